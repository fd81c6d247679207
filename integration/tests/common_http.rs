//! Common behavior of clients and services that a proxy must not break: slow uploads, early responses, unusual
//! statuses.

use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use weft_integration::bootstrap::allow_only;
use weft_integration::http1::{self, Http1Client};
use weft_integration::http2::{self, request};
use weft_integration::http2_frames;
use weft_integration::origin_server::OriginServer;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::{self, SidecarPair};
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::DEADLINE;

/// Starts a sidecar whose only route has this timeout.
fn with_route_timeout(port: u16, timeout: &str) -> SingleSidecar {
    SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1)
        .with_route_action("timeout", &json!(timeout))
        .start()
}

/// Sends a body of this many bytes, one every 100 ms, and returns the status line of the response.
fn upload_slowly(port: u16, bytes: usize) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the sidecar listens");
    let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {bytes}\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("the sidecar accepts a header section");
    // A response before the last byte ends the upload, and is returned.
    stream.set_read_timeout(Some(Duration::from_millis(100))).expect("the timeout is not zero");
    let mut response = vec![0; 64];
    for _ in 0..bytes {
        stream.write_all(b"x").expect("the sidecar accepts the body");
        match stream.peek(&mut response) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Ok(_) | Err(_) => break,
        }
    }
    stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    let read = stream.read(&mut response).expect("a response arrives");
    let response = String::from_utf8_lossy(response.get(..read).unwrap_or_default()).into_owned();
    response.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn upload_longer_than_the_route_timeout_is_served() {
    let origin = OriginServer::start();
    let sidecar = with_route_timeout(origin.port, "0.5s");
    assert_eq!(upload_slowly(sidecar.port, 15), "HTTP/1.1 200 OK");
}

#[test]
fn route_timeout_begins_when_a_slow_upload_ends() {
    let sidecar = with_route_timeout(ScriptedServer::silent().port, "0.5s");
    assert_eq!(upload_slowly(sidecar.port, 15), "HTTP/1.1 504 Gateway Timeout");
    let line = sidecar.access_line("upstream_response_timeout");
    let took = line.get("duration_us").and_then(Value::as_u64).unwrap_or(0);
    assert!(took >= 1_900_000, "1.5 s of upload and 0.5 s of route timeout: {line}");
}

const MEBIBYTE: usize = 1024 * 1024;

/// Sends a whole body before it reads the response, as most HTTP/1.1 clients do. Returns the status of the response,
/// or 0 when the connection breaks.
fn upload_first(port: u16, path: &str, bytes: usize) -> u16 {
    let mut client = Http1Client::connect(port);
    client.send(format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {bytes}\r\n\r\n"));
    let piece = vec![b'x'; MEBIBYTE];
    for _ in 0..bytes / MEBIBYTE {
        if !client.send(&piece) {
            return 0;
        }
    }
    client.answer("POST").status
}

#[track_caller]
fn assert_uploads_get(sidecar: &SingleSidecar, name: &str, status: u16) {
    for bytes in [MEBIBYTE, 5 * MEBIBYTE, 64 * MEBIBYTE] {
        let statuses: Vec<u16> = (0..8).map(|_| upload_first(sidecar.port, "/", bytes)).collect();
        assert_eq!(statuses, [status; 8], "{name}: {bytes} bytes");
    }
}

#[test]
fn policy_refusal_reaches_a_client_within_its_upload() {
    let config =
        SingleSidecarConfig::for_upstream(ScriptedServer::silent().port, UpstreamHttp::Http1)
            .with_filter(allow_only("other", "/"));
    assert_uploads_get(&config.start(), "a policy that denies", 403);
}

#[test]
fn early_response_of_a_service_reaches_a_client_within_its_upload() {
    let response =
        "HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 5\r\n\r\nlarge";
    let closing = ScriptedServer::replying_once(response);
    let sidecar = SingleSidecarConfig::for_upstream(closing.port, UpstreamHttp::Http1).start();
    assert_uploads_get(&sidecar, "a service that closes", 413);
    let open = Mutex::new(Vec::new());
    let keeping = ScriptedServer::start(move |stream| {
        let mut reader = BufReader::new(stream);
        if read_head(&mut reader).is_some() {
            // A lost connection shows in the statuses that the clients get.
            drop(reader.get_mut().write_all(response.as_bytes()));
            open.lock().expect("no thread panics").push(reader);
        }
    });
    let sidecar = SingleSidecarConfig::for_upstream(keeping.port, UpstreamHttp::Http1).start();
    assert_uploads_get(&sidecar, "a service that stops reading", 413);
}

/// The number of voluntary context switches of a process: one for each time that a thread goes to sleep.
fn wake_ups(process: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("the process runs");
    let sleeps = tasks.flatten().map(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or(0)
    });
    sleeps.sum()
}

