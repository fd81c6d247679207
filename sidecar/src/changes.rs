//! Who wants to hear that another plan is in force: requests and connections that were let in by the one
//! before.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// Those of one worker that wait for another plan. As many as there are requests and connections.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    count: Cell<u64>,
    next: Cell<u64>,
    waiting: RefCell<HashMap<u64, Waker>>,
}

impl Changes {
    /// Another plan is in force.
    pub(crate) fn tell(&self) {
        self.count.set(self.count.get() + 1);
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        waiting.into_values().for_each(Waker::wake);
    }

    /// From now on.
    pub(crate) fn follow(&self) -> Following<'_> {
        Following { changes: self, seen: self.count.get(), place: None }
    }
}

/// One who waits.
#[derive(Debug)]
pub(crate) struct Following<'a> {
    changes: &'a Changes,
    seen: u64,
    place: Option<u64>,
}

impl Following<'_> {
    /// Resolves with the next plan that is not known yet.
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
        let place = *following.place.get_or_insert_with(|| {
            changes.next.set(changes.next.get() + 1);
            changes.next.get()
        });
        let mut waiting = changes.waiting.borrow_mut();
        let known = waiting.entry(place).or_insert_with(|| cx.waker().clone());
        if !known.will_wake(cx.waker()) {
            known.clone_from(cx.waker());
        }
        Poll::Pending
    }
}

impl Drop for Following<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.changes.waiting.borrow_mut().remove(&place);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn each_change_is_heard_of_once_and_nobody_stays_behind() {
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
