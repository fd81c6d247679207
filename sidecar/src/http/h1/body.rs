//! Reading and writing what follows a head.

use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::FutureExt;
use http::HeaderMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::chunked::{ChunkedDecoder, ChunkedStep};
use crate::buffers;
use crate::http::body::BodyError;
use crate::stream::StreamHalf;

/// How much is read at once.
const READ_BYTES: usize = 16 * 1024;
/// How much is gathered before it is written without waiting for more.
const WRITE_BYTES: usize = 64 * 1024;

/// How a body is framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyFraming {
    /// There is none.
    None,
    /// So many bytes.
    Length(u64),
    /// In chunks.
    Chunked,
    /// To the end of the connection; responses, and what follows an upgrade.
    UntilClose,
}

/// The reading half of a connection, with what was read and not yet used.
#[derive(Debug)]
pub(crate) struct Http1Reader {
    pub(crate) half: StreamHalf,
    pub(crate) buffer: BytesMut,
    /// Whether the last body was given up before its end, so that the rest of it may still come.
    pub(crate) is_within_body: bool,
}

impl Http1Reader {
    pub(crate) fn new(half: StreamHalf) -> Self {
        Self { half, buffer: BytesMut::new(), is_within_body: false }
    }

    /// Makes room to read into.
    pub(crate) fn reserve(&mut self, bytes: usize) {
        if self.buffer.capacity() == 0 {
            self.buffer = buffers::take();
        }
        self.buffer.reserve(bytes);
    }

    /// Lets go of the room for what was read, while nothing waits in it.
    pub(crate) fn rest(&mut self) {
        if self.buffer.is_empty() {
            buffers::give_back(&mut self.buffer);
        }
    }
}

/// The writing half of a connection, with what was not yet written.
#[derive(Debug)]
pub(crate) struct Http1Writer {
    pub(crate) half: StreamHalf,
    pub(crate) out: BytesMut,
    /// How long the other side may take nothing while there is something to take.
    pub(crate) stall: Duration,
}

impl Http1Writer {
    pub(crate) fn new(half: StreamHalf, stall: Duration) -> Self {
        Self { half, out: BytesMut::new(), stall }
    }

    /// Where to gather what is to be written.
    pub(crate) fn room(&mut self) -> &mut BytesMut {
        if self.out.capacity() == 0 {
            self.out = buffers::take();
        }
        &mut self.out
    }

    /// Writes what was gathered.
    ///
    /// # Errors
    /// When the connection broke, or the other side took nothing for too long.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            let writing = self.half.write(&self.out);
            // It nearly always fits, and then nobody asks for the time.
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
        // TLS takes more than the socket does, and gives it on here.
        match self.half.flush().now_or_never() {
            Some(flushed) => flushed,
            None => {
                let flushing = self.half.flush();
                tokio::time::timeout(self.stall, flushing).await.map_err(io::Error::from)?
            }
        }
    }

    /// Lets go of the room for what was written, while there is nothing to write.
    pub(crate) fn rest(&mut self) {
        if self.out.is_empty() {
            buffers::give_back(&mut self.out);
        }
    }
}

/// A body being read.
#[derive(Debug)]
pub(crate) struct BodyReader<'a> {
    reader: &'a mut Http1Reader,
    rest: RemainingBody,
}

#[derive(Debug)]
enum RemainingBody {
    Length(u64),
    Chunked(ChunkedDecoder),
    UntilClose,
    Done,
}

impl Drop for BodyReader<'_> {
    fn drop(&mut self) {
        let is_framed = matches!(self.rest, RemainingBody::Length(_) | RemainingBody::Chunked(_));
        self.reader.is_within_body = is_framed && !self.is_done();
    }
}

impl<'a> BodyReader<'a> {
    pub(crate) fn new(reader: &'a mut Http1Reader, framing: BodyFraming) -> Self {
        let rest = match framing {
            BodyFraming::None | BodyFraming::Length(0) => RemainingBody::Done,
            BodyFraming::Length(length) => RemainingBody::Length(length),
            BodyFraming::Chunked => RemainingBody::Chunked(ChunkedDecoder::Size),
            BodyFraming::UntilClose => RemainingBody::UntilClose,
        };
        Self { reader, rest }
    }

    /// Whether all of it was read, so that the connection may be used again.
    pub(crate) fn is_done(&self) -> bool {
        matches!(self.rest, RemainingBody::Done | RemainingBody::Chunked(ChunkedDecoder::Done(_)))
    }

    /// Whether trailers may follow, or have come.
    pub(crate) fn may_have_trailers(&self) -> bool {
        matches!(self.rest, RemainingBody::Chunked(_))
    }

    /// Goes on to what follows an upgrade. None when some of it came before the upgrade was agreed to:
    /// it could as well be meant for a request.
    pub(crate) fn upgraded(mut self) -> Option<Self> {
        if !self.reader.buffer.is_empty() {
            return None;
        }
        self.rest = RemainingBody::UntilClose;
        Some(self)
    }

    pub(crate) fn take_trailers(&mut self) -> Option<HeaderMap> {
        match &mut self.rest {
            RemainingBody::Chunked(ChunkedDecoder::Done(trailers)) => trailers.take(),
            _ => None,
        }
    }

    /// The next piece; none at the end. Dropping the future loses nothing.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        loop {
            let buffer = &mut self.reader.buffer;
            match &mut self.rest {
                RemainingBody::Done => return Ok(None),
                RemainingBody::Chunked(decoder) => {
                    match decoder.step(buffer).map_err(BodyError::Malformed)? {
                        ChunkedStep::Piece(piece) => return Ok(Some(piece)),
                        ChunkedStep::End => return Ok(None),
                        ChunkedStep::NeedMore => {}
                    }
                }
                RemainingBody::Length(left) if !buffer.is_empty() => {
                    let now = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                    *left -= now as u64;
                    let piece = buffer.split_to(now).freeze();
                    if *left == 0 {
                        self.rest = RemainingBody::Done;
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
                Ok(0) if matches!(self.rest, RemainingBody::UntilClose) => {
                    self.rest = RemainingBody::Done;
                    return Ok(None);
                }
                Ok(0) => return Err(BodyError::Malformed("the body ended before its end")),
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
    /// As it is; its end is known from its length, or from the end of the connection.
    Plain,
    Chunked,
    /// As it is; its end is the end of this direction.
    Tunnel,
}

impl BodyCoding {
    pub(crate) fn of(framing: BodyFraming) -> Self {
        if framing == BodyFraming::Chunked { Self::Chunked } else { Self::Plain }
    }
}

impl BodyWriter<'_> {
    pub(crate) async fn send(&mut self, piece: &[u8]) -> io::Result<()> {
        if piece.is_empty() {
            return Ok(());
        }
        let out = self.writer.room();
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

    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        self.writer.flush().await
    }

    pub(crate) async fn finish(&mut self, trailers: Option<HeaderMap>) -> io::Result<()> {
        if self.coding == BodyCoding::Chunked {
            let out = self.writer.room();
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
    for place in (0..digits).rev() {
        let digit = u8::try_from((number >> (4 * place)) & 15).unwrap_or(0);
        out.put_u8(if digit < 10 { b'0' + digit } else { b'a' + digit - 10 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_numbers_to_the_base_of_16() {
        for number in [0, 1, 9, 10, 15, 16, 255, 256, 65_535, 65_536, usize::MAX] {
            let mut out = BytesMut::new();
            put_hexadecimal(number, &mut out);
            assert_eq!(out, format!("{number:x}").as_bytes());
        }
    }
}
