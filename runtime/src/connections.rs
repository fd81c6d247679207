//! The open connections of one worker, and their status, which ends them.
//!
//! Each accepted connection is registered and has a [`ConnectionStatus`]. The shutdown of the process and expired or
//! revoked certificates change statuses; the task that serves a connection is woken, sees its status, and ends the
//! connection in the way of its protocol. A changed policy is different: the task itself evaluates it and returns. A
//! connection to an endpoint has a status too, but is not registered: draining does not wait for it.
//!
//! Everything here belongs to one thread.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use slab::Slab;
use tokio::sync::Notify;

/// Why a connection is drained or closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The process shuts down.
    Shutdown,
    /// The certificate of the peer has expired.
    PeerExpired,
    /// The certificate of the peer was revoked, or its trust root was removed.
    PeerRevoked,
}

impl std::fmt::Display for CloseReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Shutdown => "the process shuts down",
            Self::PeerExpired => "the peer certificate has expired",
            Self::PeerRevoked => "the peer certificate was revoked",
        })
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ConnectionState {
    #[default]
    Open,
    /// Current requests may finish.
    Draining(CloseReason),
    /// The connection is neither read nor written.
    Closed(CloseReason),
}

/// Whether a connection may be read, written and take requests.
///
/// One task serves a connection at a time. It is woken when the status changes, provided that it waits in
/// [`Self::draining`] or [`Self::closed`], or has called [`Self::watch`].
#[derive(Default)]
pub struct ConnectionStatus {
    state: Cell<ConnectionState>,
    stays_writable: Cell<bool>,
    /// The task that serves the connection.
    task: Cell<Option<Waker>>,
}

impl ConnectionStatus {
    /// Why the connection must not be read, if it is closed.
    #[must_use]
    pub fn close_reason(&self) -> Option<CloseReason> {
        match self.state.get() {
            ConnectionState::Closed(reason) => Some(reason),
            ConnectionState::Open | ConnectionState::Draining(_) => None,
        }
    }

    /// Whether the connection must not be read.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.close_reason().is_some()
    }

    /// Whether the connection must not be written.
    #[must_use]
    pub fn is_write_closed(&self) -> bool {
        self.is_closed() && !self.stays_writable.get()
    }

    /// Whether the current requests are the last ones.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.state.get() != ConnectionState::Open
    }

    /// Whether a request that has arrived must not begin. A connection that drains because the process shuts down
    /// still serves it.
    #[must_use]
    pub fn refuses_requests(&self) -> bool {
        match self.state.get() {
            ConnectionState::Open => false,
            ConnectionState::Draining(reason) => reason != CloseReason::Shutdown,
            ConnectionState::Closed(_) => true,
        }
    }

    /// Keeps the connection writable after it is closed, so that its protocol can report the reason to the peer.
    pub fn keep_writable(&self) {
        self.stays_writable.set(true);
    }

    /// Has the task of `cx` woken when the status changes, instead of the task of the last call.
    pub fn watch(&self, cx: &Context<'_>) {
        let known = self.task.take().filter(|task| task.will_wake(cx.waker()));
        self.task.set(Some(known.unwrap_or_else(|| cx.waker().clone())));
    }

    /// Ready when the connection is closed.
    pub fn poll_closed(&self, cx: &Context<'_>) -> Poll<CloseReason> {
        match self.close_reason() {
            Some(reason) => Poll::Ready(reason),
            None => {
                self.watch(cx);
                Poll::Pending
            }
        }
    }

    /// Resolves when the connection is closed.
    pub async fn closed(&self) -> CloseReason {
        std::future::poll_fn(|cx| self.poll_closed(cx)).await
    }

    /// Resolves when the current requests are the last ones.
    pub async fn draining(&self) {
        std::future::poll_fn(|cx| {
            if self.is_draining() {
                return Poll::Ready(());
            }
            self.watch(cx);
            Poll::Pending
        })
        .await;
    }

    /// Lets current requests finish. No effect when the connection is draining or closed, except that a later
    /// reason than [`CloseReason::Shutdown`] replaces that one.
    pub fn drain(&self, reason: CloseReason) {
        match self.state.get() {
            ConnectionState::Open | ConnectionState::Draining(CloseReason::Shutdown) => {
                self.state.set(ConnectionState::Draining(reason));
                self.wake();
            }
            ConnectionState::Draining(_) | ConnectionState::Closed(_) => {}
        }
    }

    /// Closes the connection.
    pub fn close(&self, reason: CloseReason) {
        if self.mark_closed(reason) {
            self.wake();
        }
    }

    /// Closes the connection without waking its task; [`Self::wake`] does that later. Returns whether it was open
    /// before.
    pub fn mark_closed(&self, reason: CloseReason) -> bool {
        let was_open = !self.is_closed();
        if was_open {
            self.state.set(ConnectionState::Closed(reason));
        }
        was_open
    }

    /// Wakes the task that serves the connection.
    pub fn wake(&self) {
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }
}

impl std::fmt::Debug for ConnectionStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectionStatus").field("state", &self.state).finish_non_exhaustive()
    }
}

/// The open connections of one worker. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct ConnectionRegistry(Rc<RegistryInner>);

#[derive(Debug, Default)]
struct RegistryInner {
    open: RefCell<Slab<Rc<ConnectionStatus>>>,
    /// The state in which a connection is registered.
    initial: Cell<ConnectionState>,
    emptied: Notify,
}

