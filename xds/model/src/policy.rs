//! Who may call what: the policies, and the decision over them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::{Cidr, HeaderMatch, Name, SpiffeId, StringMatch};

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
    /// A claim of a token, by the name under which policies see the payload and the way into it
    /// (`metadata` of `envoy.filters.http.jwt_authn`). Of a list, one value suffices.
    Claim(Name, Vec<String>, StringMatch),
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
    /// Whether the token that was checked has a claim of which `fits` takes a value. `name` is the provider's
    /// name for the payload, `way` leads into it.
    fn has_claim(&self, name: &str, way: &[String], fits: &mut dyn FnMut(&str) -> bool) -> bool;
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
            Self::Claim(name, way, value) => {
                facts.has_claim(name, way, &mut |claim| value.matches(claim))
            }
        }
    }
}
