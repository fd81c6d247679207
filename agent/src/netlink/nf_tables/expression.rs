//! The steps of rules. A step loads into a register, works on one, compares it, or decides.

use crate::netlink::{Attributes, attributes, find};

/// A step of a rule. Each may break off the rule; the registers hold what steps hand on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expression(pub(super) Attributes);

/// The register that most of our rules use: 16 bytes, which are the first four words.
const REGISTER: u32 = 1;

/// The number of the register that begins at a word of four bytes, as the kernel tells it: the wide
/// registers have numbers of their own.
fn register(word: u32) -> u32 {
    const WIDE: u32 = 4;
    const FIRST_WORD: u32 = 8;
    if word.is_multiple_of(WIDE) { REGISTER + word / WIDE } else { FIRST_WORD + word }
}

/// The register that decides about the packet.
const VERDICT_REGISTER: u32 = 0;

/// What of a packet's surroundings can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MetaKey {
    Mark = 3,
    InputInterface = 6,
    OutputInterface = 7,
    User = 10,
    Family = 15,
    Protocol = 16,
}

/// Where in a packet a field is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PayloadBase {
    Network = 1,
    Transport = 2,
}

/// How a register is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    Equal = 0,
    NotEqual = 1,
    LessOrEqual = 3,
    GreaterOrEqual = 5,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PacketVerdict {
    Drop = 0,
    Accept = 1,
    Goto = -4,
    Return = -5,
}

fn expression(name: &str, data: Attributes) -> Expression {
    Expression(Attributes::new().text(1, name).nested(2, data))
}

fn value(bytes: &[u8]) -> Attributes {
    Attributes::new().bytes(1, bytes)
}

/// Loads what surrounds the packet.
pub(crate) fn load_meta(key: MetaKey) -> Expression {
    load_meta_at(0, key)
}

/// Loads what surrounds the packet, at a word.
pub(crate) fn load_meta_at(word: u32, key: MetaKey) -> Expression {
    expression("meta", Attributes::new().big_endian(1, register(word)).big_endian(2, key as u32))
}

/// Sets what surrounds the packet to what was loaded.
pub(crate) fn set_meta(key: MetaKey) -> Expression {
    expression("meta", Attributes::new().big_endian(2, key as u32).big_endian(3, REGISTER))
}

/// Loads a field of the packet.
pub(crate) fn load_payload(part: PayloadBase, offset: u32, bytes: u32) -> Expression {
    load_payload_at(0, part, offset, bytes)
}

/// Loads a field of the packet, at a word; the last word is filled up with zeros.
pub(crate) fn load_payload_at(word: u32, part: PayloadBase, offset: u32, bytes: u32) -> Expression {
    let data = Attributes::new()
        .big_endian(1, register(word))
        .big_endian(2, part as u32)
        .big_endian(3, offset)
        .big_endian(4, bytes);
    expression("payload", data)
}

/// Loads what kind of address the packet's destination is (`RTN_*`).
pub(crate) fn load_destination_type() -> Expression {
    const RESULT_KIND: u32 = 3;
    const OF_DESTINATION: u32 = 2;
    let data = Attributes::new()
        .big_endian(1, REGISTER)
        .big_endian(2, RESULT_KIND)
        .big_endian(3, OF_DESTINATION);
    expression("fib", data)
}

/// Keeps the bits of `mask` of what was loaded, then sets those of `set`. Both are as long as what
/// was loaded.
pub(crate) fn mask(mask: &[u8], set: &[u8]) -> Expression {
    let data = Attributes::new()
        .big_endian(1, REGISTER)
        .big_endian(2, REGISTER)
        .big_endian(3, u32::try_from(mask.len()).unwrap_or(u32::MAX))
        .nested(4, value(mask))
        .nested(5, value(set));
    expression("bitwise", data)
}

/// Goes on only when what was loaded compares so.
pub(crate) fn compare(comparison: Comparison, with: &[u8]) -> Expression {
    let data = Attributes::new()
        .big_endian(1, REGISTER)
        .big_endian(2, comparison as u32)
        .nested(3, value(with));
    expression("cmp", data)
}

/// Counts the packet.
pub(crate) fn counter() -> Expression {
    expression("counter", Attributes::new())
}

/// Decides about the packet.
pub(crate) fn verdict(verdict: PacketVerdict) -> Expression {
    let code = Attributes::new().bytes(1, &(verdict as i32).to_be_bytes());
    let data = Attributes::new().nested(2, code);
    expression("immediate", Attributes::new().big_endian(1, VERDICT_REGISTER).nested(2, data))
}

/// Loads a port.
fn load_port(port: u16) -> Expression {
    let data = value(&port.to_be_bytes());
    expression("immediate", Attributes::new().big_endian(1, REGISTER).nested(2, data))
}

/// Makes a port of this host the connection's destination.
pub(crate) fn redirect(port: u16) -> [Expression; 2] {
    [load_port(port), expression("redir", Attributes::new().big_endian(1, REGISTER))]
}

/// Hands the packet to the socket at a port of this host.
pub(crate) fn tproxy(port: u16) -> [Expression; 2] {
    const EITHER_FAMILY: u32 = 0;
    let data = Attributes::new().big_endian(1, EITHER_FAMILY).big_endian(3, REGISTER);
    [load_port(port), expression("tproxy", data)]
}

/// Goes on only when what was loaded, from the first word on, is in a set.
pub(crate) fn lookup_set(set: &str) -> Expression {
    expression("lookup", Attributes::new().text(1, set).big_endian(2, REGISTER))
}

/// Decides as the map holds for what was loaded; goes on when it holds nothing for it.
pub(crate) fn lookup_verdict(map: &str) -> Expression {
    let data =
        Attributes::new().text(1, map).big_endian(2, REGISTER).big_endian(3, VERDICT_REGISTER);
    expression("lookup", data)
}

