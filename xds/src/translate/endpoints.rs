//! `ClusterLoadAssignment`: the endpoints of a cluster.

use std::collections::HashSet;
use std::net::SocketAddr;

use serde_json::{Value, json};
use weft_model::{Endpoint, EndpointSet, Health, Name, Transport};

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

/// The JSON form of an assignment.
pub(super) fn encode(name: &str, set: &EndpointSet) -> Value {
    let members: Vec<Value> = set.endpoints.iter().map(member).collect();
    let localities =
        if members.is_empty() { json!([]) } else { json!([{"lb_endpoints": members}]) };
    json!({"cluster_name": name, "endpoints": localities})
}

fn member(endpoint: &Endpoint) -> Value {
    let health = match endpoint.health {
        Health::Healthy => "HEALTHY",
        Health::Draining => "DRAINING",
        Health::Unhealthy => "UNHEALTHY",
    };
    json!({
        "endpoint": {"address": values::socket_json(endpoint.address, Transport::Tcp)},
        "load_balancing_weight": endpoint.weight.get(),
        "health_status": health,
    })
}
