//! The plan of the agent: for each destination, the listener and the cluster that serve it.
//!
//! A plan is built once per snapshot, outside the workers, and is immutable.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use weft_model::{
    AddressConflict, Balance, Cluster, DEFAULT_TABLE_SIZE, Discovery, Endpoint, Filter, FlowKey,
    FlowTuple, Listener, Maglev, Name, Snapshot, SourceAddress, TcpProxy, Transport, TransportKind,
    UdpProxy, WeightedCluster,
};

use weft_runtime::problems::Problems;

use crate::node::{LoopDetector, NodeInfo};

/// The seed of the flow hash when neither the command line nor the configuration has one. It is not secret.
const DEFAULT_SEED: u32 = 0x5eed;
/// How many other endpoints are tried when the endpoint of a flow cannot be reached.
pub(crate) const OTHER_ENDPOINTS: usize = 2;

/// The configuration that the workers use.
#[derive(Debug, Default)]
pub struct AgentPlan {
    /// The revision of the snapshot.
    pub revision: u64,
    listeners: BTreeMap<Name, Arc<Listener>>,
    /// Listeners that are not bound, by the address whose redirected connections they serve.
    pub(crate) by_destination: HashMap<(Transport, SocketAddr), Arc<Listener>>,
    targets: HashMap<Name, Arc<AgentTarget>>,
    looping_endpoints: usize,
    seed: u32,
}

/// A cluster in the form that the agent uses.
#[derive(Debug)]
pub struct AgentTarget {
    /// The name of the cluster.
    pub name: Name,
    /// The timeout of a connection attempt.
    pub connect_timeout: Duration,
    picker: Picker,
    /// The endpoints that the picker was built from.
    endpoints: Vec<Endpoint>,
    /// The endpoints that keep their existing flows: healthy and draining ones.
    retained: BTreeSet<SocketAddr>,
}

impl AgentTarget {
    /// The Maglev table of the cluster, if it has one.
    #[must_use]
    pub(crate) fn table(&self) -> Option<&Arc<Maglev>> {
        match &self.picker {
            Picker::Table(table) => Some(table),
            Picker::OriginalDestination => None,
        }
    }

    /// Whether an existing flow may stay on an endpoint.
    #[must_use]
    pub(crate) fn retains(&self, endpoint: SocketAddr) -> bool {
        match &self.picker {
            Picker::Table(_) => self.retained.contains(&endpoint),
            Picker::OriginalDestination => true,
        }
    }

    /// The endpoint for a flow with this hash. Attempt 0 gives the flow's endpoint; later attempts give the
    /// endpoints to try when it cannot be reached.
    #[must_use]
    pub(crate) fn pick(&self, flow: &FlowTuple, hash: u32, attempt: usize) -> EndpointChoice {
        match &self.picker {
            Picker::Table(table) => table
                .pick_after(hash, attempt)
                .map_or(EndpointChoice::NoEndpoint, EndpointChoice::ByFlowHash),
            Picker::OriginalDestination if attempt == 0 => {
                EndpointChoice::ByOriginalDestination(flow.destination)
            }
            Picker::OriginalDestination => EndpointChoice::NoEndpoint,
        }
    }

    /// The endpoints that keep their existing flows.
    pub(crate) fn retained(&self) -> impl Iterator<Item = SocketAddr> {
        self.retained.iter().copied()
    }
}

#[derive(Debug)]
enum Picker {
    /// The Maglev table, by the hash of the flow.
    Table(Arc<Maglev>),
    /// The original destination.
    OriginalDestination,
}

/// The endpoint of a flow, and what decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointChoice {
    /// Chosen by the hash of the 5-tuple.
    ByFlowHash(SocketAddr),
    /// The original destination of the flow.
    ByOriginalDestination(SocketAddr),
    /// The service has no endpoint.
    NoEndpoint,
}

impl EndpointChoice {
    /// The endpoint, if there is one.
    #[must_use]
    pub fn endpoint(self) -> Option<SocketAddr> {
        match self {
            Self::ByFlowHash(endpoint) | Self::ByOriginalDestination(endpoint) => Some(endpoint),
            Self::NoEndpoint => None,
        }
    }

