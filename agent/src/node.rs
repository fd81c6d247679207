//! The node that an agent runs on, and detection of endpoints that lead back to the agent itself.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::ifaddrs::getifaddrs;
use weft_model::{Listener, Name, Snapshot, Transport};
use weft_runtime::socket::can_bind_foreign_addresses;

/// Properties of the node that a plan depends on, besides the configuration.
#[derive(Debug, Clone, Default)]
pub struct NodeInfo {
    /// The seed of the flow hash, if it overrides the seed of the configuration.
    pub seed: Option<u32>,
    /// The IP addresses of the host.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether this process may send from addresses of other hosts.
    pub can_bind_foreign_addresses: bool,
}

impl NodeInfo {
    /// Reads the current state of the node.
    ///
    /// # Errors
    /// When the host's addresses cannot be read.
    pub fn now(seed: Option<u32>) -> io::Result<Self> {
        let device_addresses = getifaddrs()?.filter_map(|device| device.address);
        let address = |raw: nix::sys::socket::SockaddrStorage| {
            let v4 = raw.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| raw.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        };
        let addresses = device_addresses.filter_map(address).collect();
        Ok(Self { seed, addresses, can_bind_foreign_addresses: can_bind_foreign_addresses() })
    }

    fn has(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.addresses.contains(&address)
    }

    /// Whether the virtual address of a service is an address of this host.
    pub(crate) fn owns_address_of(&self, listener: &Listener) -> bool {
        let address = listener.address.ip();
        !listener.bind && !address.is_loopback() && self.addresses.contains(&address)
    }
}

/// Finds endpoints whose flows would come back to a listener of this agent.
#[derive(Debug)]
pub(crate) struct LoopDetector<'a> {
    node: &'a NodeInfo,
    snapshot: &'a Snapshot,
    /// Listeners by their address.
    exact: HashMap<(Transport, SocketAddr), &'a Listener>,
    /// Listeners on all addresses of one family, by protocol, family (true: IPv4) and port.
    wildcard: HashMap<(Transport, bool, u16), &'a Listener>,
    /// The protocols of the flows that go to each cluster.
    carried: HashMap<&'a Name, BTreeSet<Transport>>,
}

impl<'a> LoopDetector<'a> {
    pub(crate) fn new(
        node: &'a NodeInfo,
        snapshot: &'a Snapshot,
        listeners: impl Iterator<Item = &'a Listener>,
    ) -> Self {
        let mut exact = HashMap::new();
        let mut wildcard = HashMap::new();
        let mut carried: HashMap<&Name, BTreeSet<Transport>> = HashMap::new();
        for listener in listeners {
            let transport = listener.transport;
            let address = listener.address;
            if listener.bind && address.ip().is_unspecified() {
                wildcard.insert((transport, address.is_ipv4(), address.port()), listener);
            } else {
                exact.insert((transport, address), listener);
            }
            for cluster in listener.flow_clusters() {
                carried.entry(cluster).or_default().insert(transport);
            }
        }
        Self { node, snapshot, exact, wildcard, carried }
    }

    /// The listener that would take a cluster's flows to an endpoint, if the flows would come back to the
    /// cluster from there, or end at a capture port.
    pub(crate) fn loop_listener(
        &self,
        cluster: &Name,
        endpoint: SocketAddr,
    ) -> Option<&'a Listener> {
        let loop_listener = self.at(cluster, endpoint)?;
        (loop_listener.use_original_destination || self.leads_back(loop_listener, cluster))
            .then_some(loop_listener)
    }

    /// The listener that a cluster's flows to an endpoint would reach.
    fn at(&self, cluster: &Name, endpoint: SocketAddr) -> Option<&'a Listener> {
        let endpoint = SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port());
        let is_here = self.node.has(endpoint.ip());
        let reached = |transport: &Transport| {
            let exact = self.exact.get(&(*transport, endpoint));
            let place = (*transport, endpoint.is_ipv4(), endpoint.port());
            exact.or_else(|| self.wildcard.get(&place).filter(|_| is_here)).copied()
        };
        self.carried.get(cluster)?.iter().find_map(reached)
    }

    /// Whether flows that a listener takes may go to a cluster, also through other listeners.
    fn leads_back(&self, loop_listener: &'a Listener, cluster: &Name) -> bool {
        let mut seen = BTreeSet::from([&loop_listener.name]);
        let mut waiting = vec![loop_listener];
        while let Some(listener) = waiting.pop() {
            for next in listener.flow_clusters() {
                if next == cluster {
                    return true;
                }
                let set = self.snapshot.clusters.get(next);
                let set = set.and_then(|next| self.snapshot.endpoints_of(next));
                for endpoint in set.map_or(&[][..], |set| &set.endpoints) {
                    let reached = self.at(next, endpoint.address);
                    waiting.extend(reached.filter(|listener| seen.insert(&listener.name)));
                }
            }
        }
        false
    }
}
