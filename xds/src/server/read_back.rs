//! Decides which resources are decoded again after encoding, to check that data planes accept them. Decoding costs more
//! than encoding, and a control plane with thousands of services encodes hundreds of thousands of resources.

use weft_model::{
    Cluster, Discovery, Filter, FilterChain, Listener, RouteAction, RouteMatch, RouteSource,
    RouteTable, VirtualHost,
};

use crate::translate::Resource;

/// Whether a resource contains user-provided text, which a data plane might reject. Other resources consist of numbers
/// and of names that were validated before. Debug builds decode all resources.
pub(super) fn is_needed(resource: &Resource) -> bool {
    match resource {
        Resource::Endpoints(..) => false,
        Resource::Cluster(cluster) => cluster_needs_check(cluster),
        Resource::Listener(listener) => listener_needs_check(listener),
        Resource::Routes(table) => !forwards_all(table),
        Resource::Secret(..) => true,
    }
}

/// Clusters outside the mesh have user-provided host names.
fn cluster_needs_check(cluster: &Cluster) -> bool {
    let is_outside = cluster.tls.as_ref().is_some_and(|tls| tls.identity.is_none());
    match cluster.discovery {
        Discovery::Dns(_) => true,
        Discovery::Endpoints(_) | Discovery::Static(_) | Discovery::OriginalDestination => {
            is_outside
        }
    }
}

/// Listeners contain policies and TLS settings.
fn listener_needs_check(listener: &Listener) -> bool {
    let needs_check = |chain: &FilterChain| {
        let has_policy = match &chain.filter {
            Filter::Tcp(_) => false,
            Filter::Http(http) => {
                !http.filters.is_empty() || !matches!(http.routes, RouteSource::Named(_))
            }
        };
        has_policy || chain.tls.is_some() || !chain.rules.is_empty()
    };
    listener.all_chains().any(needs_check)
}

/// Whether a table has only the default route that every service has.
fn forwards_all(table: &RouteTable) -> bool {
    let is_plain = |host: &VirtualHost| {
        host.domains == ["*"]
            && host.mutations.is_none()
            && host.routes.iter().all(|route| {
                let forwards = match &route.action {
                    RouteAction::Forward { path_rewrite, host_rewrite, .. } => {
                        path_rewrite.is_none() && host_rewrite.is_none()
                    }
                    RouteAction::Redirect(_) | RouteAction::Respond { .. } => false,
                };
                forwards && route.mutations.is_none() && route.matches == RouteMatch::any()
            })
    };
    table.hosts.iter().all(is_plain)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};
    use weft_model::{HttpFilter, RbacFilter, VirtualHost};

    use super::*;
    use crate::translate::{self, ResourceKind};

    /// A resource from its JSON form.
    fn read(kind: ResourceKind, json: Value) -> Resource {
        let bytes = crate::descriptor::encode_json(kind.message(), json);
        translate::decode(kind, &bytes).expect("a good resource").resource
    }

    fn cluster(fields: Value) -> Resource {
        let mut json = fields;
        json["name"] = "c".into();
        read(ResourceKind::Cluster, json)
    }

    #[test]
    fn clusters_with_user_provided_host_names_are_read_back() {
        let static_hosts = json!({"type": "STATIC", "loadAssignment": {"clusterName": "c"}});
        assert!(!is_needed(&cluster(static_hosts)));
        let eds = json!({"type": "EDS", "edsClusterConfig": {"edsConfig": {"ads": {}}}});
        assert!(!is_needed(&cluster(eds)));
        let address = json!({"socketAddress": {"address": "keys.test", "portValue": 443}});
        let members = json!([{"lbEndpoints": [{"endpoint": {"address": address}}]}]);
        let dns = json!({"type": "STRICT_DNS",
            "loadAssignment": {"clusterName": "c", "endpoints": members}});
        assert!(is_needed(&cluster(dns)));
    }

    #[test]
    fn route_tables_other_than_the_default_are_read_back() {
        let host = |domain: &str, prefix: &str| {
            json!({"name": "h", "domains": [domain], "routes": [
                {"match": {"prefix": prefix}, "route": {"cluster": "c"}}]})
        };
        let table = |host| read(ResourceKind::Routes, json!({"name": "r", "virtualHosts": [host]}));
        assert!(!is_needed(&table(host("*", "/"))));
        assert!(is_needed(&table(host("web.test", "/"))));
        assert!(is_needed(&table(host("*", "/api"))));
        let Resource::Routes(plain) = table(host("*", "/")) else { panic!("routes") };
        let mut answers = RouteTable::clone(&plain);
        for route in answers.hosts.iter_mut().flat_map(|host: &mut VirtualHost| &mut host.routes) {
            route.action = RouteAction::Respond { status: 200, body: "text".into() };
        }
        assert!(is_needed(&Resource::Routes(answers.into())));
    }

    #[test]
    fn listeners_with_policies_or_inline_routes_are_read_back() {
        let routes = json!({"routeConfigName": "r", "configSource": {"ads": {}}});
        let manager = json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "statPrefix": "s", "rds": routes, "httpFilters": [{"name": "router", "typedConfig":
                {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]});
        let address = json!({"socketAddress": {"address": "10.0.0.1", "portValue": 80}});
        let plain = read(
            ResourceKind::Listener,
            json!({"name": "l", "address": address, "filterChains": [
                {"filters": [{"name": "http", "typedConfig": manager}]}]}),
        );
        assert!(!is_needed(&plain));
        let Resource::Listener(plain) = plain else { panic!("a listener") };
        let with = |change: &dyn Fn(&mut weft_model::HttpService)| {
            let mut listener = Listener::clone(&plain);
            for chain in listener.chains.iter_mut().chain(&mut listener.default_chain) {
                let Filter::Http(http) = &mut chain.filter else { panic!("HTTP") };
                change(Arc::make_mut(http));
            }
            Resource::Listener(listener.into())
        };
        let policy = RbacFilter { rules: None, shadow: None };
        let policy = HttpFilter::Rbac(policy.into());
        assert!(is_needed(&with(&|http| http.filters.push(policy.clone()))));
        let table = Arc::new(RouteTable::new("r".into(), Vec::new()));
        assert!(is_needed(&with(&|http| http.routes = RouteSource::Inline(table.clone()))));
    }
}
