//! Warming: which version of each resource is in use while resources that it refers to are missing.
//!
//! As in Envoy, only resources that depend on a missing one wait for it: a new cluster for its endpoints, a new listener
//! for its routes, both for their secrets, for at most 15 s (`initial_fetch_timeout`). Until then the last version of
//! the waiting resource stays in use, if there is one. Every other change applies at once.
//!
//! Unlike in Envoy, routes also wait for their clusters, so that no request fails because of the order of the server's
//! messages (make before break, gRFC A74). They wait for at most 1 s, because a cluster may never arrive.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_model::{Cluster, Discovery, Listener, MissingReference, Name, Snapshot};

/// How long a resource waits for requested resources: Envoy's default of `initial_fetch_timeout`.
const FETCH_TIMEOUT: Duration = Duration::from_secs(15);
/// How long routes wait for a cluster, and a cluster for its first DNS answer.
const CLUSTER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the first configuration waits as a whole. Longer than `CLUSTER_TIMEOUT`, because nothing is served yet, and
/// an agent takes over the kernel state of its predecessor.
const FIRST_TIMEOUT: Duration = Duration::from_secs(2);

fn timeout(missing: &MissingReference) -> Duration {
    match missing {
        MissingReference::Endpoints(_)
        | MissingReference::Routes(_)
        | MissingReference::Secret(_) => FETCH_TIMEOUT,
        MissingReference::Cluster(_) | MissingReference::Addresses(_) => CLUSTER_TIMEOUT,
    }
}

/// Decides which resources are in use. Does no I/O; the time is an argument of each call.
#[derive(Debug, Default)]
pub struct Warming {
    in_force: Snapshot,
    /// The configuration last offered.
    candidate: Snapshot,
    /// Missing names of the candidate, with the time when each was first missing.
    missed: BTreeMap<MissingReference, Instant>,
    /// Missing names that delay a resource.
    blocking: BTreeSet<MissingReference>,
    /// Missing names that the server has reported as nonexistent.
    absent: BTreeSet<MissingReference>,
    /// Names that timed out since [`Warming::take_overdue`].
    overdue: Vec<MissingReference>,
    began: Option<Instant>,
    is_settled: bool,
}

impl Warming {
    /// Without a configuration.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a new configuration; returns the one to serve, if that changes. `is_absent` is true for names that the
    /// server has reported as nonexistent: no resource waits for those.
    pub fn offer(
        &mut self,
        candidate: Snapshot,
        is_absent: impl Fn(&MissingReference) -> bool,
        now: Instant,
    ) -> Option<Snapshot> {
        self.candidate = candidate;
        self.advance(&is_absent, now)
    }

    /// Checks the timeouts; returns the configuration to serve, if that changes.
    pub fn tick(&mut self, now: Instant) -> Option<Snapshot> {
        if self.blocking.is_empty() {
            return None;
        }
        let absent = std::mem::take(&mut self.absent);
        self.advance(&|missing| absent.contains(missing), now)
    }

    /// When [`Warming::tick`] should be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let names = self.blocking.iter();
        let ends = names.filter_map(|name| Some(*self.missed.get(name)? + timeout(name))).min()?;
        let first = self.began.filter(|_| self.in_force.revision == 0);
        Some(first.map_or(ends, |began| ends.min(began + FIRST_TIMEOUT)))
    }

    /// The missing names, whether a resource still waits for them or not.
    #[must_use]
    pub fn missing(&self) -> Vec<MissingReference> {
        self.missed.keys().cloned().collect()
    }

    /// Whether the whole first configuration is in use, or its fetch timeout has passed.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    /// The names that timed out since the last call.
    pub fn take_overdue(&mut self) -> Vec<MissingReference> {
        std::mem::take(&mut self.overdue)
    }

    fn advance(
        &mut self,
        is_absent: &dyn Fn(&MissingReference) -> bool,
        now: Instant,
    ) -> Option<Snapshot> {
        let ends = |name: &MissingReference| *self.missed.get(name).unwrap_or(&now) + timeout(name);
        let blocks = |name: &MissingReference| !is_absent(name) && now < ends(name);
        let merged = SnapshotMerge::of(&self.in_force, &self.candidate, &blocks);
        let SnapshotMerge { mut next, missed, blocking, .. } = merged;
        let (absent, missed): (BTreeSet<MissingReference>, BTreeSet<MissingReference>) =
            missed.into_iter().partition(is_absent);
        let timed_out = self.blocking.difference(&blocking).filter(|name| missed.contains(*name));
        self.overdue.extend(timed_out.cloned());
        self.missed.retain(|name, _| missed.contains(name));
        for name in missed {
            self.missed.entry(name).or_insert(now);
        }
        self.absent = absent;
        self.blocking = blocking;
        let began = *self.began.get_or_insert(now);
        let is_first = self.in_force.revision == 0;
        if is_first && !self.blocking.is_empty() && now < began + FIRST_TIMEOUT {
            return None;
        }
        self.is_settled |= self.blocking.is_empty() || now >= began + FETCH_TIMEOUT;
        next.revision = self.in_force.revision;
        if !is_first && next == self.in_force {
            return None;
        }
        next.revision += 1;
        self.in_force = next;
        Some(self.in_force.clone())
    }
}

