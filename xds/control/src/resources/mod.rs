//! What a mesh means for each kind of client: the same resources that any control plane would send.
//!
//! The agent gets every service as opaque flows. A sidecar gets the inbound side of its own service
//! and the outbound side of all others.

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

/// The ports of the data plane, as the field has them.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where inbound traffic is taken.
pub const INBOUND_PORT: u16 = 15006;
/// Where intercepted datagrams are taken.
pub const UDP_PORT: u16 = 15099;
/// The secret that holds roots and revocation lists.
const TRUST: &str = "trust";
/// How many connections and requests a cluster may have open.
const LIMIT: u32 = 100_000;

/// What is trusted, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    /// The roots.
    pub roots: String,
    /// The revocation lists.
    pub revocations: String,
}

/// Who has taken what everybody must trust.
pub(crate) fn trust_subscribers() -> ResourceSubscribers {
    ResourceSubscribers::new(ResourceKind::Secret, TRUST)
}

/// What the sidecar of a service asks of whoever calls a port of it, in this order.
#[must_use]
pub fn checks(mesh: &Mesh, service: &Service, port: &Port) -> Vec<HttpFilter> {
    if port.protocol == Protocol::Tcp {
        return policies::rules(mesh, service, port).into_iter().map(HttpFilter::Rbac).collect();
    }
    sidecar::filters(mesh, service, port, &mut Snapshot::default())
}

/// The routes by which the sidecar of a caller sends the requests to a port of HTTP: those of the mesh, then one that
/// leads to the service itself.
#[must_use]
pub fn routes(mesh: &Mesh, service: &Service, port: &Port) -> RouteTable {
    sidecar::routes(mesh, service, port)
}

/// The identity of an agent.
#[must_use]
pub fn agent_identity(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}/ns/weft/sa/agent")
}

/// The identity of the control plane.
#[must_use]
pub fn control_identity(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}/ns/weft/sa/control")
}

/// The name of the cluster of a service's port.
fn cluster_name(service: &str, port: u16) -> String {
    format!("{service}|{port}")
}

/// Any address of both families at a port: one bound socket for each.
fn everywhere(port: u16) -> [(&'static str, SocketAddr); 2] {
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
        connection_limit: LIMIT,
        request_limit: LIMIT,
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
