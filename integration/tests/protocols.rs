//! Every version of HTTP that a client may speak before every version that a service may speak, and what
//! of a message must be the same behind both. What a connection may become is in `upgrades`. Clients and services speak by hand, by `h2`, grpcio and
//! websockets.

use serde_json::json;
use weft_integration::bootstrap::verify_mode;
use weft_integration::http1::{self, Http1Client};
use weft_integration::http2::{self, request};
use weft_integration::mesh_pki::{MeshPki, text};
use weft_integration::origin_server::OriginServer;
use weft_integration::port;
use weft_integration::process::{Process, counterpart, run};
use weft_integration::single_sidecar::{
    SidecarPerHttpVersion, SingleSidecarConfig, UpstreamHttp, matching_empty_path,
};

/// What the versions of an answer have in common.
#[derive(Debug, Default, PartialEq, Eq)]
struct Common {
    status: u16,
    body: String,
    length: Option<String>,
    etag: Option<String>,
    checksum: Option<String>,
    interim: Vec<String>,
    link: Option<String>,
}

fn by_http1(port: u16, version: &str, method: &str, path: &str) -> Common {
    let answer = http1::ask(port, &format!("{method} {path} HTTP/{version}\r\nhost: a\r\n\r\n"));
    assert!(!answer.broken, "{answer:?}");
    let own = |text: &str| text.to_owned();
    Common {
        status: answer.status,
        length: answer.header("content-length").map(own),
        etag: answer.header("etag").map(own),
        checksum: http1::header(&format!("\n{}", answer.trailers), "x-checksum").map(own),
        interim: answer.interim.iter().map(|head| head[9..12].to_owned()).collect(),
        link: answer.interim.first().and_then(|head| http1::header(head, "link")).map(own),
        body: answer.body,
    }
}

