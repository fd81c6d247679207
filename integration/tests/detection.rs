//! What a connection is where nobody said it: the client's first bytes tell, or the service's, and neither
//! waits for the other.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use weft_integration::bootstrap::{allow_only, cluster, http, route_to};
use weft_integration::http1::Http1Client;
use weft_integration::http2;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

/// A service that greets whoever connects and then repeats each line, with how many came.
fn greeter() -> (ScriptedServer, Arc<AtomicUsize>) {
    let came = Arc::<AtomicUsize>::default();
    let count = came.clone();
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
    (backend, came)
}

#[test]
fn a_service_that_speaks_first_is_heard() {
    let (greeter, _) = greeter();
    let alone = SingleSidecarConfig::for_upstream(greeter.port, UpstreamHttp::Http1).start();
    for turn in 1..=3 {
        let mut client = Http1Client::connect(alone.port);
        assert_eq!(client.bytes(11).as_deref(), Some("220 ready\r\n"), "turn {turn}");
        client.send("EHLO a\r\n");
        assert_eq!(client.bytes(8).as_deref(), Some("EHLO a\r\n"), "turn {turn}");
        client.finish();
        assert!(client.is_at_end(), "turn {turn}");
        assert_eq!(alone.metric("weft_sidecar_spoken_first_total"), turn);
    }
}

/// A service of HTTP/1.1 that counts its connections.
fn counting() -> (ScriptedServer, Arc<AtomicUsize>) {
    let came = Arc::<AtomicUsize>::default();
    let count = came.clone();
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
    (backend, came)
}

#[test]
fn a_client_that_takes_its_time_is_served() {
    let (service, came) = counting();
    let alone = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1).start();
    let mut client = Http1Client::connect(alone.port);
    // It was silent for long enough for its service to be asked.
    eventually("the service was asked", || (came.load(Ordering::Relaxed) == 1).then_some(()));
    assert_eq!(client.ask("GET / HTTP/1.1\r\nhost: a\r\n\r\n").status, 200);
    assert_eq!(client.ask("GET / HTTP/1.1\r\nhost: a\r\n\r\n").status, 200);
    let answer = http2::ask_one(alone.port, http2::request("GET", "/", &[]));
    assert_eq!(answer.status(), 200);
    assert_eq!(alone.metric("weft_sidecar_spoken_first_total"), 0);
}

#[test]
fn a_client_that_speaks_at_once_costs_no_connection() {
    let (service, came) = counting();
    let alone = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1).start();
    for _ in 0..20 {
        let answer = Http1Client::connect(alone.port).ask("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!(answer.status, 200);
    }
    // A machine that is busy may keep a client or two from speaking at once.
    let came = came.load(Ordering::Relaxed);
    assert!(came < 10, "{came} connections for 20 clients, one after the other");
}

/// Holds that a silent client is not joined to the service.
fn check_apart(name: &str, alone: &SingleSidecar, came: &AtomicUsize) {
    let mut client = TcpStream::connect(("127.0.0.1", alone.port)).expect("it listens");
    // Much longer than a service that may be asked is left alone.
    client.set_read_timeout(Some(Duration::from_millis(500))).expect("above zero");
    assert!(client.read(&mut [0; 99]).is_err(), "{name}");
    assert_eq!(came.load(Ordering::Relaxed), 0, "{name}");
}

#[test]
fn bytes_get_past_no_policy_and_no_choice() {
    let (service, came) = greeter();
    let mut wanted = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1);
    wanted.http = http(&route_to("service", 15), &[allow_only("web", "/")]);
    check_apart("a policy looks at requests", &wanted.start(), &came);

    let mut wanted = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1);
    wanted.clusters.push(cluster("other", &[service.port], UpstreamHttp::Http1, None));
    let hosts = json!([
        {"name": "a", "domains": ["a"], "routes": [route_to("service", 15)]},
        {"name": "b", "domains": ["b"], "routes": [route_to("other", 15)]},
    ]);
    wanted.http["route_config"]["virtual_hosts"] = hosts;
    check_apart("the host decides", &wanted.start(), &came);

    let wanted = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http2);
    check_apart("the cluster speaks HTTP/2", &wanted.start(), &came);

    let wanted = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1)
        .with("codec_type", json!("HTTP1"));
    check_apart("the listener speaks HTTP/1.1", &wanted.start(), &came);
}
