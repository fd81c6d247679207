//! Installs the rules in the kernel directly, without a tool: one table for both address families, replaced in one
//! transaction. The table equals the one that [`nft`](super::nft) renders.

use std::io;
use std::net::IpAddr;

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;
use weft_model::Cidr;

use super::comment::generation;
use super::config::{MARK_MASK, RedirectConfig};
use super::nft::{TABLE, name};
use super::rules::{RedirectChain, RedirectHook, RedirectRule, RuleAction, RuleMatch, chains};
use super::types::RedirectState;
use crate::netlink::nf_tables::{
    self as nf, Comparison, Expression, Hook, HookPoint, MetaKey, PayloadBase,
};
use crate::netlink::{Attributes, Netlink, NetlinkReply, find};

/// The address families, as `meta nfproto` reports them.
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// The length of the fixed part before the attributes.
const FIXED_BYTES: usize = 4;

/// Checks that the kernel has nf_tables and that this process may use it.
pub(super) fn probe() -> io::Result<()> {
    open()?.get(&nf::get_generation()).map(drop)
}

fn open() -> io::Result<Netlink> {
    Netlink::open(SockProtocol::NetlinkNetFilter)
}

/// Installs the desired table, replacing an existing one.
pub(super) fn apply(redirect: &RedirectConfig, generation: u64) -> io::Result<()> {
    // Creating, deleting and creating the table replaces it, whether or not it exists.
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

/// The generation of the installed table; 0 when there is none.
pub(super) fn installed_generation() -> io::Result<u64> {
    Ok(comment(&mut open()?)?.map_or(0, |comment| generation(&comment)))
}

/// The comment of the installed table, empty when it has none; `None` when the table does not exist.
fn comment(kernel: &mut Netlink) -> io::Result<Option<String>> {
    let table = match kernel.get(&nf::get_table(TABLE)) {
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(None),
        found => found?,
    };
    let found = table.first().and_then(|table| find(attributes(table), nf::TABLE_USERDATA));
    Ok(Some(found.and_then(nf::parse_comment).unwrap_or_default()))
}

/// Deletes the table, if it exists.
pub(super) fn remove() -> io::Result<()> {
    let changes = vec![nf::make_table(TABLE, None), nf::delete_table(TABLE)];
    open()?.batch(&nf::transaction(changes))
}

/// The number of packets that the rules have dropped since they were installed.
pub(super) fn dropped_packets() -> io::Result<u64> {
    let rules = ours(open()?.dump(&nf::get_rules(TABLE))?, nf::RULE_TABLE);
    Ok(rules.iter().filter_map(|rule| nf::parse_dropped(attributes(rule))).sum())
}

/// Whether any table has a chain with such a name, as the nf_tables variant of iptables creates them.
pub(super) fn has_chain(is_it: impl Fn(&str) -> bool) -> bool {
    let chains = open().and_then(|mut kernel| kernel.dump(&nf::get_chains()));
    let name = |reply: &NetlinkReply| find(attributes(reply), nf::CHAIN_NAME).map(readable);
    chains.is_ok_and(|all| all.iter().filter_map(name).any(|name| is_it(&name)))
}

/// Compares the installed rules with the desired ones, in every value.
pub(super) fn verify(redirect: &RedirectConfig) -> io::Result<RedirectState> {
    let mut kernel = open()?;
    let Some(comment) = comment(&mut kernel)? else { return Ok(RedirectState::NotInstalled) };
    let mut differences = Vec::new();
    if !redirect.matches_comment(&comment) {
        differences
            .push(format!("table comment is {comment:?}, expected {:?}", redirect.comment(1)));
    }
    let desired = chains(redirect);
    let installed = ours(kernel.dump(&nf::get_chains())?, nf::CHAIN_TABLE);
    differences.extend(compare_chains(&desired, &installed));
    let rules = ours(kernel.dump(&nf::get_rules(TABLE))?, nf::RULE_TABLE);
    differences.extend(desired.iter().filter_map(|chain| compare_rules(chain, &rules)));
    Ok(RedirectState::of(differences))
}

fn compare_chains(desired: &[RedirectChain], installed: &[NetlinkReply]) -> Vec<String> {
    let chain_name = |reply: &NetlinkReply| find(attributes(reply), nf::CHAIN_NAME).map(readable);
    let missing = desired.iter().filter(|chain| {
        let found = chain_attributes(chain.place);
        !installed.iter().any(|reply| found.is_contained_in(attributes(reply)))
    });
    let missing =
        missing.map(|chain| format!("chain {}: missing, or hooked elsewhere", name(chain.place)));
    let unexpected = installed.iter().filter_map(chain_name);
    let unexpected = unexpected
        .filter(|installed| !desired.iter().any(|chain| name(chain.place) == installed.as_str()));
    missing.chain(unexpected.map(|name| format!("chain {name}: unexpected"))).collect()
}

fn compare_rules(chain: &RedirectChain, installed: &[NetlinkReply]) -> Option<String> {
    let name = name(chain.place);
    let bytes = [name.as_bytes(), &[0]].concat();
    let installed_rules: Vec<&NetlinkReply> = installed
        .iter()
        .filter(|rule| find(attributes(rule), nf::RULE_CHAIN) == Some(&bytes))
        .collect();
    let desired = rule_attributes(chain);
    let differs = desired
        .iter()
        .zip(&installed_rules)
        .position(|(rule, found)| !rule.is_contained_in(attributes(found)));
    match differs {
        Some(position) => Some(format!("chain {name}: rule {} differs", position + 1)),
        None if desired.len() != installed_rules.len() => Some(format!(
            "chain {name}: {} rules, expected {}",
            installed_rules.len(),
            desired.len()
        )),
        None => None,
    }
}

/// Selects the messages that describe our table.
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

/// A name from the kernel, without control characters, which another program may have put there.
fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|c| !c.is_control()).collect()
}

