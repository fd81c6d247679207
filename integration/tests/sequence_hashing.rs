//! Flow hashing with the TCP sequence number of the SYN: kernel path, proxy path and `weft flow
//! explain` select the same endpoint.

use std::io::Read as _;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use weft_integration::agent::TestAgent;
use weft_integration::bootstrap::{bootstrap, static_cluster, tcp_listener, with};
use weft_integration::process::{ip, weft};
use weft_integration::wait::eventually;

const ENDPOINTS: u8 = 5;
/// The number of connections from one client port.
const CONNECTIONS: usize = 40;

#[derive(Debug, Clone, Copy)]
struct Addresses {
    service: SocketAddr,
    client: SocketAddr,
    endpoint: fn(u8) -> SocketAddr,
    routes: &'static [&'static str],
}

const V4: Addresses = Addresses {
    service: SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 96, 0, 3)), 7000),
    client: SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 5, 0, 1)), 4000),
    endpoint: |number| (Ipv4Addr::new(10, 1, 0, number), 9000).into(),
    routes: &["local 10.5.0.0/16", "local 10.1.0.0/16", "10.96.0.0/16"],
};
const V6: Addresses = Addresses {
    service: SocketAddr::new(
        std::net::IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 3)),
        7000,
    ),
    client: SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::new(0xfd05, 0, 0, 0, 0, 0, 0, 1)), 4000),
    endpoint: |number| (Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, number.into()), 9000).into(),
    routes: &["local fd05::/64", "local fd01::/64", "fd96::/64"],
};

/// Captures the SYNs that pass on loopback, each when sent and when received.
struct SynCapture {
    socket: Socket,
    last: Option<u32>,
}

impl SynCapture {
    fn open() -> Self {
        const EVERYTHING: u16 = 3;
        let protocol = Protocol::from(i32::from(EVERYTHING.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol));
        let socket = socket.expect("the network namespace belongs to the test");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("the timeout is not zero");
        Self { socket, last: None }
    }

    /// The sequence number of the next SYN of a client.
    fn next(&mut self, client: SocketAddr) -> u32 {
        const ETHERNET: usize = 14;
        const SYN_ALONE: u8 = 0x02;
        let header = if client.is_ipv4() { 20 } else { 40 };
        let mut frame = [0; 2048];
        loop {
            let length = self.socket.read(&mut frame).expect("a SYN is captured");
            let tcp: Option<&[u8; 20]> =
                frame.get(ETHERNET + header..length).and_then(<[u8]>::first_chunk);
            let Some([p0, p1, _, _, s0, s1, s2, s3, _, _, _, _, _, flags, ..]) = tcp else {
                continue;
            };
            let sequence = u32::from_be_bytes([*s0, *s1, *s2, *s3]);
            let is_clients = u16::from_be_bytes([*p0, *p1]) == client.port();
            if is_clients && *flags == SYN_ALONE && Some(sequence) != self.last {
                self.last = Some(sequence);
                return sequence;
            }
        }
    }
}

fn agent(addresses: Addresses, key: &Value, path: &str) -> TestAgent {
    let endpoints: Vec<SocketAddr> = (1..=ENDPOINTS).map(addresses.endpoint).collect();
    let proxy = json!({"cluster": "echo", "hash_policy": [key]});
    let listener = tcp_listener("echo", addresses.service, proxy);
    let listener = with(listener, "bind_to_port", json!(path == "proxy"));
    let cluster = with(static_cluster("echo", &endpoints), "lb_policy", json!("MAGLEV"));
    TestAgent::start(|admin| bootstrap(admin, &[listener], &[cluster]), &["--path", path])
}

/// The agent's explanation of the client's connection with this sequence number.
fn explain(
    agent: &TestAgent,
    addresses: Addresses,
    sequence: Option<u32>,
) -> Result<Value, String> {
    let client = addresses.client.to_string();
    let service = addresses.service.to_string();
    let mut command = weft();
    command.args(["flow", "explain", "tcp", &client, &service, "--json"]);
    command.args(["--admin", &format!("127.0.0.1:{}", agent.admin)]);
    command.args(sequence.map(|sequence| format!("--sequence={sequence}")));
    let output = command.output().expect("weft can be started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !output.status.success() {
        return Err(text(&output.stderr));
    }
    Ok(serde_json::from_str(&text(&output.stdout)).expect("the explanation is JSON"))
}

