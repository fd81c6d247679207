//! Keeps the kernel's table as the plan wants it, for as long as it runs: one thread, which sleeps
//! while nothing happens.
//!
//! A new plan, what the kernel tells of changes, and the passing of time all lead to the same: the
//! table is reconciled, and flows that lost their endpoint are let go. The table stays when the
//! process ends: flows go on, and the next agent takes it over as it is.

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

use super::flows::{ExpiredEndpoint, FlowAction, FlowTracker};
use super::occupancy::Occupancy;
use super::reconcile::KernelTable;
use super::report::{KernelPathReport, ServiceReport};
use super::service::{FlowPath, NeedsProxy, PathAssignment, PathChoice, ServiceKey, assign_paths};
use super::table::DesiredTable;
use super::table_sets::{GROUP_PREFIX, chain_name};
use crate::clock::{now, unix_ms};
use crate::netlink::conntrack::{self, Conntrack, ConntrackEntry, EndedConnection};
use crate::netlink::{Netlink, Notification, nf_tables};
use crate::plan::AgentPlan;
use crate::record::Record;
use crate::redirect::is_in_iptables;

/// How often the kernel's counters are read.
const COUNTER_INTERVAL: Duration = Duration::from_secs(1);
/// How often the kernel's connections are looked at when nothing has changed, at most; looking may
/// take a two-hundredth of the time, so many of them are looked at less often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
const SWEEP_COST_FACTOR: u32 = 200;
/// How often the maps are compared element by element.
const DEEP_COMPARE_INTERVAL: Duration = Duration::from_secs(60);
/// The shortest time between two repairs, so that a fight with somebody else costs little.
const REPAIR_INTERVAL: Duration = Duration::from_millis(100);
/// How often the table is made before whoever changes it meanwhile is left alone for a moment.
const RECONCILE_ATTEMPTS: usize = 3;
/// How long the kernel rests after it refused.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// How long connections of an endpoint whose time is over have to be heard of, and so be reset.
const RESET_PERIOD: Duration = Duration::from_secs(60);

/// What the kernel path may take.
#[derive(Debug, Clone, Copy)]
pub struct KernelLimits {
    /// Slots of all services' tables together; one takes about 100 bytes of the kernel's memory.
    pub slots: usize,
    /// How long an endpoint that is gone may keep its TCP connections.
    pub endpoint_drain: Duration,
}

/// The thread's handle. The thread ends with the last of them; the table stays.
#[derive(Debug, Clone)]
pub struct KernelReconciler {
    pending_plan: Arc<Mutex<Option<Arc<AgentPlan>>>>,
    waker: Arc<UnixStream>,
    report: Arc<Mutex<KernelPathReport>>,
}

impl KernelReconciler {
    /// Starts the thread, for the network namespace of this one.
    ///
    /// # Errors
    /// When there can be no thread for it.
    pub fn start(choice: PathChoice, limits: KernelLimits, access: Writer) -> io::Result<Self> {
        let report = Arc::new(Mutex::new(KernelPathReport::default()));
        let pending_plan = Arc::new(Mutex::new(None));
        let (waker, woken) = UnixStream::pair()?;
        waker.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let now = now();
        let work = ReconcileThread {
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
            .spawn(move || work.run(woken, &access))?;
        Ok(Self { pending_plan, waker: Arc::new(waker), report })
    }

    /// Takes over a plan.
    pub fn follow(&self, plan: Arc<AgentPlan>) {
        *self.pending_plan.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan);
        // When there is no room, it has been woken often enough.
        drop((&*self.waker).write(&[0]));
    }

    /// What there is to tell.
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
    /// Tells of connections that end, when records of them are wanted.
    ended_events: Option<Netlink>,
    /// Of the newest plan.
    assignment: PathAssignment,
    /// How many flows each service has, and has had.
    open: HashMap<ServiceKey, u64>,
    counters: HashMap<String, u64>,
    /// Whose connections are being reset.
    expired: Vec<ExpiredEndpoint>,
    /// Whether the division is what the kernel does.
    is_in_force: bool,
    /// What was enforced last beside the services.
    last_applied: Option<(Vec<ExpiredEndpoint>, bool)>,
    /// Tells of changes, ours and others'.
    change_events: Option<Netlink>,
    /// Why the kernel refused, when it did.
    last_error: Option<String>,
    due: Instant,
    deep_due: Instant,
    sweep_due: Instant,
    count_due: Instant,
}

impl ReconcileThread {
    fn run(mut self, mut woken: UnixStream, access: &Writer) {
        let log = access.log();
        let mut has_plan = false;
        loop {
            let pending_plan =
                self.pending_plan.lock().unwrap_or_else(PoisonError::into_inner).take();
            // What was there before is not touched before there is a configuration.
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
            if !wait(timeout, &mut woken, sockets.into_iter().flatten()) {
                return;
            }
            self.drain_changes();
            self.record(&log);
        }
    }

    /// Takes in what the kernel told of changes: it is looked at soon.
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