/// Replaces what was loaded, from the first word on, by what the map holds for it; goes on only when
/// it holds something.
pub(crate) fn lookup_map(map: &str) -> Expression {
    expression(
        "lookup",
        Attributes::new().text(1, map).big_endian(2, REGISTER).big_endian(3, REGISTER),
    )
}

/// Replaces so many bytes, from the first word on, by their hash (`jhash`), scaled to be below `size`.
pub(crate) fn hash(bytes: u32, size: u32, seed: u32) -> Expression {
    let data = Attributes::new()
        .big_endian(1, REGISTER)
        .big_endian(2, REGISTER)
        .big_endian(3, bytes)
        .big_endian(4, size)
        .big_endian(5, seed);
    expression("hash", data)
}

/// Makes what was loaded, an address at the first word and a port at `port_word`, the connection's
/// destination. `family` is `AF_INET` or `AF_INET6`.
pub(crate) fn dnat(family: u32, port_word: u32) -> Expression {
    const DESTINATION: u32 = 1;
    let data = Attributes::new()
        .big_endian(1, DESTINATION)
        .big_endian(2, family)
        .big_endian(3, REGISTER)
        .big_endian(5, register(port_word));
    expression("nat", data)
}

/// Makes an address of this host the connection's source.
pub(crate) fn masquerade() -> Expression {
    expression("masq", Attributes::new())
}

/// What of a packet's connection can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConntrackKey {
    SourcePort = 11,
    DestinationPort = 12,
    SourceIpv4 = 19,
    DestinationIpv4 = 20,
    SourceIpv6 = 21,
    DestinationIpv6 = 22,
}

/// Whose packets are asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConntrackDirection {
    Original = 0,
    Reply = 1,
}

/// Loads what the packet's connection has, at a word; breaks off when it has no connection.
pub(crate) fn load_conntrack_at(
    word: u32,
    key: ConntrackKey,
    side: ConntrackDirection,
) -> Expression {
    let data = Attributes::new()
        .big_endian(1, register(word))
        .big_endian(2, key as u32)
        .bytes(3, &[side as u8]);
    expression("ct", data)
}

/// Goes on only with packets that belong to no connection that was let in: the first of a new one, and
/// those that nobody can assign.
pub(crate) fn match_unestablished() -> [Expression; 3] {
    const NEW_INVALID_OR_UNTRACKED: u32 = 8 | 1 | 64;
    match_state(NEW_INVALID_OR_UNTRACKED)
}

/// Goes on only with packets that tell of another connection, such as errors of ICMP.
pub(crate) fn match_related() -> [Expression; 3] {
    const RELATED: u32 = 4;
    match_state(RELATED)
}

/// Goes on only with packets whose connection is in one of the states of `bits`.
fn match_state(bits: u32) -> [Expression; 3] {
    const STATE: u32 = 0;
    let load = Attributes::new().big_endian(1, REGISTER).big_endian(2, STATE);
    [
        expression("ct", load),
        mask(&bits.to_ne_bytes(), &[0; 4]),
        compare(Comparison::NotEqual, &[0; 4]),
    ]
}

/// Loads on which [`ConntrackDirection`] of its connection the packet is, a byte.
pub(crate) fn load_conntrack_direction() -> Expression {
    const DIRECTION: u32 = 1;
    expression("ct", Attributes::new().big_endian(1, REGISTER).big_endian(2, DIRECTION))
}

/// What of the socket that a packet is for can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SocketKey {
    IsTransparent = 0,
    IsWildcard = 2,
}

/// Loads what the packet's socket has, a byte; breaks off when no socket of this host is for it.
pub(crate) fn load_socket(key: SocketKey) -> Expression {
    let data = Attributes::new().big_endian(1, key as u32).big_endian(2, REGISTER);
    expression("socket", data)
}

/// Refuses a TCP packet with a reset.
pub(crate) fn reset() -> Expression {
    const TCP_RESET: u32 = 1;
    expression("reject", Attributes::new().big_endian(1, TCP_RESET).bytes(2, &[0]))
}

/// Counts the packet by the named counter.
pub(crate) fn count_in(counter: &str) -> Expression {
    const COUNTER: u32 = 1;
    expression("objref", Attributes::new().big_endian(1, COUNTER).text(2, counter))
}

/// How many packets a rule has dropped, as the kernel tells the rule; none of one that drops nothing.
pub(crate) fn parse_dropped(rule: &[u8]) -> Option<u64> {
    const PACKETS: u16 = 2;
    let verdict = find(find(expressions_of_kind(rule, b"immediate\0").next()?, 2)?, 2)?;
    let drops = find(verdict, 1)? == (PacketVerdict::Drop as i32).to_be_bytes();
    let packets = find(expressions_of_kind(rule, b"counter\0").next().filter(|_| drops)?, PACKETS)?;
    packets.try_into().ok().map(u64::from_be_bytes)
}

/// The names of the sets that a rule looks into, as the kernel tells the rule.
pub(crate) fn parse_lookups(rule: &[u8]) -> impl Iterator<Item = String> {
    expressions_of_kind(rule, b"lookup\0").filter_map(|lookup| super::parse_text(find(lookup, 1)?))
}

/// What the kernel tells of a rule's steps of one kind.
fn expressions_of_kind<'a>(rule: &'a [u8], kind: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let steps = attributes(find(rule, super::RULE_EXPRESSIONS).unwrap_or_default());
    let of_kind = steps.filter(move |(_, step)| find(step, 1) == Some(kind));
    of_kind.filter_map(|(_, step)| find(step, 2))
}