fn by_http2(port: u16, method: &str, path: &str) -> Common {
    let answer = http2::ask_one(port, request(method, path, &[]));
    assert!(answer.is_whole(), "{answer:?}");
    let own = |text: &str| text.to_owned();
    Common {
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
fn an_answer_means_the_same_in_every_version() {
    let both = SidecarPerHttpVersion::plain();
    let check = |method: &str, path: &str, expected: &Common| {
        for (to, port) in both.ports() {
            let told = |version| format!("{method} {path} by {version} {to}");
            assert_eq!(&by_http1(port, "1.1", method, path), expected, "{}", told("HTTP/1.1"));
            assert_eq!(&by_http2(port, method, path), expected, "{}", told("HTTP/2"));
            // HTTP/1.0 knows neither trailers nor interim answers.
            let mut old = by_http1(port, "1.0", method, path);
            assert_eq!((old.checksum.take(), old.interim.len()), (None, 0), "{}", told("1.0"));
            let expected = (expected.status, &expected.body, &expected.etag);
            assert_eq!((old.status, &old.body, &old.etag), expected, "{}", told("HTTP/1.0"));
        }
    };
    let hello = Common { status: 200, length: some("6"), ..Common::default() };
    check("HEAD", "/length", &hello);
    check("GET", "/length", &Common { body: "hello\n".to_owned(), ..hello });
    check("GET", "/empty", &Common { status: 204, ..Common::default() });
    let unmodified = Common { status: 304, etag: some("\"1\""), ..Common::default() };
    check("GET", "/unmodified", &unmodified);
    check("HEAD", "/unmodified", &unmodified);
    let body = "body".to_owned();
    let trailers = Common { status: 200, body, checksum: some("1"), ..Common::default() };
    check("GET", "/trailers", &trailers);
}

/// RFC 8297; RFC 9110, section 15.2: a server must not send one to a client of HTTP/1.0.
#[test]
fn early_hints_reach_whoever_knows_them() {
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
fn a_body_and_its_trailers_reach_every_service() {
    let both = SidecarPerHttpVersion::plain();
    let chunked = "POST /tell HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
        3\r\nsen\r\n1;x=y\r\nt\r\n0\r\nx-checksum: 1\r\n\r\n";
    let whole = "POST /tell HTTP/1.0\r\nhost: a\r\ncontent-length: 4\r\n\r\nsent";
    let mut post = request("POST", "/tell", &[]);
    post["body"] = json!("sent");
    let mut with_length = request("POST", "/tell", &[("content-length", "4")]);
    with_length["body"] = json!("sent");
    let mut with_trailers = post.clone();
    with_trailers["trailers"] = json!([["x-checksum", "1"]]);
    for (to, port) in both.ports() {
        let told = http1::ask(port, chunked).body;
        assert!(told.ends_with("\n\nsent\ntrailer x-checksum: 1"), "{to}: {told}");
        let told = http1::ask(port, whole).body;
        assert!(told.ends_with("\n\nsent") && told.contains("content-length: 4"), "{to}: {told}");
        let requests = [post.clone(), with_length.clone(), with_trailers.clone()];
        let answers = http2::ask(port, &requests);
        let ends = ["\n\nsent", "\n\nsent", "\n\nsent\ntrailer x-checksum: 1"];
        for (answer, end) in answers.iter().zip(ends) {
            assert!(answer.body().ends_with(end), "{to}: {answer:?}");
        }
    }
}

#[test]
fn http2_is_agreed_on_by_alpn() {
    let pki = MeshPki::create();
    let (server, client) = (pki.issue("server"), pki.issue("client"));
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
        // Both need the files of the one authority.
        let alone = match pki.take() {
            Some(pki) => wanted.start_with_pki(pki),
            None => wanted.start_with_pki(MeshPki::create()),
        };
        let mut asked = request("GET", "/tell", &[]);
        asked["tls"] = json!(files);
        let answer = http2::ask_one(alone.port, asked);
        assert_eq!(answer.status(), 200, "{speaks:?}: {answer:?}");
        assert!(answer.body().starts_with("GET /tell\n"), "{speaks:?}: {answer:?}");
        pki = Some(alone.pki);
    }
}

#[test]
fn grpc_reaches_a_service_of_http2() {
    let port = port::free();
    let service = Process::start("service", counterpart("grpc_service.py").arg(port.to_string()));
    service.line_with("ready");
    let alone = SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http2).start();
    for what in ["unary", "many", "error", "server_stream", "client_stream"] {
        run(counterpart("grpc_caller.py").arg(alone.port.to_string()).arg(what));
    }
}

#[test]
fn grpc_before_a_service_of_http1_is_unimplemented() {
    let origin = OriginServer::start();
    let alone = SingleSidecarConfig::for_upstream(origin.port, UpstreamHttp::Http1).start();
    let call = request("POST", "/weft.Test/Unary", &[("content-type", "application/grpc+proto")]);
    let answer = http2::ask_one(alone.port, call);
    assert_eq!(answer.status(), 200, "{answer:?}");
    assert_eq!(answer.header("grpc-status"), Some("12"), "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/grpc"), "{answer:?}");
    let line = alone.access_line("/weft.Test/Unary");
    assert_eq!((&line["status"], &line["denial"]), (&json!(464), &json!("protocol_mismatch")));
    assert_eq!(origin.seen(), Vec::<String>::new());
}

const EXPECTING: &str = "expect: 100-continue\r\n\r\n";

