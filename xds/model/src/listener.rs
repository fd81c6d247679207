//! A listener: an address, and how what arrives there is served.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::{
    Cidr, DownstreamTls, FlowKey, HttpService, Name, RbacFilter, Transport, WeightedCluster,
};

/// An address that takes connections or datagrams (`envoy.config.listener.v3.Listener`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Its name.
    pub name: Name,
    /// The address to bind, or the original destination it answers for when `bind` is false.
    pub address: SocketAddr,
    /// TCP or UDP.
    pub transport: Transport,
    /// Whether a socket is bound (`bind_to_port`). One that is not gets its connections from a
    /// listener with `use_original_destination`.
    pub bind: bool,
    /// Whether connections arrive redirected, and are handed to the listener of the address they
    /// aimed at when there is one (`use_original_dst`, or the `original_dst` listener filter).
    pub use_original_destination: bool,
    /// Whether the socket takes packets for addresses that are not the host's (`transparent`).
    pub transparent: bool,
    /// How connections are served, by what they look like. The most specific match wins.
    pub chains: Vec<FilterChain>,
    /// How connections are served that no chain matches; without one they are closed.
    pub default_chain: Option<FilterChain>,
    /// How datagrams are served, for UDP.
    pub udp: Option<UdpProxy>,
    /// Whose flows the agent takes: the listener's security group (`metadata`, `allow_from` under
    /// `weft`). None: anybody's.
    pub allow_from: Option<Vec<Cidr>>,
    /// How a TCP connection ends that was silent for too long (`metadata`, `idle_end` under `weft`:
    /// `reset` or `close`). None: however it does; nobody needs to see it.
    pub idle_end: Option<IdleEnd>,
    /// The seed of the flow hash, which all agents of a mesh share and nobody else is to know, so that
    /// none aims flows at an endpoint (`metadata`, `flow_seed` under `weft`).
    pub flow_seed: Option<u32>,
    /// Whose address endpoints see (the `original_src` listener filter; `use_original_src_ip` of UDP).
    pub source_address: SourceAddress,
}

/// Whose address an endpoint sees as that of its client, when the agent moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourceAddress {
    /// The agent's host's.
    #[default]
    Agent,
    /// The client's, so that answers must come by the agent's host.
    Client,
}

/// How both sides see the end of a connection that was silent for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleEnd {
    /// It is reset: whoever writes next learns of it at once.
    Reset,
    /// It is closed in good order.
    Close,
}

impl IdleEnd {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Reset, Self::Close];

    /// The word in configurations.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Close => "close",
        }
    }

    /// What a word stands for.
    #[must_use]
    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|end| end.word() == word)
    }
}

impl Listener {
    /// Its chains, the default one among them.
    pub fn all_chains(&self) -> impl Iterator<Item = &FilterChain> {
        self.chains.iter().chain(&self.default_chain)
    }

    /// The clusters that its flows go to, of TCP and of UDP. Where requests go, their routes say.
    pub fn flow_clusters(&self) -> impl Iterator<Item = &Name> {
        let of_chains = self.all_chains().flat_map(|chain| match &chain.filter {
            Filter::Tcp(tcp) => tcp.clusters.as_slice(),
            Filter::Http(_) => &[],
        });
        let of_udp = self.udp.as_ref().map(|udp| &udp.cluster);
        of_chains.map(|cluster| &cluster.name).chain(of_udp)
    }

    /// The chain that serves a connection, by `filter_chain_match` order: destination port, then
    /// longest destination prefix, then transport.
    #[must_use]
    pub fn chain_for(&self, destination: SocketAddr, kind: TransportKind) -> Option<&FilterChain> {
        self.chains
            .iter()
            .filter_map(|chain| Some((chain.matches.rank(destination, kind)?, chain)))
            .max_by_key(|(rank, _)| *rank)
            .map(|(_, chain)| chain)
            .or(self.default_chain.as_ref())
    }

    /// Whether its security group lets a client in.
    #[must_use]
    pub fn admits(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        let holds = |ranges: &Vec<Cidr>| ranges.iter().any(|range| range.contains(client));
        self.allow_from.as_ref().is_none_or(holds)
    }

    /// Whether a chain must know if the client speaks TLS, so that its first bytes must be seen.
    #[must_use]
    pub fn inspects_transport(&self) -> bool {
        self.chains.iter().any(|chain| chain.matches.transport.is_some())
    }
}

/// How the connections that a match covers are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterChain {
    /// Its name, for logs; may be empty.
    pub name: Name,
    /// Which connections it is for.
    pub matches: ChainMatch,
    /// How TLS with the client is done; plain text without.
    pub tls: Option<DownstreamTls>,
    /// Which connections are let in, once their clients have proved who they are
    /// (`envoy.filters.network.rbac`).
    pub rules: Vec<Arc<RbacFilter>>,
    /// What is done with the bytes.
    pub filter: Filter,
}

