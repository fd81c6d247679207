//! How many connections may be open to a cluster (`circuit_breakers.max_connections`).
//!
//! The limit counts those of all workers to all endpoints. A worker that has none to an endpoint may open
//! one all the same, as in Envoy: what others hold is of no use to it, and it would wait for ever.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::Notify;

use crate::plan::PlannedCluster;

/// What a worker has open, by the number of the target.
#[derive(Debug, Default)]
pub(crate) struct Slots(RefCell<HashMap<u64, Rc<TargetSlots>>>);

#[derive(Debug, Default)]
struct TargetSlots {
    /// How many to each endpoint; none where there are none.
    open: RefCell<HashMap<SocketAddr, u32>>,
    /// Whoever waits is told when one may be used again, or was closed.
    freed: Notify,
}

/// The right to one connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    own: Rc<TargetSlots>,
    address: SocketAddr,
    all: Arc<AtomicU32>,
}

impl Slots {
    /// The right to one more connection to an endpoint of `target`. None at the limit.
    pub(crate) fn take(&self, target: &PlannedCluster, address: SocketAddr) -> Option<Slot> {
        let own = self.of(target);
        let all = target.balancer.connections();
        let mut open = own.open.borrow_mut();
        let limit =
            if open.contains_key(&address) { target.cluster.connection_limit } else { u32::MAX };
        let one_more = |all: u32| if all < limit { Some(all + 1) } else { None };
        all.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        *open.entry(address).or_default() += 1;
        drop(open);
        Some(Slot { own, address, all: all.clone() })
    }

    /// Resolves when a connection of this worker to the target may be used again, or was closed.
    pub(crate) async fn freed(&self, target: &PlannedCluster) {
        let own = self.of(target);
        own.freed.notified().await;
    }

    /// Forgets targets to which nothing is open and for which nobody waits.
    pub(crate) fn sweep(&self) {
        self.0.borrow_mut().retain(|_, own| Rc::strong_count(own) > 1);
    }

    fn of(&self, target: &PlannedCluster) -> Rc<TargetSlots> {
        self.0.borrow_mut().entry(target.id).or_default().clone()
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
        let mut open = self.own.open.borrow_mut();
        if let Some(count) = open.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.address);
            }
        }
        drop(open);
        self.all.fetch_sub(1, Ordering::Relaxed);
        self.own.freed.notify_one();
    }
}
