//! Results of TLS handshakes: the access line, the counter, the alert, and the headers that describe the certificate.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use weft_integration::authority::{PemIdentity, TestAuthority};
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::{IdentityFiles, MeshPki, PythonPki, text};
use weft_integration::process::run;
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::tls_client::{TlsClient, client_config, client_config_trusting};
use weft_integration::tls_contexts::{TestTls, verify_mode};

fn start(
    root: &std::path::Path,
    crls: &std::path::Path,
    server: &IdentityFiles,
    ours: Value,
) -> SingleSidecar {
    let mut wanted = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    );
    wanted.tls = Some(verify_mode(server, root, crls));
    wanted.weft_metadata = ours;
    wanted.with("forward_client_cert_details", json!("SANITIZE_SET")).start()
}

fn ask(alone: &SingleSidecar, client: Option<&IdentityFiles>) -> (u16, String) {
    let mut arguments = vec!["--insecure", "--http1.1"];
    if let Some(client) = client {
        arguments.extend(["--cert", text(&client.certificate), "--key", text(&client.key)]);
    }
    let answer = Curl::to(format!("https://127.0.0.1:{}/", alone.port)).with(&arguments).run();
    (answer.status, answer.text())
}

#[test]
fn handshake_results_are_logged_with_their_reason_and_counted() {
    let hands = PythonPki::create();
    let alone = start(&hands.root(), &hands.crl_file(), &hands.identity("good"), json!({}));
    let check = |client: Option<&IdentityFiles>, result: &str| {
        let (answered, _) = ask(&alone, client);
        assert_eq!(answered == 200, result == "success", "{result}");
        // A readiness probe that only connects leaves an access line too.
        let line = alone.access_line(&format!(":\"{result}\""));
        assert!(line["conn_trace_id"].as_str().unwrap().starts_with("TID_"), "{line}");
        line
    };
    let unmapped = "weft_sidecar_tls_handshake_failures_total{reason=\"UnmappedConnectionError\"}";
    let before = alone.metric(unmapped);
    let line = check(Some(&hands.identity("good")), "success");
    assert_eq!(line["downstream_tls_version"], "TLSv1.3", "{line}");
    let group = line["downstream_tls_group"].as_str().unwrap();
    assert!(group.contains("X25519"), "{line}");
    assert!(line["downstream_peer_cert_v_start"].as_str().unwrap().starts_with("20"), "{line}");
    let request = alone.access_line("\"kind\":\"http\"");
    assert_eq!(request["conn_trace_id"], line["conn_trace_id"]);
    assert_eq!(request["downstream_tls_version"], "TLSv1.3", "{request}");

    let line = check(Some(&hands.identity("expired")), "ClientCertExpired");
    assert!(line["downstream_peer_subject"].is_string(), "{line}");
    check(Some(&hands.identity("revoked")), "ClientCertCrlHit");
    let others = MeshPki::create();
    check(Some(&others.issue("web")), "ClientCertUntrusted");
    check(None, "UnmappedConnectionError");
    for word in ["ClientCertExpired", "ClientCertCrlHit", "ClientCertUntrusted"] {
        let name = format!("weft_sidecar_tls_handshake_failures_total{{reason=\"{word}\"}}");
        assert_eq!(alone.metric(&name), 1, "{word}");
    }
    assert_eq!(alone.metric(unmapped), before + 1);
    assert_eq!(alone.metric("weft_sidecar_tls_handshake_failures_total"), before + 4);
}

