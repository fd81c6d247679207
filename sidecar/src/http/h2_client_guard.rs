//! A connection of HTTP/2 whose frames are looked at on their way to the library and from it: what it
//! lets pass and must not, and what it takes amiss and should not.

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

use super::h2_budget::{FrameBudget, ViolationAction, ViolationCounter};
use super::h2_frames::{DATA, Frames, GOAWAY, HEADERS, PREFACE_BYTES, RST_STREAM};
use super::h2_reset::ReplaceableReset;
use super::h2_shutdown::GracefulShutdown;
use crate::worker::now;

/// How many requests the library may refuse by itself, for their size or form: each was decoded, and is
/// thrown away.
const REFUSED_LIMIT: u32 = 64;

/// What is seen of a connection from outside.
#[derive(Debug)]
pub(crate) struct Http2Monitor {
    /// Why the connection must end.
    reason: Cell<Option<Reason>>,
    is_over: Notify,
    breaches: RefCell<ViolationCounter>,
    /// Whether the client is to open another connection.
    is_old: Cell<bool>,
    renewed: Notify,
    received: Cell<u32>,
    /// The number of the frame or field section that has begun and not ended; 0 when there is none.
    pending: Cell<u32>,
    begun: Notify,
    /// The streams of requests that were neither given to us yet nor reset by the library.
    unseen: RefCell<VecDeque<u32>>,
    /// The streams that were answered instead of a reset, as far as the library may still give them to us: it does
    /// where it had taken in the head of a request whose body breaks a rule.
    answered: RefCell<Vec<u32>>,
    /// How many requests the library has refused, and nobody has taken note of.
    refused: Cell<u32>,
    refusal: Notify,
}

impl Http2Monitor {
    /// Resolves when the connection must end: it sends too much, or breaks a rule that the library does
    /// not hold it to.
    pub(crate) async fn abort_reason(&self) -> Reason {
        loop {
            if let Some(reason) = self.reason.get() {
                return reason;
            }
            self.is_over.notified().await;
        }
    }

    /// Resolves when the connection must end gracefully, since the library would soon end it at once.
    pub(crate) async fn renewal_due(&self) {
        while !self.is_old.get() {
            self.renewed.notified().await;
        }
    }

    /// Counts a stream that broke a rule or a limit.
    pub(crate) fn count_violation(&self, now: Instant) {
        match self.breaches.borrow_mut().add(now) {
            ViolationAction::Tolerated => {}
            ViolationAction::Renewed => {
                self.is_old.set(true);
                self.renewed.notify_one();
            }
            ViolationAction::Ended => self.end(Reason::ENHANCE_YOUR_CALM),
        }
    }

    /// How often anything came, a PING too.
    pub(crate) fn received_count(&self) -> u32 {
        self.received.get()
    }

    /// Takes the last frame out of the count: an answer to our own PING does not show that the client uses the
    /// connection.
    pub(crate) fn uncount_last(&self) {
        self.received.set(self.received.get().wrapping_sub(1));
    }

    /// Resolves when a frame, or the head of a request, has been on its way for `limit`.
    pub(crate) async fn stalled(&self, limit: std::time::Duration) {
        loop {
            self.begun.notified().await;
            let pending = self.pending.get();
            if pending == 0 {
                continue;
            }
            tokio::time::sleep(limit).await;
            if self.pending.get() == pending {
                return;
            }
            self.begun.notify_one();
        }
    }

    /// Notes that the request of a stream was given to us; whether it was not answered before.
    pub(crate) fn note_accepted(&self, stream: u32) -> bool {
        self.forget(stream);
        let mut answered = self.answered.borrow_mut();
        let is_answered = answered.contains(&stream);
        // Requests are given to us in the order in which they came.
        answered.retain(|later| *later > stream);
        !is_answered
    }

    /// Removes a stream from those that were not given to us; whether it was one of them.
    fn forget(&self, stream: u32) -> bool {
        let mut unseen = self.unseen.borrow_mut();
        if unseen.front() == Some(&stream) {
            unseen.pop_front();
            return true;
        }
        let before = unseen.len();
        unseen.retain(|other| *other != stream);
        unseen.len() < before
    }

    /// Resolves when the library has refused a request by itself, once for each.
    pub(crate) async fn refused_by_library(&self) {
        while !self.take_refused() {
            self.refusal.notified().await;
        }
    }

