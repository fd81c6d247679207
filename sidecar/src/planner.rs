//! The control work of a sidecar: from every snapshot a plan, from every issuer its keys.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use weft_model::Snapshot;
use weft_runtime::socket::Mark;

use crate::authenticate::fetch::{Wanted, fetch};
use crate::authenticate::keys::KeyStore;
use crate::plan::{Builder, Plan};

/// How often due key sets are looked for.
const TICK: Duration = Duration::from_millis(500);

/// Publishes a plan for every snapshot, and again when keys were fetched, until the sender of
/// snapshots is gone. `problems` gets what could not be built.
pub async fn run(
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    plans: watch::Sender<Arc<Plan>>,
    problems: watch::Sender<Vec<String>>,
    mark: Option<Mark>,
) {
    let mut builder = Builder::new();
    let mut keys = KeyStore::new();
    let mut wanted: Vec<Wanted> = Vec::new();
    let mut stale = true;
    loop {
        if stale {
            let snapshot = snapshots.borrow_and_update().clone();
            let built = builder.build(&snapshot, &keys, unix_time());
            for problem in &built.problems {
                tracing::warn!(problem, "a part of the configuration is not served");
            }
            problems.send_replace(built.problems);
            wanted = built.key_sets;
            plans.send_replace(Arc::new(built.plan));
        }
        stale = false;
        let due: Vec<&Wanted> = wanted.iter().filter(|w| keys.is_due(&w.uri, now())).collect();
        let mut outcomes = Vec::new();
        for wanted in due {
            outcomes.push((wanted.clone(), fetch(wanted, mark).await));
        }
        for (wanted, outcome) in outcomes {
            stale |= keys.fetched(&wanted.uri, outcome, wanted.cache, now());
        }
        if stale {
            continue;
        }
        tokio::select! {
            changed = snapshots.changed() => match changed {
                Ok(()) => stale = true,
                Err(_) => return,
            },
            () = tokio::time::sleep(TICK), if !wanted.is_empty() => {}
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
fn now() -> Instant {
    Instant::now()
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
fn unix_time() -> UnixTime {
    UnixTime::since_unix_epoch(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}
