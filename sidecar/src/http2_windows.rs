//! Budget for the receive windows of HTTP/2 connections. A worker must buffer whatever a peer sends into a connection's window
//! until it is forwarded, so windows come from a fixed budget: buffered bytes never exceed it, however slow the receivers
//! and however many the connections.
//!
//! A window of the smallest size is charged while bodies may arrive, and not while the connection is idle, because bytes of
//! closed streams are dropped at once.

use std::cell::Cell;
use std::rc::Rc;

/// The window of a connection while more than half of the budget is left, in bytes.
const FULL_BYTES: u32 = 4 * 1024 * 1024;
/// The smallest window (RFC 9113, section 6.9.2), in bytes. Limits the throughput of connections with high latency.
const SMALL_BYTES: u32 = 65_535;

/// The budget of a worker.
#[derive(Debug)]
pub(crate) struct WindowBudget {
    left: Rc<Cell<u64>>,
    limit: u64,
    /// Whether a body was refused since a quarter of the budget was last free.
    has_refused: Cell<bool>,
}

/// The window of a connection. A full one is charged until it is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionWindow {
    pub(crate) bytes: u32,
    left: Rc<Cell<u64>>,
    /// The number of bodies that may arrive.
    bodies: Cell<usize>,
}

/// Permission to receive a body within a connection's window, until dropped.
#[derive(Debug)]
pub(crate) struct BodyPermit(Rc<ConnectionWindow>);

impl WindowBudget {
    /// A budget of `limit` bytes.
    pub(crate) fn new(limit: u64) -> Self {
        Self { left: Rc::new(Cell::new(limit)), limit, has_refused: Cell::new(false) }
    }

    /// Whether a refusal is the first since the budget was exhausted, so that a series of refusals is logged once.
    pub(crate) fn is_first_refusal(&self) -> bool {
        !self.has_refused.replace(true)
    }

    /// Updates whether a further refusal is logged.
    pub(crate) fn update(&self) {
        if self.left.get() >= self.limit / 4 {
            self.has_refused.set(false);
        }
    }

    /// The window for a connection: full while more than half of the budget is left, and else the smallest.
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
    /// Permission to receive one more body. None when the budget is exhausted.
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
        let mut bodies = vec![first.receive().expect("the budget is not exhausted")];
        bodies.push(first.receive().expect("the same window"));
        bodies.push(second.receive().expect("the budget is not exhausted"));
        bodies.push(third.receive().expect("the budget is not exhausted"));
        assert!(fourth.receive().is_none());
        bodies.remove(0);
        assert!(fourth.receive().is_none(), "another body may still arrive in the first window");
        bodies.remove(0);
        bodies.push(fourth.receive().expect("the budget is not exhausted"));
        drop(bodies);
        assert_eq!(windows.left.get(), windows.limit);
    }
}
