//! Ports that nobody uses.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

/// Below the range from which the kernel takes ports for outgoing connections: a port that was found
/// free there could be taken before its process binds it.
static NEXT: AtomicU16 = AtomicU16::new(20_000);

/// A free port of loopback, and another one at each call.
///
/// # Panics
/// When none is left.
#[must_use]
pub fn free() -> u16 {
    (0..10_000)
        .map(|_| NEXT.fetch_add(1, Ordering::Relaxed))
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("ten thousand ports are more than a test binds")
}
