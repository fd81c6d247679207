//! Idle timeout of TCP connections on the agent's proxy path.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_integration::agent::TestAgent;
use weft_integration::bootstrap::{bootstrap, static_cluster, tcp_listener, with};
use weft_integration::port;
use weft_integration::wait::{DEADLINE, eventually};

/// A listener with an idle timeout of one second; `end` is its `idle_end`.
fn listener(at: SocketAddr, end: Option<&str>) -> Value {
    let listener = tcp_listener("tcp", at, json!({"cluster": "c", "idle_timeout": "1s"}));
    let Some(end) = end else { return listener };
    with(listener, "metadata", json!({"filter_metadata": {"weft": {"idle_end": end}}}))
}

/// A connection through an agent: the agent, the client's socket and the server's.
fn connection(end: Option<&str>) -> (TestAgent, TcpStream, TcpStream) {
    let endpoint = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let cluster = static_cluster("c", &[endpoint.local_addr().expect("the socket is bound")]);
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port::free()));
    let agent = TestAgent::start(|admin| bootstrap(admin, &[listener(at, end)], &[cluster]), &[]);
    let client = TcpStream::connect(at).expect("the agent listens");
    let (server, _) = endpoint.accept().expect("the agent connects");
    for side in [&client, &server] {
        side.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    }
    (agent, client, server)
}

/// How the connection ended for this side: by a reset or an orderly close.
fn observed_end(side: &mut TcpStream) -> String {
    match side.read(&mut [0; 8]) {
        Ok(0) => "close".to_owned(),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => "reset".to_owned(),
        other => format!("{other:?}"),
    }
}

#[expect(clippy::disallowed_methods, reason = "the test measures the timeout")]
fn now() -> Instant {
    Instant::now()
}

#[test]
fn idle_connection_is_closed_or_reset_as_configured() {
    for (wanted, expected) in [(None, "reset"), (Some("reset"), "reset"), (Some("close"), "close")]
    {
        let (agent, mut client, mut server) = connection(wanted);
        client.write_all(b"hello").expect("the connection is open");
        server.read_exact(&mut [0; 5]).expect("the data arrives");
        let idle_since = now();
        assert_eq!(observed_end(&mut client), expected);
        let idle = now() - idle_since;
        assert!(idle >= Duration::from_millis(900), "the connection ended after {idle:?}");
        assert!(idle < Duration::from_millis(1900), "the connection ended after {idle:?}");
        assert_eq!(observed_end(&mut server), expected);
        eventually("the connection is not counted as open", || {
            (agent.metric("weft_agent_connections_open{path=\"proxy\"}") == 0).then_some(())
        });
    }
}

#[test]
fn one_way_traffic_keeps_a_connection_from_being_idle() {
    let (_agent, client, mut server) = connection(None);
    client.set_read_timeout(Some(Duration::from_millis(300))).expect("the timeout is not zero");
    let mut client = client;
    // Ten pauses of 0.3 s exceed the idle timeout three times; data flows in one direction only.
    for _ in 0..10 {
        let idle = client.read(&mut [0; 1]).expect_err("the server says nothing");
        assert!(matches!(idle.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{idle}");
        client.write_all(b"?").expect("the connection is open");
        server.read_exact(&mut [0; 1]).expect("the data arrives");
    }
}

#[test]
fn service_with_idle_end_uses_the_proxy_path() {
    let at = SocketAddr::from(([10, 96, 0, 9], 80));
    let listener = with(listener(at, Some("reset")), "bind_to_port", json!(false));
    let cluster = static_cluster("c", &[SocketAddr::from(([10, 1, 0, 1], 8080))]);
    let agent =
        TestAgent::start(|admin| bootstrap(admin, &[listener], &[cluster]), &["--path", "kernel"]);
    let services = agent.services();
    let service = services.first().expect("the agent has a service");
    assert_eq!(service.get("path"), Some(&json!("proxy")), "{service}");
    let why = service.get("why").and_then(Value::as_str).expect("the service has a reason");
    assert!(why.starts_with("it sets idle_end"), "{why}");
}
