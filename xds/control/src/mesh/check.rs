//! From the file as written to the mesh that it means. Every mistake is collected.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use weft_model::{
    Balance, Cidr, HeaderCheck, HeaderMatch, PathMatch, RouteMatch, SpiffeId, StringMatch,
};

use super::{
    Allow, Issuer, Keys, Mesh, Policy, Port, Protocol, Route, Rule, Service, Target, identity, raw,
};

/// A mistake, and where it stands.
pub(super) struct Mistake {
    pub(super) path: String,
    pub(super) reason: String,
}

#[derive(Default)]
struct Mistakes(Vec<Mistake>);

impl Mistakes {
    fn add(&mut self, path: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Mistake { path: path.into(), reason: reason.into() });
    }
}

/// Checks the whole file.
pub(super) fn check(raw: raw::Mesh, folder: &Path) -> Result<Mesh, Vec<Mistake>> {
    let mut mistakes = Mistakes::default();
    if let Err(error) = SpiffeId::parse(&format!("spiffe://{}", raw.trust_domain)) {
        mistakes.add("trust_domain", error.reason);
    }
    let mut service_ranges = Vec::new();
    for (index, text) in raw.service_ranges.iter().enumerate() {
        match Cidr::parse(text) {
            Ok(range) => service_ranges.push(range),
            Err(error) => mistakes.add(format!("service_ranges[{index}]"), error.to_string()),
        }
    }
    let services = services(&raw, &service_ranges, &mut mistakes);
    let routes = routes(&raw, &services, &mut mistakes);
    let issuers = issuers(&raw, folder, &mut mistakes);
    let policies = policies(&raw, &services, &issuers, &mut mistakes);
    for (index, serial) in raw.security.revocations.iter().enumerate() {
        let hex = !serial.is_empty()
            && serial.len() <= 40
            && serial.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex || !serial.len().is_multiple_of(2) {
            mistakes.add(
                format!("security.revocations[{index}]"),
                format!("{serial:?} is no serial number: an even number of hexadecimal digits, at most 40"),
            );
        }
    }
    if !mistakes.0.is_empty() {
        return Err(mistakes.0);
    }
    Ok(Mesh {
        trust_domain: raw.trust_domain,
        service_ranges,
        outbound: raw.outbound,
        services,
        routes,
        issuers,
        policies,
        revocations: raw.security.revocations,
    })
}

fn services(
    raw: &raw::Mesh,
    ranges: &[Cidr],
    mistakes: &mut Mistakes,
) -> BTreeMap<String, Service> {
    let mut services = BTreeMap::new();
    let mut addresses: HashMap<std::net::IpAddr, String> = HashMap::new();
    for (index, service) in raw.services.iter().enumerate() {
        let path = format!("services[{index}]");
        if !is_name(&service.name) {
            mistakes.add(
                format!("{path}.name"),
                format!("{:?} is not 1 to 63 of a-z 0-9 -", service.name),
            );
            continue;
        }
        for (position, address) in service.addresses.iter().enumerate() {
            let path = format!("{path}.addresses[{position}]");
            if let Some(other) = addresses.insert(*address, service.name.clone()) {
                mistakes
                    .add(path.clone(), format!("{address} is the address of {other:?} already"));
            }
            if !ranges.iter().any(|range| range.contains(*address)) {
                mistakes.add(path, format!("{address} lies in none of service_ranges"));
            }
        }
        let ports = ports(service, &path, mistakes);
        let endpoints = endpoints(service, &path, mistakes);
        let balance = match service.balance {
            raw::Balance::RoundRobin => Balance::RoundRobin,
            raw::Balance::LeastRequests => Balance::LeastRequests,
        };
        let checked = Service {
            name: service.name.clone(),
            addresses: service.addresses.clone(),
            ports,
            endpoints,
            balance,
            meshed: service.meshed,
        };
        if services.insert(service.name.clone(), checked).is_some() {
            mistakes
                .add(format!("{path}.name"), format!("there are two services {:?}", service.name));
        }
    }
    services
}

