//! The kernel path: the nf_tables rules send each flow to the endpoint that weft's hash selects,
//! and the agent restores them after foreign changes and after crashes.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use weft_integration::agent::TestAgent;
use weft_integration::bootstrap::{bootstrap, static_cluster, tcp_listener, udp_listener, with};
use weft_integration::process::{ip, nft, run, weft};
use weft_integration::wait::eventually;
use weft_model::{Endpoint, FlowKey, FlowTuple, Health, Maglev, Transport};

/// The default hash seed of an agent.
const SEED: u32 = 0x5eed;
/// The default size of a Maglev table.
const SLOTS: u32 = 65_537;
/// The number of compared flows.
const TUPLES: u32 = 100_000;
/// The number of concurrent flows.
const BATCH: u32 = 200;
const SERVICE_PORT: u16 = 7000;
const ENDPOINT_PORT: u16 = 9000;

/// An address family with a service, its endpoints and clients, all in this namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn service(self) -> SocketAddr {
        match self {
            Self::V4 => (Ipv4Addr::new(10, 96, 0, 3), SERVICE_PORT).into(),
            Self::V6 => (Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 3), SERVICE_PORT).into(),
        }
    }

    fn endpoint(self, number: u8) -> SocketAddr {
        match self {
            Self::V4 => (Ipv4Addr::new(10, 1, 0, number), ENDPOINT_PORT).into(),
            Self::V6 => {
                (Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, number.into()), ENDPOINT_PORT).into()
            }
        }
    }

    /// The address of a client: clients differ in IP addresses and ports.
    fn client(self, number: u32) -> SocketAddr {
        let port = 10_000 + u16::try_from(number % 50_000).expect("the port fits in 16 bits");
        let host = number / 50_000 + 256 * (number % 251);
        match self {
            Self::V4 => (Ipv4Addr::from(0x0a05_0000 + host), port).into(),
            Self::V6 => (Ipv6Addr::from((0xfd05_u128 << 112) + u128::from(host)), port).into(),
        }
    }

    fn prepare(self) {
        match self {
            Self::V4 => {
                ip("route add local 10.5.0.0/16 dev lo");
                ip("route add local 10.1.0.0/16 dev lo");
                ip("route add 10.96.0.0/16 dev lo");
            }
            Self::V6 => {
                ip("-6 route add local fd05::/64 dev lo");
                ip("-6 route add local fd01::/64 dev lo");
                ip("-6 route add fd96::/64 dev lo");
                // IPv4 needs only a route to bind these addresses; IPv6 needs this setting too.
                std::fs::write("/proc/sys/net/ipv6/ip_nonlocal_bind", "1")
                    .expect("the network namespace belongs to the test");
            }
        }
    }
}

/// A bootstrap file with one service over TCP and UDP, at an address without a listening socket.
fn config(admin: u16, service: SocketAddr, endpoints: &[SocketAddr], slots: u32) -> Value {
    let listeners = [
        tcp_listener("echo", service, json!({"cluster": "echo"})),
        udp_listener("echo-udp", service, "echo", json!({})),
    ];
    let listeners = listeners.map(|listener| with(listener, "bind_to_port", json!(false)));
    let cluster = with(static_cluster("echo", endpoints), "lb_policy", json!("MAGLEV"));
    let cluster = with(cluster, "maglev_lb_config", json!({"table_size": slots}));
    bootstrap(admin, &listeners, &[with(cluster, "connect_timeout", json!("2s"))])
}

fn table(family: Family, endpoints: u8) -> Maglev {
    let endpoints: Vec<Endpoint> = (1..=endpoints)
        .filter_map(|n| Endpoint::new(family.endpoint(n), 1, Health::Healthy))
        .collect();
    Maglev::new(&endpoints, SLOTS, SEED).expect("the table size is a prime")
}

/// The endpoint that weft's own hash selects for a flow.
fn expected(
    table: &Maglev,
    transport: Transport,
    family: Family,
    client: SocketAddr,
) -> SocketAddr {
    let flow = FlowTuple { transport, client, destination: family.service() };
    table.pick(flow.hash(FlowKey::FiveTuple, 0, SEED)).expect("the table has endpoints")
}

fn socket(kind: Type, address: SocketAddr) -> Socket {
    let socket =
        Socket::new(Domain::for_address(address), kind, None).expect("a socket can be created");
    socket.set_reuse_address(true).expect("SO_REUSEADDR can be set");
    socket.bind(&address.into()).expect("the address is free");
    socket.set_nonblocking(true).expect("the socket can be non-blocking");
    socket
}

