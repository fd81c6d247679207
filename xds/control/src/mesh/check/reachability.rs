//! Warnings: what a valid file says and its author may not mean.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Diagnostics;
use crate::mesh::{Clause, MeshRoute, Policy, Port, Protocol, RouteTarget, Service, raw};

/// Methods that services use: those of HTTP, WebDAV and caches.
const KNOWN_METHODS: [&str; 28] = [
    "ACL",
    "BAN",
    "CONNECT",
    "COPY",
    "DELETE",
    "GET",
    "HEAD",
    "LINK",
    "LOCK",
    "MERGE",
    "MKCALENDAR",
    "MKCOL",
    "MOVE",
    "NOTIFY",
    "OPTIONS",
    "PATCH",
    "POST",
    "PROPFIND",
    "PROPPATCH",
    "PURGE",
    "PUT",
    "QUERY",
    "REPORT",
    "SEARCH",
    "TRACE",
    "UNLINK",
    "UNLOCK",
    "VERSION-CONTROL",
];

/// Adds a warning for each port that no caller may reach, for empty lists of addresses that flows are taken from, for addresses of services without ports, for ports of policies where none is enforced,
/// for methods that are probably misspelled, and for denials that a caller avoids by sending no token.
pub(super) fn warn(
    raw: &raw::RawMesh,
    services: &BTreeMap<String, Service>,
    routes: &[MeshRoute],
    policies: &[Policy],
    warnings: &mut Diagnostics,
) {
    let routed = routed_services(routes);
    let mut enforced: HashMap<&str, Vec<(usize, &Policy)>> = HashMap::new();
    for (index, policy) in policies.iter().enumerate().filter(|(_, policy)| !policy.dry_run) {
        enforced.entry(&policy.service).or_default().push((index, policy));
    }
    let of = |service: &str| enforced.get(service).map(Vec::as_slice).unwrap_or_default();
    for (index, named) in raw.services.iter().enumerate() {
        if named.allow_from.as_ref().is_some_and(Vec::is_empty) {
            let reason =
                "agents drop every new flow: the list is empty; leave it out for any address";
            warnings.add(format!("services[{index}].allow_from"), reason);
        }
        let has_no_way = named.addresses.is_empty() && !routed.contains(named.name.as_str());
        if has_no_way && !named.ports.is_empty() {
            let reason = format!(
                "no caller can reach service {:?}: it has no addresses, and no route sends requests to it",
                named.name
            );
            warnings.add(format!("services[{index}].addresses"), reason);
        }
        let Some(service) = services.get(&named.name).filter(|service| service.meshed) else {
            continue;
        };
        if service.ports.is_empty() && !(named.addresses.is_empty() && named.endpoints.is_empty()) {
            let reason = format!(
                "no caller may reach service {:?}: it has no ports; a service that only calls others needs no \
                 addresses and endpoints",
                service.name
            );
            warnings.add(format!("services[{index}].ports"), reason);
        }
        let own = of(&service.name);
        for (position, port) in service.ports.iter().enumerate() {
            if let Some(reason) = unreachable(service, port, own) {
                warnings.add(format!("services[{index}].ports[{position}]"), reason);
            }
        }
    }
    for (index, policy) in policies.iter().enumerate() {
        for (place, clause) in policy.places(index) {
            unknown_methods(clause, &place, warnings);
        }
        avoidable((index, policy), of(&policy.service), warnings);
    }
}

/// The services that routes send requests to.
fn routed_services(routes: &[MeshRoute]) -> HashSet<&str> {
    let mut names = HashSet::new();
    for rule in routes.iter().flat_map(|route| &route.rules) {
        if let RouteTarget::Backends { backends, .. } = &rule.target {
            let reached = backends.iter().filter(|(_, _, weight)| *weight != 0);
            names.extend(reached.map(|(service, _, _)| service.as_str()));
        }
    }
    names
}

/// Why no caller may reach a port, or why no policy protects it.
fn unreachable(service: &Service, port: &Port, own: &[(usize, &Policy)]) -> Option<String> {
    let (name, number) = (&service.name, port.port);
    if port.protocol == Protocol::Udp {
        let is_meant = own.iter().flat_map(|(_, policy)| policy.allow.iter().chain(&policy.deny));
        let is_meant = is_meant.into_iter().any(|clause| clause.names(port));
        return is_meant.then(|| {
            format!("no policy of service {name:?} is enforced on udp port {number}: datagrams pass no sidecar")
        });
    }
    let of = |pick: fn(&Policy) -> &[Clause]| {
        own.iter().flat_map(move |(_, policy)| pick(policy)).filter(|clause| clause.is_of(port))
    };
    if of(|policy| &policy.deny).any(Clause::is_unconditional) {
        return Some(format!(
            "no caller may reach service {name:?} port {number}: a policy denies every call"
        ));
    }
    let allowed = of(|policy| &policy.allow).next().is_some();
    (!allowed).then(|| {
        format!("no caller may reach service {name:?} port {number}: no policy allows a call")
    })
}

fn unknown_methods(clause: &Clause, path: &str, warnings: &mut Diagnostics) {
    for (place, method) in clause.methods.iter().enumerate() {
        if !KNOWN_METHODS.contains(&method.as_str()) {
            let path = format!("{path}.methods[{place}]");
            warnings.add(path, format!("method {method:?} is not in the registry of HTTP methods"));
        }
    }
}

/// Warns of denials by token where an allowance of the same requests asks for no such token.
fn avoidable(
    (index, policy): (usize, &Policy),
    enforced: &[(usize, &Policy)],
    warnings: &mut Diagnostics,
) {
    let denials = policy.places(index).skip(policy.allow.len());
    for (place, deny) in denials {
        let Some(token) = &deny.token else { continue };
        let allowances =
            enforced.iter().flat_map(|(index, other)| other.places(*index).take(other.allow.len()));
        let same = allowances.into_iter().find(|(_, allow)| {
            allow.token.as_ref() != Some(token)
                && (deny.ports.is_empty()
                    || allow.ports.is_empty()
                    || allow.ports.iter().any(|port| deny.ports.contains(port)))
                && allow.may_share_requests_with(deny)
        });
        if let Some((allowance, _)) = same {
            let reason = format!(
                "a caller avoids this denial by sending no token of {token:?}: {allowance} asks for none"
            );
            warnings.add(format!("{place}.token"), reason);
        }
    }
}
