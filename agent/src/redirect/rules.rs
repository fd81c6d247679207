//! The rules that a wish comes to, as values. What they mean is decided here, once; the renderers
//! only find words for it.

use std::ops::RangeInclusive;

use weft_model::{Cidr, Transport};

use super::{IpFamily, LOCAL_DELIVERY_MARK, RedirectConfig, dns};

/// A chain of ours: rules that see packets at one place of their way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RedirectChain {
    pub(super) place: RedirectHook,
    /// In order; the first that decides ends it. A packet that none takes goes its way.
    pub(super) rules: Vec<RedirectRule>,
}

/// Where a chain sees packets, and what it may do to them there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RedirectHook {
    /// The first packet of a connection that arrives: its destination may be changed.
    Arriving,
    /// The first packet of a connection that a program here makes.
    Leaving,
    /// Every packet that arrives: one for a socket of ours at another's address is kept here.
    Answers,
    /// Every packet that arrives: it may be handed to a socket.
    ArrivingUdp,
    /// Every packet that a program here sends: it is routed again when its mark changes.
    LeavingUdp,
    /// Every packet for this host, after all others: it may be dropped.
    ArrivingStrict,
    /// Every packet that a program here sends, after all others: it may be dropped.
    LeavingStrict,
}

/// When all of `matches` hold, `action` is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RedirectRule {
    pub(super) matches: Vec<RuleMatch>,
    /// Whether the packets it takes are counted.
    pub(super) counted: bool,
    pub(super) action: RuleAction,
}

/// What a rule asks of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RuleMatch {
    /// Its mark, under [`MARK_MASK`](super::MARK_MASK).
    Mark(u32),
    /// The user whose program sends it.
    User(u32),
    /// Its destination is an address of this host, or is not.
    ToThisHost(bool),
    /// Its destination lies in a range. A packet of the other family does not match.
    To(Cidr),
    /// It is of this protocol.
    Over(Transport),
    /// It is of this protocol, and to one of these ports.
    Port(Transport, RangeInclusive<u16>),
    /// It arrives on this network device, or does not.
    FromInterface(String, bool),
    /// It leaves by this network device.
    ToInterface(String),
    /// It is for a socket here that is bound to an address which may be another's.
    ForTransparentSocket,
    /// It answers: its connection began on the other side.
    Reply,
    /// It tells of a connection, as an error of ICMP does.
    Related,
    /// It is of this type of `ICMPv6`, and has this hop limit.
    Icmpv6 { kind: u8, hop_limit: u8 },
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RuleAction {
    /// Leaves it alone.
    Return,
    /// Makes this port of this host its destination.
    RedirectConfig(u16),
    /// Sets the bits of its mark that are ours.
    Mark(u32),
    /// Hands it to the socket at this port, destination unchanged.
    Tproxy(u16),
    /// Drops it.
    Drop,
}

impl RuleMatch {
    /// The family of packets that can match; none when either can.
    pub(super) fn family(&self) -> Option<IpFamily> {
        match self {
            Self::To(range) if range.address().is_ipv4() => Some(IpFamily::V4),
            Self::To(_) | Self::Icmpv6 { .. } => Some(IpFamily::V6),
            _ => None,
        }
    }
}

/// The chains that are wanted.
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
            &[RuleMatch::Over(Transport::Tcp)],
            RuleAction::RedirectConfig(port),
        ));
    }
    if let Some(port) = redirect.inbound {
        let (first, last) = RedirectConfig::OWN_PORTS;
        rules.push(skip([RuleMatch::ToThisHost(false)]));
        rules.push(skip([RuleMatch::Port(Transport::Tcp, first..=last)]));
        for excluded in &redirect.exclude_inbound_ports {
            rules.push(skip([RuleMatch::Port(Transport::Tcp, *excluded..=*excluded)]));
        }
        rules
            .push(counted(vec![RuleMatch::Over(Transport::Tcp)], RuleAction::RedirectConfig(port)));
    }
    rules
}

fn leaving(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    if redirect.outbound.is_none() && redirect.dns.is_none() {
        return Vec::new();
    }
    let mut rules = loop_prevention(redirect);
    rules.extend(excluded_from_leaving(redirect));
    // A resolver may be on loopback, as Docker's is, at 127.0.0.11.
    rules.extend(to_resolvers(redirect));
    let Some(port) = redirect.outbound else {
        return rules;
    };
    // The whole of loopback, and the namespace's own addresses, stay as they are.
    rules.extend(Cidr::LOOPBACK.map(|range| skip([RuleMatch::To(range)])));
    rules.push(counted(vec![RuleMatch::ToThisHost(true)], RuleAction::Return));
    for excluded in &redirect.exclude_outbound_ports {
        rules.push(skip([RuleMatch::Port(Transport::Tcp, *excluded..=*excluded)]));
    }
    if redirect.services.is_empty() {
        rules
            .push(counted(vec![RuleMatch::Over(Transport::Tcp)], RuleAction::RedirectConfig(port)));
    }
    rules.extend(to_services(
        redirect,
        &[RuleMatch::Over(Transport::Tcp)],
        RuleAction::RedirectConfig(port),
    ));
    rules
}

