//! The attributes of a request or connection that decisions read.

use std::net::IpAddr;

use crate::SpiffeId;

/// The attributes of a request or connection that policies and routes are evaluated with.
pub trait RequestFacts {
    /// The method.
    fn method(&self) -> &str;
    /// The path without its query.
    fn path(&self) -> &str;
    /// Whether `fits` accepts a spelling of the path. Most paths have one spelling.
    fn path_fits(&self, fits: &mut dyn FnMut(&str) -> bool) -> bool {
        fits(self.path())
    }
    /// Whether `fits` accepts a spelling of the path with its query. A request without a path has none.
    fn target_fits(&self, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool;
    /// The scheme.
    fn scheme(&self) -> &str;
    /// The authority.
    fn authority(&self) -> &str;
    /// Whether `fits` accepts a value of the header. `name` is lower case.
    fn has_header(&self, name: &str, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool;
    /// The first value of a query parameter, as sent.
    fn query(&self, name: &str) -> Option<&str>;
    /// Whether `fits` accepts a value of a claim of the verified token. `name` is the metadata key of the payload,
    /// `path` leads to the claim.
    fn has_claim(&self, name: &str, path: &[String], fits: &mut dyn FnMut(&str) -> bool) -> bool;
    /// The SPIFFE ID of the peer's verified certificate.
    fn peer(&self) -> Option<&SpiffeId>;
    /// The peer's address.
    fn remote_address(&self) -> IpAddr;
    /// The client's address, as forwarded by trusted hops.
    fn client_address(&self) -> IpAddr {
        self.remote_address()
    }
    /// The original destination address.
    fn destination_address(&self) -> IpAddr;
    /// The original destination port.
    fn destination_port(&self) -> u16;
}
