//! A cluster: a service's endpoints, and how to choose among and speak to them.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use crate::{DnsDiscovery, Name, UpstreamTls};

/// How long a connection attempt may take when the cluster does not say (`Cluster.connect_timeout`).
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A named set of endpoints (`envoy.config.cluster.v3.Cluster`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// The name routes and proxies use.
    pub name: Name,
    /// Where its endpoints come from.
    pub discovery: Discovery,
    /// How one of them is chosen.
    pub balance: Balance,
    /// How long a connection attempt may take.
    pub connect_timeout: Duration,
    /// The HTTP version spoken to the endpoints.
    pub protocol: UpstreamProtocol,
    /// How TLS to the endpoints is done; plain text without.
    pub tls: Option<UpstreamTls>,
    /// How many connections may be open to the cluster at once (`circuit_breakers.max_connections`).
    pub connection_limit: u32,
    /// How many requests may be open at once (`circuit_breakers.max_requests`).
    pub request_limit: u32,
    /// The most bytes of a response's head
    /// (`HttpProtocolOptions.common_http_protocol_options.max_response_headers_kb`).
    pub response_head_bytes: usize,
    /// The most headers of a response
    /// (`HttpProtocolOptions.common_http_protocol_options.max_headers_count`).
    pub response_header_count: usize,
    /// How long a connection to an endpoint may wait for a request
    /// (`HttpProtocolOptions.common_http_protocol_options.idle_timeout`).
    pub idle_timeout: Duration,
}

/// The most bytes of a response's head when the cluster does not say: Envoy's.
pub const DEFAULT_RESPONSE_HEAD_BYTES: usize = 60 * 1024;
/// The most headers of a response when the cluster does not say. Envoy's 100 are too few for some services,
/// and their size is limited in any case.
pub const DEFAULT_RESPONSE_HEADER_COUNT: usize = 1024;
/// How long a connection may wait when the cluster does not say: shorter than servers commonly do (60
/// seconds and more), so that we close first.
pub const DEFAULT_UPSTREAM_IDLE: Duration = Duration::from_secs(50);

/// Where the endpoints of a cluster come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Discovery {
    /// They stand in the cluster (`STATIC`).
    Static(EndpointSet),
    /// They come as a `ClusterLoadAssignment` of this name (`EDS`).
    Endpoints(Name),
    /// Host names to resolve (`STRICT_DNS`, `LOGICAL_DNS`).
    Dns(DnsDiscovery),
    /// The address that the client aimed at (`ORIGINAL_DST`).
    OriginalDestination,
}

/// How an endpoint is chosen (`Cluster.lb_policy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// In turn, by weight.
    RoundRobin,
    /// The one with the fewest requests open, by weight.
    LeastRequests,
    /// By the hash of the 5-tuple in a Maglev table of this many slots.
    Maglev {
        /// The number of slots: a prime.
        table_size: u32,
    },
}

/// The HTTP version spoken to endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, by prior knowledge or ALPN.
    Http2,
    /// The version the client spoke (`use_downstream_protocol_config`).
    AsDownstream,
}

/// The endpoints of a service at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EndpointSet {
    /// In the order they came; addresses may repeat only by mistake of the source, which is refused earlier.
    pub endpoints: Vec<Endpoint>,
}

/// One address that serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its share of new work, relative to the others'.
    pub weight: NonZeroU32,
    /// Whether it should get work.
    pub health: Health,
}

impl Endpoint {
    /// An endpoint; none when the weight is 0, which means "no share" and is said by leaving it out.
    #[must_use]
    pub fn new(address: SocketAddr, weight: u32, health: Health) -> Option<Self> {
        NonZeroU32::new(weight).map(|weight| Self { address, weight, health })
    }
}

/// What the control plane says of an endpoint (`envoy.config.core.v3.HealthStatus`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Serves.
    Healthy,
    /// Keeps what it has, gets nothing new.
    Draining,
    /// Does not serve.
    Unhealthy,
}

impl Health {
    /// Whether a new flow or request may go there.
    #[must_use]
    pub fn accepts_new_traffic(self) -> bool {
        match self {
            Self::Healthy => true,
            Self::Draining | Self::Unhealthy => false,
        }
    }

    /// Whether what is there may go on.
    #[must_use]
    pub fn keeps_existing_traffic(self) -> bool {
        match self {
            Self::Healthy | Self::Draining => true,
            Self::Unhealthy => false,
        }
    }
}
