//! Every error status of the sidecar itself: the response over HTTP/1.1, over HTTP/2 and to gRPC,
//! the access-log line and the counter. Size limits are tested in `size_limits`.

use std::io::BufReader;
use std::net::TcpStream;

use serde_json::json;
use socket2::SockRef;
use weft_integration::bootstrap::{allow_only, any, cluster, require_token};
use weft_integration::http1::{self, Http1Client};
use weft_integration::http2::{self, request};
use weft_integration::origin_server::OriginServer;
use weft_integration::port;
use weft_integration::process::nft;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

/// An expected error response: HTTP status, gRPC status, reason and details.
#[derive(Debug, Clone, Copy)]
struct ExpectedDenial {
    status: u16,
    grpc: &'static str,
    reason: &'static str,
    detail: &'static str,
    /// The details about an endpoint, which are in the access log only.
    endpoint: &'static str,
}

impl ExpectedDenial {
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

fn count(sidecar: &SingleSidecar, reason: &str) -> u64 {
    sidecar.metric(&format!("weft_sidecar_requests_denied_total{{reason=\"{reason}\"}}"))
}

/// The `response_code_details` of a reason.
fn details(reason: &str) -> &'static str {
    let refusal = weft_sidecar::reference::refusals().find(|refusal| refusal.reason == reason);
    refusal.expect("the reason is documented").details
}

/// Checks that the access log and the counter each have the denial once.
#[track_caller]
fn check_recorded(sidecar: &SingleSidecar, refusal: ExpectedDenial, counted_before: u64) {
    let ExpectedDenial { status, reason, detail, endpoint, .. } = refusal;
    let line = sidecar.access_line(&format!("\"response_code_details\":\"{}\"", details(reason)));
    let recorded = ["response_code", "error_detail", "upstream_failure_reason"]
        .map(|field| line.get(field).cloned());
    let text = |text: &str| Some(text).filter(|text| !text.is_empty()).map(|text| json!(text));
    assert_eq!(recorded, [Some(json!(status)), text(detail), text(endpoint)], "{line}");
    assert_eq!(count(sidecar, reason), counted_before + 1, "{reason}");
}

/// Checks that these bytes are rejected with this denial.
#[track_caller]
fn check_bytes(sidecar: &SingleSidecar, bytes: &str, refusal: ExpectedDenial) {
    let before = count(sidecar, refusal.reason);
    let answer = http1::ask(sidecar.port, bytes);
    let start: String = bytes.chars().take(200).collect();
    assert_eq!((answer.status, &answer.body), (refusal.status, &refusal.body()), "{start}");
    check_recorded(sidecar, refusal, before);
}

/// Checks that a GET with these headers is rejected over both HTTP versions, and for gRPC with a
/// gRPC status.
#[track_caller]
fn check(sidecar: &SingleSidecar, path: &str, fields: &[(&str, &str)], refusal: ExpectedDenial) {
    let lines: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    check_bytes(
        sidecar,
        &format!("GET {path} HTTP/1.1\r\nhost: a.example\r\n{lines}\r\n"),
        refusal,
    );

    let before = count(sidecar, refusal.reason);
    let answer = http2::ask_one(sidecar.port, request("GET", path, fields));
    let recorded = (answer.status(), answer.body());
    assert_eq!(recorded, (refusal.status, refusal.body().as_str()), "{answer:?}");
    check_recorded(sidecar, refusal, before);

    check_grpc(sidecar, path, fields, refusal);
}

