//! Builds a plan from a snapshot, reusing what did not change since the last one, and from fetched keys and CRLs.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use rustls_pki_types::UnixTime;
use weft_certs::TrustStore;
use weft_certs::tls::{ClientAuthentication, ClientTls, LoadedIdentity, ServerTls, SessionTickets};
use weft_model::{
    Balance, ClientCertificateMode, Cluster, DownstreamTls, Filter, FilterChain, HttpFilter,
    HttpService, Listener, Name, RbacFilter, Route, RouteAction, RouteIndex, RouteMatch,
    RouteSource, RouteTable, Secret, SecretSource, Snapshot, TlsIdentity, UpstreamTls, VirtualHost,
};
use weft_runtime::problems::Problems;
use zeroize::Zeroizing;

use super::crl_sources::{CrlDownload, CrlSources};
use super::files::{WatchedFileStamp, WatchedFiles};
use super::issuers::KnownIssuers;
use super::trust::{SecretId, TrustStores, ValidationInputs};
use super::{
    ChainTls, PlannedChain, PlannedCluster, PlannedClusterSecrets, PlannedClusterTls, PlannedHttp,
    PlannedListener, PlannedService, SidecarPlan, is_servable,
};
use crate::authenticate::fetch::KeySetDownload;
use crate::authenticate::key_store::{KeyOrigin, KeyStore};
use crate::config_map::ConfigMap;
use crate::crl_store::CrlStore;
use crate::load_balancer::Balancer;

/// The key sets and CRLs fetched so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FetchedData<'a> {
    pub(crate) keys: &'a KeyStore,
    pub(crate) crls: &'a CrlStore,
}

/// Builds successive plans, keeping what did not change.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    trust: TrustStores,
    pub(super) files: WatchedFiles,
    /// The last good certificate of each secret.
    identities: HashMap<SecretId, KnownIdentity>,
    pub(super) targets: ConfigMap<Name, Arc<PlannedCluster>>,
    next_target: u64,
    pub(super) issuers: KnownIssuers,
    /// The session ticket keys by listener and chain. They survive other changes, so that clients can resume sessions; the
    /// current plan's settings are checked on resumption.
    tickets: HashMap<(Name, usize), SessionTickets>,
}

/// A certificate with its key, and what it was loaded from.
#[derive(Debug)]
struct KnownIdentity {
    secret: Arc<Secret>,
    stamps: [WatchedFileStamp; 2],
    identity: LoadedIdentity,
    /// Why the current files or secret cannot be used.
    failed: Option<String>,
    is_used: bool,
}

/// A plan with its problems, and what must be fetched for it.
#[derive(Debug)]
pub(crate) struct BuiltPlan {
    /// The plan.
    pub(crate) plan: SidecarPlan,
    /// What could not be built, and warnings.
    pub(crate) problems: Problems,
    /// The key sets to fetch.
    pub(crate) key_sets: Vec<KeySetDownload>,
    /// The origins of all key sets, including those whose cluster is missing.
    pub(crate) key_origins: Vec<KeyOrigin>,
    /// The CRLs to fetch.
    pub(crate) crl_downloads: Vec<CrlDownload>,
    /// The CRL distribution points of all validations.
    pub(crate) crl_sources: CrlSources,
}

