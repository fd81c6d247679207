//! The status of the kernel path.

use std::time::Duration;

use weft_model::{Name, Transport};

use super::occupancy::{Occupancy, OccupancyLevel};
use super::service::FlowPath;

/// The status of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceReport {
    /// The listener of the service.
    pub listener: Name,
    /// The transport protocol; `None` for a service that the kernel does not carry.
    pub transport: Option<Transport>,
    /// Which path its flows take.
    pub path: FlowPath,
    /// The number of flows that the kernel has started for the service.
    pub flows: u64,
    /// The number of open flows.
    pub flows_open: u64,
}

/// The status of the kernel path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelPathReport {
    /// All services.
    pub services: Vec<ServiceReport>,
    /// Whether the newest plan is in force, or the kernel has refused it.
    pub settled: bool,
    /// Packets of new flows that security groups have dropped.
    pub blocked: u64,
    /// How often the table had drifted and was repaired.
    pub repairs: u64,
    /// How often the kernel refused a change.
    pub failures: u64,
    /// The number of conntrack entries deleted because their endpoint was removed.
    pub evicted: u64,
    /// How often notifications about ended connections were lost.
    pub records_lost: u64,
    /// How long the last change took.
    pub last_change: Duration,
    /// How full the conntrack table is; `None` where the kernel does not say.
    pub occupancy: Option<Occupancy>,
    /// The level of that occupancy.
    pub level: OccupancyLevel,
}
