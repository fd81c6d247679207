//! Batches UDP reads at high rates. Reading each datagram at once then costs more than forwarding it: a
//! worker that pauses first finds several datagrams of each flow, which it sends together. Network cards
//! coalesce interrupts likewise.
//!
//! A worker pauses only above a rate at which several datagrams arrive during a pause, never when it is
//! behind, and never while it carries TCP, whose messages the pause would delay.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// The length of a pause. The kernel adds its timer slack, 50 us.
pub(crate) const PAUSE: Duration = Duration::from_micros(5);
/// The window over which the rate is measured.
const RATE_WINDOW: Duration = Duration::from_millis(1);
/// The datagrams per window, in both directions, from which on pausing pays: two per pause.
const BUSY_DATAGRAMS: u32 = 40;
/// The shortest time between pauses for responses, where the pauses for client datagrams serve them too.
const ENDPOINT_PAUSE_GAP: Duration = Duration::from_micros(200);

/// The measured rate and the last pause of a worker.
#[derive(Debug)]
pub(crate) struct BatchPacer {
    began: Cell<Instant>,
    count: Cell<u32>,
    is_busy: Cell<bool>,
    last_pause: Cell<Instant>,
}

/// Which sockets are about to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadSide {
    /// The listening socket, for datagrams of clients.
    Client,
    /// The socket of one of many flows, for responses of its endpoint.
    Endpoint,
}

impl BatchPacer {
    pub(crate) fn new(now: Instant) -> Self {
        let began = Cell::new(now);
        let last_pause = Cell::new(now);
        Self { began, count: Cell::new(0), is_busy: Cell::new(false), last_pause }
    }

    /// Counts forwarded datagrams.
    pub(crate) fn count(&self, datagrams: usize, now: Instant) {
        let datagrams = u32::try_from(datagrams).unwrap_or(u32::MAX);
        self.count.set(self.count.get().saturating_add(datagrams));
        let passed = now.saturating_duration_since(self.began.get());
        if passed >= RATE_WINDOW {
            let windows = u32::try_from(passed.as_micros() / RATE_WINDOW.as_micros());
            self.is_busy
                .set(self.count.get() / windows.unwrap_or(u32::MAX).max(1) >= BUSY_DATAGRAMS);
            self.began.set(now);
            self.count.set(0);
        }
    }

    /// Whether to pause before reading. If so, the pause counts as taken.
    pub(crate) fn should_pause(&self, side: ReadSide, carries_tcp: bool, now: Instant) -> bool {
        if carries_tcp || !self.is_busy.get() {
            return false;
        }
        // An old rate says nothing about the current one.
        let is_known = now.saturating_duration_since(self.began.get()) < 2 * RATE_WINDOW;
        let gap = match side {
            ReadSide::Client => Duration::ZERO,
            ReadSide::Endpoint => ENDPOINT_PAUSE_GAP,
        };
        let is_time = now.saturating_duration_since(self.last_pause.get()) >= gap;
        let should_pause = is_known && is_time;
        if should_pause {
            self.last_pause.set(now + PAUSE);
        }
        should_pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn start() -> Instant {
        Instant::now()
    }

    /// The number of pauses in 100 ms with one datagram every `every_us` microseconds.
    fn pauses(every_us: u64, side: ReadSide, carries_tcp: bool) -> usize {
        let start = start();
        let pacer = BatchPacer::new(start);
        let at = |n: u64| start + Duration::from_micros(n * every_us);
        let step = |n| {
            let should_pause = pacer.should_pause(side, carries_tcp, at(n));
            pacer.count(1, at(n));
            should_pause
        };
        (0..100_000 / every_us).filter(|n| step(*n)).count()
    }

    #[test]
    fn worker_pauses_at_high_rates_only() {
        for side in [ReadSide::Client, ReadSide::Endpoint] {
            assert_eq!(pauses(100, side, false), 0, "10,000 datagrams per second");
            assert_eq!(pauses(30, side, false), 0, "33,000 datagrams per second");
            assert!(pauses(10, side, false) > 300, "100,000 datagrams per second");
            assert_eq!(pauses(10, side, true), 0, "TCP is not delayed");
        }
        assert!(pauses(10, ReadSide::Endpoint, false) < 500, "responses pause less often");
    }

    #[test]
    fn worker_does_not_pause_for_an_old_rate() {
        let start = start();
        let pacer = BatchPacer::new(start);
        pacer.count(1000, start + RATE_WINDOW);
        assert!(pacer.should_pause(ReadSide::Client, false, start + RATE_WINDOW));
        assert!(!pacer.should_pause(ReadSide::Client, false, start + 10 * RATE_WINDOW));
        pacer.count(1, start + 10 * RATE_WINDOW);
        assert!(!pacer.should_pause(ReadSide::Client, false, start + 10 * RATE_WINDOW));
    }
}
