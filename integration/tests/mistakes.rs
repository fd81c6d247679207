//! Configurations and surroundings that cannot work, and what an agent makes of them.

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

/// A listener that moves TCP to a cluster.
fn to(cluster: &str, name: &str, at: SocketAddr) -> Value {
    tcp_listener(name, at, json!({"cluster": cluster}))
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn problems(agent: &TestAgent) -> Vec<String> {
    let dump = agent.dump();
    let problems = dump.get("problems").and_then(Value::as_array).expect("it lists problems");
    problems.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

#[test]
fn an_endpoint_that_is_the_agents_own_listener_gets_no_flows() {
    let backend = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let good = backend.local_addr().expect("it is bound");
    let [exact, everywhere, alone] = [port::free(), port::free(), port::free()];
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
                to("alone", "alone", local(alone)),
                to("onward", "onward", local(onward)),
            ];
            // A listener before another one is no loop, as long as nothing leads back.
            let onward = static_cluster("onward", &[local(exact)]);
            let alone = static_cluster("alone", &[local(alone)]);
            bootstrap(admin, &listeners, &[mixed, alone, onward])
        },
        &[],
    );
    let told = problems(&agent);
    for (endpoint, listener) in looping.iter().zip(["exact", "everywhere", "virtual"]) {
        let wanted = format!(
            "cluster \"mixed\": endpoint {endpoint} is excluded: it is this agent's own listener \"{listener}\""
        );
        assert!(told.iter().any(|problem| problem.starts_with(&wanted)), "{wanted}: {told:#?}");
    }
    assert_eq!(told.len(), 4, "{told:#?}");
    assert_eq!(agent.metric("weft_agent_looping_endpoints"), 4);

    let admin = format!("127.0.0.1:{}", agent.admin);
    let said = run(weft().args(["status", "--admin", &admin]));
    assert!(said.starts_with("ready        yes\n"), "{said}");
    assert!(said.contains(&format!("problem      {}", told.first().expect("four"))), "{said}");

    // Every flow goes to the one that is left; by any hash, some would have gone round.
    for _ in 0..32 {
        let client = TcpStream::connect(local(onward)).expect("the agent listens");
        let (stream, _) = backend.accept().expect("the endpoint is reached");
        drop((client, stream));
    }
    let refused = "weft_agent_refused_total{reason=\"no_endpoint\"}";
    let before = agent.metric(refused);
    let mut client = TcpStream::connect(local(alone)).expect("the agent listens");
    client.set_read_timeout(Some(DEADLINE)).expect("it is above zero");
    assert!(matches!(client.read(&mut [0; 1]), Ok(0) | Err(_)), "it is not carried");
    assert_eq!(agent.metric(refused), before + 1);
}

#[test]
fn the_kernels_table_of_connections_is_watched() {
    let port = port::free();
    let agent = TestAgent::start(
        |admin| {
            let listener = to("none", "tcp", local(port));
            bootstrap(admin, &[listener], &[static_cluster("none", &[])])
        },
        &[],
    );
    let limit = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max");
    let limit: u64 = limit.expect("the kernel tells").trim().parse().expect("a number");
    assert_eq!(agent.metric("weft_agent_conntrack_limit"), limit);
    assert!(agent.metric("weft_agent_conntrack_entries") < limit);
}

/// Processor time that a process has used, in hundredths of a second.
fn used(process: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("it runs");
    let (_, rest) = stat.rsplit_once(')').expect("its name is in brackets");
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
    ticks(11).zip(ticks(12)).map(|(user, system)| user + system).expect("it tells both")
}

/// Says a byte and waits for it to come back.
fn is_echoed(stream: &mut TcpStream) -> bool {
    stream.write_all(b"?").and_then(|()| stream.read_exact(&mut [0; 1])).is_ok()
}

#[test]
fn without_descriptors_the_old_goes_on_the_new_is_refused_and_nothing_spins() {
    let backend = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let at = backend.local_addr().expect("it is bound");
    std::thread::spawn(move || {
        for mut stream in backend.incoming().flatten() {
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
    // Far more than its descriptors are good for.
    let many: Vec<TcpStream> = std::iter::repeat_with(connect).take(80).collect();
    old.set_read_timeout(Some(Duration::from_secs(2))).expect("it is above zero");
    let before = used(id);
    let waited = old.read(&mut [0; 1]).expect_err("nothing was said");
    assert!(matches!(waited.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{waited}");
    let spent = used(id) - before;
    assert!(spent <= 20, "{spent} hundredths of a second in two seconds");
    assert!(is_echoed(&mut old), "what was there goes on");

    drop(many);
    eventually("there is room again", || is_echoed(&mut connect()).then_some(()));
    assert!(is_echoed(&mut old));
    assert!(agent.metric("weft_agent_refused_total{reason=\"limit\"}") > 0);
    assert_eq!(agent.metric("weft_agent_refused_total{reason=\"unreachable\"}"), 0);
}

#[test]
fn clients_that_endpoints_cannot_see_are_told_of() {
    let other_family: SocketAddr = "[fd01::1]:80".parse().expect("an address");
    let keeping = |name: &str, at: SocketAddr| {
        let filter = json!({"@type":
            "type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc"});
        let filters = json!([{"name": "source", "typed_config": filter}]);
        with(to(name, name, at), "listener_filters", filters)
    };
    let (own, strange) = (local(port::free()), local(port::free()));
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
        "listener \"strange\": endpoint {other_family} is not of its clients' family of addresses"
    );
    let told = problems(&agent);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told.first().is_some_and(|problem| problem.starts_with(&wanted)), "{told:?}");
}
