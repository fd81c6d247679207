//! The control work of a sidecar: from every snapshot a plan, and another when a file of it changes; from
//! every issuer its keys.
//!
//! Keys are fetched beside it: an issuer that is slow holds up neither a change of configuration nor
//! the keys of another.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use tokio::task::JoinSet;
use weft_model::Snapshot;
use weft_runtime::memory;
use weft_runtime::socket::Mark;

use crate::authenticate::fetch::{Wanted, fetch};
use crate::authenticate::key_store::KeyStore;
use crate::plan::{Builder, Plan};

/// How often due key sets, and files that have changed, are looked for.
const TICK: Duration = Duration::from_millis(250);

/// Publishes a plan for every snapshot, and again when keys were fetched or a file changed, until the sender of
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
    let mut under_way: HashSet<String> = HashSet::new();
    let mut fetches = JoinSet::new();
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
            memory::give_back();
        }
        for due in wanted.iter().filter(|wanted| keys.is_due(&wanted.uri, now())) {
            if under_way.insert(due.uri.clone()) {
                keys.began(&due.uri);
                let due = due.clone();
                fetches.spawn(async move {
                    let outcome = fetch(&due, mark).await;
                    (due, outcome)
                });
            }
        }
        stale = tokio::select! {
            changed = snapshots.changed() => match changed {
                Ok(()) => true,
                Err(_) => return,
            },
            Some(Ok((fetched, outcome))) = fetches.join_next() => {
                under_way.remove(&fetched.uri);
                keys.fetched(&fetched.uri, outcome, fetched.cache, now())
            }
            () = tokio::time::sleep(TICK) => builder.is_outdated(unix_time()),
        };
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
