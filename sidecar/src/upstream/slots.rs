//! How many connections may be open to a cluster (`circuit_breakers.max_connections`).
//!
//! The limit counts those of all workers to all endpoints. A worker that has none to an endpoint may open
//! one all the same, as in Envoy: what others hold is of no use to it, and it would wait for ever.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::Notify;

use super::pool::Key;
use crate::plan::Target;

/// What a worker has open.
#[derive(Debug, Default)]
pub(crate) struct Slots(RefCell<HashMap<Key, Rc<Own>>>);

#[derive(Debug, Default)]
struct Own {
    open: Cell<u32>,
    /// Whoever waits is told when one is free again, or closed.
    freed: Notify,
}

/// The right to one connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    own: Rc<Own>,
    all: Arc<AtomicU32>,
}

impl Slots {
    /// The right to one more connection to an endpoint of `target`. None at the limit.
    pub(crate) fn take(&self, target: &Target, address: SocketAddr) -> Option<Slot> {
        let own = self.of((target.id, address));
        let all = target.balancer.connections();
        let within = all.load(Ordering::Relaxed) < target.cluster.connection_limit;
        if !within && own.open.get() > 0 {
            return None;
        }
        own.open.set(own.open.get() + 1);
        all.fetch_add(1, Ordering::Relaxed);
        Some(Slot { own, all: all.clone() })
    }

    /// Resolves when a connection of this worker to the endpoint is free again, or closed.
    pub(crate) async fn freed(&self, key: Key) {
        let own = self.of(key);
        own.freed.notified().await;
    }

    /// Forgets targets that are gone.
    pub(crate) fn sweep(&self, is_current: impl Fn(u64) -> bool) {
        self.0.borrow_mut().retain(|(target, _), own| is_current(*target) || own.open.get() > 0);
    }

    fn of(&self, key: Key) -> Rc<Own> {
        self.0.borrow_mut().entry(key).or_default().clone()
    }
}

impl Slot {
    /// Tells one that waits that the connection may be used again.
    pub(crate) fn free(&self) {
        self.own.freed.notify_one();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.own.open.set(self.own.open.get().saturating_sub(1));
        self.all.fetch_sub(1, Ordering::Relaxed);
        self.own.freed.notify_one();
    }
}
