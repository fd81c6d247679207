//! `Cluster`: endpoints, load balancing and connection settings of a service.

use std::num::NonZeroU32;
use std::time::Duration;

use envoy_types::util::pack_any;
use weft_model::{
    Balance, Cluster, DEFAULT_CONNECT_TIMEOUT, DEFAULT_DNS_REFRESH, DEFAULT_RESPONSE_HEAD_BYTES,
    DEFAULT_RESPONSE_HEADER_COUNT, DEFAULT_TABLE_SIZE, DEFAULT_UPSTREAM_IDLE, Discovery,
    DnsDiscovery, DnsFamily, DnsHost, DnsPolicy, OnEmptyAnswer, Transport, UpstreamProtocol,
    UpstreamTls,
};

use super::pb::{cluster as pb, core, google, upstream_http};
use super::reader::MISSING;
use super::{FieldError, MessageReader, endpoints, secret, values};

/// The default of both circuit breaker limits (`CircuitBreakers.Thresholds`).
const DEFAULT_LIMIT: u32 = 1024;

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Reads a cluster.
pub(super) fn decode(mut cluster: MessageReader<'_>) -> Result<Cluster, FieldError> {
    let name: weft_model::Name = cluster.required_text("name")?.into();
    cluster.harmless(&["alt_stat_name"]);
    let discovery = discovery(&mut cluster, &name)?;
    let balance = balance(&mut cluster, &discovery)?;
    let connect_timeout = cluster.duration("connect_timeout")?.unwrap_or(DEFAULT_CONNECT_TIMEOUT);
    if connect_timeout.is_zero() {
        return Err(cluster.refuse("connect_timeout", "invalid duration 0s: must be more than 0s"));
    }
    let mut options = HttpProtocolOptions::default();
    let protocol = protocol(&mut cluster, &mut options)?;
    let tls = cluster.child("transport_socket").map(socket).transpose()?.flatten();
    let (connection_limit, request_limit) = limits(&mut cluster);
    if cluster.has("transport_socket_matches") {
        return Err(
            cluster.refuse("transport_socket_matches", "not supported: use transport_socket")
        );
    }
    Ok(Cluster {
        name,
        discovery,
        balance,
        connect_timeout,
        protocol,
        tls,
        connection_limit,
        request_limit,
        response_head_bytes: options.response_head_bytes,
        response_header_count: options.response_header_count,
        idle_timeout: options.idle_timeout,
    })
}

fn discovery(
    cluster: &mut MessageReader<'_>,
    name: &weft_model::Name,
) -> Result<Discovery, FieldError> {
    if cluster.has("cluster_type") {
        return Err(cluster.refuse("cluster_type", "extension cluster types are not supported"));
    }
    let kind = cluster.choice("type");
    match kind.as_str() {
        "STATIC" => match cluster.child("load_assignment") {
            Some(assignment) => Ok(Discovery::Static(endpoints::set(assignment)?)),
            None => Err(cluster.refuse("load_assignment", "a STATIC cluster must have endpoints")),
        },
        "EDS" => {
            let mut config = cluster.required_child("eds_cluster_config")?;
            values::config_source(&mut config, "eds_config");
            let service = config.text("service_name");
            Ok(Discovery::Endpoints(if service.is_empty() { name.clone() } else { service.into() }))
        }
        "STRICT_DNS" => dns(cluster, OnEmptyAnswer::Drop),
        "LOGICAL_DNS" => dns(cluster, OnEmptyAnswer::Keep),
        "ORIGINAL_DST" => Ok(Discovery::OriginalDestination),
        other => Err(cluster.refuse("type", format!("unsupported discovery type {other}: must be STATIC, EDS, STRICT_DNS, LOGICAL_DNS or ORIGINAL_DST"))),
    }
}

fn dns(
    cluster: &mut MessageReader<'_>,
    on_empty_answer: OnEmptyAnswer,
) -> Result<Discovery, FieldError> {
    let policy = dns_policy(cluster, on_empty_answer)?;
    let mut assignment = cluster.required_child("load_assignment")?;
    assignment.harmless(&["cluster_name"]);
    let mut hosts = Vec::new();
    for mut locality in assignment.children("endpoints") {
        for mut member in locality.children("lb_endpoints") {
            let weight = NonZeroU32::new(member.number("load_balancing_weight").unwrap_or(1))
                .unwrap_or(NonZeroU32::MIN);
            let mut address = member.required_child("endpoint")?.required_child("address")?;
            let mut socket = address.required_child("socket_address")?;
            socket.harmless(&["protocol"]);
            let name = socket.required_text("address")?;
            hosts.push(DnsHost { name, port: values::port(&mut socket)?, weight });
        }
    }
    Ok(Discovery::Dns(DnsDiscovery { hosts, policy }))
}