/// Which connections a chain is for. Empty: all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChainMatch {
    /// The port the client aimed at.
    pub destination_port: Option<u16>,
    /// The addresses the client aimed at; empty: any.
    pub destination_prefixes: Vec<Cidr>,
    /// Whether the client speaks TLS.
    pub transport: Option<TransportKind>,
}

impl ChainMatch {
    /// Whether it covers every connection.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// How specific the match is for this connection; none when it does not cover it.
    fn rank(
        &self,
        destination: SocketAddr,
        kind: TransportKind,
    ) -> Option<(bool, Option<u8>, bool)> {
        if self.destination_port.is_some_and(|port| port != destination.port()) {
            return None;
        }
        let prefix = self.longest_prefix(destination.ip());
        if !self.destination_prefixes.is_empty() && prefix.is_none() {
            return None;
        }
        if self.transport.is_some_and(|wanted| wanted != kind) {
            return None;
        }
        Some((self.destination_port.is_some(), prefix, self.transport.is_some()))
    }

    fn longest_prefix(&self, address: IpAddr) -> Option<u8> {
        self.destination_prefixes
            .iter()
            .filter(|range| range.contains(address))
            .map(Cidr::prefix_bits)
            .max()
    }
}

/// What the first bytes of a connection are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransportKind {
    /// A TLS ClientHello.
    Tls,
    /// Anything else.
    Plain,
}

/// What is done with a connection's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filter {
    /// They are moved (`envoy.filters.network.tcp_proxy`).
    Tcp(TcpProxy),
    /// They are HTTP (`envoy.filters.network.http_connection_manager`).
    Http(Arc<HttpService>),
}

/// How a connection is moved (`envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpProxy {
    /// Where to; one is drawn by weight for each connection.
    pub clusters: Vec<WeightedCluster>,
    /// How long both directions may be silent; none: for ever.
    pub idle_timeout: Option<Duration>,
    /// What of a connection decides about its endpoint (`hash_policy`).
    pub flow_key: FlowKey,
    /// Whether a line is written per connection (`access_log`).
    pub access_log: bool,
}

/// How datagrams are moved (`envoy.extensions.filters.udp.udp_proxy.v3.UdpProxyConfig`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpProxy {
    /// Where to.
    pub cluster: Name,
    /// How long a flow lives without a datagram.
    pub idle_timeout: Duration,
    /// What of a flow decides about its endpoint (`hash_policies`).
    pub flow_key: FlowKey,
    /// Whether a line is written per flow (`access_log`).
    pub access_log: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(name: &str, matches: ChainMatch) -> FilterChain {
        let filter = Filter::Tcp(TcpProxy {
            clusters: Vec::new(),
            idle_timeout: None,
            flow_key: FlowKey::FiveTuple,
            access_log: false,
        });
        FilterChain { name: name.into(), matches, tls: None, rules: Vec::new(), filter }
    }

    fn prefix(text: &str) -> Vec<Cidr> {
        vec![Cidr::parse(text).expect("a range")]
    }

    #[test]
    fn the_most_specific_chain_serves() {
        let listener = Listener {
            name: "inbound".into(),
            address: "0.0.0.0:15006".parse().expect("an address"),
            transport: Transport::Tcp,
            bind: true,
            use_original_destination: true,
            transparent: false,
            chains: vec![
                chain("port", ChainMatch { destination_port: Some(80), ..ChainMatch::default() }),
                chain(
                    "tls",
                    ChainMatch {
                        destination_port: Some(80),
                        transport: Some(TransportKind::Tls),
                        ..ChainMatch::default()
                    },
                ),
                chain(
                    "wide",
                    ChainMatch {
                        destination_prefixes: prefix("10.0.0.0/8"),
                        ..ChainMatch::default()
                    },
                ),
                chain(
                    "narrow",
                    ChainMatch {
                        destination_prefixes: prefix("10.1.0.0/16"),
                        ..ChainMatch::default()
                    },
                ),
            ],
            default_chain: Some(chain("default", ChainMatch::default())),
            udp: None,
            allow_from: None,
            idle_end: None,
            flow_seed: None,
            source_address: SourceAddress::Agent,
        };
        let check = |destination: &str, kind, expected: &str| {
            let destination = destination.parse().expect("an address");
            assert_eq!(
                &*listener.chain_for(destination, kind).expect("a chain").name,
                expected,
                "{destination}"
            );
        };
        check("10.1.1.1:80", TransportKind::Plain, "port");
        check("10.1.1.1:80", TransportKind::Tls, "tls");
        check("10.2.1.1:81", TransportKind::Plain, "wide");
        check("10.1.1.1:81", TransportKind::Plain, "narrow");
        check("192.0.2.1:81", TransportKind::Plain, "default");
    }
}
