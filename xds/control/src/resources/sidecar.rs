//! The resources of sidecars: the inbound configuration of the own service, and the outbound configuration of all services.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use weft_model::{
    AccessLogSinks, AmbiguousPath, Balance, CertificateKey, ChainMatch, ClientCertificateDetails,
    ClientCertificateMode, Cluster, Discovery, DownstreamTls, Endpoint, EndpointSet, Filter,
    FilterChain, FlowKey, Health, HttpFilter, HttpLimits, HttpService, HttpTimeouts, JwtPolicy,
    JwtProvider, JwtRule, KeySource, Listener, Name, PathMatch, PathRules, Route as ModelRoute,
    RouteAction, RouteMatch, RouteSource, RouteTable, SecretSource, Snapshot, SourceAddress,
    StringMatch, TcpProxy, TlsParameters, Transport, Upgrades, UpstreamProtocol, UpstreamTls,
    VirtualHost, WeightedCluster,
};
use weft_xds::translate::WORKLOAD_IDENTITY;

use super::capture::{INBOUND_PORT, OUTBOUND_PORT, wildcard_addresses};
use super::clusters::{cluster, cluster_name, endpoints};
use super::trust::{TRUST, Trust, trust_secret};
use super::{key_server, policies};
use crate::mesh::{
    HttpTuning, Mesh, MeshRoute, OutboundPolicy, Port, Protocol, RouteRule, RouteTarget, Service,
    TokenKeys, prefix_rewrite,
};

/// The default idle timeout of HTTP connections.
const HTTP_IDLE: Duration = Duration::from_secs(300);
/// The default idle timeout of TCP connections.
const TCP_IDLE: Duration = Duration::from_secs(3600);
/// The accepted clock skew for the dates of tokens.
const LEEWAY: Duration = Duration::from_secs(60);

/// The inbound configuration of the services of a mesh.
pub(super) fn inbound_configuration(mesh: &Mesh) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for service in mesh.services.values() {
        inbound_service(mesh, service, &mut snapshot);
    }
    snapshot
}

/// The resources of all sidecars: the trust bundle and the capture listeners.
pub(super) fn common(mesh: &Mesh, trust: &Trust) -> Snapshot {
    let mut snapshot = Snapshot::default();
    snapshot.secrets.insert(TRUST.into(), Arc::new(trust_secret(trust, &mesh.revocation)));
    outbound(mesh, &mut snapshot);
    snapshot
}

/// The outbound configuration of all services.
pub(super) fn outbound_configuration(mesh: &Mesh) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for service in mesh.services.values() {
        for port in service.ports.iter().filter(|port| port.protocol != Protocol::Udp) {
            outbound_port(mesh, service, port, &mut snapshot);
        }
    }
    snapshot
}

fn inbound_service(mesh: &Mesh, own: &Service, snapshot: &mut Snapshot) {
    let mut chains = Vec::new();
    for port in own.ports.iter().filter(|port| port.protocol != Protocol::Udp) {
        let name: Name = format!("inbound|{}", port.target).into();
        let application =
            Endpoint::new((Ipv4Addr::LOCALHOST, port.target).into(), 1, Health::Healthy);
        let set = EndpointSet { endpoints: application.into_iter().collect() };
        let target = cluster(&name, Discovery::Static(set), Balance::RoundRobin);
        let target = Cluster {
            protocol: workload_protocol(port.protocol),
            response_head_bytes: port.http.response_head_bytes,
            response_header_count: port.http.response_headers,
            ..target
        };
        snapshot.clusters.insert(name.clone(), Arc::new(target));
        let filter = match port.protocol {
            Protocol::Tcp | Protocol::Udp => tcp(&name, port.idle_timeout),
            Protocol::Http | Protocol::Http2 | Protocol::Grpc => {
                let table = table(&name, vec![host(&name, vec![forward_to(&name)])]);
                let mut service = http(RouteSource::Inline(Arc::new(table)), port.http);
                service.path = own.paths;
                service.underscores = own.underscores;
                service.filters = filters(mesh, own, port, snapshot);
                service.client_certificate = ClientCertificateDetails::SanitizeSet;
                service.certificate_keys = vec![CertificateKey::Uri];
                Filter::Http(Arc::new(service))
            }
        };
        chains.push(FilterChain {
            name,
            matches: ChainMatch { destination_port: Some(port.target), ..ChainMatch::default() },
            tls: Some(verify_mode(mesh, port)),
            rules: if port.protocol == Protocol::Tcp {
                policies::rules(mesh, own, port)
            } else {
                Vec::new()
            },
            filter,
        });
    }
    for (suffix, address) in wildcard_addresses(INBOUND_PORT) {
        let name = format!("inbound{suffix}");
        insert(snapshot, Listener { chains: chains.clone(), ..redirected(&name, address) });
    }
}

