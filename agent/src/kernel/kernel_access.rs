//! What the reconciler needs of the kernel.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};

use nix::sys::socket::SockProtocol;

use super::desired::DesiredTable;
use super::occupancy::Occupancy;
use super::reconcile::{KernelTable, ReconcileOutcome};
use crate::netlink::conntrack::{Conntrack, ConntrackEntry};
use crate::netlink::{Netlink, Notification, nf_tables};
use crate::redirect::may_have_iptables_rules;

/// The notifications about changes of the ruleset that have arrived since the last look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct RulesetChanges {
    /// Whether anything has changed, or may have.
    pub(super) any: bool,
    /// Whether elements of maps have changed, or may have.
    pub(super) of_elements: bool,
}

/// The kernel as the reconciler sees it.
pub(super) trait KernelAccess {
    /// Makes the table of services match `desired`, and compares the contents of maps with `deep`.
    fn reconcile(&mut self, desired: DesiredTable<'_>, deep: bool) -> io::Result<ReconcileOutcome>;

    /// The counters of the table, by name.
    fn counters(&mut self) -> io::Result<HashMap<String, u64>>;

    /// Whether iptables may have redirects, which capture UDP packets before the table of services.
    fn has_iptables_rules(&self) -> bool;

    /// How full conntrack is, where the kernel says it.
    fn occupancy(&self) -> Option<Occupancy>;

    /// Passes each conntrack entry to `each`.
    fn conntrack_entries(&mut self, each: &mut dyn FnMut(ConntrackEntry)) -> io::Result<()>;

    /// Deletes conntrack entries.
    fn delete_conntrack_entries(&mut self, entries: &[ConntrackEntry]) -> io::Result<()>;

    /// Subscribes to changes of the ruleset, unless that is done. Returns whether it was.
    fn watch_ruleset(&mut self) -> bool;

    /// Whether changes of the ruleset are subscribed to.
    fn is_watching_ruleset(&self) -> bool;

    /// Ends the subscription.
    fn stop_watching_ruleset(&mut self);

    /// The pending notifications about changes of the ruleset, by this process and by others.
    fn ruleset_changes(&mut self) -> RulesetChanges;

    /// The socket of these notifications.
    fn ruleset_socket(&self) -> Option<BorrowedFd<'_>>;
}

/// The kernel of this host, in the network namespace of the thread.
#[derive(Debug, Default)]
pub(super) struct LiveKernel {
    ruleset_events: Option<Netlink>,
}

impl KernelAccess for LiveKernel {
    fn reconcile(&mut self, desired: DesiredTable<'_>, deep: bool) -> io::Result<ReconcileOutcome> {
        KernelTable::open()?.reconcile(desired, deep)
    }

    fn counters(&mut self) -> io::Result<HashMap<String, u64>> {
        Ok(KernelTable::open()?.counters()?.into_iter().collect())
    }

    fn has_iptables_rules(&self) -> bool {
        may_have_iptables_rules()
    }

    fn occupancy(&self) -> Option<Occupancy> {
        Occupancy::read()
    }

    fn conntrack_entries(&mut self, each: &mut dyn FnMut(ConntrackEntry)) -> io::Result<()> {
        Conntrack::open()?.list(each)
    }

    fn delete_conntrack_entries(&mut self, entries: &[ConntrackEntry]) -> io::Result<()> {
        let mut conntrack = Conntrack::open()?;
        entries.iter().try_for_each(|entry| conntrack.delete(entry))
    }

    fn watch_ruleset(&mut self) -> bool {
        if self.ruleset_events.is_some() {
            return true;
        }
        self.ruleset_events =
            Netlink::listen(SockProtocol::NetlinkNetFilter, nf_tables::CHANGES).ok();
        false
    }

    fn is_watching_ruleset(&self) -> bool {
        self.ruleset_events.is_some()
    }

    fn stop_watching_ruleset(&mut self) {
        self.ruleset_events = None;
    }

    fn ruleset_changes(&mut self) -> RulesetChanges {
        let Some(events) = &self.ruleset_events else { return RulesetChanges::default() };
        let mut of_elements = false;
        let received = events.drain(|notification| {
            of_elements |= match notification {
                Notification::Message(message) => nf_tables::is_element_change(&message),
                Notification::Overflow => true,
            }
        });
        match received {
            Ok(any) => RulesetChanges { any, of_elements },
            Err(_) => RulesetChanges { any: true, of_elements: true },
        }
    }

    fn ruleset_socket(&self) -> Option<BorrowedFd<'_>> {
        self.ruleset_events.as_ref().map(Netlink::as_fd)
    }
}
