//! A body on its way: where it comes from, and where it goes.

use std::cell::RefCell;

use bytes::Bytes;
use http::HeaderMap;

use super::h1::{BodyReader, BodyWriter};
use super::h2::{self as http2, ReceivedBody};
use super::header_filter::HeaderFilter;
use super::read_ahead::Ahead;
use crate::timeouts::RequestProgress;

/// Where a body comes from.
#[derive(Debug)]
pub(crate) enum BodySource<'a> {
    Empty,
    Http1(BodyReader<'a>),
    Http2(&'a mut ReceivedBody),
    /// What was taken before, and then the rest.
    Again(std::vec::IntoIter<Bytes>, Box<Self>),
}

/// What was taken of a body, so that it can be sent once more.
#[derive(Debug, Default)]
pub(crate) struct ReplayBuffer {
    pieces: Vec<Bytes>,
    bytes: usize,
    /// Whether it is not all that was taken.
    overflowed: bool,
}

/// How much of a body is kept to be sent once more.
const TAKEN_LIMIT_BYTES: usize = 64 * 1024;

impl ReplayBuffer {
    /// Whether it is all that was taken.
    pub(crate) fn is_whole(&self) -> bool {
        !self.overflowed
    }

    pub(crate) fn add(&mut self, piece: &Bytes) {
        self.bytes += piece.len();
        if self.bytes > TAKEN_LIMIT_BYTES {
            self.overflowed = true;
            self.pieces.clear();
        } else if !self.overflowed {
            self.pieces.push(piece.clone());
        }
    }
}

/// Where a body goes to.
#[derive(Debug)]
pub(crate) enum BodySink<'a> {
    /// Nothing follows the head.
    Closed,
    Http1(BodyWriter<'a>),
    Http2(h2::SendStream<Bytes>),
}

/// Which side broke a body off, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyError {
    /// The one that sends it is gone.
    SourceClosed,
    /// The stream of HTTP/2 on which it came was reset, or its connection ended, for this reason.
    StreamEnded(&'static str),
    /// The one that sends it does not keep to its framing.
    Malformed(&'static str),
    /// The one that receives it wants no more, or is gone.
    SinkClosed,
}

impl<'a> BodySource<'a> {
    /// The same body from its beginning, of which that much was taken. The body itself when that is not
    /// known any more.
    ///
    /// # Errors
    /// The body as it is, when not all that was taken is known.
    pub(crate) fn rewound(self, taken: ReplayBuffer) -> Result<Self, Self> {
        match self {
            _ if taken.overflowed => Err(self),
            whole if taken.pieces.is_empty() => Ok(whole),
            rest => Ok(Self::Again(taken.pieces.into_iter(), Box::new(rest))),
        }
    }

    /// Whether nothing will come.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Http1(reader) => reader.is_done(),
            Self::Http2(body) => body.is_end(),
            Self::Again(pieces, rest) => pieces.len() == 0 && rest.is_empty(),
        }
    }

    /// Whether trailers may follow the body.
    pub(crate) fn may_have_trailers(&self) -> bool {
        match self {
            Self::Empty => false,
            Self::Http1(reader) => reader.may_have_trailers(),
            Self::Http2(body) => !body.is_end(),
            Self::Again(_, rest) => rest.may_have_trailers(),
        }
    }

    /// What follows an upgrade, from here. None when some of it came before the upgrade was agreed to.
    pub(crate) fn upgraded(self) -> Option<Self> {
        match self {
            Self::Empty => None,
            Self::Http1(reader) => reader.upgraded().map(Self::Http1),
            // Bytes of this stream can only be meant for it.
            Self::Http2(stream) => Some(Self::Http2(stream)),
            Self::Again(..) => None,
        }
    }

    /// The next piece; none at the end. Dropping the future loses nothing.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        match self {
            Self::Empty => Ok(None),
            Self::Http1(reader) => reader.piece().await,
            Self::Http2(body) => body.piece().await,
            Self::Again(pieces, rest) => match pieces.next() {
                Some(piece) => Ok(Some(piece)),
                None => Box::pin(rest.piece()).await,
            },
        }
    }

    /// Whether its pieces are kept elsewhere until they are taken, each at a cost of its own.
    pub(crate) fn reads_ahead(&self) -> bool {
        matches!(self, Self::Http2(_))
    }

    /// The next piece, whose sender may send no more for it before it is released.
    pub(crate) async fn held_piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        match self {
            Self::Http2(body) => body.held_piece().await,
            other => other.piece().await,
        }
    }

    /// Lets the sender send as much again as is held beyond the last `kept` bytes.
    pub(crate) fn release_beyond(&mut self, kept: usize) {
        if let Self::Http2(body) = self {
            body.release_beyond(kept);
        }
    }

    /// The trailers, after the last piece.
    async fn trailers(&mut self) -> Result<Option<HeaderMap>, BodyError> {
        match self {
            Self::Empty => Ok(None),
            Self::Http1(reader) => Ok(reader.take_trailers()),
            Self::Http2(body) => body.trailers().await,
            Self::Again(_, rest) => Box::pin(rest.trailers()).await,
        }
    }
}