#[test]
fn service_receives_the_whole_client_certificate_where_configured() {
    let hands = PythonPki::create();
    let client = hands.identity("good");
    let whole = json!({"client_certificate": "whole"});
    let alone = start(&hands.root(), &hands.crl_file(), &client, whole);
    let (status, head) = ask(&alone, Some(&client));
    assert_eq!(status, 200);
    let header = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("{name} in {head}")).to_owned()
    };
    let openssl = |arguments: &[&str]| {
        let mut command = Command::new("openssl");
        command.args(["x509", "-noout", "-in", text(&client.certificate)]).args(arguments);
        let output = run(&mut command);
        output.trim().split_once('=').unwrap().1.to_owned()
    };
    let rfc2253 = ["-nameopt", "RFC2253"];
    assert_eq!(
        header("x-amzn-mtls-clientcert-subject"),
        openssl(&[&["-subject"][..], &rfc2253].concat())
    );
    assert_eq!(
        header("x-amzn-mtls-clientcert-issuer"),
        openssl(&[&["-issuer"][..], &rfc2253].concat())
    );
    assert_eq!(header("x-amzn-mtls-clientcert-serial-number"), openssl(&["-serial"]));
    let dates = |option| openssl(&[option, "-dateopt", "iso_8601"]).replace(' ', "T");
    let validity = format!("NotBefore={};NotAfter={}", dates("-startdate"), dates("-enddate"));
    assert_eq!(header("x-amzn-mtls-clientcert-validity"), validity);
    let leaf = header("x-amzn-mtls-clientcert-leaf").replace("%20", " ").replace("%0A", "\n");
    let chain = std::fs::read_to_string(&client.certificate).unwrap();
    assert!(chain.replace('\r', "").starts_with(&leaf), "{leaf}");
    let plain = start(&hands.root(), &hands.crl_file(), &client, json!({}));
    let (_, head) = ask(&plain, Some(&client));
    assert!(!head.contains("clientcert-leaf") && head.contains("clientcert-serial-number"));
}

#[test]
fn unverified_client_certificate_is_forwarded_whole_and_is_no_identity() {
    let hands = PythonPki::create();
    let server = hands.identity("good");
    let start = |required: bool, filters: &[Value]| {
        let mut wanted = SingleSidecarConfig::for_upstream(
            ScriptedServer::echoing_heads().port,
            UpstreamHttp::Http1,
        )
        .with("forward_client_cert_details", json!("SANITIZE_SET"));
        let tls = TestTls::listener(&server, &hands.root()).unverified();
        wanted.tls = Some(tls.requires_certificate(required).socket());
        wanted.filters = filters.to_vec();
        wanted.start()
    };
    let alone = start(true, &[]);
    for client in
        [hands.identity("good"), hands.identity("revoked"), MeshPki::create().issue("web")]
    {
        let (status, head) = ask(&alone, Some(&client));
        assert_eq!(status, 200);
        let named = |line: &&str| line.contains("cert") || line.contains("x-weft");
        let headers: Vec<&str> = head.lines().filter(named).collect();
        let [header] = headers[..] else { panic!("one header expected: {headers:?}") };
        let value = header.strip_prefix("x-amzn-mtls-clientcert: ").unwrap();
        let value = value.replace("%20", " ").replace("%0A", "\n");
        let sent = std::fs::read_to_string(&client.certificate).unwrap().replace('\r', "");
        assert_eq!(value, sent);
    }
    // The sidecar has not verified the certificate.
    let line = alone.access_line("\"downstream_tls_result\":\"unverified\"");
    assert!(line["downstream_peer_uri_san"].is_null(), "{line}");
    assert_eq!(ask(&alone, None).0, 0, "a client certificate is required");
    let optional = start(false, &[]);
    let forged = ["--insecure", "-H", "X-Amzn-Mtls-Clientcert: forged"];
    let answer = Curl::to(format!("https://127.0.0.1:{}/", optional.port)).with(&forged).run();
    assert_eq!(
        (answer.status, answer.text().contains("forged")),
        (200, false),
        "{}",
        answer.text()
    );

    // A policy that requires an authenticated principal, of any name, refuses an unverified certificate.
    let authenticated = json!({"policies": {"authenticated": {
        "permissions": [{"any": true}], "principals": [{"authenticated": {}}]}}});
    let kind = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
    let rbac = json!({"name": "rbac", "typed_config": {"@type": kind, "rules": authenticated}});
    let guarded = start(true, &[rbac]);
    assert_eq!(ask(&guarded, Some(&server)).0, 403);

    // Sessions with unverified certificates are not resumed.
    let signer = TestAuthority::create();
    let holder = signer.sign("web", Duration::from_secs(3600));
    let config = client_config_trusting(
        std::str::from_utf8(&std::fs::read(hands.root()).unwrap()).unwrap(),
        &holder,
        "good",
        "http/1.1",
    );
    for _ in 0..2 {
        let mut caller = TlsClient::connect(alone.port, &config);
        assert_eq!((caller.ask("/"), caller.is_resumed()), (Some(200), false));
    }
}

