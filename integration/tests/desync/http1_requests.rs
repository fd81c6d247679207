//! Each HTTP/1.1 request of the corpus in each desync mitigation mode: what the service receives, what the client gets,
//! what is counted, and that the next client gets its own response.

use serde_json::json;

use crate::client::{Answer, Client};
use crate::corpus::{
    Case, Expected, cases, endless_request_line, forbidden_trailers, refused_tunnels,
    tunnel_where_connect_is_disabled,
};
use crate::front::{Front, probe, recorded_probe};

/// The action of a mode on a noncompliant request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ModeAction {
    Allow,
    AllowAndClose,
    Refuse,
}

/// The actions of `monitor`, `defensive` and `strictest`, as the documentation specifies them.
fn mode_actions(reason: &str) -> [ModeAction; 3] {
    use ModeAction::{Allow, AllowAndClose, Refuse};
    match reason {
        "GetHeadZeroContentLength"
        | "NonCompliantHeader"
        | "NonCompliantVersion"
        // These close only the upstream connection.
        | "UndefinedContentLengthSemantics"
        | "UndefinedTransferEncodingSemantics" => [Allow, Allow, Refuse],
        "SuspiciousHeader" => [Allow, AllowAndClose, Refuse],
        "NonCrLfLineTermination" | "BothTeClPresent" | "DuplicateContentLength" => {
            [AllowAndClose, Refuse, Refuse]
        }
        _ => [Refuse; 3],
    }
}

/// The expected results of a case in one mode.
#[derive(Debug, Default)]
struct ModeResult {
    /// The requests that the service receives, in order.
    received: Vec<&'static str>,
    /// Number of those to which the client gets the service's response.
    answered: usize,
    /// The status of a last response that the service did not send.
    status: Option<u16>,
    /// Whether the connection closes.
    closes: bool,
    reason: Option<&'static str>,
}

impl ModeResult {
    fn of(expected: &Expected, mode: usize) -> Self {
        let served = |received: &[&'static str], status, closes| Self {
            received: received.to_vec(),
            answered: received.len(),
            status,
            closes,
            reason: None,
        };
        match expected {
            Expected::Served(received) => served(received, None, false),
            Expected::Last(received) => served(received, None, true),
            Expected::Refused(received, status) => served(received, Some(*status), true),
            Expected::RefusedAfterForwarding(received, status) => {
                Self { answered: 0, ..served(&[*received], Some(*status), true) }
            }
            Expected::Declined(status) => served(&[], Some(*status), false),
            Expected::Closed => served(&[], None, true),
            Expected::Noncompliant(reason, received) => {
                let result = match mode_actions(reason)[mode] {
                    ModeAction::Allow => served(&[*received], None, false),
                    ModeAction::AllowAndClose => served(&[*received], None, true),
                    ModeAction::Refuse => served(&[], Some(400), true),
                };
                Self { reason: Some(*reason), ..result }
            }
        }
    }
}

/// Runs a case in a mode. Returns an error if a result is wrong.
fn check(front: &Front, case: &Case, mode: usize) -> Result<(), String> {
    let expected = ModeResult::of(&case.expected, mode);
    // Discard what an earlier, failed case recorded.
    drop(front.recorder.take());
    let before = front.noncompliant_requests();
    let mut client = front.client();
    client.send(&case.bytes);
    if case.closes {
        client.finish();
    }
    check_responses(&mut client, &expected)?;
    let mut received = expected.received.clone();
    if expected.closes {
        let rest = client.rest()?;
        let rest = String::from_utf8_lossy(&rest);
        let is_other_protocol =
            matches!(case.expected, Expected::Closed) && !rest.contains("HTTP/1");
        if !rest.is_empty() && !is_other_protocol {
            return Err(format!("unexpected bytes after the response: {rest:?}"));
        }
    } else {
        probe(&mut client, "same")?;
        received.push(SAME);
    }
    probe(&mut front.client(), "next")?;
    received.push(NEXT);
    check_recorded(front, &received)?;
    let mut counted = before;
    if let Some(reason) = expected.reason {
        *counted.entry(reason.to_owned()).or_default() += 1;
    }
    let after = front.noncompliant_requests();
    if counted == after { Ok(()) } else { Err(format!("counted {after:?}, not {counted:?}")) }
}

