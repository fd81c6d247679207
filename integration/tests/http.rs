//! HTTP through two sidecars: curl as the client, nginx or a faulty server as the upstream.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use weft_integration::bootstrap::{UpstreamHttp, bootstrap, cluster, http, listener, route_to};
use weft_integration::curl::{Curl, CurlResponse};
use weft_integration::mesh_pki::{IdentityFiles, MeshPki, PythonPki, spiffe_id, text};
use weft_integration::nginx::Nginx;
use weft_integration::port;
use weft_integration::scripted_server::{ScriptedServer, read_head, send_and_read_all};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair, TestSidecar};
use weft_integration::tls_contexts::verify_mode;
use weft_integration::wait::DEADLINE;

/// curl's option for HTTP/2 without TLS, which the listener of the caller's sidecar accepts as well as HTTP/1.1.
const HTTP2: &[&str] = &["--http2-prior-knowledge"];
const BOTH_VERSIONS: [(&str, &[&str]); 2] = [("1.1", &["--http1.1"]), ("2", HTTP2)];

const MEBIBYTE: usize = 1024 * 1024;

/// Pseudo-random bytes, so that a lost or repeated piece shows.
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
fn assert_complete(answer: &CurlResponse, status: u16) {
    assert_eq!((answer.exit, answer.status), (0, status), "{answer:?}");
}

#[test]
fn http1_and_http2_requests_pass_through_both_sidecars() {
    let (nginx, pair) = with_nginx();
    nginx.serve("hello", b"hello\n");
    for (version, option) in BOTH_VERSIONS {
        let answer = Curl::get(pair.caller.port, "/hello").with(option).run();
        assert_complete(&answer, 200);
        assert_eq!((answer.version.as_str(), answer.text().as_str()), (version, "hello\n"));
        assert_eq!(answer.header("content-length"), Some("6"));
        assert_complete(&Curl::get(pair.caller.port, "/nothing").with(option).run(), 404);
    }
}

