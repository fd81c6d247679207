//! Finds the virtual host of a request by its authority.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::{MatchedRoute, RequestFacts, RouteTable, VirtualHost};

/// A route table with an index over its domains; a lookup does not depend on the number of virtual hosts.
#[derive(Debug)]
pub struct RouteIndex {
    table: Arc<RouteTable>,
    exact: HashMap<String, usize>,
    /// Domains such as `*.mesh`, by the part after the `*`.
    suffixes: Affixes,
    /// Domains such as `api.*`, by the part before the `*`.
    prefixes: Affixes,
    /// The virtual host of `*`.
    any: Option<usize>,
}

/// Prefixes or suffixes of names, longest first.
#[derive(Debug, Default)]
struct Affixes {
    hosts: HashMap<String, usize>,
    lengths: BTreeSet<Reverse<usize>>,
}

impl Affixes {
    fn add(&mut self, affix: &str, host: usize) {
        self.hosts.insert(affix.to_owned(), host);
        self.lengths.insert(Reverse(affix.len()));
    }

    /// The virtual host of the longest affix of a name. `part` gives the affix of a length.
    fn find<'n>(&self, name: &str, part: impl Fn(usize) -> Option<&'n str>) -> Option<usize> {
        // A `*` matches at least one character.
        let shorter = self.lengths.iter().filter(|Reverse(length)| *length < name.len());
        shorter
            .filter_map(|Reverse(length)| part(*length))
            .find_map(|part| self.hosts.get(part))
            .copied()
    }
}

impl RouteIndex {
    /// Indexes a table.
    #[must_use]
    pub fn new(table: Arc<RouteTable>) -> Self {
        let mut exact = HashMap::new();
        let mut any = None;
        let mut suffixes = Affixes::default();
        let mut prefixes = Affixes::default();
        for (host, of_host) in table.hosts.iter().enumerate() {
            for domain in &of_host.domains {
                if domain == "*" {
                    any = Some(host);
                } else if let Some(suffix) = domain.strip_prefix('*') {
                    suffixes.add(suffix, host);
                } else if let Some(prefix) = domain.strip_suffix('*') {
                    prefixes.add(prefix, host);
                } else {
                    exact.insert(domain.clone(), host);
                }
            }
        }
        Self { table, exact, suffixes, prefixes, any }
    }

    /// The route of a request: the most specific virtual host, then its first matching route.
    #[must_use]
    pub fn route(&self, facts: &dyn RequestFacts) -> Option<MatchedRoute<'_>> {
        let host = self.host(facts.authority())?;
        let route = host.routes.iter().find(|route| route.matches.covers(facts))?;
        Some(MatchedRoute { table: &self.table, host, route })
    }

    /// The virtual host of an authority: exact name, then longest suffix wildcard, then longest prefix wildcard,
    /// then `*` (`VirtualHost.domains`). Case-insensitive; the port is compared unless the table ignores it.
    fn host(&self, authority: &str) -> Option<&VirtualHost> {
        let name = if self.table.ignores_port { without_port(authority) } else { authority };
        let name = if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
            Cow::Owned(name.to_ascii_lowercase())
        } else {
            Cow::Borrowed(name)
        };
        let end = |length: usize| name.len().checked_sub(length);
        let found = self
            .exact
            .get(&*name)
            .copied()
            .or_else(|| self.suffixes.find(&name, |length| name.get(end(length)?..)))
            .or_else(|| self.prefixes.find(&name, |length| name.get(..length)))
            .or(self.any)?;
        self.table.hosts.get(found)
    }
}

/// The host of an authority. As in Envoy, the text after the last colon outside brackets is the port.
fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => host,
        _ => authority,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(ignores_port: bool, domains: &[&[&str]]) -> RouteIndex {
        let host = |(i, d): (usize, &&[&str])| VirtualHost {
            name: i.to_string().into(),
            domains: d.iter().map(|d| (*d).to_owned()).collect(),
            routes: Vec::new(),
            mutations: None,
        };
        let hosts = domains.iter().enumerate().map(host).collect();
        let table = RouteTable { ignores_port, ..RouteTable::new("t".into(), hosts) };
        RouteIndex::new(table.into())
    }

    const DOMAINS: &[&[&str]] = &[
        &["*"],
        &["*.mesh"],
        &["orders.*"],
        &["orders.mesh"],
        &["*.shop.mesh"],
        &["[::1]"],
        &["orders.mesh:81", "or*"],
        &["*-v1.shop.mesh:8080"],
    ];

    fn check(table: &RouteIndex, authority: &str, expected: &str) {
        assert_eq!(table.host(authority).map(|h| &*h.name), Some(expected), "{authority}");
    }

    #[test]
    fn most_specific_domain_is_used() {
        for table in [table(true, DOMAINS), table(false, DOMAINS)] {
            check(&table, "orders.mesh", "3");
            check(&table, "Orders.Mesh", "3");
            check(&table, "web.mesh", "1");
            check(&table, "a.shop.mesh", "4");
            check(&table, "orders.example", "2");
            check(&table, "example", "0");
            check(&table, "[::1]", "5");
            check(&table, ".mesh", "0");
            check(&table, "orchard", "6");
            check(&table, "or", "0");
        }
    }

    #[test]
    fn port_of_a_domain_is_compared_unless_the_table_ignores_ports() {
        let strict = table(false, DOMAINS);
        check(&strict, "orders.mesh:81", "6");
        check(&strict, "orders.mesh:8080", "2");
        check(&strict, "web.mesh:80", "0");
        check(&strict, "[::1]:80", "0");
        check(&strict, "a-V1.shop.mesh:8080", "7");
        check(&strict, "a-v1.shop.mesh:80", "0");
        let ignoring = table(true, DOMAINS);
        check(&ignoring, "orders.mesh:81", "3");
        check(&ignoring, "Orders.Mesh:8080", "3");
        check(&ignoring, "web.mesh:80", "1");
        check(&ignoring, "[::1]:80", "5");
        check(&ignoring, "a-v1.shop.mesh:8080", "4");
        check(&ignoring, "or:80", "0");
    }
}
