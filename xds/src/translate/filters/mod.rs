//! Network filters: TCP proxy, UDP proxy, HTTP and RBAC.

mod http;
mod http_ours;
mod http_versions;
mod jwt;
mod jwt_ours;
mod rbac;
mod typed_config;

pub(super) use http::{encode_http_service, http_service};
pub(super) use http_ours::{OurHttp, encode_our_http};
pub(super) use rbac::{decode_network as network_rbac, encode_network as encode_network_rbac};
pub(super) use typed_config::{listener_filter, network_filter};

use std::time::Duration;

use envoy_types::util::pack_any;
use weft_model::{FlowKey, SourceAddress, TcpProxy, UdpProxy, WeightedCluster};

use super::pb::xds::core::v3::TypedExtensionConfig;
use super::pb::xds::r#type::matcher::v3::{Matcher, matcher};
use super::pb::{listener, tcp, types, udp};
use super::{FieldError, MessageReader, route, values};

const UDP_ROUTE: &str = "envoy.extensions.filters.udp.udp_proxy.v3.Route";

/// Envoy's defaults.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
const DEFAULT_UDP_IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// The name of the TCP proxy.
pub(super) const TCP_PROXY: &str = "envoy.filters.network.tcp_proxy";

/// Reads `TcpProxy`.
pub(super) fn tcp_proxy(mut filter: MessageReader<'_>) -> Result<TcpProxy, FieldError> {
    filter.harmless(&["stat_prefix"]);
    let flow_key = flow_key(filter.children("hash_policy"), |policy| {
        if policy.child("source_ip").is_some() {
            return Ok(FlowKey::SourceAddress);
        }
        let key = policy.child("filter_state").map(|mut state| state.text("key"));
        let is_sequence = key.is_some_and(|key| key == TCP_SEQUENCE);
        let supported = format!("source_ip or filter_state {TCP_SEQUENCE}");
        if is_sequence { Ok(FlowKey::WithSequence) } else { Err(supported) }
    })?;
    let clusters = if filter.has("cluster") {
        vec![WeightedCluster::new(filter.required_text("cluster")?.into(), 1)]
    } else if let Some(weighted) = filter.child("weighted_clusters") {
        route::weighted_clusters(weighted, |_| Ok(None))?
    } else {
        return Err(filter.refuse("", "one of cluster and weighted_clusters must be set"));
    };
    let idle_timeout = match filter.duration("idle_timeout")? {
        None => Some(DEFAULT_IDLE_TIMEOUT),
        Some(timeout) => Some(timeout).filter(|t| !t.is_zero()),
    };
    Ok(TcpProxy { clusters, idle_timeout, flow_key, access_log: values::access_log(&mut filter)? })
}

/// The filter state of a hash policy by the sequence number of the SYN.
const TCP_SEQUENCE: &str = "weft.tcp_sequence";

