//! The types that `mesh.yaml` is deserialized to, before it is checked. Unknown fields are errors.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

use super::{OutboundPolicy, Protocol, raw_number};

pub use super::raw_routes::{
    RawBackendRef, RawFilter, RawMatch, RawParentRef, RawPathMatch, RawPathModifier,
    RawRequestRedirect, RawRoute, RawRule, RawTimeouts, RawUrlRewrite, RawValueMatch,
};

/// The whole file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawMesh {
    /// The trust domain, such as `mesh.local`.
    pub trust_domain: String,
    /// The address ranges of services, such as `10.96.0.0/16`.
    pub service_ranges: Vec<String>,
    /// Whether workloads may connect to destinations outside the mesh: `closed` or `open`.
    #[serde(default)]
    pub outbound: OutboundPolicy,
    /// The services.
    pub services: Vec<RawService>,
    /// The routes.
    #[serde(default)]
    pub routes: Vec<RawRoute>,
    /// Token issuers, policies and revocations.
    #[serde(default)]
    pub security: RawSecurity,
}

impl RawMesh {
    /// Frees unused capacity of lists, since the value is kept.
    pub(super) fn shrink(&mut self) {
        self.services.shrink_to_fit();
        for service in &mut self.services {
            service.addresses.shrink_to_fit();
            service.ports.shrink_to_fit();
            service.endpoints.shrink_to_fit();
        }
        self.security.policies.shrink_to_fit();
        for policy in &mut self.security.policies {
            policy.allow.shrink_to_fit();
            policy.deny.shrink_to_fit();
            for clause in policy.allow.iter_mut().chain(&mut policy.deny) {
                clause.from.shrink_to_fit();
                clause.methods.iter_mut().for_each(Vec::shrink_to_fit);
                clause.paths.iter_mut().for_each(Vec::shrink_to_fit);
            }
        }
    }
}

/// A service.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawService {
    /// The name: lower-case letters, digits and `-`.
    pub name: String,
    /// The virtual addresses. A service without them is reached through routes only.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// The ports; empty for a service that only calls others.
    pub ports: Vec<RawPort>,
    /// The endpoints.
    #[serde(default)]
    pub endpoints: Vec<RawEndpoint>,
    /// The load balancing policy of sidecars: `round_robin` (default) or `least_requests`.
    pub balance: Option<RawBalance>,
    /// The client address ranges that agents accept; any by default.
    pub allow_from: Option<Vec<String>>,
    /// The parts of a flow that agents hash: `none` (the 5-tuple), `client_address` or `tcp_sequence`.
    #[serde(default)]
    pub affinity: RawAffinity,
    /// The source address that endpoints see behind an agent: `agent` or `client`.
    #[serde(default)]
    pub source_address: RawSourceAddress,
    /// The HTTP settings of its sidecars.
    pub http: Option<RawHttp>,
    /// Whether its endpoints have sidecars.
    #[serde(default = "default_true")]
    pub meshed: bool,
}

/// The HTTP settings of a service's sidecars.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawHttp {
    /// How request paths are normalized.
    #[serde(default)]
    pub paths: RawPaths,
    /// How headers with `_` in their names are handled: `allow`, `drop` or `reject`.
    pub headers_with_underscores: Option<String>,
    /// The size limits of messages.
    #[serde(default)]
    pub limits: RawHttpLimits,
    /// The timeouts.
    #[serde(default)]
    pub timeouts: RawHttpTimeouts,
}

/// The HTTP settings of one port, which override those of the service.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPortHttp {
    /// The size limits of messages.
    #[serde(default)]
    pub limits: RawHttpLimits,
    /// The timeouts.
    #[serde(default)]
    pub timeouts: RawHttpTimeouts,
}

/// The size limits of message heads.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawHttpLimits {
    /// The most KiB of a request head, 60 by default. One header, a token or the request target may use all of it.
    pub request_headers_kib: Option<u32>,
    /// The most headers of a request, 100 by default.
    pub request_headers: Option<u32>,
    /// The most KiB of a response head, 60 by default.
    pub response_headers_kib: Option<u32>,
    /// The most headers of a response, 1,024 by default.
    pub response_headers: Option<u32>,
}

/// The HTTP timeouts.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawHttpTimeouts {
    /// The idle timeout of a request: no data in either direction, for example while the client does not read the
    /// response. Such as `10m`; `0s`: no limit. 5 minutes by default, no limit for gRPC.
    pub stream_idle: Option<String>,
}

/// How request paths are normalized. By default they are forwarded as they were sent.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPaths {
    /// Whether dot segments are resolved and escapes of unreserved characters decoded (RFC 3986).
    #[serde(default)]
    pub normalize: bool,
    /// Whether empty segments are removed.
    #[serde(default)]
    pub merge_slashes: bool,
    /// How `%2F` and `%5C` are handled: `keep`, `reject` or `unescape_and_redirect`.
    pub escaped_slashes: Option<String>,
}

/// The load balancing policy of sidecars.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RawBalance {
    /// Endpoints in turn.
    RoundRobin,
    /// The endpoint with the fewest open requests.
    LeastRequests,
}

/// The source address that endpoints see when an agent proxies the connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RawSourceAddress {
    /// An address of the agent's host.
    #[default]
    Agent,
    /// The client's address. Responses must be routed through the agent's host, and its redirects need `keep_source`.
    Client,
}

/// Which flows go to the same endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RawAffinity {
    /// The packets of one flow, by its 5-tuple.
    #[default]
    None,
    /// All flows of one client address.
    ClientAddress,
    /// The packets of one TCP connection. The sequence number of its SYN is hashed as well, so that a connection from a
    /// reused client port may go to another endpoint.
    TcpSequence,
}

