//! When many datagrams come, looking at once at each costs more than moving it: a worker that rests a
//! moment first finds several of each flow, which go together. As network cards do with interrupts.
//!
//! It rests only above a rate at which much comes in a moment, never when it is behind, and never while
//! it carries TCP too, whose messages would wait for nothing.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long it rests. The kernel adds to it what it calls timer slack, 50 us.
pub(crate) const PAUSE: Duration = Duration::from_micros(5);
/// The rate is looked at over this time.
const RATE_WINDOW: Duration = Duration::from_millis(1);
/// So many datagrams of a window, both ways, make it worth resting: two in a moment.
const BUSY_DATAGRAMS: u32 = 40;
/// How long answers go without rests of their own, where those of the other direction serve them too.
const ENDPOINT_PAUSE_GAP: Duration = Duration::from_micros(200);

/// What a worker remembers of its pace.
#[derive(Debug)]
pub(crate) struct BatchPacer {
    began: Cell<Instant>,
    count: Cell<u32>,
    is_busy: Cell<bool>,
    last_pause: Cell<Instant>,
}

/// Who is about to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadSide {
    /// For datagrams of clients.
    Client,
    /// For answers, at one of many sockets.
    Endpoint,
}

impl BatchPacer {
    pub(crate) fn new(now: Instant) -> Self {
        let (began, last_pause) = (Cell::new(now), Cell::new(now));
        Self { began, count: Cell::new(0), is_busy: Cell::new(false), last_pause }
    }

    /// Notes that so many datagrams were moved.
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

    /// Whether to rest before looking; it is then taken for done.
    pub(crate) fn should_pause(&self, side: ReadSide, carries_tcp: bool, now: Instant) -> bool {
        if carries_tcp || !self.is_busy.get() {
            return false;
        }
        // What was long ago says nothing of now.
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

    #[allow(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn start() -> Instant {
        Instant::now()
    }

    /// How many rests there are in 100 ms of one datagram each so many microseconds.
    fn should_pause(every_us: u64, side: ReadSide, carries_tcp: bool) -> usize {
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
    fn it_rests_at_high_rates_only() {
        for side in [ReadSide::Client, ReadSide::Endpoint] {
            assert_eq!(should_pause(100, side, false), 0, "ten thousand a second");
            assert_eq!(should_pause(30, side, false), 0, "thirty thousand");
            assert!(should_pause(10, side, false) > 300, "a hundred thousand");
            assert_eq!(should_pause(10, side, true), 0, "TCP does not wait for datagrams");
        }
        assert!(
            should_pause(10, ReadSide::Endpoint, false) < 500,
            "each second datagram is not looked for anew"
        );
    }

    #[test]
    fn it_does_not_rest_for_what_was_long_ago() {
        let start = start();
        let pacer = BatchPacer::new(start);
        pacer.count(1000, start + RATE_WINDOW);
        assert!(pacer.should_pause(ReadSide::Client, false, start + RATE_WINDOW));
        assert!(!pacer.should_pause(ReadSide::Client, false, start + 10 * RATE_WINDOW));
        pacer.count(1, start + 10 * RATE_WINDOW);
        assert!(!pacer.should_pause(ReadSide::Client, false, start + 10 * RATE_WINDOW));
    }
}
