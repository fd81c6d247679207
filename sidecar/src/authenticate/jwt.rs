//! Tokens (RFC 7519) by `jsonwebtoken`, behind one door that closes what the library leaves open:
//! `exp`, `iss` and `aud` must be there, `nbf` counts, `crit` is refused, and the key decides the
//! algorithm, never the token.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Validation, decode, decode_header};
use serde::Deserialize;
use weft_model::{JwtPolicy, JwtProvider, Name, TokenPresence};

use super::Facts;
use super::keys::KeySet;
use crate::denial::Denial;

/// The longest token that is looked at.
const TOKEN_LIMIT_BYTES: usize = 16 * 1024;

/// A policy with the keys it needs.
#[derive(Debug)]
pub(crate) struct Tokens {
    policy: Arc<JwtPolicy>,
    providers: BTreeMap<Name, PlannedProvider>,
}

/// An issuer with its keys; none when they could not be loaded yet.
#[derive(Debug)]
pub(crate) struct PlannedProvider {
    pub(crate) provider: JwtProvider,
    pub(crate) keys: Option<Arc<KeySet>>,
}

#[derive(Debug, Deserialize)]
struct Claims {
    sub: Option<String>,
    exp: f64,
    nbf: Option<f64>,
}

impl Tokens {
    pub(crate) fn new(policy: Arc<JwtPolicy>, providers: BTreeMap<Name, PlannedProvider>) -> Self {
        Self { policy, providers }
    }

    /// Whether the token goes on to the service.
    pub(crate) fn forward(&self) -> bool {
        self.providers.values().all(|planned| planned.provider.forward)
    }

    /// The subject of the request's token, where one is asked for.
    pub(crate) fn check(
        &self,
        facts: &Facts<'_>,
        now: SystemTime,
    ) -> Result<Option<String>, Denial> {
        let rule = self.policy.rules.iter().find(|rule| rule.matches.covers(facts));
        let Some(requirement) = rule.and_then(|rule| rule.requires.as_ref()) else {
            return Ok(None);
        };
        let token = match bearer(facts)? {
            Some(token) => token,
            None if requirement.presence == TokenPresence::Optional => return Ok(None),
            None => return Err(Denial::TokenMissing),
        };
        let mut denial = Denial::TokenInvalid("its issuer is not accepted here");
        for name in &requirement.providers {
            let Some(planned) = self.providers.get(name) else {
                continue;
            };
            match planned.check(token, now) {
                Ok(subject) => return Ok(subject),
                Err(reason) => denial = Denial::TokenInvalid(reason),
            }
        }
        Err(denial)
    }
}

/// The one bearer token of a request.
fn bearer<'a>(facts: &Facts<'a>) -> Result<Option<&'a str>, Denial> {
    let fields = &facts.head.fields;
    match fields.count("authorization") {
        0 => return Ok(None),
        1 => {}
        _ => return Err(Denial::TokenInvalid("more than one authorization")),
    }
    let value = fields.text("authorization").ok_or(Denial::TokenInvalid("it is no text"))?;
    let Some((scheme, token)) = value.split_once(' ') else {
        return Ok(None);
    };
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Ok(None);
    }
    let token = token.trim();
    if token.len() > TOKEN_LIMIT_BYTES {
        return Err(Denial::TokenInvalid("it is larger than 16 KiB"));
    }
    Ok(Some(token))
}

impl PlannedProvider {
    /// The subject of a token that this issuer signed for us and that is good now.
    fn check(&self, token: &str, now: SystemTime) -> Result<Option<String>, &'static str> {
        let keys = self.keys.as_ref().ok_or("the issuer's keys are not known yet")?;
        let header = decode_header(token).map_err(|_| "it is no token")?;
        if has_critical_extensions(token) {
            return Err("it has critical extensions");
        }
        let mut reason = "no key of the issuer fits it";
        for key in keys.candidates(header.kid.as_deref(), header.alg) {
            let mut validation = Validation::new(header.alg);
            validation.set_required_spec_claims(&["exp", "iss", "aud"]);
            validation.set_issuer(&[&self.provider.issuer]);
            validation.set_audience(&self.provider.audiences);
            // The clock is ours, so that a test can set it.
            validation.validate_exp = false;
            validation.validate_nbf = false;
            match decode::<Claims>(token, &key.key, &validation) {
                Ok(decoded) => return self.check_times(decoded.claims, now),
                Err(error) => reason = explain(error.kind()),
            }
        }
        Err(reason)
    }

    fn check_times(&self, claims: Claims, now: SystemTime) -> Result<Option<String>, &'static str> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let leeway = self.provider.leeway.as_secs_f64();
        if !claims.exp.is_finite() || claims.exp + leeway <= now {
            return Err("it has expired");
        }
        if claims.nbf.is_some_and(|nbf| !nbf.is_finite() || nbf - leeway > now) {
            return Err("it is not good yet");
        }
        Ok(claims.sub)
    }
}

/// `crit` names extensions that must be understood (RFC 7515, section 4.1.11); we understand none.
fn has_critical_extensions(token: &str) -> bool {
    #[derive(Deserialize)]
    struct Critical {
        crit: Option<serde_json::Value>,
    }
    let Some(header) = token.split('.').next() else {
        return true;
    };
    // The library has decoded it once already, so it can be decoded.
    decode_header(token).is_err()
        || URL_SAFE_NO_PAD
            .decode(header)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Critical>(&bytes).ok())
            .is_none_or(|critical| critical.crit.is_some())
}

fn explain(kind: &jsonwebtoken::errors::ErrorKind) -> &'static str {
    use jsonwebtoken::errors::ErrorKind;
    match kind {
        ErrorKind::InvalidSignature => "its signature is wrong",
        ErrorKind::InvalidIssuer => "its issuer is not accepted here",
        ErrorKind::InvalidAudience => "it is for another audience",
        ErrorKind::MissingRequiredClaim(_) => "exp, iss or aud is missing",
        ErrorKind::ExpiredSignature => "it has expired",
        _ => "it is no token",
    }
}
