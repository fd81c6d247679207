//! How long connections of HTTP are kept, and that no request is lost when one ends.

use weft_integration::port;
use weft_integration::process::{Process, counterpart, run, tool};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::sidecar_pair::{PairConfig, SidecarPair, TestSidecar};

const LIMIT: u32 = 7;

fn start(wanted: PairConfig) -> SidecarPair {
    SidecarPair::start(&PairConfig { request_limit: Some(LIMIT), ..wanted })
}

/// How many connections a sidecar has taken.
fn connections(sidecar: &TestSidecar) -> u64 {
    sidecar.metric("weft_sidecar_connections_total")
}

#[test]
fn a_connection_brings_so_many_requests_and_none_is_lost() {
    const TIMES: u32 = 40;
    let pair = start(PairConfig::http1(ScriptedServer::echoing_heads().port));
    let before = [&pair.caller, &pair.callee].map(connections);
    let mut curl = tool("curl");
    curl.args(["--silent", "--output", "/dev/null", "--write-out", "%{http_code} "]);
    let told = run(curl.arg(format!("http://{}/[1-{TIMES}]", pair.address())));
    assert_eq!(told, "200 ".repeat(TIMES as usize));
    let wanted = u64::from(TIMES.div_ceil(LIMIT));
    let [to_caller, to_callee] = before;
    assert_eq!(connections(&pair.caller) - to_caller, wanted);
    assert_eq!(connections(&pair.callee) - to_callee, wanted);
}

#[test]
fn calls_under_way_are_served_when_their_connection_ends() {
    let port = port::free();
    let service =
        Process::start("grpc_service.py", counterpart("grpc_service.py").arg(port.to_string()));
    service.line_with("ready");
    let mut pair = start(PairConfig::http2(port));
    run(counterpart("grpc_caller.py").arg(pair.caller.port.to_string()).arg("many"));
    for sidecar in [&pair.caller, &pair.callee] {
        let connections = connections(sidecar);
        assert!(connections > 3, "{connections} of {sidecar:?}");
    }
    pair.assert_healthy();
}
