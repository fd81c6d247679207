//! Evaluates the routes of a mesh for a request, and the policies of each destination. Does no I/O.

use std::sync::Arc;

use weft_control::mesh::{
    Mesh, MeshRoute, Port, Protocol, RouteRule, RouteTarget, Service, prefix_rewrite,
};
use weft_control::resources::{checks, routes};
use weft_model::{
    HttpFilter, JwtPolicy, JwtRequirement, MatchedRoute, RbacFilter, Redirect, RouteIndex,
    evaluate_rbac_readings,
};

use super::request::{Arrival, WhyRequest};

/// How the routes of the called port handle a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum RouteDecision<'m> {
    /// No route matches: the request goes to the called service.
    Direct {
        /// Whether the port has routes at all.
        has_routes: bool,
        outcome: PolicyOutcome,
    },
    /// A route selects the destinations.
    Routed { rule: RuleLocation<'m>, destinations: Vec<Destination<'m>> },
    /// A route answers with a redirect; no service receives the request.
    Redirected { rule: RuleLocation<'m>, redirect: &'m Redirect },
}

/// The location of a rule in the mesh configuration.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RuleLocation<'m> {
    /// The name of the route.
    pub(super) route: &'m str,
    /// The path of the rule in the file, such as `routes[0].rules[1]`.
    pub(super) path: String,
}

/// A destination of a route: a port of a service.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Destination<'m> {
    pub(super) service: &'m str,
    pub(super) port: u16,
    pub(super) weight: u32,
    /// The request target after the rewrite of the route; none when unchanged.
    pub(super) rewritten: Option<String>,
    pub(super) outcome: PolicyOutcome,
}

/// The decision of the policies of a destination.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PolicyOutcome {
    /// No policy is enforced at the destination, for this reason.
    NotEnforced(String),
    /// The caller cannot connect, for this reason.
    NoIdentity(String),
    /// The clause with this name uses the caller's address, which is not known.
    NeedsAddress(String),
    /// The request lacks a token of these issuers.
    NeedsToken(String),
    /// The policies were evaluated.
    Evaluated(PolicyDecision),
}

/// The result of the policies. Clauses have their access-log names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PolicyDecision {
    pub(super) is_refused: bool,
    pub(super) clause: Option<String>,
    /// Set when a `dry_run` policy would deny the request; holds the deciding clause, if any.
    pub(super) shadow: Option<Option<String>>,
}

/// The service that a request is for, and the port of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Callee<'m> {
    /// The service.
    pub(super) service: &'m Service,
    /// Its port.
    pub(super) port: &'m Port,
}

/// Evaluates a request to a port of a service. `caller` is the calling service; none for a SPIFFE ID.
pub(super) fn decide<'m>(
    mesh: &'m Mesh,
    caller: Option<&Service>,
    callee: Callee<'m>,
    request: &WhyRequest<'_>,
) -> RouteDecision<'m> {
    let Callee { service, port } = callee;
    let judge = |service: &Service, port: &Port, target: &str| {
        outcome(mesh, caller, Callee { service, port }, &Arrival::new(request, target, port))
    };
    let has_sidecar = caller.is_none_or(|caller| caller.meshed);
    let is_routed = has_sidecar && !matches!(port.protocol, Protocol::Tcp | Protocol::Udp);
    let has_routes = is_routed && mesh.routes.iter().any(|route| route.is_of(service, port));
    let sent = Arrival::new(request, request.target, port);
    let table = RouteIndex::new(Arc::new(routes(mesh, service, port)));
    let found = has_routes.then(|| table.route(&sent.routed())).flatten();
    let taken = found.and_then(|found| Some((found, rule_of(mesh, callee, found)?)));
    let Some((found, (place, rule))) = taken else {
        return RouteDecision::Direct { has_routes, outcome: judge(service, port, request.target) };
    };
    let (backends, replacement) = match &rule.target {
        RouteTarget::Redirect(redirect) => {
            return RouteDecision::Redirected { rule: place, redirect };
        }
        RouteTarget::Backends { backends, prefix_replacement } => (backends, prefix_replacement),
    };
    let matched = &found.route.matches.path;
    let rewrite = replacement.as_ref().and_then(|to| prefix_rewrite(matched, to));
    let rewritten =
        rewrite.and_then(|rewrite| rewrite.target(matched, request.target, sent.readings()));
    let target = rewritten.as_deref().unwrap_or(request.target);
    let destinations =
        backends.iter().filter(|(_, _, weight)| *weight != 0).filter_map(|backend| {
            let (name, number, weight) = backend;
            let service = mesh.services.get(name)?;
            let port = port_of(service, *number)?;
            let outcome = judge(service, port, target);
            let rewritten = rewritten.clone();
            Some(Destination { service: name, port: *number, weight: *weight, rewritten, outcome })
        });
    RouteDecision::Routed { rule: place, destinations: destinations.collect() }
}

/// The port of a service with this number. When a TCP and a UDP port share the number, returns the TCP port: UDP has no
/// policies.
pub(super) fn port_of(service: &Service, number: u16) -> Option<&Port> {
    let all = service.ports.iter().filter(|port| port.port == number);
    all.min_by_key(|port| port.protocol == Protocol::Udp)
}

