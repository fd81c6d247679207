//! Resilience of a complete mesh: killed processes, rejected configurations, reused join tokens and
//! garbage on open ports.

use std::collections::BTreeSet;
use std::fs::DirEntry;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use weft_integration::mesh::{MeshIpFamily, TestMesh};
use weft_integration::wait::{DEADLINE, eventually};
use weft_model::{FlowKey, FlowTuple, Transport};

/// The start of a TLS handshake record, then garbage.
const TRUNCATED_HANDSHAKE: &[u8] = &[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3, 7, 7, 7];
/// The HTTP/2 preface, then a frame that is longer than allowed.
const OVERSIZED_HTTP2_FRAME: &[u8] =
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x04\x00\x00\x00\x00\x00";

fn garbage(seed: u32, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// The endpoints of `orders` that respond to `web`, over enough requests to reach each.
fn responding_endpoints(mesh: &TestMesh) -> BTreeSet<String> {
    let ask = || {
        let answer = mesh.ask_orders();
        assert_eq!(answer.status, 200, "{answer:?}");
        let body: Value = serde_json::from_slice(&answer.body).expect("the response is JSON");
        let replica = body.get("replica").and_then(Value::as_str);
        replica.expect("the response names the endpoint").to_owned()
    };
    std::iter::repeat_with(ask).take(12).collect()
}

#[test]
fn ipv4_mesh_serves_requests_connections_and_datagrams() {
    let mut mesh = TestMesh::builder().start();
    let answer = mesh.ask().text();
    assert!(answer.contains("/sa/client") && answer.contains("/sa/web"), "{answer}");
    mesh.assert_healthy();
}

/// The sockets in a thread's file table.
fn sockets(table: &Path) -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir(table).expect("the process runs").flatten();
    let held = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    held.filter(|file| file.to_string_lossy().starts_with("socket:")).collect()
}

#[test]
fn workers_share_no_sockets_with_the_rest_of_the_process() {
    let mesh = TestMesh::builder().start();
    mesh.assert_traffic_flows();
    for (role, worker) in [(&mesh.agent, "agent-0"), (&mesh.web.sidecar, "sidecar-0")] {
        let process = PathBuf::from(format!("/proc/{}", role.process.id()));
        let mut tasks =
            std::fs::read_dir(process.join("task")).expect("the process runs").flatten();
        let is_worker = |task: &DirEntry| {
            let name = std::fs::read_to_string(task.path().join("comm"));
            name.is_ok_and(|name| name.trim() == worker)
        };
        let task = tasks.find(is_worker).expect("the process has a worker").path();
        let own = sockets(&task.join("fd"));
        let rest = sockets(&process.join("fd"));
        assert!(!rest.is_empty(), "the admin port, and the connection to the control plane");
        let both: Vec<_> = own.intersection(&rest).collect();
        // Two sockets of signal handling exist before any thread is started.
        assert!(both.len() <= 2, "{worker} also has {both:?}");
    }
}

/// The hash of a flow, as the agent explains it.
fn explained_hash(mesh: &TestMesh, flow: &FlowTuple) -> Option<Value> {
    let query =
        format!("/flow?transport=tcp&client={}&destination={}", flow.client, flow.destination);
    let explanation: Value = serde_json::from_slice(&mesh.agent.admin(&query).body).ok()?;
    explanation.get("hash").cloned()
}

#[test]
fn flow_hash_seed_is_specific_to_the_mesh_and_survives_a_restart() {
    let mut mesh = TestMesh::builder().start();
    let client = SocketAddr::from(([10, 9, 9, 9], 4000));
    let flow = FlowTuple { transport: Transport::Tcp, client, destination: mesh.echo() };
    let hash = explained_hash(&mesh, &flow).expect("the agent explains");
    let without_one = flow.hash(FlowKey::FiveTuple, 0, 0x5eed);
    assert_ne!(hash, json!(without_one), "the seed is not the default");
    let dump = mesh.agent.admin("/config_dump").text();
    assert!(dump.contains("\"flow_seed\": \"[redacted]\""), "the seed is redacted");

    mesh.control.restart();
    mesh.agent.restart();
    assert_eq!(explained_hash(&mesh, &flow), Some(hash));
}

#[test]
fn ipv6_mesh_serves_requests_connections_and_datagrams() {
    let mut mesh = TestMesh::builder().family(MeshIpFamily::V6).start();
    let answer = mesh.ask().text();
    assert!(answer.contains("/sa/client") && answer.contains("/sa/web"), "{answer}");
    mesh.assert_healthy();
}

#[test]
fn killed_agent_drops_only_flows_of_its_proxy_path() {
    let mut mesh = TestMesh::builder().agent_arguments(&["--path", "proxy"]).start();
    let (mut flow, _) = mesh.open_flow().expect("the echo service accepts the connection");
    mesh.agent.process.kill();

    assert_eq!(flow.send_line("ping"), None, "the flow went through the agent");
    assert_eq!(mesh.ask().status, 0, "traffic for the agent is not sent elsewhere");
    assert_eq!(responding_endpoints(&mesh).len(), 2, "sidecars do not need the agent");

    mesh.agent.restart();
    mesh.assert_healthy();
}

#[test]
fn killed_agent_keeps_flows_of_the_kernel_path() {
    let mut mesh = TestMesh::builder().start();
    let (mut flow, replica) = mesh.open_flow().expect("the echo service accepts the connection");
    mesh.agent.process.kill();
    assert_eq!(flow.send_line("ping"), Some(replica.clone()));
    mesh.assert_traffic_flows();

    mesh.agent.restart();
    assert_eq!(flow.send_line("ping again"), Some(replica));
    mesh.assert_healthy();
}

