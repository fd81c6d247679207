//! Where the routes of a mesh send a request, and what the policies of each destination decide. Pure: a mesh and a
//! request give a decision.

use std::sync::Arc;

use weft_control::mesh::{
    Mesh, MeshRoute, Port, Protocol, RouteRule, RouteTarget, Service, prefix_rewrite,
};
use weft_control::resources::{checks, routes};
use weft_model::{
    HttpFilter, JwtPolicy, JwtRequirement, MatchedRoute, RbacFilter, Redirect, RouteIndex,
    evaluate_rbac_readings,
};

use super::request::{Arrival, Request};

/// What happens to a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decision<'m> {
    /// No route takes it: it goes to the service that was called.
    Direct {
        /// Whether the port has routes, of which none matches.
        has_routes: bool,
        outcome: Outcome,
    },
    /// A route sends it on.
    Routed { rule: RulePlace<'m>, destinations: Vec<Destination<'m>> },
    /// A route sends the caller elsewhere, so that no service gets the request.
    Redirected { rule: RulePlace<'m>, redirect: &'m Redirect },
}

/// A rule of a route.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RulePlace<'m> {
    /// The name of the route.
    pub(super) route: &'m str,
    /// The path of the rule in the file, such as `routes[0].rules[1]`.
    pub(super) path: String,
}

/// A port of a service that a route sends requests to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Destination<'m> {
    pub(super) service: &'m str,
    pub(super) port: u16,
    pub(super) weight: u32,
    /// The target that arrives there, where the route changes it.
    pub(super) rewritten: Option<String>,
    pub(super) outcome: Outcome,
}

/// What the policies of a destination decide.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// No policy is enforced there, for this reason.
    NotEnforced(String),
    /// The caller cannot connect, for this reason.
    NoIdentity(String),
    /// The clause with this name asks for the caller's address, which is not given.
    NeedsAddress(String),
    /// A token of these issuers is missing.
    NeedsToken(String),
    /// The policies are evaluated.
    Judged(Judged),
}

/// What policies say of a request. Clauses are given by their names in access logs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Judged {
    pub(super) is_refused: bool,
    pub(super) clause: Option<String>,
    /// Set where a policy with `dry_run` would refuse the request; with its clause where one says so.
    pub(super) shadow: Option<Option<String>>,
}

/// Decides about a request to a port of a service. `caller` is the service that sends it, if it is one.
pub(super) fn decide<'m>(
    mesh: &'m Mesh,
    caller: Option<&Service>,
    callee: (&'m Service, &'m Port),
    request: &Request<'_>,
) -> Decision<'m> {
    let (service, port) = callee;
    let judge = |service: &Service, port: &Port, target: &str| {
        outcome(mesh, caller, (service, port), &Arrival::new(request, target, port))
    };
    let has_sidecar = caller.is_none_or(|caller| caller.meshed);
    let is_routed = has_sidecar && !matches!(port.protocol, Protocol::Tcp | Protocol::Udp);
    let has_routes = is_routed && mesh.routes.iter().any(|route| route.is_of(service, port));
    let sent = Arrival::new(request, request.target, port);
    let table = RouteIndex::new(Arc::new(routes(mesh, service, port)));
    let found = has_routes.then(|| table.route(&sent.routed())).flatten();
    let taken = found.and_then(|found| Some((found, rule_of(mesh, callee, found)?)));
    let Some((found, (place, rule))) = taken else {
        return Decision::Direct { has_routes, outcome: judge(service, port, request.target) };
    };
    let (backends, replacement) = match &rule.target {
        RouteTarget::Redirect(redirect) => return Decision::Redirected { rule: place, redirect },
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
    Decision::Routed { rule: place, destinations: destinations.collect() }
}

/// The port of a service with a number. Two ports may have one number; policies are enforced on the one that is not
/// UDP.
pub(super) fn port_of(service: &Service, number: u16) -> Option<&Port> {
    let all = service.ports.iter().filter(|port| port.port == number);
    all.min_by_key(|port| port.protocol == Protocol::Udp)
}