/// The mesh rule from which a route of the port's route table was built; none for the default route to the service.
fn rule_of<'m>(
    mesh: &'m Mesh,
    callee: Callee<'_>,
    found: MatchedRoute<'_>,
) -> Option<(RuleLocation<'m>, &'m RouteRule)> {
    let Callee { service, port } = callee;
    let has_host = |route: &MeshRoute| match route.hostnames.as_slice() {
        [] => found.host.domains.iter().any(|domain| domain == "*"),
        names => names.iter().any(|name| found.host.domains.contains(name)),
    };
    let routes = mesh.routes.iter().enumerate();
    let mut routes = routes.filter(|(_, route)| route.is_of(service, port) && has_host(route));
    routes.find_map(|(index, route)| {
        let is_found = |(number, rule): &(usize, &RouteRule)| {
            *found.route.name == *format!("{}[{number}]", route.name)
                && rule.matches.contains(&found.route.matches)
        };
        let (number, rule) = route.rules.iter().enumerate().find(is_found)?;
        let path = format!("routes[{index}].rules[{number}]");
        Some((RuleLocation { route: &route.name, path }, rule))
    })
}

/// Evaluates the policies of a port for a request that arrives there.
fn outcome(
    mesh: &Mesh,
    caller: Option<&Service>,
    callee: Callee<'_>,
    arrival: &Arrival<'_>,
) -> PolicyOutcome {
    let Callee { service, port } = callee;
    if !service.meshed {
        let name = &service.name;
        let reason = format!("service {name:?} is outside the mesh; no policy is enforced");
        return PolicyOutcome::NotEnforced(reason);
    }
    if port.protocol == Protocol::Udp {
        return PolicyOutcome::NotEnforced("UDP bypasses sidecars; no policy is enforced".into());
    }
    if let Some(caller) = caller.filter(|caller| !caller.meshed) {
        let reason = "meshed: false, so it has no certificate and the TLS handshake fails";
        return PolicyOutcome::NoIdentity(format!(
            "service {:?} has no identity: {reason}",
            caller.name
        ));
    }
    if let Some(clause) = clause_by_address(mesh, service, port).filter(|_| !arrival.has_address())
    {
        return PolicyOutcome::NeedsAddress(clause.to_owned());
    }
    let checks = checks(mesh, service, port);
    if let Some(issuers) = missing_token(&checks, arrival) {
        return PolicyOutcome::NeedsToken(issuers);
    }
    let rules: Vec<&RbacFilter> = checks
        .iter()
        .filter_map(|check| match check {
            HttpFilter::Rbac(rules) => Some(&**rules),
            HttpFilter::Jwt(_) => None,
        })
        .collect();
    let evaluation = evaluate_rbac_readings(&rules.into_iter(), arrival.each());
    let name = |clause: Option<&str>| clause.map(str::to_owned);
    let shadow = evaluation.shadow.filter(|shadow| shadow.refused);
    PolicyOutcome::Evaluated(PolicyDecision {
        is_refused: evaluation.enforced.refused,
        clause: name(evaluation.enforced.policy.map(|clause| &**clause)),
        shadow: shadow.map(|shadow| name(shadow.policy.map(|clause| &**clause))),
    })
}

/// The name of a clause of the port that uses the caller's address.
fn clause_by_address<'m>(mesh: &'m Mesh, service: &Service, port: &Port) -> Option<&'m str> {
    let policies = mesh.policies.iter().filter(|policy| policy.service == service.name);
    let mut clauses = policies.flat_map(|policy| policy.allow.iter().chain(&policy.deny));
    let deciding = clauses.find(|clause| clause.is_of(port) && !clause.from_addresses.is_empty());
    deciding.map(|clause| clause.name.as_str())
}

/// The issuers of a required token that the request lacks; none when the token rules are met.
fn missing_token(checks: &[HttpFilter], arrival: &Arrival<'_>) -> Option<String> {
    let policy: &JwtPolicy = checks.iter().find_map(|check| match check {
        HttpFilter::Jwt(policy) => Some(&**policy),
        HttpFilter::Rbac(_) => None,
    })?;
    arrival.each().find_map(|facts| {
        let rule = policy.rules.get(policy.rule(&facts)?)?;
        let requirement = rule.requires.as_ref()?;
        let is_met = meets(requirement, arrival.token().map(|(shown, _)| shown));
        (!is_met).then(|| names(requirement).join(" or "))
    })
}

/// Whether a request with a token of issuer `shown`, or without a token, meets the requirement.
fn meets(requirement: &JwtRequirement, shown: Option<&str>) -> bool {
    match requirement {
        JwtRequirement::Provider(name, _) => shown == Some(&**name),
        JwtRequirement::Any(all) => all.iter().any(|one| meets(one, shown)),
        JwtRequirement::All(all) => all.iter().all(|one| meets(one, shown)),
        JwtRequirement::Missing => shown.is_none(),
    }
}

/// The names of the issuers in a requirement.
fn names(requirement: &JwtRequirement) -> Vec<&str> {
    match requirement {
        JwtRequirement::Provider(name, _) => vec![&**name],
        JwtRequirement::Any(all) | JwtRequirement::All(all) => all.iter().flat_map(names).collect(),
        JwtRequirement::Missing => Vec::new(),
    }
}

#[cfg(test)]
mod tests;