impl Builder {
    /// A builder without a previous plan.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Builds the plan of a snapshot.
    pub(crate) fn build(
        &mut self,
        snapshot: &Arc<Snapshot>,
        fetched: FetchedData<'_>,
        now: UnixTime,
    ) -> BuiltPlan {
        let mut problems = Problems::default();
        self.files.begin();
        let mut plan = SidecarPlan { revision: snapshot.revision, ..SidecarPlan::default() };
        let mut build = PlanBuild {
            builder: self,
            snapshot,
            fetched,
            now,
            problems: &mut problems,
            key_sets: Vec::new(),
            key_origins: Vec::new(),
            crl_sources: CrlSources::default(),
        };
        for (name, cluster) in &snapshot.clusters {
            let target = build.target(cluster);
            plan.ids.insert(target.id);
            plan.targets.insert(name.clone(), target);
        }
        build.builder.targets.clone_from(&plan.targets);
        let conflicts = snapshot.address_conflicts();
        build.problems.unserved.extend(conflicts.iter().map(ToString::to_string));
        for (name, listener) in &snapshot.listeners {
            if conflicts.iter().any(|conflict| conflict.second == *name) {
                continue;
            }
            if !is_servable(listener) {
                build
                    .problems
                    .unserved
                    .push(format!("listener {name:?} is for UDP, which only the agent serves"));
                continue;
            }
            let planned = Arc::new(build.listener(listener));
            if !listener.bind {
                plan.by_destination.insert(listener.address, planned.clone());
            }
            plan.listeners.insert(name.clone(), planned);
        }
        let PlanBuild { key_sets, key_origins, crl_sources, .. } = build;
        let crl_downloads = crl_sources.downloads(&plan, fetched.crls, &mut problems);
        self.trust.settle(now);
        self.identities.retain(|_, known| std::mem::take(&mut known.is_used));
        plan.revocations = self.trust.revocations().clone();
        plan.crls = self.trust.coverage();
        self.tickets.retain(|(listener, _), _| plan.listeners.contains_key(listener));
        self.issuers.settle();
        BuiltPlan { plan, problems, key_sets, key_origins, crl_downloads, crl_sources }
    }

    /// Whether the same snapshot would now result in another plan: a file changed, or a CRL expired.
    pub(crate) fn is_outdated(&self, now: UnixTime) -> bool {
        self.files.have_changed() || self.trust.is_outdated(now)
    }
}

pub(super) struct PlanBuild<'a> {
    pub(super) builder: &'a mut Builder,
    snapshot: &'a Snapshot,
    pub(super) fetched: FetchedData<'a>,
    now: UnixTime,
    pub(super) problems: &'a mut Problems,
    pub(super) key_sets: Vec<KeySetDownload>,
    pub(super) key_origins: Vec<KeyOrigin>,
    crl_sources: CrlSources,
}

