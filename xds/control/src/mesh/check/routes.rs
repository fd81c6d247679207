//! Checks the routes: each reference must exist, and each value must be one that sidecars can serve.

use std::collections::BTreeMap;

use weft_model::path::{PathReadings, canonical};
use weft_model::{
    HeaderMatch, PathMatch, QueryCheck, QueryMatch, RouteMatch, StringMatch, has_query_or_fragment,
    is_header_name, is_uri_part,
};

use super::diagnostics::{Diagnostics, unknown_service};
use crate::mesh::{
    MeshRoute, Port, Protocol, RouteParent, RouteRule, RouteTarget, Service, duration, raw,
};

/// Checks the routes.
pub(super) fn routes(
    raw: &raw::RawMesh,
    services: &BTreeMap<String, Service>,
    errors: &mut Diagnostics,
) -> Vec<MeshRoute> {
    let mut routes = Vec::new();
    for (index, route) in raw.routes.iter().enumerate() {
        let path = format!("routes[{index}]");
        for (position, parent) in route.parent_refs.iter().enumerate() {
            let path = format!("{path}.parentRefs[{position}]");
            match services.get(&parent.name) {
                None => {
                    let reason = unknown_service(&parent.name);
                    errors.add_reference(&parent.name, format!("{path}.name"), reason);
                }
                Some(service) => parent_port(parent, service, &path, errors),
            }
        }
        let rules = route
            .rules
            .iter()
            .enumerate()
            .filter_map(|(position, r)| {
                rule(r, &format!("{path}.rules[{position}]"), services, errors)
            })
            .collect();
        routes.push(MeshRoute {
            name: route.name.clone(),
            parents: route
                .parent_refs
                .iter()
                .map(|parent| RouteParent { service: parent.name.clone(), port: parent.port })
                .collect(),
            hostnames: route.hostnames.iter().map(|host| host.to_ascii_lowercase()).collect(),
            rules,
        });
    }
    routes
}

/// Checks that a route applies to at least one HTTP port.
fn parent_port(
    parent: &raw::RawParentRef,
    service: &Service,
    path: &str,
    errors: &mut Diagnostics,
) {
    let is_selected = |port: &&Port| parent.port.is_none_or(|number| number == port.port);
    let mut ports = service.ports.iter().filter(is_selected).peekable();
    let is_missing = ports.peek().is_none();
    let is_routed = |port: &Port| !matches!(port.protocol, Protocol::Tcp | Protocol::Udp);
    if ports.any(is_routed) {
        return;
    }
    let name = &parent.name;
    match parent.port {
        Some(number) if is_missing => errors.add_reference(
            name,
            format!("{path}.port"),
            format!("invalid port {number}: service {name:?} has no such port"),
        ),
        Some(number) => errors.add_reference(
            name,
            format!("{path}.port"),
            format!("invalid port {number}: must be an http, http2 or grpc port"),
        ),
        None => errors.add_reference(
            name,
            format!("{path}.name"),
            format!("invalid service {name:?}: must have an http, http2 or grpc port"),
        ),
    }
}

fn rule(
    rule: &raw::RawRule,
    path: &str,
    services: &BTreeMap<String, Service>,
    errors: &mut Diagnostics,
) -> Option<RouteRule> {
    let mut matches: Vec<RouteMatch> = rule
        .matches
        .iter()
        .enumerate()
        .map(|(index, m)| route_match(m, &format!("{path}.matches[{index}]"), errors))
        .collect();
    if matches.is_empty() {
        matches.push(RouteMatch::any());
    }
    let timeout = rule.timeouts.as_ref().and_then(|timeouts| {
        let text = &timeouts.request;
        let parsed = duration::parse(text);
        if parsed.is_none() {
            let reason = format!("invalid duration {text:?}: must be {}", duration::ACCEPTED);
            errors.add(format!("{path}.timeouts.request"), reason);
        }
        parsed
    });
    let mut prefix_replacement = None;
    let mut redirected = None;
    for (index, filter) in rule.filters.iter().enumerate() {
        let path = format!("{path}.filters[{index}]");
        match (filter.kind.as_str(), &filter.url_rewrite, &filter.request_redirect) {
            ("URLRewrite", Some(rewrite), None) => match &rewrite.path.replace_prefix_match {
                Some(prefix) if rewrite.path.kind == "ReplacePrefixMatch" => {
                    // An empty replacement counts as `/`.
                    if !prefix.is_empty() {
                        let path = format!("{path}.urlRewrite.path.replacePrefixMatch");
                        check_path(prefix, path, errors);
                    }
                    prefix_replacement = Some(prefix.clone())
                }
                _ => errors
                    .add(format!("{path}.urlRewrite.path"), "invalid path modifier: must be ReplacePrefixMatch with replacePrefixMatch"),
            },
            ("RequestRedirect", None, Some(redirect)) => {
                redirected = Some(to_redirect(redirect, &path, errors))
            }
            _ => errors.add(
                format!("{path}.type"),
                "invalid filter: must be URLRewrite with urlRewrite, or RequestRedirect with requestRedirect",
            ),
        }
    }
    let target = match redirected {
        Some(redirect) if rule.backend_refs.is_empty() => RouteTarget::Redirect(redirect),
        Some(_) => {
            errors.add(
                format!("{path}.backendRefs"),
                "must be empty in a rule with a RequestRedirect filter",
            );
            return None;
        }
        None => {
            let backends = backends(rule, path, services, errors)?;
            RouteTarget::Backends { backends, prefix_replacement }
        }
    };
    Some(RouteRule { matches, target, timeout })
}

