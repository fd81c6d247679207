//! What a service is told of the client, `x-forwarded-*`, and which host it is told was asked for.

use serde_json::{Value, json};
use weft_integration::bootstrap::{address, verify_mode, with};
use weft_integration::http1::{self, Http1Client};
use weft_integration::http2::{self, request};
use weft_integration::mesh_pki::{MeshPki, text};
use weft_integration::port;
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};

fn wanted() -> SingleSidecarConfig {
    SingleSidecarConfig::for_upstream(ScriptedServer::echoing_heads().port, UpstreamHttp::Http1)
}

/// What is done with the addresses that a request names.
#[derive(Debug, Clone, Copy)]
enum Mode {
    Append,
    Preserve,
    Remove,
}

fn with_mode(mode: Mode, client_port: bool) -> SingleSidecarConfig {
    let wanted = wanted().with_weft_metadata("forwarded_client_port", json!(client_port));
    match mode {
        Mode::Append => wanted.with("use_remote_address", json!(true)),
        Mode::Preserve => {
            let edge = wanted.with("use_remote_address", json!(true));
            edge.with("skip_xff_append", json!(true))
        }
        Mode::Remove => wanted.with_weft_metadata("forwarded_for", json!("remove")),
    }
}

/// The values of a field in a head, in their order.
fn values(head: &str, name: &str) -> Vec<String> {
    let named = |line: &str| {
        let (key, value) = line.split_once(": ")?;
        key.eq_ignore_ascii_case(name).then(|| value.to_owned())
    };
    head.lines().filter_map(named).collect()
}

/// What the service is told after a request with these fields of `x-forwarded-for`.
fn told(alone: &SingleSidecar, before: &[&str]) -> Vec<String> {
    let fields: String = before.iter().map(|v| format!("X-Forwarded-For: {v}\r\n")).collect();
    let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
    let by_http1 = values(&http1::ask(alone.port, &request).body, "x-forwarded-for");
    let fields: Vec<_> = before.iter().map(|value| ("x-forwarded-for", *value)).collect();
    let answer = http2::ask_one(alone.port, self::request("GET", "/", &fields));
    assert_eq!(values(answer.body(), "x-forwarded-for"), by_http1, "both versions: {before:?}");
    by_http1
}

