//! A connection of HTTP/2 whose frames are looked at on their way to the library and from it: what it
//! lets pass and must not, and what it takes amiss and should not.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use super::h2_budget::Budget;
use super::h2_frames::{
    ACK, DATA, FrameHeader, Frames, GOAWAY, HEADER_BYTES, HEADERS, PING, PREFACE_BYTES, RST_STREAM,
    WINDOW_UPDATE,
};
use crate::worker::now;

/// The stream that a GOAWAY names when it only announces the end (RFC 9113, section 6.8).
const LAST_STREAM: u32 = 0x7fff_ffff;

/// How many requests the library may refuse by itself, for their size or form: each was decoded, and is
/// thrown away.
const REFUSED_LIMIT: u32 = 64;

/// What is seen of a connection from outside.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// Why the connection must end.
    reason: Cell<Option<Reason>>,
    is_over: Notify,
    received: Cell<u32>,
    /// The number of the frame or field section that has begun and not ended; 0 when there is none.
    pending: Cell<u32>,
    begun: Notify,
    /// How many streams came, and were not given to us yet. Those that the library refuses by itself
    /// never are.
    kept_back: Cell<u32>,
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

    /// How often anything came, a PING too.
    pub(crate) fn received(&self) -> u32 {
        self.received.get()
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
    /// The last stream that is served, once it was told that there is one; then what is said of later ones
    /// is left out.
    last_stream: Option<u32>,
    leaving_out: Option<LeavingOut>,
    watch: Rc<Watch>,
}