fn backends(
    rule: &raw::RawRule,
    path: &str,
    services: &BTreeMap<String, Service>,
    errors: &mut Diagnostics,
) -> Option<Vec<(String, u16, u32)>> {
    let mut backends = Vec::new();
    for (index, backend) in rule.backend_refs.iter().enumerate() {
        let path = format!("{path}.backendRefs[{index}]");
        match services.get(&backend.name) {
            None => {
                let reason = unknown_service(&backend.name);
                errors.add_reference(&backend.name, format!("{path}.name"), reason);
            }
            Some(service) if !service.ports.iter().any(|port| port.port == backend.port) => {
                errors.add_reference(
                    &backend.name,
                    format!("{path}.port"),
                    format!(
                        "unknown port {}: service {:?} has no such port",
                        backend.port, backend.name
                    ),
                );
            }
            Some(service) if !service.ports.iter().any(|port| takes_requests(port, backend)) => {
                let number = backend.port;
                let reason = format!("invalid port {number}: must not be a udp port");
                errors.add_reference(&backend.name, format!("{path}.port"), reason);
            }
            Some(_) => {
                backends.push((backend.name.clone(), backend.port, backend.weight.unwrap_or(1)))
            }
        }
    }
    let has_weight = rule.backend_refs.iter().any(|backend| backend.weight != Some(0));
    if !has_weight {
        errors
            .add(format!("{path}.backendRefs"), "at least one backend must have a weight above 0");
        return None;
    }
    Some(backends)
}

/// Whether this is the port of the backend, and routes can forward to it.
fn takes_requests(port: &Port, backend: &raw::RawBackendRef) -> bool {
    port.port == backend.port && port.protocol != Protocol::Udp
}

fn route_match(raw: &raw::RawMatch, path: &str, errors: &mut Diagnostics) -> RouteMatch {
    let path_match = path_match(raw.path.as_ref(), &format!("{path}.path"), errors);
    names(raw, path, errors);
    let exact = |value: &str| StringMatch::Exact(value.to_owned());
    let mut headers = Vec::new();
    if let Some(method) = &raw.method {
        // Case-insensitive, as in policies.
        let method = StringMatch::ExactIgnoreCase(method.clone());
        headers.push(HeaderMatch::new(":method", method));
    }
    let mut only_exact = |list: &[raw::RawValueMatch], field: &str| {
        for (index, item) in list.iter().enumerate().filter(|(_, item)| item.kind != "Exact") {
            errors.add(
                format!("{path}.{field}[{index}].type"),
                format!("invalid type {:?}: must be Exact", item.kind),
            );
        }
    };
    only_exact(&raw.headers, "headers");
    only_exact(&raw.query_params, "queryParams");
    headers.extend(
        raw.headers.iter().map(|header| {
            HeaderMatch::new(&header.name.to_ascii_lowercase(), exact(&header.value))
        }),
    );
    let query = raw
        .query_params
        .iter()
        .map(|parameter| QueryMatch {
            name: parameter.name.clone(),
            check: QueryCheck::Value(exact(&parameter.value)),
        })
        .collect();
    RouteMatch { path: path_match, headers, query }
}

/// The path of a match. `path` is its field path.
fn path_match(raw: Option<&raw::RawPathMatch>, path: &str, errors: &mut Diagnostics) -> PathMatch {
    // Envoy has no `/` for whole segments, and every path begins with it.
    let any = || PathMatch::Prefix("/".into());
    let Some(raw) = raw else { return any() };
    check_path(&raw.value, format!("{path}.value"), errors);
    match raw.kind.as_str() {
        "PathPrefix" => match raw.value.trim_end_matches('/') {
            "" => any(),
            prefix => PathMatch::Segments(prefix.to_owned()),
        },
        "Exact" => PathMatch::Exact(raw.value.clone()),
        other => {
            let reason = format!("invalid type {other:?}: must be PathPrefix or Exact");
            errors.add(format!("{path}.type"), reason);
            any()
        }
    }
}