#[test]
fn the_nine_cases_of_the_table() {
    const NONE: &[&str] = &[];
    const ONE: &[&str] = &["10.0.0.1"];
    const MANY: &[&str] = &["10.0.0.1, 2001:db8::1", "10.0.0.2"];
    let check = |alone: &SingleSidecar, mode: Mode, before: &[&str], expected: &[&str]| {
        assert_eq!(told(alone, before), expected, "{mode:?} {before:?}");
    };
    let append = with_mode(Mode::Append, false).start();
    check(&append, Mode::Append, NONE, &["127.0.0.1"]);
    check(&append, Mode::Append, ONE, &["10.0.0.1, 127.0.0.1"]);
    check(&append, Mode::Append, MANY, &["10.0.0.1, 2001:db8::1, 10.0.0.2, 127.0.0.1"]);
    // A port is only told of what is added.
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
fn nothing_is_added_where_that_is_said() {
    let alone = with_mode(Mode::Append, false).with("skip_xff_append", json!(true)).start();
    assert_eq!(told(&alone, &["10.0.0.1"]), ["10.0.0.1"]);
    assert_eq!(told(&alone, &[]), Vec::<String>::new());
}

/// A sidecar that listens at an address.
fn listening_at(wanted: SingleSidecarConfig, ip: &str) -> (SingleSidecar, std::net::SocketAddr) {
    let at = std::net::SocketAddr::new(ip.parse().expect("an address"), port::free());
    let alone = wanted
        .start_with_second_listener(&json!({"name": "another", "address": address(at, "TCP")}));
    (alone, at)
}

#[test]
fn the_clients_port_is_told_where_wanted() {
    for (ip, bare) in [("127.0.0.1", "127.0.0.1"), ("::1", "::1")] {
        for client_port in [false, true] {
            let (_alone, at) = listening_at(with_mode(Mode::Append, client_port), ip);
            let mut client = Http1Client::connect_to(at);
            let own = client.local_address();
            let answer = client
                .ask("GET / HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 10.0.0.1:80, [::2]:81\r\n\r\n");
            // The form with a port has brackets around IPv6.
            let told = if client_port { own.to_string() } else { bare.to_owned() };
            let expected = [format!("10.0.0.1:80, [::2]:81, {told}")];
            assert_eq!(values(&answer.body, "x-forwarded-for"), expected, "{ip} {client_port}");
        }
    }
}

#[test]
fn a_chain_has_thirty_addresses_at_most() {
    let status = |alone: &SingleSidecar, values: &[String]| {
        let fields: String = values.iter().map(|v| format!("x-forwarded-for: {v}\r\n")).collect();
        let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
        http1::ask(alone.port, &request).status
    };
    let list = |count: usize| vec!["10.0.0.1"; count].join(",");
    for (mode, above) in [(Mode::Append, 463), (Mode::Preserve, 463), (Mode::Remove, 200)] {
        let alone = with_mode(mode, false).start();
        assert_eq!(status(&alone, &[list(29)]), 200, "{mode:?}");
        assert_eq!(status(&alone, &[list(30)]), 200, "{mode:?}");
        assert_eq!(status(&alone, &[list(31)]), above, "{mode:?}");
        // Counted together, and empty elements are none (RFC 9110, section 5.6.1).
        assert_eq!(status(&alone, &[list(15), list(16)]), above, "{mode:?}");
        assert_eq!(status(&alone, &[list(15), ",,".into(), list(15)]), 200, "{mode:?}");
        assert_eq!(status(&alone, &vec!["::1".to_owned(); 31]), above, "{mode:?}");
    }
}

/// The values of `x-forwarded-proto` and `-port` that a service is told when a client claims others.
fn told_of_the_listener(alone: &SingleSidecar, asked: Option<Value>) -> [Vec<String>; 2] {
    let claims = [("x-forwarded-proto", "gopher"), ("x-forwarded-port", "1")];
    let mut claiming = request("GET", "/", &claims);
    if let Some(tls) = asked {
        claiming = with(claiming, "tls", tls);
    }
    let answer = http2::ask_one(alone.port, claiming);
    assert_eq!(answer.status(), 200, "{answer:?}");
    ["x-forwarded-proto", "x-forwarded-port"].map(|name| values(answer.body(), name))
}

#[test]
fn the_listeners_scheme_and_port_are_told() {
    let alone = with_mode(Mode::Append, false).start();
    let told = told_of_the_listener(&alone, None);
    assert_eq!(told, [vec!["http".to_owned()], vec![alone.port.to_string()]]);

    let pki = MeshPki::create();
    let (server, client) = (pki.issue("server"), pki.issue("client"));
    let tls = json!([text(&pki.root()), text(&client.certificate), text(&client.key)]);
    let verify = verify_mode(&server, &pki.root(), &pki.crl_file());
    let wanted = SingleSidecarConfig { tls: Some(verify), ..with_mode(Mode::Append, false) };
    let alone = wanted.start_with_pki(pki);
    let told = told_of_the_listener(&alone, Some(tls));
    assert_eq!(told, [vec!["https".to_owned()], vec![alone.port.to_string()]]);
}

/// Only the addresses have modes: at the edge, scheme and port are the sidecar's to say in each.
#[test]
fn the_listeners_scheme_and_port_are_told_in_every_mode() {
    for mode in [Mode::Preserve, Mode::Remove] {
        let alone = with_mode(mode, false).start();
        let told = told_of_the_listener(&alone, None);
        assert_eq!(told, [vec!["http".to_owned()], vec![alone.port.to_string()]], "{mode:?}");
    }
}

/// How the port in a host is treated.
fn with_port_rule(wanted: SingleSidecarConfig, rule: &str) -> SingleSidecarConfig {
    match rule {
        "keep" => wanted,
        "canonical" => wanted.with_weft_metadata("host_port", json!("canonical")),
        field => wanted.with(field, json!(true)),
    }
}

/// The host that a service is told when a client asks a sidecar at `at` for another, by each version.
#[track_caller]
fn check_host(at: std::net::SocketAddr, rule: &str, host: &str, expected: &str) {
    let ask = |request: &str| {
        let answer = Http1Client::connect_to(at).ask(request);
        assert_eq!(answer.status, 200, "{rule} {host} at {at}: {answer:?}");
        values(&answer.body, "host")
    };
    let told = ask(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    assert_eq!(told, [expected], "{rule} {host} at {at}");
    // What stands in the target wins.
    let told = ask(&format!("GET http://{host}/ HTTP/1.1\r\nHost: another:1\r\n\r\n"));
    assert_eq!(told, [expected], "{rule} {host} in the target at {at}");
    let asked = http2::to_host(request("GET", "/", &[]), host);
    let answer = http2::ask_one(at.port(), asked);
    assert_eq!(values(answer.body(), "host"), [expected], "{rule} {host} at {at} by HTTP/2");
}

/// The same for each of `cases`, of a host asked for and one told, by a sidecar with that rule.
#[track_caller]
fn check_hosts(rule: &str, port: u16, cases: &[(&str, &str)]) {
    let at = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let other = json!({"name": "another", "address": address(at, "TCP")});
    let _alone = with_port_rule(wanted(), rule).start_with_second_listener(&other);
    for (host, expected) in cases {
        check_host(at, rule, host, expected);
    }
}

#[test]
fn the_hosts_port_is_as_the_rule_says() {
    check_hosts("keep", 80, &[("a.example:80", "a.example:80"), ("a.example", "a.example")]);
    // The table of AWS: at 80 and 443 any port is taken off, elsewhere one is put on.
    let without = [
        ("a.example", "a.example"),
        ("a.example:80", "a.example"),
        ("a.example:8443", "a.example"),
        ("[::1]:8443", "[::1]"),
    ];
    check_hosts("canonical", 80, &without);
    check_hosts("canonical", 443, &without);
    let with = [
        ("a.example", "a.example:8080"),
        ("a.example:81", "a.example:81"),
        ("[2001:db8::1]", "[2001:db8::1]:8080"),
    ];
    check_hosts("canonical", 8080, &with);
    check_hosts("strip_any_host_port", 81, &[("a.example:82", "a.example"), ("[::1]:82", "[::1]")]);
    let matching = [("a.example:82", "a.example"), ("a.example:81", "a.example:81")];
    check_hosts("strip_matching_host_port", 82, &matching);
}

#[test]
fn http10_needs_no_host() {
    let alone = wanted().start();
    let ask = |request: &str| http1::ask(alone.port, request);
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

/// RFC 9112, section 3.2: "any HTTP/1.1 request message that lacks a Host header field" is answered by 400.
#[test]
fn http11_needs_a_host_whatever_its_target() {
    let alone = wanted().start();
    let answer = http1::ask(alone.port, "GET http://b.example/ HTTP/1.1\r\n\r\n");
    assert_eq!(answer.status, 400, "{answer:?}");
}
