//! Reads and writes HTTP/1.1 message bodies, and the bytes after an upgrade.

use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::FutureExt;
use http::HeaderMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::chunked::{ChunkedDecoder, ChunkedStep};
use super::framing::BodyFraming;
use crate::buffers;
use crate::http::body_error::BodyError;
use crate::stream::StreamHalf;

/// How many bytes are read at once.
const READ_BYTES: usize = 16 * 1024;
/// How many bytes are buffered before they are written without waiting for more.
const WRITE_BYTES: usize = 64 * 1024;

/// The reading half of a connection, with the bytes that were read and not yet consumed.
#[derive(Debug)]
pub(crate) struct Http1Reader {
    pub(crate) half: StreamHalf,
    pub(crate) buffer: BytesMut,
    /// Whether reading the last body stopped before its end, so that the rest of it may still be received.
    pub(crate) has_unread_body: bool,
}

impl Http1Reader {
    pub(crate) fn new(half: StreamHalf) -> Self {
        Self { half, buffer: BytesMut::new(), has_unread_body: false }
    }

    /// Reserves space to read into.
    pub(crate) fn reserve(&mut self, bytes: usize) {
        if self.buffer.capacity() == 0 {
            self.buffer = buffers::take();
        }
        self.buffer.reserve(bytes);
    }

    /// Returns the buffer to the pool when it is empty.
    pub(crate) fn release_buffer(&mut self) {
        if self.buffer.is_empty() {
            buffers::give_back(&mut self.buffer);
        }
    }
}

/// The writing half of a connection, with the bytes that were not yet written.
#[derive(Debug)]
pub(crate) struct Http1Writer {
    pub(crate) half: StreamHalf,
    pub(crate) out: BytesMut,
    /// How long the peer may accept no bytes while some wait to be written.
    pub(crate) stall: Duration,
}

impl Http1Writer {
    pub(crate) fn new(half: StreamHalf, stall: Duration) -> Self {
        Self { half, out: BytesMut::new(), stall }
    }

    /// The output buffer.
    pub(crate) fn output(&mut self) -> &mut BytesMut {
        if self.out.capacity() == 0 {
            self.out = buffers::take();
        }
        &mut self.out
    }

    /// Writes the output buffer.
    ///
    /// # Errors
    /// `TimedOut` when the peer accepted no bytes for the stall timeout, and other errors of the connection.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            let writing = self.half.write(&self.out);
            // The socket usually accepts all bytes at once, so a timer is only made when it does not.
            let written = match writing.now_or_never() {
                Some(written) => written?,
                None => {
                    let writing = self.half.write(&self.out);
                    tokio::time::timeout(self.stall, writing).await.map_err(io::Error::from)??
                }
            };
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.out.advance(written);
        }
        // TLS may have buffered records that the socket has not accepted yet.
        match self.half.flush().now_or_never() {
            Some(flushed) => flushed,
            None => {
                let flushing = self.half.flush();
                tokio::time::timeout(self.stall, flushing).await.map_err(io::Error::from)?
            }
        }
    }

    /// Returns the output buffer to the pool when it is empty.
    pub(crate) fn release_buffer(&mut self) {
        if self.out.is_empty() {
            buffers::give_back(&mut self.out);
        }
    }
}

/// A body being read.
#[derive(Debug)]
pub(crate) struct BodyReader<'a> {
    reader: &'a mut Http1Reader,
    remaining: RemainingBody,
}

/// The part of a body that was not read yet.
#[derive(Debug)]
enum RemainingBody {
    Length(u64),
    Chunked(ChunkedDecoder),
    UntilClose,
    Done,
}

impl Drop for BodyReader<'_> {
    fn drop(&mut self) {
        let is_framed =
            matches!(self.remaining, RemainingBody::Length(_) | RemainingBody::Chunked(_));
        self.reader.has_unread_body = is_framed && !self.is_done();
    }
}

impl<'a> BodyReader<'a> {
    pub(crate) fn new(reader: &'a mut Http1Reader, framing: BodyFraming) -> Self {
        let remaining = match framing {
            BodyFraming::None | BodyFraming::Length(0) => RemainingBody::Done,
            BodyFraming::Length(length) => RemainingBody::Length(length),
            BodyFraming::Chunked => RemainingBody::Chunked(ChunkedDecoder::Size),
            BodyFraming::UntilClose => RemainingBody::UntilClose,
        };
        Self { reader, remaining }
    }

    /// Whether the whole body was read, so that the connection can be reused.
    pub(crate) fn is_done(&self) -> bool {
        matches!(
            self.remaining,
            RemainingBody::Done | RemainingBody::Chunked(ChunkedDecoder::Done(_))
        )
    }

    /// Whether the body can have trailers.
    pub(crate) fn may_have_trailers(&self) -> bool {
        matches!(self.remaining, RemainingBody::Chunked(_))
    }

