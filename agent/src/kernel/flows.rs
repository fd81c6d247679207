//! Which of the kernel's connections have lost their endpoint, and what becomes of them.
//!
//! conntrack keeps a flow where it is, whatever the table says by now. A TCP connection wants that:
//! its endpoint may finish what it has, until a deadline. A UDP flow does not: it never ends while
//! its client sends, so it is let go at once, and its next datagram is a new flow's.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_model::{FlowTuple, Name, Transport};

use super::service::{KernelService, ProxiedService, ServiceAddress, ServiceKey};
use crate::plan::AgentTarget;

/// A service's address with an endpoint that it has no more: TCP connections there are reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ExpiredEndpoint {
    pub(super) destination: SocketAddr,
    pub(super) endpoint: SocketAddr,
}

/// What is to become of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FlowAction {
    /// Nothing; it is none of ours.
    Ignore,
    /// It goes on.
    Keep,
    /// The kernel lets go of it: its next packet is a new flow's.
    Evict,
}

/// A service that the kernel carries.
#[derive(Debug)]
struct CarriedService {
    target: Arc<AgentTarget>,
    logged: bool,
}

/// What the services are and were, as far as flows have to do with it. Sans-io.
#[derive(Debug)]
pub(super) struct FlowTracker {
    /// How long an endpoint that is gone may keep its TCP connections.
    drain: Duration,
    services: HashMap<ServiceKey, CarriedService>,
    /// The targets of services that the kernel does not carry: what it carried before may stay there.
    proxied: HashMap<ServiceKey, Vec<Arc<AgentTarget>>>,
    /// Destinations that were the kernel's and are not now, until their datagrams were let go.
    former_services: BTreeSet<ServiceKey>,
    /// Endpoints that are gone, with the end of their time.
    removed: HashMap<(ServiceKey, SocketAddr), Instant>,
}

/// How many endpoints that are gone are remembered. Connections of more than these end by themselves.
const REMOVED_ENDPOINT_LIMIT: usize = 100_000;

impl FlowTracker {
    pub(super) fn new(drain: Duration) -> Self {
        let (services, proxied) = (HashMap::new(), HashMap::new());
        Self { drain, services, proxied, former_services: BTreeSet::new(), removed: HashMap::new() }
    }

    /// Takes over the services that the kernel carries from now on, and those that it does not.
    pub(super) fn apply(
        &mut self,
        services: &[KernelService],
        proxied: &[ProxiedService],
        now: Instant,
    ) {
        self.proxied = proxied.iter().map(|p| (p.key, p.targets.clone())).collect();
        let before = std::mem::take(&mut self.services);
        let service =
            |s: &KernelService| CarriedService { target: s.target.clone(), logged: s.logged };
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
        // One that is still there, or came back, has nothing to end.
        removed.retain(|(key, endpoint), _| !self.retains(*key, *endpoint));
        self.removed = removed;
        let services = &self.services;
        self.former_services.retain(|key| !services.contains_key(key));
    }

    /// Whether flows may stay on an endpoint of a service, by whichever way it goes now.
    fn retains(&self, key: ServiceKey, endpoint: SocketAddr) -> bool {
        let by_kernel = self.services.get(&key).map(|service| &service.target);
        let by_proxy = self.proxied.get(&key).into_iter().flatten();
        by_kernel.into_iter().chain(by_proxy).any(|target| target.retains(endpoint))
    }

    /// What is to become of a connection that goes to `endpoint`.
    pub(super) fn action_for(&self, flow: &FlowTuple, endpoint: SocketAddr) -> FlowAction {
        let Some((key, service)) = self.service_of(flow) else { return FlowAction::Ignore };
        let is_translated = endpoint != flow.destination;
        match flow.transport {
            // An endpoint that is gone has time; [`expired`](Self::ending) tells when it is over. What
            // was redirected to us is ours.
            Transport::Tcp => FlowAction::Keep,
            // At a port of any address of this host others' flows are seen as well: only those that
            // went to an endpoint of ours are known to be ours.
            Transport::Udp if matches!(key.1, ServiceAddress::AnyLocal(_)) => {
                if self.removed.contains_key(&(key, endpoint)) {
                    FlowAction::Evict
                } else {
                    FlowAction::Ignore
                }
            }
            Transport::Udp if is_translated && self.retains(key, endpoint) => FlowAction::Keep,
            // What was captured before the kernel carried the service goes nowhere now.
            Transport::Udp if is_translated || service.is_some() => FlowAction::Evict,
            Transport::Udp => FlowAction::Keep,
        }
    }

    /// The chain of the service that a connection is counted for, when the kernel carries it there.
    pub(super) fn carrying_service(
        &self,
        flow: &FlowTuple,
        endpoint: SocketAddr,
    ) -> Option<ServiceKey> {
        let (key, service) = self.service_of(flow)?;
        service.filter(|service| service.target.retains(endpoint)).map(|_| key)
    }

    /// Whether any service wants records of its flows.
    pub(super) fn wants_records(&self) -> bool {
        self.services.values().any(|service| service.logged)
    }

    /// The name of the service whose flow this was, when a record of it is wanted. What was not sent
    /// elsewhere was not the kernel's.
    pub(super) fn logged_service(&self, flow: &FlowTuple, endpoint: SocketAddr) -> Option<&Name> {
        let (key, service) = self.service_of(flow)?;
        let is_ours = self.retains(key, endpoint) || self.removed.contains_key(&(key, endpoint));
        let service = service.filter(|service| service.logged && is_ours);
        service.map(|service| &service.target.name)
    }

