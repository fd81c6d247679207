//! The expressions of a rule. An expression loads a value into a register, transforms or compares it, or sets
//! the verdict.

use super::wire::{RULE_EXPRESSIONS, parse_text};
use crate::netlink::{Attributes, attributes, find};

/// An expression of a rule. It may end the rule; registers pass values to later expressions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expression(pub(super) Attributes);

/// The register that most of our rules use: 16 bytes, which are also the first four word registers.
const REGISTER: u32 = 1;

/// The number of the register that starts at word `word` of four bytes, in the kernel's numbering: 16-byte
/// registers and 4-byte registers have separate numbers.
fn register(word: u32) -> u32 {
    const WIDE: u32 = 4;
    const FIRST_WORD: u32 = 8;
    if word.is_multiple_of(WIDE) { REGISTER + word / WIDE } else { FIRST_WORD + word }
}

/// The register that holds the verdict on the packet.
const VERDICT_REGISTER: u32 = 0;

/// Metadata of a packet (`NFT_META_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MetaKey {
    Mark = 3,
    InputInterface = 6,
    OutputInterface = 7,
    User = 10,
    Family = 15,
    Protocol = 16,
}

/// The packet header that an offset counts from (`NFT_PAYLOAD_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PayloadBase {
    Network = 1,
    Transport = 2,
}

/// How a register is compared with a value (`NFT_CMP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    Equal = 0,
    NotEqual = 1,
    LessOrEqual = 3,
    GreaterOrEqual = 5,
}

/// The verdict on a packet.
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

/// Loads metadata of the packet.
pub(crate) fn load_meta(key: MetaKey) -> Expression {
    load_meta_at(0, key)
}

/// Loads metadata of the packet into a register that starts at word `word`.
pub(crate) fn load_meta_at(word: u32, key: MetaKey) -> Expression {
    expression("meta", Attributes::new().big_endian(1, register(word)).big_endian(2, key as u32))
}

/// Sets metadata of the packet to the loaded value.
pub(crate) fn set_meta(key: MetaKey) -> Expression {
    expression("meta", Attributes::new().big_endian(2, key as u32).big_endian(3, REGISTER))
}

/// Loads bytes of a packet header.
pub(crate) fn load_payload(part: PayloadBase, offset: u32, bytes: u32) -> Expression {
    load_payload_at(0, part, offset, bytes)
}

/// Loads bytes of a packet header into a register that starts at word `word`, padded with zeros to whole
/// words.
pub(crate) fn load_payload_at(word: u32, part: PayloadBase, offset: u32, bytes: u32) -> Expression {
    let data = Attributes::new()
        .big_endian(1, register(word))
        .big_endian(2, part as u32)
        .big_endian(3, offset)
        .big_endian(4, bytes);
    expression("payload", data)
}

/// Loads the type of the destination address (`RTN_*`).
pub(crate) fn load_destination_type() -> Expression {
    const RESULT_KIND: u32 = 3;
    const OF_DESTINATION: u32 = 2;
    let data = Attributes::new()
        .big_endian(1, REGISTER)
        .big_endian(2, RESULT_KIND)
        .big_endian(3, OF_DESTINATION);
    expression("fib", data)
}

/// Keeps the bits of `mask` in the loaded value, then sets the bits of `set`. Both are as long as the loaded
/// value.
pub(crate) fn mask(mask: &[u8], set: &[u8]) -> Expression {
    let data = Attributes::new()
        .big_endian(1, REGISTER)
        .big_endian(2, REGISTER)
        .big_endian(3, u32::try_from(mask.len()).unwrap_or(u32::MAX))
        .nested(4, value(mask))
        .nested(5, value(set));
    expression("bitwise", data)
}

/// Ends the rule unless the loaded value compares as given.
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

/// Sets the verdict on the packet.
pub(crate) fn verdict(verdict: PacketVerdict) -> Expression {
    let code = Attributes::new().bytes(1, &(verdict as i32).to_be_bytes());
    let data = Attributes::new().nested(2, code);
    expression("immediate", Attributes::new().big_endian(1, VERDICT_REGISTER).nested(2, data))
}

/// Loads a port number.
fn load_port(port: u16) -> Expression {
    let data = value(&port.to_be_bytes());
    expression("immediate", Attributes::new().big_endian(1, REGISTER).nested(2, data))
}

/// Redirects the connection to a port of this host.
pub(crate) fn redirect(port: u16) -> [Expression; 2] {
    [load_port(port), expression("redir", Attributes::new().big_endian(1, REGISTER))]
}

/// Hands the packet to the socket at a port of this host, with its destination unchanged (TPROXY).
pub(crate) fn tproxy(port: u16) -> [Expression; 2] {
    const EITHER_FAMILY: u32 = 0;
    let data = Attributes::new().big_endian(1, EITHER_FAMILY).big_endian(3, REGISTER);
    [load_port(port), expression("tproxy", data)]
}

/// Ends the rule unless the value that starts at the first word is in a set.
pub(crate) fn lookup_set(set: &str) -> Expression {
    expression("lookup", Attributes::new().text(1, set).big_endian(2, REGISTER))
}

/// Sets the verdict that the map has for the loaded value; continues when the map has none.
pub(crate) fn lookup_verdict(map: &str) -> Expression {
    let data =
        Attributes::new().text(1, map).big_endian(2, REGISTER).big_endian(3, VERDICT_REGISTER);
    expression("lookup", data)
}

