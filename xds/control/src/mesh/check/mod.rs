//! Checks the deserialized file and makes a [`Mesh`] of it. All errors are collected, not only the first.

mod diagnostics;
mod http;
mod key_server;
mod policies;
mod reachability;
mod rewritten_paths;
mod route_order;
mod routes;
mod security;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use weft_model::{Balance, Cidr, FlowKey, IdleEnd, SourceAddress, SpiffeId};
use weft_runtime::socket::PROBE_PORT;

use super::referenced_files::ReferencedFiles;
use super::{Mesh, Port, Protocol, Service, duration, raw};
use diagnostics::Diagnostics;
pub(crate) use diagnostics::{Diagnostic, Reference};
use policies::{dry_run_tokens, policies};
use routes::routes;
use security::issuers;

/// Checks the whole file. Returns the mesh and the warnings.
///
/// # Errors
/// Every error of the file.
pub(super) fn check(
    raw: &raw::RawMesh,
    files: &ReferencedFiles,
) -> Result<(Mesh, Vec<Diagnostic>), Vec<Diagnostic>> {
    let mut errors = Diagnostics::default();
    if SpiffeId::parse(&format!("spiffe://{}", raw.trust_domain)).is_err() {
        let accepted = "must match [a-z0-9._-]{1,255}";
        let reason = format!("invalid trust domain {:?}: {accepted}", raw.trust_domain);
        errors.add("trust_domain", reason);
    }
    let mut service_ranges = Vec::new();
    if raw.service_ranges.is_empty() && raw.services.iter().any(|s| !s.addresses.is_empty()) {
        let reason = "invalid empty list: must contain the addresses of all services";
        errors.add("service_ranges", reason);
    }
    for (index, text) in raw.service_ranges.iter().enumerate() {
        match Cidr::parse(text) {
            Ok(range) => service_ranges.push(range),
            Err(error) => errors.add(format!("service_ranges[{index}]"), error.to_string()),
        }
    }
    let services = services(raw, &service_ranges, &mut errors);
    let routes = routes(raw, &services, &mut errors);
    let issuers = issuers(raw, files, &mut errors);
    let policies = policies(raw, &services, &issuers, &mut errors);
    dry_run_tokens(&services, &policies, &mut errors);
    let revocation = security::revocation(raw, &mut errors);
    let groups = security::groups(raw, &mut errors);
    for (index, serial) in raw.security.revocations.iter().enumerate() {
        let hex = !serial.is_empty()
            && serial.len() <= 40
            && serial.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex || !serial.len().is_multiple_of(2) {
            errors.add(
                format!("security.revocations[{index}]"),
                format!(
                    "invalid serial number {serial:?}: must be an even number of hexadecimal digits, at most 40"
                ),
            );
        }
    }
    if !errors.0.is_empty() {
        return Err(errors.0);
    }
    let mut warnings = Diagnostics::default();
    reachability::warn(raw, &services, &routes, &policies, &mut warnings);
    ranges_with_host_bits(raw, &mut warnings);
    route_order::warn(raw, &services, &routes, &mut warnings);
    rewritten_paths::warn(&services, &routes, &policies, &mut warnings);
    let mesh = Mesh {
        trust_domain: raw.trust_domain.clone(),
        service_ranges,
        outbound: raw.outbound,
        services,
        routes,
        issuers,
        policies,
        revocations: raw.security.revocations.clone(),
        revocation,
        groups,
        warnings: Vec::new(),
    };
    Ok((mesh, warnings.0))
}

fn services(
    raw: &raw::RawMesh,
    ranges: &[Cidr],
    errors: &mut Diagnostics,
) -> BTreeMap<String, Service> {
    let mut services = BTreeMap::new();
    let mut addresses: HashMap<IpAddr, String> = HashMap::new();
    for (index, service) in raw.services.iter().enumerate() {
        let path = format!("services[{index}]");
        if !is_name(&service.name) {
            errors.add(
                format!("{path}.name"),
                format!("invalid service name {:?}: must match [a-z0-9-]{{1,63}}", service.name),
            );
        }
        for (position, address) in service.addresses.iter().enumerate() {
            let path = format!("{path}.addresses[{position}]");
            check_unicast(*address, &path, errors);
            if let Some(other) = addresses.insert(*address, service.name.clone()) {
                errors.add(
                    path.clone(),
                    format!("invalid address {address}: already used by service {other:?}"),
                );
            }
            // A range that could not be parsed may contain the address.
            let is_known = !ranges.is_empty() && ranges.len() == raw.service_ranges.len();
            if is_known && !ranges.iter().any(|range| range.contains(*address)) {
                errors.add(
                    &path,
                    format!("invalid address {address}: must be in one of service_ranges"),
                );
            }
            let before = service.addresses.iter().take(position);
            if let Some(other) = before.into_iter().find(|o| o.is_ipv4() == address.is_ipv4()) {
                let reason = "a service has at most one address per IP version";
                errors.add(path, format!("invalid address {address} beside {other}: {reason}"));
            }
        }
        let ports = ports(service, &path, errors);
        let endpoints = endpoints(service, ranges, &path, errors);
        let balance = balance(service, &path, errors);
        let flow_key = flow_key(service, &ports, &path, errors);
        let allow_from = allow_from(service, &path, errors);
        let checked = Service {
            name: service.name.clone(),
            addresses: service.addresses.clone(),
            ports,
            endpoints,
            balance,
            allow_from,
            flow_key,
            source_address: match service.source_address {
                raw::RawSourceAddress::Agent => SourceAddress::Agent,
                raw::RawSourceAddress::Client => SourceAddress::Client,
            },
            paths: http::path_rules(service, &path, errors),
            underscores: http::underscores(service, &path, errors),
            meshed: service.meshed,
        };
        if services.insert(service.name.clone(), checked).is_some() {
            errors
                .add(format!("{path}.name"), format!("duplicate service name {:?}", service.name));
        }
    }
    services
}

