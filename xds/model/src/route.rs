//! Routes: which cluster serves a request.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use crate::{HeaderMutations, Name, PathTemplate, RequestFacts, StringMatch, Substitution};

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
}

impl RouteTable {
    /// A table that changes no headers.
    #[must_use]
    pub fn new(name: Name, hosts: Vec<VirtualHost>) -> Self {
        Self { name, hosts, mutations: None, most_specific_mutations_win: false }
    }
}

/// A table of routes whose hosts are found by their names, however many there are.
#[derive(Debug)]
pub struct RouteIndex {
    table: Arc<RouteTable>,
    exact: HashMap<String, usize>,
    /// By what stands behind the `*`.
    suffixes: Affixes,
    /// By what stands before the `*`.
    prefixes: Affixes,
    /// The host of `*`.
    any: Option<usize>,
}

/// Beginnings or ends of names, longest first.
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

    /// The host of the longest affix of one of `names`; `part` cuts one of that length off a name.
    fn find<'n>(
        &self,
        names: [&'n str; 2],
        part: impl Fn(&'n str, usize) -> Option<&'n str>,
    ) -> Option<usize> {
        let of_length = |length: usize| {
            // A `*` stands for at least one character.
            let parts = names.into_iter().filter(|name| name.len() > length);
            parts.filter_map(|name| part(name, length)).find_map(|part| self.hosts.get(part))
        };
        self.lengths.iter().find_map(|Reverse(length)| of_length(*length)).copied()
    }
}

impl RouteIndex {
    /// Indexes a table.
    #[must_use]
    pub fn new(table: Arc<RouteTable>) -> Self {
        let (mut exact, mut any) = (HashMap::new(), None);
        let (mut suffixes, mut prefixes) = (Affixes::default(), Affixes::default());
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

    /// The route of a request: the most specific host, then the first match.
    #[must_use]
    pub fn route(&self, facts: &dyn RequestFacts) -> Option<Found<'_>> {
        let host = self.host(facts.authority())?;
        let route = host.routes.iter().find(|route| route.matches.covers(facts))?;
        Some(Found { table: &self.table, host, route })
    }

    /// The host that serves an authority: exact name, then longest suffix wildcard, then longest
    /// prefix wildcard, then `*` (`VirtualHost.domains`). The port is left out of the comparison
    /// unless a domain names one.
    fn host(&self, authority: &str) -> Option<&VirtualHost> {
        let lower = if authority.bytes().any(|byte| byte.is_ascii_uppercase()) {
            Cow::Owned(authority.to_ascii_lowercase())
        } else {
            Cow::Borrowed(authority)
        };
        let names = [&*lower, without_port(&lower)];
        let end =
            |name: &'_ str, length: usize| -> Option<usize> { name.len().checked_sub(length) };
        let found = names
            .iter()
            .find_map(|name| self.exact.get(*name).copied())
            .or_else(|| self.suffixes.find(names, |name, n| name.get(end(name, n)?..)))
            .or_else(|| self.prefixes.find(names, |name, n| name.get(..n)))
            .or(self.any)?;
        self.table.hosts.get(found)
    }
}

/// The route of a request, and where it is.
#[derive(Debug, Clone, Copy)]
pub struct Found<'t> {
    /// The table.
    pub table: &'t RouteTable,
    /// The virtual host.
    pub host: &'t VirtualHost,
    /// The route.
    pub route: &'t Route,
}

impl<'t> Found<'t> {
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
    pub action: Action,
    /// What changes in headers.
    pub mutations: Option<Arc<HeaderMutations>>,
}

/// Which requests a route or rule covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteMatch {
    /// The path.
    pub path: PathMatch,
    /// All of these headers.
    pub headers: Vec<HeaderMatch>,
    /// All of these query parameters.
    pub query: Vec<(String, StringMatch)>,
}

impl RouteMatch {
    /// A match that covers every request.
    #[must_use]
    pub fn any() -> Self {
        Self { path: PathMatch::Prefix("/".into()), headers: Vec::new(), query: Vec::new() }
    }

