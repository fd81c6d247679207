//! A pool of I/O buffers per worker thread. A connection that waits for a request owns no buffer.

use std::cell::RefCell;

use bytes::BytesMut;

/// The number of buffers in the pool of a worker.
const POOL_LIMIT: usize = 64;
/// The capacity of the largest buffer that returns to the pool.
const LARGEST_BYTES: usize = 64 * 1024;

thread_local! {
    static BUFFERS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer of any capacity.
pub(crate) fn take() -> BytesMut {
    BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default()
}

/// Returns an empty buffer to the pool, unless it is large.
pub(crate) fn give_back(buffer: &mut BytesMut) {
    let mut buffer = std::mem::take(buffer);
    // Slices of it may still be in use; the whole capacity is available again once they are dropped.
    let is_large = buffer.try_reclaim(LARGEST_BYTES + 1);
    if !buffer.is_empty() || is_large || !buffer.try_reclaim(1) {
        return;
    }
    BUFFERS.with_borrow_mut(|pool| {
        if pool.len() < POOL_LIMIT {
            pool.push(buffer);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returned_buffer_is_reused_unless_it_is_large() {
        let mut first = take();
        first.extend_from_slice(&[1; 4096]);
        let allocation = first.as_ptr();
        let part = first.split().freeze();
        drop(part);
        give_back(&mut first);
        assert_eq!(first.capacity(), 0, "the returned buffer still owns memory");
        let mut second = take();
        second.reserve(4096);
        assert_eq!(second.as_ptr(), allocation);
        let mut large = BytesMut::zeroed(LARGEST_BYTES + 1);
        large.clear();
        give_back(&mut large);
        assert_eq!(take().capacity(), 0);
        let mut large = BytesMut::zeroed(LARGEST_BYTES + 1);
        drop(large.split_to(LARGEST_BYTES - 10));
        large.clear();
        give_back(&mut large);
        assert_eq!(
            take().capacity(),
            0,
            "a buffer with a large allocation must not return to the pool"
        );
    }
}
