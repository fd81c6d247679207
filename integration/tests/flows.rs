//! Flows through whole meshes while the endpoints of their service are added and removed: which endpoint a flow gets,
//! and that flows leave removed endpoints.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use serde_json::{Value, json};
use weft::demo::hosts::Host;
use weft_integration::mesh::{self, TestMesh};
use weft_integration::wait::{DEADLINE, eventually};

/// A UDP client that only sends, and UDP endpoints that only receive.
struct OneWay {
    client: UdpSocket,
    endpoints: Vec<UdpSocket>,
    service: SocketAddr,
    /// Number of datagrams, of one byte each, that have arrived at any endpoint.
    arrived: Cell<u64>,
}

impl OneWay {
    fn start(mesh: &TestMesh) -> Self {
        let port = |address: SocketAddr| SocketAddr::new(address.ip(), address.port() + 1);
        let bind = |host: &Host, address: SocketAddr| -> UdpSocket {
            let socket = mesh.on(Some(host), || UdpSocket::bind(address));
            let socket = socket.expect("the address is free");
            socket.set_nonblocking(true).expect("the socket can be made non-blocking");
            socket
        };
        let endpoints = mesh.orders.iter().enumerate();
        let endpoints =
            endpoints.map(|(n, workload)| bind(&workload.host, port(mesh.sink_endpoint(n))));
        let any = match mesh.sink() {
            SocketAddr::V4(_) => SocketAddr::from(([0; 4], 4444)),
            SocketAddr::V6(_) => SocketAddr::from(([0u16; 8], 4444)),
        };
        Self {
            endpoints: endpoints.collect(),
            client: bind(&mesh.client, any),
            service: port(mesh.sink()),
            arrived: Cell::new(0),
        }
    }

    /// Sends a datagram and returns the endpoints that have received any since the last call.
    fn send(&self) -> Vec<usize> {
        // Errors are ignored: the kernel may report an unreachable endpoint.
        drop(self.client.send_to(b"?", self.service));
        std::thread::yield_now();
        let received = |endpoint: &UdpSocket| {
            let datagrams = std::iter::from_fn(|| endpoint.recv(&mut [0; 8]).ok()).count() as u64;
            self.arrived.set(self.arrived.get() + datagrams);
            datagrams > 0
        };
        let reached = self.endpoints.iter().enumerate().filter(|(_, endpoint)| received(endpoint));
        reached.map(|(number, _)| number).collect()
    }

    /// Sends until only this endpoint receives datagrams, then 500 more, none of which may reach another endpoint.
    fn assert_reaches_only(&self, number: usize) {
        eventually(format!("endpoint {number} is reached"), || {
            (self.send() == [number]).then_some(())
        });
        for _ in 0..500 {
            let reached = self.send();
            assert!(reached.iter().all(|at| *at == number), "endpoints {reached:?} were reached");
        }
    }

    /// Sends until no endpoint receives datagrams, then 500 more.
    fn assert_reaches_none(&self) {
        let mut unreceived = 0;
        eventually("no endpoint is reached", || {
            unreceived = if self.send().is_empty() { unreceived + 1 } else { 0 };
            (unreceived > 50).then_some(())
        });
        for _ in 0..500 {
            assert_eq!(self.send(), Vec::<usize>::new());
        }
    }
}

fn assert_datagrams_leave_removed_endpoint(family: mesh::MeshIpFamily, path: &str) {
    let mut mesh = TestMesh::builder().family(family).agent_arguments(&["--path", path]).start();
    let flow = OneWay::start(&mesh);
    let first = eventually("an endpoint is reached", || flow.send().first().copied());
    let other = 1 - first;
    flow.assert_reaches_only(first);
    let arrived = flow.arrived.get();
    assert!(arrived > 100, "{arrived} of more than 500 datagrams arrived");
    mesh.change_sink(&[other]);
    flow.assert_reaches_only(other);
    let record = mesh.agent.process.line_with(":7101\"");
    let record: Value = serde_json::from_str(&record).expect("a record is JSON");
    let expected = if path == "proxy" {
        ["proxy", "endpoint_removed"]
    } else {
        ["kernel", "conntrack_entry_removed"]
    };
    let logged = ["data_path", "connection_termination_details"]
        .map(|field| record.get(field).and_then(Value::as_str));
    assert_eq!(logged, expected.map(Some), "{record}");
    let received = record.get("bytes_received").and_then(Value::as_u64);
    assert!(received >= Some(arrived), "{arrived} arrived: {record}");
    mesh.change_sink(&[]);
    flow.assert_reaches_none();
    mesh.change_sink(&[first]);
    flow.assert_reaches_only(first);
    mesh.assert_healthy();
}