impl PlanBuild<'_> {
    fn listener(&mut self, listener: &Arc<Listener>) -> PlannedListener {
        let chains = listener
            .chains
            .iter()
            .enumerate()
            .map(|(number, chain)| Arc::new(self.chain(&listener.name, number, chain)))
            .collect();
        let default = listener
            .default_chain
            .as_ref()
            .map(|chain| Arc::new(self.chain(&listener.name, usize::MAX, chain)));
        PlannedListener { listener: listener.clone(), chains, default }
    }

    fn chain(&mut self, listener: &Name, number: usize, chain: &FilterChain) -> PlannedChain {
        let place = (listener.clone(), number);
        let tls = match &chain.tls {
            None => ChainTls::None,
            Some(tls) => match self.server_tls(tls, place.clone()) {
                Ok(config) => config,
                Err(problem) => {
                    self.problems
                        .unserved
                        .push(format!("listener {listener:?} chain {:?}: {problem}", &*chain.name));
                    ChainTls::Broken
                }
            },
        };
        let service = match &chain.filter {
            Filter::Tcp(tcp) => PlannedService::Tcp(tcp.clone()),
            Filter::Http(http) => {
                PlannedService::Http(Box::new(self.http(&place, http, &chain.rules)))
            }
        };
        PlannedChain { tls, rules: chain.rules.clone(), service }
    }

    fn http(
        &mut self,
        place: &(Name, usize),
        http: &Arc<HttpService>,
        of_connections: &[Arc<RbacFilter>],
    ) -> PlannedHttp {
        let routes = match &http.routes {
            RouteSource::Inline(table) => Some(table.clone()),
            RouteSource::Named(name) => self.snapshot.routes.get(name).cloned(),
        };
        let mut tokens = None;
        let mut rules = of_connections.to_vec();
        for filter in &http.filters {
            match filter {
                HttpFilter::Jwt(policy) if tokens.is_none() => {
                    tokens = Some(self.tokens(place, policy))
                }
                HttpFilter::Jwt(_) => self.problems.warn(format!(
                    "listener {:?} has two token policies; the first counts",
                    place.0
                )),
                HttpFilter::Rbac(policy) => rules.push(policy.clone()),
            }
        }
        let is_open = http.filters.is_empty() && of_connections.is_empty();
        let only = routes.as_deref().filter(|_| is_open).and_then(only_cluster).cloned();
        let routes = routes.map(RouteIndex::new);
        PlannedHttp { http: http.clone(), routes, tokens, rules, only }
    }

    fn server_tls(
        &mut self,
        tls: &DownstreamTls,
        place: (Name, usize),
    ) -> Result<ChainTls, String> {
        let (listener, chain) = &place;
        let here = format!("listener {listener} chain {chain}");
        // First, so that it stays current even if something else is wrong.
        let clients = match &tls.client_certificates {
            ClientCertificateMode::NotRequested => ClientAuthentication::None,
            ClientCertificateMode::Verify { validation, names, required } => {
                let trust = self.trust(validation, &here)?;
                if *required {
                    ClientAuthentication::Required(trust, names.clone())
                } else {
                    ClientAuthentication::Optional(trust, names.clone())
                }
            }
            ClientCertificateMode::PassThrough { required } => {
                ClientAuthentication::Unchecked { required: *required }
            }
        };
        let identity = self.identity(&tls.identity, &here)?;
        let tickets = match self.builder.tickets.entry(place) {
            Entry::Occupied(held) => held.into_mut(),
            Entry::Vacant(free) => {
                free.insert(SessionTickets::new().map_err(|error| error.to_string())?)
            }
        };
        ServerTls::new(&identity, clients, &tls.alpn, &tls.parameters, tickets)
            .map(ChainTls::Terminate)
            .map_err(|error| error.to_string())
    }

    fn target(&mut self, cluster: &Arc<Cluster>) -> Arc<PlannedCluster> {
        let previous = self.builder.targets.get(&cluster.name).cloned();
        let endpoints = self.snapshot.endpoints_of(cluster).map_or(&[][..], |set| &set.endpoints);
        if matches!(cluster.balance, Balance::Maglev { .. }) {
            self.problems.warn(format!(
                "cluster {:?}: lb_policy MAGLEV has no effect at a sidecar, which uses round robin instead",
                &*cluster.name
            ));
        }
        let balancer =
            Balancer::new(endpoints, cluster.balance, previous.as_ref().map(|old| &old.balancer));
        // Loaded for each plan, so that a problem is reported as long as it exists.
        let parts = cluster.tls.as_ref().map(|tls| self.client_tls(tls, &cluster.name));
        let (parts, problem) = match parts.transpose() {
            Ok(parts) => (parts, None),
            Err(problem) => (None, Some(problem)),
        };
        let secrets = PlannedClusterSecrets::new(parts.as_ref());
        let same = previous.filter(|old| old.cluster == *cluster && old.secrets.is_as(&secrets));
        let id = same.as_ref().map_or(self.builder.next_target + 1, |old| old.id);
        self.builder.next_target = self.builder.next_target.max(id);
        let tls = match (&cluster.tls, parts, problem) {
            (None, ..) => PlannedClusterTls::None,
            (Some(_), Some(_), _) if same.as_ref().is_some_and(|old| old.secrets == secrets) => {
                same.map_or(PlannedClusterTls::Broken, |old| old.tls.clone())
            }
            (Some(tls), parts, problem) => {
                let originate = |parts: ClientParts| parts.originate(tls);
                let made = parts.ok_or_else(|| problem.unwrap_or_default()).and_then(originate);
                made.unwrap_or_else(|problem| {
                    let problem = format!("cluster {:?}: {problem}", &*cluster.name);
                    self.problems.unreachable.push(problem);
                    PlannedClusterTls::Broken
                })
            }
        };
        Arc::new(PlannedCluster { id, cluster: cluster.clone(), balancer, tls, secrets })
    }

    fn client_tls(&mut self, tls: &UpstreamTls, cluster: &str) -> Result<ClientParts, String> {
        let here = format!("cluster {cluster}");
        let trust = tls.validation.as_ref();
        let trust = trust.map(|source| self.trust(source, &here)).transpose()?;
        let identity = tls.identity.as_ref();
        let identity = identity.map(|source| self.identity(source, &here)).transpose()?;
        Ok(ClientParts { identity, trust })
    }

    /// A certificate with its key. If it cannot be loaded, the last good one stays in force.
    fn identity(&mut self, source: &SecretSource, place: &str) -> Result<LoadedIdentity, String> {
        let id = SecretId::of(source, place);
        let secret = self.secret(source)?.clone();
        let Secret::Identity(own) = secret.as_ref() else {
            return Err("expected a certificate, but the secret is a validation context".into());
        };
        let Builder { identities, files, .. } = &mut *self.builder;
        let stamps = [files.stamp(&own.chain), files.stamp(&own.key)];
        let known = identities.remove(&id);
        let is_same = |known: &KnownIdentity| known.secret == secret && known.stamps == stamps;
        let (identity, failed) = match known {
            Some(known) if is_same(&known) => (known.identity, known.failed),
            known => match load_identity(own, files) {
                Ok(identity) => (identity, files.open_to_all(&own.key)),
                // The last good certificate of another secret must not be used.
                Err(problem) => match known.filter(|known| known.secret == secret) {
                    Some(known) => (
                        known.identity,
                        Some(format!("{problem}; the last good one stays in force")),
                    ),
                    None => return Err(problem),
                },
            },
        };
        if let Some(problem) = &failed {
            self.problems.warn(format!("certificate {:?}: {problem}", id.text()));
        }
        let kept = identity.clone();
        let known = KnownIdentity { secret, stamps, identity, failed, is_used: true };
        self.builder.identities.insert(id, known);
        Ok(kept)
    }

    /// The trust store of a validation. An inline validation is identified by the place that holds it.
    fn trust(&mut self, source: &SecretSource, place: &str) -> Result<Arc<TrustStore>, String> {
        let id = SecretId::of(source, place);
        let secret = self.secret(source)?.clone();
        let Secret::Validation(validation) = secret.as_ref() else {
            return Err("expected a validation context, but the secret is a certificate".into());
        };
        let Builder { trust, files, .. } = &mut *self.builder;
        let loaded = {
            let crls = self.fetched.crls;
            trust.store(&id, validation, &mut ValidationInputs { files, crls, now: self.now })
        };
        self.crl_sources.add(validation, trust.has_failed(&id));
        let (store, warnings) = loaded?;
        // Several users of one trust store report the same warning.
        warnings.into_iter().for_each(|warning| self.problems.warn(warning));
        Ok(store)
    }

    fn secret<'a>(&'a self, source: &'a SecretSource) -> Result<&'a Arc<Secret>, String> {
        self.snapshot.secret(source).ok_or_else(|| match source {
            SecretSource::Named(name) => format!("secret {name:?} does not exist"),
            SecretSource::Inline(_) => "the secret is empty".into(),
        })
    }
}

