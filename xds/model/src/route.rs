//! Route tables: which cluster serves a request, or which reply the proxy gives.

use std::sync::Arc;
use std::time::Duration;

use crate::path::{PathReadings, canonical};
use crate::{HeaderMutations, Name, PathMatch, RouteMatch, Substitution};

/// The default of `RouteAction.timeout`.
pub const DEFAULT_ROUTE_TIMEOUT: Duration = Duration::from_secs(15);

/// A table of routes (`envoy.config.route.v3.RouteConfiguration`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteTable {
    /// Its name.
    pub name: Name,
    /// The virtual hosts.
    pub hosts: Vec<VirtualHost>,
    /// Header changes of all requests and responses.
    pub mutations: Option<Arc<HeaderMutations>>,
    /// The order of header changes: true, table, host, route, so that the route's win; false, the reverse
    /// (`most_specific_header_mutations_wins`).
    pub most_specific_mutations_win: bool,
    /// Whether the port of an authority is ignored when a virtual host is chosen
    /// (`ignore_port_in_host_matching`).
    pub ignores_port: bool,
}

impl RouteTable {
    /// A table without header changes that compares authorities with their ports.
    #[must_use]
    pub fn new(name: Name, hosts: Vec<VirtualHost>) -> Self {
        Self {
            name,
            hosts,
            mutations: None,
            most_specific_mutations_win: false,
            ignores_port: false,
        }
    }
}

/// The route of a request, with its virtual host and table.
#[derive(Debug, Clone, Copy)]
pub struct MatchedRoute<'t> {
    /// The table.
    pub table: &'t RouteTable,
    /// The virtual host.
    pub host: &'t VirtualHost,
    /// The route.
    pub route: &'t Route,
}

impl<'t> MatchedRoute<'t> {
    /// The header changes, in the order in which they are applied: the cluster's first.
    pub fn mutations(
        &self,
        cluster: Option<&'t WeightedCluster>,
    ) -> impl Iterator<Item = &'t HeaderMutations> + use<'t> {
        let mut levels = [&self.route.mutations, &self.host.mutations, &self.table.mutations];
        if self.table.most_specific_mutations_win {
            levels.reverse();
        }
        let cluster = cluster.and_then(|cluster| cluster.mutations.as_deref());
        cluster.into_iter().chain(levels.into_iter().filter_map(|level| level.as_deref()))
    }
}

/// The routes of a set of domains (`envoy.config.route.v3.VirtualHost`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualHost {
    /// Its name, for logs.
    pub name: Name,
    /// `api.mesh`, `*.mesh`, `api.*` or `*`, lower case.
    pub domains: Vec<String>,
    /// The routes in order; the first match is used.
    pub routes: Vec<Route>,
    /// Header changes.
    pub mutations: Option<Arc<HeaderMutations>>,
}

/// A match and an action (`envoy.config.route.v3.Route`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Its name, for logs; may be empty.
    pub name: Name,
    /// Which requests match.
    pub matches: RouteMatch,
    /// What to do with them.
    pub action: RouteAction,
    /// Header changes.
    pub mutations: Option<Arc<HeaderMutations>>,
}

/// What to do with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteAction {
    /// Forward it to a cluster.
    Forward {
        /// The clusters; one is picked by weight.
        clusters: Vec<WeightedCluster>,
        /// How the path is rewritten.
        path_rewrite: Option<PathRewrite>,
        /// The new authority.
        host_rewrite: Option<String>,
        /// The longest time from the end of the request to the end of the response; none: no limit.
        timeout: Option<Duration>,
        /// Whether a `CONNECT` tunnel is terminated here and its payload is forwarded as TCP (`connect_config`).
        ends_tunnels: bool,
    },
    /// Reply with a redirect.
    Redirect(Redirect),
    /// Reply with a fixed response (`direct_response`).
    Respond {
        /// The status.
        status: u16,
        /// The body.
        body: String,
    },
}

/// How a path is rewritten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathRewrite {
    /// Replaces the part that the route matched (`prefix_rewrite`).
    Prefix(String),
    /// Replaces every match of an expression in the path without its query (`regex_rewrite`).
    Regex(Box<Substitution>),
}

impl PathRewrite {
    /// The rewritten target of a request whose path matched `matched`; none when it does not change. `readings` are
    /// those of the request's path. The request may have been routed by another form of its path than the one sent:
    /// the form as sent is kept when the rewritten paths of both forms are equivalent.
    #[must_use]
    pub fn target(
        &self,
        matched: &PathMatch,
        target: &str,
        readings: Option<&PathReadings>,
    ) -> Option<String> {
        let Some(reading) = readings.and_then(|readings| readings.get(0)) else {
            return self.apply(matched, target);
        };
        let (path, query) = split_query(target);
        let routed = self.apply(matched, &format!("{}{query}", reading.path()))?;
        let as_sent = self
            .apply(matched, target)
            .filter(|_| matched.matches(path))
            .filter(|sent| canonical(split_query(sent).0) == canonical(split_query(&routed).0));
        Some(as_sent.unwrap_or(routed))
    }

