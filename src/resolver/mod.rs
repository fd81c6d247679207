//! Asynchronous DNS resolution. A lookup without an answer delays nothing else.
//!
//! `entry` holds the state of a host name and schedules lookups; `lookup` queries DNS servers. The last addresses stay in
//! use while lookups fail.

mod entry;
mod lookup;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;
use weft_runtime::clock::now;

use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};
use weft_model::DnsQuery;
use weft_xds::client::DnsAnswers;

use entry::{Event, HostEntry};
use lookup::{LookupResult, Lookups};

/// The maximum number of concurrent lookups. A lookup without an answer takes 10 s; this many of them delay no others.
const CONCURRENT_LOOKUPS: usize = 128;

/// The error of the last lookup, by host name.
pub type FailedLookups = BTreeMap<String, String>;

/// Resolves the wanted names periodically. Publishes the addresses, and the names whose last lookup failed.
pub async fn run(
    mut wanted: watch::Receiver<BTreeSet<DnsQuery>>,
    answers: watch::Sender<Arc<DnsAnswers>>,
    failing: watch::Sender<FailedLookups>,
) {
    let mut lookups = Lookups::default();
    let mut entries: BTreeMap<DnsQuery, HostEntry> = BTreeMap::new();
    let mut running = RunningLookups::default();
    loop {
        let now = now();
        let room = CONCURRENT_LOOKUPS.saturating_sub(running.tasks.len());
        for query in due(&entries, room, now) {
            if let Some(entry) = entries.get_mut(&query) {
                entry.begin();
                let lookup = lookups.begin(&query);
                running.begin(query, lookup);
            }
        }
        let next = entries.values().filter_map(HostEntry::due).filter(|_| room > 0).min();
        let mut is_new = false;
        tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() {
                    return;
                }
                let queries = wanted.borrow_and_update().clone();
                entries.retain(|query, _| queries.contains(query));
                for query in queries {
                    entries.entry(query).or_insert_with(|| HostEntry::new(now));
                }
                is_new = true;
            }
            Some((query, found)) = running.next() => {
                if let Some(entry) = entries.get_mut(&query) {
                    let event = entry.take(found, &query.policy, self::now(), fastrand::f64());
                    log(&query.name, &event);
                    is_new = event != Event::Same;
                }
            }
            () = sleep_until(next) => {}
        }
        if is_new {
            publish(&entries, &answers, &failing);
        }
    }
}

/// The running lookups.
#[derive(Default)]
struct RunningLookups {
    tasks: JoinSet<LookupResult>,
    queries: HashMap<Id, DnsQuery>,
}

impl RunningLookups {
    fn begin(
        &mut self,
        query: DnsQuery,
        lookup: impl Future<Output = LookupResult> + Send + 'static,
    ) {
        let task = self.tasks.spawn(lookup);
        self.queries.insert(task.id(), query);
    }

    /// Waits for the next result; none without running lookups. A lookup that panics counts as failed and is retried.
    async fn next(&mut self) -> Option<(DnsQuery, LookupResult)> {
        let ended = self.tasks.join_next_with_id().await?;
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let query = self.queries.remove(&id)?;
        let found = ended.map(|(_, found)| found).unwrap_or_else(|error| {
            tracing::error!(host = query.name, %error, "DNS lookup ended unexpectedly");
            lookup::failed(query.policy.family, "the lookup ended unexpectedly")
        });
        Some((query, found))
    }
}

/// The names that are due; names without a result come first.
fn due(entries: &BTreeMap<DnsQuery, HostEntry>, room: usize, now: Instant) -> Vec<DnsQuery> {
    let mut due: Vec<(bool, Instant, &DnsQuery)> = entries
        .iter()
        .filter_map(|(query, entry)| Some((entry.has_answered(), entry.due()?, query)))
        .filter(|(_, at, _)| *at <= now)
        .collect();
    due.sort();
    due.into_iter().take(room).map(|(.., query)| query.clone()).collect()
}

fn publish(
    entries: &BTreeMap<DnsQuery, HostEntry>,
    answers: &watch::Sender<Arc<DnsAnswers>>,
    failing: &watch::Sender<FailedLookups>,
) {
    let known: DnsAnswers = entries
        .iter()
        .filter(|(_, entry)| entry.has_answered())
        .map(|(query, entry)| (query.clone(), entry.addresses(query.policy.family)))
        .collect();
    answers.send_if_modified(|last| {
        let changed = **last != known;
        *last = Arc::new(known);
        changed
    });
    let failed = entries
        .iter()
        .filter_map(|(query, entry)| Some((query.name.clone(), entry.last_error()?.to_owned())));
    failing.send_replace(failed.collect());
}

fn log(host: &str, event: &Event) {
    match event {
        Event::Same => {}
        Event::Changed { addresses } => tracing::info!(host, addresses, "host name resolved"),
        Event::Failed { error, kept: 0 } => {
            tracing::warn!(host, error, "DNS lookup failed, no addresses known");
        }
        Event::Failed { error, kept } => {
            tracing::warn!(host, error, kept, "DNS lookup failed, last addresses stay in use");
        }
        Event::Absent => tracing::warn!(host, "host name does not exist or has no addresses"),
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entry::FamilyAnswer;
    use weft_model::DnsPolicy;

    #[tokio::test]
    async fn lookup_that_panics_counts_as_failed() {
        let query = DnsQuery { name: "web.test".into(), policy: DnsPolicy::default() };
        let mut running = RunningLookups::default();
        running.begin(query.clone(), async { panic!("a mistake in a lookup") });
        let (ended, found) = running.next().await.expect("one lookup is under way");
        assert_eq!(ended, query);
        assert!(matches!(found.v4, FamilyAnswer::Failed(_)), "{found:?}");
        assert!(running.next().await.is_none() && running.queries.is_empty());
    }
}
