//! The form that all messages of the packet filter share.

use crate::netlink::{Attributes, NetlinkMessage};

/// The family of a table for IPv4 and IPv6.
const FAMILY_INET: u8 = 1;
/// The netfilter subsystem of these messages.
pub(super) const SUBSYSTEM: u16 = 10;

/// The attribute of a rule that lists its expressions.
pub(super) const RULE_EXPRESSIONS: u16 = 4;

/// The fixed part of these messages: family, version and resource ID.
pub(super) fn fixed(family: u8, resource: u16) -> Vec<u8> {
    let [high, low] = resource.to_be_bytes();
    vec![family, 0, high, low]
}

/// A message about a table of both address families.
pub(super) fn message(kind: u16, flags: u16, attributes: Attributes) -> NetlinkMessage {
    NetlinkMessage { kind: SUBSYSTEM << 8 | kind, flags, fixed: fixed(FAMILY_INET, 0), attributes }
}

/// Decodes a zero-terminated name.
pub(crate) fn parse_text(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.strip_suffix(&[0])?.to_vec()).ok()
}
