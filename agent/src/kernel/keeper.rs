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

use super::flows::{Ending, Fate, Flows};
use super::index::{GROUP_PREFIX, chain_name};
use super::occupancy::Occupancy;
use super::reconcile::Kernel;
use super::report::{Report, ServiceReport};
use super::service::{Division, Key, NeedsProxy, PathChoice, Way, divide};
use super::table::Wanted;
use crate::netlink::conntrack::{self, Conntrack, Ended, Entry};
use crate::netlink::{Netlink, Told, nf_tables};
use crate::plan::Plan;
use crate::record::Record;
use crate::redirect::is_in_iptables;
use crate::worker::unix_ms;

/// How often the kernel's counters are read.
const COUNT: Duration = Duration::from_secs(1);
/// How often the kernel's connections are looked at when nothing has changed, at most; looking may
/// take a two-hundredth of the time, so many of them are looked at less often.
const SWEEP: Duration = Duration::from_secs(5);
const SWEEP_SHARE: u32 = 200;
/// How often the maps are compared element by element.
const DEEP: Duration = Duration::from_secs(60);
/// The shortest time between two repairs, so that a fight with somebody else costs little.
const BETWEEN_REPAIRS: Duration = Duration::from_millis(100);
/// How often the table is made before whoever changes it meanwhile is left alone for a moment.
const ATTEMPTS: usize = 3;
/// How long the kernel rests after it refused.
const RETRY: Duration = Duration::from_secs(5);
/// How long connections of an endpoint whose time is over have to be heard of, and so be reset.
const RESETTING: Duration = Duration::from_secs(60);

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
pub struct Keeper {
    newest: Arc<Mutex<Option<Arc<Plan>>>>,
    waker: Arc<UnixStream>,
    report: Arc<Mutex<Report>>,
}

impl Keeper {
    /// Starts the thread, for the network namespace of this one.
    ///
    /// # Errors
    /// When there can be no thread for it.
    pub fn start(choice: PathChoice, limits: KernelLimits, access: Writer) -> io::Result<Self> {
        let report = Arc::new(Mutex::new(Report::default()));
        let newest = Arc::new(Mutex::new(None));
        let (waker, woken) = UnixStream::pair()?;
        waker.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let now = now();
        let work = Work {
            choice,
            limits,
            newest: newest.clone(),
            report: report.clone(),
            flows: Flows::new(limits.endpoint_drain),
            ends: None,
            division: Division::default(),
            open: HashMap::new(),
            counters: HashMap::new(),
            ending: Vec::new(),
            is_in_force: false,
            enforced: None,
            changes: None,
            refused: None,
            due: now,
            deep_due: now,
            sweep_due: now,
            count_due: now,
        };
        std::thread::Builder::new()
            .name("kernel-path".into())
            .spawn(move || work.run(woken, &access))?;
        Ok(Self { newest, waker: Arc::new(waker), report })
    }

