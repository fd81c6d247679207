//! `mesh.yaml`: services, routes in the shape of the Gateway API's HTTPRoute, and who may call whom.
//!
//! [`raw`] is the file as it is written, with every field optional that can be; [`Mesh`] is what it
//! means, with every name resolved and every value parsed. Between them every mistake is collected.

mod check;
mod duration;
mod file;
mod parse_errors;
mod path_rewrite;
pub mod raw;
mod raw_number;
pub mod raw_routes;
mod reader;
mod sections;
pub(crate) mod token_rules;

pub use file::MeshFile;
pub use path_rewrite::prefix_rewrite;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use weft_model::{
    Balance, Cidr, ClaimRule, FlowKey, HeadersWithUnderscores, IdleEnd, KeyExchangeGroup,
    PathMatch, PathPattern, PathRules, RevocationPolicy, RouteMatch, SourceAddress, SpiffeId,
    StreamIdle, StringMatch,
};
use weft_xds::bootstrap::ConfigError;

/// A mesh, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mesh {
    /// The trust domain of every identity.
    pub trust_domain: String,
    /// The addresses of services; every virtual address lies in one of them.
    pub service_ranges: Vec<Cidr>,
    /// Whether a workload may talk to what is no service of the mesh.
    pub outbound: OutboundPolicy,
    /// The services by name.
    pub services: BTreeMap<String, Service>,
    /// The routes, in the order of the file.
    pub routes: Vec<MeshRoute>,
    /// The issuers of tokens by name.
    pub issuers: BTreeMap<String, Issuer>,
    /// Who may call what. What is not allowed here is refused.
    pub policies: Vec<Policy>,
    /// Serial numbers of certificates that are no longer good, in hex.
    pub revocations: Vec<String>,
    /// What revocation lists decide.
    pub revocation: RevocationPolicy,
    /// How sidecars agree on keys, most wanted first; empty: as they prefer.
    pub groups: Vec<KeyExchangeGroup>,
    /// What the file may not mean, though it is valid: such as services that no caller may reach.
    pub warnings: Vec<ConfigError>,
}

/// Whether a workload may talk to what is no service of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutboundPolicy {
    /// It may not.
    #[default]
    Closed,
    /// It may.
    Open,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its virtual addresses: at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// What it serves.
    pub ports: Vec<Port>,
    /// Where its replicas are.
    pub endpoints: Vec<(IpAddr, u32)>,
    /// How a replica is chosen for a request.
    pub balance: Balance,
    /// Whose flows agents take; none: anybody's.
    pub allow_from: Option<Vec<Cidr>>,
    /// What of a flow decides about its replica.
    pub flow_key: FlowKey,
    /// Whose address replicas see.
    pub source_address: SourceAddress,
    /// What becomes of the paths of requests.
    pub paths: PathRules,
    /// What becomes of headers with `_` in their names.
    pub underscores: HeadersWithUnderscores,
    /// Whether its replicas have sidecars, and so speak mutual TLS only.
    pub meshed: bool,
}

/// A port of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// The port at the virtual addresses.
    pub port: u16,
    /// The port at the replicas.
    pub target: u16,
    /// What is spoken.
    pub protocol: Protocol,
    /// How long a flow may be silent; as long as flows usually may, when not given.
    pub idle_timeout: Option<Duration>,
    /// How a connection ends that was silent for too long.
    pub idle_end: Option<IdleEnd>,
    /// How large and how slow HTTP may be.
    pub http: HttpTuning,
}

/// How large and how slow the messages of an HTTP port may be, at its callers and at the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpTuning {
    /// The most bytes of a request head, which one header, a token or the target may fill.
    pub request_head_bytes: usize,
    /// The most headers of a request.
    pub request_headers: usize,
    /// The most bytes of a response head.
    pub response_head_bytes: usize,
    /// The most headers of a response.
    pub response_headers: usize,
    /// How long a request under way may be silent.
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

