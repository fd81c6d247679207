//! The cases of the Autobahn suite, by kosoku: a WebSocket service behaves through two sidecars, with mutual
//! TLS between, as it does without them.

use std::collections::BTreeMap;

use weft_integration::pair::{Pair, Wanted};
use weft_integration::port;
use weft_integration::process::{Process, counterpart, run};

/// How many cases there are: 247 on framing, UTF-8 and closing, 54 on large and many messages, and 24 of
/// those on compression (`websocket_cases.py` says which).
const CASES: usize = 325;

/// What the service gets wrong by itself: it takes a close between two fragments for a broken message.
const FAIL_WITHOUT_MESH: &[&str] = &["7.1.5"];

/// How each case ended, by its id.
fn outcomes(port: u16) -> BTreeMap<String, String> {
    let said = run(counterpart("websocket_cases.py").arg(port.to_string()));
    let outcome = |line: &str| {
        let (case, outcome) = line.split_once('\t').expect("a line is a case and its outcome");
        (case.to_owned(), outcome.to_owned())
    };
    said.lines().map(outcome).collect()
}

/// The cases that ended as none should that stands in a mesh by itself.
fn failed(outcomes: &BTreeMap<String, String>) -> Vec<&str> {
    let fails = |outcome: &str| {
        let verdicts = outcome.split(", ").take(2);
        verdicts
            .into_iter()
            .any(|verdict| !["OK", "OK or NON-STRICT", "INFORMATIONAL"].contains(&verdict))
    };
    outcomes.iter().filter(|(_, outcome)| fails(outcome)).map(|(case, _)| case.as_str()).collect()
}

#[test]
fn every_websocket_case_ends_through_the_mesh_as_it_does_without() {
    let port = port::free();
    let service = Process::start(
        "websocket_service.py",
        counterpart("websocket_service.py").arg(port.to_string()),
    );
    service.line_with("ready");
    let direct = outcomes(port);
    assert_eq!(direct.len(), CASES);
    assert_eq!(failed(&direct), FAIL_WITHOUT_MESH, "without a mesh");

    let mut pair = Pair::start(&Wanted::http1(port));
    let through = outcomes(pair.caller.port);
    assert_eq!(through.len(), CASES);
    let differs = |(case, expected): (&String, &String)| {
        let got = through.get(case);
        (got != Some(expected)).then(|| format!("{case}: {expected} directly, {got:?} through"))
    };
    let differing: Vec<String> = direct.iter().filter_map(differs).collect();
    assert!(differing.is_empty(), "{} cases differ:\n{}", differing.len(), differing.join("\n"));
    pair.assert_unharmed();
}
