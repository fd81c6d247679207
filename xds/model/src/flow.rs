//! The identity of a flow (5-tuple), and its hash, which is the same on every agent of a mesh.

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

    /// The name in logs and in firewall rules.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    /// The hash seed for this protocol, derived from the mesh's seed. TCP and UDP have different seeds, so that the
    /// endpoint of a TCP flow does not reveal that of a UDP flow with the same ports.
    #[must_use]
    pub fn seed(self, seed: u32) -> u32 {
        seed ^ u32::from(self.number()) << 24
    }
}

/// Which parts of a flow are hashed to choose its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FlowKey {
    /// The 5-tuple: flows of one client spread over the endpoints.
    #[default]
    FiveTuple,
    /// The client's address: all of its flows of one protocol go to one endpoint.
    SourceAddress,
    /// The 5-tuple and, for TCP, the sequence number of the SYN: a new connection from the same port may go to
    /// another endpoint.
    WithSequence,
}

impl FlowKey {
    /// Whether a flow of this protocol is hashed with the sequence number of its SYN.
    #[must_use]
    pub fn takes_sequence(self, transport: Transport) -> bool {
        self == Self::WithSequence && transport == Transport::Tcp
    }
}

/// The 5-tuple of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowTuple {
    /// The transport protocol.
    pub transport: Transport,
    /// The client's address and port.
    pub client: SocketAddr,
    /// The original destination: the address and port that the client connected to.
    pub destination: SocketAddr,
}

impl FlowTuple {
    /// The flow's hash with the mesh's `seed`: the same on every node and in the kernel.
    ///
    /// It equals the value of the nf_tables expression `jhash saddr . sport . daddr . dport seed SEED` before scaling,
    /// with the protocol number in the most significant byte of the seed. Each field is in network order and padded to
    /// four bytes. With [`FlowKey::SourceAddress`] the expression is `jhash saddr`; with [`FlowKey::WithSequence`],
    /// `tcp sequence` is appended. `sequence` is the SYN's and is only used for that key. An IPv4-mapped IPv6 address
    /// counts as IPv4. While the seed is secret, a client cannot craft tuples that all go to one endpoint.
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

    fn hash_all(&self, suffix: &[u8], seed: u32) -> u32 {
        let [client, destination] = [self.client, self.destination];
        let ports = [client, destination].map(|address| padded(address.port()));
        let ips = [client, destination].map(|address| address.ip().to_canonical());
        let mut key = [0; 44];
        let mut length = 0;
        let mut put = |bytes: &[u8]| {
            let free = key.iter_mut().skip(length);
            free.zip(bytes).for_each(|(target, byte)| *target = *byte);
            length += bytes.len();
        };
        for (ip, port) in ips.into_iter().zip(ports) {
            match (ip, ips) {
                (IpAddr::V4(v4), [IpAddr::V4(_), IpAddr::V4(_)]) => put(&v4.octets()),
                (ip, _) => put(&ipv6_octets(ip)),
            }
            put(&port);
        }
        put(suffix);
        jhash(key.get(..length).unwrap_or_default(), seed)
    }
}

fn padded(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn ipv6_octets(address: IpAddr) -> [u8; 16] {
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
    fn flow_hash_has_a_fixed_value() {
        // A change of this number would move every flow of every running mesh to another endpoint.
        let hash = |client: &str, seed| tuple(client).hash(FlowKey::FiveTuple, 0, seed);
        assert_eq!(hash("10.0.0.1:4000", 7), 1_559_211_547);
        assert_ne!(hash("10.0.0.1:4000", 7), hash("10.0.0.1:4001", 7));
        assert_ne!(hash("10.0.0.1:4000", 7), hash("10.0.0.1:4000", 8));
        assert_eq!(hash("10.0.0.1:4000", 7), hash("[::ffff:10.0.0.1]:4000", 7));
    }

    #[test]
    fn source_address_key_ignores_the_client_port() {
        let hash = |client: &str| tuple(client).hash(FlowKey::SourceAddress, 0, 7);
        assert_eq!(hash("10.0.0.1:4000"), hash("10.0.0.1:4001"));
        assert_ne!(hash("10.0.0.1:4000"), hash("10.0.0.2:4000"));
        assert_eq!(hash("10.0.0.1:4000"), hash("[::ffff:10.0.0.1]:4000"));
    }

    #[test]
    fn sequence_number_is_hashed_only_for_tcp_and_only_on_request() {
        let tcp = tuple("10.0.0.1:4000");
        let hash = |sequence| tcp.hash(FlowKey::WithSequence, sequence, 7);
        assert_ne!(hash(1), hash(2));
        assert_ne!(hash(0), tcp.hash(FlowKey::FiveTuple, 0, 7));
        assert_eq!(tcp.hash(FlowKey::FiveTuple, 1, 7), tcp.hash(FlowKey::FiveTuple, 2, 7));
        let udp = FlowTuple { transport: Transport::Udp, ..tcp };
        assert_eq!(udp.hash(FlowKey::WithSequence, 1, 7), udp.hash(FlowKey::FiveTuple, 2, 7));
    }
}
