//! What services come to in the kernel: one table, hooked just before the redirects.
//!
//! ```text
//! arriving, leaving   destination . protocol . port -> the service's chain, by a map
//! tcp_10.96.0.3_7000  count; destination = maglev map[jhash(source . port . destination . port)]
//! hairpin             an endpoint that reached itself: this host becomes the source
//! ours_*              datagrams that the kernel carries bear our mark, so that iptables does not
//!                     capture them; only where there are redirects by iptables
//! ending*             a packet of a connection whose endpoint's time is over: reset
//! ```
//!
//! Maps bear a hash of what they hold in their names, so a map that a rule looks into is known to be
//! whole and right: whoever fills one makes the rule look into it last.

use std::collections::BTreeSet;
use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};

use weft_model::{FlowKey, Maglev, Transport};
use weft_runtime::socket::Mark;

use super::flows::Ending;
use super::service::{KernelService, Key, Place};
use crate::netlink::Message;
use crate::netlink::nf_tables::{
    self as nf, Comparison, Element, Expression, Holds, Hook, HookPlace, Meta, Part, Set, ValueKind,
};
use crate::redirect::MARK_MASK;

/// The name of the table.
pub(super) const TABLE: &str = "weft_services";
/// What stands in its comment.
pub(super) const COMMENT: &str = "owner=weft-agent";

/// What the table is to carry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) services: &'a [KernelService],
    /// Connections that are to be reset when they are next heard of.
    pub(super) ending: &'a [Ending],
    /// Whether datagrams may be captured before their destination is changed: by iptables.
    pub(super) is_captured_early: bool,
}

impl Wanted<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.services.is_empty() && self.ending.is_empty()
    }
}

/// A chain with its rules.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) name: String,
    pub(super) hook: Hook,
    pub(super) rules: Vec<Vec<Expression>>,
}

/// The two families of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    const BOTH: [Self; 2] = [Self::V4, Self::V6];

    fn of(is_ipv4: bool) -> Self {
        if is_ipv4 { Self::V4 } else { Self::V6 }
    }

    /// `AF_INET` or `AF_INET6`, which is `NFPROTO_*` too.
    fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    fn kind(self) -> ValueKind {
        match self {
            Self::V4 => ValueKind::Ipv4,
            Self::V6 => ValueKind::Ipv6,
        }
    }

    /// How many words an address takes.
    fn words(self) -> u32 {
        match self {
            Self::V4 => 1,
            Self::V6 => 4,
        }
    }

    /// Where a packet's source and destination are.
    fn offsets(self) -> (u32, u32) {
        match self {
            Self::V4 => (12, 16),
            Self::V6 => (8, 24),
        }
    }

    fn pick<T>(self, v4: T, v6: T) -> T {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }

    fn load_source(self, word: u32) -> Expression {
        nf::load_payload_at(word, Part::Network, self.offsets().0, self.words() * 4)
    }

    fn load_destination(self, word: u32) -> Expression {
        nf::load_payload_at(word, Part::Network, self.offsets().1, self.words() * 4)
    }

    fn is_it(self) -> [Expression; 2] {
        [nf::load_meta(Meta::Family), nf::compare(Comparison::Equal, &[self.number()])]
    }
}

fn load_source_port(word: u32) -> Expression {
    nf::load_payload_at(word, Part::Transport, 0, 2)
}

fn load_destination_port(word: u32) -> Expression {
    nf::load_payload_at(word, Part::Transport, 2, 2)
}

/// A set whose elements come and go with the services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Index {
    /// A service's address, protocol and port: its chain.
    Services4,
    Services6,
    /// A protocol and port of any address of this host: the service's chain.
    Here4,
    Here6,
    /// The address and port of a service of datagrams.
    Datagrams4,
    Datagrams6,
    /// An endpoint's address, twice.
    Hairpin4,
    Hairpin6,
    /// A service's address and port, and those of an endpoint that it has no more.
    Ending4,
    Ending6,
}

