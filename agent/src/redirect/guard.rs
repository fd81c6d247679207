//! Keeps rules as they are wanted, in many network namespaces, for as long as it runs.
//!
//! The kernel tells of every change; what was changed is compared with what is wanted and, when it
//! differs, installed again. A namespace that goes is let go; one that comes under the same name gets
//! the rules anew. One thread does it all, and sleeps while nothing happens.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::apply::{dropped, listen};
use super::dns;
use super::report::{RedirectReport, RedirectStatus};
use super::{
    BackendChoice, Namespace, ProbeOutcome, RedirectBackend, RedirectConfig, RedirectError,
    RedirectState, apply, probe, remove, verify,
};
use crate::clock::now;
use crate::netlink::Netlink;

/// How often namespaces are looked for, and new wishes.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How often what is in force is compared though nothing was told.
const COMPARE_INTERVAL: Duration = Duration::from_secs(30);
/// How often it is where the kernel tells nothing: the older iptables.
const COMPARE_INTERVAL_IPTABLES: Duration = Duration::from_millis(500);
/// The shortest time between two repairs of a namespace, so that a fight with somebody who changes
/// the rules back costs little.
const REPAIR_INTERVAL: Duration = Duration::from_millis(100);
/// How often rules are installed before it counts as a failure that they are not there.
const INSTALL_ATTEMPTS: usize = 3;
/// How often it is tried whether traffic is really handed over, and how often when it was not.
const PROBE_INTERVAL: Duration = Duration::from_secs(30);
const PROBE_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is read how much strict rules have dropped.
const DROP_COUNT_INTERVAL: Duration = Duration::from_secs(2);
/// How often that is told, at most.
const DROP_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// The longest wait after failures.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// Rules that are wanted in a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredRedirects {
    /// Where.
    pub namespace: Namespace,
    /// What.
    pub redirect: RedirectConfig,
    /// By what.
    pub backend: BackendChoice,
}

/// A guard that runs. It ends when the value is dropped; the rules stay.
#[derive(Debug, Clone)]
pub struct RedirectGuard {
    desired: Sender<Vec<DesiredRedirects>>,
    report: Arc<Mutex<RedirectReport>>,
}

impl RedirectGuard {
    /// Starts one, with what is wanted.
    ///
    /// # Errors
    /// When there can be no thread for it.
    pub fn start(active_config: Vec<DesiredRedirects>) -> io::Result<Self> {
        let (desired, received) = channel();
        let report = Arc::new(Mutex::new(RedirectReport::default()));
        let mut thread = RedirectThread { report: report.clone(), managed: HashMap::new() };
        thread.want(active_config);
        thread.publish_report();
        std::thread::Builder::new()
            .name("redirects".into())
            .spawn(move || thread.run(&received))?;
        Ok(Self { desired, report })
    }

    /// Says what is wanted from now on. Where nothing is wanted any more, the rules are removed.
    pub fn want(&self, desired: Vec<DesiredRedirects>) {
        // The thread ends with the last sender only.
        drop(self.desired.send(desired));
    }

