//! The cases of the Autobahn suite, run by kosoku: a WebSocket service has the same results through
//! two sidecars with mutual TLS as without them.

use std::collections::BTreeMap;

use weft_integration::port;
use weft_integration::process::{Process, counterpart};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};

/// The number of cases: 247 on framing, UTF-8 and closing, 54 on large and many messages, and 24 on
/// compression (`websocket_cases.py` lists these).
const CASES: usize = 325;

/// A failure of the service itself: it treats a close between two fragments as a broken message.
const FAIL_WITHOUT_MESH: &[&str] = &["7.1.5"];

/// How often the runner is started when a signal ends it: its native code has aborted once, before
/// the first case.
const STARTS: usize = 3;

/// The outcome of each case, by its ID.
fn outcomes(port: u16) -> BTreeMap<String, String> {
    let mut runner = counterpart("websocket_cases.py");
    runner.arg(port.to_string());
    let mut start = |_| runner.output().expect("the runner can be started");
    let ended = (0..STARTS).map(&mut start).find(|output| output.status.code().is_some());
    let output = ended.expect("the runner is not ended by a signal");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{errors}", output.status);
    let printed = String::from_utf8_lossy(&output.stdout);
    let outcome = |line: &str| {
        let (case, outcome) = line.split_once('\t').expect("a line is a case and its outcome");
        (case.to_owned(), outcome.to_owned())
    };
    printed.lines().map(outcome).collect()
}

/// The cases with an outcome that the suite rates as a failure.
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
fn autobahn_results_are_the_same_with_and_without_mesh() {
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
