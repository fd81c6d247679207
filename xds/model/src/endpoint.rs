//! Endpoints: the addresses of a cluster, with their shares of the traffic and their health.

use std::net::SocketAddr;
use std::num::NonZeroU32;

/// The endpoints of a service at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EndpointSet {
    /// In the order received. Translation refuses duplicate addresses.
    pub endpoints: Vec<Endpoint>,
}

/// One address of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The address and port.
    pub address: SocketAddr,
    /// The share of new traffic, relative to the other endpoints' weights.
    pub weight: NonZeroU32,
    /// The health reported by the control plane.
    pub health: Health,
}

impl Endpoint {
    /// An endpoint; none when the weight is 0: an endpoint without a share is left out of the set.
    #[must_use]
    pub fn new(address: SocketAddr, weight: u32, health: Health) -> Option<Self> {
        NonZeroU32::new(weight).map(|weight| Self { address, weight, health })
    }
}

/// The health of an endpoint, as reported by the control plane (`envoy.config.core.v3.HealthStatus`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Gets new traffic.
    Healthy,
    /// Keeps existing flows and requests, gets no new ones.
    Draining,
    /// Gets no traffic; existing flows are closed.
    Unhealthy,
}

impl Health {
    /// Whether a new flow or request may be sent to the endpoint.
    #[must_use]
    pub fn accepts_new_traffic(self) -> bool {
        match self {
            Self::Healthy => true,
            Self::Draining | Self::Unhealthy => false,
        }
    }

    /// Whether existing flows and requests may continue.
    #[must_use]
    pub fn keeps_existing_traffic(self) -> bool {
        match self {
            Self::Healthy | Self::Draining => true,
            Self::Unhealthy => false,
        }
    }
}
