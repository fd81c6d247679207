//! The ports and addresses at which redirected traffic arrives.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// The port that captures outbound TCP connections, as in Istio.
pub const OUTBOUND_PORT: u16 = 15001;
/// The port that captures inbound connections of sidecars.
pub const INBOUND_PORT: u16 = 15006;
/// The port that captures UDP datagrams.
pub const UDP_PORT: u16 = 15099;

/// The wildcard addresses of both IP versions at a port, each with the suffix of its listener's name.
pub(super) fn wildcard_addresses(port: u16) -> [(&'static str, SocketAddr); 2] {
    [("", (Ipv4Addr::UNSPECIFIED, port).into()), ("-6", (Ipv6Addr::UNSPECIFIED, port).into())]
}
