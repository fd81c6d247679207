//! Graceful shutdown: stop accepting new work, let current work finish, and stop after a grace period.

use std::time::Duration;

use tokio::sync::watch;

use crate::connections::ConnectionRegistry;

/// How far the shutdown of the process has progressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The process accepts new work.
    Running,
    /// The process accepts no new work and lets current work finish.
    Draining,
    /// The process stops at once.
    Ended,
}

/// A handle that starts the shutdown of a process and observes its progress. Clones share one shutdown.
#[derive(Debug, Clone)]
pub struct Drain {
    phase: watch::Sender<Phase>,
    grace_period: Duration,
}

impl Drain {
    /// A running process that waits up to `grace_period` for its current work once it drains.
    #[must_use]
    pub fn new(grace_period: Duration) -> Self {
        Self { phase: watch::Sender::new(Phase::Running), grace_period }
    }

    /// Starts draining. If the process drains already, stops it at once.
    pub fn advance(&self) {
        self.phase.send_modify(|phase| {
            *phase = match phase {
                Phase::Running => Phase::Draining,
                Phase::Draining | Phase::Ended => Phase::Ended,
            };
        });
    }

    /// Starts draining. Has no effect if the process drains already.
    pub fn begin(&self) {
        self.phase.send_if_modified(|phase| {
            let changes = *phase == Phase::Running;
            if changes {
                *phase = Phase::Draining;
            }
            changes
        });
    }

    /// The current phase of the shutdown.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Resolves when the process has reached `phase` or a later one.
    pub async fn reached(&self, phase: Phase) {
        let mut watched = self.phase.subscribe();
        if watched.wait_for(|now| *now >= phase).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Resolves when a worker should stop: when it drains and no connection is `open`, when the grace period has
    /// passed, or at once in phase [`Phase::Ended`].
    pub async fn finished(&self, open: &ConnectionRegistry) {
        self.reached(Phase::Draining).await;
        tokio::select! {
            () = open.emptied() => {}
            () = tokio::time::sleep(self.grace_period) => {
                tracing::warn!(
                    connections = open.count(),
                    "drain timeout reached, closing remaining connections"
                );
            }
            () = self.reached(Phase::Ended) => {}
        }
    }
}

/// Starts draining on the first SIGTERM or SIGINT, and stops the process on the second.
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
            tracing::info!(phase = ?drain.phase(), "shutdown requested");
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn draining_waits_for_open_connections() {
        let drain = Drain::new(Duration::from_secs(60));
        let open = ConnectionRegistry::default();
        let held = open.try_register(1).expect("the limit is 1");
        assert!(open.try_register(1).is_none(), "the limit is reached");
        drain.begin();
        drain.begin();
        assert_eq!(drain.phase(), Phase::Draining);
        let finished = drain.finished(&open);
        tokio::pin!(finished);
        assert!(futures_poll(finished.as_mut()).await.is_none());
        drop(held);
        tokio::time::timeout(Duration::from_secs(5), finished).await.expect("finished");
    }

    #[tokio::test]
    async fn second_shutdown_request_stops_at_once() {
        let drain = Drain::new(Duration::from_secs(60));
        let open = ConnectionRegistry::default();
        let _held = open.try_register(1).expect("the limit is 1");
        drain.advance();
        drain.advance();
        tokio::time::timeout(Duration::from_secs(5), drain.finished(&open)).await.expect("ended");
    }

    async fn futures_poll<F: Future>(future: F) -> Option<F::Output> {
        tokio::time::timeout(Duration::from_millis(20), future).await.ok()
    }
}
