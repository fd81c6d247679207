//! The node that an agent runs on, and which endpoints would lead back to the agent itself.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::ifaddrs::getifaddrs;
use weft_model::{Filter, Listener, Name, Transport};

/// What a plan takes into account beside the configuration.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// The seed of the flow hash, where it is not to be the configuration's.
    pub seed: Option<u32>,
    /// The addresses of the host.
    pub addresses: BTreeSet<IpAddr>,
}

impl Node {
    /// The node as it is now.
    ///
    /// # Errors
    /// When the kernel does not tell its addresses.
    pub fn now(seed: Option<u32>) -> io::Result<Self> {
        let told = getifaddrs()?.filter_map(|device| device.address);
        let address = |told: nix::sys::socket::SockaddrStorage| {
            let v4 = told.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| told.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        };
        Ok(Self { seed, addresses: told.filter_map(address).collect() })
    }

    fn has(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.addresses.contains(&address)
    }

    /// Whether the address of a service, which is to be nobody's, is one of the host's own.
    pub(crate) fn occupies(&self, listener: &Listener) -> bool {
        let address = listener.address.ip();
        !listener.bind && !address.is_loopback() && self.addresses.contains(&address)
    }
}

/// Who takes what is sent where, among the listeners of an agent.
#[derive(Debug)]
pub(crate) struct Ourselves<'a> {
    node: &'a Node,
    listeners: Vec<&'a Listener>,
    /// Over which protocols flows go to a cluster.
    carried: HashMap<&'a Name, BTreeSet<Transport>>,
}

impl<'a> Ourselves<'a> {
    pub(crate) fn new(node: &'a Node, listeners: impl Iterator<Item = &'a Listener>) -> Self {
        let listeners: Vec<&Listener> = listeners.collect();
        let mut carried: HashMap<&Name, BTreeSet<Transport>> = HashMap::new();
        for listener in &listeners {
            for cluster in clusters(listener) {
                carried.entry(cluster).or_default().insert(listener.transport);
            }
        }
        Self { node, listeners, carried }
    }

    /// The listener that would take a cluster's flows to an endpoint: they would go round for ever.
    pub(crate) fn taker(&self, cluster: &Name, endpoint: SocketAddr) -> Option<&'a Listener> {
        let transports = self.carried.get(cluster)?;
        let endpoint = SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port());
        let takes = |listener: &&&Listener| {
            let everywhere = listener.bind && listener.address.ip().is_unspecified();
            let is_there = listener.address == endpoint
                || everywhere
                    && listener.address.port() == endpoint.port()
                    && self.node.has(endpoint.ip());
            is_there && transports.contains(&listener.transport)
        };
        self.listeners.iter().find(takes).copied()
    }
}

/// The clusters that a listener's flows go to.
fn clusters(listener: &Listener) -> impl Iterator<Item = &Name> {
    let chains = listener.chains.iter().chain(&listener.default_chain);
    let of_chains = chains.flat_map(|chain| match &chain.filter {
        Filter::Tcp(tcp) => tcp.clusters.as_slice(),
        Filter::Http(_) => &[],
    });
    let of_udp = listener.udp.as_ref().map(|udp| &udp.cluster);
    of_chains.map(|cluster| &cluster.name).chain(of_udp)
}
