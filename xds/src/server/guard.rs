//! Guards the gRPC services: checks the client before a request's messages are read, and limits the memory of messages
//! in flight per client and in total.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
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
use weft_model::SpiffeId;

use super::peer::Peer;

/// The longest time from a message's first byte to its last.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// The prefix of a gRPC message: the compression flag, and the length in four bytes.
const PREFIX_BYTES: usize = 5;
/// How many bytes of a refused request are read and discarded, and for how long.
const DISCARD_LIMIT_BYTES: usize = 256 * 1024;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);
/// How many messages of the largest size one connection without a certificate may have in flight.
const MESSAGES_PER_CONNECTION: usize = 4;
/// How many messages of the largest size all clients with a certificate may have in flight, and the fraction of that
/// (1/8) for one identity.
const LARGEST_MESSAGES_TOTAL: usize = 16;
const IDENTITY_SHARE_DIVISOR: usize = 8;
/// The least in-flight limit of all clients with a certificate, in bytes.
const MINIMUM_TOTAL_BYTES: usize = 64 * 1024 * 1024;
/// The largest message of a client without a certificate: a certificate request. The certificate service refuses
/// requests above 64 KiB with a specific error.
const UNAUTHENTICATED_MESSAGE_BYTES: usize = 128 * 1024;
/// The in-flight limit of all clients without a certificate, in bytes.
const UNAUTHENTICATED_TOTAL_BYTES: usize = 32 * 1024 * 1024;

/// Limits of requests to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// For clients with a certificate.
    pub authenticated: MessageLimits,
    /// For clients without a certificate.
    pub unauthenticated: MessageLimits,
    /// The most concurrent streams of a connection.
    pub streams: u32,
}

/// Memory limits of messages in flight, for one group of clients. A message counts with its whole length from its first
/// byte to its last, because gRPC allocates its buffer at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageLimits {
    /// The largest message, in bytes.
    pub message_bytes: usize,
    /// All messages in flight of one client, in bytes. A client is an identity or, without a certificate, a connection.
    pub client_bytes: usize,
    /// All messages in flight of the group, in bytes.
    pub total_bytes: usize,
}

impl RequestLimits {
    /// The default limit of a message from a client with a certificate, in bytes. A client that reconnects sends up to
    /// 1.1 MB for 10,000 services with two ports each.
    pub const DEFAULT_MESSAGE_BYTES: u32 = 16 * 1024 * 1024;

    /// The limits when clients with a certificate may send messages of at most `message_bytes`. Clients without a
    /// certificate have smaller limits and a separate budget.
    #[must_use]
    pub fn for_message_bytes(message_bytes: u32) -> Self {
        let message_bytes = usize::try_from(message_bytes).unwrap_or(usize::MAX);
        let total_bytes =
            MINIMUM_TOTAL_BYTES.max(message_bytes.saturating_mul(LARGEST_MESSAGES_TOTAL));
        let client_bytes = total_bytes / IDENTITY_SHARE_DIVISOR;
        let unauthenticated_message_bytes = message_bytes.min(UNAUTHENTICATED_MESSAGE_BYTES);
        Self {
            authenticated: MessageLimits { message_bytes, client_bytes, total_bytes },
            unauthenticated: MessageLimits {
                message_bytes: unauthenticated_message_bytes,
                client_bytes: unauthenticated_message_bytes * MESSAGES_PER_CONNECTION,
                total_bytes: UNAUTHENTICATED_TOTAL_BYTES,
            },
            ..Self::default()
        }
    }
}

impl Default for RequestLimits {
    fn default() -> Self {
        let limits = MessageLimits {
            message_bytes: 1024 * 1024,
            client_bytes: 4 * 1024 * 1024,
            total_bytes: 64 * 1024 * 1024,
        };
        Self { authenticated: limits, unauthenticated: limits, streams: 100 }
    }
}

/// The client to which messages are attributed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum MessageSender {
    Identity(SpiffeId),
    Connection(u64),
}

/// The memory budget of one group of clients.
#[derive(Debug)]
struct MessageBudget {
    limits: MessageLimits,
    reserved: Mutex<ReservedBytes>,
}

/// The reserved bytes. Only clients with a reservation are listed.
#[derive(Debug, Default)]
struct ReservedBytes {
    total: usize,
    clients: BTreeMap<MessageSender, usize>,
}

/// A budget, and the client that reserves from it.
#[derive(Debug, Clone)]
struct BudgetAccount {
    budget: Arc<MessageBudget>,
    client: MessageSender,
}

