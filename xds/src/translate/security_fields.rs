//! Messages and fields that are relevant for security: a resource is rejected when one of them is not supported.

/// Packages whose messages decide which peers are trusted, which requests are allowed, or what a rule matches. An
/// unsupported field in one of them, or in a message inside it, rejects the resource.
const SECURITY_PACKAGES: &[&str] = &[
    "envoy.config.rbac.v3.",
    "envoy.extensions.filters.http.api_key_auth.v3.",
    "envoy.extensions.filters.http.basic_auth.v3.",
    "envoy.extensions.filters.http.ext_authz.v3.",
    "envoy.extensions.filters.http.jwt_authn.v3.",
    "envoy.extensions.filters.http.oauth2.v3.",
    "envoy.extensions.filters.http.rbac.v3.",
    "envoy.extensions.filters.network.ext_authz.v3.",
    "envoy.extensions.filters.network.rbac.v3.",
    "envoy.extensions.transport_sockets.tls.v3.",
    "envoy.type.matcher.v3.",
    "xds.type.matcher.v3.",
];

/// Messages of other packages that are relevant for security.
const SECURITY_MESSAGES: &[&str] = &[
    "envoy.config.core.v3.CidrRange",
    "envoy.config.listener.v3.FilterChainMatch",
    "envoy.config.route.v3.HeaderMatcher",
    "envoy.config.route.v3.QueryParameterMatcher",
    "envoy.config.route.v3.RouteMatch",
];

/// Fields of other messages that are relevant for security: a resource that sets one is rejected. `Message.field`,
/// without the package.
pub(super) const SECURITY_FIELDS: &[&str] = &[
    "ClusterWeight.typed_per_filter_config",
    "FilterChain.use_proxy_proto",
    "HttpConnectionManager.early_header_mutation_extensions",
    "HttpConnectionManager.forward_client_cert_matcher",
    "HttpConnectionManager.forward_proto_config",
    "HttpConnectionManager.original_ip_detection_extensions",
    "HttpConnectionManager.path_normalization_options",
    "HttpConnectionManager.scheme_header_transformation",
    "HttpConnectionManager.strip_trailing_host_dot",
    "HttpConnectionManager.typed_header_validation_config",
    "Listener.filter_chain_matcher",
    "Route.route_specifiers",
    "Route.typed_per_filter_config",
    "RouteAction.append_x_forwarded_host",
    "RouteConfiguration.ignore_path_parameters_in_path_matching",
    "RouteConfiguration.internal_only_headers",
    "RouteConfiguration.route_specifiers",
    "RouteConfiguration.typed_per_filter_config",
    "RouteConfiguration.vhost_header",
    "UpstreamHttpProtocolOptions.auto_san_validation",
    "VirtualHost.matcher",
    "VirtualHost.require_tls",
    "VirtualHost.route_specifiers",
    "VirtualHost.typed_per_filter_config",
];

/// Whether a message is relevant for security.
pub(super) fn is_security(message: &str) -> bool {
    SECURITY_PACKAGES.iter().any(|package| message.starts_with(package))
        || SECURITY_MESSAGES.contains(&message)
}
