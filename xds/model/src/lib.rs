//! The configuration model of the mesh as plain values, and the decisions that agent and sidecar share.
//!
//! This crate opens no socket, reads no clock and knows no wire format. `weft-xds` translates xDS resources into
//! these types and validates them; the other crates only see valid values. One [`Snapshot`] holds the whole
//! configuration; it is immutable and replaced as a whole.
//!
//! The main types, in reading order: a [`Listener`] accepts connections, a [`FilterChain`] defines how they are
//! served, a [`RouteTable`] sends a request to a [`Cluster`], which is a set of [`Endpoint`]s; a [`Secret`] is a
//! certificate with its key, or a trust bundle.

mod access_log;
mod backoff;
mod cluster;
mod dns;
mod endpoint;
mod flow;
mod header_match;
mod http;
mod identity;
pub mod jhash;
mod listener;
mod maglev;
mod method;
mod mutation;
mod name;
pub mod path;
mod path_pattern;
mod path_template;
mod pattern;
mod policy;
mod request_facts;
mod route;
mod route_index;
mod route_match;
mod secret;
mod snapshot;
#[cfg(test)]
mod test_request;
mod text;
mod tls_parameters;
mod token;

pub use access_log::{AccessLogSink, AccessLogSinks};
pub use backoff::Backoff;
pub use cluster::{
    Balance, Cluster, DEFAULT_CONNECT_TIMEOUT, DEFAULT_RESPONSE_HEAD_BYTES,
    DEFAULT_RESPONSE_HEADER_COUNT, DEFAULT_UPSTREAM_IDLE, Discovery, UpstreamProtocol,
};
pub use dns::{
    DEFAULT_DNS_REFRESH, DnsDiscovery, DnsFamily, DnsHost, DnsPolicy, DnsQuery, OnEmptyAnswer,
};
pub use endpoint::{Endpoint, EndpointSet, Health};
pub use flow::{FlowKey, FlowTuple, Transport};
pub use header_match::{HeaderCheck, HeaderMatch, is_joined};
pub use http::{
    AmbiguousPath, CertificateKey, ClientCertificateDetails, Codec, DesyncMode, EscapedSlashes,
    ForwardedFor, ForwardedHeaders, HeaderCase, HeadersWithUnderscores, HostPort, Http1Options,
    HttpFilter, HttpLimits, HttpService, HttpTimeouts, Keepalive, PathRules, RouteSource,
    StreamIdle, Upgrades,
};
pub use identity::{InvalidSpiffeId, SpiffeId};
pub use listener::{
    ChainMatch, Filter, FilterChain, IdleEnd, Listener, SourceAddress, TcpProxy, TransportKind,
    UdpProxy,
};
pub use maglev::{DEFAULT_TABLE_SIZE, InvalidTableSize, Maglev};
pub use method::{MethodRefusal, method_refusal};
pub use mutation::{
    AddressPart, AppendAction, FormatPart, FormatVariable, HeaderAddition, HeaderFormat,
    HeaderMutation, HeaderMutations, HeaderSource, PlainVariable, is_header_name,
    is_identity_header,
};
pub use name::Name;
pub use path_pattern::PathPattern;
pub use path_template::{InvalidPathPattern, PathTemplate};
pub use pattern::{Pattern, Substitution};
pub use policy::{
    Permission, Principal, Rbac, RbacAction, RbacDecision, RbacEvaluation, RbacFilter, RbacPolicy,
    evaluate_rbac, evaluate_rbac_readings,
};
pub use request_facts::RequestFacts;
pub use route::{
    DEFAULT_ROUTE_TIMEOUT, MatchedRoute, PathRewrite, Redirect, Route, RouteAction, RouteTable,
    VirtualHost, WeightedCluster,
};
pub use route_index::RouteIndex;
pub use route_match::{
    PathMatch, QueryCheck, QueryMatch, RouteMatch, has_query_or_fragment, is_uri_part,
    query_parameter,
};
pub use secret::{
    ClientCertificateMode, DataSource, DistributionPoint, DownstreamTls, ExpiredCrlAction,
    RevocationDepth, RevocationMode, RevocationPolicy, Secret, SecretSource, TlsIdentity,
    UpstreamTls, Validation,
};
pub use snapshot::{AddressConflict, MissingReference, Snapshot};
pub use text::{Cidr, InvalidCidr, StringMatch};
pub use tls_parameters::{CipherSuite, KeyExchangeGroup, TlsParameters, TlsVersion};
pub use token::{
    ClaimFormat, ClaimRule, JwtPolicy, JwtProvider, JwtRequirement, JwtRule, KeySource,
    REDIRECTS_LIMIT, TokenLocation, claim_header, token_header,
};
