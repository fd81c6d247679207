//! How many frames that carry nothing an HTTP/2 connection may send.
//!
//! Each PING, SETTINGS, PRIORITY, WINDOW_UPDATE, RST_STREAM or unknown frame costs work, and the library
//! answers them without end (RFC 9113, section 10.5). They are counted here, on their way to it: a
//! connection has so many, gains some with time, with each request, and with what is sent to it, which a
//! client must acknowledge. One that has none left is ended with `ENHANCE_YOUR_CALM`.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use crate::worker::now;

/// What a connection has at first, and at most.
const MOST: u32 = 10_000;
/// What it gains in a second.
const PER_SECOND: u64 = 1_000;
/// What it gains by a request: a priority, updates of windows, a reset.
const PER_REQUEST: u32 = 20;
/// What it gains by each piece sent to it: an update of each window, and one to spare.
const PER_PIECE_SENT: u32 = 3;

const FRAME_HEADER_BYTES: usize = 9;
const PREFACE_BYTES: u32 = 24;
const DATA: u8 = 0;
const HEADERS: u8 = 1;

/// Sees frames in the bytes of one direction (RFC 9113, section 4.1).
#[derive(Debug)]
struct Frames {
    /// The bytes of the frame's payload that are still to come, or of what stands before the first.
    left: u32,
    header: [u8; FRAME_HEADER_BYTES],
    /// How many of them have come.
    have: usize,
}

impl Frames {
    fn behind(preface: u32) -> Self {
        Self { left: preface, header: [0; FRAME_HEADER_BYTES], have: 0 }
    }

    /// Goes through bytes; gives the kind of each frame whose header is whole, and whether it has a
    /// payload.
    fn see(&mut self, mut bytes: &[u8], mut each: impl FnMut(u8, bool)) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let skipped = bytes.len().min(self.left as usize);
                bytes = bytes.get(skipped..).unwrap_or_default();
                self.left -= u32::try_from(skipped).unwrap_or(self.left);
                continue;
            }
            let header = match bytes.split_first_chunk() {
                // As it nearly always is, all of it has come at once.
                Some((header, rest)) if self.have == 0 => {
                    bytes = rest;
                    *header
                }
                _ => {
                    let room = self.header.iter_mut().skip(self.have);
                    let came = room.zip(bytes).map(|(place, byte)| *place = *byte).count();
                    bytes = bytes.get(came..).unwrap_or_default();
                    self.have += came;
                    if self.have < FRAME_HEADER_BYTES {
                        return;
                    }
                    self.have = 0;
                    self.header
                }
            };
            let [high, middle, low, kind, ..]: [u8; FRAME_HEADER_BYTES] = header;
            self.left = u32::from_be_bytes([0, high, middle, low]);
            each(kind, self.left > 0);
        }
    }
}

/// What a connection has left.
#[derive(Debug)]
struct Budget {
    received: Frames,
    sent: Frames,
    left: u32,
    /// When it last gained by time.
    gained: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        let (received, sent) = (Frames::behind(PREFACE_BYTES), Frames::behind(0));
        Self { received, sent, left: MOST, gained: now }
    }

    fn send(&mut self, bytes: &[u8]) {
        let left = &mut self.left;
        self.sent.see(bytes, |kind, has_payload| {
            if kind == DATA && has_payload {
                *left = MOST.min(*left + PER_PIECE_SENT);
            }
        });
    }

    /// Whether the connection may go on after it sent these bytes. The clock is asked only when nothing
    /// is left.
    fn receive(&mut self, bytes: &[u8], now: impl FnOnce() -> Instant) -> bool {
        let (left, mut lacking) = (&mut self.left, 0u32);
        self.received.see(bytes, |kind, has_payload| match kind {
            DATA if has_payload => {}
            HEADERS => *left = MOST.min(*left + PER_REQUEST),
            _ => match left.checked_sub(1) {
                Some(less) => *left = less,
                None => lacking += 1,
            },
        });
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

/// What is seen of a connection from outside.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    is_exhausted: Cell<bool>,
    notify: Notify,
    received: Cell<u32>,
}

