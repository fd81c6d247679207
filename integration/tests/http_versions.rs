//! HTTP versions: every version of a client with every version of a service. Upgrades and tunnels
//! are in `upgrades`. Clients and services are raw sockets, `h2`, grpcio and websockets.

use serde_json::json;
use weft_integration::http1::{self, Http1Client};
use weft_integration::http2::{self, request};
use weft_integration::mesh_pki::{MeshPki, text};
use weft_integration::origin_server::OriginServer;
use weft_integration::port;
use weft_integration::process::{Process, counterpart, run};
use weft_integration::single_sidecar::{SidecarPerHttpVersion, SingleSidecarConfig, UpstreamHttp};
use weft_integration::tls_contexts::verify_mode;

/// The parts of a response that all HTTP versions have in common.
#[derive(Debug, Default, PartialEq, Eq)]
struct CommonResponse {
    status: u16,
    body: String,
    length: Option<String>,
    etag: Option<String>,
    checksum: Option<String>,
    interim: Vec<String>,
    link: Option<String>,
}

fn by_http1(port: u16, version: &str, method: &str, path: &str) -> CommonResponse {
    let answer = http1::ask(port, &format!("{method} {path} HTTP/{version}\r\nhost: a\r\n\r\n"));
    assert!(!answer.broken, "{answer:?}");
    let own = |text: &str| text.to_owned();
    CommonResponse {
        status: answer.status,
        length: answer.header("content-length").map(own),
        etag: answer.header("etag").map(own),
        checksum: http1::header(&format!("\n{}", answer.trailers), "x-checksum").map(own),
        interim: answer.interim.iter().map(|head| head[9..12].to_owned()).collect(),
        link: answer.interim.first().and_then(|head| http1::header(head, "link")).map(own),
        body: answer.body,
    }
}

