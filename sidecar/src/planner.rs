//! The control work of a sidecar: from every snapshot a plan, and another when a file of it changes; from
//! every issuer its keys, from every distribution point its list.
//!
//! Those are fetched beside it: an issuer that is slow holds up neither a change of configuration nor
//! the keys of another.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use tokio::task::JoinSet;
use weft_model::{Cluster, DistributionPoint, Secret, SecretSource, Snapshot};
use weft_runtime::memory;
use weft_runtime::problems::Problems;
use weft_runtime::socket::Mark;

use crate::authenticate::fetch::{KeySetDownload, fetch_keys};
use crate::authenticate::key_store::{FetchedKeySet, KeyFetchError, KeyOrigin, KeyStore};
use crate::crl_store::CrlStore;
use crate::fetch::{self, FetchFailure, FetchRequest, FetchResponse};
use crate::plan::{Builder, CrlDownload, SidecarPlan};

/// How often due key sets, and files that have changed, are looked for.
const TICK: Duration = Duration::from_millis(250);

/// How long one endpoint may take for a list.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);

/// Publishes a plan for every snapshot, and again when keys were fetched or a file changed, until the sender of
/// snapshots is gone. `problems` gets what could not be built.
pub async fn run(
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    plans: watch::Sender<Arc<SidecarPlan>>,
    problems: watch::Sender<Problems>,
    mark: Option<Mark>,
) {
    let mut builder = Builder::new();
    let mut fetched = FetchStores::default();
    let mut wanted = Vec::new();
    let mut under_way: HashSet<FetchKey> = HashSet::new();
    let mut fetches = JoinSet::new();
    let mut stale = true;
    loop {
        if stale {
            let snapshot = snapshots.borrow_and_update().clone();
            let built = builder.build(&snapshot, (&fetched.keys, &fetched.lists), unix_time());
            let is_known =
                |problem: &&String| problems.borrow().all().any(|known| known == *problem);
            for problem in built.problems.all().filter(|problem| !is_known(problem)) {
                tracing::warn!(problem, "configuration problem");
            }
            problems.send_replace(built.problems);
            fetched.lists.settle(&built.crl_sources);
            fetched.keys.retain(&built.key_origins);
            let keys = built.key_sets.into_iter().map(|keys| PendingFetch::Keys(Box::new(keys)));
            wanted = keys.chain(built.lists.into_iter().map(PendingFetch::List)).collect();
            plans.send_replace(Arc::new(built.plan));
            memory::trim_heap();
        }
        for due in wanted.iter().filter(|due| fetched.is_due(due, now())) {
            if under_way.insert(due.place()) {
                fetches.spawn(fetched.begin(due.clone(), mark));
            }
        }
        stale = tokio::select! {
            changed = snapshots.changed() => match changed {
                Ok(()) => true,
                Err(_) => return,
            },
            Some(Ok(outcome)) = fetches.join_next() => {
                under_way.remove(&outcome.place());
                fetched.take(outcome, now())
            }
            () = tokio::time::sleep(TICK) => builder.is_outdated(unix_time()),
        };
    }
}

/// What of a configuration would not be served, without fetching anything: what waits for a revocation
/// list from elsewhere is left out.
#[must_use]
pub fn check(snapshot: &Snapshot) -> Problems {
    let fetches = |source: &SecretSource| match snapshot.secret(source).map(Arc::as_ref) {
        Some(Secret::Validation(validation)) => !validation.points.is_empty(),
        Some(Secret::Identity(_)) | None => false,
    };
    let mut checked = snapshot.clone();
    checked.listeners.retain(|_, listener| {
        let tls = listener.all_chains().filter_map(|chain| chain.tls.as_ref());
        !tls.filter_map(|tls| tls.client_certificates.validation()).any(fetches)
    });
    for cluster in checked.clusters.values_mut() {
        if cluster.tls.as_ref().is_some_and(|tls| tls.validation.as_ref().is_some_and(fetches)) {
            *cluster = Arc::new(Cluster { tls: None, ..(**cluster).clone() });
        }
    }
    let (keys, lists) = (KeyStore::default(), CrlStore::default());
    Builder::new().build(&Arc::new(checked), (&keys, &lists), unix_time()).problems
}

/// What was fetched.
#[derive(Default)]
struct FetchStores {
    keys: KeyStore,
    lists: CrlStore,
}

/// What may be due.
#[derive(Clone)]
enum PendingFetch {
    Keys(Box<KeySetDownload>),
    List(CrlDownload),
}

/// What came of it.
enum FetchOutcome {
    Keys(Box<KeySetDownload>, Result<FetchedKeySet, KeyFetchError>),
    List(CrlDownload, Result<FetchResponse, FetchFailure>),
}

/// Where something is fetched: not twice at once.
#[derive(PartialEq, Eq, Hash)]
enum FetchKey {
    Keys(KeyOrigin),
    List(DistributionPoint),
}

impl PendingFetch {
    fn place(&self) -> FetchKey {
        match self {
            Self::Keys(wanted) => FetchKey::Keys(wanted.origin.clone()),
            Self::List(wanted) => FetchKey::List(wanted.point.clone()),
        }
    }
}

impl FetchOutcome {
    fn place(&self) -> FetchKey {
        match self {
            Self::Keys(wanted, _) => FetchKey::Keys(wanted.origin.clone()),
            Self::List(wanted, _) => FetchKey::List(wanted.point.clone()),
        }
    }
}

impl FetchStores {
    fn is_due(&self, due: &PendingFetch, now: Instant) -> bool {
        match due {
            PendingFetch::Keys(wanted) => {
                self.keys.is_due(&wanted.origin, |address| wanted.has_endpoint(address), now)
            }
            PendingFetch::List(wanted) => self.lists.is_due(&wanted.point, now),
        }
    }

    fn begin(
        &self,
        due: PendingFetch,
        mark: Option<Mark>,
    ) -> Pin<Box<dyn Future<Output = FetchOutcome> + Send + 'static>> {
        match due {
            PendingFetch::Keys(wanted) => {
                self.keys.began(&wanted.origin);
                Box::pin(async move {
                    let outcome = fetch_keys(&wanted, mark).await;
                    FetchOutcome::Keys(wanted, outcome)
                })
            }
            PendingFetch::List(wanted) => {
                let asked = FetchRequest {
                    uri: wanted.point.uri.clone(),
                    target: wanted.target.clone(),
                    timeout: LIST_TIMEOUT,
                    accept: "application/pkix-crl, */*;q=0.1",
                    limit: wanted.limit,
                    held: self.lists.validators(&wanted.point),
                    redirects: 0,
                };
                Box::pin(async move {
                    let outcome = fetch::fetch(&asked, mark).await;
                    FetchOutcome::List(wanted, outcome)
                })
            }
        }
    }

    /// Takes what came; whether the plan would be another.
    fn take(&mut self, outcome: FetchOutcome, now: Instant) -> bool {
        match outcome {
            FetchOutcome::Keys(wanted, outcome) => {
                self.keys.fetched(&wanted.origin, outcome, wanted.cache, now)
            }
            FetchOutcome::List(wanted, outcome) => self.lists.fetched(&wanted.point, outcome, now),
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