/// The flow key of the hash policies; without any, the 5-tuple.
fn flow_key(
    policies: Vec<MessageReader<'_>>,
    read: impl Fn(&mut MessageReader<'_>) -> Result<FlowKey, String>,
) -> Result<FlowKey, FieldError> {
    let mut key = FlowKey::FiveTuple;
    for mut policy in policies {
        key = read(&mut policy).map_err(|supported| {
            let reason = format!(
                "unsupported hash policy: must be {supported}; without one, the 5-tuple is hashed"
            );
            policy.refuse("", reason)
        })?;
    }
    Ok(key)
}

/// Encodes `TcpProxy`.
pub(super) fn encode_tcp_proxy(proxy: &TcpProxy) -> listener::Filter {
    use types::hash_policy::{FilterState, PolicySpecifier, SourceIp};
    let policy = match proxy.flow_key {
        FlowKey::FiveTuple => None,
        FlowKey::SourceAddress => Some(PolicySpecifier::SourceIp(SourceIp::default())),
        FlowKey::WithSequence => {
            Some(PolicySpecifier::FilterState(FilterState { key: TCP_SEQUENCE.into() }))
        }
    };
    let hash = policy.map(|policy| types::HashPolicy { policy_specifier: Some(policy) });
    let config = tcp::TcpProxy {
        stat_prefix: "tcp".into(),
        idle_timeout: Some(values::duration(proxy.idle_timeout.unwrap_or_default())),
        access_log: values::encode_access_log(&proxy.access_log),
        hash_policy: hash.into_iter().collect(),
        cluster_specifier: Some(encode_clusters(&proxy.clusters)),
        ..tcp::TcpProxy::default()
    };
    network_filter(TCP_PROXY, pack_any(config))
}

fn encode_clusters(clusters: &[WeightedCluster]) -> tcp::tcp_proxy::ClusterSpecifier {
    use tcp::tcp_proxy::weighted_cluster::ClusterWeight;
    let weighted = |cluster: &WeightedCluster| ClusterWeight {
        name: cluster.name.to_string(),
        weight: cluster.weight,
        ..ClusterWeight::default()
    };
    match clusters {
        [only] => tcp::tcp_proxy::ClusterSpecifier::Cluster(only.name.to_string()),
        several => {
            let clusters = several.iter().map(weighted).collect();
            let weighted = tcp::tcp_proxy::WeightedCluster { clusters };
            tcp::tcp_proxy::ClusterSpecifier::WeightedClusters(weighted)
        }
    }
}

/// Reads `UdpProxyConfig`.
pub(super) fn udp_proxy(mut filter: MessageReader<'_>) -> Result<UdpProxy, FieldError> {
    filter.harmless(&["stat_prefix"]);
    let flow_key = flow_key(filter.children("hash_policies"), |policy| {
        let is_by_source = policy.flag("source_ip").unwrap_or(false);
        if is_by_source { Ok(FlowKey::SourceAddress) } else { Err("source_ip".into()) }
    })?;
    let idle_timeout = filter.duration("idle_timeout")?.unwrap_or(DEFAULT_UDP_IDLE_TIMEOUT);
    let access_log = values::access_log(&mut filter)?;
    if filter.has("cluster") {
        return Ok(UdpProxy {
            cluster: filter.required_text("cluster")?.into(),
            idle_timeout,
            flow_key,
            access_log,
        });
    }
    let mut matcher = filter.required_child("matcher")?;
    let mut otherwise = matcher.required_child("on_no_match")?;
    let mut action = otherwise.required_child("action")?;
    action.harmless(&["name"]);
    match action.any("typed_config")? {
        Some(mut route) if route.kind() == UDP_ROUTE => Ok(UdpProxy {
            cluster: route.required_text("cluster")?.into(),
            idle_timeout,
            flow_key,
            access_log,
        }),
        _ => Err(action.refuse("typed_config", format!("must be {UDP_ROUTE}"))),
    }
}

/// Encodes a UDP listener filter.
pub(super) fn encode_udp_proxy(
    proxy: &UdpProxy,
    source: SourceAddress,
) -> listener::ListenerFilter {
    use udp::udp_proxy_config::hash_policy::PolicySpecifier;
    use udp::udp_proxy_config::{HashPolicy, RouteSpecifier};
    let action = TypedExtensionConfig {
        name: "route".into(),
        typed_config: Some(pack_any(udp::Route { cluster: proxy.cluster.to_string() })),
    };
    let otherwise = matcher::OnMatch {
        on_match: Some(matcher::on_match::OnMatch::Action(action)),
        ..matcher::OnMatch::default()
    };
    let route = Matcher { on_no_match: Some(otherwise.into()), ..Matcher::default() };
    let by_source = HashPolicy { policy_specifier: Some(PolicySpecifier::SourceIp(true)) };
    let is_by_source = proxy.flow_key == FlowKey::SourceAddress;
    let config = udp::UdpProxyConfig {
        stat_prefix: "udp".into(),
        idle_timeout: Some(values::duration(proxy.idle_timeout)),
        access_log: values::encode_access_log(&proxy.access_log),
        route_specifier: Some(RouteSpecifier::Matcher(route)),
        hash_policies: is_by_source.then_some(by_source).into_iter().collect(),
        use_original_src_ip: source == SourceAddress::Client,
        ..udp::UdpProxyConfig::default()
    };
    listener_filter("envoy.filters.udp_listener.udp_proxy", pack_any(config))
}
