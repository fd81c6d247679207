//! The kernel path: the kernel itself load-balances flows that need no proxy.
//!
//! nf_tables hashes the 5-tuple of a new flow onto the Maglev table of the service, which is a map in the
//! kernel, and translates the destination. conntrack then keeps the flow on its endpoint, without the agent.
//! Hash, seed and table are the same as on the proxy path, so all nodes agree, and `weft flow explain` is
//! exact for both paths.
//!
//! [`service`] decides which services use the kernel path. [`desired`] says what the nf_tables table is to
//! contain, [`table`] defines its chains, [`table_sets`] its sets, and [`packet_fields`] how it reads packets.
//! [`reconcile`] changes the [`installed`] table to match. [`flows`] finds conntrack entries that have lost
//! their endpoint, and [`occupancy`] watches how full conntrack is. [`KernelReconciler`] is the thread that runs
//! all this, and [`kernel_access`] what it needs of the kernel. Flows that the kernel path does not carry use the
//! proxy path.

mod desired;
mod ended_flow;
mod flows;
mod installed;
mod kernel_access;
mod occupancy;
mod packet_fields;
mod reconcile;
mod reconciler;
mod report;
mod service;
mod table;
mod table_sets;

pub use occupancy::{Occupancy, OccupancyLevel};
pub use reconciler::{KernelLimits, KernelReconciler};
pub use report::{KernelPathReport, ServiceReport};
pub use service::{FlowPath, NeedsProxy, PathChoice};

use crate::redirect::{Namespace, RedirectError, has_nf_tables, in_namespace, kernel_error};
use reconcile::KernelTable;

/// Removes the table of services in a network namespace. Established connections stay in conntrack. Removing a table
/// that does not exist is not an error.
///
/// # Errors
/// When the namespace cannot be entered, or the error of the kernel.
pub fn remove_services(namespace: &Namespace) -> Result<(), RedirectError> {
    in_namespace(namespace, || {
        if !has_nf_tables() {
            // The table cannot exist.
            return Ok(());
        }
        KernelTable::open()
            .and_then(|mut table| table.remove())
            .map_err(kernel_error("removing the services"))
    })
}