/// The HTTP version that a workload accepts on a port.
fn workload_protocol(protocol: Protocol) -> UpstreamProtocol {
    match protocol {
        Protocol::Http | Protocol::Tcp | Protocol::Udp => UpstreamProtocol::Http1,
        Protocol::Http2 | Protocol::Grpc => UpstreamProtocol::Http2,
    }
}

/// Mutual TLS that requires a client certificate of this mesh: chained to its root, not expired and not revoked.
fn verify_mode(mesh: &Mesh, port: &Port) -> DownstreamTls {
    let alpn: &[&str] = if port.protocol == Protocol::Tcp { &[] } else { &["h2", "http/1.1"] };
    DownstreamTls {
        identity: SecretSource::Named(WORKLOAD_IDENTITY.into()),
        client_certificates: ClientCertificateMode::Verify {
            validation: SecretSource::Named(TRUST.into()),
            names: vec![StringMatch::Prefix(format!("spiffe://{}/", mesh.trust_domain))],
            required: true,
        },
        alpn: alpn.iter().map(|name| (*name).to_owned()).collect(),
        parameters: TlsParameters::meshed(mesh.groups.clone()),
    }
}

/// The filters of an HTTP port: tokens, then RBAC. Without a policy every request is refused.
pub(super) fn filters(
    mesh: &Mesh,
    own: &Service,
    port: &Port,
    snapshot: &mut Snapshot,
) -> Vec<HttpFilter> {
    let mut filters = Vec::new();
    let token_rules = policies::token_rules(mesh, own, port);
    if token_rules.iter().any(|rule| rule.requires.is_some()) {
        filters.push(HttpFilter::Jwt(Arc::new(tokens(mesh, token_rules, snapshot))));
    }
    filters.extend(policies::rules(mesh, own, port).into_iter().map(HttpFilter::Rbac));
    filters
}

/// The token issuers and the token rules.
fn tokens(mesh: &Mesh, rules: Vec<JwtRule>, snapshot: &mut Snapshot) -> JwtPolicy {
    let mut providers = BTreeMap::new();
    for (name, issuer) in &mesh.issuers {
        let keys = match &issuer.keys {
            TokenKeys::File(_, bytes) => {
                KeySource::Local(weft_model::DataSource::inline(bytes.as_slice()))
            }
            TokenKeys::Http(server) => {
                let target = key_server::cluster_of(name, server);
                let cluster = target.name.clone();
                snapshot.clusters.insert(cluster.clone(), Arc::new(target));
                KeySource::Http {
                    uri: server.uri.clone(),
                    cluster,
                    timeout: Duration::from_secs(5),
                    cache: Duration::from_secs(300),
                    redirects: server.redirects,
                }
            }
        };
        let provider = JwtProvider {
            issuer: issuer.issuer.clone(),
            audiences: issuer.audiences.clone(),
            subject: None,
            claims: issuer.claims.clone(),
            longest_life: None,
            keys,
            token_locations: Vec::new(),
            forward: issuer.forward,
            claim_headers: issuer.claim_headers.clone(),
            payload_header: None,
            payload_name: Some(name.as_str().into()),
            leeway: LEEWAY,
            bound: issuer.bound,
            ends_streams: issuer.ends_streams,
        };
        providers.insert(Name::from(name.as_str()), provider);
    }
    JwtPolicy { providers, rules, passes_preflight: false }
}

