//! What was read of a body and not sent yet. Small pieces are merged: each frame of HTTP/2 costs the next
//! receiver as much as a large one, and a flood of small frames ends connections.

use std::cell::RefCell;
use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;

use super::body::{BodyError, BodySource, ReplayBuffer};

/// Pieces below this size are merged.
const SMALL_BYTES: usize = 1024;
/// How large a merged piece becomes: the smallest limit of a frame in HTTP/2.
const MERGED_BYTES: usize = 16 * 1024;

/// The next of a body, or its end.
type Next = Result<Option<Bytes>, BodyError>;

/// Pieces that wait to be sent.
#[derive(Debug, Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    small: BytesMut,
    /// How many bytes are in these two.
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

/// What was read ahead. It is bounded: pieces that are kept to be sent once more are bounded by [`ReplayBuffer`], and the
/// others by the window of the stream, since they are not released before they leave here.
#[derive(Debug, Default)]
pub(crate) struct Ahead<'t> {
    /// Where all that is read is kept, so that the body can be sent once more.
    taken: Option<&'t RefCell<ReplayBuffer>>,
    /// None until something waits: most bodies are sent as fast as they are read.
    queue: Option<Box<Queue>>,
    end: Option<Next>,
    /// Whether the source had nothing at hand when it was last asked.
    is_drained: bool,
}

impl<'t> Ahead<'t> {
    pub(crate) fn new(taken: Option<&'t RefCell<ReplayBuffer>>) -> Self {
        Self { taken, ..Self::default() }
    }

    /// Waits for the next piece when none was at hand.
    pub(crate) async fn wait(&mut self, source: &mut BodySource<'_>) -> Next {
        let next = source.piece().await;
        self.keep(&next);
        next
    }

    fn keep(&self, next: &Next) {
        if let (Some(taken), Ok(Some(piece))) = (self.taken, next) {
            taken.borrow_mut().add(piece);
        }
    }

    fn poll(&self, source: &mut BodySource<'_>) -> Option<Next> {
        let next = source.piece().now_or_never()?;
        self.keep(&next);
        Some(next)
    }

    /// The next piece, as far as it is at hand.
    pub(crate) fn next(&mut self, source: &mut BodySource<'_>) -> Option<Next> {
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

    /// A small piece together with what else is at hand; nothing is waited for. It is copied into an allocation
    /// that fits: its own may be the read buffer of a connection, of which HTTP/2 counts the payload only.
    pub(crate) fn merge(&mut self, first: Bytes, source: &mut BodySource<'_>) -> Bytes {
        if first.len() >= SMALL_BYTES || !self.is_empty() {
            return first;
        }
        let mut next = self.poll(source);
        if let Some(Ok(None)) = next {
            // The last piece: one read buffer at most is kept for a stream.
            self.end = next;
            return first;
        }
        let mut merged = BytesMut::with_capacity(first.len());
        merged.extend_from_slice(&first);
        while let Some(Ok(Some(more))) = &next
            && merged.len() + more.len() <= MERGED_BYTES
        {
            merged.extend_from_slice(more);
            next = self.poll(source);
        }
        self.is_drained = next.is_none();
        self.end = next;
        merged.freeze()
    }

    /// Reads on for as long as this is polled: while the receiver takes nothing, small frames must not
    /// pile up in the library. Never resolves.
    pub(crate) async fn fill(&mut self, source: &mut BodySource<'_>) {
        while self.end.is_none() && source.reads_ahead() {
            // What may be sent once more is bounded by itself, and is released at once: it must not keep the window.
            let is_kept = self.taken.is_some_and(|taken| taken.borrow().is_whole());
            let next = if is_kept { source.piece().await } else { source.held_piece().await };
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

    /// How many bytes the test's client sends, in pieces of so many.
    const SENT_BYTES: usize = 100 * PIECE_BYTES;
    const PIECE_BYTES: usize = 100;

    fn queued(ahead: &Ahead<'_>) -> usize {
        ahead.queue.as_ref().map_or(0, |queue| queue.bytes)
    }

    /// A body of which all has arrived and nothing was taken, and what keeps its connection.
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
            let (request, respond) = connection.accept().await.expect("open").expect("a request");
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
    async fn bytes_that_wait_here_count_against_the_window_until_they_leave() {
        let (mut body, _connection) = arrived().await;
        let mut ahead = Ahead::default();
        assert!(ahead.fill(&mut BodySource::Http2(&mut body)).now_or_never().is_none());
        assert_eq!((queued(&ahead), body.in_flight()), (SENT_BYTES, SENT_BYTES));
        while matches!(ahead.next(&mut BodySource::Http2(&mut body)), Some(Ok(Some(_)))) {
            assert_eq!(body.in_flight(), queued(&ahead));
        }
        assert_eq!(body.in_flight(), 0);
    }

    #[tokio::test]
    async fn piece_kept_for_a_retry_is_released_once() {
        let (mut body, _connection) = arrived().await;
        let taken = RefCell::<ReplayBuffer>::default();
        let mut ahead = Ahead::new(Some(&taken));
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
    async fn what_was_read_ahead_and_dropped_is_released_without_what_was_not_taken() {
        let (mut body, _connection) = arrived().await;
        assert!(body.held_piece().await.is_ok_and(|piece| piece.is_some()));
        body.release_beyond(0);
        assert_eq!(body.in_flight(), SENT_BYTES - PIECE_BYTES);
        while body.in_flight() > 0 {
            assert!(body.piece().await.is_ok_and(|piece| piece.is_some()));
        }
    }

    #[tokio::test]
    async fn lone_small_piece_leaves_its_read_buffer_unless_it_is_the_last() {
        let (mut body, _connection) = arrived().await;
        for _ in 1..SENT_BYTES / PIECE_BYTES {
            assert!(body.piece().await.is_ok_and(|piece| piece.is_some()));
        }
        let mut ahead = Ahead::default();
        let lone = ahead.next(&mut BodySource::Http2(&mut body)).and_then(Result::ok).flatten();
        let lone = lone.expect("a piece");
        let buffer = lone.as_ptr();
        let sent = ahead.merge(lone.clone(), &mut BodySource::Http2(&mut body));
        assert_eq!(sent, lone);
        assert_ne!(sent.as_ptr(), buffer);
        assert!(ahead.next(&mut BodySource::Http2(&mut body)).is_none());
        let last = ahead.merge(lone, &mut BodySource::Empty);
        assert_eq!(last.as_ptr(), buffer);
        assert!(matches!(ahead.next(&mut BodySource::Empty), Some(Ok(None))));
    }

    #[test]
    fn merged_piece_is_in_an_allocation_of_at_most_twice_its_size() {
        let read_buffer = Bytes::from(vec![7; MERGED_BYTES]);
        for count in [2, 3, 50, 163] {
            let pieces = vec![read_buffer.slice(..100); count];
            let mut source = BodySource::Again(pieces.into_iter(), Box::new(BodySource::Empty));
            let mut ahead = Ahead::default();
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
