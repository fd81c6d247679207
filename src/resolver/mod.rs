//! Host names to addresses, beside everything else: a lookup that gets no answer holds nothing back.
//!
//! `entry` decides what an answer does to what is known of a name, and when it is looked up again;
//! `lookup` asks. Addresses are kept while lookups fail.

mod entry;
mod lookup;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use tokio::task::JoinSet;
use weft_model::DnsQuery;
use weft_xds::client::Answers;

use entry::{Entry, Event};
use lookup::{Found, Lookups};

/// How many names are looked up at once. A lookup without an answer takes 10 s, so this many silent
/// names delay no other one.
const CONCURRENT_LOOKUPS: usize = 128;

/// What lookups failed last, for people: the reason by host name.
pub type Failing = BTreeMap<String, String>;

/// Looks up what is wanted, again and again, until nothing wants it. Publishes the answers, and the
/// names whose last lookup failed.
pub async fn run(
    mut wanted: watch::Receiver<BTreeSet<DnsQuery>>,
    answers: watch::Sender<Arc<Answers>>,
    failing: watch::Sender<Failing>,
) {
    let mut lookups = Lookups::default();
    let mut entries: BTreeMap<DnsQuery, Entry> = BTreeMap::new();
    let mut running: JoinSet<(DnsQuery, Found)> = JoinSet::new();
    loop {
        let now = now();
        let room = CONCURRENT_LOOKUPS.saturating_sub(running.len());
        for query in due(&entries, room, now) {
            if let Some(entry) = entries.get_mut(&query) {
                entry.begin();
                let lookup = lookups.begin(&query);
                running.spawn(async move { (query, lookup.await) });
            }
        }
        let next = entries.values().filter_map(Entry::due).filter(|_| room > 0).min();
        let mut is_new = false;
        tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() {
                    return;
                }
                let queries = wanted.borrow_and_update().clone();
                entries.retain(|query, _| queries.contains(query));
                for query in queries {
                    entries.entry(query).or_insert_with(|| Entry::new(now));
                }
                is_new = true;
            }
            Some(Ok((query, found))) = running.join_next() => {
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

/// The names to look up now, those first that were never answered.
fn due(entries: &BTreeMap<DnsQuery, Entry>, room: usize, now: Instant) -> Vec<DnsQuery> {
    let mut due: Vec<(bool, Instant, &DnsQuery)> = entries
        .iter()
        .filter_map(|(query, entry)| Some((entry.has_answered(), entry.due()?, query)))
        .filter(|(_, at, _)| *at <= now)
        .collect();
    due.sort();
    due.into_iter().take(room).map(|(.., query)| query.clone()).collect()
}

fn publish(
    entries: &BTreeMap<DnsQuery, Entry>,
    answers: &watch::Sender<Arc<Answers>>,
    failing: &watch::Sender<Failing>,
) {
    let known: Answers = entries
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

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
fn now() -> Instant {
    Instant::now()
}
