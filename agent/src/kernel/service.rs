//! Which services the kernel can carry by itself, and why not the others.

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use weft_model::{Cidr, FlowKey, Listener, Maglev, Name, Transport};

use crate::plan::{AgentPlan, AgentTarget};

/// How flows to a service are moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FlowPath {
    /// By the kernel alone.
    Kernel,
    /// By us, and why.
    Proxy(NeedsProxy),
}

/// Why a service is not left to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NeedsProxy {
    /// The agent was told so.
    Chosen,
    /// This process listens there itself.
    Bound,
    /// It goes where each client aimed at.
    OriginalDestination,
    /// Which chain serves a connection depends on more than its destination.
    Chains,
    /// Flows are divided among several clusters.
    SeveralClusters,
    /// There is no endpoint: new flows are refused, which the kernel would not tell anybody.
    NoEndpoint,
    /// The endpoint's address is of the other family.
    OtherFamily(SocketAddr),
    /// Another listener has the same address and protocol.
    AddressTaken,
    /// The listener or an endpoint is on loopback, where the kernel does not send what comes from others.
    OnLoopback(SocketAddr),
    /// Connections that were silent for too long are to end for both sides to see, and the kernel just
    /// forgets them.
    IdleEnd,
    /// The kernel's tables would have more slots than they may.
    TooLarge,
    /// The kernel refused.
    Refused(String),
}

impl fmt::Display for NeedsProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen => f.write_str("the agent runs with --path proxy"),
            Self::Bound => {
                f.write_str("the agent listens there itself; --path kernel carries it all the same")
            }
            Self::OriginalDestination => f.write_str("it goes where each client aimed at"),
            Self::Chains => f.write_str("its filter chains look at more than the destination"),
            Self::SeveralClusters => f.write_str("its flows go to several clusters by weight"),
            Self::NoEndpoint => f.write_str("it has no endpoint, and new flows are refused"),
            Self::OtherFamily(endpoint) => {
                write!(f, "its endpoint {endpoint} is of the other address family")
            }
            Self::AddressTaken => f.write_str("another listener has the same address"),
            Self::OnLoopback(address) => write!(f, "{address} is on loopback"),
            Self::IdleEnd => f.write_str(
                "its idle_end is to be seen, and the kernel forgets silent connections without a word",
            ),
            Self::TooLarge => f.write_str("the kernel's tables hold as many slots as they may"),
            Self::Refused(reason) => write!(f, "the kernel refused: {reason}"),
        }
    }
}

/// The address that a service is reached at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ServiceAddress {
    /// Its own.
    Exact(SocketAddr),
    /// Any of this host's, of the family of this unspecified address.
    AnyLocal(SocketAddr),
}

impl ServiceAddress {
    fn of(listener: &Listener) -> Self {
        let is_any = listener.address.ip().is_unspecified();
        if is_any { Self::AnyLocal(listener.address) } else { Self::Exact(listener.address) }
    }

    pub(super) fn is_ipv4(self) -> bool {
        match self {
            Self::Exact(address) | Self::AnyLocal(address) => address.is_ipv4(),
        }
    }
}

/// What tells a service from others.
pub(super) type ServiceKey = (Transport, ServiceAddress);

/// A service that the kernel can carry. Its endpoints are of one family, which is its address's.
#[derive(Debug, Clone)]
pub(super) struct KernelService {
    pub(super) key: ServiceKey,
    pub(super) listener: Name,
    pub(super) target: Arc<AgentTarget>,
    /// The target's Maglev table.
    pub(super) table: Arc<Maglev>,
    /// What of a flow is hashed.
    pub(super) flow_key: FlowKey,
    /// The seed of the hash of its protocol's flows.
    pub(super) seed: u32,
    /// Whether a record is written per flow.
    pub(super) logged: bool,
}

/// Whose flows to a service are let in; all others are dropped. It holds on both ways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SecurityGroup {
    pub(super) key: ServiceKey,
    pub(super) ranges: Vec<Cidr>,
}

/// Every service of a plan: those that the kernel can carry, and why not the others; and the security
/// groups of both.
#[derive(Debug, Default)]
pub(super) struct PathAssignment {
    pub(super) kernel: Vec<KernelService>,
    pub(super) groups: Vec<SecurityGroup>,
    pub(super) proxied: Vec<ProxiedService>,
}

