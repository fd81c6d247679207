//! The HTTP and network filters `RBAC`: which requests and connections are allowed.

use std::collections::BTreeMap;

use envoy_types::util::pack_any;
use weft_model::{
    Name, Permission, Principal, Rbac, RbacAction, RbacFilter, RbacPolicy, StringMatch,
};

use super::typed_config::{http_filter, network_filter};
use crate::translate::pb::matcher::metadata_matcher::{PathSegment, path_segment};
use crate::translate::pb::matcher::{
    MetadataMatcher, PathMatcher, ValueMatcher, path_matcher, value_matcher,
};
use crate::translate::pb::{http, http_rbac, listener, network_rbac, rbac as pb, types};
use crate::translate::{FieldError, MessageReader, route_match, values};

/// The filter whose metadata contains the claims of tokens.
const TOKENS: &str = "envoy.filters.http.jwt_authn";

/// How deep conditions may nest, so that a hostile resource cannot exhaust the stack.
const DEPTH_LIMIT: usize = 16;

/// Reads the HTTP filter.
pub(super) fn decode(mut filter: MessageReader<'_>) -> Result<RbacFilter, FieldError> {
    filter.harmless(&["rules_stat_prefix", "shadow_rules_stat_prefix", "track_per_rule_stats"]);
    filter_of(filter)
}

/// Reads the network filter. Envoy evaluates it at the first bytes or continuously (`enforcement_type`); weft evaluates
/// it before any byte is forwarded, and again when the rules change.
pub(crate) fn decode_network(mut filter: MessageReader<'_>) -> Result<RbacFilter, FieldError> {
    filter.harmless(&[
        "stat_prefix",
        "shadow_rules_stat_prefix",
        "enforcement_type",
        "track_per_rule_stats",
        "delay_deny",
    ]);
    filter_of(filter)
}

fn filter_of(mut filter: MessageReader<'_>) -> Result<RbacFilter, FieldError> {
    let rules = filter.child("rules").map(decode_rules).transpose()?;
    // Unsupported dry-run rules are listed as not honoured, because they are not enforced.
    let shadow =
        filter.child("shadow_rules").and_then(|rules| decode_rules(rules.shadow_rules()).ok());
    filter.unenforced(&["shadow_matcher"]);
    Ok(RbacFilter { rules, shadow })
}

fn decode_rules(mut rules: MessageReader<'_>) -> Result<Rbac, FieldError> {
    rules.unenforced(&["audit_logging_options"]);
    let action = match rules.choice("action").as_str() {
        "ALLOW" => RbacAction::Allow,
        "DENY" => RbacAction::Deny,
        "LOG" => RbacAction::Log,
        other => {
            return Err(rules.refuse(
                "action",
                format!("unsupported action {other}: must be ALLOW, DENY or LOG"),
            ));
        }
    };
    let mut policies = BTreeMap::new();
    for (name, mut policy) in rules.map("policies") {
        let permissions = some(&mut policy, "permissions", |p| permission(p, DEPTH_LIMIT))?;
        let principals = some(&mut policy, "principals", |p| principal(p, DEPTH_LIMIT))?;
        policies.insert(Name::from(name), RbacPolicy { permissions, principals });
    }
    Ok(Rbac { action, policies })
}

/// The items of a list that must not be empty: an empty list of conditions would match everything or nothing.
fn some<'f, T>(
    reader: &mut MessageReader<'f>,
    field: &str,
    read: impl Fn(MessageReader<'f>) -> Result<T, FieldError>,
) -> Result<Vec<T>, FieldError> {
    let items = values::each(reader.children(field), read)?;
    if items.is_empty() { Err(reader.refuse(field, "must not be empty")) } else { Ok(items) }
}

