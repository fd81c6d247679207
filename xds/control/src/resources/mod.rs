//! Generates the xDS resources of each kind of client from a mesh.
//!
//! An agent receives a listener with a TCP or UDP proxy for each port of each service. A sidecar receives the inbound
//! configuration of its own service and the outbound configuration of all services.

mod agent;
mod encodable;
mod key_server;
mod policies;
mod scope;
mod sidecar;
mod views;

pub use encodable::check_encodable;
pub(crate) use encodable::check_inbound;
pub use views::Views;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use weft_model::{
    Balance, Cluster, DEFAULT_CONNECT_TIMEOUT, DEFAULT_RESPONSE_HEAD_BYTES,
    DEFAULT_RESPONSE_HEADER_COUNT, DEFAULT_UPSTREAM_IDLE, Discovery, Endpoint, EndpointSet, Health,
    HttpFilter, RevocationPolicy, RouteTable, Secret, Snapshot, UpstreamProtocol, UpstreamTls,
    Validation,
};
use weft_xds::server::ResourceSubscribers;
use weft_xds::translate::ResourceKind;

use crate::mesh::{Mesh, Port, Protocol, Service};

/// The port that captures outbound TCP connections, as in Istio.
pub const OUTBOUND_PORT: u16 = 15001;
/// The port that captures inbound connections of sidecars.
pub const INBOUND_PORT: u16 = 15006;
/// The port that captures UDP datagrams.
pub const UDP_PORT: u16 = 15099;
/// The name of the secret with the trust bundle and the CRLs.
const TRUST: &str = "trust";
/// The most open connections and requests of a cluster.
const CIRCUIT_BREAKER_LIMIT: u32 = 100_000;

/// The trust bundle and the CRLs, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    /// The roots.
    pub roots: String,
    /// The CRLs.
    pub revocations: String,
}

/// Tracks which clients have acknowledged the trust bundle.
pub(crate) fn trust_subscribers() -> ResourceSubscribers {
    ResourceSubscribers::new(ResourceKind::Secret, TRUST)
}

/// The filters by which the sidecar of a service checks tokens and policies on a port, in order.
#[must_use]
pub fn checks(mesh: &Mesh, service: &Service, port: &Port) -> Vec<HttpFilter> {
    if port.protocol == Protocol::Tcp {
        return policies::rules(mesh, service, port).into_iter().map(HttpFilter::Rbac).collect();
    }
    sidecar::filters(mesh, service, port, &mut Snapshot::default())
}

/// The route table of callers' sidecars for an HTTP port: the routes of the mesh, then a default route to the service.
#[must_use]
pub fn routes(mesh: &Mesh, service: &Service, port: &Port) -> RouteTable {
    sidecar::routes(mesh, service, port)
}

/// The SPIFFE ID of agents.
#[must_use]
pub fn agent_identity(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}/ns/weft/sa/agent")
}

/// The SPIFFE ID of the control plane.
#[must_use]
pub fn control_identity(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}/ns/weft/sa/control")
}

/// The name of the cluster for a port of a service.
fn cluster_name(service: &str, port: u16) -> String {
    format!("{service}|{port}")
}

/// The wildcard addresses of both IP versions at a port, each with the suffix of its listener's name.
fn wildcard_addresses(port: u16) -> [(&'static str, SocketAddr); 2] {
    [("", (Ipv4Addr::UNSPECIFIED, port).into()), ("-6", (Ipv6Addr::UNSPECIFIED, port).into())]
}

fn endpoints(service: &Service, port: &Port) -> Arc<EndpointSet> {
    let endpoint = |(address, weight): &(IpAddr, u32)| {
        Endpoint::new(SocketAddr::new(*address, port.target), *weight, Health::Healthy)
    };
    Arc::new(EndpointSet { endpoints: service.endpoints.iter().filter_map(endpoint).collect() })
}

fn cluster(name: &str, discovery: Discovery, balance: Balance) -> Cluster {
    Cluster {
        name: name.into(),
        discovery,
        balance,
        connect_timeout: DEFAULT_CONNECT_TIMEOUT,
        protocol: UpstreamProtocol::AsDownstream,
        tls: None::<UpstreamTls>,
        connection_limit: CIRCUIT_BREAKER_LIMIT,
        request_limit: CIRCUIT_BREAKER_LIMIT,
        response_head_bytes: DEFAULT_RESPONSE_HEAD_BYTES,
        response_header_count: DEFAULT_RESPONSE_HEADER_COUNT,
        idle_timeout: DEFAULT_UPSTREAM_IDLE,
    }
}

fn trust_secret(trust: &Trust, policy: &RevocationPolicy) -> Secret {
    let data = |text: &str| weft_model::DataSource::inline(text);
    Secret::Validation(Validation {
        roots: data(&trust.roots),
        revocations: Some(data(&trust.revocations)),
        points: Vec::new(),
        policy: *policy,
        names: Vec::new(),
    })
}

#[cfg(test)]
mod scale_tests;
#[cfg(test)]
mod tests;
