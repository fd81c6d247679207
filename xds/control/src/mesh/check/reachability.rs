//! Warnings about services that no caller can reach, and about policies without the intended effect.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::diagnostics::Diagnostics;
use crate::mesh::{Clause, MeshRoute, Policy, Port, Protocol, RouteTarget, Service, raw};

/// Known methods: those of HTTP, WebDAV and caches.
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

/// Adds warnings for:
///
/// - services and ports that no caller can reach,
/// - an empty `allow_from`,
/// - policies for UDP ports, where none is enforced,
/// - unknown methods,
/// - deny clauses that a caller avoids by not sending a token.
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
            let reason = "empty list: agents drop every new flow; omit the field for any address";
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
                "no caller can reach service {:?}: it has no ports; a service that only calls others needs no \
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
        for (place, clause) in policy.field_paths(index) {
            unknown_methods(clause, &place, warnings);
        }
        avoidable_denials(index, policy, of(&policy.service), warnings);
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

/// Why no caller can reach a port, or why no policy is enforced there.
fn unreachable(service: &Service, port: &Port, own: &[(usize, &Policy)]) -> Option<String> {
    let name = &service.name;
    let number = port.port;
    if port.protocol == Protocol::Udp {
        let is_named = own.iter().flat_map(|(_, policy)| policy.allow.iter().chain(&policy.deny));
        let is_named = is_named.into_iter().any(|clause| clause.names(port));
        return is_named.then(|| {
            format!("no policy of service {name:?} is enforced on udp port {number}: UDP does not pass through sidecars")
        });
    }
    let of = |pick: fn(&Policy) -> &[Clause]| {
        own.iter().flat_map(move |(_, policy)| pick(policy)).filter(|clause| clause.is_of(port))
    };
    if of(|policy| &policy.deny).any(Clause::is_unconditional) {
        return Some(format!(
            "no caller can reach service {name:?} port {number}: a policy denies every call"
        ));
    }
    let allowed = of(|policy| &policy.allow).next().is_some();
    (!allowed).then(|| {
        format!("no caller can reach service {name:?} port {number}: no policy allows a call")
    })
}

fn unknown_methods(clause: &Clause, path: &str, warnings: &mut Diagnostics) {
    for (place, method) in clause.methods.iter().enumerate() {
        if !KNOWN_METHODS.contains(&method.as_str()) {
            let path = format!("{path}.methods[{place}]");
            warnings.add(path, format!("unknown HTTP method {method:?}"));
        }
    }
}

/// Adds a warning for each deny clause with a token, if an allow clause for the same requests does not require that token.
fn avoidable_denials(
    index: usize,
    policy: &Policy,
    enforced: &[(usize, &Policy)],
    warnings: &mut Diagnostics,
) {
    let denials = policy.field_paths(index).skip(policy.allow.len());
    for (place, deny) in denials {
        let Some(token) = &deny.token else { continue };
        let allowances = enforced
            .iter()
            .flat_map(|(index, other)| other.field_paths(*index).take(other.allow.len()));
        let same = allowances.into_iter().find(|(_, allow)| {
            allow.token.as_ref() != Some(token)
                && (deny.ports.is_empty()
                    || allow.ports.is_empty()
                    || allow.ports.iter().any(|port| deny.ports.contains(port)))
                && allow.may_share_requests_with(deny)
        });
        if let Some((allowance, _)) = same {
            let reason = format!(
                "a caller can avoid this denial by not sending a token of issuer {token:?}: {allowance} does not require one"
            );
            warnings.add(format!("{place}.token"), reason);
        }
    }
}
