//! Wakes requests and connections when a new plan is in force, so that each checks whether it is still allowed.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use slab::Slab;

/// The requests and connections of one worker that wait for a new plan.
#[derive(Debug, Default)]
pub(crate) struct PlanChanges {
    count: Cell<u64>,
    /// One entry per subscription that was polled, without a waker after it was woken.
    waiting: RefCell<Slab<Option<Waker>>>,
}

impl PlanChanges {
    /// Wakes all subscriptions, because a new plan is in force.
    pub(crate) fn notify(&self) {
        self.count.set(self.count.get() + 1);
        let wakers: Vec<Waker> =
            self.waiting.borrow_mut().iter_mut().filter_map(|(_, waker)| waker.take()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// A subscription of the plans published from now on.
    pub(crate) fn subscribe(&self) -> PlanSubscription<'_> {
        PlanSubscription { changes: self, seen: self.count.get(), slot: None }
    }
}

/// Waits for new plans.
#[derive(Debug)]
pub(crate) struct PlanSubscription<'a> {
    changes: &'a PlanChanges,
    seen: u64,
    /// Its entry in `waiting`, until it is dropped.
    slot: Option<usize>,
}

impl PlanSubscription<'_> {
    /// Resolves when a plan is in force that this subscription has not seen.
    pub(crate) fn next(&mut self) -> impl Future<Output = ()> + '_ {
        NextPlan(self)
    }
}

struct NextPlan<'f, 'a>(&'f mut PlanSubscription<'a>);

impl Future for NextPlan<'_, '_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let subscription = &mut *self.get_mut().0;
        let changes = subscription.changes;
        if changes.count.get() != subscription.seen {
            subscription.seen = changes.count.get();
            return Poll::Ready(());
        }
        let mut waiting = changes.waiting.borrow_mut();
        let slot = *subscription.slot.get_or_insert_with(|| waiting.insert(None));
        if let Some(known) = waiting.get_mut(slot) {
            match known {
                Some(known) => known.clone_from(cx.waker()),
                None => *known = Some(cx.waker().clone()),
            }
        }
        Poll::Pending
    }
}

impl Drop for PlanSubscription<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.changes.waiting.borrow_mut().remove(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn subscription_is_woken_once_for_several_changes_and_removed_on_drop() {
        let changes = PlanChanges::default();
        let mut one = changes.subscribe();
        let mut other = changes.subscribe();
        assert!(one.next().now_or_never().is_none());
        changes.notify();
        changes.notify();
        assert!(one.next().now_or_never().is_some());
        assert!(one.next().now_or_never().is_none());
        assert!(other.next().now_or_never().is_some());
        assert!(changes.subscribe().next().now_or_never().is_none());
        assert_eq!(changes.waiting.borrow().len(), 1);
        drop((one, other));
        assert!(changes.waiting.borrow().is_empty());
    }
}
