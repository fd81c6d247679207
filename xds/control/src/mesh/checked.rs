//! The checked form of `mesh.yaml`: all names are resolved and all values parsed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use weft_model::{
    Balance, Cidr, ClaimRule, FlowKey, HeadersWithUnderscores, IdleEnd, KeyExchangeGroup,
    PathMatch, PathPattern, PathRules, RevocationPolicy, RouteMatch, SourceAddress, SpiffeId,
    StreamIdle, StringMatch,
};
use weft_xds::located::ConfigError;

/// A checked mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mesh {
    /// The trust domain of all identities.
    pub trust_domain: String,
    /// The address ranges that contain all virtual addresses of services.
    pub service_ranges: Vec<Cidr>,
    /// Whether workloads may connect to destinations outside the mesh.
    pub outbound: OutboundPolicy,
    /// The services by name.
    pub services: BTreeMap<String, Service>,
    /// The routes, in the order of the file.
    pub routes: Vec<MeshRoute>,
    /// The token issuers by name.
    pub issuers: BTreeMap<String, Issuer>,
    /// The authorization policies. A request that none of them allows is refused.
    pub policies: Vec<Policy>,
    /// The serial numbers of revoked certificates, hexadecimal.
    pub revocations: Vec<String>,
    /// How CRLs are applied.
    pub revocation: RevocationPolicy,
    /// The key exchange groups of sidecars, in order of preference; empty: the default.
    pub groups: Vec<KeyExchangeGroup>,
    /// Warnings about valid settings that are probably not intended, such as services that no caller may reach.
    pub warnings: Vec<ConfigError>,
}

/// Whether workloads may connect to destinations outside the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutboundPolicy {
    /// Connections are refused.
    #[default]
    Closed,
    /// Connections are passed through.
    Open,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its virtual addresses: at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Its endpoints: address and weight.
    pub endpoints: Vec<(IpAddr, u32)>,
    /// The load balancing policy of sidecars.
    pub balance: Balance,
    /// The client address ranges that agents accept; none: any.
    pub allow_from: Option<Vec<Cidr>>,
    /// The parts of a flow that agents hash.
    pub flow_key: FlowKey,
    /// The source address of connections from the agent to endpoints.
    pub source_address: SourceAddress,
    /// How request paths are normalized.
    pub paths: PathRules,
    /// How headers with `_` in their names are handled.
    pub underscores: HeadersWithUnderscores,
    /// Whether its endpoints have sidecars, which accept mutual TLS only.
    pub meshed: bool,
}

/// A port of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// The port at the virtual addresses.
    pub port: u16,
    /// The port of the endpoints.
    pub target: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// The idle timeout of flows; none: the default of the data plane.
    pub idle_timeout: Option<Duration>,
    /// How a connection is closed at its idle timeout.
    pub idle_end: Option<IdleEnd>,
    /// The HTTP limits and timeouts.
    pub http: HttpTuning,
}

/// The HTTP limits and timeouts of a port. They apply to the sidecars of its callers and of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpTuning {
    /// The most bytes of a request head. One header, a token or the request target may use all of it.
    pub request_head_bytes: usize,
    /// The most headers of a request.
    pub request_headers: usize,
    /// The most bytes of a response head.
    pub response_head_bytes: usize,
    /// The most headers of a response.
    pub response_headers: usize,
    /// The idle timeout of a request in progress.
    pub stream_idle: StreamIdle,
}

impl Default for HttpTuning {
    fn default() -> Self {
        let limits = weft_model::HttpLimits::default();
        Self {
            request_head_bytes: limits.head_bytes,
            request_headers: limits.header_count,
            response_head_bytes: weft_model::DEFAULT_RESPONSE_HEAD_BYTES,
            response_headers: weft_model::DEFAULT_RESPONSE_HEADER_COUNT,
            stream_idle: StreamIdle::default(),
        }
    }
}

