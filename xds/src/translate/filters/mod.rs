//! Network filters: TCP proxy, UDP proxy, HTTP and RBAC.

#![expect(
    clippy::indexing_slicing,
    reason = "assigning a field of a JSON object made here cannot fail"
)]

mod http;
mod http_ours;
mod http_versions;
mod jwt;
mod jwt_ours;
mod rbac;

pub(super) use http::{http_service, http_service_json};
pub(super) use http_ours::{OurHttp, our_http_json};
pub(super) use rbac::{decode_network as network_rbac, encode_network as network_rbac_json};

use std::time::Duration;

use serde_json::{Value, json};
use weft_model::{FlowKey, SourceAddress, TcpProxy, UdpProxy, WeightedCluster};

use super::{FieldError, MessageReader, route, values};

const TCP: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const UDP: &str = "envoy.extensions.filters.udp.udp_proxy.v3.UdpProxyConfig";
const UDP_ROUTE: &str = "envoy.extensions.filters.udp.udp_proxy.v3.Route";

/// Envoy's defaults.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
const DEFAULT_UDP_IDLE_TIMEOUT: Duration = Duration::from_secs(60);

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

/// The JSON form of `TcpProxy`.
pub(super) fn tcp_proxy_json(tcp: &TcpProxy) -> Value {
    let mut fields = json!({
        "stat_prefix": "tcp",
        "idle_timeout": values::duration(tcp.idle_timeout.unwrap_or_default()),
        "access_log": values::access_log_json(&tcp.access_log),
    });
    match tcp.flow_key {
        FlowKey::FiveTuple => {}
        FlowKey::SourceAddress => fields["hash_policy"] = json!([{"source_ip": {}}]),
        FlowKey::WithSequence => {
            fields["hash_policy"] = json!([{"filter_state": {"key": TCP_SEQUENCE}}]);
        }
    }
    match tcp.clusters.as_slice() {
        [only] => fields["cluster"] = json!(&*only.name),
        several => fields["weighted_clusters"] = route::weighted_clusters_json(several),
    }
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": values::any(TCP, fields)})
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

/// The JSON form of a UDP listener filter.
pub(super) fn udp_proxy_json(udp: &UdpProxy, source: SourceAddress) -> Value {
    let route = values::any(UDP_ROUTE, json!({"cluster": &*udp.cluster}));
    let mut fields = json!({
        "stat_prefix": "udp",
        "idle_timeout": values::duration(udp.idle_timeout),
        "access_log": values::access_log_json(&udp.access_log),
        "matcher": {"on_no_match": {"action": {"name": "route", "typed_config": route}}},
    });
    if udp.flow_key == FlowKey::SourceAddress {
        fields["hash_policies"] = json!([{"source_ip": true}]);
    }
    if source == SourceAddress::Client {
        fields["use_original_src_ip"] = json!(true);
    }
    json!({"name": "envoy.filters.udp_listener.udp_proxy", "typed_config": values::any(UDP, fields)})
}
