//! Buffers body pieces that were read and not sent yet, and merges small ones: an HTTP/2 receiver pays a fixed cost for
//! each frame, and many proxies close connections that send a flood of small frames.

use std::cell::RefCell;
use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;

use super::body::{BodySource, ReplayBuffer};
use super::body_error::BodyError;

/// Pieces smaller than this are merged.
const SMALL_BYTES: usize = 1024;
/// The largest merged piece: the smallest SETTINGS_MAX_FRAME_SIZE (RFC 9113, section 6.5.2).
const MERGED_BYTES: usize = 16 * 1024;

/// The next piece of a body, none at its end.
type NextPiece = Result<Option<Bytes>, BodyError>;

/// Pieces waiting to be sent, in order.
#[derive(Debug, Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    /// Small pieces after those in `pieces`, merged.
    small: BytesMut,
    /// The bytes in `pieces` and `small`.
    bytes: usize,
}

impl Queue {
    fn add(&mut self, piece: &Bytes) {
        self.bytes += piece.len();
        if piece.len() < SMALL_BYTES && self.small.len() + piece.len() <= MERGED_BYTES {
            self.small.extend_from_slice(piece);
            return;
        }
        if !self.small.is_empty() {
            self.pieces.push_back(self.small.split().freeze());
        }
        if piece.len() < SMALL_BYTES {
            self.small.extend_from_slice(piece);
        } else {
            self.pieces.push_back(piece.clone());
        }
    }

    fn take(&mut self) -> Option<Bytes> {
        let small = || (!self.small.is_empty()).then(|| self.small.split().freeze());
        let piece = self.pieces.pop_front().or_else(small)?;
        self.bytes -= piece.len();
        Some(piece)
    }
}

/// Reads a body ahead of its receiver. Memory is bounded: by [`ReplayBuffer`] for pieces that are kept to be sent
/// again, and by the stream's flow-control window for others, which are released only when they leave this buffer.
#[derive(Debug, Default)]
pub(crate) struct ReadAhead<'r> {
    /// Keeps every piece that is read, so that the body can be sent again.
    replay: Option<&'r RefCell<ReplayBuffer>>,
    /// None until the first piece has to wait: most bodies are sent as fast as they are read.
    queue: Option<Box<Queue>>,
    /// The end of the body, or an error, once it was read and while pieces are still queued.
    end: Option<NextPiece>,
    /// Whether the last poll of the source found no piece.
    is_drained: bool,
}

impl<'r> ReadAhead<'r> {
    pub(crate) fn new(replay: Option<&'r RefCell<ReplayBuffer>>) -> Self {
        Self { replay, ..Self::default() }
    }

    /// Waits for the next piece. Call it when [`Self::next`] found none.
    pub(crate) async fn wait(&mut self, source: &mut BodySource<'_>) -> NextPiece {
        let next = source.piece().await;
        self.keep(&next);
        next
    }

    fn keep(&self, next: &NextPiece) {
        if let (Some(replay), Ok(Some(piece))) = (self.replay, next) {
            replay.borrow_mut().add(piece);
        }
    }

    fn poll(&self, source: &mut BodySource<'_>) -> Option<NextPiece> {
        let next = source.piece().now_or_never()?;
        self.keep(&next);
        Some(next)
    }

    /// The next piece, if one is available without waiting.
    pub(crate) fn next(&mut self, source: &mut BodySource<'_>) -> Option<NextPiece> {
        if let Some(queue) = &mut self.queue
            && let Some(piece) = queue.take()
        {
            source.release_beyond(queue.bytes);
            return Some(Ok(Some(piece)));
        }
        if let Some(end) = self.end.take() {
            return Some(end);
        }
        if std::mem::take(&mut self.is_drained) {
            return None;
        }
        self.poll(source)
    }

