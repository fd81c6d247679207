//! Every status that the sidecar answers with itself: how it looks by HTTP/1.1, by HTTP/2 and to gRPC, its
//! access line and its counter. The sizes from which on some of them begin are in `limits`.

use std::io::BufReader;
use std::net::TcpStream;

use serde_json::{Value, json};
use socket2::SockRef;
use weft_integration::bootstrap::{allow_only, any, cluster, http, require_token, route_to};
use weft_integration::http1::{self, Http1Client};
use weft_integration::http2::{self, request};
use weft_integration::origin_server::OriginServer;
use weft_integration::port;
use weft_integration::process::nft;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

/// A refusal: its status, what it is to gRPC, the reason, and what exactly was wrong.
#[derive(Debug, Clone, Copy)]
struct Refusal {
    status: u16,
    grpc: &'static str,
    reason: &'static str,
    detail: &'static str,
    /// What of an endpoint is in the access line alone.
    endpoint: &'static str,
}

impl Refusal {
    const fn new(status: u16, grpc: &'static str, reason: &'static str) -> Self {
        Self { status, grpc, reason, detail: "", endpoint: "" }
    }

    const fn because(self, detail: &'static str) -> Self {
        Self { detail, ..self }
    }

    const fn of_endpoint(self, endpoint: &'static str) -> Self {
        Self { endpoint, ..self }
    }

    fn body(&self) -> String {
        match self.detail {
            "" => format!("{}\n", self.reason),
            detail => format!("{}: {detail}\n", self.reason),
        }
    }
}

fn count(alone: &SingleSidecar, reason: &str) -> u64 {
    alone.metric(&format!("weft_sidecar_requests_denied_total{{reason=\"{reason}\"}}"))
}

/// Holds that a refusal is told and counted, once.
#[track_caller]
fn check_told(alone: &SingleSidecar, refusal: Refusal, counted_before: u64) {
    let Refusal { status, reason, detail, endpoint, .. } = refusal;
    let detail = if detail.is_empty() { endpoint } else { detail };
    let line = alone.access_line(&format!("\"denial\":\"{reason}\""));
    let detail = if detail.is_empty() { Value::Null } else { json!(detail) };
    let told = ["status", "detail", "outcome"].map(|field| line.get(field).cloned());
    let expected = [json!(status), detail, json!("denied")].map(Some);
    assert_eq!(told, expected, "{line}");
    assert_eq!(count(alone, reason), counted_before + 1, "{reason}");
}

/// Holds that these bytes are refused so.
#[track_caller]
fn check_bytes(alone: &SingleSidecar, bytes: &str, refusal: Refusal) {
    let before = count(alone, refusal.reason);
    let answer = http1::ask(alone.port, bytes);
    let start: String = bytes.chars().take(200).collect();
    assert_eq!((answer.status, &answer.body), (refusal.status, &refusal.body()), "{start}");
    check_told(alone, refusal, before);
}

/// Holds that a GET with these fields is refused so over both versions, and to gRPC by its own status.
#[track_caller]
fn check(alone: &SingleSidecar, path: &str, fields: &[(&str, &str)], refusal: Refusal) {
    let lines: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    check_bytes(alone, &format!("GET {path} HTTP/1.1\r\nhost: a.example\r\n{lines}\r\n"), refusal);

    let before = count(alone, refusal.reason);
    let answer = http2::ask_one(alone.port, request("GET", path, fields));
    let told = (answer.status(), answer.body());
    assert_eq!(told, (refusal.status, refusal.body().as_str()), "{answer:?}");
    check_told(alone, refusal, before);

    check_grpc(alone, path, fields, refusal);
}

/// gRPC over HTTP/2, "Responses": trailers only, in one frame that ends the stream.
#[track_caller]
fn check_grpc(alone: &SingleSidecar, path: &str, fields: &[(&str, &str)], refusal: Refusal) {
    let before = count(alone, refusal.reason);
    let fields = [fields, &[("content-type", "application/grpc"), ("te", "trailers")]].concat();
    let answer = http2::ask_one(alone.port, request("POST", path, &fields));
    let told = (answer.status(), answer.header("grpc-status"), answer.body());
    assert_eq!(told, (200, Some(refusal.grpc), ""), "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/grpc"), "{answer:?}");
    let message = refusal.body().trim_end().replace(' ', "%20");
    assert_eq!(answer.header("grpc-message"), Some(message.as_str()), "{answer:?}");
    check_told(alone, refusal, before);
}

