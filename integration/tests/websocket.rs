//! The cases of the Autobahn suite, by kosoku: a WebSocket service behaves through two sidecars, with mutual
//! TLS between, as it does without them.

use std::collections::BTreeMap;

use weft_integration::port;
use weft_integration::process::{Process, counterpart};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};

/// How many cases there are: 247 on framing, UTF-8 and closing, 54 on large and many messages, and 24 of
/// those on compression (`websocket_cases.py` says which).
const CASES: usize = 325;

/// What the service gets wrong by itself: it takes a close between two fragments for a broken message.
const FAIL_WITHOUT_MESH: &[&str] = &["7.1.5"];

/// How often the runner is started, when a signal ends it: its native half has aborted once, before a mesh
/// was there, and has then said nothing about any case.
const STARTS: usize = 3;

/// How each case ended, by its id.
fn outcomes(port: u16) -> BTreeMap<String, String> {
    let mut runner = counterpart("websocket_cases.py");
    runner.arg(port.to_string());
    let mut start = |_| runner.output().expect("it can be started");
    let ended = (0..STARTS).map(&mut start).find(|output| output.status.code().is_some());
    let output = ended.expect("it ends by itself");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{errors}", output.status);
    let said = String::from_utf8_lossy(&output.stdout);
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

    let mut pair = SidecarPair::start(&PairConfig::http1(port));
    let through = outcomes(pair.caller.port);
    assert_eq!(through.len(), CASES);
    let differs = |(case, expected): (&String, &String)| {
        let got = through.get(case);
        (got != Some(expected)).then(|| format!("{case}: {expected} directly, {got:?} through"))
    };
    let differing: Vec<String> = direct.iter().filter_map(differs).collect();
    assert!(differing.is_empty(), "{} cases differ:\n{}", differing.len(), differing.join("\n"));
    pair.assert_healthy();
}