#[test]
fn datagrams_leave_a_removed_endpoint_on_the_kernel_path() {
    assert_datagrams_leave_removed_endpoint(mesh::MeshIpFamily::V4, "auto");
}

#[test]
fn datagrams_leave_a_removed_endpoint_on_the_kernel_path_over_ipv6() {
    assert_datagrams_leave_removed_endpoint(mesh::MeshIpFamily::V6, "auto");
}

#[test]
fn datagrams_leave_a_removed_endpoint_on_the_proxy_path() {
    assert_datagrams_leave_removed_endpoint(mesh::MeshIpFamily::V4, "proxy");
}

#[test]
fn datagrams_leave_a_removed_endpoint_on_the_proxy_path_over_ipv6() {
    assert_datagrams_leave_removed_endpoint(mesh::MeshIpFamily::V6, "proxy");
}

/// Binds a blocking TCP listener on a host.
fn listen_on(mesh: &TestMesh, host: &Host, address: SocketAddr) -> TcpListener {
    mesh.on(Some(host), || TcpListener::bind(address)).expect("the port is free")
}

fn connect(mesh: &TestMesh, host: &Host, to: SocketAddr) -> TcpStream {
    let stream = mesh.on(Some(host), || TcpStream::connect_timeout(&to, DEADLINE));
    let stream = stream.expect("the connection is accepted");
    stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    stream
}

/// Asserts that bytes sent on one side arrive on the other.
fn assert_delivers(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"hello").expect("the bytes are sent");
    let mut received = [0; 5];
    to.read_exact(&mut received).expect("the bytes arrive");
    assert_eq!(&received, b"hello");
}

/// Connects until twelve consecutive connections reach this listener. Returns both ends of the last one.
fn connect_until_stable(mesh: &TestMesh, listener: &TcpListener) -> (TcpStream, TcpStream) {
    listener.set_nonblocking(true).expect("the listener can be made non-blocking");
    let mut consecutive = 0;
    let pair = eventually("new connections reach the endpoint", || {
        let client = connect(mesh, &mesh.client, mesh.sink());
        let Ok((accepted, _)) = listener.accept() else {
            consecutive = 0;
            return None;
        };
        consecutive += 1;
        accepted.set_nonblocking(false).expect("the connection can be made blocking");
        accepted.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        (consecutive == 12).then_some((client, accepted))
    });
    listener.set_nonblocking(false).expect("the listener can be made blocking");
    pair
}

fn assert_removed_endpoint_drains_then_resets(family: mesh::MeshIpFamily) {
    let mut mesh =
        TestMesh::builder().family(family).agent_arguments(&["--endpoint-drain", "3"]).start();
    let listeners: Vec<TcpListener> = (0..)
        .zip(&mesh.orders)
        .map(|(n, workload)| listen_on(&mesh, &workload.host, mesh.sink_endpoint(n)))
        .collect();
    let [listener, other] = listeners.as_slice() else { unreachable!("orders has two endpoints") };
    mesh.change_sink(&[0]);
    let mut pairs = [connect_until_stable(&mesh, listener), connect_until_stable(&mesh, listener)];
    mesh.change_sink(&[1]);
    drop(connect_until_stable(&mesh, other));
    for (client, endpoint) in &mut pairs {
        assert_delivers(client, endpoint);
        assert_delivers(endpoint, client);
    }
    let [(by_client, _), (_, by_endpoint)] = &mut pairs;
    for side in [by_client, by_endpoint] {
        eventually("the connection is reset", || {
            let sent = side.write_all(b"?").and_then(|()| {
                side.set_nonblocking(true)?;
                side.read(&mut [0; 8])
            });
            // Before the drain timeout the read blocks. After it, the write or the read reports the reset.
            let error = sent.expect_err("the other side sends nothing").kind();
            [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error).then_some(())
        });
    }
    mesh.assert_healthy();
}