impl Index {
    pub(super) const ALL: [Self; 10] = [
        Self::Services4,
        Self::Services6,
        Self::Here4,
        Self::Here6,
        Self::Datagrams4,
        Self::Datagrams6,
        Self::Hairpin4,
        Self::Hairpin6,
        Self::Ending4,
        Self::Ending6,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Services4 => "services4",
            Self::Services6 => "services6",
            Self::Here4 => "here4",
            Self::Here6 => "here6",
            Self::Datagrams4 => "datagrams4",
            Self::Datagrams6 => "datagrams6",
            Self::Hairpin4 => "hairpin4",
            Self::Hairpin6 => "hairpin6",
            Self::Ending4 => "ending4",
            Self::Ending6 => "ending6",
        }
    }

    fn family(self) -> Family {
        match self {
            Self::Services4 | Self::Here4 | Self::Datagrams4 | Self::Hairpin4 | Self::Ending4 => {
                Family::V4
            }
            Self::Services6 | Self::Here6 | Self::Datagrams6 | Self::Hairpin6 | Self::Ending6 => {
                Family::V6
            }
        }
    }

    pub(super) fn make(self) -> Message {
        let family = self.family();
        let address = family.words() * 4;
        let (key, key_bytes, holds): (&[ValueKind], u32, Holds<'_>) = match self {
            Self::Services4 | Self::Services6 => (
                &[family.kind(), ValueKind::Protocol, ValueKind::Port],
                address + 8,
                Holds::Verdicts,
            ),
            Self::Here4 | Self::Here6 => {
                (&[ValueKind::Protocol, ValueKind::Port], 8, Holds::Verdicts)
            }
            Self::Datagrams4 | Self::Datagrams6 => {
                (&[family.kind(), ValueKind::Port], address + 4, Holds::Nothing)
            }
            Self::Hairpin4 | Self::Hairpin6 => {
                (&[family.kind(), family.kind()], address * 2, Holds::Nothing)
            }
            Self::Ending4 | Self::Ending6 => (
                &[family.kind(), ValueKind::Port, family.kind(), ValueKind::Port],
                address * 2 + 8,
                Holds::Nothing,
            ),
        };
        nf::make_set(TABLE, Set { name: self.name(), key, key_bytes, holds, size: None })
    }

    /// Whether what it holds comes and goes with a single service.
    pub(super) fn is_per_service(self) -> bool {
        match self {
            Self::Services4
            | Self::Services6
            | Self::Here4
            | Self::Here6
            | Self::Datagrams4
            | Self::Datagrams6 => true,
            Self::Hairpin4 | Self::Hairpin6 | Self::Ending4 | Self::Ending6 => false,
        }
    }

    /// What it holds for a service.
    pub(super) fn element_of(self, service: &KernelService) -> Option<Element> {
        let (transport, place) = service.key;
        if Family::of(place.is_ipv4()) != self.family() {
            return None;
        }
        let chain = |key: &[u8]| Some(Element::chain(key, &chain_name(service.key)));
        match (self, place) {
            (Self::Services4 | Self::Services6, Place::At(at)) => {
                chain(&[padded(at.ip()), proto_port(transport, at)].concat())
            }
            (Self::Here4 | Self::Here6, Place::Here(at)) => chain(&proto_port(transport, at)),
            (Self::Datagrams4 | Self::Datagrams6, Place::At(at)) if transport == Transport::Udp => {
                Some(Element::key(&full(at)))
            }
            _ => None,
        }
    }

    /// All that it holds.
    pub(super) fn elements(self, wanted: Wanted<'_>) -> Vec<Element> {
        let is_ours = |is_ipv4| Family::of(is_ipv4) == self.family();
        match self {
            Self::Hairpin4 | Self::Hairpin6 => {
                let services = wanted.services.iter().filter(|s| is_ours(s.key.1.is_ipv4()));
                let endpoints: BTreeSet<IpAddr> =
                    services.flat_map(|s| s.table.endpoints()).map(SocketAddr::ip).collect();
                let twice = |ip: IpAddr| Element::key(&[padded(ip), padded(ip)].concat());
                endpoints.into_iter().map(twice).collect()
            }
            Self::Ending4 | Self::Ending6 => {
                let ours = wanted.ending.iter().filter(|e| is_ours(e.destination.is_ipv4()));
                ours.map(|e| Element::key(&[full(e.destination), full(e.endpoint)].concat()))
                    .collect()
            }
            _ => wanted.services.iter().filter_map(|service| self.element_of(service)).collect(),
        }
    }
}

