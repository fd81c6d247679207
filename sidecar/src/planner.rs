//! The sidecar's control loop: builds a plan from each snapshot and again when a file changes, and fetches key sets of token
//! issuers and CRLs of distribution points.
//!
//! Fetches run concurrently: a slow issuer delays neither configuration changes nor the keys of another issuer.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use tokio::task::JoinSet;
use weft_model::{Cluster, DistributionPoint, Secret, SecretSource, Snapshot};
use weft_runtime::clock::{now, wall_clock};
use weft_runtime::memory;
use weft_runtime::problems::Problems;
use weft_runtime::socket::Mark;

use crate::authenticate::fetch::fetch_keys;
use crate::authenticate::key_store::{FetchedKeySet, KeyFetchError, KeyOrigin, KeyStore};
use crate::crl_store::CrlStore;
use crate::fetch::{self, FetchFailure, FetchRequest, FetchResponse};
use crate::plan::SidecarPlan;
use crate::plan::build::{Builder, FetchedData};
use crate::plan::downloads::{CrlDownload, KeySetDownload};

/// The interval at which due fetches and changed files are checked for.
const TICK: Duration = Duration::from_millis(250);

/// The limit for one endpoint to serve a CRL.
const CRL_TIMEOUT: Duration = Duration::from_secs(30);

/// Publishes a plan for each snapshot, and another when keys or CRLs were fetched or a file changed, until the sender of
/// `snapshots` is dropped. Sends what could not be built to `problems`.
pub async fn run(
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    plans: watch::Sender<Arc<SidecarPlan>>,
    problems: watch::Sender<Problems>,
    mark: Option<Mark>,
) {
    let mut builder = Builder::new();
    let mut fetched = FetchStores::default();
    let mut pending = Vec::new();
    let mut in_flight: HashSet<FetchKey> = HashSet::new();
    let mut fetches = JoinSet::new();
    let mut is_outdated = true;
    loop {
        if is_outdated {
            let snapshot = snapshots.borrow_and_update().clone();
            let built = builder.build(&snapshot, fetched.data(), unix_time());
            let is_known =
                |problem: &&String| problems.borrow().all().any(|known| known == *problem);
            for problem in built.problems.all().filter(|problem| !is_known(problem)) {
                tracing::warn!(problem, "configuration problem");
            }
            problems.send_replace(built.problems);
            fetched.crls.settle(&built.crl_sources);
            fetched.keys.retain(&built.key_sets.origins);
            let keys =
                built.key_sets.downloads.into_iter().map(|keys| PendingFetch::Keys(Box::new(keys)));
            pending = keys.chain(built.crl_downloads.into_iter().map(PendingFetch::Crl)).collect();
            plans.send_replace(Arc::new(built.plan));
            memory::trim_heap();
        }
        for due in pending.iter().filter(|due| fetched.is_due(due, now())) {
            if in_flight.insert(due.fetch_key()) {
                fetches.spawn(fetched.begin(due.clone(), mark));
            }
        }
        is_outdated = tokio::select! {
            changed = snapshots.changed() => match changed {
                Ok(()) => true,
                Err(_) => return,
            },
            Some(Ok(outcome)) = fetches.join_next() => {
                in_flight.remove(&outcome.fetch_key());
                fetched.take(outcome, now())
            }
            () = tokio::time::sleep(TICK) => builder.is_outdated(unix_time()),
        };
    }
}

/// Finds the parts of a configuration that would not be served, without fetching anything. TLS settings with a fetched CRL are
/// left out of the check.
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
    let keys = KeyStore::default();
    let crls = CrlStore::default();
    Builder::new()
        .build(&Arc::new(checked), FetchedData { keys: &keys, crls: &crls }, unix_time())
        .problems
}

/// The fetched key sets and CRLs.
#[derive(Default)]
struct FetchStores {
    keys: KeyStore,
    crls: CrlStore,
}

/// Something that is fetched when it is due.
#[derive(Clone)]
enum PendingFetch {
    Keys(Box<KeySetDownload>),
    Crl(CrlDownload),
}

/// The result of a fetch.
enum FetchOutcome {
    Keys(Box<KeySetDownload>, Result<FetchedKeySet, KeyFetchError>),
    Crl(CrlDownload, Result<FetchResponse, FetchFailure>),
}

/// The source of a fetch, which has at most one fetch in flight.
#[derive(PartialEq, Eq, Hash)]
enum FetchKey {
    Keys(KeyOrigin),
    Crl(DistributionPoint),
}

impl PendingFetch {
    fn fetch_key(&self) -> FetchKey {
        match self {
            Self::Keys(download) => FetchKey::Keys(download.origin.clone()),
            Self::Crl(download) => FetchKey::Crl(download.point.clone()),
        }
    }
}

impl FetchOutcome {
    fn fetch_key(&self) -> FetchKey {
        match self {
            Self::Keys(download, _) => FetchKey::Keys(download.origin.clone()),
            Self::Crl(download, _) => FetchKey::Crl(download.point.clone()),
        }
    }
}

impl FetchStores {
    fn data(&self) -> FetchedData<'_> {
        FetchedData { keys: &self.keys, crls: &self.crls }
    }

    fn is_due(&self, due: &PendingFetch, now: Instant) -> bool {
        match due {
            PendingFetch::Keys(download) => {
                self.keys.is_due(&download.origin, |address| download.has_endpoint(address), now)
            }
            PendingFetch::Crl(download) => self.crls.is_due(&download.point, now),
        }
    }

    fn begin(
        &self,
        due: PendingFetch,
        mark: Option<Mark>,
    ) -> Pin<Box<dyn Future<Output = FetchOutcome> + Send + 'static>> {
        match due {
            PendingFetch::Keys(download) => {
                self.keys.began(&download.origin);
                Box::pin(async move {
                    let outcome = fetch_keys(&download, mark).await;
                    FetchOutcome::Keys(download, outcome)
                })
            }
            PendingFetch::Crl(download) => {
                let asked = FetchRequest {
                    uri: download.point.uri.clone(),
                    cluster: download.cluster.clone(),
                    timeout: CRL_TIMEOUT,
                    accept: "application/pkix-crl, */*;q=0.1",
                    limit: download.limit,
                    validators: self.crls.validators(&download.point),
                    redirects: 0,
                };
                Box::pin(async move {
                    let outcome = fetch::fetch(&asked, mark).await;
                    FetchOutcome::Crl(download, outcome)
                })
            }
        }
    }

    /// Stores a fetched result. Returns whether the plan must be built again.
    fn take(&mut self, outcome: FetchOutcome, now: Instant) -> bool {
        match outcome {
            FetchOutcome::Keys(download, outcome) => {
                self.keys.fetched(&download.origin, outcome, download.cache, now)
            }
            FetchOutcome::Crl(download, outcome) => {
                self.crls.fetched(&download.point, outcome, now)
            }
        }
    }
}

/// The wall clock, as rustls takes it.
fn unix_time() -> UnixTime {
    UnixTime::since_unix_epoch(wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default())
}
