//! Clusters: endpoints, load balancing and connection settings of a service.

use std::time::Duration;

use crate::{DnsDiscovery, EndpointSet, Name, UpstreamTls};

/// The default of `Cluster.connect_timeout`.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A named set of endpoints (`envoy.config.cluster.v3.Cluster`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// The name that routes and TCP proxies refer to.
    pub name: Name,
    /// Where the endpoints come from.
    pub discovery: Discovery,
    /// How an endpoint is chosen.
    pub balance: Balance,
    /// How long a connection attempt may take.
    pub connect_timeout: Duration,
    /// The HTTP version spoken to the endpoints.
    pub protocol: UpstreamProtocol,
    /// TLS settings towards the endpoints; none: plaintext.
    pub tls: Option<UpstreamTls>,
    /// How many connections may be open to the cluster at once (`circuit_breakers.max_connections`).
    pub connection_limit: u32,
    /// How many requests may be open at once (`circuit_breakers.max_requests`).
    pub request_limit: u32,
    /// The most bytes of a response head (status line and headers)
    /// (`HttpProtocolOptions.common_http_protocol_options.max_response_headers_kb`).
    pub response_head_bytes: usize,
    /// The most headers of a response
    /// (`HttpProtocolOptions.common_http_protocol_options.max_headers_count`).
    pub response_header_count: usize,
    /// How long a connection to an endpoint may be idle
    /// (`HttpProtocolOptions.common_http_protocol_options.idle_timeout`).
    pub idle_timeout: Duration,
}

/// The default of `Cluster::response_head_bytes`, the same as Envoy's.
pub const DEFAULT_RESPONSE_HEAD_BYTES: usize = 60 * 1024;
/// The default of `Cluster::response_header_count`. Envoy's 100 are too few for some services, and the size of the
/// headers is limited as well.
pub const DEFAULT_RESPONSE_HEADER_COUNT: usize = 1024;
/// The default of `Cluster::idle_timeout`. It is shorter than the idle timeout of common servers (60 seconds or
/// more), so that the proxy closes first and does not send a request on a connection that is being closed.
pub const DEFAULT_UPSTREAM_IDLE: Duration = Duration::from_secs(50);

/// Where the endpoints of a cluster come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Discovery {
    /// Endpoints listed in the cluster (`STATIC`).
    Static(EndpointSet),
    /// Endpoints from the `ClusterLoadAssignment` of this name (`EDS`).
    Endpoints(Name),
    /// Host names to resolve (`STRICT_DNS`, `LOGICAL_DNS`).
    Dns(DnsDiscovery),
    /// The original destination of the connection (`ORIGINAL_DST`).
    OriginalDestination,
}

/// How an endpoint is chosen (`Cluster.lb_policy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// Weighted round robin.
    RoundRobin,
    /// The endpoint with the fewest open requests, relative to its weight.
    LeastRequests,
    /// By the flow hash, in a Maglev table.
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
    /// HTTP/2, with prior knowledge or ALPN.
    Http2,
    /// The version the client spoke (`use_downstream_protocol_config`).
    AsDownstream,
}