/// A service that the kernel does not carry, and why.
#[derive(Debug, Clone)]
pub(super) struct ProxiedService {
    pub(super) listener: Name,
    pub(super) reason: NeedsProxy,
    pub(super) key: ServiceKey,
    /// Wherever its flows may go.
    pub(super) targets: Vec<Arc<AgentTarget>>,
}

/// Which way flows are to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PathChoice {
    /// The kernel's, for virtual addresses of services that need nothing else.
    #[default]
    Auto,
    /// The kernel's, wherever it can; for addresses at which this process listens as well.
    Kernel,
    /// Ours.
    Proxy,
}

/// Divides the services of a plan. `slot_limit` is how many slots the kernel's tables may have in
/// all; the first services by name get them.
pub(super) fn assign_paths(
    plan: &AgentPlan,
    choice: PathChoice,
    slot_limit: usize,
) -> PathAssignment {
    let mut assignment = PathAssignment::default();
    let mut slots = 0;
    let mut keys = HashSet::new();
    for listener in plan.services() {
        if let Some(ranges) = &listener.allow_from {
            let key = (listener.transport, ServiceAddress::of(listener));
            assignment.groups.push(SecurityGroup { key, ranges: ranges.clone() });
        }
        let proxied = |reason| ProxiedService {
            listener: listener.name.clone(),
            reason,
            key: (listener.transport, ServiceAddress::of(listener)),
            targets: targets(plan, listener),
        };
        match kernel_service(plan, listener, choice) {
            Ok(service) if !keys.insert(service.key) => {
                assignment.proxied.push(proxied(NeedsProxy::AddressTaken));
            }
            Ok(service) if slots + service.table.size() > slot_limit => {
                assignment.proxied.push(proxied(NeedsProxy::TooLarge));
            }
            Ok(service) => {
                slots += service.table.size();
                assignment.kernel.push(service);
            }
            Err(reason) => assignment.proxied.push(proxied(reason)),
        }
    }
    assignment
}

/// Wherever flows to a listener may go.
fn targets(plan: &AgentPlan, listener: &Listener) -> Vec<Arc<AgentTarget>> {
    let targets = listener.flow_clusters().filter_map(|name| plan.target_named(name));
    targets.cloned().collect()
}

fn kernel_service(
    plan: &AgentPlan,
    listener: &Listener,
    choice: PathChoice,
) -> Result<KernelService, NeedsProxy> {
    match choice {
        PathChoice::Proxy => return Err(NeedsProxy::Chosen),
        PathChoice::Auto if listener.bind => return Err(NeedsProxy::Bound),
        PathChoice::Auto | PathChoice::Kernel => {}
    }
    let (target, flow_key, logged) = match listener.transport {
        Transport::Tcp if listener.chains.iter().any(|chain| !chain.matches.is_empty()) => {
            return Err(NeedsProxy::Chains);
        }
        Transport::Tcp => {
            let tcp = plan.tcp(listener, listener.address).ok_or(NeedsProxy::Chains)?;
            let [only] = tcp.clusters.as_slice() else { return Err(NeedsProxy::SeveralClusters) };
            (plan.target_named(&only.name), tcp.flow_key, tcp.access_log)
        }
        Transport::Udp => {
            let udp = plan.udp(listener).ok_or(NeedsProxy::NoEndpoint)?;
            (plan.target_named(&udp.cluster), udp.flow_key, udp.access_log)
        }
    };
    if listener.idle_end.is_some() {
        return Err(NeedsProxy::IdleEnd);
    }
    if listener.address.ip().is_loopback() {
        return Err(NeedsProxy::OnLoopback(listener.address));
    }
    let target = target.ok_or(NeedsProxy::NoEndpoint)?;
    let table = target.table().ok_or(NeedsProxy::OriginalDestination)?;
    if table.endpoints().is_empty() {
        return Err(NeedsProxy::NoEndpoint);
    }
    let is_ipv4 = listener.address.is_ipv4();
    if let Some(other) = table.endpoints().iter().find(|e| e.is_ipv4() != is_ipv4) {
        return Err(NeedsProxy::OtherFamily(*other));
    }
    if let Some(local) = table.endpoints().iter().find(|e| e.ip().is_loopback()) {
        return Err(NeedsProxy::OnLoopback(*local));
    }
    Ok(KernelService {
        key: (listener.transport, ServiceAddress::of(listener)),
        listener: listener.name.clone(),
        target: target.clone(),
        table: table.clone(),
        flow_key,
        seed: listener.transport.seed(plan.seed()),
        logged,
    })
}
