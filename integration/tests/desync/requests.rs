//! Each request of the corpus in each mode: what the service gets, what the client is told, what is
//! counted, and that whoever comes next gets their own answer.

use serde_json::json;

use crate::client::{Answer, Client};
use crate::corpus::{
    Case, Wanted, cases, forbidden_trailers, slow_to_end, tunnel_where_none_is_served,
    tunnels_turned_down,
};
use crate::front::{Front, probe, told_probe};

/// What a mode does with a request that departs from the standard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allow,
    AllowAndClose,
    Refuse,
}

/// The verdicts of `monitor`, `defensive` and `strictest`, as the documentation has them.
fn verdicts(reason: &str) -> [Verdict; 3] {
    use Verdict::{Allow, AllowAndClose, Refuse};
    match reason {
        "GetHeadZeroContentLength"
        | "NonCompliantHeader"
        | "NonCompliantVersion"
        // Only the connection to the service ends.
        | "UndefinedContentLengthSemantics"
        | "UndefinedTransferEncodingSemantics" => [Allow, Allow, Refuse],
        "SuspiciousHeader" => [Allow, AllowAndClose, Refuse],
        "NonCrLfLineTermination" | "BothTeClPresent" | "DuplicateContentLength" => {
            [AllowAndClose, Refuse, Refuse]
        }
        _ => [Refuse; 3],
    }
}

/// What should be seen of a case in one mode.
#[derive(Debug, Default)]
struct Expected {
    /// What the service is asked, in order.
    told: Vec<&'static str>,
    /// How many of those are answered by it.
    answered: usize,
    /// The status of a last answer that is not a served one.
    status: Option<u16>,
    /// Whether the connection ends.
    ends: bool,
    reason: Option<&'static str>,
}

impl Expected {
    fn of(wanted: &Wanted, mode: usize) -> Self {
        let served = |told: &[&'static str], status, ends| Self {
            told: told.to_vec(),
            answered: told.len(),
            status,
            ends,
            reason: None,
        };
        match wanted {
            Wanted::Served(told) => served(told, None, false),
            Wanted::Last(told) => served(told, None, true),
            Wanted::Refused(told, status) => served(told, Some(*status), true),
            Wanted::RefusedBehind(told, status) => {
                Self { answered: 0, ..served(&[*told], Some(*status), true) }
            }
            Wanted::Declined(status) => served(&[], Some(*status), false),
            Wanted::Closed => served(&[], None, true),
            Wanted::Departs(reason, told) => {
                let expected = match verdicts(reason)[mode] {
                    Verdict::Allow => served(&[*told], None, false),
                    Verdict::AllowAndClose => served(&[*told], None, true),
                    Verdict::Refuse => served(&[], Some(400), true),
                };
                Self { reason: Some(*reason), ..expected }
            }
        }
    }
}

/// What is wrong about a case.
fn check(front: &Front, case: &Case, mode: usize) -> Result<(), String> {
    let expected = Expected::of(&case.wanted, mode);
    // Whatever a broken case before has left.
    drop(front.recorder.take());
    let before = front.departures();
    let mut client = front.client();
    client.send(&case.bytes);
    if case.ends {
        client.finish();
    }
    answers(&mut client, &expected)?;
    let mut told = expected.told.clone();
    if expected.ends {
        let rest = client.rest()?;
        let rest = String::from_utf8_lossy(&rest);
        let is_other = matches!(case.wanted, Wanted::Closed) && !rest.contains("HTTP/1");
        if !rest.is_empty() && !is_other {
            return Err(format!("more came: {rest:?}"));
        }
    } else {
        probe(&mut client, "same")?;
        told.push(SAME);
    }
    probe(&mut front.client(), "next")?;
    told.push(NEXT);
    seen(front, &told)?;
    let mut counted = before;
    if let Some(reason) = expected.reason {
        *counted.entry(reason.to_owned()).or_default() += 1;
    }
    let after = front.departures();
    if counted == after { Ok(()) } else { Err(format!("it counted {after:?}")) }
}

const SAME: &str = "GET /probe/same p";
const NEXT: &str = "GET /probe/next p";

fn answers(client: &mut Client, expected: &Expected) -> Result<(), String> {
    for told in &expected.told[..expected.answered] {
        let is_to_head = told.starts_with("HEAD ");
        let wanted = if is_to_head { "" } else { told };
        match client.answer(is_to_head) {
            Some(Answer { status: 200, body, .. }) if body == wanted => {}
            other => return Err(format!("not served {told:?}, but {other:?}")),
        }
    }
    let Some(wanted) = expected.status else {
        return Ok(());
    };
    match client.answer(false) {
        Some(Answer { status, is_last, .. }) if status == wanted && is_last == expected.ends => {
            Ok(())
        }
        other => Err(format!("not refused with {wanted}, last {}, but {other:?}", expected.ends)),
    }
}

fn seen(front: &Front, told: &[&str]) -> Result<(), String> {
    let seen = front.recorder.take();
    if let Some(violation) = seen.violations.first() {
        return Err(format!("not strict: {violation}"));
    }
    let got: Vec<String> = seen.requests.iter().map(crate::strict::Request::told).collect();
    if got == told { Ok(()) } else { Err(format!("the service got {got:?}, not {told:?}")) }
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
    run_before(front(MODES[mode]), mode, cases);
}

fn run_before(mut front: Front, mode: usize, cases: &[Case]) {
    let broken: Vec<String> = cases
        .iter()
        .filter_map(|case| check(&front, case, mode).err().map(|why| format!("{case:?}: {why}")))
        .collect();
    assert!(broken.is_empty(), "{} of {}:\n{}", broken.len(), cases.len(), broken.join("\n"));
    front.assert_healthy();
}

#[test]
fn there_are_many_cases_of_every_reason() {
    let cases = cases();
    assert!(cases.len() > 400, "{}", cases.len());
    let mut once = std::collections::BTreeSet::new();
    let twice: Vec<_> = cases.iter().filter(|case| !once.insert(&case.bytes)).collect();
    assert!(twice.is_empty(), "they are there twice: {twice:?}");
    let mut reasons: Vec<&str> = cases
        .iter()
        .filter_map(|case| match case.wanted {
            Wanted::Departs(reason, _) => Some(reason),
            _ => None,
        })
        .collect();
    reasons.sort_unstable();
    reasons.dedup();
    assert_eq!(reasons.len(), 26, "{reasons:?}");
    assert_eq!([told_probe("same"), told_probe("next")], [SAME, NEXT]);
}

#[test]
fn whatever_is_let_through_by_monitor_is_strict() {
    run(0, &cases());
}

#[test]
fn whatever_is_let_through_by_defensive_is_strict() {
    run(1, &cases());
}

#[test]
fn whatever_is_let_through_by_strictest_is_strict() {
    run(2, &cases());
}

#[test]
fn nothing_behind_a_tunnel_that_is_turned_down_is_a_request() {
    run(1, &tunnels_turned_down());
}

#[test]
fn nothing_behind_a_tunnel_that_is_never_served_is_a_request() {
    let front = Front::start(&[], &json!({}), &json!({"path": "strict"}));
    run_before(front, 1, &[tunnel_where_none_is_served()]);
}

#[test]
fn a_first_line_above_the_limit_is_refused_at_once() {
    run(1, &[slow_to_end()]);
}

#[test]
fn forbidden_trailers_are_dropped_and_the_request_is_served() {
    run(1, &forbidden_trailers());
}
