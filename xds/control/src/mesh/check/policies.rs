//! Checks authorization policies: each clause must be able to match, and must be enforced at every port that it lists.

use std::collections::{BTreeMap, HashMap};

use weft_model::{Cidr, InvalidPathPattern, PathPattern, SpiffeId, StringMatch};

use super::diagnostics::{Diagnostics, unknown_service};
use crate::mesh::token_rules::{self, CoveredRequests};
use crate::mesh::{Clause, Issuer, Policy, Port, Protocol, Service, identity, raw};

/// Checks the authorization policies.
pub(super) fn policies(
    raw: &raw::RawMesh,
    services: &BTreeMap<String, Service>,
    issuers: &BTreeMap<String, Issuer>,
    errors: &mut Diagnostics,
) -> Vec<Policy> {
    let ours = format!("spiffe://{}/", raw.trust_domain);
    // Without it no identity can be checked; its own error says so.
    let ours = identity(&raw.trust_domain, "x").is_ok().then_some(ours);
    let mut policies = Vec::new();
    let mut counts = HashMap::new();
    for (index, policy) in raw.security.policies.iter().enumerate() {
        let path = format!("security.policies[{index}]");
        let service = services.get(&policy.service);
        match service {
            None => {
                let reason = unknown_service(&policy.service);
                errors.add_reference(&policy.service, format!("{path}.service"), reason);
            }
            Some(service) if !service.meshed => {
                let reason = format!(
                    "invalid service {:?}: meshed is false, so no sidecar enforces the policy",
                    policy.service
                );
                errors.add(format!("{path}.service"), reason);
            }
            Some(_) => {}
        }
        if policy.allow.is_empty() && policy.deny.is_empty() {
            errors.add(&path, "no effect: allow and deny are empty");
        }
        let mut clauses = |kind: ClauseKind, raws: &[raw::RawClause]| {
            let each = raws.iter().enumerate().map(|(position, item)| {
                let word = kind.word();
                // Counted per service, so that a change of one service's policies does not rename clauses of others.
                let count: &mut usize = counts.entry((policy.service.as_str(), word)).or_default();
                let name = format!("{}.{word}[{count}]", policy.service);
                *count += 1;
                let path = format!("{path}.{word}[{position}]");
                let ours = ours.as_deref();
                let clauses = ClauseChecker { raw, ours, services, issuers, service, kind };
                clauses.check(name, item, &path, errors)
            });
            each.collect()
        };
        let allow = clauses(ClauseKind::Allow, &policy.allow);
        let deny = clauses(ClauseKind::Deny, &policy.deny);
        policies.push(Policy {
            service: policy.service.clone(),
            allow,
            deny,
            dry_run: policy.dry_run,
        });
    }
    policies
}

/// Checks that enforced policies verify the tokens that policies with `dry_run` name. A token rule for a dry run alone
/// would reject requests with invalid tokens, and remove tokens from others.
pub(super) fn dry_run_tokens(
    services: &BTreeMap<String, Service>,
    policies: &[Policy],
    errors: &mut Diagnostics,
) {
    let mut enforced: HashMap<&str, Vec<&Policy>> = HashMap::new();
    for policy in policies.iter().filter(|policy| !policy.dry_run) {
        enforced.entry(&policy.service).or_default().push(policy);
    }
    for (index, policy) in policies.iter().enumerate().filter(|(_, policy)| policy.dry_run) {
        let enforced = enforced.get(policy.service.as_str()).map_or(&[][..], Vec::as_slice);
        let Some(service) = services.get(&policy.service) else { continue };
        let named = policy.field_paths(index).filter(|(_, clause)| clause.token.is_some());
        for (place, clause) in named {
            let ports = service.ports.iter().filter(|port| clause.is_of(port));
            let unverified = ports.into_iter().find(|port| !is_verified(enforced, port, clause));
            if let Some(port) = unverified {
                let reason = format!(
                    "port {}: no enforced policy verifies this token for these requests; accepted with dry_run if \
                     each enforced allow clause for them requires the token, or an enforced deny clause names it",
                    port.port
                );
                errors.add(format!("{place}.token"), reason);
            }
        }
    }
}

