//! `Listener`: an address, and the filter chains that serve it.

use std::sync::Arc;

use envoy_types::util::pack_any;
use weft_model::{
    ChainMatch, Cidr, Filter, FilterChain, IdleEnd, Listener, RbacFilter, SourceAddress, Transport,
    TransportKind, UdpProxy,
};

use super::filters::OurHttp;
use super::pb::{listener as pb, original_dst, original_src, tcp, tls_inspector};
use super::reader::MISSING;
use super::struct_value::{self, OUR_METADATA, StructFields};
use super::{FieldError, MessageReader, filters, secret, values};

/// The name of the placeholder chain that closes connections.
const CLOSED: &str = "weft.closed";

/// The fields of weft's metadata.
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

/// Encodes a listener.
pub(super) fn encode(listener: &Listener) -> pb::Listener {
    let mut encoded = pb::Listener {
        name: listener.name.to_string(),
        address: Some(values::encode_socket(listener.address, listener.transport)),
        bind_to_port: values::flag(listener.bind),
        filter_chains: listener.chains.iter().map(encode_chain).collect(),
        default_filter_chain: listener.default_chain.as_ref().map(encode_chain),
        listener_filters: encode_listener_filters(listener),
        metadata: struct_value::metadata(encode_our_metadata(listener)),
        ..pb::Listener::default()
    };
    if listener.use_original_destination {
        encoded.use_original_dst = values::flag(true);
    }
    if listener.transparent {
        encoded.transparent = values::flag(true);
    }
    let has_chain = listener.default_chain.is_some() || !listener.chains.is_empty();
    if !has_chain && listener.transport == Transport::Tcp {
        encoded.default_filter_chain = Some(closed_chain());
    }
    encoded
}

fn encode_listener_filters(listener: &Listener) -> Vec<pb::ListenerFilter> {
    let mut filters = Vec::new();
    if listener.use_original_destination && listener.transport == Transport::Tcp {
        let config = pack_any(original_dst::OriginalDst::default());
        filters.push(filters::listener_filter("envoy.filters.listener.original_dst", config));
    }
    if listener.inspects_transport() {
        let config = pack_any(tls_inspector::TlsInspector::default());
        filters.push(filters::listener_filter("envoy.filters.listener.tls_inspector", config));
    }
    if let Some(udp) = &listener.udp {
        filters.push(filters::encode_udp_proxy(udp, listener.source_address));
    } else if listener.source_address == SourceAddress::Client {
        let config = pack_any(original_src::OriginalSrc::default());
        filters.push(filters::listener_filter("envoy.filters.listener.original_src", config));
    }
    filters
}

fn encode_our_metadata(listener: &Listener) -> StructFields {
    let mut ours = StructFields::new();
    if let Some(ranges) = &listener.allow_from {
        let ranges = ranges.iter().map(|range| struct_value::text(range.to_string()));
        ours.insert(ALLOW_FROM.into(), struct_value::list(ranges));
    }
    if let Some(end) = listener.idle_end {
        ours.insert(IDLE_END.into(), struct_value::text(end.word()));
    }
    if let Some(seed) = listener.flow_seed {
        ours.insert(FLOW_SEED.into(), struct_value::text(seed.to_string()));
    }
    ours
}

/// A placeholder chain for Envoy, which refuses listeners without chains. Its cluster does not exist, so that
/// connections are closed. [`decode`] ignores it.
fn closed_chain() -> pb::FilterChain {
    let proxy = tcp::TcpProxy {
        stat_prefix: CLOSED.into(),
        cluster_specifier: Some(tcp::tcp_proxy::ClusterSpecifier::Cluster(CLOSED.into())),
        ..tcp::TcpProxy::default()
    };
    pb::FilterChain {
        name: CLOSED.into(),
        filters: vec![filters::network_filter(filters::TCP_PROXY, pack_any(proxy))],
        ..pb::FilterChain::default()
    }
}

fn encode_chain(chain: &FilterChain) -> pb::FilterChain {
    let filter = match &chain.filter {
        Filter::Tcp(tcp) => filters::encode_tcp_proxy(tcp),
        Filter::Http(http) => filters::encode_http_service(http),
    };
    let ours = match &chain.filter {
        Filter::Tcp(_) => StructFields::new(),
        Filter::Http(http) => filters::encode_our_http(http),
    };
    let rules = chain.rules.iter().map(|rules| filters::encode_network_rbac(rules));
    pb::FilterChain {
        name: chain.name.to_string(),
        filter_chain_match: Some(encode_match(&chain.matches)),
        filters: rules.chain([filter]).collect(),
        transport_socket: chain.tls.as_ref().map(secret::encode_downstream),
        metadata: struct_value::metadata(ours),
        ..pb::FilterChain::default()
    }
}

fn encode_match(matches: &ChainMatch) -> pb::FilterChainMatch {
    let transport = match matches.transport {
        Some(TransportKind::Tls) => "tls",
        Some(TransportKind::Plain) => "raw_buffer",
        None => "",
    };
    pb::FilterChainMatch {
        destination_port: matches.destination_port.and_then(|port| values::number(port.into())),
        prefix_ranges: matches.destination_prefixes.iter().map(values::encode_cidr).collect(),
        transport_protocol: transport.into(),
        ..pb::FilterChainMatch::default()
    }
}