    /// Whether the request is covered.
    #[must_use]
    pub fn covers(&self, facts: &dyn RequestFacts) -> bool {
        facts.path_fits(&mut |path| self.path.matches(path))
            && self.headers.iter().all(|header| header.matches(facts))
            && self
                .query
                .iter()
                .all(|(name, value)| facts.query(name).is_some_and(|v| value.matches(v)))
    }
}

/// Which paths, without the query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    /// The beginning, byte by byte (`prefix`).
    Prefix(String),
    /// The whole (`path`).
    Exact(String),
    /// Whole segments: `/cart` covers `/cart` and `/cart/1`, not `/cartoon` (`path_separated_prefix`).
    Segments(String),
    /// A path with wildcards (`path_match_policy` with `uri_template`).
    Template(PathTemplate),
    /// No path: the request is a `CONNECT` (`connect_matcher`).
    Connect,
}

impl PathMatch {
    /// Whether the path is covered.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Prefix(want) | Self::Segments(want) if want == "/" && path == "*" => true,
            Self::Prefix(want) => path.starts_with(want.as_str()),
            Self::Exact(want) => path == want,
            Self::Segments(want) => path
                .strip_prefix(want.trim_end_matches('/'))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
            Self::Template(want) => want.matches(path),
            // Such a request has no path, and no other is without one.
            Self::Connect => path.is_empty(),
        }
    }

    /// What every covered path begins with.
    #[must_use]
    pub fn literal_prefix(&self) -> String {
        match self {
            Self::Prefix(want) | Self::Exact(want) => want.clone(),
            Self::Segments(want) => want.trim_end_matches('/').to_owned(),
            Self::Template(want) => want.literal_prefix(),
            Self::Connect => String::new(),
        }
    }

    /// Whether a path may be covered by both. True as well where that is not known.
    #[must_use]
    pub fn may_overlap(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Connect, _) | (_, Self::Connect) => self == other,
            (Self::Exact(path), other) | (other, Self::Exact(path)) => other.matches(path),
            _ => {
                let (ours, theirs) = (self.literal_prefix(), other.literal_prefix());
                ours.starts_with(&theirs) || theirs.starts_with(&ours)
            }
        }
    }

    /// The part of a path that a prefix rewrite replaces, in bytes.
    #[must_use]
    pub fn matched_bytes(&self) -> usize {
        match self {
            Self::Prefix(want) | Self::Exact(want) => want.len(),
            Self::Segments(want) => want.trim_end_matches('/').len(),
            // Translation refuses a rewrite of the prefix beside a template.
            Self::Template(_) | Self::Connect => 0,
        }
    }
}

/// A condition on a header; `:method`, `:path` and `:authority` count as headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderMatch {
    /// The name, lower case.
    pub name: String,
    /// What to ask of it.
    pub check: HeaderCheck,
    /// Whether the answer is turned around. What is asked of a value says nothing of a header that is
    /// missing: such a header does not match, turned around or not.
    pub invert: bool,
}

/// What to ask of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderCheck {
    /// It is there.
    Present,
    /// It is there and its value matches.
    Value(StringMatch),
}

impl HeaderMatch {
    /// Whether the request fits.
    #[must_use]
    pub fn matches(&self, facts: &dyn RequestFacts) -> bool {
        let mut is_there = false;
        let mut fits = |value: &str| {
            is_there = true;
            match &self.check {
                HeaderCheck::Present => true,
                HeaderCheck::Value(want) => want.matches(value),
            }
        };
        // Each value of a field counts: one behind another must not hide from a policy.
        let any_fits = match self.name.as_str() {
            ":method" => fits(facts.method()),
            ":path" => fits(facts.path()),
            ":authority" | "host" => fits(facts.authority()),
            name => facts.has_header(name, &mut fits),
        };
        if is_there {
            any_fits != self.invert
        } else {
            self.check == HeaderCheck::Present && self.invert
        }
    }
}