fn dns_policy(
    cluster: &mut MessageReader<'_>,
    on_empty_answer: OnEmptyAnswer,
) -> Result<DnsPolicy, FieldError> {
    let refresh = interval(cluster, "dns_refresh_rate")?.unwrap_or(DEFAULT_DNS_REFRESH);
    let mut failure_base = refresh.min(DnsPolicy::default().failure_base);
    let mut failure_max = refresh;
    if let Some(mut rate) = cluster.child("dns_failure_refresh_rate") {
        let base = interval(&mut rate, "base_interval")?;
        failure_base = base.ok_or_else(|| rate.refuse("base_interval", MISSING))?;
        failure_max =
            interval(&mut rate, "max_interval")?.unwrap_or_else(|| failure_base.saturating_mul(10));
        if failure_max < failure_base {
            return Err(rate.refuse("max_interval", "must be base_interval or more"));
        }
    }
    let family = match cluster.choice("dns_lookup_family").as_str() {
        "AUTO" => DnsFamily::Auto,
        "V4_ONLY" => DnsFamily::V4Only,
        "V6_ONLY" => DnsFamily::V6Only,
        "V4_PREFERRED" => DnsFamily::V4Preferred,
        "ALL" => DnsFamily::All,
        other => {
            let why = format!(
                "invalid family {other:?}: must be AUTO, V4_ONLY, V6_ONLY, V4_PREFERRED or ALL"
            );
            return Err(cluster.refuse("dns_lookup_family", why));
        }
    };
    Ok(DnsPolicy {
        refresh,
        respects_ttl: cluster.flag("respect_dns_ttl").unwrap_or(false),
        jitter: cluster.duration("dns_jitter")?.unwrap_or_default(),
        failure_base,
        failure_max,
        family,
        on_empty_answer,
    })
}

/// An interval between lookups: Envoy refuses 1 ms or less.
fn interval(reader: &mut MessageReader<'_>, field: &str) -> Result<Option<Duration>, FieldError> {
    match reader.duration(field)? {
        Some(interval) if interval <= Duration::from_millis(1) => {
            Err(reader.refuse(field, format!("invalid interval {interval:?}: must exceed 1ms")))
        }
        interval => Ok(interval),
    }
}

fn balance(cluster: &mut MessageReader<'_>, discovery: &Discovery) -> Result<Balance, FieldError> {
    match cluster.choice("lb_policy").as_str() {
        "ROUND_ROBIN" => Ok(Balance::RoundRobin),
        "LEAST_REQUEST" => Ok(Balance::LeastRequests),
        "MAGLEV" => {
            let config = cluster.child("maglev_lb_config");
            let size =
                config.and_then(|mut c| c.number("table_size")).unwrap_or(DEFAULT_TABLE_SIZE);
            weft_model::Maglev::new(&[], size, 0).map_err(|error| {
                cluster.refuse("maglev_lb_config.table_size", error.to_string())
            })?;
            Ok(Balance::Maglev { table_size: size })
        }
        "CLUSTER_PROVIDED" if matches!(discovery, Discovery::OriginalDestination) => {
            Ok(Balance::RoundRobin)
        }
        other => Err(cluster.refuse(
            "lb_policy",
            format!("unsupported policy {other}: must be ROUND_ROBIN, LEAST_REQUEST or MAGLEV"),
        )),
    }
}

/// Settings of `HttpProtocolOptions` other than the version.
struct HttpProtocolOptions {
    response_head_bytes: usize,
    response_header_count: usize,
    idle_timeout: Duration,
}

impl Default for HttpProtocolOptions {
    fn default() -> Self {
        Self {
            response_head_bytes: DEFAULT_RESPONSE_HEAD_BYTES,
            response_header_count: DEFAULT_RESPONSE_HEADER_COUNT,
            idle_timeout: DEFAULT_UPSTREAM_IDLE,
        }
    }
}

impl HttpProtocolOptions {
    fn read(&mut self, mut common: MessageReader<'_>) -> Result<(), FieldError> {
        if let Some(idle) = common.duration("idle_timeout")?.filter(|idle| !idle.is_zero()) {
            self.idle_timeout = idle;
        }
        if let Some(count) = common.number("max_headers_count") {
            self.response_header_count = values::header_count(&common, count)?;
        }
        match common.number("max_response_headers_kb") {
            None => {}
            Some(kib @ 1..=8192) => {
                self.response_head_bytes = usize::try_from(kib).unwrap_or(60) * 1024;
            }
            Some(kib) => {
                let why = format!("invalid size {kib}: must be 1 to 8192");
                return Err(common.refuse("max_response_headers_kb", why));
            }
        }
        Ok(())
    }
}