    /// The word in logs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::ByFlowHash(_) => "flow_hash",
            Self::ByOriginalDestination(_) => "original_destination",
            Self::NoEndpoint => "none",
        }
    }
}

/// A part of a snapshot that the agent does not serve, or serves with a restriction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentPlanProblem {
    /// A listener that needs layer 7. It is not served.
    NeedsSidecar {
        /// The listener.
        listener: Name,
        /// What it needs.
        reason: &'static str,
    },
    /// A listener whose address another listener has. It is not served.
    Conflict(AddressConflict),
    /// An endpoint that leads back to this agent. It gets no flows.
    Loop {
        /// The cluster of the endpoint.
        cluster: Name,
        /// The endpoint.
        endpoint: SocketAddr,
        /// The listener that would take its flows.
        listener: Name,
    },
    /// A virtual address that is an address of this host, so connections from programs on this host are not
    /// redirected.
    LocalAddress {
        /// The service's listener.
        listener: Name,
        /// The address.
        address: SocketAddr,
    },
    /// A service that preserves client addresses, with an endpoint of the other address family, which sees
    /// the agent's address.
    SourceFamilyMismatch {
        /// The service's listener.
        listener: Name,
        /// The endpoint.
        endpoint: SocketAddr,
    },
    /// A service that preserves client addresses, which this process may not send from. Its flows on the
    /// proxy path are refused.
    SourceNotPermitted {
        /// The service's listener.
        listener: Name,
    },
}

impl AgentPlanProblem {
    /// Groups problems by their effect on readiness.
    #[must_use]
    pub fn classify(all: &[Self]) -> Problems {
        let mut problems = Problems::default();
        for problem in all {
            match problem {
                Self::NeedsSidecar { .. } | Self::Conflict(_) => {
                    problems.unserved.push(problem.to_string());
                }
                Self::Loop { .. }
                | Self::LocalAddress { .. }
                | Self::SourceFamilyMismatch { .. }
                | Self::SourceNotPermitted { .. } => problems.warn(problem.to_string()),
            }
        }
        problems
    }
}

impl fmt::Display for AgentPlanProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeedsSidecar { listener, reason } => {
                write!(f, "listener {listener:?} is not served: {reason}")
            }
            Self::Conflict(conflict) => conflict.fmt(f),
            Self::Loop { cluster, endpoint, listener } => write!(
                f,
                "cluster {cluster:?}: endpoint {endpoint} is excluded: it is this agent's own listener {listener:?}, so its flows would loop"
            ),
            Self::LocalAddress { listener, address } => write!(
                f,
                "listener {listener:?}: {address} is an address of this host; the virtual address of a service must not be an address of any host"
            ),
            Self::SourceFamilyMismatch { listener, endpoint } => write!(
                f,
                "listener {listener:?}: endpoint {endpoint} is of another address family than its clients, and sees the agent's address"
            ),
            Self::SourceNotPermitted { listener } => write!(
                f,
                "listener {listener:?}: keeping client addresses on the proxy path needs the capability NET_RAW or NET_ADMIN; without it those flows are refused"
            ),
        }
    }
}

