//! The rules told to the kernel itself, so that no tool needs to be there: one table for both
//! families, replaced in one transaction. It is the table that [`nft`](super::nft) would make.

use std::io;
use std::net::IpAddr;

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;
use weft_model::Cidr;

use super::nft::{TABLE, name};
use super::rules::{RedirectChain, RedirectHook, RedirectRule, RuleAction, RuleMatch, chains};
use super::{MARK_MASK, RedirectConfig, RedirectState, generation};
use crate::netlink::nf_tables::{
    self as nf, Comparison, Expression, Hook, HookPoint, MetaKey, PayloadBase,
};
use crate::netlink::{Attributes, Netlink, NetlinkReply, find};

/// The families of addresses, as packets are asked for theirs.
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// Before a message's attributes.
const FIXED_BYTES: usize = 4;

/// Asks whether the kernel has a packet filter that we may talk to.
pub(super) fn probe() -> io::Result<()> {
    open()?.get(&nf::get_generation()).map(drop)
}

fn open() -> io::Result<Netlink> {
    Netlink::open(SockProtocol::NetlinkNetFilter)
}

/// Replaces what is there by what is wanted.
pub(super) fn apply(redirect: &RedirectConfig, generation: u64) -> io::Result<()> {
    // Made, removed and made again, a table is replaced whether or not it was there.
    let mut changes = vec![
        nf::make_table(TABLE, None),
        nf::delete_table(TABLE),
        nf::make_table(TABLE, Some(&redirect.comment(generation))),
    ];
    for chain in chains(redirect) {
        changes.push(nf::make_chain(chain_attributes(chain.place)));
        changes.extend(rule_attributes(&chain).into_iter().map(nf::append_rule));
    }
    open()?.batch(&nf::transaction(changes))
}

/// The generation of what is there; 0 when nothing is.
pub(super) fn installed_generation() -> io::Result<u64> {
    Ok(comment(&mut open()?)?.map_or(0, |comment| generation(&comment)))
}

/// The comment of our table, empty when it has none; none when there is no table.
fn comment(kernel: &mut Netlink) -> io::Result<Option<String>> {
    let table = match kernel.get(&nf::get_table(TABLE)) {
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(None),
        told => told?,
    };
    let told = table.first().and_then(|table| find(attributes(table), nf::TABLE_USERDATA));
    Ok(Some(told.and_then(nf::parse_comment).unwrap_or_default()))
}

/// Removes what is there, if anything is.
pub(super) fn remove() -> io::Result<()> {
    let changes = vec![nf::make_table(TABLE, None), nf::delete_table(TABLE)];
    open()?.batch(&nf::transaction(changes))
}

/// How many packets our rules have dropped since they were installed.
pub(super) fn dropped() -> io::Result<u64> {
    let rules = ours(open()?.dump(&nf::get_rules(TABLE))?, nf::RULE_TABLE);
    Ok(rules.iter().filter_map(|rule| nf::parse_dropped(attributes(rule))).sum())
}

/// Whether a chain of that name is in any table, as the newer iptables makes them.
pub(super) fn has_chain(is_it: impl Fn(&str) -> bool) -> bool {
    let chains = open().and_then(|mut kernel| kernel.dump(&nf::get_chains()));
    let name = |reply: &NetlinkReply| find(attributes(reply), nf::CHAIN_NAME).map(readable);
    chains.is_ok_and(|all| all.iter().filter_map(name).any(|name| is_it(&name)))
}

/// Compares what is there with what is wanted, down to the last value of each rule.
pub(super) fn verify(redirect: &RedirectConfig) -> io::Result<RedirectState> {
    let mut kernel = open()?;
    let Some(comment) = comment(&mut kernel)? else { return Ok(RedirectState::NotInstalled) };
    let mut differences = Vec::new();
    if !redirect.matches_comment(&comment) {
        differences.push(format!("its comment is {comment:?}, not {:?}", redirect.comment(1)));
    }
    let wanted = chains(redirect);
    let there = ours(kernel.dump(&nf::get_chains())?, nf::CHAIN_TABLE);
    differences.extend(compare_chains(&wanted, &there));
    let rules = ours(kernel.dump(&nf::get_rules(TABLE))?, nf::RULE_TABLE);
    differences.extend(wanted.iter().filter_map(|chain| compare_rules(chain, &rules)));
    Ok(RedirectState::of(differences))
}