    /// Whether the library has refused a request that was not taken note of.
    pub(crate) fn take_refused(&self) -> bool {
        let count = self.refused.get();
        self.refused.set(count.saturating_sub(1));
        count > 0
    }

    /// Notes that the answer to a request that the library refuses is sent.
    fn note_refused(&self, stream: u32) {
        self.forget(stream);
        self.answered.borrow_mut().push(stream);
        self.refused.set(self.refused.get().saturating_add(1));
        self.refusal.notify_one();
    }

    /// Notes a reset that was sent, and counts it where the client broke a rule or a limit.
    fn note_reset(&self, stream: u32, reason: Option<Reason>) {
        let was_unseen = self.forget(stream);
        let is_breach = match reason {
            None | Some(Reason::NO_ERROR | Reason::CANCEL) => false,
            // The library refuses streams above the limit. A request that was given to us is refused for reasons
            // of our own.
            Some(Reason::REFUSED_STREAM) => was_unseen,
            Some(_) => true,
        };
        if is_breach {
            self.count_violation(now());
        }
    }

    fn end(&self, reason: Reason) {
        self.reason.set(Some(reason));
        self.is_over.notify_one();
    }
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Http2ClientGuard<S> {
    stream: S,
    budget: FrameBudget,
    received: Frames,
    sent: Frames,
    /// How many frames have begun, as far as their headers are whole.
    count: u32,
    /// The number of the frame with which the open field section began.
    section: Option<u32>,
    /// Whether the frame whose payload is on its way is one of DATA.
    in_data: bool,
    /// The highest stream so far.
    highest: u32,
    /// How many streams the library may keep back.
    kept_back_limit: usize,
    /// Whether the client was told that there will be an end.
    is_told: bool,
    ending: Option<GracefulShutdown>,
    /// What is sent instead of the reset that the library writes next.
    replacement: Option<Replacement>,
    /// Whether a response of ours needs no word on the size of the compression table before it.
    may_answer: bool,
    monitor: Rc<Http2Monitor>,
}

/// The bytes that are sent instead of a reset. Once there are any, all are sent: half of a frame would break the
/// connection.
#[derive(Debug)]
struct Replacement {
    bytes: Vec<u8>,
    /// How many of them were sent.
    sent: usize,
}

impl<S> Http2ClientGuard<S> {
    /// A connection that may have `streams` open at once.
    pub(crate) fn new(stream: S, streams: u32) -> (Self, Rc<Http2Monitor>) {
        let monitor = Rc::new(Http2Monitor {
            reason: Cell::default(),
            is_over: Notify::default(),
            breaches: RefCell::new(ViolationCounter::new(now())),
            is_old: Cell::default(),
            renewed: Notify::default(),
            received: Cell::default(),
            pending: Cell::default(),
            begun: Notify::default(),
            unseen: RefCell::default(),
            answered: RefCell::default(),
            refused: Cell::default(),
            refusal: Notify::default(),
        });
        let guarded = Self {
            stream,
            budget: FrameBudget::new(now()),
            received: Frames::behind(PREFACE_BYTES),
            sent: Frames::behind(0),
            count: 0,
            section: None,
            in_data: false,
            highest: 0,
            kept_back_limit: streams.saturating_add(REFUSED_LIMIT) as usize,
            is_told: false,
            ending: None,
            replacement: None,
            may_answer: true,
            monitor: monitor.clone(),
        };
        (guarded, monitor)
    }

    /// Looks at what came.
    ///
    /// # Errors
    /// Why the connection must end.
    fn receive(&mut self, bytes: &[u8]) -> Result<(), Reason> {
        let Self {
            budget, received, count, section, in_data, highest, monitor, may_answer, ..
        } = self;
        let mut checked = Ok(());
        received.see(bytes, |frame, payload| {
            *count = count.wrapping_add(1).max(1);
            if *count == 1 {
                checked = checked.and_then(|()| frame.check_first());
            }
            checked = checked
                .and_then(|()| frame.check_size())
                .and_then(|()| frame.check_settings(payload));
            match frame.leaves_section_open() {
                Some(true) => *section = section.or(Some(*count)),
                Some(false) => *section = None,
                None => {}
            }
            *in_data = frame.kind == DATA;
            *may_answer &= !frame.shrinks_table(payload);
            if frame.kind == HEADERS && frame.stream > *highest {
                *highest = frame.stream;
                monitor.unseen.borrow_mut().push_back(frame.stream);
            }
            budget.receive(frame);
        });
        checked?;
        self.follow();
        let refused_few = self.monitor.unseen.borrow().len() <= self.kept_back_limit;
        if refused_few && self.budget.is_kept(now) {
            Ok(())
        } else {
            Err(Reason::ENHANCE_YOUR_CALM)
        }
    }