    /// What it has to tell.
    #[must_use]
    pub fn report(&self) -> RedirectReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A file of a namespace, as it is now: another one under the same name is another namespace.
type NamespaceId = Option<(u64, u64)>;

struct RedirectThread {
    report: Arc<Mutex<RedirectReport>>,
    managed: HashMap<Namespace, ManagedNamespace>,
}

/// A wish and how it stands.
struct ManagedNamespace {
    desired: DesiredRedirects,
    namespace_id: NamespaceId,
    /// Whether the namespace is there and tells of changes.
    is_subscribed: bool,
    events: Vec<Netlink>,
    was_in_force: bool,
    /// What put them in force.
    backend_in_use: Option<RedirectBackend>,
    status: RedirectStatus,
    /// Why traffic is not handed over though the rules are in force.
    probe_failure: Option<String>,
    probe_due: Instant,
    /// Where DNS is to be handed over: who takes it, and whether it is handed over.
    dns: Option<(dns::DnsHealthCheck, bool)>,
    /// What the kernel remembers of earlier questions is to be forgotten.
    flush_dns_conntrack: bool,
    /// How many packets strict rules have dropped, where that can be read.
    dropped: Option<u64>,
    count_due: Instant,
    drop_log_due: Instant,
    due: Instant,
    /// When rules were last installed, or could not be.
    last_attempt: Option<Instant>,
    failures: u32,
}

impl RedirectThread {
    fn run(mut self, desired: &Receiver<Vec<DesiredRedirects>>) {
        loop {
            match desired.try_recv() {
                Ok(active_config) => self.want(active_config),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
            let now = now();
            for managed in self.managed.values_mut() {
                managed.check_namespace(now);
            }
            for managed in self.managed.values_mut() {
                managed.check_dns(now);
            }
            for managed in self.managed.values_mut().filter(|managed| managed.is_due(now)) {
                managed.compare(now, &self.report);
            }
            for managed in self.managed.values_mut().filter(|managed| managed.probe_due <= now) {
                managed.probe(now, &self.report);
            }
            for managed in self.managed.values_mut().filter(|managed| managed.count_due <= now) {
                managed.count(now);
            }
            self.publish_report();
            self.wait(now);
        }
    }

    /// Takes over new wishes: unchanged ones go on as they are.
    fn want(&mut self, active_config: Vec<DesiredRedirects>) {
        let mut before = std::mem::take(&mut self.managed);
        for desired in active_config {
            let same =
                before.remove(&desired.namespace).filter(|managed| managed.desired == desired);
            let managed = same.unwrap_or_else(|| ManagedNamespace::new(desired.clone()));
            self.managed.insert(desired.namespace, managed);
        }
        let unwanted = before.into_values().filter(|managed| managed.namespace_id.is_some());
        for managed in unwanted {
            if self.managed.contains_key(&managed.desired.namespace) {
                continue;
            }
            match remove(&managed.desired.namespace) {
                Ok(()) => {
                    tracing::info!(namespace = %managed.desired.namespace, "redirects removed")
                }
                Err(error) => {
                    tracing::warn!(namespace = %managed.desired.namespace, %error, "redirects not removed");
                }
            }
        }
    }

    fn publish_report(&self) {
        let mut status: Vec<(String, RedirectStatus)> = self
            .managed
            .values()
            .map(|managed| (managed.desired.namespace.to_string(), managed.reported_status()))
            .collect();
        status.sort_by(|(one, _), (other, _)| one.cmp(other));
        let dropped = self.managed.values().filter_map(|managed| {
            managed.dropped.map(|packets| (managed.desired.namespace.to_string(), packets))
        });
        let mut dropped: Vec<_> = dropped.collect();
        dropped.sort();
        let dns = self.managed.values().filter_map(|managed| {
            Some((managed.desired.namespace.to_string(), managed.dns.as_ref()?.1))
        });
        let mut dns: Vec<_> = dns.collect();
        dns.sort();
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        (report.statuses, report.dropped, report.dns) = (status, dropped, dns);
    }

    /// Sleeps until something is told, something is due, or it is time to look.
    fn wait(&mut self, now: Instant) {
        let due = self
            .managed
            .values()
            .filter(|managed| managed.is_subscribed)
            .map(|managed| managed.due);
        let until_due = due.min().map_or(POLL_INTERVAL, |due| due.saturating_duration_since(now));
        let timeout = until_due.min(POLL_INTERVAL).as_millis().max(1);
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO);
        let events = self.managed.values().flat_map(|managed| &managed.events);
        let mut waited: Vec<PollFd<'_>> =
            events.map(|events| PollFd::new(events.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut waited, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => tracing::warn!(%error, "waiting for changes of rules"),
        }
        drop(waited);
        for managed in self.managed.values_mut() {
            managed.drain_events(now);
        }
    }
}

impl ManagedNamespace {
    fn new(desired: DesiredRedirects) -> Self {
        Self {
            desired,
            namespace_id: None,
            is_subscribed: false,
            events: Vec::new(),
            was_in_force: false,
            backend_in_use: None,
            status: RedirectStatus::Pending,
            probe_failure: None,
            probe_due: now(),
            dns: None,
            flush_dns_conntrack: false,
            dropped: None,
            count_due: now(),
            drop_log_due: now(),
            due: now(),
            last_attempt: None,
            failures: 0,
        }
    }