    /// The target with its path rewritten.
    fn apply(&self, matched: &PathMatch, target: &str) -> Option<String> {
        let (path, query) = split_query(target);
        let joined = match self {
            Self::Prefix(prefix) => {
                format!("{prefix}{}", target.get(matched.matched_bytes(path)..)?)
            }
            Self::Regex(substitution) => format!("{}{query}", substitution.apply(path)),
        };
        // The result must neither begin with `//` nor be empty.
        let clean = if joined.starts_with("//") { joined.split_at(1).1.to_owned() } else { joined };
        Some(if clean.starts_with('/') { clean } else { format!("/{clean}") })
    }
}

/// Splits a target into its path and its query with the question mark.
fn split_query(target: &str) -> (&str, &str) {
    target.find('?').map_or((target, ""), |at| target.split_at(at))
}

/// A redirect (`RedirectAction`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// The status: 301, 302, 303, 307 or 308.
    pub status: u16,
    /// `https` to change the scheme.
    pub scheme: Option<String>,
    /// The host, when it changes.
    pub host: Option<String>,
    /// The port, when it changes.
    pub port: Option<u16>,
    /// The whole path, when it changes.
    pub path: Option<String>,
    /// How the path is rewritten.
    pub path_rewrite: Option<PathRewrite>,
    /// Whether the query of the request is removed.
    pub strip_query: bool,
}

/// A cluster and its share of the traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightedCluster {
    /// The cluster's name.
    pub name: Name,
    /// The share, relative to the other clusters' weights; at least one weight of a list is not 0.
    pub weight: u32,
    /// Header changes of requests to this cluster, and of their responses.
    pub mutations: Option<Arc<HeaderMutations>>,
}

impl WeightedCluster {
    /// A cluster without header changes.
    #[must_use]
    pub fn new(name: Name, weight: u32) -> Self {
        Self { name, weight, mutations: None }
    }

    /// Picks a cluster by weight. `random` must be uniformly distributed over all of `u32`.
    #[must_use]
    pub fn pick(clusters: &[Self], random: u32) -> Option<&Self> {
        let total: u64 = clusters.iter().map(|c| u64::from(c.weight)).sum();
        let mut point = (u64::from(random) * total) >> 32;
        clusters.iter().find(|cluster| {
            let share = u64::from(cluster.weight);
            let here = point < share;
            point = point.saturating_sub(share);
            here
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Pattern;

    #[test]
    fn prefix_rewrite_replaces_the_matched_part_and_keeps_the_rest() {
        let check = |path: PathMatch, prefix: &str, target: &str, expected: &str| {
            let rewrite = PathRewrite::Prefix(prefix.into());
            let readings = PathReadings::of(split_query(target).0);
            let rewritten = rewrite.target(&path, target, readings.as_ref());
            assert_eq!(rewritten.as_deref(), Some(expected), "{target}");
        };
        check(PathMatch::Segments("/v1".into()), "/", "/v1/x?y", "/x?y");
        check(PathMatch::Segments("/v1".into()), "/", "/v1", "/");
        check(PathMatch::Prefix("/v1/".into()), "/v2/", "/v1/x", "/v2/x");
        check(PathMatch::Exact("/a".into()), "/b", "/a?q", "/b?q");
        // The path keeps the form in which it was sent where both are equivalent.
        check(PathMatch::Segments("/v1".into()), "/v2", "/v1/%61", "/v2/%61");
        check(PathMatch::Segments("/v1".into()), "/v2", "/x/../v1/a?q", "/v2/a?q");
        check(PathMatch::Segments("/v1".into()), "/v2", "/v1/../v1/a", "/v2/a");
    }

    #[test]
    fn regex_rewrite_keeps_the_query() {
        let any = PathMatch::Prefix("/".into());
        let check = |pattern: &str, to: &str, target: &str, expected: &str| {
            let pattern = Pattern::parse(pattern).expect("an expression");
            let substitution = Substitution::parse(pattern, to).expect("a substitution");
            let rewritten = PathRewrite::Regex(substitution.into()).target(&any, target, None);
            assert_eq!(rewritten.as_deref(), Some(expected), "{target}");
        };
        check("^/(.*)/old$", r"/\1/new", "/a/old?x=/b/old", "/a/new?x=/b/old");
        check("^/a", "", "/a", "/");
        check("^/a", "", "/a//b", "/b");
    }

    #[test]
    fn clusters_are_picked_by_weight() {
        let cluster = |name: &str, weight| WeightedCluster::new(name.into(), weight);
        let clusters = [cluster("a", 1), cluster("none", 0), cluster("b", 3)];
        let check = |draw: u32, expected: &str| {
            assert_eq!(
                WeightedCluster::pick(&clusters, draw).map(|c| &*c.name),
                Some(expected),
                "{draw}"
            );
        };
        check(0, "a");
        check(u32::MAX / 4, "a");
        check(u32::MAX / 4 + 2, "b");
        check(u32::MAX, "b");
        assert_eq!(WeightedCluster::pick(&[], 1), None);
    }
}
