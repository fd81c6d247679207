//! Configuration that cannot be served: `--check` fails, and the process is not ready.

use std::net::SocketAddr;
use std::process::Output;

use serde_json::{Value, json};
use tempfile::TempDir;
use weft_integration::bootstrap::{
    UpstreamHttp, bootstrap, cluster, http, listener, route_to, tcp_listener, udp_listener,
};
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::process::{Process, weft};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::tls_contexts::{mutual_tls, verify_mode};
use weft_integration::wait::eventually;

/// A role with a configuration file.
struct RoleWithConfig {
    role: &'static str,
    admin: u16,
    folder: TempDir,
}

impl RoleWithConfig {
    fn new(role: &'static str, listeners: &[Value], clusters: &[Value]) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let admin = port::free();
        let config = bootstrap(admin, listeners, clusters);
        std::fs::write(folder.path().join("c.json"), config.to_string())
            .expect("the folder is writable");
        Self { role, admin, folder }
    }

    fn check(&self) -> Output {
        let mut command = weft();
        command.args([self.role, "--check-config", "-c"]).arg(self.folder.path().join("c.json"));
        command.output().expect("weft can be started")
    }

    #[track_caller]
    fn assert_check_fails(&self, reason: &str) {
        let output = self.check();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{complaint}");
        assert!(complaint.contains(reason) && complaint.contains("c.json: "), "{complaint}");
    }

    fn start(&self) -> Process {
        let mut command = weft();
        command.args([self.role, "--workers", "1", "-c"]).arg(self.folder.path().join("c.json"));
        Process::start(self.role, &mut command)
    }

    #[track_caller]
    fn wait_until_unready(&self, process: &Process, reason: &str) {
        eventually(format!("{process:?} is not ready: {reason}"), || {
            let answer = Curl::get(self.admin, "/ready").run();
            (answer.status == 503 && answer.text().contains(reason)).then_some(())
        });
    }

    #[track_caller]
    fn wait_until_ready(&self, process: &Process) {
        eventually(format!("{process:?} is ready"), || {
            (Curl::get(self.admin, "/ready").run().status == 200).then_some(())
        });
    }
}

fn web(name: &str, port: u16) -> Value {
    listener(name, port, http(&route_to("service", 5), &[]), None)
}

fn service() -> Value {
    let backend = ScriptedServer::replying_once("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    cluster("service", &[backend.port], UpstreamHttp::Http1, None)
}

fn at(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

#[test]
fn http_listener_in_an_agent_fails_the_check_and_readiness() {
    let open = port::free();
    let tcp = tcp_listener("tcp", at(open), json!({"cluster": "service"}));
    let case = RoleWithConfig::new("agent", &[tcp.clone(), web("web", port::free())], &[service()]);
    case.assert_check_fails("listener \"web\" is not served: it serves HTTP");
    let agent = case.start();
    case.wait_until_unready(&agent, "listener \"web\" is not served");
    // The other listeners are served.
    assert_eq!(Curl::get(open, "/").run().status, 200);
    let good = RoleWithConfig::new("agent", &[tcp], &[service()]);
    assert_eq!(good.check().status.code(), Some(0));
}

#[test]
fn udp_listener_in_a_sidecar_fails_the_check_and_readiness() {
    let udp = udp_listener("udp", at(port::free()), "service", json!({}));
    let case = RoleWithConfig::new("sidecar", &[web("web", port::free()), udp], &[service()]);
    case.assert_check_fails("listener \"udp\" is for UDP");
    case.wait_until_unready(&case.start(), "listener \"udp\" is for UDP");
}

#[test]
fn two_listeners_with_one_address_fail_the_check_and_readiness() {
    for role in ["agent", "sidecar"] {
        let port = port::free();
        let tcp = |name| tcp_listener(name, at(port), json!({"cluster": "service"}));
        let case = RoleWithConfig::new(role, &[tcp("one"), tcp("two")], &[service()]);
        let reason =
            format!("listener \"two\": address 127.0.0.1:{port} is already used by listener");
        case.assert_check_fails(&reason);
        case.wait_until_unready(&case.start(), &reason);
    }
}

#[test]
fn missing_certificate_file_fails_the_check_and_readiness_until_it_exists() {
    let pki = MeshPki::create();
    let own = pki.issue("server");
    let tls = verify_mode(&own, &pki.root(), &pki.crl_file());
    let secure = listener("secure", port::free(), http(&route_to("service", 5), &[]), Some(tls));
    let case = RoleWithConfig::new("sidecar", &[web("web", port::free()), secure], &[service()]);
    assert_eq!(case.check().status.code(), Some(0));
    let hidden = own.certificate.with_extension("hidden");
    std::fs::rename(&own.certificate, &hidden).expect("the file exists");
    case.assert_check_fails("listener \"secure\"");
    let sidecar = case.start();
    case.wait_until_unready(&sidecar, "listener \"secure\"");
    std::fs::rename(&hidden, &own.certificate).expect("the file exists");
    case.wait_until_ready(&sidecar);
}

#[test]
fn missing_certificate_of_a_cluster_fails_the_check_and_keeps_a_new_process_unready() {
    let pki = MeshPki::create();
    let own = pki.issue("client");
    let tls = mutual_tls(&own, &pki.root(), "server");
    let secure = cluster("secure", &[port::free()], UpstreamHttp::Http1, Some(tls));
    let hide = || std::fs::remove_file(&own.key).expect("the file exists");
    let case = RoleWithConfig::new("sidecar", &[web("web", port::free())], &[service(), secure]);
    assert_eq!(case.check().status.code(), Some(0));
    hide();
    case.assert_check_fails("cluster \"secure\"");
    case.wait_until_unready(&case.start(), "cluster \"secure\"");
}
