//! What a request has to pass before a byte of its messages is read: who sends it, and how much memory its
//! messages may take, of one client and of all.

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

use super::Peer;

/// How long a message may take from its first byte to its last.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// The head of a message of gRPC: a flag, and the length in four bytes.
const PREFIX_BYTES: usize = 5;
/// How much of a refused request is read, and for how long.
const DISCARD_LIMIT_BYTES: usize = 256 * 1024;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);
/// How many messages of the largest size one connection without a certificate may have under way.
const MESSAGES_PER_CONNECTION: usize = 4;
/// How many messages of the largest size all clients with a certificate may have under way, and the part of that
/// which one identity may have.
const LARGEST_MESSAGES_TOTAL: usize = 16;
const IDENTITY_SHARE_DIVISOR: usize = 8;
/// The least that all clients with a certificate may have under way, in bytes.
const MINIMUM_TOTAL_BYTES: usize = 64 * 1024 * 1024;
/// The largest message of a client without a certificate: a request for a certificate, which is refused with a reason
/// of its own above 64 KiB.
const UNAUTHENTICATED_MESSAGE_BYTES: usize = 128 * 1024;
/// All messages of clients without a certificate that are under way, in bytes.
const UNAUTHENTICATED_TOTAL_BYTES: usize = 32 * 1024 * 1024;

/// What requests may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// Of clients with a certificate.
    pub authenticated: MessageLimits,
    /// Of clients without a certificate.
    pub unauthenticated: MessageLimits,
    /// The streams that one connection may have open.
    pub streams: u32,
}

/// What the messages of one group of clients may take, each counted by its whole length from its first byte to its
/// last: gRPC makes room for all of it at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageLimits {
    /// The largest message, in bytes.
    pub message_bytes: usize,
    /// The messages of one client that have begun and not ended, in bytes. A client is an identity; without a
    /// certificate, a connection.
    pub client_bytes: usize,
    /// Those of all clients of the group, in bytes.
    pub total_bytes: usize,
}

impl RequestLimits {
    /// The largest message of a client with a certificate, where no other is set, in bytes. A client that reconnects
    /// sends up to 1.1 MB for 10,000 services with two ports each.
    pub const DEFAULT_MESSAGE_BYTES: u32 = 16 * 1024 * 1024;

    /// The limits for clients whose certificate lets them send messages of at most `message_bytes`. Clients without a
    /// certificate have small limits and a budget of their own.
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

/// Whose messages they are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum MessageSender {
    Identity(SpiffeId),
    Connection(u64),
}

/// Memory of which parts are held while messages are read.
#[derive(Debug)]
struct MessageBudget {
    limits: MessageLimits,
    reserved: Mutex<ReservedBytes>,
}

/// What is held, in bytes. Only clients that hold something are listed.
#[derive(Debug, Default)]
struct ReservedBytes {
    total: usize,
    clients: BTreeMap<MessageSender, usize>,
}

/// A client's part of a budget.
#[derive(Debug, Clone)]
struct BudgetAccount {
    budget: Arc<MessageBudget>,
    client: MessageSender,
}

impl BudgetAccount {
    /// Holds bytes for a message, unless that would be more than a limit.
    fn reserve(&self, bytes: usize) -> Result<Reservation, Status> {
        let MessageLimits { message_bytes, client_bytes, total_bytes } = self.budget.limits;
        if bytes > message_bytes {
            return Err(Status::resource_exhausted(format!(
                "a request of {bytes} bytes is larger than the limit of {message_bytes}"
            )));
        }
        let mut reserved = self.budget.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        let own = reserved.clients.get(&self.client).unwrap_or(&0).saturating_add(bytes);
        if own > client_bytes {
            let reason = "too many requests of this client are under way; try again";
            return Err(Status::resource_exhausted(reason));
        }
        let total = reserved.total.saturating_add(bytes);
        if total > total_bytes {
            let reason = "too many requests are under way; try again";
            return Err(Status::resource_exhausted(reason));
        }
        reserved.total = total;
        reserved.clients.insert(self.client.clone(), own);
        Ok(Reservation { account: self.clone(), bytes })
    }
}

/// Bytes that are held until this is dropped.
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

/// Decides by a request's head whether its messages are read.
pub(crate) type RequestGate =
    Arc<dyn Fn(&http::request::Parts) -> Result<(), Status> + Send + Sync>;

/// A service behind a gate.
#[derive(Clone)]
pub(crate) struct GuardedService<S> {
    inner: S,
    gate: RequestGate,
    meter: MessageMeter,
}

/// What messages are measured by.
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

/// Reads what a refused request still sends, without keeping it: a stream that is reset at once takes its
/// answer with it at some clients. What is too long or too late is reset.
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

/// A body of messages, each of which is measured when its length is known.
struct MeteredBody {
    /// None once a message was refused.
    body: Option<Body>,
    account: BudgetAccount,
    /// What of the next message's head has come.
    prefix: Vec<u8>,
    /// What is still to come of the message under way.
    remaining: usize,
    reservation: Option<Reservation>,
    /// By when the message under way must have come.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl MeteredBody {
    /// Follows the messages in bytes that have come.
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
                (self.reservation, self.deadline) = (None, None);
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

    /// A body on a connection of its own.
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
    async fn messages_are_held_from_their_length_to_their_last_byte_however_they_are_cut() {
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
    async fn message_above_a_limit_is_refused_by_its_length_alone() {
        let meter = meter(100, 400, 150);
        let refusal = |metered: &mut MeteredBody, length| {
            let refused = metered.follow(message(length, 1)).expect_err("it is too large");
            refused.message().to_owned()
        };
        let mut first = metered(&meter, 1, None);
        assert!(first.follow(message(100, 1)).is_ok(), "the limit itself is within it");
        assert!(first.deadline.is_some(), "it has a time to end");
        let text = refusal(&mut metered(&meter, 2, None), 101);
        assert_eq!(text, "a request of 101 bytes is larger than the limit of 100");
        assert!(refusal(&mut metered(&meter, 2, None), u32::MAX).contains("4294967295 bytes"));
        // Of another connection, which shares the total alone.
        let mut second = metered(&meter, 2, None);
        assert_eq!(refusal(&mut second, 51), "too many requests are under way; try again");
        drop(first);
        let mut third = metered(&meter, 3, None);
        assert!(third.follow(message(51, 1)).is_ok(), "what is dropped is held no longer");
    }

    #[tokio::test]
    async fn connection_holds_four_messages_of_the_largest_size() {
        let meter = meter(100, 400, 10_000);
        let mut streams: Vec<MeteredBody> = (0..5).map(|_| metered(&meter, 1, None)).collect();
        let held: Vec<bool> =
            streams.iter_mut().map(|stream| stream.follow(message(100, 1)).is_ok()).collect();
        assert_eq!(held, [true, true, true, true, false]);
    }

    #[tokio::test]
    async fn identity_that_announces_the_largest_messages_on_all_connections_keeps_out_no_other() {
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