fn answers(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    let rule =
        || counted(vec![RuleMatch::ForTransparentSocket], RuleAction::Mark(LOCAL_DELIVERY_MARK));
    redirect.keep_source.then(rule).into_iter().collect()
}

/// Questions to resolvers.
fn to_resolvers(redirect: &RedirectConfig) -> impl Iterator<Item = RedirectRule> + '_ {
    let rules = |port: u16| {
        redirect.resolvers.iter().flat_map(move |resolver| {
            [Transport::Udp, Transport::Tcp].map(|transport| {
                let question = RuleMatch::Port(transport, dns::PORT..=dns::PORT);
                counted(
                    vec![RuleMatch::To(Cidr::from(*resolver)), question],
                    RuleAction::RedirectConfig(port),
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
        // What the kernel carries itself bears our mark (`kernel/table.rs`).
        rules.push(skip([RuleMatch::Mark(redirect.mark)]));
        let from_others = [from_loopback(false), RuleMatch::Over(Transport::Udp)];
        rules.extend(to_services(redirect, &from_others, RuleAction::Mark(LOCAL_DELIVERY_MARK)));
    }
    rules.push(counted(
        vec![RuleMatch::Mark(LOCAL_DELIVERY_MARK), RuleMatch::Over(Transport::Udp)],
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
        &[RuleMatch::Over(Transport::Udp)],
        RuleAction::Mark(LOCAL_DELIVERY_MARK),
    ));
    rules
}

/// What may arrive without having been handed over.
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
        rules.push(skip([RuleMatch::Mark(LOCAL_DELIVERY_MARK), RuleMatch::Over(Transport::Udp)]));
    }
    rules.extend(from_excluded_interfaces(redirect));
    rules.extend(redirect.exclude_inbound_ports.iter().flat_map(|port| to_port(*port)));
    rules.extend(ipv6_link_messages([130], [134, 135, 136, 137]));
    rules.push(counted(Vec::new(), RuleAction::Drop));
    rules
}

/// What may leave without having been handed over.
fn leaving_strict(redirect: &RedirectConfig) -> Vec<RedirectRule> {
    if redirect.outbound.is_none() || !redirect.strict {
        return Vec::new();
    }
    let mut rules = loop_prevention(redirect);
    // The address tells it, not the device: a packet that was just redirected still has the device of
    // its first destination.
    rules.push(skip([RuleMatch::ToThisHost(true)]));
    if redirect.udp.is_some() {
        rules.push(skip([RuleMatch::Mark(LOCAL_DELIVERY_MARK), RuleMatch::Over(Transport::Udp)]));
    }
    rules.extend(replies_and_related());
    rules.extend(excluded_from_leaving(redirect));
    rules.extend(redirect.exclude_outbound_ports.iter().flat_map(|port| to_port(*port)));
    rules.extend(ipv6_link_messages([131, 132, 143], [133, 135, 136]));
    rules.push(counted(Vec::new(), RuleAction::Drop));
    rules
}

/// Answers, and errors about connections: what they belong to was judged when it began.
fn replies_and_related() -> [RedirectRule; 2] {
    [skip([RuleMatch::Reply]), skip([RuleMatch::Related])]
}

/// What IPv6 needs on the link: groups, which go no hop further (RFC 3810 5.1.14), and neighbours, whose
/// messages have come no hop far (RFC 4861 7.1), so that neither crosses a router unseen.
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
    RuleMatch::FromInterface("lo".to_owned(), is)
}

fn from_excluded_interfaces(redirect: &RedirectConfig) -> impl Iterator<Item = RedirectRule> + '_ {
    let names = redirect.exclude_interfaces.iter();
    names.map(|name| skip([RuleMatch::FromInterface(name.clone(), true)]))
}

/// What leaves as it is whatever it carries: by whose program, by which device, and whereto.
fn excluded_from_leaving(redirect: &RedirectConfig) -> impl Iterator<Item = RedirectRule> + '_ {
    let users = redirect.exclude_users.iter().map(|user| RuleMatch::User(*user));
    let devices =
        redirect.exclude_interfaces.iter().map(|name| RuleMatch::ToInterface(name.clone()));
    let ranges = redirect.exclude_destinations.iter().map(|range| RuleMatch::To(*range));
    users.chain(devices).chain(ranges).map(|excluded| skip([excluded]))
}

/// What breaks loops: the mark first, the user second.
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
    let rule = |range: &Cidr| counted([matches, &[RuleMatch::To(*range)]].concat(), action);
    redirect.services.iter().map(rule).collect()
}

fn skip(matches: impl Into<Vec<RuleMatch>>) -> RedirectRule {
    RedirectRule { matches: matches.into(), counted: false, action: RuleAction::Return }
}

fn counted(matches: Vec<RuleMatch>, action: RuleAction) -> RedirectRule {
    RedirectRule { matches, counted: true, action }
}
