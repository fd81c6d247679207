//! Generates RBAC filters and token rules from policies.

use std::sync::Arc;

use weft_model::{
    HeaderMatch, JwtRequirement, JwtRule, PathPattern, Permission, Principal, Rbac, RbacAction,
    RbacFilter, RbacPolicy, RouteMatch, StringMatch,
};

use crate::mesh::token_rules::{self, TokenRule};
use crate::mesh::{Clause, Mesh, Policy, Port, Service};

/// The RBAC filters of a port: the deny clauses, then the allow clauses.
pub(super) fn rules(mesh: &Mesh, own: &Service, port: &Port) -> Vec<Arc<RbacFilter>> {
    let rbac = |action, dry_run, pick: fn(&Policy) -> &[Clause]| {
        let clauses = clauses(mesh, own, port, dry_run, pick);
        let policy = |clause: &&Clause| (clause.name.as_str().into(), policy(mesh, clause));
        Rbac { action, policies: clauses.iter().map(policy).collect() }
    };
    let is_any = |rbac: &Rbac| !rbac.policies.is_empty();
    let denied = |dry_run| rbac(RbacAction::Deny, dry_run, |policy| &policy.deny);
    let allowed = |dry_run| rbac(RbacAction::Allow, dry_run, |policy| &policy.allow);
    let deny = RbacFilter {
        rules: Some(denied(false)).filter(is_any),
        shadow: Some(denied(true)).filter(is_any),
    };
    let allow =
        RbacFilter { rules: Some(allowed(false)), shadow: Some(allowed(true)).filter(is_any) };
    let denies = deny != RbacFilter::default();
    denies.then_some(deny).into_iter().chain([allow]).map(Arc::new).collect()
}

/// The clauses that apply to a port.
fn clauses<'m>(
    mesh: &'m Mesh,
    own: &Service,
    port: &Port,
    dry_run: bool,
    pick: fn(&Policy) -> &[Clause],
) -> Vec<&'m Clause> {
    let policies = mesh.policies.iter();
    policies
        .filter(|policy| policy.service == own.name && policy.dry_run == dry_run)
        .flat_map(pick)
        .filter(|clause| clause.is_of(port))
        .collect()
}

fn policy(mesh: &Mesh, clause: &Clause) -> RbacPolicy {
    let paths: Vec<Permission> = clause.paths.iter().map(PathPattern::permission).collect();
    let methods: Vec<Permission> =
        clause.methods.iter().map(|method| Permission::Header(method_is(method))).collect();
    let all: Vec<Permission> = [paths, methods]
        .into_iter()
        .filter(|some| !some.is_empty())
        .map(Permission::OneOf)
        .collect();
    let permission = if all.is_empty() { Permission::Any } else { Permission::All(all) };
    RbacPolicy { permissions: vec![permission], principals: vec![principal(mesh, clause)] }
}

fn principal(mesh: &Mesh, clause: &Clause) -> Principal {
    let any = vec![StringMatch::Prefix(format!("spiffe://{}/", mesh.trust_domain))];
    let from = if clause.from.is_empty() { &any } else { &clause.from };
    let one_of = |mut any: Vec<Principal>| match any.len() {
        1 => any.remove(0),
        _ => Principal::OneOf(any),
    };
    let named = from.iter().map(|id| Principal::Authenticated(Some(id.clone())));
    let mut all = vec![one_of(named.collect())];
    if !clause.from_addresses.is_empty() {
        let ranges = clause.from_addresses.iter().map(|range| Principal::RemoteAddress(*range));
        all.push(one_of(ranges.collect()));
    }
    if let Some((token, issuer)) =
        clause.token.as_ref().and_then(|token| mesh.issuers.get_key_value(token))
    {
        let claim = |name: &str, value: &str| {
            let value = StringMatch::Exact(value.to_owned());
            Principal::Claim(token.as_str().into(), vec![name.to_owned()], value)
        };
        // A claim of the issuer exists only if a valid token was sent.
        all.push(claim("iss", &issuer.issuer));
        for (name, values) in &clause.claims {
            all.push(one_of(values.iter().map(|value| claim(name, value)).collect()));
        }
    }
    match all.len() {
        1 => all.remove(0),
        _ => Principal::All(all),
    }
}

/// Methods are compared case-insensitively: a service may accept `post` as `POST`.
fn method_is(method: &str) -> HeaderMatch {
    HeaderMatch::new(":method", StringMatch::ExactIgnoreCase(method.to_owned()))
}

/// The token rules of a port.
pub(super) fn token_rules(mesh: &Mesh, own: &Service, port: &Port) -> Vec<JwtRule> {
    let allow = clauses(mesh, own, port, false, |policy| &policy.allow);
    let deny = clauses(mesh, own, port, false, |policy| &policy.deny);
    let rule = |rule: TokenRule<'_>| {
        let headers = rule.requests.method.iter().map(|method| method_is(method)).collect();
        let matches = RouteMatch { path: rule.requests.path, headers, query: Vec::new() };
        JwtRule { matches, requires: one_of(&rule.issuers, rule.is_optional) }
    };
    token_rules::token_rules(&allow, &deny).into_iter().map(rule).collect()
}

fn one_of(issuers: &[&str], is_optional: bool) -> Option<JwtRequirement> {
    let provider = |token: &str| JwtRequirement::Provider(token.into(), Vec::new());
    match issuers {
        [] => None,
        [token] if !is_optional => Some(provider(token)),
        several => {
            let missing = is_optional.then_some(JwtRequirement::Missing);
            let all = several.iter().map(|token| provider(token)).chain(missing);
            Some(JwtRequirement::Any(all.collect()))
        }
    }
}
