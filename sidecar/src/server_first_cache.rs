//! Remembers the destinations whose services speak first.

use std::cell::RefCell;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::rc::Rc;

/// The most destinations that are remembered as server-first.
const CACHE_LIMIT: usize = 1024;

/// Destinations with a server-first protocol, whose next client is not delayed.
#[derive(Debug, Default)]
pub(crate) struct ServerFirstCache {
    known: RefCell<HashSet<SocketAddr>>,
    /// The number of services being probed, as the number of clones.
    pub(crate) probes: Rc<()>,
}

impl ServerFirstCache {
    /// Whether the last connection to a destination was server-first.
    pub(crate) fn contains(&self, destination: SocketAddr) -> bool {
        self.known.borrow().contains(&destination)
    }

    /// Remembers whether the service at a destination speaks first.
    pub(crate) fn record(&self, destination: SocketAddr, speaks_first: bool) {
        let mut known = self.known.borrow_mut();
        if !speaks_first {
            known.remove(&destination);
        } else if known.len() < CACHE_LIMIT {
            known.insert(destination);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_first_cache_is_bounded_and_forgets_client_first_destinations() {
        let server_first = ServerFirstCache::default();
        let at =
            |port: usize| SocketAddr::from(([127, 0, 0, 1], u16::try_from(port).expect("small")));
        for port in 1..=CACHE_LIMIT + 10 {
            server_first.record(at(port), true);
        }
        assert_eq!(server_first.known.borrow().len(), CACHE_LIMIT);
        assert!(server_first.contains(at(1)));
        server_first.record(at(1), false);
        assert!(!server_first.contains(at(1)));
    }
}
