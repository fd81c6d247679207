//! How many frames that carry nothing an HTTP/2 connection may send.
//!
//! Each PING, SETTINGS, PRIORITY, WINDOW_UPDATE, RST_STREAM or unknown frame costs work, and the library
//! answers them without end (RFC 9113, section 10.5). They are counted on their way to it: a connection
//! has so many, gains some with time, with each request, and with what is sent to it, which a client
//! must acknowledge. One that has none left is ended with `ENHANCE_YOUR_CALM`.

use std::time::Instant;

use super::h2_frames::{DATA, FrameHeader, HEADERS};

/// What a connection has at first, and at most.
const MOST: u32 = 10_000;
/// What it gains in a second.
const PER_SECOND: u64 = 1_000;
/// What it gains by a request: a priority, updates of windows, a reset.
const PER_REQUEST: u32 = 20;
/// What it gains by each piece sent to it: an update of each window, and one to spare.
const PER_PIECE_SENT: u32 = 3;

/// What a connection has left.
#[derive(Debug)]
pub(super) struct FrameBudget {
    left: u32,
    /// What it used beyond that, since it was last looked at.
    lacking: u32,
    /// When it last gained by time.
    gained: Instant,
}

impl FrameBudget {
    pub(super) fn new(now: Instant) -> Self {
        Self { left: MOST, lacking: 0, gained: now }
    }

    /// A frame was sent to the client.
    pub(super) fn send(&mut self, frame: FrameHeader) {
        if frame.kind == DATA && frame.length > 0 {
            self.left = MOST.min(self.left + PER_PIECE_SENT);
        }
    }

    /// A frame came from the client.
    pub(super) fn receive(&mut self, frame: FrameHeader) {
        match frame.kind {
            DATA if frame.length > 0 => {}
            HEADERS => self.left = MOST.min(self.left + PER_REQUEST),
            _ => match self.left.checked_sub(1) {
                Some(less) => self.left = less,
                None => self.lacking += 1,
            },
        }
    }

    /// Whether the connection may go on. The clock is asked only when nothing is left.
    pub(super) fn is_kept(&mut self, now: impl FnOnce() -> Instant) -> bool {
        let lacking = std::mem::take(&mut self.lacking);
        if lacking == 0 {
            return true;
        }
        let now = now();
        let passed = now.saturating_duration_since(self.gained).as_millis();
        let gained = u64::try_from(passed).unwrap_or(u64::MAX).saturating_mul(PER_SECOND) / 1000;
        let gained = u32::try_from(gained).unwrap_or(u32::MAX).min(MOST);
        (self.gained, self.left) = (now, gained.saturating_sub(lacking));
        gained >= lacking
    }
}

/// How many streams of a connection may break a rule or a limit at once.
const BREACHES_AT_ONCE: u32 = 100;
/// How many of those are forgiven in a second.
const BREACHES_FORGIVEN_PER_SECOND: u64 = 10;
/// How many breaches the library counts over the lifetime of a connection before it ends the connection and
/// every stream on it.
pub(crate) const LIBRARY_VIOLATION_LIMIT: u32 = 4_000;

/// What follows from a breach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ViolationAction {
    Tolerated,
    /// The connection ends gracefully, and the client opens another, before the library ends it at once.
    Renewed,
    /// The connection ends at once: so many breaches are abuse.
    Ended,
}

/// The streams of a connection that broke a rule (those that the library resets or refuses) or the limit
/// of a request's head. Each costs work that serves no client; a few in the long life of a connection that
/// is shared by many programs are no abuse.
#[derive(Debug)]
pub(super) struct ViolationCounter {
    left: u32,
    total: u32,
    /// When some were last forgiven.
    forgiven: Instant,
}

impl ViolationCounter {
    pub(super) fn new(now: Instant) -> Self {
        Self { left: BREACHES_AT_ONCE, total: 0, forgiven: now }
    }

    /// Counts one more.
    pub(super) fn add(&mut self, now: Instant) -> ViolationAction {
        let passed = now.saturating_duration_since(self.forgiven).as_millis();
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        let forgiven = passed.saturating_mul(BREACHES_FORGIVEN_PER_SECOND) / 1000;
        if forgiven > 0 {
            let forgiven = u32::try_from(forgiven).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(forgiven).min(BREACHES_AT_ONCE);
            self.forgiven = now;
        }
        self.total = self.total.saturating_add(1);
        let Some(left) = self.left.checked_sub(1) else { return ViolationAction::Ended };
        self.left = left;
        if self.total >= LIBRARY_VIOLATION_LIMIT / 2 {
            ViolationAction::Renewed
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
    fn burst_of_breaches_ends_the_connection() {
        let now = start();
        let mut breaches = ViolationCounter::new(now);
        let tolerated =
            (0..).take_while(|_| breaches.add(now) == ViolationAction::Tolerated).count();
        assert_eq!(tolerated, BREACHES_AT_ONCE as usize);
        assert_eq!(breaches.add(now), ViolationAction::Ended);
        let later = now + Duration::from_secs(1);
        assert_eq!(breaches.add(later), ViolationAction::Tolerated);
    }

    #[test]
    fn rare_breaches_renew_the_connection_before_the_library_ends_it() {
        let mut now = start();
        let mut breaches = ViolationCounter::new(now);
        let mut tolerated = 0;
        let verdict = loop {
            now += Duration::from_millis(150);
            match breaches.add(now) {
                ViolationAction::Tolerated => tolerated += 1,
                verdict => break verdict,
            }
        };
        assert_eq!(verdict, ViolationAction::Renewed);
        assert_eq!(tolerated + 1, LIBRARY_VIOLATION_LIMIT / 2);
    }

    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;

    #[allow(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn start() -> Instant {
        Instant::now()
    }

    fn frame(kind: u8, length: u32) -> FrameHeader {
        FrameHeader { length, kind, flags: 0, stream: 1 }
    }

    /// Whether the connection is kept after these came together.
    fn is_kept(budget: &mut FrameBudget, frames: &[FrameHeader], now: Instant) -> bool {
        frames.iter().for_each(|frame| budget.receive(*frame));
        budget.is_kept(|| now)
    }

    #[test]
    fn a_flood_has_an_end_and_comes_again_with_time() {
        let now = start();
        let mut budget = FrameBudget::new(now);
        let ping = [frame(PING, 8)];
        let count = (0..).take_while(|_| is_kept(&mut budget, &ping, now)).count();
        assert_eq!(count, MOST as usize);
        let later = now + Duration::from_millis(100);
        assert!(is_kept(&mut budget, &ping, later), "some have been gained");
        let count = (0..).take_while(|_| is_kept(&mut budget, &ping, later)).count();
        assert_eq!(count, 99);
    }

    #[test]
    fn who_is_served_may_acknowledge_it() {
        let now = start();
        let mut budget = FrameBudget::new(now);
        let updates = [frame(WINDOW_UPDATE, 4), frame(WINDOW_UPDATE, 4)];
        for _ in 0..100_000 {
            budget.send(frame(DATA, 1));
            assert!(is_kept(&mut budget, &updates, now));
        }
        let request = [frame(HEADERS, 10), frame(WINDOW_UPDATE, 4), frame(3, 4)];
        for _ in 0..100_000 {
            assert!(is_kept(&mut budget, &request, now));
        }
        // Our answers to a flood are no service.
        let answered = (0..MOST + 1).all(|_| {
            budget.send(frame(PING, 8));
            is_kept(&mut budget, &[frame(PING, 8)], now)
        });
        assert!(!answered);
    }
}
