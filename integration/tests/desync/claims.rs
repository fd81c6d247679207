//! Who a client says that it is reaches nobody, however it is said; what it proved does.

use serde_json::json;
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::{spiffe_id, text};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};

use crate::client::Client;
use crate::front::Front;
use crate::recorder::Recorder;
use crate::strict::Request;

/// What a sidecar tells of its peer, or could.
const CLAIMS: [&str; 10] = [
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

/// What is told of a peer that showed a certificate.
const PROVED: [&str; 3] =
    ["x-amzn-mtls-clientcert-serial-number", "x-forwarded-client-cert", "x-weft-peer"];

const FORGED: &str = "forged";

/// The ways to write a name that some service takes for the same.
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

/// The ways to send a field.
fn requests(name: &str) -> [String; 5] {
    let get =
        |fields: &str| format!("GET / HTTP/1.1\r\nHost: a\r\nX-Harmless: y\r\n{fields}\r\n\r\n");
    let trailed = |head: &str| {
        format!(
            "POST / HTTP/1.1\r\nHost: a\r\nX-Harmless: y\r\n{head}Transfer-Encoding: chunked\r\n\r\n\
             1\r\ny\r\n0\r\n{name}: {FORGED}\r\n\r\n"
        )
    };
    [
        get(&format!("{name}: {FORGED}")),
        get(&format!("{name}:\r\nX: y\r\n{name}: {FORGED}\r\n{name}: {FORGED}")),
        // What is named goes; the proof must not go with it.
        get(&format!(
            "Connection: {name}, x-weft-peer, x-forwarded-client-cert\r\n{name}: {FORGED}"
        )),
        trailed(""),
        trailed(&format!("Trailer: {name}\r\nConnection: trailer\r\n")),
    ]
}

/// Holds that the service is told of a peer what was proved, and no more.
fn check(request: &Request, proved: &[&str], sent: &str) {
    let is_claim = |name: &str| {
        name == "x-forwarded-client-cert"
            || name.starts_with("x-weft-")
            || name.starts_with("x-amzn-mtls-")
    };
    let all = || request.fields.iter().chain(&request.trailers);
    let names = all().map(|(name, _)| name.replace('_', "-"));
    let mut told: Vec<String> = names.filter(|name| is_claim(name)).collect();
    told.sort();
    assert_eq!(told, proved, "to {sent:?} the service got {request:?}");
    assert!(!all().any(|(_, value)| value.contains(FORGED)), "{sent:?} gave {request:?}");
    assert_eq!(request.header("x-harmless"), Some("y"), "{sent:?} gave {request:?}");
}

/// Sends every spelling in every way to a port; how many there were.
fn run(port: u16, recorder: &Recorder, proved: &[&str]) -> usize {
    let mut client = Client::connect(port);
    let mut count = 0;
    for sent in CLAIMS.iter().flat_map(|name| spellings(name)).flat_map(|name| requests(&name)) {
        client.send(sent.as_bytes());
        let answer = client.answer(false);
        assert_eq!(answer.as_ref().map(|answer| answer.status), Some(200), "{sent:?}: {answer:?}");
        let seen = recorder.take();
        assert!(seen.violations.is_empty(), "{sent:?}: {:?}", seen.violations);
        assert_eq!(seen.requests.len(), 1, "{sent:?}");
        check(&seen.requests[0], proved, &sent);
        count += 1;
    }
    count
}

#[test]
fn claims_are_removed_where_nothing_is_proved() {
    for ours in [json!({}), json!({"underscores": "allow"})] {
        let mut front = Front::start(&[], &json!({}), &ours);
        assert_eq!(run(front.sidecar.port, &front.recorder, &[]), 450);
        front.assert_healthy();
    }
}

#[test]
fn claims_are_replaced_by_what_is_proved() {
    let recorder = Recorder::start();
    let mut pair = SidecarPair::start(&PairConfig::http1(recorder.port));
    drop(recorder.take());
    assert_eq!(run(pair.caller.port, &recorder, &PROVED), 450);
    pair.assert_healthy();
}

/// A client with a certificate needs no sidecar to speak for it.
#[test]
fn a_proof_is_not_removed_by_whom_it_is_about() {
    let recorder = Recorder::start();
    let pair = SidecarPair::start(&PairConfig::http1(recorder.port));
    drop(recorder.take());
    let client = pair.pki.path("client");
    let (certificate, key) = (client.with_extension("pem"), client.with_extension("key"));
    let url = format!("https://127.0.0.1:{}/", pair.callee.port);
    let proof = ["--insecure", "--http1.1", "--cert", text(&certificate), "--key", text(&key)];
    for name in PROVED.iter().flat_map(|name| spellings(name)) {
        let (listed, claim) = (format!("connection: {name}"), format!("{name}: {FORGED}"));
        let fields = ["--header", "x-harmless: y", "--header", &listed, "--header", &claim];
        let answer = Curl::to(url.clone()).with(&proof).with(&fields).run();
        assert_eq!(answer.status, 200, "{name}: {answer:?}");
        let seen = recorder.take();
        assert!(seen.violations.is_empty(), "{name}: {:?}", seen.violations);
        check(&seen.requests[0], &PROVED, &name);
        assert_eq!(seen.requests[0].header("x-weft-peer"), Some(&*spiffe_id("client")));
    }
}
