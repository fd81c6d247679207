//! The loop of a thread that makes the kernel match a desired state.
//!
//! The thread takes the newest desired state, performs the actions that are due, publishes a report, and sleeps until a
//! new desired state or a notification of the kernel arrives, or the next action is due. What the kernel has stays when
//! the thread ends.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use weft_runtime::clock::now;

/// Makes a part of the kernel match a desired state.
pub(crate) trait Reconcile {
    /// The desired state.
    type Desired;
    /// The status, for readers on other threads.
    type Report;

    /// Takes a new desired state.
    fn set_desired(&mut self, desired: Self::Desired, now: Instant);

    /// Performs the actions that are due: observes the kernel, and changes what differs.
    fn act(&mut self, now: Instant);

    /// The current status.
    fn report(&self) -> Self::Report;

    /// When to act next without a notification; `None` waits for a desired state.
    fn next_due(&self, now: Instant) -> Option<Instant>;

    /// The sockets on which notifications of the kernel arrive.
    fn event_sockets(&self) -> Vec<BorrowedFd<'_>>;

    /// Reads pending notifications, and schedules the actions that follow from them.
    fn read_events(&mut self, now: Instant);
}

/// A handle of the thread. The thread ends with its last handle.
#[derive(Debug)]
pub(crate) struct ReconcileHandle<D, R> {
    shared: Arc<ReconcileState<D, R>>,
    waker: Arc<UnixStream>,
}

/// What the thread and its handles share.
#[derive(Debug)]
struct ReconcileState<D, R> {
    /// The newest desired state that the thread has not taken.
    desired: Mutex<Option<D>>,
    report: Mutex<R>,
}

impl<D, R> Clone for ReconcileHandle<D, R> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), waker: self.waker.clone() }
    }
}

impl<D: Send + 'static, R: Clone + Send + 'static> ReconcileHandle<D, R> {
    /// Starts a thread of this name, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the wake-up socket or the thread cannot be created.
    pub(crate) fn start(
        name: &str,
        reconciler: impl Reconcile<Desired = D, Report = R> + Send + 'static,
    ) -> io::Result<Self> {
        let (waker, wakeups) = UnixStream::pair()?;
        waker.set_nonblocking(true)?;
        wakeups.set_nonblocking(true)?;
        let shared = Arc::new(ReconcileState {
            desired: Mutex::new(None),
            report: Mutex::new(reconciler.report()),
        });
        let handle = Self { shared: shared.clone(), waker: Arc::new(waker) };
        std::thread::Builder::new()
            .name(name.into())
            .spawn(move || run(reconciler, &shared, wakeups))?;
        Ok(handle)
    }

    /// Replaces the desired state, asynchronously.
    pub(crate) fn set_desired(&self, desired: D) {
        *lock(&self.shared.desired) = Some(desired);
        // A full socket means that the thread will wake up anyway.
        drop((&*self.waker).write(&[0]));
    }

    /// The status after the last actions.
    pub(crate) fn report(&self) -> R {
        lock(&self.shared.report).clone()
    }
}

fn run<T: Reconcile>(
    mut reconciler: T,
    shared: &ReconcileState<T::Desired, T::Report>,
    mut wakeups: UnixStream,
) {
    loop {
        if let Some(desired) = lock(&shared.desired).take() {
            reconciler.set_desired(desired, now());
        }
        reconciler.act(now());
        *lock(&shared.report) = reconciler.report();
        let sleep_start = now();
        let due = reconciler.next_due(sleep_start);
        let timeout = due.map_or(Duration::MAX, |due| due.saturating_duration_since(sleep_start));
        if !wait(timeout, &mut wakeups, reconciler.event_sockets()) {
            return;
        }
        reconciler.read_events(now());
    }
}

/// Waits for a desired state, a notification of the kernel, or the timeout. Returns false when the thread should end.
fn wait(longest: Duration, wakeups: &mut UnixStream, sockets: Vec<BorrowedFd<'_>>) -> bool {
    // poll counts whole milliseconds; with 0 it would not sleep.
    let timeout = PollTimeout::try_from(longest.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
    let mut waited = vec![PollFd::new(wakeups.as_fd(), PollFlags::POLLIN)];
    waited.extend(sockets.into_iter().map(|socket| PollFd::new(socket, PollFlags::POLLIN)));
    match poll(&mut waited, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => tracing::warn!(%error, "polling for changes failed"),
    }
    drop(waited);
    let mut bytes = [0; 64];
    !matches!(wakeups.read(&mut bytes), Ok(0))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, Sender, channel};

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// Counts its desired states, and sends each to the test.
    struct FakeReconciler {
        taken: usize,
        desired: Sender<u32>,
    }

    impl Reconcile for FakeReconciler {
        type Desired = u32;
        type Report = usize;

        fn set_desired(&mut self, desired: u32, _: Instant) {
            self.taken += 1;
            self.desired.send(desired).expect("the test receives");
        }

        fn act(&mut self, _: Instant) {}

        fn report(&self) -> usize {
            self.taken
        }

        fn next_due(&self, _: Instant) -> Option<Instant> {
            None
        }

        fn event_sockets(&self) -> Vec<BorrowedFd<'_>> {
            Vec::new()
        }

        fn read_events(&mut self, _: Instant) {}
    }

    #[test]
    fn thread_takes_desired_states_at_once_and_ends_with_its_last_handle() {
        let (desired, taken) = channel();
        let handle = ReconcileHandle::start("fake", FakeReconciler { taken: 0, desired })
            .expect("a thread starts");
        let other = handle.clone();
        for state in [1, 2] {
            handle.set_desired(state);
            assert_eq!(taken.recv_timeout(TIMEOUT), Ok(state));
        }
        assert!(other.report() >= 1, "the report of the first state is published");
        drop(handle);
        other.set_desired(3);
        assert_eq!(taken.recv_timeout(TIMEOUT), Ok(3));
        drop(other);
        assert_eq!(taken.recv_timeout(TIMEOUT), Err(RecvTimeoutError::Disconnected));
    }
}
