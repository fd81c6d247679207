//! What there is to tell of the kernel path.

use std::time::Duration;

use weft_model::{Name, Transport};

use super::occupancy::{Occupancy, OccupancyLevel};
use super::service::FlowPath;

/// How it stands with a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceReport {
    /// Its listener.
    pub listener: Name,
    /// Its transport protocol; none of a service that the kernel does not carry.
    pub transport: Option<Transport>,
    /// How its flows are moved.
    pub path: FlowPath,
    /// How many flows the kernel has begun for it.
    pub flows: u64,
    /// How many of them there are.
    pub flows_open: u64,
}

/// What there is to tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelPathReport {
    /// Every service.
    pub services: Vec<ServiceReport>,
    /// Whether the newest plan is in force.
    pub settled: bool,
    /// Packets of new flows that security groups did not let in.
    pub blocked: u64,
    /// How often the table was another than it should have been.
    pub repairs: u64,
    /// How often the kernel refused.
    pub failures: u64,
    /// How many flows were let go because their endpoint was gone.
    pub evicted: u64,
    /// How often the kernel told of more ends of connections than were taken in.
    pub records_lost: u64,
    /// How long the last change took.
    pub last_change: Duration,
    /// How full the kernel's table of connections is, where it tells.
    pub occupancy: Option<Occupancy>,
    /// What that means.
    pub level: OccupancyLevel,
}
