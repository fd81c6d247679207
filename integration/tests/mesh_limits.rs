//! `http.limits` and `http.timeouts` of `mesh.yaml`, through the sidecars of the client and of the
//! service.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use weft_integration::curl::{Curl, CurlResponse};
use weft_integration::mesh::{MeshWorkload, TestMesh};
use weft_integration::mesh_pki::text;
use weft_integration::wait::eventually;

/// The port of `orders` and `web` in the mesh.
const PORT: u16 = 80;

/// The port of a service's program.
const PROGRAM: u16 = 8080;
/// The port of a server that reads requests and never responds.
const SILENT: u16 = 7200;

fn set_http(mesh: &mut TestMesh, service: &str, target: u16, http: &Value) {
    mesh.change(|file| {
        let port = json!({"port": PORT, "target": target, "protocol": "http", "http": http});
        file.service(service).set_first_port(port);
    });
}

/// The response to a request with a header of this size.
fn ask_with(curl: Curl, bytes: usize) -> CurlResponse {
    curl.with(&["--header", &format!("x-large: {}", "x".repeat(bytes))]).run()
}

/// A request of the program of `web` to `orders`, through both sidecars.
fn ask_orders(mesh: &TestMesh, bytes: usize) -> CurlResponse {
    let url = format!("http://{}/orders", mesh.orders_at(PORT));
    mesh.on(Some(&mesh.web.host), || ask_with(Curl::to(url), bytes))
}

/// A request of the client without sidecar to `web`, through the sidecar of `web` only. It uses
/// HTTP/1.1: curl sends at most 64 KiB of headers over HTTP/2.
fn ask_web(mesh: &TestMesh, bytes: usize) -> CurlResponse {
    let identity = &mesh.identity;
    let arguments = [
        "--http1.1",
        "--insecure",
        "--cert",
        text(&identity.certificate),
        "--key",
        text(&identity.key),
    ];
    let curl = Curl::to(format!("https://{}/", mesh.web_at(PORT))).with(&arguments);
    mesh.on(Some(&mesh.client), || ask_with(curl, bytes))
}

fn wait_for_status(what: &str, status: u16, ask: impl Fn() -> CurlResponse) {
    eventually(what, || (ask().status == status).then_some(()));
}

#[test]
fn configured_header_limits_apply_in_both_sidecars() {
    let mut mesh = TestMesh::builder().start();
    assert_eq!(ask_orders(&mesh, 56 << 10).status, 200, "the default is 60 KiB");
    let refused = ask_orders(&mesh, 80 << 10);
    assert_eq!(refused.status, 431, "{refused:?}");

    set_http(&mut mesh, "orders", PROGRAM, &json!({"limits": {"request_headers_kib": 96}}));
    wait_for_status("80 KiB of headers are accepted with a limit of 96", 200, || {
        ask_orders(&mesh, 80 << 10)
    });
    assert_eq!(ask_orders(&mesh, 100 << 10).status, 431);
    let refused = ask_web(&mesh, 80 << 10);
    assert_eq!(refused.status, 431, "the limit of another service is unchanged: {refused:?}");

    set_http(&mut mesh, "orders", PROGRAM, &json!({"limits": {"request_headers_kib": 8}}));
    wait_for_status("9 KiB of headers are rejected with a limit of 8", 431, || {
        ask_orders(&mesh, 9 << 10)
    });
    assert_eq!(ask_orders(&mesh, 6 << 10).status, 200);

    // The sidecar of the service enforces the limit too: this client has no sidecar.
    set_http(
        &mut mesh,
        "web",
        PROGRAM,
        &json!({"limits": {"request_headers_kib": 8, "response_headers": 1000}}),
    );
    wait_for_status("the sidecar of the service rejects the request", 431, || {
        ask_web(&mesh, 9 << 10)
    });
    assert_eq!(ask_web(&mesh, 6 << 10).status, 200);
}

fn listen(mesh: &TestMesh, workload: &MeshWorkload) -> TcpListener {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, SILENT));
    mesh.on(Some(&workload.host), bind).expect("the port is free")
}

#[test]
fn upload_idle_for_longer_than_the_stream_idle_timeout_gets_408() {
    let mut mesh = TestMesh::builder().start();
    let silent: Vec<TcpListener> = mesh.orders.iter().map(|one| listen(&mesh, one)).collect();
    set_http(&mut mesh, "orders", SILENT, &json!({"timeouts": {"stream_idle": "2s"}}));
    eventually("the new timeout is in force", || {
        let orders = mesh.orders_at(PORT);
        let connected = mesh.on(Some(&mesh.web.host), || TcpStream::connect(orders));
        let mut stream = connected.expect("the sidecar listens");
        // With the default timeout of five minutes, no response is sent in this time.
        stream.set_read_timeout(Some(Duration::from_secs(6))).expect("the timeout is not zero");
        // The policy of `orders` allows GET.
        let head = "GET /orders HTTP/1.1\r\nhost: orders\r\ncontent-length: 5\r\n\r\nab";
        stream.write_all(head.as_bytes()).expect("the sidecar reads a head");
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).ok()?;
        (&answer == b"HTTP/1.1 408").then_some(())
    });
    drop(silent);
}
