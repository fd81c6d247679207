//! What a snapshot means for the agent: for every destination, who serves it.
//!
//! A plan is built once per snapshot, away from the workers, and never changes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use weft_model::{
    Balance, Cluster, DEFAULT_TABLE_SIZE, Discovery, Filter, FlowKey, FlowTuple, Listener, Maglev,
    Name, Snapshot, TcpProxy, Transport, TransportKind, UdpProxy, WeightedCluster,
};

/// How many other endpoints are tried when a flow's own cannot be reached.
pub(crate) const OTHER_ENDPOINTS: usize = 2;

/// Everything the workers work by.
#[derive(Debug, Default)]
pub struct Plan {
    /// Which snapshot it was made of.
    pub revision: u64,
    listeners: BTreeMap<Name, Arc<Listener>>,
    /// Listeners that are not bound: they answer for connections redirected from their address.
    by_destination: HashMap<(Transport, SocketAddr), Arc<Listener>>,
    targets: HashMap<Name, Arc<Target>>,
    seed: u32,
}

/// A cluster as the agent sees it.
#[derive(Debug)]
pub struct Target {
    /// Its name.
    pub name: Name,
    /// How long a connection attempt may take.
    pub connect_timeout: Duration,
    picker: Picker,
    /// The endpoints that keep the flows they have: those that serve, and those that drain.
    keeping: BTreeSet<SocketAddr>,
}

impl Target {
    /// The table that decides about its flows, if one does.
    #[must_use]
    pub(crate) fn table(&self) -> Option<&Arc<Maglev>> {
        match &self.picker {
            Picker::Table(table) => Some(table),
            Picker::OriginalDestination => None,
        }
    }

    /// Whether a flow may stay on an endpoint that it has.
    #[must_use]
    pub(crate) fn keeps(&self, endpoint: SocketAddr) -> bool {
        match &self.picker {
            Picker::Table(_) => self.keeping.contains(&endpoint),
            Picker::OriginalDestination => true,
        }
    }

    /// The endpoints that keep the flows they have.
    pub(crate) fn keeping(&self) -> impl Iterator<Item = SocketAddr> {
        self.keeping.iter().copied()
    }
}

#[derive(Debug)]
enum Picker {
    /// The hash of the flow in a table.
    Table(Arc<Maglev>),
    /// The address the client aimed at.
    OriginalDestination,
}

/// Which endpoint a flow goes to, and what decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The hash of the 5-tuple fell on it.
    ByFlowHash(SocketAddr),
    /// The client aimed at it.
    ByOriginalDestination(SocketAddr),
    /// The service has no endpoint to offer.
    NoEndpoint,
}

impl Choice {
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

/// A listener that cannot be served by this tier, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unservable {
    /// The listener.
    pub listener: Name,
    /// Why.
    pub reason: &'static str,
}

impl Plan {
    /// Makes a plan of a snapshot. Listeners that need layer 7 are left out and told. Tables of
    /// clusters whose endpoints did not change are taken from `previous`.
    #[must_use]
    pub fn new(
        snapshot: &Snapshot,
        seed: u32,
        previous: Option<&(Arc<Snapshot>, Arc<Self>)>,
    ) -> (Self, Vec<Unservable>) {
        let mut plan = Self { revision: snapshot.revision, seed, ..Self::default() };
        let mut unservable = Vec::new();
        for (name, listener) in &snapshot.listeners {
            if let Some(reason) = needs_layer_7(listener) {
                unservable.push(Unservable { listener: name.clone(), reason });
                continue;
            }
            if !listener.bind {
                plan.by_destination
                    .insert((listener.transport, listener.address), listener.clone());
            }
            plan.listeners.insert(name.clone(), listener.clone());
        }
        for (name, cluster) in &snapshot.clusters {
            let kept = previous.and_then(|(old, plan)| plan.unchanged(name, old, snapshot));
            let target = kept.unwrap_or_else(|| Arc::new(target(cluster, snapshot, seed)));
            plan.targets.insert(name.clone(), target);
        }
        (plan, unservable)
    }

    fn unchanged(&self, name: &Name, old: &Snapshot, new: &Snapshot) -> Option<Arc<Target>> {
        let (before, after) = (old.clusters.get(name)?, new.clusters.get(name)?);
        let same = before == after && old.endpoints_of(before) == new.endpoints_of(after);
        if same { self.targets.get(name).cloned() } else { None }
    }

    /// The listeners that bind a socket.
    pub fn bound(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.listeners.values().filter(|listener| listener.bind)
    }

    /// The listeners that serve destinations: virtual ones, and bound ones that do not only capture.
    pub(crate) fn services(&self) -> impl Iterator<Item = &Arc<Listener>> {
        self.listeners.values().filter(|listener| !listener.use_original_destination)
    }

    /// The seed of the flow hash.
    pub(crate) fn seed(&self) -> u32 {
        self.seed
    }

    /// The listener of this name.
    #[must_use]
    pub fn listener(&self, name: &str) -> Option<&Arc<Listener>> {
        self.listeners.get(name)
    }

    /// The listener that answers for `destination`: a service's own, or `accepted`, which took it in.
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