    /// Tells whether something has begun and not ended. A body may take its time.
    fn follow(&mut self) {
        let pending = match self.section {
            Some(begun) => begun,
            None if self.received.have > 0 => self.count.wrapping_add(1),
            None if self.received.left > 0 && !self.in_data => self.count,
            None => 0,
        };
        if self.monitor.pending.replace(pending) != pending && pending != 0 {
            self.monitor.begun.notify_one();
        }
    }
}

impl<S: AsyncWrite + Unpin> Http2ClientGuard<S> {
    /// The first reset in what the library writes that is to be replaced.
    fn refusal(&self, bytes: &[u8]) -> Option<ReplaceableReset> {
        let unseen = self.monitor.unseen.borrow();
        if unseen.is_empty() {
            return None;
        }
        ReplaceableReset::find(bytes, self.sent.open_bytes(bytes)?, |stream| {
            unseen.contains(&stream)
        })
    }

    /// Replaces the reset with which `bytes` begin.
    fn replace(&mut self, refusal: ReplaceableReset, bytes: &[u8]) {
        let bytes = if self.may_answer {
            refusal.answer()
        } else {
            // The client would want a word on the size of the compression table before an answer.
            bytes.get(..ReplaceableReset::BYTES).unwrap_or_default().to_vec()
        };
        self.replacement = Some(Replacement { bytes, sent: 0 });
        self.monitor.note_refused(refusal.stream);
    }