/// Replaces the value that starts at the first word by the map's value for it; ends the rule when the map has
/// none.
pub(crate) fn lookup_map(map: &str) -> Expression {
    expression(
        "lookup",
        Attributes::new().text(1, map).big_endian(2, REGISTER).big_endian(3, REGISTER),
    )
}

/// Replaces `bytes` bytes, from the first word on, by their hash (`jhash`), scaled to be below `size`.
pub(crate) fn hash(bytes: u32, size: u32, seed: u32) -> Expression {
    let data = Attributes::new()
        .big_endian(1, REGISTER)
        .big_endian(2, REGISTER)
        .big_endian(3, bytes)
        .big_endian(4, size)
        .big_endian(5, seed);
    expression("hash", data)
}

/// Translates the destination of the connection to the loaded address, at the first word, and port, at
/// `port_word`. `family` is `AF_INET` or `AF_INET6`.
pub(crate) fn dnat(family: u32, port_word: u32) -> Expression {
    const DESTINATION: u32 = 1;
    let data = Attributes::new()
        .big_endian(1, DESTINATION)
        .big_endian(2, family)
        .big_endian(3, REGISTER)
        .big_endian(5, register(port_word));
    expression("nat", data)
}

/// Translates the source of the connection to an address of this host.
pub(crate) fn masquerade() -> Expression {
    expression("masq", Attributes::new())
}

/// Fields of the conntrack entry of a packet (`NFT_CT_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConntrackKey {
    SourcePort = 11,
    DestinationPort = 12,
    SourceIpv4 = 19,
    DestinationIpv4 = 20,
    SourceIpv6 = 21,
    DestinationIpv6 = 22,
}

/// The direction of a tuple within a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConntrackDirection {
    Original = 0,
    Reply = 1,
}

/// Loads a conntrack field into a register that starts at word `word`; ends the rule for packets without an
/// entry.
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

/// Ends the rule unless the packet is new, invalid or untracked, so it belongs to no connection that was
/// admitted.
pub(crate) fn match_unestablished() -> [Expression; 3] {
    const NEW_INVALID_OR_UNTRACKED: u32 = 8 | 1 | 64;
    match_state(NEW_INVALID_OR_UNTRACKED)
}

/// Ends the rule unless the packet is related to another connection, such as an ICMP error.
pub(crate) fn match_related() -> [Expression; 3] {
    const RELATED: u32 = 4;
    match_state(RELATED)
}

/// Ends the rule unless the conntrack state of the packet is one of `bits`.
fn match_state(bits: u32) -> [Expression; 3] {
    const STATE: u32 = 0;
    let load = Attributes::new().big_endian(1, REGISTER).big_endian(2, STATE);
    [
        expression("ct", load),
        mask(&bits.to_ne_bytes(), &[0; 4]),
        compare(Comparison::NotEqual, &[0; 4]),
    ]
}

/// Loads the [`ConntrackDirection`] of the packet, one byte.
pub(crate) fn load_conntrack_direction() -> Expression {
    const DIRECTION: u32 = 1;
    expression("ct", Attributes::new().big_endian(1, REGISTER).big_endian(2, DIRECTION))
}

/// Attributes of the socket that receives a packet (`NFT_SOCKET_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SocketKey {
    IsTransparent = 0,
    IsWildcard = 2,
}

/// Loads an attribute of the receiving socket, one byte; ends the rule when no socket of this host receives
/// the packet.
pub(crate) fn load_socket(key: SocketKey) -> Expression {
    let data = Attributes::new().big_endian(1, key as u32).big_endian(2, REGISTER);
    expression("socket", data)
}

/// Rejects a TCP packet with a reset.
pub(crate) fn reset() -> Expression {
    const TCP_RESET: u32 = 1;
    expression("reject", Attributes::new().big_endian(1, TCP_RESET).bytes(2, &[0]))
}

/// Counts the packet in the named counter.
pub(crate) fn count_in(counter: &str) -> Expression {
    const COUNTER: u32 = 1;
    expression("objref", Attributes::new().big_endian(1, COUNTER).text(2, counter))
}

/// The number of packets that a rule has dropped; `None` for a rule that drops nothing.
pub(crate) fn parse_dropped(rule: &[u8]) -> Option<u64> {
    const PACKETS: u16 = 2;
    let verdict = find(find(expressions_of_kind(rule, b"immediate\0").next()?, 2)?, 2)?;
    let drops = find(verdict, 1)? == (PacketVerdict::Drop as i32).to_be_bytes();
    let packets = find(expressions_of_kind(rule, b"counter\0").next().filter(|_| drops)?, PACKETS)?;
    packets.try_into().ok().map(u64::from_be_bytes)
}

/// The names of the sets that a rule uses.
pub(crate) fn parse_lookups(rule: &[u8]) -> impl Iterator<Item = String> {
    expressions_of_kind(rule, b"lookup\0").filter_map(|lookup| parse_text(find(lookup, 1)?))
}

/// The data of a rule's expressions of one kind.
fn expressions_of_kind<'a>(rule: &'a [u8], kind: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let steps = attributes(find(rule, RULE_EXPRESSIONS).unwrap_or_default());
    let of_kind = steps.filter(move |(_, step)| find(step, 1) == Some(kind));
    of_kind.filter_map(|(_, step)| find(step, 2))
}