/// The protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1, including WebSocket. Sidecars translate HTTP/2 of clients.
    Http,
    /// HTTP/2. Sidecars translate HTTP/1.1 of clients.
    Http2,
    /// gRPC: HTTP/2, without a response timeout.
    Grpc,
    /// Opaque TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A route: rules for the requests to one or more services.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshRoute {
    /// Its name.
    pub name: String,
    /// The services that it applies to.
    pub parents: Vec<RouteParent>,
    /// The host names that it applies to; empty: all.
    pub hostnames: Vec<String>,
    /// Its rules, in order: the first match wins.
    pub rules: Vec<RouteRule>,
}

/// A service that a route applies to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteParent {
    /// The service.
    pub service: String,
    /// The port; none: all ports.
    pub port: Option<u16>,
}

impl MeshRoute {
    /// Whether the route applies to a port of a service.
    #[must_use]
    pub fn is_of(&self, service: &Service, port: &Port) -> bool {
        self.parents.iter().any(|parent| {
            parent.service == service.name && parent.port.is_none_or(|number| number == port.port)
        })
    }
}

/// A rule of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteRule {
    /// The matches: a request needs one of them.
    pub matches: Vec<RouteMatch>,
    /// What is done with the requests.
    pub target: RouteTarget,
    /// The timeout of the whole response; none: no limit.
    pub timeout: Option<Duration>,
}

/// What a rule does with requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteTarget {
    /// Forwards to ports of services, chosen by weight.
    Backends {
        /// Service, port and weight.
        backends: Vec<(String, u16, u32)>,
        /// What replaces the matched prefix of the path; see [`super::prefix_rewrite`].
        prefix_replacement: Option<String>,
    },
    /// Redirects the client.
    Redirect(weft_model::Redirect),
}

/// A token issuer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issuer {
    /// The `iss` claim.
    pub issuer: String,
    /// The audiences: a token's `aud` claim must contain one of them.
    pub audiences: Vec<String>,
    /// The source of its keys.
    pub keys: TokenKeys,
    /// Whether tokens are forwarded to the service.
    pub forward: bool,
    /// Rules for further claims.
    pub claims: Vec<ClaimRule>,
    /// The claims that are forwarded to the service, each with its header.
    pub claim_headers: Vec<(String, String)>,
    /// Whether a token must be bound to the client's certificate (RFC 8705).
    pub bound: bool,
    /// Whether a stream is closed when its token expires.
    pub ends_streams: bool,
}

/// The source of an issuer's keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenKeys {
    /// A file of the control plane, and its content, which is sent to sidecars.
    File(PathBuf, Vec<u8>),
    /// A key server, from which sidecars fetch the keys.
    Http(KeyServer),
}

/// A server that publishes a key set (JWKS).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyServer {
    /// The URI of the key set.
    pub uri: String,
    /// The URI's host. With `https`, the server's certificate must have this name.
    pub host: String,
    /// The URI's port.
    pub port: u16,
    /// The address to connect to; none: the host is resolved by DNS.
    pub address: Option<SocketAddr>,
    /// The roots that verify the server's certificate; none with `http`.
    pub roots: Option<KeyServerRoots>,
    /// How many redirects are followed.
    pub redirects: u8,
}

/// The trusted roots for a server outside the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyServerRoots {
    /// The roots of the system that the sidecar runs on.
    System,
    /// A PEM file of the control plane, and its content, which is sent to sidecars.
    File(PathBuf, Vec<u8>),
}

/// An authorization policy of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The service.
    pub service: String,
    /// Allow clauses: a request must match one of them.
    pub allow: Vec<Clause>,
    /// Deny clauses: they take precedence over allow clauses.
    pub deny: Vec<Clause>,
    /// Whether the policy is evaluated without being enforced.
    pub dry_run: bool,
}

impl Policy {
    /// The clauses, each with its field path. `index` is the index of the policy in the file.
    pub(super) fn field_paths(&self, index: usize) -> impl Iterator<Item = (String, &Clause)> {
        let of = move |word: &'static str, clauses: &'_ [Clause]| {
            (0..clauses.len()).map(move |at| format!("security.policies[{index}].{word}[{at}]"))
        };
        let allow = of("allow", &self.allow).zip(&self.allow);
        allow.chain(of("deny", &self.deny).zip(&self.deny))
    }
}

