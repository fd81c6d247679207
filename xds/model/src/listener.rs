//! Listeners: an address, and the filter chains that serve its connections or datagrams.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::{
    AccessLogSinks, Cidr, DownstreamTls, FlowKey, HttpService, Name, RbacFilter, Transport,
    WeightedCluster,
};

/// An address that accepts connections or datagrams (`envoy.config.listener.v3.Listener`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Its name.
    pub name: Name,
    /// The address to bind, or the original destination that it serves when `bind` is false.
    pub address: SocketAddr,
    /// TCP or UDP.
    pub transport: Transport,
    /// Whether a socket is bound (`bind_to_port`). A listener without a socket gets its connections from a listener
    /// with `use_original_destination`.
    pub bind: bool,
    /// Whether connections arrive redirected and are passed to the listener of their original destination, when
    /// there is one (`use_original_dst`, or the `original_dst` listener filter).
    pub use_original_destination: bool,
    /// Whether the socket accepts packets for addresses that are not local (`transparent`).
    pub transparent: bool,
    /// The filter chains. The most specific match wins.
    pub chains: Vec<FilterChain>,
    /// The filter chain for connections that no chain matches; none: they are closed.
    pub default_chain: Option<FilterChain>,
    /// The UDP proxy, for a UDP listener.
    pub udp: Option<UdpProxy>,
    /// The listener's security group: the client addresses whose flows the agent accepts (`metadata`,
    /// `allow_from` under `weft`). None: all clients.
    pub allow_from: Option<Vec<Cidr>>,
    /// How a TCP connection is ended after its idle timeout (`metadata`, `idle_end` under `weft`: `reset` or
    /// `close`). None: unspecified, the agent or the kernel decides.
    pub idle_end: Option<IdleEnd>,
    /// The seed of the flow hash, shared by all agents of a mesh. It is secret, so that clients cannot aim flows at
    /// one endpoint (`metadata`, `flow_seed` under `weft`).
    pub flow_seed: Option<u32>,
    /// The source address that endpoints see (the `original_src` listener filter; `use_original_src_ip` for UDP).
    pub source_address: SourceAddress,
}

/// The source address that an endpoint sees when the agent proxies the flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SourceAddress {
    /// An address of the agent's host.
    #[default]
    Agent,
    /// The client's address; replies must be routed through the agent's host.
    Client,
}

/// How a connection is ended after its idle timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleEnd {
    /// With RST: the next write of either side fails at once.
    Reset,
    /// With FIN.
    Close,
}

impl IdleEnd {
    /// Every value.
    pub const ALL: [Self; 2] = [Self::Reset, Self::Close];

    /// The name in configurations.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Close => "close",
        }
    }

    /// The value with this name in configurations.
    #[must_use]
    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|end| end.word() == word)
    }
}

impl Listener {
    /// All filter chains, including the default one.
    pub fn all_chains(&self) -> impl Iterator<Item = &FilterChain> {
        self.chains.iter().chain(&self.default_chain)
    }

    /// The clusters of its TCP and UDP proxies. The clusters of HTTP requests are in the route tables.
    pub fn flow_clusters(&self) -> impl Iterator<Item = &Name> {
        let of_chains = self.all_chains().flat_map(|chain| match &chain.filter {
            Filter::Tcp(tcp) => tcp.clusters.as_slice(),
            Filter::Http(_) => &[],
        });
        let of_udp = self.udp.as_ref().map(|udp| &udp.cluster);
        of_chains.map(|cluster| &cluster.name).chain(of_udp)
    }

    /// The filter chain for a connection, by the order of `filter_chain_match`: destination port, then longest
    /// destination prefix, then transport.
    #[must_use]
    pub fn chain_for(&self, destination: SocketAddr, kind: TransportKind) -> Option<&FilterChain> {
        self.chains
            .iter()
            .filter_map(|chain| Some((chain.matches.rank(destination, kind)?, chain)))
            .max_by_key(|(rank, _)| *rank)
            .map(|(_, chain)| chain)
            .or(self.default_chain.as_ref())
    }

    /// Whether the security group admits a client.
    #[must_use]
    pub fn admits(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        let holds = |ranges: &Vec<Cidr>| ranges.iter().any(|range| range.contains(client));
        self.allow_from.as_ref().is_none_or(holds)
    }

    /// Whether a filter chain matches on TLS, so that the first bytes of the connection must be inspected.
    #[must_use]
    pub fn inspects_transport(&self) -> bool {
        self.chains.iter().any(|chain| chain.matches.transport.is_some())
    }
}

/// How matching connections are served (`envoy.config.listener.v3.FilterChain`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterChain {
    /// Its name, for logs; may be empty.
    pub name: Name,
    /// Which connections it serves.
    pub matches: ChainMatch,
    /// TLS settings towards the client; none: plaintext.
    pub tls: Option<DownstreamTls>,
    /// Which connections are allowed, evaluated after the TLS handshake (`envoy.filters.network.rbac`).
    pub rules: Vec<Arc<RbacFilter>>,
    /// The proxy that handles the connection.
    pub filter: Filter,
}

/// Which connections a filter chain serves. Empty: all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChainMatch {
    /// The original destination port.
    pub destination_port: Option<u16>,
    /// Ranges of the original destination address; empty: any.
    pub destination_prefixes: Vec<Cidr>,
    /// Whether the client speaks TLS.
    pub transport: Option<TransportKind>,
}

impl ChainMatch {
    /// Whether it matches every connection.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// How specific the match is for this connection; none when it does not match.
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

/// The kind of the first bytes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransportKind {
    /// A TLS ClientHello.
    Tls,
    /// Anything else.
    Plain,
}

/// The proxy that handles a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filter {
    /// TCP proxy (`envoy.filters.network.tcp_proxy`).
    Tcp(TcpProxy),
    /// HTTP (`envoy.filters.network.http_connection_manager`).
    Http(Arc<HttpService>),
}

/// How a TCP connection is proxied (`envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpProxy {
    /// The clusters; one is picked by weight for each connection.
    pub clusters: Vec<WeightedCluster>,
    /// How long both directions may be silent; none: no limit.
    pub idle_timeout: Option<Duration>,
    /// What is hashed to choose the endpoint (`hash_policy`).
    pub flow_key: FlowKey,
    /// Where a line per connection is written (`access_log`).
    pub access_log: AccessLogSinks,
}

/// How datagrams are proxied (`envoy.extensions.filters.udp.udp_proxy.v3.UdpProxyConfig`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpProxy {
    /// The cluster.
    pub cluster: Name,
    /// How long a flow lives without a datagram.
    pub idle_timeout: Duration,
    /// What is hashed to choose the endpoint (`hash_policies`).
    pub flow_key: FlowKey,
    /// Where a line per flow is written (`access_log`).
    pub access_log: AccessLogSinks,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(name: &str, matches: ChainMatch) -> FilterChain {
        let filter = Filter::Tcp(TcpProxy {
            clusters: Vec::new(),
            idle_timeout: None,
            flow_key: FlowKey::FiveTuple,
            access_log: AccessLogSinks::Off,
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
