//! What a mesh promises when things go wrong, each with a whole mesh.

use std::collections::BTreeSet;
use std::fs::DirEntry;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use weft_integration::mesh::{MeshIpFamily, TestMesh};
use weft_integration::wait::{DEADLINE, eventually};
use weft_model::{FlowKey, FlowTuple, Transport};

/// The start of a TLS record that announces a handshake, and then whatever.
const HALF_A_HANDSHAKE: &[u8] = &[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3, 7, 7, 7];
/// HTTP/2's preface, then a frame that is longer than any may be.
const HTTP2_THEN_NONSENSE: &[u8] =
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x04\x00\x00\x00\x00\x00";

fn noise(seed: u32, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// The replicas that answer `web`'s program, asked often enough to meet each.
fn replicas(mesh: &TestMesh) -> BTreeSet<String> {
    let ask = || {
        let answer = mesh.ask_orders();
        assert_eq!(answer.status, 200, "{answer:?}");
        let said: Value = serde_json::from_slice(&answer.body).expect("the service says JSON");
        let replica = said.get("replica").and_then(Value::as_str);
        replica.expect("it says which it is").to_owned()
    };
    std::iter::repeat_with(ask).take(12).collect()
}

#[test]
fn a_mesh_carries_requests_flows_and_datagrams() {
    let mut mesh = TestMesh::start();
    let answer = mesh.ask().text();
    assert!(answer.contains("/sa/client") && answer.contains("/sa/web"), "{answer}");
    mesh.assert_healthy();
}

/// The sockets that a thread's table of open files holds.
fn sockets(table: &Path) -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir(table).expect("the process runs").flatten();
    let held = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    held.filter(|file| file.to_string_lossy().starts_with("socket:")).collect()
}

#[test]
fn workers_hold_nothing_open_that_the_rest_of_the_process_closes() {
    let mesh = TestMesh::start();
    mesh.assert_traffic_flows();
    for (role, worker) in [(&mesh.agent, "agent-0"), (&mesh.web.sidecar, "sidecar-0")] {
        let process = PathBuf::from(format!("/proc/{}", role.process.id()));
        let mut tasks = std::fs::read_dir(process.join("task")).expect("it runs").flatten();
        let is_worker = |task: &DirEntry| {
            let name = std::fs::read_to_string(task.path().join("comm"));
            name.is_ok_and(|name| name.trim() == worker)
        };
        let task = tasks.find(is_worker).expect("it has a worker").path();
        let (own, rest) = (sockets(&task.join("fd")), sockets(&process.join("fd")));
        assert!(!rest.is_empty(), "the admin port, and the connection to the control plane");
        let both: Vec<_> = own.intersection(&rest).collect();
        // Two sockets wake whoever waits for signals, and are there before anything else is.
        assert!(both.len() <= 2, "{worker} holds too: {both:?}");
    }
}

/// The hash of a flow, as the agent tells it.
fn told_hash(mesh: &TestMesh, flow: &FlowTuple) -> Option<Value> {
    let query =
        format!("/flow?transport=tcp&client={}&destination={}", flow.client, flow.destination);
    let told: Value = serde_json::from_slice(&mesh.agent.admin(&query).body).ok()?;
    told.get("hash").cloned()
}

#[test]
fn flows_are_hashed_with_a_seed_of_the_meshs_own_that_outlives_a_restart() {
    let mut mesh = TestMesh::start();
    let client = SocketAddr::from(([10, 9, 9, 9], 4000));
    let flow = FlowTuple { transport: Transport::Tcp, client, destination: mesh.echo() };
    let hash = told_hash(&mesh, &flow).expect("the agent explains");
    let without_one = flow.hash(FlowKey::FiveTuple, 0, 0x5eed);
    assert_ne!(hash, json!(without_one), "it is not the seed that everybody knows");
    let dump = mesh.agent.admin("/config_dump").text();
    assert!(dump.contains("\"flow_seed\": \"[redacted]\""), "the seed is nobody's to read");

    mesh.control.restart();
    mesh.agent.restart();
    assert_eq!(told_hash(&mesh, &flow), Some(hash));
}

#[test]
fn a_mesh_of_ipv6_alone_does_the_same() {
    let mut mesh = TestMesh::start_in_family(MeshIpFamily::V6);
    let answer = mesh.ask().text();
    assert!(answer.contains("/sa/client") && answer.contains("/sa/web"), "{answer}");
    mesh.assert_healthy();
}

#[test]
fn an_agent_that_is_killed_takes_only_its_own_flows_along() {
    let mut mesh = TestMesh::start_with_agent_arguments(MeshIpFamily::V4, &["--path", "proxy"]);
    let (mut flow, _) = mesh.open_flow().expect("the echo service greets");
    mesh.agent.process.kill();

    assert_eq!(flow.send_line("still there?"), None, "the flow went through the agent");
    assert_eq!(mesh.ask().status, 0, "what the agent should take goes nowhere else");
    assert_eq!(replicas(&mesh).len(), 2, "sidecars do not need the agent");

    mesh.agent.restart();
    mesh.assert_healthy();
}

#[test]
fn an_agent_that_is_killed_takes_no_flow_along_that_the_kernel_carries() {
    let mut mesh = TestMesh::start();
    let (mut flow, replica) = mesh.open_flow().expect("the echo service greets");
    mesh.agent.process.kill();
    assert_eq!(flow.send_line("still there?"), Some(replica.clone()));
    mesh.assert_traffic_flows();

    mesh.agent.restart();
    assert_eq!(flow.send_line("and now?"), Some(replica));
    mesh.assert_healthy();
}

