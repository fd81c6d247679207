//! What a service learns about the client and the requested host: `x-forwarded-for`, `-proto`, `-port` and `host`.

use serde_json::{Value, json};
use weft_integration::bootstrap::{address, with};
use weft_integration::http1::{self, Http1Client};
use weft_integration::http2::{self, request};
use weft_integration::mesh_pki::{MeshPki, text};
use weft_integration::port;
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::tls_contexts::verify_mode;

fn config() -> SingleSidecarConfig {
    SingleSidecarConfig::for_upstream(ScriptedServer::echoing_heads().port, UpstreamHttp::Http1)
}

/// Handling of the addresses in a request's `x-forwarded-for`.
#[derive(Debug, Clone, Copy)]
enum Mode {
    Append,
    Preserve,
    Remove,
}

fn with_mode(mode: Mode, client_port: bool) -> SingleSidecarConfig {
    let config = config().with_weft_metadata("forwarded_client_port", json!(client_port));
    match mode {
        Mode::Append => config.with("use_remote_address", json!(true)),
        Mode::Preserve => {
            let edge = config.with("use_remote_address", json!(true));
            edge.with("skip_xff_append", json!(true))
        }
        Mode::Remove => config.with_weft_metadata("forwarded_for", json!("remove")),
    }
}

/// The values of a header in a received header section, in order.
fn values(head: &str, name: &str) -> Vec<String> {
    let named = |line: &str| {
        let (key, value) = line.split_once(": ")?;
        key.eq_ignore_ascii_case(name).then(|| value.to_owned())
    };
    head.lines().filter_map(named).collect()
}

/// The `x-forwarded-for` values that the service receives for a request with these. Asserts that HTTP/1.1 and HTTP/2
/// agree.
fn received_forwarded_for(sidecar: &SingleSidecar, sent: &[&str]) -> Vec<String> {
    let headers: String = sent.iter().map(|v| format!("X-Forwarded-For: {v}\r\n")).collect();
    let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{headers}\r\n");
    let by_http1 = values(&http1::ask(sidecar.port, &request).body, "x-forwarded-for");
    let headers: Vec<_> = sent.iter().map(|value| ("x-forwarded-for", *value)).collect();
    let answer = http2::ask_one(sidecar.port, self::request("GET", "/", &headers));
    assert_eq!(values(answer.body(), "x-forwarded-for"), by_http1, "HTTP/2 and HTTP/1.1: {sent:?}");
    by_http1
}

#[test]
fn forwarded_for_is_appended_preserved_or_removed_by_mode() {
    const NONE: &[&str] = &[];
    const ONE: &[&str] = &["10.0.0.1"];
    const MANY: &[&str] = &["10.0.0.1, 2001:db8::1", "10.0.0.2"];
    let check = |sidecar: &SingleSidecar, mode: Mode, sent: &[&str], expected: &[&str]| {
        assert_eq!(received_forwarded_for(sidecar, sent), expected, "{mode:?} {sent:?}");
    };
    let append = with_mode(Mode::Append, false).start();
    check(&append, Mode::Append, NONE, &["127.0.0.1"]);
    check(&append, Mode::Append, ONE, &["10.0.0.1, 127.0.0.1"]);
    check(&append, Mode::Append, MANY, &["10.0.0.1, 2001:db8::1, 10.0.0.2, 127.0.0.1"]);
    // The client port applies only to an address that the sidecar adds.
    for client_port in [false, true] {
        let preserve = with_mode(Mode::Preserve, client_port).start();
        check(&preserve, Mode::Preserve, NONE, &[]);
        check(&preserve, Mode::Preserve, ONE, ONE);
        check(&preserve, Mode::Preserve, MANY, MANY);
        let remove = with_mode(Mode::Remove, client_port).start();
        check(&remove, Mode::Remove, NONE, &[]);
        check(&remove, Mode::Remove, ONE, &[]);
        check(&remove, Mode::Remove, MANY, &[]);
    }
}

#[test]
fn skip_xff_append_adds_no_address() {
    let sidecar = with_mode(Mode::Append, false).with("skip_xff_append", json!(true)).start();
    assert_eq!(received_forwarded_for(&sidecar, &["10.0.0.1"]), ["10.0.0.1"]);
    assert_eq!(received_forwarded_for(&sidecar, &[]), Vec::<String>::new());
}