/// Whether the enforced policies verify the token that a clause of a policy with `dry_run` names.
fn is_verified(enforced: &[&Policy], port: &Port, clause: &Clause) -> bool {
    let Some(token) = &clause.token else { return true };
    let of = |pick: fn(&Policy) -> &[Clause]| -> Vec<&Clause> {
        enforced
            .iter()
            .flat_map(|policy| pick(policy))
            .filter(|clause| clause.is_of(port))
            .collect()
    };
    let rules = token_rules::token_rules(&of(|policy| &policy.allow), &of(|policy| &policy.deny));
    CoveredRequests::all_of(clause).iter().all(|area| token_rules::verifies(&rules, area, token))
}

/// Whether a clause allows or denies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClauseKind {
    Allow,
    Deny,
}

impl ClauseKind {
    fn word(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

/// Checks clauses of one policy.
struct ClauseChecker<'a> {
    raw: &'a raw::RawMesh,
    /// What the identities of the mesh begin with: `spiffe://TRUST_DOMAIN/`. None where the trust domain is invalid.
    ours: Option<&'a str>,
    services: &'a BTreeMap<String, Service>,
    issuers: &'a BTreeMap<String, Issuer>,
    /// The service of the policy; none if it is unknown.
    service: Option<&'a Service>,
    kind: ClauseKind,
}

impl ClauseChecker<'_> {
    fn check(
        &self,
        name: String,
        item: &raw::RawClause,
        path: &str,
        errors: &mut Diagnostics,
    ) -> Clause {
        not_empty(item, path, errors);
        self.token(item, path, errors);
        let clause = Clause {
            from: self.callers(item, path, errors),
            from_addresses: from_addresses(item, path, errors),
            ports: item.ports.clone().unwrap_or_default(),
            methods: self.methods(item, path, errors),
            paths: paths(item, path, errors),
            token: item.token.clone().filter(|token| self.issuers.contains_key(token)),
            claims: item.claims.clone().unwrap_or_default().into_iter().collect(),
            name,
        };
        if let Some(service) = self.service.filter(|service| service.meshed) {
            self.ports(&clause, service, path, errors);
        }
        clause
    }

    fn token(&self, item: &raw::RawClause, path: &str, errors: &mut Diagnostics) {
        let known = &self.raw.security.issuers;
        if let Some(token) = item.token.as_ref().filter(|token| !known.contains_key(*token)) {
            errors.add_unknown_issuer(token, format!("{path}.token"));
        }
        let claims = item.claims.as_ref();
        if item.token.is_none() && claims.is_some_and(|claims| !claims.is_empty()) {
            errors.add(format!("{path}.claims"), "requires token: the name of the issuer");
        }
        for (claim, values) in claims.into_iter().flatten() {
            let path = format!("{path}.claims[\"{claim}\"]");
            if claim.is_empty() {
                errors.add(path, "invalid claim \"\": must be the name of a claim");
            } else if values.is_empty() {
                errors.add(path, "invalid empty list: must contain the accepted values");
            }
        }
    }