fn compare_chains(wanted: &[RedirectChain], there: &[NetlinkReply]) -> Vec<String> {
    let chain_name = |reply: &NetlinkReply| find(attributes(reply), nf::CHAIN_NAME).map(readable);
    let missing = wanted.iter().filter(|chain| {
        let told = chain_attributes(chain.place);
        !there.iter().any(|reply| told.is_contained_in(attributes(reply)))
    });
    let missing =
        missing.map(|chain| format!("chain {} is not there, or elsewhere", name(chain.place)));
    let strange = there.iter().filter_map(chain_name);
    let strange =
        strange.filter(|there| !wanted.iter().any(|chain| name(chain.place) == there.as_str()));
    missing.chain(strange.map(|name| format!("chain {name} is too much"))).collect()
}

fn compare_rules(chain: &RedirectChain, there: &[NetlinkReply]) -> Option<String> {
    let name = name(chain.place);
    let bytes = [name.as_bytes(), &[0]].concat();
    let here: Vec<&NetlinkReply> = there
        .iter()
        .filter(|rule| find(attributes(rule), nf::RULE_CHAIN) == Some(&bytes))
        .collect();
    let wanted = rule_attributes(chain);
    let differs =
        wanted.iter().zip(&here).position(|(rule, told)| !rule.is_contained_in(attributes(told)));
    match differs {
        Some(position) => Some(format!("chain {name}: rule {} is another", position + 1)),
        None if wanted.len() != here.len() => {
            Some(format!("chain {name} has {} rules, not {}", here.len(), wanted.len()))
        }
        None => None,
    }
}

/// Those that tell of our table.
fn ours(replies: Vec<NetlinkReply>, table: u16) -> Vec<NetlinkReply> {
    const INET: u8 = 1;
    let bytes = [TABLE.as_bytes(), &[0]].concat();
    let is_ours = |reply: &NetlinkReply| {
        reply.body.first() == Some(&INET) && find(attributes(reply), table) == Some(&bytes)
    };
    replies.into_iter().filter(is_ours).collect()
}

fn attributes(reply: &NetlinkReply) -> &[u8] {
    reply.body.get(FIXED_BYTES..).unwrap_or_default()
}

/// Text of the kernel's, or whatever somebody put in its place.
fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|c| !c.is_control()).collect()
}

fn chain_attributes(place: RedirectHook) -> Attributes {
    // Why here, `nft::hook` says.
    const BEFORE_NAT: i32 = -101;
    const BEHIND_NAT: i32 = -99;
    const LAST: i32 = 0;
    let (kind, hook, priority) = match place {
        RedirectHook::Arriving => ("nat", HookPoint::Prerouting, BEFORE_NAT),
        RedirectHook::Leaving => ("nat", HookPoint::Output, BEFORE_NAT),
        RedirectHook::Answers | RedirectHook::ArrivingUdp => {
            ("filter", HookPoint::Prerouting, BEHIND_NAT)
        }
        RedirectHook::LeavingUdp => ("route", HookPoint::Output, BEHIND_NAT),
        RedirectHook::ArrivingStrict => ("filter", HookPoint::Input, LAST),
        RedirectHook::LeavingStrict => ("filter", HookPoint::Output, LAST),
    };
    nf::chain(TABLE, name(place), Hook { kind, point: hook, priority })
}

fn rule_attributes(chain: &RedirectChain) -> Vec<Attributes> {
    let told = |rule: &RedirectRule| nf::rule(TABLE, name(chain.place), expressions(rule));
    chain.rules.iter().map(told).collect()
}

fn expressions(rule: &RedirectRule) -> Vec<Expression> {
    let mut steps: Vec<Expression> = rule.matches.iter().flat_map(asked).collect();
    if rule.counted {
        steps.push(nf::counter());
    }
    match rule.action {
        RuleAction::Return => steps.push(nf::verdict(nf::PacketVerdict::Return)),
        RuleAction::RedirectConfig(port) => steps.extend(nf::redirect(port)),
        RuleAction::Mark(mark) => steps.extend([
            nf::load_meta(MetaKey::Mark),
            nf::mask(&(!MARK_MASK).to_ne_bytes(), &mark.to_ne_bytes()),
            nf::set_meta(MetaKey::Mark),
        ]),
        RuleAction::Drop => steps.push(nf::verdict(nf::PacketVerdict::Drop)),
        RuleAction::Tproxy(port) => {
            steps.extend(nf::tproxy(port));
            steps.push(nf::verdict(nf::PacketVerdict::Accept));
        }
    }
    steps
}

