//! Misconfigurations of the agent and limits of its host: loops to its own listeners, a full
//! conntrack table, too few file descriptors.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use weft_integration::agent::TestAgent;
use weft_integration::bootstrap::{bootstrap, static_cluster, tcp_listener, with};
use weft_integration::port;
use weft_integration::process::{run, weft};
use weft_integration::wait::{DEADLINE, eventually};

/// A listener that proxies TCP to a cluster.
fn to(cluster: &str, name: &str, at: SocketAddr) -> Value {
    tcp_listener(name, at, json!({"cluster": cluster}))
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn problems(agent: &TestAgent) -> Vec<String> {
    let dump = agent.dump();
    let problems = dump.get("problems").and_then(Value::as_array).expect("the dump lists problems");
    problems.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

#[test]
fn endpoint_that_is_the_agents_own_listener_is_left_out() {
    let endpoint = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let good = endpoint.local_addr().expect("the socket is bound");
    let [exact, everywhere, looped] = [port::free(), port::free(), port::free()];
    let onward = port::free();
    let virtual_one: SocketAddr = "10.96.0.9:80".parse().expect("an address");
    let looping = [local(exact), local(everywhere), virtual_one];
    let agent = TestAgent::start(
        |admin| {
            let mixed = static_cluster("mixed", &[&[good], &looping[..]].concat());
            let listeners = [
                to("mixed", "exact", local(exact)),
                to("mixed", "everywhere", (Ipv4Addr::UNSPECIFIED, everywhere).into()),
                with(to("mixed", "virtual", virtual_one), "bind_to_port", json!(false)),
                to("loop", "loop", local(looped)),
                to("onward", "onward", local(onward)),
            ];
            // A listener in front of another one is allowed, if it does not lead back.
            let onward = static_cluster("onward", &[local(exact)]);
            let looped = static_cluster("loop", &[local(looped)]);
            bootstrap(admin, &listeners, &[mixed, looped, onward])
        },
        &[],
    );
    let reported = problems(&agent);
    for (endpoint, listener) in looping.iter().zip(["exact", "everywhere", "virtual"]) {
        let wanted = format!(
            "cluster \"mixed\": endpoint {endpoint} is excluded: it is this agent's own listener \"{listener}\""
        );
        assert!(
            reported.iter().any(|problem| problem.starts_with(&wanted)),
            "{wanted}: {reported:#?}"
        );
    }
    assert_eq!(reported.len(), 4, "{reported:#?}");
    assert_eq!(agent.metric("weft_agent_looping_endpoints"), 4);

    let admin = format!("127.0.0.1:{}", agent.admin);
    let status = run(weft().args(["status", "--admin", &admin]));
    assert!(status.starts_with("ready        yes\n"), "{status}");
    assert!(
        status.contains(&format!("problem      {}", reported.first().expect("four"))),
        "{status}"
    );

    // Every flow goes to the remaining endpoint; with the other one, some flows would loop.
    for _ in 0..32 {
        let client = TcpStream::connect(local(onward)).expect("the agent listens");
        let (stream, _) = endpoint.accept().expect("the connection reaches the endpoint");
        drop((client, stream));
    }
    let refused = "weft_agent_refused_total{reason=\"no_endpoint\"}";
    let before = agent.metric(refused);
    let mut client = TcpStream::connect(local(looped)).expect("the agent listens");
    client.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    assert!(matches!(client.read(&mut [0; 1]), Ok(0) | Err(_)), "the connection has no endpoint");
    assert_eq!(agent.metric(refused), before + 1);
}

#[test]
fn conntrack_table_usage_is_reported() {
    let port = port::free();
    let agent = TestAgent::start(
        |admin| {
            let listener = to("none", "tcp", local(port));
            bootstrap(admin, &[listener], &[static_cluster("none", &[])])
        },
        &[],
    );
    let limit = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max");
    let limit: u64 =
        limit.expect("the kernel reports the limit").trim().parse().expect("the text is a number");
    assert_eq!(agent.metric("weft_agent_conntrack_limit"), limit);
    assert!(agent.metric("weft_agent_conntrack_entries") < limit);
}

/// The CPU time that a process has used, in hundredths of a second.
fn used(process: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("the process runs");
    let (_, rest) = stat.rsplit_once(')').expect("the process name is in parentheses");
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
    ticks(11)
        .zip(ticks(12))
        .map(|(user, system)| user + system)
        .expect("stat has user and system time")
}

/// Sends a byte and waits for its echo.
fn is_echoed(stream: &mut TcpStream) -> bool {
    stream.write_all(b"?").and_then(|()| stream.read_exact(&mut [0; 1])).is_ok()
}

#[test]
fn agent_without_file_descriptors_serves_old_connections_and_refuses_new_ones_without_spinning() {
    let endpoint = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let at = endpoint.local_addr().expect("the socket is bound");
    std::thread::spawn(move || {
        for mut stream in endpoint.incoming().flatten() {
            std::thread::spawn(move || {
                let mut byte = [0; 1];
                while stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {}
            });
        }
    });
    let port = port::free();
    let agent = TestAgent::start(
        |admin| {
            let listener = to("echo", "tcp", local(port));
            bootstrap(admin, &[listener], &[static_cluster("echo", &[at])])
        },
        &[],
    );
    let id = agent.process.id();
    let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the agent listens");
    let mut old = connect();
    assert!(is_echoed(&mut old));
    run(Command::new("prlimit").args(["--pid", &id.to_string(), "--nofile=60:60"]));
    // Many more connections than its descriptors allow.
    let many: Vec<TcpStream> = std::iter::repeat_with(connect).take(80).collect();
    old.set_read_timeout(Some(Duration::from_secs(2))).expect("the timeout is not zero");
    let before = used(id);
    let waited = old.read(&mut [0; 1]).expect_err("no data is sent");
    assert!(matches!(waited.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{waited}");
    let spent = used(id) - before;
    assert!(spent <= 20, "{spent} hundredths of a second in two seconds");
    assert!(is_echoed(&mut old), "the earlier connection still works");

    drop(many);
    eventually("new connections are served again", || is_echoed(&mut connect()).then_some(()));
    assert!(is_echoed(&mut old));
    assert!(agent.metric("weft_agent_refused_total{reason=\"limit\"}") > 0);
    assert_eq!(agent.metric("weft_agent_refused_total{reason=\"unreachable\"}"), 0);
}

#[test]
fn endpoint_of_another_address_family_is_reported() {
    let other_family: SocketAddr = "[fd01::1]:80".parse().expect("an address");
    let keeping = |name: &str, at: SocketAddr| {
        let filter = json!({"@type":
            "type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc"});
        let filters = json!([{"name": "source", "typed_config": filter}]);
        with(to(name, name, at), "listener_filters", filters)
    };
    let own = local(port::free());
    let strange = local(port::free());
    let agent = TestAgent::start(
        |admin| {
            let listeners = [keeping("own", own), keeping("strange", strange)];
            let clusters = [
                static_cluster("own", &[local(port::free())]),
                static_cluster("strange", &[local(port::free()), other_family]),
            ];
            bootstrap(admin, &listeners, &clusters)
        },
        &[],
    );
    let wanted = format!(
        "listener \"strange\": endpoint {other_family} is of another address family than its clients"
    );
    let reported = problems(&agent);
    assert_eq!(reported.len(), 1, "{reported:?}");
    assert!(reported.first().is_some_and(|problem| problem.starts_with(&wanted)), "{reported:?}");
}