#[test]
fn connections_to_a_removed_endpoint_are_reset_after_the_drain_timeout() {
    assert_removed_endpoint_drains_then_resets(mesh::MeshIpFamily::V4);
}

#[test]
fn connections_to_a_removed_endpoint_are_reset_after_the_drain_timeout_over_ipv6() {
    assert_removed_endpoint_drains_then_resets(mesh::MeshIpFamily::V6);
}

#[test]
fn endpoint_reaches_itself_through_the_virtual_ip() {
    let mut mesh = TestMesh::builder().start();
    let host = mesh.host("both");
    mesh.change(|file| file.service("sink").set_endpoints(&[host.address.into()]));
    let listener =
        listen_on(&mesh, &host, SocketAddr::new(host.address.into(), mesh.sink().port()));
    let sink = mesh.sink();
    let mut client = eventually("the endpoint is reachable", || {
        mesh.on(Some(&host), || TcpStream::connect_timeout(&sink, DEADLINE)).ok()
    });
    let (mut endpoint, from) = listener.accept().expect("the client connects");
    endpoint.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    assert_ne!(
        from.ip(),
        host.address,
        "with its own source address, the host would not route the response back through NAT"
    );
    assert_delivers(&mut client, &mut endpoint);
}

/// The endpoints of the echo service that 16 new flows of the client reach.
fn reached_endpoints(mesh: &TestMesh) -> BTreeSet<String> {
    let flows = std::iter::repeat_with(|| mesh.open_flow().expect("the echo service greets").1);
    flows.take(16).collect()
}

fn assert_affinity(path: &str) {
    let mut mesh = TestMesh::builder().agent_arguments(&["--path", path]).start();
    assert_eq!(reached_endpoints(&mesh).len(), 2, "flows are spread over both endpoints");
    mesh.change(|file| file.service("echo").set("affinity", json!("client_address")));
    eventually("all flows of a client reach the same endpoint", || {
        (reached_endpoints(&mesh).len() == 1).then_some(())
    });
    mesh.assert_healthy();
}

#[test]
fn client_address_affinity_sends_all_flows_to_one_endpoint_on_the_kernel_path() {
    assert_affinity("auto");
}

#[test]
fn client_address_affinity_sends_all_flows_to_one_endpoint_on_the_proxy_path() {
    assert_affinity("proxy");
}

/// Total and open TCP flows of the echo service, from the agent's configuration dump.
fn reported_flows(mesh: &TestMesh) -> (u64, u64) {
    let dump: Value = serde_json::from_str(&mesh.agent.admin("/config_dump").text()).expect("JSON");
    let at = format!(" {}", mesh.echo().ip());
    let is_echo = |service: &&Value| {
        let name = service["listener"].as_str().unwrap_or_default();
        name.starts_with("echo") && name.ends_with(&at) && !name.contains("/udp")
    };
    let services = dump.get("services").and_then(Value::as_array).expect("the dump lists services");
    let echo = services.iter().find(is_echo).expect("the dump lists the echo service");
    let number = |field: &str| echo[field].as_u64().expect("the field is a number");
    (number("flows"), number("flows_open"))
}

fn assert_flows_are_reported(path: &str) {
    let mesh = TestMesh::builder().agent_arguments(&["--path", path]).start();
    let (before, _) = reported_flows(&mesh);
    let flows: Vec<_> = (0..5).map(|_| mesh.open_flow().expect("the service greets")).collect();
    let open = 5;
    eventually("five flows are open", || {
        (reported_flows(&mesh) == (before + 5, open)).then_some(())
    });
    drop(flows);
    eventually("no flow is open", || (reported_flows(&mesh) == (before + 5, 0)).then_some(()));
}

#[test]
fn flows_of_a_service_are_reported_on_the_kernel_path() {
    assert_flows_are_reported("auto");
}

#[test]
fn flows_of_a_service_are_reported_on_the_proxy_path() {
    assert_flows_are_reported("proxy");
}
