//! Shuts an HTTP/2 client connection down without losing requests (RFC 9113, section 6.8).
//!
//! The h2 crate sends a GOAWAY that announces the shutdown, and a PING. When the client has acknowledged the PING, the
//! h2 crate chooses the last stream that is served and ignores later ones. From the first GOAWAY on, this filter
//! changes what the h2 crate receives from the client:
//!
//! - The PING acknowledgement is delayed by [`ACK_DELAY`]. A client may acknowledge at once and send requests behind it
//!   that it prepared before it received the GOAWAY. These requests are served too.
//! - RST_STREAM and WINDOW_UPDATE frames of streams after the last one are dropped. A client may send them before it
//!   receives the second GOAWAY; the h2 crate would treat them as a protocol violation and close all other streams.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::Sleep;

use super::h2_frames::{ACK, FrameHeader, HEADER_BYTES, HEADERS, PING, RST_STREAM, WINDOW_UPDATE};

/// The last stream in the first GOAWAY: the last stream is not chosen yet (RFC 9113, section 6.8).
pub(super) const NO_LAST_STREAM: u32 = 0x7fff_ffff;
/// How long the PING acknowledgement is held back, for requests that the client has already prepared.
const ACK_DELAY: Duration = Duration::from_millis(100);

/// The filter for the bytes that a client sends during a graceful shutdown.
#[derive(Debug)]
pub(super) struct GracefulShutdown {
    /// The bytes of a partial frame header.
    header: Vec<u8>,
    /// How many bytes of the current payload are still to be forwarded, dropped or held back. At most one is not 0.
    forwarding: u32,
    dropping: u32,
    holding: u32,
    /// The PING acknowledgement; empty once it was forwarded.
    acknowledgement: Vec<u8>,
    delay: Option<Pin<Box<Sleep>>>,
    /// The highest stream so far.
    highest: u32,
    /// The last stream that is served, or [`NO_LAST_STREAM`].
    last: u32,
    /// Bytes to be forwarded that did not fit into the reader's buffer.
    pending: Vec<u8>,
}

impl GracefulShutdown {
    /// A filter for a connection of whose current payload `forwarding` bytes are still to be received.
    pub(super) fn new(forwarding: u32, highest: u32) -> Self {
        Self {
            header: Vec::new(),
            forwarding,
            dropping: 0,
            holding: 0,
            acknowledgement: Vec::new(),
            delay: None,
            highest,
            last: NO_LAST_STREAM,
            pending: Vec::new(),
        }
    }

