//! The rules that a wish comes to, as values. What they mean is decided here, once; the renderers
//! only find words for it.

use std::ops::RangeInclusive;

use weft_model::{Cidr, Transport};

use super::{Family, HERE_MARK, Redirect, dns};

/// A chain of ours: rules that see packets at one place of their way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) place: Place,
    /// In order; the first that decides ends it. A packet that none takes goes its way.
    pub(super) rules: Vec<Rule>,
}

/// Where a chain sees packets, and what it may do to them there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
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
pub(super) struct Rule {
    pub(super) matches: Vec<Match>,
    /// Whether the packets it takes are counted.
    pub(super) counted: bool,
    pub(super) action: Action,
}

/// What a rule asks of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Match {
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
pub(super) enum Action {
    /// Leaves it alone.
    Return,
    /// Makes this port of this host its destination.
    Redirect(u16),
    /// Sets the bits of its mark that are ours.
    Mark(u32),
    /// Hands it to the socket at this port, destination unchanged.
    HandTo(u16),
    /// Drops it.
    Drop,
}

impl Match {
    /// The family of packets that can match; none when either can.
    pub(super) fn family(&self) -> Option<Family> {
        match self {
            Self::To(range) if range.address().is_ipv4() => Some(Family::V4),
            Self::To(_) | Self::Icmpv6 { .. } => Some(Family::V6),
            _ => None,
        }
    }
}

/// The chains that are wanted.
pub(super) fn chains(redirect: &Redirect) -> Vec<Chain> {
    let all = [
        Chain { place: Place::Arriving, rules: arriving(redirect) },
        Chain { place: Place::Leaving, rules: leaving(redirect) },
        Chain { place: Place::Answers, rules: answers(redirect) },
        Chain { place: Place::ArrivingUdp, rules: arriving_udp(redirect) },
        Chain { place: Place::LeavingUdp, rules: leaving_udp(redirect) },
        Chain { place: Place::ArrivingStrict, rules: arriving_strict(redirect) },
        Chain { place: Place::LeavingStrict, rules: leaving_strict(redirect) },
    ];
    all.into_iter().filter(|chain| !chain.rules.is_empty()).collect()
}

fn arriving(redirect: &Redirect) -> Vec<Rule> {
    if redirect.inbound.is_none() && redirect.forwarded.is_none() {
        return Vec::new();
    }
    let mut rules = vec![leave_alone([from_loopback(true)])];
    rules.extend(from_excluded_interfaces(redirect));
    if let Some(port) = redirect.forwarded {
        rules.extend(to_services(redirect, &[Match::Over(Transport::Tcp)], Action::Redirect(port)));
    }
    if let Some(port) = redirect.inbound {
        let (first, last) = Redirect::OWN_PORTS;
        rules.push(leave_alone([Match::ToThisHost(false)]));
        rules.push(leave_alone([Match::Port(Transport::Tcp, first..=last)]));
        for excluded in &redirect.exclude_inbound_ports {
            rules.push(leave_alone([Match::Port(Transport::Tcp, *excluded..=*excluded)]));
        }
        rules.push(counted(vec![Match::Over(Transport::Tcp)], Action::Redirect(port)));
    }
    rules
}

fn leaving(redirect: &Redirect) -> Vec<Rule> {
    if redirect.outbound.is_none() && redirect.dns.is_none() {
        return Vec::new();
    }
    let mut rules = own(redirect);
    rules.extend(excluded_from_leaving(redirect));
    // A resolver may be on loopback, as Docker's is, at 127.0.0.11.
    rules.extend(to_resolvers(redirect));
    let Some(port) = redirect.outbound else {
        return rules;
    };
    // The whole of loopback, and the namespace's own addresses, stay as they are.
    rules.extend(Cidr::LOOPBACK.map(|range| leave_alone([Match::To(range)])));
    rules.push(counted(vec![Match::ToThisHost(true)], Action::Return));
    for excluded in &redirect.exclude_outbound_ports {
        rules.push(leave_alone([Match::Port(Transport::Tcp, *excluded..=*excluded)]));
    }
    if redirect.services.is_empty() {
        rules.push(counted(vec![Match::Over(Transport::Tcp)], Action::Redirect(port)));
    }
    rules.extend(to_services(redirect, &[Match::Over(Transport::Tcp)], Action::Redirect(port)));
    rules
}

fn answers(redirect: &Redirect) -> Vec<Rule> {
    let rule = || counted(vec![Match::ForTransparentSocket], Action::Mark(HERE_MARK));
    redirect.keep_source.then(rule).into_iter().collect()
}

/// Questions to resolvers.
fn to_resolvers(redirect: &Redirect) -> impl Iterator<Item = Rule> + '_ {
    let rules = |port: u16| {
        redirect.resolvers.iter().flat_map(move |resolver| {
            [Transport::Udp, Transport::Tcp].map(|transport| {
                let question = Match::Port(transport, dns::PORT..=dns::PORT);
                counted(vec![Match::To(Cidr::from(*resolver)), question], Action::Redirect(port))
            })
        })
    };
    redirect.dns.into_iter().flat_map(rules)
}

fn arriving_udp(redirect: &Redirect) -> Vec<Rule> {
    let Some(port) = redirect.udp else {
        return Vec::new();
    };
    let mut rules: Vec<Rule> = from_excluded_interfaces(redirect).collect();
    if redirect.forwarded.is_some() {
        // What the kernel carries itself bears our mark (`kernel/table.rs`).
        rules.push(leave_alone([Match::Mark(redirect.mark)]));
        let from_others = [from_loopback(false), Match::Over(Transport::Udp)];
        rules.extend(to_services(redirect, &from_others, Action::Mark(HERE_MARK)));
    }
    rules.push(counted(
        vec![Match::Mark(HERE_MARK), Match::Over(Transport::Udp)],
        Action::HandTo(port),
    ));
    rules
}

