//! Counts and logs the headers that a listener drops because their names contain `_`. Each name is logged once.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use weft_model::Name;

use crate::metrics::SidecarMetrics;

/// The most names that a process logs.
const NAMES_LIMIT: usize = 256;
/// The most bytes of a name that are logged.
const NAME_LIMIT_BYTES: usize = 128;

/// Records the headers that the listener of one connection drops.
#[derive(Debug, Default)]
pub(crate) struct DroppedHeaders {
    metrics: Arc<SidecarMetrics>,
    listener: Name,
}

impl DroppedHeaders {
    pub(crate) fn new(metrics: Arc<SidecarMetrics>, listener: Name) -> Self {
        Self { metrics, listener }
    }

    /// Counts a dropped header, and logs its name unless the process already logged it for this listener.
    pub(crate) fn record(&self, name: &[u8]) {
        self.metrics.headers_dropped.increment();
        let name = name.get(..NAME_LIMIT_BYTES).unwrap_or(name).to_ascii_lowercase();
        // The process-wide lock is taken only once per name and worker.
        let is_known = KNOWN.with_borrow_mut(|known| !known.is_new(&self.listener, &name));
        if is_known {
            return;
        }
        let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_new(&self.listener, &name) {
            let is_last = logged.count == NAMES_LIMIT;
            drop(logged);
            let header = String::from_utf8_lossy(&name);
            tracing::warn!(listener = %self.listener, %header, "header dropped: its name contains an underscore");
            if is_last {
                tracing::warn!(
                    "log limit reached: names of further dropped headers are not logged"
                );
            }
        }
    }

    /// The number of headers that this worker dropped.
    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        self.metrics.headers_dropped.get()
    }
}

/// The logged names by listener.
static LOGGED: Mutex<LoggedNames> = Mutex::new(LoggedNames::new());

thread_local! {
    /// The names that this worker knows to be in [`LOGGED`].
    static KNOWN: RefCell<LoggedNames> = const { RefCell::new(LoggedNames::new()) };
}

/// A bounded set of names by listener.
#[derive(Debug)]
struct LoggedNames {
    names: BTreeMap<Name, BTreeSet<Vec<u8>>>,
    count: usize,
}

impl LoggedNames {
    const fn new() -> Self {
        Self { names: BTreeMap::new(), count: 0 }
    }

    /// Adds a name. Returns whether the name is new and the set was not full.
    fn is_new(&mut self, listener: &Name, name: &[u8]) -> bool {
        let is_known = self.names.get(listener).is_some_and(|names| names.contains(name));
        if is_known || self.count >= NAMES_LIMIT {
            return false;
        }
        self.count += 1;
        self.names.entry(listener.clone()).or_default().insert(name.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_of_logged_names_is_bounded() {
        let mut logged = LoggedNames::new();
        let one: Name = "one".into();
        assert!(logged.is_new(&one, b"x_a"));
        assert!(!logged.is_new(&one, b"x_a"));
        assert!(logged.is_new(&"two".into(), b"x_a"));
        let new = (0..1000).filter(|n| logged.is_new(&one, format!("x_{n}").as_bytes())).count();
        assert_eq!(new, NAMES_LIMIT - 2);
    }
}
