//! Limits control frames and protocol violations of HTTP/2 client connections.
//!
//! Each PING, SETTINGS, PRIORITY, WINDOW_UPDATE, RST_STREAM or unknown frame costs work, and the h2 crate processes any
//! number of them (RFC 9113, section 10.5). They are counted before the h2 crate receives them. A connection has a
//! budget of such frames. The budget grows with time, with each request, and with each DATA frame that is sent to the
//! client, which the client acknowledges by WINDOW_UPDATE. A connection that exhausts it is closed with
//! `ENHANCE_YOUR_CALM`.

use std::time::Instant;

use super::h2_frames::{DATA, FrameHeader, HEADERS};

/// The initial and highest budget, in frames.
const MAX_FRAMES: u32 = 10_000;
/// Frames added per second.
const FRAMES_PER_SECOND: u64 = 1_000;
/// Frames added per request: PRIORITY, WINDOW_UPDATE, RST_STREAM.
const FRAMES_PER_REQUEST: u32 = 20;
/// Frames added per DATA frame sent to the client: a WINDOW_UPDATE for stream and connection, and one spare.
const FRAMES_PER_DATA_SENT: u32 = 3;

/// The remaining control frames of a connection.
#[derive(Debug)]
pub(super) struct FrameBudget {
    remaining: u32,
    /// Frames received beyond the budget since the last [`Self::is_within`].
    excess: u32,
    /// When frames were last added for elapsed time.
    refilled: Instant,
}

impl FrameBudget {
    pub(super) fn new(now: Instant) -> Self {
        Self { remaining: MAX_FRAMES, excess: 0, refilled: now }
    }

    /// Records a frame that was sent to the client.
    pub(super) fn send(&mut self, frame: FrameHeader) {
        if frame.kind == DATA && frame.length > 0 {
            self.remaining = MAX_FRAMES.min(self.remaining + FRAMES_PER_DATA_SENT);
        }
    }

    /// Records a frame that was received from the client.
    pub(super) fn receive(&mut self, frame: FrameHeader) {
        match frame.kind {
            DATA if frame.length > 0 => {}
            HEADERS => self.remaining = MAX_FRAMES.min(self.remaining + FRAMES_PER_REQUEST),
            _ => match self.remaining.checked_sub(1) {
                Some(less) => self.remaining = less,
                None => self.excess += 1,
            },
        }
    }

    /// Whether the connection is within its budget. Reads the clock only when the budget is exhausted.
    pub(super) fn is_within(&mut self, now: impl FnOnce() -> Instant) -> bool {
        let excess = std::mem::take(&mut self.excess);
        if excess == 0 {
            return true;
        }
        let now = now();
        let passed = now.saturating_duration_since(self.refilled).as_millis();
        let gained =
            u64::try_from(passed).unwrap_or(u64::MAX).saturating_mul(FRAMES_PER_SECOND) / 1000;
        let gained = u32::try_from(gained).unwrap_or(u32::MAX).min(MAX_FRAMES);
        self.refilled = now;
        self.remaining = gained.saturating_sub(excess);
        gained >= excess
    }
}

/// How many violations a connection may commit in a burst.
const VIOLATION_BURST: u32 = 100;
/// How many violations are forgiven per second.
const VIOLATIONS_FORGIVEN_PER_SECOND: u64 = 10;
/// How many violations the h2 crate tolerates over the lifetime of a connection before it closes it with all streams.
pub(crate) const LIBRARY_VIOLATION_LIMIT: u32 = 4_000;

/// What is done after a violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ViolationAction {
    Tolerated,
    /// The connection is shut down gracefully, so that the client opens another before the h2 crate closes this one.
    ShutDown,
    /// The connection is closed at once, because of abuse.
    Close,
}

/// Counts the streams of a connection that violated the protocol (the h2 crate resets or refuses them) or exceeded the
/// limit of a request head. A few of them are normal in the long life of a connection that many clients share.
#[derive(Debug)]
pub(super) struct ViolationCounter {
    remaining: u32,
    total: u32,
    /// When violations were last forgiven.
    forgiven: Instant,
}

