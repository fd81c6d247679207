//! Enforces the limit of connections to a cluster (`circuit_breakers.max_connections`).
//!
//! The limit applies to the connections of all workers to all endpoints of the cluster. A worker without a connection
//! to an endpoint may exceed it by one, as in Envoy: it cannot use connections of other workers, and would wait without
//! end.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::Notify;

use crate::plan::PlannedCluster;

/// The connections of a worker, by the ID of the cluster.
#[derive(Debug, Default)]
pub(crate) struct Slots(RefCell<HashMap<u64, Rc<ClusterSlots>>>);

#[derive(Debug, Default)]
struct ClusterSlots {
    /// The number of connections to each endpoint, without zeros.
    open: RefCell<HashMap<SocketAddr, u32>>,
    /// Notified when a connection becomes idle or is closed.
    freed: Notify,
}

/// The permission to have one connection open. Released when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    cluster: Rc<ClusterSlots>,
    address: SocketAddr,
    /// The connections of all workers to the cluster.
    total: Arc<AtomicU32>,
}

impl Slots {
    /// Permission for one more connection to an endpoint of `cluster`. None at the limit.
    pub(crate) fn take(&self, cluster: &PlannedCluster, address: SocketAddr) -> Option<Slot> {
        let slots = self.of(cluster);
        let total = cluster.balancer.connections();
        let mut open = slots.open.borrow_mut();
        let limit =
            if open.contains_key(&address) { cluster.settings.connection_limit } else { u32::MAX };
        let one_more = |total: u32| if total < limit { Some(total + 1) } else { None };
        total.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        *open.entry(address).or_default() += 1;
        drop(open);
        Some(Slot { cluster: slots, address, total: total.clone() })
    }

    /// Resolves when a connection of this worker to the cluster becomes idle or is closed.
    pub(crate) async fn freed(&self, cluster: &PlannedCluster) {
        let slots = self.of(cluster);
        slots.freed.notified().await;
    }

    /// Removes clusters without connections and waiters.
    pub(crate) fn sweep(&self) {
        self.0.borrow_mut().retain(|_, slots| Rc::strong_count(slots) > 1);
    }

    fn of(&self, cluster: &PlannedCluster) -> Rc<ClusterSlots> {
        self.0.borrow_mut().entry(cluster.id).or_default().clone()
    }
}

impl Slot {
    /// Notifies one waiter that the connection is idle.
    pub(crate) fn notify_idle(&self) {
        self.cluster.freed.notify_one();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = self.cluster.open.borrow_mut();
        if let Some(count) = open.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.address);
            }
        }
        drop(open);
        self.total.fetch_sub(1, Ordering::Relaxed);
        self.cluster.freed.notify_one();
    }
}
