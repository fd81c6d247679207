//! Decides which conntrack entries have lost their endpoint, and what happens to them.
//!
//! conntrack keeps a flow on its endpoint, also when the table has changed. For TCP that is right: a removed
//! endpoint may finish its connections until a deadline. A UDP flow never ends while its client sends, so its
//! entry is deleted at once, and the next datagram starts a new flow.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_model::{AccessLogSinks, FlowTuple, Transport};

use super::service::{KernelService, ProxiedService, ServiceAddress, ServiceKey};
use crate::plan::AgentTarget;

/// The address of a service and a removed endpoint whose drain time has passed: TCP connections between them are
/// reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ExpiredEndpoint {
    pub(super) destination: SocketAddr,
    pub(super) endpoint: SocketAddr,
}

/// What to do with a conntrack entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FlowAction {
    /// Nothing: the entry is not a flow to a service of the agent.
    Ignore,
    /// Keep the entry.
    Keep,
    /// Delete the entry, so that the next packet starts a new flow.
    Evict,
}

/// A service that the kernel carries.
#[derive(Debug)]
pub(super) struct CarriedService {
    pub(super) target: Arc<AgentTarget>,
    /// Where records of its flows are written.
    pub(super) access_log: AccessLogSinks,
}

/// Current, former and drained endpoints of services, as far as flows depend on them. Sans-io.
#[derive(Debug)]
pub(super) struct FlowTracker {
    /// How long TCP connections to a removed endpoint may continue.
    drain: Duration,
    services: HashMap<ServiceKey, CarriedService>,
    /// The targets of services on the proxy path: flows that the kernel carried before may stay there.
    proxied: HashMap<ServiceKey, Vec<Arc<AgentTarget>>>,
    /// Services that have left the kernel path, until the entries of their UDP flows are deleted.
    former_services: BTreeSet<ServiceKey>,
    /// Removed endpoints, with their drain deadlines.
    removed: HashMap<(ServiceKey, SocketAddr), Instant>,
}

/// How many removed endpoints are tracked. TCP connections of further ones are not reset.
const REMOVED_ENDPOINT_LIMIT: usize = 100_000;

impl FlowTracker {
    pub(super) fn new(drain: Duration) -> Self {
        let services = HashMap::new();
        let proxied = HashMap::new();
        Self { drain, services, proxied, former_services: BTreeSet::new(), removed: HashMap::new() }
    }

    /// Applies a new assignment of services to the two paths.
    pub(super) fn apply(
        &mut self,
        services: &[KernelService],
        proxied: &[ProxiedService],
        now: Instant,
    ) {
        self.proxied = proxied.iter().map(|p| (p.key, p.targets.clone())).collect();
        let before = std::mem::take(&mut self.services);
        let service = |s: &KernelService| CarriedService {
            target: s.target.clone(),
            access_log: s.access_log.clone(),
        };
        self.services = services.iter().map(|s| (s.key, service(s))).collect();
        for (key, CarriedService { target, .. }) in &before {
            if !self.services.contains_key(key) {
                self.former_services.insert(*key);
            }
            for endpoint in target.retained() {
                if self.removed.len() < REMOVED_ENDPOINT_LIMIT {
                    self.removed.entry((*key, endpoint)).or_insert(now + self.drain);
                }
            }
        }
        let mut removed = std::mem::take(&mut self.removed);
        // An endpoint that came back is not drained.
        removed.retain(|(key, endpoint), _| !self.retains(*key, *endpoint));
        self.removed = removed;
        let services = &self.services;
        self.former_services.retain(|key| !services.contains_key(key));
    }

    /// Whether flows of a service may stay on an endpoint, on either path.
    fn retains(&self, key: ServiceKey, endpoint: SocketAddr) -> bool {
        let by_kernel = self.services.get(&key).map(|service| &service.target);
        let by_proxy = self.proxied.get(&key).into_iter().flatten();
        by_kernel.into_iter().chain(by_proxy).any(|target| target.retains(endpoint))
    }

