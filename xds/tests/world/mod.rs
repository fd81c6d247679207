//! A configuration in short, for the tests of this folder.
//!
//! `c/a:1>e/a,s/t` is the cluster `a` in its form 1; its endpoints are served under the name `a`,
//! and what it trusts is the secret `t`. `l/web:2>r/main` is the listener `web` in its form 2, with
//! the routes `main`. The letters: `c` cluster, `e` endpoints, `s` secret, `l` listener, `r` routes.
//! Forms are numbers; endpoints and routes in form 0 are empty.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use weft_model::{
    Balance, ChainMatch, Cluster, DEFAULT_RESPONSE_HEAD_BYTES, DEFAULT_RESPONSE_HEADER_COUNT,
    DEFAULT_UPSTREAM_IDLE, DataSource, Discovery, Endpoint, EndpointSet, Filter, FilterChain,
    Health, HttpService, Listener, Name, RevocationPolicy, RouteSource, RouteTable, Secret,
    SecretSource, Snapshot, SourceAddress, StringMatch, TlsParameters, Transport, UpstreamProtocol,
    UpstreamTls, Validation, VirtualHost,
};
use weft_xds::translate::{self, Resource, ResourceKind};

const LETTERS: [(&str, ResourceKind); 5] = [
    ("c", ResourceKind::Cluster),
    ("e", ResourceKind::Endpoints),
    ("s", ResourceKind::Secret),
    ("l", ResourceKind::Listener),
    ("r", ResourceKind::Routes),
];

/// The kind of a letter.
pub(crate) fn kind(letter: &str) -> ResourceKind {
    LETTERS.iter().find(|(l, _)| *l == letter).expect("one of c, e, s, l and r").1
}

/// The letter of a kind.
pub(crate) fn letter(kind: ResourceKind) -> &'static str {
    LETTERS.iter().find(|(_, k)| *k == kind).expect("every kind has a letter").0
}

/// The configuration that `text` describes.
pub(crate) fn snapshot(text: &str) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for word in text.split_whitespace() {
        let (what, references) = word.split_once('>').unwrap_or((word, ""));
        let (letter, rest) = what.split_once('/').expect("letter/name:form");
        let (name, form) = rest.split_once(':').expect("name:form");
        let form: u16 = form.parse().expect("a number");
        let name: Name = name.into();
        let refers = |letter: &str| {
            references
                .split(',')
                .filter_map(|reference| reference.split_once('/'))
                .filter(|(l, _)| *l == letter)
                .map(|(_, name)| Name::from(name))
                .collect::<Vec<_>>()
        };
        match kind(letter) {
            ResourceKind::Cluster => {
                let cluster = cluster(name.clone(), form, refers("e").pop(), refers("s").pop());
                snapshot.clusters.insert(name, cluster.into());
            }
            ResourceKind::Endpoints => {
                snapshot.endpoints.insert(name, endpoints(form).into());
            }
            ResourceKind::Secret => {
                snapshot.secrets.insert(name, secret(form).into());
            }
            ResourceKind::Listener => {
                let listener = listener(name.clone(), form, refers("r"));
                snapshot.listeners.insert(name, listener.into());
            }
            ResourceKind::Routes => {
                snapshot.routes.insert(name.clone(), routes(name, form).into());
            }
        }
    }
    snapshot
}

/// A resource as `name:form`, from its bytes.
pub(crate) fn shown(kind: ResourceKind, bytes: &[u8]) -> String {
    let resource = translate::decode(kind, bytes).expect("a good resource").resource;
    let form = match &resource {
        Resource::Cluster(cluster) => cluster.connect_timeout.as_secs().to_string(),
        Resource::Endpoints(_, set) => {
            set.endpoints.first().map_or(0, |endpoint| endpoint.address.port()).to_string()
        }
        Resource::Secret(_, secret) => match secret.as_ref() {
            Secret::Validation(Validation { roots: DataSource::Inline(bytes), .. }) => {
                String::from_utf8_lossy(bytes).into_owned()
            }
            Secret::Validation(_) | Secret::Identity(_) => "?".into(),
        },
        Resource::Listener(listener) => listener.address.port().to_string(),
        Resource::Routes(table) => {
            table.hosts.first().map_or("0", |host| host.name.as_ref()).to_owned()
        }
    };
    format!("{}:{form}", resource.name())
}

fn cluster(name: Name, form: u16, endpoints: Option<Name>, trust: Option<Name>) -> Cluster {
    Cluster {
        name,
        discovery: endpoints
            .map_or_else(|| Discovery::Static(EndpointSet::default()), Discovery::Endpoints),
        balance: Balance::RoundRobin,
        connect_timeout: Duration::from_secs(form.into()),
        protocol: UpstreamProtocol::Http1,
        tls: trust.map(|trust| UpstreamTls {
            parameters: TlsParameters::meshed(Vec::new()),
            identity: Some(SecretSource::Named("default".into())),
            validation: Some(SecretSource::Named(trust)),
            names: vec![StringMatch::Exact("spiffe://mesh/x".into())],
            sni: None,
            alpn: Vec::new(),
        }),
        connection_limit: 1024,
        request_limit: 1024,
        response_head_bytes: DEFAULT_RESPONSE_HEAD_BYTES,
        response_header_count: DEFAULT_RESPONSE_HEADER_COUNT,
        idle_timeout: DEFAULT_UPSTREAM_IDLE,
    }
}

fn endpoints(form: u16) -> EndpointSet {
    let endpoint = Endpoint {
        address: ([10, 0, 0, 1], form).into(),
        weight: NonZeroU32::MIN,
        health: Health::Healthy,
    };
    EndpointSet { endpoints: Some(endpoint).into_iter().filter(|_| form > 0).collect() }
}

fn secret(form: u16) -> Secret {
    Secret::Validation(Validation {
        roots: DataSource::inline(form.to_string()),
        revocations: None,
        points: Vec::new(),
        policy: RevocationPolicy::default(),
        names: Vec::new(),
    })
}

fn routes(name: Name, form: u16) -> RouteTable {
    let host = VirtualHost {
        name: form.to_string().into(),
        domains: vec!["*".into()],
        routes: Vec::new(),
        mutations: None,
    };
    RouteTable::new(name, Some(host).into_iter().filter(|_| form > 0).collect())
}

fn listener(name: Name, form: u16, routes: Vec<Name>) -> Listener {
    let chains = (1..).zip(routes).map(|(port, name)| FilterChain {
        name: name.clone(),
        matches: ChainMatch { destination_port: Some(port), ..ChainMatch::default() },
        tls: None,
        rules: Vec::new(),
        filter: Filter::Http(Arc::new(HttpService::new(RouteSource::Named(name)))),
    });
    Listener {
        name,
        address: ([10, 0, 0, 1], form).into(),
        transport: Transport::Tcp,
        bind: true,
        use_original_destination: true,
        transparent: false,
        chains: chains.collect(),
        default_chain: None,
        udp: None,
        allow_from: None,
        idle_end: None,
        flow_seed: None,
        source_address: SourceAddress::Agent,
    }
}
