//! The rules for a redirect configuration, as values. This file alone decides what they mean; the renderers only
//! translate them.

use std::ops::RangeInclusive;

use weft_model::{Cidr, Transport};

use super::config::{DNS_PORT, IpFamily, LOCAL_DELIVERY_MARK, RedirectConfig};

/// A chain of rules, hooked at one point of a packet's path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RedirectChain {
    pub(super) place: RedirectHook,
    /// The rules, in order: the first one that matches decides. A packet that matches none continues unchanged.
    pub(super) rules: Vec<RedirectRule>,
}

/// Where a chain is hooked, and what it may do there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RedirectHook {
    /// The first packet of an arriving connection: its destination may be changed.
    Arriving,
    /// The first packet of a connection from a program on this host: its destination may be changed.
    Leaving,
    /// Every arriving packet: answers to sockets that have the address of a client are delivered locally.
    Answers,
    /// Every arriving packet: it may be handed to a socket.
    ArrivingUdp,
    /// Every packet from a program on this host: it is rerouted when its mark changes.
    LeavingUdp,
    /// Every packet delivered to this host, after all other chains: it may be dropped.
    ArrivingStrict,
    /// Every packet from a program on this host, after all other chains: it may be dropped.
    LeavingStrict,
}

/// A rule: when all of `matches` match, `action` is performed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RedirectRule {
    pub(super) matches: Vec<RuleMatch>,
    /// Whether matching packets are counted.
    pub(super) counted: bool,
    pub(super) action: RuleAction,
}

/// A condition on a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RuleMatch {
    /// The mark has this value, under [`MARK_MASK`](super::config::MARK_MASK).
    Mark(u32),
    /// The user of the sending program.
    User(u32),
    /// Whether the destination is an address of this host.
    LocalDestination(bool),
    /// The destination is in a range. A packet of the other address family does not match.
    Destination(Cidr),
    /// The transport protocol.
    Protocol(Transport),
    /// The transport protocol and a range of destination ports.
    Port(Transport, RangeInclusive<u16>),
    /// Whether the packet arrives on this network device.
    InputInterface(String, bool),
    /// The packet leaves on this network device.
    OutputInterface(String),
    /// The packet is for a transparent socket of this host, bound to a specific address.
    TransparentSocket,
    /// The packet is in the reply direction of its connection.
    Reply,
    /// The packet is related to another connection, as an ICMP error is.
    Related,
    /// An `ICMPv6` type and hop limit.
    Icmpv6 { kind: u8, hop_limit: u8 },
}

/// What a rule does with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RuleAction {
    /// Leaves the packet unchanged.
    Return,
    /// Redirects the connection to a port of this host.
    Redirect(u16),
    /// Sets our bits of the mark.
    Mark(u32),
    /// Hands the packet to the socket at this port, with its destination unchanged.
    Tproxy(u16),
    /// Drops the packet.
    Drop,
}

impl RuleMatch {
    /// The address family of packets that can match; `None` when both can.
    pub(super) fn family(&self) -> Option<IpFamily> {
        match self {
            Self::Destination(range) if range.address().is_ipv4() => Some(IpFamily::V4),
            Self::Destination(_) | Self::Icmpv6 { .. } => Some(IpFamily::V6),
            _ => None,
        }
    }
}

/// The desired chains, without empty ones.
pub(super) fn chains(redirect: &RedirectConfig) -> Vec<RedirectChain> {
    let all = [
        RedirectChain { place: RedirectHook::Arriving, rules: arriving(redirect) },
        RedirectChain { place: RedirectHook::Leaving, rules: leaving(redirect) },
        RedirectChain { place: RedirectHook::Answers, rules: answers(redirect) },
        RedirectChain { place: RedirectHook::ArrivingUdp, rules: arriving_udp(redirect) },
        RedirectChain { place: RedirectHook::LeavingUdp, rules: leaving_udp(redirect) },
        RedirectChain { place: RedirectHook::ArrivingStrict, rules: arriving_strict(redirect) },
        RedirectChain { place: RedirectHook::LeavingStrict, rules: leaving_strict(redirect) },
    ];
    all.into_iter().filter(|chain| !chain.rules.is_empty()).collect()
}