/// The one cluster that serves every request under a route table, if there is such a cluster.
fn only_cluster(table: &RouteTable) -> Option<&Name> {
    fn cluster(route: &Route) -> Option<&Name> {
        match &route.action {
            RouteAction::Forward { clusters, .. } => match clusters.as_slice() {
                [only] => Some(&only.name),
                _ => None,
            },
            RouteAction::Redirect(_) | RouteAction::Respond { .. } => None,
        }
    }
    let any = RouteMatch::any();
    let serves_all = |host: &VirtualHost| {
        host.domains.iter().any(|domain| domain == "*")
            && host.routes.iter().any(|route| route.matches == any)
    };
    table.hosts.iter().find(|host| serves_all(host))?;
    let mut routes = table.hosts.iter().flat_map(|host| &host.routes);
    let first = cluster(routes.next()?)?;
    routes.all(|route| cluster(route) == Some(first)).then_some(first)
}

fn load_identity(own: &TlsIdentity, files: &mut WatchedFiles) -> Result<LoadedIdentity, String> {
    let chain = files.read(&own.chain)?;
    let key = Zeroizing::new(files.read(&own.key)?);
    LoadedIdentity::load(&chain, &key).map_err(|error| error.to_string())
}

/// The certificate and trust store for TLS to a cluster.
pub(super) struct ClientParts {
    pub(super) identity: Option<LoadedIdentity>,
    /// None: any server certificate is accepted.
    pub(super) trust: Option<Arc<TrustStore>>,
}