fn outbound(mesh: &Mesh, snapshot: &mut Snapshot) {
    let default_chain = match mesh.outbound {
        OutboundPolicy::Closed => None,
        OutboundPolicy::Open => {
            let name: Name = "passthrough".into();
            let target = cluster(&name, Discovery::OriginalDestination, Balance::RoundRobin);
            snapshot.clusters.insert(name.clone(), Arc::new(target));
            Some(chain(&name, tcp(&name, None)))
        }
    };
    for (suffix, address) in wildcard_addresses(OUTBOUND_PORT) {
        let name = format!("outbound{suffix}");
        insert(
            snapshot,
            Listener { default_chain: default_chain.clone(), ..redirected(&name, address) },
        );
    }
}

/// The outbound configuration of a port.
fn outbound_port(mesh: &Mesh, service: &Service, port: &Port, snapshot: &mut Snapshot) {
    let name: Name = cluster_name(&service.name, port.port).into();
    let mut target = cluster(&name, Discovery::Endpoints(name.clone()), service.balance);
    target.response_head_bytes = port.http.response_head_bytes;
    target.response_header_count = port.http.response_headers;
    if service.meshed {
        target.tls = Some(UpstreamTls {
            identity: Some(SecretSource::Named(WORKLOAD_IDENTITY.into())),
            validation: Some(SecretSource::Named(TRUST.into())),
            names: vec![StringMatch::Exact(mesh.identity_of(&service.name).as_str().to_owned())],
            sni: Some(format!("{}.{}", service.name, mesh.trust_domain)),
            // The sidecar offers the protocol that it uses, which is that of the client.
            alpn: Vec::new(),
            parameters: TlsParameters::meshed(mesh.groups.clone()),
        });
    } else {
        // Without a sidecar, the workload itself must understand the protocol.
        target.protocol = workload_protocol(port.protocol);
    }
    snapshot.clusters.insert(name.clone(), Arc::new(target));
    snapshot.endpoints.insert(name.clone(), endpoints(service, port));
    let filter = match port.protocol {
        Protocol::Tcp | Protocol::Udp => tcp(&name, port.idle_timeout),
        Protocol::Http | Protocol::Http2 | Protocol::Grpc => {
            let table = routes(mesh, service, port);
            snapshot.routes.insert(name.clone(), Arc::new(table));
            Filter::Http(Arc::new(http(RouteSource::Named(name.clone()), port.http)))
        }
    };
    for address in &service.addresses {
        let listener_name = format!("{name} {address}");
        let listener = Listener {
            bind: false,
            use_original_destination: false,
            default_chain: Some(chain(&name, filter.clone())),
            ..redirected(&listener_name, (*address, port.port).into())
        };
        insert(snapshot, listener);
    }
}

/// The route table of callers' sidecars for a port.
pub(super) fn routes(mesh: &Mesh, service: &Service, port: &Port) -> RouteTable {
    let name: Name = cluster_name(&service.name, port.port).into();
    table(&name, hosts(mesh, service, port, &name))
}

/// A route table that compares host names without ports.
fn table(name: &Name, hosts: Vec<VirtualHost>) -> RouteTable {
    RouteTable { ignores_port: true, ..RouteTable::new(name.clone(), hosts) }
}

/// The virtual hosts of a port: the routes of the file, then a default route to the service.
fn hosts(mesh: &Mesh, service: &Service, port: &Port, name: &Name) -> Vec<VirtualHost> {
    let mut by_host: BTreeMap<String, Vec<ModelRoute>> = BTreeMap::new();
    for route in mesh.routes.iter().filter(|route| route.is_of(service, port)) {
        let all = vec!["*".to_owned()];
        for hostname in if route.hostnames.is_empty() { &all } else { &route.hostnames } {
            by_host.entry(hostname.clone()).or_default().extend(routes_of(route));
        }
    }
    by_host.entry("*".into()).or_default().push(forward_to(name));
    by_host
        .into_iter()
        .map(|(hostname, routes)| VirtualHost {
            // Metrics and access logs name the service of a request by its virtual host.
            name: if hostname == "*" { name.clone() } else { hostname.as_str().into() },
            domains: vec![hostname],
            routes,
            mutations: None,
        })
        .collect()
}

