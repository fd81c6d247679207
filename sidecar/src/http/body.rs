//! Message bodies: where they are read from and written to, whichever HTTP version the connection speaks.

use std::cell::RefCell;

use bytes::Bytes;
use http::HeaderMap;

use super::body_error::BodyError;
use super::h1::{BodyReader, BodyWriter};
use super::h2::{self as http2, ReceivedBody};
use crate::timeouts::RequestProgress;

/// The connection that a body is read from.
#[derive(Debug)]
pub(crate) enum BodySource<'a> {
    /// The message has no body.
    Empty,
    Http1(BodyReader<'a>),
    Http2(&'a mut ReceivedBody),
    /// The pieces of a [`ReplayBuffer`], then the rest of the source that they were read from.
    Replay(std::vec::IntoIter<Bytes>, Box<Self>),
}

/// The pieces that were read from a body, kept so that the request can be sent again to another endpoint.
#[derive(Debug, Default)]
pub(crate) struct ReplayBuffer {
    pieces: Vec<Bytes>,
    bytes: usize,
    /// Whether pieces are missing because the body exceeded [`REPLAY_LIMIT_BYTES`] or had trailers.
    pub(super) overflowed: bool,
}

/// How many bytes of a body are kept so that it can be sent again.
const REPLAY_LIMIT_BYTES: usize = 64 * 1024;

impl ReplayBuffer {
    /// Whether every piece that was read is kept.
    pub(crate) fn is_whole(&self) -> bool {
        !self.overflowed
    }

    /// Keeps a piece, or discards all pieces when the limit is exceeded.
    pub(crate) fn add(&mut self, piece: &Bytes) {
        self.bytes += piece.len();
        if self.bytes > REPLAY_LIMIT_BYTES {
            self.overflowed = true;
            self.pieces.clear();
        } else if !self.overflowed {
            self.pieces.push(piece.clone());
        }
    }
}

/// The connection that a body is written to.
#[derive(Debug)]
pub(crate) enum BodySink<'a> {
    /// The message ended with its head: pieces are discarded.
    Closed,
    Http1(BodyWriter<'a>),
    Http2(h2::SendStream<Bytes>),
}

impl<'a> BodySource<'a> {
    /// The same body from its beginning, given the pieces that were already read from it.
    ///
    /// # Errors
    /// Gives the source back unchanged when `replay` does not hold every piece.
    pub(crate) fn rewound(self, replay: ReplayBuffer) -> Result<Self, Self> {
        match self {
            _ if replay.overflowed => Err(self),
            whole if replay.pieces.is_empty() => Ok(whole),
            rest => Ok(Self::Replay(replay.pieces.into_iter(), Box::new(rest))),
        }
    }

    /// Whether the body is known to have no further bytes.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Http1(reader) => reader.is_done(),
            Self::Http2(body) => body.is_end(),
            Self::Replay(pieces, rest) => pieces.len() == 0 && rest.is_empty(),
        }
    }

    /// Whether trailers may follow the body.
    pub(crate) fn may_have_trailers(&self) -> bool {
        match self {
            Self::Empty => false,
            Self::Http1(reader) => reader.may_have_trailers(),
            Self::Http2(body) => !body.is_end(),
            Self::Replay(_, rest) => rest.may_have_trailers(),
        }
    }

    /// Switches from the request's body to the bytes after an upgrade. None when the client sent bytes before the
    /// upgrade was accepted.
    pub(crate) fn upgraded(self) -> Option<Self> {
        match self {
            Self::Empty => None,
            Self::Http1(reader) => reader.upgraded().map(Self::Http1),
            // An HTTP/2 stream carries one request, so early bytes cannot be mistaken for the next one.
            Self::Http2(stream) => Some(Self::Http2(stream)),
            Self::Replay(..) => None,
        }
    }

    /// The next piece; none at the end. Cancel-safe.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        match self {
            Self::Empty => Ok(None),
            Self::Http1(reader) => reader.piece().await,
            Self::Http2(body) => body.piece().await,
            Self::Replay(pieces, rest) => match pieces.next() {
                Some(piece) => Ok(Some(piece)),
                None => Box::pin(rest.piece()).await,
            },
        }
    }

    /// Whether unread pieces accumulate in the h2 crate, each with a fixed cost, so that reading ahead saves memory.
    pub(crate) fn allows_read_ahead(&self) -> bool {
        matches!(self, Self::Http2(_))
    }

    /// The next piece. Over HTTP/2 it keeps occupying the flow-control window until [`Self::release_beyond`].
    pub(crate) async fn unreleased_piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        match self {
            Self::Http2(body) => body.unreleased_piece().await,
            other => other.piece().await,
        }
    }

    /// Returns window capacity to the sender for all but the last `kept` bytes that were read.
    pub(crate) fn release_beyond(&mut self, kept: usize) {
        if let Self::Http2(body) = self {
            body.release_beyond(kept);
        }
    }

    /// The trailers. Call it after the last piece.
    pub(super) async fn trailers(&mut self) -> Result<Option<HeaderMap>, BodyError> {
        match self {
            Self::Empty => Ok(None),
            Self::Http1(reader) => Ok(reader.take_trailers()),
            Self::Http2(body) => body.trailers().await,
            Self::Replay(_, rest) => Box::pin(rest.trailers()).await,
        }
    }
}