fn permission(mut reader: MessageReader<'_>, depth: usize) -> Result<Permission, FieldError> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(reader.refuse("", format!("conditions nest deeper than {DEPTH_LIMIT}")));
    };
    if reader.flag("any") == Some(true) {
        return Ok(Permission::Any);
    }
    if let Some(mut set) = reader.child("and_rules") {
        return some(&mut set, "rules", |p| permission(p, depth)).map(Permission::All);
    }
    if let Some(mut set) = reader.child("or_rules") {
        return some(&mut set, "rules", |p| permission(p, depth)).map(Permission::OneOf);
    }
    if let Some(inner) = reader.child("not_rule") {
        return permission(inner, depth).map(|p| Permission::Not(Box::new(p)));
    }
    if let Some(mut path) = reader.child("url_path") {
        return values::string_match(path.required_child("path")?).map(Permission::Path);
    }
    if let Some(extension) = reader.child("uri_template") {
        return values::path_template(extension).map(Permission::PathTemplate);
    }
    if let Some(header) = reader.child("header") {
        return route_match::header(header).map(Permission::Header);
    }
    if reader.has("destination_port") {
        let port = reader.number("destination_port").unwrap_or(0);
        return u16::try_from(port).map(Permission::DestinationPort).map_err(|_| {
            reader.refuse("destination_port", format!("invalid port {port}: must be at most 65535"))
        });
    }
    if let Some(range) = reader.child("destination_ip") {
        return values::cidr(range).map(Permission::DestinationAddress);
    }
    if let Some(mut range) = reader.child("destination_port_range") {
        let mut bound = |field| i32::try_from(range.integer(field)).unwrap_or(0);
        let start = bound("start");
        let end = bound("end");
        // As in Envoy: such a range contains no port.
        if start >= end || end > 65536 || start < 0 {
            let reason =
                format!("invalid range {start} to {end}: must be 0 <= start < end <= 65536");
            return Err(reader.refuse("destination_port_range", reason));
        }
        return Ok(Permission::DestinationPorts(start, end));
    }
    Err(reader.refuse("", "unsupported permission"))
}

fn principal(mut reader: MessageReader<'_>, depth: usize) -> Result<Principal, FieldError> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(reader.refuse("", format!("conditions nest deeper than {DEPTH_LIMIT}")));
    };
    if reader.flag("any") == Some(true) {
        return Ok(Principal::Any);
    }
    if let Some(mut set) = reader.child("and_ids") {
        return some(&mut set, "ids", |p| principal(p, depth)).map(Principal::All);
    }
    if let Some(mut set) = reader.child("or_ids") {
        return some(&mut set, "ids", |p| principal(p, depth)).map(Principal::OneOf);
    }
    if let Some(inner) = reader.child("not_id") {
        return principal(inner, depth).map(|p| Principal::Not(Box::new(p)));
    }
    if let Some(mut authenticated) = reader.child("authenticated") {
        let name = authenticated.child("principal_name").map(values::string_match).transpose()?;
        return Ok(Principal::Authenticated(name));
    }
    if let Some(mut path) = reader.child("url_path") {
        return values::string_match(path.required_child("path")?).map(Principal::Path);
    }
    // The PROXY protocol is not supported, so `source_ip` is the same.
    for field in ["direct_remote_ip", "source_ip"] {
        if let Some(range) = reader.child(field) {
            return values::cidr(range).map(Principal::RemoteAddress);
        }
    }
    if let Some(range) = reader.child("remote_ip") {
        return values::cidr(range).map(Principal::ClientAddress);
    }
    if let Some(header) = reader.child("header") {
        return route_match::header(header).map(Principal::Header);
    }
    if let Some(metadata) = reader.child("metadata") {
        return claim(metadata);
    }
    Err(reader.refuse("", "unsupported principal"))
}

/// A claim of a token: metadata of the filter `jwt_authn`. Metadata of other filters is not supported.
fn claim(mut metadata: MessageReader<'_>) -> Result<Principal, FieldError> {
    let filter = metadata.text("filter");
    if filter != TOKENS {
        return Err(
            metadata.refuse("filter", format!("unsupported filter {filter:?}: must be {TOKENS}"))
        );
    }
    if metadata.flag("invert") == Some(true) {
        return Err(metadata.refuse("invert", "not supported: use not_id"));
    }
    let mut path: Vec<String> =
        metadata.children("path").into_iter().map(|mut segment| segment.text("key")).collect();
    if path.len() < 2 || path.iter().any(String::is_empty) {
        let reason =
            "must be the provider's payload_in_metadata, followed by the path to the claim";
        return Err(metadata.refuse("path", reason));
    }
    let name = Name::from(path.remove(0));
    let mut value = metadata.required_child("value")?;
    let wanted = if let Some(mut list) = value.child("list_match") {
        let mut one = list.required_child("one_of")?;
        values::string_match(one.required_child("string_match")?)?
    } else {
        values::string_match(value.required_child("string_match")?)?
    };
    Ok(Principal::Claim(name, path, wanted))
}

/// Encodes the HTTP filter.
pub(super) fn encode(filter: &RbacFilter) -> http::HttpFilter {
    let config = http_rbac::Rbac {
        rules: filter.rules.as_ref().map(encode_rules),
        shadow_rules: filter.shadow.as_ref().map(encode_rules),
        ..http_rbac::Rbac::default()
    };
    http_filter("envoy.filters.http.rbac", pack_any(config))
}

