//! The nf_tables table for the kernel path, hooked just before the redirects.
//!
//! ```text
//! guard_*             a new flow to a service with a security group -> the chain of the group
//! group_tcp_...       destination . protocol . port . source is admitted: return; otherwise count and drop
//! arriving, leaving   destination . protocol . port -> the chain of the service, through a map
//! tcp_10.96.0.3_7000  count; destination = maglev map[jhash(source . port . destination . port)]
//! hairpin             an endpoint connected to itself: masquerade as this host
//! ours_*              set our mark on UDP packets that the kernel carries, so that iptables redirects do not
//!                     capture them; only while iptables has redirects
//! ending*             a packet of a connection to an endpoint whose drain time has passed: reset
//! ```
//!
//! The name of a map contains a hash of its contents. A rule switches to a map only after the map is filled, so a map
//! that a rule uses is complete and correct.

use std::hash::Hasher;

use weft_model::{FlowKey, Maglev, Transport};
use weft_runtime::socket::Mark;

use super::desired::{DesiredTable, TABLE, chain_name, group_name};
use super::flows::ExpiredEndpoint;
use super::packet_fields::{
    NetFamily, address_and_port, load_destination_port, load_sequence, load_source_port,
};
use super::service::{KernelService, SecurityGroup, ServiceAddress};
use super::table_sets::{SetKind, TableSet};
use crate::netlink::NetlinkMessage;
use crate::netlink::nf_tables::{
    self as nf, Comparison, Expression, Hook, HookPoint, MetaKey, PayloadBase, SetData, SetSpec,
    ValueKind,
};
use crate::redirect::MARK_MASK;

/// A chain with its rules.
#[derive(Debug)]
pub(super) struct KernelChain {
    pub(super) name: String,
    pub(super) hook: Option<Hook>,
    pub(super) rules: Vec<Vec<Expression>>,
}

/// The chain of a service's security group.
pub(super) fn group_chain(group: &SecurityGroup) -> KernelChain {
    let name = group_name(group.key);
    let family = NetFamily::of(group.key.address.is_ipv4());
    let address = family.words();
    let (mut let_in, protocol, index) = match group.key.address {
        ServiceAddress::Exact(_) => (
            vec![family.load_destination(0)],
            address,
            TableSet::of(SetKind::AllowedClients, family),
        ),
        ServiceAddress::AnyLocal(_) => {
            (Vec::new(), 0, TableSet::of(SetKind::LocalAllowedClients, family))
        }
    };
    let_in.extend([
        nf::load_meta_at(protocol, MetaKey::Protocol),
        load_destination_port(protocol + 1),
        family.load_source(protocol + 2),
        nf::lookup_set(index.name()),
        nf::verdict(nf::PacketVerdict::Return),
    ]);
    let others = vec![nf::count_in(&name), nf::verdict(nf::PacketVerdict::Drop)];
    KernelChain { name, hook: None, rules: vec![let_in, others] }
}

/// The name of the map for a service. A number may follow it; maps with the same name before the number are equal.
pub(super) fn map_name(service: &KernelService) -> String {
    let mut hasher = siphasher::sip::SipHasher13::new();
    let table = &service.table;
    hasher.write_usize(table.size());
    // The endpoints in their order, then the owner of each slot, determine the contents.
    for endpoint in table.endpoints() {
        hasher.write(&address_and_port(*endpoint));
    }
    table.owners().iter().for_each(|owner| hasher.write_u32(*owner));
    format!("{}_{:016x}", chain_name(service.key), hasher.finish())
}

/// Creates an empty map for the Maglev table of a service.
pub(super) fn make_map(service: &KernelService, name: &str) -> NetlinkMessage {
    let family = NetFamily::of(service.key.address.is_ipv4());
    let value = [family.kind(), ValueKind::Port];
    let set = SetSpec {
        name,
        key: &[ValueKind::Number],
        has_ranges: false,
        holds: SetData::Values(&value, family.words() * 4 + 4),
        size: u32::try_from(service.table.size()).ok(),
    };
    nf::make_set(TABLE, set)
}

/// The map values of the endpoints, in their order.
pub(super) fn map_values(table: &Maglev) -> Vec<Vec<u8>> {
    table.endpoints().iter().map(|endpoint| address_and_port(*endpoint)).collect()
}

