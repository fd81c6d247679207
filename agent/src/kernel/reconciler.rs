//! The thread that keeps the kernel's table of services as the plan requires. It sleeps while nothing changes.
//!
//! A new plan, a notification of a change in the kernel, and the passing of time lead to the same action: the thread
//! reconciles the table and deletes conntrack entries that have lost their endpoint. The table stays when the process
//! ends: flows continue, and the next agent takes the table over.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::SockProtocol;
use weft_model::Name;
use weft_runtime::access::{AccessLog, Writer};

use super::desired::{DesiredTable, GROUP_PREFIX, chain_name};
use super::flows::{ExpiredEndpoint, FlowAction, FlowTracker};
use super::occupancy::Occupancy;
use super::reconcile::KernelTable;
use super::report::{KernelPathReport, ServiceReport};
use super::service::{FlowPath, NeedsProxy, PathAssignment, PathChoice, ServiceKey, assign_paths};
use crate::clock::{now, unix_ms};
use crate::netlink::conntrack::{self, Conntrack, ConntrackEntry, EndedConnection};
use crate::netlink::{Netlink, Notification, nf_tables};
use crate::plan::AgentPlan;
use crate::record::AgentAccessRecord;
use crate::redirect::may_have_iptables_rules;

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
pub struct KernelReconciler {
    pending_plan: Arc<Mutex<Option<Arc<AgentPlan>>>>,
    waker: Arc<UnixStream>,
    report: Arc<Mutex<KernelPathReport>>,
}

impl KernelReconciler {
    /// Starts the thread, for the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the wake-up socket or the thread cannot be created.
    pub fn start(choice: PathChoice, limits: KernelLimits, access: Writer) -> io::Result<Self> {
        let report = Arc::new(Mutex::new(KernelPathReport::default()));
        let pending_plan = Arc::new(Mutex::new(None));
        let (waker, wakeups) = UnixStream::pair()?;
        waker.set_nonblocking(true)?;
        wakeups.set_nonblocking(true)?;
        let now = now();
        let thread = ReconcileThread {
            choice,
            limits,
            pending_plan: pending_plan.clone(),
            report: report.clone(),
            flows: FlowTracker::new(limits.endpoint_drain),
            ended_events: None,
            assignment: PathAssignment::default(),
            open: HashMap::new(),
            counters: HashMap::new(),
            expired: Vec::new(),
            is_in_force: false,
            last_applied: None,
            change_events: None,
            last_error: None,
            due: now,
            deep_due: now,
            sweep_due: now,
            count_due: now,
        };
        std::thread::Builder::new()
            .name("kernel-path".into())
            .spawn(move || thread.run(wakeups, &access))?;
        Ok(Self { pending_plan, waker: Arc::new(waker), report })
    }

    /// Applies a new plan, asynchronously.
    pub fn set_plan(&self, plan: Arc<AgentPlan>) {
        *self.pending_plan.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan);
        // A full socket means that the thread will wake up anyway.
        drop((&*self.waker).write(&[0]));
    }

    /// The current status.
    #[must_use]
    pub fn report(&self) -> KernelPathReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

struct ReconcileThread {
    choice: PathChoice,
    limits: KernelLimits,
    pending_plan: Arc<Mutex<Option<Arc<AgentPlan>>>>,
    report: Arc<Mutex<KernelPathReport>>,
    flows: FlowTracker,
    /// Notifications about ended connections, when records of them are configured.
    ended_events: Option<Netlink>,
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
    /// Notifications about changes of the ruleset, by this thread and by others.
    change_events: Option<Netlink>,
    /// Why the kernel refused the last change, if it did.
    last_error: Option<String>,
    due: Instant,
    deep_due: Instant,
    sweep_due: Instant,
    count_due: Instant,
}

impl ReconcileThread {
    fn run(mut self, mut wakeups: UnixStream, access: &Writer) {
        let log = access.log();
        let mut has_plan = false;
        loop {
            let pending_plan =
                self.pending_plan.lock().unwrap_or_else(PoisonError::into_inner).take();
            // An earlier agent's table stays untouched until the first configuration arrives.
            if let Some(plan) = pending_plan.filter(|plan| plan.revision > 0) {
                has_plan = true;
                self.apply_plan(&plan);
            }
            if has_plan {
                self.enforce();
                self.publish_report();
            }
            let timeout = self.next_wakeup().saturating_duration_since(now());
            let timeout = if has_plan { timeout } else { Duration::MAX };
            let sockets = [self.change_events.as_ref(), self.ended_events.as_ref()];
            if !wait(timeout, &mut wakeups, sockets.into_iter().flatten()) {
                return;
            }
            self.drain_changes();
            self.record(&log);
        }
    }

    /// Reads pending notifications about changes, and schedules a reconciliation.
    fn drain_changes(&mut self) {
        let Some(change_events) = &self.change_events else { return };
        let mut of_elements = false;
        let received =
            change_events.drain(|notification| of_elements |= is_element_change(&notification));
        let soon = now() + REPAIR_INTERVAL;
        if received.unwrap_or(true) {
            self.due = self.due.min(soon);
        }
        if of_elements {
            self.deep_due = self.deep_due.min(soon);
        }
    }

