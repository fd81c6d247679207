//! Flows of whole meshes, while the endpoints of their service come and go: which one each gets, and
//! that it leaves what is gone.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use serde_json::{Value, json};
use weft::demo::hosts::Host;
use weft_integration::mesh::{self, TestMesh};
use weft_integration::wait::{DEADLINE, eventually};

/// A client that only sends, and endpoints that only take in, all of UDP.
struct OneWay {
    client: UdpSocket,
    endpoints: Vec<UdpSocket>,
    service: SocketAddr,
    /// How many datagrams, of one byte each, have arrived at any.
    arrived: Cell<u64>,
}

impl OneWay {
    fn start(mesh: &TestMesh) -> Self {
        let port = |address: SocketAddr| SocketAddr::new(address.ip(), address.port() + 1);
        let bind = |host: &Host, address: SocketAddr| -> UdpSocket {
            let socket = mesh.on(Some(host), || UdpSocket::bind(address));
            let socket = socket.expect("the address is free");
            socket.set_nonblocking(true).expect("it can be");
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

    /// Sends a datagram and gives which endpoints have got any since.
    fn send(&self) -> Vec<usize> {
        // Nobody answers, and where there is no endpoint the kernel may say so.
        drop(self.client.send_to(b"?", self.service));
        std::thread::yield_now();
        let got = |endpoint: &UdpSocket| {
            let datagrams = std::iter::from_fn(|| endpoint.recv(&mut [0; 8]).ok()).count() as u64;
            self.arrived.set(self.arrived.get() + datagrams);
            datagrams > 0
        };
        let reached = self.endpoints.iter().enumerate().filter(|(_, endpoint)| got(endpoint));
        reached.map(|(number, _)| number).collect()
    }

    /// Sends until only this endpoint is reached, and then more, none of which may go elsewhere.
    fn reaches_only(&self, number: usize) {
        eventually(format!("endpoint {number} is reached"), || {
            (self.send() == [number]).then_some(())
        });
        for _ in 0..500 {
            let reached = self.send();
            assert!(reached.iter().all(|at| *at == number), "{reached:?} were reached");
        }
    }

    /// Sends until nobody is reached, and then more.
    fn reaches_nobody(&self) {
        let mut silent = 0;
        eventually("nobody is reached", || {
            silent = if self.send().is_empty() { silent + 1 } else { 0 };
            (silent > 50).then_some(())
        });
        for _ in 0..500 {
            assert_eq!(self.send(), Vec::<usize>::new());
        }
    }
}

fn assert_datagrams_follow_their_endpoints(family: mesh::MeshIpFamily, path: &str) {
    let mut mesh = TestMesh::start_with_agent_arguments(family, &["--path", path]);
    let flow = OneWay::start(&mesh);
    let first = eventually("an endpoint is reached", || flow.send().first().copied());
    let other = 1 - first;
    flow.reaches_only(first);
    let arrived = flow.arrived.get();
    assert!(arrived > 100, "a busy host may lose some, but not most: {arrived}");
    mesh.change_sink(&[other]);
    flow.reaches_only(other);
    let record = mesh.agent.process.line_with(":7101\"");
    let record: Value = serde_json::from_str(&record).expect("a record is JSON");
    let wanted = if path == "proxy" { ("proxy", "endpoint_gone") } else { ("kernel", "ended") };
    let told = ["path", "outcome"].map(|field| record.get(field).and_then(Value::as_str));
    assert_eq!(told, [Some(wanted.0), Some(wanted.1)], "{record}");
    let sent = record.get("bytes_sent").and_then(Value::as_u64);
    assert!(sent >= Some(arrived), "{arrived} arrived: {record}");
    mesh.change_sink(&[]);
    flow.reaches_nobody();
    mesh.change_sink(&[first]);
    flow.reaches_only(first);
    mesh.assert_healthy();
}

#[test]
fn datagrams_leave_an_endpoint_that_is_gone_by_the_kernel() {
    assert_datagrams_follow_their_endpoints(mesh::MeshIpFamily::V4, "auto");
}

#[test]
fn datagrams_leave_an_endpoint_that_is_gone_by_the_kernel_over_ipv6() {
    assert_datagrams_follow_their_endpoints(mesh::MeshIpFamily::V6, "auto");
}

#[test]
fn datagrams_leave_an_endpoint_that_is_gone_by_the_proxy() {
    assert_datagrams_follow_their_endpoints(mesh::MeshIpFamily::V4, "proxy");
}

#[test]
fn datagrams_leave_an_endpoint_that_is_gone_by_the_proxy_over_ipv6() {
    assert_datagrams_follow_their_endpoints(mesh::MeshIpFamily::V6, "proxy");
}

/// A listener on a host, which waits as long as a test does.
fn listen_on(mesh: &TestMesh, host: &Host, address: SocketAddr) -> TcpListener {
    mesh.on(Some(host), || TcpListener::bind(address)).expect("the port is free")
}

fn connect(mesh: &TestMesh, host: &Host, to: SocketAddr) -> TcpStream {
    let stream = mesh.on(Some(host), || TcpStream::connect_timeout(&to, DEADLINE));
    let stream = stream.expect("it is accepted");
    stream.set_read_timeout(Some(DEADLINE)).expect("it is above zero");
    stream
}

/// Holds that what one side says, the other hears.
fn assert_says(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"hello").expect("it is sent");
    let mut heard = [0; 5];
    to.read_exact(&mut heard).expect("it arrives");
    assert_eq!(&heard, b"hello");
}

/// Connects until a dozen connections in a row have come to this listener, and gives the last.
fn settle(mesh: &TestMesh, listener: &TcpListener) -> (TcpStream, TcpStream) {
    listener.set_nonblocking(true).expect("it can be");
    let mut row = 0;
    let pair = eventually("new connections come to the endpoint", || {
        let client = connect(mesh, &mesh.client, mesh.sink());
        let Ok((accepted, _)) = listener.accept() else {
            row = 0;
            return None;
        };
        row += 1;
        accepted.set_nonblocking(false).expect("it can be");
        accepted.set_read_timeout(Some(DEADLINE)).expect("it is above zero");
        (row == 12).then_some((client, accepted))
    });
    listener.set_nonblocking(false).expect("it can be");
    pair
}

fn assert_connections_end_at_the_deadline(family: mesh::MeshIpFamily) {
    let mut mesh = TestMesh::start_with_agent_arguments(family, &["--endpoint-drain", "3"]);
    let listeners: Vec<TcpListener> = (0..)
        .zip(&mesh.orders)
        .map(|(n, workload)| listen_on(&mesh, &workload.host, mesh.sink_endpoint(n)))
        .collect();
    let [listener, other] = listeners.as_slice() else { unreachable!("orders has two replicas") };
    mesh.change_sink(&[0]);
    let mut pairs = [settle(&mesh, listener), settle(&mesh, listener)];
    mesh.change_sink(&[1]);
    drop(settle(&mesh, other));
    for (client, endpoint) in &mut pairs {
        assert_says(client, endpoint);
        assert_says(endpoint, client);
    }
    let [(by_client, _), (_, by_endpoint)] = &mut pairs;
    for side in [by_client, by_endpoint] {
        eventually("the connection is reset when it is next heard of", || {
            let sent = side.write_all(b"?").and_then(|()| {
                side.set_nonblocking(true)?;
                side.read(&mut [0; 8])
            });
            // Until the deadline nobody answers, and then it is reset, whichever call is told of it.
            let error = sent.expect_err("nobody answers").kind();
            [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error).then_some(())
        });
    }
    mesh.assert_healthy();
}

#[test]
fn connections_of_an_endpoint_that_is_gone_have_time_and_are_then_reset() {
    assert_connections_end_at_the_deadline(mesh::MeshIpFamily::V4);
}

#[test]
fn connections_of_an_endpoint_that_is_gone_have_time_and_are_then_reset_over_ipv6() {
    assert_connections_end_at_the_deadline(mesh::MeshIpFamily::V6);
}

#[test]
fn a_host_reaches_itself_by_the_services_address() {
    let mut mesh = TestMesh::start();
    let host = mesh.host("both");
    mesh.change(|mesh| mesh["services"][3]["endpoints"] = json!([{"address": host.address}]));
    let listener =
        listen_on(&mesh, &host, SocketAddr::new(host.address.into(), mesh.sink().port()));
    let sink = mesh.sink();
    let mut client = eventually("the endpoint is there", || {
        mesh.on(Some(&host), || TcpStream::connect_timeout(&sink, DEADLINE)).ok()
    });
    let (mut endpoint, from) = listener.accept().expect("somebody connects");
    endpoint.set_read_timeout(Some(DEADLINE)).expect("it is above zero");
    assert_ne!(from.ip(), host.address, "else the answer would not find its way");
    assert_says(&mut client, &mut endpoint);
}

/// The endpoints of the echo service that some flows of the client come to.
fn reached(mesh: &TestMesh) -> BTreeSet<String> {
    let flows = std::iter::repeat_with(|| mesh.open_flow().expect("the echo service greets").1);
    flows.take(16).collect()
}

fn assert_affinity(path: &str) {
    let mut mesh = TestMesh::start_with_agent_arguments(mesh::MeshIpFamily::V4, &["--path", path]);
    assert_eq!(reached(&mesh).len(), 2, "each flow has an endpoint of its own");
    mesh.change(|mesh| {
        let echo = mesh.pointer_mut("/services/2").and_then(Value::as_object_mut);
        echo.expect("it is there").insert("affinity".into(), json!("client_address"));
    });
    eventually("all flows of a client have the same", || (reached(&mesh).len() == 1).then_some(()));
    mesh.assert_healthy();
}

#[test]
fn all_flows_of_a_client_go_to_one_endpoint_when_that_is_wanted_of_the_kernel() {
    assert_affinity("auto");
}

#[test]
fn all_flows_of_a_client_go_to_one_endpoint_when_that_is_wanted_of_the_proxy() {
    assert_affinity("proxy");
}

/// How many flows over TCP the echo service has had and has, as the agent tells.
fn told_flows(mesh: &TestMesh) -> (u64, u64) {
    let dump: Value = serde_json::from_str(&mesh.agent.admin("/config_dump").text()).expect("JSON");
    let at = format!(" {}", mesh.echo().ip());
    let is_echo = |service: &&Value| {
        let name = service["listener"].as_str().unwrap_or_default();
        name.starts_with("echo") && name.ends_with(&at) && !name.contains("/udp")
    };
    let services = dump.get("services").and_then(Value::as_array).expect("it lists services");
    let echo = services.iter().find(is_echo).expect("it tells of the echo service");
    let number = |field: &str| echo[field].as_u64().expect("a number");
    (number("flows"), number("flows_open"))
}

fn assert_flows_are_told(path: &str) {
    let mesh = TestMesh::start_with_agent_arguments(mesh::MeshIpFamily::V4, &["--path", path]);
    let (before, _) = told_flows(&mesh);
    let flows: Vec<_> = (0..5).map(|_| mesh.open_flow().expect("the service greets")).collect();
    let open = 5;
    eventually("five flows are open", || (told_flows(&mesh) == (before + 5, open)).then_some(()));
    drop(flows);
    eventually("they have ended", || (told_flows(&mesh) == (before + 5, 0)).then_some(()));
}

#[test]
fn the_flows_of_each_service_are_told_on_the_kernel_path() {
    assert_flows_are_told("auto");
}

#[test]
fn the_flows_of_each_service_are_told_on_the_proxy_path() {
    assert_flows_are_told("proxy");
}