fn arriving(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    if redirect.inbound.is_none() && redirect.forwarded.is_none() {
        return Vec::new();
    }
    let mut rules = vec![skip([from_loopback(true)])];
    rules.extend(from_excluded_interfaces(redirect));
    if let Some(port) = redirect.forwarded {
        rules.extend(to_services(
            redirect,
            &[RuleMatch::Protocol(Transport::Tcp)],
            RuleAction::Redirect(port),
        ));
    }
    if let Some(port) = redirect.inbound {
        let (first, last) = RedirectConfig::OWN_PORTS;
        rules.push(skip([RuleMatch::LocalDestination(false)]));
        rules.push(skip([RuleMatch::Port(Transport::Tcp, first..=last)]));
        for excluded in &redirect.exclude_inbound_ports {
            rules.push(skip([RuleMatch::Port(Transport::Tcp, *excluded..=*excluded)]));
        }
        rules.push(counted(vec![RuleMatch::Protocol(Transport::Tcp)], RuleAction::Redirect(port)));
    }
    rules
}

fn leaving(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    if redirect.outbound.is_none() && redirect.dns.is_none() {
        return Vec::new();
    }
    let mut rules = loop_prevention(redirect);
    rules.extend(excluded_from_leaving(redirect));
    // A resolver may be on loopback, such as Docker's at 127.0.0.11.
    rules.extend(to_resolvers(redirect));
    let Some(port) = redirect.outbound else {
        return rules;
    };
    // Connections to loopback and to the namespace's own addresses are not redirected.
    rules.extend(Cidr::LOOPBACK.map(|range| skip([RuleMatch::Destination(range)])));
    rules.push(counted(vec![RuleMatch::LocalDestination(true)], RuleAction::Return));
    for excluded in &redirect.exclude_outbound_ports {
        rules.push(skip([RuleMatch::Port(Transport::Tcp, *excluded..=*excluded)]));
    }
    if redirect.services.is_empty() {
        rules.push(counted(vec![RuleMatch::Protocol(Transport::Tcp)], RuleAction::Redirect(port)));
    }
    rules.extend(to_services(
        redirect,
        &[RuleMatch::Protocol(Transport::Tcp)],
        RuleAction::Redirect(port),
    ));
    rules
}

fn answers(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    let rule =
        || counted(vec![RuleMatch::TransparentSocket], RuleAction::Mark(LOCAL_DELIVERY_MARK));
    redirect.keep_source.then(rule).into_iter().collect()
}

/// Redirects DNS queries to the resolvers.
fn to_resolvers(redirect: &RedirectConfig) -> impl Iterator<Item = RedirectRule> + '_ {
    let rules = |port: u16| {
        redirect.resolvers.iter().flat_map(move |resolver| {
            [Transport::Udp, Transport::Tcp].map(|transport| {
                let question = RuleMatch::Port(transport, DNS_PORT..=DNS_PORT);
                counted(
                    vec![RuleMatch::Destination(Cidr::from(*resolver)), question],
                    RuleAction::Redirect(port),
                )
            })
        })
    };
    redirect.dns.into_iter().flat_map(rules)
}

fn arriving_udp(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    let Some(port) = redirect.udp else {
        return Vec::new();
    };
    let mut rules: Vec<RedirectRule> = from_excluded_interfaces(redirect).collect();
    if redirect.forwarded.is_some() {
        // While iptables has redirects, packets that the kernel path carries have our mark (`kernel/table.rs`).
        rules.push(skip([RuleMatch::Mark(redirect.mark)]));
        let from_others = [from_loopback(false), RuleMatch::Protocol(Transport::Udp)];
        rules.extend(to_services(redirect, &from_others, RuleAction::Mark(LOCAL_DELIVERY_MARK)));
    }
    rules.push(counted(
        vec![RuleMatch::Mark(LOCAL_DELIVERY_MARK), RuleMatch::Protocol(Transport::Udp)],
        RuleAction::Tproxy(port),
    ));
    rules
}

fn leaving_udp(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    if redirect.udp.is_none() {
        return Vec::new();
    }
    let mut rules = loop_prevention(redirect);
    rules.extend(excluded_from_leaving(redirect));
    for excluded in &redirect.exclude_outbound_ports {
        rules.push(skip([RuleMatch::Port(Transport::Udp, *excluded..=*excluded)]));
    }
    rules.extend(to_services(
        redirect,
        &[RuleMatch::Protocol(Transport::Udp)],
        RuleAction::Mark(LOCAL_DELIVERY_MARK),
    ));
    rules
}

/// Drops arriving packets that were neither redirected nor excluded.
fn arriving_strict(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    let Some(inbound) = redirect.inbound.filter(|_| redirect.strict) else {
        return Vec::new();
    };
    let mut rules = vec![skip([from_loopback(true)])];
    rules.extend(replies_and_related());
    for port in [Some(inbound), redirect.forwarded].into_iter().flatten() {
        rules.push(skip([RuleMatch::Port(Transport::Tcp, port..=port)]));
    }
    if redirect.udp.is_some() {
        rules.push(skip([
            RuleMatch::Mark(LOCAL_DELIVERY_MARK),
            RuleMatch::Protocol(Transport::Udp),
        ]));
    }
    rules.extend(from_excluded_interfaces(redirect));
    rules.extend(redirect.exclude_inbound_ports.iter().flat_map(|port| to_port(*port)));
    rules.extend(ipv6_link_messages([130], [134, 135, 136, 137]));
    rules.push(counted(Vec::new(), RuleAction::Drop));
    rules
}

