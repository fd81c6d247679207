//! Keeps the desired redirect rules installed in many network namespaces.
//!
//! After each notification about a change, the guard compares the installed rules with the desired ones, and
//! installs them again if they differ. It stops managing a namespace that is removed, and installs the rules
//! in a new namespace of the same name. One thread does all this, and sleeps while nothing changes.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::apply::{apply, dropped_packets, remove, subscribe, verify};
use super::config::RedirectConfig;
use super::dns;
use super::namespace::{Namespace, NamespaceId};
use super::probe::{ProbeOutcome, probe};
use super::report::{RedirectReport, RedirectStatus};
use super::types::{BackendChoice, RedirectBackend, RedirectError, RedirectState};
use crate::clock::now;
use crate::netlink::Netlink;

/// How often the guard checks for new namespaces and new configurations.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How often rules are compared without a notification.
const COMPARE_INTERVAL: Duration = Duration::from_secs(30);
/// The same for legacy iptables, about which the kernel sends no notifications.
const COMPARE_INTERVAL_IPTABLES: Duration = Duration::from_millis(500);
/// The shortest time between two repairs of a namespace, to bound the cost when another program keeps changing the
/// rules.
const REPAIR_INTERVAL: Duration = Duration::from_millis(100);
/// How often installing is repeated until the rules are in place, before it counts as a failure.
const INSTALL_ATTEMPTS: usize = 3;
/// How often traffic is probed, and how often after a probe that was not redirected.
const PROBE_INTERVAL: Duration = Duration::from_secs(30);
const PROBE_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How often the packets dropped by strict rules are counted.
const DROP_COUNT_INTERVAL: Duration = Duration::from_secs(2);
/// The shortest time between two log lines about dropped packets.
const DROP_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// The longest wait after failures.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// The redirects to keep installed in a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredRedirects {
    /// The namespace.
    pub namespace: Namespace,
    /// The redirects.
    pub redirect: RedirectConfig,
    /// How to install them.
    pub backend: BackendChoice,
}

/// A handle of a running guard. The guard ends with its last handle; the rules stay.
#[derive(Debug, Clone)]
pub struct RedirectGuard {
    updates: Sender<Vec<DesiredRedirects>>,
    report: Arc<Mutex<RedirectReport>>,
}

impl RedirectGuard {
    /// Starts a guard with these redirects.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(redirects: Vec<DesiredRedirects>) -> io::Result<Self> {
        let (updates, received) = channel();
        let report = Arc::new(Mutex::new(RedirectReport::default()));
        let mut thread = RedirectThread { report: report.clone(), managed: HashMap::new() };
        thread.update(redirects);
        thread.publish_report();
        std::thread::Builder::new()
            .name("redirects".into())
            .spawn(move || thread.run(&received))?;
        Ok(Self { updates, report })
    }

    /// Replaces the desired redirects. Rules of namespaces that are not listed are removed.
    pub fn update(&self, redirects: Vec<DesiredRedirects>) {
        // Sending fails only when the thread has ended.
        drop(self.updates.send(redirects));
    }

    /// The current status.
    #[must_use]
    pub fn report(&self) -> RedirectReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

struct RedirectThread {
    report: Arc<Mutex<RedirectReport>>,
    managed: HashMap<Namespace, ManagedNamespace>,
}

/// A namespace whose redirects the guard maintains.
struct ManagedNamespace {
    desired: DesiredRedirects,
    namespace_id: NamespaceId,
    /// Whether the namespace exists and notifications are subscribed to.
    is_subscribed: bool,
    events: Vec<Netlink>,
    was_in_force: bool,
    /// The backend that installed the rules.
    backend_in_use: Option<RedirectBackend>,
    status: RedirectStatus,
    /// Why the last probe was not redirected, although the rules are in force.
    probe_failure: Option<String>,
    probe_due: Instant,
    /// The health check of the DNS server, and whether DNS is redirected to it.
    dns: Option<(dns::DnsHealthCheck, bool)>,
    /// Whether conntrack entries of earlier DNS queries must be deleted.
    flush_dns_conntrack: bool,
    /// The packets that strict rules have dropped, where the count can be read.
    dropped: Option<u64>,
    count_due: Instant,
    drop_log_due: Instant,
    due: Instant,
    /// When rules were last installed, or installing last failed.
    last_attempt: Option<Instant>,
    failures: u32,
}

