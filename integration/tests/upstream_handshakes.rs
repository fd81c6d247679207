//! Failed TLS handshakes with endpoints: the access log and a metric have the same reason, for
//! every kind of traffic. The endpoints are openssl servers, or servers that do not speak TLS.

#![expect(clippy::unwrap_used, reason = "a test may panic on unexpected values")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use socket2::SockRef;
use weft_integration::authority::TestAuthority;
use weft_integration::bootstrap::{any, bootstrap, cluster, tcp_listener, tcp_tls_listener, with};
use weft_integration::curl::Curl;
use weft_integration::http2;
use weft_integration::mesh_pki::{IdentityFiles, MeshPki, PythonPki, spiffe_id, text};
use weft_integration::port;
use weft_integration::process::Process;
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::sidecar_pair::TestSidecar;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::tls_contexts::{TestTls, mutual_tls};
use weft_integration::wait::eventually;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// An `openssl s_server` with this certificate.
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

/// A server that reads the first bytes, then runs `act`.
fn server(act: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> u16 {
    let server = ScriptedServer::start(move |mut stream| {
        let mut first = [0; 4096];
        if stream.read(&mut first).is_ok_and(|count| count > 0) {
            act(&mut stream);
        }
    });
    server.port
}

/// A transport socket whose endpoint must chain to `roots`, with these further checks and
/// `tls_params`.
fn socket(roots: &str, validation: &Value, parameters: &Value) -> Value {
    let validation = with(validation.clone(), "trusted_ca", json!({"filename": roots}));
    let common = json!({"validation_context": validation, "tls_params": parameters});
    let message = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
    json!({"name": "tls", "typed_config": any(message, json!({"common_tls_context": common}))})
}

/// An endpoint with a failing handshake: the expected reason, its port, and the transport socket to
/// it.
struct HandshakeCase {
    reason: &'static str,
    status: u16,
    port: u16,
    socket: Value,
}

impl HandshakeCase {
    fn cluster(&self, speaks: UpstreamHttp) -> Value {
        with(
            cluster(self.reason, &[self.port], speaks, Some(self.socket.clone())),
            "connect_timeout",
            json!("1s"),
        )
    }
}

/// The endpoints, and their processes. `others` is an authority that signed none of these
/// certificates.
fn cases(python_pki: &PythonPki, others: &MeshPki) -> (Vec<HandshakeCase>, Vec<Process>) {
    let mut cases = Vec::new();
    let mut processes = Vec::new();
    let root = python_pki.root();
    let any_name = json!({"match_typed_subject_alt_names":
        [{"san_type": "URI", "matcher": {"prefix": "spiffe://"}}]});
    let other_name = json!({"match_typed_subject_alt_names":
        [{"san_type": "URI", "matcher": {"exact": spiffe_id("unknown")}}]});
    let listed = with(any_name.clone(), "crl", json!({"filename": text(&python_pki.crl_file())}));
    let foreign = text(&others.root()).to_owned();
    let plain = json!({});
    let newer = json!({"tls_minimum_protocol_version": "TLSv1_3"});
    let rsa = json!({"tls_maximum_protocol_version": "TLSv1_2",
        "cipher_suites": ["ECDHE-RSA-AES128-GCM-SHA256"]});
    let good = python_pki.identity("good");
    let mut add = |reason, identity: &IdentityFiles, arguments: &[&str], socket| {
        let (process, port) = s_server(identity, arguments);
        processes.push(process);
        cases.push(HandshakeCase { reason, status: 503, port, socket });
    };
    let root = text(&root);
    add("unknown_issuer", &good, &[], socket(&foreign, &any_name, &plain));
    add("wrong_name", &good, &[], socket(root, &other_name, &plain));
    let expired = python_pki.identity("expired");
    add("certificate_expired", &expired, &[], socket(root, &any_name, &plain));
    let revoked = python_pki.identity("revoked");
    add("certificate_revoked", &revoked, &["-tls1_2"], socket(root, &listed, &plain));
    add("alert_protocol_version", &good, &["-tls1_2"], socket(root, &any_name, &newer));
    add("alert_handshake_failure", &good, &["-tls1_2"], socket(root, &any_name, &rsa));
    let mut add = |reason, status, port| {
        cases.push(HandshakeCase { reason, status, port, socket: socket(root, &any_name, &plain) });
    };
    add("not_tls", 503, server(|stream| drop(stream.write_all(b"220 mail.test ESMTP\r\n"))));
    add("closed_in_handshake", 503, server(|_| {}));
    let reset = |stream: &mut TcpStream| {
        SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).unwrap();
    };
    add("reset_in_handshake", 503, server(reset));
    add("handshake_timeout", 504, ScriptedServer::silent().port);
    // A ServerHello of TLS 1.1, as from a server that ignores the offered versions.
    let old: &[u8] =
        &[&[22, 3, 2, 0, 42, 2, 0, 0, 38, 3, 2][..], &[7; 32], &[0, 0xc0, 9, 0]].concat();
    let old = old.to_vec();
    add("protocol_version", 503, server(move |stream| drop(stream.write_all(&old))));
    (cases, processes)
}

