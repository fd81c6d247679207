//! Warnings about policy paths that do not match because a route rewrites the path first.

use std::collections::HashMap;

use weft_model::{PathMatch, PathPattern};

use super::diagnostics::Diagnostics;
use crate::mesh::{Clause, MeshRoute, Policy, RouteTarget, Service, prefix_rewrite};

/// A route rule that rewrites the paths of requests to a port of a service.
struct PrefixRewriteRule<'m> {
    route: &'m str,
    /// The path matches of the rule.
    matches: Vec<&'m PathMatch>,
    /// The replacement of the matched prefix.
    prefix: &'m str,
    port: u16,
}

impl PrefixRewriteRule<'_> {
    /// An example of a path that matches the pattern and the rule, with the rewritten path. None if no such path exists,
    /// or if the pattern describes rewritten paths.
    fn example_of_rewrite(&self, pattern: &PathPattern) -> Option<(String, String)> {
        let rewritten_form = PathMatch::Segments(self.prefix.to_owned());
        self.matches.iter().find_map(|matched| {
            let start = matched.literal_prefix();
            let paths = [pattern.example(&start), start.clone()];
            let is_taken = |path: &String| pattern.matches(path) && matched.matches(path);
            let path = paths.into_iter().find(is_taken)?;
            // With a rewrite of `/` to `/api`, a policy path `/api/users` describes a rewritten path.
            let is_rewritten_form = rewritten_form.matches(&path)
                && self.prefix.trim_end_matches('/').len() >= start.trim_end_matches('/').len();
            let rewritten = prefix_rewrite(matched, self.prefix)?.target(matched, &path, None)?;
            (rewritten != path && !is_rewritten_form).then_some((path, rewritten))
        })
    }
}

/// Adds a warning for each policy path that a route rewrites to a path that no equivalent clause covers.
pub(super) fn warn(
    services: &std::collections::BTreeMap<String, Service>,
    routes: &[MeshRoute],
    policies: &[Policy],
    warnings: &mut Diagnostics,
) {
    let rewriting = rewriting(routes);
    if rewriting.is_empty() {
        return;
    }
    let mut of_service: HashMap<&str, Vec<&Policy>> = HashMap::new();
    for policy in policies {
        of_service.entry(&policy.service).or_default().push(policy);
    }
    for (index, policy) in policies.iter().enumerate() {
        let rules = rewriting.get(policy.service.as_str());
        let (Some(rules), Some(service)) = (rules, services.get(&policy.service)) else { continue };
        let own = of_service.get(policy.service.as_str()).map_or(&[][..], Vec::as_slice);
        for (count, (place, clause)) in policy.field_paths(index).enumerate() {
            let same = equivalent(own, policy, clause, count < policy.allow.len());
            let rules = rules.iter().filter(|rule| {
                service.ports.iter().any(|port| port.port == rule.port && clause.is_of(port))
            });
            for rule in rules {
                check_paths(clause, rule, &same, &place, warnings);
            }
        }
    }
}

/// The rules that rewrite paths, by the service that they forward to.
fn rewriting(routes: &[MeshRoute]) -> HashMap<&str, Vec<PrefixRewriteRule<'_>>> {
    let mut all: HashMap<&str, Vec<PrefixRewriteRule<'_>>> = HashMap::new();
    for (route, rule) in routes.iter().flat_map(|route| route.rules.iter().map(move |r| (route, r)))
    {
        let RouteTarget::Backends { backends, prefix_replacement: Some(prefix) } = &rule.target
        else {
            continue;
        };
        for (service, port, _) in backends.iter().filter(|(_, _, weight)| *weight != 0) {
            let matches = rule.matches.iter().map(|matched| &matched.path).collect();
            let rewriting = PrefixRewriteRule { route: &route.name, matches, prefix, port: *port };
            all.entry(service).or_default().push(rewriting);
        }
    }
    all
}

/// The clauses that apply to at least the same callers and requests as a clause, apart from the paths. A rewritten path
/// that one of them covers needs no warning.
fn equivalent<'m>(
    own: &[&'m Policy],
    policy: &Policy,
    clause: &Clause,
    is_allowance: bool,
) -> Vec<&'m Clause> {
    let is_as_broad = |other: &&Clause| {
        let Clause { name: _, from, from_addresses, ports, methods, paths: _, token, claims } =
            other;
        (from.is_empty() || *from == clause.from)
            && (from_addresses.is_empty() || *from_addresses == clause.from_addresses)
            && (ports.is_empty() || *ports == clause.ports)
            && (methods.is_empty() || *methods == clause.methods)
            && (token.is_none() || *token == clause.token)
            && (claims.is_empty() || *claims == clause.claims)
    };
    own.iter()
        .filter(|other| other.dry_run == policy.dry_run)
        .flat_map(|other| if is_allowance { &other.allow } else { &other.deny })
        .filter(is_as_broad)
        .collect()
}

fn check_paths(
    clause: &Clause,
    rule: &PrefixRewriteRule<'_>,
    equivalent: &[&Clause],
    place: &str,
    warnings: &mut Diagnostics,
) {
    let covers = |clause: &&Clause, path: &str| {
        clause.paths.is_empty() || clause.paths.iter().any(|pattern| pattern.matches(path))
    };
    for (position, pattern) in clause.paths.iter().enumerate() {
        let example = rule.example_of_rewrite(pattern);
        let is_covered = |path: &str| equivalent.iter().any(|clause| covers(clause, path));
        if let Some((path, rewritten)) = example.filter(|(_, rewritten)| !is_covered(rewritten)) {
            let service = clause.name.split('.').next().unwrap_or_default();
            let route = rule.route;
            let reason = format!(
                "path {path:?} is rewritten to {rewritten:?} by route {route:?} before the policy of service \
                 {service:?} is evaluated; for requests through the route the policy must list the rewritten path"
            );
            warnings.add(format!("{place}.paths[{position}]"), reason);
        }
    }
}