impl Watch {
    /// Resolves when the connection has sent too much.
    pub(crate) async fn exhausted(&self) {
        if !self.is_exhausted.get() {
            self.notify.notified().await;
        }
    }

    /// How often anything came, a PING too.
    pub(crate) fn received(&self) -> u32 {
        self.received.get()
    }
}

/// A connection whose frames are counted. When there are too many, nothing more is read from it.
#[derive(Debug)]
pub(crate) struct Counted<S> {
    stream: S,
    budget: Budget,
    watch: Rc<Watch>,
}

impl<S> Counted<S> {
    pub(crate) fn new(stream: S) -> (Self, Rc<Watch>) {
        let watch = Rc::<Watch>::default();
        let budget = Budget::new(now());
        (Self { stream, budget, watch: watch.clone() }, watch)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.watch.is_exhausted.get() {
            // Whoever was told ends it.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        let came = buf.filled().get(before..).unwrap_or_default();
        if came.is_empty() {
            return polled;
        }
        this.watch.received.set(this.watch.received.get().wrapping_add(1));
        if !this.budget.receive(came, now) {
            this.watch.is_exhausted.set(true);
            this.watch.notify.notify_one();
            return Poll::Pending;
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_write(cx, buf);
        if let Poll::Ready(Ok(sent)) = polled {
            this.budget.send(buf.get(..sent).unwrap_or_default());
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
    use std::time::Duration;

    use super::*;

    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;

    #[allow(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn start() -> Instant {
        Instant::now()
    }

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let [_, high, middle, low] = u32::try_from(payload).expect("short").to_be_bytes();
        [&[high, middle, low, kind, 0, 0, 0, 0, 1][..], &vec![kind; payload]].concat()
    }

    /// A connection behind its preface, whose first bytes look like a frame.
    fn begun(now: Instant) -> Budget {
        let mut budget = Budget::new(now);
        assert!(budget.receive(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", || now));
        assert_eq!(budget.left, MOST);
        budget
    }

    #[test]
    fn frames_are_seen_however_the_bytes_come() {
        let all = [frame(DATA, 300), frame(PING, 8), frame(DATA, 0), frame(HEADERS, 1)].concat();
        let wanted = [(DATA, true), (PING, true), (DATA, false), (HEADERS, true)];
        for size in 1..all.len() {
            let (mut frames, mut seen) = (Frames::behind(0), Vec::new());
            for part in all.chunks(size) {
                frames.see(part, |kind, has_payload| seen.push((kind, has_payload)));
            }
            assert_eq!(seen, wanted, "in parts of {size}");
        }
    }

    #[test]
    fn a_flood_has_an_end_and_comes_again_with_time() {
        let now = start();
        let mut budget = begun(now);
        let ping = frame(PING, 8);
        let count = (0..).take_while(|_| budget.receive(&ping, || now)).count();
        assert_eq!(count, MOST as usize);
        let later = now + Duration::from_millis(100);
        assert!(budget.receive(&ping, || later), "some have been gained");
        let count = (0..).take_while(|_| budget.receive(&ping, || later)).count();
        assert_eq!(count, 99);
    }

    #[test]
    fn who_is_served_may_acknowledge_it() {
        let now = start();
        let mut budget = begun(now);
        for _ in 0..100_000 {
            budget.send(&frame(DATA, 1));
            let updates = [frame(WINDOW_UPDATE, 4), frame(WINDOW_UPDATE, 4)].concat();
            assert!(budget.receive(&updates, || now));
        }
        for _ in 0..100_000 {
            let request = [frame(HEADERS, 10), frame(WINDOW_UPDATE, 4), frame(3, 4)].concat();
            assert!(budget.receive(&request, || now));
        }
        // Our answers to a flood are no service.
        let answered = (0..MOST + 1).all(|_| {
            budget.send(&frame(PING, 8));
            budget.receive(&frame(PING, 8), || now)
        });
        assert!(!answered);
    }
}