    /// Lets go of a namespace that has gone, and takes up one that has come.
    fn check_namespace(&mut self, now: Instant) {
        let namespace_id = self.desired.namespace.namespace_id();
        if namespace_id == self.namespace_id && (namespace_id.is_none() || self.is_subscribed) {
            return;
        }
        self.events.clear();
        (self.is_subscribed, self.was_in_force) = (false, false);
        self.namespace_id = namespace_id;
        if namespace_id.is_none() {
            self.status = RedirectStatus::NamespaceMissing;
            return;
        }
        let DesiredRedirects { redirect, namespace, .. } = &self.desired;
        let server = redirect.dns.map(|port| dns::DnsHealthCheck::at(port, namespace)).transpose();
        // Listening comes before comparing, so that no change falls between.
        let taken_up = server.and_then(|server| Ok((server, listen(redirect, namespace)?)));
        match taken_up {
            Ok((server, events)) => {
                (self.events, self.is_subscribed, self.due) = (events, true, now);
                self.dns = server.map(|server| (server, false));
            }
            Err(error) => self.status = RedirectStatus::Failed(error.to_string()),
        }
    }

    /// Sees whether DNS is to be handed over, and has the rules changed when that has changed.
    fn check_dns(&mut self, now: Instant) {
        let Some((server, is_redirected)) = &mut self.dns else { return };
        let answers = server.poll(now);
        if answers == *is_redirected {
            return;
        }
        *is_redirected = answers;
        let namespace = &self.desired.namespace;
        if answers {
            tracing::info!(%namespace, "DNS is handed over: its server answers");
        } else {
            tracing::warn!(%namespace, "DNS is not handed over any more: its server does not answer");
        }
        (self.due, self.was_in_force, self.flush_dns_conntrack) = (now, false, true);
    }

    /// What is to be in force now.
    fn active_config(&self) -> RedirectConfig {
        match self.dns {
            Some((_, false)) => self.desired.redirect.without_dns(),
            Some((_, true)) | None => self.desired.redirect.clone(),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.is_subscribed && self.due <= now
    }

    /// Takes in what the kernel told: whatever it was, it is time to compare.
    fn drain_events(&mut self, now: Instant) {
        let mut received = false;
        for events in &self.events {
            received |= events.drain(|_| {}).unwrap_or(true);
        }
        if received {
            // After a failure too: what was in the way may just have gone.
            let rest = if self.failures == 0 { REPAIR_INTERVAL } else { POLL_INTERVAL };
            let earliest = self.last_attempt.map_or(now, |last| last + rest);
            self.due = self.due.min(earliest.max(now));
            // Others' rules may go before ours now.
            self.probe_due = self.probe_due.min(self.due);
        }
    }

    /// How it stands, by the rules and by what becomes of traffic.
    fn reported_status(&self) -> RedirectStatus {
        match &self.probe_failure {
            Some(how) if self.status == RedirectStatus::InForce => {
                RedirectStatus::Failed(how.clone())
            }
            _ => self.status.clone(),
        }
    }

    /// Tries whether traffic is handed over, where the rules are in force.
    fn probe(&mut self, now: Instant, report: &Mutex<RedirectReport>) {
        if self.status != RedirectStatus::InForce {
            return;
        }
        let namespace = &self.desired.namespace;
        let probe_failure = match probe(&self.desired.redirect, namespace) {
            Ok(outcome @ ProbeOutcome::NotRedirected(..)) => Some(outcome.to_string()),
            Ok(other) => {
                tracing::debug!(%namespace, "{other}");
                None
            }
            Err(error) => {
                tracing::debug!(%namespace, %error, "it cannot be tried what becomes of traffic");
                None
            }
        };
        match (&self.probe_failure, &probe_failure) {
            (None, Some(how)) => tracing::error!(%namespace, "{how}"),
            (Some(_), None) => tracing::info!(%namespace, "connections are handed over again"),
            (None, None) | (Some(_), Some(_)) => {}
        }
        self.probe_due =
            now + if probe_failure.is_some() { PROBE_RETRY_INTERVAL } else { PROBE_INTERVAL };
        if probe_failure.is_some() {
            report.lock().unwrap_or_else(PoisonError::into_inner).probe_failures += 1;
        }
        self.probe_failure = probe_failure;
    }

    /// Compares, and installs what is not as it is wanted.
    fn compare(&mut self, now: Instant, report: &Mutex<RedirectReport>) {
        let namespace = self.desired.namespace.to_string();
        let outcome = self.enforce();
        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok((backend, repaired)) => {
                if let Some(before) = repaired {
                    self.last_attempt = Some(now);
                    if self.was_in_force {
                        report.repairs += 1;
                        tracing::warn!(namespace, was = %before, "redirects had been changed: repaired");
                    } else {
                        tracing::info!(namespace, "redirects installed");
                    }
                }
                (self.was_in_force, self.status, self.failures) =
                    (true, RedirectStatus::InForce, 0);
                self.backend_in_use = Some(backend);
                if std::mem::take(&mut self.flush_dns_conntrack)
                    && let Err(error) = dns::flush_conntrack(
                        &self.desired.redirect.resolvers,
                        &self.desired.namespace,
                    )
                {
                    tracing::warn!(namespace, %error, "questions under way may go astray");
                }
                let silent = backend == RedirectBackend::Iptables;
                self.due = now + if silent { COMPARE_INTERVAL_IPTABLES } else { COMPARE_INTERVAL };
            }
            Err(error) => {
                self.last_attempt = Some(now);
                report.failures += 1;
                let wait = POLL_INTERVAL
                    .saturating_mul(2u32.saturating_pow(self.failures))
                    .min(MAX_RETRY_INTERVAL);
                self.failures = self.failures.saturating_add(1);
                tracing::error!(namespace, %error, ?wait, "redirects are not as they should be");
                self.status = RedirectStatus::Failed(error.to_string());
                // The tool itself may be gone.
                self.backend_in_use = None;
                self.due = now + wait;
            }
        }
    }

