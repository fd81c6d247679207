//! `JwtAuthentication`: which tokens count, and which requests need one.

#![allow(
    clippy::indexing_slicing,
    reason = "assigning a field of a JSON object made here cannot fail"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use weft_model::{
    JwtPolicy, JwtProvider, JwtRequirement, JwtRule, KeySource, Name, TokenLocation, claim_header,
    token_header,
};

use super::jwt_ours::OurProvider;
use crate::translate::{FieldError, MessageReader, route_match, values};

const MESSAGE: &str = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";

/// What Envoy takes when the fields are not set.
const DEFAULT_LEEWAY: Duration = Duration::from_secs(60);
const DEFAULT_CACHE: Duration = Duration::from_secs(600);
const DEFAULT_FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// How deep requirements may nest, so that a hostile resource cannot exhaust the stack.
const DEPTH_LIMIT: usize = 8;
/// How many providers there may be, and how many fields, parameters and cookies one looks at.
const LIMIT: usize = 100;

/// Reads the policy. `ours` is what the chain's metadata says of its providers.
pub(super) fn decode(
    mut filter: MessageReader<'_>,
    ours: &BTreeMap<String, OurProvider>,
) -> Result<JwtPolicy, FieldError> {
    filter.harmless(&["strip_failure_response", "stat_prefix"]);
    let passes_preflight = filter.flag("bypass_cors_preflight").unwrap_or(false);
    let mut providers = BTreeMap::new();
    for (name, reader) in filter.map("providers") {
        let ours = ours.get(&name).cloned().unwrap_or_default();
        providers.insert(Name::from(name), provider(reader, ours)?);
    }
    if providers.len() > LIMIT {
        return Err(filter.refuse("providers", format!("more than {LIMIT} of them")));
    }
    if let Some(unknown) = ours.keys().find(|name| !providers.contains_key(name.as_str())) {
        let reason = format!("the chain's metadata speaks of {unknown:?}, which is no provider");
        return Err(filter.refuse("providers", reason));
    }
    let known = providers.keys().cloned().collect::<Vec<_>>();
    let mut named = BTreeMap::new();
    for (name, reader) in filter.map("requirement_map") {
        named.insert(name, requirement(reader, &known, DEPTH_LIMIT)?);
    }
    let rules = values::each(filter.children("rules"), |reader| rule(reader, &known, &named))?;
    Ok(JwtPolicy { providers, rules, passes_preflight })
}

fn provider(mut provider: MessageReader<'_>, ours: OurProvider) -> Result<JwtProvider, FieldError> {
    // A token without `exp` is refused in any case; the rest is Envoy's own bookkeeping.
    provider.harmless(&["jwt_cache_config", "require_expiration", "clear_route_cache"]);
    // Metadata that no filter here reads.
    provider.unenforced(&["header_in_metadata", "failed_status_in_metadata"]);
    let issuer = provider.text("issuer");
    if issuer.is_empty() {
        return Err(provider.refuse("issuer", "it is missing; a token of any issuer would be good"));
    }
    let audiences = provider.texts("audiences");
    if ours.any_audience && !audiences.is_empty() {
        let reason = "there are some, and the chain's metadata says that any is good";
        return Err(provider.refuse("audiences", reason));
    }
    if audiences.is_empty() && !ours.any_audience {
        provider
            .warn("audiences", "none: a token of this issuer for any other service is accepted");
    }
    let keys = if let Some(local) = provider.child("local_jwks") {
        KeySource::Local(values::data(local)?)
    } else if let Some(remote) = provider.child("remote_jwks") {
        remote_keys(remote, ours.redirects)?
    } else {
        return Err(provider.refuse("", "one of local_jwks and remote_jwks must be set"));
    };
    let leeway = provider
        .number("clock_skew_seconds")
        .map_or(DEFAULT_LEEWAY, |s| Duration::from_secs(s.into()));
    if provider.flag("pad_forward_payload_header") == Some(true) {
        return Err(provider.refuse("pad_forward_payload_header", "padding is not supported"));
    }
    Ok(JwtProvider {
        issuer,
        audiences,
        subject: provider.child("subjects").map(values::string_match).transpose()?,
        claims: ours.claims,
        longest_life: provider.duration("max_lifetime")?.filter(|life| !life.is_zero()),
        keys,
        token_locations: token_locations(&mut provider)?,
        forward: provider.flag("forward").unwrap_or(false),
        claim_headers: claim_headers(&mut provider)?,
        payload_header: header_name(&mut provider, "forward_payload_header", claim_header)?,
        payload_name: Some(provider.text("payload_in_metadata"))
            .filter(|name| !name.is_empty())
            .map(Name::from),
        leeway,
        bound: ours.bound,
        ends_streams: ours.ends_streams,
    })
}

