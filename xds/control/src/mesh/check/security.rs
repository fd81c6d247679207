//! Checks token issuers, revocation settings and key exchange.

use std::collections::BTreeMap;
use std::time::Duration;

use weft_model::{
    ClaimFormat, ClaimRule, ExpiredCrlAction, KeyExchangeGroup, RevocationDepth, RevocationMode,
    RevocationPolicy, claim_header,
};

use super::diagnostics::Diagnostics;
use super::key_server::keys;
use crate::mesh::referenced_files::ReferencedFiles;
use crate::mesh::{Issuer, raw};

/// Checks the token issuers.
pub(super) fn issuers(
    raw: &raw::RawMesh,
    files: &ReferencedFiles,
    errors: &mut Diagnostics,
) -> BTreeMap<String, Issuer> {
    let mut issuers = BTreeMap::new();
    for (name, issuer) in &raw.security.issuers {
        let path = format!("security.issuers[\"{name}\"]");
        if name.is_empty() {
            errors.add(
                &path,
                "invalid name \"\": must be the name by which policies refer to the issuer",
            );
        }
        if issuer.issuer.is_empty() {
            errors.add(
                format!("{path}.issuer"),
                "invalid issuer \"\": must be the iss claim of its tokens",
            );
        }
        if issuer.audiences.is_empty() {
            errors.add(
                format!("{path}.audiences"),
                "invalid empty list: must contain the accepted aud claims",
            );
        }
        for (index, _) in issuer.audiences.iter().enumerate().filter(|(_, one)| one.is_empty()) {
            let reason = "invalid audience \"\": must be an aud claim of tokens";
            errors.add(format!("{path}.audiences[{index}]"), reason);
        }
        let claims = claims(issuer, &path, errors);
        let Some(keys) = keys(issuer, files, &path, errors) else {
            continue;
        };
        let checked = Issuer {
            issuer: issuer.issuer.clone(),
            audiences: issuer.audiences.clone(),
            keys,
            forward: issuer.forward,
            claims,
            claim_headers: issuer.claim_headers.clone().into_iter().collect(),
            bound: issuer.bound_to_certificate,
            ends_streams: issuer.ends_streams,
        };
        issuers.insert(name.clone(), checked);
    }
    issuers
}

/// The most claim rules of an issuer, and the most values of one rule.
const CLAIM_LIMIT: usize = 10;

fn claims(issuer: &raw::RawIssuer, path: &str, errors: &mut Diagnostics) -> Vec<ClaimRule> {
    let mut rules = Vec::new();
    if issuer.claims.len() > CLAIM_LIMIT {
        errors.add(
            format!("{path}.claims"),
            format!("too many claims: must be at most {CLAIM_LIMIT}"),
        );
    }
    for (claim, header) in &issuer.claim_headers {
        let path = format!("{path}.claim_headers[\"{claim}\"]");
        if claim.is_empty() {
            errors.add(&path, "invalid claim \"\": must be the name of a claim");
        }
        if let Err(reason) = claim_header(header) {
            errors.add(path, reason);
        }
    }
    for (index, claim) in issuer.claims.iter().enumerate() {
        let path = format!("{path}.claims[{index}]");
        if claim.values.is_empty() || claim.values.len() > CLAIM_LIMIT {
            errors.add(
                format!("{path}.values"),
                format!(
                    "invalid number of values {}: must be 1 to {CLAIM_LIMIT}",
                    claim.values.len()
                ),
            );
        }
        if claim.values.iter().any(String::is_empty) {
            errors.add(format!("{path}.values"), "invalid value \"\": must not be empty");
        }
        if ["", "iss", "aud", "exp", "nbf", "iat"].contains(&claim.name.as_str()) {
            let reason = format!(
                "invalid claim {:?}: must not be empty, iss, aud, exp, nbf or iat",
                claim.name
            );
            errors.add(format!("{path}.name"), reason);
        }
        let written = claim.format.as_deref();
        let format = word(&format!("{path}.format"), written, &ClaimFormat::WORDS, errors);
        rules.push(ClaimRule {
            name: claim.name.clone(),
            format: format.unwrap_or(ClaimFormat::Single),
            values: claim.values.clone(),
            all: claim.all,
        });
    }
    rules
}

/// Checks how CRLs are applied.
pub(super) fn revocation(raw: &raw::RawMesh, errors: &mut Diagnostics) -> RevocationPolicy {
    let raw = &raw.security.revocation;
    let default = RevocationPolicy::default();
    let limit = |written: Option<u32>, default| written.map_or(default, |limit| limit as usize);
    RevocationPolicy {
        mode: word("security.revocation.mode", raw.mode.as_deref(), &RevocationMode::WORDS, errors)
            .unwrap_or(default.mode),
        on_expired: word(
            "security.revocation.on_expired",
            raw.on_expired.as_deref(),
            &ExpiredCrlAction::WORDS,
            errors,
        )
        .unwrap_or(default.on_expired),
        depth: word(
            "security.revocation.depth",
            raw.depth.as_deref(),
            &RevocationDepth::WORDS,
            errors,
        )
        .unwrap_or(default.depth),
        drain: Duration::from_secs(raw.drain_seconds.into()),
        depth_limit: default.depth_limit,
        bytes_limit: limit(raw.bytes_limit, default.bytes_limit),
        entries_limit: limit(raw.entries_limit, default.entries_limit),
    }
}

/// The key exchange groups of sidecars.
pub(super) fn groups(raw: &raw::RawMesh, errors: &mut Diagnostics) -> Vec<KeyExchangeGroup> {
    let written = raw.security.post_quantum.as_deref();
    let words = [
        ("prefer", PostQuantum::Prefer),
        ("require", PostQuantum::Require),
        ("off", PostQuantum::Off),
    ];
    match word("security.post_quantum", written, &words, errors) {
        None | Some(PostQuantum::Prefer) => Vec::new(),
        Some(PostQuantum::Require) => vec![KeyExchangeGroup::X25519MlKem768],
        Some(PostQuantum::Off) => KeyExchangeGroup::CLASSICAL.to_vec(),
    }
}

#[derive(Clone, Copy)]
enum PostQuantum {
    Prefer,
    Require,
    Off,
}

/// The value for a word. None if the field is not set, or after adding an error.
fn word<T: Copy>(
    path: &str,
    written: Option<&str>,
    words: &[(&'static str, T)],
    errors: &mut Diagnostics,
) -> Option<T> {
    let written = written?;
    let value = words.iter().find(|(word, _)| *word == written).map(|(_, value)| *value);
    if value.is_none() {
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let reason = format!("invalid value {written:?}: must be one of {}", known.join(", "));
        errors.add(path, reason);
    }
    value
}
