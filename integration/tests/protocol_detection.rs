//! Protocol detection where no setting names the protocol: by the first bytes of the client or, when the client stays
//! silent, of the service.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use weft_integration::bootstrap::{allow_only, cluster, route_to};
use weft_integration::http1::Http1Client;
use weft_integration::http2;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

/// A service that sends a greeting to every client and then echoes each line, with its number of connections.
fn greeter() -> (ScriptedServer, Arc<AtomicUsize>) {
    let connections = Arc::<AtomicUsize>::default();
    let count = connections.clone();
    let backend = ScriptedServer::start(move |mut stream: TcpStream| {
        count.fetch_add(1, Ordering::Relaxed);
        if stream.write_all(b"220 ready\r\n").is_err() {
            return;
        }
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        while lines.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            if lines.get_mut().write_all(line.as_bytes()).is_err() {
                return;
            }
            line.clear();
        }
    });
    (backend, connections)
}

#[test]
fn greeting_of_a_server_first_service_reaches_the_client() {
    let (greeter, _) = greeter();
    let alone = SingleSidecarConfig::for_upstream(greeter.port, UpstreamHttp::Http1).start();
    for turn in 1..=3 {
        let mut client = Http1Client::connect(alone.port);
        assert_eq!(client.bytes(11).as_deref(), Some("220 ready\r\n"), "turn {turn}");
        client.send("EHLO a\r\n");
        assert_eq!(client.bytes(8).as_deref(), Some("EHLO a\r\n"), "turn {turn}");
        client.finish();
        assert!(client.is_at_end(), "turn {turn}");
        assert_eq!(alone.metric("weft_sidecar_server_first_connections_total"), turn);
        let line = alone.access_line("\"kind\":\"tcp\"");
        let fields = ["connection_termination_details", "upstream_cluster"];
        assert_eq!(fields.map(|field| &line[field]), ["closed", "service"], "{line}");
        let bytes = ["bytes_received", "bytes_sent"].map(|field| line[field].as_u64());
        assert_eq!(bytes, [Some(8), Some(19)], "{line}");
    }
}

/// An HTTP/1.1 service, with its number of connections.
fn counting() -> (ScriptedServer, Arc<AtomicUsize>) {
    let connections = Arc::<AtomicUsize>::default();
    let count = connections.clone();
    let backend = ScriptedServer::start(move |stream| {
        count.fetch_add(1, Ordering::Relaxed);
        let mut reader = BufReader::new(stream);
        while read_head(&mut reader).is_some() {
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
            if reader.get_mut().write_all(answer).is_err() {
                return;
            }
        }
    });
    (backend, connections)
}

#[test]
fn client_that_sends_its_request_late_is_served() {
    let (service, connections) = counting();
    let alone = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1).start();
    let mut client = Http1Client::connect(alone.port);
    // The client stays silent long enough that the sidecar opens a connection to the service.
    eventually("the sidecar connected to the service", || {
        (connections.load(Ordering::Relaxed) == 1).then_some(())
    });
    assert_eq!(client.ask("GET / HTTP/1.1\r\nhost: a\r\n\r\n").status, 200);
    assert_eq!(client.ask("GET / HTTP/1.1\r\nhost: a\r\n\r\n").status, 200);
    let answer = http2::ask_one(alone.port, http2::request("GET", "/", &[]));
    assert_eq!(answer.status(), 200);
    assert_eq!(alone.metric("weft_sidecar_server_first_connections_total"), 0);
}

#[test]
fn client_that_sends_first_causes_no_detection_connection() {
    let (service, connections) = counting();
    let alone = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1).start();
    for _ in 0..20 {
        let answer = Http1Client::connect(alone.port).ask("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!(answer.status, 200);
    }
    // On a busy machine a few clients may be late with their first bytes.
    let connections = connections.load(Ordering::Relaxed);
    assert!(connections < 10, "{connections} connections for 20 clients, one after the other");
}

/// Asserts that a silent client is not connected to the service.
fn assert_not_connected(name: &str, alone: &SingleSidecar, connections: &AtomicUsize) {
    let mut client = TcpStream::connect(("127.0.0.1", alone.port)).expect("the sidecar listens");
    // Much longer than the time after which the sidecar connects to a service that may send first.
    client.set_read_timeout(Some(Duration::from_millis(500))).expect("the timeout is not zero");
    assert!(client.read(&mut [0; 99]).is_err(), "{name}");
    assert_eq!(connections.load(Ordering::Relaxed), 0, "{name}");
}

#[test]
fn detection_does_not_bypass_policies_or_routing() {
    let (service, connections) = greeter();
    let wanted = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1)
        .with_filter(allow_only("web", "/"));
    assert_not_connected("a policy evaluates requests", &wanted.start(), &connections);

    let hosts = json!([
        {"name": "a", "domains": ["a"], "routes": [route_to("service", 15)]},
        {"name": "b", "domains": ["b"], "routes": [route_to("other", 15)]},
    ]);
    let mut wanted = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1)
        .with("route_config", json!({"name": "all", "virtual_hosts": hosts}));
    wanted.clusters.push(cluster("other", &[service.port], UpstreamHttp::Http1, None));
    assert_not_connected("routes depend on the host", &wanted.start(), &connections);

    let wanted = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http2);
    assert_not_connected("the cluster speaks HTTP/2", &wanted.start(), &connections);

    let wanted = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1)
        .with("codec_type", json!("HTTP1"));
    assert_not_connected("the listener speaks HTTP/1.1", &wanted.start(), &connections);
}