fn by_http2(port: u16, method: &str, path: &str) -> CommonResponse {
    let answer = http2::ask_one(port, request(method, path, &[]));
    assert!(answer.is_whole(), "{answer:?}");
    let own = |text: &str| text.to_owned();
    CommonResponse {
        status: answer.status(),
        length: answer.header("content-length").map(own),
        etag: answer.header("etag").map(own),
        checksum: answer.trailer("x-checksum").map(own),
        interim: answer.interim().into_iter().map(own).collect(),
        link: answer.interim_header("link").map(own),
        body: answer.body().to_owned(),
    }
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[test]
fn response_is_equivalent_in_every_http_version() {
    let both = SidecarPerHttpVersion::plain();
    let check = |method: &str, path: &str, expected: &CommonResponse| {
        for (to, port) in both.ports() {
            let label = |version| format!("{method} {path} over {version} {to}");
            assert_eq!(&by_http1(port, "1.1", method, path), expected, "{}", label("HTTP/1.1"));
            assert_eq!(&by_http2(port, method, path), expected, "{}", label("HTTP/2"));
            // HTTP/1.0 has neither trailers nor interim responses.
            let mut old = by_http1(port, "1.0", method, path);
            assert_eq!((old.checksum.take(), old.interim.len()), (None, 0), "{}", label("1.0"));
            let expected = (expected.status, &expected.body, &expected.etag);
            assert_eq!((old.status, &old.body, &old.etag), expected, "{}", label("HTTP/1.0"));
        }
    };
    let hello = CommonResponse { status: 200, length: some("6"), ..CommonResponse::default() };
    check("HEAD", "/length", &hello);
    check("GET", "/length", &CommonResponse { body: "hello\n".to_owned(), ..hello });
    check("GET", "/empty", &CommonResponse { status: 204, ..CommonResponse::default() });
    let unmodified =
        CommonResponse { status: 304, etag: some("\"1\""), ..CommonResponse::default() };
    check("GET", "/unmodified", &unmodified);
    check("HEAD", "/unmodified", &unmodified);
    let body = "body".to_owned();
    let trailers =
        CommonResponse { status: 200, body, checksum: some("1"), ..CommonResponse::default() };
    check("GET", "/trailers", &trailers);
}

/// RFC 8297; RFC 9110, section 15.2: a server must not send a 1xx response to an HTTP/1.0 client.
#[test]
fn early_hints_reach_http11_and_http2_clients_only() {
    for (to, port) in SidecarPerHttpVersion::plain().ports() {
        for answer in [by_http1(port, "1.1", "GET", "/hints"), by_http2(port, "GET", "/hints")] {
            assert_eq!((answer.status, answer.interim), (200, vec!["103".to_owned()]), "{to}");
            assert_eq!(answer.link.as_deref(), Some("</style.css>; rel=preload"), "{to}");
        }
        let old = by_http1(port, "1.0", "GET", "/hints");
        assert_eq!((old.status, old.interim.len()), (200, 0), "{to}");
    }
}

#[test]
fn request_body_and_trailers_reach_the_service_in_every_version() {
    let both = SidecarPerHttpVersion::plain();
    let chunked = "POST /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
        3\r\nsen\r\n1;x=y\r\nt\r\n0\r\nx-checksum: 1\r\n\r\n";
    let whole = "POST /echo HTTP/1.0\r\nhost: a\r\ncontent-length: 4\r\n\r\nsent";
    let mut post = request("POST", "/echo", &[]);
    post["body"] = json!("sent");
    let mut with_length = request("POST", "/echo", &[("content-length", "4")]);
    with_length["body"] = json!("sent");
    let mut with_trailers = post.clone();
    with_trailers["trailers"] = json!([["x-checksum", "1"]]);
    for (to, port) in both.ports() {
        let received = http1::ask(port, chunked).body;
        assert!(received.ends_with("\n\nsent\ntrailer x-checksum: 1"), "{to}: {received}");
        let received = http1::ask(port, whole).body;
        assert!(
            received.ends_with("\n\nsent") && received.contains("content-length: 4"),
            "{to}: {received}"
        );
        let requests = [post.clone(), with_length.clone(), with_trailers.clone()];
        let answers = http2::ask(port, &requests);
        let ends = ["\n\nsent", "\n\nsent", "\n\nsent\ntrailer x-checksum: 1"];
        for (answer, end) in answers.iter().zip(ends) {
            assert!(answer.body().ends_with(end), "{to}: {answer:?}");
        }
    }
}

#[test]
fn http2_is_negotiated_by_alpn() {
    let pki = MeshPki::create();
    let server = pki.issue("server");
    let client = pki.issue("client");
    let files =
        [text(&pki.root()), text(&client.certificate), text(&client.key)].map(str::to_owned);
    let (_process, http2_port) = OriginServer::start_http2();
    let verify = verify_mode(&server, &pki.root(), &pki.crl_file());
    let mut pki = Some(pki);
    for (port, speaks) in
        [(OriginServer::start().port, UpstreamHttp::Http1), (http2_port, UpstreamHttp::Http2)]
    {
        let wanted = SingleSidecarConfig::for_upstream(port, speaks);
        let wanted = SingleSidecarConfig { tls: Some(verify.clone()), ..wanted };
        // Both sidecars need the files of one authority.
        let sidecar = match pki.take() {
            Some(pki) => wanted.start_with_pki(pki),
            None => wanted.start_with_pki(MeshPki::create()),
        };
        let mut asked = request("GET", "/echo", &[]);
        asked["tls"] = json!(files);
        let answer = http2::ask_one(sidecar.port, asked);
        assert_eq!(answer.status(), 200, "{speaks:?}: {answer:?}");
        assert!(answer.body().starts_with("GET /echo\n"), "{speaks:?}: {answer:?}");
        pki = Some(sidecar.pki);
    }
}

#[test]
fn grpc_call_reaches_an_http2_service() {
    let port = port::free();
    let service = Process::start("service", counterpart("grpc_service.py").arg(port.to_string()));
    service.line_with("ready");
    let sidecar = SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http2).start();
    for what in ["unary", "many", "error", "server_stream", "client_stream"] {
        run(counterpart("grpc_caller.py").arg(sidecar.port.to_string()).arg(what));
    }
}

#[test]
fn grpc_call_to_an_http1_service_is_unimplemented() {
    let origin = OriginServer::start();
    let sidecar = SingleSidecarConfig::for_upstream(origin.port, UpstreamHttp::Http1).start();
    let call = request("POST", "/weft.Test/Unary", &[("content-type", "application/grpc+proto")]);
    let answer = http2::ask_one(sidecar.port, call);
    assert_eq!(answer.status(), 200, "{answer:?}");
    assert_eq!(answer.header("grpc-status"), Some("12"), "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/grpc"), "{answer:?}");
    let line = sidecar.access_line("/weft.Test/Unary");
    assert_eq!(line["response_code"], 464, "{line}");
    assert_eq!(line["response_code_details"], "protocol_mismatch", "{line}");
    assert_eq!(origin.seen(), Vec::<String>::new());
}