#[test]
fn connections_are_reused_between_client_sidecars_and_upstream() {
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
fn upload_and_download_of_10_mebibytes_arrive_complete() {
    let (nginx, mut pair) = with_nginx();
    let file = pair.pki.path("large");
    let sent = content(10 * MEBIBYTE);
    std::fs::write(&file, &sent).expect("the folder is writable");
    let chunked = ["--header", "transfer-encoding: chunked"];
    for (name, options) in [("a", BOTH_VERSIONS[0].1), ("b", HTTP2), ("c", &chunked)] {
        let path = format!("/put/{name}");
        let put = Curl::get(pair.caller.port, &path).with(options);
        assert_complete(&put.with(&["--upload-file", text(&file)]).run(), 201);
        assert!(
            std::fs::read(nginx.file(&path[1..])).expect("the upload was stored") == sent,
            "{path} differs"
        );
        let got = Curl::get(pair.caller.port, &path).with(options).run();
        assert_complete(&got, 200);
        assert!(got.body == sent, "{path} was downloaded with {} bytes", got.body.len());
    }
    pair.assert_healthy();
}

#[test]
fn response_framings_are_preserved() {
    let (nginx, pair) = with_nginx();
    nginx.serve("hello", b"hello\n");
    nginx.serve("included", b"<!--#include virtual=\"/hello\" -->again\n");
    for (_, option) in BOTH_VERSIONS {
        let get = |path: &str| Curl::get(pair.caller.port, path).with(option);

        let chunked = get("/chunked/included").run();
        assert_complete(&chunked, 200);
        assert_eq!(
            (chunked.text().as_str(), chunked.header("content-length")),
            ("hello\nagain\n", None)
        );

        let head = get("/hello").with(&["--head"]).run();
        assert_complete(&head, 200);
        assert_eq!(head.header("content-length"), Some("6"), "the length of a response to GET");

        let empty = get("/empty").run();
        assert_complete(&empty, 204);
        assert_eq!((empty.body.len(), empty.header("transfer-encoding")), (0, None));

        let tag = get("/hello").run().header("etag").expect("nginx tags files").to_owned();
        let unmodified = get("/hello").with(&["--header", &format!("if-none-match: {tag}")]).run();
        assert_complete(&unmodified, 304);
        assert_eq!((unmodified.body.len(), unmodified.header("etag")), (0, Some(tag.as_str())));
    }
}

#[test]
fn client_with_expect_100_continue_gets_100_continue() {
    let (nginx, pair) = with_nginx();
    let options = ["--header", "expect: 100-continue", "--expect100-timeout", "25"];
    let put = Curl::get(pair.caller.port, "/put/x").with(&options).with(&["--request", "PUT"]);
    let answer = put.with(&["--data-binary", "expected"]).run();
    assert_complete(&answer, 201);
    assert!(answer.head.starts_with("HTTP/1.1 100 Continue\r\n"), "{}", answer.head);
    assert_eq!(std::fs::read(nginx.file("put/x")).expect("the upload was stored"), b"expected");
}

/// A server may respond before it has read the request body. The rest of the body belongs to that request, whatever
/// it looks like.
#[test]
fn rest_of_an_unread_body_is_not_parsed_as_a_request() {
    let pair = with_backend(ScriptedServer::replying_once(
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nearly",
    ));
    let mut stream = TcpStream::connect(pair.address()).expect("the sidecar listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    let smuggled = b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    let length = smuggled.len() + 1;
    write!(stream, "POST /first HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\nx")
        .expect("the sidecar accepts a header section");
    let mut reader = BufReader::new(stream);
    let head = read_head(&mut reader).expect("a response");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    // An error is allowed: the sidecar may have closed the connection.
    drop(reader.get_mut().write_all(smuggled));
    drop(reader.get_mut().shutdown(std::net::Shutdown::Write));
    pair.caller.process.line_with("/first");
    let mut rest = Vec::new();
    // A reset is allowed.
    drop(std::io::Read::read_to_end(&mut reader, &mut rest));
    assert_eq!(String::from_utf8_lossy(&rest), "early", "one request gets one response");
}

#[test]
fn client_identity_headers_are_replaced_by_the_verified_identity() {
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
        let answer = Curl::get(pair.caller.port, "/").with(option).with(&claims).run();
        assert_complete(&answer, 200);
        let head = answer.text();
        assert!(!head.contains("admin"), "a claimed identity was forwarded:\n{head}");
        assert!(head.contains("x-harmless: stays\r\n"), "{head}");
        let client = spiffe_id("client");
        assert!(head.contains(&format!("x-weft-peer: {client}\r\n")), "{head}");
        let certificate = head.lines().find(|line| line.starts_with("x-forwarded-client-cert: "));
        let certificate = certificate.expect("the verified certificate is forwarded");
        assert!(certificate.contains("Hash=") && certificate.contains(&client), "{certificate}");
    }
}

/// RFC 9113, section 8.2.3: HTTP/2 may split the cookie header, HTTP/1.1 may not.
#[test]
fn split_http2_cookies_reach_an_http1_service_as_one_header() {
    let pair = with_backend(ScriptedServer::echoing_heads());
    let cookies = ["--header", "cookie: a=1", "--header", "cookie: b=2"];
    let answer = Curl::get(pair.caller.port, "/").with(HTTP2).with(&cookies).run();
    assert_complete(&answer, 200);
    assert!(answer.text().contains("cookie: a=1; b=2\r\n"), "{}", answer.text());
}

/// Sends a request to a sidecar in Verify Mode with `openssl s_client`. Returns all that it printed.
fn request_by_openssl(port: u16, root: &std::path::Path, client: Option<&IdentityFiles>) -> String {
    request_by_openssl_with(&["-quiet"], port, root, client)
}

fn request_by_openssl_with(
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
        // Without this option openssl sends only the leaf, which the sidecar could not verify.
        openssl.arg("-cert_chain").arg(&client.certificate);
    }
    openssl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = openssl.spawn().expect("openssl can be started");
    let mut input = running.stdin.take().expect("standard input is piped");
    // An error is allowed: a refused client may have exited before it reads its input.
    drop(input.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"));
    let output = running.wait_with_output().expect("openssl exits with its connection");
    drop(input);
    [output.stdout, output.stderr].iter().map(|text| String::from_utf8_lossy(text)).collect()
}

/// The callee's sidecar without a caller's sidecar. It trusts `root`.
fn callee_alone(pki: &MeshPki, root: &std::path::Path, crl: &std::path::Path) -> TestSidecar {
    let port = port::free();
    let admin = port::free();
    let backend = ScriptedServer::echoing_heads();
    let verify = verify_mode(&pki.issue("server"), root, crl);
    let inbound = listener("inbound", port, http(&route_to("service", 15), &[]), Some(verify));
    let service = cluster("service", &[backend.port], UpstreamHttp::Http1, None);
    TestSidecar::start("callee", pki, port, admin, &bootstrap(admin, &[inbound], &[service]))
}

#[track_caller]
fn assert_refused(output: &str, alert: &str) {
    assert!(!output.contains("HTTP/1.1"), "the request was served:\n{output}");
    assert!(output.contains(alert), "no alert with {alert:?}:\n{output}");
}

#[test]
fn only_clients_with_a_valid_certificate_of_a_trusted_ca_are_served() {
    let pki = MeshPki::create();
    let good = pki.issue("good");
    let stolen = pki.issue("stolen");
    pki.revoke(&stolen);
    let callee = callee_alone(&pki, &pki.root(), &pki.crl_file());
    let ask = |client| request_by_openssl(callee.port, &pki.root(), client);

    assert!(ask(Some(&good)).contains("HTTP/1.1 200 OK"), "{}", ask(Some(&good)));
    assert_refused(&ask(None), "certificate required");
    assert_refused(&ask(Some(&stolen)), "certificate revoked");
    let foreign = MeshPki::create();
    // The foreign root has the same name and another key, so only the signature is wrong.
    assert_refused(&ask(Some(&foreign.issue("good"))), "certificate unknown");
}

#[test]
fn resumed_session_keeps_the_client_identity() {
    let pki = MeshPki::create();
    let callee = callee_alone(&pki, &pki.root(), &pki.crl_file());
    let client = pki.issue("client");
    let file = pki.path("session");
    let ask = |option, kind: &str| {
        let options = ["-ign_eof", option, text(&file)];
        let output = request_by_openssl_with(&options, callee.port, &pki.root(), Some(&client));
        assert!(
            output.contains(&format!("{kind}, TLSv1.3")),
            "the session is not {kind}:\n{output}"
        );
        assert!(output.contains(&format!("x-weft-peer: {}", spiffe_id("client"))), "{output}");
    };
    ask("-sess_out", "New");
    ask("-sess_in", "Reused");
    let page = Curl::get(callee.admin, "/metrics").run().text();
    assert!(page.contains("weft_sidecar_tls_handshakes_resumed_total 1\n"), "{page}");
}

#[test]
fn certificates_made_by_openssl_are_verified_like_those_of_weft() {
    let pki = MeshPki::create();
    let others = PythonPki::create();
    let callee = callee_alone(&pki, &others.root(), &others.crl_file());
    let ask = |client: &IdentityFiles| request_by_openssl(callee.port, &pki.root(), Some(client));

    let good = ask(&others.identity("good"));
    assert!(good.contains("HTTP/1.1 200 OK"), "{good}");
    assert!(good.contains(&format!("x-weft-peer: {}", spiffe_id("good"))), "{good}");
    assert_refused(&ask(&others.identity("expired")), "certificate expired");
    assert_refused(&ask(&others.identity("revoked")), "certificate revoked");
    assert_refused(&ask(&pki.issue("client")), "certificate unknown");
}

#[test]
fn refused_request_without_body_keeps_the_client_connection_open() {
    let mut pair = SidecarPair::start(&PairConfig::http1(port::free()));
    pair.callee.process.kill();
    let again = format!("http://{}/", pair.address());
    let twice = Curl::get(pair.caller.port, "/").with(&["--output", "/dev/null", &again]);
    let answer = twice.run();
    assert_eq!((answer.status, answer.connections), (503, 0), "{answer:?}");
    // A request body may still be in flight, so the connection closes, and the body is not parsed as a request.
    let answer = Curl::get(pair.caller.port, "/").with(&["--data-binary", "body"]).run();
    assert_eq!((answer.status, answer.header("connection")), (503, Some("close")), "{answer:?}");
}

#[test]
fn request_with_too_large_headers_is_refused_with_431() {
    let mut pair = with_backend(ScriptedServer::echoing_heads());
    let large = format!("x-large: {}", "a".repeat(63 * 1024));
    let file = pair.pki.path("headers");
    std::fs::write(&file, large).expect("the folder is writable");
    let header = format!("@{}", text(&file));
    for (_, option) in BOTH_VERSIONS {
        let refused =
            Curl::get(pair.caller.port, "/").with(option).with(&["--header", &header]).run();
        assert_complete(&refused, 431);
        assert_complete(&Curl::get(pair.caller.port, "/").with(option).run(), 200);
    }
    pair.assert_healthy();
}

#[test]
fn malformed_http_is_refused_with_400_and_leaves_sidecars_working() {
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
        let response =
            String::from_utf8_lossy(&send_and_read_all(pair.caller.port, bytes)).into_owned();
        let request = String::from_utf8_lossy(bytes);
        assert!(response.starts_with("HTTP/1.1 400 "), "{request:?} got {response:?}");
        assert!(response.contains("connection: close"), "{request:?} got {response:?}");
    }
    pair.assert_healthy();
    assert_complete(&Curl::get(pair.caller.port, "/").run(), 200);
}

