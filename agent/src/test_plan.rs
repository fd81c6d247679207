//! Plans for tests: the service `dns` at a virtual address, with the endpoints of a test.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use weft_model::{
    AccessLogSinks, Balance, ChainMatch, Cidr, Cluster, DEFAULT_CONNECT_TIMEOUT, Discovery,
    Endpoint, EndpointSet, Filter, FilterChain, FlowKey, Health, Listener, Snapshot, SourceAddress,
    TcpProxy, Transport, UdpProxy, UpstreamProtocol, WeightedCluster,
};

use crate::node::NodeInfo;
use crate::plan::AgentPlan;

/// The virtual address of the service.
pub(crate) const SERVICE: &str = "10.96.0.1:53";

pub(crate) fn address(text: &str) -> SocketAddr {
    text.parse().expect("the address is valid")
}

pub(crate) fn cluster(name: &str, endpoints: &[(&str, Health)]) -> Arc<Cluster> {
    let endpoints = endpoints
        .iter()
        .filter_map(|(at, health)| Endpoint::new(address(at), 1, *health))
        .collect();
    Arc::new(Cluster {
        name: name.into(),
        discovery: Discovery::Static(EndpointSet { endpoints }),
        balance: Balance::Maglev { table_size: 251 },
        connect_timeout: DEFAULT_CONNECT_TIMEOUT,
        protocol: UpstreamProtocol::Http1,
        tls: None,
        connection_limit: 1,
        request_limit: 1,
        response_head_bytes: weft_model::DEFAULT_RESPONSE_HEAD_BYTES,
        response_header_count: weft_model::DEFAULT_RESPONSE_HEADER_COUNT,
        idle_timeout: weft_model::DEFAULT_UPSTREAM_IDLE,
    })
}

/// The listener that captures redirected flows, without a proxy of its own.
pub(crate) fn capture(transport: Transport) -> Listener {
    Listener {
        name: "capture".into(),
        address: address("0.0.0.0:15001"),
        transport,
        bind: true,
        use_original_destination: true,
        transparent: false,
        chains: Vec::new(),
        default_chain: None,
        udp: None,
        allow_from: None,
        idle_end: None,
        flow_seed: Some(7),
        source_address: SourceAddress::Agent,
    }
}

/// The listener of a service at a virtual address, whose flows go to cluster `dns`.
fn service(transport: Transport) -> Listener {
    let tcp = TcpProxy {
        clusters: vec![WeightedCluster::new("dns".into(), 1)],
        idle_timeout: None,
        flow_key: FlowKey::FiveTuple,
        access_log: AccessLogSinks::Off,
    };
    let udp = UdpProxy {
        cluster: "dns".into(),
        idle_timeout: Duration::from_secs(60),
        flow_key: FlowKey::FiveTuple,
        access_log: AccessLogSinks::Off,
    };
    let chain = FilterChain {
        name: "all".into(),
        matches: ChainMatch::default(),
        tls: None,
        rules: Vec::new(),
        filter: Filter::Tcp(tcp),
    };
    Listener {
        name: "dns".into(),
        address: address(SERVICE),
        bind: false,
        use_original_destination: false,
        chains: (transport == Transport::Tcp).then_some(chain).into_iter().collect(),
        udp: (transport == Transport::Udp).then_some(udp),
        allow_from: Some(vec![Cidr::parse("10.0.0.0/24").expect("the range is valid")]),
        ..capture(transport)
    }
}

/// A plan of the service with these clusters.
pub(crate) fn plan(
    transport: Transport,
    clusters: impl IntoIterator<Item = Arc<Cluster>>,
) -> AgentPlan {
    let mut snapshot = Snapshot { revision: 1, ..Snapshot::default() };
    snapshot.listeners.insert("dns".into(), Arc::new(service(transport)));
    snapshot.clusters.extend(clusters.into_iter().map(|c| (c.name.clone(), c)));
    AgentPlan::new(&snapshot, &NodeInfo::default(), None).0
}