    /// Decides what to do with the entry of a flow that goes to `endpoint`.
    pub(super) fn action_for(&self, flow: &FlowTuple, endpoint: SocketAddr) -> FlowAction {
        let Some((key, service)) = self.service_of(flow) else { return FlowAction::Ignore };
        let is_translated = endpoint != flow.destination;
        match flow.transport {
            // A connection to a removed endpoint has until the end of its drain time, which `expired` watches; one that
            // was redirected to the agent is forwarded by it. Neither loses its entry.
            Transport::Tcp => FlowAction::Keep,
            // On a port of any host address there are flows of other programs too. Only those to a removed
            // endpoint are known to be ours.
            Transport::Udp if matches!(key.address, ServiceAddress::AnyLocal(_)) => {
                if self.removed.contains_key(&(key, endpoint)) {
                    FlowAction::Evict
                } else {
                    FlowAction::Ignore
                }
            }
            Transport::Udp if is_translated && self.retains(key, endpoint) => FlowAction::Keep,
            // The endpoint is gone; or the entry is older than the kernel rules of the service, which apply to new
            // entries only. Without the entry, the next datagram gets an endpoint.
            Transport::Udp if is_translated || service.is_some() => FlowAction::Evict,
            Transport::Udp => FlowAction::Keep,
        }
    }

    /// The service that the kernel carries this flow for, if any.
    pub(super) fn carrying_service(
        &self,
        flow: &FlowTuple,
        endpoint: SocketAddr,
    ) -> Option<ServiceKey> {
        let (key, service) = self.service_of(flow)?;
        service.filter(|service| service.target.retains(endpoint)).map(|_| key)
    }

    /// Whether any service writes records of its flows.
    pub(super) fn wants_records(&self) -> bool {
        self.services.values().any(|service| !service.access_log.is_off())
    }

    /// The service of this flow, if the service writes records. A flow that was not translated was not on the
    /// kernel path.
    pub(super) fn logged_service(
        &self,
        flow: &FlowTuple,
        endpoint: SocketAddr,
    ) -> Option<&CarriedService> {
        let (key, service) = self.service_of(flow)?;
        let is_ours = self.retains(key, endpoint) || self.removed.contains_key(&(key, endpoint));
        service.filter(|service| !service.access_log.is_off() && is_ours)
    }

    fn service_of(&self, flow: &FlowTuple) -> Option<(ServiceKey, Option<&CarriedService>)> {
        let any = match flow.destination {
            SocketAddr::V4(_) => SocketAddr::from(([0; 4], flow.destination.port())),
            SocketAddr::V6(_) => SocketAddr::from(([0u16; 8], flow.destination.port())),
        };
        [ServiceAddress::Exact(flow.destination), ServiceAddress::AnyLocal(any)]
            .into_iter()
            .find_map(|address| {
                let key = ServiceKey { transport: flow.transport, address };
                let service = self.services.get(&key);
                (service.is_some() || self.former_services.contains(&key)).then_some((key, service))
            })
    }

    /// The endpoints whose TCP connections are to be reset now.
    pub(super) fn expired(&self, now: Instant) -> Vec<ExpiredEndpoint> {
        let over = self.removed.iter().filter(|(_, until)| **until <= now);
        let mut expired: Vec<ExpiredEndpoint> = over
            .filter_map(|((key, endpoint), _)| match (key.transport, key.address) {
                (Transport::Tcp, ServiceAddress::Exact(destination)) => {
                    Some(ExpiredEndpoint { destination, endpoint: *endpoint })
                }
                // On any host address the original destination is unknown, and entries of UDP flows are deleted.
                (Transport::Tcp, ServiceAddress::AnyLocal(_)) | (Transport::Udp, _) => None,
            })
            .collect();
        expired.sort_unstable();
        expired
    }

    /// Notes that a sweep of all entries has finished.
    pub(super) fn sweep_finished(&mut self) {
        self.former_services.clear();
    }

    /// When the next endpoint expires.
    pub(super) fn next_deadline(&self, now: Instant) -> Option<Instant> {
        self.removed.values().copied().filter(|until| *until > now).min()
    }

    /// Forgets endpoints that expired before `then`: their connections have been reset.
    pub(super) fn forget_expired_before(&mut self, then: Instant) {
        self.removed.retain(|_, until| *until > then);
    }
}

#[cfg(test)]
mod tests {
    use weft_model::{FlowKey, Health};

    use super::*;
    use crate::test_plan::{SERVICE, address, cluster, plan};

    const DRAIN: Duration = Duration::from_secs(300);

    /// The service 10.96.0.1:53 with this protocol and these endpoints.
    fn service(transport: Transport, endpoints: &[(&str, Health)]) -> KernelService {
        let plan = plan(transport, [cluster("dns", endpoints)]);
        let target = plan.target_named("dns").expect("the plan has the cluster").clone();
        KernelService {
            key: ServiceKey { transport, address: ServiceAddress::Exact(address(SERVICE)) },
            listener: "dns".into(),
            table: target.table().expect("the cluster has a Maglev table").clone(),
            target,
            flow_key: FlowKey::FiveTuple,
            seed: 7,
            access_log: AccessLogSinks::Off,
        }
    }