impl ClientParts {
    fn originate(self, tls: &UpstreamTls) -> Result<PlannedClusterTls, String> {
        let Self { identity, trust } = self;
        let config = |alpn: &[&str]| {
            let alpn: Vec<String> = alpn.iter().map(|name| (*name).to_owned()).collect();
            let client = match trust.clone() {
                Some(trust) => ClientTls::new(
                    identity.as_ref(),
                    trust,
                    tls.names.clone(),
                    &alpn,
                    &tls.parameters,
                ),
                None => ClientTls::unverified(identity.as_ref(), &alpn, &tls.parameters),
            };
            client.map_err(|error| error.to_string())
        };
        let http1 = config(&["http/1.1"])?;
        let http2 = config(&["h2"])?;
        let plain = config(&[])?;
        Ok(PlannedClusterTls::Originate { http1, http2, plain, tls: Box::new(tls.clone()) })
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use weft_certs::KeySet;
    use weft_model::{
        Discovery, DnsDiscovery, DnsFamily, DnsPolicy, Endpoint, EndpointSet, Health, JwtProvider,
        KeySource, OnEmptyAnswer, UpstreamProtocol,
    };

    use super::*;
    use crate::authenticate::key_store::FetchedKeySet;

    fn origin() -> KeyOrigin {
        let issuer = "https://issuer".into();
        let uri = "http://keys.test/".into();
        KeyOrigin { issuer, uri, cluster: "keys".into(), redirects: 0, tls: None }
    }

    fn address(last: u8) -> SocketAddr {
        ([10, 0, 0, last], 80).into()
    }

    /// Stores a key set that the second address served.
    fn fetched(keys: &mut KeyStore, now: std::time::Instant) {
        let set = KeySet::parse(br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#);
        let set = FetchedKeySet { set: set.expect("a set"), max_age: None, from: address(2) };
        assert!(keys.fetched(&origin(), Ok(set), HOUR, now));
    }

    const HOUR: Duration = Duration::from_secs(3600);

    fn provider() -> JwtProvider {
        let KeyOrigin { issuer, uri, cluster, redirects, .. } = origin();
        JwtProvider {
            issuer,
            audiences: Vec::new(),
            subject: None,
            claims: Vec::new(),
            longest_life: None,
            keys: KeySource::Http { uri, cluster, timeout: HOUR, cache: HOUR, redirects },
            token_locations: Vec::new(),
            forward: false,
            claim_headers: Vec::new(),
            payload_header: None,
            payload_name: None,
            leeway: Duration::ZERO,
            bound: false,
            ends_streams: false,
        }
    }

    /// A snapshot with the cluster of the keys and these endpoints.
    fn snapshot(discovery: Discovery, endpoints: &[(u8, Health)]) -> Snapshot {
        let name: Name = "keys".into();
        let cluster = Cluster {
            name: name.clone(),
            discovery,
            balance: Balance::RoundRobin,
            connect_timeout: HOUR,
            protocol: UpstreamProtocol::Http1,
            tls: None,
            connection_limit: 1,
            request_limit: 1,
            response_head_bytes: 1,
            response_header_count: 1,
            idle_timeout: HOUR,
        };
        let endpoint = |(last, health): &(u8, Health)| Endpoint::new(address(*last), 1, *health);
        let endpoints = endpoints.iter().filter_map(endpoint).collect();
        let set = Arc::new(EndpointSet { endpoints });
        let mut snapshot = Snapshot::default();
        snapshot.clusters.insert(name.clone(), Arc::new(cluster));
        snapshot.endpoints.insert(name.clone(), set.clone());
        snapshot.resolved.insert(name, set);
        snapshot
    }

    /// The key sets to fetch under a snapshot, and its problems.
    fn keys_of(snapshot: &Snapshot, keys: &KeyStore) -> (Vec<KeySetDownload>, Problems) {
        let mut builder = Builder::new();
        let mut problems = Problems::default();
        let mut build = PlanBuild {
            builder: &mut builder,
            snapshot,
            fetched: FetchedData { keys, crls: &CrlStore::default() },
            now: UnixTime::since_unix_epoch(HOUR),
            problems: &mut problems,
            key_sets: Vec::new(),
            key_origins: Vec::new(),
            crl_sources: CrlSources::default(),
        };
        for (name, cluster) in &snapshot.clusters {
            let target = build.target(cluster);
            build.builder.targets.insert(name.clone(), target);
        }
        let _ = build.fetched_keys(&"issuer".into(), &provider());
        (build.key_sets, problems)
    }

    #[expect(clippy::disallowed_methods, reason = "tests need a start time")]
    fn start() -> std::time::Instant {
        std::time::Instant::now()
    }

    #[test]
    fn missing_cluster_is_a_warning_once_its_keys_were_fetched() {
        let mut keys = KeyStore::default();
        let missing = "keys of \"issuer\": cluster \"keys\" does not exist";
        let (_, problems) = keys_of(&Snapshot::default(), &keys);
        assert_eq!(problems.unserved, [missing]);
        fetched(&mut keys, start());
        let (_, problems) = keys_of(&Snapshot::default(), &keys);
        assert_eq!(problems.warnings, [format!("{missing}; the last good keys stay in force")]);
        assert!(problems.unserved.is_empty());
    }

    #[test]
    fn keys_are_fetched_again_when_their_endpoint_left_but_not_when_dns_answers_rotate() {
        let mut keys = KeyStore::default();
        let start = start();
        fetched(&mut keys, start);
        let check = |discovery: &Discovery, endpoints: &[(u8, Health)], expected: bool| {
            let (wanted, _) = keys_of(&snapshot(discovery.clone(), endpoints), &keys);
            let [wanted] = &wanted[..] else { panic!("there is one provider") };
            let later = start + Duration::from_secs(600);
            let is_due = keys.is_due(&wanted.origin, |at| wanted.has_endpoint(at), later);
            assert_eq!(is_due, expected, "{discovery:?} {endpoints:?}");
        };
        let policy = DnsPolicy {
            refresh: HOUR,
            respects_ttl: true,
            jitter: HOUR,
            failure_base: HOUR,
            failure_max: HOUR,
            family: DnsFamily::Auto,
            on_empty_answer: OnEmptyAnswer::Keep,
        };
        let dns = Discovery::Dns(DnsDiscovery { hosts: Vec::new(), policy });
        let eds = Discovery::Endpoints("keys".into());
        let healthy = Health::Healthy;
        let unhealthy = Health::Unhealthy;
        check(&eds, &[(1, healthy), (2, healthy)], false);
        check(&eds, &[(1, healthy), (2, unhealthy)], false);
        check(&eds, &[(1, healthy)], true);
        check(&eds, &[], false);
        check(&dns, &[(1, healthy)], false);
    }
}
