//! Security groups: the kernel drops new flows of clients outside a service's `allow_from` ranges,
//! before any other rule.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use serde_json::{Value, json};
use weft::demo::hosts::Host;
use weft_integration::agent::TestAgent;
use weft_integration::bootstrap::{bootstrap, static_cluster, tcp_listener, with};
use weft_integration::mesh::{MeshIpFamily, TestMesh};
use weft_integration::process::{ip, nft};
use weft_integration::wait::eventually;

/// How long a test waits for a reply to a dropped flow.
const DROP_TIMEOUT: Duration = Duration::from_millis(700);

/// Sets the `allow_from` ranges of the echo service.
fn set_allow_from(mesh: &mut TestMesh, ranges: &[String]) {
    mesh.change(|file| file.service("echo").set("allow_from", json!(ranges)));
}

fn blocked(mesh: &TestMesh) -> u64 {
    let page = mesh.agent.admin("/metrics").text();
    weft_integration::metrics::metric(&page, "weft_agent_security_group_dropped_packets_total")
}

fn connect(mesh: &TestMesh, host: &Host) -> Result<TcpStream, ErrorKind> {
    let echo = mesh.echo();
    let stream = mesh.on(Some(host), || TcpStream::connect_timeout(&echo, DROP_TIMEOUT));
    stream.map_err(|error| error.kind())
}

/// Whether a connection from a host is accepted.
fn connects(mesh: &TestMesh, host: &Host) -> bool {
    connect(mesh, host).is_ok()
}

/// Whether a connection from a host is dropped: it times out instead of being refused.
fn is_dropped(mesh: &TestMesh, host: &Host) -> bool {
    connect(mesh, host).is_err_and(|kind| kind == ErrorKind::TimedOut)
}

/// Whether a datagram from a host is answered.
fn is_answered(mesh: &TestMesh, host: &Host) -> bool {
    let echo = SocketAddr::new(mesh.echo().ip(), mesh.echo().port() + 1);
    let any: SocketAddr = if echo.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = mesh.on(Some(host), || UdpSocket::bind(any)).expect("a port is free");
    socket.set_read_timeout(Some(DROP_TIMEOUT)).expect("the timeout is not zero");
    socket.send_to(b"?", echo).expect("the datagram is sent");
    socket.recv_from(&mut [0; 64]).is_ok()
}

fn range_of(mesh: &TestMesh, host: &Host) -> String {
    let address: IpAddr = match mesh.echo() {
        SocketAddr::V4(_) => host.address.into(),
        SocketAddr::V6(_) => host.address6.expect("the host has IPv6").into(),
    };
    address.to_string()
}

/// The agent's explanation of a new connection from a host: the group's decision, the matching
/// range, and the number of endpoints.
/// the endpoints.
fn explained(mesh: &TestMesh, host: &Host) -> (String, Value, usize) {
    let client = SocketAddr::new(range_of(mesh, host).parse().expect("an address"), 4000);
    let flow = format!("/flow?transport=tcp&client={client}&destination={}", mesh.echo());
    let text = mesh.agent.admin(&flow).text();
    let explanation: Value = serde_json::from_str(&text).expect("the explanation is JSON");
    let field = |name: &str| explanation.get(name).cloned().unwrap_or_default();
    let group = field("security_group").as_str().unwrap_or(&text).to_owned();
    let endpoints = field("endpoints").as_array().map_or(0, Vec::len);
    (group, field("admitting_range"), endpoints)
}

fn assert_groups_hold(family: MeshIpFamily, path: &str) {
    let mut mesh = TestMesh::builder().family(family).agent_arguments(&["--path", path]).start();
    let client = mesh.client.clone();
    let stranger = mesh.host("stranger");
    assert!(connects(&mesh, &stranger), "without a group every client is accepted");
    let (mut flow, replica) = mesh.open_flow().expect("the echo service accepts the connection");
    let (group, range, endpoints) = explained(&mesh, &client);
    assert_eq!((&*group, range), ("none", Value::Null));
    assert!(endpoints > 0);

    let range = range_of(&mesh, &stranger);
    set_allow_from(&mut mesh, &[range]);
    eventually("the client is dropped", || (!connects(&mesh, &client)).then_some(()));
    assert!(!is_answered(&mesh, &client));
    assert!(connects(&mesh, &stranger) && is_answered(&mesh, &stranger));
    assert_eq!(explained(&mesh, &client), ("not_allowed".to_owned(), Value::Null, 0));
    let (group, range, endpoints) = explained(&mesh, &stranger);
    assert_eq!(group, "admitted");
    assert!(range.as_str().is_some_and(|range| range.starts_with(&range_of(&mesh, &stranger))));
    assert!(endpoints > 0);
    assert_eq!(flow.send_line("ping"), Some(replica), "established connections continue");
    // On the proxy path the agent may have refused the first connections: the kernel rules change a
    // moment later.
    eventually("dropped packets are counted", || {
        assert!(!is_answered(&mesh, &client));
        (blocked(&mesh) > 1).then_some(())
    });

    let range = range_of(&mesh, &client);
    set_allow_from(&mut mesh, &[range]);
    eventually("the client is accepted again", || connects(&mesh, &client).then_some(()));
    assert!(is_answered(&mesh, &client));
    eventually("the other host is dropped", || is_dropped(&mesh, &stranger).then_some(()));
    assert!(!is_answered(&mesh, &stranger));

    set_allow_from(&mut mesh, &[]);
    eventually("every client is dropped", || is_dropped(&mesh, &client).then_some(()));
}