fn chain_attributes(place: RedirectHook) -> Attributes {
    // `nft::hook` has the reasons for these priorities.
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
    let found = |rule: &RedirectRule| nf::rule(TABLE, name(chain.place), expressions(rule));
    chain.rules.iter().map(found).collect()
}

fn expressions(rule: &RedirectRule) -> Vec<Expression> {
    let mut steps: Vec<Expression> = rule.matches.iter().flat_map(condition_expressions).collect();
    if rule.counted {
        steps.push(nf::counter());
    }
    match rule.action {
        RuleAction::Return => steps.push(nf::verdict(nf::PacketVerdict::Return)),
        RuleAction::Redirect(port) => steps.extend(nf::redirect(port)),
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

fn condition_expressions(condition: &RuleMatch) -> Vec<Expression> {
    let equal = |bytes: &[u8]| nf::compare(Comparison::Equal, bytes);
    let comparison = |is: bool| if is { Comparison::Equal } else { Comparison::NotEqual };
    match condition {
        RuleMatch::Mark(mark) => vec![
            nf::load_meta(MetaKey::Mark),
            nf::mask(&MARK_MASK.to_ne_bytes(), &[0; 4]),
            equal(&mark.to_ne_bytes()),
        ],
        RuleMatch::User(user) => vec![nf::load_meta(MetaKey::User), equal(&user.to_ne_bytes())],
        RuleMatch::InputInterface(name, is) => {
            vec![
                nf::load_meta(MetaKey::InputInterface),
                nf::compare(comparison(*is), &device(name)),
            ]
        }
        RuleMatch::OutputInterface(name) => {
            vec![nf::load_meta(MetaKey::OutputInterface), equal(&device(name))]
        }
        RuleMatch::LocalDestination(is) => {
            const LOCAL: u32 = 2;
            let kind = nf::compare(comparison(*is), &LOCAL.to_ne_bytes());
            vec![nf::load_destination_type(), kind]
        }
        RuleMatch::Destination(range) => to(*range),
        RuleMatch::Protocol(transport) => protocol(transport.number()),
        RuleMatch::TransparentSocket => vec![
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

/// The name of a device as it is compared: padded with zeros.
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
    // As the nft command does: for a prefix of whole bytes it compares these bytes only, otherwise the whole
    // address under a mask.
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
    fn prefix_length_becomes_a_mask() {
        let check = |bits, mask: &[u8]| assert_eq!(prefix_mask(bits, 4), mask, "{bits}");
        check(0, &[0, 0, 0, 0]);
        check(1, &[0x80, 0, 0, 0]);
        check(12, &[0xff, 0xf0, 0, 0]);
        check(16, &[0xff, 0xff, 0, 0]);
        check(31, &[0xff, 0xff, 0xff, 0xfe]);
        check(32, &[0xff, 0xff, 0xff, 0xff]);
    }
}