impl BodySink<'_> {
    pub(crate) async fn send(&mut self, piece: Bytes) -> Result<(), BodyError> {
        match self {
            Self::Closed => Ok(()),
            Self::Http1(writer) => writer.send(&piece).await.map_err(|_| BodyError::SinkClosed),
            Self::Http2(stream) => http2::send(stream, piece).await,
        }
    }

    /// Whether each piece becomes a frame of HTTP/2.
    fn has_frames(&self) -> bool {
        matches!(self, Self::Http2(_))
    }

    pub(crate) async fn flush(&mut self) -> Result<(), BodyError> {
        match self {
            Self::Closed | Self::Http2(_) => Ok(()),
            Self::Http1(writer) => writer.flush().await.map_err(|_| BodyError::SinkClosed),
        }
    }

    pub(crate) async fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), BodyError> {
        match self {
            Self::Closed => Ok(()),
            Self::Http1(writer) => writer.finish(trailers).await.map_err(|_| BodyError::SinkClosed),
            Self::Http2(stream) => http2::finish(stream, trailers),
        }
    }

    /// Resolves when the receiver wants no more, as far as it can tell us.
    async fn refused(&mut self) {
        match self {
            Self::Http2(stream) => {
                // An error means that the connection is gone, which ends the stream as well.
                drop(std::future::poll_fn(|cx| stream.poll_reset(cx)).await);
            }
            Self::Http1(body) => body.writer.half.gone().await,
            Self::Closed => std::future::pending().await,
        }
    }

    /// Breaks the body off so that the receiver can tell it is not whole. What was gathered still goes out.
    pub(crate) async fn break_off(&mut self) {
        if self.flush().await.is_err() {
            tracing::debug!("nobody takes what was left of a body");
        }
        self.abort();
    }

    /// Breaks the body off at once.
    pub(crate) fn abort(&mut self) {
        if let Self::Http2(stream) = self {
            stream.send_reset(h2::Reason::CANCEL);
        }
    }
}

/// What is recorded while a body is carried.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BodyProgress<'p> {
    request_progress: &'p RequestProgress,
    is_request: bool,
    /// Where the pieces of a request body are kept, so that it can be sent once more.
    taken: Option<&'p RefCell<ReplayBuffer>>,
}

impl<'p> BodyProgress<'p> {
    /// The body goes from the client to an endpoint.
    pub(crate) fn of_request(request_progress: &'p RequestProgress) -> Self {
        Self { request_progress, is_request: true, taken: None }
    }

    /// The same, with its pieces kept in `taken`.
    pub(crate) fn of_repeatable(
        request_progress: &'p RequestProgress,
        taken: &'p RefCell<ReplayBuffer>,
    ) -> Self {
        Self { request_progress, is_request: true, taken: Some(taken) }
    }

    /// The body goes from an endpoint to the client.
    pub(crate) fn of_response(request_progress: &'p RequestProgress) -> Self {
        Self { request_progress, is_request: false, taken: None }
    }

    fn moved(self, piece: &Bytes, is_last: bool) {
        self.request_progress.record_bytes(piece.len(), self.is_request);
        if is_last {
            self.ended();
        }
    }

    /// The sender has sent all of the body; the receiver may not have taken it yet.
    fn ended(self) {
        if self.is_request {
            self.request_progress.request_received();
        }
    }
}

/// Carries a whole body, and of its trailers what `header_filter` lets pass. What is at hand is written
/// together; before waiting for more, what was written is flushed, so that a stream of small messages
/// is never held back.
pub(crate) async fn forward_body(
    source: &mut BodySource<'_>,
    sink: &mut BodySink<'_>,
    header_filter: &HeaderFilter,
    progress: BodyProgress<'_>,
) -> Result<u64, BodyError> {
    let mut bytes = 0;
    let mut ahead = Ahead::new(progress.taken);
    loop {
        let piece = match ahead.next(source) {
            Some(piece) => piece?,
            None => {
                sink.flush().await?;
                tokio::select! {
                    piece = ahead.wait(source) => piece?,
                    () = sink.refused() => return Err(BodyError::SinkClosed),
                }
            }
        };
        let Some(piece) = piece else {
            break;
        };
        let piece = if sink.has_frames() { ahead.merge(piece, source) } else { piece };
        bytes += piece.len() as u64;
        progress.moved(&piece, source.is_empty());
        tokio::select! {
            biased;
            sent = sink.send(piece) => sent?,
            () = ahead.fill(source) => {}
        }
    }
    let trailers = source.trailers().await?;
    let trailers = trailers.map(|trailers| header_filter.strip_trailers(trailers)).transpose()?;
    progress.ended();
    if let (Some(taken), Some(_)) = (progress.taken, &trailers) {
        taken.borrow_mut().overflowed = true;
    }
    sink.finish(trailers).await?;
    Ok(bytes)
}