fn leaving_udp(redirect: &Redirect) -> Vec<Rule> {
    if redirect.udp.is_none() {
        return Vec::new();
    }
    let mut rules = own(redirect);
    rules.extend(excluded_from_leaving(redirect));
    for excluded in &redirect.exclude_outbound_ports {
        rules.push(leave_alone([Match::Port(Transport::Udp, *excluded..=*excluded)]));
    }
    rules.extend(to_services(redirect, &[Match::Over(Transport::Udp)], Action::Mark(HERE_MARK)));
    rules
}

/// What may arrive without having been handed over.
fn arriving_strict(redirect: &Redirect) -> Vec<Rule> {
    let Some(inbound) = redirect.inbound.filter(|_| redirect.strict) else {
        return Vec::new();
    };
    let mut rules = vec![leave_alone([from_loopback(true)])];
    rules.extend(part_of_other_connections());
    for port in [Some(inbound), redirect.forwarded].into_iter().flatten() {
        rules.push(leave_alone([Match::Port(Transport::Tcp, port..=port)]));
    }
    if redirect.udp.is_some() {
        rules.push(leave_alone([Match::Mark(HERE_MARK), Match::Over(Transport::Udp)]));
    }
    rules.extend(from_excluded_interfaces(redirect));
    rules.extend(redirect.exclude_inbound_ports.iter().flat_map(|port| to_port(*port)));
    rules.extend(of_the_link([130], [134, 135, 136, 137]));
    rules.push(counted(Vec::new(), Action::Drop));
    rules
}

/// What may leave without having been handed over.
fn leaving_strict(redirect: &Redirect) -> Vec<Rule> {
    if redirect.outbound.is_none() || !redirect.strict {
        return Vec::new();
    }
    let mut rules = own(redirect);
    // The address tells it, not the device: a packet that was just redirected still has the device of
    // its first destination.
    rules.push(leave_alone([Match::ToThisHost(true)]));
    if redirect.udp.is_some() {
        rules.push(leave_alone([Match::Mark(HERE_MARK), Match::Over(Transport::Udp)]));
    }
    rules.extend(part_of_other_connections());
    rules.extend(excluded_from_leaving(redirect));
    rules.extend(redirect.exclude_outbound_ports.iter().flat_map(|port| to_port(*port)));
    rules.extend(of_the_link([131, 132, 143], [133, 135, 136]));
    rules.push(counted(Vec::new(), Action::Drop));
    rules
}

/// Answers, and errors about connections: what they belong to was judged when it began.
fn part_of_other_connections() -> [Rule; 2] {
    [leave_alone([Match::Reply]), leave_alone([Match::Related])]
}

/// What IPv6 needs on the link: groups, which go no hop further (RFC 3810 5.1.14), and neighbours, whose
/// messages have come no hop far (RFC 4861 7.1), so that neither crosses a router unseen.
fn of_the_link<const G: usize, const N: usize>(
    groups: [u8; G],
    neighbours: [u8; N],
) -> impl Iterator<Item = Rule> {
    let groups = groups.into_iter().map(|kind| Match::Icmpv6 { kind, hop_limit: 1 });
    let neighbours = neighbours.into_iter().map(|kind| Match::Icmpv6 { kind, hop_limit: 255 });
    groups.chain(neighbours).map(|message| leave_alone([message]))
}

fn to_port(port: u16) -> [Rule; 2] {
    [Transport::Tcp, Transport::Udp]
        .map(|transport| leave_alone([Match::Port(transport, port..=port)]))
}

fn from_loopback(is: bool) -> Match {
    Match::FromInterface("lo".to_owned(), is)
}

fn from_excluded_interfaces(redirect: &Redirect) -> impl Iterator<Item = Rule> + '_ {
    let names = redirect.exclude_interfaces.iter();
    names.map(|name| leave_alone([Match::FromInterface(name.clone(), true)]))
}

/// What leaves as it is whatever it carries: by whose program, by which device, and whereto.
fn excluded_from_leaving(redirect: &Redirect) -> impl Iterator<Item = Rule> + '_ {
    let users = redirect.exclude_users.iter().map(|user| Match::User(*user));
    let devices = redirect.exclude_interfaces.iter().map(|name| Match::ToInterface(name.clone()));
    let ranges = redirect.exclude_destinations.iter().map(|range| Match::To(*range));
    users.chain(devices).chain(ranges).map(|excluded| leave_alone([excluded]))
}

/// What breaks loops: the mark first, the user second.
fn own(redirect: &Redirect) -> Vec<Rule> {
    let mut rules = vec![counted(vec![Match::Mark(redirect.mark)], Action::Return)];
    if let Some(user) = redirect.uid {
        rules.push(counted(vec![Match::User(user)], Action::Return));
    }
    rules
}

fn to_services(redirect: &Redirect, matches: &[Match], action: Action) -> Vec<Rule> {
    let rule = |range: &Cidr| counted([matches, &[Match::To(*range)]].concat(), action);
    redirect.services.iter().map(rule).collect()
}

fn leave_alone(matches: impl Into<Vec<Match>>) -> Rule {
    Rule { matches: matches.into(), counted: false, action: Action::Return }
}

fn counted(matches: Vec<Match>, action: Action) -> Rule {
    Rule { matches, counted: true, action }
}
