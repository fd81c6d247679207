//! TCP connections on the proxy path while nothing is said.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_integration::agent::TestAgent;
use weft_integration::bootstrap::{bootstrap, static_cluster, tcp_listener, with};
use weft_integration::port;
use weft_integration::wait::{DEADLINE, eventually};

/// A listener with an idle timeout of a second, whose silent connections end as `end` says.
fn listener(at: SocketAddr, end: Option<&str>) -> Value {
    let listener = tcp_listener("tcp", at, json!({"cluster": "c", "idle_timeout": "1s"}));
    let Some(end) = end else { return listener };
    with(listener, "metadata", json!({"filter_metadata": {"weft": {"idle_end": end}}}))
}

/// A connection through an agent: both of its sides.
fn connection(end: Option<&str>) -> (TestAgent, TcpStream, TcpStream) {
    let endpoint = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let cluster = static_cluster("c", &[endpoint.local_addr().expect("it is bound")]);
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port::free()));
    let agent = TestAgent::start(|admin| bootstrap(admin, &[listener(at, end)], &[cluster]), &[]);
    let client = TcpStream::connect(at).expect("the agent listens");
    let (server, _) = endpoint.accept().expect("the agent connects");
    for side in [&client, &server] {
        side.set_read_timeout(Some(DEADLINE)).expect("it is above zero");
    }
    (agent, client, server)
}

/// How a side that waits sees the end: by a reset, or in good order.
fn end_seen(side: &mut TcpStream) -> String {
    match side.read(&mut [0; 8]) {
        Ok(0) => "close".to_owned(),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => "reset".to_owned(),
        other => format!("{other:?}"),
    }
}

#[allow(clippy::disallowed_methods, reason = "the timeout itself is what is tested")]
fn now() -> Instant {
    Instant::now()
}

#[test]
fn a_silent_connection_ends_as_it_is_wanted() {
    for (wanted, seen) in [(None, "reset"), (Some("reset"), "reset"), (Some("close"), "close")] {
        let (agent, mut client, mut server) = connection(wanted);
        client.write_all(b"hello").expect("it is open");
        server.read_exact(&mut [0; 5]).expect("it arrives");
        let silent_since = now();
        assert_eq!(end_seen(&mut client), seen);
        let silent = now() - silent_since;
        assert!(silent >= Duration::from_millis(900), "it ended after {silent:?}");
        assert!(silent < Duration::from_millis(1900), "it ended after {silent:?}");
        assert_eq!(end_seen(&mut server), seen);
        eventually("the record of it", || {
            (agent.metric("weft_agent_connections_open{path=\"proxy\"}") == 0).then_some(())
        });
    }
}

#[test]
fn a_connection_that_one_side_uses_is_not_silent() {
    let (_agent, client, mut server) = connection(None);
    client.set_read_timeout(Some(Duration::from_millis(300))).expect("it is above zero");
    let mut client = client;
    // Ten pauses of 0.3 s each, three timeouts in all, and only one direction speaks.
    for _ in 0..10 {
        let silent = client.read(&mut [0; 1]).expect_err("the server says nothing");
        assert!(matches!(silent.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{silent}");
        client.write_all(b"?").expect("it is open");
        server.read_exact(&mut [0; 1]).expect("it arrives");
    }
}

#[test]
fn what_must_be_seen_is_not_left_to_the_kernel() {
    let at = SocketAddr::from(([10, 96, 0, 9], 80));
    let listener = with(listener(at, Some("reset")), "bind_to_port", json!(false));
    let cluster = static_cluster("c", &[SocketAddr::from(([10, 1, 0, 1], 8080))]);
    let agent =
        TestAgent::start(|admin| bootstrap(admin, &[listener], &[cluster]), &["--path", "kernel"]);
    let services = agent.services();
    let service = services.first().expect("there is one");
    assert_eq!(service.get("path"), Some(&json!("proxy")), "{service}");
    let why = service.get("why").and_then(Value::as_str).expect("it says why");
    assert!(why.starts_with("it sets idle_end"), "{why}");
}
