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

use super::h2_budget::{Breaches, Budget, Verdict};
use super::h2_ending::Ending;
use super::h2_frames::{DATA, Frames, GOAWAY, HEADERS, PREFACE_BYTES};
use super::h2_refusal::Refusal;
use crate::worker::now;

/// How many requests the library may refuse by itself, for their size or form: each was decoded, and is
/// thrown away.
const REFUSED_LIMIT: u32 = 64;

/// What is seen of a connection from outside.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Why the connection must end.
    reason: Cell<Option<Reason>>,
    is_over: Notify,
    breaches: RefCell<Breaches>,
    /// Whether the client is to open another connection.
    is_old: Cell<bool>,
    renewed: Notify,
    received: Cell<u32>,
    /// The number of the frame or field section that has begun and not ended; 0 when there is none.
    pending: Cell<u32>,
    begun: Notify,
    /// How many streams came, and were not given to us yet. Those that the library refuses by itself
    /// never are.
    kept_back: Cell<u32>,
    /// The streams of requests that were not given to us yet.
    unseen: RefCell<VecDeque<u32>>,
    /// How many requests the library has refused, and nobody has taken note of.
    refused: Cell<u32>,
    refusal: Notify,
}

impl Watch {
    /// Resolves when the connection must end: it sends too much, or breaks a rule that the library does
    /// not hold it to.
    pub(crate) async fn over(&self) -> Reason {
        loop {
            if let Some(reason) = self.reason.get() {
                return reason;
            }
            self.is_over.notified().await;
        }
    }

    /// Resolves when the connection must end gracefully, since the library would soon end it at once.
    pub(crate) async fn old(&self) {
        while !self.is_old.get() {
            self.renewed.notified().await;
        }
    }

    /// Counts a stream that broke a rule or a limit.
    pub(crate) fn breach(&self, now: Instant) {
        match self.breaches.borrow_mut().add(now) {
            Verdict::Tolerated => {}
            Verdict::Renewed => {
                self.is_old.set(true);
                self.renewed.notify_one();
            }
            Verdict::Ended => self.end(Reason::ENHANCE_YOUR_CALM),
        }
    }

    /// How often anything came, a PING too.
    pub(crate) fn received(&self) -> u32 {
        self.received.get()
    }

    /// Takes the last frame out of the count: an answer to our own PING does not show that the client uses the
    /// connection.
    pub(crate) fn discount(&self) {
        self.received.set(self.received.get().wrapping_sub(1));
    }

    /// A stream was given to us.
    pub(crate) fn given(&self) {
        self.kept_back.set(self.kept_back.get().saturating_sub(1));
    }

    /// Resolves when a frame, or the head of a request, has been on its way for `limit`.
    pub(crate) async fn stuck(&self, limit: std::time::Duration) {
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

    /// The request of a stream was given to us.
    pub(crate) fn seen(&self, stream: u32) {
        let mut unseen = self.unseen.borrow_mut();
        if unseen.front() == Some(&stream) {
            unseen.pop_front();
        } else {
            unseen.retain(|other| *other != stream);
        }
    }

    /// Resolves when the library has refused a request by itself, once for each.
    pub(crate) async fn refused(&self) {
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

    fn note_refused(&self, stream: u32) {
        self.seen(stream);
        self.refused.set(self.refused.get().saturating_add(1));
        self.refusal.notify_one();
    }

    fn end(&self, reason: Reason) {
        self.reason.set(Some(reason));
        self.is_over.notify_one();
    }
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Guarded<S> {
    stream: S,
    budget: Budget,
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
    kept_back_limit: u32,
    /// Whether the client was told that there will be an end.
    is_told: bool,
    ending: Option<Ending>,
    /// What is on its way instead of a reset, and how much of it was sent.
    answer: Vec<u8>,
    answered: usize,
    /// Whether a response of ours needs no word on the size of the compression table before it.
    may_answer: bool,
    watch: Rc<Watch>,
}

impl<S> Guarded<S> {
    /// A connection that may have `streams` open at once.
    pub(crate) fn new(stream: S, streams: u32) -> (Self, Rc<Watch>) {
        let watch = Rc::new(Watch {
            reason: Cell::default(),
            is_over: Notify::default(),
            breaches: RefCell::new(Breaches::new(now())),
            is_old: Cell::default(),
            renewed: Notify::default(),
            received: Cell::default(),
            pending: Cell::default(),
            begun: Notify::default(),
            kept_back: Cell::default(),
            unseen: RefCell::default(),
            refused: Cell::default(),
            refusal: Notify::default(),
        });
        let guarded = Self {
            stream,
            budget: Budget::new(now()),
            received: Frames::behind(PREFACE_BYTES),
            sent: Frames::behind(0),
            count: 0,
            section: None,
            in_data: false,
            highest: 0,
            kept_back_limit: streams.saturating_add(REFUSED_LIMIT),
            is_told: false,
            ending: None,
            answer: Vec::new(),
            answered: 0,
            may_answer: true,
            watch: watch.clone(),
        };
        (guarded, watch)
    }

    /// Looks at what came.
    ///
    /// # Errors
    /// Why the connection must end.
    fn receive(&mut self, bytes: &[u8]) -> Result<(), Reason> {
        let Self { budget, received, count, section, in_data, highest, watch, may_answer, .. } =
            self;
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
                watch.unseen.borrow_mut().push_back(frame.stream);
                watch.kept_back.set(watch.kept_back.get().saturating_add(1));
            }
            budget.receive(frame);
        });
        checked?;
        self.follow();
        let refused_few = self.watch.kept_back.get() <= self.kept_back_limit;
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
        if self.watch.pending.replace(pending) != pending && pending != 0 {
            self.watch.begun.notify_one();
        }
    }
}