#[test]
fn partial_http2_preface_is_refused_with_408_without_polling() {
    let sidecar =
        SingleSidecarConfig::for_upstream(ScriptedServer::silent().port, UpstreamHttp::Http1)
            .with("request_headers_timeout", json!("2s"))
            .start();
    for bytes in ["P", "PR", "PRI"] {
        let mut client = Http1Client::connect(sidecar.port);
        let before = wake_ups(sidecar.sidecar.process.id());
        for byte in bytes.chars() {
            assert!(client.send(byte.to_string()));
        }
        assert_eq!(client.answer("GET").status, 408, "{bytes}");
        let woken = wake_ups(sidecar.sidecar.process.id()) - before;
        // Polling once per millisecond would cause 2,000 in two seconds; workers wake up about twice a second anyway.
        assert!(woken < 200, "{bytes}: {woken} wake-ups");
    }
}

#[test]
fn client_that_closes_within_the_http2_preface_gets_400_at_once() {
    let sidecar =
        SingleSidecarConfig::for_upstream(ScriptedServer::silent().port, UpstreamHttp::Http1)
            .with("request_headers_timeout", json!("1000s"))
            .start();
    for bytes in ["P", "PRI"] {
        let mut client = Http1Client::connect(sidecar.port);
        assert!(client.send(bytes));
        client.finish();
        assert_eq!(client.answer("GET").status, 400, "{bytes}");
    }
}

#[test]
fn http2_preface_in_pieces_and_method_with_the_same_prefix_are_served() {
    let origin = OriginServer::start();
    let sidecar = SingleSidecarConfig::for_upstream(origin.port, UpstreamHttp::Http1).start();
    let mut client = Http1Client::connect(sidecar.port);
    for piece in ["P", "RI", "NT / HTTP/1.1\r\n", "host: a\r\n\r\n"] {
        assert!(client.send(piece));
        // Between two pieces the sidecar answers a metrics request, so it has read the first piece by then.
        assert!(sidecar.metric("weft_sidecar_connections_open") > 0);
    }
    assert_eq!(client.answer("PRINT").status, 200);
    let mut client = Http1Client::connect(sidecar.port);
    for piece in ["P", "R", "I * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0"] {
        assert!(client.send(piece));
        // Between two pieces the sidecar answers a metrics request, so it has read the first piece by then.
        assert!(sidecar.metric("weft_sidecar_connections_open") > 0);
    }
    // The frame header of its SETTINGS frame, which has type 4.
    let settings = client.bytes(9).expect("the sidecar sends its SETTINGS");
    assert_eq!(settings.as_bytes().get(3), Some(&4), "{settings:?}");
}

const GET_WITH_BODY: &str = "GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc";

#[test]
fn get_with_a_body_keeps_the_client_connection_open() {
    let origin = OriginServer::start();
    let sidecar = SingleSidecarConfig::for_upstream(origin.port, UpstreamHttp::Http1).start();
    let mut client = Http1Client::connect(sidecar.port);
    for request in [
        GET_WITH_BODY,
        "GET / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        GET_WITH_BODY,
        "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ] {
        let answer = client.ask(request);
        assert_eq!((answer.status, answer.header("connection")), (200, None), "{request}");
    }
}

