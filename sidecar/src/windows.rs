//! How much the connections of HTTP/2 may make a worker hold. Whatever is sent into a connection's window
//! must be kept until somebody takes it, so windows come out of a budget that is there from the start:
//! what was promised never exceeds it, whoever reads slowly and however many there are.

use std::cell::Cell;
use std::rc::Rc;

/// The window of a connection while there is plenty left.
const FULL_BYTES: u32 = 4 * 1024 * 1024;
/// The smallest there is (RFC 9113, section 6.9.2): slower on a long way, and as correct.
const SMALL_BYTES: u32 = 65_535;

/// What a worker may still promise.
#[derive(Debug)]
pub(crate) struct Windows {
    left: Rc<Cell<u64>>,
    limit: u64,
}

/// A connection's part of it; given back when dropped.
#[derive(Debug)]
pub(crate) struct Window {
    pub(crate) bytes: u32,
    left: Rc<Cell<u64>>,
}

impl Windows {
    /// So many bytes at most.
    pub(crate) fn new(limit: u64) -> Self {
        Self { left: Rc::new(Cell::new(limit)), limit }
    }

    /// The window for a connection: full while more than half is left. None when all is promised.
    pub(crate) fn take(&self) -> Option<Window> {
        let left = self.left.get();
        let is_plenty = left >= self.limit / 2 + u64::from(FULL_BYTES);
        let bytes = if is_plenty { FULL_BYTES } else { SMALL_BYTES };
        self.left.set(left.checked_sub(bytes.into())?);
        Some(Window { bytes, left: self.left.clone() })
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.left.set(self.left.get() + u64::from(self.bytes));
    }
}

/// The window of a connection that is told to go.
pub(crate) const NO_WINDOW_BYTES: u32 = SMALL_BYTES;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_shrink_and_never_exceed_the_limit() {
        let limit = 8 * u64::from(FULL_BYTES) + 10;
        let windows = Windows::new(limit);
        let mut held = Vec::new();
        while let Some(window) = windows.take() {
            held.push(window);
        }
        let full = held.iter().filter(|window| window.bytes == FULL_BYTES).count();
        assert_eq!(full, 4);
        let promised: u64 = held.iter().map(|window| u64::from(window.bytes)).sum();
        assert!(promised <= limit && limit - promised < u64::from(SMALL_BYTES));
        held.truncate(1);
        assert_eq!(windows.take().map(|window| window.bytes), Some(FULL_BYTES));
        drop(held);
        assert_eq!(windows.left.get(), limit);
    }

    #[test]
    fn without_a_budget_nobody_gets_one() {
        assert!(Windows::new(0).take().is_none());
        assert!(Windows::new(u64::from(SMALL_BYTES)).take().is_some());
    }
}