const EXPECTING: &str = "expect: 100-continue\r\n\r\n";

#[test]
fn expect_continue_is_answered_by_the_service() {
    let both = SidecarPerHttpVersion::plain();
    for (to, port) in both.ports() {
        for framing in ["content-length: 4", "transfer-encoding: chunked"] {
            let mut client = Http1Client::connect(port);
            client.send(format!("POST /take HTTP/1.1\r\nhost: a\r\n{framing}\r\n{EXPECTING}"));
            let interim = client.bytes(25).expect("something");
            assert_eq!(interim, "HTTP/1.1 100 Continue\r\n\r\n", "{framing} {to}");
            let body = if framing.starts_with('c') { "sent" } else { "4\r\nsent\r\n0\r\n\r\n" };
            client.send(body);
            let answer = client.answer("POST");
            assert_eq!((answer.status, answer.interim.len()), (200, 0), "{framing} {to}");
            assert!(answer.body.ends_with("\n\nsent"), "{framing} {to}: {answer:?}");
        }
        let mut post = request("POST", "/take", &[("expect", "100-continue")]);
        post["on_continue"] = json!("sent");
        let answer = http2::ask_one(port, post);
        assert_eq!((answer.status(), answer.interim()), (200, vec!["100"]), "{to}: {answer:?}");
        assert!(answer.body().ends_with("\n\nsent"), "{to}: {answer:?}");
    }
}

#[test]
fn body_is_not_sent_when_the_service_refuses_it() {
    let both = SidecarPerHttpVersion::plain();
    for (to, port) in both.ports() {
        for status in [417, 401] {
            let mut client = Http1Client::connect(port);
            client.send(format!(
                "POST /refuse/{status} HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n{EXPECTING}"
            ));
            let answer = client.answer("POST");
            assert_eq!((answer.status, answer.interim.len()), (status, 0), "{to}: {answer:?}");
            client.send("sent");
            assert!(client.is_at_end(), "{to}");
            let path = format!("/refuse/{status}");
            let mut post = request("POST", &path, &[("expect", "100-continue")]);
            post["on_continue"] = json!("sent");
            let answer = http2::ask_one(port, post);
            assert_eq!((answer.status(), answer.interim().len()), (status, 0), "{to}: {answer:?}");
        }
        assert_eq!(by_http1(port, "1.1", "GET", "/last").status, 200);
    }
    let seen = both.http1.0.seen();
    assert_eq!(seen.iter().filter(|line| line.starts_with("left 0 /refuse/")).count(), 4);
    assert!(!seen.iter().any(|line| line.starts_with("body 4")), "{seen:?}");
    both.http2.0.line("the last request", |line| {
        assert!(!line.starts_with("body 4"), "{line}");
        line.contains("/last")
    });
}