/// A service that does not read the body of a GET would take the body for the next client's request.
#[test]
fn body_of_a_get_is_never_read_as_a_request() {
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .start();
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut client = Http1Client::connect(sidecar.port);
    for _ in 0..10 {
        let length = smuggled.len();
        let get = format!("GET / HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
        let first = client.ask(&format!("{get}{smuggled}"));
        assert_eq!(first.status, 200);
        let next = client.ask("GET /next HTTP/1.1\r\nhost: a\r\n\r\n");
        assert!(next.body.starts_with("GET /next "), "{next:?}");
    }
}

#[test]
fn status_codes_above_599_are_forwarded() {
    for status in [600, 799, 999] {
        let response = format!("HTTP/1.1 {status} Own\r\ncontent-length: 3\r\n\r\nown");
        let sidecar = SingleSidecarConfig::for_upstream(
            ScriptedServer::replying_once(response).port,
            UpstreamHttp::Http1,
        )
        .start();
        let by_http1 = http1::ask(sidecar.port, "GET / HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!((by_http1.status, by_http1.body.as_str()), (status, "own"));
        let by_http2 = http2::ask_one(sidecar.port, request("GET", "/", &[]));
        assert_eq!((by_http2.status(), by_http2.body()), (status, "own"));
        assert_eq!(sidecar.metric("weft_sidecar_requests_total{response_class=\"other\"}"), 2);
    }
}

#[test]
fn grpc_web_over_http2_reaches_an_http1_service() {
    let sidecar =
        SingleSidecarConfig::for_upstream(OriginServer::start().port, UpstreamHttp::Http1).start();
    for kind in ["application/grpc-web", "application/grpc-web+proto", "application/grpc-web-text"]
    {
        let mut post = request("POST", "/x.Y/Z", &[("content-type", kind)]);
        post["body"] = json!("message");
        let answer = http2::ask_one(sidecar.port, post);
        assert_eq!(answer.status(), 200, "{kind}: {answer:?}");
        assert!(answer.body().contains("message"), "{kind}: {answer:?}");
    }
    for kind in ["application/grpc", "application/grpc+proto", "Application/gRPC;x=y"] {
        let answer =
            http2::ask_one(sidecar.port, request("POST", "/x.Y/Z", &[("content-type", kind)]));
        assert_eq!(answer.header("grpc-status"), Some("12"), "{kind}: {answer:?}");
    }
}

/// A service with per-connection logins, as of NTLM: the first request on a connection gets 401 with `challenge`, if
/// there is one, and every other request the number of its connection.
fn with_connection_logins(challenge: Option<&'static str>) -> ScriptedServer {
    let connections = AtomicUsize::new(0);
    ScriptedServer::start(move |stream| {
        let number = connections.fetch_add(1, Ordering::Relaxed).to_string();
        let mut reader = BufReader::new(stream);
        let mut challenge = challenge;
        while read_head(&mut reader).is_some() {
            let response = match challenge.take() {
                Some(challenge) => {
                    format!("HTTP/1.1 401 Unauthorized\r\n{challenge}\r\ncontent-length: 0\r\n\r\n")
                }
                None => {
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{number}", number.len())
                }
            };
            if reader.get_mut().write_all(response.as_bytes()).is_err() {
                return;
            }
        }
    })
}

/// Asserts that each of three clients is challenged, then keeps an upstream connection of its own.
#[track_caller]
fn assert_own_connections(port: u16, name: &str) {
    const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut clients: Vec<Http1Client> = (0..3).map(|_| Http1Client::connect(port)).collect();
    let mut served = Vec::new();
    for client in &mut clients {
        assert_eq!(client.ask(GET).status, 401, "{name}");
        let answer = client.ask(GET);
        assert_eq!(answer.status, 200, "{name}");
        served.push(answer.body);
    }
    for _ in 0..3 {
        let again: Vec<String> = clients.iter_mut().map(|client| client.ask(GET).body).collect();
        assert_eq!(again, served, "{name}");
    }
    served.sort();
    served.dedup();
    assert_eq!(served.len(), 3, "{name}: one connection served two clients");
}

#[test]
fn upstream_connections_with_a_login_are_not_shared_between_clients() {
    for challenge in [
        "WWW-Authenticate: NTLM",
        "www-authenticate: negotiate",
        "WWW-Authenticate: Basic realm=\"a\"\r\nWWW-Authenticate: Negotiate",
        "WWW-Authenticate: Basic realm=\"a\", NTLM",
    ] {
        let backend = with_connection_logins(Some(challenge));
        let sidecar = SingleSidecarConfig::for_upstream(backend.port, UpstreamHttp::Http1)
            .with_one_worker(&[])
            .start();
        assert_own_connections(sidecar.port, challenge);
    }
    let pair = SidecarPair::start(&sidecar_pair::PairConfig::http1(
        with_connection_logins(Some("WWW-Authenticate: NTLM")).port,
    ));
    assert_own_connections(pair.caller.port, "between two sidecars");
}

#[test]
fn negotiate_login_in_a_request_reserves_its_upstream_connection() {
    let sidecar =
        SingleSidecarConfig::for_upstream(with_connection_logins(None).port, UpstreamHttp::Http1)
            .with_one_worker(&[])
            .start();
    let get = |headers: &str| format!("GET / HTTP/1.1\r\nhost: a\r\n{headers}\r\n");
    let mut first = Http1Client::connect(sidecar.port);
    let own = first.ask(&get("authorization: Negotiate YIIabc\r\n")).body;
    for _ in 0..5 {
        assert_ne!(
            http1::ask(sidecar.port, &get("")).body,
            own,
            "another client does not use the connection with the login"
        );
        assert_eq!(first.ask(&get("")).body, own);
    }
    // Requests without a connection login still share a connection.
    let shared = http1::ask(sidecar.port, &get("authorization: Bearer x\r\n")).body;
    assert_eq!(http1::ask(sidecar.port, &get("")).body, shared);
}

/// An HTTP/2 connection may carry several clients, so it does not support connection logins.
#[test]
fn http2_login_attempt_does_not_reserve_an_upstream_connection() {
    let backend = with_connection_logins(Some("WWW-Authenticate: NTLM"));
    let sidecar = SingleSidecarConfig::for_upstream(backend.port, UpstreamHttp::Http1)
        .with_one_worker(&[])
        .start();
    for _ in 0..3 {
        assert_eq!(http2::ask_one(sidecar.port, request("GET", "/", &[])).status(), 401);
    }
}

/// Targets with raw characters that RFC 3986 forbids, and the target that the service receives, or `None` if refused.
const RAW_TARGETS: [(&str, Option<&str>); 12] = [
    ("/a?q={x}", Some("/a?q=%7Bx%7D")),
    ("/a?q=x|y", Some("/a?q=x%7Cy")),
    ("/a?q=x^y", Some("/a?q=x%5Ey")),
    ("/a?q=`x`", Some("/a?q=%60x%60")),
    ("/a?q=x\\y", Some("/a?q=x%5Cy")),
    ("/a?q=<x", None),
    ("/a?q=x>y", None),
    ("/a?q=\"x\"", None),
    ("/a<b", None),
    ("/a>b", None),
    ("/a`b", None),
    ("/a?q=\u{e4}", None),
];

#[test]
fn raw_characters_in_targets_are_encoded_or_refused_equally_over_http1_and_http2() {
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .start();
    for (target, received) in RAW_TARGETS {
        let by_http1 =
            http1::ask(sidecar.port, &format!("GET {target} HTTP/1.1\r\nhost: a\r\n\r\n"));
        let first_line = sidecar.access_line("\"kind\":\"http\"");
        let by_http2 = http2::ask_one(sidecar.port, request("GET", target, &[]));
        let second_line = sidecar.access_line("\"kind\":\"http\"");
        let status = if received.is_some() { 200 } else { 400 };
        let got = (by_http1.status, by_http2.status());
        assert_eq!(got, (status, status), "{target}: {by_http2:?}");
        for line in [first_line, second_line] {
            assert_eq!(line.get("response_code"), Some(&json!(status)), "{target}: {line}");
        }
        let line = received.map(|received| format!("GET {received} HTTP/1.1\r\n"));
        for body in [&*by_http1.body, by_http2.body()].into_iter().filter(|_| received.is_some()) {
            assert!(line.as_ref().is_some_and(|line| body.starts_with(line)), "{target}: {body}");
        }
    }
}

#[test]
fn refused_http2_request_keeps_its_connection_open_for_other_streams() {
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .start();
    let mut client = http2_frames::Http2FrameClient::connect(sidecar.port);
    for stream in (1..40).step_by(4) {
        let bad = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/?<")];
        client.send(&http2_frames::headers(http2_frames::flag::WHOLE, stream, &bad));
        assert_eq!(client.outcome(stream), http2_frames::StreamOutcome::Answered(400));
        client.send(&http2_frames::headers(
            http2_frames::flag::WHOLE,
            stream + 2,
            &http2_frames::get("/"),
        ));
        assert_eq!(client.outcome(stream + 2), http2_frames::StreamOutcome::Answered(200));
    }
    assert_eq!(sidecar.metric("weft_sidecar_requests_denied_total{reason=\"malformed\"}"), 10);
    assert_eq!(sidecar.metric("weft_sidecar_requests_open"), 0);
}
