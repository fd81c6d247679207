//! Wakes requests and connections when a new plan is in force, so that each checks whether it is still allowed.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use slab::Slab;

/// The requests and connections of one worker that wait for a new plan.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    count: Cell<u64>,
    /// One entry for each follower that was polled; without a waker after it was woken.
    waiting: RefCell<Slab<Option<Waker>>>,
}

impl Changes {
    /// Wakes all followers: a new plan is in force.
    pub(crate) fn tell(&self) {
        self.count.set(self.count.get() + 1);
        let wakers: Vec<Waker> =
            self.waiting.borrow_mut().iter_mut().filter_map(|(_, waker)| waker.take()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Follows the changes from now on.
    pub(crate) fn follow(&self) -> Following<'_> {
        Following { changes: self, seen: self.count.get(), place: None }
    }
}

/// A follower of changes.
#[derive(Debug)]
pub(crate) struct Following<'a> {
    changes: &'a Changes,
    seen: u64,
    /// Its entry, which stays its own until it is dropped.
    place: Option<usize>,
}

impl Following<'_> {
    /// Resolves when a plan is in force that this follower has not seen.
    pub(crate) fn next(&mut self) -> impl Future<Output = ()> + '_ {
        Next(self)
    }
}

struct Next<'f, 'a>(&'f mut Following<'a>);

impl Future for Next<'_, '_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let following = &mut *self.get_mut().0;
        let changes = following.changes;
        if changes.count.get() != following.seen {
            following.seen = changes.count.get();
            return Poll::Ready(());
        }
        let mut waiting = changes.waiting.borrow_mut();
        let place = *following.place.get_or_insert_with(|| waiting.insert(None));
        if let Some(known) = waiting.get_mut(place) {
            match known {
                Some(known) => known.clone_from(cx.waker()),
                None => *known = Some(cx.waker().clone()),
            }
        }
        Poll::Pending
    }
}

impl Drop for Following<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.changes.waiting.borrow_mut().remove(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn follower_is_woken_once_for_changes_and_removed_when_dropped() {
        let changes = Changes::default();
        let (mut one, mut other) = (changes.follow(), changes.follow());
        assert!(one.next().now_or_never().is_none());
        changes.tell();
        changes.tell();
        assert!(one.next().now_or_never().is_some());
        assert!(one.next().now_or_never().is_none());
        assert!(other.next().now_or_never().is_some());
        assert!(changes.follow().next().now_or_never().is_none());
        assert_eq!(changes.waiting.borrow().len(), 1);
        drop((one, other));
        assert!(changes.waiting.borrow().is_empty());
    }
}