/// A registered connection. Dropping it removes it from the registry.
#[derive(Debug)]
pub struct ConnectionHandle {
    registry: ConnectionRegistry,
    status: Rc<ConnectionStatus>,
    id: usize,
}

impl ConnectionHandle {
    /// The status of the connection.
    #[must_use]
    pub fn status(&self) -> &Rc<ConnectionStatus> {
        &self.status
    }
}

impl ConnectionRegistry {
    /// Registers a connection, unless `limit` connections are registered already. It is draining or closed from the
    /// start if all others are.
    #[must_use]
    pub fn try_register(&self, limit: usize) -> Option<ConnectionHandle> {
        let mut open = self.0.open.borrow_mut();
        if open.len() >= limit {
            return None;
        }
        let status = Rc::new(ConnectionStatus::default());
        status.state.set(self.0.initial.get());
        let id = open.insert(status.clone());
        Some(ConnectionHandle { registry: self.clone(), status, id })
    }

    /// The number of registered connections.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.open.borrow().len()
    }

    /// Drains all connections, also those that are registered later.
    pub fn drain_all(&self, reason: CloseReason) {
        self.0.initial.set(ConnectionState::Draining(reason));
        self.0.open.borrow().iter().for_each(|(_, status)| status.drain(reason));
    }

    /// Closes all connections, also those that are registered later.
    pub fn close_all(&self, reason: CloseReason) {
        self.0.initial.set(ConnectionState::Closed(reason));
        self.0.open.borrow().iter().for_each(|(_, status)| status.close(reason));
    }

    /// Resolves when no connection is registered.
    pub async fn emptied(&self) {
        loop {
            let emptied = self.0.emptied.notified();
            if self.count() == 0 {
                return;
            }
            emptied.await;
        }
    }
}

impl Drop for ConnectionHandle {
    fn drop(&mut self) {
        let registry = &self.registry.0;
        let mut open = registry.open.borrow_mut();
        open.remove(self.id);
        if open.is_empty() {
            registry.emptied.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    /// Counts how often a task is woken.
    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl std::task::Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn shutdown_lets_an_arrived_request_begin_and_a_certificate_does_not() {
        use CloseReason::{PeerExpired, PeerRevoked, Shutdown};
        let check = |reasons: &[CloseReason], is_closed: bool, refuses_requests: bool| {
            let status = ConnectionStatus::default();
            assert!(!status.is_draining());
            reasons.iter().for_each(|reason| match reason {
                PeerRevoked => status.close(*reason),
                Shutdown | PeerExpired => status.drain(*reason),
            });
            assert!(status.is_draining(), "{reasons:?}");
            assert_eq!(status.is_closed(), is_closed, "{reasons:?}");
            assert_eq!(status.refuses_requests(), refuses_requests, "{reasons:?}");
        };
        check(&[Shutdown], false, false);
        check(&[PeerExpired], false, true);
        check(&[PeerRevoked], true, true);
        // The stricter reason holds, in whichever order they come.
        check(&[Shutdown, PeerExpired], false, true);
        check(&[PeerExpired, Shutdown], false, true);
        check(&[PeerRevoked, Shutdown], true, true);
    }

    #[test]
    fn each_change_wakes_the_waiting_task_once() {
        let wakes = Arc::<Wakes>::default();
        let waker = Waker::from(wakes.clone());
        let mut cx = Context::from_waker(&waker);
        let status = ConnectionStatus::default();
        let mut draining = pin!(status.draining());
        let mut closed = pin!(status.closed());
        assert!(draining.as_mut().poll(&mut cx).is_pending());
        assert!(closed.as_mut().poll(&mut cx).is_pending());
        status.drain(CloseReason::PeerExpired);
        assert_eq!(wakes.0.load(Relaxed), 1);
        assert!(draining.as_mut().poll(&mut cx).is_ready());
        assert!(closed.as_mut().poll(&mut cx).is_pending());
        status.close(CloseReason::PeerExpired);
        status.close(CloseReason::PeerRevoked);
        assert_eq!(wakes.0.load(Relaxed), 2);
        assert_eq!(closed.as_mut().poll(&mut cx), Poll::Ready(CloseReason::PeerExpired));
    }

    #[test]
    fn writing_may_outlast_reading() {
        let status = ConnectionStatus::default();
        status.keep_writable();
        status.close(CloseReason::PeerRevoked);
        assert!(status.is_closed() && !status.is_write_closed());
    }

    #[tokio::test]
    async fn dropped_handles_leave_the_registry_empty_also_after_a_panic() {
        let registry = ConnectionRegistry::default();
        let held = registry.try_register(2).unwrap();
        let in_panic = registry.try_register(2).unwrap();
        assert!(registry.try_register(2).is_none(), "the limit is reached");
        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _in_panic = in_panic;
            panic!("the task fails");
        }));
        assert!(unwound.is_err());
        assert_eq!(registry.count(), 1);
        let mut emptied = pin!(registry.emptied());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(emptied.as_mut().poll(&mut cx).is_pending());
        drop(held);
        emptied.await;
    }

    #[test]
    fn later_connections_begin_as_the_others_were_left() {
        let registry = ConnectionRegistry::default();
        let early = registry.try_register(9).unwrap();
        registry.drain_all(CloseReason::Shutdown);
        let late = registry.try_register(9).unwrap();
        assert!(early.status().is_draining() && late.status().is_draining());
        registry.close_all(CloseReason::Shutdown);
        let last = registry.try_register(9).unwrap();
        assert!([&early, &late, &last].iter().all(|handle| handle.status().is_closed()));
    }
}