#[test]
fn a_sidecar_that_is_killed_is_replaced_by_the_other_replica() {
    let mut mesh = TestMesh::start();
    assert_eq!(replicas(&mesh).len(), 2);
    mesh.orders[0].sidecar.process.kill();
    assert_eq!(replicas(&mesh), BTreeSet::from(["orders-2".to_owned()]));
    mesh.assert_traffic_flows();

    mesh.orders[0].sidecar.restart();
    eventually("both replicas serve again", || (replicas(&mesh).len() == 2).then_some(()));
    mesh.assert_healthy();
}

#[test]
fn a_control_plane_that_is_killed_is_not_missed_and_leads_again_when_it_is_back() {
    let mut mesh = TestMesh::start();
    mesh.control.process.kill();
    mesh.assert_traffic_flows();

    mesh.control.restart();
    mesh.change(|mesh| mesh["security"]["policies"][1]["allow"][0]["methods"] = json!(["PUT"]));
    eventually("web may no longer GET", || (mesh.ask_orders().status == 403).then_some(()));
    mesh.change(|mesh| mesh["security"]["policies"][1]["allow"][0]["methods"] = json!(["GET"]));
    // Every replica, and every worker of each, takes the change over in its own time.
    eventually("web may GET again", || {
        (0..16).all(|_| mesh.ask_orders().status == 200).then_some(())
    });
    mesh.assert_healthy();
}

#[test]
fn two_services_on_one_address_are_refused_and_nothing_changes() {
    let mut mesh = TestMesh::start();
    mesh.change(|mesh| mesh["services"][1]["addresses"] = mesh["services"][0]["addresses"].clone());
    let rejected = eventually("the control plane refuses it", || {
        let dump: Value = serde_json::from_slice(&mesh.control.admin("/config_dump").body).ok()?;
        Some(dump["rejected"][0].as_str()?.to_owned())
    });
    for part in ["services[1].addresses[0]", "10.96.0.1", "web"] {
        assert!(rejected.contains(part), "{rejected:?} does not say {part:?}");
    }
    mesh.assert_healthy();
}

#[test]
fn a_join_token_lets_one_workload_in_and_no_second() {
    let mut mesh = TestMesh::start();
    let thief = mesh.host("thief");
    let second = mesh.join("thief", &thief, "web", &["sidecar", "--service", "web"]);
    eventually("the second is refused, and says why", || {
        second.process.errors().contains("invalid join token: unknown, already used").then_some(())
    });
    let ready = second.admin("/ready");
    assert_eq!(ready.status, 503, "{ready:?}");
    let host = mesh.host("other");
    let other = mesh.join("other", &host, "orders-1", &["sidecar", "--service", "web"]);
    eventually("so is one with the token of another service", || {
        other.process.errors().contains("join token").then_some(())
    });
    mesh.assert_healthy();
}

/// Sends bytes and takes in what comes back, until the other side ends it. Being reset is an end.
fn say(to: SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect_timeout(&to, DEADLINE).expect("somebody listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("it is above zero");
    // It may be refused before all was read.
    if stream.write_all(bytes).is_ok() {
        drop(stream.shutdown(Shutdown::Write));
    }
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_ne!(
            error.kind(),
            std::io::ErrorKind::WouldBlock,
            "{to} keeps a hopeless connection"
        );
    }
}

#[test]
fn noise_on_the_ports_of_agent_and_control_plane_harms_nobody() {
    let mut mesh = TestMesh::start();
    let control = IpAddr::from(mesh.control_host().address);
    let router = IpAddr::from([10, 90, 1, 1]);
    let client = mesh.client.clone();
    for (turn, bytes) in (0..).zip([1, 3, 100, 70_000]) {
        let random = noise(turn, bytes);
        for words in [&random[..], HALF_A_HANDSHAKE, HTTP2_THEN_NONSENSE, b""] {
            let say = |port| client.on(|| say((control, port).into(), words));
            say(15010).expect("the host can be entered");
            // The agent's port, dialled itself and not by a redirect.
            client.on(|| drop(TcpStream::connect((router, 15001)))).expect("it can be entered");
        }
    }
    client
        .on(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a port is free");
            for size in [0, 1, 1200, 60_000] {
                for target in [(router, 15099), ([10, 96, 0, 3].into(), 7001)] {
                    // Whether it is taken is not the point.
                    drop(socket.send_to(&noise(size, size as usize), target));
                }
            }
        })
        .expect("the host can be entered");
    mesh.assert_healthy();
}

#[test]
fn connections_that_say_nothing_do_not_keep_others_from_the_control_plane() {
    let mut mesh = TestMesh::start();
    let control: SocketAddr = (mesh.control_host().address, 15010).into();
    let silent: Vec<TcpStream> = mesh
        .client
        .on(|| (0..200).filter_map(|_| TcpStream::connect(control).ok()).collect())
        .expect("the host can be entered");
    assert_eq!(silent.len(), 200);
    mesh.change(|mesh| mesh["security"]["policies"][1]["allow"][0]["methods"] = json!(["PUT"]));
    eventually("a change still arrives", || (mesh.ask_orders().status == 403).then_some(()));
    mesh.orders[0].sidecar.restart();
    drop(silent);
}
