//! Checks tokens and policies.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use weft_model::{
    Cidr, ClaimFormat, ClaimRule, Group, OnExpired, RevocationDepth, RevocationMode,
    RevocationPolicy, SpiffeId, StringMatch,
};

use super::{Mistakes, unknown_service};
use crate::mesh::{Clause, Issuer, Keys, Policy, Service, identity, raw};

/// Checks the issuers of tokens.
pub(super) fn issuers(
    raw: &raw::Mesh,
    folder: &Path,
    mistakes: &mut Mistakes,
) -> BTreeMap<String, Issuer> {
    let mut issuers = BTreeMap::new();
    for (name, issuer) in &raw.security.issuers {
        let path = format!("security.issuers[\"{name}\"]");
        if issuer.issuer.is_empty() {
            mistakes
                .add(format!("{path}.issuer"), "it is empty; a token of any issuer would be good");
        }
        if issuer.audiences.is_empty() {
            mistakes.add(
                format!("{path}.audiences"),
                "it is empty; a token for any service would be good",
            );
        }
        let keys = match (&issuer.jwks_file, &issuer.jwks_uri, issuer.jwks_address) {
            (Some(file), None, None) => {
                let file = folder.join(file);
                match std::fs::read(&file) {
                    Ok(bytes) => Keys::File(file, bytes),
                    Err(error) => {
                        mistakes.add(
                            format!("{path}.jwks_file"),
                            format!("{}: {error}", file.display()),
                        );
                        continue;
                    }
                }
            }
            (None, Some(uri), Some(address)) if uri.starts_with("http://") => {
                Keys::Http(uri.clone(), address)
            }
            (None, Some(uri), Some(_)) => {
                mistakes.add(
                    format!("{path}.jwks_uri"),
                    format!("{uri:?} does not start with http://"),
                );
                continue;
            }
            _ => {
                mistakes.add(&path, "give jwks_file, or jwks_uri with jwks_address");
                continue;
            }
        };
        let checked = Issuer {
            issuer: issuer.issuer.clone(),
            audiences: issuer.audiences.clone(),
            keys,
            forward: issuer.forward,
            claims: claims(issuer, &path, mistakes),
            claim_fields: issuer.claim_headers.clone().into_iter().collect(),
            bound: issuer.bound_to_certificate,
            ends_streams: issuer.ends_streams,
        };
        issuers.insert(name.clone(), checked);
    }
    issuers
}

/// How many claims an issuer may ask for, and how many values of one.
const LIMIT: usize = 10;

fn claims(issuer: &raw::Issuer, path: &str, mistakes: &mut Mistakes) -> Vec<ClaimRule> {
    let mut rules = Vec::new();
    if issuer.claims.len() > LIMIT {
        mistakes.add(format!("{path}.claims"), format!("more than {LIMIT} of them"));
    }
    for (claim, field) in &issuer.claim_headers {
        let is_good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        let is_ours =
            ["connection", "content-length", "host", "te", "transfer-encoding", "upgrade"];
        if field.is_empty() || !field.bytes().all(is_good) || is_ours.contains(&field.as_str()) {
            let path = format!("{path}.claim_headers[\"{claim}\"]");
            mistakes
                .add(path, format!("{field:?} is no name of a field, or is the connection's own"));
        }
    }
    for (index, claim) in issuer.claims.iter().enumerate() {
        let path = format!("{path}.claims[{index}]");
        if claim.values.is_empty() || claim.values.len() > LIMIT {
            mistakes.add(format!("{path}.values"), format!("there must be 1 to {LIMIT}"));
        }
        if ["", "iss", "aud", "exp", "nbf", "iat"].contains(&claim.name.as_str()) {
            let reason = format!("{:?} cannot be asked for in this way", claim.name);
            mistakes.add(format!("{path}.name"), reason);
        }
        let said = claim.format.as_deref();
        let format = word(&format!("{path}.format"), said, &ClaimFormat::WORDS, mistakes);
        rules.push(ClaimRule {
            name: claim.name.clone(),
            format: format.unwrap_or(ClaimFormat::Single),
            values: claim.values.clone(),
            all: claim.all,
        });
    }
    rules
}

