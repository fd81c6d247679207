//! Who may call what: the policies, and the decision over them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::{Cidr, HeaderMatch, Name, PathTemplate, SpiffeId, StringMatch};

/// Rules of who may call what (`envoy.config.rbac.v3.RBAC`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rbac {
    /// What a matching policy means.
    pub action: RbacAction,
    /// The policies by name.
    pub policies: BTreeMap<Name, RbacPolicy>,
}

/// A check of who may call what (`envoy.extensions.filters.http.rbac.v3.RBAC`, and the same of
/// `network`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RbacFilter {
    /// The rules in force; none: everything passes.
    pub rules: Option<Rbac>,
    /// Rules that only watch: what they would refuse is told, and passes (`shadow_rules`).
    pub shadow: Option<Rbac>,
}

/// What a matching policy means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RbacAction {
    /// A request passes when a policy matches.
    Allow,
    /// A request passes when no policy matches.
    Deny,
    /// Every request passes (`LOG`).
    Log,
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
    /// A path with wildcards (`uri_template`).
    PathTemplate(PathTemplate),
    /// A header, `:method` and `:path` among them.
    Header(HeaderMatch),
    /// The address the client aimed at (`destination_ip`).
    DestinationAddress(Cidr),
    /// The port the client aimed at.
    DestinationPort(u16),
    /// A port from the first up to the second, which is not among them (`destination_port_range`).
    DestinationPorts(i32, i32),
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
    /// A peer that proved a name by its certificate; without a match, any that did. Envoy takes any TLS
    /// client then, with a certificate or without.
    Authenticated(Option<StringMatch>),
    /// A path without its query (`url_path`).
    Path(StringMatch),
    /// The address at the other end of the connection (`direct_remote_ip`, and `source_ip`).
    RemoteAddress(Cidr),
    /// The client's address, after trusted hops of `x-forwarded-for` (`remote_ip`).
    ClientAddress(Cidr),
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
    /// Whether `fits` takes a spelling of the path. A path that is written in one way has one.
    fn path_fits(&self, fits: &mut dyn FnMut(&str) -> bool) -> bool {
        fits(self.path())
    }
    /// Whether `fits` takes a spelling of the path with its query. A request without a path has none.
    fn target_fits(&self, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool;
    /// The scheme.
    fn scheme(&self) -> &str;
    /// The authority.
    fn authority(&self) -> &str;
    /// Whether any value of the header of a lower-case name is one that `fits` takes.
    fn has_header(&self, name: &str, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool;
    /// The first value of a query parameter, as it was sent.
    fn query(&self, name: &str) -> Option<&str>;
    /// Whether the token that was checked has a claim of which `fits` takes a value. `name` is the provider's
    /// name for the payload, `way` leads into it.
    fn has_claim(&self, name: &str, way: &[String], fits: &mut dyn FnMut(&str) -> bool) -> bool;
    /// The name the peer's certificate proved.
    fn peer(&self) -> Option<&SpiffeId>;
    /// The address at the other end of the connection.
    fn remote_address(&self) -> IpAddr;
    /// The client's address, as trusted hops forwarded it.
    fn client_address(&self) -> IpAddr {
        self.remote_address()
    }
    /// The address the client aimed at.
    fn destination_address(&self) -> IpAddr;
    /// The port the client aimed at.
    fn destination_port(&self) -> u16;
}

/// What rules say of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RbacDecision<'a> {
    /// Whether it is refused.
    pub refused: bool,
    /// The policy that decided: the one that allows, or the one that denies. None: no policy speaks of
    /// it, which is a refusal where something must allow it.
    pub policy: Option<&'a Name>,
}

/// What all checks together say of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RbacEvaluation<'a> {
    /// What holds.
    pub enforced: RbacDecision<'a>,
    /// What the rules that only watch would say; none where there are none.
    pub shadow: Option<RbacDecision<'a>>,
}

/// Decides a request: the first check that refuses it decides, and else the last that allows it.
/// The one function by which requests and connections are let in, and `weft why` answers.
pub fn evaluate_rbac<'a>(
    filters: impl IntoIterator<Item = &'a RbacFilter>,
    facts: &dyn RequestFacts,
) -> RbacEvaluation<'a> {
    let mut judgement = RbacEvaluation::default();
    for filter in filters {
        if let Some(rules) = filter.rules.as_ref().filter(|_| !judgement.enforced.refused) {
            judgement.enforced = judgement.enforced.then(rules.evaluate_rbac(facts));
        }
        if let Some(rules) = &filter.shadow {
            let before = judgement.shadow.unwrap_or_default();
            let after =
                if before.refused { before } else { before.then(rules.evaluate_rbac(facts)) };
            judgement.shadow = Some(after);
        }
    }
    judgement
}

/// Decides a request whose path services read in several ways: every reading must be allowed.
pub fn evaluate_rbac_readings<'a, F: RequestFacts>(
    filters: &(impl Iterator<Item = &'a RbacFilter> + Clone),
    readings: impl IntoIterator<Item = F>,
) -> RbacEvaluation<'a> {
    let mut judgement: Option<RbacEvaluation<'a>> = None;
    for facts in readings {
        let next = evaluate_rbac(filters.clone(), &facts);
        let before = judgement.unwrap_or(next);
        let watched = before.shadow.filter(|shadow| shadow.refused).or(next.shadow);
        let enforced = if next.enforced.refused { next.enforced } else { before.enforced };
        judgement = Some(RbacEvaluation { enforced, shadow: watched });
        if enforced.refused {
            break;
        }
    }
    judgement.unwrap_or_default()
}

impl<'a> RbacDecision<'a> {
    /// What two checks say, of which the first lets it pass.
    fn then(self, next: Self) -> Self {
        Self {
            refused: next.refused,
            policy: if next.refused { next.policy } else { next.policy.or(self.policy) },
        }
    }
}