impl BudgetAccount {
    /// Reserves bytes for a message, unless a limit would be exceeded.
    fn reserve(&self, bytes: usize) -> Result<Reservation, Status> {
        let MessageLimits { message_bytes, client_bytes, total_bytes } = self.budget.limits;
        if bytes > message_bytes {
            return Err(Status::resource_exhausted(format!(
                "message of {bytes} bytes is larger than the limit of {message_bytes} bytes"
            )));
        }
        let mut reserved = self.budget.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        let own = reserved.clients.get(&self.client).unwrap_or(&0).saturating_add(bytes);
        if own > client_bytes {
            let reason = "memory limit of this client's messages in flight reached; retry later";
            return Err(Status::resource_exhausted(reason));
        }
        let total = reserved.total.saturating_add(bytes);
        if total > total_bytes {
            let reason = "memory limit of all messages in flight reached; retry later";
            return Err(Status::resource_exhausted(reason));
        }
        reserved.total = total;
        reserved.clients.insert(self.client.clone(), own);
        Ok(Reservation { account: self.clone(), bytes })
    }
}

/// Reserved bytes, released on drop.
#[derive(Debug)]
struct Reservation {
    account: BudgetAccount,
    bytes: usize,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let BudgetAccount { budget, client } = &self.account;
        let mut reserved = budget.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        reserved.total = reserved.total.saturating_sub(self.bytes);
        let left = reserved.clients.get(client).unwrap_or(&0).saturating_sub(self.bytes);
        if left == 0 {
            reserved.clients.remove(client);
        } else {
            reserved.clients.insert(client.clone(), left);
        }
    }
}

/// Decides from a request's headers and peer whether its messages are read.
pub(crate) type RequestGate =
    Arc<dyn Fn(&http::request::Parts) -> Result<(), Status> + Send + Sync>;

/// A gRPC service behind a request gate and a message meter.
#[derive(Clone)]
pub(crate) struct GuardedService<S> {
    inner: S,
    gate: RequestGate,
    meter: MessageMeter,
}

/// The budgets of both groups of clients.
#[derive(Debug, Clone)]
pub(super) struct MessageMeter {
    authenticated: Arc<MessageBudget>,
    unauthenticated: Arc<MessageBudget>,
}

impl MessageMeter {
    pub(super) fn new(limits: RequestLimits) -> Self {
        let budget = |limits| Arc::new(MessageBudget { limits, reserved: Mutex::default() });
        Self {
            authenticated: budget(limits.authenticated),
            unauthenticated: budget(limits.unauthenticated),
        }
    }

    fn account(&self, peer: Option<&Peer>) -> BudgetAccount {
        match peer.and_then(|peer| peer.id.clone()) {
            Some(id) => BudgetAccount {
                budget: self.authenticated.clone(),
                client: MessageSender::Identity(id),
            },
            None => BudgetAccount {
                budget: self.unauthenticated.clone(),
                client: MessageSender::Connection(peer.map_or(0, |peer| peer.connection)),
            },
        }
    }
}

impl<S> GuardedService<S> {
    pub(super) fn new(inner: S, gate: RequestGate, meter: MessageMeter) -> Self {
        Self { inner, gate, meter }
    }
}

impl<S: NamedService> NamedService for GuardedService<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for GuardedService<S>
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
        let metered = MeteredBody {
            body: Some(body),
            account: self.meter.account(head.extensions.get::<Peer>()),
            prefix: Vec::with_capacity(PREFIX_BYTES),
            remaining: 0,
            reservation: None,
            deadline: None,
        };
        Box::pin(self.inner.call(http::Request::from_parts(head, Body::new(metered))))
    }
}

/// Reads and discards the rest of a refused request: some clients lose the response when the stream is reset at once.
/// The stream is reset after [`DISCARD_LIMIT_BYTES`] or [`DISCARD_TIMEOUT`].
fn discard(mut body: Body) {
    let reading = async move {
        let mut left = DISCARD_LIMIT_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            let Some(rest) = left.checked_sub(length) else {
                return;
            };
            left = rest;
        }
    };
    drop(tokio::spawn(tokio::time::timeout(DISCARD_TIMEOUT, reading)));
}

/// A request body whose messages reserve memory once their length is known.
struct MeteredBody {
    /// None after a message was refused.
    body: Option<Body>,
    account: BudgetAccount,
    /// The received part of the next message's prefix.
    prefix: Vec<u8>,
    /// The missing bytes of the message in flight.
    remaining: usize,
    reservation: Option<Reservation>,
    /// When the message in flight must be complete.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl MeteredBody {
    /// Tracks the messages in received bytes.
    fn follow(&mut self, mut bytes: Bytes) -> Result<(), Status> {
        while bytes.has_remaining() {
            if self.remaining > 0 {
                let taken = self.remaining.min(bytes.len());
                bytes.advance(taken);
                self.remaining -= taken;
            } else {
                let taken = (PREFIX_BYTES - self.prefix.len()).min(bytes.len());
                self.prefix.extend_from_slice(&bytes.split_to(taken));
                let [_, length @ ..] = self.prefix.as_slice() else {
                    continue;
                };
                if let Ok(length) = <[u8; 4]>::try_from(length) {
                    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                    self.reservation = Some(self.account.reserve(length)?);
                    self.remaining = length;
                    self.prefix.clear();
                }
            }
            if self.remaining == 0 && self.prefix.is_empty() {
                self.reservation = None;
                self.deadline = None;
            }
        }
        let is_open = self.remaining > 0 || !self.prefix.is_empty();
        if is_open && self.deadline.is_none() {
            self.deadline = Some(Box::pin(tokio::time::sleep(MESSAGE_TIMEOUT)));
        }
        Ok(())
    }
}

