//! Finds free ports.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

/// Starts below the ephemeral port range: the kernel could give a port of that range to an outgoing
/// connection before the test's process binds it.
static NEXT: AtomicU16 = AtomicU16::new(20_000);

/// Returns a free port of loopback, a different one at each call.
///
/// # Panics
/// If no port is free.
#[must_use]
pub fn free() -> u16 {
    (0..10_000)
        .map(|_| NEXT.fetch_add(1, Ordering::Relaxed))
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("one of ten thousand ports is free")
}
