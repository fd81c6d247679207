//! Listener options for a single HTTP version, compared with Envoy.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_integration::http1;
use weft_integration::http2_frames::{self, ReceiveError, flag, frame, kind};
use weft_integration::mesh_pki::MeshPki;

use crate::comparison::{Service, Setup, case, compare, serving};

fn http1_options(options: &Value) -> Value {
    serving(json!({"http_protocol_options": options}))
}

/// The response header names as written, except those that Envoy adds.
fn names(head: &str) -> Vec<String> {
    let name = |line: &str| Some(line.split_once(':')?.0.to_owned());
    let is_compared = |name: &String| {
        let lower = name.to_ascii_lowercase();
        !["server", "date"].contains(&&*lower) && !lower.starts_with("x-envoy-")
    };
    let mut names: Vec<String> = head.lines().filter_map(name).filter(is_compared).collect();
    names.sort();
    names
}

#[test]
fn header_names_have_the_case_configured_at_the_listener() {
    let preserve_case = json!({"name": "preserve", "typed_config": {"@type": "type.googleapis.com/\
        envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig"}});
    let listeners = [
        ("words", http1_options(&json!({"header_key_format": {"proper_case_words": {}}}))),
        (
            "preserved",
            http1_options(&json!({"header_key_format": {"stateful_formatter": preserve_case}})),
        ),
    ];
    let service = Service::start();
    let setup = Setup::new(&service, &listeners);
    let names_of = |listener: &str, target: &str| {
        let mut client = http1::Http1Client::connect(setup.port(listener));
        let answer = client.ask(&format!("GET {target} HTTP/1.1\r\nhost: a.example\r\n\r\n"));
        (answer.status, names(&answer.head))
    };
    let all = || -> Vec<(u16, Vec<String>)> {
        ["/", "/404", "/cookies", "/chunked", "/304"]
            .map(|target| names_of("words", target))
            .to_vec()
    };
    let pki = MeshPki::create();
    let mut envoy = setup.envoy(&pki);
    let envoys = all();
    envoy.kill();
    let _weft = setup.weft(&pki);
    assert_eq!(all(), envoys);
    assert!(envoys[0].1.contains(&"X-Answer".to_owned()), "{envoys:?}");
    // Envoy preserves the case only if the cluster has the formatter too.
    assert!(names_of("preserved", "/").1.contains(&"X-Answer".to_owned()));
}

#[test]
fn http10_request_without_host_gets_the_default_host() {
    let options = json!({"accept_http_10": true, "default_host_for_http_10": "default.example"});
    let cases = [
        case("default", "1.0 without host", "GET /x HTTP/1.0\r\n\r\n"),
        case("default", "1.0 with host", "GET /x HTTP/1.0\r\nhost: a.example\r\n\r\n"),
        case("default", "1.1 without host", "GET /x HTTP/1.1\r\n\r\n"),
    ];
    compare(&[("default", http1_options(&options))], &cases, &[], true);
}

/// The lifetime of a connection, 4 s at most, and the number of PINGs received.
#[expect(clippy::disallowed_methods, reason = "the test measures the lifetime of a connection")]
fn lifetime(port: u16, answers_pings: bool) -> (Duration, usize) {
    let began = Instant::now();
    let mut client = http2_frames::Http2FrameClient::connect(port);
    let limit = Duration::from_secs(4);
    client.tcp().set_read_timeout(Some(limit)).expect("the timeout is not zero");
    let mut pings = 0;
    while began.elapsed() < limit {
        match client.receive() {
            Ok(frame_received)
                if frame_received.kind == kind::PING && frame_received.flags & flag::ACK == 0 =>
            {
                pings += 1;
                if answers_pings {
                    client.send(&frame(kind::PING, flag::ACK, 0, &frame_received.payload));
                }
            }
            Ok(frame_received) if frame_received.kind == kind::GOAWAY => break,
            Ok(_) => {}
            Err(ReceiveError::Closed | ReceiveError::Silent) => break,
        }
    }
    (began.elapsed(), pings)
}

#[test]
fn http2_client_that_does_not_answer_pings_is_disconnected() {
    let keepalive = |interval: &str, timeout: &str| {
        json!({"connection_keepalive": {"interval": interval, "timeout": timeout,
            "interval_jitter": {"value": 0}}})
    };
    let listeners = [
        ("keepalive", serving(json!({"http2_protocol_options": keepalive("0.3s", "0.5s")}))),
        (
            "idle",
            serving(json!({"http2_protocol_options": keepalive("0.3s", "0.5s"),
                "common_http_protocol_options": {"idle_timeout": "1s"}})),
        ),
    ];
    let service = Service::start();
    let setup = Setup::new(&service, &listeners);
    let check = |proxy: &str| {
        let (lived, pings) = lifetime(setup.port("keepalive"), false);
        assert!((1..=2).contains(&pings) && lived < Duration::from_secs(3), "{proxy}: {lived:?}");
        let (lived, pings) = lifetime(setup.port("keepalive"), true);
        assert!(pings >= 4 && lived >= Duration::from_secs(4), "{proxy}: {lived:?} {pings}");
        // An acknowledged PING does not reset the idle timeout.
        let (lived, pings) = lifetime(setup.port("idle"), true);
        assert!(pings >= 2 && lived < Duration::from_secs(4), "{proxy}: {lived:?} {pings}");
    };
    let pki = MeshPki::create();
    let mut envoy = setup.envoy(&pki);
    check("envoy");
    envoy.kill();
    let _weft = setup.weft(&pki);
    check("weft");
}
