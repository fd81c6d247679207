//! Keeps the desired redirect rules installed in many network namespaces.
//!
//! After each notification about a change, the guard compares the installed rules with the desired ones, and
//! installs them again if they differ. It stops managing a namespace that is removed, and installs the rules
//! in a new namespace of the same name. One thread does all this, and sleeps while nothing changes.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Instant;

use weft_runtime::clock::now;

use super::managed_namespace::{DesiredRedirects, ManagedNamespace, POLL_INTERVAL};
use super::namespace::Namespace;
use super::redirect_kernel::{HostKernel, RedirectKernel};
use super::report::RedirectReport;
use crate::netlink::Netlink;
use crate::reconcile_loop::{Reconcile, ReconcileHandle};

/// A handle of a running guard. The guard ends with its last handle; the rules stay.
#[derive(Debug, Clone)]
pub struct RedirectGuard(ReconcileHandle<Vec<DesiredRedirects>, RedirectReport>);

impl RedirectGuard {
    /// Starts a guard with these redirects.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(redirects: Vec<DesiredRedirects>) -> io::Result<Self> {
        let mut reconciler = RedirectReconciler::new(HostKernel);
        reconciler.set_desired(redirects, now());
        ReconcileHandle::start("redirects", reconciler).map(Self)
    }

    /// Replaces the desired redirects. Rules of namespaces that are not listed are removed.
    pub fn update(&self, redirects: Vec<DesiredRedirects>) {
        self.0.set_desired(redirects);
    }

    /// The current status.
    #[must_use]
    pub fn report(&self) -> RedirectReport {
        self.0.report()
    }
}

/// Makes the rules of all namespaces match the desired ones.
struct RedirectReconciler<K> {
    kernel: K,
    managed: HashMap<Namespace, ManagedNamespace>,
    /// The counts of the report.
    counts: RedirectReport,
}

impl<K: RedirectKernel> Reconcile for RedirectReconciler<K> {
    type Desired = Vec<DesiredRedirects>;
    type Report = RedirectReport;

    /// Namespaces whose redirects have not changed are left alone.
    fn set_desired(&mut self, redirects: Vec<DesiredRedirects>, now: Instant) {
        let mut before = std::mem::take(&mut self.managed);
        for desired in redirects {
            let unchanged =
                before.remove(&desired.namespace).filter(|managed| managed.desired == desired);
            let managed = unchanged.unwrap_or_else(|| ManagedNamespace::new(desired.clone(), now));
            self.managed.insert(desired.namespace, managed);
        }
        for removed in before.into_values().filter(|managed| managed.namespace_id.is_some()) {
            let namespace = removed.desired.namespace;
            match self.kernel.remove(&namespace) {
                Ok(()) => tracing::info!(%namespace, "redirects removed"),
                Err(error) => tracing::warn!(%namespace, %error, "redirects not removed"),
            }
        }
    }

    fn act(&mut self, now: Instant) {
        let Self { kernel, managed, counts } = self;
        for managed in managed.values_mut() {
            managed.check_namespace(kernel, now);
        }
        for managed in managed.values_mut() {
            managed.check_dns(now);
        }
        for managed in managed.values_mut() {
            managed.compare(kernel, now, counts);
        }
        // Rules are restored in every namespace before a slow probe of one.
        for managed in managed.values_mut() {
            managed.probe(kernel, now, counts);
        }
        for managed in managed.values_mut() {
            managed.count(kernel, now);
        }
    }

    fn report(&self) -> RedirectReport {
        let mut report = self.counts.clone();
        for managed in self.managed.values() {
            let namespace = managed.desired.namespace.to_string();
            report.statuses.push((namespace.clone(), managed.reported_status()));
            report.dropped.extend(managed.dropped.map(|packets| (namespace.clone(), packets)));
            report.dns.extend(managed.is_dns_redirected().map(|is| (namespace, is)));
        }
        report.statuses.sort_by(|(one, _), (other, _)| one.cmp(other));
        report.dropped.sort();
        report.dns.sort();
        report
    }

    /// New namespaces are looked for at an interval, because the kernel sends no notification about them.
    fn next_due(&self, now: Instant) -> Option<Instant> {
        let due = self.managed.values().filter_map(ManagedNamespace::next_due);
        Some(due.fold(now + POLL_INTERVAL, Instant::min))
    }