fn routes_of(route: &MeshRoute) -> Vec<ModelRoute> {
    let mut routes = Vec::new();
    for (index, rule) in route.rules.iter().enumerate() {
        for matches in &rule.matches {
            let name = format!("{}[{index}]", route.name).into();
            routes.push(ModelRoute {
                name,
                matches: matches.clone(),
                action: action(rule, &matches.path),
                mutations: None,
            });
        }
    }
    routes
}

/// A response has no timeout unless the rule sets one, so that streams, downloads and long polls work. Idle timeouts still
/// apply.
fn action(rule: &RouteRule, matched: &PathMatch) -> RouteAction {
    match &rule.target {
        RouteTarget::Redirect(redirect) => RouteAction::Redirect(redirect.clone()),
        RouteTarget::Backends { backends, prefix_replacement } => RouteAction::Forward {
            clusters: backends
                .iter()
                .map(|(service, port, weight)| {
                    WeightedCluster::new(cluster_name(service, *port).into(), *weight)
                })
                .collect(),
            path_rewrite: prefix_replacement.as_ref().and_then(|to| prefix_rewrite(matched, to)),
            host_rewrite: None,
            timeout: rule.timeout.filter(|timeout| !timeout.is_zero()),
            ends_tunnels: false,
        },
    }
}

fn forward_to(cluster: &Name) -> ModelRoute {
    let clusters = vec![WeightedCluster::new(cluster.clone(), 1)];
    let action = RouteAction::Forward {
        clusters,
        path_rewrite: None,
        host_rewrite: None,
        timeout: None,
        ends_tunnels: false,
    };
    ModelRoute { name: "default".into(), matches: RouteMatch::any(), action, mutations: None }
}

fn host(name: &Name, routes: Vec<ModelRoute>) -> VirtualHost {
    VirtualHost { name: name.clone(), domains: vec!["*".into()], routes, mutations: None }
}

/// HTTP with the defaults of a mesh: paths and headers are forwarded as they were sent.
fn http(routes: RouteSource, tuning: HttpTuning) -> HttpService {
    let path = PathRules { ambiguous: AmbiguousPath::RouteNormalized, ..PathRules::default() };
    let timeouts = HttpTimeouts {
        idle: HTTP_IDLE,
        stream_idle: tuning.stream_idle,
        ..HttpTimeouts::default()
    };
    let head_bytes = tuning.request_head_bytes;
    let limits = HttpLimits {
        head_bytes,
        // A token or a request target may use the whole head.
        target_bytes: head_bytes,
        header_bytes: head_bytes,
        header_count: tuning.request_headers,
        ..HttpLimits::default()
    };
    HttpService {
        limits,
        timeouts,
        path,
        upgrades: Upgrades { websocket: true, connect: false },
        access_log: AccessLogSinks::Stdout,
        ..HttpService::new(routes)
    }
}

fn tcp(cluster: &Name, idle_timeout: Option<Duration>) -> Filter {
    Filter::Tcp(TcpProxy {
        clusters: vec![WeightedCluster::new(cluster.clone(), 1)],
        idle_timeout: Some(idle_timeout.unwrap_or(TCP_IDLE)),
        flow_key: FlowKey::FiveTuple,
        access_log: AccessLogSinks::Stdout,
    })
}

fn chain(name: &Name, filter: Filter) -> FilterChain {
    FilterChain {
        name: name.clone(),
        matches: ChainMatch::default(),
        tls: None,
        rules: Vec::new(),
        filter,
    }
}

fn redirected(name: &str, address: std::net::SocketAddr) -> Listener {
    Listener {
        name: name.into(),
        address,
        transport: Transport::Tcp,
        bind: true,
        use_original_destination: true,
        transparent: false,
        chains: Vec::new(),
        default_chain: None,
        udp: None,
        allow_from: None,
        idle_end: None,
        flow_seed: None,
        source_address: SourceAddress::Agent,
    }
}

fn insert(snapshot: &mut Snapshot, listener: Listener) {
    snapshot.listeners.insert(listener.name.clone(), Arc::new(listener));
}
