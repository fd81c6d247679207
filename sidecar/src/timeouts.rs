//! The timeouts of a request: for its response, its body, and periods without traffic.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::authenticate::TokenFault;
use crate::denial::Denial;

/// What a request has transferred so far, as input for its timeouts.
#[derive(Debug, Default)]
pub(crate) struct RequestProgress {
    moved: Cell<u32>,
    received: Cell<bool>,
    is_tunnel: Cell<bool>,
    bytes_to_endpoint: Cell<u64>,
    bytes_to_client: Cell<u64>,
}

impl RequestProgress {
    /// A request that begins. `received`: it has no body.
    pub(crate) fn new(received: bool) -> Self {
        Self { received: Cell::new(received), ..Self::default() }
    }

    /// Records that bytes moved in either direction.
    pub(crate) fn record_activity(&self) {
        self.moved.set(self.moved.get().wrapping_add(1));
    }

    /// Records that `bytes` of the request body, or of the response body, moved.
    pub(crate) fn record_bytes(&self, bytes: usize, is_request: bool) {
        self.record_activity();
        let all = if is_request { &self.bytes_to_endpoint } else { &self.bytes_to_client };
        all.set(all.get() + bytes as u64);
    }

    /// The number of response body bytes that moved.
    pub(crate) fn bytes_to_client(&self) -> u64 {
        self.bytes_to_client.get()
    }

    /// The number of request body bytes that moved, over all attempts.
    pub(crate) fn bytes_to_endpoint(&self) -> u64 {
        self.bytes_to_endpoint.get()
    }

    /// Records that the last byte of the request was read from the client.
    pub(crate) fn request_received(&self) {
        self.received.set(true);
    }

    /// Resolves when the whole request has been received. The task that polls this future also polls the future that
    /// receives the request, so no waker is stored.
    async fn until_received(&self) {
        std::future::poll_fn(|_| match self.received.get() {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        })
        .await;
    }

    /// Records that the request became a tunnel, which has no response timeout.
    pub(crate) fn become_tunnel(&self) {
        self.is_tunnel.set(true);
        self.received.set(true);
    }
}

/// The timeouts of one request; none: no limit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestTimeouts {
    /// The route timeout (`RouteAction.timeout`): from the last byte of the request to the last byte of the
    /// response. A request that is still being sent is limited by `request` and `idle`.
    pub(crate) response: Option<Duration>,
    /// For receiving the whole request with its body.
    pub(crate) request: Option<Duration>,
    /// For a period in which neither side sends anything. The period may be up to twice as long: activity is checked at
    /// intervals, so that moving bytes needs no clock.
    pub(crate) idle: Option<Duration>,
    /// How long an endpoint may accept no bytes of the request while there are some to send.
    pub(crate) stall: Duration,
    /// When the request ends in any case, because its token expires.
    pub(crate) until: Option<Instant>,
}