impl Rbac {
    /// What these rules say of a request.
    fn evaluate_rbac(&self, facts: &dyn RequestFacts) -> RbacDecision<'_> {
        let matched = self.policies.iter().find(|(_, policy)| {
            policy.permissions.iter().any(|p| p.matches(facts))
                && policy.principals.iter().any(|p| p.matches(facts))
        });
        let by = matched.map(|(name, _)| name);
        let refused = match self.action {
            RbacAction::Allow => by.is_none(),
            RbacAction::Deny => by.is_some(),
            RbacAction::Log => false,
        };
        RbacDecision { refused, policy: by }
    }
}

impl Permission {
    fn matches(&self, facts: &dyn RequestFacts) -> bool {
        match self {
            Self::Any => true,
            Self::All(all) => all.iter().all(|p| p.matches(facts)),
            Self::OneOf(any) => any.iter().any(|p| p.matches(facts)),
            Self::Not(inner) => !inner.matches(facts),
            Self::Path(wanted) => facts.path_fits(&mut |path| wanted.matches(path)),
            Self::PathTemplate(wanted) => facts.path_fits(&mut |path| wanted.matches(path)),
            Self::Header(header) => header.matches(facts),
            Self::DestinationAddress(range) => range.contains(facts.destination_address()),
            Self::DestinationPort(port) => *port == facts.destination_port(),
            Self::DestinationPorts(start, end) => {
                (*start..*end).contains(&i32::from(facts.destination_port()))
            }
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
            Self::Path(wanted) => facts.path_fits(&mut |path| wanted.matches(path)),
            Self::RemoteAddress(range) => range.contains(facts.remote_address()),
            Self::ClientAddress(range) => range.contains(facts.client_address()),
            Self::Header(header) => header.matches(facts),
            Self::Claim(name, way, value) => {
                facts.has_claim(name, way, &mut |claim| value.matches(claim))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_request::TestRequest;

    /// A connection to a port.
    fn to(port: u16) -> TestRequest {
        TestRequest { destination: ([10, 0, 0, 2], port).into(), ..TestRequest::default() }
    }

    fn rules(action: RbacAction, ports: &[u16]) -> Rbac {
        let policy = |port: &u16| {
            let permissions = vec![Permission::DestinationPort(*port)];
            (format!("{port}").into(), RbacPolicy { permissions, principals: vec![Principal::Any] })
        };
        Rbac { action, policies: ports.iter().map(policy).collect() }
    }

    #[test]
    fn the_first_that_refuses_decides_and_else_the_last_that_allows() {
        let denies = |ports: &[u16]| Some(rules(RbacAction::Deny, ports));
        let allows = |ports: &[u16]| Some(rules(RbacAction::Allow, ports));
        let in_force = |rules| RbacFilter { rules, shadow: None };
        let watching = |shadow| RbacFilter { rules: None, shadow };
        let check = |filters: &[RbacFilter], port, refused, by: Option<&str>, shadow| {
            let judgement = evaluate_rbac(filters, &to(port));
            let verdict = judgement.enforced;
            assert_eq!(
                (verdict.refused, verdict.policy.map(|name| &**name)),
                (refused, by),
                "{port}"
            );
            assert_eq!(judgement.shadow.map(|shadow| shadow.refused), shadow, "{port}");
        };
        check(&[], 1, false, None, None);
        check(&[in_force(allows(&[]))], 1, true, None, None);
        let both = [in_force(denies(&[1, 2])), in_force(allows(&[2, 3]))];
        check(&both, 1, true, Some("1"), None);
        check(&both, 2, true, Some("2"), None);
        check(&both, 3, false, Some("3"), None);
        check(&both, 4, true, None, None);
        // Those that watch see the same, and nothing comes of it.
        let seen = [watching(denies(&[1])), watching(allows(&[2])), in_force(allows(&[1, 3]))];
        check(&seen, 1, false, Some("1"), Some(true));
        check(&seen, 2, true, None, Some(false));
        check(&seen, 3, false, Some("3"), Some(true));
    }
    #[test]
    fn log_rules_refuse_nothing() {
        let filter = RbacFilter { rules: Some(rules(RbacAction::Log, &[1])), shadow: None };
        for port in [1, 2] {
            assert!(!evaluate_rbac([&filter], &to(port)).enforced.refused, "{port}");
        }
    }

    #[test]
    fn permissions_look_at_where_a_connection_leads() {
        let check = |permission: &Permission, port: u16, expected: bool| {
            assert_eq!(permission.matches(&to(port)), expected, "{permission:?} {port}");
        };
        let range = Permission::DestinationPorts(80, 90);
        check(&range, 79, false);
        check(&range, 80, true);
        check(&range, 89, true);
        check(&range, 90, false);
        check(&Permission::DestinationPorts(90, 80), 85, false);
        let network = |text: &str| Permission::DestinationAddress(Cidr::parse(text).expect(text));
        check(&network("10.0.0.2"), 80, true);
        check(&network("10.0.0.3"), 80, false);
    }

    #[test]
    fn principals_look_at_the_connection_and_the_client_apart() {
        let request = TestRequest { client: [1, 1, 1, 1].into(), ..to(80) };
        let range = |text: &str| Cidr::parse(text).expect(text);
        assert!(Principal::ClientAddress(range("1.1.1.1")).matches(&request));
        assert!(!Principal::RemoteAddress(range("1.1.1.1")).matches(&request));
        assert!(Principal::RemoteAddress(range("10.0.0.0/8")).matches(&request));
        assert!(Principal::Path(StringMatch::Prefix("/".into())).matches(&request));
    }
}
