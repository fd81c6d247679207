//! The clusters of services, and their endpoints.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use weft_model::{
    Balance, Cluster, DEFAULT_CONNECT_TIMEOUT, DEFAULT_RESPONSE_HEAD_BYTES,
    DEFAULT_RESPONSE_HEADER_COUNT, DEFAULT_UPSTREAM_IDLE, Discovery, Endpoint, EndpointSet, Health,
    UpstreamProtocol, UpstreamTls,
};

use crate::mesh::{Port, Service};

/// The most open connections and requests of a cluster.
pub(super) const CIRCUIT_BREAKER_LIMIT: u32 = 100_000;

/// The name of the cluster for a port of a service.
pub(super) fn cluster_name(service: &str, port: u16) -> String {
    format!("{service}|{port}")
}

pub(super) fn endpoints(service: &Service, port: &Port) -> Arc<EndpointSet> {
    let endpoint = |(address, weight): &(IpAddr, u32)| {
        Endpoint::new(SocketAddr::new(*address, port.target), *weight, Health::Healthy)
    };
    Arc::new(EndpointSet { endpoints: service.endpoints.iter().filter_map(endpoint).collect() })
}

pub(super) fn cluster(name: &str, discovery: Discovery, balance: Balance) -> Cluster {
    Cluster {
        name: name.into(),
        discovery,
        balance,
        connect_timeout: DEFAULT_CONNECT_TIMEOUT,
        protocol: UpstreamProtocol::AsDownstream,
        tls: None::<UpstreamTls>,
        connection_limit: CIRCUIT_BREAKER_LIMIT,
        request_limit: CIRCUIT_BREAKER_LIMIT,
        response_head_bytes: DEFAULT_RESPONSE_HEAD_BYTES,
        response_header_count: DEFAULT_RESPONSE_HEADER_COUNT,
        idle_timeout: DEFAULT_UPSTREAM_IDLE,
    }
}
