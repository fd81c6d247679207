//! What a request has to pass before a byte of its messages is read: who sends it, and how much memory its
//! messages may take, of one connection and of all.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body_util::BodyExt as _;
use hyper::body::{Frame, SizeHint};
use tokio::time::Sleep;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower_service::Service;

/// How long a message may take from its first byte to its last.
const MESSAGE_TIME: Duration = Duration::from_secs(10);
/// The head of a message of gRPC: a flag, and the length in four bytes.
const PREFIX_BYTES: usize = 5;
/// How much of a refused request is read, and for how long.
const DISCARDED_BYTES: usize = 256 * 1024;
const DISCARD_TIME: Duration = Duration::from_secs(1);
/// How many messages of the largest size one connection may have under way.
const MESSAGES_PER_CONNECTION: usize = 4;

/// What requests may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// The largest message, in bytes.
    pub message_bytes: usize,
    /// All messages that have begun and not ended, of all connections, in bytes.
    pub total_bytes: usize,
    /// The streams that one connection may have open.
    pub streams: u32,
}

impl RequestLimits {
    /// The limits for messages of at most so many bytes.
    #[must_use]
    pub fn for_messages_of(message_bytes: u32) -> Self {
        let message_bytes = usize::try_from(message_bytes).unwrap_or(usize::MAX);
        let usual = Self::default();
        let total_bytes =
            usual.total_bytes.max(message_bytes.saturating_mul(MESSAGES_PER_CONNECTION));
        Self { message_bytes, total_bytes, ..usual }
    }
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self { message_bytes: 1024 * 1024, total_bytes: 64 * 1024 * 1024, streams: 100 }
    }
}

/// Memory of which parts are held while messages are read.
#[derive(Debug, Default)]
pub(super) struct Budget(AtomicUsize);

impl Budget {
    /// Holds bytes, unless that would be more than the limit.
    fn hold(self: &Arc<Self>, bytes: usize, limit: usize) -> Option<Held> {
        let add = |held: usize| held.checked_add(bytes).filter(|sum| *sum <= limit);
        self.0.fetch_update(Relaxed, Relaxed, add).ok()?;
        Some(Held { budget: self.clone(), bytes })
    }
}

/// Bytes that are held until this is dropped.
#[derive(Debug)]
struct Held {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.bytes, Relaxed);
    }
}

/// Decides by a request's head whether its messages are read.
pub(crate) type Gate = Arc<dyn Fn(&http::request::Parts) -> Result<(), Status> + Send + Sync>;

/// A service behind a gate.
#[derive(Clone)]
pub(crate) struct Guarded<S> {
    inner: S,
    gate: Gate,
    meter: Meter,
}

/// What messages are measured by.
#[derive(Debug, Clone)]
pub(super) struct Meter {
    limits: RequestLimits,
    total: Arc<Budget>,
}

impl Meter {
    pub(super) fn new(limits: RequestLimits) -> Self {
        Self { limits, total: Arc::default() }
    }

    fn hold(&self, connection: &Arc<Budget>, bytes: usize) -> Result<[Held; 2], Status> {
        let RequestLimits { message_bytes, total_bytes, .. } = self.limits;
        if bytes > message_bytes {
            return Err(Status::resource_exhausted(format!(
                "a request of {bytes} bytes is larger than the limit of {message_bytes}"
            )));
        }
        let of_one = message_bytes.saturating_mul(MESSAGES_PER_CONNECTION);
        let own = connection.hold(bytes, of_one).ok_or_else(|| {
            Status::resource_exhausted("too many requests of this connection are under way")
        })?;
        let total = self.total.hold(bytes, total_bytes).ok_or_else(|| {
            Status::resource_exhausted("too many requests are under way; try again")
        })?;
        Ok([own, total])
    }
}

impl<S> Guarded<S> {
    pub(super) fn new(inner: S, gate: Gate, meter: Meter) -> Self {
        Self { inner, gate, meter }
    }
}

impl<S: NamedService> NamedService for Guarded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (head, body) = request.into_parts();
        if let Err(status) = (self.gate)(&head) {
            discard(body);
            return Box::pin(std::future::ready(Ok(status.into_http())));
        }
        let connection = head.extensions.get::<super::Peer>().map(|peer| peer.budget.clone());
        let metered = Metered {
            body: Some(body),
            meter: self.meter.clone(),
            connection: connection.unwrap_or_default(),
            prefix: Vec::with_capacity(PREFIX_BYTES),
            left: 0,
            held: None,
            end: None,
        };
        Box::pin(self.inner.call(http::Request::from_parts(head, Body::new(metered))))
    }
}

/// Reads what a refused request still sends, without keeping it: a stream that is reset at once takes its
/// answer with it at some clients. What is too long or too late is reset.
fn discard(mut body: Body) {
    let reading = async move {
        let mut left = DISCARDED_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            let Some(rest) = left.checked_sub(length) else {
                return;
            };
            left = rest;
        }
    };
    drop(tokio::spawn(tokio::time::timeout(DISCARD_TIME, reading)));
}