const SAME: &str = "GET /probe/same p";
const NEXT: &str = "GET /probe/next p";

fn check_responses(client: &mut Client, expected: &ModeResult) -> Result<(), String> {
    for received in &expected.received[..expected.answered] {
        let is_to_head = received.starts_with("HEAD ");
        let expected_body = if is_to_head { "" } else { received };
        match client.answer(is_to_head) {
            Some(Answer { status: 200, body, .. }) if body == expected_body => {}
            other => return Err(format!("{received:?} was not served: {other:?}")),
        }
    }
    let Some(expected_status) = expected.status else {
        return Ok(());
    };
    match client.answer(false) {
        Some(Answer { status, is_last, .. })
            if status == expected_status && is_last == expected.closes =>
        {
            Ok(())
        }
        other => {
            Err(format!("expected {expected_status}, closes: {}, not {other:?}", expected.closes))
        }
    }
}

fn check_recorded(front: &Front, expected: &[&str]) -> Result<(), String> {
    let recorded = front.recorder.take();
    if let Some(violation) = recorded.violations.first() {
        return Err(format!("not strict: {violation}"));
    }
    let received: Vec<String> =
        recorded.requests.iter().map(crate::strict_parser::Request::summary).collect();
    if received == expected {
        Ok(())
    } else {
        Err(format!("the service received {received:?}, not {expected:?}"))
    }
}

fn front(mode: &str) -> Front {
    let upgrades = json!([{"upgrade_type": "websocket"}, {"upgrade_type": "CONNECT"}]);
    Front::start(
        &[],
        &json!({"upgrade_configs": upgrades}),
        &json!({"desync_mode": mode, "path": "strict"}),
    )
}

const MODES: [&str; 3] = ["monitor", "defensive", "strictest"];

fn run(mode: usize, cases: &[Case]) {
    run_with(front(MODES[mode]), mode, cases);
}

fn run_with(mut front: Front, mode: usize, cases: &[Case]) {
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            check(&front, case, mode).err().map(|reason| format!("{case:?}: {reason}"))
        })
        .collect();
    assert!(
        failures.is_empty(),
        "{} of {} cases:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
    front.assert_healthy();
}

#[test]
fn corpus_has_over_400_distinct_cases_and_every_noncompliance_reason() {
    let cases = cases();
    assert!(cases.len() > 400, "{}", cases.len());
    let mut unique = std::collections::BTreeSet::new();
    let repeated: Vec<_> = cases.iter().filter(|case| !unique.insert(&case.bytes)).collect();
    assert!(repeated.is_empty(), "repeated cases: {repeated:?}");
    let mut reasons: Vec<&str> = cases
        .iter()
        .filter_map(|case| match case.expected {
            Expected::Noncompliant(reason, _) => Some(reason),
            _ => None,
        })
        .collect();
    reasons.sort_unstable();
    reasons.dedup();
    assert_eq!(reasons.len(), 26, "{reasons:?}");
    assert_eq!([recorded_probe("same"), recorded_probe("next")], [SAME, NEXT]);
}

#[test]
fn requests_forwarded_in_monitor_mode_are_strict() {
    run(0, &cases());
}

#[test]
fn requests_forwarded_in_defensive_mode_are_strict() {
    run(1, &cases());
}

#[test]
fn requests_forwarded_in_strictest_mode_are_strict() {
    run(2, &cases());
}

#[test]
fn bytes_after_a_refused_tunnel_are_not_parsed_as_a_request() {
    run(1, &refused_tunnels());
}

#[test]
fn bytes_after_connect_are_not_parsed_as_a_request_where_connect_is_disabled() {
    let front = Front::start(&[], &json!({}), &json!({"path": "strict"}));
    run_with(front, 1, &[tunnel_where_connect_is_disabled()]);
}

#[test]
fn endless_request_line_is_refused_at_its_limit() {
    run(1, &[endless_request_line()]);
}

#[test]
fn forbidden_trailers_are_dropped_and_the_request_is_served() {
    run(1, &forbidden_trailers());
}
