//! `mesh.yaml` as it is written. An unknown field is a mistake.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

use super::{OutboundPolicy, Protocol, raw_number};

pub use super::raw_routes::{
    RawBackendRef, RawFilter, RawMatch, RawParentRef, RawPathMatch, RawPathModifier,
    RawRequestRedirect, RawRoute, RawRule, RawTimeouts, RawUrlRewrite, RawValueMatch,
};

/// The file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawMesh {
    /// Such as `mesh.local`.
    pub trust_domain: String,
    /// Such as `10.96.0.0/16`.
    pub service_ranges: Vec<String>,
    /// `closed` or `open`.
    #[serde(default)]
    pub outbound: OutboundPolicy,
    /// The services.
    pub services: Vec<RawService>,
    /// The routes.
    #[serde(default)]
    pub routes: Vec<RawRoute>,
    /// Tokens, policies and revocations.
    #[serde(default)]
    pub security: RawSecurity,
}

impl RawMesh {
    /// Gives back the room that lists were read into and do not need: the mesh is kept.
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
    /// Its name: lower-case letters, digits and `-`.
    pub name: String,
    /// Its virtual addresses; a service without any is reached by routes.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Its ports; none: it only calls others.
    pub ports: Vec<RawPort>,
    /// Its replicas.
    #[serde(default)]
    pub endpoints: Vec<RawEndpoint>,
    /// `round_robin` or `least_requests`; `round_robin` when not given.
    pub balance: Option<RawBalance>,
    /// Whose flows agents take: address ranges. Anybody's when not given.
    pub allow_from: Option<Vec<String>>,
    /// `none`, `client_address` or `tcp_sequence`.
    #[serde(default)]
    pub affinity: RawAffinity,
    /// `agent` or `client`.
    #[serde(default)]
    pub source_address: RawSourceAddress,
    /// How its sidecars serve HTTP.
    pub http: Option<RawHttp>,
    /// Whether its replicas have sidecars.
    #[serde(default = "yes")]
    pub meshed: bool,
}

/// How sidecars serve the HTTP ports of a service.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawHttp {
    /// What becomes of paths.
    #[serde(default)]
    pub paths: RawPaths,
    /// What becomes of headers with `_` in their names: `allow`, `drop` or `reject`.
    pub headers_with_underscores: Option<String>,
    /// How large messages may be.
    #[serde(default)]
    pub limits: RawHttpLimits,
    /// How long they may take.
    #[serde(default)]
    pub timeouts: RawHttpTimeouts,
}

/// How sidecars serve one HTTP port, where it differs from the service's others.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPortHttp {
    /// How large messages may be.
    #[serde(default)]
    pub limits: RawHttpLimits,
    /// How long they may take.
    #[serde(default)]
    pub timeouts: RawHttpTimeouts,
}

/// How large the heads of messages may be.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawHttpLimits {
    /// The head of a request in KiB; one header, a token or the target may fill it. 60 when not given.
    pub request_headers_kib: Option<u32>,
    /// The headers of a request; 100 when not given.
    pub request_headers: Option<u32>,
    /// The head of a response in KiB; 60 when not given.
    pub response_headers_kib: Option<u32>,
    /// The headers of a response; 1,024 when not given.
    pub response_headers: Option<u32>,
}

/// How long messages may take.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawHttpTimeouts {
    /// How long a request may be silent in both directions, such as a client that takes nothing of its answer:
    /// such as `10m`; `0s`: without limit. 5 minutes when not given, and without limit for gRPC.
    pub stream_idle: Option<String>,
}

/// What becomes of paths. By default they reach the service as they were sent.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPaths {
    /// Whether dot segments are resolved and needless escapes decoded.
    #[serde(default)]
    pub normalize: bool,
    /// Whether empty segments are removed.
    #[serde(default)]
    pub merge_slashes: bool,
    /// What is done with `%2F` and `%5C`: `keep`, `reject` or `unescape_and_redirect`.
    pub escaped_slashes: Option<String>,
}

/// How a replica is chosen.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RawBalance {
    /// In turn.
    RoundRobin,
    /// The one with the fewest open requests.
    LeastRequests,
}

/// Whose address replicas see, when an agent moves the bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RawSourceAddress {
    /// The agent's host's.
    #[default]
    Agent,
    /// The client's: answers must come by the agent's host, and its redirects have `keep_source`.
    Client,
}

/// Which flows go to one replica.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RawAffinity {
    /// Each flow has its own.
    #[default]
    None,
    /// Those of one client.
    ClientAddress,
    /// Each has its own, also one from the port of one before: of TCP, the sequence number of the SYN
    /// counts as well.
    TcpSequence,
}