/// The conditions of an allowance or a denial. All of them must match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clause {
    /// Its name in access logs and RBAC: `SERVICE.allow[NUMBER]`, numbered over all policies of the service. For the field
    /// path see [`Mesh::field_path_of`].
    pub name: String,
    /// The identities of callers; empty: any identity of the mesh.
    pub from: Vec<StringMatch>,
    /// The address ranges of callers' hosts; empty: any address.
    pub from_addresses: Vec<Cidr>,
    /// The ports at the virtual addresses; empty: all.
    pub ports: Vec<u16>,
    /// The methods in upper case. They are compared case-insensitively; empty: any.
    pub methods: Vec<String>,
    /// The paths; empty: any.
    pub paths: Vec<PathPattern>,
    /// The issuer of the required token.
    pub token: Option<String>,
    /// The required claims of the token, each with its accepted values.
    pub claims: Vec<(String, Vec<String>)>,
}

impl Clause {
    /// Whether the clause applies to a port of its service and a sidecar can evaluate it there.
    #[must_use]
    pub fn is_of(&self, port: &Port) -> bool {
        self.names(port) && self.is_enforced_at(port)
    }

    /// Whether the clause applies to the port: it lists the port, or no ports.
    pub(super) fn names(&self, port: &Port) -> bool {
        self.ports.is_empty() || self.ports.contains(&port.port)
    }

    /// Whether a sidecar can evaluate the clause at a port of this protocol.
    pub(super) fn is_enforced_at(&self, port: &Port) -> bool {
        match port.protocol {
            Protocol::Http | Protocol::Http2 | Protocol::Grpc => true,
            Protocol::Tcp => !self.has_request_conditions(),
            Protocol::Udp => false,
        }
    }

    /// Whether the clause has conditions that only HTTP requests can meet.
    pub(super) fn has_request_conditions(&self) -> bool {
        !self.methods.is_empty() || !self.paths.is_empty() || self.token.is_some()
    }

    /// The paths of the clause, as path matches of routes.
    pub(crate) fn route_paths(&self) -> Vec<PathMatch> {
        let all: Vec<PathMatch> = self.paths.iter().flat_map(PathPattern::route_paths).collect();
        if all.is_empty() { PathPattern::Any.route_paths() } else { all }
    }

    /// Whether a request may match both clauses, by its method and path. True if that cannot be excluded.
    pub(super) fn may_share_requests_with(&self, other: &Self) -> bool {
        let methods = self.methods.is_empty()
            || other.methods.is_empty()
            || self.methods.iter().any(|method| other.methods.contains(method));
        let theirs = other.route_paths();
        methods && self.route_paths().iter().any(|o| theirs.iter().any(|t| o.may_overlap(t)))
    }

    /// Whether the clause matches every request and connection to its ports.
    pub(super) fn is_unconditional(&self) -> bool {
        self.from.is_empty() && self.from_addresses.is_empty() && !self.has_request_conditions()
    }
}

impl Mesh {
    /// The field path of a clause, such as `security.policies[0].allow[1]`.
    #[must_use]
    pub fn field_path_of(&self, clause: &str) -> Option<String> {
        let mut clauses =
            (0..).zip(&self.policies).flat_map(|(index, policy)| policy.field_paths(index));
        clauses.find(|(_, known)| known.name == clause).map(|(place, _)| place)
    }

    /// The identity of a service's sidecars.
    ///
    /// # Panics
    /// Never: `check` verifies that names form a SPIFFE ID.
    #[must_use]
    pub fn identity_of(&self, service: &str) -> SpiffeId {
        identity(&self.trust_domain, service).expect("service names are checked")
    }
}

/// The identity of a service's sidecars: `spiffe://TRUST_DOMAIN/ns/default/sa/SERVICE`.
///
/// # Errors
/// The two do not form a valid SPIFFE ID.
pub fn identity(
    trust_domain: &str,
    service: &str,
) -> Result<SpiffeId, weft_model::InvalidSpiffeId> {
    SpiffeId::parse(&format!("spiffe://{trust_domain}/ns/default/sa/{service}"))
}