/// Drops leaving packets that were neither redirected nor excluded.
fn leaving_strict(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    if redirect.outbound.is_none() || !redirect.strict {
        return Vec::new();
    }
    let mut rules = loop_prevention(redirect);
    // Matched by address, not by device: a packet that was just redirected still has the device of its original
    // destination.
    rules.push(skip([RuleMatch::LocalDestination(true)]));
    if redirect.udp.is_some() {
        rules.push(skip([
            RuleMatch::Mark(LOCAL_DELIVERY_MARK),
            RuleMatch::Protocol(Transport::Udp),
        ]));
    }
    rules.extend(replies_and_related());
    rules.extend(excluded_from_leaving(redirect));
    rules.extend(redirect.exclude_outbound_ports.iter().flat_map(|port| to_port(*port)));
    rules.extend(ipv6_link_messages([131, 132, 143], [133, 135, 136]));
    rules.push(counted(Vec::new(), RuleAction::Drop));
    rules
}

/// Passes replies and related packets: their connection was checked when it began.
fn replies_and_related() -> [RedirectRule; 2] {
    [skip([RuleMatch::Reply]), skip([RuleMatch::Related])]
}

/// Passes link-local ICMPv6 messages: multicast listener discovery, with hop limit 1 (RFC 3810 5.1.14), and neighbour
/// discovery, with hop limit 255 (RFC 4861 7.1). The hop limits show that a message has not crossed a router.
fn ipv6_link_messages<const G: usize, const N: usize>(
    groups: [u8; G],
    neighbours: [u8; N],
) -> impl Iterator<Item = RedirectRule> {
    let groups = groups.into_iter().map(|kind| RuleMatch::Icmpv6 { kind, hop_limit: 1 });
    let neighbours = neighbours.into_iter().map(|kind| RuleMatch::Icmpv6 { kind, hop_limit: 255 });
    groups.chain(neighbours).map(|message| skip([message]))
}

fn to_port(port: u16) -> [RedirectRule; 2] {
    [Transport::Tcp, Transport::Udp]
        .map(|transport| skip([RuleMatch::Port(transport, port..=port)]))
}

fn from_loopback(is: bool) -> RuleMatch {
    RuleMatch::InputInterface("lo".to_owned(), is)
}

fn from_excluded_interfaces(redirect: &RedirectConfig) -> impl Iterator<Item = RedirectRule> + '_ {
    let names = redirect.exclude_interfaces.iter();
    names.map(|name| skip([RuleMatch::InputInterface(name.clone(), true)]))
}

/// Skips excluded outbound traffic, by user, network device and destination.
fn excluded_from_leaving(redirect: &RedirectConfig) -> impl Iterator<Item = RedirectRule> + '_ {
    let users = redirect.exclude_users.iter().map(|user| RuleMatch::User(*user));
    let devices =
        redirect.exclude_interfaces.iter().map(|name| RuleMatch::OutputInterface(name.clone()));
    let ranges = redirect.exclude_destinations.iter().map(|range| RuleMatch::Destination(*range));
    users.chain(devices).chain(ranges).map(|excluded| skip([excluded]))
}

/// Prevents loops: skips packets of the proxy itself, by mark, then by user.
fn loop_prevention(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    let mut rules = vec![counted(vec![RuleMatch::Mark(redirect.mark)], RuleAction::Return)];
    if let Some(user) = redirect.uid {
        rules.push(counted(vec![RuleMatch::User(user)], RuleAction::Return));
    }
    rules
}

fn to_services(
    redirect: &RedirectConfig,
    matches: &[RuleMatch],
    action: RuleAction,
) -> Vec<RedirectRule> {
    let rule =
        |range: &Cidr| counted([matches, &[RuleMatch::Destination(*range)]].concat(), action);
    redirect.services.iter().map(rule).collect()
}

fn skip(matches: impl Into<Vec<RuleMatch>>) -> RedirectRule {
    RedirectRule { matches: matches.into(), counted: false, action: RuleAction::Return }
}

fn counted(matches: Vec<RuleMatch>, action: RuleAction) -> RedirectRule {
    RedirectRule { matches, counted: true, action }
}