    /// Appends the pieces that are available without waiting to a small piece. The result is copied into an allocation
    /// of its size: the piece may be a slice of a whole read buffer, while flow control counts its payload only.
    pub(crate) fn merge(&mut self, first: Bytes, source: &mut BodySource<'_>) -> Bytes {
        if first.len() >= SMALL_BYTES || !self.is_empty() {
            return first;
        }
        let mut next = self.poll(source);
        if let Some(Ok(None)) = next {
            // A last piece is not copied: each stream can keep at most one read buffer alive this way.
            self.end = next;
            return first;
        }
        let mut merged = BytesMut::with_capacity(first.len());
        merged.extend_from_slice(&first);
        while let Some(Ok(Some(piece))) = &next
            && merged.len() + piece.len() <= MERGED_BYTES
        {
            merged.extend_from_slice(piece);
            next = self.poll(source);
        }
        self.is_drained = next.is_none();
        self.end = next;
        merged.freeze()
    }

    /// Reads and merges pieces for as long as it is polled, so that small frames do not accumulate in the h2 crate
    /// while the receiver is blocked. Never resolves.
    pub(crate) async fn fill(&mut self, source: &mut BodySource<'_>) {
        while self.end.is_none() && source.allows_read_ahead() {
            // Pieces in the replay buffer have a limit of their own, so the window is released at once.
            let is_kept = self.replay.is_some_and(|replay| replay.borrow().is_whole());
            let next = if is_kept { source.piece().await } else { source.unreleased_piece().await };
            self.keep(&next);
            match next {
                Ok(Some(piece)) => self.queue.get_or_insert_default().add(&piece),
                end => self.end = Some(end),
            }
        }
        std::future::pending().await
    }