/// A port.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPort {
    /// The port at the virtual addresses.
    #[serde(deserialize_with = "raw_number::port")]
    pub port: u16,
    /// The port of the endpoints; the same by default.
    #[serde(default, deserialize_with = "raw_number::optional_port")]
    pub target: Option<u16>,
    /// The protocol: `http`, `http2`, `grpc`, `tcp` or `udp`.
    pub protocol: Protocol,
    /// The idle timeout of `tcp` and `udp` flows, such as `10m`.
    pub idle_timeout: Option<String>,
    /// How both sides of a `tcp` connection are closed at the idle timeout: `reset` or `close`.
    pub idle_end: Option<String>,
    /// The HTTP settings of this port, which override those of the service.
    pub http: Option<RawPortHttp>,
}

/// An endpoint.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// The weight, 1 by default.
    pub weight: Option<u32>,
}

/// Token issuers, policies and revocations.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawSecurity {
    /// The token issuers by name.
    #[serde(default)]
    pub issuers: BTreeMap<String, RawIssuer>,
    /// The authorization policies.
    #[serde(default)]
    pub policies: Vec<RawPolicy>,
    /// The serial numbers of revoked certificates, hexadecimal.
    #[serde(default)]
    pub revocations: Vec<String>,
    /// How CRLs are applied.
    #[serde(default)]
    pub revocation: RawRevocation,
    /// Whether sidecars use the post-quantum key exchange X25519MLKEM768: `prefer`, `require` or `off`.
    pub post_quantum: Option<String>,
}

/// How CRLs are applied, everywhere in the mesh.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawRevocation {
    /// `off`, `soft` (a certificate without a CRL of its issuer is accepted) or `strict`.
    pub mode: Option<String>,
    /// What an expired CRL does: `ignore`, `warn` or `deny`.
    pub on_expired: Option<String>,
    /// Which certificates are checked: `leaf` or `chain`.
    pub depth: Option<String>,
    /// The grace period for open requests and connections of a revoked peer, in seconds.
    #[serde(default)]
    pub drain_seconds: u32,
    /// The most entries of all CRLs.
    pub entries_limit: Option<u32>,
    /// The most bytes of all CRLs.
    pub bytes_limit: Option<u32>,
}

/// A token issuer.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawIssuer {
    /// The `iss` claim.
    pub issuer: String,
    /// The accepted `aud` claims.
    pub audiences: Vec<String>,
    /// A file with the key set (JWKS). The path is relative to `mesh.yaml`.
    pub jwks_file: Option<String>,
    /// The URI of the key set.
    pub jwks_uri: Option<String>,
    /// The address and port to connect to. Without it the URI's host is resolved by DNS.
    pub jwks_address: Option<SocketAddr>,
    /// A PEM file with the trusted roots for the key server, relative to `mesh.yaml`. Without it the roots of the system
    /// are trusted.
    pub jwks_roots_file: Option<String>,
    /// The most HTTP redirects that are followed to the key set.
    #[serde(default)]
    pub jwks_redirects: u8,
    /// Whether tokens are forwarded to the service.
    #[serde(default = "default_true")]
    pub forward: bool,
    /// Rules for further claims.
    #[serde(default)]
    pub claims: Vec<RawClaim>,
    /// The claims that are forwarded in headers: header names by claim.
    #[serde(default)]
    pub claim_headers: BTreeMap<String, String>,
    /// Whether a token must be bound to the client's certificate (`cnf`, RFC 8705).
    #[serde(default)]
    pub bound_to_certificate: bool,
    /// Whether a stream is closed when its token expires.
    #[serde(default)]
    pub ends_streams: bool,
}

/// A rule for a claim.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawClaim {
    /// Its name.
    pub name: String,
    /// `single-string`, `string-array` or `space-separated-values`.
    pub format: Option<String>,
    /// The accepted values.
    pub values: Vec<String>,
    /// Whether all values are required. Otherwise one suffices.
    #[serde(default)]
    pub all: bool,
}

/// An authorization policy of a service.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPolicy {
    /// The service.
    pub service: String,
    /// Allow clauses.
    #[serde(default)]
    pub allow: Vec<RawClause>,
    /// Deny clauses, which take precedence.
    #[serde(default)]
    pub deny: Vec<RawClause>,
    /// Whether the policy is only evaluated: requests that it would refuse are logged and served.
    #[serde(default)]
    pub dry_run: bool,
}

/// The conditions of an allowance or a denial.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawClause {
    /// The callers: service names or SPIFFE IDs. An ID that ends with `/*` covers all IDs below it, such as those of a
    /// namespace. `"*"` is any identity of the mesh.
    pub from: Vec<String>,
    /// The address ranges of callers' hosts.
    pub from_addresses: Option<Vec<String>>,
    /// The ports of the service.
    #[serde(default, deserialize_with = "raw_number::optional_ports")]
    pub ports: Option<Vec<u16>>,
    /// The methods, compared case-insensitively; `"*"`: any.
    pub methods: Option<Vec<String>>,
    /// The path patterns (`weft_model::PathPattern`).
    pub paths: Option<Vec<RawPathText>>,
    /// The issuer of the required token.
    pub token: Option<String>,
    /// The required claims of the token, each with its accepted values.
    pub claims: Option<BTreeMap<String, Vec<String>>>,
}

/// A path of a policy clause.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "a path pattern such as /cart, or {type: Exact, value: /cart}")]
pub enum RawPathText {
    /// A pattern, which may have wildcards.
    Pattern(String),
    /// A `PathPrefix` or `Exact` match as in routes, without wildcards.
    Typed(RawPathMatch),
}

fn default_true() -> bool {
    true
}
