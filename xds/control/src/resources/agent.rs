//! The resources of agents: a listener with a TCP or UDP proxy for each port of each service. Flows are hashed onto
//! endpoints by Maglev.

use std::sync::Arc;
use std::time::Duration;

use weft_model::{
    AccessLogSinks, Balance, ChainMatch, DEFAULT_TABLE_SIZE, Discovery, Filter, FilterChain,
    Listener, Name, Snapshot, SourceAddress, TcpProxy, Transport, UdpProxy, WeightedCluster,
};

use super::capture::{OUTBOUND_PORT, UDP_PORT, wildcard_addresses};
use super::clusters::{cluster, cluster_name, endpoints};
use crate::mesh::{Mesh, Port, Protocol, Service};

/// The default idle timeouts: those of AWS Network Load Balancers.
const TCP_IDLE: Duration = Duration::from_secs(350);
const UDP_IDLE: Duration = Duration::from_secs(120);

/// The capture listeners, which receive redirected connections and datagrams.
pub(super) fn common(flow_seed: u32) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for (suffix, address) in wildcard_addresses(OUTBOUND_PORT) {
        let tcp = capture(&format!("capture{suffix}"), address, Transport::Tcp);
        insert(&mut snapshot, Listener { flow_seed: Some(flow_seed), ..tcp });
    }
    for (suffix, address) in wildcard_addresses(UDP_PORT) {
        insert(&mut snapshot, capture(&format!("capture-udp{suffix}"), address, Transport::Udp));
    }
    snapshot
}

/// The listeners, clusters and endpoints of all services.
pub(super) fn all_services(mesh: &Mesh) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for service in mesh.services.values() {
        for port in &service.ports {
            add_port(service, port, &mut snapshot);
        }
    }
    snapshot
}

fn add_port(service: &Service, port: &Port, snapshot: &mut Snapshot) {
    let udp = port.protocol == Protocol::Udp;
    let suffix = if udp { "/udp" } else { "" };
    let name: Name = format!("{}{suffix}", cluster_name(&service.name, port.port)).into();
    let balance = Balance::Maglev { table_size: DEFAULT_TABLE_SIZE };
    let target = cluster(&name, Discovery::Endpoints(name.clone()), balance);
    snapshot.clusters.insert(name.clone(), Arc::new(target));
    snapshot.endpoints.insert(name.clone(), endpoints(service, port));
    for address in &service.addresses {
        let transport = if udp { Transport::Udp } else { Transport::Tcp };
        let listener_name = format!("{name} {address}");
        let mut listener = capture(&listener_name, (*address, port.port).into(), transport);
        listener.bind = false;
        listener.use_original_destination = false;
        listener.transparent = false;
        listener.allow_from.clone_from(&service.allow_from);
        listener.idle_end = port.idle_end;
        listener.source_address = service.source_address;
        if udp {
            listener.udp = Some(UdpProxy {
                cluster: name.clone(),
                idle_timeout: port.idle_timeout.unwrap_or(UDP_IDLE),
                flow_key: service.flow_key,
                access_log: AccessLogSinks::Stdout,
            });
        } else {
            listener.default_chain = Some(FilterChain {
                name: name.clone(),
                matches: ChainMatch::default(),
                tls: None,
                rules: Vec::new(),
                filter: Filter::Tcp(TcpProxy {
                    clusters: vec![WeightedCluster::new(name.clone(), 1)],
                    idle_timeout: Some(port.idle_timeout.unwrap_or(TCP_IDLE)),
                    flow_key: service.flow_key,
                    access_log: AccessLogSinks::Stdout,
                }),
            });
        }
        insert(snapshot, listener);
    }
}

fn capture(name: &str, address: std::net::SocketAddr, transport: Transport) -> Listener {
    Listener {
        name: name.into(),
        address,
        transport,
        bind: true,
        use_original_destination: true,
        transparent: transport == Transport::Udp,
        chains: Vec::new(),
        default_chain: None,
        udp: None,
        allow_from: None,
        idle_end: None,
        flow_seed: None,
        source_address: SourceAddress::Agent,
    }
}

fn insert(snapshot: &mut Snapshot, listener: Listener) {
    snapshot.listeners.insert(listener.name.clone(), Arc::new(listener));
}