impl<S: AsyncWrite + Unpin> Guarded<S> {
    /// The first reset in what the library writes that is to be replaced.
    fn refusal(&self, bytes: &[u8]) -> Option<Refusal> {
        let unseen = self.watch.unseen.borrow();
        if unseen.is_empty() || self.sent.have > 0 {
            return None;
        }
        Refusal::find(bytes, self.sent.left as usize, |stream| unseen.contains(&stream))
    }

    /// Sends what replaces `reset`.
    fn poll_answer(
        &mut self,
        cx: &mut Context<'_>,
        refusal: Refusal,
        reset: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.answer.is_empty() {
            // Otherwise the client would want a word on the size of the compression table first.
            self.answer = if self.may_answer { refusal.answer() } else { reset.to_vec() };
            self.answered = 0;
        }
        while let Some(rest) = self.answer.get(self.answered..).filter(|rest| !rest.is_empty()) {
            let sent = ready!(Pin::new(&mut self.stream).poll_write(cx, rest))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.answered += sent;
        }
        self.answer.clear();
        self.watch.note_refused(refusal.stream);
        Poll::Ready(Ok(reset.len()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.watch.reason.get().is_some() {
            // Whoever was told ends it.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        if this.is_told && this.ending.is_none() && this.received.have == 0 {
            // What has begun was given to the library, and goes on to it.
            this.ending = Some(Ending::new(this.received.left, this.highest));
        }
        let polled = match &mut this.ending {
            Some(ending) => ending.poll_read(&mut this.stream, cx, buf),
            None => Pin::new(&mut this.stream).poll_read(cx, buf),
        };
        let came = buf.filled().get(before..).unwrap_or_default();
        if came.is_empty() {
            return polled;
        }
        this.watch.received.set(this.watch.received.get().wrapping_add(1));
        if let Err(reason) = this.receive(came) {
            this.watch.end(reason);
            return Poll::Pending;
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = match this.refusal(buf) {
            Some(refusal) if refusal.offset == 0 => {
                let reset = buf.get(..Refusal::BYTES).unwrap_or_default();
                this.poll_answer(cx, refusal, reset)
            }
            Some(Refusal { offset, .. }) => {
                let before = buf.get(..offset).unwrap_or_default();
                Pin::new(&mut this.stream).poll_write(cx, before)
            }
            None => Pin::new(&mut this.stream).poll_write(cx, buf),
        };
        if let Poll::Ready(Ok(sent)) = polled {
            let Self { sent: frames, budget, is_told, watch, .. } = this;
            frames.see(buf.get(..sent).unwrap_or_default(), |frame, payload| {
                budget.send(frame);
                *is_told |= frame.kind == GOAWAY;
                if frame.punishes(payload) {
                    watch.breach(now());
                    // One that the library refused is no longer kept back.
                    watch.given();
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