fn ports(service: &raw::Service, path: &str, mistakes: &mut Mistakes) -> Vec<Port> {
    let mut seen = HashSet::new();
    let mut targets = HashSet::new();
    let mut ports = Vec::new();
    for (index, port) in service.ports.iter().enumerate() {
        let path = format!("{path}.ports[{index}]");
        let target = port.target.unwrap_or(port.port);
        let udp = port.protocol == Protocol::Udp;
        if port.port == 0 || target == 0 {
            mistakes.add(path.clone(), "port 0 is no port");
        }
        if (15000..=15099).contains(&target) {
            mistakes.add(
                format!("{path}.target"),
                format!("{target} is among weft's own ports, 15000 to 15099"),
            );
        }
        if !seen.insert((port.port, udp)) {
            mistakes.add(format!("{path}.port"), format!("port {} is there twice", port.port));
        }
        if !targets.insert((target, udp)) {
            mistakes.add(format!("{path}.target"), format!("two ports lead to {target}"));
        }
        ports.push(Port { port: port.port, target, protocol: port.protocol });
    }
    ports
}

fn endpoints(
    service: &raw::Service,
    path: &str,
    mistakes: &mut Mistakes,
) -> Vec<(std::net::IpAddr, u32)> {
    let mut seen = HashSet::new();
    let mut endpoints = Vec::new();
    for (index, endpoint) in service.endpoints.iter().enumerate() {
        let weight = endpoint.weight.unwrap_or(1);
        if weight == 0 {
            mistakes.add(
                format!("{path}.endpoints[{index}].weight"),
                "it is 0; leave the endpoint out instead",
            );
        }
        if !seen.insert(endpoint.address) {
            let reason = format!("{} is there twice", endpoint.address);
            mistakes.add(format!("{path}.endpoints[{index}].address"), reason);
        }
        endpoints.push((endpoint.address, weight));
    }
    endpoints
}

fn routes(
    raw: &raw::Mesh,
    services: &BTreeMap<String, Service>,
    mistakes: &mut Mistakes,
) -> Vec<Route> {
    let mut routes = Vec::new();
    for (index, route) in raw.routes.iter().enumerate() {
        let path = format!("routes[{index}]");
        for (position, parent) in route.parent_refs.iter().enumerate() {
            if !services.contains_key(&parent.name) {
                mistakes.add(
                    format!("{path}.parentRefs[{position}].name"),
                    unknown_service(&parent.name),
                );
            }
        }
        let rules = route
            .rules
            .iter()
            .enumerate()
            .filter_map(|(position, r)| {
                rule(r, &format!("{path}.rules[{position}]"), services, mistakes)
            })
            .collect();
        routes.push(Route {
            name: route.name.clone(),
            parents: route.parent_refs.iter().map(|parent| parent.name.clone()).collect(),
            hostnames: route.hostnames.iter().map(|host| host.to_ascii_lowercase()).collect(),
            rules,
        });
    }
    routes
}

fn rule(
    rule: &raw::Rule,
    path: &str,
    services: &BTreeMap<String, Service>,
    mistakes: &mut Mistakes,
) -> Option<Rule> {
    let mut matches: Vec<RouteMatch> = rule
        .matches
        .iter()
        .enumerate()
        .map(|(index, m)| route_match(m, &format!("{path}.matches[{index}]"), mistakes))
        .collect();
    if matches.is_empty() {
        matches.push(RouteMatch { path: PathMatch::Segments("/".into()), ..RouteMatch::any() });
    }
    let timeout = rule.timeouts.as_ref().and_then(|timeouts| {
        let parsed = duration(&timeouts.request);
        if parsed.is_none() {
            let reason = format!("{:?} is no duration, such as 500ms, 10s or 2m", timeouts.request);
            mistakes.add(format!("{path}.timeouts.request"), reason);
        }
        parsed
    });
    let mut prefix_rewrite = None;
    let mut redirected = None;
    for (index, filter) in rule.filters.iter().enumerate() {
        let path = format!("{path}.filters[{index}]");
        match (filter.kind.as_str(), &filter.url_rewrite, &filter.request_redirect) {
            ("URLRewrite", Some(rewrite), None) => match &rewrite.path.replace_prefix_match {
                Some(prefix) if rewrite.path.kind == "ReplacePrefixMatch" => {
                    prefix_rewrite = Some(prefix.clone())
                }
                _ => mistakes
                    .add(format!("{path}.urlRewrite.path"), "only ReplacePrefixMatch is supported"),
            },
            ("RequestRedirect", None, Some(redirect)) => {
                redirected = Some(to_redirect(redirect, &path, mistakes))
            }
            _ => mistakes.add(
                format!("{path}.type"),
                "URLRewrite and RequestRedirect are supported, with their own field",
            ),
        }
    }
    let target = match redirected {
        Some(redirect) if rule.backend_refs.is_empty() => Target::Redirect(redirect),
        Some(_) => {
            mistakes.add(format!("{path}.backendRefs"), "a redirect goes nowhere else");
            return None;
        }
        None => {
            Target::Backends { backends: backends(rule, path, services, mistakes)?, prefix_rewrite }
        }
    };
    Some(Rule { matches, target, timeout })
}

