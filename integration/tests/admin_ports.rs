//! The admin, metrics and readiness ports: what each port serves, which clients may use it, and how it copes with slow
//! clients.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use serde_json::json;
use weft_integration::bootstrap::{bootstrap, http, listener};
use weft_integration::curl::{Curl, CurlResponse};
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::process::{Process, ip, weft};
use weft_integration::wait::{DEADLINE, eventually};

/// An address of this host that is not a loopback address.
const OUTSIDE: &str = "10.9.9.1";

struct Ports {
    process: Process,
    admin: String,
    metrics: u16,
    readiness: u16,
    _folder: MeshPki,
}

impl Ports {
    /// Starts a sidecar whose admin port listens on an address of this host.
    fn start(host: &str, arguments: &[&str]) -> Self {
        let folder = MeshPki::create();
        let admin = format!("{host}:{}", port::free());
        let metrics = port::free();
        let readiness = port::free();
        let answer = json!({"status": 200, "body": {"inline_string": "x".repeat(3000)}});
        let route = json!({"match": {"prefix": "/"}, "direct_response": answer});
        let listeners: Vec<_> = (0..200)
            .map(|n| listener(&format!("l{n}"), port::free(), http(&route, &[]), None))
            .collect();
        let file = folder.path("sidecar.json");
        std::fs::write(&file, bootstrap(1, &listeners, &[]).to_string())
            .expect("the folder is writable");
        let mut command = weft();
        command.args(["sidecar", "--workers", "1", "--admin", &admin]);
        command.args(["--metrics", &format!("127.0.0.1:{metrics}")]);
        command.args(["--readiness", &format!("127.0.0.1:{readiness}")]);
        let process = Process::start("sidecar", command.args(arguments).arg("-c").arg(file));
        let ports = Self { process, admin, metrics, readiness, _folder: folder };
        eventually("the sidecar is ready", || {
            (Curl::get(readiness, "/ready").run().status == 200).then_some(())
        });
        ports
    }

    fn ask(&self, path: &str, arguments: &[&str]) -> CurlResponse {
        Curl::to(format!("http://{}{path}", self.admin)).with(arguments).run()
    }
}

/// Opens clients that keep a port busy: some never finish their request, others never read the response.
fn slow_clients(address: &str, path: &str) -> Vec<TcpStream> {
    let client = |number: usize| {
        let mut stream = TcpStream::connect(address).expect("the port accepts connections");
        let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n");
        let end = if number.is_multiple_of(2) { "\r\n" } else { "" };
        // Pipelined, so that the responses fill every buffer on the way.
        let requests =
            [request.as_str(), end].concat().repeat(if number.is_multiple_of(2) { 20 } else { 1 });
        stream.write_all(requests.as_bytes()).expect("the connection is open");
        stream
    };
    (0..64).map(client).collect()
}

#[test]
fn slow_connections_do_not_block_other_clients_on_any_port() {
    let ports = Ports::start("127.0.0.1", &[]);
    let [metrics, readiness] =
        [ports.metrics, ports.readiness].map(|port| format!("127.0.0.1:{port}"));
    let mut slow = slow_clients(&ports.admin, "/config_dump");
    slow.extend(slow_clients(&metrics, "/metrics"));
    slow.extend(slow_clients(&readiness, "/ready"));
    for _ in 0..3 {
        for path in ["/live", "/ready", "/metrics"] {
            assert_eq!(ports.ask(path, &["--max-time", "5"]).status, 200, "{path}");
        }
        let quick = |port, path| Curl::get(port, path).with(&["--max-time", "5"]).run().status;
        assert_eq!(quick(ports.metrics, "/metrics"), 200);
        assert_eq!(quick(ports.readiness, "/ready"), 200);
        assert_eq!(quick(ports.readiness, "/live"), 200);
    }
    // The slow connections time out, also while no other request arrives.
    for mut stream in slow {
        stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        let mut rest = Vec::new();
        let ended = stream.read_to_end(&mut rest).map_err(|error| error.kind());
        assert!(
            !matches!(ended, Err(std::io::ErrorKind::WouldBlock)),
            "the slow connection is still open"
        );
    }
}

#[test]
fn metrics_and_readiness_ports_serve_nothing_else() {
    let ports = Ports::start("127.0.0.1", &[]);
    let status = |port, path, method| Curl::get(port, path).with(&["-X", method]).run().status;
    assert_eq!(status(ports.metrics, "/metrics", "GET"), 200);
    assert_eq!(status(ports.readiness, "/live", "GET"), 200);
    for path in ["/drain", "/logging?level=debug", "/config_dump", "/"] {
        for port in [ports.metrics, ports.readiness] {
            assert_eq!(status(port, path, "POST"), 404, "{path}");
            assert_eq!(status(port, path, "GET"), 404, "{path}");
        }
    }
    assert_eq!(status(ports.metrics, "/ready", "GET"), 404);
    assert_eq!(status(ports.readiness, "/metrics", "GET"), 404);
    // A scraper may use any host name.
    let named = Curl::get(ports.metrics, "/metrics").with(&["-H", "host: web.example"]).run();
    assert_eq!(named.status, 200);
}

#[test]
fn cross_site_requests_to_the_admin_port_are_refused_with_403() {
    let mut ports = Ports::start("127.0.0.1", &["--admin-host", "weft.example"]);
    for header in [
        "origin: http://evil.example",
        "origin: null",
        "sec-fetch-site: cross-site",
        "host: evil.example",
    ] {
        let refused = ports.ask("/drain", &["-X", "POST", "-H", header]);
        assert_eq!(refused.status, 403, "{header}");
    }
    assert_eq!(ports.ask("/config_dump", &["-H", "host: evil.example"]).status, 403);
    assert_eq!(ports.ask("/config_dump", &["-H", "host: weft.example"]).status, 200);
    assert_eq!(
        Curl::get(ports.readiness, "/ready").run().status,
        200,
        "the sidecar does not drain"
    );
    assert!(ports.process.is_running());
    assert_eq!(ports.ask("/drain", &["-X", "POST"]).status, 202);
}

#[test]
fn admin_port_beyond_loopback_accepts_posts_only_when_allowed() {
    ip(&format!("addr add {OUTSIDE}/32 dev lo"));
    assert!(!OUTSIDE.parse::<Ipv4Addr>().expect("the constant is an IPv4 address").is_loopback());
    let guarded = Ports::start(OUTSIDE, &[]);
    for order in ["/drain", "/logging?level=debug"] {
        let refused = guarded.ask(order, &["-X", "POST"]);
        assert_eq!(refused.status, 403, "{order}");
        assert!(refused.text().contains("--allow-remote-admin-orders"), "{}", refused.text());
    }
    assert_eq!(guarded.ask("/config_dump", &[]).status, 200);
    let open = Ports::start(OUTSIDE, &["--allow-remote-admin-orders"]);
    assert_eq!(open.ask("/logging?level=debug", &["-X", "POST"]).status, 200);
}

#[test]
fn log_filter_without_a_level_is_refused_with_400_and_changes_nothing() {
    let ports = Ports::start("127.0.0.1", &[]);
    for level in ["nosuch", "", "weft_xds"] {
        let refused = ports.ask(&format!("/logging?level={level}"), &["-X", "POST"]);
        assert_eq!(refused.status, 400, "{level:?}");
        assert!(refused.text().contains("off, error, warn, info, debug"), "{}", refused.text());
    }
    assert_eq!(ports.ask("/logging", &[]).text(), "info\n");
    assert_eq!(ports.ask("/logging?level=weft_xds=trace,warn", &["-X", "POST"]).status, 200);
}