fn failures(sidecar: &SingleSidecar, reason: &str) -> u64 {
    sidecar.metric(&format!(
        "weft_sidecar_upstream_tls_handshake_failures_total{{reason=\"{reason}\"}}"
    ))
}

fn start(cases: &[HandshakeCase], speaks: UpstreamHttp) -> SingleSidecar {
    let mut wanted = SingleSidecarConfig::for_upstream(1, speaks);
    wanted.clusters = cases.iter().map(|case| case.cluster(speaks)).collect();
    let route = |case: &HandshakeCase| {
        json!({"match": {"prefix": format!("/{}", case.reason)},
            "route": {"cluster": case.reason, "timeout": "15s"}})
    };
    wanted.routes = cases.iter().map(route).collect();
    wanted.start()
}

#[test]
fn handshake_failure_reason_is_in_the_access_log_and_the_metric() {
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
    let python_pki = PythonPki::create();
    let others = MeshPki::create();
    let (cases, _processes) = cases(&python_pki, &others);
    for (speaks, arguments) in [
        (UpstreamHttp::Http1, &[][..]),
        (UpstreamHttp::Http1, &UPGRADE[..]),
        (UpstreamHttp::Http2, &[][..]),
    ] {
        let sidecar = start(&cases, speaks);
        for HandshakeCase { reason, status, .. } in &cases {
            let before = failures(&sidecar, reason);
            let answer = Curl::get(sidecar.port, &format!("/{reason}")).with(arguments).run();
            assert_eq!(answer.status, *status, "{reason}");
            assert!(
                !answer.text().contains(reason),
                "the response contains no details of endpoints"
            );
            let line = sidecar.access_line(&format!("\"path\":\"/{reason}\""));
            assert_eq!(line["upstream_failure_reason"], *reason, "{line}");
            assert!(failures(&sidecar, reason) > before, "{reason}");
        }
    }
}

/// In TLS 1.3, a server rejects a client's certificate after the client has finished its handshake.
#[test]
fn alert_after_the_handshake_is_in_the_access_log_and_the_metric() {
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
        HandshakeCase { reason: "alert_certificate_required", status: 502, port, socket }
    };
    let (_newer, newer) = asking("-tls1_3");
    let (_older, older) = asking("-tls1_2");
    let unknown = HandshakeCase {
        reason: "alert_unknown_ca",
        status: 502,
        port: newer,
        socket: mutual_tls(&own, &root, "server"),
    };
    let in_handshake =
        HandshakeCase { reason: "alert_handshake_failure", status: 503, ..nameless(older) };
    let cases = [nameless(newer), unknown, in_handshake];
    for speaks in [UpstreamHttp::Http1, UpstreamHttp::Http2] {
        let sidecar = start(&cases, speaks);
        for HandshakeCase { reason, status, .. } in &cases {
            let answer = Curl::get(sidecar.port, &format!("/{reason}")).run();
            assert_eq!(answer.status, *status, "{reason}");
            let line = sidecar.access_line(&format!("\"path\":\"/{reason}\""));
            assert_eq!(line["upstream_failure_reason"], *reason, "{line}");
            eventually(reason, || (failures(&sidecar, reason) >= 1).then_some(()));
        }
        let answer = http2::ask_one(sidecar.port, http2::request("POST", "/alert_unknown_ca", &[]));
        assert_eq!(answer.status(), 502);
        let line = sidecar.access_line("\"method\":\"POST\"");
        assert_eq!(line["upstream_failure_reason"], "alert_unknown_ca", "{line}");
    }
}

