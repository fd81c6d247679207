//! How a connection of HTTP/2 is ended so that no call on it is lost (RFC 9113, section 6.8).
//!
//! The client is told that there will be an end, and a PING; when it has answered that, the library decides
//! which stream was the last, and serves no later one. Two things are done here for it, between the client
//! and the library, from the moment that the client is told:
//!
//! - The answer to the PING is passed on a moment later. A client may answer at once and send requests
//!   behind it that it had in hand before it was told: those are served, and not sent back.
//! - What is said of streams that came too late all the same is left out. A client may well reset one, or
//!   open its window, before it knows; the library calls it a breach of protocol and ends the others with it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::Sleep;

use super::h2_frames::{ACK, FrameHeader, HEADER_BYTES, HEADERS, PING, RST_STREAM, WINDOW_UPDATE};

/// No stream is the last yet (RFC 9113, section 6.8).
pub(super) const NO_LAST_STREAM: u32 = 0x7fff_ffff;
/// How long the answer to the PING waits for requests that the client had in hand.
const MOMENT: Duration = Duration::from_millis(100);

/// The end of a connection.
#[derive(Debug)]
pub(super) struct GracefulShutdown {
    /// The bytes of a frame's header that came so far.
    header: Vec<u8>,
    /// How many bytes of a payload are still passed on, left out, or held.
    passing: u32,
    leaving: u32,
    holding: u32,
    /// The answer to the PING; empty once it was passed on.
    answer: Vec<u8>,
    moment: Option<Pin<Box<Sleep>>>,
    /// The highest stream so far, and the last that is served.
    highest: u32,
    last: u32,
    /// What is to be passed on and had no place yet.
    kept: Vec<u8>,
}

impl GracefulShutdown {
    /// The end of a connection on which `passing` bytes more of a payload are the library's already.
    pub(super) fn new(passing: u32, highest: u32) -> Self {
        Self {
            header: Vec::new(),
            passing,
            leaving: 0,
            holding: 0,
            answer: Vec::new(),
            moment: None,
            highest,
            last: NO_LAST_STREAM,
            kept: Vec::new(),
        }
    }