/// The merge of the configuration in use and a candidate.
struct SnapshotMerge<'a> {
    old: &'a Snapshot,
    new: &'a Snapshot,
    blocks: &'a dyn Fn(&MissingReference) -> bool,
    next: Snapshot,
    missed: BTreeSet<MissingReference>,
    blocking: BTreeSet<MissingReference>,
    /// Resources of `next` in their old version, because the new one is delayed.
    held_tables: BTreeSet<Name>,
    held_listeners: BTreeSet<Name>,
}

impl<'a> SnapshotMerge<'a> {
    fn of(
        old: &'a Snapshot,
        new: &'a Snapshot,
        blocks: &'a dyn Fn(&MissingReference) -> bool,
    ) -> Self {
        let next = Snapshot {
            endpoints: new.endpoints.clone(),
            resolved: new.resolved.clone(),
            secrets: new.secrets.clone(),
            ..Snapshot::default()
        };
        let mut merge = Self {
            old,
            new,
            blocks,
            next,
            missed: BTreeSet::new(),
            blocking: BTreeSet::new(),
            held_tables: BTreeSet::new(),
            held_listeners: BTreeSet::new(),
        };
        merge.clusters();
        merge.tables();
        merge.listeners();
        merge.retain();
        merge
    }

    /// Records missing names. Returns whether one of them delays the resource.
    fn record_missing(&mut self, missing: Vec<MissingReference>) -> bool {
        let mut is_held = false;
        for name in missing {
            if (self.blocks)(&name) {
                self.blocking.insert(name.clone());
                is_held = true;
            }
            self.missed.insert(name);
        }
        is_held
    }

    fn clusters(&mut self) {
        for (name, cluster) in &self.new.clusters {
            let cluster = match self.record_missing(self.new.missing_of_cluster(cluster)) {
                false => Some(cluster),
                true => self.old.clusters.get(name),
            };
            self.next.clusters.extend(cluster.map(|cluster| (name.clone(), cluster.clone())));
        }
    }

