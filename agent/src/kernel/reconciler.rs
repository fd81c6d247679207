//! Keeps the kernel's table of services as the plan requires, on a thread of its own.
//!
//! A new plan, a notification of a change in the kernel, and the passing of time lead to the same action: the thread
//! reconciles the table and deletes conntrack entries that have lost their endpoint. The table stays when the process
//! ends: flows continue, and the next agent takes the table over.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::SockProtocol;
use weft_runtime::access::{AccessLog, Writer};
use weft_runtime::clock;

use super::desired::{DesiredTable, GROUP_PREFIX, chain_name};
use super::ended_flow;
use super::flows::{ExpiredEndpoint, FlowAction, FlowTracker};
use super::kernel_access::{KernelAccess, LiveKernel};
use super::report::{KernelPathReport, ServiceReport};
use super::service::{FlowPath, NeedsProxy, PathAssignment, PathChoice, ServiceKey, assign_paths};
use crate::netlink::conntrack::{self, ConntrackEntry};
use crate::netlink::{Netlink, Notification};
use crate::plan::AgentPlan;
use crate::reconcile_loop::{Reconcile, ReconcileHandle};

/// How often the kernel's counters are read.
const COUNTER_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest time between two sweeps of conntrack when nothing has changed. A sweep may take a
/// two-hundredth of the time at most, so large tables are swept less often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
const SWEEP_COST_FACTOR: u32 = 200;
/// How often the maps are compared element by element.
const DEEP_COMPARE_INTERVAL: Duration = Duration::from_secs(60);
/// The shortest time between two repairs, to bound the cost when another program keeps changing the table.
const REPAIR_INTERVAL: Duration = Duration::from_millis(100);
/// How often the table is reconciled in a row while another program keeps changing it.
const RECONCILE_ATTEMPTS: usize = 3;
/// How long to wait after the kernel has refused a change.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// How long connections to a drained endpoint are reset, so each has time to send a packet.
const RESET_PERIOD: Duration = Duration::from_secs(60);

/// Limits of the kernel path.
#[derive(Debug, Clone, Copy)]
pub struct KernelLimits {
    /// The most slots of all Maglev tables together. One takes about 100 bytes of kernel memory.
    pub slots: usize,
    /// How long TCP connections to a removed endpoint may continue.
    pub endpoint_drain: Duration,
}

/// A handle of the thread. The thread ends with its last handle; the table stays.
#[derive(Debug, Clone)]
pub struct KernelReconciler(ReconcileHandle<Arc<AgentPlan>, KernelPathReport>);

impl KernelReconciler {
    /// Starts the thread, for the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the wake-up socket or the thread cannot be created.
    pub fn start(choice: PathChoice, limits: KernelLimits, access: &Writer) -> io::Result<Self> {
        let reconciler = ServiceReconciler::new(
            choice,
            limits,
            access.log(),
            LiveKernel::default(),
            clock::now(),
        );
        ReconcileHandle::start("kernel-path", reconciler).map(Self)
    }

    /// Applies a new plan, asynchronously.
    pub fn set_plan(&self, plan: Arc<AgentPlan>) {
        self.0.set_desired(plan);
    }

    /// The current status.
    #[must_use]
    pub fn report(&self) -> KernelPathReport {
        self.0.report()
    }
}

/// Makes the kernel's table of services match the newest plan.
struct ServiceReconciler<K> {
    choice: PathChoice,
    limits: KernelLimits,
    log: AccessLog,
    kernel: K,
    report: KernelPathReport,
    flows: FlowTracker,
    /// Notifications about ended connections, when records of them are configured.
    ended_events: Option<Netlink>,
    has_plan: bool,
    /// Which path the services of the newest plan take.
    assignment: PathAssignment,
    /// The open flows of each service.
    open: HashMap<ServiceKey, u64>,
    counters: HashMap<String, u64>,
    /// The endpoints whose connections are being reset.
    expired: Vec<ExpiredEndpoint>,
    /// Whether the kernel's table matches the assignment.
    is_in_force: bool,
    /// The inputs of the last reconciliation besides the services: expired endpoints, and whether iptables has rules.
    last_applied: Option<(Vec<ExpiredEndpoint>, bool)>,
    /// Why the kernel refused the last change, if it did.
    last_error: Option<String>,
    due: Instant,
    deep_due: Instant,
    sweep_due: Instant,
    count_due: Instant,
}