/// What to do with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
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
                Action::Forward { clusters, .. } => clusters.as_slice(),
                Action::Redirect(_) | Action::Respond { .. } => &[],
            })
            .map(|cluster| &cluster.name)
    }
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port))
            if port.bytes().all(|b| b.is_ascii_digit())
                && (!host.contains(':') || host.ends_with(']')) =>
        {
            host
        }
        _ => authority,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(domains: &[&[&str]]) -> RouteIndex {
        let host = |(i, d): (usize, &&[&str])| VirtualHost {
            name: i.to_string().into(),
            domains: d.iter().map(|d| (*d).to_owned()).collect(),
            routes: Vec::new(),
            mutations: None,
        };
        let hosts = domains.iter().enumerate().map(host).collect();
        RouteIndex::new(RouteTable::new("t".into(), hosts).into())
    }

    #[test]
    fn the_most_specific_domain_wins() {
        let table = table(&[
            &["*"],
            &["*.mesh"],
            &["orders.*"],
            &["orders.mesh"],
            &["*.shop.mesh"],
            &["[::1]"],
            &["orders.mesh:81", "or*"],
        ]);
        let check = |authority: &str, expected: &str| {
            assert_eq!(table.host(authority).map(|h| &*h.name), Some(expected), "{authority}");
        };
        check("orders.mesh", "3");
        check("Orders.Mesh:8080", "3");
        check("web.mesh", "1");
        check("a.shop.mesh", "4");
        check("orders.example", "2");
        check("example", "0");
        check("[::1]:80", "5");
        check(".mesh", "0");
        check("orders.mesh:81", "6");
        check("orchard", "6");
        check("or", "0");
    }

    #[test]
    fn segments_are_whole() {
        let check = |prefix: &str, path: &str, expected: bool| {
            assert_eq!(
                PathMatch::Segments(prefix.into()).matches(path),
                expected,
                "{prefix} {path}"
            );
        };
        check("/cart", "/cart", true);
        check("/cart", "/cart/1", true);
        check("/cart", "/cartoon", false);
        check("/", "/anything", true);
        check("/cart/", "/cart/1", true);
        // The route of everything takes what is asked of the whole server too.
        check("/", "*", true);
        check("/cart", "*", false);
    }

    /// A request with these values of the header `x`.
    struct With<'v>(&'v [&'v str]);

    impl RequestFacts for With<'_> {
        fn method(&self) -> &str {
            "GET"
        }
        fn path(&self) -> &str {
            "/"
        }
        fn authority(&self) -> &str {
            "a"
        }
        fn has_header(&self, name: &str, fits: &mut dyn FnMut(&str) -> bool) -> bool {
            name == "x" && self.0.iter().any(|value| fits(value))
        }
        fn query(&self, _: &str) -> Option<&str> {
            None
        }
        fn has_claim(&self, _: &str, _: &[String], _: &mut dyn FnMut(&str) -> bool) -> bool {
            false
        }
        fn peer(&self) -> Option<&crate::SpiffeId> {
            None
        }
        fn remote_address(&self) -> std::net::IpAddr {
            [10, 0, 0, 1].into()
        }
        fn client_address(&self) -> std::net::IpAddr {
            self.remote_address()
        }
        fn destination_port(&self) -> u16 {
            80
        }
    }

    #[test]
    fn inverted_matcher_of_a_value_does_not_match_a_missing_header() {
        let exact = HeaderCheck::Value(StringMatch::Exact("a".into()));
        // Missing, empty, `a`, `b` before `a`, `b`: as Envoy 1.40 decides.
        let check = |check: &HeaderCheck, invert, expected: [bool; 5]| {
            let matcher = HeaderMatch { name: "x".into(), check: check.clone(), invert };
            let values: [&[&str]; 5] = [&[], &[""], &["a"], &["b", "a"], &["b"]];
            assert_eq!(
                values.map(|values| matcher.matches(&With(values))),
                expected,
                "{matcher:?}"
            );
        };
        check(&exact, false, [false, false, true, true, false]);
        check(&exact, true, [false, true, false, false, true]);
        check(&HeaderCheck::Present, false, [false, true, true, true, true]);
        check(&HeaderCheck::Present, true, [true, false, false, false, false]);
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
