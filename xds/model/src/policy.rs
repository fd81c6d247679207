//! Who may call what, and which tokens count: the policies, and the decision over them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::{Cidr, DataSource, HeaderMatch, Name, RouteMatch, SpiffeId, StringMatch};

/// Rules of who may call what (`envoy.config.rbac.v3.RBAC`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rbac {
    /// What a matching policy means.
    pub action: RbacAction,
    /// The policies by name.
    pub policies: BTreeMap<Name, RbacPolicy>,
}

/// What a matching policy means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RbacAction {
    /// A request passes when a policy matches.
    Allow,
    /// A request passes when no policy matches.
    Deny,
}

/// A policy matches when any permission and any principal match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RbacPolicy {
    /// What is asked for.
    pub permissions: Vec<Permission>,
    /// Who asks.
    pub principals: Vec<Principal>,
}

/// What is asked for (`envoy.config.rbac.v3.Permission`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Permission {
    /// Anything.
    Any,
    /// All of these.
    All(Vec<Self>),
    /// One of these.
    OneOf(Vec<Self>),
    /// Not this.
    Not(Box<Self>),
    /// A path without its query (`url_path`).
    Path(StringMatch),
    /// A header, `:method` and `:path` among them.
    Header(HeaderMatch),
    /// The port the client aimed at.
    DestinationPort(u16),
}

/// Who asks (`envoy.config.rbac.v3.Principal`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// Anybody.
    Any,
    /// All of these.
    All(Vec<Self>),
    /// One of these.
    OneOf(Vec<Self>),
    /// Not this.
    Not(Box<Self>),
    /// A peer that proved a name by its certificate; without a match, any that did.
    Authenticated(Option<StringMatch>),
    /// The address at the other end of the connection (`direct_remote_ip`).
    RemoteAddress(Cidr),
    /// A header.
    Header(HeaderMatch),
}

/// What the decision needs to know of a request.
pub trait RequestFacts {
    /// The method.
    fn method(&self) -> &str;
    /// The path without its query.
    fn path(&self) -> &str;
    /// The authority.
    fn authority(&self) -> &str;
    /// Whether any value of the header of a lower-case name is one that `fits` takes. What is no text is
    /// given with replacement characters: it must not count as absent.
    fn has_header(&self, name: &str, fits: &mut dyn FnMut(&str) -> bool) -> bool;
    /// The value of a query parameter.
    fn query(&self, name: &str) -> Option<&str>;
    /// The name the peer's certificate proved.
    fn peer(&self) -> Option<&SpiffeId>;
    /// The address at the other end of the connection.
    fn remote_address(&self) -> IpAddr;
    /// The port the client aimed at.
    fn destination_port(&self) -> u16;
}

impl Rbac {
    /// Whether the request passes.
    #[must_use]
    pub fn allows(&self, facts: &dyn RequestFacts) -> bool {
        let matched = self.policies.values().any(|policy| {
            policy.permissions.iter().any(|p| p.matches(facts))
                && policy.principals.iter().any(|p| p.matches(facts))
        });
        match self.action {
            RbacAction::Allow => matched,
            RbacAction::Deny => !matched,
        }
    }
}

impl Permission {
    fn matches(&self, facts: &dyn RequestFacts) -> bool {
        match self {
            Self::Any => true,
            Self::All(all) => all.iter().all(|p| p.matches(facts)),
            Self::OneOf(any) => any.iter().any(|p| p.matches(facts)),
            Self::Not(inner) => !inner.matches(facts),
            Self::Path(path) => path.matches(facts.path()),
            Self::Header(header) => header.matches(facts),
            Self::DestinationPort(port) => *port == facts.destination_port(),
        }
    }
}

impl Principal {
    fn matches(&self, facts: &dyn RequestFacts) -> bool {
        match self {
            Self::Any => true,
            Self::All(all) => all.iter().all(|p| p.matches(facts)),
            Self::OneOf(any) => any.iter().any(|p| p.matches(facts)),
            Self::Not(inner) => !inner.matches(facts),
            Self::Authenticated(None) => facts.peer().is_some(),
            Self::Authenticated(Some(name)) => {
                facts.peer().is_some_and(|peer| name.matches(peer.as_str()))
            }
            Self::RemoteAddress(range) => range.contains(facts.remote_address()),
            Self::Header(header) => header.matches(facts),
        }
    }
}

/// Which tokens count, and which requests need one
/// (`envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtPolicy {
    /// The issuers by name.
    pub providers: BTreeMap<Name, JwtProvider>,
    /// The first rule that covers a request says what it needs; none: nothing.
    pub rules: Vec<JwtRule>,
}

/// An issuer of tokens (`JwtProvider`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtProvider {
    /// The `iss` claim, compared whole. Always asked for.
    pub issuer: String,
    /// The `aud` claims of which the token must have one. Always asked for, never empty.
    pub audiences: Vec<String>,
    /// The keys.
    pub keys: KeySource,
    /// Whether the token goes on to the service (`forward`).
    pub forward: bool,
    /// How far the clocks may differ (`clock_skew_seconds`).
    pub leeway: Duration,
}

/// Where a key set (RFC 7517) comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// In place or in a file.
    Local(DataSource),
    /// Fetched over HTTP.
    Http {
        /// The URI.
        uri: String,
        /// The cluster that serves it.
        cluster: Name,
        /// How long a fetch may take.
        timeout: Duration,
        /// How long a fetched set is good.
        cache: Duration,
    },
}

/// What the requests of a match need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtRule {
    /// Which requests.
    pub matches: RouteMatch,
    /// What they need; none: nothing.
    pub requires: Option<JwtRequirement>,
}

/// A token of one of these providers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtRequirement {
    /// The providers, by name; one suffices.
    pub providers: Vec<Name>,
    /// Whether a request without any token passes (`allow_missing`).
    pub presence: TokenPresence,
}

/// Whether there must be a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenPresence {
    /// There must be one.
    Required,
    /// There may be none; one that is there must be good.
    Optional,
}
