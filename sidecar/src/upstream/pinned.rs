//! Connections to endpoints that serve one client connection only.
//!
//! A login by NTLM or Negotiate is one of the connection (RFC 4559, section 6): whoever sends the next request
//! over it is taken for the same client.

use std::cell::RefCell;
use std::net::SocketAddr;

use super::pool::{Http1Connection, is_alive};
use crate::http::head::{RequestHead, ResponseHead, list_elements};
use crate::http::headers::Headers;
use crate::plan::PlannedCluster;

/// Such a connection, while no request is under way.
#[derive(Debug)]
pub(crate) struct PinnedConnection {
    target: u64,
    pub(super) address: SocketAddr,
    pub(super) connection: Http1Connection,
}

impl PinnedConnection {
    pub(super) fn new(
        target: &PlannedCluster,
        address: SocketAddr,
        mut connection: Http1Connection,
    ) -> Self {
        connection.used = true;
        connection.reader.rest();
        connection.writer.rest();
        Self { target: target.id, address, connection }
    }

    /// The connection in `pin`, if another request to `target` may go over it.
    pub(super) fn take(
        pin: Option<&RefCell<Option<Self>>>,
        target: &PlannedCluster,
    ) -> Option<Self> {
        let pinned = pin?.borrow_mut().take_if(|pinned| pinned.target == target.id)?;
        is_alive(&pinned.connection).then_some(pinned)
    }
}

/// Whether a request carries a login that is one of the connection.
pub(super) fn logs_in(request: &RequestHead) -> bool {
    names_login(&request.headers, "authorization")
}

/// Whether a service asks for a login that is one of the connection, or completes one.
pub(super) fn asks_for_login(response: &ResponseHead) -> bool {
    names_login(&response.headers, "www-authenticate")
}

fn names_login(headers: &Headers, name: &str) -> bool {
    let mut found = false;
    headers.each(name, |value| {
        for challenge in list_elements(value) {
            let scheme = challenge.split(|byte| *byte == b' ').next().unwrap_or_default();
            found |= [&b"ntlm"[..], b"negotiate"].iter().any(|s| scheme.eq_ignore_ascii_case(s));
        }
    });
    found
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    #[test]
    fn ntlm_and_negotiate_are_logins_of_a_connection() {
        let check = |values: &[&str], expected| {
            let mut map = HeaderMap::new();
            for value in values {
                map.append("www-authenticate", value.parse().expect("a header value"));
            }
            let found = names_login(&Headers::from(map), "www-authenticate");
            assert_eq!(found, expected, "{values:?}");
        };
        check(&["NTLM"], true);
        check(&["ntlm TlRMTVNTUAAC"], true);
        check(&["Negotiate"], true);
        check(&["Basic realm=\"a\"", "NEGOTIATE oYG"], true);
        check(&["Basic realm=\"a\", NTLM"], true);
        check(&[], false);
        check(&["Bearer", "Basic realm=\"ntlm\""], false);
        check(&["Negotiated"], false);
    }
}