fn backends(
    rule: &raw::Rule,
    path: &str,
    services: &BTreeMap<String, Service>,
    mistakes: &mut Mistakes,
) -> Option<Vec<(String, u16, u32)>> {
    let mut backends = Vec::new();
    for (index, backend) in rule.backend_refs.iter().enumerate() {
        let path = format!("{path}.backendRefs[{index}]");
        match services.get(&backend.name) {
            None => mistakes.add(format!("{path}.name"), unknown_service(&backend.name)),
            Some(service) if !service.ports.iter().any(|port| port.port == backend.port) => {
                mistakes.add(
                    format!("{path}.port"),
                    format!("{:?} has no port {}", backend.name, backend.port),
                );
            }
            Some(_) => {
                backends.push((backend.name.clone(), backend.port, backend.weight.unwrap_or(1)))
            }
        }
    }
    if backends.iter().all(|(_, _, weight)| *weight == 0) {
        mistakes.add(format!("{path}.backendRefs"), "no backend has a share");
        return None;
    }
    Some(backends)
}

fn route_match(raw: &raw::Match, path: &str, mistakes: &mut Mistakes) -> RouteMatch {
    let path_match = match &raw.path {
        None => PathMatch::Segments("/".into()),
        Some(p) if !p.value.starts_with('/') => {
            mistakes
                .add(format!("{path}.path.value"), format!("{:?} does not start with /", p.value));
            PathMatch::Segments("/".into())
        }
        Some(p) if p.kind == "PathPrefix" => PathMatch::Segments(p.value.clone()),
        Some(p) if p.kind == "Exact" => PathMatch::Exact(p.value.clone()),
        Some(p) => {
            mistakes.add(
                format!("{path}.path.type"),
                format!("{:?} is neither PathPrefix nor Exact", p.kind),
            );
            PathMatch::Segments("/".into())
        }
    };
    let exact = |value: &str| StringMatch::Exact(value.to_owned());
    let mut headers = Vec::new();
    if let Some(method) = &raw.method {
        headers.push(HeaderMatch {
            name: ":method".into(),
            check: HeaderCheck::Value(exact(method)),
            invert: false,
        });
    }
    let mut only_exact = |list: &[raw::ValueMatch], field: &str| {
        for (index, item) in list.iter().enumerate().filter(|(_, item)| item.kind != "Exact") {
            mistakes.add(
                format!("{path}.{field}[{index}].type"),
                format!("{:?} is not supported; Exact is", item.kind),
            );
        }
    };
    only_exact(&raw.headers, "headers");
    only_exact(&raw.query_params, "queryParams");
    headers.extend(raw.headers.iter().map(|header| HeaderMatch {
        name: header.name.to_ascii_lowercase(),
        check: HeaderCheck::Value(exact(&header.value)),
        invert: false,
    }));
    let query = raw
        .query_params
        .iter()
        .map(|parameter| (parameter.name.clone(), exact(&parameter.value)))
        .collect();
    RouteMatch { path: path_match, headers, query }
}