/// A port.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPort {
    /// At the virtual addresses.
    #[serde(deserialize_with = "raw_number::port")]
    pub port: u16,
    /// At the replicas; the same when not given.
    #[serde(default, deserialize_with = "raw_number::optional_port")]
    pub target: Option<u16>,
    /// `http`, `grpc`, `tcp` or `udp`.
    pub protocol: Protocol,
    /// How long a flow of `tcp` or `udp` may be silent, such as `10m`.
    pub idle_timeout: Option<String>,
    /// How a connection of `tcp` ends that was silent for too long, for both sides to see: `reset` or
    /// `close`.
    pub idle_end: Option<String>,
    /// How sidecars serve a port of HTTP, where it differs from the service's others.
    pub http: Option<RawPortHttp>,
}

/// A replica.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// Its share, 1 when not given.
    pub weight: Option<u32>,
}

/// Tokens, policies and revocations.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawSecurity {
    /// The issuers of tokens by name.
    #[serde(default)]
    pub issuers: BTreeMap<String, RawIssuer>,
    /// Who may call what.
    #[serde(default)]
    pub policies: Vec<RawPolicy>,
    /// Serial numbers, hex.
    #[serde(default)]
    pub revocations: Vec<String>,
    /// What revocation lists decide.
    #[serde(default)]
    pub revocation: RawRevocation,
    /// Whether keys are agreed on in a way that quantum computers do not undo: `prefer`, `require` or `off`.
    pub post_quantum: Option<String>,
}

/// What revocation lists decide, everywhere in the mesh.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawRevocation {
    /// `off`, `soft`, or `strict`.
    pub mode: Option<String>,
    /// `ignore`, `warn`, or `deny`.
    pub on_expired: Option<String>,
    /// `leaf` or `chain`.
    pub depth: Option<String>,
    /// How long what a revoked peer has begun may last, in seconds.
    #[serde(default)]
    pub drain_seconds: u32,
    /// The most revoked certificates.
    pub entries_limit: Option<u32>,
    /// The most bytes of lists.
    pub bytes_limit: Option<u32>,
}

/// An issuer.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawIssuer {
    /// The `iss` claim.
    pub issuer: String,
    /// The `aud` claims.
    pub audiences: Vec<String>,
    /// A file with the key set, beside the mesh's.
    pub jwks_file: Option<String>,
    /// The URI of the key set.
    pub jwks_uri: Option<String>,
    /// Where the URI is served: address and port. Without it the URI's host is resolved.
    pub jwks_address: Option<SocketAddr>,
    /// A file with the roots of the key server, beside the mesh's. Without it the roots of the system count.
    pub jwks_roots_file: Option<String>,
    /// How many redirects are followed to the key set.
    #[serde(default)]
    pub jwks_redirects: u8,
    /// Whether tokens go on to the service.
    #[serde(default = "yes")]
    pub forward: bool,
    /// What claims beside these must be.
    #[serde(default)]
    pub claims: Vec<RawClaim>,
    /// Which claims are told to the service: fields by claim.
    #[serde(default)]
    pub claim_headers: BTreeMap<String, String>,
    /// Whether a token must name the client's certificate.
    #[serde(default)]
    pub bound_to_certificate: bool,
    /// Whether a stream ends when its token does.
    #[serde(default)]
    pub ends_streams: bool,
}

/// What a claim must be.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawClaim {
    /// Its name.
    pub name: String,
    /// `single-string`, `string-array` or `space-separated-values`.
    pub format: Option<String>,
    /// The values.
    pub values: Vec<String>,
    /// Whether it must have all of them; else one suffices.
    #[serde(default)]
    pub all: bool,
}

/// Who may call what at a service.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPolicy {
    /// The service.
    pub service: String,
    /// What is allowed.
    #[serde(default)]
    pub allow: Vec<RawClause>,
    /// What is denied, whatever is allowed.
    #[serde(default)]
    pub deny: Vec<RawClause>,
    /// Whether it only watches: what it would refuse is told, and passes.
    #[serde(default)]
    pub dry_run: bool,
}

/// Something that is allowed or denied.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawClause {
    /// Service names or SPIFFE ids; an id that ends with `/*`: all below it, such as those of a namespace;
    /// `"*"`: any identity of the mesh.
    pub from: Vec<String>,
    /// The ranges of addresses that the caller's host must be in one of.
    pub from_addresses: Option<Vec<String>>,
    /// The ports of the service.
    #[serde(default, deserialize_with = "raw_number::optional_ports")]
    pub ports: Option<Vec<u16>>,
    /// The methods, compared without case; `"*"`: any.
    pub methods: Option<Vec<String>>,
    /// The path patterns (`weft_model::PathPattern`).
    pub paths: Option<Vec<RawPathText>>,
    /// The issuer whose token is needed.
    pub token: Option<String>,
    /// What claims of the token must be: one of these values each.
    pub claims: Option<BTreeMap<String, Vec<String>>>,
}

/// A path of a policy.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "a path pattern such as /cart, or {type: Exact, value: /cart}")]
pub enum RawPathText {
    /// A pattern.
    Pattern(String),
    /// `PathPrefix` or `Exact`, without wildcards, as in routes.
    Typed(RawPathMatch),
}

fn yes() -> bool {
    true
}