/// Starts a sidecar with a second listener at this IP address. Returns the listener's address.
fn start_at(config: SingleSidecarConfig, ip: &str) -> (SingleSidecar, std::net::SocketAddr) {
    let at = std::net::SocketAddr::new(ip.parse().expect("an IP address"), port::free());
    let sidecar = config
        .start_with_second_listener(&json!({"name": "another", "address": address(at, "TCP")}));
    (sidecar, at)
}

#[test]
fn client_port_is_added_to_forwarded_for_where_configured() {
    for (ip, bare) in [("127.0.0.1", "127.0.0.1"), ("::1", "::1")] {
        for client_port in [false, true] {
            let (_sidecar, at) = start_at(with_mode(Mode::Append, client_port), ip);
            let mut client = Http1Client::connect_to(at);
            let own = client.local_address();
            let answer = client
                .ask("GET / HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 10.0.0.1:80, [::2]:81\r\n\r\n");
            // An IPv6 address with a port has brackets.
            let added = if client_port { own.to_string() } else { bare.to_owned() };
            let expected = [format!("10.0.0.1:80, [::2]:81, {added}")];
            assert_eq!(values(&answer.body, "x-forwarded-for"), expected, "{ip} {client_port}");
        }
    }
}

#[test]
fn forwarded_for_with_more_than_30_addresses_is_refused() {
    let status = |sidecar: &SingleSidecar, values: &[String]| {
        let headers: String = values.iter().map(|v| format!("x-forwarded-for: {v}\r\n")).collect();
        let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{headers}\r\n");
        http1::ask(sidecar.port, &request).status
    };
    let list = |count: usize| vec!["10.0.0.1"; count].join(",");
    for (mode, above) in [(Mode::Append, 463), (Mode::Preserve, 463), (Mode::Remove, 200)] {
        let sidecar = with_mode(mode, false).start();
        assert_eq!(status(&sidecar, &[list(29)]), 200, "{mode:?}");
        assert_eq!(status(&sidecar, &[list(30)]), 200, "{mode:?}");
        assert_eq!(status(&sidecar, &[list(31)]), above, "{mode:?}");
        // All values count together; empty list elements do not count (RFC 9110, section 5.6.1).
        assert_eq!(status(&sidecar, &[list(15), list(16)]), above, "{mode:?}");
        assert_eq!(status(&sidecar, &[list(15), ",,".into(), list(15)]), 200, "{mode:?}");
        assert_eq!(status(&sidecar, &vec!["::1".to_owned(); 31]), above, "{mode:?}");
    }
}

/// The values of `x-forwarded-proto` and `x-forwarded-port` that the service receives when the client sends others.
fn received_scheme_and_port(
    sidecar: &SingleSidecar,
    client_tls: Option<Value>,
) -> [Vec<String>; 2] {
    let claims = [("x-forwarded-proto", "gopher"), ("x-forwarded-port", "1")];
    let mut claiming = request("GET", "/", &claims);
    if let Some(tls) = client_tls {
        claiming = with(claiming, "tls", tls);
    }
    let answer = http2::ask_one(sidecar.port, claiming);
    assert_eq!(answer.status(), 200, "{answer:?}");
    ["x-forwarded-proto", "x-forwarded-port"].map(|name| values(answer.body(), name))
}

#[test]
fn forwarded_proto_and_port_are_those_of_the_listener() {
    let sidecar = with_mode(Mode::Append, false).start();
    let received = received_scheme_and_port(&sidecar, None);
    assert_eq!(received, [vec!["http".to_owned()], vec![sidecar.port.to_string()]]);

    let pki = MeshPki::create();
    let server = pki.issue("server");
    let client = pki.issue("client");
    let tls = json!([text(&pki.root()), text(&client.certificate), text(&client.key)]);
    let verify = verify_mode(&server, &pki.root(), &pki.crl_file());
    let config = SingleSidecarConfig { tls: Some(verify), ..with_mode(Mode::Append, false) };
    let sidecar = config.start_with_pki(pki);
    let received = received_scheme_and_port(&sidecar, Some(tls));
    assert_eq!(received, [vec!["https".to_owned()], vec![sidecar.port.to_string()]]);
}

/// The mode applies to addresses only: the sidecar sets scheme and port in every mode.
#[test]
fn forwarded_proto_and_port_are_those_of_the_listener_in_every_mode() {
    for mode in [Mode::Preserve, Mode::Remove] {
        let sidecar = with_mode(mode, false).start();
        let received = received_scheme_and_port(&sidecar, None);
        assert_eq!(received, [vec!["http".to_owned()], vec![sidecar.port.to_string()]], "{mode:?}");
    }
}

