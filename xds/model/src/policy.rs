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
    /// The client's address, as trusted hops forwarded it.
    fn client_address(&self) -> IpAddr {
        self.remote_address()
    }
    /// The port the client aimed at.
    fn destination_port(&self) -> u16;
}

/// What rules say of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verdict<'a> {
    /// Whether it is refused.
    pub refused: bool,
    /// The policy that decided: the one that allows, or the one that denies. None: no policy speaks of
    /// it, which is a refusal where something must allow it.
    pub by: Option<&'a Name>,
}

/// What all checks together say of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Judgement<'a> {
    /// What holds.
    pub verdict: Verdict<'a>,
    /// What the rules that only watch would say; none where there are none.
    pub shadow: Option<Verdict<'a>>,
}

/// Decides a request: the first check that refuses it decides, and else the last that allows it.
/// The one function by which requests and connections are let in, and `weft why` answers.
pub fn judge<'a>(
    filters: impl IntoIterator<Item = &'a RbacFilter>,
    facts: &dyn RequestFacts,
) -> Judgement<'a> {
    let mut judgement = Judgement::default();
    for filter in filters {
        if let Some(rules) = filter.rules.as_ref().filter(|_| !judgement.verdict.refused) {
            judgement.verdict = judgement.verdict.then(rules.judge(facts));
        }
        if let Some(rules) = &filter.shadow {
            let before = judgement.shadow.unwrap_or_default();
            let after = if before.refused { before } else { before.then(rules.judge(facts)) };
            judgement.shadow = Some(after);
        }
    }
    judgement
}

/// Decides a request whose path services read in several ways: every reading must be allowed.
pub fn judge_readings<'a, F: RequestFacts>(
    filters: &(impl Iterator<Item = &'a RbacFilter> + Clone),
    readings: impl IntoIterator<Item = F>,
) -> Judgement<'a> {
    let mut judgement: Option<Judgement<'a>> = None;
    for facts in readings {
        let next = judge(filters.clone(), &facts);
        let before = judgement.unwrap_or(next);
        let watched = before.shadow.filter(|shadow| shadow.refused).or(next.shadow);
        let verdict = if next.verdict.refused { next.verdict } else { before.verdict };
        judgement = Some(Judgement { verdict, shadow: watched });
        if verdict.refused {
            break;
        }
    }
    judgement.unwrap_or_default()
}

impl<'a> Verdict<'a> {
    /// What two checks say, of which the first lets it pass.
    fn then(self, next: Self) -> Self {
        Self { refused: next.refused, by: if next.refused { next.by } else { next.by.or(self.by) } }
    }
}

impl Rbac {
    /// What these rules say of a request.
    fn judge(&self, facts: &dyn RequestFacts) -> Verdict<'_> {
        let matched = self.policies.iter().find(|(_, policy)| {
            policy.permissions.iter().any(|p| p.matches(facts))
                && policy.principals.iter().any(|p| p.matches(facts))
        });
        let by = matched.map(|(name, _)| name);
        let refused = match self.action {
            RbacAction::Allow => by.is_none(),
            RbacAction::Deny => by.is_some(),
        };
        Verdict { refused, by }
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

    struct To(u16);

    impl RequestFacts for To {
        fn method(&self) -> &str {
            "GET"
        }
        fn path(&self) -> &str {
            "/"
        }
        fn authority(&self) -> &str {
            ""
        }
        fn has_header(&self, _: &str, _: &mut dyn FnMut(&str) -> bool) -> bool {
            false
        }
        fn query(&self, _: &str) -> Option<&str> {
            None
        }
        fn has_claim(&self, _: &str, _: &[String], _: &mut dyn FnMut(&str) -> bool) -> bool {
            false
        }
        fn peer(&self) -> Option<&SpiffeId> {
            None
        }
        fn remote_address(&self) -> IpAddr {
            IpAddr::from([10, 0, 0, 1])
        }
        fn client_address(&self) -> IpAddr {
            self.remote_address()
        }
        fn destination_port(&self) -> u16 {
            self.0
        }
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
            let judgement = judge(filters, &To(port));
            let verdict = judgement.verdict;
            assert_eq!((verdict.refused, verdict.by.map(|name| &**name)), (refused, by), "{port}");
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
}