    /// Switches to the bytes after an upgrade. None when some were received before the upgrade was accepted: they could
    /// be meant as another request.
    pub(crate) fn upgraded(mut self) -> Option<Self> {
        if !self.reader.buffer.is_empty() {
            return None;
        }
        self.remaining = RemainingBody::UntilClose;
        Some(self)
    }

    /// The trailers, once the body was read.
    pub(crate) fn take_trailers(&mut self) -> Option<HeaderMap> {
        match &mut self.remaining {
            RemainingBody::Chunked(ChunkedDecoder::Done(trailers)) => trailers.take(),
            _ => None,
        }
    }

    /// The next piece; none at the end. Cancel-safe.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        loop {
            let buffer = &mut self.reader.buffer;
            match &mut self.remaining {
                RemainingBody::Done => return Ok(None),
                RemainingBody::Chunked(decoder) => {
                    match decoder.step(buffer).map_err(BodyError::Malformed)? {
                        ChunkedStep::Piece(piece) => return Ok(Some(piece)),
                        ChunkedStep::End => return Ok(None),
                        ChunkedStep::NeedMore => {}
                    }
                }
                RemainingBody::Length(missing) if !buffer.is_empty() => {
                    let count = usize::try_from(*missing).unwrap_or(usize::MAX).min(buffer.len());
                    *missing -= count as u64;
                    let piece = buffer.split_to(count).freeze();
                    if *missing == 0 {
                        self.remaining = RemainingBody::Done;
                    }
                    return Ok(Some(piece));
                }
                RemainingBody::UntilClose if !buffer.is_empty() => {
                    return Ok(Some(buffer.split().freeze()));
                }
                RemainingBody::Length(_) | RemainingBody::UntilClose => {}
            }
            self.reader.reserve(READ_BYTES);
            match self.reader.half.read_buf(&mut self.reader.buffer).await {
                Ok(0) if matches!(self.remaining, RemainingBody::UntilClose) => {
                    self.remaining = RemainingBody::Done;
                    return Ok(None);
                }
                Ok(0) => {
                    return Err(BodyError::Malformed(
                        "connection closed before the end of the body",
                    ));
                }
                Ok(_) => {}
                Err(_) => return Err(BodyError::SourceClosed),
            }
        }
    }
}

/// A body being written.
#[derive(Debug)]
pub(crate) struct BodyWriter<'a> {
    pub(crate) writer: &'a mut Http1Writer,
    pub(crate) coding: BodyCoding,
}

/// How a body is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyCoding {
    /// Unchanged. Its end follows from its length or from the end of the connection.
    Plain,
    Chunked,
    /// Unchanged. The writing direction of the connection is closed at its end.
    Tunnel,
}

impl BodyCoding {
    pub(crate) fn of(framing: BodyFraming) -> Self {
        if framing == BodyFraming::Chunked { Self::Chunked } else { Self::Plain }
    }
}

impl BodyWriter<'_> {
    /// Buffers a piece, and writes the buffer when it is full.
    pub(crate) async fn send(&mut self, piece: &[u8]) -> io::Result<()> {
        if piece.is_empty() {
            return Ok(());
        }
        let out = self.writer.output();
        out.reserve(piece.len() + 20);
        if self.coding == BodyCoding::Chunked {
            put_hexadecimal(piece.len(), out);
            out.put_slice(b"\r\n");
            out.put_slice(piece);
            out.put_slice(b"\r\n");
        } else {
            out.put_slice(piece);
        }
        if out.len() >= WRITE_BYTES { self.flush().await } else { Ok(()) }
    }

    /// Writes the buffer.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        self.writer.flush().await
    }

    /// Ends the body and writes the buffer. Trailers are sent only with the chunked coding.
    pub(crate) async fn finish(&mut self, trailers: Option<HeaderMap>) -> io::Result<()> {
        if self.coding == BodyCoding::Chunked {
            let out = self.writer.output();
            out.put_slice(b"0\r\n");
            for (name, value) in trailers.iter().flatten() {
                out.put_slice(name.as_str().as_bytes());
                out.put_slice(b": ");
                out.put_slice(value.as_bytes());
                out.put_slice(b"\r\n");
            }
            out.put_slice(b"\r\n");
        }
        self.flush().await?;
        if self.coding == BodyCoding::Tunnel { self.writer.half.shutdown().await } else { Ok(()) }
    }
}

fn put_hexadecimal(number: usize, out: &mut BytesMut) {
    let digits = (usize::BITS - number.leading_zeros()).div_ceil(4).max(1);
    for position in (0..digits).rev() {
        let digit = u8::try_from((number >> (4 * position)) & 15).unwrap_or(0);
        out.put_u8(if digit < 10 { b'0' + digit } else { b'a' + digit - 10 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_in_hexadecimal() {
        for number in [0, 1, 9, 10, 15, 16, 255, 256, 65_535, 65_536, usize::MAX] {
            let mut out = BytesMut::new();
            put_hexadecimal(number, &mut out);
            assert_eq!(out, format!("{number:x}").as_bytes());
        }
    }
}