    /// How a TCP connection to `destination` is moved; none when nobody serves it.
    #[must_use]
    pub fn tcp<'a>(&self, listener: &'a Listener, destination: SocketAddr) -> Option<&'a TcpProxy> {
        match &listener.chain_for(destination, TransportKind::Plain)?.filter {
            Filter::Tcp(tcp) => Some(tcp),
            Filter::Http(_) => None,
        }
    }

    /// How a datagram to this listener is moved.
    #[must_use]
    pub fn udp<'a>(&self, listener: &'a Listener) -> Option<&'a UdpProxy> {
        listener.udp.as_ref()
    }

    /// The target of a flow among weighted clusters. The draw is the flow's own hash, so that every
    /// agent sends the flow to the same one.
    #[must_use]
    pub fn target(&self, tcp: &TcpProxy, flow: &FlowTuple) -> Option<&Arc<Target>> {
        let draw = flow.hash(tcp.flow_key, !self.seed);
        self.targets.get(&WeightedCluster::draw(&tcp.clusters, draw)?.name)
    }

    /// The target of this name.
    #[must_use]
    pub fn target_named(&self, name: &str) -> Option<&Arc<Target>> {
        self.targets.get(name)
    }

    /// The endpoint for a flow: attempt 0 is its own, 1 and up are where it goes when that one
    /// cannot be reached.
    #[must_use]
    pub fn pick(&self, target: &Target, flow: &FlowTuple, key: FlowKey, attempt: usize) -> Choice {
        match &target.picker {
            Picker::Table(table) => table
                .pick_after(flow.hash(key, self.seed), attempt)
                .map_or(Choice::NoEndpoint, Choice::ByFlowHash),
            Picker::OriginalDestination if attempt == 0 => {
                Choice::ByOriginalDestination(flow.destination)
            }
            Picker::OriginalDestination => Choice::NoEndpoint,
        }
    }
}

/// Where a flow goes and why, for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Explanation {
    /// The listener that answers for the destination.
    pub listener: String,
    /// The cluster that its flows go to.
    pub cluster: String,
    /// The hash of the 5-tuple under the mesh's seed.
    pub hash: u32,
    /// The slot on which it falls, and of how many; none where no table decides.
    pub slot: Option<(usize, usize)>,
    /// The flow's endpoint, then where it goes when that one cannot be reached.
    pub endpoints: Vec<SocketAddr>,
    /// What decided.
    pub choice: &'static str,
}

impl Plan {
    /// Where a new flow would go.
    ///
    /// # Errors
    /// Why it would go nowhere.
    pub fn explain(&self, flow: &FlowTuple) -> Result<Explanation, String> {
        let (transport, destination) = (flow.transport, flow.destination);
        let bound = self.bound().find(|bound| {
            let addressed = bound.address == destination
                || bound.address.ip().is_unspecified()
                    && bound.address.port() == destination.port();
            bound.transport == transport && addressed
        });
        let listener = self.by_destination.get(&(transport, destination)).or(bound);
        let listener = listener.ok_or_else(|| format!("no listener answers for {destination}"))?;
        let target = match transport {
            Transport::Tcp => {
                let tcp = self.tcp(listener, destination);
                tcp.and_then(|tcp| Some((self.target(tcp, flow)?, tcp.flow_key)))
            }
            Transport::Udp => {
                let udp = self.udp(listener);
                udp.and_then(|udp| Some((self.target_named(&udp.cluster)?, udp.flow_key)))
            }
        };
        let (target, key) =
            target.ok_or_else(|| format!("{:?} leads to no cluster", &*listener.name))?;
        let hash = flow.hash(key, self.seed);
        let slot = match &target.picker {
            Picker::Table(table) => table.slot(hash).map(|slot| (slot, table.size())),
            Picker::OriginalDestination => None,
        };
        let choices = (0..=OTHER_ENDPOINTS).map(|attempt| self.pick(target, flow, key, attempt));
        Ok(Explanation {
            listener: listener.name.to_string(),
            cluster: target.name.to_string(),
            hash,
            slot,
            endpoints: choices.filter_map(Choice::endpoint).collect(),
            choice: self.pick(target, flow, key, 0).word(),
        })
    }
}

fn target(cluster: &Cluster, snapshot: &Snapshot, seed: u32) -> Target {
    let picker = match cluster.discovery {
        Discovery::OriginalDestination => Picker::OriginalDestination,
        Discovery::Static(_) | Discovery::Endpoints(_) | Discovery::Dns(_) => {
            let endpoints = snapshot.endpoints_of(cluster).map_or(&[][..], |set| &set.endpoints);
            // At this tier every flow is hashed: round robin would not survive a restart.
            let size = match cluster.balance {
                Balance::Maglev { table_size } => table_size,
                Balance::RoundRobin | Balance::LeastRequests => DEFAULT_TABLE_SIZE,
            };
            let table = Maglev::new(endpoints, size, seed)
                .or_else(|_| Maglev::new(endpoints, DEFAULT_TABLE_SIZE, seed));
            Picker::Table(Arc::new(table.expect("the default table size is a prime")))
        }
    };
    let endpoints = snapshot.endpoints_of(cluster).map_or(&[][..], |set| &set.endpoints);
    let keeping = endpoints.iter().filter(|endpoint| endpoint.health.keeps_work());
    Target {
        name: cluster.name.clone(),
        connect_timeout: cluster.connect_timeout,
        picker,
        keeping: keeping.map(|endpoint| endpoint.address).collect(),
    }
}

/// Why a listener is not this tier's: what it asks for would need the bytes opened.
fn needs_layer_7(listener: &Listener) -> Option<&'static str> {
    let mut chains = listener.chains.iter().chain(&listener.default_chain);
    chains.find_map(|chain| match (&chain.tls, &chain.filter) {
        (Some(_), _) => Some("it terminates TLS, which is the sidecar's work"),
        (None, Filter::Http(_)) => Some("it serves HTTP, which is the sidecar's work"),
        (None, Filter::Tcp(_)) => None,
    })
}
