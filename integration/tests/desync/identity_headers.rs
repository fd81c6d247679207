//! Identity headers from a client never reach the service, in any spelling; headers from its certificate do.

use serde_json::json;
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::{spiffe_id, text};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};

use crate::client::Client;
use crate::front::Front;
use crate::recorder::Recorder;
use crate::strict_parser::Request;

/// Identity headers that a sidecar sets or reserves.
const IDENTITY_HEADERS: [&str; 10] = [
    "x-forwarded-client-cert",
    "x-weft-peer",
    "x-weft-anything",
    "x-weft-",
    "x-amzn-mtls-clientcert",
    "x-amzn-mtls-clientcert-subject",
    "x-amzn-mtls-clientcert-issuer",
    "x-amzn-mtls-clientcert-serial-number",
    "x-amzn-mtls-clientcert-leaf",
    "x-amzn-mtls-clientcert-validity",
];

/// The identity headers that a service receives for a client with a certificate.
const VERIFIED: [&str; 3] =
    ["x-amzn-mtls-clientcert-serial-number", "x-forwarded-client-cert", "x-weft-peer"];

const FORGED: &str = "forged";

/// Spellings of a name that some services treat as the same header.
fn spellings(name: &str) -> Vec<String> {
    let every_other = |from: usize, change: fn(char) -> String| -> String {
        let changed =
            |(at, c): (usize, char)| if at % 2 == from { change(c) } else { c.to_string() };
        name.chars().enumerate().map(changed).collect()
    };
    let upper = |c: char| c.to_ascii_uppercase().to_string();
    vec![
        name.to_owned(),
        name.to_ascii_uppercase(),
        every_other(0, upper),
        every_other(1, upper),
        name.replace('-', "_"),
        name.replacen('-', "_", 1),
        name.replacen('-', "_", 2),
        name.replace('-', "_").to_ascii_uppercase(),
        name.replace("x-", "X_"),
    ]
}

/// Requests that contain the header, as a header or as a trailer.
fn requests(name: &str) -> [String; 5] {
    let get =
        |headers: &str| format!("GET / HTTP/1.1\r\nHost: a\r\nX-Harmless: y\r\n{headers}\r\n\r\n");
    let trailed = |head: &str| {
        format!(
            "POST / HTTP/1.1\r\nHost: a\r\nX-Harmless: y\r\n{head}Transfer-Encoding: chunked\r\n\r\n\
             1\r\ny\r\n0\r\n{name}: {FORGED}\r\n\r\n"
        )
    };
    [
        get(&format!("{name}: {FORGED}")),
        get(&format!("{name}:\r\nX: y\r\n{name}: {FORGED}\r\n{name}: {FORGED}")),
        // `connection` removes the headers that it names; it must not remove the verified ones.
        get(&format!(
            "Connection: {name}, x-weft-peer, x-forwarded-client-cert\r\n{name}: {FORGED}"
        )),
        trailed(""),
        trailed(&format!("Trailer: {name}\r\nConnection: trailer\r\n")),
    ]
}

/// Asserts that the service receives the verified identity headers and no others.
fn assert_identity_headers(request: &Request, verified: &[&str], sent: &str) {
    let is_identity_header = |name: &str| {
        name == "x-forwarded-client-cert"
            || name.starts_with("x-weft-")
            || name.starts_with("x-amzn-mtls-")
    };
    let all = || request.headers.iter().chain(&request.trailers);
    let names = all().map(|(name, _)| name.replace('_', "-"));
    let mut received: Vec<String> = names.filter(|name| is_identity_header(name)).collect();
    received.sort();
    assert_eq!(received, verified, "for {sent:?} the service received {request:?}");
    assert!(!all().any(|(_, value)| value.contains(FORGED)), "{sent:?} became {request:?}");
    assert_eq!(request.header("x-harmless"), Some("y"), "{sent:?} became {request:?}");
}

/// Sends every spelling in every way to a port. Returns the number of requests.
fn send_all(port: u16, recorder: &Recorder, verified: &[&str]) -> usize {
    let mut client = Client::connect(port);
    let mut count = 0;
    let spelled = IDENTITY_HEADERS.iter().flat_map(|name| spellings(name));
    for sent in spelled.flat_map(|name| requests(&name)) {
        client.send(sent.as_bytes());
        let answer = client.answer(false);
        assert_eq!(answer.as_ref().map(|answer| answer.status), Some(200), "{sent:?}: {answer:?}");
        let recorded = recorder.take();
        assert!(recorded.violations.is_empty(), "{sent:?}: {:?}", recorded.violations);
        assert_eq!(recorded.requests.len(), 1, "{sent:?}");
        assert_identity_headers(&recorded.requests[0], verified, &sent);
        count += 1;
    }
    count
}

#[test]
fn identity_headers_of_an_unauthenticated_client_are_removed() {
    for weft_metadata in [json!({}), json!({"underscores": "allow"})] {
        let mut front = Front::start(&[], &json!({}), &weft_metadata);
        assert_eq!(send_all(front.sidecar.port, &front.recorder, &[]), 450);
        front.assert_healthy();
    }
}

#[test]
fn identity_headers_are_replaced_by_the_verified_identity_between_sidecars() {
    let recorder = Recorder::start();
    let mut pair = SidecarPair::start(&PairConfig::http1(recorder.port));
    drop(recorder.take());
    assert_eq!(send_all(pair.caller.port, &recorder, &VERIFIED), 450);
    pair.assert_healthy();
}

/// A client with its own certificate, without a sidecar.
#[test]
fn connection_header_does_not_remove_verified_identity_headers() {
    let recorder = Recorder::start();
    let pair = SidecarPair::start(&PairConfig::http1(recorder.port));
    drop(recorder.take());
    let client = pair.pki.path("client");
    let certificate = client.with_extension("pem");
    let key = client.with_extension("key");
    let url = format!("https://127.0.0.1:{}/", pair.callee.port);
    let identity = ["--insecure", "--http1.1", "--cert", text(&certificate), "--key", text(&key)];
    for name in VERIFIED.iter().flat_map(|name| spellings(name)) {
        let connection = format!("connection: {name}");
        let forged = format!("{name}: {FORGED}");
        let headers = ["--header", "x-harmless: y", "--header", &connection, "--header", &forged];
        let answer = Curl::to(url.clone()).with(&identity).with(&headers).run();
        assert_eq!(answer.status, 200, "{name}: {answer:?}");
        let recorded = recorder.take();
        assert!(recorded.violations.is_empty(), "{name}: {:?}", recorded.violations);
        assert_identity_headers(&recorded.requests[0], &VERIFIED, &name);
        assert_eq!(recorded.requests[0].header("x-weft-peer"), Some(&*spiffe_id("client")));
    }
}