#[test]
fn requests_fail_over_when_a_sidecar_is_killed() {
    let mut mesh = TestMesh::builder().start();
    assert_eq!(responding_endpoints(&mesh).len(), 2);
    mesh.orders[0].sidecar.process.kill();
    assert_eq!(responding_endpoints(&mesh), BTreeSet::from(["orders-2".to_owned()]));
    mesh.assert_traffic_flows();

    mesh.orders[0].sidecar.restart();
    eventually("both endpoints serve again", || {
        (responding_endpoints(&mesh).len() == 2).then_some(())
    });
    mesh.assert_healthy();
}

#[test]
fn traffic_continues_without_control_plane_and_changes_apply_after_its_restart() {
    let mut mesh = TestMesh::builder().start();
    mesh.control.process.kill();
    mesh.assert_traffic_flows();

    mesh.control.restart();
    mesh.change(|file| file.policy("orders").allow_methods(&["PUT"]));
    eventually("web may no longer GET", || (mesh.ask_orders().status == 403).then_some(()));
    mesh.change(|file| file.policy("orders").allow_methods(&["GET"]));
    // Each endpoint, and each of its workers, applies the change at its own time.
    eventually("web may GET again", || {
        (0..16).all(|_| mesh.ask_orders().status == 200).then_some(())
    });
    mesh.assert_healthy();
}

#[test]
fn configuration_with_a_duplicate_address_is_rejected_and_the_last_good_one_stays() {
    let mut mesh = TestMesh::builder().start();
    mesh.change(|file| {
        let addresses = file.service("web").field("addresses");
        file.service("orders").set("addresses", addresses);
    });
    let rejected = eventually("the control plane rejects the configuration", || {
        let dump: Value = serde_json::from_slice(&mesh.control.admin("/config_dump").body).ok()?;
        Some(dump["rejected"][0].as_str()?.to_owned())
    });
    for part in ["services[1].addresses[0]", "10.96.0.1", "web"] {
        assert!(rejected.contains(part), "{rejected:?} does not contain {part:?}");
    }
    mesh.assert_healthy();
}

#[test]
fn join_token_admits_one_workload_only() {
    let mut mesh = TestMesh::builder().start();
    let thief = mesh.host("thief");
    let second = mesh.join("thief", &thief, "web", &["sidecar", "--service", "web"]);
    eventually("the second workload is rejected with a reason", || {
        second.process.errors().contains("invalid join token: unknown, already used").then_some(())
    });
    let ready = second.admin("/ready");
    assert_eq!(ready.status, 503, "{ready:?}");
    let host = mesh.host("other");
    let other = mesh.join("other", &host, "orders-1", &["sidecar", "--service", "web"]);
    eventually("a workload with the token of another service is rejected", || {
        other.process.errors().contains("join token").then_some(())
    });
    mesh.assert_healthy();
}

/// Sends bytes and reads until the peer ends the connection; a reset counts as an end.
fn send_and_drain(to: SocketAddr, bytes: &[u8]) {
    let mut stream =
        TcpStream::connect_timeout(&to, DEADLINE).expect("the port accepts connections");
    stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    // The peer may close the connection before it has read everything.
    if stream.write_all(bytes).is_ok() {
        drop(stream.shutdown(Shutdown::Write));
    }
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_ne!(
            error.kind(),
            std::io::ErrorKind::WouldBlock,
            "{to} keeps an unusable connection open"
        );
    }
}

#[test]
fn garbage_on_ports_of_agent_and_control_plane_does_not_disturb_traffic() {
    let mut mesh = TestMesh::builder().start();
    let control = IpAddr::from(mesh.control_host().address);
    let router = IpAddr::from([10, 90, 1, 1]);
    let client = mesh.client.clone();
    for (turn, bytes) in (0..).zip([1, 3, 100, 70_000]) {
        let random = garbage(turn, bytes);
        for words in [&random[..], TRUNCATED_HANDSHAKE, OVERSIZED_HTTP2_FRAME, b""] {
            let address = SocketAddr::new(control, 15010);
            client
                .on(|| send_and_drain(address, words))
                .expect("the host's namespace can be entered");
            // The agent's port, dialled directly and not through a redirect.
            client
                .on(|| drop(TcpStream::connect((router, 15001))))
                .expect("the host's namespace can be entered");
        }
    }
    client
        .on(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a port is free");
            for size in [0, 1, 1200, 60_000] {
                for target in [(router, 15099), ([10, 96, 0, 3].into(), 7001)] {
                    // Whether the datagram is accepted does not matter.
                    drop(socket.send_to(&garbage(size, size as usize), target));
                }
            }
        })
        .expect("the host's namespace can be entered");
    mesh.assert_healthy();
}

#[test]
fn silent_connections_do_not_block_the_control_plane() {
    let mut mesh = TestMesh::builder().start();
    let control: SocketAddr = (mesh.control_host().address, 15010).into();
    let silent: Vec<TcpStream> = mesh
        .client
        .on(|| (0..200).filter_map(|_| TcpStream::connect(control).ok()).collect())
        .expect("the host's namespace can be entered");
    assert_eq!(silent.len(), 200);
    mesh.change(|file| file.policy("orders").allow_methods(&["PUT"]));
    eventually("a change still arrives", || (mesh.ask_orders().status == 403).then_some(()));
    mesh.orders[0].sidecar.restart();
    drop(silent);
}
