//! RBAC policies and their evaluation: which clients may connect and which requests they may send.

use std::collections::BTreeMap;

use crate::{Cidr, HeaderMatch, Name, PathTemplate, RequestFacts, StringMatch};

/// A set of policies with one action (`envoy.config.rbac.v3.RBAC`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rbac {
    /// What a matching policy means.
    pub action: RbacAction,
    /// The policies by name.
    pub policies: BTreeMap<Name, RbacPolicy>,
}

/// An RBAC filter (`envoy.extensions.filters.http.rbac.v3.RBAC` or
/// `envoy.extensions.filters.network.rbac.v3.RBAC`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RbacFilter {
    /// The enforced rules; none: everything is allowed.
    pub rules: Option<Rbac>,
    /// Dry-run rules: a request that they would refuse is reported, but not refused (`shadow_rules`).
    pub shadow: Option<Rbac>,
}

/// What a matching policy means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RbacAction {
    /// A request is allowed when a policy matches.
    Allow,
    /// A request is allowed when no policy matches.
    Deny,
    /// Every request is allowed (`LOG`).
    Log,
}

/// A policy: it matches when at least one permission and at least one principal match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RbacPolicy {
    /// Conditions on the request.
    pub permissions: Vec<Permission>,
    /// Conditions on the client.
    pub principals: Vec<Principal>,
}

/// A condition on the request (`envoy.config.rbac.v3.Permission`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Permission {
    /// Every request.
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
    /// A header, including `:method` and `:path`.
    Header(HeaderMatch),
    /// The original destination address (`destination_ip`).
    DestinationAddress(Cidr),
    /// The original destination port.
    DestinationPort(u16),
    /// An original destination port from the first value up to the second, exclusive (`destination_port_range`).
    DestinationPorts(i32, i32),
}

/// A condition on the client (`envoy.config.rbac.v3.Principal`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// Every client.
    Any,
    /// All of these.
    All(Vec<Self>),
    /// One of these.
    OneOf(Vec<Self>),
    /// Not this.
    Not(Box<Self>),
    /// A peer whose verified certificate has a matching identity; none: any verified identity. Without a match, Envoy
    /// accepts every TLS client, with or without a certificate.
    Authenticated(Option<StringMatch>),
    /// A path without its query (`url_path`).
    Path(StringMatch),
    /// The peer's address (`direct_remote_ip`, `source_ip`).
    RemoteAddress(Cidr),
    /// The client's address, after trusted hops of `x-forwarded-for` (`remote_ip`).
    ClientAddress(Cidr),
    /// A header.
    Header(HeaderMatch),
    /// A token's claim: the metadata key of the payload, the path to the claim, and its value (`metadata` of
    /// `envoy.filters.http.jwt_authn`). For a list, one matching value suffices.
    Claim(Name, Vec<String>, StringMatch),
}

/// The decision of one set of rules about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RbacDecision<'a> {
    /// Whether the request is refused.
    pub refused: bool,
    /// The deciding policy: the one that allows or denies the request. None: no policy matched, which is a refusal
    /// when the rules are ALLOW rules.
    pub policy: Option<&'a Name>,
}

/// The decision of all RBAC filters about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RbacEvaluation<'a> {
    /// The decision of the enforced rules.
    pub enforced: RbacDecision<'a>,
    /// The decision of the dry-run rules; none where there are no such rules.
    pub shadow: Option<RbacDecision<'a>>,
}

/// Evaluates RBAC filters for a request or connection: the first filter that refuses decides, otherwise the last that
/// allows. The data plane and `weft why` both use this function.
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

/// Evaluates RBAC filters for a request whose path has several readings: every reading must be allowed.
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
    /// Combines two decisions, of which `self` allows the request.
    fn then(self, next: Self) -> Self {
        Self {
            refused: next.refused,
            policy: if next.refused { next.policy } else { next.policy.or(self.policy) },
        }
    }
}

impl Rbac {
    /// The decision of these rules about a request.
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
            Self::Claim(name, path, value) => {
                facts.has_claim(name, path, &mut |claim| value.matches(claim))
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
    fn first_refusing_filter_decides_otherwise_the_last_allowing_one() {
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
        // Dry-run rules are evaluated in the same way and refuse nothing.
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
    fn permissions_match_the_original_destination() {
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
    fn remote_and_client_address_are_matched_separately() {
        let request = TestRequest { client: [1, 1, 1, 1].into(), ..to(80) };
        let range = |text: &str| Cidr::parse(text).expect(text);
        assert!(Principal::ClientAddress(range("1.1.1.1")).matches(&request));
        assert!(!Principal::RemoteAddress(range("1.1.1.1")).matches(&request));
        assert!(Principal::RemoteAddress(range("10.0.0.0/8")).matches(&request));
        assert!(Principal::Path(StringMatch::Prefix("/".into())).matches(&request));
    }
}
