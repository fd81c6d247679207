//! `RouteConfiguration`: virtual hosts, routes and their actions.

use std::sync::Arc;

use weft_model::{
    DEFAULT_ROUTE_TIMEOUT, HeaderMutations, PathMatch, PathRewrite, Redirect, Route, RouteAction,
    RouteTable, Substitution, VirtualHost, WeightedCluster,
};

use super::pb::matcher::RegexMatchAndSubstitute;
use super::pb::{core, route as pb};
use super::{FieldError, MessageReader, mutation, route_match, values};

/// Reads a route table. The name may be empty for a table inside a listener.
pub(super) fn decode(mut table: MessageReader<'_>) -> Result<RouteTable, FieldError> {
    table.harmless(&["validate_clusters"]);
    let name = table.text("name");
    let hosts = table.many("virtual_hosts", virtual_host)?;
    let mut seen = std::collections::HashSet::new();
    for domain in hosts.iter().flat_map(|host: &VirtualHost| &host.domains) {
        if !seen.insert(domain.clone()) {
            return Err(table.refuse("virtual_hosts", format!("duplicate domain {domain:?}")));
        }
    }
    Ok(RouteTable {
        mutations: mutation::decode(&mut table)?,
        most_specific_mutations_win: table
            .flag("most_specific_header_mutations_wins")
            .unwrap_or(false),
        ignores_port: table.flag("ignore_port_in_host_matching").unwrap_or(false),
        ..RouteTable::new(name.into(), hosts)
    })
}

fn virtual_host(mut host: MessageReader<'_>) -> Result<VirtualHost, FieldError> {
    let name = host.text("name").into();
    let domains: Vec<String> =
        host.texts("domains").iter().map(|d| d.to_ascii_lowercase()).collect();
    if domains.is_empty() {
        return Err(host.refuse("domains", "must not be empty: \"*\" matches every host"));
    }
    Ok(VirtualHost {
        name,
        domains,
        routes: values::each(host.children("routes"), route)?,
        mutations: mutation::decode(&mut host)?,
    })
}

fn route(mut route: MessageReader<'_>) -> Result<Route, FieldError> {
    route.harmless(&["metadata", "stat_prefix"]);
    let name = route.text("name").into();
    let matches = route_match::decode(route.required_child("match")?)?;
    let action = if let Some(forward) = route.child("route") {
        let action = forwarding(forward)?;
        let rewrites = matches!(
            &action,
            RouteAction::Forward { path_rewrite: Some(PathRewrite::Prefix(_)), .. }
        );
        if rewrites && matches!(matches.path, PathMatch::Template(_)) {
            let reason = "prefix_rewrite is not supported together with path_match_policy";
            return Err(route.refuse("route", reason));
        }
        action
    } else if let Some(elsewhere) = route.child("redirect") {
        redirect(elsewhere)?
    } else if let Some(answer) = route.child("direct_response") {
        direct(answer)?
    } else {
        return Err(route.refuse("", "one of route, redirect and direct_response must be set"));
    };
    Ok(Route { name, matches, action, mutations: mutation::decode(&mut route)? })
}

fn forwarding(mut action: MessageReader<'_>) -> Result<RouteAction, FieldError> {
    let clusters = if action.has("cluster") {
        vec![WeightedCluster::new(action.required_text("cluster")?.into(), 1)]
    } else if let Some(weighted) = action.child("weighted_clusters") {
        clusters_of_requests(weighted)?
    } else {
        return Err(action.refuse("", "one of cluster and weighted_clusters must be set"));
    };
    let timeout = match action.duration("timeout")? {
        None => Some(DEFAULT_ROUTE_TIMEOUT),
        Some(timeout) => Some(timeout).filter(|t| !t.is_zero()),
    };
    Ok(RouteAction::Forward {
        clusters,
        path_rewrite: path_rewrite(&mut action)?,
        host_rewrite: values::uri_part(&mut action, "host_rewrite_literal")?,
        timeout,
        ends_tunnels: ends_tunnels(&mut action)?,
    })
}

/// The path rewrite of a forwarding or redirect action.
fn path_rewrite(action: &mut MessageReader<'_>) -> Result<Option<PathRewrite>, FieldError> {
    let prefix = values::uri_part(action, "prefix_rewrite")?;
    let Some(mut regex) = action.child("regex_rewrite") else {
        return Ok(prefix.map(PathRewrite::Prefix));
    };
    if prefix.is_some() {
        return Err(action.refuse("regex_rewrite", "must not be set together with prefix_rewrite"));
    }
    let pattern = values::pattern(regex.required_child("pattern")?)?;
    let text = values::uri_part(&mut regex, "substitution")?.unwrap_or_default();
    let substitution = Substitution::parse(pattern, &text);
    let substitution = substitution.map_err(|reason| regex.refuse("substitution", reason))?;
    Ok(Some(PathRewrite::Regex(substitution.into())))
}