impl<K: KernelAccess> Reconcile for ServiceReconciler<K> {
    type Desired = Arc<AgentPlan>;
    type Report = KernelPathReport;

    fn set_desired(&mut self, plan: Arc<AgentPlan>, now: Instant) {
        // An earlier agent's table stays untouched until the first configuration arrives.
        if plan.revision > 0 {
            self.has_plan = true;
            self.assignment = assign_paths(&plan, self.choice, self.limits.slots);
            self.is_in_force = false;
            self.due = now;
        }
    }

    fn act(&mut self, now: Instant) {
        if self.has_plan {
            let now = self.reconcile_if_due(now);
            self.count_if_due(now);
            self.sweep_if_due(now);
        }
    }

    fn report(&self) -> KernelPathReport {
        KernelPathReport {
            services: self.service_reports(),
            blocked: self.blocked(),
            settled: self.is_in_force || self.last_error.is_some(),
            ..self.report.clone()
        }
    }

    fn next_due(&self, now: Instant) -> Option<Instant> {
        let due = self.due.min(self.deep_due).min(self.sweep_due).min(self.count_due);
        let due = self.flows.next_deadline(now).map_or(due, |deadline| due.min(deadline));
        self.has_plan.then_some(due)
    }

    fn event_sockets(&self) -> Vec<BorrowedFd<'_>> {
        let ended = self.ended_events.as_ref().map(Netlink::as_fd);
        self.kernel.ruleset_socket().into_iter().chain(ended).collect()
    }

    fn read_events(&mut self, now: Instant) {
        let changes = self.kernel.ruleset_changes();
        let soon = now + REPAIR_INTERVAL;
        if changes.any {
            self.due = self.due.min(soon);
        }
        if changes.of_elements {
            self.deep_due = self.deep_due.min(soon);
        }
        self.record();
    }
}

impl<K: KernelAccess> ServiceReconciler<K> {
    fn new(
        choice: PathChoice,
        limits: KernelLimits,
        log: AccessLog,
        kernel: K,
        now: Instant,
    ) -> Self {
        Self {
            choice,
            limits,
            log,
            kernel,
            report: KernelPathReport::default(),
            flows: FlowTracker::new(limits.endpoint_drain),
            ended_events: None,
            has_plan: false,
            assignment: PathAssignment::default(),
            open: HashMap::new(),
            counters: HashMap::new(),
            expired: Vec::new(),
            is_in_force: false,
            last_applied: None,
            last_error: None,
            due: now,
            deep_due: now,
            sweep_due: now,
            count_due: now,
        }
    }

    /// Writes a record for each connection that has ended.
    fn record(&mut self) {
        let Some(ended_events) = &self.ended_events else { return };
        let mut lost = 0;
        let flows = &self.flows;
        let received = ended_events.drain(|notification| match notification {
            Notification::Message(notification) => {
                if let Some(ended) = conntrack::parse_ended(&notification)
                    && let Some(service) =
                        flows.logged_service(&ended.entry.flow, ended.entry.endpoint)
                {
                    let record = ended_flow::record(&ended, &service.target.name);
                    self.log.line(&service.access_log, &record);
                }
            }
            Notification::Overflow => lost += 1,
        });
        self.log.flush();
        if let Err(error) = received {
            tracing::warn!(%error, "records of connections stopped: notifications failed");
            self.ended_events = None;
        }
        if lost > 0 {
            self.report.records_lost += lost;
        }
    }