/// Where a token may stand. Without any it is the `authorization` field alone: in a URI, which is Envoy's
/// other default, it would stand in logs.
fn token_locations(provider: &mut MessageReader<'_>) -> Result<Vec<TokenLocation>, FieldError> {
    let mut locations = Vec::new();
    for mut place in provider.children("from_headers") {
        let prefix = place.text("value_prefix");
        let name = header_name(&mut place, "name", token_header)?;
        let name = name.ok_or_else(|| place.refuse("name", "it is missing"))?;
        locations.push(TokenLocation::Header { name, prefix });
    }
    locations.extend(provider.texts("from_params").into_iter().map(TokenLocation::QueryParameter));
    locations.extend(provider.texts("from_cookies").into_iter().map(TokenLocation::Cookie));
    if locations.len() > LIMIT {
        return Err(provider.refuse("from_headers", format!("more than {LIMIT} places")));
    }
    Ok(locations)
}

fn claim_headers(provider: &mut MessageReader<'_>) -> Result<Vec<(String, String)>, FieldError> {
    let mut fields = Vec::new();
    for mut told in provider.children("claim_to_headers") {
        let claim = told.required_text("claim_name")?;
        let name = header_name(&mut told, "header_name", claim_header)?;
        let name = name.ok_or_else(|| told.refuse("header_name", "it is missing"))?;
        fields.push((claim, name));
    }
    Ok(fields)
}

/// The name of a header, in lower case, by this rule; none when it is empty.
fn header_name(
    reader: &mut MessageReader<'_>,
    field: &str,
    rule: fn(&str) -> Result<String, String>,
) -> Result<Option<String>, FieldError> {
    let name = reader.text(field);
    if name.is_empty() {
        return Ok(None);
    }
    rule(&name).map(Some).map_err(|reason| reader.refuse(field, reason))
}

fn remote_keys(mut remote: MessageReader<'_>, redirects: u8) -> Result<KeySource, FieldError> {
    remote.harmless(&["async_fetch", "retry_policy"]);
    let cache = remote.duration("cache_duration")?.unwrap_or(DEFAULT_CACHE);
    let mut http = remote.required_child("http_uri")?;
    let uri = http.required_text("uri")?;
    if !uri.starts_with("http://") && !uri.starts_with("https://") {
        return Err(http.refuse("uri", format!("{uri:?} starts with neither http:// nor https://")));
    }
    let cluster = http.required_text("cluster")?.into();
    let timeout = http.duration("timeout")?.unwrap_or(DEFAULT_FETCH_TIMEOUT);
    Ok(KeySource::Http { uri, cluster, timeout, cache, redirects })
}

fn rule(
    mut rule: MessageReader<'_>,
    providers: &[Name],
    named: &BTreeMap<String, JwtRequirement>,
) -> Result<JwtRule, FieldError> {
    let matches = route_match::decode_rule(rule.required_child("match")?)?;
    let name = rule.text("requirement_name");
    if !name.is_empty() {
        let requires = named.get(&name).cloned().ok_or_else(|| {
            rule.refuse("requirement_name", format!("{name:?} is not in requirement_map"))
        })?;
        return Ok(JwtRule { matches, requires: Some(requires) });
    }
    let requires = rule.child("requires");
    let requires =
        requires.map(|reader| requirement(reader, providers, DEPTH_LIMIT)).transpose()?;
    Ok(JwtRule { matches, requires })
}

fn requirement(
    mut reader: MessageReader<'_>,
    providers: &[Name],
    depth: usize,
) -> Result<JwtRequirement, FieldError> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(reader.refuse("", format!("requirements nest deeper than {DEPTH_LIMIT}")));
    };
    let known = |reader: &mut MessageReader<'_>| {
        let name: Name = reader.text("provider_name").into();
        if providers.contains(&name) {
            return Ok(name);
        }
        Err(reader.refuse("provider_name", format!("{name:?} is no provider")))
    };
    if reader.has("provider_name") {
        return Ok(JwtRequirement::Provider(known(&mut reader)?, Vec::new()));
    }
    if let Some(mut narrower) = reader.child("provider_and_audiences") {
        let audiences = narrower.texts("audiences");
        return Ok(JwtRequirement::Provider(known(&mut narrower)?, audiences));
    }
    let several = |mut set: MessageReader<'_>| {
        let all = values::each(set.children("requirements"), |r| requirement(r, providers, depth))?;
        if all.is_empty() {
            return Err(set.refuse("requirements", "it is empty"));
        }
        Ok(all)
    };
    if let Some(set) = reader.child("requires_any") {
        return several(set).map(JwtRequirement::Any);
    }
    if let Some(set) = reader.child("requires_all") {
        return several(set).map(JwtRequirement::All);
    }
    if reader.child("allow_missing").is_some() {
        // By itself it stands for: a token of whomever, if there is one.
        let any = providers.iter().map(|name| JwtRequirement::Provider(name.clone(), Vec::new()));
        return Ok(if depth + 1 == DEPTH_LIMIT {
            JwtRequirement::Any(any.chain([JwtRequirement::Missing]).collect())
        } else {
            JwtRequirement::Missing
        });
    }
    for field in ["allow_missing_or_failed", "extract_only_without_validation"] {
        if reader.has(field) {
            return Err(reader.refuse(field, "it is not supported: a forged token would be taken"));
        }
    }
    Err(reader.refuse("", "it requires nothing that is known here"))
}