/// A body of messages, each of which is measured when its length is known.
struct Metered {
    /// None once a message was refused.
    body: Option<Body>,
    meter: Meter,
    connection: Arc<Budget>,
    /// What of the next message's head has come.
    prefix: Vec<u8>,
    /// What is still to come of the message under way.
    left: usize,
    held: Option<[Held; 2]>,
    /// By when the message under way must have come.
    end: Option<Pin<Box<Sleep>>>,
}

impl Metered {
    /// Follows the messages in bytes that have come.
    fn follow(&mut self, mut bytes: Bytes) -> Result<(), Status> {
        while bytes.has_remaining() {
            if self.left > 0 {
                let taken = self.left.min(bytes.len());
                bytes.advance(taken);
                self.left -= taken;
            } else {
                let taken = (PREFIX_BYTES - self.prefix.len()).min(bytes.len());
                self.prefix.extend_from_slice(&bytes.split_to(taken));
                let [_, length @ ..] = self.prefix.as_slice() else {
                    continue;
                };
                if let Ok(length) = <[u8; 4]>::try_from(length) {
                    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                    self.held = Some(self.meter.hold(&self.connection, length)?);
                    self.left = length;
                    self.prefix.clear();
                }
            }
            if self.left == 0 && self.prefix.is_empty() {
                (self.held, self.end) = (None, None);
            }
        }
        let is_open = self.left > 0 || !self.prefix.is_empty();
        if is_open && self.end.is_none() {
            self.end = Some(Box::pin(tokio::time::sleep(MESSAGE_TIME)));
        }
        Ok(())
    }
}

impl hyper::body::Body for Metered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let is_late = this.end.as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready());
        if is_late {
            this.body = None;
            let reason = "a request took longer than 10 s to come";
            return Poll::Ready(Some(Err(Status::deadline_exceeded(reason))));
        }
        let Some(body) = &mut this.body else {
            return Poll::Ready(None);
        };
        let frame = match ready!(Pin::new(body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            other => return Poll::Ready(other),
        };
        if let Some(bytes) = frame.data_ref()
            && let Err(status) = this.follow(bytes.clone())
        {
            this.body.take().into_iter().for_each(discard);
            return Poll::Ready(Some(Err(status)));
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(hyper::body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(hyper::body::Body::size_hint).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metered(limits: RequestLimits) -> Metered {
        Metered {
            body: Some(Body::empty()),
            meter: Meter::new(limits),
            connection: Arc::default(),
            prefix: Vec::new(),
            left: 0,
            held: None,
            end: None,
        }
    }

    fn message(length: u32, sent: usize) -> Bytes {
        [&[0][..], &length.to_be_bytes(), &vec![b'x'; sent]].concat().into()
    }

    #[tokio::test]
    async fn messages_are_held_from_their_length_to_their_last_byte_however_they_are_cut() {
        let limits = RequestLimits { message_bytes: 100, total_bytes: 1000, streams: 1 };
        for cut in 1..30 {
            let mut metered = metered(limits);
            let all = [message(10, 10), message(0, 0), message(20, 20)].concat();
            let mut most = 0;
            for part in all.chunks(cut) {
                metered.follow(Bytes::copy_from_slice(part)).expect("it is within the limit");
                most = most.max(metered.meter.total.0.load(Relaxed));
            }
            assert_eq!(metered.meter.total.0.load(Relaxed), 0, "cut at {cut}");
            assert!(metered.end.is_none(), "cut at {cut}");
            assert!(most <= 20, "cut at {cut}: {most}");
        }
    }

    #[tokio::test]
    async fn message_above_a_limit_is_refused_by_its_length_alone() {
        let limits = RequestLimits { message_bytes: 100, total_bytes: 150, streams: 1 };
        let refusal = |metered: &mut Metered, length| {
            let refused = metered.follow(message(length, 1)).expect_err("it is too large");
            refused.message().to_owned()
        };
        let mut first = metered(limits);
        assert!(first.follow(message(100, 1)).is_ok(), "the limit itself is within it");
        assert!(first.end.is_some(), "it has a time to end");
        let text = refusal(&mut metered(limits), 101);
        assert_eq!(text, "a request of 101 bytes is larger than the limit of 100");
        assert!(refusal(&mut metered(limits), u32::MAX).contains("4294967295 bytes"));
        // Of another connection, which shares the total alone.
        let mut second = Metered { meter: first.meter.clone(), ..metered(limits) };
        assert_eq!(refusal(&mut second, 51), "too many requests are under way; try again");
        drop(first);
        let mut third = Metered { meter: second.meter, ..metered(limits) };
        assert!(third.follow(message(51, 1)).is_ok(), "what is dropped is held no longer");
    }

    #[tokio::test]
    async fn connection_holds_four_messages_of_the_largest_size() {
        let limits = RequestLimits { message_bytes: 100, total_bytes: 10_000, streams: 9 };
        let first = metered(limits);
        let open = || Metered {
            meter: first.meter.clone(),
            connection: first.connection.clone(),
            ..metered(limits)
        };
        let mut streams: Vec<Metered> = (0..5).map(|_| open()).collect();
        let held: Vec<bool> =
            streams.iter_mut().map(|stream| stream.follow(message(100, 1)).is_ok()).collect();
        assert_eq!(held, [true, true, true, true, false]);
    }
}
