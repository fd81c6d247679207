//! The limit of requests per connection, and that no request is lost when a connection reaches it.

use weft_integration::port;
use weft_integration::process::{Process, counterpart, run, tool};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::sidecar_pair::{PairConfig, SidecarPair, TestSidecar};

const REQUESTS_PER_CONNECTION: u32 = 7;

fn start(config: PairConfig) -> SidecarPair {
    SidecarPair::start(&PairConfig { request_limit: Some(REQUESTS_PER_CONNECTION), ..config })
}

/// The number of connections that a sidecar has accepted.
fn connections(sidecar: &TestSidecar) -> u64 {
    sidecar.metric("weft_sidecar_connections_total")
}

#[test]
fn connection_closes_after_its_request_limit_without_losing_requests() {
    const TIMES: u32 = 40;
    let pair = start(PairConfig::http1(ScriptedServer::echoing_heads().port));
    let before = [&pair.caller, &pair.callee].map(connections);
    let mut curl = tool("curl");
    curl.args(["--silent", "--output", "/dev/null", "--write-out", "%{http_code} "]);
    let output = run(curl.arg(format!("http://{}/[1-{TIMES}]", pair.address())));
    assert_eq!(output, "200 ".repeat(TIMES as usize));
    let expected = u64::from(TIMES.div_ceil(REQUESTS_PER_CONNECTION));
    let [caller_before, callee_before] = before;
    assert_eq!(connections(&pair.caller) - caller_before, expected);
    assert_eq!(connections(&pair.callee) - callee_before, expected);
}

#[test]
fn in_flight_grpc_calls_are_served_when_their_connection_reaches_its_request_limit() {
    let port = port::free();
    let service =
        Process::start("grpc_service.py", counterpart("grpc_service.py").arg(port.to_string()));
    service.line_with("ready");
    let mut pair = start(PairConfig::http2(port));
    run(counterpart("grpc_caller.py").arg(pair.caller.port.to_string()).arg("many"));
    for sidecar in [&pair.caller, &pair.callee] {
        let connections = connections(sidecar);
        assert!(connections > 3, "{connections} connections accepted by {sidecar:?}");
    }
    pair.assert_healthy();
}
