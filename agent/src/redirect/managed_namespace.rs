//! The redirects of one network namespace: installs them, repairs drift, and backs off after failures.

use std::time::{Duration, Instant};

use weft_model::Backoff;

use super::config::RedirectConfig;
use super::dns;
use super::namespace::{Namespace, NamespaceId};
use super::probe::ProbeOutcome;
use super::redirect_kernel::RedirectKernel;
use super::report::{RedirectReport, RedirectStatus};
use super::types::{BackendChoice, RedirectBackend, RedirectError, RedirectState};
use crate::netlink::Netlink;

/// How often the guard checks for new namespaces and new configurations.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(250);
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
/// The waits after failures.
const BACKOFF: Backoff = Backoff { first: POLL_INTERVAL, longest: Duration::from_secs(10) };

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

/// A namespace whose redirects the guard maintains.
pub(super) struct ManagedNamespace {
    pub(super) desired: DesiredRedirects,
    pub(super) namespace_id: NamespaceId,
    /// Whether the namespace exists and notifications are subscribed to.
    is_subscribed: bool,
    pub(super) events: Vec<Netlink>,
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
    pub(super) dropped: Option<u64>,
    count_due: Instant,
    drop_log_due: Instant,
    due: Instant,
    /// When rules were last installed, or installing last failed.
    last_attempt: Option<Instant>,
    failures: u32,
}

impl ManagedNamespace {
    pub(super) fn new(desired: DesiredRedirects, now: Instant) -> Self {
        Self {
            desired,
            namespace_id: None,
            is_subscribed: false,
            events: Vec::new(),
            was_in_force: false,
            backend_in_use: None,
            status: RedirectStatus::Pending,
            probe_failure: None,
            probe_due: now,
            dns: None,
            flush_dns_conntrack: false,
            dropped: None,
            count_due: now,
            drop_log_due: now,
            due: now,
            last_attempt: None,
            failures: 0,
        }
    }

    /// Stops managing a namespace that was removed, and starts managing a new one.
    pub(super) fn check_namespace(&mut self, kernel: &impl RedirectKernel, now: Instant) {
        let namespace_id = kernel.namespace_id(&self.desired.namespace);
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
        let subscribed =
            server.and_then(|server| Ok((server, kernel.subscribe(redirect, namespace)?)));
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
    pub(super) fn check_dns(&mut self, now: Instant) {
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

    /// When the rules are compared next.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.is_subscribed.then_some(self.due)
    }

    /// Whether DNS is redirected, where that is configured.
    pub(super) fn is_dns_redirected(&self) -> Option<bool> {
        self.dns.as_ref().map(|(_, is_redirected)| *is_redirected)
    }

    /// Reads pending notifications, and schedules a comparison if there were any.
    pub(super) fn read_events(&mut self, now: Instant) {
        let mut received = false;
        for events in &self.events {
            received |= events.drain(|_| {}).unwrap_or(true);
        }
        if received {
            self.rules_changed(now);
        }
    }

    /// Schedules a comparison, because rules have changed.
    pub(super) fn rules_changed(&mut self, now: Instant) {
        // After a failure too: its cause may just have gone.
        let pause = if self.failures == 0 { REPAIR_INTERVAL } else { POLL_INTERVAL };
        let earliest = self.last_attempt.map_or(now, |last| last + pause);
        self.due = self.due.min(earliest.max(now));
        // Rules of another program may run before ours now.
        self.probe_due = self.probe_due.min(self.due);
    }

    /// The status, with a failed probe taken into account.
    pub(super) fn reported_status(&self) -> RedirectStatus {
        match &self.probe_failure {
            Some(how) if self.status == RedirectStatus::InForce => {
                RedirectStatus::Failed(how.clone())
            }
            _ => self.status.clone(),
        }
    }

    /// Probes whether traffic is redirected when that is due, while the rules are in force.
    pub(super) fn probe(
        &mut self,
        kernel: &impl RedirectKernel,
        now: Instant,
        report: &mut RedirectReport,
    ) {
        if self.probe_due > now || self.status != RedirectStatus::InForce {
            return;
        }
        let namespace = &self.desired.namespace;
        let probe_failure = match kernel.probe(&self.desired.redirect, namespace) {
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
            report.probe_failures += 1;
        }
        self.probe_failure = probe_failure;
    }

    /// Compares the rules when that is due, and installs them if they differ.
    pub(super) fn compare(
        &mut self,
        kernel: &impl RedirectKernel,
        now: Instant,
        report: &mut RedirectReport,
    ) {
        if self.next_due().is_none_or(|due| due > now) {
            return;
        }
        let namespace = self.desired.namespace.to_string();
        match self.enforce(kernel) {
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
                let wait = BACKOFF.delay(self.failures);
                self.failures = self.failures.saturating_add(1);
                tracing::error!(namespace, %error, ?wait, "failed to restore redirect rules");
                self.status = RedirectStatus::Failed(error.to_string());
                // The tool may have been removed.
                self.backend_in_use = None;
                self.due = now + wait;
            }
        }
    }

    /// Reads how many packets strict rules have dropped when that is due, and logs an increase.
    pub(super) fn count(&mut self, kernel: &impl RedirectKernel, now: Instant) {
        if self.count_due > now {
            return;
        }
        self.count_due = now + DROP_COUNT_INTERVAL;
        // Counters of iptables are not read.
        let is_read =
            matches!(self.backend_in_use, Some(RedirectBackend::Native | RedirectBackend::Nft));
        if !self.desired.redirect.strict || !is_read || self.status != RedirectStatus::InForce {
            return;
        }
        let namespace = &self.desired.namespace;
        match kernel.dropped_packets(namespace) {
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
    fn enforce(
        &self,
        kernel: &impl RedirectKernel,
    ) -> Result<(RedirectBackend, Option<RedirectState>), RedirectError> {
        let DesiredRedirects { namespace, backend, .. } = &self.desired;
        let redirect = &self.active_config();
        // The backend is remembered, because looking for a tool starts a process.
        let backend = self.backend_in_use.map_or_else(|| kernel.resolve(*backend), Ok)?;
        if redirect.is_empty() {
            return kernel.remove(namespace).map(|()| (backend, None));
        }
        let before = kernel.verify(redirect, backend, namespace)?;
        if before == RedirectState::InSync {
            return Ok((backend, None));
        }
        let mut after = before.clone();
        // Another program may change the rules between two of our steps.
        for _ in 0..INSTALL_ATTEMPTS {
            kernel.apply(redirect, backend, namespace)?;
            after = kernel.verify(redirect, backend, namespace)?;
            if after == RedirectState::InSync {
                return Ok((backend, Some(before)));
            }
        }
        Err(RedirectError::NotInForce(after))
    }
}
