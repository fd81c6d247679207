//! Option values that are refused as usage errors.

use clap::error::ErrorKind;

use super::*;

const CONTROL: &str = "--control control.example:15010 --trust root.pem";

/// The usage error for a command line.
fn refusal(line: &str) -> String {
    let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
    assert_eq!(error.exit_code(), 2, "{line}");
    assert_eq!(error.kind(), ErrorKind::ValueValidation, "{line}: {error}");
    error.to_string()
}

fn accept(line: &str) {
    if let Err(error) = Cli::try_parse_from(line.split(' ')) {
        panic!("{line}: {error}");
    }
}

#[test]
fn log_filter_without_a_level_is_a_usage_error() {
    let refused = refusal("weft --log nosuch ca list --state ca");
    assert!(refused.contains("unknown level \"nosuch\""), "{refused}");
    assert!(refused.contains("off, error, warn, info, debug and trace"), "{refused}");
    accept("weft --log weft_xds=trace,info ca list --state ca");
}

#[test]
fn control_address_without_a_host_or_port_is_a_usage_error() {
    for address in ["banana", "banana:", ":15010", "banana:0", "banana:65536", "fd00::1", "a/b:1"] {
        let line = format!("weft sidecar --control {address} --trust root.pem --service web");
        let refused = refusal(&line);
        assert!(refused.contains("must be HOST:PORT"), "{refused}");
    }
    for address in ["control:15010", "10.0.0.1:15010", "[fd00::1]:15010", "control.example.:15010"]
    {
        accept(&format!("weft sidecar --control {address} --trust root.pem --service web"));
    }
}

#[test]
fn limit_of_zero_is_a_usage_error() {
    for option in ["--connection-limit", "--window-limit", "--workers"] {
        refusal(&format!("weft sidecar {CONTROL} --service web {option} 0"));
        accept(&format!("weft sidecar {CONTROL} --service web {option} 1"));
    }
    for option in ["--connection-limit", "--flow-limit", "--slot-limit", "--workers"] {
        refusal(&format!("weft agent {CONTROL} {option} 0"));
        accept(&format!("weft agent {CONTROL} {option} 1"));
    }
}

#[test]
fn numbers_beyond_what_a_host_can_serve_are_usage_errors() {
    refusal(&format!("weft agent {CONTROL} --workers 1025"));
    refusal(&format!("weft agent {CONTROL} --connection-limit 1000001"));
    refusal(&format!("weft agent {CONTROL} --drain-timeout 18446744073709551615"));
    accept(&format!("weft agent {CONTROL} --drain-timeout 0"));
}

#[test]
fn addresses_that_name_no_listener_are_usage_errors() {
    for option in ["--admin", "--metrics", "--readiness"] {
        for address in ["banana", "localhost:15000", "127.0.0.1", "127.0.0.1:65536"] {
            refusal(&format!("weft agent {CONTROL} {option} {address}"));
        }
    }
    refusal("weft control -c mesh.yaml --state ca --listen banana");
    refusal(&format!("weft agent {CONTROL} --admin-host weft.example:80"));
    for address in ["0.0.0.0", "::", "224.0.0.1", "banana"] {
        refusal(&format!("weft agent {CONTROL} --source-addresses {address}"));
    }
}

#[test]
fn redirect_port_of_zero_is_a_usage_error() {
    for option in ["--inbound", "--udp", "--exclude-inbound-ports", "--exclude-outbound-ports"] {
        refusal(&format!("weft redirect plan {option} 0"));
        accept(&format!("weft redirect plan {option} 1"));
    }
}
