//! Soak test at half of the maximum load: memory and open files do not grow, and no request is
//! rejected. `WEFT_SOAK_SECONDS` sets the total duration.

use weft_integration::nginx::Nginx;
use weft_integration::process::{Process, tool};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};

/// The default duration.
const SECONDS: u32 = 20;
const CLIENTS: u32 = 64;
/// The requests per second of each client.
const RATE: u32 = 31;
/// When memory and files are measured, in percent of all requests: after connections, pools and
/// heaps have reached their size, and near the end. The median of three measurements counts.
const EARLY: [u32; 3] = [30, 40, 50];
const LATE: [u32; 3] = [70, 80, 90];
/// A small heap cannot be compared to 2 %: it grows in chunks.
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

/// The resident memory in bytes and the number of open files, at these points of the load.
fn measured(sidecar: &SingleSidecar, load: &Process, points: [u32; 3]) -> [u64; 2] {
    let looks = points.map(|percent| {
        load.line_with(&format!("progress: {percent}% done"));
        (sidecar.sidecar.resident_memory(), sidecar.sidecar.open_files() as u64)
    });
    [median(looks.map(|(bytes, _)| bytes)), median(looks.map(|(_, files)| files))]
}

fn median(mut values: [u64; 3]) -> u64 {
    values.sort_unstable();
    let [_, median, _] = values;
    median
}

fn refusals(sidecar: &SingleSidecar) -> [u64; REFUSALS.len()] {
    let page = sidecar.sidecar.metrics();
    REFUSALS.map(|refusal| weft_integration::metrics::metric(&page, refusal))
}

/// Puts load on the sidecar over one HTTP version.
fn check(sidecar: &SingleSidecar, version: &[&str]) {
    let requests = seconds() / 2 * RATE * CLIENTS;
    let mut load = tool("h2load");
    load.args(version).args(["--clients", &CLIENTS.to_string(), "--rps", &RATE.to_string()]);
    load.args(["--requests", &requests.to_string()]);
    load.arg(format!("http://127.0.0.1:{}/small", sidecar.port));
    let refused = refusals(sidecar);
    let mut load = Process::start("h2load", &mut load);
    let early = measured(sidecar, &load, EARLY);
    let late = measured(sidecar, &load, LATE);
    let summary = load.line_with("status codes:");
    assert!(summary.contains(&format!(" {requests} 2xx")), "{version:?}: {summary}");
    assert!(load.ended().success(), "{load:?}");
    for ((early, late), slack) in early.into_iter().zip(late).zip([SLACK_BYTES, 0]) {
        let is_near = early.abs_diff(late) <= (early / 50).max(slack);
        assert!(is_near, "{version:?}: {early} early and {late} late");
    }
    assert_eq!(refusals(sidecar), refused, "{version:?}");
}

fn before_nginx() -> (Nginx, SingleSidecar) {
    let nginx = Nginx::start();
    nginx.serve("small", &[b'x'; 100]);
    let sidecar = SingleSidecarConfig::for_upstream(nginx.port, UpstreamHttp::Http1).start();
    (nginx, sidecar)
}

/// The second service sends no `date` header; see the test below.
#[test]
fn memory_and_files_do_not_grow_under_half_load() {
    let (_nginx, mut sidecar) = before_nginx();
    check(&sidecar, &["--h1"]);
    sidecar.assert_healthy();
    let service = ScriptedServer::echoing_heads();
    let mut sidecar = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1).start();
    check(&sidecar, &[]);
    sidecar.assert_healthy();
}

/// A `date` header changes every second, and the HPACK table of each connection stores it.
#[test]
fn changing_header_does_not_grow_the_hpack_table() {
    let (_nginx, mut sidecar) = before_nginx();
    check(&sidecar, &[]);
    sidecar.assert_healthy();
}