    /// Subscribes to ended connections while records of them are configured.
    fn update_record_subscription(&mut self) {
        if !self.flows.wants_records() {
            self.ended_events = None;
        } else if self.ended_events.is_none() {
            if let Err(error) = conntrack::enable_accounting() {
                tracing::warn!(%error, "byte counts missing in records: conntrack accounting failed");
            }
            let listening =
                Netlink::listen(SockProtocol::NetlinkNetFilter, conntrack::DESTROY_GROUP);
            match listening {
                Ok(ended_events) => self.ended_events = Some(ended_events),
                Err(error) => tracing::warn!(%error, "records of connections not available"),
            }
        }
    }

    /// Compares the table with the plan when that is due, and changes what differs. Returns the time afterwards.
    fn reconcile_if_due(&mut self, now: Instant) -> Instant {
        let expired = self.flows.expired(now);
        if self.due > now && self.deep_due > now && expired == self.expired {
            return now;
        }
        self.expired = expired;
        let started = clock::now();
        let outcome = self.reconcile(now, started);
        let finished = now + (clock::now() - started);
        if let Err(error) = outcome {
            self.record_failure(&error, finished);
        }
        finished
    }

    /// Reconciles at `now`, which the clock shows as `started`.
    fn reconcile(&mut self, now: Instant, started: Instant) -> io::Result<()> {
        let mut deep = self.deep_due <= now;
        let mut uses_iptables = false;
        let mut transactions = 0;
        if !self.is_in_force {
            // The kernel would send a notification for every slot of a new map, which takes longer than filling it.
            self.kernel.stop_watching_ruleset();
        }
        for attempt in 0..RECONCILE_ATTEMPTS {
            if attempt > 0 || self.is_in_force {
                // A later change causes a notification; an earlier one is seen by the comparison that follows.
                deep |= self.kernel.watch_ruleset() && self.kernel.ruleset_changes().of_elements;
            }
            // Checked after subscribing, so a notification follows when iptables rules change later.
            uses_iptables = self.kernel.has_iptables_rules();
            let desired = DesiredTable {
                services: &self.assignment.kernel,
                groups: &self.assignment.groups,
                expired: &self.expired,
                may_be_captured_by_iptables: uses_iptables,
            };
            let outcome = self.kernel.reconcile(desired, deep)?;
            transactions += outcome.transactions;
            if outcome.transactions == 0 && self.kernel.is_watching_ruleset() {
                break;
            }
        }
        let took = clock::now() - started;
        self.reconciled(transactions, uses_iptables, now + took);
        if !self.is_in_force {
            self.put_in_force(transactions, took, now + took);
        }
        self.last_error = None;
        self.due = now + took + DEEP_COMPARE_INTERVAL;
        if deep {
            self.deep_due = self.due;
        }
        Ok(())
    }

    /// Notes the number of transactions that made the table match, and counts a repair.
    fn reconciled(&mut self, transactions: usize, uses_iptables: bool, now: Instant) {
        if transactions > 0 {
            // Flows that started meanwhile may be on the wrong endpoint.
            self.sweep_due = now;
        }
        let applied = Some((self.expired.clone(), uses_iptables));
        let is_same = self.last_applied == applied;
        self.last_applied = applied;
        if self.is_in_force && transactions > 0 && is_same {
            self.report.repairs += 1;
            tracing::warn!("table of services had drifted: repaired");
        }
    }

    /// Applies the assignment of a new plan to the flows, once the table matches it.
    fn put_in_force(&mut self, transactions: usize, took: Duration, now: Instant) {
        self.flows.apply(&self.assignment.kernel, &self.assignment.proxied, now);
        self.update_record_subscription();
        self.is_in_force = true;
        self.sweep_due = now;
        self.report.last_change = took;
        tracing::info!(
            services = self.assignment.kernel.len(),
            transactions,
            ?took,
            "services on the kernel path changed"
        );
    }