/// Checks what revocation lists decide.
pub(super) fn revocation(raw: &raw::Mesh, mistakes: &mut Mistakes) -> RevocationPolicy {
    let raw = &raw.security.revocation;
    let default = RevocationPolicy::default();
    let limit = |said: Option<u32>, default| said.map_or(default, |limit| limit as usize);
    RevocationPolicy {
        mode: word(
            "security.revocation.mode",
            raw.mode.as_deref(),
            &RevocationMode::WORDS,
            mistakes,
        )
        .unwrap_or(default.mode),
        on_expired: word(
            "security.revocation.on_expired",
            raw.on_expired.as_deref(),
            &OnExpired::WORDS,
            mistakes,
        )
        .unwrap_or(default.on_expired),
        depth: word(
            "security.revocation.depth",
            raw.depth.as_deref(),
            &RevocationDepth::WORDS,
            mistakes,
        )
        .unwrap_or(default.depth),
        drain: Duration::from_secs(raw.drain_seconds.into()),
        depth_limit: default.depth_limit,
        bytes_limit: limit(raw.bytes_limit, default.bytes_limit),
        entries_limit: limit(raw.entries_limit, default.entries_limit),
    }
}

/// How keys are agreed on.
pub(super) fn groups(raw: &raw::Mesh, mistakes: &mut Mistakes) -> Vec<Group> {
    let said = raw.security.post_quantum.as_deref();
    let words = [
        ("prefer", PostQuantum::Prefer),
        ("require", PostQuantum::Require),
        ("off", PostQuantum::Off),
    ];
    match word("security.post_quantum", said, &words, mistakes) {
        None | Some(PostQuantum::Prefer) => Vec::new(),
        Some(PostQuantum::Require) => vec![Group::X25519MlKem768],
        Some(PostQuantum::Off) => Group::CLASSICAL.to_vec(),
    }
}

#[derive(Clone, Copy)]
enum PostQuantum {
    Prefer,
    Require,
    Off,
}