/// Connects from the client's port; returns the endpoint that received the connection.
fn reach(addresses: Addresses, endpoints: &[TcpListener]) -> SocketAddr {
    let socket = Socket::new(Domain::for_address(addresses.client), Type::STREAM, None);
    let socket = socket.expect("a socket can be created");
    socket.set_reuse_address(true).expect("SO_REUSEADDR can be set");
    socket.bind(&addresses.client.into()).expect("the address is local");
    socket.connect(&addresses.service.into()).expect("the service accepts the connection");
    let client = TcpStream::from(socket);
    let (mut stream, reached) = eventually("an endpoint receives the connection", || {
        endpoints.iter().find_map(|endpoint| {
            let (stream, _) = endpoint.accept().ok()?;
            Some((stream, endpoint.local_addr().expect("bound")))
        })
    });
    // A reset frees the client's port and the conntrack entry at once.
    let socket = socket2::SockRef::from(&client);
    socket.set_linger(Some(Duration::ZERO)).expect("SO_LINGER can be set");
    drop(client);
    stream.set_nonblocking(false).expect("the socket mode can be set");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("the timeout is not zero");
    let error = stream.read(&mut [0]).expect_err("the connection is reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    reached
}

fn assert_sequence_decides(addresses: Addresses, path: &str) {
    let family = if addresses.client.is_ipv4() { "-4" } else { "-6" };
    for route in addresses.routes {
        ip(&format!("{family} route add {route} dev lo"));
    }
    std::fs::write("/proc/sys/net/ipv6/ip_nonlocal_bind", "1")
        .expect("the network namespace belongs to the test");
    if path == "proxy" {
        // The agent listens on the address of the service.
        let address =
            format!("{}/{}", addresses.service.ip(), if family == "-4" { 32 } else { 128 });
        ip(&format!("addr add {address} dev lo"));
    }
    let endpoints = (1..=ENDPOINTS).map(|number| {
        let listener =
            TcpListener::bind((addresses.endpoint)(number)).expect("the address is free");
        listener.set_nonblocking(true).expect("the socket mode can be set");
        listener
    });
    let endpoints: Vec<TcpListener> = endpoints.collect();
    let agent = agent(addresses, &json!({"filter_state": {"key": "weft.tcp_sequence"}}), path);
    let mut capture = SynCapture::open();
    let mut reached = std::collections::BTreeSet::new();
    for _ in 0..CONNECTIONS {
        let endpoint = reach(addresses, &endpoints);
        let sequence = capture.next(addresses.client);
        let explained =
            explain(&agent, addresses, Some(sequence)).expect("the agent explains the connection");
        assert_eq!(
            explained.pointer("/endpoints/0"),
            Some(&json!(endpoint)),
            "{sequence}: {explained}"
        );
        assert_eq!(explained.get("path"), Some(&json!(path)));
        reached.insert(endpoint);
    }
    assert!(reached.len() > 1, "connections of one port reach several endpoints: {reached:?}");
    let refusal =
        explain(&agent, addresses, None).expect_err("the explanation needs the sequence number");
    assert!(refusal.contains("--sequence"), "{refusal}");
}

#[test]
fn sequence_number_selects_the_endpoint_on_the_kernel_path() {
    assert_sequence_decides(V4, "kernel");
}

#[test]
fn sequence_number_selects_the_endpoint_on_the_kernel_path_over_ipv6() {
    assert_sequence_decides(V6, "kernel");
}

#[test]
fn sequence_number_selects_the_endpoint_on_the_proxy_path() {
    assert_sequence_decides(V4, "proxy");
}

#[test]
fn sequence_number_selects_the_endpoint_on_the_proxy_path_over_ipv6() {
    assert_sequence_decides(V6, "proxy");
}

#[test]
fn without_sequence_hashing_a_client_port_has_one_endpoint() {
    for route in V4.routes {
        ip(&format!("route add {route} dev lo"));
    }
    let endpoints: Vec<TcpListener> = (1..=ENDPOINTS)
        .map(|number| TcpListener::bind((V4.endpoint)(number)).expect("the address is free"))
        .collect();
    endpoints
        .iter()
        .for_each(|listener| listener.set_nonblocking(true).expect("the socket mode can be set"));
    let _agent = agent(V4, &json!({"source_ip": {}}), "kernel");
    let reached = (0..CONNECTIONS).map(|_| reach(V4, &endpoints));
    assert_eq!(reached.collect::<std::collections::BTreeSet<_>>().len(), 1);
}