fn asked(asked: &RuleMatch) -> Vec<Expression> {
    let equal = |bytes: &[u8]| nf::compare(Comparison::Equal, bytes);
    let comparison = |is: bool| if is { Comparison::Equal } else { Comparison::NotEqual };
    match asked {
        RuleMatch::Mark(mark) => vec![
            nf::load_meta(MetaKey::Mark),
            nf::mask(&MARK_MASK.to_ne_bytes(), &[0; 4]),
            equal(&mark.to_ne_bytes()),
        ],
        RuleMatch::User(user) => vec![nf::load_meta(MetaKey::User), equal(&user.to_ne_bytes())],
        RuleMatch::FromInterface(name, is) => {
            vec![
                nf::load_meta(MetaKey::InputInterface),
                nf::compare(comparison(*is), &device(name)),
            ]
        }
        RuleMatch::ToInterface(name) => {
            vec![nf::load_meta(MetaKey::OutputInterface), equal(&device(name))]
        }
        RuleMatch::ToThisHost(is) => {
            const LOCAL: u32 = 2;
            let kind = nf::compare(comparison(*is), &LOCAL.to_ne_bytes());
            vec![nf::load_destination_type(), kind]
        }
        RuleMatch::To(range) => to(*range),
        RuleMatch::Over(transport) => protocol(transport.number()),
        RuleMatch::ForTransparentSocket => vec![
            nf::load_socket(nf::SocketKey::IsTransparent),
            equal(&[1]),
            nf::load_socket(nf::SocketKey::IsWildcard),
            equal(&[0]),
        ],
        RuleMatch::Reply => {
            vec![nf::load_conntrack_direction(), equal(&[nf::ConntrackDirection::Reply as u8])]
        }
        RuleMatch::Related => nf::match_related().to_vec(),
        RuleMatch::Icmpv6 { kind, hop_limit } => {
            const HOP_LIMIT: u32 = 7;
            const ICMPV6: u8 = 58;
            let mut steps = vec![
                nf::load_meta(MetaKey::Family),
                equal(&[IPV6]),
                nf::load_payload(PayloadBase::Network, HOP_LIMIT, 1),
                equal(&[*hop_limit]),
            ];
            steps.extend(protocol(ICMPV6));
            steps.extend([nf::load_payload(PayloadBase::Transport, 0, 1), equal(&[*kind])]);
            steps
        }
        RuleMatch::Port(transport, ports) => {
            let mut steps = protocol(transport.number());
            steps.push(nf::load_payload(PayloadBase::Transport, 2, 2));
            if ports.start() == ports.end() {
                steps.push(equal(&ports.start().to_be_bytes()));
            } else {
                steps.push(nf::compare(Comparison::GreaterOrEqual, &ports.start().to_be_bytes()));
                steps.push(nf::compare(Comparison::LessOrEqual, &ports.end().to_be_bytes()));
            }
            steps
        }
    }
}

/// A device's name as it is compared: with zeros behind it.
fn device(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    bytes
}

fn protocol(number: u8) -> Vec<Expression> {
    vec![nf::load_meta(MetaKey::Protocol), nf::compare(Comparison::Equal, &[number])]
}

fn to(range: Cidr) -> Vec<Expression> {
    let (family, offset, bytes) = match range.address() {
        IpAddr::V4(address) => (IPV4, 16, address.octets().to_vec()),
        IpAddr::V6(address) => (IPV6, 24, address.octets().to_vec()),
    };
    // As the nft command does: of a prefix of whole bytes only those are looked at; of any other the
    // whole address is, and masked.
    let prefix = usize::from(range.prefix_bits());
    let is_whole = prefix > 0 && prefix % 8 == 0;
    let looked_at = if is_whole { prefix / 8 } else { bytes.len() };
    let mut steps = vec![
        nf::load_meta(MetaKey::Family),
        nf::compare(Comparison::Equal, &[family]),
        nf::load_payload(
            PayloadBase::Network,
            offset,
            u32::try_from(looked_at).unwrap_or(u32::MAX),
        ),
    ];
    if !is_whole {
        steps.push(nf::mask(&prefix_mask(range.prefix_bits(), looked_at), &vec![0; looked_at]));
    }
    steps.push(nf::compare(Comparison::Equal, bytes.get(..looked_at).unwrap_or_default()));
    steps
}

fn prefix_mask(bits: u8, bytes: usize) -> Vec<u8> {
    let ones = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
    ones.to_be_bytes().into_iter().take(bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_becomes_a_mask() {
        let check = |bits, mask: &[u8]| assert_eq!(prefix_mask(bits, 4), mask, "{bits}");
        check(0, &[0, 0, 0, 0]);
        check(1, &[0x80, 0, 0, 0]);
        check(12, &[0xff, 0xf0, 0, 0]);
        check(16, &[0xff, 0xff, 0, 0]);
        check(31, &[0xff, 0xff, 0xff, 0xfe]);
        check(32, &[0xff, 0xff, 0xff, 0xff]);
    }
}
