//! Why TLS with an endpoint did not come about: the same word in the access line and in a metric, whatever is
//! carried. The endpoints are openssl's, or say what no server of TLS says.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at what it did not expect"
)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use socket2::SockRef;
use weft_integration::authority::TestAuthority;
use weft_integration::bootstrap::{
    any, bootstrap, cluster, mutual_tls, tcp_listener, verify_mode, with,
};
use weft_integration::curl::Curl;
use weft_integration::http2;
use weft_integration::mesh_pki::{IdentityFiles, MeshPki, PythonPki, spiffe_id, text};
use weft_integration::port;
use weft_integration::process::Process;
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::sidecar_pair::TestSidecar;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// An `openssl s_server` that shows a certificate.
fn s_server(identity: &IdentityFiles, arguments: &[&str]) -> (Process, u16) {
    let port = port::free();
    let mut command = Command::new("openssl");
    command.args(["s_server", "-quiet", "-accept", &port.to_string()]).args(arguments);
    command.args(["-cert_chain", text(&identity.certificate)]);
    command.args(["-cert", text(&identity.certificate), "-key", text(&identity.key)]);
    let process = Process::start("s_server", &mut command);
    eventually("openssl listens", || TcpStream::connect(("127.0.0.1", port)).ok());
    (process, port)
}

/// A server that reads what comes first, and does this.
fn server(act: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> u16 {
    let backend = ScriptedServer::start(move |mut stream| {
        let mut first = [0; 4096];
        if stream.read(&mut first).is_ok_and(|count| count > 0) {
            act(&mut stream);
        }
    });
    backend.port
}

/// A socket whose endpoint must chain to `roots`; without lists and names where none are given.
fn socket(roots: &str, validation: &Value, parameters: &Value) -> Value {
    let validation = with(validation.clone(), "trusted_ca", json!({"filename": roots}));
    let common = json!({"validation_context": validation, "tls_params": parameters});
    let message = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
    json!({"name": "tls", "typed_config": any(message, json!({"common_tls_context": common}))})
}

/// One endpoint that cannot be had: the word for it, its port, and the socket to it.
struct Case {
    word: &'static str,
    status: u16,
    port: u16,
    socket: Value,
}

impl Case {
    fn cluster(&self, speaks: UpstreamHttp) -> Value {
        with(
            cluster(self.word, &[self.port], speaks, Some(self.socket.clone())),
            "connect_timeout",
            json!("1s"),
        )
    }
}

/// The endpoints, and what keeps them running. `others` is an authority that signed none of them.
fn cases(hands: &PythonPki, others: &MeshPki) -> (Vec<Case>, Vec<Process>) {
    let mut cases = Vec::new();
    let mut processes = Vec::new();
    let root = hands.root();
    let any_name = json!({"match_typed_subject_alt_names":
        [{"san_type": "URI", "matcher": {"prefix": "spiffe://"}}]});
    let other_name = json!({"match_typed_subject_alt_names":
        [{"san_type": "URI", "matcher": {"exact": spiffe_id("nobody")}}]});
    let listed = with(any_name.clone(), "crl", json!({"filename": text(&hands.crl_file())}));
    let foreign = text(&others.root()).to_owned();
    let plain = json!({});
    let newer = json!({"tls_minimum_protocol_version": "TLSv1_3"});
    let rsa = json!({"tls_maximum_protocol_version": "TLSv1_2",
        "cipher_suites": ["ECDHE-RSA-AES128-GCM-SHA256"]});
    let good = hands.identity("good");
    let mut add = |word, identity: &IdentityFiles, arguments: &[&str], socket| {
        let (process, port) = s_server(identity, arguments);
        processes.push(process);
        cases.push(Case { word, status: 503, port, socket });
    };
    let root = text(&root);
    add("unknown_issuer", &good, &[], socket(&foreign, &any_name, &plain));
    add("wrong_name", &good, &[], socket(root, &other_name, &plain));
    let expired = hands.identity("expired");
    add("certificate_expired", &expired, &[], socket(root, &any_name, &plain));
    let revoked = hands.identity("revoked");
    add("certificate_revoked", &revoked, &["-tls1_2"], socket(root, &listed, &plain));
    add("alert_protocol_version", &good, &["-tls1_2"], socket(root, &any_name, &newer));
    add("alert_handshake_failure", &good, &["-tls1_2"], socket(root, &any_name, &rsa));
    let mut add = |word, status, port| {
        cases.push(Case { word, status, port, socket: socket(root, &any_name, &plain) });
    };
    add("not_tls", 503, server(|stream| drop(stream.write_all(b"220 mail.test ESMTP\r\n"))));
    add("closed_in_handshake", 503, server(|_| {}));
    let reset = |stream: &mut TcpStream| {
        SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).unwrap();
    };
    add("reset_in_handshake", 503, server(reset));
    add("handshake_timeout", 504, ScriptedServer::silent().port);
    // A ServerHello of TLS 1.1, as from a server that does not look at what is offered.
    let old: &[u8] =
        &[&[22, 3, 2, 0, 42, 2, 0, 0, 38, 3, 2][..], &[7; 32], &[0, 0xc0, 9, 0]].concat();
    let old = old.to_vec();
    add("protocol_version", 503, server(move |stream| drop(stream.write_all(&old))));
    (cases, processes)
}