/// What a word means; none when nothing was said.
fn word<T: Copy>(
    path: &str,
    said: Option<&str>,
    words: &[(&'static str, T)],
    mistakes: &mut Mistakes,
) -> Option<T> {
    let said = said?;
    let meant = words.iter().find(|(word, _)| *word == said).map(|(_, meant)| *meant);
    if meant.is_none() {
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let reason = format!("{said:?} is not known; {} are", known.join(", "));
        mistakes.add(path, reason);
    }
    meant
}

/// Checks who may call what.
pub(super) fn policies(
    raw: &raw::Mesh,
    services: &BTreeMap<String, Service>,
    issuers: &BTreeMap<String, Issuer>,
    mistakes: &mut Mistakes,
) -> Vec<Policy> {
    let mut policies = Vec::new();
    for (index, policy) in raw.security.policies.iter().enumerate() {
        let name = format!("policies[{index}]");
        let path = format!("security.{name}");
        let service = services.get(&policy.service);
        if service.is_none() {
            mistakes.add(format!("{path}.service"), unknown_service(&policy.service));
        }
        if policy.allow.is_empty() && policy.deny.is_empty() {
            mistakes.add(&path, "it neither allows nor denies anything");
        }
        let mut clauses = |kind: &str, raws: &[raw::Clause]| {
            let each = raws.iter().enumerate().map(|(position, item)| {
                let name = format!("{name}.{kind}[{position}]");
                Clauses { raw, services, issuers, service }.check(name, item, mistakes)
            });
            each.collect()
        };
        let allow = clauses("allow", &policy.allow);
        let deny = clauses("deny", &policy.deny);
        let (service, dry_run) = (policy.service.clone(), policy.dry_run);
        policies.push(Policy { service, allow, deny, dry_run });
    }
    policies
}

/// What a clause may speak of.
struct Clauses<'a> {
    raw: &'a raw::Mesh,
    services: &'a BTreeMap<String, Service>,
    issuers: &'a BTreeMap<String, Issuer>,
    /// Whose policy it is.
    service: Option<&'a Service>,
}

impl Clauses<'_> {
    fn check(&self, name: String, item: &raw::Clause, mistakes: &mut Mistakes) -> Clause {
        let path = format!("security.{name}");
        let known = &self.raw.security.issuers;
        if let Some(token) = item.token.as_ref().filter(|token| !known.contains_key(*token)) {
            mistakes.add(format!("{path}.token"), format!("there is no issuer {token:?}"));
        }
        for (place, prefix) in item.paths.iter().enumerate().filter(|(_, p)| !p.starts_with('/')) {
            let reason = format!("{prefix:?} does not start with /");
            mistakes.add(format!("{path}.paths[{place}]"), reason);
        }
        for (place, port) in item.ports.iter().enumerate() {
            let is_there = |service: &Service| service.ports.iter().any(|p| p.port == *port);
            if self.service.is_some_and(|service| !is_there(service)) {
                let reason = format!("the service has no port {port}");
                mistakes.add(format!("{path}.ports[{place}]"), reason);
            }
        }
        let mut from_addresses = Vec::new();
        for (place, range) in item.from_addresses.iter().enumerate() {
            match Cidr::parse(range) {
                Ok(range) => from_addresses.push(range),
                Err(error) => {
                    mistakes.add(format!("{path}.from_addresses[{place}]"), error.to_string());
                }
            }
        }
        if item.token.is_none() && !item.claims.is_empty() {
            mistakes.add(format!("{path}.claims"), "whose? Name the issuer by token");
        }
        for (claim, _) in item.claims.iter().filter(|(_, values)| values.is_empty()) {
            let reason = "there must be a value";
            mistakes.add(format!("{path}.claims[\"{claim}\"]"), reason);
        }
        Clause {
            from: self.callers(item, &path, mistakes),
            from_addresses,
            ports: item.ports.clone(),
            methods: item.methods.clone(),
            paths: item.paths.clone(),
            token: item.token.clone().filter(|token| self.issuers.contains_key(token)),
            claims: item.claims.clone().into_iter().collect(),
            name,
        }
    }

    fn callers(
        &self,
        clause: &raw::Clause,
        path: &str,
        mistakes: &mut Mistakes,
    ) -> Vec<StringMatch> {
        if clause.from.is_empty() {
            let reason = "it is empty; \"*\" stands for any identity of the mesh";
            mistakes.add(format!("{path}.from"), reason);
        }
        if clause.from.iter().any(|from| from == "*") {
            return Vec::new();
        }
        let mut callers = Vec::new();
        for (index, from) in clause.from.iter().enumerate() {
            match self.caller(from) {
                Ok(id) => callers.push(id),
                Err(reason) => mistakes.add(format!("{path}.from[{index}]"), reason),
            }
        }
        callers
    }

    fn caller(&self, from: &str) -> Result<StringMatch, String> {
        let exact = |id: SpiffeId| StringMatch::Exact(id.as_str().to_owned());
        if let Some(above) = from.strip_suffix("/*").filter(|above| above.starts_with("spiffe://"))
        {
            // What stands before must be an id itself, so that nothing is cut in the middle of a name.
            let above = SpiffeId::parse(above).map_err(|error| error.to_string())?;
            return Ok(StringMatch::Prefix(format!("{above}/")));
        }
        if from.starts_with("spiffe://") {
            SpiffeId::parse(from).map(exact).map_err(|error| error.to_string())
        } else if self.services.contains_key(from) {
            identity(&self.raw.trust_domain, from).map(exact).map_err(|error| error.to_string())
        } else {
            Err(unknown_service(from))
        }
    }
}