    /// Sends the replacement; how many bytes of the library's were replaced.
    fn poll_replacement(
        stream: &mut S,
        replacement: &mut Replacement,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let Replacement { bytes, sent } = replacement;
        while let Some(rest) = bytes.get(*sent..).filter(|rest| !rest.is_empty()) {
            let more = ready!(Pin::new(&mut *stream).poll_write(cx, rest))?;
            if more == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *sent += more;
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
            // Whoever was told ends it.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        if this.is_told && this.ending.is_none() && this.received.have == 0 {
            // What has begun was given to the library, and goes on to it.
            this.ending = Some(GracefulShutdown::new(this.received.left, this.highest));
        }
        let polled = match &mut this.ending {
            Some(ending) => ending.poll_read(&mut this.stream, cx, buf),
            None => Pin::new(&mut this.stream).poll_read(cx, buf),
        };
        let came = buf.filled().get(before..).unwrap_or_default();
        if came.is_empty() {
            return polled;
        }
        this.monitor.received.set(this.monitor.received.get().wrapping_add(1));
        if let Err(reason) = this.receive(came) {
            this.monitor.end(reason);
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
        let refusal = if this.replacement.is_none() { this.refusal(buf) } else { None };
        if let Some(refusal) = refusal.filter(|refusal| refusal.offset == 0) {
            this.replace(refusal, buf);
        }
        let polled = match &mut this.replacement {
            Some(replacement) => Self::poll_replacement(&mut this.stream, replacement, cx),
            None => {
                let before = refusal.and_then(|refusal| buf.get(..refusal.offset));
                Pin::new(&mut this.stream).poll_write(cx, before.unwrap_or(buf))
            }
        };
        if let Poll::Ready(Ok(sent)) = polled {
            this.replacement = None;
            let Self { sent: frames, budget, is_told, monitor, .. } = this;
            frames.see(buf.get(..sent).unwrap_or_default(), |frame, payload| {
                budget.send(frame);
                *is_told |= frame.kind == GOAWAY;
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

    /// Takes so many bytes at a time, and nothing each second time.
    #[derive(Debug)]
    struct Slow {
        taken: Vec<u8>,
        is_full: bool,
        most: usize,
    }

    impl AsyncWrite for Slow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.is_full = !self.is_full;
            if !self.is_full {
                return Poll::Pending;
            }
            let taken = buf.len().min(self.most);
            self.taken.extend_from_slice(&buf[..taken]);
            Poll::Ready(Ok(taken))
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
        let length = u8::try_from(payload.len()).expect("short");
        [&[0, 0, length, kind, 0][..], &stream.to_be_bytes(), payload].concat()
    }

    fn reset(stream: u32, reason: Reason) -> Vec<u8> {
        frame(RST_STREAM, stream, &u32::from(reason).to_be_bytes())
    }

    /// A connection on which the heads of `requests` have come, on the streams 1, 3 and so on.
    fn with_requests(requests: u32, most: usize) -> (Http2ClientGuard<Slow>, Rc<Http2Monitor>) {
        let slow = Slow { taken: Vec::new(), is_full: false, most };
        let (mut guarded, monitor) = Http2ClientGuard::new(slow, requests);
        let preface = vec![0; PREFACE_BYTES as usize];
        let heads = (0..requests).flat_map(|number| frame(HEADERS, 2 * number + 1, &[0x82]));
        let bytes = [preface, frame(SETTINGS, 0, &[])].concat();
        let bytes: Vec<u8> = bytes.into_iter().chain(heads).collect();
        guarded.receive(&bytes).expect("the client keeps the rules");
        (guarded, monitor)
    }

    /// Writes as the library does; `between` is called before each attempt.
    fn write(
        guarded: &mut Http2ClientGuard<Slow>,
        mut bytes: &[u8],
        mut between: impl FnMut(&Slow),
    ) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        while !bytes.is_empty() {
            between(&guarded.stream);
            if let Poll::Ready(sent) = Pin::new(&mut *guarded).poll_write(&mut cx, bytes) {
                bytes = &bytes[sent.expect("it takes bytes")..];
            }
        }
    }

    #[test]
    fn answer_that_is_half_sent_is_finished_and_its_request_is_refused_once() {
        let ping = frame(PING, 0, &[0; 8]);
        let bytes = [&ping[..], &reset(1, Reason::PROTOCOL_ERROR), &ping].concat();
        let answer = ReplaceableReset { offset: 0, stream: 1 }.answer();
        let expected = [&ping[..], &answer, &ping].concat();
        for given_at in ping.len() + 1..ping.len() + answer.len() {
            let (mut guarded, monitor) = with_requests(1, 5);
            let mut is_given = false;
            write(&mut guarded, &bytes, |slow| {
                if slow.taken.len() >= given_at && !is_given {
                    is_given = true;
                    assert!(!monitor.note_accepted(1), "it is answered already");
                }
            });
            assert!(is_given);
            assert_eq!(guarded.stream.taken, expected, "given after {given_at} bytes");
            assert!(monitor.take_refused() && !monitor.take_refused());
        }
    }

    #[test]
    fn request_given_before_its_reset_is_not_answered_twice() {
        let (mut guarded, monitor) = with_requests(2, 5);
        assert!(monitor.note_accepted(1));
        let bytes = [reset(1, Reason::PROTOCOL_ERROR), reset(3, Reason::PROTOCOL_ERROR)].concat();
        write(&mut guarded, &bytes, |_| {});
        let answer = ReplaceableReset { offset: 0, stream: 3 }.answer();
        assert_eq!(guarded.stream.taken, [reset(1, Reason::PROTOCOL_ERROR), answer].concat());
        assert!(monitor.take_refused() && !monitor.take_refused());
    }

    #[test]
    fn requests_that_we_refuse_are_no_breach_and_those_above_the_limit_of_streams_are() {
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
    fn stream_that_the_library_resets_is_no_longer_kept_back() {
        let (mut guarded, monitor) = with_requests(3, 1024);
        let resets = [Reason::STREAM_CLOSED, Reason::PROTOCOL_ERROR, Reason::REFUSED_STREAM];
        let resets = (0..).map(|number| 2 * number + 1).zip(resets);
        let resets: Vec<u8> = resets.flat_map(|(stream, reason)| reset(stream, reason)).collect();
        write(&mut guarded, &resets, |_| {});
        assert!(monitor.unseen.borrow().is_empty());
        assert!(monitor.note_accepted(1) && !monitor.note_accepted(3) && monitor.note_accepted(5));
        assert!(monitor.answered.borrow().is_empty());
    }
}