    /// Writes a record for each connection that has ended.
    fn record(&mut self, log: &AccessLog) {
        let Some(ended_events) = &self.ended_events else { return };
        let mut lost = 0;
        let flows = &self.flows;
        let received = ended_events.drain(|notification| match notification {
            Notification::Message(notification) => {
                if let Some(ended) = conntrack::parse_ended(&notification)
                    && let Some(service) =
                        flows.logged_service(&ended.entry.flow, ended.entry.endpoint)
                {
                    log.line(&record(&ended, service));
                }
            }
            Notification::Overflow => lost += 1,
        });
        log.hand_over();
        if let Err(error) = received {
            tracing::warn!(%error, "records of connections stopped: notifications failed");
            self.ended_events = None;
        }
        if lost > 0 {
            self.update(|report| report.records_lost += lost);
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

    /// When the next action is due.
    fn next_wakeup(&self) -> Instant {
        let due = self.due.min(self.deep_due).min(self.sweep_due).min(self.count_due);
        self.flows.next_deadline(now()).map_or(due, |deadline| due.min(deadline))
    }

    fn apply_plan(&mut self, plan: &AgentPlan) {
        self.assignment = assign_paths(plan, self.choice, self.limits.slots);
        self.is_in_force = false;
        self.due = now();
    }

    /// Performs the actions that are due.
    fn enforce(&mut self) {
        let started = now();
        let expired = self.flows.expired(started);
        if self.due <= started || self.deep_due <= started || expired != self.expired {
            self.expired = expired;
            match self.reconcile() {
                Ok(()) => {}
                Err(error) => self.record_failure(&error),
            }
        }
        if self.count_due <= now() {
            self.count();
        }
        let sweeping = now();
        if self.sweep_due <= sweeping {
            if let Err(error) = self.sweep() {
                tracing::warn!(%error, "sweep of conntrack failed");
            }
            let finished = now();
            let took = finished - sweeping;
            self.sweep_due = finished + SWEEP_INTERVAL.max(took * SWEEP_COST_FACTOR);
            if let Some(then) = finished.checked_sub(RESET_PERIOD) {
                self.flows.forget_expired_before(then);
            }
        }
    }

    fn reconcile(&mut self) -> io::Result<()> {
        let started = now();
        let mut deep = self.deep_due <= started;
        let mut uses_iptables = false;
        let mut kernel = KernelTable::open()?;
        let mut transactions = 0;
        if !self.is_in_force {
            // The kernel would send a notification for every slot of a new map, which takes longer than filling it.
            self.change_events = None;
        }
        for attempt in 0..RECONCILE_ATTEMPTS {
            if attempt > 0 || self.is_in_force {
                // A later change causes a notification; an earlier one is seen by the comparison that follows.
                deep |= self.subscribe_to_changes();
            }
            // Checked after subscribing, so a notification follows when iptables rules change later.
            uses_iptables = may_have_iptables_rules();
            let desired = DesiredTable {
                services: &self.assignment.kernel,
                groups: &self.assignment.groups,
                expired: &self.expired,
                may_be_captured_by_iptables: uses_iptables,
            };
            let outcome = kernel.reconcile(desired, deep)?;
            transactions += outcome.transactions;
            if outcome.transactions == 0 && self.change_events.is_some() {
                break;
            }
        }
        let finished = now();
        if transactions > 0 {
            // Flows that started meanwhile may be on the wrong endpoint.
            self.sweep_due = finished;
        }
        let desired = (self.expired.clone(), uses_iptables);
        let is_same = self.last_applied.as_ref() == Some(&desired);
        self.last_applied = Some(desired);
        if self.is_in_force && transactions > 0 && is_same {
            self.update(|report| report.repairs += 1);
            tracing::warn!("table of services had drifted: repaired");
        }
        if !self.is_in_force {
            self.flows.apply(&self.assignment.kernel, &self.assignment.proxied, finished);
            self.update_record_subscription();
            self.sweep_due = finished;
            self.update(|report| report.last_change = finished - started);
            tracing::info!(
                services = self.assignment.kernel.len(),
                transactions,
                took = ?finished - started,
                "services on the kernel path changed"
            );
        }
        self.is_in_force = true;
        self.last_error = None;
        self.due = finished + DEEP_COMPARE_INTERVAL;
        if deep {
            self.deep_due = finished + DEEP_COMPARE_INTERVAL;
        }
        Ok(())
    }

    /// Subscribes to changes, or reads pending notifications. The comparison that follows sees earlier
    /// changes. Returns whether it must compare the elements of maps.
    fn subscribe_to_changes(&mut self) -> bool {
        let Some(change_events) = &self.change_events else {
            let part = SockProtocol::NetlinkNetFilter;
            self.change_events = Netlink::listen(part, nf_tables::CHANGES).ok();
            return false;
        };
        let mut of_elements = false;
        let received =
            change_events.drain(|notification| of_elements |= is_element_change(&notification));
        of_elements || received.is_err()
    }

    fn record_failure(&mut self, error: &io::Error) {
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => "; needs the capability NET_ADMIN",
            _ => "",
        };
        let reason = format!("{error}{hint}");
        if self.last_error.as_ref() != Some(&reason) && !self.assignment.kernel.is_empty() {
            tracing::warn!(reason, "kernel path not available, services use the proxy path");
        }
        self.last_error = Some(reason);
        self.update(|report| report.failures += 1);
        let later = now() + RETRY_INTERVAL;
        self.due = later;
        self.deep_due = self.deep_due.max(later);
    }

    /// Reads the counters of services, and state that the kernel sends no notifications about.
    fn count(&mut self) {
        match KernelTable::open().and_then(|mut kernel| kernel.counters()) {
            Ok(counters) => self.counters = counters.into_iter().collect(),
            Err(error) => tracing::debug!(%error, "reading the kernel's counters failed"),
        }
        if let Some(occupancy) = Occupancy::read() {
            self.update(|report| {
                report.level = occupancy.log_level_change(report.level);
                report.occupancy = Some(occupancy);
            });
        }
        // Legacy iptables sends no notifications.
        if self
            .last_applied
            .as_ref()
            .is_some_and(|(_, uses_iptables)| *uses_iptables != may_have_iptables_rules())
        {
            self.due = now();
        }
        self.count_due = now() + COUNTER_INTERVAL;
    }

    /// Lists all conntrack entries: counts the open flows of each service, and deletes entries that have lost their
    /// endpoint.
    fn sweep(&mut self) -> io::Result<()> {
        if self.last_error.is_some() || !self.is_in_force {
            return Ok(());
        }
        let mut conntrack = Conntrack::open()?;
        let mut open = HashMap::new();
        let mut lost: Vec<ConntrackEntry> = Vec::new();
        let flows = &self.flows;
        conntrack.list(|entry| match flows.action_for(&entry.flow, entry.endpoint) {
            FlowAction::Evict => lost.push(entry),
            FlowAction::Keep if entry.is_closed => {}
            FlowAction::Keep => {
                if let Some(key) = flows.carrying_service(&entry.flow, entry.endpoint) {
                    *open.entry(key).or_insert(0) += 1;
                }
            }
            FlowAction::Ignore => {}
        })?;
        for entry in &lost {
            conntrack.delete(entry)?;
        }
        self.flows.sweep_finished();
        self.open = open;
        if !lost.is_empty() {
            tracing::info!(flows = lost.len(), "conntrack entries of removed endpoints deleted");
            self.update(|report| report.evicted += lost.len() as u64);
        }
        Ok(())
    }

    fn publish_report(&self) {
        let carried = self.assignment.kernel.iter().map(|service| ServiceReport {
            listener: service.listener.clone(),
            transport: Some(service.key.0),
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
        let is_group = |(name, _): &(&String, &u64)| name.starts_with(GROUP_PREFIX);
        let blocked = self.counters.iter().filter(is_group).map(|(_, packets)| packets).sum();
        self.update(|report| {
            report.services = services;
            report.blocked = blocked;
            report.settled = self.is_in_force || self.last_error.is_some();
        });
    }

    fn update(&self, change: impl FnOnce(&mut KernelPathReport)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn is_element_change(notification: &Notification) -> bool {
    match notification {
        Notification::Message(notification) => nf_tables::is_element_change(notification),
        Notification::Overflow => true,
    }
}

/// Waits for a new plan, a notification from the kernel, or the timeout. Returns false when the thread should end.
fn wait<'a>(
    longest: Duration,
    wakeups: &mut UnixStream,
    sockets: impl Iterator<Item = &'a Netlink>,
) -> bool {
    // poll counts whole milliseconds; with 0 it would not sleep.
    let timeout = PollTimeout::try_from(longest.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
    let mut waited = vec![PollFd::new(wakeups.as_fd(), PollFlags::POLLIN)];
    waited.extend(sockets.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
    match poll(&mut waited, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => tracing::warn!(%error, "polling for changes failed"),
    }
    let mut bytes = [0; 64];
    !matches!(wakeups.read(&mut bytes), Ok(0))
}

/// The access-log record of a connection. The record of a TCP connection is written when conntrack drops the
/// entry, two minutes after the end.
fn record<'a>(ended: &EndedConnection, service: &'a Name) -> AgentAccessRecord<'a> {
    let flow = ended.entry.flow;
    AgentAccessRecord {
        kind: flow.transport.word(),
        path: "kernel",
        time_ms: unix_ms(),
        client: flow.client,
        original_destination: flow.destination,
        service: Some(service),
        endpoint: Some(ended.entry.endpoint),
        choice: "flow_hash",
        bytes_sent: ended.bytes_sent,
        bytes_received: ended.bytes_received,
        duration_ms: ended.duration.unwrap_or_default().as_millis(),
        outcome: "ended",
    }
}