#[test]
fn handshake_failure_reason_is_in_the_access_log_of_a_tcp_connection() {
    let python_pki = PythonPki::create();
    let others = MeshPki::create();
    let (mut cases, mut processes) = cases(&python_pki, &others);
    let (process, asking) = s_server(
        &python_pki.identity("good"),
        &["-Verify", "1", "-verify_return_error", "-tls1_3"],
    );
    processes.push(process);
    let last = cases.last().unwrap();
    let required = HandshakeCase {
        reason: "alert_certificate_required",
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
            let proxy = json!({"cluster": case.reason, "access_log": log});
            tcp_listener(case.reason, ([127, 0, 0, 1], *port).into(), proxy)
        })
        .collect();
    let clusters: Vec<Value> = cases.iter().map(|case| case.cluster(UpstreamHttp::Http1)).collect();
    let config = bootstrap(admin, &listeners, &clusters);
    let sidecar = TestSidecar::start("sidecar", &pki, ports[0], admin, &config);
    for (HandshakeCase { reason, port, .. }, at) in cases.iter().zip(&ports) {
        let mut client = TcpStream::connect(("127.0.0.1", *at)).unwrap();
        // The connection may be reset before the bytes are read.
        drop(client.write_all(b"hello"));
        let ended = client.read(&mut [0; 64]);
        assert!(!ended.is_ok_and(|count| count > 0), "{reason}");
        let line = sidecar.process.line_with(&format!("\"service\":\"{reason}\""));
        let line: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["kind"], "tcp", "{line}");
        assert_eq!(
            (&line["upstream_failure_reason"], &line["response_flags"]),
            (&json!(reason), &json!("UF")),
            "{line}"
        );
        assert_eq!(line["upstream_host"], format!("127.0.0.1:{port}"), "{line}");
        let name =
            format!("weft_sidecar_upstream_tls_handshake_failures_total{{reason=\"{reason}\"}}");
        eventually(reason, || (sidecar.metric(&name) >= 1).then_some(()));
    }
}

#[test]
fn proxied_tcp_connection_is_logged_with_its_byte_counts() {
    let python_pki = PythonPki::create();
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
    let tls = TestTls::listener(&python_pki.identity("good"), &python_pki.root())
        .crls(&python_pki.crl_file())
        .requires_certificate(false);
    let listener = tcp_tls_listener("tcp", ([127, 0, 0, 1], at).into(), proxy, Some(tls.socket()));
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
    let fields = ["connection_termination_details", "protocol", "downstream_tls_version"];
    assert_eq!(fields.map(|field| &line[field]), ["closed", "TCP", "TLSv1.3"], "{line}");
}

/// A network filter whose only policy, `decides`, matches every connection.
fn connection_policy(action: &str) -> Value {
    let policy = json!({"permissions": [{"any": true}], "principals": [{"any": true}]});
    let rules = json!({"action": action, "policies": {"decides": policy}});
    let config = json!({"stat_prefix": "rbac", "rules": rules});
    json!({"name": "rbac", "typed_config":
        any("envoy.extensions.filters.network.rbac.v3.RBAC", config)})
}

#[test]
fn tcp_connection_is_logged_with_the_policy_that_allows_or_denies_it() {
    let echo = ScriptedServer::start(|mut stream| {
        let mut read = stream.try_clone().unwrap();
        drop(std::io::copy(&mut read, &mut stream));
    });
    let log = json!([{"name": "stdout", "typed_config":
        any("envoy.extensions.access_loggers.stream.v3.StdoutAccessLog", json!({}))}]);
    let ports = [port::free(), port::free()];
    let listeners = [("ALLOW", ports[0]), ("DENY", ports[1])].map(|(action, port)| {
        let proxy = json!({"cluster": "echo", "access_log": log});
        let mut listener = tcp_listener(action, ([127, 0, 0, 1], port).into(), proxy);
        let filters = listener["filter_chains"][0]["filters"].as_array_mut().unwrap();
        filters.insert(0, connection_policy(action));
        listener
    });
    let admin = port::free();
    let clusters = [cluster("echo", &[echo.port], UpstreamHttp::Http1, None)];
    let config = bootstrap(admin, &listeners, &clusters);
    let sidecar = TestSidecar::start("sidecar", &MeshPki::create(), ports[0], admin, &config);
    let line_of = |port: u16, sent: &[u8]| -> Value {
        let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        drop(client.write_all(sent));
        drop(client.shutdown(std::net::Shutdown::Write));
        drop(client.read_to_end(&mut Vec::new()));
        let local = client.local_addr().unwrap();
        let line = sidecar.process.line_with(&format!("\"{local}\""));
        serde_json::from_str(&line).unwrap()
    };
    let fields = ["kind", "response_flags", "connection_termination_details", "matched_policy"];
    let allowed = line_of(ports[0], b"hello");
    let expected = [json!("tcp"), Value::Null, json!("closed"), json!("decides")];
    assert_eq!(fields.map(|field| allowed[field].clone()), expected, "{allowed}");
    let denied = line_of(ports[1], b"hello");
    assert_eq!(
        fields.map(|field| &denied[field]),
        ["tcp", "UAEX", "rbac_access_denied", "decides"],
        "{denied}"
    );
}
