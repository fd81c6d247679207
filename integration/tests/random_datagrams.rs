//! One million datagrams with random payloads to a UDP service of an agent: memory and flows stay within their limits.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use serde_json::json;
use weft_integration::agent::TestAgent;
use weft_integration::bootstrap::{bootstrap, static_cluster, udp_listener};
use weft_integration::port;
use weft_integration::wait::eventually;

const DATAGRAMS: u32 = 1_000_000;
/// Number of clients: far above the flow limit, however slow the machine is.
const CLIENTS: u32 = 2_000;
const FLOWS: u64 = 20;

fn resident_kib(process: u32) -> u64 {
    let status =
        std::fs::read_to_string(format!("/proc/{process}/status")).expect("the process runs");
    let line =
        status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("an RssAnon line");
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("a number of KiB")
}

/// Starts an agent with a UDP service whose flows expire after a second without datagrams.
fn agent_before(endpoint: SocketAddr, port: u16) -> TestAgent {
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listener = udp_listener("udp", at, "echo", json!({"idle_timeout": "1s"}));
    let cluster = static_cluster("echo", &[endpoint]);
    let limit = FLOWS.to_string();
    TestAgent::start(|admin| bootstrap(admin, &[listener], &[cluster]), &["--flow-limit", &limit])
}

#[test]
fn million_random_datagrams_exceed_neither_flow_limit_nor_memory_bound() {
    let endpoint = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let at = endpoint.local_addr().expect("the socket is bound");
    std::thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((read, client)) = endpoint.recv_from(&mut bytes) {
            drop(endpoint.send_to(bytes.get(..read).unwrap_or_default(), client));
        }
    });
    let port = port::free();
    let agent = agent_before(at, port);
    let service = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let is_answered = || {
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
        client.set_read_timeout(Some(Duration::from_millis(300))).expect("the timeout is not zero");
        client.send_to(b"probe", service).expect("the datagram is sent");
        let mut answer = [0; 64];
        let answered = client.recv_from(&mut answer);
        answered.is_ok_and(|(read, _)| answer.get(..read) == Some(b"probe"))
    };
    eventually("the service answers", || is_answered().then_some(()));
    let before = resident_kib(agent.process.id());

    let mut state = 1u32;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let noise: Vec<u8> = std::iter::repeat_with(&mut draw)
        .map(|drawn| drawn.to_le_bytes()[0])
        .take(1 << 16)
        .collect();
    for client in 0..CLIENTS {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
        for step in 0..DATAGRAMS / CLIENTS {
            let from = (client * 977 + step * 131) as usize % (noise.len() - 1500);
            let bytes = (client + step * 37) as usize % 1400;
            // A full queue drops datagrams, as UDP allows.
            drop(socket.send_to(noise.get(from..from + bytes).unwrap_or_default(), service));
        }
    }

    eventually("a new flow is accepted", || is_answered().then_some(()));
    let refused = agent.metric("weft_agent_refused_total{reason=\"limit\"}");
    assert!(refused > 0, "flows beyond the limit are refused");
    assert!(agent.metric("weft_agent_flows_open{path=\"proxy\"}") <= FLOWS);
    let grown = resident_kib(agent.process.id()).saturating_sub(before);
    assert!(grown < 16 * 1024, "the agent grew by {grown} KiB");
    assert!(!agent.process.errors().contains("panicked"), "{}", agent.process.errors());
}