/// "Responses" of gRPC over HTTP/2: trailers only, in one frame that ends the stream.
#[track_caller]
fn check_grpc(
    sidecar: &SingleSidecar,
    path: &str,
    fields: &[(&str, &str)],
    refusal: ExpectedDenial,
) {
    let before = count(sidecar, refusal.reason);
    let fields = [fields, &[("content-type", "application/grpc"), ("te", "trailers")]].concat();
    let answer = http2::ask_one(sidecar.port, request("POST", path, &fields));
    let recorded = (answer.status(), answer.header("grpc-status"), answer.body());
    assert_eq!(recorded, (200, Some(refusal.grpc), ""), "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/grpc"), "{answer:?}");
    let message = refusal.body().trim_end().replace(' ', "%20");
    assert_eq!(answer.header("grpc-message"), Some(message.as_str()), "{answer:?}");
    check_recorded(sidecar, refusal, before);
}

fn before(port: u16) -> SingleSidecarConfig {
    SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1)
}

/// In front of an HTTP/2 service: gRPC calls to an HTTP/1.1 service are always rejected.
fn before_http2(port: u16) -> SingleSidecarConfig {
    SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http2)
}

const MALFORMED: ExpectedDenial = ExpectedDenial::new(400, "13", "malformed");

#[test]
fn malformed_request_gets_400() {
    let sidecar = before(ScriptedServer::echoing_heads().port).start();
    let check = |bytes: &str, refusal| check_bytes(&sidecar, bytes, refusal);
    check("GET / HTTP/1.1\r\n\r\n", MALFORMED.because("missing host header"));
    let space = "space in the request target";
    check("GET /a b HTTP/1.1\r\nhost: a\r\n\r\n", MALFORMED.because(space));
    let large = ExpectedDenial::new(413, "8", "body_too_large");
    check("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1099511627777\r\n\r\n", large);
    let long = "99999999999999999999999999";
    check(&format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {long}\r\n\r\n"), large);
    let coding = ExpectedDenial::new(501, "12", "not_implemented")
        .because("unsupported transfer-encoding: only chunked is supported");
    check("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n", coding);
    check("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n", coding);
    let version = ExpectedDenial::new(505, "12", "unknown_version");
    check("GET / HTTP/2.0\r\nhost: a\r\n\r\n", version);
    check("GET / HTTP/0.9\r\nhost: a\r\n\r\n", version);
}

#[test]
fn denied_client_gets_403() {
    let keys = r#"{"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": "1",
        "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
        "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}"#;
    let sidecar = before(ScriptedServer::echoing_heads().port)
        .with_filter(require_token("https://issuer", "service", keys))
        .start();
    check(&sidecar, "/", &[], ExpectedDenial::new(401, "16", "jwt_header_not_present"));
    let answer = http1::ask(sidecar.port, "GET / HTTP/1.1\r\nhost: a\r\n\r\n");
    assert_eq!(answer.header("www-authenticate"), Some("Bearer"), "{answer:?}");
    drop(sidecar.access_line("jwt_header_not_present"));

    let wanted = before(ScriptedServer::echoing_heads().port).with_filter(allow_only("other", "/"));
    check(&wanted.start(), "/", &[], ExpectedDenial::new(403, "7", "not_allowed"));
}

#[test]
fn invalid_token_gets_401() {
    let filter = require_token("https://issuer", "service", r#"{"keys": []}"#);
    let wanted = before(ScriptedServer::echoing_heads().port).with_filter(filter);
    let sidecar = wanted.start_unready("invalid key set with no key");
    let bad = [("authorization", "Bearer e30.e30.e30")];
    let answer = http2::ask_one(sidecar.port, request("GET", "/", &bad));
    assert_eq!(answer.status(), 401, "{answer:?}");
    assert_eq!(answer.header("www-authenticate"), Some("Bearer error=\"invalid_token\""));
    let line = sidecar.access_line("\"jwt_request_format_invalid\"");
    assert!(line["error_detail"].is_string(), "{line}");
    assert_eq!(count(&sidecar, "jwt_request_format_invalid"), 1);
}

#[test]
fn request_without_route_gets_404() {
    let route = json!({"match": {"prefix": "/only"}, "route": {"cluster": "service"}});
    let wanted = before(ScriptedServer::echoing_heads().port).with_route(route);
    check(&wanted.start(), "/other", &[], ExpectedDenial::new(404, "12", "no_route"));
}

#[test]
fn unsupported_method_gets_405() {
    let sidecar = before(ScriptedServer::echoing_heads().port).start();
    let refusal =
        ExpectedDenial::new(405, "12", "method_not_allowed").because("TRACE is not served");
    check_bytes(&sidecar, "TRACE / HTTP/1.1\r\nhost: a\r\n\r\n", refusal);
    let counted = count(&sidecar, refusal.reason);
    let answer = http2::ask_one(sidecar.port, request("TRACE", "/", &[]));
    assert_eq!(answer.status(), 405, "{answer:?}");
    check_recorded(&sidecar, refusal, counted);
}

#[test]
fn forwarding_chain_above_the_limit_is_rejected() {
    let sidecar = before(ScriptedServer::echoing_heads().port).start();
    let named = |count: usize| vec!["10.0.0.1"; count].join(", ");
    let refusal = ExpectedDenial::new(463, "8", "too_many_forwarders");
    check(&sidecar, "/", &[("x-forwarded-for", &named(31))], refusal);
    check(&sidecar, "/", &[("x-forwarded-for", &named(30)), ("x-forwarded-for", "::1")], refusal);
}

/// Sends an incomplete request, and waits for the response.
#[track_caller]
fn check_slow(sidecar: &SingleSidecar, part: &str, reason: &'static str) {
    let counted = count(sidecar, reason);
    let mut client = Http1Client::connect(sidecar.port);
    let answer = client.ask(part);
    assert_eq!((answer.status, answer.body), (408, format!("{reason}\n")), "{part}");
    assert_eq!(http1::header(&answer.head, "connection"), Some("close"), "{part}");
    client.finish();
    assert!(client.is_at_end(), "{part}");
    check_recorded(sidecar, ExpectedDenial::new(408, "4", reason), counted);
}

#[test]
fn incomplete_request_gets_408() {
    let (_process, port) = OriginServer::start_http2();
    let sidecar = before_http2(port)
        .with("request_headers_timeout", json!("0.3s"))
        .with("request_timeout", json!("0.5s"))
        .start();
    check_slow(&sidecar, "GET / HTTP/1.1\r\nhost: ", "head_timeout");
    let post = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n";
    check_slow(&sidecar, &format!("{post}sen"), "body_timeout");
    let refusal = ExpectedDenial::new(408, "4", "body_timeout");
    let mut call = request("POST", "/", &[("content-type", "application/grpc")]);
    call["body"] = json!("sen");
    call["on_answer"] = json!("t");
    let answer = http2::ask_one(sidecar.port, call);
    assert_eq!((answer.status(), answer.header("grpc-status")), (200, Some("4")), "{answer:?}");
    check_recorded(&sidecar, refusal, 1);
}

#[test]
fn body_within_the_timeout_is_accepted() {
    let sidecar = before(ScriptedServer::silent().port)
        .with("request_timeout", json!("0.3s"))
        .with_route_action("timeout", &json!("0.8s"))
        .start();
    let bytes = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nsent";
    check_bytes(&sidecar, bytes, ExpectedDenial::new(504, "4", "upstream_timeout"));
}

/// A service that reads a head, then runs `act` on the connection.
fn doing(act: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> u16 {
    let backend = ScriptedServer::start(move |stream| {
        let mut reader = BufReader::new(stream);
        if read_head(&mut reader).is_some() {
            act(reader.get_mut());
        }
    });
    backend.port
}

/// Makes the connection end with a reset.
fn reset(stream: &mut TcpStream) {
    let socket = SockRef::from(&*stream);
    socket.set_linger(Some(std::time::Duration::ZERO)).expect("SO_LINGER can be set");
}

const BROKEN: ExpectedDenial = ExpectedDenial::new(502, "14", "upstream_broken");

#[test]
fn broken_upstream_response_gives_502() {
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
        let sidecar = before(port).start();
        let answer = http1::ask(sidecar.port, "GET /x HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!((answer.status, answer.body.as_str()), (502, "upstream_broken\n"), "{name}");
        check_recorded(&sidecar, BROKEN.of_endpoint(name), 0);
        let answer = http2::ask_one(sidecar.port, request("GET", "/x", &[]));
        assert_eq!((answer.status(), answer.body()), (502, "upstream_broken\n"), "{name}");
        check_recorded(&sidecar, BROKEN.of_endpoint(name), 1);
    }
    // Half an HTTP/2 preface is parsed as an HTTP/1.1 head.
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
fn response_head_above_the_limit_gives_502() {
    for (bytes, status) in [(1023, 200), (1024, 200), (1025, 502)] {
        let start = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-long: ";
        let rest = "x".repeat(bytes - start.len() - 4);
        let service = ScriptedServer::replying_once(format!("{start}{rest}\r\n\r\n"));
        let wanted = before(service.port);
        let sidecar = with_response_limit(wanted, "http_protocol_options", 1).start();
        let answer = http1::ask(sidecar.port, "GET / HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!(answer.status, status, "{bytes}");
    }
}

/// RFC 9113, section 10.5.1: name, value and 32 bytes per header, including `:status`.
#[test]
fn http2_response_head_above_the_limit_gives_502() {
    let (_process, port) = OriginServer::start_http2();
    let wanted = before_http2(port);
    let sidecar = with_response_limit(wanted, "http2_protocol_options", 1).start();
    let overhead = ":status".len() + "200".len() + "x-long".len() + 2 * 32;
    // The h2 library rejects a head whose size equals its limit.
    for (bytes, status) in [(1000, 200), (1023, 200), (1025, 502)] {
        let path = format!("/field/{}", bytes - overhead);
        let answer = http1::ask(sidecar.port, &format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n"));
        assert_eq!(answer.status, status, "{bytes}: {answer:?}");
    }
}

#[test]
fn cluster_without_endpoints_gives_503() {
    let mut wanted = before_http2(1);
    wanted.clusters = vec![cluster("service", &[], UpstreamHttp::Http2, None)];
    check(&wanted.start(), "/", &[], ExpectedDenial::new(503, "14", "no_endpoint"));
}

#[test]
fn endpoint_that_refuses_connections_gives_503() {
    let sidecar = before_http2(port::free()).start();
    let refused = ExpectedDenial::new(503, "14", "unreachable").of_endpoint("connection_refused");
    check(&sidecar, "/", &[], refused);
}

#[test]
fn cluster_at_its_request_limit_gives_503() {
    let limits = json!({"thresholds": [{"max_requests": 1}]});
    let silent = ScriptedServer::silent();
    let sidecar = before(silent.port).with_cluster("circuit_breakers", &limits).start();
    let mut held = Http1Client::connect(sidecar.port);
    held.send("GET /held HTTP/1.1\r\nhost: a\r\n\r\n");
    let overloaded =
        || http1::ask(sidecar.port, "GET / HTTP/1.1\r\nhost: a\r\nx: y\r\n\r\n").status == 503;
    // The first request may not have reached its service yet: then this one is served first, and
    // waits until its timeout.
    eventually("the first request is open", || {
        (sidecar.metric("weft_sidecar_upstream_connections_total") == 1).then_some(())
    });
    assert!(overloaded());
    check_recorded(&sidecar, ExpectedDenial::new(503, "8", "overloaded"), 0);
}

#[test]
fn disconnected_client_is_logged_as_460() {
    let sidecar = before(ScriptedServer::silent().port).start();
    let mut client = Http1Client::connect(sidecar.port);
    client.send("GET /left HTTP/1.1\r\nhost: a\r\n\r\n");
    eventually("the service has the request", || {
        (sidecar.metric("weft_sidecar_upstream_connections_total") == 1).then_some(())
    });
    drop(client);
    check_recorded(&sidecar, ExpectedDenial::new(460, "1", "client_gone"), 0);
}

/// A service whose ports drop connection attempts.
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

const CONNECT_TIMEOUT: ExpectedDenial =
    ExpectedDenial::new(504, "14", "connect_timeout").of_endpoint("connection_timeout");

#[test]
fn endpoints_that_drop_connections_give_504() {
    check(&before_black_holes(&[9, 10, 11]), "/", &[], CONNECT_TIMEOUT);
}

#[test]
fn single_endpoint_that_drops_connections_gives_504() {
    check(&before_black_holes(&[9]), "/", &[], CONNECT_TIMEOUT);
}

#[test]
fn endpoint_that_does_not_respond_gives_504() {
    let mut wanted =
        before(ScriptedServer::silent().port).with_route_action("timeout", &json!("0.4s"));
    let slow = ExpectedDenial::new(504, "4", "upstream_timeout");
    check_bytes(&wanted.clone().start(), "GET / HTTP/1.1\r\nhost: a\r\n\r\n", slow);
    wanted.clusters = before_http2(ScriptedServer::silent().port).clusters;
    let sidecar = wanted.start();
    check_bytes(&sidecar, "GET / HTTP/1.1\r\nhost: a\r\n\r\n", slow);
    check_grpc(&sidecar, "/", &[], slow);
}

/// A target of this many bytes.
fn target(bytes: usize) -> String {
    format!("/{}", "x".repeat(bytes - 1))
}

#[test]
fn target_above_the_limit_gets_414() {
    let sidecar = before(ScriptedServer::echoing_heads().port).start();
    let bytes = format!("GET {} HTTP/1.1\r\nhost: a\r\n\r\n", target(60 * 1024 + 1));
    check_bytes(&sidecar, &bytes, ExpectedDenial::new(414, "8", "target_too_long"));
}

#[test]
fn grpc_call_with_a_too_large_head_gets_a_grpc_status() {
    let (_process, port) = OriginServer::start_http2();
    let sidecar = before_http2(port).start();
    let long = "x".repeat(61 * 1024);
    check_grpc(
        &sidecar,
        "/",
        &[("x-long", &long)],
        ExpectedDenial::new(431, "8", "head_too_large"),
    );
    check_grpc(&sidecar, &target(61 * 1024), &[], ExpectedDenial::new(414, "8", "target_too_long"));
}

#[test]
fn http2_body_above_the_limit_gets_413() {
    let (_process, port) = OriginServer::start_http2();
    let sidecar = before_http2(port).with("request_timeout", json!("0.5s")).start();
    let mut post = request("POST", "/", &[("content-length", "1099511627777")]);
    post["body"] = json!("sent");
    post["until"] = json!("\n");
    let answer = http2::ask_one(sidecar.port, post);
    assert_eq!((answer.status(), answer.body()), (413, "body_too_large\n"), "{answer:?}");
}

/// A sidecar whose service ends its response early.
fn before_half_an_answer() -> SingleSidecar {
    let half = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf";
    before(ScriptedServer::replying_once(half).port).start()
}

const GET_HALF: &str = "GET /half HTTP/1.1\r\nhost: a\r\n\r\n";

#[test]
fn started_response_is_not_followed_by_an_error_response() {
    let sidecar = before_half_an_answer();
    assert!(http1::ask(sidecar.port, GET_HALF).broken);
    let line = sidecar.access_line("/half");
    assert_eq!(line["response_code"], 200, "{line}");
    assert_eq!(line["response_code_details"], "upstream_reset_after_response_started", "{line}");
}

#[test]
fn aborted_response_is_logged_once() {
    let sidecar = before_half_an_answer();
    let answer = http1::ask(sidecar.port, GET_HALF);
    let recorded = (answer.status, answer.broken);
    assert!(recorded == (200, true) || recorded == (502, false), "{answer:?}");
}
