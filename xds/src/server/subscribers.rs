//! Tracks which clients have acknowledged which version of one resource, so that a CA rotation can wait until every
//! client has the new trust bundle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::ServerSession;
use super::ack_state::AckState;
use crate::translate::ResourceKind;

/// The streams that subscribe to one resource, each with the version that its client has acknowledged.
#[derive(Debug)]
pub struct ResourceSubscribers {
    kind: ResourceKind,
    name: String,
    streams: Mutex<BTreeMap<u64, Subscriber>>,
    next_id: AtomicU64,
}

#[derive(Debug)]
struct Subscriber {
    client: String,
    /// The acknowledged version; none before the first ACK.
    version: Option<String>,
}

/// The entry of one stream in [`ResourceSubscribers`]; removed on drop.
#[derive(Debug)]
pub(super) struct SubscriberHandle {
    subscribers: Arc<ResourceSubscribers>,
    id: u64,
}

impl ResourceSubscribers {
    /// Tracks a resource that has no subscriber yet.
    #[must_use]
    pub fn new(kind: ResourceKind, name: &str) -> Self {
        Self {
            kind,
            name: name.to_owned(),
            streams: Mutex::default(),
            next_id: AtomicU64::default(),
        }
    }

    /// The clients that subscribe to the resource and have not acknowledged this version.
    #[must_use]
    pub fn not_acknowledged(&self, version: &str) -> Vec<String> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let behind = streams.values().filter(|known| known.version.as_deref() != Some(version));
        behind.map(|known| known.client.clone()).collect()
    }

    /// The clients that subscribe to the resource.
    #[must_use]
    pub fn names(&self) -> BTreeSet<String> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.values().map(|known| known.client.clone()).collect()
    }

    /// Adds a stream. It counts as a subscriber once [`SubscriberHandle::update`] finds a subscription.
    pub(super) fn register(self: &Arc<Self>) -> SubscriberHandle {
        SubscriberHandle { subscribers: self.clone(), id: self.next_id.fetch_add(1, Relaxed) }
    }
}

impl SubscriberHandle {
    /// Records what the session knows of its client's acknowledgements.
    pub(super) fn update(&self, client: &str, session: &ServerSession) {
        let ResourceSubscribers { kind, name, streams, .. } = &*self.subscribers;
        let mut streams = streams.lock().unwrap_or_else(PoisonError::into_inner);
        let version = match session.ack_state(*kind, name) {
            AckState::NotSubscribed => {
                streams.remove(&self.id);
                return;
            }
            AckState::Pending => None,
            AckState::Acked(version) => Some(version),
        };
        streams.insert(self.id, Subscriber { client: client.to_owned(), version });
    }
}

impl Drop for SubscriberHandle {
    fn drop(&mut self) {
        let mut streams = self.subscribers.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.remove(&self.id);
    }
}
