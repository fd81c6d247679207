//! Who is on the other side of a connection: what policies of connections and the TCP access log see.

use std::net::{IpAddr, SocketAddr};

use weft_certs::VerifiedPeer;
use weft_model::{RbacDecision, RequestFacts, SpiffeId, evaluate_rbac};
use weft_runtime::access::ConnectionTraceId;

use crate::authorize::RbacFilters;

/// A client connection after its handshake.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionInfo<'a> {
    /// The verified client; none without mutual TLS.
    pub(crate) peer: Option<&'a VerifiedPeer>,
    pub(crate) client: SocketAddr,
    pub(crate) destination: SocketAddr,
    /// The TLS version; none without TLS.
    pub(crate) tls_version: Option<&'static str>,
    /// Its identifier in the access log.
    pub(crate) trace: Option<ConnectionTraceId>,
}

impl ConnectionInfo<'_> {
    /// Evaluates policies for the connection.
    pub(crate) fn judge<'p>(&self, rules: &'p RbacFilters) -> RbacDecision<'p> {
        evaluate_rbac(rules.iter().map(|filter| &**filter), self).enforced
    }
}

/// Rules that match on parts of an HTTP request never match here.
impl RequestFacts for ConnectionInfo<'_> {
    fn method(&self) -> &str {
        ""
    }

    fn path(&self) -> &str {
        ""
    }

    fn target_fits(&self, _: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        false
    }

    fn scheme(&self) -> &str {
        ""
    }

    fn authority(&self) -> &str {
        ""
    }

    fn has_header(&self, _: &str, _: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        false
    }

    fn query(&self, _: &str) -> Option<&str> {
        None
    }

    fn has_claim(&self, _: &str, _: &[String], _: &mut dyn FnMut(&str) -> bool) -> bool {
        false
    }

    fn peer(&self) -> Option<&SpiffeId> {
        self.peer.and_then(VerifiedPeer::identity)
    }

    fn remote_address(&self) -> IpAddr {
        self.client.ip().to_canonical()
    }

    fn client_address(&self) -> IpAddr {
        self.remote_address()
    }

    fn destination_address(&self) -> IpAddr {
        self.destination.ip().to_canonical()
    }

    fn destination_port(&self) -> u16 {
        self.destination.port()
    }
}