    /// Writes a record of each connection that has ended.
    fn record(&mut self, log: &AccessLog) {
        let Some(ended_events) = &self.ended_events else { return };
        let (mut lost, flows) = (0, &self.flows);
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
            tracing::warn!(%error, "ends of connections are not heard any more");
            self.ended_events = None;
        }
        if lost > 0 {
            self.update(|report| report.records_lost += lost);
        }
    }

    /// Listens to ends of connections as long as records of them are wanted.
    fn update_record_subscription(&mut self) {
        if !self.flows.wants_records() {
            self.ended_events = None;
        } else if self.ended_events.is_none() {
            if let Err(error) = conntrack::enable_accounting() {
                tracing::warn!(%error, "records will not tell what connections carried");
            }
            let listening =
                Netlink::listen(SockProtocol::NetlinkNetFilter, conntrack::DESTROY_GROUP);
            match listening {
                Ok(ended_events) => self.ended_events = Some(ended_events),
                Err(error) => tracing::warn!(%error, "there will be no records of connections"),
            }
        }
    }

    /// When there is something to do next.
    fn next_wakeup(&self) -> Instant {
        let due = self.due.min(self.deep_due).min(self.sweep_due).min(self.count_due);
        self.flows.next_deadline(now()).map_or(due, |deadline| due.min(deadline))
    }

    fn apply_plan(&mut self, plan: &AgentPlan) {
        self.assignment = assign_paths(plan, self.choice, self.limits.slots);
        (self.is_in_force, self.due) = (false, now());
    }

    /// Does what is due.
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
                tracing::warn!(%error, "the kernel's connections cannot be looked at");
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
            // The kernel would tell us of every slot of a map, which takes longer than filling it.
            self.change_events = None;
        }
        for attempt in 0..RECONCILE_ATTEMPTS {
            if attempt > 0 || self.is_in_force {
                // What changes from here on is heard, or seen by what follows.
                deep |= self.subscribe_to_changes();
            }
            // Asked after listening: whoever installs or removes iptables' rules now is heard of.
            uses_iptables = is_in_iptables();
            let desired = DesiredTable {
                services: &self.assignment.kernel,
                groups: &self.assignment.groups,
                expired: &self.expired,
                is_captured_by_iptables: uses_iptables,
            };
            let outcome = kernel.reconcile(desired, deep)?;
            transactions += outcome.transactions;
            if outcome.transactions == 0 && self.change_events.is_some() {
                break;
            }
        }
        let finished = now();
        if transactions > 0 {
            // Flows that began while it was otherwise may be where they no longer belong.
            self.sweep_due = finished;
        }
        let desired = (self.expired.clone(), uses_iptables);
        let is_same = self.last_applied.as_ref() == Some(&desired);
        self.last_applied = Some(desired);
        if self.is_in_force && transactions > 0 && is_same {
            self.update(|report| report.repairs += 1);
            tracing::warn!("the kernel's table of services had been changed: repaired");
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
                "services that the kernel carries"
            );
        }
        (self.is_in_force, self.last_error) = (true, None);
        self.due = finished + DEEP_COMPARE_INTERVAL;
        if deep {
            self.deep_due = finished + DEEP_COMPARE_INTERVAL;
        }
        Ok(())
    }

    /// Listens to changes from here on. What was told before is seen by whoever looks now; whether it
    /// has to look at the elements of maps.
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
            io::ErrorKind::PermissionDenied => "; it takes the capability NET_ADMIN",
            _ => "",
        };
        let reason = format!("{error}{hint}");
        if self.last_error.as_ref() != Some(&reason) && !self.assignment.kernel.is_empty() {
            tracing::warn!(reason, "the kernel does not carry services; the proxy path does");
        }
        self.last_error = Some(reason);
        self.update(|report| report.failures += 1);
        let later = now() + RETRY_INTERVAL;
        (self.due, self.deep_due) = (later, self.deep_due.max(later));
    }

    /// Reads how many flows each service has had, and looks at what the kernel does not tell of.
    fn count(&mut self) {
        match KernelTable::open().and_then(|mut kernel| kernel.counters()) {
            Ok(counters) => self.counters = counters.into_iter().collect(),
            Err(error) => tracing::debug!(%error, "the kernel's counters cannot be read"),
        }
        if let Some(occupancy) = Occupancy::read() {
            self.update(|report| {
                report.level = occupancy.log_level_change(report.level);
                report.occupancy = Some(occupancy);
            });
        }
        // The older iptables tells nobody of its changes.
        if self
            .last_applied
            .as_ref()
            .is_some_and(|(_, uses_iptables)| *uses_iptables != is_in_iptables())
        {
            self.due = now();
        }
        self.count_due = now() + COUNTER_INTERVAL;
    }

    /// Looks at all of the kernel's connections: counts them, and lets go of those that lost their
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
            tracing::info!(flows = lost.len(), "flows left endpoints that are gone");
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

/// Sleeps until there is a new plan, the kernel tells of a change, or the time is over. Whether to go
/// on.
fn wait<'a>(
    longest: Duration,
    woken: &mut UnixStream,
    notification: impl Iterator<Item = &'a Netlink>,
) -> bool {
    // The kernel counts whole milliseconds; below one it would not sleep at all.
    let timeout = PollTimeout::try_from(longest.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
    let mut waited = vec![PollFd::new(woken.as_fd(), PollFlags::POLLIN)];
    waited.extend(
        notification.map(|notification| PollFd::new(notification.as_fd(), PollFlags::POLLIN)),
    );
    match poll(&mut waited, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => tracing::warn!(%error, "waiting for a plan"),
    }
    let mut calls = [0; 64];
    !matches!(woken.read(&mut calls), Ok(0))
}

/// The record of a connection. TCP's is written when the kernel forgets it, two minutes after its end.
fn record<'a>(ended: &EndedConnection, service: &'a Name) -> Record<'a> {
    let flow = ended.entry.flow;
    Record {
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
