//! Inspects the frames between an HTTP/2 client and the h2 crate, to correct what the h2 crate does too leniently or
//! too strictly.
//!
//! Too lenient: floods of control frames ([`FrameBudget`]), protocol violations ([`ViolationCounter`]), slow request
//! heads ([`Http2Monitor::stalled`]), wrong frame sizes and settings. Too strict: frames that arrive during a shutdown
//! ([`GracefulShutdown`]), and malformed requests, which get a 400 instead of a reset ([`ReplaceableReset`]).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use weft_runtime::clock::now;

use super::h2_budget::{FrameBudget, ViolationAction, ViolationCounter};
use super::h2_frames::{DATA, FrameScanner, GOAWAY, HEADERS, PREFACE_BYTES, RST_STREAM};
use super::h2_reset::ReplaceableReset;
use super::h2_shutdown::GracefulShutdown;

/// How many requests the h2 crate may hold without delivering them to weft, beyond the limit of streams: it decodes and
/// discards requests that it refuses for their size or form.
const REFUSED_LIMIT: u32 = 64;

/// The state of a connection that is shared between its guard and the task that serves it.
#[derive(Debug)]
pub(crate) struct Http2Monitor {
    /// The error code with which the connection must be closed.
    reason: Cell<Option<Reason>>,
    reason_set: Notify,
    violations: RefCell<ViolationCounter>,
    /// Whether the connection is to be shut down gracefully, so that the client opens another.
    is_renewal_due: Cell<bool>,
    renewal_set: Notify,
    /// How many reads returned data. Wraps.
    received: Cell<u32>,
    /// The number of the incomplete frame or header block; 0 when there is none.
    pending: Cell<u32>,
    pending_set: Notify,
    /// The streams of requests that the h2 crate has neither delivered nor reset.
    undelivered: RefCell<VecDeque<u32>>,
    /// The streams that were refused with a 400 and that the h2 crate may still deliver: it does when it had accepted
    /// the head of a request whose body then violated a rule.
    rejected: RefCell<Vec<u32>>,
    /// How many refused requests were not reported by [`Http2Monitor::take_refused`] yet.
    refused: Cell<u32>,
    refused_set: Notify,
}

impl Http2Monitor {
    /// Resolves when the connection must be closed: it exceeded a limit, or violated a rule that the h2 crate does not
    /// enforce.
    pub(crate) async fn abort_reason(&self) -> Reason {
        loop {
            if let Some(reason) = self.reason.get() {
                return reason;
            }
            self.reason_set.notified().await;
        }
    }

    /// Resolves when the connection must be shut down gracefully, because the h2 crate would soon close it.
    pub(crate) async fn renewal_due(&self) {
        while !self.is_renewal_due.get() {
            self.renewal_set.notified().await;
        }
    }

    /// Counts a stream that violated a rule or a limit.
    pub(crate) fn count_violation(&self, now: Instant) {
        match self.violations.borrow_mut().add(now) {
            ViolationAction::Tolerated => {}
            ViolationAction::ShutDown => {
                self.is_renewal_due.set(true);
                self.renewal_set.notify_one();
            }
            ViolationAction::Close => self.close(Reason::ENHANCE_YOUR_CALM),
        }
    }

    /// How many reads returned data. Acknowledgements of our PINGs are not counted.
    pub(crate) fn received_count(&self) -> u32 {
        self.received.get()
    }

    /// Removes the last read from the count: acknowledging our PING does not show that the client uses the connection.
    pub(crate) fn uncount_last(&self) {
        self.received.set(self.received.get().wrapping_sub(1));
    }

    /// Resolves when a frame, or the head of a request, has been incomplete for `limit`. DATA frames may take any time.
    pub(crate) async fn stalled(&self, limit: std::time::Duration) {
        loop {
            self.pending_set.notified().await;
            let pending = self.pending.get();
            if pending == 0 {
                continue;
            }
            tokio::time::sleep(limit).await;
            if self.pending.get() == pending {
                return;
            }
            self.pending_set.notify_one();
        }
    }