fn protocol(
    cluster: &mut MessageReader<'_>,
    more: &mut HttpProtocolOptions,
) -> Result<UpstreamProtocol, FieldError> {
    if cluster.child("http2_protocol_options").is_some() {
        return Ok(UpstreamProtocol::Http2);
    }
    for (_, any) in cluster.map("typed_extension_protocol_options") {
        let mut options = any.unpacked()?;
        if options.kind() != HTTP_OPTIONS {
            return Err(options.refuse(
                "",
                format!("unsupported type {}: must be {HTTP_OPTIONS}", options.kind()),
            ));
        }
        if let Some(common) = options.child("common_http_protocol_options") {
            more.read(common)?;
        }
        if let Some(mut explicit) = options.child("explicit_http_config") {
            let http2 = explicit.child("http2_protocol_options").is_some();
            read_http1(explicit.child("http_protocol_options"));
            return Ok(if http2 { UpstreamProtocol::Http2 } else { UpstreamProtocol::Http1 });
        }
        if let Some(mut downstream) = options.child("use_downstream_protocol_config") {
            read_http1(downstream.child("http_protocol_options"));
            // Its settings are listed as not honoured.
            drop(downstream.child("http2_protocol_options"));
            return Ok(UpstreamProtocol::AsDownstream);
        }
    }
    Ok(UpstreamProtocol::Http1)
}

/// Reads `Http1ProtocolOptions` of a cluster: its settings have no effect and are listed.
fn read_http1(options: Option<MessageReader<'_>>) {
    if let Some(mut options) = options {
        // Both are always enabled.
        options.harmless(&["accept_http_10", "enable_trailers"]);
    }
}

fn socket(mut socket: MessageReader<'_>) -> Result<Option<UpstreamTls>, FieldError> {
    socket.harmless(&["name"]);
    let Some(context) = socket.any("typed_config")? else {
        return Ok(None);
    };
    match context.kind().rsplit('.').next() {
        Some("UpstreamTlsContext") => secret::upstream(context).map(Some),
        _ => Err(context.refuse(
            "",
            format!("unsupported transport socket {}: must be UpstreamTlsContext", context.kind()),
        )),
    }
}

fn limits(cluster: &mut MessageReader<'_>) -> (u32, u32) {
    let mut limits = (DEFAULT_LIMIT, DEFAULT_LIMIT);
    if let Some(mut breakers) = cluster.child("circuit_breakers") {
        for mut threshold in breakers.children("thresholds") {
            if threshold.choice("priority") == "DEFAULT" {
                limits.0 = threshold.number("max_connections").unwrap_or(DEFAULT_LIMIT);
                limits.1 = threshold.number("max_requests").unwrap_or(DEFAULT_LIMIT);
                threshold.harmless(&["max_pending_requests", "max_retries"]);
            }
        }
    }
    limits
}

/// Encodes a cluster.
pub(super) fn encode(cluster: &Cluster) -> pb::Cluster {
    let limits = pb::circuit_breakers::Thresholds {
        max_connections: values::number(cluster.connection_limit),
        max_requests: values::number(cluster.request_limit),
        ..pb::circuit_breakers::Thresholds::default()
    };
    let breakers =
        pb::CircuitBreakers { thresholds: vec![limits], ..pb::CircuitBreakers::default() };
    let mut encoded = pb::Cluster {
        name: cluster.name.to_string(),
        connect_timeout: Some(values::duration(cluster.connect_timeout)),
        circuit_breakers: Some(breakers),
        typed_extension_protocol_options: [(HTTP_OPTIONS.into(), encode_http_options(cluster))]
            .into(),
        transport_socket: cluster.tls.as_ref().map(secret::encode_upstream),
        ..pb::Cluster::default()
    };
    encode_discovery(cluster, &mut encoded);
    encode_balance(cluster, &mut encoded);
    encoded
}

