//! What services come to in the kernel: one table, hooked just before the redirects.
//!
//! ```text
//! guard_*             a new flow to a service with a security group -> the group's chain
//! group_tcp_...       destination . protocol . port . source among those let in: on; else count, drop
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

use std::hash::Hasher;

use weft_model::{FlowKey, Maglev, Transport};
use weft_runtime::socket::Mark;

use super::field::{Family, full, load_destination_port, load_sequence, load_source_port};
use super::flows::Ending;
use super::index::{Index, What, chain_name, group_name};
use super::service::{Group, KernelService, Place};
use crate::netlink::Message;
use crate::netlink::nf_tables::{
    self as nf, Comparison, Expression, Holds, Hook, HookPlace, Meta, Part, Set, ValueKind,
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
    pub(super) groups: &'a [Group],
    /// Connections that are to be reset when they are next heard of.
    pub(super) ending: &'a [Ending],
    /// Whether datagrams may be captured before their destination is changed: by iptables.
    pub(super) is_captured_early: bool,
}

impl Wanted<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.services.is_empty() && self.groups.is_empty() && self.ending.is_empty()
    }
}

/// A chain with its rules.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) name: String,
    pub(super) hook: Option<Hook>,
    pub(super) rules: Vec<Vec<Expression>>,
}

/// The chain of a service's security group.
pub(super) fn group_chain(group: &Group) -> Chain {
    let name = group_name(group.key);
    let family = Family::of(group.key.1.is_ipv4());
    let address = family.words();
    let (mut let_in, protocol, index) = match group.key.1 {
        Place::At(_) => (vec![family.load_destination(0)], address, Index::of(What::LetIn, family)),
        Place::Here(_) => (Vec::new(), 0, Index::of(What::LetInHere, family)),
    };
    let_in.extend([
        nf::load_meta_at(protocol, Meta::Protocol),
        load_destination_port(protocol + 1),
        family.load_source(protocol + 2),
        nf::is_in(index.name()),
        nf::decide(nf::Verdict::Return),
    ]);
    let others = vec![nf::count_by(&name), nf::decide(nf::Verdict::Drop)];
    Chain { name, hook: None, rules: vec![let_in, others] }
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
        has_ranges: false,
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
    let (mut key, mut words) = match service.flow_key {
        FlowKey::FiveTuple | FlowKey::WithSequence => (
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
    if service.flow_key.takes_sequence(service.key.0) {
        key.push(load_sequence(words));
        words += 1;
    }
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
    // Behind connection tracking, which is at -200, and before everything that takes a packet.
    const GUARD: i32 = -175;
    let chain = |name: &str, kind, place, priority, rules: Vec<_>| Chain {
        name: name.to_owned(),
        hook: Some(Hook { kind, place, priority }),
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
    let guard: Vec<_> = Family::BOTH.into_iter().flat_map(|f| guard(f, wanted.groups)).collect();
    let all = [
        chain("guard_arriving", "filter", HookPlace::Prerouting, GUARD, guard.clone()),
        chain("guard_leaving", "filter", HookPlace::Output, GUARD, guard),
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
    let places: Vec<Place> = services.iter().map(|service| service.key.1).collect();
    let at = Index::of(What::Services, family);
    let here = Index::of(What::Here, family);
    by_destination(family, &places, &[], at, here)
}

fn guard(family: Family, groups: &[Group]) -> Vec<Vec<Expression>> {
    let places: Vec<Place> = groups.iter().map(|group| group.key.1).collect();
    let at = Index::of(What::Groups, family);
    let here = Index::of(What::GroupsHere, family);
    by_destination(family, &places, &nf::is_of_no_connection(), at, here)
}

/// The rules that lead packets to the chains of their destinations, as far as there are any in these
/// places: `first` is asked before, then `at` by address, protocol and port, then `here`.
fn by_destination(
    family: Family,
    places: &[Place],
    first: &[Expression],
    at: Index,
    here: Index,
) -> Vec<Vec<Expression>> {
    let mut ours = places.iter().filter(|place| Family::of(place.is_ipv4()) == family);
    let has_at = ours.clone().any(|place| matches!(place, Place::At(_)));
    let has_here = ours.any(|place| matches!(place, Place::Here(_)));
    let address = family.words();
    let mut rules = Vec::new();
    if has_at {
        let mut rule = [family.is_it().as_slice(), first].concat();
        rule.extend([
            family.load_destination(0),
            nf::load_meta_at(address, Meta::Protocol),
            load_destination_port(address + 1),
            nf::decide_by(at.name()),
        ]);
        rules.push(rule);
    }
    if has_here {
        const LOCAL: u32 = 2;
        let mut rule = [family.is_it().as_slice(), first].concat();
        // The kernel sends nothing from loopback elsewhere: that is for our own socket.
        rule.extend(family.is_not_loopback());
        rule.extend([
            nf::load_destination_kind(),
            nf::compare(Comparison::Equal, &LOCAL.to_ne_bytes()),
            nf::load_meta_at(0, Meta::Protocol),
            load_destination_port(1),
            nf::decide_by(here.name()),
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
            nf::is_in(Index::of(What::Datagrams, family).name()),
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
            nf::is_in(Index::of(What::Hairpin, family).name()),
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
            nf::is_in(Index::of(What::Ending, family).name()),
            nf::reset(),
        ]);
        rule
    })
}
