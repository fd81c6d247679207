//! Room for what is read and written, shared by the connections of a worker: one that waits for a
//! request owns none.

use std::cell::RefCell;

use bytes::BytesMut;

/// How many buffers a worker keeps.
const KEPT: usize = 64;
/// The largest that is kept.
const LARGEST_BYTES: usize = 64 * 1024;

thread_local! {
    static BUFFERS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer, with whatever room it has.
pub(crate) fn take() -> BytesMut {
    BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default()
}

/// Gives an empty buffer back. Its room is kept for others, unless it is large.
pub(crate) fn give_back(buffer: &mut BytesMut) {
    let mut buffer = std::mem::take(buffer);
    // Its parts may have been handed on; once they are gone all of the room can be had again.
    let is_large = buffer.try_reclaim(LARGEST_BYTES + 1);
    if !buffer.is_empty() || is_large || !buffer.try_reclaim(1) {
        return;
    }
    BUFFERS.with_borrow_mut(|kept| {
        if kept.len() < KEPT {
            kept.push(buffer);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_goes_from_one_to_the_next() {
        let mut first = take();
        first.extend_from_slice(&[1; 4096]);
        let room = first.as_ptr();
        let part = first.split().freeze();
        drop(part);
        give_back(&mut first);
        assert_eq!(first.capacity(), 0, "it owns nothing any more");
        let mut second = take();
        second.reserve(4096);
        assert_eq!(second.as_ptr(), room);
        let mut large = BytesMut::zeroed(LARGEST_BYTES + 1);
        large.clear();
        give_back(&mut large);
        assert_eq!(take().capacity(), 0);
        let mut large = BytesMut::zeroed(LARGEST_BYTES + 1);
        drop(large.split_to(LARGEST_BYTES - 10));
        large.clear();
        give_back(&mut large);
        assert_eq!(take().capacity(), 0, "what is left of it is small, and it is not");
    }
}
