//! Upgrades and tunnels: WebSocket and CONNECT between every HTTP version of a client and of a
//! service.

use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::sync::mpsc::channel;

use serde_json::{Value, json};
use weft_integration::bootstrap::with;
use weft_integration::http1::{self, Http1Client};
use weft_integration::http2::{self, connect};
use weft_integration::origin_server::OriginServer;
use weft_integration::port;
use weft_integration::process::{Process, counterpart, run};
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::single_sidecar::{SidecarPerHttpVersion, SingleSidecarConfig, UpstreamHttp};

#[test]
fn websocket_passes_between_all_http_versions() {
    let http1 = port::free();
    let service =
        Process::start("service", counterpart("websocket_service.py").arg(http1.to_string()));
    service.line_with("ready");
    let (_process, http2) = OriginServer::start_http2();
    for (port, speaks) in [(http1, UpstreamHttp::Http1), (http2, UpstreamHttp::Http2)] {
        let sidecar = SingleSidecarConfig::for_upstream(port, speaks).start();
        run(counterpart("websocket_caller.py").arg(sidecar.port.to_string()));
        let mut opening = connect(Some("websocket"));
        // A text frame, masked with zeros; a server's frame is not masked (RFC 6455, section 5.3).
        opening["on_answer"] = json!("\u{81}\u{85}\0\0\0\0hello");
        opening["until"] = json!("\u{81}\u{5}hello");
        let answer = http2::ask_one(sidecar.port, opening);
        assert_eq!(answer.status(), 200, "{speaks:?}: {answer:?}");
        assert_eq!(answer.body(), "\u{81}\u{5}hello", "{speaks:?}: {answer:?}");
    }
}

/// RFC 8441, section 3: an HTTP/2 service announces support in its SETTINGS, which it sends first.
#[test]
fn first_websocket_to_an_http2_service_waits_for_its_settings() {
    let (_process, port) = OriginServer::start_http2();
    let sidecar = SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http2).start();
    run(counterpart("websocket_caller.py").arg(sidecar.port.to_string()));
}

#[test]
fn websocket_without_upgrade_config_is_rejected_over_http2_and_ignored_over_http1() {
    let both = SidecarPerHttpVersion::start(|wanted| wanted.with("upgrade_configs", json!([])));
    for (to, port) in both.ports() {
        let answer = http2::ask_one(port, connect(Some("websocket")));
        // The setting was not sent, so a client must not send extended CONNECT.
        let is_refused = [400, 405].contains(&answer.status()) || answer.reset().is_some();
        assert!(is_refused, "{to}: {answer:?}");
        let received = http1::ask(
            port,
            "GET /chat HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        );
        assert_eq!(received.status, 200, "{to}: {received:?}");
        assert!(!received.body.contains("upgrade"), "{to}: {received:?}");
    }
}

const CONNECT: &str = "CONNECT a.example:443 HTTP/1.1\r\nhost: a.example:443\r\n\r\n";

fn tunnel_over_http2() -> Value {
    let tunnel = with(connect(None), "on_answer", json!("through"));
    with(tunnel, "until", json!("through"))
}

#[test]
fn connect_is_rejected_by_default() {
    let both = SidecarPerHttpVersion::plain();
    for (to, port) in both.ports() {
        assert_eq!(http1::ask(port, CONNECT).status, 405, "{to}");
        assert_eq!(http2::ask_one(port, connect(None)).status(), 405, "{to}");
    }
    assert_eq!(both.http1.0.seen(), Vec::<String>::new());
}

#[test]
fn configured_connect_opens_a_tunnel() {
    let connects = json!([{"upgrade_type": "CONNECT"}]);
    let both = SidecarPerHttpVersion::start(|wanted| {
        wanted.matching_empty_path().with("upgrade_configs", connects.clone())
    });
    for (to, port) in both.ports() {
        let mut client = Http1Client::connect(port);
        let answer = client.ask(CONNECT);
        assert_eq!(answer.status, 200, "{to}: {answer:?}");
        assert_eq!(answer.header("content-length"), None, "{to}: {answer:?}");
        assert_eq!(answer.header("transfer-encoding"), None, "{to}: {answer:?}");
        client.send("through");
        assert_eq!(client.bytes(7).as_deref(), Some("through"), "{to}");
        client.finish();
        assert!(client.is_at_end(), "{to}");
        let answer = http2::ask_one(port, tunnel_over_http2());
        assert_eq!((answer.status(), answer.body()), (200, "through"), "{to}: {answer:?}");
    }
}

/// RFC 9113, section 3.1, deprecated it; a sidecar that forwards the upgrade cannot inspect the
/// requests that follow.
#[test]
fn h2c_upgrade_is_ignored_and_not_forwarded() {
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .start();
    let mut client = Http1Client::connect(sidecar.port);
    for _ in 0..2 {
        let answer = client.ask(
            "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n\
             http2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n",
        );
        let received = format!("{answer:?}");
        assert_eq!(answer.status, 200, "{received}");
        assert!(received.contains("GET / HTTP/1.1"), "{received}");
        assert!(!received.contains("h2c") && !received.contains("http2-settings"), "{received}");
    }
}

/// A sidecar that terminates CONNECT tunnels, and forwards their bytes to a port.
fn terminating_connect(port: u16) -> SingleSidecarConfig {
    SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1)
        .matching_empty_path()
        .with("upgrade_configs", json!([{"upgrade_type": "CONNECT"}]))
        .with_route_action(
            "upgrade_configs",
            &json!([{"upgrade_type": "CONNECT", "connect_config": {}}]),
        )
}