/// RFC 9110, section 10.1.1: a server that responds without reading the body indicates whether it
/// will close the connection; RFC 9112, section 9.6: with `connection: close`.
#[test]
fn response_before_the_body_has_connection_close() {
    for (to, port) in SidecarPerHttpVersion::plain().ports() {
        let answer = http1::ask(
            port,
            &format!("POST /refuse/417 HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n{EXPECTING}"),
        );
        assert_eq!(answer.header("connection"), Some("close"), "{to}: {answer:?}");
    }
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    for (to, port) in SidecarPerHttpVersion::plain().ports() {
        let mut client = Http1Client::connect(port);
        client.send(
            "GET /echo?1 HTTP/1.1\r\nhost: a\r\n\r\n\
            POST /echo?2 HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nsent\
            GET /echo?3 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        );
        for request in ["GET /echo?1\n", "POST /echo?2\n", "GET /echo?3\n"] {
            let answer = client.answer("GET");
            assert_eq!(answer.status, 200, "{request} {to}: {answer:?}");
            assert!(answer.body.starts_with(request), "{request} {to}: {answer:?}");
        }
        assert!(client.is_at_end(), "{to}");
    }
}

#[test]
fn every_request_target_form_reaches_the_service() {
    let both = SidecarPerHttpVersion::plain();
    let check = |line: &str, host: &str, expected: &str| {
        for (to, port) in both.ports() {
            let received = http1::ask(port, &format!("{line} HTTP/1.1\r\nhost: {host}\r\n\r\n"));
            assert_eq!(received.status, 200, "{line} {to}: {received:?}");
            assert!(received.body.starts_with(expected), "{line} {to}: {received:?}");
        }
    };
    check("GET /x?y=z", "a", "GET /x?y=z\nhost: a\n");
    check("GET http://b.example:81/x?y", "a", "GET /x?y\nhost: b.example:81\n");
    check("GET http://b.example", "a", "GET /\nhost: b.example\n");
    check("OPTIONS /x", "a", "OPTIONS /x\nhost: a\n");
    check("GET /x", "[::1]", "GET /x\nhost: [::1]\n");
    check("GET /x", "[2001:db8::1]:8080", "GET /x\nhost: [2001:db8::1]:8080\n");
    check("GET http://[::1]:81/", "a", "GET /\nhost: [::1]:81\n");
    for (to, port) in both.ports() {
        let mut literal = request("GET", "/x", &[]);
        literal["fields"][2][1] = json!("[::1]:8080");
        let answer = http2::ask_one(port, literal);
        assert!(answer.body().starts_with("GET /x\nhost: [::1]:8080\n"), "{to}: {answer:?}");
    }
}

/// Sends requests without a path, `OPTIONS *`, over both versions.
#[track_caller]
fn check_options_of_the_server(both: &SidecarPerHttpVersion) {
    for (to, port) in both.ports() {
        let received = http1::ask(port, "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n");
        assert!(received.body.starts_with("OPTIONS *\nhost: a\n"), "{to}: {received:?}");
        let answer = http2::ask_one(port, request("OPTIONS", "*", &[]));
        assert!(answer.body().starts_with("OPTIONS *\nhost: a.example\n"), "{to}: {answer:?}");
    }
}

#[test]
fn options_asterisk_reaches_the_service_by_a_route_without_path() {
    check_options_of_the_server(&SidecarPerHttpVersion::start(
        SingleSidecarConfig::matching_empty_path,
    ));
}

/// RFC 9110, section 9.3.7.
#[test]
fn options_asterisk_matches_the_catch_all_route() {
    check_options_of_the_server(&SidecarPerHttpVersion::plain());
}

#[test]
fn last_request_of_a_connection_gets_connection_close() {
    let both = SidecarPerHttpVersion::start(|wanted| {
        wanted.with("common_http_protocol_options", json!({"max_requests_per_connection": 2}))
    });
    for (to, port) in both.ports() {
        let mut client = Http1Client::connect(port);
        let asked = "GET /echo HTTP/1.1\r\nhost: a\r\n\r\n";
        assert_eq!(client.ask(asked).header("connection"), None, "{to}");
        // Data after the last request is not read.
        let last = client.ask(&format!("{asked}{asked}"));
        assert_eq!((last.status, last.header("connection")), (200, Some("close")), "{to}");
        assert!(client.is_at_end(), "{to}");
    }
    let heads = both.http1.0.seen().into_iter().filter(|line| line.starts_with("head")).count();
    assert_eq!(heads, 2);
}

/// RFC 9112, section 9.3 and appendix C.2.2: an HTTP/1.0 client that requested keep-alive needs the
/// confirmation, or waits for the end of the connection.
#[test]
fn http10_keep_alive_is_confirmed_in_the_response() {
    for (to, port) in SidecarPerHttpVersion::plain().ports() {
        let mut client = Http1Client::connect(port);
        let answer = client.ask("GET /echo HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
        let kept = answer.header("connection");
        assert!(kept == Some("keep-alive") || client.is_at_end(), "{to}: {answer:?}");
    }
}

#[test]
fn http10_connection_is_closed_after_the_response() {
    for (to, port) in SidecarPerHttpVersion::plain().ports() {
        let mut client = Http1Client::connect(port);
        let answer = client.ask("GET /echo HTTP/1.0\r\n\r\n");
        assert_eq!((answer.status, answer.broken), (200, false), "{to}: {answer:?}");
        assert!(client.is_at_end(), "{to}");
    }
}