fn to_redirect(
    raw: &raw::RequestRedirect,
    path: &str,
    mistakes: &mut Mistakes,
) -> weft_model::Redirect {
    let status = raw.status_code.unwrap_or(302);
    if ![301, 302, 303, 307, 308].contains(&status) {
        let path = format!("{path}.requestRedirect.statusCode");
        mistakes.add(path, format!("{status} is none of 301, 302, 303, 307, 308"));
    }
    let target = raw.path.as_ref().and_then(|path| path.replace_full_path.clone());
    if raw.path.is_some() && target.is_none() {
        mistakes.add(format!("{path}.requestRedirect.path"), "only ReplaceFullPath is supported");
    }
    weft_model::Redirect {
        status,
        scheme: raw.scheme.clone(),
        host: raw.hostname.clone(),
        path: target,
    }
}

fn issuers(raw: &raw::Mesh, folder: &Path, mistakes: &mut Mistakes) -> BTreeMap<String, Issuer> {
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
                mistakes.add(path, "give jwks_file, or jwks_uri with jwks_address");
                continue;
            }
        };
        let (issuer_claim, audiences) = (issuer.issuer.clone(), issuer.audiences.clone());
        issuers.insert(
            name.clone(),
            Issuer { issuer: issuer_claim, audiences, keys, forward: issuer.forward },
        );
    }
    issuers
}

fn policies(
    raw: &raw::Mesh,
    services: &BTreeMap<String, Service>,
    issuers: &BTreeMap<String, Issuer>,
    mistakes: &mut Mistakes,
) -> Vec<Policy> {
    let mut policies = Vec::new();
    for (index, policy) in raw.security.policies.iter().enumerate() {
        let path = format!("security.policies[{index}]");
        if !services.contains_key(&policy.service) {
            mistakes.add(format!("{path}.service"), unknown_service(&policy.service));
        }
        let mut allow = Vec::new();
        for (position, item) in policy.allow.iter().enumerate() {
            let path = format!("{path}.allow[{position}]");
            if let Some(token) =
                item.token.as_ref().filter(|token| !raw.security.issuers.contains_key(*token))
            {
                mistakes.add(format!("{path}.token"), format!("there is no issuer {token:?}"));
            }
            for (place, prefix) in
                item.paths.iter().enumerate().filter(|(_, p)| !p.starts_with('/'))
            {
                mistakes.add(
                    format!("{path}.paths[{place}]"),
                    format!("{prefix:?} does not start with /"),
                );
            }
            allow.push(Allow {
                from: callers(item, &path, raw, services, mistakes),
                methods: item.methods.clone(),
                paths: item.paths.clone(),
                token: item.token.clone().filter(|token| issuers.contains_key(token)),
            });
        }
        policies.push(Policy { service: policy.service.clone(), allow });
    }
    policies
}

fn callers(
    allow: &raw::Allow,
    path: &str,
    raw: &raw::Mesh,
    services: &BTreeMap<String, Service>,
    mistakes: &mut Mistakes,
) -> Vec<SpiffeId> {
    if allow.from.is_empty() {
        mistakes
            .add(format!("{path}.from"), "it is empty; \"*\" stands for any identity of the mesh");
    }
    if allow.from.iter().any(|from| from == "*") {
        return Vec::new();
    }
    let mut callers = Vec::new();
    for (index, from) in allow.from.iter().enumerate() {
        let id = if from.starts_with("spiffe://") {
            SpiffeId::parse(from).map_err(|error| error.to_string())
        } else if services.contains_key(from) {
            identity(&raw.trust_domain, from).map_err(|error| error.to_string())
        } else {
            Err(unknown_service(from))
        };
        match id {
            Ok(id) => callers.push(id),
            Err(reason) => mistakes.add(format!("{path}.from[{index}]"), reason),
        }
    }
    callers
}

fn unknown_service(name: &str) -> String {
    format!("there is no service {name:?}")
}

fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty() && text.len() <= 63 && text.bytes().all(allowed)
}

fn duration(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().ok()?;
    match text.get(digits.len()..)? {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_secs(number.checked_mul(60)?)),
        "h" => Some(Duration::from_secs(number.checked_mul(3600)?)),
        _ => None,
    }
}