    fn flow(transport: Transport) -> FlowTuple {
        let client = address("10.0.0.1:4000");
        let destination = address("10.96.0.1:53");
        FlowTuple { transport, client, destination }
    }

    #[expect(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn udp_flows_stay_on_usable_endpoints_and_leave_others() {
        use Health::{Draining, Healthy, Unhealthy};
        let mut flows = FlowTracker::new(DRAIN);
        let endpoints =
            [("10.0.0.2:53", Healthy), ("10.0.0.3:53", Draining), ("10.0.0.4:53", Unhealthy)];
        flows.apply(&[service(Transport::Udp, &endpoints)], &[], start());
        let check = |flows: &FlowTracker, endpoint: &str, action_for: FlowAction| {
            assert_eq!(
                flows.action_for(&flow(Transport::Udp), address(endpoint)),
                action_for,
                "{endpoint}"
            );
        };
        check(&flows, "10.0.0.2:53", FlowAction::Keep);
        check(&flows, "10.0.0.3:53", FlowAction::Keep);
        check(&flows, "10.0.0.4:53", FlowAction::Evict);
        check(&flows, "10.0.0.9:53", FlowAction::Evict);
        // Captured before the kernel carried the service: not translated.
        check(&flows, "10.96.0.1:53", FlowAction::Evict);

        flows.apply(&[], &[], start());
        check(&flows, "10.0.0.2:53", FlowAction::Evict);
        check(&flows, "10.96.0.1:53", FlowAction::Keep);
        flows.sweep_finished();
        check(&flows, "10.0.0.2:53", FlowAction::Ignore);
    }

    #[test]
    fn tcp_connections_of_a_removed_endpoint_are_reset_after_the_drain_time() {
        let both = [("10.0.0.2:53", Health::Healthy), ("10.0.0.3:53", Health::Healthy)];
        let now = start();
        let mut flows = FlowTracker::new(DRAIN);
        flows.apply(&[service(Transport::Tcp, &both)], &[], now);
        flows.apply(&[service(Transport::Tcp, &both[1..])], &[], now);
        assert_eq!(
            flows.action_for(&flow(Transport::Tcp), address("10.0.0.2:53")),
            FlowAction::Keep
        );
        assert_eq!(flows.expired(now), []);
        assert_eq!(flows.next_deadline(now), Some(now + DRAIN));
        let expired = ExpiredEndpoint {
            destination: address("10.96.0.1:53"),
            endpoint: address("10.0.0.2:53"),
        };
        assert_eq!(flows.expired(now + DRAIN), [expired]);
        flows.forget_expired_before(now + DRAIN);
        assert_eq!(flows.expired(now + DRAIN), []);
    }

    #[test]
    fn service_moved_to_the_proxy_path_keeps_its_kernel_flows() {
        let both = [("10.0.0.2:53", Health::Draining), ("10.0.0.3:53", Health::Healthy)];
        let now = start();
        for transport in [Transport::Udp, Transport::Tcp] {
            let mut flows = FlowTracker::new(DRAIN);
            flows.apply(&[service(transport, &both)], &[], now);
            let service = service(transport, &both[..1]);
            let proxied = ProxiedService {
                listener: service.listener,
                reason: crate::kernel::NeedsProxy::NoEndpoint,
                key: service.key,
                targets: vec![service.target],
            };
            flows.apply(&[], &[proxied], now);
            let action_for = |endpoint| flows.action_for(&flow(transport), address(endpoint));
            assert_eq!(action_for("10.0.0.2:53"), FlowAction::Keep);
            let of_lost =
                if transport == Transport::Udp { FlowAction::Evict } else { FlowAction::Keep };
            assert_eq!(action_for("10.0.0.3:53"), of_lost);
            let lost = address("10.0.0.3:53");
            assert!(flows.expired(now + DRAIN).iter().all(|expired| expired.endpoint == lost));
        }
    }

    #[test]
    fn endpoint_that_comes_back_in_time_is_not_drained() {
        let both = [("10.0.0.2:53", Health::Healthy), ("10.0.0.3:53", Health::Healthy)];
        let now = start();
        let mut flows = FlowTracker::new(DRAIN);
        for endpoints in [&both[..], &both[1..], &both[..]] {
            flows.apply(&[service(Transport::Tcp, endpoints)], &[], now);
        }
        assert_eq!(flows.next_deadline(now), None);
        assert_eq!(flows.expired(now + DRAIN), []);
    }
}
