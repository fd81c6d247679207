//! Validates the claims of a token.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use weft_model::{ClaimFormat, ClaimRule, JwtProvider};

use super::fault::{TokenFault, TokenRejection};

/// The validity times of a token, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct TokenTimes {
    pub(crate) from: f64,
    pub(crate) issued: f64,
    pub(crate) until: f64,
}

impl TokenTimes {
    /// Checks that the token is valid at `now`.
    ///
    /// # Errors
    /// [`TokenFault::ClaimValue`] when the token has expired, is not valid yet, or was issued in the future.
    pub(crate) fn check(
        &self,
        provider: &JwtProvider,
        now: SystemTime,
    ) -> Result<(), TokenRejection> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let leeway = provider.leeway.as_secs_f64();
        let refuse = |detail| Err(TokenRejection::new(TokenFault::ClaimValue, detail));
        if self.until + leeway <= now {
            return refuse("the token has expired");
        }
        if self.from - leeway > now {
            return refuse("the token is not valid yet");
        }
        if self.issued - leeway > now {
            return refuse("the token was issued in the future");
        }
        Ok(())
    }
}

/// Validates the claims against the settings of a provider, apart from the times.
///
/// # Errors
/// The first claim that is missing, malformed, or has a value that the provider does not accept.
pub(crate) fn check(
    claims: &Map<String, Value>,
    provider: &JwtProvider,
) -> Result<TokenTimes, TokenRejection> {
    if text(claims, "iss")? != provider.issuer {
        return Err(TokenRejection::OTHER_ISSUER);
    }
    let audiences = audiences(claims, !provider.audiences.is_empty())?;
    let is_ours = |audience: &&str| provider.audiences.iter().any(|own| own == audience);
    if !provider.audiences.is_empty() && !audiences.iter().any(is_ours) {
        return Err(TokenRejection::new(
            TokenFault::ClaimValue,
            "the token is for another audience",
        ));
    }
    let from = date(claims, "nbf")?;
    let issued = date(claims, "iat")?;
    let missing = TokenRejection::new(TokenFault::ClaimMissing, "exp is missing");
    let until = date(claims, "exp")?.ok_or(missing)?;
    if let Some(longest) = provider.longest_life {
        let begun = issued.or(from);
        let begun = begun
            .ok_or(TokenRejection::new(TokenFault::ClaimMissing, "iat and nbf are missing"))?;
        if until - begun > longest.as_secs_f64() {
            return Err(TokenRejection::new(
                TokenFault::ClaimValue,
                "the token lifetime exceeds the limit",
            ));
        }
    }
    let subject = match claims.get("sub") {
        None => None,
        Some(Value::String(subject)) => Some(subject.as_str()),
        Some(_) => return Err(TokenRejection::new(TokenFault::ClaimFormat, "sub is not a string")),
    };
    if let Some(wanted) = &provider.subject {
        let missing = TokenRejection::new(TokenFault::ClaimMissing, "sub is missing");
        if !wanted.matches(subject.ok_or(missing)?) {
            return Err(TokenRejection::new(
                TokenFault::ClaimValue,
                "its subject is not accepted here",
            ));
        }
    }
    provider.claims.iter().try_for_each(|rule| meets(claims, rule))?;
    let from = from.unwrap_or(0.0);
    let issued = issued.unwrap_or(0.0);
    Ok(TokenTimes { from, issued, until })
}

/// Whether a token is for one of these audiences.
pub(crate) fn is_for(claims: &Map<String, Value>, wanted: &[String]) -> bool {
    let audiences = audiences(claims, false).unwrap_or_default();
    audiences.iter().any(|audience| wanted.iter().any(|wanted| wanted == audience))
}

fn meets(claims: &Map<String, Value>, rule: &ClaimRule) -> Result<(), TokenRejection> {
    let missing = TokenRejection::new(TokenFault::ClaimMissing, "a required claim is missing");
    let other = TokenRejection::new(TokenFault::ClaimFormat, "a required claim has the wrong type");
    let claim = claims.get(&rule.name).ok_or(missing)?;
    let values: Vec<&str> = match (rule.format, claim) {
        (ClaimFormat::Single, Value::String(value)) => vec![value],
        (ClaimFormat::Spaced, Value::String(values)) => values.split(' ').collect(),
        (ClaimFormat::Array, Value::Array(values)) => {
            values.iter().map(Value::as_str).collect::<Option<_>>().ok_or(other)?
        }
        _ => return Err(other),
    };
    let has = |wanted: &String| values.contains(&wanted.as_str());
    let good = if rule.all { rule.values.iter().all(has) } else { rule.values.iter().any(has) };
    if good {
        Ok(())
    } else {
        Err(TokenRejection::new(
            TokenFault::ClaimValue,
            "a claim says something else than is asked for",
        ))
    }
}

fn text<'c>(claims: &'c Map<String, Value>, name: &str) -> Result<&'c str, TokenRejection> {
    match claims.get(name) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(TokenRejection::new(TokenFault::ClaimFormat, "iss is not a string")),
        None => Err(TokenRejection::new(TokenFault::ClaimMissing, "iss is missing")),
    }
}

/// RFC 7519, section 4.1.3: a string, or an array of strings.
fn audiences(claims: &Map<String, Value>, wanted: bool) -> Result<Vec<&str>, TokenRejection> {
    let other = TokenRejection::new(
        TokenFault::ClaimFormat,
        "aud is neither a string nor a list of strings",
    );
    match claims.get("aud") {
        Some(Value::String(audience)) => Ok(vec![audience]),
        Some(Value::Array(all)) => {
            all.iter().map(Value::as_str).collect::<Option<_>>().ok_or(other)
        }
        Some(_) => Err(other),
        None if wanted => Err(TokenRejection::new(TokenFault::ClaimMissing, "aud is missing")),
        None => Ok(Vec::new()),
    }
}

/// RFC 7519, section 2, `NumericDate`.
fn date(claims: &Map<String, Value>, name: &str) -> Result<Option<f64>, TokenRejection> {
    match claims.get(name) {
        None => Ok(None),
        Some(Value::Number(date)) => Ok(date.as_f64()),
        Some(_) => {
            Err(TokenRejection::new(TokenFault::ClaimFormat, "exp, nbf or iat is not a number"))
        }
    }
}

/// The claim at a dotted path, as text: a string as it is, other values as JSON. A claim whose name has the dots itself takes
/// precedence.
pub(crate) fn claim_text(claims: &Map<String, Value>, way: &str) -> Option<String> {
    let found = claims.get(way).or_else(|| {
        let mut steps = way.split('.');
        let first = claims.get(steps.next()?)?;
        steps.try_fold(first, |value, step| value.get(step))
    })?;
    match found {
        Value::String(text) => Some(text.clone()),
        Value::Null => None,
        other => Some(other.to_string()),
    }
}