impl ViolationCounter {
    pub(super) fn new(now: Instant) -> Self {
        Self { remaining: VIOLATION_BURST, total: 0, forgiven: now }
    }

    /// Counts a violation and decides what is done about it.
    pub(super) fn add(&mut self, now: Instant) -> ViolationAction {
        let passed = now.saturating_duration_since(self.forgiven).as_millis();
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        let forgiven = passed.saturating_mul(VIOLATIONS_FORGIVEN_PER_SECOND) / 1000;
        if forgiven > 0 {
            let forgiven = u32::try_from(forgiven).unwrap_or(u32::MAX);
            self.remaining = self.remaining.saturating_add(forgiven).min(VIOLATION_BURST);
            self.forgiven = now;
        }
        self.total = self.total.saturating_add(1);
        let Some(remaining) = self.remaining.checked_sub(1) else { return ViolationAction::Close };
        self.remaining = remaining;
        if self.total >= LIBRARY_VIOLATION_LIMIT / 2 {
            ViolationAction::ShutDown
        } else {
            ViolationAction::Tolerated
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn burst_of_violations_closes_the_connection() {
        let now = start();
        let mut violations = ViolationCounter::new(now);
        let tolerated =
            (0..).take_while(|_| violations.add(now) == ViolationAction::Tolerated).count();
        assert_eq!(tolerated, VIOLATION_BURST as usize);
        assert_eq!(violations.add(now), ViolationAction::Close);
        let later = now + Duration::from_secs(1);
        assert_eq!(violations.add(later), ViolationAction::Tolerated);
    }

    #[test]
    fn rare_violations_shut_the_connection_down_before_the_h2_crate_closes_it() {
        let mut now = start();
        let mut violations = ViolationCounter::new(now);
        let mut tolerated = 0;
        let action = loop {
            now += Duration::from_millis(150);
            match violations.add(now) {
                ViolationAction::Tolerated => tolerated += 1,
                action => break action,
            }
        };
        assert_eq!(action, ViolationAction::ShutDown);
        assert_eq!(tolerated + 1, LIBRARY_VIOLATION_LIMIT / 2);
    }

    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;

    #[expect(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn start() -> Instant {
        Instant::now()
    }

    fn frame(kind: u8, length: u32) -> FrameHeader {
        FrameHeader { length, kind, flags: 0, stream: 1 }
    }

    /// Whether the connection is within its budget after these frames arrived in one read.
    fn is_within(budget: &mut FrameBudget, frames: &[FrameHeader], now: Instant) -> bool {
        frames.iter().for_each(|frame| budget.receive(*frame));
        budget.is_within(|| now)
    }

    #[test]
    fn flood_exhausts_the_budget_which_refills_with_time() {
        let now = start();
        let mut budget = FrameBudget::new(now);
        let ping = [frame(PING, 8)];
        let count = (0..).take_while(|_| is_within(&mut budget, &ping, now)).count();
        assert_eq!(count, MAX_FRAMES as usize);
        let later = now + Duration::from_millis(100);
        assert!(is_within(&mut budget, &ping, later), "the budget was refilled");
        let count = (0..).take_while(|_| is_within(&mut budget, &ping, later)).count();
        assert_eq!(count, 99);
    }

    #[test]
    fn served_client_may_acknowledge_every_data_frame() {
        let now = start();
        let mut budget = FrameBudget::new(now);
        let updates = [frame(WINDOW_UPDATE, 4), frame(WINDOW_UPDATE, 4)];
        for _ in 0..100_000 {
            budget.send(frame(DATA, 1));
            assert!(is_within(&mut budget, &updates, now));
        }
        let request = [frame(HEADERS, 10), frame(WINDOW_UPDATE, 4), frame(3, 4)];
        for _ in 0..100_000 {
            assert!(is_within(&mut budget, &request, now));
        }
        // Replies to a flood of PING frames do not refill the budget.
        let answered = (0..MAX_FRAMES + 1).all(|_| {
            budget.send(frame(PING, 8));
            is_within(&mut budget, &[frame(PING, 8)], now)
        });
        assert!(!answered);
    }
}
