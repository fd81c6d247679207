//! `Listener`: an address, and the filter chains that serve it.

#![expect(
    clippy::indexing_slicing,
    reason = "assigning a field of a JSON object made here cannot fail"
)]

use std::sync::Arc;

use serde_json::{Value, json};
use weft_model::{
    ChainMatch, Cidr, Filter, FilterChain, IdleEnd, Listener, RbacFilter, SourceAddress, Transport,
    TransportKind, UdpProxy,
};

use super::filters::OurHttp;
use super::reader::MISSING;
use super::{FieldError, MessageReader, filters, secret, values};

const ORIGINAL_DESTINATION: &str = "envoy.extensions.filters.listener.original_dst.v3.OriginalDst";
const ORIGINAL_SOURCE: &str = "envoy.extensions.filters.listener.original_src.v3.OriginalSrc";

/// The name of the placeholder chain that closes connections.
const CLOSED: &str = "weft.closed";

/// The key of weft's metadata, and its fields.
const OUR_METADATA: &str = "weft";
const ALLOW_FROM: &str = "allow_from";
const IDLE_END: &str = "idle_end";
pub(super) const FLOW_SEED: &str = "flow_seed";

/// Reads a listener.
pub(super) fn decode(mut listener: MessageReader<'_>) -> Result<Listener, FieldError> {
    let name: weft_model::Name = listener.required_text("name")?.into();
    listener.harmless(&["stat_prefix", "traffic_direction"]);
    if listener.flag("enable_reuse_port") == Some(false) {
        listener.not_honoured("enable_reuse_port", "each worker has its own socket");
    }
    if listener.has("api_listener") {
        return Err(
            listener.refuse("api_listener", "not supported: an API listener is for gRPC clients")
        );
    }
    if listener.has("additional_addresses") {
        return Err(listener
            .refuse("additional_addresses", "not supported: use one listener for each address"));
    }
    let (address, transport) = values::socket(listener.required_child("address")?)?;
    let bind = listener.flag("bind_to_port").unwrap_or(true);
    let transparent = listener.flag("transparent").unwrap_or(false);
    let mut use_original_destination = listener.flag("use_original_dst").unwrap_or(false);
    let mut udp = None;
    let mut source_address = SourceAddress::Agent;
    for filter in listener.children("listener_filters") {
        match listener_filter(filter)? {
            ListenerFilter::OriginalDestination => use_original_destination = true,
            ListenerFilter::OriginalSource => source_address = SourceAddress::Client,
            ListenerFilter::Inspector => {}
            ListenerFilter::Udp(proxy, source) => {
                udp = Some(proxy);
                source_address = source;
            }
        }
    }
    let ours = listener.child("metadata").map(our_metadata).transpose()?.unwrap_or_default();
    let chains = values::each(listener.children("filter_chains"), chain)?;
    let default_chain = listener.child("default_filter_chain").map(chain).transpose()?;
    let default_chain = default_chain.filter(|chain| *chain.name != *CLOSED);
    let listener_value = Listener {
        name,
        address,
        transport,
        bind,
        use_original_destination,
        transparent,
        chains,
        default_chain,
        udp,
        allow_from: ours.allow_from,
        idle_end: ours.idle_end,
        flow_seed: ours.flow_seed,
        source_address,
    };
    check(&listener, &listener_value)?;
    Ok(listener_value)
}

/// The weft fields of a listener's metadata.
#[derive(Default)]
struct OurMetadata {
    allow_from: Option<Vec<Cidr>>,
    idle_end: Option<IdleEnd>,
    flow_seed: Option<u32>,
}