    /// Takes over a plan.
    pub fn follow(&self, plan: Arc<Plan>) {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan);
        // When there is no room, it has been woken often enough.
        drop((&*self.waker).write(&[0]));
    }

    /// What there is to tell.
    #[must_use]
    pub fn report(&self) -> Report {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

struct Work {
    choice: PathChoice,
    limits: KernelLimits,
    newest: Arc<Mutex<Option<Arc<Plan>>>>,
    report: Arc<Mutex<Report>>,
    flows: Flows,
    /// Tells of connections that end, when records of them are wanted.
    ends: Option<Netlink>,
    /// Of the newest plan.
    division: Division,
    /// How many flows each service has, and has had.
    open: HashMap<Key, u64>,
    counters: HashMap<String, u64>,
    /// Whose connections are being reset.
    ending: Vec<Ending>,
    /// Whether the division is what the kernel does.
    is_in_force: bool,
    /// What was enforced last beside the services.
    enforced: Option<(Vec<Ending>, bool)>,
    /// Tells of changes, ours and others'.
    changes: Option<Netlink>,
    /// Why the kernel refused, when it did.
    refused: Option<String>,
    due: Instant,
    deep_due: Instant,
    sweep_due: Instant,
    count_due: Instant,
}

impl Work {
    fn run(mut self, mut woken: UnixStream, access: &Writer) {
        let log = access.log();
        let mut has_plan = false;
        loop {
            let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner).take();
            // What was there before is not touched before there is a configuration.
            if let Some(plan) = newest.filter(|plan| plan.revision > 0) {
                has_plan = true;
                self.take_over(&plan);
            }
            if has_plan {
                self.enforce();
                self.tell();
            }
            let wait = self.next().saturating_duration_since(now());
            let wait = if has_plan { wait } else { Duration::MAX };
            let told = [self.changes.as_ref(), self.ends.as_ref()];
            if !pause(wait, &mut woken, told.into_iter().flatten()) {
                return;
            }
            self.hear();
            self.record(&log);
        }
    }

    /// Takes in what the kernel told of changes: it is looked at soon.
    fn hear(&mut self) {
        let Some(changes) = &self.changes else { return };
        let mut of_elements = false;
        let heard = changes.drain(|told| of_elements |= is_of_elements(&told));
        let soon = now() + BETWEEN_REPAIRS;
        if heard.unwrap_or(true) {
            self.due = self.due.min(soon);
        }
        if of_elements {
            self.deep_due = self.deep_due.min(soon);
        }
    }

    /// Writes a record of each connection that has ended.
    fn record(&mut self, log: &AccessLog) {
        let Some(ends) = &self.ends else { return };
        let (mut lost, flows) = (0, &self.flows);
        let heard = ends.drain(|told| match told {
            Told::This(told) => {
                if let Some(ended) = conntrack::ended(&told)
                    && let Some(service) = flows.logged(&ended.entry.flow, ended.entry.endpoint)
                {
                    log.line(&record(&ended, service));
                }
            }
            Told::TooMuch => lost += 1,
        });
        log.hand_over();
        if let Err(error) = heard {
            tracing::warn!(%error, "ends of connections are not heard any more");
            self.ends = None;
        }
        if lost > 0 {
            self.update(|report| report.records_lost += lost);
        }
    }

    /// Listens to ends of connections as long as records of them are wanted.
    fn want_records(&mut self) {
        if !self.flows.are_logged() {
            self.ends = None;
        } else if self.ends.is_none() {
            if let Err(error) = conntrack::keep_accounts() {
                tracing::warn!(%error, "records will not tell what connections carried");
            }
            let listening = Netlink::listen(SockProtocol::NetlinkNetFilter, conntrack::ENDS);
            match listening {
                Ok(ends) => self.ends = Some(ends),
                Err(error) => tracing::warn!(%error, "there will be no records of connections"),
            }
        }
    }

    /// When there is something to do next.
    fn next(&self) -> Instant {
        let due = self.due.min(self.deep_due).min(self.sweep_due).min(self.count_due);
        self.flows.next_deadline(now()).map_or(due, |deadline| due.min(deadline))
    }

    fn take_over(&mut self, plan: &Plan) {
        self.division = divide(plan, self.choice, self.limits.slots);
        (self.is_in_force, self.due) = (false, now());
    }

    /// Does what is due.
    fn enforce(&mut self) {
        let started = now();
        let ending = self.flows.ending(started);
        if self.due <= started || self.deep_due <= started || ending != self.ending {
            self.ending = ending;
            match self.reconcile() {
                Ok(()) => {}
                Err(error) => self.complain(&error),
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
            self.sweep_due = finished + SWEEP.max(took * SWEEP_SHARE);
            if let Some(then) = finished.checked_sub(RESETTING) {
                self.flows.forget(then);
            }
        }
    }

    fn reconcile(&mut self) -> io::Result<()> {
        let started = now();
        let mut deep = self.deep_due <= started;
        let mut early = false;
        let mut kernel = Kernel::open()?;
        let mut transactions = 0;
        if !self.is_in_force {
            // The kernel would tell us of every slot of a map, which takes longer than filling it.
            self.changes = None;
        }
        for attempt in 0..ATTEMPTS {
            if attempt > 0 || self.is_in_force {
                // What changes from here on is heard, or seen by what follows.
                deep |= self.listen();
            }
            // Asked after listening: whoever installs or removes iptables' rules now is heard of.
            early = is_in_iptables();
            let wanted = Wanted {
                services: &self.division.kernel,
                groups: &self.division.groups,
                ending: &self.ending,
                is_captured_early: early,
            };
            let outcome = kernel.reconcile(wanted, deep)?;
            transactions += outcome.transactions;
            if outcome.transactions == 0 && self.changes.is_some() {
                break;
            }
        }
        let finished = now();
        if transactions > 0 {
            // Flows that began while it was otherwise may be where they no longer belong.
            self.sweep_due = finished;
        }
        let wanted = (self.ending.clone(), early);
        let is_same = self.enforced.as_ref() == Some(&wanted);
        self.enforced = Some(wanted);
        if self.is_in_force && transactions > 0 && is_same {
            self.update(|report| report.repairs += 1);
            tracing::warn!("the kernel's table of services had been changed: repaired");
        }
        if !self.is_in_force {
            self.flows.follow(&self.division.kernel, &self.division.proxied, finished);
            self.want_records();
            self.sweep_due = finished;
            self.update(|report| report.last_change = finished - started);
            tracing::info!(
                services = self.division.kernel.len(),
                transactions,
                took = ?finished - started,
                "services that the kernel carries"
            );
        }
        (self.is_in_force, self.refused) = (true, None);
        self.due = finished + DEEP;
        if deep {
            self.deep_due = finished + DEEP;
        }
        Ok(())
    }

    /// Listens to changes from here on. What was told before is seen by whoever looks now; whether it
    /// has to look at the elements of maps.
    fn listen(&mut self) -> bool {
        let Some(changes) = &self.changes else {
            let part = SockProtocol::NetlinkNetFilter;
            self.changes = Netlink::listen(part, nf_tables::CHANGES).ok();
            return false;
        };
        let mut of_elements = false;
        let heard = changes.drain(|told| of_elements |= is_of_elements(&told));
        of_elements || heard.is_err()
    }

    fn complain(&mut self, error: &io::Error) {
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => "; it takes the capability NET_ADMIN",
            _ => "",
        };
        let reason = format!("{error}{hint}");
        if self.refused.as_ref() != Some(&reason) && !self.division.kernel.is_empty() {
            tracing::warn!(reason, "the kernel does not carry services; the proxy path does");
        }
        self.refused = Some(reason);
        self.update(|report| report.failures += 1);
        let later = now() + RETRY;
        (self.due, self.deep_due) = (later, self.deep_due.max(later));
    }

    /// Reads how many flows each service has had, and looks at what the kernel does not tell of.
    fn count(&mut self) {
        match Kernel::open().and_then(|mut kernel| kernel.counters()) {
            Ok(counters) => self.counters = counters.into_iter().collect(),
            Err(error) => tracing::debug!(%error, "the kernel's counters cannot be read"),
        }
        if let Some(occupancy) = Occupancy::now() {
            self.update(|report| {
                report.level = occupancy.tell(report.level);
                report.occupancy = Some(occupancy);
            });
        }
        // The older iptables tells nobody of its changes.
        if self.enforced.as_ref().is_some_and(|(_, early)| *early != is_in_iptables()) {
            self.due = now();
        }
        self.count_due = now() + COUNT;
    }

    /// Looks at all of the kernel's connections: counts them, and lets go of those that lost their
    /// endpoint.
    fn sweep(&mut self) -> io::Result<()> {
        if self.refused.is_some() || !self.is_in_force {
            return Ok(());
        }
        let mut conntrack = Conntrack::open()?;
        let mut open = HashMap::new();
        let mut lost: Vec<Entry> = Vec::new();
        let flows = &self.flows;
        conntrack.list(|entry| match flows.fate(&entry.flow, entry.endpoint) {
            Fate::LetGo => lost.push(entry),
            Fate::Keep if entry.is_over => {}
            Fate::Keep => {
                if let Some(key) = flows.carried(&entry.flow, entry.endpoint) {
                    *open.entry(key).or_insert(0) += 1;
                }
            }
            Fate::Strange => {}
        })?;
        for entry in &lost {
            conntrack.delete(entry)?;
        }
        self.flows.swept();
        self.open = open;
        if !lost.is_empty() {
            tracing::info!(flows = lost.len(), "flows left endpoints that are gone");
            self.update(|report| report.let_go += lost.len() as u64);
        }
        Ok(())
    }

    fn tell(&self) {
        let carried = self.division.kernel.iter().map(|service| ServiceReport {
            listener: service.listener.clone(),
            transport: Some(service.key.0),
            way: match &self.refused {
                Some(reason) => Way::Proxy(NeedsProxy::Refused(reason.clone())),
                None => Way::Kernel,
            },
            flows: self.counters.get(&chain_name(service.key)).copied().unwrap_or(0),
            flows_open: self.open.get(&service.key).copied().unwrap_or(0),
        });
        let proxied = self.division.proxied.iter().map(|proxied| ServiceReport {
            listener: proxied.listener.clone(),
            transport: None,
            way: Way::Proxy(proxied.reason.clone()),
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
            report.settled = self.is_in_force || self.refused.is_some();
        });
    }

    fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn is_of_elements(told: &Told) -> bool {
    match told {
        Told::This(told) => nf_tables::is_of_elements(told),
        Told::TooMuch => true,
    }
}

/// Sleeps until there is a new plan, the kernel tells of a change, or the time is over. Whether to go
/// on.
fn pause<'a>(
    longest: Duration,
    woken: &mut UnixStream,
    told: impl Iterator<Item = &'a Netlink>,
) -> bool {
    // The kernel counts whole milliseconds; below one it would not sleep at all.
    let timeout = PollTimeout::try_from(longest.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
    let mut waited = vec![PollFd::new(woken.as_fd(), PollFlags::POLLIN)];
    waited.extend(told.map(|told| PollFd::new(told.as_fd(), PollFlags::POLLIN)));
    match poll(&mut waited, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => tracing::warn!(%error, "waiting for a plan"),
    }
    let mut calls = [0; 64];
    !matches!(woken.read(&mut calls), Ok(0))
}

/// The record of a connection. TCP's is written when the kernel forgets it, two minutes after its end.
fn record<'a>(ended: &Ended, service: &'a Name) -> Record<'a> {
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

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
fn now() -> Instant {
    Instant::now()
}
