//! How long a request may take, and how long it may be silent.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::authenticate::TokenFault;
use crate::denial::Denial;

/// What has happened to a request so far, as far as patience with it goes.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    moved: Cell<u32>,
    received: Cell<bool>,
    open_ended: Cell<bool>,
}

impl Pulse {
    /// Something was moved, in either direction.
    pub(crate) fn beat(&self) {
        self.moved.set(self.moved.get().wrapping_add(1));
    }

    /// The request has come whole.
    pub(crate) fn request_received(&self) {
        self.received.set(true);
    }

    /// It has become a tunnel, which lasts as long as both sides want.
    pub(crate) fn open_end(&self) {
        self.open_ended.set(true);
        self.received.set(true);
    }
}

/// The limits of one request; none: there is no such limit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// For everything, to the end of the response.
    pub(crate) whole: Option<Duration>,
    /// For the request with its body.
    pub(crate) request: Option<Duration>,
    /// For silence, while neither side sends anything. It may last up to twice as long: silence is
    /// looked for at intervals, so that what moves costs no clock.
    pub(crate) silence: Option<Duration>,
    /// When it ends, whatever it is: its token is good no longer.
    pub(crate) until: Option<Instant>,
}

impl Patience {
    /// Resolves when one limit is reached.
    pub(crate) async fn ends(self, started: Instant, pulse: &Pulse) -> Denial {
        let mut silent_since = (started, pulse.moved.get());
        loop {
            let received = pulse.received.get();
            let whole = self.whole.filter(|_| !pulse.open_ended.get()).map(|t| started + t);
            let request = self.request.filter(|_| !received).map(|t| started + t);
            let silence = self.silence.map(|t| silent_since.0 + t);
            let all = [self.until, whole, request, silence];
            let Some(next) = all.into_iter().flatten().min() else {
                return std::future::pending().await;
            };
            tokio::time::sleep_until(next.into()).await;
            let (received, late) = (
                pulse.received.get(),
                if received { Denial::UpstreamTimeout } else { Denial::BodyTimeout },
            );
            if self.until == Some(next) {
                return Denial::Token(TokenFault::ClaimValue, "it has expired");
            }
            if request == Some(next) && !received {
                return Denial::BodyTimeout;
            }
            if whole == Some(next) && !pulse.open_ended.get() {
                return Denial::UpstreamTimeout;
            }
            if silence == Some(next) {
                if pulse.moved.get() == silent_since.1 {
                    return late;
                }
                silent_since = (next, pulse.moved.get());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn patience(whole: u32, request: u32, silence: u32) -> Patience {
        let limit = |seconds: u32| Some(SECOND * seconds).filter(|limit| !limit.is_zero());
        let (whole, request, silence) = (limit(whole), limit(request), limit(silence));
        Patience { whole, request, silence, until: None }
    }

    /// Runs for a minute in which `pulse` beats each `beat` seconds; when the limit came, and which.
    async fn run(patience: Patience, pulse: &Pulse, beat: u32) -> Option<(u64, Denial)> {
        let started = tokio::time::Instant::now();
        let beats = async {
            for _ in 0..60 {
                tokio::time::sleep(SECOND * beat).await;
                pulse.beat();
            }
        };
        tokio::select! {
            denial = patience.ends(started.into_std(), pulse) => {
                Some((started.elapsed().as_secs(), denial))
            }
            () = beats => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_limit_ends_what_it_is_for() {
        let unreceived = Pulse::default();
        let received = Pulse::default();
        received.request_received();
        let tunnel = Pulse::default();
        tunnel.open_end();
        let (early, late) = (Denial::BodyTimeout, Denial::UpstreamTimeout);
        assert_eq!(run(patience(0, 0, 0), &unreceived, 1).await, None);
        assert_eq!(run(patience(5, 0, 0), &unreceived, 1).await, Some((5, late)));
        assert_eq!(run(patience(5, 3, 0), &unreceived, 1).await, Some((3, early)));
        assert_eq!(run(patience(5, 3, 0), &received, 1).await, Some((5, late)));
        assert_eq!(run(patience(5, 3, 0), &tunnel, 1).await, None);
        assert_eq!(run(patience(0, 0, 4), &tunnel, 3).await, None);
        assert_eq!(run(patience(0, 0, 4), &tunnel, 30).await, Some((4, late)));
        assert_eq!(run(patience(0, 0, 4), &unreceived, 30).await, Some((4, early)));
        assert_eq!(run(patience(0, 0, 4), &received, 30).await, Some((4, late)));
        let until = Some(tokio::time::Instant::now().into_std() + SECOND * 7);
        let over = Denial::Token(TokenFault::ClaimValue, "it has expired");
        let ends = Patience { until, ..patience(0, 0, 4) };
        assert_eq!(run(ends, &tunnel, 3).await, Some((7, over)));
    }
}