/// Reads the weft fields; metadata of others is ignored.
fn our_metadata(mut metadata: MessageReader<'_>) -> Result<OurMetadata, FieldError> {
    metadata.harmless(&["typed_filter_metadata"]);
    let mut ours = OurMetadata::default();
    for (name, mut fields) in metadata.map("filter_metadata") {
        if name != OUR_METADATA {
            fields.harmless(&["fields"]);
            continue;
        }
        for (field, mut value) in fields.map("fields") {
            if field == IDLE_END {
                let word = value.text("string_value");
                let end = IdleEnd::named(&word).ok_or_else(|| {
                    value.refuse("", format!("invalid value {word:?}: must be reset or close"))
                })?;
                ours.idle_end = Some(end);
                continue;
            }
            if field == FLOW_SEED {
                let text = value.text("string_value");
                let seed = text.parse().map_err(|_| {
                    value.refuse(
                        "",
                        format!(
                            "invalid seed {text:?}: must be a whole number below 2^32, as text"
                        ),
                    )
                })?;
                ours.flow_seed = Some(seed);
                continue;
            }
            let list = value.child("list_value").filter(|_| field == ALLOW_FROM);
            let mut list = list.ok_or_else(|| {
                value.refuse(
                    "",
                    format!(
                        "unknown field {field:?}: must be {ALLOW_FROM} (a list), {IDLE_END} or {FLOW_SEED} (text)"
                    ),
                )
            })?;
            let range = |mut value: MessageReader<'_>| {
                let text = value.text("string_value");
                Cidr::parse(&text).map_err(|error| value.refuse("", error.to_string()))
            };
            ours.allow_from = Some(values::each(list.children("values"), range)?);
        }
    }
    Ok(ours)
}

/// Checks that need several fields of the listener.
fn check(reader: &MessageReader<'_>, listener: &Listener) -> Result<(), FieldError> {
    let has_chain = !listener.chains.is_empty() || listener.default_chain.is_some();
    match listener.transport {
        Transport::Tcp if !has_chain && !listener.use_original_destination => {
            return Err(reader.refuse(
                "filter_chains",
                "a TCP listener must have a filter chain or use_original_dst",
            ));
        }
        Transport::Tcp if listener.udp.is_some() => {
            return Err(reader.refuse("listener_filters", "udp_proxy must be on a UDP address"));
        }
        Transport::Udp if listener.udp.is_none() && !listener.use_original_destination => {
            return Err(reader.refuse(
                "listener_filters",
                "a UDP listener must have udp_proxy or use_original_dst",
            ));
        }
        Transport::Udp if has_chain => {
            return Err(reader.refuse(
                "filter_chains",
                "not supported on a UDP listener: QUIC is proxied as UDP, not terminated",
            ));
        }
        Transport::Tcp | Transport::Udp => {}
    }
    for (index, chain) in listener.chains.iter().enumerate() {
        if listener.chains.iter().take(index).any(|other| other.matches == chain.matches) {
            return Err(reader.refuse(
                &format!("filter_chains[{index}].filter_chain_match"),
                "an earlier filter chain has the same match",
            ));
        }
    }
    Ok(())
}

enum ListenerFilter {
    OriginalDestination,
    OriginalSource,
    Inspector,
    Udp(UdpProxy, SourceAddress),
}

fn listener_filter(mut filter: MessageReader<'_>) -> Result<ListenerFilter, FieldError> {
    filter.harmless(&["name"]);
    if filter.has("filter_disabled") {
        return Err(filter.refuse("filter_disabled", "not supported: leave the filter out"));
    }
    let Some(mut config) = filter.any("typed_config")? else {
        return Err(filter.refuse("typed_config", MISSING));
    };
    match config.kind().rsplit('.').next().unwrap_or_default() {
        "OriginalDst" => Ok(ListenerFilter::OriginalDestination),
        // TLS and HTTP are always detected.
        "TlsInspector" | "HttpInspector" => {
            config.harmless(&[
                "enable_ja3_fingerprinting",
                "enable_ja4_fingerprinting",
                "initial_read_buffer_size",
            ]);
            Ok(ListenerFilter::Inspector)
        }
        "OriginalSrc" => {
            // The agent sets its own mark, by which `weft redirect` routes replies to it.
            config.harmless(&["mark"]);
            if config.flag("bind_port").unwrap_or(false) {
                return Err(
                    config.refuse("bind_port", "not supported: the source port is not preserved")
                );
            }
            Ok(ListenerFilter::OriginalSource)
        }
        "UdpProxyConfig" => {
            let keeps = config.flag("use_original_src_ip").unwrap_or(false);
            let source = if keeps { SourceAddress::Client } else { SourceAddress::Agent };
            Ok(ListenerFilter::Udp(filters::udp_proxy(config)?, source))
        }
        _ => Err(config.refuse("", format!("unsupported listener filter {}", config.kind()))),
    }
}