/// What is spoken on a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1, WebSocket too. Clients may speak HTTP/2 as well: it is translated.
    Http,
    /// HTTP/2. Clients may speak HTTP/1.1 as well: it is translated.
    Http2,
    /// gRPC: HTTP/2, without a limit to how long an answer may take.
    Grpc,
    /// Bytes over TCP.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A route: where the requests to a service go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshRoute {
    /// Its name.
    pub name: String,
    /// The services whose requests it takes.
    pub parents: Vec<RouteParent>,
    /// The host names it takes, when it does not take all.
    pub hostnames: Vec<String>,
    /// Its rules, in order.
    pub rules: Vec<RouteRule>,
}

/// A service whose requests a route takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteParent {
    /// The service.
    pub service: String,
    /// Its port; none: all ports.
    pub port: Option<u16>,
}

impl MeshRoute {
    /// Whether the route takes the requests to a port of a service.
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
    /// Which requests: one match suffices.
    pub matches: Vec<RouteMatch>,
    /// Where they go.
    pub target: RouteTarget,
    /// How long until the whole response; none: without limit.
    pub timeout: Option<Duration>,
}

/// Where a rule's requests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteTarget {
    /// To these ports of services, by weight.
    Backends {
        /// Service, port and weight.
        backends: Vec<(String, u16, u32)>,
        /// What replaces the matched prefix of the path; see [`prefix_rewrite`].
        prefix_replacement: Option<String>,
    },
    /// Elsewhere.
    Redirect(weft_model::Redirect),
}

/// An issuer of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issuer {
    /// The `iss` claim.
    pub issuer: String,
    /// The `aud` claims, of which a token needs one.
    pub audiences: Vec<String>,
    /// Where its keys are.
    pub keys: TokenKeys,
    /// Whether its tokens go on to the service.
    pub forward: bool,
    /// What claims beside these must be.
    pub claims: Vec<ClaimRule>,
    /// Which claims are told to the service, and in which field.
    pub claim_headers: Vec<(String, String)>,
    /// Whether a token must name the client's certificate.
    pub bound: bool,
    /// Whether a stream ends when its token does.
    pub ends_streams: bool,
}

/// Where keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenKeys {
    /// In the control plane's file: they are sent along.
    File(PathBuf, Vec<u8>),
    /// At a key server.
    Http(KeyServer),
}

/// A server that publishes keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyServer {
    /// The URI of the key set.
    pub uri: String,
    /// The URI's host: by `https` the server's certificate must have this name.
    pub host: String,
    /// The URI's port.
    pub port: u16,
    /// The address to connect to; none: the host is resolved.
    pub address: Option<SocketAddr>,
    /// By which roots the server's certificate is verified; none by `http`.
    pub roots: Option<KeyServerRoots>,
    /// How many redirects are followed.
    pub redirects: u8,
}

/// Roots of a server outside the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyServerRoots {
    /// Those that the system of each sidecar trusts.
    System,
    /// Those of a file, PEM: they are sent along.
    File(PathBuf, Vec<u8>),
}

/// Who may call what at a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The service.
    pub service: String,
    /// Each allows something; nothing else is allowed.
    pub allow: Vec<Clause>,
    /// Each denies something, whatever is allowed.
    pub deny: Vec<Clause>,
    /// Whether it only watches.
    pub dry_run: bool,
}

impl Policy {
    /// The clauses, each with its place in the file, where the policy has this index.
    fn places(&self, index: usize) -> impl Iterator<Item = (String, &Clause)> {
        let of = move |word: &'static str, clauses: &'_ [Clause]| {
            (0..clauses.len()).map(move |at| format!("security.policies[{index}].{word}[{at}]"))
        };
        let allow = of("allow", &self.allow).zip(&self.allow);
        allow.chain(of("deny", &self.deny).zip(&self.deny))
    }
}

