//! gRPC interoperability tests: grpcio as client and server, with two sidecars and mutual TLS between them.
//!
//! The cases have the names of grpc/grpc's `doc/interop-test-descriptions.md`. Left out are cases that need Google
//! credentials or a caching proxy, and cases on compressed messages, because grpcio does not show whether a message
//! was compressed. `grpc_and_websocket` has more gRPC tests.

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

/// Runs a case.
///
/// # Errors
///
/// The case's name and the client's standard error when it fails.
fn check(pair: &SidecarPair, case: &str) -> Result<(), String> {
    let mut caller = counterpart("interop_caller.py");
    let output =
        caller.arg(pair.caller.port.to_string()).arg(case).output().expect("Python can be started");
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{case}: {errors}")) }
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
    // Each case uses one connection, also when it cancels a call, and no call stays open.
    let callers = u64::try_from(CASES.len()).expect("the number of cases fits into u64");
    assert_eq!(connections() - before, callers);
    for sidecar in [&pair.caller, &pair.callee] {
        let open = || sidecar.metric("weft_sidecar_requests_open");
        eventually(format!("no call is open in {sidecar:?}"), || (open() == 0).then_some(()));
        assert_eq!(sidecar.metric("weft_sidecar_upstream_retries_total"), 0);
    }
    pair.assert_healthy();
}