    /// Reads from the client the bytes that the h2 crate receives.
    pub(super) fn poll_read<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if !self.pending.is_empty() {
                let fits = self.pending.len().min(buf.remaining());
                buf.put_slice(self.pending.drain(..fits).as_slice());
                return Poll::Ready(Ok(()));
            }
            if let Some(delay) = &mut self.delay
                && delay.as_mut().poll(cx).is_ready()
                && self.is_between_frames()
            {
                self.forward_acknowledgement();
                continue;
            }
            let mut bytes = [0; 4096];
            let mut part = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut *stream).poll_read(cx, &mut part))?;
            if part.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.filter(part.filled());
            if self.delay.is_none() && !self.acknowledgement.is_empty() && self.holding == 0 {
                self.delay = Some(Box::pin(tokio::time::sleep(ACK_DELAY)));
            }
        }
    }

    fn is_between_frames(&self) -> bool {
        self.header.is_empty() && self.forwarding + self.dropping + self.holding == 0
    }

    /// Forwards the acknowledgement. The h2 crate then chooses the same last stream.
    fn forward_acknowledgement(&mut self) {
        self.last = self.highest;
        self.delay = None;
        self.pending.append(&mut self.acknowledgement);
    }

    /// Moves the bytes that are to be forwarded to `pending`.
    fn filter(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (remaining, destination) = if self.forwarding > 0 {
                (&mut self.forwarding, Some(&mut self.pending))
            } else if self.holding > 0 {
                (&mut self.holding, Some(&mut self.acknowledgement))
            } else if self.dropping > 0 {
                (&mut self.dropping, None)
            } else {
                let (part, rest) =
                    bytes.split_at(bytes.len().min(HEADER_BYTES - self.header.len()));
                bytes = rest;
                self.header.extend(part);
                if let Ok(header) = <[u8; HEADER_BYTES]>::try_from(self.header.as_slice()) {
                    self.header.clear();
                    self.begin_frame(header);
                }
                continue;
            };
            let count = bytes.len().min(*remaining as usize);
            let (part, rest) = bytes.split_at(count);
            bytes = rest;
            *remaining -= u32::try_from(count).unwrap_or(*remaining);
            if let Some(destination) = destination {
                destination.extend(part);
            }
        }
    }

    /// Decides whether a frame is forwarded, dropped or held back.
    fn begin_frame(&mut self, header: [u8; HEADER_BYTES]) {
        let frame = FrameHeader::read(header);
        if frame.kind == HEADERS {
            self.highest = self.highest.max(frame.stream);
        }
        // Our PING is the only one in flight before the last stream is chosen.
        let is_acknowledgement = frame.kind == PING && frame.flags & ACK != 0;
        if is_acknowledgement && self.last == NO_LAST_STREAM && self.acknowledgement.is_empty() {
            self.acknowledgement.extend(header);
            self.holding = frame.length;
        } else if frame.stream > self.last && matches!(frame.kind, RST_STREAM | WINDOW_UPDATE) {
            self.dropping = frame.length;
        } else {
            self.pending.extend(header);
            self.forwarding = frame.length;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: usize) -> Vec<u8> {
        let [_, high, middle, low] = u32::try_from(payload).expect("a short payload").to_be_bytes();
        let header = [&[high, middle, low, kind, flags][..], &stream.to_be_bytes()].concat();
        [header, vec![kind; payload]].concat()
    }

    /// A client connection behind the filter.
    struct FilteredStream(GracefulShutdown, DuplexStream);

    impl AsyncRead for FilteredStream {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let Self(ending, stream) = &mut *self;
            ending.poll_read(stream, cx, buf)
        }
    }

    /// What the h2 crate receives, read `room` bytes at a time, when frames arrive in pieces of `size` bytes and the
    /// second part of them arrives after `late`.
    async fn received(parts: [&[Vec<u8>]; 2], late: Duration, size: usize, room: usize) -> Vec<u8> {
        let (mut client, stream) = duplex(size);
        let first = parts[0].concat();
        let second = parts[1].concat();
        let sending = tokio::spawn(async move {
            client.write_all(&first).await.expect("the filter reads");
            tokio::time::sleep(late).await;
            client.write_all(&second).await.expect("the filter reads");
            tokio::time::sleep(ACK_DELAY * 2).await;
        });
        let mut h2 = FilteredStream(GracefulShutdown::new(0, 0), stream);
        let mut all = Vec::new();
        let mut buffer = vec![0; room];
        while let Ok(read @ 1..) = h2.read(&mut buffer).await {
            all.extend_from_slice(&buffer[..read]);
        }
        sending.await.expect("the client task ends");
        all
    }

    #[tokio::test(start_paused = true)]
    async fn requests_before_the_acknowledgement_are_served_and_frames_of_later_streams_dropped() {
        const DATA: u8 = 0;
        let acknowledgement = frame(PING, ACK, 0, 8);
        let before = [
            frame(HEADERS, 4, 3, 5),
            acknowledgement.clone(),
            frame(HEADERS, 4, 5, 5),
            frame(WINDOW_UPDATE, 0, 5, 4),
            frame(DATA, 0, 5, 20),
        ];
        let after = [
            frame(RST_STREAM, 0, 7, 4),
            frame(WINDOW_UPDATE, 0, 5, 4),
            frame(WINDOW_UPDATE, 0, 9, 4),
            frame(DATA, 0, 7, 20),
            frame(HEADERS, 4, 7, 3),
            frame(WINDOW_UPDATE, 0, 0, 4),
            frame(PING, ACK, 0, 8),
        ];
        let wanted = [
            &before[0],
            &before[2],
            &before[3],
            &before[4],
            &acknowledgement,
            &after[1],
            &after[3],
            &after[4],
            &after[5],
            &after[6],
        ];
        let wanted: Vec<u8> = wanted.into_iter().flatten().copied().collect();
        for size in 1..40 {
            for room in [1, 7, 4096] {
                let actual = received([&before, &after], ACK_DELAY * 2, size, room).await;
                assert_eq!(actual, wanted, "in parts of {size}, {room} at a time");
            }
        }
    }
}
