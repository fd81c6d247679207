//! `JwtAuthentication`: which tokens are accepted, and which requests need one.

use std::collections::BTreeMap;
use std::time::Duration;

use envoy_types::util::pack_any;
use weft_model::{
    JwtPolicy, JwtProvider, JwtRequirement, JwtRule, KeySource, Name, TokenLocation, claim_header,
    token_header,
};

use super::jwt_ours::OurProvider;
use super::typed_config::http_filter;
use crate::translate::pb::{core, google, http, jwt as pb};
use crate::translate::reader::MISSING;
use crate::translate::struct_value::{StructFields, object};
use crate::translate::{FieldError, MessageReader, route_match, values};

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

/// Encodes the filter.
pub(super) fn encode(policy: &JwtPolicy) -> http::HttpFilter {
    let providers = policy.providers.iter();
    let config = pb::JwtAuthentication {
        providers: providers.map(|(name, p)| (name.to_string(), encode_provider(p))).collect(),
        rules: policy.rules.iter().map(encode_rule).collect(),
        bypass_cors_preflight: policy.passes_preflight,
        ..pb::JwtAuthentication::default()
    };
    http_filter("envoy.filters.http.jwt_authn", pack_any(config))
}

fn encode_provider(provider: &JwtProvider) -> pb::JwtProvider {
    let mut encoded = pb::JwtProvider {
        issuer: provider.issuer.clone(),
        audiences: provider.audiences.clone(),
        subjects: provider.subject.as_ref().map(values::encode_string_match),
        max_lifetime: provider.longest_life.map(values::duration),
        forward: provider.forward,
        forward_payload_header: provider.payload_header.clone().unwrap_or_default(),
        payload_in_metadata: provider.payload_name.as_deref().unwrap_or_default().into(),
        clock_skew_seconds: u32::try_from(provider.leeway.as_secs()).unwrap_or(u32::MAX),
        jwks_source_specifier: Some(encode_keys(&provider.keys)),
        ..pb::JwtProvider::default()
    };
    for location in &provider.token_locations {
        match location {
            TokenLocation::Header { name, prefix } => encoded
                .from_headers
                .push(pb::JwtHeader { name: name.clone(), value_prefix: prefix.clone() }),
            TokenLocation::QueryParameter(name) => encoded.from_params.push(name.clone()),
            TokenLocation::Cookie(name) => encoded.from_cookies.push(name.clone()),
        }
    }
    let claims = provider.claim_headers.iter().map(|(claim, name)| pb::JwtClaimToHeader {
        claim_name: claim.clone(),
        header_name: name.clone(),
        ..pb::JwtClaimToHeader::default()
    });
    encoded.claim_to_headers = claims.collect();
    encoded
}

fn encode_keys(keys: &KeySource) -> pb::jwt_provider::JwksSourceSpecifier {
    match keys {
        KeySource::Local(data) => {
            pb::jwt_provider::JwksSourceSpecifier::LocalJwks(values::encode_data(data))
        }
        KeySource::Http { uri, cluster, timeout, cache, redirects: _ } => {
            let cluster = core::http_uri::HttpUpstreamType::Cluster(cluster.to_string());
            let http_uri = core::HttpUri {
                uri: uri.clone(),
                timeout: Some(values::duration(*timeout)),
                http_upstream_type: Some(cluster),
            };
            pb::jwt_provider::JwksSourceSpecifier::RemoteJwks(pb::RemoteJwks {
                http_uri: Some(http_uri),
                cache_duration: Some(values::duration(*cache)),
                ..pb::RemoteJwks::default()
            })
        }
    }
}

fn encode_rule(rule: &JwtRule) -> pb::RequirementRule {
    let requires = rule.requires.as_ref().map(encode_requirement);
    pb::RequirementRule {
        r#match: Some(route_match::encode(&rule.matches)),
        requirement_type: requires.map(pb::requirement_rule::RequirementType::Requires),
    }
}

fn encode_requirement(requirement: &JwtRequirement) -> pb::JwtRequirement {
    use pb::jwt_requirement::RequiresType;
    let list = |all: &[JwtRequirement]| all.iter().map(encode_requirement).collect();
    let requires = match requirement {
        JwtRequirement::Provider(name, audiences) if audiences.is_empty() => {
            RequiresType::ProviderName(name.to_string())
        }
        JwtRequirement::Provider(name, audiences) => {
            RequiresType::ProviderAndAudiences(pb::ProviderWithAudiences {
                provider_name: name.to_string(),
                audiences: audiences.clone(),
            })
        }
        JwtRequirement::Any(all) => {
            RequiresType::RequiresAny(pb::JwtRequirementOrList { requirements: list(all) })
        }
        JwtRequirement::All(all) => {
            RequiresType::RequiresAll(pb::JwtRequirementAndList { requirements: list(all) })
        }
        JwtRequirement::Missing => RequiresType::AllowMissing(google::Empty::default()),
    };
    pb::JwtRequirement { requires_type: Some(requires) }
}

/// Encodes the provider settings for the chain's metadata: an object of each provider that has some.
pub(super) fn encode_ours(policy: &JwtPolicy) -> StructFields {
    let ours = policy.providers.iter().map(|(name, p)| (name, super::jwt_ours::encode(p)));
    let ours = ours.filter(|(_, fields)| !fields.is_empty());
    ours.map(|(name, fields)| (name.to_string(), object(fields))).collect()
}