#[test]
fn truncated_and_random_bytes_on_any_port_leave_sidecars_working() {
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
                let sent = &request[..end];
                let response = send_and_read_all(port, sent);
                // An endpoint may answer a whole head before the body is complete.
                let has_head = sent.windows(4).any(|window| window == b"\r\n\r\n");
                let is_served = response.starts_with(b"HTTP/1.1 200");
                assert!(has_head || !is_served, "a request without a whole head was served");
            }
        }
        for bytes in content(64 * 1024).chunks(997) {
            let _response = send_and_read_all(port, bytes);
        }
        let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", content(4096).as_slice()].concat();
        let _response = send_and_read_all(port, &preface);
    }
    pair.assert_healthy();
    assert_complete(&Curl::get(pair.caller.port, "/").run(), 200);
}

#[test]
fn endpoint_that_refuses_connections_gives_503() {
    let mut pair = SidecarPair::start(&PairConfig::http1(port::free()));
    for (_, option) in BOTH_VERSIONS {
        let refused = Curl::get(pair.caller.port, "/").with(option).run();
        assert_complete(&refused, 503);
        assert_eq!(refused.text(), "unreachable\n");
    }
    pair.assert_healthy();
}

#[test]
fn truncated_response_is_not_completed() {
    let half_length = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf";
    let half_chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n";
    for answer in [half_length, half_chunked] {
        let mut pair = with_backend(ScriptedServer::replying_once(answer));
        for (_, option) in BOTH_VERSIONS {
            let broken = Curl::get(pair.caller.port, "/").with(option).run();
            // If nothing was forwarded yet, the client may get 502; it never gets a complete response.
            assert!(
                broken.exit != 0 || broken.status == 502,
                "curl got a complete response: {broken:?}"
            );
            assert_ne!(broken.exit, 28, "curl timed out: {broken:?}");
        }
        pair.assert_healthy();
    }
}

#[test]
fn upstream_response_that_is_not_http_gives_502() {
    for answer in ["", "no HTTP at all\r\n\r\n", "HTTP/1.1 999999 x\r\n\r\n"] {
        let pair = with_backend(ScriptedServer::replying_once(answer));
        for (_, option) in BOTH_VERSIONS {
            let broken = Curl::get(pair.caller.port, "/").with(option).run();
            assert_eq!(broken.status, 502, "{answer:?} gave {broken:?}");
        }
    }
}

#[test]
fn endpoint_that_never_responds_gives_504() {
    let config =
        PairConfig { timeout_seconds: 1, ..PairConfig::http1(ScriptedServer::silent().port) };
    let mut pair = SidecarPair::start(&config);
    for (_, option) in BOTH_VERSIONS {
        assert_complete(&Curl::get(pair.caller.port, "/").with(option).run(), 504);
    }
    pair.assert_healthy();
}