impl RedirectThread {
    fn run(mut self, updates: &Receiver<Vec<DesiredRedirects>>) {
        loop {
            match updates.try_recv() {
                Ok(redirects) => self.update(redirects),
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

    /// Applies a new list of redirects. Namespaces whose redirects have not changed are left alone.
    fn update(&mut self, redirects: Vec<DesiredRedirects>) {
        let mut before = std::mem::take(&mut self.managed);
        for desired in redirects {
            let unchanged =
                before.remove(&desired.namespace).filter(|managed| managed.desired == desired);
            let managed = unchanged.unwrap_or_else(|| ManagedNamespace::new(desired.clone()));
            self.managed.insert(desired.namespace, managed);
        }
        let removed = before.into_values().filter(|managed| managed.namespace_id.is_some());
        for managed in removed {
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
        let mut statuses: Vec<(String, RedirectStatus)> = self
            .managed
            .values()
            .map(|managed| (managed.desired.namespace.to_string(), managed.reported_status()))
            .collect();
        statuses.sort_by(|(one, _), (other, _)| one.cmp(other));
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
        report.statuses = statuses;
        report.dropped = dropped;
        report.dns = dns;
    }

    /// Sleeps until a notification arrives, a comparison is due, or [`POLL_INTERVAL`] has passed.
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
            Err(error) => tracing::warn!(%error, "polling for changes of rules failed"),
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

    /// Stops managing a namespace that was removed, and starts managing a new one.
    fn check_namespace(&mut self, now: Instant) {
        let namespace_id = self.desired.namespace.namespace_id();
        if namespace_id == self.namespace_id && (namespace_id.is_none() || self.is_subscribed) {
            return;
        }
        self.events.clear();
        self.is_subscribed = false;
        self.was_in_force = false;
        self.namespace_id = namespace_id;
        if namespace_id.is_none() {
            self.status = RedirectStatus::NamespaceMissing;
            return;
        }
        let DesiredRedirects { redirect, namespace, .. } = &self.desired;
        let server = redirect.dns.map(|port| dns::DnsHealthCheck::at(port, namespace)).transpose();
        // Subscribing comes before comparing, so that no change is missed.
        let subscribed = server.and_then(|server| Ok((server, subscribe(redirect, namespace)?)));
        match subscribed {
            Ok((server, events)) => {
                self.events = events;
                self.is_subscribed = true;
                self.due = now;
                self.dns = server.map(|server| (server, false));
            }
            Err(error) => self.status = RedirectStatus::Failed(error.to_string()),
        }
    }

    /// Checks the DNS server, and schedules a change of the rules when its health has changed.
    fn check_dns(&mut self, now: Instant) {
        let Some((server, is_redirected)) = &mut self.dns else { return };
        let answers = server.poll(now);
        if answers == *is_redirected {
            return;
        }
        *is_redirected = answers;
        let namespace = &self.desired.namespace;
        if answers {
            tracing::info!(%namespace, "DNS redirected: the DNS server answers");
        } else {
            tracing::warn!(%namespace, "DNS redirection suspended: the DNS server does not answer");
        }
        self.due = now;
        self.was_in_force = false;
        self.flush_dns_conntrack = true;
    }

    /// The configuration that should be installed now: without DNS while the server does not answer.
    fn active_config(&self) -> RedirectConfig {
        match self.dns {
            Some((_, false)) => self.desired.redirect.without_dns(),
            Some((_, true)) | None => self.desired.redirect.clone(),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.is_subscribed && self.due <= now
    }

    /// Reads pending notifications, and schedules a comparison if there were any.
    fn drain_events(&mut self, now: Instant) {
        let mut received = false;
        for events in &self.events {
            received |= events.drain(|_| {}).unwrap_or(true);
        }
        if received {
            // After a failure too: its cause may just have gone.
            let pause = if self.failures == 0 { REPAIR_INTERVAL } else { POLL_INTERVAL };
            let earliest = self.last_attempt.map_or(now, |last| last + pause);
            self.due = self.due.min(earliest.max(now));
            // Rules of another program may run before ours now.
            self.probe_due = self.probe_due.min(self.due);
        }
    }

    /// The status, with a failed probe taken into account.
    fn reported_status(&self) -> RedirectStatus {
        match &self.probe_failure {
            Some(how) if self.status == RedirectStatus::InForce => {
                RedirectStatus::Failed(how.clone())
            }
            _ => self.status.clone(),
        }
    }

    /// Probes whether traffic is redirected, while the rules are in force.
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
                tracing::debug!(%namespace, %error, "probe failed");
                None
            }
        };
        match (&self.probe_failure, &probe_failure) {
            (None, Some(how)) => tracing::error!(%namespace, "{how}"),
            (Some(_), None) => tracing::info!(%namespace, "connections are redirected again"),
            (None, None) | (Some(_), Some(_)) => {}
        }
        self.probe_due =
            now + if probe_failure.is_some() { PROBE_RETRY_INTERVAL } else { PROBE_INTERVAL };
        if probe_failure.is_some() {
            report.lock().unwrap_or_else(PoisonError::into_inner).probe_failures += 1;
        }
        self.probe_failure = probe_failure;
    }

    /// Compares the rules, and installs them if they differ.
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
                        tracing::warn!(namespace, was = %before, "redirect rules had drifted: repaired");
                    } else {
                        tracing::info!(namespace, "redirects installed");
                    }
                }
                self.was_in_force = true;
                self.status = RedirectStatus::InForce;
                self.failures = 0;
                self.backend_in_use = Some(backend);
                if std::mem::take(&mut self.flush_dns_conntrack)
                    && let Err(error) = dns::flush_conntrack(
                        &self.desired.redirect.resolvers,
                        &self.desired.namespace,
                    )
                {
                    tracing::warn!(namespace, %error, "conntrack entries of earlier DNS queries not deleted");
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
                tracing::error!(namespace, %error, ?wait, "failed to restore redirect rules");
                self.status = RedirectStatus::Failed(error.to_string());
                // The tool may have been removed.
                self.backend_in_use = None;
                self.due = now + wait;
            }
        }
    }

    /// Reads how many packets strict rules have dropped, and logs an increase.
    fn count(&mut self, now: Instant) {
        self.count_due = now + DROP_COUNT_INTERVAL;
        // Counters of iptables are not read.
        let is_read =
            matches!(self.backend_in_use, Some(RedirectBackend::Native | RedirectBackend::Nft));
        if !self.desired.redirect.strict || !is_read || self.status != RedirectStatus::InForce {
            return;
        }
        let namespace = &self.desired.namespace;
        match dropped_packets(namespace) {
            Ok(packets) => {
                // Newly installed rules count from 0.
                let is_more = packets > self.dropped.unwrap_or(0);
                if is_more && self.drop_log_due <= now {
                    tracing::warn!(%namespace, packets, "strict rules dropped packets that no redirect captures");
                    self.drop_log_due = now + DROP_LOG_INTERVAL;
                }
                self.dropped = Some(packets);
            }
            Err(error) => tracing::debug!(%namespace, %error, "reading dropped packets failed"),
        }
    }

    /// Installs the rules if they differ. Returns the backend, and the state before if the rules were installed.
    fn enforce(&self) -> Result<(RedirectBackend, Option<RedirectState>), RedirectError> {
        let DesiredRedirects { namespace, backend, .. } = &self.desired;
        let redirect = &self.active_config();
        // The backend is remembered, because looking for a tool starts a process.
        let backend = self.backend_in_use.map_or_else(|| backend.resolve(), Ok)?;
        if redirect.is_empty() {
            return remove(namespace).map(|()| (backend, None));
        }
        let before = verify(redirect, backend, namespace)?;
        if before == RedirectState::InSync {
            return Ok((backend, None));
        }
        let mut after = before.clone();
        // Another program may change the rules between two of our steps.
        for _ in 0..INSTALL_ATTEMPTS {
            apply(redirect, backend, namespace)?;
            after = verify(redirect, backend, namespace)?;
            if after == RedirectState::InSync {
                return Ok((backend, Some(before)));
            }
        }
        Err(RedirectError::Invalid(format!("rules differ after installation: {after}")))
    }
}