/// Configures the handling of the port in `host`.
fn with_port_rule(config: SingleSidecarConfig, rule: &str) -> SingleSidecarConfig {
    match rule {
        "keep" => config,
        "canonical" => config.with_weft_metadata("host_port", json!("canonical")),
        field => config.with(field, json!(true)),
    }
}

/// Asserts which host the service receives for a requested host, over HTTP/1.1 (header and target) and HTTP/2.
#[track_caller]
fn assert_host(at: std::net::SocketAddr, rule: &str, host: &str, expected: &str) {
    let ask = |request: &str| {
        let answer = Http1Client::connect_to(at).ask(request);
        assert_eq!(answer.status, 200, "{rule} {host} at {at}: {answer:?}");
        values(&answer.body, "host")
    };
    let received = ask(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    assert_eq!(received, [expected], "{rule} {host} at {at}");
    // The host in an absolute-form target takes precedence.
    let received = ask(&format!("GET http://{host}/ HTTP/1.1\r\nHost: another:1\r\n\r\n"));
    assert_eq!(received, [expected], "{rule} {host} in the target at {at}");
    let by_http2 = http2::to_host(request("GET", "/", &[]), host);
    let answer = http2::ask_one(at.port(), by_http2);
    assert_eq!(values(answer.body(), "host"), [expected], "{rule} {host} at {at} over HTTP/2");
}

/// Asserts the received host for each pair of requested and expected host, with a sidecar that has this port rule.
#[track_caller]
fn assert_hosts(rule: &str, port: u16, cases: &[(&str, &str)]) {
    let at = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let other = json!({"name": "another", "address": address(at, "TCP")});
    let _sidecar = with_port_rule(config(), rule).start_with_second_listener(&other);
    for (host, expected) in cases {
        assert_host(at, rule, host, expected);
    }
}

#[test]
fn host_port_is_kept_stripped_or_added_by_rule() {
    assert_hosts("keep", 80, &[("a.example:80", "a.example:80"), ("a.example", "a.example")]);
    // As AWS load balancers do: on ports 80 and 443 any port is removed, on others a missing port is added.
    let without = [
        ("a.example", "a.example"),
        ("a.example:80", "a.example"),
        ("a.example:8443", "a.example"),
        ("[::1]:8443", "[::1]"),
    ];
    assert_hosts("canonical", 80, &without);
    assert_hosts("canonical", 443, &without);
    let with = [
        ("a.example", "a.example:8080"),
        ("a.example:81", "a.example:81"),
        ("[2001:db8::1]", "[2001:db8::1]:8080"),
    ];
    assert_hosts("canonical", 8080, &with);
    assert_hosts(
        "strip_any_host_port",
        81,
        &[("a.example:82", "a.example"), ("[::1]:82", "[::1]")],
    );
    let matching = [("a.example:82", "a.example"), ("a.example:81", "a.example:81")];
    assert_hosts("strip_matching_host_port", 82, &matching);
}

#[test]
fn http10_request_without_host_is_served_and_http11_is_refused() {
    let sidecar = config().start();
    let ask = |request: &str| http1::ask(sidecar.port, request);
    let answer = ask("GET / HTTP/1.0\r\n\r\n");
    assert_eq!((answer.status, values(&answer.body, "host").len()), (200, 1), "{answer:?}");
    let answer = ask("GET / HTTP/1.0\r\nhost: a.example\r\n\r\n");
    assert_eq!(values(&answer.body, "host"), ["a.example"], "{answer:?}");
    let answer = ask("GET http://b.example/ HTTP/1.0\r\n\r\n");
    assert_eq!(values(&answer.body, "host"), ["b.example"], "{answer:?}");
    assert_eq!(ask("GET / HTTP/1.1\r\n\r\n").status, 400);
    for twice in ["host: a\r\nhost: a\r\n", "host: a\r\nhost: b\r\n"] {
        assert_eq!(ask(&format!("GET / HTTP/1.1\r\n{twice}\r\n")).status, 400, "{twice}");
    }
}

/// RFC 9112, section 3.2: "any HTTP/1.1 request message that lacks a Host header field" gets 400.
#[test]
fn http11_request_without_host_is_refused_with_400_despite_absolute_target() {
    let sidecar = config().start();
    let answer = http1::ask(sidecar.port, "GET http://b.example/ HTTP/1.1\r\n\r\n");
    assert_eq!(answer.status, 400, "{answer:?}");
}
