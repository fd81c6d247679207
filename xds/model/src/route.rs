//! Routes: which cluster serves a request.

use std::sync::Arc;
use std::time::Duration;

use crate::path::{PathReadings, canonical};
use crate::{HeaderMutations, Name, PathMatch, RouteMatch, Substitution};

/// How long a response may take when the route does not say (`RouteAction.timeout`).
pub const DEFAULT_ROUTE_TIMEOUT: Duration = Duration::from_secs(15);

/// A table of routes (`envoy.config.route.v3.RouteConfiguration`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteTable {
    /// Its name.
    pub name: Name,
    /// The hosts it serves.
    pub hosts: Vec<VirtualHost>,
    /// What changes in the headers of all its requests and their responses.
    pub mutations: Option<Arc<HeaderMutations>>,
    /// Whether the changes of a route come after those of its host, and those after the table's, so that
    /// the most specific wins; else the other way round (`most_specific_header_mutations_wins`).
    pub most_specific_mutations_win: bool,
    /// Whether the port of an authority does not count when a host is chosen
    /// (`ignore_port_in_host_matching`).
    pub ignores_port: bool,
}

impl RouteTable {
    /// A table that changes no headers, for which ports count in host names.
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

/// The route of a request, and where it is.
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
    /// The changes of headers, in the order in which they are made: the cluster's first.
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

/// The routes of some host names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualHost {
    /// Its name, for logs.
    pub name: Name,
    /// `api.mesh`, `*.mesh`, `api.*` or `*`, lower case.
    pub domains: Vec<String>,
    /// In order; the first that matches wins.
    pub routes: Vec<Route>,
    /// What changes in headers.
    pub mutations: Option<Arc<HeaderMutations>>,
}

/// A match and what to do then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Its name, for logs; may be empty.
    pub name: Name,
    /// Which requests.
    pub matches: RouteMatch,
    /// What to do with them.
    pub action: RouteAction,
    /// What changes in headers.
    pub mutations: Option<Arc<HeaderMutations>>,
}

/// What to do with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteAction {
    /// Send it on.
    Forward {
        /// Where to; one is drawn by weight.
        clusters: Vec<WeightedCluster>,
        /// What becomes of the path.
        path_rewrite: Option<PathRewrite>,
        /// What replaces the authority.
        host_rewrite: Option<String>,
        /// How long from the end of the request to the end of the response; none: no limit.
        timeout: Option<Duration>,
        /// Whether a `CONNECT` ends here, and what comes through it goes on as it is (`connect_config`).
        ends_tunnels: bool,
    },
    /// Send the client elsewhere.
    Redirect(Redirect),
    /// Answer at once.
    Respond {
        /// The status.
        status: u16,
        /// The body.
        body: String,
    },
}

/// What becomes of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathRewrite {
    /// This replaces the part that the route matched (`prefix_rewrite`).
    Prefix(String),
    /// Every match of an expression in the path without its query is replaced (`regex_rewrite`).
    Regex(Box<Substitution>),
}

impl PathRewrite {
    /// The target that a request is sent on with, whose path was covered by `matched`. `readings` are those of the
    /// request's path. A path that was routed by another form than the one it was sent in keeps its form where the
    /// rewrite means the same for both. None where the target stays unchanged.
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

    /// A target after the rewrite of its path.
    fn apply(&self, matched: &PathMatch, target: &str) -> Option<String> {
        let (path, query) = split_query(target);
        let joined = match self {
            Self::Prefix(prefix) => {
                format!("{prefix}{}", target.get(matched.matched_bytes(path)..)?)
            }
            Self::Regex(substitution) => format!("{}{query}", substitution.apply(path)),
        };
        // `/` put before `/x` must become neither `//x` nor an empty path.
        let clean = if joined.starts_with("//") { joined.split_at(1).1.to_owned() } else { joined };
        Some(if clean.starts_with('/') { clean } else { format!("/{clean}") })
    }
}

/// A target's path, and its query with the question mark.
fn split_query(target: &str) -> (&str, &str) {
    target.find('?').map_or((target, ""), |at| target.split_at(at))
}

/// Where a client is sent (`RedirectAction`).
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
    /// A change of the path.
    pub path_rewrite: Option<PathRewrite>,
    /// Whether the query of the request is left out.
    pub strip_query: bool,
}

/// A cluster and its share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightedCluster {
    /// The cluster's name.
    pub name: Name,
    /// Its share, relative to the others'; not all are 0.
    pub weight: u32,
    /// What changes in headers of requests that it gets.
    pub mutations: Option<Arc<HeaderMutations>>,
}

impl WeightedCluster {
    /// A cluster with a share, for which no headers change.
    #[must_use]
    pub fn new(name: Name, weight: u32) -> Self {
        Self { name, weight, mutations: None }
    }

    /// The cluster on which `draw` falls, for a draw that is evenly spread over all of `u32`.
    #[must_use]
    pub fn draw(clusters: &[Self], draw: u32) -> Option<&Self> {
        let total: u64 = clusters.iter().map(|c| u64::from(c.weight)).sum();
        let mut point = (u64::from(draw) * total) >> 32;
        clusters.iter().find(|cluster| {
            let share = u64::from(cluster.weight);
            let here = point < share;
            point = point.saturating_sub(share);
            here
        })
    }
}

impl RouteTable {
    /// The names of the clusters that the routes send to.
    pub fn clusters(&self) -> impl Iterator<Item = &Name> {
        self.hosts
            .iter()
            .flat_map(|host| &host.routes)
            .flat_map(|route| match &route.action {
                RouteAction::Forward { clusters, .. } => clusters.as_slice(),
                RouteAction::Redirect(_) | RouteAction::Respond { .. } => &[],
            })
            .map(|cluster| &cluster.name)
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
        // The form in which the path was sent is kept where it means the same.
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
    fn a_draw_falls_by_weight() {
        let cluster = |name: &str, weight| WeightedCluster::new(name.into(), weight);
        let clusters = [cluster("a", 1), cluster("none", 0), cluster("b", 3)];
        let check = |draw: u32, expected: &str| {
            assert_eq!(
                WeightedCluster::draw(&clusters, draw).map(|c| &*c.name),
                Some(expected),
                "{draw}"
            );
        };
        check(0, "a");
        check(u32::MAX / 4, "a");
        check(u32::MAX / 4 + 2, "b");
        check(u32::MAX, "b");
        assert_eq!(WeightedCluster::draw(&[], 1), None);
    }
}