fn chain(mut chain: MessageReader<'_>) -> Result<FilterChain, FieldError> {
    let name = chain.text("name").into();
    let matches =
        chain.child("filter_chain_match").map(chain_match).transpose()?.unwrap_or_default();
    let tls = match chain.child("transport_socket") {
        Some(mut socket) => {
            socket.harmless(&["name"]);
            let context = socket.any("typed_config")?;
            let context = context.ok_or_else(|| socket.refuse("typed_config", MISSING))?;
            if context.kind().rsplit('.').next() != Some("DownstreamTlsContext") {
                return Err(context.refuse(
                    "",
                    format!(
                        "unsupported transport socket {}: must be DownstreamTlsContext",
                        context.kind()
                    ),
                ));
            }
            Some(secret::downstream(context)?)
        }
        None => None,
    };
    let ours = chain.child("metadata").map(our_http).transpose()?.unwrap_or_default();
    let mut filters = chain.children("filters");
    let Some(last) = filters.pop() else {
        return Err(chain.refuse("filters", "a filter chain must have at least one filter"));
    };
    let rules = values::each(filters, connection_rules)?;
    Ok(FilterChain { name, matches, tls, rules, filter: network_filter(last, &ours)? })
}

/// Reads a filter before the last one, which must be an RBAC filter.
fn connection_rules(mut filter: MessageReader<'_>) -> Result<Arc<RbacFilter>, FieldError> {
    filter.harmless(&["name"]);
    let Some(config) = filter.any("typed_config")? else {
        return Err(filter.refuse("typed_config", MISSING));
    };
    if config.kind() != "envoy.extensions.filters.network.rbac.v3.RBAC" {
        let reason =
            format!("unsupported filter {} before the last filter: must be RBAC", config.kind());
        return Err(config.refuse("", reason));
    }
    filters::network_rbac(config).map(Arc::new)
}

/// Reads the weft fields of a chain's metadata.
fn our_http(mut metadata: MessageReader<'_>) -> Result<OurHttp, FieldError> {
    metadata.harmless(&["typed_filter_metadata"]);
    let mut ours = OurHttp::default();
    for (name, mut fields) in metadata.map("filter_metadata") {
        if name != OUR_METADATA {
            fields.harmless(&["fields"]);
            continue;
        }
        for (field, value) in fields.map("fields") {
            ours.read(&field, value)?;
        }
    }
    Ok(ours)
}

fn chain_match(mut matches: MessageReader<'_>) -> Result<ChainMatch, FieldError> {
    let destination_port = match matches.number("destination_port") {
        None => None,
        Some(port) => Some(u16::try_from(port).map_err(|_| {
            matches
                .refuse("destination_port", format!("invalid port {port}: must be at most 65535"))
        })?),
    };
    let destination_prefixes = values::each(matches.children("prefix_ranges"), values::cidr)?;
    let transport = match matches.text("transport_protocol").as_str() {
        "" => None,
        "tls" => Some(TransportKind::Tls),
        "raw_buffer" => Some(TransportKind::Plain),
        other => {
            return Err(matches.refuse(
                "transport_protocol",
                format!("invalid protocol {other:?}: must be tls or raw_buffer"),
            ));
        }
    };
    for field in ["server_names", "application_protocols", "source_prefix_ranges", "source_ports"] {
        if matches.has(field) {
            return Err(matches.refuse(
                field,
                "not supported: must match by destination_port, prefix_ranges or transport_protocol",
            ));
        }
    }
    Ok(ChainMatch { destination_port, destination_prefixes, transport })
}

fn network_filter(mut filter: MessageReader<'_>, ours: &OurHttp) -> Result<Filter, FieldError> {
    filter.harmless(&["name"]);
    let Some(config) = filter.any("typed_config")? else {
        return Err(filter.refuse("typed_config", MISSING));
    };
    match config.kind().rsplit('.').next().unwrap_or_default() {
        "TcpProxy" => filters::tcp_proxy(config).map(Filter::Tcp),
        "HttpConnectionManager" => {
            filters::http_service(config, ours).map(|http| Filter::Http(http.into()))
        }
        _ => Err(config.refuse("", format!("unsupported network filter {}", config.kind()))),
    }
}