/// The rule of a service's chain, with this map.
pub(super) fn service_rule(service: &KernelService, map: &str) -> Vec<Expression> {
    let family = NetFamily::of(service.key.address.is_ipv4());
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
    if service.flow_key.takes_sequence(service.key.transport) {
        key.push(load_sequence(words));
        words += 1;
    }
    let mut rule = vec![nf::count_in(&chain_name(service.key))];
    rule.extend(key);
    rule.extend([
        nf::hash(words * 4, size, service.seed),
        nf::lookup_map(map),
        nf::dnat(family.number().into(), address),
    ]);
    rule
}

/// The base chains that these services need.
pub(super) fn base_chains(desired: DesiredTable<'_>) -> Vec<KernelChain> {
    // Our redirects of connections are at -101.
    const BEFORE_NAT: i32 = -102;
    // The UDP redirects of iptables are at -150.
    const BEFORE_CAPTURE: i32 = -160;
    const BEFORE_SOURCE_NAT: i32 = 99;
    const AS_FILTERS: i32 = 0;
    // After connection tracking, which is at -200, and before everything that captures packets.
    const GUARD: i32 = -175;
    let chain = |name: &str, kind, place, priority, rules: Vec<_>| KernelChain {
        name: name.to_owned(),
        hook: Some(Hook { kind, point: place, priority }),
        rules,
    };
    let services = desired.services;
    let dispatch: Vec<_> =
        NetFamily::BOTH.into_iter().flat_map(|f| dispatch(f, services)).collect();
    let mark_udp: Vec<_> = NetFamily::BOTH
        .into_iter()
        .filter(|_| desired.may_be_captured_by_iptables)
        .filter_map(|f| mark_udp(f, services))
        .collect();
    let hairpin = NetFamily::BOTH.into_iter().filter_map(|f| hairpin(f, services)).collect();
    let expired: Vec<_> =
        NetFamily::BOTH.into_iter().filter_map(|f| expired(f, desired.expired)).collect();
    let guard: Vec<_> =
        NetFamily::BOTH.into_iter().flat_map(|f| security_group_guard(f, desired.groups)).collect();
    let all = [
        chain("guard_arriving", "filter", HookPoint::Prerouting, GUARD, guard.clone()),
        chain("guard_leaving", "filter", HookPoint::Output, GUARD, guard),
        chain("arriving", "nat", HookPoint::Prerouting, BEFORE_NAT, dispatch.clone()),
        chain("leaving", "nat", HookPoint::Output, BEFORE_NAT, dispatch),
        chain("hairpin", "nat", HookPoint::Postrouting, BEFORE_SOURCE_NAT, hairpin),
        chain("ours_arriving", "filter", HookPoint::Prerouting, BEFORE_CAPTURE, mark_udp.clone()),
        chain("ours_leaving", "filter", HookPoint::Output, BEFORE_CAPTURE, mark_udp),
        chain("ending", "filter", HookPoint::Forward, AS_FILTERS, expired.clone()),
        chain("ending_here", "filter", HookPoint::Output, AS_FILTERS, expired),
    ];
    // A chain without rules would still cost time for every packet.
    all.into_iter().filter(|chain| !chain.rules.is_empty()).collect()
}

fn dispatch(family: NetFamily, services: &[KernelService]) -> Vec<Vec<Expression>> {
    let places: Vec<ServiceAddress> = services.iter().map(|service| service.key.address).collect();
    let exact = TableSet::of(SetKind::Services, family);
    let local = TableSet::of(SetKind::LocalServices, family);
    by_destination(family, &places, &[], exact, local)
}

fn security_group_guard(family: NetFamily, groups: &[SecurityGroup]) -> Vec<Vec<Expression>> {
    let places: Vec<ServiceAddress> = groups.iter().map(|group| group.key.address).collect();
    let exact = TableSet::of(SetKind::SecurityGroups, family);
    let local = TableSet::of(SetKind::LocalSecurityGroups, family);
    by_destination(family, &places, &nf::match_unestablished(), exact, local)
}

