//! The kernel path: flows to services at the kernel's own cost.
//!
//! nf_tables hashes a new flow's 5-tuple onto the service's Maglev table, which is a map in the
//! kernel, and changes its destination; conntrack keeps the flow there while it lives, and we are not
//! asked again. It is the same hash, seed and table as on the proxy path, so every node agrees and
//! `weft flow explain` is exact for both.
//!
//! [`service`] decides which services can go this way, [`table`] what that comes to in the kernel's
//! words ([`index`] its sets, [`field`] the fields of packets), [`reconcile`] makes it so, whatever was
//! [`installed`] there before, and [`flows`] which of the kernel's connections have lost their endpoint;
//! [`occupancy`] how many more the kernel may hold. [`KernelReconciler`] does it for as long as it runs. What the
//! kernel does not carry, the proxy path does.

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

/// Removes what an agent told the kernel of services, in the network namespace of this thread.
/// Established connections are then the hosts' own matter. Removing nothing is no mistake.
///
/// # Errors
/// The kernel's.
pub(crate) fn remove_services() -> io::Result<()> {
    reconcile::KernelTable::open()?.remove()
}