/// Encodes the network filter.
pub(crate) fn encode_network(filter: &RbacFilter) -> listener::Filter {
    let config = network_rbac::Rbac {
        rules: filter.rules.as_ref().map(encode_rules),
        shadow_rules: filter.shadow.as_ref().map(encode_rules),
        stat_prefix: "rbac".into(),
        ..network_rbac::Rbac::default()
    };
    network_filter("envoy.filters.network.rbac", pack_any(config))
}

fn encode_rules(rules: &Rbac) -> pb::Rbac {
    let action = match rules.action {
        RbacAction::Allow => pb::rbac::Action::Allow,
        RbacAction::Deny => pb::rbac::Action::Deny,
        RbacAction::Log => pb::rbac::Action::Log,
    };
    let policy = |policy: &RbacPolicy| pb::Policy {
        permissions: policy.permissions.iter().map(encode_permission).collect(),
        principals: policy.principals.iter().map(encode_principal).collect(),
        ..pb::Policy::default()
    };
    let policies = rules.policies.iter();
    pb::Rbac {
        action: action.into(),
        policies: policies.map(|(name, rules)| (name.to_string(), policy(rules))).collect(),
        ..pb::Rbac::default()
    }
}

fn encode_permission(permission: &Permission) -> pb::Permission {
    use pb::permission::{Rule, Set};
    let set = |all: &[Permission]| Set { rules: all.iter().map(encode_permission).collect() };
    let rule = match permission {
        Permission::Any => Rule::Any(true),
        Permission::All(all) => Rule::AndRules(set(all)),
        Permission::OneOf(any) => Rule::OrRules(set(any)),
        Permission::Not(inner) => Rule::NotRule(encode_permission(inner).into()),
        Permission::Path(path) => Rule::UrlPath(encode_path(path)),
        Permission::PathTemplate(template) => {
            Rule::UriTemplate(values::encode_path_template(template))
        }
        Permission::Header(header) => Rule::Header(route_match::encode_header(header)),
        Permission::DestinationAddress(range) => Rule::DestinationIp(values::encode_cidr(range)),
        Permission::DestinationPort(port) => Rule::DestinationPort((*port).into()),
        Permission::DestinationPorts(start, end) => {
            Rule::DestinationPortRange(types::Int32Range { start: *start, end: *end })
        }
    };
    pb::Permission { rule: Some(rule) }
}

#[expect(deprecated, reason = "`sourced_metadata` replaces `metadata`, but older Envoys lack it")]
fn encode_principal(principal: &Principal) -> pb::Principal {
    use pb::principal::{Authenticated, Identifier, Set};
    let set = |all: &[Principal]| Set { ids: all.iter().map(encode_principal).collect() };
    let identifier = match principal {
        Principal::Any => Identifier::Any(true),
        Principal::All(all) => Identifier::AndIds(set(all)),
        Principal::OneOf(any) => Identifier::OrIds(set(any)),
        Principal::Not(inner) => Identifier::NotId(encode_principal(inner).into()),
        Principal::Authenticated(name) => Identifier::Authenticated(Authenticated {
            principal_name: name.as_ref().map(values::encode_string_match),
        }),
        Principal::Path(path) => Identifier::UrlPath(encode_path(path)),
        Principal::RemoteAddress(range) => Identifier::DirectRemoteIp(values::encode_cidr(range)),
        Principal::ClientAddress(range) => Identifier::RemoteIp(values::encode_cidr(range)),
        Principal::Header(header) => Identifier::Header(route_match::encode_header(header)),
        Principal::Claim(name, path, value) => {
            Identifier::Metadata(encode_claim(name, path, value))
        }
    };
    pb::Principal { identifier: Some(identifier) }
}

fn encode_path(path: &StringMatch) -> PathMatcher {
    let rule = path_matcher::Rule::Path(values::encode_string_match(path));
    PathMatcher { rule: Some(rule) }
}

fn encode_claim(name: &str, path: &[String], value: &StringMatch) -> MetadataMatcher {
    let keys = std::iter::once(name).chain(path.iter().map(String::as_str));
    let segment = |key: &str| PathSegment { segment: Some(path_segment::Segment::Key(key.into())) };
    let pattern = value_matcher::MatchPattern::StringMatch(values::encode_string_match(value));
    MetadataMatcher {
        filter: TOKENS.into(),
        path: keys.map(segment).collect(),
        value: Some(ValueMatcher { match_pattern: Some(pattern) }),
        ..MetadataMatcher::default()
    }
}