    /// Records that the h2 crate delivered the request of a stream. False when it was already refused with a 400.
    pub(crate) fn note_accepted(&self, stream: u32) -> bool {
        self.forget(stream);
        let mut rejected = self.rejected.borrow_mut();
        let is_rejected = rejected.contains(&stream);
        // Requests are delivered in the order in which they were received.
        rejected.retain(|later| *later > stream);
        !is_rejected
    }

    /// Removes a stream from the undelivered ones. False when it was not one of them.
    fn forget(&self, stream: u32) -> bool {
        let mut undelivered = self.undelivered.borrow_mut();
        if undelivered.front() == Some(&stream) {
            undelivered.pop_front();
            return true;
        }
        let before = undelivered.len();
        undelivered.retain(|other| *other != stream);
        undelivered.len() < before
    }

    /// Resolves once for each request that the h2 crate refused.
    pub(crate) async fn refused_by_h2(&self) {
        while !self.take_refused() {
            self.refused_set.notified().await;
        }
    }

    /// Whether the h2 crate refused a request that was not reported yet; reports it.
    pub(crate) fn take_refused(&self) -> bool {
        let count = self.refused.get();
        self.refused.set(count.saturating_sub(1));
        count > 0
    }

    /// Records that a request that the h2 crate refuses gets a 400.
    fn note_rejected(&self, stream: u32) {
        self.forget(stream);
        self.rejected.borrow_mut().push(stream);
        self.refused.set(self.refused.get().saturating_add(1));
        self.refused_set.notify_one();
    }

    /// Records a reset that was sent, and counts it when the client violated a rule or a limit.
    fn note_reset(&self, stream: u32, reason: Option<Reason>) {
        let was_undelivered = self.forget(stream);
        let is_violation = match reason {
            None | Some(Reason::NO_ERROR | Reason::CANCEL) => false,
            // The h2 crate refuses streams above the limit, which is a violation. Weft refuses delivered requests for
            // other reasons, such as a shutdown.
            Some(Reason::REFUSED_STREAM) => was_undelivered,
            Some(_) => true,
        };
        if is_violation {
            self.count_violation(now());
        }
    }

    fn close(&self, reason: Reason) {
        self.reason.set(Some(reason));
        self.reason_set.notify_one();
    }
}

/// A client connection whose frames are inspected in both directions.
#[derive(Debug)]
pub(crate) struct Http2ClientGuard<S> {
    stream: S,
    budget: FrameBudget,
    received: FrameScanner,
    sent: FrameScanner,
    /// How many frame headers were received. Wraps, and is never 0 after the first.
    count: u32,
    /// The number of the HEADERS frame whose CONTINUATION frames are incomplete.
    open_headers: Option<u32>,
    /// Whether the current frame is a DATA frame.
    in_data: bool,
    /// The highest stream that the client has opened.
    highest: u32,
    /// How many requests the h2 crate may hold without delivering them.
    undelivered_limit: usize,
    /// Whether a GOAWAY was sent.
    has_sent_goaway: bool,
    shutdown: Option<GracefulShutdown>,
    /// The bytes that are sent instead of the reset that the h2 crate writes next.
    replacement: Option<Replacement>,
    /// Whether the guard may send a response. It may not after the client has reduced the HPACK table size: a header
    /// block must then begin with an update of the table size, which only the h2 crate can encode.
    may_respond: bool,
    monitor: Rc<Http2Monitor>,
}

/// The bytes that are sent instead of a reset. Once some were sent, the rest is sent too: a partial frame would break
/// the connection.
#[derive(Debug)]
struct Replacement {
    bytes: Vec<u8>,
    /// How many of the bytes were sent.
    sent: usize,
}

