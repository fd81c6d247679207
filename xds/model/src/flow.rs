//! What identifies a flow, and the hash that every agent of a mesh agrees on.

use std::net::{IpAddr, SocketAddr};

use crate::jhash::jhash;

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

    /// The word in names, logs and rules.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    /// The seed of flows of this protocol: the mesh's own, told apart so that the ports of one do not
    /// foretell the endpoints of the other.
    #[must_use]
    pub fn seed(self, seed: u32) -> u32 {
        seed ^ u32::from(self.number()) << 24
    }
}

/// What of a flow decides about its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FlowKey {
    /// The 5-tuple: flows of one client spread over the endpoints.
    #[default]
    FiveTuple,
    /// The client's address: all its flows of a protocol go to one endpoint.
    SourceAddress,
    /// The 5-tuple and, of TCP, the sequence number of the SYN: a client that uses a port again goes to
    /// an endpoint anew.
    WithSequence,
}

impl FlowKey {
    /// Whether a flow of this protocol is hashed with the sequence number of its SYN.
    #[must_use]
    pub fn takes_sequence(self, transport: Transport) -> bool {
        self == Self::WithSequence && transport == Transport::Tcp
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
    /// The flow's hash under the mesh's `seed`: the same on every node and in the kernel.
    ///
    /// It is what nf_tables computes by `jhash saddr . sport . daddr . dport seed SEED` before it
    /// scales it, with the protocol's number in the topmost byte of the seed: each field in network
    /// order and filled up to four bytes; by [`FlowKey::SourceAddress`], `jhash saddr`, and by
    /// [`FlowKey::WithSequence`] with `tcp sequence` behind the rest. `sequence` is that of the SYN, and
    /// of no account otherwise. A mapped IPv4 address counts as IPv4. The seed, where it is kept secret,
    /// keeps a client from crafting tuples that all fall on one endpoint.
    #[must_use]
    pub fn hash(&self, key: FlowKey, sequence: u32, seed: u32) -> u32 {
        let seed = self.transport.seed(seed);
        match key {
            FlowKey::WithSequence if self.transport == Transport::Tcp => {
                self.hash_all(&sequence.to_be_bytes(), seed)
            }
            FlowKey::FiveTuple | FlowKey::WithSequence => self.hash_all(&[], seed),
            FlowKey::SourceAddress => match self.client.ip().to_canonical() {
                IpAddr::V4(v4) => jhash(&v4.octets(), seed),
                IpAddr::V6(v6) => jhash(&v6.octets(), seed),
            },
        }
    }

    fn hash_all(&self, behind: &[u8], seed: u32) -> u32 {
        let [client, destination] = [self.client, self.destination];
        let ports = [client, destination].map(|address| filled(address.port()));
        let ips = [client, destination].map(|address| address.ip().to_canonical());
        let mut key = [0; 44];
        let mut length = 0;
        let mut put = |bytes: &[u8]| {
            let places = key.iter_mut().skip(length);
            places.zip(bytes).for_each(|(place, byte)| *place = *byte);
            length += bytes.len();
        };
        for (ip, port) in ips.into_iter().zip(ports) {
            match (ip, ips) {
                (IpAddr::V4(v4), [IpAddr::V4(_), IpAddr::V4(_)]) => put(&v4.octets()),
                (ip, _) => put(&wide(ip)),
            }
            put(&port);
        }
        put(behind);
        jhash(key.get(..length).unwrap_or_default(), seed)
    }
}

fn filled(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
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
        let hash = |client: &str, seed| tuple(client).hash(FlowKey::FiveTuple, 0, seed);
        assert_eq!(hash("10.0.0.1:4000", 7), 1_559_211_547);
        assert_ne!(hash("10.0.0.1:4000", 7), hash("10.0.0.1:4001", 7));
        assert_ne!(hash("10.0.0.1:4000", 7), hash("10.0.0.1:4000", 8));
        assert_eq!(hash("10.0.0.1:4000", 7), hash("[::ffff:10.0.0.1]:4000", 7));
    }

    #[test]
    fn by_its_address_a_client_has_one_hash() {
        let hash = |client: &str| tuple(client).hash(FlowKey::SourceAddress, 0, 7);
        assert_eq!(hash("10.0.0.1:4000"), hash("10.0.0.1:4001"));
        assert_ne!(hash("10.0.0.1:4000"), hash("10.0.0.2:4000"));
        assert_eq!(hash("10.0.0.1:4000"), hash("[::ffff:10.0.0.1]:4000"));
    }

    #[test]
    fn the_sequence_counts_where_it_is_wanted_and_there_is_one() {
        let tcp = tuple("10.0.0.1:4000");
        let hash = |sequence| tcp.hash(FlowKey::WithSequence, sequence, 7);
        assert_ne!(hash(1), hash(2));
        assert_ne!(hash(0), tcp.hash(FlowKey::FiveTuple, 0, 7));
        assert_eq!(tcp.hash(FlowKey::FiveTuple, 1, 7), tcp.hash(FlowKey::FiveTuple, 2, 7));
        let udp = FlowTuple { transport: Transport::Udp, ..tcp };
        assert_eq!(udp.hash(FlowKey::WithSequence, 1, 7), udp.hash(FlowKey::FiveTuple, 2, 7));
    }
}