    fn event_sockets(&self) -> Vec<BorrowedFd<'_>> {
        let events = self.managed.values().flat_map(|managed| &managed.events);
        events.map(Netlink::as_fd).collect()
    }

    fn read_events(&mut self, now: Instant) {
        for managed in self.managed.values_mut() {
            managed.read_events(now);
        }
    }
}

impl<K> RedirectReconciler<K> {
    fn new(kernel: K) -> Self {
        Self { kernel, managed: HashMap::new(), counts: RedirectReport::default() }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::path::PathBuf;
    use std::time::Duration;

    use super::super::config::RedirectConfig;
    use super::super::namespace::NamespaceId;
    use super::super::probe::ProbeOutcome;
    use super::super::report::RedirectStatus;
    use super::super::tests::workload;
    use super::super::types::{BackendChoice, RedirectBackend, RedirectError, RedirectState};
    use super::*;

    /// A kernel with one set of rules, in a namespace that may be missing.
    #[derive(Default)]
    struct FakeKernel {
        namespace: Cell<NamespaceId>,
        installed: RefCell<Option<RedirectConfig>>,
        verifications: Cell<u32>,
        installations: Cell<u32>,
        refuses: Cell<bool>,
        /// Whether another program undoes each installation.
        undoes: Cell<bool>,
    }

    impl RedirectKernel for FakeKernel {
        fn namespace_id(&self, _: &Namespace) -> NamespaceId {
            self.namespace.get()
        }

        fn subscribe(
            &self,
            _: &RedirectConfig,
            _: &Namespace,
        ) -> Result<Vec<Netlink>, RedirectError> {
            Ok(Vec::new())
        }

        fn resolve(&self, _: BackendChoice) -> Result<RedirectBackend, RedirectError> {
            Ok(RedirectBackend::Native)
        }

        fn verify(
            &self,
            redirect: &RedirectConfig,
            _: RedirectBackend,
            _: &Namespace,
        ) -> Result<RedirectState, RedirectError> {
            self.verifications.set(self.verifications.get() + 1);
            Ok(match &*self.installed.borrow() {
                None => RedirectState::NotInstalled,
                Some(installed) if installed == redirect => RedirectState::InSync,
                Some(_) => RedirectState::Drifted(vec!["rule 1 differs".into()]),
            })
        }

        fn apply(
            &self,
            redirect: &RedirectConfig,
            _: RedirectBackend,
            _: &Namespace,
        ) -> Result<(), RedirectError> {
            self.installations.set(self.installations.get() + 1);
            if self.refuses.get() {
                return Err(RedirectError::Missing("nft"));
            }
            let installed = (!self.undoes.get()).then(|| redirect.clone());
            self.installed.replace(installed);
            Ok(())
        }

        fn remove(&self, _: &Namespace) -> Result<(), RedirectError> {
            self.installed.take();
            Ok(())
        }

        fn probe(&self, _: &RedirectConfig, _: &Namespace) -> Result<ProbeOutcome, RedirectError> {
            Ok(ProbeOutcome::Skipped("the rules are not in a kernel".into()))
        }

        fn dropped_packets(&self, _: &Namespace) -> Result<u64, RedirectError> {
            Ok(0)
        }
    }

    fn desired() -> DesiredRedirects {
        DesiredRedirects {
            namespace: Namespace::At(PathBuf::from("/run/netns/web")),
            redirect: workload(),
            backend: BackendChoice::Auto,
        }
    }

    /// A reconciler with desired redirects in an existing namespace, before its first action.
    fn reconciler(start: Instant) -> RedirectReconciler<FakeKernel> {
        let mut reconciler = RedirectReconciler::new(FakeKernel::default());
        reconciler.kernel.namespace.set(Some((1, 1)));
        reconciler.set_desired(vec![desired()], start);
        reconciler
    }

    fn status(reconciler: &RedirectReconciler<FakeKernel>) -> RedirectStatus {
        reconciler.report().statuses.remove(0).1
    }

    #[test]
    fn installed_rules_are_compared_at_an_interval_and_not_installed_again() {
        let start = now();
        let mut reconciler = reconciler(start);
        assert_eq!(status(&reconciler), RedirectStatus::Pending);
        reconciler.act(start);
        assert_eq!(status(&reconciler), RedirectStatus::InForce);
        assert_eq!(reconciler.kernel.installations.get(), 1);
        let verifications = reconciler.kernel.verifications.get();
        reconciler.act(start + Duration::from_secs(1));
        assert_eq!(reconciler.kernel.verifications.get(), verifications);
        reconciler.set_desired(vec![desired()], start);
        reconciler.act(start + Duration::from_secs(60));
        assert_eq!(reconciler.kernel.verifications.get(), verifications + 1);
        assert_eq!(reconciler.kernel.installations.get(), 1);
        assert_eq!(reconciler.report().repairs, 0);
    }

    #[test]
    fn drift_is_repaired_after_a_notification_and_counted() {
        let start = now();
        let mut reconciler = reconciler(start);
        reconciler.act(start);
        reconciler.kernel.installed.take();
        let soon = start + Duration::from_millis(1);
        for managed in reconciler.managed.values_mut() {
            managed.rules_changed(soon);
        }
        reconciler.act(soon);
        assert_eq!(reconciler.kernel.installations.get(), 1, "repairs have a shortest distance");
        let later = reconciler.next_due(soon).expect("a comparison is due");
        assert!(later < start + Duration::from_millis(200));
        reconciler.act(later);
        assert_eq!(reconciler.kernel.installations.get(), 2);
        assert_eq!(reconciler.report().repairs, 1);
    }

    #[test]
    fn failed_installation_is_reported_and_repeated_with_growing_pauses() {
        let start = now();
        let mut reconciler = reconciler(start);
        reconciler.kernel.refuses.set(true);
        let mut at = start;
        let mut pauses = Vec::new();
        for failures in 1..=4 {
            reconciler.act(at);
            assert_eq!(reconciler.report().failures, failures);
            assert!(matches!(status(&reconciler), RedirectStatus::Failed(_)));
            let due = reconciler.managed.values().find_map(ManagedNamespace::next_due);
            let due = due.expect("the next attempt is due");
            reconciler.act(due - Duration::from_millis(1));
            assert_eq!(reconciler.report().failures, failures, "it is too early");
            pauses.push(due - at);
            at = due;
        }
        assert!(pauses.is_sorted_by(|earlier, later| earlier < later), "{pauses:?}");
        reconciler.kernel.refuses.set(false);
        reconciler.act(at);
        assert_eq!(status(&reconciler), RedirectStatus::InForce);
    }

    #[test]
    fn rules_that_another_program_undoes_are_reported_as_not_in_force() {
        let start = now();
        let mut reconciler = reconciler(start);
        reconciler.kernel.undoes.set(true);
        reconciler.act(start);
        let expected = RedirectError::NotInForce(RedirectState::NotInstalled).to_string();
        assert_eq!(status(&reconciler), RedirectStatus::Failed(expected));
    }

    #[test]
    fn rules_of_a_namespace_that_is_no_longer_desired_are_removed() {
        let start = now();
        let mut reconciler = reconciler(start);
        reconciler.act(start);
        assert!(reconciler.kernel.installed.borrow().is_some());
        reconciler.set_desired(Vec::new(), start);
        assert!(reconciler.kernel.installed.borrow().is_none());
        assert!(reconciler.report().statuses.is_empty());
    }

    #[test]
    fn rules_are_installed_again_in_a_new_namespace_of_the_same_name() {
        let start = now();
        let mut reconciler = reconciler(start);
        reconciler.act(start);
        reconciler.kernel.namespace.set(None);
        reconciler.act(start);
        assert_eq!(status(&reconciler), RedirectStatus::NamespaceMissing);
        reconciler.kernel.namespace.set(Some((1, 2)));
        reconciler.kernel.installed.take();
        let later = reconciler.next_due(start).expect("namespaces are looked for");
        reconciler.act(later);
        assert_eq!(status(&reconciler), RedirectStatus::InForce);
        assert_eq!(reconciler.kernel.installations.get(), 2);
        assert_eq!(reconciler.report().repairs, 0, "a new namespace has not drifted");
    }
}
