//! The source address of connections that the agent's proxy path makes to endpoints.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use serde_json::json;
use socket2::{Domain, Socket, Type};
use weft_integration::agent::TestAgent;
use weft_integration::bootstrap::{bootstrap, static_cluster, tcp_listener};
use weft_integration::mesh::{MeshIpFamily, TestMesh};
use weft_integration::process::{ip, run, weft};
use weft_integration::wait::{DEADLINE, eventually};

/// Sets the `source_address` of the sink service.
fn set_source_address(mesh: &mut TestMesh, whose: &str) {
    mesh.change(|file| file.service("sink").set("source_address", json!(whose)));
}

/// Opens a connection from the client to the sink; returns both sockets, and the source address
/// that the endpoint sees.
fn connect(mesh: &TestMesh, endpoint: &TcpListener) -> (TcpStream, TcpStream, IpAddr) {
    let sink = mesh.sink();
    let client = mesh.on(Some(&mesh.client), || TcpStream::connect_timeout(&sink, DEADLINE));
    let client = client.expect("the agent accepts the connection");
    let (accepted, from) = endpoint.accept().expect("the data arrives");
    for stream in [&client, &accepted] {
        stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    }
    (client, accepted, from.ip())
}

fn assert_kept(family: MeshIpFamily, backend: &str) {
    let mut mesh = TestMesh::builder().family(family).agent_arguments(&["--path", "proxy"]).start();
    let client: IpAddr = match family {
        MeshIpFamily::V4 => mesh.client.address.into(),
        MeshIpFamily::V6 => mesh.client.address6.expect("the host has IPv6").into(),
    };
    let mut redirect = weft();
    redirect.args(["redirect", "apply", "--backend", backend, "--keep-source"]);
    redirect.args(["--forwarded", "15001", "--udp", "15099"]);
    run(redirect.args(["--services", family.service_range()]));
    mesh.change_sink(&[0]);
    let [workload, ..] = mesh.orders.as_slice() else { unreachable!("orders has two replicas") };
    let host = &workload.host;
    let at = mesh.sink_endpoint(0);
    let endpoint = mesh.on(Some(host), || TcpListener::bind(at)).expect("the port is free");
    let next = |address: SocketAddr| SocketAddr::new(address.ip(), address.port() + 1);
    let datagrams = mesh.on(Some(host), || UdpSocket::bind(next(at))).expect("the port is free");
    datagrams.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");

    let (_, _, from) = connect(&mesh, &endpoint);
    assert_ne!(from, client, "the default is an address of the agent's host");
    set_source_address(&mut mesh, "client");
    let (mut one, mut other) = eventually("the endpoint sees the client's address", || {
        let (one, other, from) = connect(&mesh, &endpoint);
        (from == client).then_some((one, other))
    });
    let mut buffer = vec![0; 200_000];
    let bulk: Vec<u8> = (0..200_000u32).map(|n| n.to_le_bytes()[0]).collect();
    for _ in 0..2 {
        one.write_all(b"?").expect("the connection is open");
        other.read_exact(&mut [0]).expect("the data arrives");
        other.write_all(&bulk).expect("the connection is open");
        one.read_exact(&mut buffer).expect("the data arrives");
        assert_eq!(buffer, bulk);
    }

    let any = if client.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = mesh.on(Some(&mesh.client), || UdpSocket::bind(any)).expect("a port is free");
    socket.connect(next(mesh.sink())).expect("there is a route to the service");
    socket.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    socket.send(b"?").expect("the datagram is sent");
    let (_, from) = datagrams.recv_from(&mut buffer).expect("the data arrives");
    assert_eq!(from.ip(), client);
    datagrams.send_to(b"!", from).expect("the datagram is sent");
    assert_eq!(socket.recv(&mut buffer).expect("the answer arrives"), 1);

    set_source_address(&mut mesh, "agent");
    eventually("the endpoint sees the agent's host again", || {
        (connect(&mesh, &endpoint).2 != client).then_some(())
    });
    mesh.assert_healthy();
}

#[test]
fn endpoint_sees_the_client_address_if_configured() {
    assert_kept(MeshIpFamily::V4, "native");
}

#[test]
fn endpoint_sees_the_client_address_if_configured_over_ipv6() {
    assert_kept(MeshIpFamily::V6, "native");
}

#[test]
fn endpoint_sees_the_client_address_if_configured_with_iptables() {
    assert_kept(MeshIpFamily::V4, "iptables");
}

/// The size of the host's ephemeral port range, per source address and destination.
const PORTS: u16 = 10;

#[test]
fn each_source_address_provides_its_own_port_range() {
    for address in ["10.1.0.1/32", "10.2.0.1/32", "10.2.0.2/32", "10.2.0.3/32"] {
        ip(&format!("addr add {address} dev lo"));
    }
    let sources = [1, 2, 3].map(|n| IpAddr::from(Ipv4Addr::new(10, 2, 0, n)));
    let at: SocketAddr = ([10, 1, 0, 1], 9000).into();
    let service: SocketAddr = ([127, 0, 0, 1], 7000).into();
    let config = |admin| {
        let listener = tcp_listener("echo", service, json!({"cluster": "echo"}));
        bootstrap(admin, &[listener], &[static_cluster("echo", &[at])])
    };
    let agent =
        TestAgent::start(config, &["--source-addresses", "10.2.0.1,10.2.0.2,10.2.0.3,fd00::1"]);
    let range = format!("40000 {}", 40000 + PORTS - 1);
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", range)
        .expect("the network namespace belongs to the test");
    let endpoint = TcpListener::bind(at).expect("the address is free");
    endpoint.set_nonblocking(true).expect("the socket mode can be set");

    let open = |number: u16| {
        let socket =
            Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket can be created");
        let own: SocketAddr = ([127, 0, 0, 9], 20_000 + number).into();
        socket.set_reuse_address(true).expect("SO_REUSEADDR can be set");
        socket.bind(&own.into()).expect("the port is free");
        socket.connect(&service.into()).expect("the agent accepts the connection");
        let mut client = TcpStream::from(socket);
        client.set_read_timeout(Some(Duration::from_secs(5))).expect("the timeout is not zero");
        let arrived = eventually("the connection reaches the endpoint or is refused", || {
            match endpoint.accept() {
                Ok((stream, from)) => Some(Some((stream, from))),
                Err(_) => {
                    client.set_nonblocking(true).expect("the socket mode can be set");
                    let reset = client
                        .read(&mut [0])
                        .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
                    reset.then_some(None)
                }
            }
        });
        (client, arrived)
    };
    let all = 3 * PORTS;
    let flows: Vec<_> = (0..all).map(open).collect();
    for source in sources {
        let from = flows.iter().filter_map(|(_, arrived)| Some(arrived.as_ref()?.1.ip()));
        assert_eq!(from.filter(|from| *from == source).count(), usize::from(PORTS), "{source}");
    }
    let (_, refused) = open(all);
    assert!(refused.is_none(), "no port is left");
    assert_eq!(agent.metric("weft_agent_refused_total{reason=\"unreachable\"}"), 1);
    // The side that closes first keeps its port in TIME_WAIT for a minute: here the endpoint, on its own port.
    let clients: Vec<TcpStream> = flows.into_iter().map(|(client, _)| client).collect();
    for mut client in clients {
        client.set_nonblocking(false).expect("the socket mode can be set");
        assert_eq!(client.read(&mut [0]).expect("the connection ends"), 0);
    }
    eventually("ports are free again", || open(all + 1).1.is_some().then_some(()));
}