impl<S> Http2ClientGuard<S> {
    /// Guards a connection that may have `streams` concurrent streams.
    pub(crate) fn new(stream: S, streams: u32) -> (Self, Rc<Http2Monitor>) {
        let monitor = Rc::new(Http2Monitor {
            reason: Cell::default(),
            reason_set: Notify::default(),
            violations: RefCell::new(ViolationCounter::new(now())),
            is_renewal_due: Cell::default(),
            renewal_set: Notify::default(),
            received: Cell::default(),
            pending: Cell::default(),
            pending_set: Notify::default(),
            undelivered: RefCell::default(),
            rejected: RefCell::default(),
            refused: Cell::default(),
            refused_set: Notify::default(),
        });
        let guarded = Self {
            stream,
            budget: FrameBudget::new(now()),
            received: FrameScanner::after_preface(PREFACE_BYTES),
            sent: FrameScanner::after_preface(0),
            count: 0,
            open_headers: None,
            in_data: false,
            highest: 0,
            undelivered_limit: streams.saturating_add(REFUSED_LIMIT) as usize,
            has_sent_goaway: false,
            shutdown: None,
            replacement: None,
            may_respond: true,
            monitor: monitor.clone(),
        };
        (guarded, monitor)
    }

    /// Inspects received bytes.
    ///
    /// # Errors
    /// The error code with which the connection must be closed, after a violation or when a limit was exceeded.
    fn receive(&mut self, bytes: &[u8]) -> Result<(), Reason> {
        let Self {
            budget,
            received,
            count,
            open_headers,
            in_data,
            highest,
            monitor,
            may_respond,
            ..
        } = self;
        let mut checked = Ok(());
        received.scan(bytes, |frame, payload| {
            *count = count.wrapping_add(1).max(1);
            if *count == 1 {
                checked = checked.and_then(|()| frame.check_first());
            }
            checked = checked
                .and_then(|()| frame.check_size())
                .and_then(|()| frame.check_settings(payload));
            match frame.needs_continuation() {
                Some(true) => *open_headers = open_headers.or(Some(*count)),
                Some(false) => *open_headers = None,
                None => {}
            }
            *in_data = frame.kind == DATA;
            *may_respond &= !frame.shrinks_table(payload);
            if frame.kind == HEADERS && frame.stream > *highest {
                *highest = frame.stream;
                monitor.undelivered.borrow_mut().push_back(frame.stream);
            }
            budget.receive(frame);
        });
        checked?;
        self.update_pending();
        let is_below_limit = self.monitor.undelivered.borrow().len() <= self.undelivered_limit;
        if is_below_limit && self.budget.is_within(now) {
            Ok(())
        } else {
            Err(Reason::ENHANCE_YOUR_CALM)
        }
    }

    /// Updates whether a frame or header block is incomplete. DATA frames are excluded: a body may take any time.
    fn update_pending(&mut self) {
        let pending = match self.open_headers {
            Some(number) => number,
            None if self.received.header_bytes > 0 => self.count.wrapping_add(1),
            None if self.received.remaining > 0 && !self.in_data => self.count,
            None => 0,
        };
        if self.monitor.pending.replace(pending) != pending && pending != 0 {
            self.monitor.pending_set.notify_one();
        }
    }
}

impl<S: AsyncWrite + Unpin> Http2ClientGuard<S> {
    /// The first reset in the output of the h2 crate that is to be replaced.
    fn reset_to_replace(&self, bytes: &[u8]) -> Option<ReplaceableReset> {
        let undelivered = self.monitor.undelivered.borrow();
        if undelivered.is_empty() {
            return None;
        }
        ReplaceableReset::find(bytes, self.sent.current_frame_bytes(bytes)?, |stream| {
            undelivered.contains(&stream)
        })
    }

    /// Replaces the reset at the start of `bytes`.
    fn replace(&mut self, reset: ReplaceableReset, bytes: &[u8]) {
        let bytes = if self.may_respond {
            reset.response()
        } else {
            bytes.get(..ReplaceableReset::BYTES).unwrap_or_default().to_vec()
        };
        self.replacement = Some(Replacement { bytes, sent: 0 });
        self.monitor.note_rejected(reset.stream);
    }

