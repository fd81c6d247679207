//! How much the connections of HTTP/2 may make a worker hold. Whatever is sent into a connection's window
//! must be kept until it is passed on, so windows come out of a budget that is there from the start: what
//! can arrive never exceeds it, however slowly others read and however many there are.
//!
//! A window of the smallest size is charged while bodies may arrive, and not while the connection is idle:
//! bytes of streams that are closed are dropped at once.

use std::cell::Cell;
use std::rc::Rc;

/// The window of a connection while there is plenty left.
const FULL_BYTES: u32 = 4 * 1024 * 1024;
/// The smallest there is (RFC 9113, section 6.9.2): slower on a long way, and as correct.
const SMALL_BYTES: u32 = 65_535;

/// What a worker may still promise.
#[derive(Debug)]
pub(crate) struct WindowBudget {
    left: Rc<Cell<u64>>,
    limit: u64,
    /// Whether a body was refused since a quarter of the budget was last free.
    has_refused: Cell<bool>,
}

/// A connection's part of it. A full window is charged until it is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionWindow {
    pub(crate) bytes: u32,
    left: Rc<Cell<u64>>,
    /// How many bodies may arrive.
    bodies: Cell<usize>,
}

/// The right to receive a body within the window of a connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct BodyPermit(Rc<ConnectionWindow>);

impl WindowBudget {
    /// So many bytes at most.
    pub(crate) fn new(limit: u64) -> Self {
        Self { left: Rc::new(Cell::new(limit)), limit, has_refused: Cell::new(false) }
    }

    /// Whether a refusal is the first since the budget was used up, so that a flood of them has one line.
    pub(crate) fn is_first_refusal(&self) -> bool {
        !self.has_refused.replace(true)
    }

    /// Notes whether there is room again.
    pub(crate) fn look(&self) {
        if self.left.get() >= self.limit / 4 {
            self.has_refused.set(false);
        }
    }

    /// The window for a connection: full while more than half is left, and else the smallest.
    pub(crate) fn open(&self) -> Rc<ConnectionWindow> {
        let left = self.left.get();
        let is_plenty = left >= self.limit / 2 + u64::from(FULL_BYTES);
        let bytes = if is_plenty { FULL_BYTES } else { SMALL_BYTES };
        if is_plenty {
            self.left.set(left - u64::from(bytes));
        }
        Rc::new(ConnectionWindow { bytes, left: self.left.clone(), bodies: Cell::new(0) })
    }
}

impl ConnectionWindow {
    /// The right to receive one more body. None when all of the budget is in use.
    pub(crate) fn receive(self: &Rc<Self>) -> Option<BodyPermit> {
        if self.bodies.get() == 0 && self.bytes == SMALL_BYTES {
            self.left.set(self.left.get().checked_sub(SMALL_BYTES.into())?);
        }
        self.bodies.set(self.bodies.get() + 1);
        Some(BodyPermit(self.clone()))
    }
}

impl Drop for BodyPermit {
    fn drop(&mut self) {
        let ConnectionWindow { bytes, left, bodies } = &*self.0;
        bodies.set(bodies.get().saturating_sub(1));
        if bodies.get() == 0 && *bytes == SMALL_BYTES {
            left.set(left.get() + u64::from(SMALL_BYTES));
        }
    }
}

impl Drop for ConnectionWindow {
    fn drop(&mut self) {
        if self.bytes == FULL_BYTES {
            self.left.set(self.left.get() + u64::from(FULL_BYTES));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_connections_are_charged_for_full_windows_only() {
        let windows = WindowBudget::new(8 * u64::from(FULL_BYTES) + 10);
        let held: Vec<Rc<ConnectionWindow>> = (0..10_000).map(|_| windows.open()).collect();
        let full = held.iter().filter(|window| window.bytes == FULL_BYTES).count();
        assert_eq!(full, 4);
        assert_eq!(windows.left.get(), 4 * u64::from(FULL_BYTES) + 10);
        drop(held);
        assert_eq!(windows.left.get(), windows.limit);
        assert_eq!(windows.open().bytes, FULL_BYTES);
    }

    #[test]
    fn windows_of_bodies_never_exceed_the_limit() {
        let windows = WindowBudget::new(3 * u64::from(SMALL_BYTES) + 10);
        let connections: Vec<Rc<ConnectionWindow>> = (0..5).map(|_| windows.open()).collect();
        let [first, second, third, fourth, _] = &connections[..] else { panic!("there are five") };
        let mut bodies = vec![first.receive().expect("there is room")];
        bodies.push(first.receive().expect("it is the same window"));
        bodies.push(second.receive().expect("there is room"));
        bodies.push(third.receive().expect("there is room"));
        assert!(fourth.receive().is_none());
        bodies.remove(0);
        assert!(fourth.receive().is_none(), "another body may still arrive in that window");
        bodies.remove(0);
        bodies.push(fourth.receive().expect("there is room again"));
        drop(bodies);
        assert_eq!(windows.left.get(), windows.limit);
    }
}