/// Checks a path that requests are matched by or sent to: a sidecar must be able to receive and route such a request.
fn check_path(text: &str, path: String, errors: &mut Diagnostics) {
    if let Some(reason) = path_fault(text) {
        errors.add(path, format!("invalid path {text:?}: {reason}"));
    }
}

/// Why no request can be served that has this path, with what is accepted instead.
fn path_fault(path: &str) -> Option<String> {
    if !path.starts_with('/') || has_query_or_fragment(path) {
        return Some("must start with / and contain no ? or #".to_owned());
    }
    if !has_whole_escapes(path) {
        return Some("% must be followed by two hexadecimal digits; write %25 for %".to_owned());
    }
    if path.contains("%00") || path.contains('\\') {
        return Some("must not contain %00 or a backslash".to_owned());
    }
    if !is_uri_part(path) {
        let accepted = "must consist of printable ASCII characters without blanks";
        return Some(format!("{accepted}; write {:?}", canonical(path)));
    }
    (!may_be_routed(path)).then(|| {
        format!(
            "can never match: requests are routed without dot segments and empty segments; write {:?}",
            canonical(path)
        )
    })
}

/// Whether each `%` has two hexadecimal digits behind it.
fn has_whole_escapes(path: &str) -> bool {
    path.split('%').skip(1).all(|rest| {
        rest.as_bytes().get(..2).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

/// Whether a request may have this path in the form that requests are routed by.
fn may_be_routed(path: &str) -> bool {
    let readings = PathReadings::of(path);
    let routed = readings.as_ref().and_then(|readings| readings.get(0));
    routed.is_none_or(|reading| reading.fits(&mut |spelling| spelling == path))
}

/// Checks the names of the method, headers and query parameters of a match.
fn names(raw: &raw::RawMatch, path: &str, errors: &mut Diagnostics) {
    if let Some(method) = raw.method.as_ref().filter(|method| !is_header_name(method)) {
        let reason = format!("invalid method {method:?}: must be a method name, such as GET");
        errors.add(format!("{path}.method"), reason);
    }
    for (index, header) in raw.headers.iter().enumerate() {
        let name = &header.name;
        if !is_header_name(name.strip_prefix(':').unwrap_or(name)) {
            let reason =
                format!("invalid header name {name:?}: must be a header name, such as x-version");
            errors.add(format!("{path}.headers[{index}].name"), reason);
        }
    }
    for (index, _) in raw.query_params.iter().enumerate().filter(|(_, item)| item.name.is_empty()) {
        let reason = "invalid name \"\": must be the name of a query parameter";
        errors.add(format!("{path}.queryParams[{index}].name"), reason);
    }
}

fn to_redirect(
    raw: &raw::RawRequestRedirect,
    path: &str,
    errors: &mut Diagnostics,
) -> weft_model::Redirect {
    let status = raw.status_code.unwrap_or(302);
    if ![301, 302, 303, 307, 308].contains(&status) {
        let path = format!("{path}.requestRedirect.statusCode");
        let accepted = "must be 301, 302, 303, 307 or 308";
        errors.add(path, format!("invalid status code {status}: {accepted}"));
    }
    let target = raw.path.as_ref().and_then(|path| path.replace_full_path.clone());
    if raw.path.is_some() && target.is_none() {
        errors.add(
            format!("{path}.requestRedirect.path"),
            "invalid path modifier: must be ReplaceFullPath with replaceFullPath",
        );
    }
    if let Some(target) = &target {
        let path = format!("{path}.requestRedirect.path.replaceFullPath");
        check_path(target, path, errors);
    }
    if let Some(scheme) =
        raw.scheme.as_ref().filter(|scheme| !["http", "https"].contains(&&***scheme))
    {
        let reason = format!("invalid scheme {scheme:?}: must be http or https");
        errors.add(format!("{path}.requestRedirect.scheme"), reason);
    }
    if let Some(host) = raw.hostname.as_ref().filter(|host| host.is_empty() || !is_uri_part(host)) {
        let reason =
            format!("invalid host name {host:?}: must be a host name, such as web.example");
        errors.add(format!("{path}.requestRedirect.hostname"), reason);
    }
    weft_model::Redirect {
        status,
        scheme: raw.scheme.clone(),
        host: raw.hostname.clone(),
        port: None,
        path: target,
        path_rewrite: None,
        strip_query: false,
    }
}
