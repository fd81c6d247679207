//! Ending in good order: stop taking the new, let the old finish, and not wait for ever.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Notify, watch};

/// How far the end of the process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It serves.
    Running,
    /// It takes nothing new and lets what it has finish.
    Draining,
    /// It ends at once.
    Ended,
}

/// Tells a process to end. Cloning gives another handle on the same end.
#[derive(Debug, Clone)]
pub struct Drain {
    phase: watch::Sender<Phase>,
    grace_period: Duration,
}

impl Drain {
    /// A process that serves and, when told to end, waits up to `grace_period` for what it has.
    #[must_use]
    pub fn new(grace_period: Duration) -> Self {
        Self { phase: watch::Sender::new(Phase::Running), grace_period }
    }

    /// Tells the process to drain; when it drains already, to end.
    pub fn advance(&self) {
        self.phase.send_modify(|phase| {
            *phase = match phase {
                Phase::Running => Phase::Draining,
                Phase::Draining | Phase::Ended => Phase::Ended,
            };
        });
    }

    /// Tells the process to drain, however often it is told.
    pub fn begin(&self) {
        self.phase.send_if_modified(|phase| {
            let changes = *phase == Phase::Running;
            if changes {
                *phase = Phase::Draining;
            }
            changes
        });
    }

    /// How far the end has come.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Resolves when the process has come to `phase`.
    pub async fn reached(&self, phase: Phase) {
        let mut watched = self.phase.subscribe();
        if watched.wait_for(|now| *now >= phase).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Resolves when a worker should end: when it drains and `active` has none left, when its patience
    /// is over, or at once when it is told so.
    pub async fn finished(&self, active: &ActiveConnections) {
        self.reached(Phase::Draining).await;
        tokio::select! {
            () = active.all_closed() => {}
            () = tokio::time::sleep(self.grace_period) => {
                tracing::warn!(active = active.count(), "patience is over; what is left is cut off");
            }
            () = self.reached(Phase::Ended) => {}
        }
    }
}

/// Counts what a worker has in hand.
#[derive(Debug, Clone, Default)]
pub struct ActiveConnections(Rc<ActiveConnectionsInner>);

#[derive(Debug, Default)]
struct ActiveConnectionsInner {
    count: std::cell::Cell<usize>,
    changed: Notify,
}

/// One thing in hand; given back when dropped.
#[derive(Debug)]
pub struct ActiveConnection(ActiveConnections);

impl ActiveConnections {
    /// Takes one more, unless `limit` are in hand already.
    #[must_use]
    pub fn try_acquire(&self, limit: usize) -> Option<ActiveConnection> {
        let count = self.0.count.get();
        if count >= limit {
            return None;
        }
        self.0.count.set(count + 1);
        Some(ActiveConnection(self.clone()))
    }

    /// How many are in hand.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.count.get()
    }

    /// Resolves when none is in hand any more.
    pub async fn all_closed(&self) {
        loop {
            let changed = self.0.changed.notified();
            if self.count() == 0 {
                return;
            }
            changed.await;
        }
    }
}

impl Drop for ActiveConnection {
    fn drop(&mut self) {
        let inner = &self.0.0;
        inner.count.set(inner.count.get().saturating_sub(1));
        inner.changed.notify_waiters();
    }
}

/// Turns SIGTERM and SIGINT into draining, and a second one into the end.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn drain_on_signals(drain: &Drain) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let drain = drain.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            drain.advance();
            tracing::info!(phase = ?drain.phase(), "told to end");
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn draining_waits_for_what_is_in_hand() {
        let drain = Drain::new(Duration::from_secs(60));
        let active = ActiveConnections::default();
        let held = active.try_acquire(1).expect("room");
        assert!(active.try_acquire(1).is_none(), "the limit holds");
        drain.begin();
        drain.begin();
        assert_eq!(drain.phase(), Phase::Draining);
        let finished = drain.finished(&active);
        tokio::pin!(finished);
        assert!(futures_poll(finished.as_mut()).await.is_none());
        drop(held);
        tokio::time::timeout(Duration::from_secs(5), finished).await.expect("finished");
    }

    #[tokio::test]
    async fn a_second_call_ends_at_once() {
        let drain = Drain::new(Duration::from_secs(60));
        let active = ActiveConnections::default();
        let _held = active.try_acquire(1).expect("room");
        drain.advance();
        drain.advance();
        tokio::time::timeout(Duration::from_secs(5), drain.finished(&active)).await.expect("ended");
    }

    async fn futures_poll<F: Future>(future: F) -> Option<F::Output> {
        tokio::time::timeout(Duration::from_millis(20), future).await.ok()
    }
}
