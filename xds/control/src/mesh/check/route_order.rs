//! Warnings about routes that have no effect: routes without services or rules, and rules that are never reached because
//! earlier rules match the same requests.

use std::collections::{BTreeMap, HashMap};

use weft_model::{PathMatch, RouteMatch};

use super::diagnostics::Diagnostics;
use crate::mesh::{MeshRoute, Port, Protocol, Service, raw};

/// A rule by its indexes in the file: of the route, and in the route.
type RuleIndex = (usize, usize);

/// Identifies a list of routes that are tried in order: service, port, and host name or `*`.
type RouteList<'m> = (&'m str, u16, &'m str);

/// Adds warnings for routes without services or rules, for rules that no request reaches, and for tcp ports that an HTTP
/// route cannot apply to.
pub(super) fn warn(
    raw: &raw::RawMesh,
    services: &BTreeMap<String, Service>,
    routes: &[MeshRoute],
    warnings: &mut Diagnostics,
) {
    for (index, route) in raw.routes.iter().enumerate() {
        let empty = [
            ("parentRefs", route.parent_refs.is_empty(), "services"),
            ("rules", route.rules.is_empty(), "rules"),
        ];
        for (field, _, items) in empty.into_iter().filter(|(_, is_empty, _)| *is_empty) {
            let reason = format!("route {:?} has no effect: it has no {items}", route.name);
            warnings.add(format!("routes[{index}].{field}"), reason);
        }
        for (position, parent) in route.parent_refs.iter().enumerate() {
            let path = format!("routes[{index}].parentRefs[{position}]");
            let service = services.get(&parent.name);
            for port in tcp_ports(service).filter(|_| parent.port.is_none()) {
                let name = &route.name;
                let service = &parent.name;
                let number = port.port;
                let reason = format!(
                    "route {name:?} does not apply to port {number} of service {service:?}: it carries tcp; set \
                     the port in parentRefs"
                );
                warnings.add(&path, reason);
            }
        }
    }
    unreachable_rules(services, routes, warnings);
}

fn tcp_ports(service: Option<&Service>) -> impl Iterator<Item = &Port> {
    let ports = service.map_or(&[][..], |service| &service.ports);
    ports.iter().filter(|port| port.protocol == Protocol::Tcp)
}

/// Adds a warning for each rule whose requests all match earlier rules, in every list of routes that it is part of.
fn unreachable_rules(
    services: &BTreeMap<String, Service>,
    routes: &[MeshRoute],
    warnings: &mut Diagnostics,
) {
    let mut lists: HashMap<RouteList<'_>, EarlierMatches<'_>> = HashMap::new();
    for (index, route) in routes.iter().enumerate() {
        let keys = lists_of(route, services);
        for (position, rule) in route.rules.iter().enumerate() {
            let place = (index, position);
            let mut covering = None;
            let mut is_reachable = keys.is_empty();
            for key in &keys {
                let earlier = lists.entry(*key).or_default();
                for matched in &rule.matches {
                    match earlier.covering(matched) {
                        Some(first) => covering = Some(first),
                        None => is_reachable = true,
                    }
                }
            }
            for key in &keys {
                let earlier = lists.entry(*key).or_default();
                rule.matches.iter().for_each(|matched| earlier.add(matched, place));
            }
            if let Some((route, rule)) = covering.filter(|_| !is_reachable) {
                let reason = format!(
                    "no request reaches this rule: rules are tried in order, and routes[{route}].rules[{rule}] matches \
                     the same requests"
                );
                warnings.add(format!("routes[{index}].rules[{position}]"), reason);
            }
        }
    }
}

/// The lists of routes that a route is part of.
fn lists_of<'m>(
    route: &'m MeshRoute,
    services: &'m BTreeMap<String, Service>,
) -> Vec<RouteList<'m>> {
    let hosts: Vec<&str> = match route.hostnames.as_slice() {
        [] => vec!["*"],
        names => names.iter().map(String::as_str).collect(),
    };
    let parents = route.parents.iter().filter_map(|parent| services.get(&parent.service));
    let mut lists = Vec::new();
    for service in parents {
        for port in service.ports.iter().filter(|port| route.is_of(service, port)) {
            lists.extend(hosts.iter().map(|host| (service.name.as_str(), port.port, *host)));
        }
    }
    lists.sort_unstable();
    lists.dedup();
    lists
}

/// The matches of earlier rules, by path.
#[derive(Debug, Default)]
struct EarlierMatches<'m> {
    exact: HashMap<&'m str, Vec<(&'m RouteMatch, RuleIndex)>>,
    /// By path prefix in whole segments; the empty prefix matches every path.
    prefixes: HashMap<&'m str, Vec<(&'m RouteMatch, RuleIndex)>>,
}

impl<'m> EarlierMatches<'m> {
    fn add(&mut self, matched: &'m RouteMatch, place: RuleIndex) {
        let known = match &matched.path {
            PathMatch::Exact(path) => self.exact.entry(path).or_default(),
            PathMatch::Segments(path) => self.prefixes.entry(path).or_default(),
            _ => self.prefixes.entry("").or_default(),
        };
        known.push((matched, place));
    }

    /// The first rule that matches every request of a match.
    fn covering(&self, matched: &RouteMatch) -> Option<RuleIndex> {
        let (path, is_exact) = match &matched.path {
            PathMatch::Exact(path) => (path.as_str(), true),
            PathMatch::Segments(path) => (path.as_str(), false),
            _ => ("", false),
        };
        let exact = self.exact.get(path).filter(|_| is_exact);
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        let above = ends.filter_map(|end| self.prefixes.get(path.get(..end)?));
        let known = exact.into_iter().chain(above).flatten();
        known
            .filter(|(earlier, _)| {
                earlier.headers.iter().all(|header| matched.headers.contains(header))
                    && earlier.query.iter().all(|query| matched.query.contains(query))
            })
            .map(|(_, place)| *place)
            .min()
    }
}
