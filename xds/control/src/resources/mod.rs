//! Generates the xDS resources of each kind of client from a mesh.
//!
//! An agent receives a listener with a TCP or UDP proxy for each port of each service. A sidecar receives the inbound
//! configuration of its own service and the outbound configuration of all services.

mod agent;
mod capture;
mod clusters;
mod encodable;
mod identities;
mod key_server;
mod policies;
mod scope;
mod sidecar;
mod trust;
mod views;

pub use capture::{INBOUND_PORT, OUTBOUND_PORT, UDP_PORT};
pub use encodable::check_encodable;
pub(crate) use encodable::check_inbound;
pub use identities::{agent_identity, control_identity};
pub use trust::Trust;
pub(crate) use trust::trust_subscribers;
pub use views::Views;

use weft_model::{HttpFilter, RouteTable, Snapshot};

use crate::mesh::{Mesh, Port, Protocol, Service};

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

#[cfg(test)]
mod scale_tests;
#[cfg(test)]
mod tests;
