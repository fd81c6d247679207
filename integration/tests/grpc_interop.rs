//! gRPC's interoperability tests, by grpcio at both ends, through two sidecars with mutual TLS between.
//!
//! The cases are those of grpc/grpc's `doc/interop-test-descriptions.md`, under their names there. Left out
//! are those that want Google's credentials or a caching proxy, and those on compressed messages: grpcio does
//! not show whether a message was. What else must hold of gRPC here is in `streams`.

use weft_integration::port;
use weft_integration::process::{Process, counterpart};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};
use weft_integration::wait::eventually;

const CASES: &[&str] = &[
    "empty_unary",
    "large_unary",
    "concurrent_large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "cancel_after_begin",
    "cancel_after_first_response",
    "timeout_on_sleeping_server",
    "status_code_and_message",
    "special_status_message",
    "unimplemented_method",
    "unimplemented_service",
    "custom_metadata",
];

/// Why the case fails, when it does.
fn check(pair: &SidecarPair, case: &str) -> Result<(), String> {
    let mut caller = counterpart("interop_caller.py");
    let output = caller.arg(pair.caller.port.to_string()).arg(case).output().expect("Python runs");
    let complaint = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{case}: {complaint}")) }
}

#[test]
fn every_grpc_interop_case_passes() {
    let port = port::free();
    let service = Process::start(
        "interop_service.py",
        counterpart("interop_service.py").arg(port.to_string()),
    );
    service.line_with("ready");
    let mut pair =
        SidecarPair::start(&PairConfig { timeout_seconds: 0, ..PairConfig::http2(port) });
    assert_eq!(check(&pair, "empty_unary"), Ok(()));

    let connections = || pair.caller.metric("weft_sidecar_connections_total");
    let before = connections();
    let failed: Vec<String> = CASES.iter().filter_map(|case| check(&pair, case).err()).collect();
    assert!(failed.is_empty(), "{} cases fail:\n{}", failed.len(), failed.join("\n"));
    // None loses its connection, not even by ending a call early, and no call is left behind.
    let callers = u64::try_from(CASES.len()).expect("a few");
    assert_eq!(connections() - before, callers);
    for sidecar in [&pair.caller, &pair.callee] {
        let open = || sidecar.metric("weft_sidecar_requests_open");
        eventually(format!("no call is open at {sidecar:?}"), || (open() == 0).then_some(()));
        assert_eq!(sidecar.metric("weft_sidecar_upstream_retries_total"), 0);
    }
    pair.assert_healthy();
}