/// The JSON form of the filter.
pub(super) fn encode(policy: &JwtPolicy) -> Value {
    let providers: BTreeMap<&str, Value> =
        policy.providers.iter().map(|(name, p)| (&**name, provider_json(p))).collect();
    let rules: Vec<Value> = policy.rules.iter().map(rule_json).collect();
    let mut fields = json!({"providers": providers, "rules": rules});
    if policy.passes_preflight {
        fields["bypass_cors_preflight"] = json!(true);
    }
    json!({"name": "envoy.filters.http.jwt_authn", "typed_config": values::any(MESSAGE, fields)})
}

fn provider_json(provider: &JwtProvider) -> Value {
    let mut json = json!({
        "issuer": provider.issuer, "audiences": provider.audiences, "forward": provider.forward,
        "clock_skew_seconds": provider.leeway.as_secs(),
    });
    match &provider.keys {
        KeySource::Local(data) => json["local_jwks"] = values::data_json(data),
        KeySource::Http { uri, cluster, timeout, cache, redirects: _ } => {
            json["remote_jwks"] = json!({
            "http_uri": {"uri": uri, "cluster": &**cluster, "timeout": values::duration(*timeout)},
            "cache_duration": values::duration(*cache)})
        }
    }
    if let Some(subject) = &provider.subject {
        json["subjects"] = values::string_match_json(subject);
    }
    if let Some(life) = provider.longest_life {
        json["max_lifetime"] = values::duration(life);
    }
    let (mut fields, mut parameters, mut cookies) = (Vec::new(), Vec::new(), Vec::new());
    for place in &provider.token_locations {
        match place {
            TokenLocation::Header { name, prefix } => {
                fields.push(json!({"name": name, "value_prefix": prefix}));
            }
            TokenLocation::QueryParameter(name) => parameters.push(name.as_str()),
            TokenLocation::Cookie(name) => cookies.push(name.as_str()),
        }
    }
    let told = provider.claim_headers.iter();
    let told = told.map(|(claim, name)| json!({"claim_name": claim, "header_name": name}));
    json["from_headers"] = fields.into();
    json["from_params"] = json!(parameters);
    json["from_cookies"] = json!(cookies);
    json["claim_to_headers"] = told.collect();
    json["forward_payload_header"] = json!(provider.payload_header.as_deref().unwrap_or_default());
    json["payload_in_metadata"] = json!(provider.payload_name.as_deref().unwrap_or_default());
    json
}

fn rule_json(rule: &JwtRule) -> Value {
    let mut json = json!({"match": route_match::encode(&rule.matches)});
    if let Some(requirement) = &rule.requires {
        json["requires"] = requirement_json(requirement);
    }
    json
}

fn requirement_json(requirement: &JwtRequirement) -> Value {
    let list = |all: &[JwtRequirement]| all.iter().map(requirement_json).collect::<Vec<_>>();
    match requirement {
        JwtRequirement::Provider(name, audiences) if audiences.is_empty() => {
            json!({"provider_name": &**name})
        }
        JwtRequirement::Provider(name, audiences) => {
            json!({"provider_and_audiences": {"provider_name": &**name, "audiences": audiences}})
        }
        JwtRequirement::Any(all) => json!({"requires_any": {"requirements": list(all)}}),
        JwtRequirement::All(all) => json!({"requires_all": {"requirements": list(all)}}),
        JwtRequirement::Missing => json!({"allow_missing": {}}),
    }
}

/// What the metadata of a chain says of the providers of its policy.
pub(super) fn ours(policy: &JwtPolicy) -> Value {
    let said =
        policy.providers.iter().map(|(name, p)| (name.to_string(), super::jwt_ours::json(p)));
    let said = said.filter(|(_, said)| !said.is_empty());
    Value::Object(said.map(|(name, said)| (name, Value::Object(said))).collect())
}
