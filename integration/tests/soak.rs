//! At half of what it can do, for a while: neither memory nor open files grow, and nobody is refused.
//! `WEFT_SOAK_SECONDS` says for how long, all parts together.

use weft_integration::metrics::metric;
use weft_integration::nginx::Nginx;
use weft_integration::process::{Process, tool};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};

/// How long it takes when nobody says.
const SECONDS: u32 = 20;
const CLIENTS: u32 = 64;
/// How many requests each client makes in a second.
const RATE: u32 = 31;
/// When it is looked at, in percent of all requests: once connections, pools and heaps have the size that
/// they keep, and towards the end. The middle of a few looks counts, so that none stands for itself.
const EARLY: [u32; 3] = [30, 40, 50];
const LATE: [u32; 3] = [70, 80, 90];
/// A small heap is not known to a fiftieth: it grows by pieces.
const SLACK_BYTES: u64 = 1024 * 1024;
/// Metrics of requests and connections that were not served.
const REFUSALS: [&str; 6] = [
    "weft_sidecar_requests_denied_total",
    "weft_sidecar_connections_refused_total",
    "weft_sidecar_http2_window_refusals_total",
    "weft_sidecar_http2_flood_disconnects_total",
    "weft_sidecar_requests_total{response_class=\"4xx\"}",
    "weft_sidecar_requests_total{response_class=\"5xx\"}",
];

fn seconds() -> u32 {
    let seconds = std::env::var("WEFT_SOAK_SECONDS");
    seconds.map_or(SECONDS, |seconds| seconds.parse().expect("a number of seconds"))
}

/// How many bytes of memory it has, and how many open files, at these points of the load.
fn held(alone: &SingleSidecar, load: &Process, points: [u32; 3]) -> [u64; 2] {
    let looks = points.map(|percent| {
        load.line_with(&format!("progress: {percent}% done"));
        (alone.sidecar.resident_memory(), alone.sidecar.open_files() as u64)
    });
    [middle(looks.map(|(bytes, _)| bytes)), middle(looks.map(|(_, files)| files))]
}

fn middle(mut values: [u64; 3]) -> u64 {
    values.sort_unstable();
    let [_, middle, _] = values;
    middle
}

fn refusals(alone: &SingleSidecar) -> [u64; REFUSALS.len()] {
    let page = alone.sidecar.metrics();
    REFUSALS.map(|refusal| metric(&page, refusal))
}

/// Puts load on the sidecar by a version of HTTP.
fn check(alone: &SingleSidecar, version: &[&str]) {
    let requests = seconds() / 2 * RATE * CLIENTS;
    let mut load = tool("h2load");
    load.args(version).args(["--clients", &CLIENTS.to_string(), "--rps", &RATE.to_string()]);
    load.args(["--requests", &requests.to_string()]);
    load.arg(format!("http://127.0.0.1:{}/small", alone.port));
    let refused = refusals(alone);
    let mut load = Process::start("h2load", &mut load);
    let early = held(alone, &load, EARLY);
    let late = held(alone, &load, LATE);
    let told = load.line_with("status codes:");
    assert!(told.contains(&format!(" {requests} 2xx")), "{version:?}: {told}");
    assert!(load.ended().success(), "{load:?}");
    for ((early, late), slack) in early.into_iter().zip(late).zip([SLACK_BYTES, 0]) {
        let is_near = early.abs_diff(late) <= (early / 50).max(slack);
        assert!(is_near, "{version:?}: {early} early and {late} late");
    }
    assert_eq!(refusals(alone), refused, "{version:?}");
}

fn before_nginx() -> (Nginx, SingleSidecar) {
    let nginx = Nginx::start();
    nginx.serve("small", &[b'x'; 100]);
    let alone = SingleSidecarConfig::for_upstream(nginx.port, UpstreamHttp::Http1).start();
    (nginx, alone)
}

/// The second service tells no date, of which see below.
#[test]
fn at_half_load_nothing_grows() {
    let (_nginx, mut alone) = before_nginx();
    check(&alone, &["--h1"]);
    alone.assert_healthy();
    let service = ScriptedServer::echoing_heads();
    let mut alone = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1).start();
    check(&alone, &[]);
    alone.assert_healthy();
}

/// A date is new each second, and the table of HPACK remembers it for each connection.
#[test]
fn a_field_that_changes_costs_a_connection_of_http2_no_more_than_itself() {
    let (_nginx, mut alone) = before_nginx();
    check(&alone, &[]);
    alone.assert_healthy();
}