fn padded(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn port_word(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn proto_port(transport: Transport, address: SocketAddr) -> Vec<u8> {
    [[transport.number(), 0, 0, 0], port_word(address.port())].concat()
}

/// An address with its port, each part filled up to whole words.
fn full(address: SocketAddr) -> Vec<u8> {
    [padded(address.ip()), port_word(address.port()).to_vec()].concat()
}

/// The name of a service's chain and counter.
pub(super) fn chain_name((transport, place): Key) -> String {
    let transport = match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    // The nft command knows no colon in a name.
    match place {
        Place::At(at) => format!("{transport}_{}_{}", at.ip(), at.port()).replace(':', "-"),
        Place::Here(at) if at.is_ipv4() => format!("{transport}_here4_{}", at.port()),
        Place::Here(at) => format!("{transport}_here6_{}", at.port()),
    }
}

/// The name of a map for what this service's holds. Numbered ones hold the same.
pub(super) fn map_name(service: &KernelService) -> String {
    let mut hasher = siphasher::sip::SipHasher13::new();
    let table = &service.table;
    hasher.write_usize(table.size());
    // The endpoints in their order, then whose each slot is, say it all.
    for endpoint in table.endpoints() {
        hasher.write(&full(*endpoint));
    }
    table.owners().iter().for_each(|owner| hasher.write_u32(*owner));
    format!("{}_{:016x}", chain_name(service.key), hasher.finish())
}

/// Makes a map for a service's Maglev table, empty.
pub(super) fn make_map(service: &KernelService, name: &str) -> Message {
    let family = Family::of(service.key.1.is_ipv4());
    let value = [family.kind(), ValueKind::Port];
    let set = Set {
        name,
        key: &[ValueKind::Number],
        key_bytes: 4,
        holds: Holds::Values(&value, family.words() * 4 + 4),
        size: u32::try_from(service.table.size()).ok(),
    };
    nf::make_set(TABLE, set)
}

/// What a service's map holds for its endpoints, in their order.
pub(super) fn map_values(table: &Maglev) -> Vec<Vec<u8>> {
    table.endpoints().iter().map(|endpoint| full(*endpoint)).collect()
}

/// The rule of a service's chain, which looks into this map.
pub(super) fn service_rule(service: &KernelService, map: &str) -> Vec<Expression> {
    let family = Family::of(service.key.1.is_ipv4());
    let address = family.words();
    let size = u32::try_from(service.table.size()).unwrap_or(u32::MAX);
    let (key, words) = match service.flow_key {
        FlowKey::FiveTuple => (
            vec![
                family.load_source(0),
                load_source_port(address),
                family.load_destination(address + 1),
                load_destination_port(2 * address + 1),
            ],
            2 * address + 2,
        ),
        FlowKey::SourceAddress => (vec![family.load_source(0)], address),
    };
    let mut rule = vec![nf::count_by(&chain_name(service.key))];
    rule.extend(key);
    rule.extend([
        nf::hash(words * 4, size, service.seed),
        nf::look_up(map),
        nf::change_destination(family.number().into(), address),
    ]);
    rule
}

/// The chains that packets come to first, as far as these services need them.
pub(super) fn base_chains(wanted: Wanted<'_>) -> Vec<Chain> {
    // Just before the redirects, which are at -101, and those of iptables, at -150.
    const BEFORE_NAT: i32 = -102;
    const BEFORE_CAPTURE: i32 = -160;
    const BEFORE_SOURCE_NAT: i32 = 99;
    const AS_FILTERS: i32 = 0;
    let chain = |name: &str, kind, place, priority, rules: Vec<_>| Chain {
        name: name.to_owned(),
        hook: Hook { kind, place, priority },
        rules,
    };
    let services = wanted.services;
    let dispatch: Vec<_> = Family::BOTH.into_iter().flat_map(|f| dispatch(f, services)).collect();
    let ours: Vec<_> = Family::BOTH
        .into_iter()
        .filter(|_| wanted.is_captured_early)
        .filter_map(|f| ours(f, services))
        .collect();
    let hairpin = Family::BOTH.into_iter().filter_map(|f| hairpin(f, services)).collect();
    let ending: Vec<_> =
        Family::BOTH.into_iter().filter_map(|f| ending(f, wanted.ending)).collect();
    let all = [
        chain("arriving", "nat", HookPlace::Prerouting, BEFORE_NAT, dispatch.clone()),
        chain("leaving", "nat", HookPlace::Output, BEFORE_NAT, dispatch),
        chain("hairpin", "nat", HookPlace::Postrouting, BEFORE_SOURCE_NAT, hairpin),
        chain("ours_arriving", "filter", HookPlace::Prerouting, BEFORE_CAPTURE, ours.clone()),
        chain("ours_leaving", "filter", HookPlace::Output, BEFORE_CAPTURE, ours),
        chain("ending", "filter", HookPlace::Forward, AS_FILTERS, ending.clone()),
        chain("ending_here", "filter", HookPlace::Output, AS_FILTERS, ending),
    ];
    // A chain without rules would cost every packet a look.
    all.into_iter().filter(|chain| !chain.rules.is_empty()).collect()
}

fn dispatch(family: Family, services: &[KernelService]) -> Vec<Vec<Expression>> {
    let places = || services.iter().map(|s| s.key.1).filter(|p| Family::of(p.is_ipv4()) == family);
    let address = family.words();
    let mut rules = Vec::new();
    if places().any(|place| matches!(place, Place::At(_))) {
        let mut rule = family.is_it().to_vec();
        rule.extend([
            family.load_destination(0),
            nf::load_meta_at(address, Meta::Protocol),
            load_destination_port(address + 1),
            nf::decide_by(family.pick(Index::Services4, Index::Services6).name()),
        ]);
        rules.push(rule);
    }
    if places().any(|place| matches!(place, Place::Here(_))) {
        const LOCAL: u32 = 2;
        let mut rule = family.is_it().to_vec();
        rule.extend([
            nf::load_destination_kind(),
            nf::compare(Comparison::Equal, &LOCAL.to_ne_bytes()),
            nf::load_meta_at(0, Meta::Protocol),
            load_destination_port(1),
            nf::decide_by(family.pick(Index::Here4, Index::Here6).name()),
        ]);
        rules.push(rule);
    }
    rules
}

fn ours(family: Family, services: &[KernelService]) -> Option<Vec<Expression>> {
    let is_one = |service: &KernelService| match service.key {
        (Transport::Udp, Place::At(address)) => Family::of(address.is_ipv4()) == family,
        (Transport::Tcp, _) | (_, Place::Here(_)) => false,
    };
    services.iter().any(is_one).then(|| {
        let mut rule = family.is_it().to_vec();
        rule.extend([
            nf::load_meta(Meta::Protocol),
            nf::compare(Comparison::Equal, &[Transport::Udp.number()]),
            family.load_destination(0),
            load_destination_port(family.words()),
            nf::is_in(family.pick(Index::Datagrams4, Index::Datagrams6).name()),
            nf::load_meta(Meta::Mark),
            nf::mask(&(!MARK_MASK).to_ne_bytes(), &Mark::DEFAULT.0.to_ne_bytes()),
            nf::set_meta(Meta::Mark),
        ]);
        rule
    })
}

fn hairpin(family: Family, services: &[KernelService]) -> Option<Vec<Expression>> {
    services.iter().any(|s| Family::of(s.key.1.is_ipv4()) == family).then(|| {
        let mut rule = family.is_it().to_vec();
        rule.extend([
            family.load_source(0),
            family.load_destination(family.words()),
            nf::is_in(family.pick(Index::Hairpin4, Index::Hairpin6).name()),
            nf::masquerade(),
        ]);
        rule
    })
}

fn ending(family: Family, ending: &[Ending]) -> Option<Vec<Expression>> {
    use nf::{Connection, Side};
    /// Where a TCP header has its flags, and the one of a reset (RFC 9293, section 3.1).
    const TCP_FLAGS: u32 = 13;
    const RESET: u8 = 0x04;
    let (source, destination) = family.pick(
        (Connection::SourceIpv4, Connection::DestinationIpv4),
        (Connection::SourceIpv6, Connection::DestinationIpv6),
    );
    let address = family.words();
    ending.iter().any(|e| Family::of(e.destination.is_ipv4()) == family).then(|| {
        let mut rule = family.is_it().to_vec();
        rule.extend([
            nf::load_meta(Meta::Protocol),
            nf::compare(Comparison::Equal, &[Transport::Tcp.number()]),
            // A reset goes its way: ours too.
            nf::load_payload(Part::Transport, TCP_FLAGS, 1),
            nf::mask(&[RESET], &[0]),
            nf::compare(Comparison::Equal, &[0]),
            nf::load_connection_at(0, destination, Side::Original),
            nf::load_connection_at(address, Connection::DestinationPort, Side::Original),
            nf::load_connection_at(address + 1, source, Side::Reply),
            nf::load_connection_at(2 * address + 1, Connection::SourcePort, Side::Reply),
            nf::is_in(family.pick(Index::Ending4, Index::Ending6).name()),
            nf::reset(),
        ]);
        rule
    })
}
