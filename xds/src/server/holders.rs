//! Which clients have taken which version of a resource that all must have before anything else may happen.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::ServerSession;
use crate::translate::Kind;

/// The clients of a server that ask for one resource, and what they have taken of it.
#[derive(Debug)]
pub struct Holders {
    kind: Kind,
    name: String,
    streams: Mutex<BTreeMap<u64, Holder>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Holder {
    who: String,
    version: Option<String>,
}

/// What a client has said of a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// It does not ask for it.
    NotAsked,
    /// It has not taken what it was sent, or was sent nothing.
    NotYet,
    /// It has taken this version.
    Version(String),
}

/// A stream's place among them.
#[derive(Debug)]
pub(super) struct Place {
    holders: Arc<Holders>,
    id: u64,
}

impl Holders {
    /// Of a resource that nobody has yet.
    #[must_use]
    pub fn new(kind: Kind, name: &str) -> Self {
        Self { kind, name: name.to_owned(), streams: Mutex::default(), next: AtomicU64::default() }
    }

    /// Who asks for it and has not taken this version.
    #[must_use]
    pub fn without(&self, version: &str) -> Vec<String> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let behind = streams.values().filter(|held| held.version.as_deref() != Some(version));
        behind.map(|held| held.who.clone()).collect()
    }

    /// The clients that ask for it.
    #[must_use]
    pub fn names(&self) -> BTreeSet<String> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.values().map(|held| held.who.clone()).collect()
    }

    pub(super) fn enter(self: &Arc<Self>) -> Place {
        Place { holders: self.clone(), id: self.next.fetch_add(1, Relaxed) }
    }
}

impl Place {
    /// Notes how it stands with a stream.
    pub(super) fn note(&self, who: &str, session: &ServerSession) {
        let Holders { kind, name, streams, .. } = &*self.holders;
        let mut streams = streams.lock().unwrap_or_else(PoisonError::into_inner);
        let version = match session.taken(*kind, name) {
            Taken::NotAsked => {
                streams.remove(&self.id);
                return;
            }
            Taken::NotYet => None,
            Taken::Version(version) => Some(version),
        };
        streams.insert(self.id, Holder { who: who.to_owned(), version });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut streams = self.holders.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.remove(&self.id);
    }
}