/// The load balancing policy of sidecars, for requests and TCP connections.
fn balance(service: &raw::RawService, path: &str, errors: &mut Diagnostics) -> Balance {
    let is_balanced = service.ports.iter().any(|port| port.protocol != Protocol::Udp);
    if service.balance.is_some() && !is_balanced {
        let reason = "no effect: the service has no http, http2, grpc or tcp port";
        errors.add(format!("{path}.balance"), reason);
    }
    match service.balance {
        None | Some(raw::RawBalance::RoundRobin) => Balance::RoundRobin,
        Some(raw::RawBalance::LeastRequests) => Balance::LeastRequests,
    }
}

/// The client address ranges that agents accept.
fn allow_from(
    service: &raw::RawService,
    path: &str,
    errors: &mut Diagnostics,
) -> Option<Vec<Cidr>> {
    let ranges = service.allow_from.as_ref()?;
    let parsed = ranges.iter().enumerate().filter_map(|(position, text)| {
        let parsed = Cidr::parse(text);
        let path = format!("{path}.allow_from[{position}]");
        parsed.map_err(|error| errors.add(path, error.to_string())).ok()
    });
    Some(parsed.collect())
}

/// Adds an error for an address that is not a unicast address.
fn check_unicast(address: IpAddr, path: &str, errors: &mut Diagnostics) {
    let plain = address.to_canonical();
    let kind = match plain {
        _ if plain.is_unspecified() => "the unspecified address",
        _ if plain.is_multicast() => "a multicast address",
        IpAddr::V4(address) if address.is_broadcast() => "the broadcast address",
        IpAddr::V4(_) | IpAddr::V6(_) => return,
    };
    let reason = format!("invalid address {address}: must be a unicast address, not {kind}");
    errors.add(path, reason);
}

/// The parts of a flow that agents hash.
fn flow_key(
    service: &raw::RawService,
    ports: &[Port],
    path: &str,
    errors: &mut Diagnostics,
) -> FlowKey {
    let (flow_key, word) = match service.affinity {
        raw::RawAffinity::None => return FlowKey::FiveTuple,
        raw::RawAffinity::ClientAddress => (FlowKey::SourceAddress, "client_address"),
        raw::RawAffinity::TcpSequence => (FlowKey::WithSequence, "tcp_sequence"),
    };
    let is_flow = |port: &&Port| matches!(port.protocol, Protocol::Tcp | Protocol::Udp);
    if let Some(Port { port, .. }) = ports.iter().find(|port| !is_flow(port)) {
        let reason = format!(
            "invalid affinity {word}: port {port} carries HTTP, whose requests are balanced individually"
        );
        errors.add(format!("{path}.affinity"), reason);
    }
    if flow_key == FlowKey::WithSequence && !ports.iter().any(|p| p.protocol == Protocol::Tcp) {
        let reason = format!("invalid affinity {word}: the service has no tcp port");
        errors.add(format!("{path}.affinity"), reason);
    }
    flow_key
}

fn ports(service: &raw::RawService, path: &str, errors: &mut Diagnostics) -> Vec<Port> {
    let mut seen = HashSet::new();
    let mut targets = HashSet::new();
    let mut ports = Vec::new();
    let tuning = http::of_service(service, path, errors);
    for (index, port) in service.ports.iter().enumerate() {
        let path = format!("{path}.ports[{index}]");
        let target = port.target.unwrap_or(port.port);
        let udp = port.protocol == Protocol::Udp;
        if (15000..=15099).contains(&target) {
            errors.add(
                format!("{path}.target"),
                format!("invalid port {target}: 15000 to 15099 are reserved for weft"),
            );
        }
        if port.port == PROBE_PORT {
            errors.add(
                format!("{path}.port"),
                format!("invalid port {PROBE_PORT}: reserved for the redirect probes of weft"),
            );
        }
        if !seen.insert((port.port, udp)) {
            errors.add(format!("{path}.port"), format!("duplicate port {}", port.port));
        }
        if !targets.insert((target, udp)) {
            errors.add(format!("{path}.target"), format!("duplicate target port {target}"));
        }
        let (idle_timeout, idle_end) = idle(port, &path, errors);
        ports.push(Port {
            port: port.port,
            target,
            protocol: port.protocol,
            idle_timeout,
            idle_end,
            http: http::of_port(port, tuning, &path, errors),
        });
    }
    ports
}

