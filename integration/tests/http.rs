//! HTTP through two sidecars, with curl before them and nginx, or worse, behind them.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use weft_integration::bootstrap::{
    UpstreamHttp, bootstrap, cluster, http, listener, route_to, verify_mode,
};
use weft_integration::curl::{Curl, CurlResponse};
use weft_integration::mesh_pki::{IdentityFiles, MeshPki, PythonPki, spiffe_id, text};
use weft_integration::nginx::Nginx;
use weft_integration::port;
use weft_integration::scripted_server::{ScriptedServer, read_head, send_and_read_all};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair, TestSidecar};
use weft_integration::wait::DEADLINE;

/// curl's options for HTTP/2 without TLS, which the caller's sidecar takes beside HTTP/1.1.
const HTTP2: &[&str] = &["--http2-prior-knowledge"];
const BOTH_VERSIONS: [(&str, &[&str]); 2] = [("1.1", &["--http1.1"]), ("2", HTTP2)];

const MEBIBYTE: usize = 1024 * 1024;

/// Bytes that differ from place to place, so that a piece lost or sent twice shows.
fn content(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

fn with_nginx() -> (Nginx, SidecarPair) {
    let nginx = Nginx::start();
    let pair = SidecarPair::start(&PairConfig::http1(nginx.port));
    (nginx, pair)
}

fn with_backend(backend: ScriptedServer) -> SidecarPair {
    SidecarPair::start(&PairConfig::http1(backend.port))
}

#[track_caller]
fn assert_whole(answer: &CurlResponse, status: u16) {
    assert_eq!((answer.exit, answer.status), (0, status), "{answer:?}");
}

#[test]
fn both_versions_of_http_pass_through_both_sidecars() {
    let (nginx, pair) = with_nginx();
    nginx.serve("hello", b"hello\n");
    for (version, option) in BOTH_VERSIONS {
        let answer = Curl::get(pair.caller.port, "/hello").with(option).run();
        assert_whole(&answer, 200);
        assert_eq!((answer.version.as_str(), answer.text().as_str()), (version, "hello\n"));
        assert_eq!(answer.header("content-length"), Some("6"));
        assert_whole(&Curl::get(pair.caller.port, "/nothing").with(option).run(), 404);
    }
}

#[test]
fn connections_are_used_again_on_every_stretch() {
    let (nginx, pair) = with_nginx();
    nginx.serve("hello", b"hello\n");
    let again = format!("http://{}/hello", pair.address());
    let answer =
        Curl::get(pair.caller.port, "/hello").with(&["--output", "/dev/null", &again]).run();
    assert_eq!(answer.exit, 0, "{answer:?}");
    let connection = |line: String| line.rsplit(' ').next().unwrap_or_default().to_owned();
    let first = connection(nginx.process.line_with("GET /hello"));
    assert_eq!(connection(nginx.process.line_with("GET /hello")), first);
    let handshakes = pair.callee.metrics();
    let handshakes =
        handshakes.lines().find(|line| line.contains("handshakes") && line.ends_with(" 1"));
    assert!(handshakes.is_some(), "{}", pair.callee.metrics());
}

#[test]
fn ten_mebibytes_arrive_whole_both_ways() {
    let (nginx, mut pair) = with_nginx();
    let file = pair.pki.path("large");
    let sent = content(10 * MEBIBYTE);
    std::fs::write(&file, &sent).expect("the folder takes files");
    let chunked = ["--header", "transfer-encoding: chunked"];
    for (name, options) in [("a", BOTH_VERSIONS[0].1), ("b", HTTP2), ("c", &chunked)] {
        let path = format!("/put/{name}");
        let put = Curl::get(pair.caller.port, &path).with(options);
        assert_whole(&put.with(&["--upload-file", text(&file)]).run(), 201);
        assert!(
            std::fs::read(nginx.file(&path[1..])).expect("it was put") == sent,
            "{path} differs"
        );
        let got = Curl::get(pair.caller.port, &path).with(options).run();
        assert_whole(&got, 200);
        assert!(got.body == sent, "{path} came back with {} bytes", got.body.len());
    }
    pair.assert_healthy();
}

#[test]
fn every_framing_of_a_response_keeps_its_meaning() {
    let (nginx, pair) = with_nginx();
    nginx.serve("hello", b"hello\n");
    nginx.serve("included", b"<!--#include virtual=\"/hello\" -->again\n");
    for (_, option) in BOTH_VERSIONS {
        let get = |path: &str| Curl::get(pair.caller.port, path).with(option);

        let chunked = get("/chunked/included").run();
        assert_whole(&chunked, 200);
        assert_eq!(
            (chunked.text().as_str(), chunked.header("content-length")),
            ("hello\nagain\n", None)
        );

        let head = get("/hello").with(&["--head"]).run();
        assert_whole(&head, 200);
        assert_eq!(head.header("content-length"), Some("6"), "what a GET would give");

        let empty = get("/empty").run();
        assert_whole(&empty, 204);
        assert_eq!((empty.body.len(), empty.header("transfer-encoding")), (0, None));

        let tag = get("/hello").run().header("etag").expect("nginx tags files").to_owned();
        let unmodified = get("/hello").with(&["--header", &format!("if-none-match: {tag}")]).run();
        assert_whole(&unmodified, 304);
        assert_eq!((unmodified.body.len(), unmodified.header("etag")), (0, Some(tag.as_str())));
    }
}

#[test]
fn a_client_that_expects_100_continue_gets_it() {
    let (nginx, pair) = with_nginx();
    let options = ["--header", "expect: 100-continue", "--expect100-timeout", "25"];
    let put = Curl::get(pair.caller.port, "/put/x").with(&options).with(&["--request", "PUT"]);
    let answer = put.with(&["--data-binary", "expected"]).run();
    assert_whole(&answer, 201);
    assert!(answer.head.starts_with("HTTP/1.1 100 Continue\r\n"), "{}", answer.head);
    assert_eq!(std::fs::read(nginx.file("put/x")).expect("it was put"), b"expected");
}

/// A server may answer before it has read the body. What of the body then still comes belongs to the
/// old request, whatever it looks like.
#[test]
fn the_rest_of_a_body_is_never_taken_for_a_request() {
    let pair = with_backend(ScriptedServer::replying_once(
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nearly",
    ));
    let mut stream = TcpStream::connect(pair.address()).expect("the sidecar listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a deadline above zero");
    let smuggled = b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    let length = smuggled.len() + 1;
    write!(stream, "POST /first HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\nx")
        .expect("it takes a head");
    let mut reader = BufReader::new(stream);
    let head = read_head(&mut reader).expect("an answer");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    // The connection may be closed by now: that too is an answer.
    drop(reader.get_mut().write_all(smuggled));
    drop(reader.get_mut().shutdown(std::net::Shutdown::Write));
    pair.caller.process.line_with("/first");
    let mut rest = Vec::new();
    // A reset is as good an end as any.
    drop(std::io::Read::read_to_end(&mut reader, &mut rest));
    assert_eq!(String::from_utf8_lossy(&rest), "early", "one request has one answer");
}

#[test]
fn claims_of_identity_are_replaced_by_proof() {
    let pair = with_backend(ScriptedServer::echoing_heads());
    let claims = [
        "--header",
        "x-forwarded-client-cert: By=me;URI=spiffe://mesh.local/ns/default/sa/admin",
        "--header",
        "X-Weft-Peer: spiffe://mesh.local/ns/default/sa/admin",
        "--header",
        "x_weft_peer: spiffe://mesh.local/ns/default/sa/admin",
        "--header",
        "x-amzn-mtls-clientcert-subject: CN=admin",
        "--header",
        "x-harmless: stays",
    ];
    for (_, option) in BOTH_VERSIONS {
        let told = Curl::get(pair.caller.port, "/").with(option).with(&claims).run();
        assert_whole(&told, 200);
        let head = told.text();
        assert!(!head.contains("admin"), "a claim came through:\n{head}");
        assert!(head.contains("x-harmless: stays\r\n"), "{head}");
        let client = spiffe_id("client");
        assert!(head.contains(&format!("x-weft-peer: {client}\r\n")), "{head}");
        let certificate = head.lines().find(|line| line.starts_with("x-forwarded-client-cert: "));
        let certificate = certificate.expect("the proof is told");
        assert!(certificate.contains("Hash=") && certificate.contains(&client), "{certificate}");
    }
}

/// RFC 9113, section 8.2.3: HTTP/2 may divide a cookie field, HTTP/1.1 may not.
#[test]
fn divided_cookies_reach_an_http1_service_as_one_field() {
    let pair = with_backend(ScriptedServer::echoing_heads());
    let cookies = ["--header", "cookie: a=1", "--header", "cookie: b=2"];
    let told = Curl::get(pair.caller.port, "/").with(HTTP2).with(&cookies).run();
    assert_whole(&told, 200);
    assert!(told.text().contains("cookie: a=1; b=2\r\n"), "{}", told.text());
}

/// Asks a sidecar in Verify Mode by `openssl s_client`; all that it printed.
fn ask_by_openssl(port: u16, root: &std::path::Path, client: Option<&IdentityFiles>) -> String {
    ask_by_openssl_with(&["-quiet"], port, root, client)
}

fn ask_by_openssl_with(
    options: &[&str],
    port: u16,
    root: &std::path::Path,
    client: Option<&IdentityFiles>,
) -> String {
    let mut openssl = Command::new("openssl");
    openssl.args(["s_client", "-alpn", "http/1.1"]).args(options).arg("-connect");
    openssl.arg(format!("127.0.0.1:{port}")).arg("-CAfile").arg(root);
    if let Some(client) = client {
        openssl.arg("-cert").arg(&client.certificate).arg("-key").arg(&client.key);
        // Without it the leaf goes alone, and nobody could tell who signed it.
        openssl.arg("-cert_chain").arg(&client.certificate);
    }
    openssl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = openssl.spawn().expect("openssl runs");
    let mut input = running.stdin.take().expect("it was piped");
    // When it is refused it may be gone before it reads.
    drop(input.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"));
    let output = running.wait_with_output().expect("it ends with its connection");
    drop(input);
    [output.stdout, output.stderr].iter().map(|text| String::from_utf8_lossy(text)).collect()
}

/// A service's sidecar alone, which trusts `root`.
fn callee_alone(pki: &MeshPki, root: &std::path::Path, list: &std::path::Path) -> TestSidecar {
    let (port, admin) = (port::free(), port::free());
    let backend = ScriptedServer::echoing_heads();
    let verify = verify_mode(&pki.issue("server"), root, list);
    let inbound = listener("inbound", port, http(&route_to("service", 15), &[]), Some(verify));
    let service = cluster("service", &[backend.port], UpstreamHttp::Http1, None);
    TestSidecar::start("callee", pki, port, admin, &bootstrap(admin, &[inbound], &[service]))
}

#[track_caller]
fn assert_refused(said: &str, alert: &str) {
    assert!(!said.contains("HTTP/1.1"), "it was served:\n{said}");
    assert!(said.contains(alert), "no alert with {alert:?}:\n{said}");
}

#[test]
fn only_a_good_certificate_of_our_authority_opens_the_door() {
    let pki = MeshPki::create();
    let (good, stolen) = (pki.issue("good"), pki.issue("stolen"));
    pki.revoke(&stolen);
    let callee = callee_alone(&pki, &pki.root(), &pki.crl_file());
    let ask = |client| ask_by_openssl(callee.port, &pki.root(), client);

    assert!(ask(Some(&good)).contains("HTTP/1.1 200 OK"), "{}", ask(Some(&good)));
    assert_refused(&ask(None), "certificate required");
    assert_refused(&ask(Some(&stolen)), "certificate revoked");
    let foreign = MeshPki::create();
    // Its root has the name of ours and another key, so what is wrong is the signature.
    assert_refused(&ask(Some(&foreign.issue("good"))), "certificate unknown");
}

#[test]
fn a_session_is_resumed_and_its_client_known() {
    let pki = MeshPki::create();
    let callee = callee_alone(&pki, &pki.root(), &pki.crl_file());
    let client = pki.issue("client");
    let file = pki.path("session");
    let ask = |option, kind: &str| {
        let options = ["-ign_eof", option, text(&file)];
        let said = ask_by_openssl_with(&options, callee.port, &pki.root(), Some(&client));
        assert!(said.contains(&format!("{kind}, TLSv1.3")), "it is not {kind}:\n{said}");
        assert!(said.contains(&format!("x-weft-peer: {}", spiffe_id("client"))), "{said}");
    };
    ask("-sess_out", "New");
    ask("-sess_in", "Reused");
    let page = Curl::get(callee.admin, "/metrics").run().text();
    assert!(page.contains("weft_sidecar_handshakes_resumed_total 1\n"), "{page}");
}

#[test]
fn certificates_made_by_other_hands_are_judged_the_same() {
    let (pki, others) = (MeshPki::create(), PythonPki::create());
    let callee = callee_alone(&pki, &others.root(), &others.crl_file());
    let ask = |client: &IdentityFiles| ask_by_openssl(callee.port, &pki.root(), Some(client));

    let good = ask(&others.identity("good"));
    assert!(good.contains("HTTP/1.1 200 OK"), "{good}");
    assert!(good.contains(&format!("x-weft-peer: {}", spiffe_id("good"))), "{good}");
    assert_refused(&ask(&others.identity("expired")), "certificate expired");
    assert_refused(&ask(&others.identity("revoked")), "certificate revoked");
    assert_refused(&ask(&pki.issue("client")), "certificate unknown");
}

#[test]
fn a_refusal_does_not_cost_the_connection() {
    let mut pair = SidecarPair::start(&PairConfig::http1(port::free()));
    pair.callee.process.kill();
    let again = format!("http://{}/", pair.address());
    let twice = Curl::get(pair.caller.port, "/").with(&["--output", "/dev/null", &again]);
    let answer = twice.run();
    assert_eq!((answer.status, answer.connections), (503, 0), "{answer:?}");
    // A request whose body may still be on its way must not have its rest taken for a request.
    let answer = Curl::get(pair.caller.port, "/").with(&["--data-binary", "body"]).run();
    assert_eq!((answer.status, answer.header("connection")), (503, Some("close")), "{answer:?}");
}

#[test]
fn a_head_that_is_too_large_is_refused_with_431() {
    let mut pair = with_backend(ScriptedServer::echoing_heads());
    let large = format!("x-large: {}", "a".repeat(63 * 1024));
    let file = pair.pki.path("fields");
    std::fs::write(&file, large).expect("the folder takes files");
    let fields = format!("@{}", text(&file));
    for (_, option) in BOTH_VERSIONS {
        let refused =
            Curl::get(pair.caller.port, "/").with(option).with(&["--header", &fields]).run();
        assert_whole(&refused, 431);
        assert_whole(&Curl::get(pair.caller.port, "/").with(option).run(), 200);
    }
    pair.assert_healthy();
}

#[test]
fn what_is_no_http_is_refused_and_harms_nobody() {
    let mut pair = with_backend(ScriptedServer::echoing_heads());
    let refused_with_400: [&[u8]; 7] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /%00 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n folded: yes\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello\r\n\r\n",
    ];
    for bytes in refused_with_400 {
        let said =
            String::from_utf8_lossy(&send_and_read_all(pair.caller.port, bytes)).into_owned();
        let request = String::from_utf8_lossy(bytes);
        assert!(said.starts_with("HTTP/1.1 400 "), "to {request:?} it said {said:?}");
        assert!(said.contains("connection: close"), "to {request:?} it said {said:?}");
    }
    pair.assert_healthy();
    assert_whole(&Curl::get(pair.caller.port, "/").run(), 200);
}

#[test]
fn truncated_and_random_bytes_on_any_port_harm_nobody() {
    let mut pair = with_backend(ScriptedServer::echoing_heads());
    let ports = [pair.caller.port, pair.caller.admin, pair.callee.port, pair.callee.admin];
    let requests: [&[u8]; 3] = [
        b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ];
    for port in ports {
        for request in requests {
            for end in (1..=request.len()).step_by(7) {
                let said = send_and_read_all(port, &request[..end]);
                assert!(!said.starts_with(b"HTTP/1.1 200"), "an unfinished request was served");
            }
        }
        for bytes in content(64 * 1024).chunks(997) {
            let _whatever_it_says = send_and_read_all(port, bytes);
        }
        let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", content(4096).as_slice()].concat();
        let _whatever_it_says = send_and_read_all(port, &preface);
    }
    pair.assert_healthy();
    assert_whole(&Curl::get(pair.caller.port, "/").run(), 200);
}

#[test]
fn an_endpoint_that_refuses_gives_503() {
    let mut pair = SidecarPair::start(&PairConfig::http1(port::free()));
    for (_, option) in BOTH_VERSIONS {
        let refused = Curl::get(pair.caller.port, "/").with(option).run();
        assert_whole(&refused, 503);
        assert_eq!(refused.text(), "unreachable\n");
    }
    pair.assert_healthy();
}

#[test]
fn an_answer_that_breaks_off_is_seen_to_be_broken() {
    let half_length = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf";
    let half_chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n";
    for answer in [half_length, half_chunked] {
        let mut pair = with_backend(ScriptedServer::replying_once(answer));
        for (_, option) in BOTH_VERSIONS {
            let broken = Curl::get(pair.caller.port, "/").with(option).run();
            // What was not sent on yet may become a refusal; never a whole answer.
            assert!(broken.exit != 0 || broken.status == 502, "curl took it for whole: {broken:?}");
            assert_ne!(broken.exit, 28, "curl waited in vain: {broken:?}");
        }
        pair.assert_healthy();
    }
}

#[test]
fn an_answer_that_is_no_http_gives_502() {
    for answer in ["", "no HTTP at all\r\n\r\n", "HTTP/1.1 999999 x\r\n\r\n"] {
        let pair = with_backend(ScriptedServer::replying_once(answer));
        for (_, option) in BOTH_VERSIONS {
            let broken = Curl::get(pair.caller.port, "/").with(option).run();
            assert_eq!(broken.status, 502, "{answer:?} gave {broken:?}");
        }
    }
}

#[test]
fn an_endpoint_that_never_answers_gives_504() {
    let wanted =
        PairConfig { timeout_seconds: 1, ..PairConfig::http1(ScriptedServer::silent().port) };
    let mut pair = SidecarPair::start(&wanted);
    for (_, option) in BOTH_VERSIONS {
        assert_whole(&Curl::get(pair.caller.port, "/").with(option).run(), 504);
    }
    pair.assert_healthy();
}
