//! Reading and writing what follows a head.

use bytes::{BufMut, Bytes, BytesMut};
use http::HeaderMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::chunked::{Decoder, Step};
use crate::http::body::Broken;
use crate::stream::Half;

/// How much is read at once.
const READ_BYTES: usize = 16 * 1024;
/// How much is gathered before it is written without waiting for more.
const WRITE_BYTES: usize = 64 * 1024;

/// How a body is framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// There is none.
    None,
    /// So many bytes.
    Length(u64),
    /// In chunks.
    Chunked,
    /// To the end of the connection; responses only.
    UntilClose,
}

/// The reading half of a connection, with what was read and not yet used.
#[derive(Debug)]
pub(crate) struct Reader {
    pub(crate) half: Half,
    pub(crate) buffer: BytesMut,
}

/// The writing half of a connection, with what was not yet written.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) half: Half,
    pub(crate) out: BytesMut,
}

impl Writer {
    /// Writes what was gathered.
    pub(crate) async fn flush(&mut self) -> std::io::Result<()> {
        if !self.out.is_empty() {
            self.half.write_all(&self.out).await?;
            self.out.clear();
            self.half.flush().await?;
        }
        Ok(())
    }
}

/// A body being read.
#[derive(Debug)]
pub(crate) struct BodyReader<'a> {
    reader: &'a mut Reader,
    rest: Rest,
}

#[derive(Debug)]
enum Rest {
    Length(u64),
    Chunked(Decoder),
    UntilClose,
    Done,
}

impl<'a> BodyReader<'a> {
    pub(crate) fn new(reader: &'a mut Reader, framing: Framing) -> Self {
        let rest = match framing {
            Framing::None | Framing::Length(0) => Rest::Done,
            Framing::Length(length) => Rest::Length(length),
            Framing::Chunked => Rest::Chunked(Decoder::Size),
            Framing::UntilClose => Rest::UntilClose,
        };
        Self { reader, rest }
    }

    /// Whether all of it was read, so that the connection may be used again.
    pub(crate) fn is_done(&self) -> bool {
        matches!(self.rest, Rest::Done | Rest::Chunked(Decoder::Done(_)))
    }

    /// The connection's reading half, for what follows an upgrade.
    pub(crate) fn into_reader(self) -> &'a mut Reader {
        self.reader
    }

    pub(crate) fn take_trailers(&mut self) -> Option<HeaderMap> {
        match &mut self.rest {
            Rest::Chunked(Decoder::Done(trailers)) => trailers.take(),
            _ => None,
        }
    }

    /// The next piece; none at the end. Dropping the future loses nothing.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            let buffer = &mut self.reader.buffer;
            match &mut self.rest {
                Rest::Done => return Ok(None),
                Rest::Chunked(decoder) => match decoder.step(buffer).map_err(Broken::Malformed)? {
                    Step::Piece(piece) => return Ok(Some(piece)),
                    Step::End => return Ok(None),
                    Step::NeedMore => {}
                },
                Rest::Length(left) if !buffer.is_empty() => {
                    let now = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                    *left -= now as u64;
                    let piece = buffer.split_to(now).freeze();
                    if *left == 0 {
                        self.rest = Rest::Done;
                    }
                    return Ok(Some(piece));
                }
                Rest::UntilClose if !buffer.is_empty() => return Ok(Some(buffer.split().freeze())),
                Rest::Length(_) | Rest::UntilClose => {}
            }
            buffer.reserve(READ_BYTES);
            match self.reader.half.read_buf(buffer).await {
                Ok(0) if matches!(self.rest, Rest::UntilClose) => {
                    self.rest = Rest::Done;
                    return Ok(None);
                }
                Ok(0) => return Err(Broken::Malformed("the body ended before its end")),
                Ok(_) => {}
                Err(_) => return Err(Broken::Source),
            }
        }
    }
}

/// A body being written.
#[derive(Debug)]
pub(crate) struct BodyWriter<'a> {
    pub(crate) writer: &'a mut Writer,
    pub(crate) chunked: bool,
}

impl BodyWriter<'_> {
    pub(crate) async fn send(&mut self, piece: &[u8]) -> std::io::Result<()> {
        if piece.is_empty() {
            return Ok(());
        }
        let out = &mut self.writer.out;
        out.reserve(piece.len() + 20);
        if self.chunked {
            out.put_slice(format!("{:x}\r\n", piece.len()).as_bytes());
            out.put_slice(piece);
            out.put_slice(b"\r\n");
        } else {
            out.put_slice(piece);
        }
        if out.len() >= WRITE_BYTES { self.flush().await } else { Ok(()) }
    }

    pub(crate) async fn flush(&mut self) -> std::io::Result<()> {
        self.writer.flush().await
    }

    pub(crate) async fn finish(&mut self, trailers: Option<HeaderMap>) -> std::io::Result<()> {
        if self.chunked {
            let out = &mut self.writer.out;
            out.put_slice(b"0\r\n");
            for (name, value) in trailers.iter().flatten() {
                out.put_slice(name.as_str().as_bytes());
                out.put_slice(b": ");
                out.put_slice(value.as_bytes());
                out.put_slice(b"\r\n");
            }
            out.put_slice(b"\r\n");
        }
        self.flush().await
    }
}
