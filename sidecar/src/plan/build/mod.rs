//! Builds a plan from a snapshot, reusing what did not change since the last one, and from fetched keys and CRLs.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use rustls_pki_types::UnixTime;
use weft_certs::TrustStore;
use weft_certs::tls::{ClientAuthentication, ClientTls, LoadedIdentity, ServerTls, SessionTickets};
use weft_model::{
    Balance, ClientCertificateMode, Cluster, DistributionPoint, DownstreamTls, Filter, FilterChain,
    HttpFilter, HttpService, JwtPolicy, Listener, Name, RbacFilter, Route, RouteAction, RouteIndex,
    RouteMatch, RouteSource, RouteTable, Secret, SecretSource, Snapshot, TlsIdentity, Transport,
    UpstreamTls, VirtualHost,
};
use weft_runtime::problems::Problems;
use zeroize::Zeroizing;

use super::SidecarPlan;
use super::downloads::{CrlDownload, CrlSources, KeySetSources};
use super::files::{WatchedFileStamp, WatchedFiles};
use super::issuers::{ChainPlace, KeyInputs, KnownIssuers};
use super::listener::{ChainTls, PlannedChain, PlannedHttp, PlannedListener, PlannedService};
use super::planned_cluster::{PlannedCluster, PlannedClusterSecrets, PlannedClusterTls};
use super::trust::{SecretId, TrustStores, ValidationInputs};
use crate::authenticate::TokenPolicy;
use crate::authenticate::key_store::KeyStore;
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
    files: WatchedFiles,
    /// The last good certificate of each secret.
    identities: HashMap<SecretId, KnownIdentity>,
    clusters: ConfigMap<Name, Arc<PlannedCluster>>,
    next_cluster_id: u64,
    issuers: KnownIssuers,
    /// The session ticket keys by listener and chain. They survive other changes, so that clients can resume sessions; the
    /// current plan's settings are checked on resumption.
    tickets: HashMap<ChainPlace, SessionTickets>,
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
    /// The key sets of all token providers.
    pub(crate) key_sets: KeySetSources,
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
            key_sets: KeySetSources::default(),
            crl_sources: CrlSources::default(),
        };
        for (name, cluster) in &snapshot.clusters {
            let planned = build.cluster(cluster);
            plan.ids.insert(planned.id);
            plan.clusters.insert(name.clone(), planned);
        }
        build.builder.clusters.clone_from(&plan.clusters);
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
        let PlanBuild { key_sets, crl_sources, .. } = build;
        let is_fetched = |point: &DistributionPoint| fetched.crls.list(point).is_some();
        let crl_downloads = crl_sources.downloads(&plan.clusters, is_fetched, &mut problems);
        self.trust.settle(now);
        self.identities.retain(|_, known| std::mem::take(&mut known.is_used));
        plan.revocations = self.trust.revocations().clone();
        plan.crls = self.trust.coverage();
        self.tickets.retain(|place, _| plan.listeners.contains_key(&place.listener));
        self.issuers.settle();
        BuiltPlan { plan, problems, key_sets, crl_downloads, crl_sources }
    }

    /// Whether the same snapshot would now result in another plan: a file changed, or a CRL expired.
    pub(crate) fn is_outdated(&self, now: UnixTime) -> bool {
        self.files.have_changed() || self.trust.is_outdated(now)
    }
}

