//! Short paths to the generated protobuf types that resources are encoded with.

pub(super) use envoy_types::pb::envoy::config::accesslog::v3 as access_log;
pub(super) use envoy_types::pb::envoy::config::cluster::v3 as cluster;
pub(super) use envoy_types::pb::envoy::config::core::v3 as core;
pub(super) use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
pub(super) use envoy_types::pb::envoy::config::listener::v3 as listener;
pub(super) use envoy_types::pb::envoy::config::rbac::v3 as rbac;
pub(super) use envoy_types::pb::envoy::config::route::v3 as route;
pub(super) use envoy_types::pb::envoy::extensions::access_loggers::file::v3 as file_log;
pub(super) use envoy_types::pb::envoy::extensions::access_loggers::stream::v3 as stream_log;
pub(super) use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as jwt;
pub(super) use envoy_types::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
pub(super) use envoy_types::pb::envoy::extensions::filters::http::router::v3 as router;
pub(super) use envoy_types::pb::envoy::extensions::filters::listener::original_dst::v3 as original_dst;
pub(super) use envoy_types::pb::envoy::extensions::filters::listener::original_src::v3 as original_src;
pub(super) use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3 as tls_inspector;
pub(super) use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as http;
pub(super) use envoy_types::pb::envoy::extensions::filters::network::rbac::v3 as network_rbac;
pub(super) use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
pub(super) use envoy_types::pb::envoy::extensions::filters::udp::udp_proxy::v3 as udp;
pub(super) use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3 as uri_template;
pub(super) use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
pub(super) use envoy_types::pb::envoy::extensions::upstreams::http::v3 as upstream_http;
pub(super) use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
pub(super) use envoy_types::pb::envoy::r#type::v3 as types;
pub(super) use envoy_types::pb::google::protobuf as google;
pub(super) use envoy_types::pb::xds;