fn failures(alone: &SingleSidecar, word: &str) -> u64 {
    alone
        .metric(&format!("weft_sidecar_upstream_tls_handshake_failures_total{{reason=\"{word}\"}}"))
}

fn start(cases: &[Case], speaks: UpstreamHttp) -> SingleSidecar {
    let mut wanted = SingleSidecarConfig::for_upstream(1, speaks);
    wanted.clusters = cases.iter().map(|case| case.cluster(speaks)).collect();
    let route = |case: &Case| {
        json!({"match": {"prefix": format!("/{}", case.word)},
            "route": {"cluster": case.word, "timeout": "15s"}})
    };
    wanted.http["route_config"]["virtual_hosts"][0]["routes"] =
        cases.iter().map(route).collect::<Value>();
    wanted.start()
}

#[test]
fn reason_of_a_failed_handshake_is_in_the_access_line_and_in_the_metric() {
    const UPGRADE: [&str; 8] = [
        "--header",
        "connection: upgrade",
        "--header",
        "upgrade: websocket",
        "--header",
        "sec-websocket-version: 13",
        "--header",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
    ];
    let hands = PythonPki::create();
    let others = MeshPki::create();
    let (cases, _processes) = cases(&hands, &others);
    for (speaks, arguments) in [
        (UpstreamHttp::Http1, &[][..]),
        (UpstreamHttp::Http1, &UPGRADE[..]),
        (UpstreamHttp::Http2, &[][..]),
    ] {
        let alone = start(&cases, speaks);
        for Case { word, status, .. } in &cases {
            let before = failures(&alone, word);
            let answer = Curl::get(alone.port, &format!("/{word}")).with(arguments).run();
            assert_eq!(answer.status, *status, "{word}");
            assert!(!answer.text().contains(word), "clients learn nothing of endpoints");
            let line = alone.access_line(&format!("\"path\":\"/{word}\""));
            assert_eq!(line["detail"], *word, "{line}");
            assert!(failures(&alone, word) > before, "{word}");
        }
    }
}

/// In TLS 1.3 a server refuses a client's certificate after the client's handshake.
#[test]
fn alert_after_the_handshake_is_in_the_access_line_and_in_the_metric() {
    let signer = TestAuthority::create();
    let good = signer.write_files("server", &signer.sign("server", DAY));
    let foreign = MeshPki::create();
    let own = foreign.issue("client");
    let root = signer.root();
    let asking = |version: &'static str| {
        let verify = ["-Verify", "1", "-verify_return_error", "-CAfile", text(&root)];
        s_server(&good, &[&verify[..], &[version, "-alpn", "h2,http/1.1"]].concat())
    };
    let nameless = |port| {
        let any_name = json!({"match_typed_subject_alt_names":
            [{"san_type": "URI", "matcher": {"exact": spiffe_id("server")}}]});
        let socket = socket(text(&root), &any_name, &json!({}));
        Case { word: "alert_certificate_required", status: 502, port, socket }
    };
    let (_newer, newer) = asking("-tls1_3");
    let (_older, older) = asking("-tls1_2");
    let unknown = Case {
        word: "alert_unknown_ca",
        status: 502,
        port: newer,
        socket: mutual_tls(&own, &root, "server"),
    };
    let in_handshake = Case { word: "alert_handshake_failure", status: 503, ..nameless(older) };
    let cases = [nameless(newer), unknown, in_handshake];
    for speaks in [UpstreamHttp::Http1, UpstreamHttp::Http2] {
        let alone = start(&cases, speaks);
        for Case { word, status, .. } in &cases {
            let answer = Curl::get(alone.port, &format!("/{word}")).run();
            assert_eq!(answer.status, *status, "{word}");
            let line = alone.access_line(&format!("\"path\":\"/{word}\""));
            assert_eq!(line["detail"], *word, "{line}");
            eventually(word, || (failures(&alone, word) >= 1).then_some(()));
        }
        let answer = http2::ask_one(alone.port, http2::request("POST", "/alert_unknown_ca", &[]));
        assert_eq!(answer.status(), 502);
        let line = alone.access_line("\"method\":\"POST\"");
        assert_eq!(line["detail"], "alert_unknown_ca", "{line}");
    }
}