impl AgentPlan {
    /// Builds a plan from a snapshot, and lists what the agent cannot serve. Maglev tables of clusters whose
    /// endpoints did not change are reused from `previous`.
    #[must_use]
    pub fn new(
        snapshot: &Snapshot,
        node: &NodeInfo,
        previous: Option<&(Arc<Snapshot>, Arc<Self>)>,
    ) -> (Self, Vec<AgentPlanProblem>) {
        let configured = snapshot.listeners.values().find_map(|listener| listener.flow_seed);
        let seed = node.seed.or(configured).unwrap_or(DEFAULT_SEED);
        let mut plan = Self { revision: snapshot.revision, seed, ..Self::default() };
        let mut problems = Vec::new();
        let conflicts = snapshot.address_conflicts();
        problems.extend(conflicts.iter().cloned().map(AgentPlanProblem::Conflict));
        for (name, listener) in &snapshot.listeners {
            if conflicts.iter().any(|conflict| conflict.second == *name) {
                continue;
            }
            if let Some(reason) = needs_layer_7(listener) {
                problems.push(AgentPlanProblem::NeedsSidecar { listener: name.clone(), reason });
                continue;
            }
            if node.owns_address_of(listener) {
                let address = listener.address;
                problems.push(AgentPlanProblem::LocalAddress { listener: name.clone(), address });
            }
            if listener.source_address == SourceAddress::Client && !node.can_bind_foreign_addresses
            {
                problems.push(AgentPlanProblem::SourceNotPermitted { listener: name.clone() });
            }
            if !listener.bind {
                plan.by_destination
                    .insert((listener.transport, listener.address), listener.clone());
            }
            plan.listeners.insert(name.clone(), listener.clone());
        }
        let loop_detector =
            LoopDetector::new(node, snapshot, plan.listeners.values().map(Arc::as_ref));
        let mut targets = HashMap::new();
        for (name, cluster) in &snapshot.clusters {
            let set = snapshot.endpoints_of(cluster);
            let endpoints = set.map_or(&[][..], |set| &set.endpoints);
            let (looping, good): (Vec<_>, Vec<_>) = endpoints
                .iter()
                .map(|endpoint| {
                    (loop_detector.loop_listener(name, endpoint.address), endpoint.clone())
                })
                .partition(|(loop_listener, _)| loop_listener.is_some());
            plan.looping_endpoints += looping.len();
            problems.extend(looping.iter().filter_map(|(loop_listener, endpoint)| {
                let listener = loop_listener.as_ref()?.name.clone();
                Some(AgentPlanProblem::Loop {
                    cluster: name.clone(),
                    endpoint: endpoint.address,
                    listener,
                })
            }));
            let good: Vec<Endpoint> = good.into_iter().map(|(_, endpoint)| endpoint).collect();
            let previous = previous.filter(|(_, plan)| plan.seed == seed);
            let kept = previous.and_then(|(old, plan)| plan.unchanged(cluster, old, &good));
            let target = kept.unwrap_or_else(|| Arc::new(target(cluster, good, seed)));
            targets.insert(name.clone(), target);
        }
        plan.targets = targets;
        problems.extend(
            plan.listeners.values().filter_map(|listener| plan.source_family_mismatch(listener)),
        );
        (plan, problems)
    }

    /// Finds an endpoint that cannot see client addresses although the listener preserves them.
    fn source_family_mismatch(&self, listener: &Listener) -> Option<AgentPlanProblem> {
        let targets = listener.flow_clusters().filter_map(|name| self.targets.get(name));
        let mut endpoints = targets.flat_map(|target| &target.endpoints);
        let is_other = |e: &&Endpoint| e.address.is_ipv4() != listener.address.is_ipv4();
        let other =
            endpoints.find(is_other).filter(|_| listener.source_address == SourceAddress::Client);
        let endpoint = other?.address;
        Some(AgentPlanProblem::SourceFamilyMismatch { listener: listener.name.clone(), endpoint })
    }

    fn unchanged(
        &self,
        now: &Cluster,
        old: &Snapshot,
        good: &[Endpoint],
    ) -> Option<Arc<AgentTarget>> {
        let before = old.clusters.get(&now.name)?;
        let target = self.targets.get(&now.name)?;
        (**before == *now && target.endpoints == good).then(|| target.clone())
    }

    /// The listeners that bind a socket.
    pub fn bound(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.listeners.values().filter(|listener| listener.bind)
    }

    /// The listeners that serve destinations: virtual ones, and bound ones that are not only capture ports.
    pub(crate) fn services(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.listeners.values().filter(|listener| !listener.use_original_destination)
    }

    /// The number of endpoints that are excluded because they lead back to this agent.
    #[must_use]
    pub fn looping_endpoints(&self) -> usize {
        self.looping_endpoints
    }

    /// The seed of the flow hash.
    pub(crate) fn seed(&self) -> u32 {
        self.seed
    }

    /// The listener with this name.
    #[must_use]
    pub fn listener(&self, name: &str) -> Option<&Arc<Listener>> {
        self.listeners.get(name)
    }