/// Something that is allowed or denied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clause {
    /// Its name wherever it decides: `SERVICE.allow[NUMBER]`, numbered over all policies of the service. Where it stands
    /// in the file: [`Mesh::place_of`].
    pub name: String,
    /// The identities that are meant; empty: any identity of the mesh.
    pub from: Vec<StringMatch>,
    /// The ranges of addresses that the caller's host must be in one of; empty: any address.
    pub from_addresses: Vec<Cidr>,
    /// The ports of the service, as its clients know them; empty: all.
    pub ports: Vec<u16>,
    /// The methods in upper case, compared without case; empty: any.
    pub methods: Vec<String>,
    /// The paths; empty: any.
    pub paths: Vec<PathPattern>,
    /// The issuer whose token is needed as well.
    pub token: Option<String>,
    /// Which claims its token must have, and the values of which each must be one.
    pub claims: Vec<(String, Vec<String>)>,
}

impl Clause {
    /// Whether the clause applies to a port of its service and a sidecar can evaluate it there.
    #[must_use]
    pub fn is_of(&self, port: &Port) -> bool {
        self.names(port) && self.is_enforced_at(port)
    }

    /// Whether the clause names the port, or names none.
    fn names(&self, port: &Port) -> bool {
        self.ports.is_empty() || self.ports.contains(&port.port)
    }

    /// Whether a sidecar can evaluate the clause at a port of this protocol.
    fn is_enforced_at(&self, port: &Port) -> bool {
        match port.protocol {
            Protocol::Http | Protocol::Http2 | Protocol::Grpc => true,
            Protocol::Tcp => !self.has_request_conditions(),
            Protocol::Udp => false,
        }
    }

    /// Whether the clause has conditions that only HTTP requests can meet.
    fn has_request_conditions(&self) -> bool {
        !self.methods.is_empty() || !self.paths.is_empty() || self.token.is_some()
    }

    /// The paths that the clause covers, as routes have them.
    pub(crate) fn route_paths(&self) -> Vec<PathMatch> {
        let all: Vec<PathMatch> = self.paths.iter().flat_map(PathPattern::route_paths).collect();
        if all.is_empty() { PathPattern::Any.route_paths() } else { all }
    }

    /// Whether both clauses may cover one request, by its method and path. True as well where that is
    /// not known.
    fn may_share_requests_with(&self, other: &Self) -> bool {
        let methods = self.methods.is_empty()
            || other.methods.is_empty()
            || self.methods.iter().any(|method| other.methods.contains(method));
        let theirs = other.route_paths();
        methods && self.route_paths().iter().any(|o| theirs.iter().any(|t| o.may_overlap(t)))
    }

    /// Whether the clause covers everything that may come to its ports.
    fn is_unconditional(&self) -> bool {
        self.from.is_empty() && self.from_addresses.is_empty() && !self.has_request_conditions()
    }
}

impl Mesh {
    /// Reads a mesh. `folder` is where the files it names are looked for.
    ///
    /// # Errors
    /// Every mistake, each with its line and field.
    pub fn parse(text: &str, folder: &std::path::Path) -> Result<Self, Vec<ConfigError>> {
        reader::MeshReader::default().read(&text.into(), &file::ReferencedFiles::below(folder))
    }

    /// Where a clause stands in the file, such as `security.policies[0].allow[1]`.
    #[must_use]
    pub fn place_of(&self, clause: &str) -> Option<String> {
        let mut clauses =
            (0..).zip(&self.policies).flat_map(|(index, policy)| policy.places(index));
        clauses.find(|(_, known)| known.name == clause).map(|(place, _)| place)
    }

    /// The identity of a service's sidecars.
    ///
    /// # Panics
    /// Never: names were checked to make a SPIFFE id.
    #[must_use]
    pub fn identity_of(&self, service: &str) -> SpiffeId {
        identity(&self.trust_domain, service)
            .expect("service names are checked to make a SPIFFE id")
    }
}

/// The identity of a service's sidecars: `spiffe://TRUST_DOMAIN/ns/default/sa/SERVICE`.
///
/// # Errors
/// When the two do not make a SPIFFE id.
pub fn identity(
    trust_domain: &str,
    service: &str,
) -> Result<SpiffeId, weft_model::InvalidSpiffeId> {
    SpiffeId::parse(&format!("spiffe://{trust_domain}/ns/default/sa/{service}"))
}

#[cfg(test)]
mod tests;