/// Sends a datagram from each client; returns the endpoint that received each.
fn datagrams(family: Family, endpoints: u8) -> BTreeMap<SocketAddr, SocketAddr> {
    let receivers: Vec<UdpSocket> =
        (1..=endpoints).map(|n| socket(Type::DGRAM, family.endpoint(n)).into()).collect();
    let mut arrived = BTreeMap::new();
    for batch in 0..TUPLES / BATCH {
        for number in batch * BATCH..(batch + 1) * BATCH {
            let client: UdpSocket = socket(Type::DGRAM, family.client(number)).into();
            client.send_to(b"?", family.service()).expect("the datagram is sent");
        }
        let wanted = arrived.len() + BATCH as usize;
        eventually("all datagrams of a batch arrive", || {
            for receiver in &receivers {
                let at = receiver.local_addr().expect("the socket is bound");
                while let Ok((_, client)) = receiver.recv_from(&mut [0; 8]) {
                    arrived.insert(client, at);
                }
            }
            (arrived.len() == wanted).then_some(())
        });
    }
    arrived
}

/// Opens a connection from each client; returns the endpoint that received each.
fn connections(family: Family, endpoints: u8) -> BTreeMap<SocketAddr, SocketAddr> {
    let listeners: Vec<TcpListener> = (1..=endpoints)
        .map(|n| {
            let listener = socket(Type::STREAM, family.endpoint(n));
            listener.listen(4096).expect("the port accepts connections");
            listener.into()
        })
        .collect();
    let mut arrived = BTreeMap::new();
    for batch in 0..TUPLES / BATCH {
        let clients: Vec<Socket> = (batch * BATCH..(batch + 1) * BATCH)
            .map(|number| {
                let client = socket(Type::STREAM, family.client(number));
                // A reset leaves no TIME_WAIT state: there are many connections.
                client.set_linger(Some(Duration::ZERO)).expect("SO_LINGER can be set");
                drop(client.connect(&family.service().into()));
                client
            })
            .collect();
        let wanted = arrived.len() + BATCH as usize;
        eventually("all connections of a batch arrive", || {
            for listener in &listeners {
                let at = listener.local_addr().expect("the socket is bound");
                while let Ok((stream, client)) = listener.accept() {
                    socket2::SockRef::from(&stream)
                        .set_linger(Some(Duration::ZERO))
                        .expect("SO_LINGER can be set");
                    arrived.insert(client, at);
                }
            }
            (arrived.len() == wanted).then_some(())
        });
        drop(clients);
    }
    arrived
}

fn assert_parity(family: Family) {
    const ENDPOINTS: u8 = 7;
    family.prepare();
    let endpoints: Vec<SocketAddr> = (1..=ENDPOINTS).map(|n| family.endpoint(n)).collect();
    let agent = TestAgent::start(|admin| config(admin, family.service(), &endpoints, SLOTS), &[]);
    for service in agent.services() {
        assert_eq!(service.get("path"), Some(&json!("kernel")), "{service}");
    }
    let table = table(family, ENDPOINTS);
    for (transport, arrived) in [
        (Transport::Udp, datagrams(family, ENDPOINTS)),
        (Transport::Tcp, connections(family, ENDPOINTS)),
    ] {
        assert_eq!(arrived.len(), TUPLES as usize);
        let mut shares: BTreeMap<SocketAddr, u32> = BTreeMap::new();
        for (client, endpoint) in &arrived {
            assert_eq!(
                *endpoint,
                expected(&table, transport, family, *client),
                "{transport:?} of {client}"
            );
            *shares.entry(*endpoint).or_default() += 1;
        }
        let mean = f64::from(TUPLES) / f64::from(ENDPOINTS);
        let squares = shares.values().map(|n| (f64::from(*n) - mean).powi(2) / mean);
        // With six degrees of freedom, a uniform distribution exceeds this value with probability
        // 0.001.
        let chi_square: f64 = squares.sum();
        assert!(chi_square < 22.46, "{chi_square}: {shares:?}");
    }
    eventually("the metrics count the flows of the kernel path", || {
        let count = |name: &str| agent.metric(&format!("{name}_total{{path=\"kernel\"}}"));
        let counted = [count("weft_agent_connections"), count("weft_agent_flows")];
        (counted == [u64::from(TUPLES); 2]).then_some(())
    });
    let client = family.client(7);
    let service = family.service();
    let explained = run(weft().args(["flow", "explain", "udp"]).args([
        client.to_string(),
        service.to_string(),
        "--admin".into(),
        format!("127.0.0.1:{}", agent.admin),
    ]));
    let endpoint = expected(&table, Transport::Udp, family, client);
    assert!(explained.contains(&format!("endpoint  {endpoint}, by flow hash")), "{explained}");
    assert!(explained.contains("path      kernel"), "{explained}");
}

