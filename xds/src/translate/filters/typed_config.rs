//! Filters of each kind: a name and a typed configuration.

use super::super::pb::{google, http, listener};

/// An HTTP filter.
pub(super) fn http_filter(name: &str, config: google::Any) -> http::HttpFilter {
    let config = http::http_filter::ConfigType::TypedConfig(config);
    http::HttpFilter { name: name.into(), config_type: Some(config), ..http::HttpFilter::default() }
}

/// A network filter.
pub(crate) fn network_filter(name: &str, config: google::Any) -> listener::Filter {
    let config = listener::filter::ConfigType::TypedConfig(config);
    listener::Filter { name: name.into(), config_type: Some(config) }
}

/// A listener filter.
pub(crate) fn listener_filter(name: &str, config: google::Any) -> listener::ListenerFilter {
    let config = listener::listener_filter::ConfigType::TypedConfig(config);
    listener::ListenerFilter {
        name: name.into(),
        config_type: Some(config),
        ..listener::ListenerFilter::default()
    }
}