/// The idle timeout of flows to a port, and how connections are closed at it.
fn idle(
    port: &raw::RawPort,
    path: &str,
    errors: &mut Diagnostics,
) -> (Option<Duration>, Option<IdleEnd>) {
    let timeout = port.idle_timeout.as_ref().and_then(|text| {
        let parsed = duration::parse(text).filter(|timeout| !timeout.is_zero());
        if !matches!(port.protocol, Protocol::Tcp | Protocol::Udp) {
            errors.add(
                format!("{path}.idle_timeout"),
                "no effect on this port: requires tcp or udp; for HTTP set http.timeouts",
            );
        } else if parsed.is_none() {
            errors.add(
                format!("{path}.idle_timeout"),
                format!("invalid duration {text:?}: must be above zero, {}", duration::ACCEPTED),
            );
        }
        parsed
    });
    let end = port.idle_end.as_ref().and_then(|word| {
        let end = IdleEnd::named(word);
        if port.protocol != Protocol::Tcp {
            errors.add(format!("{path}.idle_end"), "no effect on this port: requires tcp");
        } else if end.is_none() {
            errors.add(
                format!("{path}.idle_end"),
                format!("invalid value {word:?}: must be reset or close"),
            );
        }
        end
    });
    (timeout, end)
}

fn endpoints(
    service: &raw::RawService,
    service_ranges: &[Cidr],
    path: &str,
    errors: &mut Diagnostics,
) -> Vec<(IpAddr, u32)> {
    let mut seen = HashSet::new();
    let mut endpoints = Vec::new();
    for (index, endpoint) in service.endpoints.iter().enumerate() {
        let weight = endpoint.weight.unwrap_or(1);
        if weight == 0 {
            errors.add(
                format!("{path}.endpoints[{index}].weight"),
                format!("invalid value 0: must be 1 to {}; or leave the endpoint out", u32::MAX),
            );
        }
        check_unicast(endpoint.address, &format!("{path}.endpoints[{index}].address"), errors);
        // Connections to such an address are redirected to the proxy again, in a loop.
        if let Some(range) = service_ranges.iter().find(|range| range.contains(endpoint.address)) {
            errors.add(
                format!("{path}.endpoints[{index}].address"),
                format!(
                    "invalid address {}: must be the address of a workload, not in service_ranges ({range})",
                    endpoint.address
                ),
            );
        }
        if !seen.insert(endpoint.address) {
            let reason = format!("duplicate address {}", endpoint.address);
            errors.add(format!("{path}.endpoints[{index}].address"), reason);
        }
        endpoints.push((endpoint.address, weight));
    }
    endpoints
}

/// Adds a warning for each address range whose address has bits beyond its prefix.
fn ranges_with_host_bits(raw: &raw::RawMesh, warnings: &mut Diagnostics) {
    let mut check = |path: &dyn Fn() -> String, ranges: &[String]| {
        for (place, text) in ranges.iter().enumerate() {
            let Ok(range) = Cidr::parse(text) else { continue };
            let address = text.split('/').next().unwrap_or_default().parse::<IpAddr>();
            if address.is_ok_and(|address| address != range.address()) {
                let reason = format!("range {text:?} has host bits set and is read as {range}");
                warnings.add(format!("{}[{place}]", path()), reason);
            }
        }
    };
    check(&|| "service_ranges".to_owned(), &raw.service_ranges);
    for (index, service) in raw.services.iter().enumerate() {
        let ranges = service.allow_from.as_deref().unwrap_or_default();
        check(&|| format!("services[{index}].allow_from"), ranges);
    }
    for (index, policy) in raw.security.policies.iter().enumerate() {
        let allow = policy.allow.iter().enumerate().map(|(at, clause)| ("allow", at, clause));
        let deny = policy.deny.iter().enumerate().map(|(at, clause)| ("deny", at, clause));
        for (word, at, clause) in allow.chain(deny) {
            let path = || format!("security.policies[{index}].{word}[{at}].from_addresses");
            check(&path, clause.from_addresses.as_deref().unwrap_or_default());
        }
    }
}

fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty() && text.len() <= 63 && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests;