    fn record_failure(&mut self, error: &io::Error, now: Instant) {
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => "; needs the capability NET_ADMIN",
            _ => "",
        };
        let reason = format!("{error}{hint}");
        if self.last_error.as_ref() != Some(&reason) && !self.assignment.kernel.is_empty() {
            tracing::warn!(reason, "kernel path not available, services use the proxy path");
        }
        self.last_error = Some(reason);
        self.report.failures += 1;
        self.due = now + RETRY_INTERVAL;
        self.deep_due = self.deep_due.max(self.due);
    }

    /// Reads the counters of services, and state that the kernel sends no notifications about.
    fn count_if_due(&mut self, now: Instant) {
        if self.count_due > now {
            return;
        }
        match self.kernel.counters() {
            Ok(counters) => self.counters = counters,
            Err(error) => tracing::debug!(%error, "reading the kernel's counters failed"),
        }
        if let Some(occupancy) = self.kernel.occupancy() {
            self.report.level = occupancy.log_level_change(self.report.level);
            self.report.occupancy = Some(occupancy);
        }
        // Legacy iptables sends no notifications.
        if self
            .last_applied
            .as_ref()
            .is_some_and(|(_, uses_iptables)| *uses_iptables != self.kernel.has_iptables_rules())
        {
            self.due = now;
        }
        self.count_due = now + COUNTER_INTERVAL;
    }

    /// Sweeps conntrack when that is due.
    fn sweep_if_due(&mut self, now: Instant) {
        if self.sweep_due > now {
            return;
        }
        let started = clock::now();
        if let Err(error) = self.sweep() {
            tracing::warn!(%error, "sweep of conntrack failed");
        }
        let took = clock::now() - started;
        let finished = now + took;
        self.sweep_due = finished + SWEEP_INTERVAL.max(took * SWEEP_COST_FACTOR);
        if let Some(then) = finished.checked_sub(RESET_PERIOD) {
            self.flows.forget_expired_before(then);
        }
    }

    /// Lists all conntrack entries: counts the open flows of each service, and deletes entries that have lost their
    /// endpoint.
    fn sweep(&mut self) -> io::Result<()> {
        if self.last_error.is_some() || !self.is_in_force {
            return Ok(());
        }
        let mut open = HashMap::new();
        let mut lost: Vec<ConntrackEntry> = Vec::new();
        let flows = &self.flows;
        self.kernel.conntrack_entries(&mut |entry| match flows
            .action_for(&entry.flow, entry.endpoint)
        {
            FlowAction::Evict => lost.push(entry),
            FlowAction::Keep if entry.is_closed => {}
            FlowAction::Keep => {
                if let Some(key) = flows.carrying_service(&entry.flow, entry.endpoint) {
                    *open.entry(key).or_insert(0) += 1;
                }
            }
            FlowAction::Ignore => {}
        })?;
        if !lost.is_empty() {
            self.kernel.delete_conntrack_entries(&lost)?;
            tracing::info!(flows = lost.len(), "conntrack entries of removed endpoints deleted");
            self.report.evicted += lost.len() as u64;
        }
        self.flows.sweep_finished();
        self.open = open;
        Ok(())
    }

    fn service_reports(&self) -> Vec<ServiceReport> {
        let carried = self.assignment.kernel.iter().map(|service| ServiceReport {
            listener: service.listener.clone(),
            transport: Some(service.key.transport),
            path: match &self.last_error {
                Some(reason) => FlowPath::Proxy(NeedsProxy::Refused(reason.clone())),
                None => FlowPath::Kernel,
            },
            flows: self.counters.get(&chain_name(service.key)).copied().unwrap_or(0),
            flows_open: self.open.get(&service.key).copied().unwrap_or(0),
        });
        let proxied = self.assignment.proxied.iter().map(|proxied| ServiceReport {
            listener: proxied.listener.clone(),
            transport: None,
            path: FlowPath::Proxy(proxied.reason.clone()),
            flows: 0,
            flows_open: 0,
        });
        let mut services: Vec<ServiceReport> = carried.chain(proxied).collect();
        services.sort_by(|one, other| one.listener.cmp(&other.listener));
        services
    }

    /// The packets that security groups have dropped.
    fn blocked(&self) -> u64 {
        let is_group = |(name, _): &(&String, &u64)| name.starts_with(GROUP_PREFIX);
        self.counters.iter().filter(is_group).map(|(_, packets)| packets).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use weft_model::{FlowTuple, Health, Transport};
    use weft_runtime::access::OpenedSink;

    use super::super::kernel_access::RulesetChanges;
    use super::super::occupancy::Occupancy;
    use super::super::reconcile::ReconcileOutcome;
    use super::*;
    use crate::test_plan::{SERVICE, address, cluster, plan};

    const ONE: (&str, Health) = ("10.0.1.1:53", Health::Healthy);
    const OTHER: (&str, Health) = ("10.0.1.2:53", Health::Healthy);

    /// A kernel whose table holds the chains of services with their endpoints.
    #[derive(Default)]
    struct FakeKernel {
        installed: Vec<(String, Vec<std::net::SocketAddr>)>,
        comparisons: Cell<usize>,
        refusal: Option<io::ErrorKind>,
        is_watching: bool,
        changes: RulesetChanges,
        conntrack: Vec<ConntrackEntry>,
    }

    impl KernelAccess for FakeKernel {
        fn reconcile(
            &mut self,
            desired: DesiredTable<'_>,
            _deep: bool,
        ) -> io::Result<ReconcileOutcome> {
            self.comparisons.set(self.comparisons.get() + 1);
            if let Some(kind) = self.refusal {
                return Err(kind.into());
            }
            let described = |service: &super::super::service::KernelService| {
                (chain_name(service.key), service.table.endpoints().to_vec())
            };
            let desired: Vec<_> = desired.services.iter().map(described).collect();
            let transactions = usize::from(desired != self.installed);
            self.installed = desired;
            Ok(ReconcileOutcome { transactions, maps: transactions })
        }

        fn counters(&mut self) -> io::Result<HashMap<String, u64>> {
            Ok(self.installed.iter().map(|(chain, _)| (chain.clone(), 3)).collect())
        }

        fn has_iptables_rules(&self) -> bool {
            false
        }

        fn occupancy(&self) -> Option<Occupancy> {
            None
        }

        fn conntrack_entries(&mut self, each: &mut dyn FnMut(ConntrackEntry)) -> io::Result<()> {
            self.conntrack.iter().cloned().for_each(each);
            Ok(())
        }

        fn delete_conntrack_entries(&mut self, entries: &[ConntrackEntry]) -> io::Result<()> {
            self.conntrack.retain(|entry| !entries.contains(entry));
            Ok(())
        }

        fn watch_ruleset(&mut self) -> bool {
            std::mem::replace(&mut self.is_watching, true)
        }

        fn is_watching_ruleset(&self) -> bool {
            self.is_watching
        }

        fn stop_watching_ruleset(&mut self) {
            self.is_watching = false;
        }

        fn ruleset_changes(&mut self) -> RulesetChanges {
            std::mem::take(&mut self.changes)
        }

        fn ruleset_socket(&self) -> Option<BorrowedFd<'_>> {
            None
        }
    }

    fn reconciler(now: Instant) -> ServiceReconciler<FakeKernel> {
        let limits = KernelLimits { slots: 10_000, endpoint_drain: Duration::from_secs(300) };
        let writer = Writer::start_with(|_| Ok(OpenedSink::stream(io::sink())));
        let log = writer.expect("a thread starts").log();
        ServiceReconciler::new(PathChoice::Auto, limits, log, FakeKernel::default(), now)
    }

    fn plan_with(endpoints: &[(&str, Health)]) -> Arc<AgentPlan> {
        Arc::new(plan(Transport::Udp, [cluster("dns", endpoints)]))
    }

    /// A reconciler with the service in force, and the time.
    fn in_force() -> (ServiceReconciler<FakeKernel>, Instant) {
        let now = clock::now();
        let mut reconciler = reconciler(now);
        reconciler.set_desired(plan_with(&[ONE, OTHER]), now);
        reconciler.act(now);
        (reconciler, now + Duration::from_millis(10))
    }

    #[test]
    fn table_of_an_earlier_agent_is_kept_until_the_first_plan_arrives() {
        let now = clock::now();
        let mut reconciler = reconciler(now);
        reconciler.set_desired(Arc::new(AgentPlan::default()), now);
        reconciler.act(now);
        assert_eq!(reconciler.kernel.comparisons.get(), 0);
        assert_eq!(reconciler.next_due(now), None);
        assert!(!reconciler.report().settled);
    }

    #[test]
    fn unchanged_table_is_not_compared_before_its_interval() {
        let (mut reconciler, now) = in_force();
        assert_eq!(reconciler.kernel.installed.len(), 1);
        let report = reconciler.report();
        assert!(report.settled, "{report:?}");
        assert_eq!(report.services[0].path, FlowPath::Kernel);
        assert_eq!(report.services[0].flows, 3);
        let comparisons = reconciler.kernel.comparisons.get();
        reconciler.act(now + Duration::from_secs(1));
        assert_eq!(reconciler.kernel.comparisons.get(), comparisons);
        reconciler.act(now + DEEP_COMPARE_INTERVAL);
        assert!(reconciler.kernel.comparisons.get() > comparisons);
        assert_eq!(reconciler.report().repairs, 0);
    }

    #[test]
    fn drift_is_repaired_soon_after_its_notification() {
        let (mut reconciler, now) = in_force();
        let desired = std::mem::take(&mut reconciler.kernel.installed);
        reconciler.kernel.changes = RulesetChanges { any: true, of_elements: false };
        reconciler.read_events(now);
        assert!(reconciler.next_due(now) <= Some(now + REPAIR_INTERVAL));
        reconciler.act(now);
        assert_eq!(reconciler.kernel.installed, [], "repairs have a shortest distance");
        reconciler.act(now + REPAIR_INTERVAL);
        assert_eq!(reconciler.kernel.installed, desired);
        assert_eq!(reconciler.report().repairs, 1);
    }

    #[test]
    fn refused_table_is_reported_and_tried_again_after_a_pause() {
        let now = clock::now();
        let mut reconciler = reconciler(now);
        reconciler.kernel.refusal = Some(io::ErrorKind::PermissionDenied);
        reconciler.set_desired(plan_with(&[ONE]), now);
        reconciler.act(now);
        let report = reconciler.report();
        assert_eq!((report.failures, report.settled), (1, true));
        assert!(
            matches!(&report.services[0].path, FlowPath::Proxy(NeedsProxy::Refused(reason))
                if reason.contains("NET_ADMIN")),
            "{report:?}"
        );
        reconciler.act(now + RETRY_INTERVAL / 2);
        assert_eq!(reconciler.report().failures, 1, "it is too early");
        reconciler.kernel.refusal = None;
        reconciler.act(now + RETRY_INTERVAL * 2);
        assert_eq!(reconciler.kernel.installed.len(), 1);
        assert_eq!(reconciler.report().services[0].path, FlowPath::Kernel);
    }

    #[test]
    fn removed_service_and_endpoint_are_cleaned_up() {
        let (mut reconciler, now) = in_force();
        let flow = FlowTuple {
            transport: Transport::Udp,
            client: address("10.0.0.9:4000"),
            destination: address(SERVICE),
        };
        let entries = [ONE, OTHER].map(|(at, _)| ConntrackEntry::example(flow, address(at)));
        reconciler.kernel.conntrack = entries.to_vec();
        reconciler.set_desired(plan_with(&[ONE]), now);
        reconciler.act(now);
        assert_eq!(reconciler.kernel.conntrack, entries[..1], "OTHER is removed");
        assert_eq!(reconciler.report().services[0].flows_open, 1);
        assert_eq!(reconciler.report().evicted, 1);

        let now = now + Duration::from_secs(1);
        reconciler.set_desired(plan_with(&[]), now);
        reconciler.act(now);
        assert_eq!(reconciler.kernel.installed, []);
        assert_eq!(reconciler.kernel.conntrack, []);
    }
}