impl hyper::body::Body for MeteredBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let is_late = this.deadline.as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready());
        if is_late {
            this.body = None;
            let reason = "message not received within 10 s";
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

    /// The body of a request on a connection.
    fn metered(meter: &MessageMeter, connection: u64, id: Option<&str>) -> MeteredBody {
        let id = id.map(|id| SpiffeId::parse(id).expect("an id"));
        MeteredBody {
            body: Some(Body::empty()),
            account: meter.account(Some(&Peer { id, connection })),
            prefix: Vec::new(),
            remaining: 0,
            reservation: None,
            deadline: None,
        }
    }

    fn meter(message_bytes: usize, client_bytes: usize, total_bytes: usize) -> MessageMeter {
        let limits = MessageLimits { message_bytes, client_bytes, total_bytes };
        MessageMeter::new(RequestLimits {
            authenticated: limits,
            unauthenticated: limits,
            streams: 1,
        })
    }

    fn message(length: u32, sent: usize) -> Bytes {
        [&[0][..], &length.to_be_bytes(), &vec![b'x'; sent]].concat().into()
    }

    fn reserved_bytes(meter: &MessageMeter) -> usize {
        let reserved = meter.unauthenticated.reserved.lock().expect("no test panicked");
        assert_eq!(reserved.clients.values().sum::<usize>(), reserved.total);
        reserved.total
    }

    #[tokio::test]
    async fn memory_is_reserved_from_a_messages_length_to_its_last_byte_for_any_chunk_size() {
        for cut in 1..30 {
            let meter = meter(100, 400, 1000);
            let mut metered = metered(&meter, 1, None);
            let all = [message(10, 10), message(0, 0), message(20, 20)].concat();
            let mut most = 0;
            for part in all.chunks(cut) {
                metered.follow(Bytes::copy_from_slice(part)).expect("it is within the limit");
                most = most.max(reserved_bytes(&meter));
            }
            assert_eq!(reserved_bytes(&meter), 0, "cut at {cut}");
            assert!(metered.deadline.is_none(), "cut at {cut}");
            assert!(most <= 20, "cut at {cut}: {most}");
        }
    }

    #[tokio::test]
    async fn message_above_a_limit_is_refused_when_its_length_is_received() {
        let meter = meter(100, 400, 150);
        let refusal = |metered: &mut MeteredBody, length| {
            let refused = metered.follow(message(length, 1)).expect_err("it is too large");
            refused.message().to_owned()
        };
        let mut first = metered(&meter, 1, None);
        assert!(
            first.follow(message(100, 1)).is_ok(),
            "a message of exactly the limit is accepted"
        );
        assert!(first.deadline.is_some(), "the message has a deadline");
        let text = refusal(&mut metered(&meter, 2, None), 101);
        assert_eq!(text, "message of 101 bytes is larger than the limit of 100 bytes");
        assert!(refusal(&mut metered(&meter, 2, None), u32::MAX).contains("4294967295 bytes"));
        // On another connection, which shares only the total.
        let mut second = metered(&meter, 2, None);
        let reason = "memory limit of all messages in flight reached; retry later";
        assert_eq!(refusal(&mut second, 51), reason);
        drop(first);
        let mut third = metered(&meter, 3, None);
        assert!(third.follow(message(51, 1)).is_ok(), "a dropped body releases its reservation");
    }

    #[tokio::test]
    async fn connection_without_a_certificate_reserves_four_of_the_largest_messages() {
        let meter = meter(100, 400, 10_000);
        let mut streams: Vec<MeteredBody> = (0..5).map(|_| metered(&meter, 1, None)).collect();
        let held: Vec<bool> =
            streams.iter_mut().map(|stream| stream.follow(message(100, 1)).is_ok()).collect();
        assert_eq!(held, [true, true, true, true, false]);
    }

    #[tokio::test]
    async fn identity_that_announces_largest_messages_on_all_connections_does_not_block_others() {
        let limit = 16 * 1024 * 1024;
        let meter = MessageMeter::new(RequestLimits::for_message_bytes(limit));
        let announce = |connection, id| {
            let mut stream = metered(&meter, connection, id);
            stream.follow(message(limit, 0)).map(|()| stream)
        };
        let hostile = Some("spiffe://mesh/ns/default/sa/hostile");
        let held: Vec<MeteredBody> = (0..100).filter_map(|at| announce(at, hostile).ok()).collect();
        assert_eq!(held.len(), 2, "an eighth of the total");
        let refused = announce(101, hostile).err().expect("its part is held");
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert!(announce(102, Some("spiffe://mesh/ns/default/sa/web")).is_ok());
        let mut stranger = metered(&meter, 103, None);
        assert!(stranger.follow(message(64 * 1024, 0)).is_ok());
        assert!(announce(104, None).is_err(), "without a certificate the limit is small");
    }
}