/// One build of a plan.
struct PlanBuild<'a> {
    builder: &'a mut Builder,
    snapshot: &'a Snapshot,
    fetched: FetchedData<'a>,
    now: UnixTime,
    problems: &'a mut Problems,
    key_sets: KeySetSources,
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
        let place = ChainPlace { listener: listener.clone(), number };
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
        place: &ChainPlace,
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
                    place.listener
                )),
                HttpFilter::Rbac(policy) => rules.push(policy.clone()),
            }
        }
        let is_open = http.filters.is_empty() && of_connections.is_empty();
        let only = routes.as_deref().filter(|_| is_open).and_then(only_cluster).cloned();
        let routes = routes.map(RouteIndex::new);
        PlannedHttp { http: http.clone(), routes, tokens, rules, only }
    }

    fn tokens(&mut self, chain: &ChainPlace, policy: &Arc<JwtPolicy>) -> TokenPolicy {
        let Builder { issuers, files, clusters, .. } = &mut *self.builder;
        let inputs = &mut KeyInputs {
            files,
            clusters,
            fetched: self.fetched.keys,
            sources: &mut self.key_sets,
            problems: self.problems,
        };
        issuers.tokens(chain, policy, inputs)
    }

    fn server_tls(&mut self, tls: &DownstreamTls, place: ChainPlace) -> Result<ChainTls, String> {
        let ChainPlace { listener, number: chain } = &place;
        let here = format!("listener {listener} chain {chain}");
        // The trust store first, so that it stays current even if the identity cannot be loaded.
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

    fn cluster(&mut self, cluster: &Arc<Cluster>) -> Arc<PlannedCluster> {
        let previous = self.builder.clusters.get(&cluster.name).cloned();
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
        let loaded = cluster.tls.as_ref().map(|tls| (tls, self.client_tls(tls, &cluster.name)));
        let secrets = match &loaded {
            Some((_, Ok(secrets))) => secrets.clone(),
            Some((_, Err(_))) | None => PlannedClusterSecrets::default(),
        };
        let same = previous.filter(|old| old.settings == *cluster && old.secrets.is_as(&secrets));
        let id = same.as_ref().map_or(self.builder.next_cluster_id + 1, |old| old.id);
        self.builder.next_cluster_id = self.builder.next_cluster_id.max(id);
        let made = match loaded {
            None => Ok(PlannedClusterTls::None),
            Some((_, Err(problem))) => Err(problem),
            Some((tls, Ok(_))) => match same.filter(|old| old.secrets == secrets) {
                Some(old) => Ok(old.tls.clone()),
                None => originate(tls, &secrets),
            },
        };
        let tls = made.unwrap_or_else(|problem| {
            self.problems.unreachable.push(format!("cluster {:?}: {problem}", &*cluster.name));
            PlannedClusterTls::Broken
        });
        Arc::new(PlannedCluster { id, settings: cluster.clone(), balancer, tls, secrets })
    }

    fn client_tls(
        &mut self,
        tls: &UpstreamTls,
        cluster: &str,
    ) -> Result<PlannedClusterSecrets, String> {
        let here = format!("cluster {cluster}");
        let trust = tls.validation.as_ref();
        let trust = trust.map(|source| self.trust(source, &here)).transpose()?;
        let identity = tls.identity.as_ref();
        let identity = identity.map(|source| self.identity(source, &here)).transpose()?;
        Ok(PlannedClusterSecrets { identity, trust })
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

/// Whether a sidecar serves a listener.
fn is_servable(listener: &Listener) -> bool {
    listener.transport == Transport::Tcp
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

/// TLS to the endpoints of a cluster with these secrets.
fn originate(
    tls: &UpstreamTls,
    secrets: &PlannedClusterSecrets,
) -> Result<PlannedClusterTls, String> {
    let identity = secrets.identity.as_ref();
    let config = |alpn: &[&str]| {
        let alpn: Vec<String> = alpn.iter().map(|name| (*name).to_owned()).collect();
        let client = match secrets.trust.clone() {
            Some(trust) => {
                ClientTls::new(identity, trust, tls.names.clone(), &alpn, &tls.parameters)
            }
            None => ClientTls::unverified(identity, &alpn, &tls.parameters),
        };
        client.map_err(|error| error.to_string())
    };
    let http1 = config(&["http/1.1"])?;
    let http2 = config(&["h2"])?;
    let plain = config(&[])?;
    Ok(PlannedClusterTls::Originate { http1, http2, plain, tls: Box::new(tls.clone()) })
}

#[cfg(test)]
mod tests;