impl BodySink<'_> {
    /// Writes or buffers a piece.
    pub(crate) async fn send(&mut self, piece: Bytes) -> Result<(), BodyError> {
        match self {
            Self::Closed => Ok(()),
            Self::Http1(writer) => writer.send(&piece).await.map_err(|_| BodyError::SinkClosed),
            Self::Http2(stream) => http2::send(stream, piece).await,
        }
    }

    /// Whether each piece becomes an HTTP/2 DATA frame.
    pub(super) fn has_frames(&self) -> bool {
        matches!(self, Self::Http2(_))
    }

    /// Writes what [`Self::send`] buffered.
    pub(crate) async fn flush(&mut self) -> Result<(), BodyError> {
        match self {
            Self::Closed | Self::Http2(_) => Ok(()),
            Self::Http1(writer) => writer.flush().await.map_err(|_| BodyError::SinkClosed),
        }
    }

    /// Ends the body, with trailers where the framing can carry them.
    pub(crate) async fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), BodyError> {
        match self {
            Self::Closed => Ok(()),
            Self::Http1(writer) => writer.finish(trailers).await.map_err(|_| BodyError::SinkClosed),
            Self::Http2(stream) => http2::finish(stream, trailers),
        }
    }

    /// Resolves when the receiver has reset its stream or closed its connection.
    pub(super) async fn closed(&mut self) {
        match self {
            Self::Http2(stream) => {
                // An error means that the connection is closed, which also ends the stream.
                drop(std::future::poll_fn(|cx| stream.poll_reset(cx)).await);
            }
            Self::Http1(body) => body.writer.half.closed().await,
            Self::Closed => std::future::pending().await,
        }
    }

    /// Flushes what is buffered, then ends the body so that the receiver sees it as incomplete.
    pub(crate) async fn flush_and_abort(&mut self) {
        if self.flush().await.is_err() {
            tracing::debug!("rest of an aborted body not sent: receiver is gone");
        }
        self.abort();
    }

    /// Resets an HTTP/2 stream. An HTTP/1.1 body is incomplete because its connection closes.
    pub(crate) fn abort(&mut self) {
        if let Self::Http2(stream) = self {
            stream.send_reset(h2::Reason::CANCEL);
        }
    }
}

/// Where progress is recorded while a body is forwarded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BodyProgress<'p> {
    request_progress: &'p RequestProgress,
    is_request: bool,
    /// Keeps the pieces of a request body so that it can be sent again.
    pub(super) replay: Option<&'p RefCell<ReplayBuffer>>,
}

impl<'p> BodyProgress<'p> {
    /// For a body from the client to an endpoint.
    pub(crate) fn of_request(request_progress: &'p RequestProgress) -> Self {
        Self { request_progress, is_request: true, replay: None }
    }

    /// For a body from the client to an endpoint, whose pieces are kept in `replay`.
    pub(crate) fn of_repeatable(
        request_progress: &'p RequestProgress,
        replay: &'p RefCell<ReplayBuffer>,
    ) -> Self {
        Self { request_progress, is_request: true, replay: Some(replay) }
    }

    /// For a body from an endpoint to the client.
    pub(crate) fn of_response(request_progress: &'p RequestProgress) -> Self {
        Self { request_progress, is_request: false, replay: None }
    }

    pub(super) fn record(self, piece: &Bytes, is_last: bool) {
        self.request_progress.record_bytes(piece.len(), self.is_request);
        if is_last {
            self.record_end();
        }
    }

    /// Records that the whole body was received from its sender. Some of it may not be sent yet.
    pub(super) fn record_end(self) {
        if self.is_request {
            self.request_progress.request_received();
        }
    }
}