/// The JSON form of a listener.
pub(super) fn encode(listener: &Listener) -> Value {
    let mut json = json!({
        "name": &*listener.name,
        "address": values::socket_json(listener.address, listener.transport),
        "bind_to_port": listener.bind,
        "filter_chains": listener.chains.iter().map(chain_json).collect::<Vec<_>>(),
    });
    let mut filters = Vec::new();
    if listener.use_original_destination {
        json["use_original_dst"] = json!(true);
        if listener.transport == Transport::Tcp {
            filters.push(json!({"name": "envoy.filters.listener.original_dst",
                "typed_config": values::any(ORIGINAL_DESTINATION, json!({}))}));
        }
    }
    if listener.inspects_transport() {
        filters.push(json!({"name": "envoy.filters.listener.tls_inspector", "typed_config":
            values::any("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector", json!({}))}));
    }
    if let Some(udp) = &listener.udp {
        filters.push(filters::udp_proxy_json(udp, listener.source_address));
    } else if listener.source_address == SourceAddress::Client {
        filters.push(json!({"name": "envoy.filters.listener.original_src",
            "typed_config": values::any(ORIGINAL_SOURCE, json!({}))}));
    }
    json["listener_filters"] = json!(filters);
    if listener.transparent {
        json["transparent"] = json!(true);
    }
    let mut ours = serde_json::Map::new();
    if let Some(ranges) = &listener.allow_from {
        let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        ours.insert(ALLOW_FROM.into(), ranges.into());
    }
    if let Some(end) = listener.idle_end {
        ours.insert(IDLE_END.into(), end.word().into());
    }
    if let Some(seed) = listener.flow_seed {
        ours.insert(FLOW_SEED.into(), seed.to_string().into());
    }
    if !ours.is_empty() {
        json["metadata"] = json!({"filter_metadata": {OUR_METADATA: ours}});
    }
    if let Some(default) = &listener.default_chain {
        json["default_filter_chain"] = chain_json(default);
    } else if listener.chains.is_empty() && listener.transport == Transport::Tcp {
        json["default_filter_chain"] = closed_json();
    }
    json
}

/// A placeholder chain for Envoy, which refuses listeners without chains. Its cluster does not exist, so that
/// connections are closed. [`decode`] ignores it.
fn closed_json() -> Value {
    let fields = json!({"stat_prefix": CLOSED, "cluster": CLOSED});
    json!({"name": CLOSED, "filters": [{"name": "envoy.filters.network.tcp_proxy",
        "typed_config": values::any("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", fields)}]})
}

fn chain_json(chain: &FilterChain) -> Value {
    let mut matches = json!({
        "prefix_ranges": chain.matches.destination_prefixes.iter().map(values::cidr_json).collect::<Vec<_>>()});
    if let Some(port) = chain.matches.destination_port {
        matches["destination_port"] = json!(port);
    }
    match chain.matches.transport {
        Some(TransportKind::Tls) => matches["transport_protocol"] = json!("tls"),
        Some(TransportKind::Plain) => matches["transport_protocol"] = json!("raw_buffer"),
        None => {}
    }
    let filter = match &chain.filter {
        Filter::Tcp(tcp) => filters::tcp_proxy_json(tcp),
        Filter::Http(http) => filters::http_service_json(http),
    };
    let rules = chain.rules.iter().map(|rules| filters::network_rbac_json(rules));
    let filters: Vec<Value> = rules.chain([filter]).collect();
    let mut json = json!({"name": &*chain.name, "filter_chain_match": matches, "filters": filters});
    if let Some(tls) = &chain.tls {
        json["transport_socket"] = secret::downstream_json(tls);
    }
    if let Filter::Http(http) = &chain.filter {
        let ours = filters::our_http_json(http);
        if !ours.is_empty() {
            json["metadata"] = json!({"filter_metadata": {OUR_METADATA: ours}});
        }
    }
    json
}
