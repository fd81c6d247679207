//! Upstream connections that are pinned to one client connection.
//!
//! NTLM and Negotiate authenticate a connection, not a request (RFC 4559, section 6): the service treats every later
//! request on it as coming from the same client.

use std::cell::RefCell;
use std::net::SocketAddr;

use super::pool::{Http1Connection, is_alive};
use crate::http::head::{RequestHead, ResponseHead, list_elements};
use crate::http::headers::Headers;
use crate::plan::PlannedCluster;

/// A pinned upstream connection, while it is idle.
#[derive(Debug)]
pub(crate) struct PinnedConnection {
    cluster: u64,
    pub(super) address: SocketAddr,
    pub(super) connection: Http1Connection,
}

impl PinnedConnection {
    pub(super) fn new(
        cluster: &PlannedCluster,
        address: SocketAddr,
        mut connection: Http1Connection,
    ) -> Self {
        connection.used = true;
        connection.reader.release_buffer();
        connection.writer.release_buffer();
        Self { cluster: cluster.id, address, connection }
    }

    /// Takes the connection out of `pin` if it leads to `cluster` and is still open.
    pub(super) fn take(
        pin: Option<&RefCell<Option<Self>>>,
        cluster: &PlannedCluster,
    ) -> Option<Self> {
        let pinned = pin?.borrow_mut().take_if(|pinned| pinned.cluster == cluster.id)?;
        is_alive(&pinned.connection).then_some(pinned)
    }
}

/// Whether a request has credentials that authenticate its connection.
pub(super) fn has_connection_login(request: &RequestHead) -> bool {
    names_login(&request.headers, "authorization")
}

/// Whether a response asks for credentials that authenticate the connection, or continues such a login.
pub(super) fn requests_connection_login(response: &ResponseHead) -> bool {
    names_login(&response.headers, "www-authenticate")
}

fn names_login(headers: &Headers, name: &str) -> bool {
    let mut is_named = false;
    headers.each(name, |value| {
        for challenge in list_elements(value) {
            let scheme = challenge.split(|byte| *byte == b' ').next().unwrap_or_default();
            is_named |= [&b"ntlm"[..], b"negotiate"].iter().any(|s| scheme.eq_ignore_ascii_case(s));
        }
    });
    is_named
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    #[test]
    fn ntlm_and_negotiate_are_connection_logins() {
        let check = |values: &[&str], expected| {
            let mut map = HeaderMap::new();
            for value in values {
                map.append("www-authenticate", value.parse().expect("a header value"));
            }
            let is_login = names_login(&Headers::from(map), "www-authenticate");
            assert_eq!(is_login, expected, "{values:?}");
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