#[test]
fn kernel_and_agent_select_the_same_endpoint_for_every_ipv4_flow() {
    assert_parity(Family::V4);
}

#[test]
fn kernel_and_agent_select_the_same_endpoint_for_every_ipv6_flow() {
    assert_parity(Family::V6);
}

/// An agent with a service of three endpoints, which uses the kernel path.
fn start_kernel_path_agent(slots: u32) -> TestAgent {
    Family::V4.prepare();
    let endpoints: Vec<SocketAddr> = (1..=3).map(|n| Family::V4.endpoint(n)).collect();
    TestAgent::start(|admin| config(admin, Family::V4.service(), &endpoints, slots), &[])
}

/// The rules of the table, sorted and without generated names, so that listings can be compared.
fn normalized_rules() -> Vec<String> {
    let listing = nft("-s list table inet weft_services");
    let line = |line: &str| line.split("7000_").next().unwrap_or(line).trim().to_owned();
    let mut lines: Vec<String> = listing.lines().map(line).collect();
    lines.sort();
    lines
}

/// The map of the service's TCP flows, and one of its elements.
fn tcp_map() -> (String, String) {
    let listing = nft("list chain inet weft_services tcp_10.96.0.3_7000");
    let map = listing.split("map @").nth(1).and_then(|rest| rest.split_whitespace().next());
    let map = map.expect("the chain uses a map").to_owned();
    let listing = nft(&format!("list map inet weft_services {map}"));
    let element = listing.split("elements = { ").nth(1).and_then(|rest| rest.split(',').next());
    (map, element.expect("the map has elements").to_owned())
}

#[test]
fn foreign_changes_of_the_kernel_table_are_reverted() {
    let agent = start_kernel_path_agent(251);
    let before = normalized_rules();
    for (turn, change) in (1..).zip([
        "delete table inet weft_services",
        "flush chain inet weft_services arriving",
        "delete chain inet weft_services leaving",
        "flush map inet weft_services services4",
        "add rule inet weft_services tcp_10.96.0.3_7000 accept",
        "add element inet weft_services hairpin4 { 192.0.2.1 . 192.0.2.1 }",
        "delete element inet weft_services MAP { ELEMENT }",
        "flush ruleset",
    ]) {
        let (map, element) = tcp_map();
        nft(&change.replace("MAP", &map).replace("ELEMENT", &element));
        eventually(format!("{change:?} is reverted"), || {
            let repairs = agent.metric("weft_agent_kernel_table_repairs_total");
            (repairs >= turn).then_some(())
        });
        assert!(normalized_rules() == before, "after {change}: {:#?}", normalized_rules());
    }
    assert_eq!(agent.metric("weft_agent_kernel_table_failures_total"), 0);
}

#[test]
fn restarted_agent_keeps_the_kernel_table_unchanged() {
    let mut agent = start_kernel_path_agent(SLOTS);
    let client: UdpSocket = socket(Type::DGRAM, Family::V4.client(1)).into();
    client.send_to(b"?", Family::V4.service()).expect("the datagram is sent");
    agent.process.kill();
    agent.restart();
    assert!(agent.process.errors().contains("transactions=0"), "{}", agent.process.errors());
    eventually("the restarted agent counts the earlier flow", || {
        (agent.metric("weft_agent_flows_total{path=\"kernel\"}") == 1).then_some(())
    });
}

#[test]
fn agent_killed_while_writing_the_kernel_table_recovers_on_restart() {
    let mut agent = start_kernel_path_agent(SLOTS);
    for milliseconds in [100, 250, 400, 550] {
        agent.process.kill();
        nft("delete table inet weft_services");
        agent.restart_without_waiting();
        agent.process.kill_after(Duration::from_millis(milliseconds));
        agent.restart();
        let sets = nft("-t list maps inet");
        assert_eq!(sets.matches("map tcp_").count(), 1, "killed after {milliseconds} ms");
        // The next agent compares the table with its plan, down to the last slot, and changes
        // nothing.
        agent.process.kill();
        agent.restart();
        eventually("the agent changes nothing", || {
            agent.process.errors().contains("transactions=0").then_some(())
        });
    }
}