    /// Checks that the clause is enforced at the ports that it applies to. An allow clause without ports applies to the
    /// ports that can evaluate it, and the others stay closed. A deny clause must be enforced wherever it applies.
    fn ports(&self, clause: &Clause, service: &Service, path: &str, errors: &mut Diagnostics) {
        for (place, number) in clause.ports.iter().enumerate() {
            let path = format!("{path}.ports[{place}]");
            let mut known = service.ports.iter().filter(|port| port.port == *number).peekable();
            match known.peek() {
                None => errors.add_reference(
                    &service.name,
                    path,
                    format!("unknown port {number}: service {:?} has no such port", service.name),
                ),
                Some(port) => {
                    let port = *port;
                    if !known.any(|port| clause.is_enforced_at(port)) {
                        errors.add_reference(&service.name, path, not_enforced(clause, port));
                    }
                }
            }
        }
        let mut not = service.ports.iter().filter(|port| !clause.is_enforced_at(port)).peekable();
        let Some(first) = not.peek().copied() else {
            return;
        };
        let enforced: Vec<String> = service
            .ports
            .iter()
            .filter(|port| clause.is_enforced_at(port))
            .map(|port| port.port.to_string())
            .collect();
        if !clause.ports.is_empty() || (self.kind == ClauseKind::Allow && !enforced.is_empty()) {
            return;
        }
        let reason = not_enforced(clause, first);
        if enforced.is_empty() {
            errors.add_reference(&service.name, path, reason);
        } else {
            let reason = format!("{reason}; limit the clause to ports: [{}]", enforced.join(", "));
            errors.add_reference(&service.name, path, reason);
        }
    }

    fn methods(&self, item: &raw::RawClause, path: &str, errors: &mut Diagnostics) -> Vec<String> {
        let methods = item.methods.as_deref().unwrap_or_default();
        for (place, method) in methods.iter().enumerate() {
            let path = format!("{path}.methods[{place}]");
            let is_token =
                |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
            let upper = method.to_ascii_uppercase();
            if method.is_empty() || !method.bytes().all(is_token) || method.len() > 64 {
                let reason = format!("invalid method {method:?}: must be a method name or \"*\"");
                errors.add(path, reason);
            } else if method != "*" && method.contains('*') {
                let reason = format!(
                    "invalid method {method:?}: must be a method name, or \"*\" for any method"
                );
                errors.add(path, reason);
            } else if self.kind == ClauseKind::Allow
                && ["TRACE", "CONNECT"].contains(&upper.as_str())
            {
                let reason =
                    format!("invalid method {method:?}: sidecars refuse TRACE and CONNECT");
                errors.add(path, reason);
            }
        }
        if methods.iter().any(|method| method == "*") {
            return Vec::new();
        }
        methods.iter().map(|method| method.to_ascii_uppercase()).collect()
    }

    fn callers(
        &self,
        clause: &raw::RawClause,
        path: &str,
        errors: &mut Diagnostics,
    ) -> Vec<StringMatch> {
        if clause.from.is_empty() {
            let reason = "invalid empty list: use \"*\" for any identity of the mesh";
            errors.add(format!("{path}.from"), reason);
        }
        let mut callers = Vec::new();
        for (index, from) in clause.from.iter().enumerate().filter(|(_, from)| *from != "*") {
            match self.caller(from) {
                Ok(id) => callers.push(id),
                Err(reason) if from.starts_with("spiffe://") => {
                    errors.add(format!("{path}.from[{index}]"), reason);
                }
                Err(reason) => errors.add_reference(from, format!("{path}.from[{index}]"), reason),
            }
        }
        if clause.from.iter().any(|from| from == "*") { Vec::new() } else { callers }
    }

