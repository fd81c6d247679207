//! The kernel path: the kernel itself load-balances flows that need no proxy.
//!
//! nf_tables hashes the 5-tuple of a new flow onto the Maglev table of the service, which is a map in the
//! kernel, and translates the destination. conntrack then keeps the flow on its endpoint, without the agent.
//! Hash, seed and table are the same as on the proxy path, so all nodes agree, and `weft flow explain` is
//! exact for both paths.
//!
//! [`service`] decides which services use the kernel path. [`table`] defines the nf_tables table for them,
//! [`table_sets`] its sets, and [`packet_fields`] how it reads packets. [`reconcile`] changes the
//! [`installed`] table to match. [`flows`] finds conntrack entries that have lost their endpoint, and
//! [`occupancy`] watches how full conntrack is. [`KernelReconciler`] is the thread that runs all this. Flows
//! that the kernel path does not carry use the proxy path.

mod flows;
mod installed;
mod occupancy;
mod packet_fields;
mod reconcile;
mod reconciler;
mod report;
mod service;
mod table;
mod table_sets;

use std::io;

pub use occupancy::{Occupancy, OccupancyLevel};
pub use reconciler::{KernelLimits, KernelReconciler};
pub use report::{KernelPathReport, ServiceReport};
pub use service::{FlowPath, NeedsProxy, PathChoice};

/// Removes the table of services in the network namespace of this thread. Established connections stay in conntrack.
/// Removing a table that does not exist is not an error.
///
/// # Errors
/// The error code of the kernel.
pub(crate) fn remove_services() -> io::Result<()> {
    reconcile::KernelTable::open()?.remove()
}