    fn lacking_clusters<'n>(&self, names: impl Iterator<Item = &'n Name>) -> Vec<MissingReference> {
        let lacking = names.filter(|name| !self.next.clusters.contains_key(*name));
        lacking.map(|name| MissingReference::Cluster(name.clone())).collect()
    }

    fn tables(&mut self) {
        for (name, table) in &self.new.routes {
            let table = match self.record_missing(self.lacking_clusters(table.cluster_names())) {
                false => Some(table),
                true => {
                    self.held_tables.insert(name.clone());
                    self.old.routes.get(name)
                }
            };
            self.next.routes.extend(table.map(|table| (name.clone(), table.clone())));
        }
    }

    fn listeners(&mut self) {
        for (name, listener) in &self.new.listeners {
            let tables =
                listener.table_names().filter(|table| !self.next.routes.contains_key(*table));
            // A table that is delayed itself does not count as missing.
            let (held, lacking): (Vec<&Name>, Vec<&Name>) =
                tables.partition(|table| self.held_tables.contains(*table));
            let lacking: Vec<MissingReference> = lacking
                .into_iter()
                .map(|table| MissingReference::Routes(table.clone()))
                .chain(self.new.missing_secrets(listener.secret_names()))
                .chain(self.lacking_clusters(listener.cluster_names()))
                .collect();
            if !self.record_missing(lacking) && held.is_empty() {
                self.next.listeners.insert(name.clone(), listener.clone());
                continue;
            }
            let predecessors = self.old.listeners.iter().filter(|(old_name, old)| {
                let is_renamed = !self.new.listeners.contains_key(*old_name)
                    && old.address == listener.address
                    && old.transport == listener.transport;
                *old_name == name || is_renamed
            });
            for (name, old) in predecessors {
                self.held_listeners.insert(name.clone());
                self.next.listeners.insert(name.clone(), old.clone());
            }
        }
    }

    /// Keeps resources that the candidate no longer has, when old versions that stay in use refer to them.
    fn retain(&mut self) {
        let listeners: Vec<Arc<Listener>> = self
            .held_listeners
            .iter()
            .filter_map(|name| self.old.listeners.get(name).cloned())
            .collect();
        let mut clusters: Vec<Name> = Vec::new();
        for listener in &listeners {
            for name in listener.table_names() {
                if !self.next.routes.contains_key(name)
                    && let Some(table) = self.old.routes.get(name)
                {
                    self.next.routes.insert(name.clone(), table.clone());
                    self.held_tables.insert(name.clone());
                }
            }
            clusters.extend(listener.cluster_names().cloned());
            self.retain_secrets(listener.secret_names());
        }
        let tables = self.held_tables.iter().filter_map(|name| self.next.routes.get(name));
        clusters.extend(tables.flat_map(|table| table.cluster_names().cloned()));
        for name in clusters {
            if let Some(old) = self.old.clusters.get(&name) {
                self.next.clusters.entry(name).or_insert_with(|| old.clone());
            }
        }
        let held: Vec<Arc<Cluster>> = self
            .next
            .clusters
            .iter()
            .filter(|(name, cluster)| self.new.clusters.get(*name) != Some(*cluster))
            .map(|(_, cluster)| cluster.clone())
            .collect();
        for cluster in held {
            self.retain_endpoints(&cluster);
            self.retain_secrets(cluster.secret_names());
        }
    }

    fn retain_endpoints(&mut self, cluster: &Cluster) {
        let old = match &cluster.discovery {
            Discovery::Endpoints(name) => {
                let old = self.old.endpoints.get(name).cloned();
                old.map(|set| self.next.endpoints.entry(name.clone()).or_insert(set));
                return;
            }
            Discovery::Dns(_) => self.old.resolved.get(&cluster.name),
            Discovery::Static(_) | Discovery::OriginalDestination => None,
        };
        if let Some(set) = old {
            self.next.resolved.insert(cluster.name.clone(), set.clone());
        }
    }

    fn retain_secrets<'n>(&mut self, names: impl Iterator<Item = &'n Name>) {
        for name in names {
            if let Some(secret) = self.old.secrets.get(name) {
                self.next.secrets.entry(name.clone()).or_insert_with(|| secret.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::descriptor;
    use crate::translate::{self, ResourceKind};

    /// A configuration in short form: `c:a` is the static cluster `a`, `e:a` an EDS cluster, `d:a` a DNS cluster; `E:a`
    /// are the endpoints of `e:a`, `D:a` the addresses of `d:a`; `r:t>a,b` are routes to two clusters, `l:x=80>t` is a
    /// listener with these routes, and `l:x=80>t?s` one with a secret, `s:s`. A number after `#` is a version.
    fn snapshot(words: &str) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for word in words.split_whitespace() {
            let (kind, rest) = word.split_once(':').expect("kind:name");
            let (rest, version) = rest.split_once('#').unwrap_or((rest, "1"));
            let (name, references) = rest.split_once('>').unwrap_or((rest, ""));
            let seconds = format!("{version}s");
            let cluster = |fields: Value| {
                let mut json = fields;
                json["name"] = json!(name);
                json["connect_timeout"] = json!(seconds);
                (ResourceKind::Cluster, json)
            };
            let (kind, json) = match kind {
                "c" => cluster(json!({"load_assignment": {"cluster_name": name}})),
                "e" => cluster(
                    json!({"type": "EDS", "eds_cluster_config": {"eds_config": {"ads": {}}}}),
                ),
                "d" => {
                    cluster(json!({"type": "STRICT_DNS", "load_assignment": {"cluster_name": name,
                    "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address":
                        {"address": "host", "port_value": 80}}}}]}]}}))
                }
                "E" => (ResourceKind::Endpoints, json!({"cluster_name": name})),
                "r" => (ResourceKind::Routes, routes(name, version, references)),
                "l" => (ResourceKind::Listener, listener(name, version, references)),
                "s" => (
                    ResourceKind::Secret,
                    json!({"name": name,
                    "validation_context": {"trusted_ca": {"inline_string": version}}}),
                ),
                "D" => {
                    snapshot.resolved.insert(name.into(), Arc::default());
                    continue;
                }
                other => panic!("{other}"),
            };
            let bytes = descriptor::encode_json(kind.message(), json);
            let accepted = translate::decode(kind, &bytes).expect("a good resource");
            translate::insert(&mut snapshot, accepted.resource);
        }
        snapshot
    }

    fn routes(name: &str, version: &str, clusters: &str) -> Value {
        let route = |cluster| {
            json!({"match": {"prefix": format!("/{cluster}")},
                                     "route": {"cluster": cluster}})
        };
        let routes: Vec<Value> = clusters.split(',').filter(|c| !c.is_empty()).map(route).collect();
        json!({"name": name, "virtual_hosts":
            [{"name": version, "domains": ["*"], "routes": routes}]})
    }

    fn listener(name: &str, version: &str, references: &str) -> Value {
        let (name, port) = name.split_once('=').expect("name=port");
        let port: u16 = port.parse().expect("a port");
        let manager = json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "http", "rds": {"route_config_name": references, "config_source": {"ads": {}}},
            "http_filters": [{"name": "router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]});
        json!({"name": name,
            "address": {"socket_address": {"address": "10.0.0.1", "port_value": port}},
            "filter_chains": [{"name": version, "filters": [{"name": "http", "typed_config": manager}]}]})
    }

    struct WarmingClock {
        warming: Warming,
        start: Instant,
    }

    impl WarmingClock {
        fn new() -> Self {
            #[expect(
                clippy::disallowed_methods,
                reason = "a starting point for the test's own clock"
            )]
            let start = Instant::now();
            Self { warming: Warming::new(), start }
        }

        /// Offers a configuration at this many milliseconds after the start, and checks which one is in use.
        #[track_caller]
        fn offer(&mut self, milliseconds: u64, offered: &str, expected: &str) {
            let now = self.start + Duration::from_millis(milliseconds);
            self.warming.offer(snapshot(offered), |_| false, now);
            self.assert_in_force(expected);
        }

        #[track_caller]
        fn tick(&mut self, milliseconds: u64, expected: &str) {
            self.warming.tick(self.start + Duration::from_millis(milliseconds));
            self.assert_in_force(expected);
        }

        #[track_caller]
        fn assert_in_force(&self, expected: &str) {
            let mut expected = snapshot(expected);
            expected.revision = self.warming.in_force.revision;
            let dump = |snapshot| format!("{:#}", translate::dump(snapshot));
            assert_eq!(dump(&self.warming.in_force), dump(&expected));
        }
    }

    #[test]
    fn cluster_without_endpoints_delays_only_itself() {
        let mut clock = WarmingClock::new();
        clock.offer(0, "c:a r:t>a l:x=80>t", "c:a r:t>a l:x=80>t");
        clock.offer(10, "c:a#2 e:b c:d r:t>a l:x=80>t", "c:a#2 c:d r:t>a l:x=80>t");
        assert_eq!(clock.warming.missing(), [MissingReference::Endpoints("b".into())]);
        clock.offer(20, "c:a#3 e:b c:d r:t>a#2 l:x=80>t", "c:a#3 c:d r:t>a#2 l:x=80>t");
        clock.tick(15_009, "c:a#3 c:d r:t>a#2 l:x=80>t");
        clock.tick(15_010, "c:a#3 e:b c:d r:t>a#2 l:x=80>t");
        assert_eq!(clock.warming.take_overdue(), [MissingReference::Endpoints("b".into())]);
        // The timeout has passed: no resource waits for it again.
        clock.offer(15_020, "c:a e:b#2 c:d r:t>a l:x=80>t", "c:a e:b#2 c:d r:t>a l:x=80>t");
        assert_eq!(clock.warming.deadline(), None);
    }

    #[test]
    fn changed_cluster_keeps_its_old_version_with_its_endpoints_while_it_warms() {
        let mut clock = WarmingClock::new();
        clock.offer(0, "c:a r:t>a l:x=80>t", "c:a r:t>a l:x=80>t");
        clock.offer(10, "e:a r:t>a l:x=80>t", "c:a r:t>a l:x=80>t");
        clock.offer(20, "e:a E:a r:t>a l:x=80>t", "e:a E:a r:t>a l:x=80>t");
        clock.offer(30, "d:a r:t>a l:x=80>t", "e:a E:a r:t>a l:x=80>t");
        clock.offer(40, "d:a D:a r:t>a l:x=80>t", "d:a D:a r:t>a l:x=80>t");
    }

    #[test]
    fn listener_without_its_routes_delays_only_itself() {
        let mut clock = WarmingClock::new();
        clock.offer(0, "c:a r:t>a l:x=80>t", "c:a r:t>a l:x=80>t");
        // The new version waits for routes u; the old one keeps routes t and their cluster.
        clock.offer(10, "c:b l:x=80>u r:v>b l:y=81>v", "c:a r:t>a l:x=80>t c:b r:v>b l:y=81>v");
        clock.tick(15_010, "c:b l:x=80>u r:v>b l:y=81>v");
        clock.offer(
            15_020,
            "c:b l:x=80>u r:u>b r:v>b l:y=81>v",
            "c:b l:x=80>u r:u>b r:v>b l:y=81>v",
        );
    }

    #[test]
    fn renamed_listener_keeps_its_predecessor_until_it_is_warm() {
        let mut clock = WarmingClock::new();
        clock.offer(0, "c:a r:t>a l:x=80>t", "c:a r:t>a l:x=80>t");
        clock.offer(10, "c:a l:z=80>u", "c:a r:t>a l:x=80>t");
        clock.offer(20, "c:a r:u>a l:z=80>u", "c:a r:u>a l:z=80>u");
        clock.offer(30, "c:a", "c:a");
    }

    #[test]
    fn routes_wait_one_second_and_only_once_for_a_new_cluster() {
        let mut clock = WarmingClock::new();
        clock.offer(0, "c:a r:t>a l:x=80>t", "c:a r:t>a l:x=80>t");
        // Routes before their cluster, the old cluster already removed: no request fails.
        clock.offer(10, "r:t>b l:x=80>t", "c:a r:t>a l:x=80>t");
        clock.offer(20, "c:b r:t>b l:x=80>t", "c:b r:t>b l:x=80>t");
        // A cluster that never arrives.
        clock.offer(100, "c:b r:t>b,n l:x=80>t", "c:b r:t>b l:x=80>t");
        clock.tick(1099, "c:b r:t>b l:x=80>t");
        clock.tick(1100, "c:b r:t>b,n l:x=80>t");
        clock.offer(1200, "c:b r:t>b,n#2 l:x=80>t", "c:b r:t>b,n#2 l:x=80>t");
    }

    #[test]
    fn routes_to_a_warming_cluster_wait_one_second() {
        let mut clock = WarmingClock::new();
        clock.offer(0, "c:a r:t>a l:x=80>t", "c:a r:t>a l:x=80>t");
        clock.offer(10, "e:b r:t>b l:x=80>t", "c:a r:t>a l:x=80>t");
        clock.offer(20, "e:b E:b r:t>b l:x=80>t", "e:b E:b r:t>b l:x=80>t");
        clock.offer(30, "e:b E:b e:n r:t>n l:x=80>t", "e:b E:b r:t>b l:x=80>t");
        clock.tick(1030, "e:b E:b r:t>n l:x=80>t");
        clock.tick(15_030, "e:b E:b e:n r:t>n l:x=80>t");
    }

    #[test]
    fn cluster_waits_one_second_for_its_first_dns_answer() {
        let mut clock = WarmingClock::new();
        clock.offer(0, "c:a d:b r:t>a r:u>b l:x=80>t l:y=81>u", "");
        clock.tick(1000, "c:a d:b r:t>a r:u>b l:x=80>t l:y=81>u");
        assert!(clock.warming.is_settled());
    }

    #[test]
    fn first_configuration_waits_two_seconds_as_a_whole() {
        let mut clock = WarmingClock::new();
        clock.offer(0, "c:a e:b r:t>a l:x=80>t l:y=81>u", "");
        assert_eq!(clock.warming.deadline(), Some(clock.start + FIRST_TIMEOUT));
        clock.tick(1999, "");
        clock.tick(2000, "c:a r:t>a l:x=80>t");
        assert!(!clock.warming.is_settled());
        clock.tick(15_000, "c:a e:b r:t>a l:x=80>t l:y=81>u");
        assert!(clock.warming.is_settled());
    }

    #[test]
    fn resource_does_not_wait_for_a_name_that_the_server_declared_absent() {
        let mut clock = WarmingClock::new();
        let offered = snapshot("e:a r:t>b l:x=80>u");
        assert!(clock.warming.offer(offered.clone(), |_| true, clock.start).is_some());
        assert_eq!(clock.warming.missing(), []);
        assert!(clock.warming.offer(offered, |_| true, clock.start).is_none(), "no change");
    }
}
