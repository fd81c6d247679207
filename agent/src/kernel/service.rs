//! Decides which services the kernel can carry, and why others need the proxy.

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use weft_model::{AccessLogSinks, Cidr, FlowKey, Listener, Maglev, Name, Transport};

use crate::plan::{AgentPlan, AgentTarget};

/// The path that flows to a service take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FlowPath {
    /// The kernel path.
    Kernel,
    /// The proxy path, and why.
    Proxy(NeedsProxy),
}

/// Why a service is not on the kernel path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NeedsProxy {
    /// The agent runs with `--path proxy`.
    Chosen,
    /// The agent itself listens on the address.
    Bound,
    /// The service forwards to the original destination.
    OriginalDestination,
    /// The filter chain of a connection depends on more than its destination.
    Chains,
    /// Flows are divided among several clusters.
    SeveralClusters,
    /// The service has no endpoints: the proxy refuses and reports new flows, which the kernel cannot.
    NoEndpoint,
    /// An endpoint has an address of the other family.
    OtherFamily(SocketAddr),
    /// Another listener has the same address and protocol.
    AddressTaken,
    /// The listener or an endpoint is on loopback, where the kernel routes no traffic of other hosts.
    OnLoopback(SocketAddr),
    /// Idle connections must be closed visibly on both sides; the kernel only drops the conntrack entry.
    IdleEnd,
    /// The limit of slots in the kernel is reached.
    TooLarge,
    /// The kernel refused the table.
    Refused(String),
}

impl fmt::Display for NeedsProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen => f.write_str("the agent runs with --path proxy"),
            Self::Bound => f.write_str(
                "the agent itself listens there (use --path kernel to let the kernel carry it)",
            ),
            Self::OriginalDestination => f.write_str("it forwards to the original destination"),
            Self::Chains => f.write_str("its filter chains match on more than the destination"),
            Self::SeveralClusters => f.write_str("it has several weighted clusters"),
            Self::NoEndpoint => f.write_str("it has no endpoints; new flows are refused"),
            Self::OtherFamily(endpoint) => {
                write!(f, "endpoint {endpoint} has the other address family")
            }
            Self::AddressTaken => f.write_str("another listener has the same address"),
            Self::OnLoopback(address) => write!(f, "{address} is on loopback"),
            Self::IdleEnd => f.write_str(
                "it sets idle_end, and the kernel drops idle connections without closing them",
            ),
            Self::TooLarge => {
                f.write_str("the limit of slots in the kernel is reached (--slot-limit)")
            }
            Self::Refused(reason) => write!(f, "the kernel refused: {reason}"),
        }
    }
}

/// The address that a service is reached at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ServiceAddress {
    /// This address.
    Exact(SocketAddr),
    /// Any address of this host, of the family of this unspecified address.
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

/// The protocol and address of a service, which identify it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ServiceKey {
    pub(super) transport: Transport,
    pub(super) address: ServiceAddress,
}

impl ServiceKey {
    fn of(listener: &Listener) -> Self {
        Self { transport: listener.transport, address: ServiceAddress::of(listener) }
    }
}

/// A service that the kernel can carry. Its endpoints have the address family of its listener.
#[derive(Debug, Clone)]
pub(super) struct KernelService {
    pub(super) key: ServiceKey,
    pub(super) listener: Name,
    pub(super) target: Arc<AgentTarget>,
    /// The Maglev table of the target.
    pub(super) table: Arc<Maglev>,
    /// Which fields of a flow are hashed.
    pub(super) flow_key: FlowKey,
    /// The hash seed for flows of its protocol.
    pub(super) seed: u32,
    /// Where a record per flow is written.
    pub(super) access_log: AccessLogSinks,
}

/// The clients that a service admits. New flows of other clients are dropped, on both paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SecurityGroup {
    pub(super) key: ServiceKey,
    pub(super) ranges: Vec<Cidr>,
}

/// The services of a plan by the path that they take, and the security groups of all.
#[derive(Debug, Default)]
pub(super) struct PathAssignment {
    pub(super) kernel: Vec<KernelService>,
    pub(super) groups: Vec<SecurityGroup>,
    pub(super) proxied: Vec<ProxiedService>,
}

/// A service on the proxy path, and why.
#[derive(Debug, Clone)]
pub(super) struct ProxiedService {
    pub(super) listener: Name,
    pub(super) reason: NeedsProxy,
    pub(super) key: ServiceKey,
    /// All targets that its flows may go to.
    pub(super) targets: Vec<Arc<AgentTarget>>,
}

/// Which services use the kernel path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PathChoice {
    /// Services on virtual addresses that need no proxy.
    #[default]
    Auto,
    /// All services that need no proxy, also on addresses that the agent itself listens on.
    Kernel,
    /// None.
    Proxy,
}

/// Assigns the services of a plan to the two paths. `slot_limit` bounds the slots of all Maglev tables in the
/// kernel; the first services by name get them.
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
            let key = ServiceKey::of(listener);
            assignment.groups.push(SecurityGroup { key, ranges: ranges.clone() });
        }
        let proxied = |reason| ProxiedService {
            listener: listener.name.clone(),
            reason,
            key: ServiceKey::of(listener),
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

/// All targets that flows to a listener may go to.
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
    let (target, flow_key, access_log) = match listener.transport {
        Transport::Tcp if listener.chains.iter().any(|chain| !chain.matches.is_empty()) => {
            return Err(NeedsProxy::Chains);
        }
        Transport::Tcp => {
            let tcp = plan.tcp(listener, listener.address).ok_or(NeedsProxy::Chains)?;
            let [only] = tcp.clusters.as_slice() else { return Err(NeedsProxy::SeveralClusters) };
            (plan.target_named(&only.name), tcp.flow_key, &tcp.access_log)
        }
        Transport::Udp => {
            let udp = plan.udp(listener).ok_or(NeedsProxy::NoEndpoint)?;
            (plan.target_named(&udp.cluster), udp.flow_key, &udp.access_log)
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
        key: ServiceKey::of(listener),
        listener: listener.name.clone(),
        target: target.clone(),
        table: table.clone(),
        flow_key,
        seed: listener.transport.seed(plan.seed()),
        access_log: access_log.clone(),
    })
}