    /// Sends the replacement. Returns how many bytes of the h2 crate's output it replaces.
    fn poll_replacement(
        stream: &mut S,
        replacement: &mut Replacement,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let Replacement { bytes, sent } = replacement;
        while let Some(rest) = bytes.get(*sent..).filter(|rest| !rest.is_empty()) {
            let written = ready!(Pin::new(&mut *stream).poll_write(cx, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *sent += written;
        }
        Poll::Ready(Ok(ReplaceableReset::BYTES))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Http2ClientGuard<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.monitor.reason.get().is_some() {
            // The task that serves the connection closes it.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        if this.has_sent_goaway && this.shutdown.is_none() && this.received.header_bytes == 0 {
            // The h2 crate has received the beginning of the current frame, so the rest is forwarded.
            this.shutdown = Some(GracefulShutdown::new(this.received.remaining, this.highest));
        }
        let polled = match &mut this.shutdown {
            Some(shutdown) => shutdown.poll_read(&mut this.stream, cx, buf),
            None => Pin::new(&mut this.stream).poll_read(cx, buf),
        };
        let bytes = buf.filled().get(before..).unwrap_or_default();
        if bytes.is_empty() {
            return polled;
        }
        this.monitor.received.set(this.monitor.received.get().wrapping_add(1));
        if let Err(reason) = this.receive(bytes) {
            this.monitor.close(reason);
            return Poll::Pending;
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Http2ClientGuard<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let reset = if this.replacement.is_none() { this.reset_to_replace(buf) } else { None };
        if let Some(reset) = reset.filter(|reset| reset.offset == 0) {
            this.replace(reset, buf);
        }
        let polled = match &mut this.replacement {
            Some(replacement) => Self::poll_replacement(&mut this.stream, replacement, cx),
            None => {
                let before = reset.and_then(|reset| buf.get(..reset.offset));
                Pin::new(&mut this.stream).poll_write(cx, before.unwrap_or(buf))
            }
        };
        if let Poll::Ready(Ok(sent)) = polled {
            this.replacement = None;
            let Self { sent: frames, budget, has_sent_goaway, monitor, .. } = this;
            frames.scan(buf.get(..sent).unwrap_or_default(), |frame, payload| {
                budget.send(frame);
                *has_sent_goaway |= frame.kind == GOAWAY;
                if frame.kind == RST_STREAM {
                    monitor.note_reset(frame.stream, frame.reset_reason(payload));
                }
            });
        }
        polled
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Accepts at most `max` bytes per write, and blocks every second write.
    #[derive(Debug)]
    struct SlowStream {
        written: Vec<u8>,
        is_full: bool,
        max: usize,
    }

    impl AsyncWrite for SlowStream {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.is_full = !self.is_full;
            if !self.is_full {
                return Poll::Pending;
            }
            let accepted = buf.len().min(self.max);
            self.written.extend_from_slice(&buf[..accepted]);
            Poll::Ready(Ok(accepted))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    const SETTINGS: u8 = 4;
    const PING: u8 = 6;

    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("a short payload");
        [&[0, 0, length, kind, 0][..], &stream.to_be_bytes(), payload].concat()
    }

    fn reset(stream: u32, reason: Reason) -> Vec<u8> {
        frame(RST_STREAM, stream, &u32::from(reason).to_be_bytes())
    }

    /// A connection that has received the heads of `requests` requests, on the streams 1, 3 and so on.
    fn with_requests(
        requests: u32,
        max: usize,
    ) -> (Http2ClientGuard<SlowStream>, Rc<Http2Monitor>) {
        let slow = SlowStream { written: Vec::new(), is_full: false, max };
        let (mut guarded, monitor) = Http2ClientGuard::new(slow, requests);
        let preface = vec![0; PREFACE_BYTES as usize];
        let heads = (0..requests).flat_map(|number| frame(HEADERS, 2 * number + 1, &[0x82]));
        let bytes = [preface, frame(SETTINGS, 0, &[])].concat();
        let bytes: Vec<u8> = bytes.into_iter().chain(heads).collect();
        guarded.receive(&bytes).expect("the frames are valid");
        (guarded, monitor)
    }

    /// Writes as the h2 crate does; `between` is called before each attempt.
    fn write(
        guarded: &mut Http2ClientGuard<SlowStream>,
        mut bytes: &[u8],
        mut between: impl FnMut(&SlowStream),
    ) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        while !bytes.is_empty() {
            between(&guarded.stream);
            if let Poll::Ready(sent) = Pin::new(&mut *guarded).poll_write(&mut cx, bytes) {
                bytes = &bytes[sent.expect("the stream accepts bytes")..];
            }
        }
    }

    #[test]
    fn partially_sent_replacement_is_completed_and_counted_once() {
        let ping = frame(PING, 0, &[0; 8]);
        let bytes = [&ping[..], &reset(1, Reason::PROTOCOL_ERROR), &ping].concat();
        let replacement = ReplaceableReset { offset: 0, stream: 1 }.response();
        let expected = [&ping[..], &replacement, &ping].concat();
        for delivered_at in ping.len() + 1..ping.len() + replacement.len() {
            let (mut guarded, monitor) = with_requests(1, 5);
            let mut is_delivered = false;
            write(&mut guarded, &bytes, |slow| {
                if slow.written.len() >= delivered_at && !is_delivered {
                    is_delivered = true;
                    assert!(!monitor.note_accepted(1), "the request was already rejected");
                }
            });
            assert!(is_delivered);
            assert_eq!(guarded.stream.written, expected, "delivered after {delivered_at} bytes");
            assert!(monitor.take_refused() && !monitor.take_refused());
        }
    }

    #[test]
    fn reset_of_a_delivered_request_is_not_replaced() {
        let (mut guarded, monitor) = with_requests(2, 5);
        assert!(monitor.note_accepted(1));
        let bytes = [reset(1, Reason::PROTOCOL_ERROR), reset(3, Reason::PROTOCOL_ERROR)].concat();
        write(&mut guarded, &bytes, |_| {});
        let replacement = ReplaceableReset { offset: 0, stream: 3 }.response();
        assert_eq!(
            guarded.stream.written,
            [reset(1, Reason::PROTOCOL_ERROR), replacement].concat()
        );
        assert!(monitor.take_refused() && !monitor.take_refused());
    }

    #[test]
    fn requests_above_the_stream_limit_count_as_violations_and_those_refused_by_weft_do_not() {
        const REQUESTS: u32 = 300;
        let resets: Vec<u8> = (0..REQUESTS)
            .flat_map(|number| reset(2 * number + 1, Reason::REFUSED_STREAM))
            .collect();
        let (mut guarded, monitor) = with_requests(REQUESTS, 1024 * 1024);
        assert!((0..REQUESTS).all(|number| monitor.note_accepted(2 * number + 1)));
        write(&mut guarded, &resets, |_| {});
        assert_eq!(monitor.reason.get(), None);
        let (mut guarded, monitor) = with_requests(REQUESTS, 1024 * 1024);
        write(&mut guarded, &resets, |_| {});
        assert_eq!(monitor.reason.get(), Some(Reason::ENHANCE_YOUR_CALM));
    }

    #[test]
    fn stream_that_the_h2_crate_resets_is_no_longer_undelivered() {
        let (mut guarded, monitor) = with_requests(3, 1024);
        let resets = [Reason::STREAM_CLOSED, Reason::PROTOCOL_ERROR, Reason::REFUSED_STREAM];
        let resets = (0..).map(|number| 2 * number + 1).zip(resets);
        let resets: Vec<u8> = resets.flat_map(|(stream, reason)| reset(stream, reason)).collect();
        write(&mut guarded, &resets, |_| {});
        assert!(monitor.undelivered.borrow().is_empty());
        assert!(monitor.note_accepted(1) && !monitor.note_accepted(3) && monitor.note_accepted(5));
        assert!(monitor.rejected.borrow().is_empty());
    }
}
