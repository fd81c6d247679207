//! What identifies a flow, and the hash that every agent of a mesh agrees on.

use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};

use siphasher::sip::SipHasher13;

/// The transport protocol of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    /// TCP, IP protocol 6.
    Tcp,
    /// UDP, IP protocol 17.
    Udp,
}

impl Transport {
    /// The IP protocol number.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

/// The 5-tuple of a flow: who talks to which service address over what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowTuple {
    /// The transport protocol.
    pub transport: Transport,
    /// The client's address and port.
    pub client: SocketAddr,
    /// The address and port the client aimed at: its original destination.
    pub destination: SocketAddr,
}

impl FlowTuple {
    /// The flow's hash under the mesh's `seed`: the same on every node and in every version.
    ///
    /// SipHash-1-3 over protocol, addresses as 16 bytes (IPv4 mapped) and ports, big-endian. The
    /// seed keeps a client from crafting tuples that all fall on one endpoint.
    #[must_use]
    pub fn hash(&self, seed: u64) -> u64 {
        let mut hasher = SipHasher13::new_with_keys(seed, !seed);
        hasher.write(&[self.transport.number()]);
        for address in [self.client, self.destination] {
            hasher.write(&wide(address.ip()));
            hasher.write(&address.port().to_be_bytes());
        }
        hasher.finish()
    }
}

fn wide(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(client: &str) -> FlowTuple {
        FlowTuple {
            transport: Transport::Tcp,
            client: client.parse().expect("an address"),
            destination: "10.96.0.1:80".parse().expect("an address"),
        }
    }

    #[test]
    fn the_hash_is_written_down() {
        // Changing this number moves every flow of every running mesh.
        assert_eq!(tuple("10.0.0.1:4000").hash(7), 5_177_175_623_394_221_354);
        assert_ne!(tuple("10.0.0.1:4000").hash(7), tuple("10.0.0.1:4001").hash(7));
        assert_ne!(tuple("10.0.0.1:4000").hash(7), tuple("10.0.0.1:4000").hash(8));
        assert_eq!(tuple("10.0.0.1:4000").hash(7), tuple("[::ffff:10.0.0.1]:4000").hash(7));
    }
}