#[test]
fn refused_client_gets_an_alert_with_the_reason() {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let signer = TestAuthority::create();
    let untrusted = TestAuthority::create();
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let alone = start(&signer.root(), &signer.crl_file(), &server, json!({}));
    let holder = signer.sign("web", DAY);
    let alert = |config| {
        let mut caller = TlsClient::connect(alone.port, &config);
        caller.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n");
        caller.alert()
    };
    let as_holder = |holder: &PemIdentity| client_config(&signer, holder, "server", "http/1.1");
    assert_eq!(alert(as_holder(&holder)), None);
    let foreign =
        client_config_trusting(signer.roots(), &untrusted.sign("web", DAY), "server", "http/1.1");
    assert_eq!(alert(foreign).as_deref(), Some("CertificateUnknown"));
    signer.revoke(&[&holder.serial]);
    weft_integration::wait::eventually("the CRL is in force", || {
        (alone.metric("weft_sidecar_crl_revoked_certificates") == 1).then_some(())
    });
    assert_eq!(alert(as_holder(&holder)).as_deref(), Some("CertificateRevoked"));
}

#[test]
fn key_exchange_uses_the_configured_groups() {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let signer = TestAuthority::create();
    let server = signer.write_files("server", &signer.sign("server", DAY));
    let holder = signer.sign("web", DAY);
    let client = signer.write_files("client", &holder);
    let check = |groups: Value, post_quantum: Option<&str>, classical: Option<&str>| {
        let mut wanted = SingleSidecarConfig::for_upstream(
            ScriptedServer::echoing_heads().port,
            UpstreamHttp::Http1,
        );
        let tls = TestTls::listener(&server, &signer.root()).crls(&signer.crl_file());
        wanted.tls = Some(tls.parameters(json!({"ecdh_curves": groups})).socket());
        let alone = wanted.start();
        let logged_group = || {
            let line = alone.access_line("\"downstream_tls_result\":\"success\"");
            assert_eq!(line["downstream_tls_cipher"], "TLS13_AES_128_GCM_SHA256", "{line}");
            line["downstream_tls_group"].as_str().unwrap().to_owned()
        };
        let mut caller =
            TlsClient::connect(alone.port, &client_config(&signer, &holder, "server", "http/1.1"));
        assert_eq!(caller.ask("/").is_some(), post_quantum.is_some(), "{groups}");
        assert_eq!(post_quantum.map(|_| logged_group()).as_deref(), post_quantum, "{groups}");
        // curl does not support ML-KEM.
        assert_eq!(ask(&alone, Some(&client)).0 == 200, classical.is_some(), "{groups}");
        assert_eq!(classical.map(|_| logged_group()).as_deref(), classical, "{groups}");
    };
    check(json!([]), Some("X25519MLKEM768"), Some("X25519"));
    check(json!(["X25519MLKEM768"]), Some("X25519MLKEM768"), None);
    check(json!(["X25519", "P-256"]), Some("X25519"), Some("X25519"));
    check(json!(["P-384"]), Some("secp384r1"), Some("secp384r1"));
}