impl<S> Guarded<S> {
    /// A connection that may have `streams` open at once.
    pub(crate) fn new(stream: S, streams: u32) -> (Self, Rc<Watch>) {
        let watch = Rc::<Watch>::default();
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
            last_stream: None,
            leaving_out: None,
            watch: watch.clone(),
        };
        (guarded, watch)
    }

    /// Looks at what came.
    ///
    /// # Errors
    /// Why the connection must end.
    fn receive(&mut self, bytes: &[u8]) -> Result<(), Reason> {
        let Self { budget, received, count, section, in_data, highest, watch, .. } = self;
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
            if frame.kind == HEADERS && frame.stream > *highest {
                *highest = frame.stream;
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

/// Leaves out what the library takes amiss while it ends a connection: a client may well reset a
/// stream, or open its window, before it knows that the stream came too late, and the library then
/// calls it a breach of protocol and ends the others with it.
#[derive(Debug, Default)]
struct LeavingOut {
    /// The bytes of a frame's header that came so far.
    header: Vec<u8>,
    /// How many bytes of a payload are passed on, or left out.
    passing: u32,
    leaving: u32,
    /// The highest stream so far.
    highest: u32,
    /// What is to be passed on and had no place yet.
    kept: Vec<u8>,
}

impl LeavingOut {
    /// Gives what is left of `bytes`. Which stream is the last, the library decides when the client has
    /// answered its PING, and tells it only after whatever came behind that: so it is decided here too.
    fn filter(&mut self, mut bytes: &[u8], last_stream: &mut u32) -> Vec<u8> {
        let mut kept = Vec::with_capacity(bytes.len() + HEADER_BYTES);
        let take = |bytes: &mut &[u8], count: usize| {
            let (head, rest) = bytes.split_at(count.min(bytes.len()));
            *bytes = rest;
            head.to_vec()
        };
        while !bytes.is_empty() {
            if self.passing > 0 {
                let passed = take(&mut bytes, self.passing as usize);
                self.passing -= u32::try_from(passed.len()).unwrap_or(self.passing);
                kept.extend(passed);
            } else if self.leaving > 0 {
                let left = take(&mut bytes, self.leaving as usize);
                self.leaving -= u32::try_from(left.len()).unwrap_or(self.leaving);
            } else {
                let part = take(&mut bytes, HEADER_BYTES - self.header.len());
                self.header.extend(part);
                let Ok(header) = <[u8; HEADER_BYTES]>::try_from(self.header.as_slice()) else {
                    break;
                };
                self.header.clear();
                let frame = FrameHeader::read(header);
                if frame.kind == HEADERS {
                    self.highest = self.highest.max(frame.stream);
                }
                if frame.kind == PING && frame.flags & ACK != 0 {
                    *last_stream = self.highest.min(*last_stream);
                }
                let is_late = frame.stream > *last_stream;
                if is_late && matches!(frame.kind, RST_STREAM | WINDOW_UPDATE) {
                    self.leaving = frame.length;
                } else {
                    self.passing = frame.length;
                    kept.extend_from_slice(&header);
                }
            }
        }
        kept
    }
}

/// Reads once more, and leaves out what must not reach the library. Only while a connection ends.
fn poll_filtered<S: AsyncRead + Unpin>(
    stream: &mut S,
    leaving_out: &mut LeavingOut,
    last_stream: &mut u32,
    cx: &mut Context<'_>,
    buf: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    loop {
        let kept = &mut leaving_out.kept;
        if !kept.is_empty() {
            let fits = kept.len().min(buf.remaining());
            buf.put_slice(kept.drain(..fits).as_slice());
            return Poll::Ready(Ok(()));
        }
        let mut bytes = [0; 4096];
        let mut part = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut part))?;
        if part.filled().is_empty() {
            return Poll::Ready(Ok(()));
        }
        leaving_out.kept = leaving_out.filter(part.filled(), last_stream);
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
        if this.last_stream.is_some() && this.leaving_out.is_none() && this.received.have == 0 {
            // What has begun was given to the library, and goes on to it.
            let (passing, highest) = (this.received.left, this.highest);
            this.leaving_out = Some(LeavingOut { passing, highest, ..LeavingOut::default() });
        }
        let polled = match (&mut this.last_stream, &mut this.leaving_out) {
            (Some(last), Some(leaving_out)) => {
                poll_filtered(&mut this.stream, leaving_out, last, cx, buf)
            }
            _ => Pin::new(&mut this.stream).poll_read(cx, buf),
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
        let polled = Pin::new(&mut this.stream).poll_write(cx, buf);
        if let Poll::Ready(Ok(sent)) = polled {
            let Self { sent: frames, budget, last_stream, .. } = this;
            frames.see(buf.get(..sent).unwrap_or_default(), |frame, payload| {
                budget.send(frame);
                if frame.kind == GOAWAY
                    && let Some((last, _)) = payload.split_first_chunk()
                {
                    let last = u32::from_be_bytes(*last) & LAST_STREAM;
                    *last_stream = Some(last_stream.unwrap_or(LAST_STREAM).min(last));
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

    fn frame(kind: u8, stream: u32, payload: usize) -> Vec<u8> {
        let [_, high, middle, low] = u32::try_from(payload).expect("short").to_be_bytes();
        let header = [&[high, middle, low, kind, 0][..], &stream.to_be_bytes()].concat();
        [header, vec![kind; payload]].concat()
    }

    #[test]
    fn what_is_said_of_streams_that_came_too_late_is_left_out() {
        let all = [
            frame(RST_STREAM, 5, 4),
            frame(RST_STREAM, 7, 4),
            frame(DATA, 7, 20),
            frame(WINDOW_UPDATE, 9, 4),
            frame(WINDOW_UPDATE, 0, 4),
            frame(1, 7, 3),
        ];
        let kept = [&all[0][..], &all[2], &all[4], &all[5]].concat();
        let all = all.concat();
        for size in 1..=all.len() {
            let mut leaving_out = LeavingOut::default();
            let got: Vec<u8> =
                all.chunks(size).flat_map(|part| leaving_out.filter(part, &mut 5)).collect();
            assert_eq!(got, kept, "in parts of {size}");
        }
    }

    #[test]
    fn which_stream_is_the_last_is_decided_by_the_answer_to_the_ping() {
        let mut answer = frame(PING, 0, 8);
        answer[4] = ACK;
        let all = [
            frame(HEADERS, 3, 5),
            frame(WINDOW_UPDATE, 3, 4),
            answer,
            frame(HEADERS, 5, 5),
            frame(WINDOW_UPDATE, 5, 4),
            frame(WINDOW_UPDATE, 3, 4),
        ];
        let kept = [&all[0][..], &all[1], &all[2], &all[3], &all[5]].concat();
        let all = all.concat();
        for size in 1..=all.len() {
            let (mut leaving_out, mut last) = (LeavingOut::default(), LAST_STREAM);
            let got: Vec<u8> =
                all.chunks(size).flat_map(|part| leaving_out.filter(part, &mut last)).collect();
            assert_eq!((got, last), (kept.clone(), 3), "in parts of {size}");
        }
    }
}
