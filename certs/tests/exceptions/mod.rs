//! Compares the results of an external test suite with its expectations, except for an exact list of exceptions in a
//! file beside the test.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// The result for a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accepted,
    Refused,
}

/// The expected and the actual result of a case.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) id: String,
    pub(crate) wanted: Verdict,
    pub(crate) ours: Verdict,
    /// The reason for the rejection.
    pub(crate) cause: String,
}

impl Outcome {
    pub(crate) fn new(id: String, wanted: Verdict, ours: Result<(), String>) -> Self {
        let (ours, cause) = match ours {
            Ok(()) => (Verdict::Accepted, String::new()),
            Err(cause) => (Verdict::Refused, cause),
        };
        Self { id, wanted, ours, cause }
    }
}

/// The exceptions of a file: each line is `id | accepted or refused | reason`. Empty lines and lines that begin with
/// `#` are comments.
pub(crate) struct Exceptions(BTreeMap<&'static str, Verdict>);

impl Exceptions {
    pub(crate) fn read(file: &'static str) -> Self {
        let mut found = BTreeMap::new();
        for line in file.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let [id, ours, reason] = line.split(" | ").collect::<Vec<_>>()[..] else {
                panic!("{line:?} is not `id | ours | reason`");
            };
            let ours = match ours {
                "accepted" => Verdict::Accepted,
                "refused" => Verdict::Refused,
                other => panic!("{line:?}: {other:?} is neither accepted nor refused"),
            };
            assert!(reason.len() > 20, "{line:?} gives no reason");
            assert!(found.insert(id, ours).is_none(), "duplicate exception {id}");
        }
        Self(found)
    }

    /// Asserts that each result is as expected or matches an exception, and that each exception of the tested cases
    /// still occurs.
    pub(crate) fn hold(&self, outcomes: &[Outcome]) {
        let mut faults = String::new();
        for Outcome { id, wanted, ours, cause } in outcomes {
            match self.0.get(id.as_str()) {
                None if wanted == ours => {}
                Some(listed) if listed == ours && wanted != ours => {}
                None => writeln!(faults, "{id}: {ours:?}, not {wanted:?}; {cause}").unwrap(),
                Some(_) if wanted == ours => {
                    writeln!(
                        faults,
                        "{id}: {ours:?} as the suite expects, so the exception is not needed"
                    )
                    .unwrap();
                }
                Some(listed) => {
                    writeln!(faults, "{id}: {ours:?}, listed as {listed:?}; {cause}").unwrap();
                }
            }
        }
        let ids: BTreeSet<_> = outcomes.iter().map(|outcome| outcome.id.as_str()).collect();
        assert_eq!(ids.len(), outcomes.len(), "two cases have one id");
        assert!(faults.is_empty(), "{} faults:\n{faults}", faults.lines().count());
    }
}
