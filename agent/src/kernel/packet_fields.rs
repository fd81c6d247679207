//! The packet fields that the table reads: their offsets, and their encoding in sets.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use weft_model::Transport;

use super::service::{ServiceAddress, ServiceKey};
use crate::netlink::nf_tables::{
    self as nf, Comparison, Expression, MetaKey, PayloadBase, ValueKind,
};

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NetFamily {
    V4,
    V6,
}

impl NetFamily {
    pub(super) const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub(super) fn of(is_ipv4: bool) -> Self {
        if is_ipv4 { Self::V4 } else { Self::V6 }
    }

    /// `AF_INET` or `AF_INET6`, which equals `NFPROTO_*`.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    pub(super) fn kind(self) -> ValueKind {
        match self {
            Self::V4 => ValueKind::Ipv4,
            Self::V6 => ValueKind::Ipv6,
        }
    }

    /// The length of an address in words of four bytes.
    pub(super) fn words(self) -> u32 {
        match self {
            Self::V4 => 1,
            Self::V6 => 4,
        }
    }

    /// The offsets of the source and destination address in the IP header.
    pub(super) fn offsets(self) -> (u32, u32) {
        match self {
            Self::V4 => (12, 16),
            Self::V6 => (8, 24),
        }
    }

    pub(super) fn pick<T>(self, v4: T, v6: T) -> T {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }

    pub(super) fn load_source(self, word: u32) -> Expression {
        nf::load_payload_at(word, PayloadBase::Network, self.offsets().0, self.words() * 4)
    }

    pub(super) fn load_destination(self, word: u32) -> Expression {
        nf::load_payload_at(word, PayloadBase::Network, self.offsets().1, self.words() * 4)
    }

    /// Ends the rule for packets to loopback addresses.
    pub(super) fn match_non_loopback_destination(self) -> [Expression; 2] {
        let loopback = self.pick(vec![127], address_bytes(Ipv6Addr::LOCALHOST.into()));
        let bytes = self.pick(1, 16);
        let load = nf::load_payload_at(0, PayloadBase::Network, self.offsets().1, bytes);
        [load, nf::compare(Comparison::NotEqual, &loopback)]
    }

    pub(super) fn match_family(self) -> [Expression; 2] {
        [nf::load_meta(MetaKey::Family), nf::compare(Comparison::Equal, &[self.number()])]
    }
}

pub(super) fn load_source_port(word: u32) -> Expression {
    nf::load_payload_at(word, PayloadBase::Transport, 0, 2)
}

pub(super) fn load_destination_port(word: u32) -> Expression {
    nf::load_payload_at(word, PayloadBase::Transport, 2, 2)
}

/// Loads the sequence number of a TCP packet (RFC 9293, section 3.1).
pub(super) fn load_sequence(word: u32) -> Expression {
    nf::load_payload_at(word, PayloadBase::Transport, 4, 4)
}

pub(super) fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

pub(super) fn padded_port(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

pub(super) fn protocol_and_port(transport: Transport, address: SocketAddr) -> Vec<u8> {
    [[transport.number(), 0, 0, 0], padded_port(address.port())].concat()
}

/// The key of a service in the dispatch sets: address, protocol and port, or only the last two.
pub(super) fn dispatch_key(key: ServiceKey) -> Vec<u8> {
    match key.address {
        ServiceAddress::Exact(at) => {
            [address_bytes(at.ip()), protocol_and_port(key.transport, at)].concat()
        }
        ServiceAddress::AnyLocal(at) => protocol_and_port(key.transport, at),
    }
}

/// An address and its port, each padded to whole words.
pub(super) fn address_and_port(address: SocketAddr) -> Vec<u8> {
    [address_bytes(address.ip()), padded_port(address.port()).to_vec()].concat()
}