/// The rule of the mesh that a route in the table of a port was made of; none for the one that leads to the service.
fn rule_of<'m>(
    mesh: &'m Mesh,
    callee: (&Service, &Port),
    found: MatchedRoute<'_>,
) -> Option<(RulePlace<'m>, &'m RouteRule)> {
    let (service, port) = callee;
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
        Some((RulePlace { route: &route.name, path }, rule))
    })
}

/// What the policies of a port decide about a request that arrives there.
fn outcome(
    mesh: &Mesh,
    caller: Option<&Service>,
    callee: (&Service, &Port),
    arrival: &Arrival<'_>,
) -> Outcome {
    let (service, port) = callee;
    if !service.meshed {
        let name = &service.name;
        let reason = format!("service {name:?} is outside the mesh; no policy is enforced");
        return Outcome::NotEnforced(reason);
    }
    if port.protocol == Protocol::Udp {
        return Outcome::NotEnforced("udp passes no sidecar; no policy is enforced".into());
    }
    if let Some(caller) = caller.filter(|caller| !caller.meshed) {
        let reason = "it has meshed: false, so it has no certificate, and the handshake fails";
        return Outcome::NoIdentity(format!("service {:?} has no identity: {reason}", caller.name));
    }
    if let Some(clause) = clause_by_address(mesh, service, port).filter(|_| !arrival.has_address())
    {
        return Outcome::NeedsAddress(clause.to_owned());
    }
    let checks = checks(mesh, service, port);
    if let Some(issuers) = missing_token(&checks, arrival) {
        return Outcome::NeedsToken(issuers);
    }
    let rules: Vec<&RbacFilter> = checks
        .iter()
        .filter_map(|check| match check {
            HttpFilter::Rbac(rules) => Some(&**rules),
            HttpFilter::Jwt(_) => None,
        })
        .collect();
    let judgement = evaluate_rbac_readings(&rules.into_iter(), arrival.each());
    let name = |clause: Option<&str>| clause.map(str::to_owned);
    let shadow = judgement.shadow.filter(|shadow| shadow.refused);
    Outcome::Judged(Judged {
        is_refused: judgement.enforced.refused,
        clause: name(judgement.enforced.policy.map(|by| &**by)),
        shadow: shadow.map(|shadow| name(shadow.policy.map(|by| &**by))),
    })
}

/// The clause of a port that decides by the caller's address.
fn clause_by_address<'m>(mesh: &'m Mesh, service: &Service, port: &Port) -> Option<&'m str> {
    let policies = mesh.policies.iter().filter(|policy| policy.service == service.name);
    let mut clauses = policies.flat_map(|policy| policy.allow.iter().chain(&policy.deny));
    let deciding = clauses.find(|clause| clause.is_of(port) && !clause.from_addresses.is_empty());
    deciding.map(|clause| clause.name.as_str())
}

/// The issuers of whom a token is required, when none of them is shown.
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

/// Whether a token of that issuer, or none, is what a request needs.
fn meets(requirement: &JwtRequirement, shown: Option<&str>) -> bool {
    match requirement {
        JwtRequirement::Provider(name, _) => shown == Some(&**name),
        JwtRequirement::Any(all) => all.iter().any(|one| meets(one, shown)),
        JwtRequirement::All(all) => all.iter().all(|one| meets(one, shown)),
        JwtRequirement::Missing => shown.is_none(),
    }
}

/// The issuers that a requirement names.
fn names(requirement: &JwtRequirement) -> Vec<&str> {
    match requirement {
        JwtRequirement::Provider(name, _) => vec![&**name],
        JwtRequirement::Any(all) | JwtRequirement::All(all) => all.iter().flat_map(names).collect(),
        JwtRequirement::Missing => Vec::new(),
    }
}

#[cfg(test)]
mod tests;