#[test]
fn connect_tunnel_can_terminate_at_the_sidecar() {
    // The service does not speak HTTP.
    let echo = ScriptedServer::start(|mut stream| {
        let mut reading = stream.try_clone().expect("the socket can be duplicated");
        drop(std::io::copy(&mut reading, &mut stream));
        drop(stream.shutdown(Shutdown::Write));
    });
    let sidecar = terminating_connect(echo.port).start();
    let mut client = Http1Client::connect(sidecar.port);
    let answer = client.ask(CONNECT);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("content-length"), None, "{answer:?}");
    assert_eq!(answer.header("transfer-encoding"), None, "{answer:?}");
    client.send("through");
    assert_eq!(client.bytes(7).as_deref(), Some("through"));
    client.finish();
    assert!(client.is_at_end());
    let answer = http2::ask_one(sidecar.port, tunnel_over_http2());
    assert_eq!((answer.status(), answer.body()), (200, "through"), "{answer:?}");
    // Other requests are forwarded as usual: the service echoes the request, which is not a
    // response.
    assert_eq!(http1::ask(sidecar.port, "GET / HTTP/1.1\r\nhost: a\r\n\r\n").status, 502);
}

#[test]
fn connect_tunnel_without_endpoint_is_rejected() {
    let sidecar = terminating_connect(port::free()).start();
    assert_eq!(http1::ask(sidecar.port, CONNECT).status, 503);
    assert_eq!(http2::ask_one(sidecar.port, connect(None)).status(), 503);
}

/// A service that accepts every upgrade, and returns all bytes received after the head.
fn accepting_server(answer: &'static str) -> (ScriptedServer, std::sync::mpsc::Receiver<String>) {
    let (sender, sent) = channel();
    let backend = ScriptedServer::start(move |stream| {
        let mut reader = BufReader::new(stream);
        if read_head(&mut reader).is_none() {
            return;
        }
        // The connection may end before everything is read.
        drop(reader.get_mut().write_all(answer.as_bytes()));
        drop(reader.get_mut().shutdown(Shutdown::Write));
        let mut rest = Vec::new();
        drop(reader.read_to_end(&mut rest));
        drop(sender.send(String::from_utf8_lossy(&rest).into_owned()));
    });
    (backend, sent)
}

#[test]
fn bytes_sent_before_the_upgrade_is_accepted_are_not_forwarded() {
    let upgrade = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
        sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let agreed = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
        upgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    for (opening, agreement) in [(upgrade, agreed), (CONNECT, "HTTP/1.1 200 OK\r\n\r\n")] {
        let (backend, sent) = accepting_server(agreement);
        let sidecar = SingleSidecarConfig::for_upstream(backend.port, UpstreamHttp::Http1)
            .matching_empty_path()
            .with(
                "upgrade_configs",
                json!([{"upgrade_type": "CONNECT"}, {"upgrade_type": "websocket"}]),
            )
            .start();
        let answer = http1::ask(sidecar.port, &format!("{opening}early"));
        assert_eq!(answer.status, 400, "{opening}: {answer:?}");
        assert_eq!(answer.header("connection"), Some("close"), "{opening}: {answer:?}");
        let early = sent.recv_timeout(weft_integration::wait::DEADLINE);
        assert_eq!(early.as_deref(), Ok(""), "{opening}");
    }
}
