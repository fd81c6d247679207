//! `ClusterLoadAssignment`: the endpoints of a cluster.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::num::NonZeroU32;

use weft_model::{Endpoint, EndpointSet, Health, Name, Transport};

use super::pb::core::{Address, HealthStatus};
use super::pb::endpoint as pb;
use super::{FieldError, MessageReader, values};

/// Reads a whole assignment.
pub(super) fn decode(mut assignment: MessageReader<'_>) -> Result<(Name, EndpointSet), FieldError> {
    let name: Name = assignment.required_text("cluster_name")?.into();
    Ok((name, set(assignment)?))
}

/// Reads the endpoints of an assignment without its name.
pub(super) fn set(mut assignment: MessageReader<'_>) -> Result<EndpointSet, FieldError> {
    assignment.harmless(&["cluster_name"]);
    // It has no effect: each of its settings is listed as not honoured.
    drop(assignment.child("policy"));
    let mut endpoints = Vec::new();
    let mut seen = HashSet::new();
    for mut locality in assignment.children("endpoints") {
        locality.harmless(&["locality", "proximity"]);
        if locality.number("priority").unwrap_or(0) > 0 {
            return Err(locality.refuse("priority", "unsupported priority: must be 0"));
        }
        endpoints.extend(locality.many("lb_endpoints", |member| endpoint(member, &mut seen))?);
    }
    endpoints.shrink_to_fit();
    Ok(EndpointSet { endpoints })
}

/// Reads an endpoint; its address must not be in `seen`.
fn endpoint(
    mut member: MessageReader<'_>,
    seen: &mut HashSet<SocketAddr>,
) -> Result<Endpoint, FieldError> {
    let weight = member.number("load_balancing_weight").unwrap_or(1);
    let health = match member.choice("health_status").as_str() {
        "UNKNOWN" | "HEALTHY" | "DEGRADED" => Health::Healthy,
        "DRAINING" => Health::Draining,
        _ => Health::Unhealthy,
    };
    let mut endpoint = member.required_child("endpoint")?;
    endpoint.harmless(&["hostname", "observability_name"]);
    let (address, _) = values::socket(endpoint.required_child("address")?)?;
    if !seen.insert(address) {
        return Err(endpoint.refuse("address", format!("duplicate address {address}")));
    }
    Endpoint::new(address, weight, health).ok_or_else(|| {
        member.refuse("load_balancing_weight", "invalid weight 0: must be 1 or more")
    })
}

/// Encodes an assignment.
pub(super) fn encode(name: &str, set: &EndpointSet) -> pb::ClusterLoadAssignment {
    assignment(name, set.endpoints.iter().map(encode_endpoint).collect())
}

/// An assignment with these endpoints.
pub(super) fn assignment(name: &str, members: Vec<pb::LbEndpoint>) -> pb::ClusterLoadAssignment {
    let locality =
        pb::LocalityLbEndpoints { lb_endpoints: members, ..pb::LocalityLbEndpoints::default() };
    pb::ClusterLoadAssignment {
        cluster_name: name.into(),
        endpoints: Some(locality).filter(|l| !l.lb_endpoints.is_empty()).into_iter().collect(),
        ..pb::ClusterLoadAssignment::default()
    }
}

fn encode_endpoint(endpoint: &Endpoint) -> pb::LbEndpoint {
    let health = match endpoint.health {
        Health::Healthy => HealthStatus::Healthy,
        Health::Draining => HealthStatus::Draining,
        Health::Unhealthy => HealthStatus::Unhealthy,
    };
    let address = values::encode_socket(endpoint.address, Transport::Tcp);
    pb::LbEndpoint { health_status: health.into(), ..member(address, endpoint.weight) }
}

/// A member of an assignment.
pub(super) fn member(address: Address, weight: NonZeroU32) -> pb::LbEndpoint {
    let endpoint = pb::Endpoint { address: Some(address), ..pb::Endpoint::default() };
    pb::LbEndpoint {
        load_balancing_weight: values::number(weight.get()),
        host_identifier: Some(pb::lb_endpoint::HostIdentifier::Endpoint(endpoint)),
        ..pb::LbEndpoint::default()
    }
}