/// Whether CONNECT tunnels are terminated. Other upgrade settings of a route are not supported: the connection manager
/// has them for all routes.
fn ends_tunnels(action: &mut MessageReader<'_>) -> Result<bool, FieldError> {
    let mut ends = false;
    for mut upgrade in action.children("upgrade_configs") {
        let kind = upgrade.required_text("upgrade_type")?;
        if upgrade.flag("enabled") == Some(false) {
            let reason = format!("{kind:?} cannot be disabled for a single route");
            return Err(upgrade.refuse("enabled", reason));
        }
        if kind.eq_ignore_ascii_case("connect") {
            ends |= upgrade.child("connect_config").is_some();
        } else if !kind.eq_ignore_ascii_case("websocket") {
            let reason = format!("unsupported upgrade {kind:?}: must be CONNECT or websocket");
            return Err(upgrade.refuse("upgrade_type", reason));
        }
    }
    Ok(ends)
}

/// Reads the weighted clusters of a route.
fn clusters_of_requests(weighted: MessageReader<'_>) -> Result<Vec<WeightedCluster>, FieldError> {
    weighted_clusters(weighted, mutation::decode)
}

/// Reads weighted clusters. `mutations` reads their header changes.
pub(super) fn weighted_clusters(
    mut weighted: MessageReader<'_>,
    mutations: impl Fn(&mut MessageReader<'_>) -> Result<Option<Arc<HeaderMutations>>, FieldError>,
) -> Result<Vec<WeightedCluster>, FieldError> {
    weighted.harmless(&["total_weight"]);
    let clusters = values::each(weighted.children("clusters"), |mut cluster| {
        let weight = cluster.number("weight").unwrap_or(0);
        let name = cluster.required_text("name")?.into();
        Ok(WeightedCluster { name, weight, mutations: mutations(&mut cluster)? })
    })?;
    if clusters.iter().all(|cluster| cluster.weight == 0) {
        return Err(weighted.refuse("clusters", "at least one weight must be above 0"));
    }
    Ok(clusters)
}

fn redirect(mut action: MessageReader<'_>) -> Result<RouteAction, FieldError> {
    let status = match action.choice("response_code").as_str() {
        "FOUND" => 302,
        "SEE_OTHER" => 303,
        "TEMPORARY_REDIRECT" => 307,
        "PERMANENT_REDIRECT" => 308,
        _ => 301,
    };
    let scheme = if action.flag("https_redirect") == Some(true) {
        Some("https".to_owned())
    } else {
        values::uri_part(&mut action, "scheme_redirect")?
    };
    let host = values::uri_part(&mut action, "host_redirect")?;
    let path = values::uri_part(&mut action, "path_redirect")?;
    let path_rewrite = path_rewrite(&mut action)?;
    if path.is_some() && path_rewrite.is_some() {
        return Err(action.refuse("path_redirect", "must not be set together with a path rewrite"));
    }
    let port = match action.number("port_redirect").unwrap_or(0) {
        0 => None,
        port => Some(u16::try_from(port).map_err(|_| {
            action.refuse("port_redirect", format!("invalid port {port}: must be 1 to 65535"))
        })?),
    };
    let strip_query = action.flag("strip_query").unwrap_or(false);
    Ok(RouteAction::Redirect(Redirect {
        status,
        scheme,
        host,
        port,
        path,
        path_rewrite,
        strip_query,
    }))
}

fn direct(mut action: MessageReader<'_>) -> Result<RouteAction, FieldError> {
    let status = action.number("status").unwrap_or(0);
    let status =
        u16::try_from(status).ok().filter(|s| (200..600).contains(s)).ok_or_else(|| {
            action.refuse("status", format!("invalid status {status}: must be 200 to 599"))
        })?;
    let body = match action.child("body") {
        Some(mut body) if body.has("inline_string") => body.text("inline_string"),
        Some(body) => return Err(body.refuse("", "only inline_string is supported")),
        None => String::new(),
    };
    Ok(RouteAction::Respond { status, body })
}

/// Encodes a route table.
pub(super) fn encode(table: &RouteTable) -> pb::RouteConfiguration {
    let headers = mutation::encode(table.mutations.as_deref());
    pb::RouteConfiguration {
        name: table.name.to_string(),
        virtual_hosts: table.hosts.iter().map(encode_host).collect(),
        most_specific_header_mutations_wins: table.most_specific_mutations_win,
        ignore_port_in_host_matching: table.ignores_port,
        request_headers_to_remove: headers.request_remove,
        request_headers_to_add: headers.request_add,
        response_headers_to_remove: headers.response_remove,
        response_headers_to_add: headers.response_add,
        ..pb::RouteConfiguration::default()
    }
}

fn encode_host(host: &VirtualHost) -> pb::VirtualHost {
    let headers = mutation::encode(host.mutations.as_deref());
    pb::VirtualHost {
        // Envoy refuses a host without a name.
        name: if host.name.is_empty() { "host".into() } else { host.name.to_string() },
        domains: host.domains.clone(),
        routes: host.routes.iter().map(encode_route).collect(),
        request_headers_to_remove: headers.request_remove,
        request_headers_to_add: headers.request_add,
        response_headers_to_remove: headers.response_remove,
        response_headers_to_add: headers.response_add,
        ..pb::VirtualHost::default()
    }
}

fn encode_route(route: &Route) -> pb::Route {
    let headers = mutation::encode(route.mutations.as_deref());
    pb::Route {
        name: route.name.to_string(),
        r#match: Some(route_match::encode(&route.matches)),
        action: Some(encode_action(&route.action)),
        request_headers_to_remove: headers.request_remove,
        request_headers_to_add: headers.request_add,
        response_headers_to_remove: headers.response_remove,
        response_headers_to_add: headers.response_add,
        ..pb::Route::default()
    }
}

fn encode_action(action: &RouteAction) -> pb::route::Action {
    match action {
        RouteAction::Forward { clusters, path_rewrite, host_rewrite, timeout, ends_tunnels } => {
            let mut forward = pb::RouteAction {
                timeout: Some(values::duration(timeout.unwrap_or_default())),
                cluster_specifier: Some(encode_clusters(clusters)),
                ..pb::RouteAction::default()
            };
            match path_rewrite {
                None => {}
                Some(PathRewrite::Prefix(prefix)) => forward.prefix_rewrite.clone_from(prefix),
                Some(PathRewrite::Regex(substitution)) => {
                    forward.regex_rewrite = Some(encode_substitution(substitution));
                }
            }
            let host = host_rewrite.clone();
            forward.host_rewrite_specifier =
                host.map(pb::route_action::HostRewriteSpecifier::HostRewriteLiteral);
            if *ends_tunnels {
                let connect = pb::route_action::upgrade_config::ConnectConfig::default();
                forward.upgrade_configs.push(pb::route_action::UpgradeConfig {
                    upgrade_type: "CONNECT".into(),
                    connect_config: Some(connect),
                    ..pb::route_action::UpgradeConfig::default()
                });
            }
            pb::route::Action::Route(forward)
        }
        RouteAction::Redirect(redirect) => pb::route::Action::Redirect(encode_redirect(redirect)),
        RouteAction::Respond { status, body } => {
            let body = core::DataSource {
                specifier: Some(core::data_source::Specifier::InlineString(body.clone())),
                ..core::DataSource::default()
            };
            pb::route::Action::DirectResponse(pb::DirectResponseAction {
                status: (*status).into(),
                body: Some(body),
                ..pb::DirectResponseAction::default()
            })
        }
    }
}

fn encode_clusters(clusters: &[WeightedCluster]) -> pb::route_action::ClusterSpecifier {
    match clusters {
        [only] if only.mutations.is_none() => {
            pb::route_action::ClusterSpecifier::Cluster(only.name.to_string())
        }
        several => {
            let clusters = several.iter().map(encode_cluster).collect();
            let weighted = pb::WeightedCluster { clusters, ..pb::WeightedCluster::default() };
            pb::route_action::ClusterSpecifier::WeightedClusters(weighted)
        }
    }
}

fn encode_cluster(cluster: &WeightedCluster) -> pb::weighted_cluster::ClusterWeight {
    let headers = mutation::encode(cluster.mutations.as_deref());
    pb::weighted_cluster::ClusterWeight {
        name: cluster.name.to_string(),
        weight: values::number(cluster.weight),
        request_headers_to_remove: headers.request_remove,
        request_headers_to_add: headers.request_add,
        response_headers_to_remove: headers.response_remove,
        response_headers_to_add: headers.response_add,
        ..pb::weighted_cluster::ClusterWeight::default()
    }
}

fn encode_redirect(redirect: &Redirect) -> pb::RedirectAction {
    use pb::redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier};
    let code = match redirect.status {
        302 => RedirectResponseCode::Found,
        303 => RedirectResponseCode::SeeOther,
        307 => RedirectResponseCode::TemporaryRedirect,
        308 => RedirectResponseCode::PermanentRedirect,
        _ => RedirectResponseCode::MovedPermanently,
    };
    let rewrite = redirect.path_rewrite.as_ref().map(|rewrite| match rewrite {
        PathRewrite::Prefix(prefix) => PathRewriteSpecifier::PrefixRewrite(prefix.clone()),
        PathRewrite::Regex(substitution) => {
            PathRewriteSpecifier::RegexRewrite(encode_substitution(substitution))
        }
    });
    let path = redirect.path.clone().map(PathRewriteSpecifier::PathRedirect);
    pb::RedirectAction {
        host_redirect: redirect.host.clone().unwrap_or_default(),
        port_redirect: redirect.port.unwrap_or_default().into(),
        response_code: code.into(),
        strip_query: redirect.strip_query,
        scheme_rewrite_specifier: redirect
            .scheme
            .clone()
            .map(SchemeRewriteSpecifier::SchemeRedirect),
        path_rewrite_specifier: path.or(rewrite),
    }
}

fn encode_substitution(substitution: &Substitution) -> RegexMatchAndSubstitute {
    RegexMatchAndSubstitute {
        pattern: Some(values::encode_pattern(substitution.pattern())),
        substitution: substitution.replacement().to_owned(),
    }
}
