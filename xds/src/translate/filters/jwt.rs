//! `JwtAuthentication`: which tokens are accepted, and which requests need one.

#![expect(
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
use crate::translate::reader::MISSING;
use crate::translate::{FieldError, MessageReader, route_match, values};

const MESSAGE: &str = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";

/// Envoy's defaults.
const DEFAULT_LEEWAY: Duration = Duration::from_secs(60);
const DEFAULT_CACHE: Duration = Duration::from_secs(600);
const DEFAULT_FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// How deep requirements may nest, so that a hostile resource cannot exhaust the stack.
const DEPTH_LIMIT: usize = 8;
/// The most providers, and the most token locations of one provider.
const LIMIT: usize = 100;

/// Reads the policy. `ours` has the provider settings of the chain's metadata.
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
        return Err(
            filter.refuse("providers", format!("too many providers: at most {LIMIT} are accepted"))
        );
    }
    if let Some(unknown) = ours.keys().find(|name| !providers.contains_key(name.as_str())) {
        let reason = format!("unknown provider {unknown:?} in the chain's metadata");
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
    // A token without `exp` is always refused; the other fields configure Envoy's caches.
    provider.harmless(&["jwt_cache_config", "require_expiration", "clear_route_cache"]);
    // Metadata that no supported filter reads.
    provider.unenforced(&["header_in_metadata", "failed_status_in_metadata"]);
    let issuer = provider.text("issuer");
    if issuer.is_empty() {
        return Err(provider.refuse(
            "issuer",
            "this field is missing: without it tokens of any issuer would be accepted",
        ));
    }
    let audiences = provider.texts("audiences");
    if ours.any_audience && !audiences.is_empty() {
        let reason = "must be empty, because the chain's metadata sets any_audience";
        return Err(provider.refuse("audiences", reason));
    }
    if audiences.is_empty() && !ours.any_audience {
        provider
            .warn("audiences", "none: tokens of this issuer for any other service are accepted");
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

/// The token locations. Without any, only the `authorization` header is used: Envoy's other default, a query parameter,
/// would put tokens into logs.
fn token_locations(provider: &mut MessageReader<'_>) -> Result<Vec<TokenLocation>, FieldError> {
    let mut locations = Vec::new();
    for mut header in provider.children("from_headers") {
        let prefix = header.text("value_prefix");
        let name = header_name(&mut header, "name", token_header)?;
        let name = name.ok_or_else(|| header.refuse("name", MISSING))?;
        locations.push(TokenLocation::Header { name, prefix });
    }
    locations.extend(provider.texts("from_params").into_iter().map(TokenLocation::QueryParameter));
    locations.extend(provider.texts("from_cookies").into_iter().map(TokenLocation::Cookie));
    if locations.len() > LIMIT {
        return Err(provider.refuse(
            "from_headers",
            format!("too many token locations: at most {LIMIT} are accepted"),
        ));
    }
    Ok(locations)
}

fn claim_headers(provider: &mut MessageReader<'_>) -> Result<Vec<(String, String)>, FieldError> {
    let mut headers = Vec::new();
    for mut mapping in provider.children("claim_to_headers") {
        let claim = mapping.required_text("claim_name")?;
        let name = header_name(&mut mapping, "header_name", claim_header)?;
        let name = name.ok_or_else(|| mapping.refuse("header_name", MISSING))?;
        headers.push((claim, name));
    }
    Ok(headers)
}

/// A header name, checked and lowercased by `rule`; none when it is empty.
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
        return Err(
            http.refuse("uri", format!("invalid URI {uri:?}: must start with http:// or https://"))
        );
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
            rule.refuse(
                "requirement_name",
                format!("unknown requirement {name:?}: must be in requirement_map"),
            )
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
        Err(reader
            .refuse("provider_name", format!("unknown provider {name:?}: must be in providers")))
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
            return Err(set.refuse("requirements", "must not be empty"));
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
        // At the top level it means: a token of any provider, if there is one.
        let any = providers.iter().map(|name| JwtRequirement::Provider(name.clone(), Vec::new()));
        return Ok(if depth + 1 == DEPTH_LIMIT {
            JwtRequirement::Any(any.chain([JwtRequirement::Missing]).collect())
        } else {
            JwtRequirement::Missing
        });
    }
    for field in ["allow_missing_or_failed", "extract_only_without_validation"] {
        if reader.has(field) {
            return Err(reader.refuse(field, "not supported: a forged token would be accepted"));
        }
    }
    Err(reader.refuse("", "unsupported requirement"))
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
    let mut headers = Vec::new();
    let mut parameters = Vec::new();
    let mut cookies = Vec::new();
    for location in &provider.token_locations {
        match location {
            TokenLocation::Header { name, prefix } => {
                headers.push(json!({"name": name, "value_prefix": prefix}));
            }
            TokenLocation::QueryParameter(name) => parameters.push(name.as_str()),
            TokenLocation::Cookie(name) => cookies.push(name.as_str()),
        }
    }
    let claims = provider.claim_headers.iter();
    let claims = claims.map(|(claim, name)| json!({"claim_name": claim, "header_name": name}));
    json["from_headers"] = headers.into();
    json["from_params"] = json!(parameters);
    json["from_cookies"] = json!(cookies);
    json["claim_to_headers"] = claims.collect();
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

/// The provider settings for the chain's metadata.
pub(super) fn ours(policy: &JwtPolicy) -> Value {
    let said =
        policy.providers.iter().map(|(name, p)| (name.to_string(), super::jwt_ours::json(p)));
    let said = said.filter(|(_, said)| !said.is_empty());
    Value::Object(said.map(|(name, said)| (name, Value::Object(said))).collect())
}