fn encode_discovery(cluster: &Cluster, encoded: &mut pb::Cluster) {
    let discovery = match &cluster.discovery {
        Discovery::Static(set) => {
            encoded.load_assignment = Some(endpoints::encode(&cluster.name, set));
            pb::cluster::DiscoveryType::Static
        }
        Discovery::Endpoints(service) => {
            encoded.eds_cluster_config = Some(pb::cluster::EdsClusterConfig {
                eds_config: Some(values::ads()),
                service_name: service.to_string(),
            });
            pb::cluster::DiscoveryType::Eds
        }
        Discovery::Dns(dns) => {
            let member = |host: &DnsHost| {
                let address = values::encode_host(host.name.clone(), host.port, Transport::Tcp);
                endpoints::member(address, host.weight)
            };
            let members = dns.hosts.iter().map(member).collect();
            encoded.load_assignment = Some(endpoints::assignment(&cluster.name, members));
            encode_dns_policy(&dns.policy, encoded);
            match dns.policy.on_empty_answer {
                OnEmptyAnswer::Drop => pb::cluster::DiscoveryType::StrictDns,
                OnEmptyAnswer::Keep => pb::cluster::DiscoveryType::LogicalDns,
            }
        }
        Discovery::OriginalDestination => pb::cluster::DiscoveryType::OriginalDst,
    };
    encoded.cluster_discovery_type =
        Some(pb::cluster::ClusterDiscoveryType::Type(discovery.into()));
}

#[expect(deprecated, reason = "`DnsCluster` replaces these fields, but older Envoys lack it")]
fn encode_dns_policy(policy: &DnsPolicy, encoded: &mut pb::Cluster) {
    let family = match policy.family {
        DnsFamily::Auto => pb::cluster::DnsLookupFamily::Auto,
        DnsFamily::V4Only => pb::cluster::DnsLookupFamily::V4Only,
        DnsFamily::V6Only => pb::cluster::DnsLookupFamily::V6Only,
        DnsFamily::V4Preferred => pb::cluster::DnsLookupFamily::V4Preferred,
        DnsFamily::All => pb::cluster::DnsLookupFamily::All,
    };
    encoded.dns_lookup_family = family.into();
    encoded.respect_dns_ttl = policy.respects_ttl;
    encoded.dns_refresh_rate = Some(values::duration(policy.refresh));
    encoded.dns_jitter = Some(values::duration(policy.jitter));
    encoded.dns_failure_refresh_rate = Some(pb::cluster::RefreshRate {
        base_interval: Some(values::duration(policy.failure_base)),
        max_interval: Some(values::duration(policy.failure_max)),
    });
}

fn encode_balance(cluster: &Cluster, encoded: &mut pb::Cluster) {
    let policy = match cluster.balance {
        Balance::RoundRobin if cluster.discovery == Discovery::OriginalDestination => {
            pb::cluster::LbPolicy::ClusterProvided
        }
        Balance::RoundRobin => pb::cluster::LbPolicy::RoundRobin,
        Balance::LeastRequests => pb::cluster::LbPolicy::LeastRequest,
        Balance::Maglev { table_size } => {
            let table_size = Some(google::UInt64Value { value: table_size.into() });
            let config = pb::cluster::MaglevLbConfig { table_size };
            encoded.lb_config = Some(pb::cluster::LbConfig::MaglevLbConfig(config));
            pb::cluster::LbPolicy::Maglev
        }
    };
    encoded.lb_policy = policy.into();
}

/// Encodes `HttpProtocolOptions`.
fn encode_http_options(cluster: &Cluster) -> google::Any {
    use upstream_http::http_protocol_options::explicit_http_config::ProtocolConfig;
    use upstream_http::http_protocol_options::{
        ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
    };
    let http1 = core::Http1ProtocolOptions::default;
    let http2 = core::Http2ProtocolOptions::default;
    let explicit = |protocol| {
        let protocol_config = Some(protocol);
        UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig { protocol_config })
    };
    let protocol = match cluster.protocol {
        UpstreamProtocol::Http1 => explicit(ProtocolConfig::HttpProtocolOptions(http1())),
        UpstreamProtocol::Http2 => explicit(ProtocolConfig::Http2ProtocolOptions(http2())),
        UpstreamProtocol::AsDownstream => {
            UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
                http_protocol_options: Some(http1()),
                http2_protocol_options: Some(http2()),
                http3_protocol_options: None,
            })
        }
    };
    let mut common = core::HttpProtocolOptions {
        idle_timeout: Some(values::duration(cluster.idle_timeout)),
        ..core::HttpProtocolOptions::default()
    };
    if cluster.response_head_bytes != DEFAULT_RESPONSE_HEAD_BYTES {
        common.max_response_headers_kb = values::count(cluster.response_head_bytes / 1024);
    }
    if cluster.response_header_count != DEFAULT_RESPONSE_HEADER_COUNT {
        common.max_headers_count = values::count(cluster.response_header_count);
    }
    pack_any(upstream_http::HttpProtocolOptions {
        common_http_protocol_options: Some(common),
        upstream_protocol_options: Some(protocol),
        ..upstream_http::HttpProtocolOptions::default()
    })
}
