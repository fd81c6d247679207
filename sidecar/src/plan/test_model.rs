//! A snapshot with few resources, and the plan that is built from it, for tests.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use weft_model::{
    Balance, ChainMatch, Cluster, Discovery, DownstreamTls, Endpoint, EndpointSet, Filter,
    FilterChain, Health, HttpFilter, HttpService, JwtPolicy, JwtProvider, KeySource, Listener,
    RouteSource, RouteTable, Secret, Snapshot, SourceAddress, Transport, UpstreamProtocol,
    UpstreamTls,
};

use super::build::{Builder, BuiltPlan, FetchedData};
use super::test_pki::at;
use crate::authenticate::key_store::KeyStore;
use crate::crl_store::CrlStore;

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// The issuer of [`provider`].
pub(crate) const ISSUER: &str = "https://issuer";

/// An address of the model: listeners are at the first, endpoints at others.
pub(crate) fn address(last: u8) -> SocketAddr {
    ([10, 0, 0, last], 80).into()
}

/// A snapshot that tests change between builds.
#[derive(Clone, Default)]
pub(crate) struct Model(Snapshot);

impl Model {
    /// Adds a cluster with the smallest limits.
    pub(crate) fn cluster(mut self, name: &str, tls: Option<UpstreamTls>) -> Self {
        let cluster = Cluster {
            name: name.into(),
            discovery: Discovery::Endpoints(name.into()),
            balance: Balance::RoundRobin,
            connect_timeout: HOUR,
            protocol: UpstreamProtocol::Http1,
            tls,
            connection_limit: 1,
            request_limit: 1,
            response_head_bytes: 1,
            response_header_count: 1,
            idle_timeout: HOUR,
        };
        self.0.clusters.insert(name.into(), Arc::new(cluster));
        self
    }

    /// Changes a cluster that was added before.
    pub(crate) fn change_cluster(mut self, name: &str, change: impl FnOnce(&mut Cluster)) -> Self {
        let cluster = self.0.clusters.get_mut(name).expect("the cluster was added");
        change(Arc::make_mut(cluster));
        self
    }

    /// Sets the endpoints of a cluster, by the last byte of their addresses.
    pub(crate) fn endpoints(self, name: &str, endpoints: &[(u8, Health)]) -> Self {
        let endpoint = |(last, health): &(u8, Health)| Endpoint::new(address(*last), 1, *health);
        self.endpoint_set(name, endpoints.iter().filter_map(endpoint).collect())
    }

    /// Sets the healthy endpoints of a cluster.
    pub(crate) fn addresses(self, name: &str, addresses: &[SocketAddr]) -> Self {
        let endpoint = |address: &SocketAddr| Endpoint::new(*address, 1, Health::Healthy);
        self.endpoint_set(name, addresses.iter().filter_map(endpoint).collect())
    }

    fn endpoint_set(mut self, name: &str, endpoints: Vec<Endpoint>) -> Self {
        let set = Arc::new(EndpointSet { endpoints });
        self.0.endpoints.insert(name.into(), set.clone());
        self.0.resolved.insert(name.into(), set);
        self
    }

    /// Adds the listener `in` with one filter chain.
    pub(crate) fn listener(mut self, tls: Option<DownstreamTls>, http: HttpService) -> Self {
        let chain = FilterChain {
            name: "".into(),
            matches: ChainMatch::default(),
            tls,
            rules: Vec::new(),
            filter: Filter::Http(Arc::new(http)),
        };
        let listener = Listener {
            name: "in".into(),
            address: address(1),
            transport: Transport::Tcp,
            bind: true,
            use_original_destination: false,
            transparent: false,
            chains: vec![chain],
            default_chain: None,
            udp: None,
            allow_from: None,
            idle_end: None,
            flow_seed: None,
            source_address: SourceAddress::Agent,
        };
        self.0.listeners.insert("in".into(), Arc::new(listener));
        self
    }

    /// Changes the filter chain of the listener that was added before.
    pub(crate) fn change_chain(mut self, change: impl FnOnce(&mut FilterChain)) -> Self {
        let listener = self.0.listeners.get_mut("in").expect("the listener was added");
        change(&mut Arc::make_mut(listener).chains[0]);
        self
    }

    /// Adds the listener `in` with the provider `issuer` of tokens.
    pub(crate) fn tokens(self, keys: KeySource) -> Self {
        let policy = JwtPolicy {
            providers: [("issuer".into(), provider(keys))].into(),
            rules: Vec::new(),
            passes_preflight: false,
        };
        let mut http = http();
        http.filters.push(HttpFilter::Jwt(Arc::new(policy)));
        self.listener(None, http)
    }

    /// Adds `table` as the route table `routes`.
    pub(crate) fn routes(mut self, table: RouteTable) -> Self {
        self.0.routes.insert("routes".into(), Arc::new(table));
        self
    }

    pub(crate) fn secret(mut self, name: &str, secret: Secret) -> Self {
        self.0.secrets.insert(name.into(), Arc::new(secret));
        self
    }

    /// Removes every resource with this name.
    pub(crate) fn without(mut self, name: &str) -> Self {
        self.0.secrets.remove(name);
        self.0.clusters.remove(name);
        self.0.listeners.remove(name);
        self.0.routes.remove(name);
        self
    }

    pub(crate) fn build(&self, builder: &mut Builder) -> BuiltPlan {
        self.build_with(builder, &KeyStore::default())
    }

    pub(crate) fn build_with(&self, builder: &mut Builder, keys: &KeyStore) -> BuiltPlan {
        let crls = &CrlStore::default();
        builder.build(&Arc::new(self.0.clone()), FetchedData { keys, crls }, at(0))
    }
}

/// An HTTP service with the route table `routes`.
pub(crate) fn http() -> HttpService {
    HttpService::new(RouteSource::Named("routes".into()))
}

/// A provider of tokens that accepts every claim.
pub(crate) fn provider(keys: KeySource) -> JwtProvider {
    JwtProvider {
        issuer: ISSUER.into(),
        audiences: Vec::new(),
        subject: None,
        claims: Vec::new(),
        longest_life: None,
        keys,
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