    fn is_empty(&self) -> bool {
        self.end.is_none() && self.queue.as_ref().is_none_or(|queue| queue.bytes == 0)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::Poll;

    use super::super::h2::ReceivedBody;
    use super::*;

    /// How many bytes the test client sends, in pieces of [`PIECE_BYTES`].
    const SENT_BYTES: usize = 100 * PIECE_BYTES;
    const PIECE_BYTES: usize = 100;

    fn queued(ahead: &ReadAhead<'_>) -> usize {
        ahead.queue.as_ref().map_or(0, |queue| queue.bytes)
    }

    /// A body that has arrived completely and of which nothing was read, and the guards that keep its connection open.
    async fn arrived() -> (ReceivedBody, impl Sized) {
        let (near, far) = tokio::io::duplex(1024 * 1024);
        let client = async {
            let (mut sender, connection) = h2::client::handshake(near).await.expect("a client");
            let connection = tokio::spawn(connection);
            let request = http::Request::post("http://a.test/").body(()).expect("a request");
            let (answer, mut body) = sender.send_request(request, false).expect("a stream");
            for _ in 0..SENT_BYTES / PIECE_BYTES {
                let piece = Bytes::from_static(&[7; PIECE_BYTES]);
                body.send_data(piece, false).expect("the stream is open");
            }
            (sender, answer, body, connection)
        };
        let server = async {
            let mut connection = h2::server::handshake(far).await.expect("a server");
            let (request, respond) =
                connection.accept().await.expect("an open connection").expect("a request");
            let mut body = ReceivedBody::new(request.into_body());
            let all = poll_fn(|cx| {
                drop(connection.poll_accept(cx));
                if body.in_flight() == SENT_BYTES { Poll::Ready(()) } else { Poll::Pending }
            });
            all.await;
            (body, (connection, respond))
        };
        let (client, (body, server)) = tokio::join!(client, server);
        (body, (client, server))
    }

    #[tokio::test]
    async fn queued_bytes_occupy_the_window_until_they_are_sent() {
        let (mut body, _connection) = arrived().await;
        let mut ahead = ReadAhead::default();
        assert!(ahead.fill(&mut BodySource::Http2(&mut body)).now_or_never().is_none());
        assert_eq!((queued(&ahead), body.in_flight()), (SENT_BYTES, SENT_BYTES));
        while matches!(ahead.next(&mut BodySource::Http2(&mut body)), Some(Ok(Some(_)))) {
            assert_eq!(body.in_flight(), queued(&ahead));
        }
        assert_eq!(body.in_flight(), 0);
    }

    #[tokio::test]
    async fn window_of_a_piece_kept_for_a_retry_is_released_once() {
        let (mut body, _connection) = arrived().await;
        let replay = RefCell::<ReplayBuffer>::default();
        let mut ahead = ReadAhead::new(Some(&replay));
        let piece = ahead.wait(&mut BodySource::Http2(&mut body)).await;
        ahead.queue.get_or_insert_default().add(&piece.ok().flatten().expect("a piece"));
        assert_eq!(body.in_flight(), SENT_BYTES - PIECE_BYTES);
        let same = ahead.next(&mut BodySource::Http2(&mut body));
        assert!(matches!(same, Some(Ok(Some(piece))) if piece.len() == PIECE_BYTES));
        assert_eq!(body.in_flight(), SENT_BYTES - PIECE_BYTES);
        assert!(ahead.fill(&mut BodySource::Http2(&mut body)).now_or_never().is_none());
        assert_eq!((queued(&ahead), body.in_flight()), (SENT_BYTES - PIECE_BYTES, 0));
    }

    #[tokio::test]
    async fn dropped_read_ahead_bytes_are_released_and_unread_ones_are_not() {
        let (mut body, _connection) = arrived().await;
        assert!(body.unreleased_piece().await.is_ok_and(|piece| piece.is_some()));
        body.release_beyond(0);
        assert_eq!(body.in_flight(), SENT_BYTES - PIECE_BYTES);
        while body.in_flight() > 0 {
            assert!(body.piece().await.is_ok_and(|piece| piece.is_some()));
        }
    }

    #[tokio::test]
    async fn single_small_piece_is_copied_unless_it_is_the_last() {
        let (mut body, _connection) = arrived().await;
        for _ in 1..SENT_BYTES / PIECE_BYTES {
            assert!(body.piece().await.is_ok_and(|piece| piece.is_some()));
        }
        let mut ahead = ReadAhead::default();
        let single = ahead.next(&mut BodySource::Http2(&mut body)).and_then(Result::ok).flatten();
        let single = single.expect("a piece");
        let buffer = single.as_ptr();
        let sent = ahead.merge(single.clone(), &mut BodySource::Http2(&mut body));
        assert_eq!(sent, single);
        assert_ne!(sent.as_ptr(), buffer);
        assert!(ahead.next(&mut BodySource::Http2(&mut body)).is_none());
        let last = ahead.merge(single, &mut BodySource::Empty);
        assert_eq!(last.as_ptr(), buffer);
        assert!(matches!(ahead.next(&mut BodySource::Empty), Some(Ok(None))));
    }

    #[test]
    fn merged_piece_is_in_an_allocation_of_at_most_twice_its_size() {
        let read_buffer = Bytes::from(vec![7; MERGED_BYTES]);
        for count in [2, 3, 50, 163] {
            let pieces = vec![read_buffer.slice(..100); count];
            let mut source = BodySource::Replay(pieces.into_iter(), Box::new(BodySource::Empty));
            let mut ahead = ReadAhead::default();
            let first = ahead.next(&mut source).and_then(Result::ok).flatten().expect("a piece");
            let merged = ahead.merge(first, &mut source);
            assert_eq!(merged.len(), 100 * count);
            let capacity = merged.try_into_mut().expect("no other piece shares it").capacity();
            assert!(capacity <= 200 * count, "{capacity} bytes for {count} pieces");
            assert!(matches!(ahead.next(&mut source), Some(Ok(None))));
        }
    }

    #[test]
    fn small_pieces_are_merged_in_order_and_large_ones_kept() {
        let mut queue = Queue::default();
        let mut sent = Vec::new();
        for round in 0..100_u8 {
            for _ in 0..500 {
                queue.add(&Bytes::from(vec![round]));
                sent.push(round);
            }
            if round % 10 == 0 {
                queue.add(&Bytes::from(vec![round; SMALL_BYTES]));
                sent.extend([round; SMALL_BYTES]);
            }
        }
        let pieces: Vec<Bytes> = std::iter::from_fn(|| queue.take()).collect();
        assert!(pieces.len() <= 24, "{} pieces", pieces.len());
        assert!(pieces.iter().all(|piece| piece.len() <= MERGED_BYTES));
        assert_eq!(pieces.concat(), sent);
        assert_eq!(queue.bytes, 0);
    }
}