    /// Reads what strict rules have dropped, and tells when it is more than before.
    fn count(&mut self, now: Instant) {
        self.count_due = now + DROP_COUNT_INTERVAL;
        // What iptables has counted we do not read.
        let is_read =
            matches!(self.backend_in_use, Some(RedirectBackend::Native | RedirectBackend::Nft));
        if !self.desired.redirect.strict || !is_read || self.status != RedirectStatus::InForce {
            return;
        }
        let namespace = &self.desired.namespace;
        match dropped(namespace) {
            Ok(packets) => {
                // Rules that were installed anew count from 0 again.
                let is_more = packets > self.dropped.unwrap_or(0);
                if is_more && self.drop_log_due <= now {
                    tracing::warn!(%namespace, packets, "strict redirects dropped what nothing captures");
                    self.drop_log_due = now + DROP_LOG_INTERVAL;
                }
                self.dropped = Some(packets);
            }
            Err(error) => tracing::debug!(%namespace, %error, "what is dropped cannot be read"),
        }
    }

    /// By what it is in force now, and what was there instead, if it was not what is wanted.
    fn enforce(&self) -> Result<(RedirectBackend, Option<RedirectState>), RedirectError> {
        let DesiredRedirects { namespace, backend, .. } = &self.desired;
        let redirect = &self.active_config();
        // Found once: looking for a tool starts it.
        let backend = self.backend_in_use.map_or_else(|| backend.resolve(), Ok)?;
        if redirect.is_empty() {
            return remove(namespace).map(|()| (backend, None));
        }
        let before = verify(redirect, backend, namespace)?;
        if before == RedirectState::InSync {
            return Ok((backend, None));
        }
        let mut after = before.clone();
        // Somebody may change them again between two of our steps.
        for _ in 0..INSTALL_ATTEMPTS {
            apply(redirect, backend, namespace)?;
            after = verify(redirect, backend, namespace)?;
            if after == RedirectState::InSync {
                return Ok((backend, Some(before)));
            }
        }
        Err(RedirectError::Invalid(format!("installed, and yet {after}")))
    }
}

impl Namespace {
    fn namespace_id(&self) -> NamespaceId {
        let own = std::path::Path::new("/proc/self/ns/net");
        let path = match self {
            Self::Own => own,
            Self::At(path) => path,
        };
        let file = std::fs::metadata(path).ok()?;
        Some((file.dev(), file.ino()))
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("this namespace"),
            Self::At(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Display for RedirectState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InSync => f.write_str("as wanted"),
            Self::NotInstalled => f.write_str("nothing of weft is installed"),
            Self::Drifted(how) => f.write_str(&how.join("; ")),
        }
    }
}