    /// The listener that serves `destination`: the listener of a service, or `accepted`, the listener that
    /// accepted the flow.
    #[must_use]
    pub fn listener_for<'a>(
        &'a self,
        accepted: &'a Listener,
        destination: SocketAddr,
    ) -> &'a Listener {
        if !accepted.use_original_destination {
            return accepted;
        }
        self.by_destination.get(&(accepted.transport, destination)).map_or(accepted, Arc::as_ref)
    }

    /// How a TCP connection to `destination` is proxied; `None` if no filter chain matches.
    #[must_use]
    pub fn tcp<'a>(&self, listener: &'a Listener, destination: SocketAddr) -> Option<&'a TcpProxy> {
        match &listener.chain_for(destination, TransportKind::Plain)?.filter {
            Filter::Tcp(tcp) => Some(tcp),
            Filter::Http(_) => None,
        }
    }

    /// How a datagram to this listener is proxied.
    #[must_use]
    pub fn udp<'a>(&self, listener: &'a Listener) -> Option<&'a UdpProxy> {
        listener.udp.as_ref()
    }

    /// The target of a flow among weighted clusters. The hash of the flow decides, so every agent chooses the same
    /// target.
    #[must_use]
    pub fn target(
        &self,
        tcp: &TcpProxy,
        flow: &FlowTuple,
        sequence: u32,
    ) -> Option<&Arc<AgentTarget>> {
        // Another seed than that of the endpoint, so that each cluster gets flows for all its endpoints.
        let draw = flow.hash(tcp.flow_key, sequence, !self.seed);
        self.targets.get(&WeightedCluster::pick(&tcp.clusters, draw)?.name)
    }

    /// Whether connections accepted by this listener may be hashed with the sequence numbers of their SYNs.
    #[must_use]
    pub fn takes_sequence(&self, accepted: &Listener) -> bool {
        let of = |listener: &Listener| {
            let mut chains = listener.all_chains();
            chains.any(|chain| match &chain.filter {
                Filter::Tcp(tcp) => tcp.flow_key.takes_sequence(Transport::Tcp),
                Filter::Http(_) => false,
            })
        };
        let captures = accepted.use_original_destination;
        of(accepted) || captures && self.by_destination.values().any(|service| of(service))
    }

    /// The target with this name.
    #[must_use]
    pub fn target_named(&self, name: &str) -> Option<&Arc<AgentTarget>> {
        self.targets.get(name)
    }

    /// The hash of a flow.
    #[must_use]
    pub fn hash(&self, flow: &FlowTuple, key: FlowKey, sequence: u32) -> u32 {
        flow.hash(key, sequence, self.seed)
    }
}

fn target(cluster: &Cluster, endpoints: Vec<Endpoint>, seed: u32) -> AgentTarget {
    let picker = match cluster.discovery {
        Discovery::OriginalDestination => Picker::OriginalDestination,
        Discovery::Static(_) | Discovery::Endpoints(_) | Discovery::Dns(_) => {
            // The agent hashes every flow: round robin would move flows when the agent restarts.
            let size = match cluster.balance {
                Balance::Maglev { table_size } => table_size,
                Balance::RoundRobin | Balance::LeastRequests => DEFAULT_TABLE_SIZE,
            };
            let table = Maglev::new(&endpoints, size, seed)
                .or_else(|_| Maglev::new(&endpoints, DEFAULT_TABLE_SIZE, seed));
            Picker::Table(Arc::new(table.expect("the default table size is prime")))
        }
    };
    let retained = endpoints.iter().filter(|endpoint| endpoint.health.keeps_existing_traffic());
    AgentTarget {
        name: cluster.name.clone(),
        connect_timeout: cluster.connect_timeout,
        picker,
        retained: retained.map(|endpoint| endpoint.address).collect(),
        endpoints,
    }
}

/// Why a listener needs layer 7, which the agent does not inspect.
fn needs_layer_7(listener: &Listener) -> Option<&'static str> {
    let mut chains = listener.all_chains();
    chains.find_map(|chain| match (&chain.tls, &chain.filter) {
        (Some(_), _) => Some("it terminates TLS, which needs a sidecar"),
        (None, Filter::Http(_)) => Some("it serves HTTP, which needs a sidecar"),
        (None, Filter::Tcp(_)) if !chain.rules.is_empty() => {
            Some("its RBAC rules match client identities, which needs a sidecar")
        }
        (None, Filter::Tcp(_)) => None,
    })
}