#[test]
fn reason_of_a_failed_handshake_is_in_the_line_of_a_tcp_connection() {
    let hands = PythonPki::create();
    let others = MeshPki::create();
    let (mut cases, mut processes) = cases(&hands, &others);
    let (process, asking) =
        s_server(&hands.identity("good"), &["-Verify", "1", "-verify_return_error", "-tls1_3"]);
    processes.push(process);
    let last = cases.last().unwrap();
    let required = Case {
        word: "alert_certificate_required",
        status: 0,
        port: asking,
        socket: last.socket.clone(),
    };
    cases.push(required);
    let pki = MeshPki::create();
    let admin = port::free();
    let log = json!([{"name": "stdout", "typed_config":
        any("envoy.extensions.access_loggers.stream.v3.StdoutAccessLog", json!({}))}]);
    let ports: Vec<u16> = cases.iter().map(|_| port::free()).collect();
    let listeners: Vec<Value> = cases
        .iter()
        .zip(&ports)
        .map(|(case, port)| {
            let proxy = json!({"cluster": case.word, "access_log": log});
            tcp_listener(case.word, ([127, 0, 0, 1], *port).into(), proxy)
        })
        .collect();
    let clusters: Vec<Value> = cases.iter().map(|case| case.cluster(UpstreamHttp::Http1)).collect();
    let config = bootstrap(admin, &listeners, &clusters);
    let sidecar = TestSidecar::start("sidecar", &pki, ports[0], admin, &config);
    for (Case { word, port, .. }, at) in cases.iter().zip(&ports) {
        let mut client = TcpStream::connect(("127.0.0.1", *at)).unwrap();
        // The connection may be reset before the bytes are taken.
        drop(client.write_all(b"hello"));
        let ended = client.read(&mut [0; 64]);
        assert!(!ended.is_ok_and(|count| count > 0), "{word}");
        let line = sidecar.process.line_with(&format!("\"service\":\"{word}\""));
        let line: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["kind"], "tcp", "{line}");
        assert_eq!((&line["detail"], &line["outcome"]), (&json!(word), &json!("denied")), "{line}");
        assert_eq!(line["endpoint"], format!("127.0.0.1:{port}"), "{line}");
        let name =
            format!("weft_sidecar_upstream_tls_handshake_failures_total{{reason=\"{word}\"}}");
        eventually(word, || (sidecar.metric(&name) >= 1).then_some(()));
    }
}

#[test]
fn tcp_connection_that_is_carried_leaves_a_line_with_its_bytes() {
    let hands = PythonPki::create();
    let echo = ScriptedServer::start(|mut stream| {
        let mut read = stream.try_clone().unwrap();
        drop(std::io::copy(&mut read, &mut stream));
        drop(stream.shutdown(std::net::Shutdown::Write));
    });
    let pki = MeshPki::create();
    let admin = port::free();
    let at = port::free();
    let log = json!([{"name": "stdout", "typed_config":
        any("envoy.extensions.access_loggers.stream.v3.StdoutAccessLog", json!({}))}]);
    let proxy = json!({"cluster": "echo", "access_log": log});
    let mut listener = tcp_listener("tcp", ([127, 0, 0, 1], at).into(), proxy);
    let mut tls = verify_mode(&hands.identity("good"), &hands.root(), &hands.crl_file());
    tls["typed_config"]["require_client_certificate"] = json!(false);
    listener["filter_chains"][0]["transport_socket"] = tls;
    let config =
        bootstrap(admin, &[listener], &[cluster("echo", &[echo.port], UpstreamHttp::Http1, None)]);
    let sidecar = TestSidecar::start("sidecar", &pki, at, admin, &config);
    let mut command = Command::new("sh");
    command.args([
        "-c",
        &format!(
            "(echo hello; sleep 1) | openssl s_client -quiet -no_ign_eof -connect 127.0.0.1:{at} 2>/dev/null"
        ),
    ]);
    let output = command.output().unwrap();
    assert_eq!(output.stdout, b"hello\n");
    let line = sidecar.process.line_with("\"service\":\"echo\"");
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&line["bytes_sent"], &line["bytes_received"]), (&json!(6), &json!(6)), "{line}");
    assert!(line["conn_trace_id"].is_string(), "{line}");
}