    fn caller(&self, from: &str) -> Result<StringMatch, String> {
        let is_ours = |id: &str| self.ours.is_none_or(|ours| id.starts_with(ours));
        let foreign = || {
            let reason = "callers of another trust domain cannot connect";
            let ours = self.ours.unwrap_or_default();
            format!("invalid caller {from:?}: {reason}; must begin with {ours:?}")
        };
        if let Some(above) = from.strip_suffix("/*").filter(|above| above.starts_with("spiffe://"))
        {
            // The part before `/*` must be a SPIFFE ID, so that it ends at the end of a segment.
            let above = SpiffeId::parse(above).map_err(|error| error.to_string())?;
            let below = format!("{above}/");
            return if is_ours(&below) { Ok(StringMatch::Prefix(below)) } else { Err(foreign()) };
        }
        if from.starts_with("spiffe://") {
            let id = SpiffeId::parse(from).map_err(|error| error.to_string())?;
            return if is_ours(id.as_str()) {
                Ok(StringMatch::Exact(id.as_str().to_owned()))
            } else {
                Err(foreign())
            };
        }
        let service = self.services.get(from).ok_or_else(|| unknown_service(from))?;
        if !service.meshed {
            return Err(format!(
                "invalid caller {from:?}: meshed is false, so the service has no identity"
            ));
        }
        if self.ours.is_none() {
            return Ok(StringMatch::Exact(from.to_owned()));
        }
        identity(&self.raw.trust_domain, from)
            .map(|id| StringMatch::Exact(id.as_str().to_owned()))
            .map_err(|error| error.to_string())
    }
}

/// Adds an error for each empty list: it could be read as "any" or as "none".
fn not_empty(item: &raw::RawClause, path: &str, errors: &mut Diagnostics) {
    let lists = [
        ("from_addresses", item.from_addresses.as_ref().map(Vec::is_empty)),
        ("ports", item.ports.as_ref().map(Vec::is_empty)),
        ("methods", item.methods.as_ref().map(Vec::is_empty)),
        ("paths", item.paths.as_ref().map(Vec::is_empty)),
        ("claims", item.claims.as_ref().map(BTreeMap::is_empty)),
    ];
    for (field, _) in lists.iter().filter(|(_, is_empty)| *is_empty == Some(true)) {
        errors.add(format!("{path}.{field}"), "invalid empty list: omit the field for any");
    }
}

fn not_enforced(clause: &Clause, port: &Port) -> String {
    let number = port.port;
    if port.protocol == Protocol::Udp {
        return format!(
            "port {number} carries udp, which does not pass through sidecars: no policy is enforced"
        );
    }
    let conditions = [
        (!clause.methods.is_empty(), "methods"),
        (!clause.paths.is_empty(), "paths"),
        (clause.token.is_some(), "token"),
    ];
    let words: Vec<&str> = conditions.iter().filter(|(is, _)| *is).map(|(_, word)| *word).collect();
    format!("port {number} carries tcp, where {} cannot be evaluated", words.join(" and "))
}

fn from_addresses(item: &raw::RawClause, path: &str, errors: &mut Diagnostics) -> Vec<Cidr> {
    let mut ranges = Vec::new();
    for (place, range) in item.from_addresses.iter().flatten().enumerate() {
        match Cidr::parse(range) {
            Ok(range) => ranges.push(range),
            Err(error) => {
                errors.add(format!("{path}.from_addresses[{place}]"), error.to_string());
            }
        }
    }
    ranges
}

fn paths(item: &raw::RawClause, path: &str, errors: &mut Diagnostics) -> Vec<PathPattern> {
    let mut patterns = Vec::new();
    for (place, written) in item.paths.iter().flatten().enumerate() {
        let path = format!("{path}.paths[{place}]");
        let (text, parsed) = match written {
            raw::RawPathText::Pattern(text) => (text, PathPattern::parse(text)),
            raw::RawPathText::Typed(typed) => (&typed.value, typed_path(typed)),
        };
        match parsed {
            Ok(pattern) => patterns.push(pattern),
            Err(error) => errors.add(path, format!("invalid path {text:?}: {error}")),
        }
    }
    if patterns.contains(&PathPattern::Any) { vec![PathPattern::Any] } else { patterns }
}

fn typed_path(typed: &raw::RawPathMatch) -> Result<PathPattern, InvalidPathPattern> {
    match typed.kind.as_str() {
        "Exact" => PathPattern::exact(&typed.value),
        "PathPrefix" => PathPattern::below(&typed.value),
        other => {
            let reason = format!("type {other:?} must be Exact or PathPrefix");
            Err(InvalidPathPattern { reason })
        }
    }
}