#[test]
fn security_group_drops_other_clients_on_the_kernel_path() {
    assert_groups_hold(MeshIpFamily::V4, "auto");
}

#[test]
fn security_group_drops_other_clients_on_the_proxy_path() {
    assert_groups_hold(MeshIpFamily::V4, "proxy");
}

#[test]
fn ipv6_security_group_drops_other_clients() {
    assert_groups_hold(MeshIpFamily::V6, "auto");
}

/// The number of services, each with ranges of its own: more than the kernel accepts at once from
/// an unprivileged process, and more than fits in one netlink message.
const SERVICES: u16 = 700;
const RANGES: u16 = 2_000;

fn virtual_address(number: u16) -> SocketAddr {
    (Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 1, number), 7000).into()
}

/// Ranges, some of which contain others; and the merged ranges.
fn ranges(number: u16) -> Vec<String> {
    match number {
        0 => (0..RANGES).map(|n| format!("fd05:0:0:{n:x}::/64")).collect(),
        1 => vec!["::/0".into(), "fd05::/16".into()],
        2 => vec!["fd05:0:0:7::1".into(), "fd05:0:0:7::/64".into(), "fd05:0:0:7::/120".into()],
        _ => vec![format!("fd06::{number:x}"), "10.0.0.0/8".into()],
    }
}

#[test]
fn hundreds_of_groups_with_thousands_of_ranges_are_enforced() {
    let endpoint: SocketAddr = (Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 1), 9000).into();
    for words in ["local fd05::/16 dev lo", "local fd01::/64 dev lo", "fd96::/64 dev lo"] {
        ip(&format!("-6 route add {words}"));
    }
    std::fs::write("/proc/sys/net/ipv6/ip_nonlocal_bind", "1")
        .expect("the network namespace belongs to the test");
    let listener = |number| {
        let proxy = json!({"cluster": "echo"});
        let listener = tcp_listener(&format!("s{number}"), virtual_address(number), proxy);
        let listener = with(listener, "bind_to_port", json!(false));
        let group = json!({"weft": {"allow_from": ranges(number)}});
        with(listener, "metadata", json!({"filter_metadata": group}))
    };
    let listeners: Vec<Value> = (0..SERVICES).map(listener).collect();
    let cluster = with(static_cluster("echo", &[endpoint]), "lb_policy", json!("MAGLEV"));
    let cluster = with(cluster, "maglev_lb_config", json!({"table_size": 11}));
    let agent = TestAgent::start(|admin| bootstrap(admin, &listeners, &[cluster]), &[]);
    let carried = agent.services().iter().filter(|s| s["path"] == "kernel").count();
    assert_eq!(carried, usize::from(SERVICES), "{:?}", agent.services().first());
    let set = nft("list set inet weft_services let_in6");
    let merged = usize::from(RANGES) + 1 + 1 + usize::from(SERVICES) - 3;
    assert_eq!(set.matches(" . tcp . 7000 . ").count(), merged, "contained ranges are merged");

    let endpoint = TcpListener::bind(endpoint).expect("the address is free");
    let connects = |number, client: &str| {
        let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None);
        let socket = socket.expect("a socket can be created");
        let client: Ipv6Addr = client.parse().expect("an address");
        socket.bind(&SocketAddr::from((client, 0)).into()).expect("the address is local");
        let connected = socket.connect_timeout(&virtual_address(number).into(), DROP_TIMEOUT);
        connected.map(|()| endpoint.accept().expect("the file has the service")).is_ok()
    };
    assert!(connects(0, "fd05:0:0:7cf::9"), "the last range");
    assert!(!connects(0, "fd05:0:0:7d0::9"), "the first address past it");
    assert!(connects(1, "fd05::9"));
    assert!(connects(2, "fd05:0:0:7::ffff"));
    assert!(!connects(2, "fd05:0:0:8::1"));
    assert!(!connects(3, "fd05::9"));
}