    fn service_of(&self, flow: &FlowTuple) -> Option<(ServiceKey, Option<&CarriedService>)> {
        let any = match flow.destination {
            SocketAddr::V4(_) => SocketAddr::from(([0; 4], flow.destination.port())),
            SocketAddr::V6(_) => SocketAddr::from(([0u16; 8], flow.destination.port())),
        };
        [ServiceAddress::Exact(flow.destination), ServiceAddress::AnyLocal(any)]
            .into_iter()
            .find_map(|place| {
                let key = (flow.transport, place);
                let service = self.services.get(&key);
                (service.is_some() || self.former_services.contains(&key)).then_some((key, service))
            })
    }

    /// The endpoints whose TCP connections are to be reset now.
    pub(super) fn expired(&self, now: Instant) -> Vec<ExpiredEndpoint> {
        let over = self.removed.iter().filter(|(_, until)| **until <= now);
        let mut expired: Vec<ExpiredEndpoint> = over
            .filter_map(|(((transport, place), endpoint), _)| match (transport, place) {
                (Transport::Tcp, ServiceAddress::Exact(destination)) => {
                    Some(ExpiredEndpoint { destination: *destination, endpoint: *endpoint })
                }
                // At an address of this host the destination is not known; and datagrams were let go.
                (Transport::Tcp, ServiceAddress::AnyLocal(_)) | (Transport::Udp, _) => None,
            })
            .collect();
        expired.sort_unstable();
        expired
    }

    /// All of the kernel's connections were looked at: what had to be let go was.
    pub(super) fn sweep_finished(&mut self) {
        self.former_services.clear();
    }

    /// When [`expired`](Self::ending) has more to tell.
    pub(super) fn next_deadline(&self, now: Instant) -> Option<Instant> {
        self.removed.values().copied().filter(|until| *until > now).min()
    }

    /// Forgets endpoints whose time was over before `then`: their connections have had their reset.
    pub(super) fn forget_expired_before(&mut self, then: Instant) {
        self.removed.retain(|_, until| *until > then);
    }
}

#[cfg(test)]
mod tests {
    use weft_model::{
        Balance, Cluster, DEFAULT_CONNECT_TIMEOUT, Discovery, Endpoint, EndpointSet, FlowKey,
        Health, Snapshot, UpstreamProtocol,
    };

    use super::*;
    use crate::plan::AgentPlan;

    const DRAIN: Duration = Duration::from_secs(300);

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    /// The service 10.96.0.1:53 over a protocol, with these endpoints.
    fn service(transport: Transport, endpoints: &[(&str, Health)]) -> KernelService {
        let endpoints: Vec<Endpoint> = endpoints
            .iter()
            .filter_map(|(at, health)| Endpoint::new(address(at), 1, *health))
            .collect();
        let cluster = Cluster {
            name: "dns".into(),
            discovery: Discovery::Static(EndpointSet { endpoints }),
            balance: Balance::Maglev { table_size: 251 },
            connect_timeout: DEFAULT_CONNECT_TIMEOUT,
            protocol: UpstreamProtocol::Http1,
            tls: None,
            connection_limit: 1,
            request_limit: 1,
            response_head_bytes: weft_model::DEFAULT_RESPONSE_HEAD_BYTES,
            response_field_count: weft_model::DEFAULT_RESPONSE_FIELD_COUNT,
            idle_timeout: weft_model::DEFAULT_UPSTREAM_IDLE,
        };
        let mut snapshot = Snapshot::default();
        snapshot.clusters.insert("dns".into(), Arc::new(cluster));
        let (plan, _) = AgentPlan::new(
            &snapshot,
            &crate::node::NodeInfo { seed: Some(7), ..Default::default() },
            None,
        );
        let target = plan.target_named("dns").expect("it was planned").clone();
        KernelService {
            key: (transport, ServiceAddress::Exact(address("10.96.0.1:53"))),
            listener: "dns".into(),
            table: target.table().expect("it has one").clone(),
            target,
            flow_key: FlowKey::FiveTuple,
            seed: 7,
            logged: false,
        }
    }

    fn flow(transport: Transport) -> FlowTuple {
        let (client, destination) = (address("10.0.0.1:4000"), address("10.96.0.1:53"));
        FlowTuple { transport, client, destination }
    }

    #[allow(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn datagrams_stay_where_they_may_and_leave_where_they_may_not() {
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
        // Captured before the kernel carried the service: it is not sent anywhere.
        check(&flows, "10.96.0.1:53", FlowAction::Evict);

        flows.apply(&[], &[], start());
        check(&flows, "10.0.0.2:53", FlowAction::Evict);
        check(&flows, "10.96.0.1:53", FlowAction::Keep);
        flows.sweep_finished();
        check(&flows, "10.0.0.2:53", FlowAction::Ignore);
    }

    #[test]
    fn connections_of_an_endpoint_that_is_gone_have_time() {
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
    fn a_service_that_goes_over_to_the_proxy_path_keeps_what_the_kernel_carries() {
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
    fn an_endpoint_that_comes_back_in_time_ends_nothing() {
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
