//! gRPC with grpcio and WebSocket with websockets, each through two sidecars with mutual TLS. The
//! cases of their test suites are in `grpc_interop` and `websocket_suite`.

use serde_json::Value;
use weft_integration::bootstrap::{allow_only, require_token};
use weft_integration::port;
use weft_integration::process::{Process, counterpart, run};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};

/// A gRPC service behind two sidecars, with these HTTP filters.
fn grpc(filters: Vec<Value>) -> (Process, SidecarPair) {
    let port = port::free();
    let service = start("grpc_service.py", port);
    let pair =
        SidecarPair::start(&PairConfig { filters, timeout_seconds: 0, ..PairConfig::http2(port) });
    (service, pair)
}

fn start(script: &str, port: u16) -> Process {
    let service = Process::start(script, counterpart(script).arg(port.to_string()));
    service.line_with("ready");
    service
}

fn check(pair: &SidecarPair, what: &str) {
    run(counterpart("grpc_caller.py").arg(pair.caller.port.to_string()).arg(what));
}

/// The next line that the service prints.
fn next_line(service: &Process) -> String {
    service.line("the end of the call", |_| true)
}

#[test]
fn grpc_calls_of_every_kind_pass_with_trailers() {
    let (_service, pair) = grpc(Vec::new());
    for what in ["unary", "error", "server_stream", "client_stream"] {
        check(&pair, what);
    }
}

#[test]
fn cancelled_grpc_call_is_cancelled_at_the_service() {
    let (service, pair) = grpc(Vec::new());
    for what in ["cancel", "cancel_while_sending"] {
        check(&pair, what);
        assert_eq!(next_line(&service), "cancelled");
    }
}

#[test]
fn grpc_deadline_ends_the_call_at_client_and_service() {
    let (service, pair) = grpc(Vec::new());
    check(&pair, "deadline");
    assert_eq!(next_line(&service), "cancelled");
}

#[test]
fn denied_grpc_call_gets_permission_denied() {
    let (_service, pair) = grpc(vec![allow_only("other", "/")]);
    check(&pair, "denied");
}

#[test]
fn grpc_call_without_valid_token_is_unauthenticated() {
    // The public key of RFC 7517, appendix A.1, whose private key is not used here.
    let keys = r#"{"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": "1",
        "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
        "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}"#;
    let (_service, pair) = grpc(vec![require_token("https://issuer", "service", keys)]);
    check(&pair, "without_token");
    check(&pair, "with_a_bad_token");
}

#[test]
fn stopped_grpc_service_is_unavailable() {
    let (mut service, pair) = grpc(Vec::new());
    check(&pair, "unary");
    service.kill();
    check(&pair, "unreachable");
}

#[test]
fn websocket_passes_messages_and_the_close_code() {
    let port = port::free();
    let _service = start("websocket_service.py", port);
    let pair = SidecarPair::start(&PairConfig::http1(port));
    run(counterpart("websocket_caller.py").arg(pair.caller.port.to_string()));
}