fn before(port: u16) -> SingleSidecarConfig {
    SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1)
}

/// Before a service of HTTP/2, since gRPC is not even tried before one of HTTP/1.1.
fn before_http2(port: u16) -> SingleSidecarConfig {
    SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http2)
}

const MALFORMED: Refusal = Refusal::new(400, "13", "malformed");

#[test]
fn what_is_no_request_is_refused() {
    let alone = before(ScriptedServer::echoing_heads().port).start();
    let check = |bytes: &str, refusal| check_bytes(&alone, bytes, refusal);
    check("GET / HTTP/1.1\r\n\r\n", MALFORMED.because("missing host header"));
    let space = "space in the request target";
    check("GET /a b HTTP/1.1\r\nhost: a\r\n\r\n", MALFORMED.because(space));
    let large = Refusal::new(413, "8", "body_too_large");
    check("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1099511627777\r\n\r\n", large);
    let long = "99999999999999999999999999";
    check(&format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {long}\r\n\r\n"), large);
    let coding = Refusal::new(501, "12", "not_implemented")
        .because("unsupported transfer-encoding: only chunked is supported");
    check("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n", coding);
    check("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n", coding);
    let version = Refusal::new(505, "12", "unknown_version");
    check("GET / HTTP/2.0\r\nhost: a\r\n\r\n", version);
    check("GET / HTTP/0.9\r\nhost: a\r\n\r\n", version);
}

#[test]
fn who_may_not_is_refused() {
    let keys = r#"{"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": "1",
        "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
        "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}"#;
    let filters = [require_token("https://issuer", "service", keys)];
    let mut wanted = before(ScriptedServer::echoing_heads().port);
    wanted.http = http(&route_to("service", 15), &filters);
    let alone = wanted.start();
    check(&alone, "/", &[], Refusal::new(401, "16", "jwt_header_not_present"));
    let answer = http1::ask(alone.port, "GET / HTTP/1.1\r\nhost: a\r\n\r\n");
    assert_eq!(answer.header("www-authenticate"), Some("Bearer"), "{answer:?}");
    drop(alone.access_line("jwt_header_not_present"));

    let mut wanted = before(ScriptedServer::echoing_heads().port);
    wanted.http = http(&route_to("service", 15), &[allow_only("somebody-else", "/")]);
    check(&wanted.start(), "/", &[], Refusal::new(403, "7", "not_allowed"));
}

#[test]
fn a_bad_token_is_refused() {
    let mut wanted = before(ScriptedServer::echoing_heads().port);
    let filters = [require_token("https://issuer", "service", r#"{"keys": []}"#)];
    wanted.http = http(&route_to("service", 15), &filters);
    let alone = wanted.start_unready("invalid key set with no key");
    let bad = [("authorization", "Bearer e30.e30.e30")];
    let answer = http2::ask_one(alone.port, request("GET", "/", &bad));
    assert_eq!(answer.status(), 401, "{answer:?}");
    assert_eq!(answer.header("www-authenticate"), Some("Bearer error=\"invalid_token\""));
    let line = alone.access_line("\"denial\":\"jwt_request_format_invalid\"");
    assert!(line["detail"].is_string(), "{line}");
    assert_eq!(count(&alone, "jwt_request_format_invalid"), 1);
}

#[test]
fn what_leads_nowhere_is_refused() {
    let mut wanted = before(ScriptedServer::echoing_heads().port);
    let route = json!({"match": {"prefix": "/only"}, "route": {"cluster": "service"}});
    wanted.http = http(&route, &[]);
    check(&wanted.start(), "/other", &[], Refusal::new(404, "12", "no_route"));
}

#[test]
fn methods_that_are_never_served_are_refused() {
    let alone = before(ScriptedServer::echoing_heads().port).start();
    let refusal = Refusal::new(405, "12", "method_not_allowed").because("TRACE is not served");
    check_bytes(&alone, "TRACE / HTTP/1.1\r\nhost: a\r\n\r\n", refusal);
    let counted = count(&alone, refusal.reason);
    let answer = http2::ask_one(alone.port, request("TRACE", "/", &[]));
    assert_eq!(answer.status(), 405, "{answer:?}");
    check_told(&alone, refusal, counted);
}

#[test]
fn a_chain_of_forwarders_that_is_too_long_is_refused() {
    let alone = before(ScriptedServer::echoing_heads().port).start();
    let named = |count: usize| vec!["10.0.0.1"; count].join(", ");
    let refusal = Refusal::new(463, "8", "too_many_forwarders");
    check(&alone, "/", &[("x-forwarded-for", &named(31))], refusal);
    check(&alone, "/", &[("x-forwarded-for", &named(30)), ("x-forwarded-for", "::1")], refusal);
}

/// Sends what is not whole, and waits for what is said to that.
#[track_caller]
fn check_slow(alone: &SingleSidecar, part: &str, reason: &'static str) {
    let counted = count(alone, reason);
    let mut client = Http1Client::connect(alone.port);
    let answer = client.ask(part);
    assert_eq!((answer.status, answer.body), (408, format!("{reason}\n")), "{part}");
    assert_eq!(http1::header(&answer.head, "connection"), Some("close"), "{part}");
    client.finish();
    assert!(client.is_at_end(), "{part}");
    check_told(alone, Refusal::new(408, "4", reason), counted);
}

#[test]
fn a_request_that_does_not_come_is_refused() {
    let (_process, port) = OriginServer::start_http2();
    let alone = before_http2(port)
        .with("request_headers_timeout", json!("0.3s"))
        .with("request_timeout", json!("0.5s"))
        .start();
    check_slow(&alone, "GET / HTTP/1.1\r\nhost: ", "head_timeout");
    let post = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n";
    check_slow(&alone, &format!("{post}sen"), "body_timeout");
    let refusal = Refusal::new(408, "4", "body_timeout");
    let mut call = request("POST", "/", &[("content-type", "application/grpc")]);
    call["body"] = json!("sen");
    call["on_answer"] = json!("t");
    let answer = http2::ask_one(alone.port, call);
    assert_eq!((answer.status(), answer.header("grpc-status")), (200, Some("4")), "{answer:?}");
    check_told(&alone, refusal, 1);
}

#[test]
fn a_request_whose_body_comes_in_time_is_not_hurried() {
    let route =
        json!({"match": {"prefix": "/"}, "route": {"cluster": "service", "timeout": "0.8s"}});
    let mut wanted = before(ScriptedServer::silent().port).with("request_timeout", json!("0.3s"));
    wanted.http["route_config"]["virtual_hosts"][0]["routes"][0] = route;
    let alone = wanted.start();
    let bytes = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nsent";
    check_bytes(&alone, bytes, Refusal::new(504, "4", "upstream_timeout"));
}

/// A service that reads a head, then does something to the connection.
fn doing(act: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> u16 {
    let backend = ScriptedServer::start(move |stream| {
        let mut reader = BufReader::new(stream);
        if read_head(&mut reader).is_some() {
            act(reader.get_mut());
        }
    });
    backend.port
}

/// Makes the end of the connection a reset.
fn reset(stream: &mut TcpStream) {
    let socket = SockRef::from(&*stream);
    socket.set_linger(Some(std::time::Duration::ZERO)).expect("it is a TCP socket");
}

const BROKEN: Refusal = Refusal::new(502, "14", "upstream_broken");

#[test]
fn a_service_that_breaks_off_gives_502() {
    let answering = |answer: &'static str| ScriptedServer::replying_once(answer).port;
    let long = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-long: ".to_owned() + &"x".repeat(61_440);
    let services = [
        ("connection_lost", doing(reset)),
        ("closed_before_response", doing(|_| {})),
        ("incomplete_head", answering("HTTP/1.1 200 OK\r\ncontent-le")),
        ("bad_status_line", answering("hello\r\n\r\n")),
        (
            "several_content_lengths",
            answering("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n"),
        ),
        ("bad_transfer_encoding", answering("HTTP/1.1 200 OK\r\ntransfer-encoding: x\r\n\r\n")),
        ("bad_upgrade_response", answering("HTTP/1.1 101 Switching Protocols\r\n\r\n")),
        ("head_too_large", ScriptedServer::replying_once(format!("{long}\r\n\r\n")).port),
    ];
    for (name, port) in services {
        let alone = before(port).start();
        let answer = http1::ask(alone.port, "GET /x HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!((answer.status, answer.body.as_str()), (502, "upstream_broken\n"), "{name}");
        check_told(&alone, BROKEN.of_endpoint(name), 0);
        let answer = http2::ask_one(alone.port, request("GET", "/x", &[]));
        assert_eq!((answer.status(), answer.body()), (502, "upstream_broken\n"), "{name}");
        check_told(&alone, BROKEN.of_endpoint(name), 1);
    }
    // Half an HTTP/2 preface is a head to it.
    let lost = BROKEN.of_endpoint("connection_lost");
    check_grpc(&before_http2(doing(|_| {})).start(), "/x", &[], lost);
}

/// `common_http_protocol_options.max_response_headers_kb` of a cluster.
fn with_response_limit(wanted: SingleSidecarConfig, speaks: &str, kib: u32) -> SingleSidecarConfig {
    let message = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let options = json!({"explicit_http_config": {speaks: {}},
        "common_http_protocol_options": {"max_response_headers_kb": kib}});
    wanted
        .with_cluster("typed_extension_protocol_options", &json!({message: any(message, options)}))
}

#[test]
fn a_response_head_above_its_limit_gives_502() {
    for (bytes, status) in [(1023, 200), (1024, 200), (1025, 502)] {
        let start = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-long: ";
        let rest = "x".repeat(bytes - start.len() - 4);
        let service = ScriptedServer::replying_once(format!("{start}{rest}\r\n\r\n"));
        let wanted = before(service.port);
        let alone = with_response_limit(wanted, "http_protocol_options", 1).start();
        let answer = http1::ask(alone.port, "GET / HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!(answer.status, status, "{bytes}");
    }
}

/// RFC 9113, section 10.5.1: name, value and 32 for each, `:status` among them.
#[test]
fn a_response_head_above_its_limit_gives_502_over_http2_as_well() {
    let (_process, port) = OriginServer::start_http2();
    let wanted = before_http2(port);
    let alone = with_response_limit(wanted, "http2_protocol_options", 1).start();
    let overhead = ":status".len() + "200".len() + "x-long".len() + 2 * 32;
    // The library that reads it does not take what is just as long as its limit.
    for (bytes, status) in [(1000, 200), (1023, 200), (1025, 502)] {
        let path = format!("/field/{}", bytes - overhead);
        let answer = http1::ask(alone.port, &format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n"));
        assert_eq!(answer.status, status, "{bytes}: {answer:?}");
    }
}

#[test]
fn a_service_without_endpoints_gives_503() {
    let mut wanted = before_http2(1);
    wanted.clusters = vec![cluster("service", &[], UpstreamHttp::Http2, None)];
    check(&wanted.start(), "/", &[], Refusal::new(503, "14", "no_endpoint"));
}

#[test]
fn an_endpoint_that_refuses_gives_503() {
    let alone = before_http2(port::free()).start();
    let refused = Refusal::new(503, "14", "unreachable").of_endpoint("connection_refused");
    check(&alone, "/", &[], refused);
}

#[test]
fn a_service_with_as_many_requests_as_it_may_have_gives_503() {
    let limits = json!({"thresholds": [{"max_requests": 1}]});
    let silent = ScriptedServer::silent();
    let alone = before(silent.port).with_cluster("circuit_breakers", &limits).start();
    let mut held = Http1Client::connect(alone.port);
    held.send("GET /held HTTP/1.1\r\nhost: a\r\n\r\n");
    let overloaded =
        || http1::ask(alone.port, "GET / HTTP/1.1\r\nhost: a\r\nx: y\r\n\r\n").status == 503;
    // The first may not have come to its service yet: then this one is the first, and waits in vain.
    eventually("the first is held", || {
        (alone.metric("weft_sidecar_upstream_connections_total") == 1).then_some(())
    });
    assert!(overloaded());
    check_told(&alone, Refusal::new(503, "8", "overloaded"), 0);
}

#[test]
fn a_client_that_leaves_is_told_of_as_460() {
    let alone = before(ScriptedServer::silent().port).start();
    let mut client = Http1Client::connect(alone.port);
    client.send("GET /left HTTP/1.1\r\nhost: a\r\n\r\n");
    eventually("it is with its service", || {
        (alone.metric("weft_sidecar_upstream_connections_total") == 1).then_some(())
    });
    drop(client);
    check_told(&alone, Refusal::new(460, "1", "client_gone"), 0);
}

/// A service of these ports, at each of which a connection is neither taken nor refused.
fn before_black_holes(ports: &[u16]) -> SingleSidecar {
    nft("add table ip hole");
    nft("add chain ip hole in { type filter hook input priority 0 ; }");
    for port in ports {
        nft(&format!("add rule ip hole in tcp dport {port} drop"));
    }
    let mut wanted = before_http2(9);
    wanted.clusters = vec![cluster("service", ports, UpstreamHttp::Http2, None)];
    wanted.with_cluster("connect_timeout", &json!("0.3s")).start()
}

const NOT_TAKEN: Refusal = Refusal::new(504, "14", "connect_timeout");

#[test]
fn endpoints_that_take_no_connection_give_504() {
    check(&before_black_holes(&[9, 10, 11]), "/", &[], NOT_TAKEN);
}

#[test]
fn one_endpoint_that_takes_no_connection_gives_504() {
    check(&before_black_holes(&[9]), "/", &[], NOT_TAKEN);
}

#[test]
fn an_endpoint_that_does_not_answer_gives_504() {
    let route =
        json!({"match": {"prefix": "/"}, "route": {"cluster": "service", "timeout": "0.4s"}});
    let (mut wanted, slow) =
        (before(ScriptedServer::silent().port), Refusal::new(504, "4", "upstream_timeout"));
    wanted.http["route_config"]["virtual_hosts"][0]["routes"][0] = route;
    check_bytes(&wanted.clone().start(), "GET / HTTP/1.1\r\nhost: a\r\n\r\n", slow);
    wanted.clusters = before_http2(ScriptedServer::silent().port).clusters;
    let alone = wanted.start();
    check_bytes(&alone, "GET / HTTP/1.1\r\nhost: a\r\n\r\n", slow);
    check_grpc(&alone, "/", &[], slow);
}

/// A target of so many bytes.
fn target(bytes: usize) -> String {
    format!("/{}", "x".repeat(bytes - 1))
}

#[test]
fn a_target_that_is_too_long_is_refused() {
    let alone = before(ScriptedServer::echoing_heads().port).start();
    let bytes = format!("GET {} HTTP/1.1\r\nhost: a\r\n\r\n", target(60 * 1024 + 1));
    check_bytes(&alone, &bytes, Refusal::new(414, "8", "target_too_long"));
}

#[test]
fn a_grpc_call_whose_head_is_too_large_gets_a_grpc_status() {
    let (_process, port) = OriginServer::start_http2();
    let alone = before_http2(port).start();
    let long = "x".repeat(61 * 1024);
    check_grpc(&alone, "/", &[("x-long", &long)], Refusal::new(431, "8", "head_too_large"));
    check_grpc(&alone, &target(61 * 1024), &[], Refusal::new(414, "8", "target_too_long"));
}

#[test]
fn a_body_of_http2_has_the_same_limit() {
    let (_process, port) = OriginServer::start_http2();
    let alone = before_http2(port).with("request_timeout", json!("0.5s")).start();
    let mut post = request("POST", "/", &[("content-length", "1099511627777")]);
    post["body"] = json!("sent");
    post["until"] = json!("\n");
    let answer = http2::ask_one(alone.port, post);
    assert_eq!((answer.status(), answer.body()), (413, "body_too_large\n"), "{answer:?}");
}

/// A sidecar whose service breaks its answer off.
fn before_half_an_answer() -> SingleSidecar {
    let half = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf";
    before(ScriptedServer::replying_once(half).port).start()
}

const GET_HALF: &str = "GET /half HTTP/1.1\r\nhost: a\r\n\r\n";

#[test]
fn what_was_answered_in_part_is_not_refused_as_well() {
    let alone = before_half_an_answer();
    assert!(http1::ask(alone.port, GET_HALF).broken);
    let line = alone.access_line("/half");
    assert_eq!((&line["status"], &line["denial"]), (&json!(200), &Value::Null), "{line}");
    assert_eq!(line["outcome"], "endpoint_broke_off", "{line}");
}

#[test]
fn what_was_answered_in_part_is_told_or_refused() {
    let alone = before_half_an_answer();
    let answer = http1::ask(alone.port, GET_HALF);
    let told = (answer.status, answer.broken);
    assert!(told == (200, true) || told == (502, false), "{answer:?}");
}
