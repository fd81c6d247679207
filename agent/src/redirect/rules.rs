//! The rules that a wish comes to, as values. What they mean is decided here, once; the renderers
//! only find words for it.

use std::ops::RangeInclusive;

use weft_model::Cidr;

use super::{Family, Redirect, UDP_MARK};

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
    /// Every packet that arrives: it may be handed to a socket.
    ArrivingUdp,
    /// Every packet that a program here sends: it is routed again when its mark changes.
    LeavingUdp,
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
    /// It arrives on loopback, or does not.
    FromLoopback(bool),
    /// Its destination is an address of this host, or is not.
    ToThisHost(bool),
    /// Its destination lies in a range. A packet of the other family does not match.
    To(Cidr),
    /// It is TCP.
    Tcp,
    /// It is UDP.
    Udp,
    /// It is TCP to one of these ports.
    TcpPort(RangeInclusive<u16>),
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
}

impl Match {
    /// The family of packets that can match; none when either can.
    pub(super) fn family(&self) -> Option<Family> {
        match self {
            Self::To(range) if range.address().is_ipv4() => Some(Family::V4),
            Self::To(_) => Some(Family::V6),
            _ => None,
        }
    }
}

/// The chains that are wanted.
pub(super) fn chains(redirect: &Redirect) -> Vec<Chain> {
    let all = [
        Chain { place: Place::Arriving, rules: arriving(redirect) },
        Chain { place: Place::Leaving, rules: leaving(redirect) },
        Chain { place: Place::ArrivingUdp, rules: arriving_udp(redirect) },
        Chain { place: Place::LeavingUdp, rules: leaving_udp(redirect) },
    ];
    all.into_iter().filter(|chain| !chain.rules.is_empty()).collect()
}

fn arriving(redirect: &Redirect) -> Vec<Rule> {
    if redirect.inbound.is_none() && redirect.forwarded.is_none() {
        return Vec::new();
    }
    let mut rules = vec![leave_alone([Match::FromLoopback(true)])];
    if let Some(port) = redirect.forwarded {
        rules.extend(to_services(redirect, &[Match::Tcp], Action::Redirect(port)));
    }
    if let Some(port) = redirect.inbound {
        let (first, last) = Redirect::OWN_PORTS;
        rules.push(leave_alone([Match::ToThisHost(false)]));
        rules.push(leave_alone([Match::TcpPort(first..=last)]));
        for excluded in &redirect.exclude_inbound_ports {
            rules.push(leave_alone([Match::TcpPort(*excluded..=*excluded)]));
        }
        rules.push(counted(vec![Match::Tcp], Action::Redirect(port)));
    }
    rules
}

fn leaving(redirect: &Redirect) -> Vec<Rule> {
    let Some(port) = redirect.outbound else {
        return Vec::new();
    };
    let mut rules = own(redirect);
    // The whole of loopback, and the namespace's own addresses, stay as they are.
    rules.extend(Cidr::LOOPBACK.map(|range| leave_alone([Match::To(range)])));
    rules.push(counted(vec![Match::ToThisHost(true)], Action::Return));
    for range in &redirect.exclude_destinations {
        rules.push(leave_alone([Match::To(*range)]));
    }
    for excluded in &redirect.exclude_outbound_ports {
        rules.push(leave_alone([Match::TcpPort(*excluded..=*excluded)]));
    }
    if redirect.services.is_empty() {
        rules.push(counted(vec![Match::Tcp], Action::Redirect(port)));
    }
    rules.extend(to_services(redirect, &[Match::Tcp], Action::Redirect(port)));
    rules
}

fn arriving_udp(redirect: &Redirect) -> Vec<Rule> {
    let Some(port) = redirect.udp else {
        return Vec::new();
    };
    let mut rules = Vec::new();
    if redirect.forwarded.is_some() {
        // What the kernel carries itself bears our mark (`kernel/table.rs`).
        rules.push(leave_alone([Match::Mark(redirect.mark)]));
        let from_others = [Match::FromLoopback(false), Match::Udp];
        rules.extend(to_services(redirect, &from_others, Action::Mark(UDP_MARK)));
    }
    rules.push(counted(vec![Match::Mark(UDP_MARK), Match::Udp], Action::HandTo(port)));
    rules
}

fn leaving_udp(redirect: &Redirect) -> Vec<Rule> {
    if redirect.udp.is_none() {
        return Vec::new();
    }
    let mut rules = own(redirect);
    rules.extend(to_services(redirect, &[Match::Udp], Action::Mark(UDP_MARK)));
    rules
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