impl RequestTimeouts {
    /// Resolves when one of the timeouts expires, with the resulting denial.
    pub(crate) async fn expired(self, started: Instant, progress: &RequestProgress) -> Denial {
        let mut idle_since = (started, progress.moved.get());
        // A request without a body is complete when it begins. For others the loop notices the last byte.
        let mut response_due =
            self.response.filter(|_| progress.received.get()).map(|t| started + t);
        loop {
            let received = progress.received.get();
            if let (None, true, Some(limit)) = (response_due, received, self.response) {
                response_due = Some(tokio::time::Instant::now().into_std() + limit);
            }
            let response = response_due.filter(|_| !progress.is_tunnel.get());
            let request = self.request.filter(|_| !received).map(|t| started + t);
            let idle = self.idle.map(|t| idle_since.0 + t);
            let all = [self.until, response, request, idle];
            let next = all.into_iter().flatten().min();
            let limit = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = limit => {}
                () = progress.until_received(), if !received && self.response.is_some() => continue,
            }
            let received = progress.received.get();
            let late = if received { Denial::UpstreamTimeout } else { Denial::BodyTimeout };
            if self.until == next {
                return Denial::Token(TokenFault::ClaimValue, "the token has expired");
            }
            if request == next && !received {
                return Denial::BodyTimeout;
            }
            if response == next && !progress.is_tunnel.get() {
                return Denial::UpstreamTimeout;
            }
            if let Some(idle_until) = idle.filter(|idle| Some(*idle) == next) {
                if progress.moved.get() == idle_since.1 {
                    return late;
                }
                idle_since = (idle_until, progress.moved.get());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn timeouts(response: u32, request: u32, idle: u32) -> RequestTimeouts {
        let limit = |seconds: u32| Some(SECOND * seconds).filter(|limit| !limit.is_zero());
        let response = limit(response);
        let request = limit(request);
        let idle = limit(idle);
        RequestTimeouts { response, request, idle, stall: Duration::MAX, until: None }
    }

    /// Runs for a minute in which `progress` records activity every `beat` seconds; returns when which timeout expired.
    async fn run(
        timeouts: RequestTimeouts,
        progress: &RequestProgress,
        beat: u32,
    ) -> Option<(u64, Denial)> {
        let started = tokio::time::Instant::now();
        let beats = async {
            for _ in 0..60 {
                tokio::time::sleep(SECOND * beat).await;
                progress.record_activity();
            }
        };
        tokio::select! {
            denial = timeouts.expired(started.into_std(), progress) => {
                Some((started.elapsed().as_secs(), denial))
            }
            () = beats => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_timeout_ends_the_requests_that_it_applies_to() {
        let unreceived = RequestProgress::default();
        let received = RequestProgress::default();
        received.request_received();
        let tunnel = RequestProgress::default();
        tunnel.become_tunnel();
        let early = Denial::BodyTimeout;
        let late = Denial::UpstreamTimeout;
        assert_eq!(run(timeouts(0, 0, 0), &unreceived, 1).await, None);
        assert_eq!(run(timeouts(5, 0, 0), &unreceived, 1).await, None);
        assert_eq!(run(timeouts(5, 0, 0), &received, 1).await, Some((5, late)));
        assert_eq!(run(timeouts(5, 3, 0), &unreceived, 1).await, Some((3, early)));
        assert_eq!(run(timeouts(5, 3, 0), &received, 1).await, Some((5, late)));
        assert_eq!(run(timeouts(5, 3, 0), &tunnel, 1).await, None);
        assert_eq!(run(timeouts(0, 0, 4), &tunnel, 3).await, None);
        assert_eq!(run(timeouts(0, 0, 4), &tunnel, 30).await, Some((4, late)));
        assert_eq!(run(timeouts(0, 0, 4), &unreceived, 30).await, Some((4, early)));
        assert_eq!(run(timeouts(0, 0, 4), &received, 30).await, Some((4, late)));
        let until = Some(tokio::time::Instant::now().into_std() + SECOND * 7);
        let over = Denial::Token(TokenFault::ClaimValue, "the token has expired");
        let ends = RequestTimeouts { until, ..timeouts(0, 0, 4) };
        assert_eq!(run(ends, &tunnel, 3).await, Some((7, over)));
    }

    #[tokio::test(start_paused = true)]
    async fn route_timeout_counts_from_the_end_of_the_request() {
        let progress = RequestProgress::new(false);
        let started = tokio::time::Instant::now();
        let exchange = async {
            for _ in 0..10 {
                tokio::time::sleep(SECOND).await;
                progress.record_activity();
            }
            progress.request_received();
            tokio::time::sleep(SECOND * 60).await;
        };
        let denial = tokio::select! {
            biased;
            () = exchange => None,
            denial = timeouts(3, 0, 0).expired(started.into_std(), &progress) => Some(denial),
        };
        assert_eq!((denial, started.elapsed()), (Some(Denial::UpstreamTimeout), SECOND * 13));
    }
}
