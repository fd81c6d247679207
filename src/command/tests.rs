//! Option values that are refused as usage errors.

use clap::error::ErrorKind;

use super::*;

const CONTROL: &str = "--control control.example:15010 --trust root.pem";

/// The usage error for an option value in a command line.
fn refusal(line: &str) -> String {
    refusal_of(line, ErrorKind::ValueValidation)
}

/// The usage error of a kind for a command line.
fn refusal_of(line: &str, kind: ErrorKind) -> String {
    let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
    assert_eq!(error.exit_code(), 2, "{line}");
    assert_eq!(error.kind(), kind, "{line}: {error}");
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
    for address in [
        "banana",
        "banana:",
        ":15010",
        "banana:0",
        "banana:65536",
        "fd00::1",
        "a/b:1",
        "1.2.3:80",
        "1.2.3.4.5:80",
        "a.1:80",
        "256.0.0.1:80",
    ] {
        let line = format!("weft sidecar --control {address} --trust root.pem --service web");
        let refused = refusal(&line);
        assert!(refused.contains("must be HOST:PORT"), "{refused}");
    }
    for address in [
        "control:15010",
        "10.0.0.1:15010",
        "[fd00::1]:15010",
        "control.example.:15010",
        "1a:1",
        "10.example:1",
    ] {
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

#[test]
fn identity_options_conflict_with_a_bootstrap_file() {
    for option in ["--service web", "--trust-domain mesh.local", "--state state"] {
        let refused = refusal_of(
            &format!("weft sidecar -c envoy.yaml {option}"),
            ErrorKind::ArgumentConflict,
        );
        assert!(refused.contains("cannot be used with"), "{refused}");
    }
    for option in ["--trust-domain mesh.local", "--state state"] {
        refusal_of(&format!("weft agent -c envoy.yaml {option}"), ErrorKind::ArgumentConflict);
    }
    accept("weft sidecar -c envoy.yaml");
}

#[test]
fn method_that_sidecars_refuse_is_a_usage_error() {
    for method in ["get", "GeT", "connect"] {
        let refused = refusal(&format!("weft why -c mesh.yaml web orders:80 {method} /v1"));
        assert!(
            refused.contains("methods are case-sensitive and sidecars answer 400"),
            "{refused}"
        );
    }
    for method in ["CONNECT", "TRACE"] {
        let refused = refusal(&format!("weft why -c mesh.yaml web orders:80 {method} /v1"));
        assert!(refused.contains("405"), "{refused}");
    }
    accept("weft why -c mesh.yaml web orders:80 propfind /v1");
}

#[test]
fn flow_address_with_port_zero_or_a_mapped_address_is_a_usage_error() {
    let refused = refusal("weft flow explain tcp 10.0.0.1:0 10.96.0.1:80");
    assert!(refused.contains("invalid port 0: must be 1 to 65535"), "{refused}");
    refusal("weft flow explain tcp 10.0.0.1:4000 10.96.0.1:0");
    refusal("weft flow explain tcp 10.0.0.1:4000 10.96.0.1");
    let refused = refusal("weft flow explain tcp 10.0.0.1:4000 [::ffff:10.96.0.1]:80");
    assert!(refused.contains("IPv4-mapped IPv6 address: must be 10.96.0.1:80"), "{refused}");
    accept("weft flow explain tcp [fd90::2]:4000 [fd96::1]:80");
}

#[test]
fn flow_between_address_families_is_a_usage_error() {
    let line = "weft flow explain tcp 10.0.0.1:4000 [fd96::1]:80";
    let cli = Cli::try_parse_from(line.split(' ')).expect("each address is valid");
    let Command::Flow(arguments) = cli.command else {
        panic!("{:?}", cli.command);
    };
    let failure = flow::run(&arguments).expect_err("the families differ");
    let CommandError::Usage(text) = failure else {
        panic!("{failure:?}");
    };
    assert!(text.contains("must be of one address family"), "{text}");
}
