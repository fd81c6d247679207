//! What was read of a body and not sent yet. Small pieces are merged: each frame of HTTP/2 costs the next
//! receiver as much as a large one, and a flood of small frames ends connections.

use std::cell::RefCell;
use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;

use super::body::{Broken, Source, Taken};

/// Pieces below this size are merged.
const SMALL_BYTES: usize = 1024;
/// How large a merged piece becomes: the smallest limit of a frame in HTTP/2.
const MERGED_BYTES: usize = 16 * 1024;

/// The next of a body, or its end.
type Next = Result<Option<Bytes>, Broken>;

/// What was read ahead. The window of the stream bounds it: what is in here was not released.
#[derive(Debug, Default)]
pub(crate) struct Ahead<'t> {
    /// Where all that is read is kept, so that the body can be sent once more.
    taken: Option<&'t RefCell<Taken>>,
    pieces: VecDeque<Bytes>,
    small: BytesMut,
    end: Option<Next>,
    /// Whether the source had nothing at hand when it was last asked.
    is_drained: bool,
}

impl<'t> Ahead<'t> {
    pub(crate) fn new(taken: Option<&'t RefCell<Taken>>) -> Self {
        Self { taken, ..Self::default() }
    }

    /// Waits for the next piece when none was at hand.
    pub(crate) async fn wait(&mut self, source: &mut Source<'_>) -> Next {
        let next = source.piece().await;
        self.keep(&next);
        next
    }

    fn keep(&self, next: &Next) {
        if let (Some(taken), Ok(Some(piece))) = (self.taken, next) {
            taken.borrow_mut().add(piece);
        }
    }

    fn poll(&self, source: &mut Source<'_>) -> Option<Next> {
        let next = source.piece().now_or_never()?;
        self.keep(&next);
        Some(next)
    }

    /// The next piece, as far as it is at hand.
    pub(crate) fn next(&mut self, source: &mut Source<'_>) -> Option<Next> {
        if let Some(piece) = self.take() {
            source.release(piece.len());
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
    pub(crate) fn merge(&mut self, first: Bytes, source: &mut Source<'_>) -> Bytes {
        if first.len() >= SMALL_BYTES || !self.is_empty() {
            return first;
        }
        let mut merged = BytesMut::with_capacity(first.len());
        merged.extend_from_slice(&first);
        loop {
            match self.poll(source) {
                Some(Ok(Some(more))) if merged.len() + more.len() <= MERGED_BYTES => {
                    merged.extend_from_slice(&more);
                }
                Some(next) => self.end = Some(next),
                None => self.is_drained = true,
            }
            if self.end.is_some() || self.is_drained {
                return merged.freeze();
            }
        }
    }

    /// Reads on for as long as this is polled: while the receiver takes nothing, small frames must not
    /// pile up in the library. Never resolves.
    pub(crate) async fn fill(&mut self, source: &mut Source<'_>) {
        while self.end.is_none() && source.reads_ahead() {
            // What may be sent once more is bounded by itself, and must not keep the window.
            let is_kept = self.taken.is_some_and(|taken| taken.borrow().is_whole());
            let next = if is_kept { source.piece().await } else { source.held_piece().await };
            self.keep(&next);
            match next {
                Ok(Some(piece)) => self.add(&piece),
                end => self.end = Some(end),
            }
        }
        std::future::pending().await
    }

    fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.small.is_empty() && self.end.is_none()
    }

    fn add(&mut self, piece: &Bytes) {
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
        self.pieces.pop_front().or_else(small)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_piece_is_in_an_allocation_of_at_most_twice_its_size() {
        let read_buffer = Bytes::from(vec![7; MERGED_BYTES]);
        for count in [1, 2, 3, 50, 163] {
            let pieces = vec![read_buffer.slice(..100); count];
            let mut source = Source::Again(pieces.into_iter(), Box::new(Source::Empty));
            let mut ahead = Ahead::default();
            let first = ahead.next(&mut source).and_then(Result::ok).flatten().expect("a piece");
            let merged = ahead.merge(first, &mut source);
            assert_eq!(merged.len(), 100 * count);
            let capacity = merged.try_into_mut().expect("no other piece shares it").capacity();
            assert!(capacity <= 200 * count, "{capacity} bytes for {count} pieces");
        }
    }

    #[test]
    fn small_pieces_are_merged_in_order_and_large_ones_kept() {
        let mut ahead = Ahead::default();
        let mut sent = Vec::new();
        for round in 0..100_u8 {
            for _ in 0..500 {
                ahead.add(&Bytes::from(vec![round]));
                sent.push(round);
            }
            if round % 10 == 0 {
                ahead.add(&Bytes::from(vec![round; SMALL_BYTES]));
                sent.extend([round; SMALL_BYTES]);
            }
        }
        let pieces: Vec<Bytes> = std::iter::from_fn(|| ahead.take()).collect();
        assert!(pieces.len() <= 24, "{} pieces", pieces.len());
        assert!(pieces.iter().all(|piece| piece.len() <= MERGED_BYTES));
        assert_eq!(pieces.concat(), sent);
        assert!(ahead.is_empty());
    }
}
