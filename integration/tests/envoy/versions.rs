//! Options of a listener that concern one version of HTTP.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_integration::http1;
use weft_integration::http2_frames::{self, ReceiveError, flag, frame, kind};
use weft_integration::mesh_pki::MeshPki;

use crate::peers::{Service, Setup, case, compare, serving};

fn http1_options(options: &Value) -> Value {
    serving(json!({"http_protocol_options": options}))
}

/// The names of a response's headers as written, but for those that Envoy adds.
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
fn header_names_have_the_case_that_the_listener_asks_for() {
    let preserving = json!({"name": "preserve", "typed_config": {"@type": "type.googleapis.com/\
        envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig"}});
    let listeners = [
        ("words", http1_options(&json!({"header_key_format": {"proper_case_words": {}}}))),
        ("kept", http1_options(&json!({"header_key_format": {"stateful_formatter": preserving}}))),
    ];
    let service = Service::start();
    let setup = Setup::new(&service, &listeners);
    let ask = |listener: &str, target: &str| {
        let mut client = http1::Http1Client::connect(setup.port(listener));
        let answer = client.ask(&format!("GET {target} HTTP/1.1\r\nhost: a.example\r\n\r\n"));
        (answer.status, names(&answer.head))
    };
    let all = || -> Vec<(u16, Vec<String>)> {
        ["/", "/404", "/cookies", "/chunked", "/304"].map(|target| ask("words", target)).to_vec()
    };
    let pki = MeshPki::create();
    let mut envoy = setup.envoy(&pki);
    let envoys = all();
    envoy.kill();
    let _weft = setup.weft(&pki);
    assert_eq!(all(), envoys);
    assert!(envoys[0].1.contains(&"X-Answer".to_owned()), "{envoys:?}");
    // Envoy keeps the case only if the cluster has the formatter too.
    assert!(ask("kept", "/").1.contains(&"X-Answer".to_owned()));
}

#[test]
fn host_of_a_request_without_one_is_the_default_of_http_1_0() {
    let options = json!({"accept_http_10": true, "default_host_for_http_10": "default.example"});
    let cases = [
        case("default", "without", "GET /x HTTP/1.0\r\n\r\n"),
        case("default", "with", "GET /x HTTP/1.0\r\nhost: a.example\r\n\r\n"),
        case("default", "newer without", "GET /x HTTP/1.1\r\n\r\n"),
    ];
    compare(&[("default", http1_options(&options))], &cases, &[], true);
}

/// For how long a connection lived, 4 s at most, and how many PINGs came.
#[allow(clippy::disallowed_methods, reason = "how long a connection lives is what is tested")]
fn lives(port: u16, answers: bool) -> (Duration, usize) {
    let began = Instant::now();
    let mut client = http2_frames::Http2FrameClient::connect(port);
    let limit = Duration::from_secs(4);
    client.tcp().set_read_timeout(Some(limit)).expect("it is above zero");
    let mut pings = 0;
    while began.elapsed() < limit {
        match client.receive() {
            Ok(came) if came.kind == kind::PING && came.flags & flag::ACK == 0 => {
                pings += 1;
                if answers {
                    client.send(&frame(kind::PING, flag::ACK, 0, &came.payload));
                }
            }
            Ok(came) if came.kind == kind::GOAWAY => break,
            Ok(_) => {}
            Err(ReceiveError::Closed | ReceiveError::Silent) => break,
        }
    }
    (began.elapsed(), pings)
}

#[test]
fn client_that_answers_no_ping_is_disconnected() {
    let keepalive = |interval: &str, timeout: &str| {
        json!({"connection_keepalive": {"interval": interval, "timeout": timeout,
            "interval_jitter": {"value": 0}}})
    };
    let listeners = [
        ("asked", serving(json!({"http2_protocol_options": keepalive("0.3s", "0.5s")}))),
        (
            "idle",
            serving(json!({"http2_protocol_options": keepalive("0.3s", "0.5s"),
                "common_http_protocol_options": {"idle_timeout": "1s"}})),
        ),
    ];
    let service = Service::start();
    let setup = Setup::new(&service, &listeners);
    let check = |who: &str| {
        let (lived, pings) = lives(setup.port("asked"), false);
        assert!((1..=2).contains(&pings) && lived < Duration::from_secs(3), "{who}: {lived:?}");
        let (lived, pings) = lives(setup.port("asked"), true);
        assert!(pings >= 4 && lived >= Duration::from_secs(4), "{who}: {lived:?} {pings}");
        // An answered PING does not count as use.
        let (lived, pings) = lives(setup.port("idle"), true);
        assert!(pings >= 2 && lived < Duration::from_secs(4), "{who}: {lived:?} {pings}");
    };
    let pki = MeshPki::create();
    let mut envoy = setup.envoy(&pki);
    check("envoy");
    envoy.kill();
    let _weft = setup.weft(&pki);
    check("weft");
}