/// The rules that send packets to the chain of their destination, for the given addresses. `first` is
/// evaluated first, then the set `exact` by address, protocol and port, then the set `local` by protocol and
/// port.
fn by_destination(
    family: NetFamily,
    places: &[ServiceAddress],
    first: &[Expression],
    exact: TableSet,
    local: TableSet,
) -> Vec<Vec<Expression>> {
    let mut of_family = places.iter().filter(|place| NetFamily::of(place.is_ipv4()) == family);
    let has_exact = of_family.clone().any(|place| matches!(place, ServiceAddress::Exact(_)));
    let has_local = of_family.any(|place| matches!(place, ServiceAddress::AnyLocal(_)));
    let address = family.words();
    let mut rules = Vec::new();
    if has_exact {
        let mut rule = [family.match_family().as_slice(), first].concat();
        rule.extend([
            family.load_destination(0),
            nf::load_meta_at(address, MetaKey::Protocol),
            load_destination_port(address + 1),
            nf::lookup_verdict(exact.name()),
        ]);
        rules.push(rule);
    }
    if has_local {
        const LOCAL: u32 = 2;
        let mut rule = [family.match_family().as_slice(), first].concat();
        // The kernel routes no loopback traffic to other hosts, so our own socket serves it.
        rule.extend(family.match_non_loopback_destination());
        rule.extend([
            nf::load_destination_type(),
            nf::compare(Comparison::Equal, &LOCAL.to_ne_bytes()),
            nf::load_meta_at(0, MetaKey::Protocol),
            load_destination_port(1),
            nf::lookup_verdict(local.name()),
        ]);
        rules.push(rule);
    }
    rules
}

fn mark_udp(family: NetFamily, services: &[KernelService]) -> Option<Vec<Expression>> {
    let is_virtual_udp =
        |service: &KernelService| match (service.key.transport, service.key.address) {
            (Transport::Udp, ServiceAddress::Exact(address)) => {
                NetFamily::of(address.is_ipv4()) == family
            }
            (Transport::Tcp, _) | (_, ServiceAddress::AnyLocal(_)) => false,
        };
    services.iter().any(is_virtual_udp).then(|| {
        let mut rule = family.match_family().to_vec();
        rule.extend([
            nf::load_meta(MetaKey::Protocol),
            nf::compare(Comparison::Equal, &[Transport::Udp.number()]),
            family.load_destination(0),
            load_destination_port(family.words()),
            nf::lookup_set(TableSet::of(SetKind::UdpServices, family).name()),
            nf::load_meta(MetaKey::Mark),
            nf::mask(&(!MARK_MASK).to_ne_bytes(), &Mark::DEFAULT.0.to_ne_bytes()),
            nf::set_meta(MetaKey::Mark),
        ]);
        rule
    })
}

fn hairpin(family: NetFamily, services: &[KernelService]) -> Option<Vec<Expression>> {
    services.iter().any(|s| NetFamily::of(s.key.address.is_ipv4()) == family).then(|| {
        let mut rule = family.match_family().to_vec();
        rule.extend([
            family.load_source(0),
            family.load_destination(family.words()),
            nf::lookup_set(TableSet::of(SetKind::Hairpin, family).name()),
            nf::masquerade(),
        ]);
        rule
    })
}

fn expired(family: NetFamily, expired: &[ExpiredEndpoint]) -> Option<Vec<Expression>> {
    use nf::{ConntrackDirection, ConntrackKey};
    /// The offset of the flags in a TCP header, and the RST flag (RFC 9293, section 3.1).
    const TCP_FLAGS: u32 = 13;
    const RESET: u8 = 0x04;
    let (source, destination) = family.pick(
        (ConntrackKey::SourceIpv4, ConntrackKey::DestinationIpv4),
        (ConntrackKey::SourceIpv6, ConntrackKey::DestinationIpv6),
    );
    let address = family.words();
    expired.iter().any(|e| NetFamily::of(e.destination.is_ipv4()) == family).then(|| {
        let mut rule = family.match_family().to_vec();
        rule.extend([
            nf::load_meta(MetaKey::Protocol),
            nf::compare(Comparison::Equal, &[Transport::Tcp.number()]),
            // A reset passes, also our own.
            nf::load_payload(PayloadBase::Transport, TCP_FLAGS, 1),
            nf::mask(&[RESET], &[0]),
            nf::compare(Comparison::Equal, &[0]),
            nf::load_conntrack_at(0, destination, ConntrackDirection::Original),
            nf::load_conntrack_at(
                address,
                ConntrackKey::DestinationPort,
                ConntrackDirection::Original,
            ),
            nf::load_conntrack_at(address + 1, source, ConntrackDirection::Reply),
            nf::load_conntrack_at(
                2 * address + 1,
                ConntrackKey::SourcePort,
                ConntrackDirection::Reply,
            ),
            nf::lookup_set(TableSet::of(SetKind::ExpiredEndpoints, family).name()),
            nf::reset(),
        ]);
        rule
    })
}