    /// Reads from the client what the library is to see.
    pub(super) fn poll_read<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if !self.kept.is_empty() {
                let fits = self.kept.len().min(buf.remaining());
                buf.put_slice(self.kept.drain(..fits).as_slice());
                return Poll::Ready(Ok(()));
            }
            if let Some(moment) = &mut self.moment
                && moment.as_mut().poll(cx).is_ready()
                && self.is_between_frames()
            {
                self.decide();
                continue;
            }
            let mut bytes = [0; 4096];
            let mut part = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut *stream).poll_read(cx, &mut part))?;
            if part.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.sort(part.filled());
            if self.moment.is_none() && !self.answer.is_empty() && self.holding == 0 {
                self.moment = Some(Box::pin(tokio::time::sleep(MOMENT)));
            }
        }
    }

    fn is_between_frames(&self) -> bool {
        self.header.is_empty() && self.passing + self.leaving + self.holding == 0
    }

    /// Passes the answer on, by which the library decides the same.
    fn decide(&mut self) {
        self.last = self.highest;
        self.moment = None;
        self.kept.append(&mut self.answer);
    }

    /// Keeps of `bytes` what is to be passed on.
    fn sort(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (left, to) = if self.passing > 0 {
                (&mut self.passing, Some(&mut self.kept))
            } else if self.holding > 0 {
                (&mut self.holding, Some(&mut self.answer))
            } else if self.leaving > 0 {
                (&mut self.leaving, None)
            } else {
                let (part, rest) =
                    bytes.split_at(bytes.len().min(HEADER_BYTES - self.header.len()));
                bytes = rest;
                self.header.extend(part);
                if let Ok(header) = <[u8; HEADER_BYTES]>::try_from(self.header.as_slice()) {
                    self.header.clear();
                    self.begin(header);
                }
                continue;
            };
            let count = bytes.len().min(*left as usize);
            let (part, rest) = bytes.split_at(count);
            bytes = rest;
            *left -= u32::try_from(count).unwrap_or(*left);
            if let Some(to) = to {
                to.extend(part);
            }
        }
    }

    /// Decides what becomes of a frame.
    fn begin(&mut self, header: [u8; HEADER_BYTES]) {
        let frame = FrameHeader::read(header);
        if frame.kind == HEADERS {
            self.highest = self.highest.max(frame.stream);
        }
        // There is one PING of ours on its way, and only before the last stream is known.
        let is_answer = frame.kind == PING && frame.flags & ACK != 0;
        if is_answer && self.last == NO_LAST_STREAM && self.answer.is_empty() {
            self.answer.extend(header);
            self.holding = frame.length;
        } else if frame.stream > self.last && matches!(frame.kind, RST_STREAM | WINDOW_UPDATE) {
            self.leaving = frame.length;
        } else {
            self.kept.extend(header);
            self.passing = frame.length;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: usize) -> Vec<u8> {
        let [_, high, middle, low] = u32::try_from(payload).expect("short").to_be_bytes();
        let header = [&[high, middle, low, kind, flags][..], &stream.to_be_bytes()].concat();
        [header, vec![kind; payload]].concat()
    }

    /// What the library sees.
    struct Seen(GracefulShutdown, DuplexStream);

    impl AsyncRead for Seen {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let Self(ending, stream) = &mut *self;
            ending.poll_read(stream, cx, buf)
        }
    }

    /// What is seen of frames that come in parts of `size`, `room` bytes at a time, where the second part of
    /// them comes `late`.
    async fn seen(parts: [&[Vec<u8>]; 2], late: Duration, size: usize, room: usize) -> Vec<u8> {
        let (mut client, stream) = duplex(size);
        let (first, second) = (parts[0].concat(), parts[1].concat());
        let sending = tokio::spawn(async move {
            client.write_all(&first).await.expect("it is read");
            tokio::time::sleep(late).await;
            client.write_all(&second).await.expect("it is read");
            tokio::time::sleep(MOMENT * 2).await;
        });
        let mut library = Seen(GracefulShutdown::new(0, 0), stream);
        let (mut all, mut buffer) = (Vec::new(), vec![0; room]);
        while let Ok(more @ 1..) = library.read(&mut buffer).await {
            all.extend_from_slice(&buffer[..more]);
        }
        sending.await.expect("it has sent all");
        all
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_in_time_is_served_and_what_is_said_of_later_streams_left_out() {
        const DATA: u8 = 0;
        let answer = frame(PING, ACK, 0, 8);
        let before = [
            frame(HEADERS, 4, 3, 5),
            answer.clone(),
            frame(HEADERS, 4, 5, 5),
            frame(WINDOW_UPDATE, 0, 5, 4),
            frame(DATA, 0, 5, 20),
        ];
        let behind = [
            frame(RST_STREAM, 0, 7, 4),
            frame(WINDOW_UPDATE, 0, 5, 4),
            frame(WINDOW_UPDATE, 0, 9, 4),
            frame(DATA, 0, 7, 20),
            frame(HEADERS, 4, 7, 3),
            frame(WINDOW_UPDATE, 0, 0, 4),
            frame(PING, ACK, 0, 8),
        ];
        let wanted = [
            &before[0], &before[2], &before[3], &before[4], &answer, &behind[1], &behind[3],
            &behind[4], &behind[5], &behind[6],
        ];
        let wanted: Vec<u8> = wanted.into_iter().flatten().copied().collect();
        for size in 1..40 {
            for room in [1, 7, 4096] {
                let got = seen([&before, &behind], MOMENT * 2, size, room).await;
                assert_eq!(got, wanted, "in parts of {size}, {room} at a time");
            }
        }
    }
}
