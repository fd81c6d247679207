//! The node that an agent runs on, and which endpoints would lead back to the agent itself.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::ifaddrs::getifaddrs;
use weft_model::{Listener, Name, Snapshot, Transport};
use weft_runtime::socket::can_bind_foreign_addresses;

/// What a plan takes into account beside the configuration.
#[derive(Debug, Clone, Default)]
pub struct NodeInfo {
    /// The seed of the flow hash, where it is not to be the configuration's.
    pub seed: Option<u32>,
    /// The addresses of the host.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether we may send from others' addresses.
    pub can_bind_foreign_addresses: bool,
}

impl NodeInfo {
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
        let addresses = told.filter_map(address).collect();
        Ok(Self { seed, addresses, can_bind_foreign_addresses: can_bind_foreign_addresses() })
    }

    fn has(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.addresses.contains(&address)
    }

    /// Whether the address of a service, which is to be nobody's, is one of the host's own.
    pub(crate) fn owns_address_of(&self, listener: &Listener) -> bool {
        let address = listener.address.ip();
        !listener.bind && !address.is_loopback() && self.addresses.contains(&address)
    }
}

/// Who takes what is sent where, among the listeners of an agent.
#[derive(Debug)]
pub(crate) struct LoopDetector<'a> {
    node: &'a NodeInfo,
    snapshot: &'a Snapshot,
    /// Listeners of one address.
    exact: HashMap<(Transport, SocketAddr), &'a Listener>,
    /// Listeners of all addresses of a family, by their port. The other family is not theirs.
    wildcard: HashMap<(Transport, bool, u16), &'a Listener>,
    /// Over which protocols flows go to a cluster.
    carried: HashMap<&'a Name, BTreeSet<Transport>>,
}

impl<'a> LoopDetector<'a> {
    pub(crate) fn new(
        node: &'a NodeInfo,
        snapshot: &'a Snapshot,
        listeners: impl Iterator<Item = &'a Listener>,
    ) -> Self {
        let (mut exact, mut wildcard) = (HashMap::new(), HashMap::new());
        let mut carried: HashMap<&Name, BTreeSet<Transport>> = HashMap::new();
        for listener in listeners {
            let (transport, address) = (listener.transport, listener.address);
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

    /// The listener that would take a cluster's flows to an endpoint, when they would come back to the
    /// cluster from there, or end at once at a capture port.
    pub(crate) fn loop_listener(
        &self,
        cluster: &Name,
        endpoint: SocketAddr,
    ) -> Option<&'a Listener> {
        let loop_listener = self.at(cluster, endpoint)?;
        (loop_listener.use_original_destination || self.leads_back(loop_listener, cluster))
            .then_some(loop_listener)
    }

    /// The listener that a cluster's flows to an endpoint reach.
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

    /// Whether flows that a listener takes may go to a cluster, by way of other listeners too.
    fn leads_back(&self, loop_listener: &'a Listener, cluster: &Name) -> bool {
        let (mut seen, mut waiting) = (BTreeSet::from([&loop_listener.name]), vec![loop_listener]);
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