#[test]
fn a_service_is_asked_itself_whether_it_takes_a_body() {
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
fn a_body_that_is_not_wanted_is_never_sent() {
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

/// RFC 9110, section 10.1.1: who answers without the body says whether it goes on reading; RFC 9112,
/// section 9.6: who closes says so.
#[test]
fn an_answer_without_the_body_says_that_it_is_the_last() {
    for (to, port) in SidecarPerHttpVersion::plain().ports() {
        let answer = http1::ask(
            port,
            &format!("POST /refuse/417 HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n{EXPECTING}"),
        );
        assert_eq!(answer.header("connection"), Some("close"), "{to}: {answer:?}");
    }
}

#[test]
fn requests_in_one_segment_are_answered_in_their_order() {
    for (to, port) in SidecarPerHttpVersion::plain().ports() {
        let mut client = Http1Client::connect(port);
        client.send(
            "GET /tell?1 HTTP/1.1\r\nhost: a\r\n\r\n\
            POST /tell?2 HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nsent\
            GET /tell?3 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
        );
        for request in ["GET /tell?1\n", "POST /tell?2\n", "GET /tell?3\n"] {
            let answer = client.answer("GET");
            assert_eq!(answer.status, 200, "{request} {to}: {answer:?}");
            assert!(answer.body.starts_with(request), "{request} {to}: {answer:?}");
        }
        assert!(client.is_at_end(), "{to}");
    }
}

#[test]
fn every_form_of_a_target_reaches_the_service_as_its_own_form() {
    let both = SidecarPerHttpVersion::plain();
    let check = |line: &str, host: &str, expected: &str| {
        for (to, port) in both.ports() {
            let told = http1::ask(port, &format!("{line} HTTP/1.1\r\nhost: {host}\r\n\r\n"));
            assert_eq!(told.status, 200, "{line} {to}: {told:?}");
            assert!(told.body.starts_with(expected), "{line} {to}: {told:?}");
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

/// A route that takes what has no path as well: `OPTIONS *` and `CONNECT`.
#[track_caller]
fn check_options_of_the_server(both: &SidecarPerHttpVersion) {
    for (to, port) in both.ports() {
        let told = http1::ask(port, "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n");
        assert!(told.body.starts_with("OPTIONS *\nhost: a\n"), "{to}: {told:?}");
        let answer = http2::ask_one(port, request("OPTIONS", "*", &[]));
        assert!(answer.body().starts_with("OPTIONS *\nhost: a.example\n"), "{to}: {answer:?}");
    }
}

#[test]
fn options_of_the_whole_server_reach_it() {
    check_options_of_the_server(&SidecarPerHttpVersion::start(matching_empty_path));
}

/// RFC 9110, section 9.3.7.
#[test]
fn options_of_the_whole_server_take_the_route_of_everything() {
    check_options_of_the_server(&SidecarPerHttpVersion::plain());
}

#[test]
fn the_last_request_of_a_connection_is_told_so() {
    let both = SidecarPerHttpVersion::start(|wanted| {
        wanted.with("common_http_protocol_options", json!({"max_requests_per_connection": 2}))
    });
    for (to, port) in both.ports() {
        let mut client = Http1Client::connect(port);
        let asked = "GET /tell HTTP/1.1\r\nhost: a\r\n\r\n";
        assert_eq!(client.ask(asked).header("connection"), None, "{to}");
        // What is behind the last one is not looked at.
        let last = client.ask(&format!("{asked}{asked}"));
        assert_eq!((last.status, last.header("connection")), (200, Some("close")), "{to}");
        assert!(client.is_at_end(), "{to}");
    }
    let heads = both.http1.0.seen().into_iter().filter(|line| line.starts_with("head")).count();
    assert_eq!(heads, 2);
}

/// RFC 9112, section 9.3, and appendix C.2.2: a client of HTTP/1.0 that asked for it must hear of it, or
/// waits for the end.
#[test]
fn http10_is_told_that_its_connection_is_kept() {
    for (to, port) in SidecarPerHttpVersion::plain().ports() {
        let mut client = Http1Client::connect(port);
        let answer = client.ask("GET /tell HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
        let kept = answer.header("connection");
        assert!(kept == Some("keep-alive") || client.is_at_end(), "{to}: {answer:?}");
    }
}

#[test]
fn http10_is_answered_and_closed() {
    for (to, port) in SidecarPerHttpVersion::plain().ports() {
        let mut client = Http1Client::connect(port);
        let answer = client.ask("GET /tell HTTP/1.0\r\n\r\n");
        assert_eq!((answer.status, answer.broken), (200, false), "{to}: {answer:?}");
        assert!(client.is_at_end(), "{to}");
    }
}
