//! `JwtAuthentication`: which tokens count, and which requests need one.

#![allow(
    clippy::indexing_slicing,
    reason = "assigning a field of a JSON object made here cannot fail"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use weft_model::{JwtPolicy, JwtProvider, JwtRequirement, JwtRule, KeySource, Name, TokenPresence};

use crate::translate::{Reader, Refused, route, values};

const MESSAGE: &str = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";

/// What Envoy takes when the fields are not set.
const DEFAULT_LEEWAY: Duration = Duration::from_secs(60);
const DEFAULT_CACHE: Duration = Duration::from_secs(600);
const DEFAULT_FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// Reads the policy.
pub(super) fn decode(mut filter: Reader<'_>) -> Result<JwtPolicy, Refused> {
    filter.harmless(&["bypass_cors_preflight", "strip_failure_response", "stat_prefix"]);
    let mut providers = BTreeMap::new();
    for (name, reader) in filter.map("providers") {
        providers.insert(Name::from(name), provider(reader)?);
    }
    let known = providers.keys().cloned().collect::<Vec<_>>();
    let rules = values::each(filter.children("rules"), |reader| rule(reader, &known))?;
    Ok(JwtPolicy { providers, rules })
}

fn provider(mut provider: Reader<'_>) -> Result<JwtProvider, Refused> {
    provider.harmless(&["jwt_cache_config", "require_expiration"]);
    let issuer = provider.text("issuer");
    if issuer.is_empty() {
        return Err(provider.refuse("issuer", "it is missing; a token of any issuer would be good"));
    }
    let audiences = provider.texts("audiences");
    if audiences.is_empty() {
        return Err(
            provider.refuse("audiences", "it is empty; a token for any service would be good")
        );
    }
    for field in ["from_headers", "from_params", "from_cookies"] {
        if provider.has(field) {
            return Err(provider.refuse(field, "only the authorization header is read"));
        }
    }
    let keys = if let Some(local) = provider.child("local_jwks") {
        KeySource::Local(values::data(local)?)
    } else if let Some(remote) = provider.child("remote_jwks") {
        remote_keys(remote)?
    } else {
        return Err(provider.refuse("", "one of local_jwks and remote_jwks must be set"));
    };
    let leeway = provider
        .number("clock_skew_seconds")
        .map_or(DEFAULT_LEEWAY, |s| Duration::from_secs(s.into()));
    Ok(JwtProvider {
        issuer,
        audiences,
        keys,
        forward: provider.flag("forward").unwrap_or(false),
        leeway,
    })
}

fn remote_keys(mut remote: Reader<'_>) -> Result<KeySource, Refused> {
    remote.harmless(&["async_fetch", "retry_policy"]);
    let cache = remote.duration("cache_duration")?.unwrap_or(DEFAULT_CACHE);
    let mut http = remote.required_child("http_uri")?;
    let uri = http.required_text("uri")?;
    if !uri.starts_with("http://") && !uri.starts_with("https://") {
        return Err(http.refuse("uri", format!("{uri:?} starts with neither http:// nor https://")));
    }
    let cluster = http.required_text("cluster")?.into();
    let timeout = http.duration("timeout")?.unwrap_or(DEFAULT_FETCH_TIMEOUT);
    Ok(KeySource::Http { uri, cluster, timeout, cache })
}

fn rule(mut rule: Reader<'_>, providers: &[Name]) -> Result<JwtRule, Refused> {
    if rule.has("requirement_name") {
        return Err(rule.refuse("requirement_name", "it is not supported; use requires"));
    }
    let matches = route::route_match(rule.required_child("match")?)?;
    let requires =
        rule.child("requires").map(|reader| requirement(reader, providers)).transpose()?.flatten();
    Ok(JwtRule { matches, requires })
}

fn requirement(
    mut reader: Reader<'_>,
    providers: &[Name],
) -> Result<Option<JwtRequirement>, Refused> {
    let known = |reader: &Reader<'_>, name: String| {
        let name: Name = name.into();
        if providers.contains(&name) {
            Ok(name)
        } else {
            Err(reader.refuse("provider_name", format!("{name:?} is no provider")))
        }
    };
    if reader.has("provider_name") {
        let name = reader.text("provider_name");
        let providers = vec![known(&reader, name)?];
        return Ok(Some(JwtRequirement { providers, presence: TokenPresence::Required }));
    }
    if let Some(mut any) = reader.child("requires_any") {
        let mut requirement =
            JwtRequirement { providers: Vec::new(), presence: TokenPresence::Required };
        for mut option in any.children("requirements") {
            if option.child("allow_missing").is_some() {
                requirement.presence = TokenPresence::Optional;
            } else if option.has("provider_name") {
                let name = option.text("provider_name");
                requirement.providers.push(known(&option, name)?);
            } else {
                return Err(
                    option.refuse("", "only provider_name and allow_missing are supported here")
                );
            }
        }
        return Ok(Some(requirement));
    }
    if reader.child("allow_missing").is_some() {
        let providers = providers.to_vec();
        return Ok(Some(JwtRequirement { providers, presence: TokenPresence::Optional }));
    }
    for field in [
        "provider_and_audiences",
        "requires_all",
        "allow_missing_or_failed",
        "extract_only_without_validation",
    ] {
        if reader.has(field) {
            return Err(reader.refuse(
                field,
                "it is not supported; provider_name, requires_any and allow_missing are",
            ));
        }
    }
    Ok(None)
}

/// The JSON form of the filter.
pub(super) fn encode(policy: &JwtPolicy) -> Value {
    let providers: BTreeMap<&str, Value> =
        policy.providers.iter().map(|(name, p)| (&**name, provider_json(p))).collect();
    let rules: Vec<Value> = policy.rules.iter().map(rule_json).collect();
    let fields = json!({"providers": providers, "rules": rules});
    json!({"name": "envoy.filters.http.jwt_authn", "typed_config": values::any(MESSAGE, fields)})
}

fn provider_json(provider: &JwtProvider) -> Value {
    let mut json = json!({
        "issuer": provider.issuer, "audiences": provider.audiences, "forward": provider.forward,
        "clock_skew_seconds": provider.leeway.as_secs(),
    });
    match &provider.keys {
        KeySource::Local(data) => json["local_jwks"] = values::data_json(data),
        KeySource::Http { uri, cluster, timeout, cache } => {
            json["remote_jwks"] = json!({
            "http_uri": {"uri": uri, "cluster": &**cluster, "timeout": values::duration(*timeout)},
            "cache_duration": values::duration(*cache)})
        }
    }
    json
}

fn rule_json(rule: &JwtRule) -> Value {
    let mut json = json!({"match": route::route_match_json(&rule.matches)});
    if let Some(requirement) = &rule.requires {
        let mut options: Vec<Value> =
            requirement.providers.iter().map(|p| json!({"provider_name": &**p})).collect();
        if requirement.presence == TokenPresence::Optional {
            options.push(json!({"allow_missing": {}}));
        }
        json["requires"] = match options.as_slice() {
            [only] => only.clone(),
            _ => json!({"requires_any": {"requirements": options}}),
        };
    }
    json
}
