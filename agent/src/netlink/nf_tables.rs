//! The packet filter's messages and expressions (kernel `include/uapi/linux/netfilter/nf_tables.h`).
//! Names and numbers are the kernel's; this file says nothing of what our rules are.

use super::{APPEND, Attributes, CREATE, Message};

/// A table for both families of addresses.
const FAMILY_INET: u8 = 1;
/// The part of the kernel's netfilter that these messages go to.
const SUBSYSTEM: u16 = 10;

/// The group of all changes of tables, chains and rules.
pub(crate) const CHANGES: u32 = 1 << 6;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const GET_GENERATION: u16 = 16;

pub(crate) const TABLE_NAME: u16 = 1;
pub(crate) const TABLE_USERDATA: u16 = 6;
pub(crate) const CHAIN_TABLE: u16 = 1;
pub(crate) const CHAIN_NAME: u16 = 3;
pub(crate) const RULE_TABLE: u16 = 1;
pub(crate) const RULE_CHAIN: u16 = 2;
pub(crate) const RULE_EXPRESSIONS: u16 = 4;

/// The fixed part of these messages: family, version, and a number of the batch.
fn fixed(family: u8, resource: u16) -> Vec<u8> {
    let [high, low] = resource.to_be_bytes();
    vec![family, 0, high, low]
}

fn message(kind: u16, flags: u16, attributes: Attributes) -> Message {
    Message { kind: SUBSYSTEM << 8 | kind, flags, fixed: fixed(FAMILY_INET, 0), attributes }
}

/// Whether this is the message that ends a batch.
pub(super) fn is_end(message: &Message) -> bool {
    message.kind == BATCH_END
}

/// Messages that come into force together or not at all.
pub(crate) fn transaction(changes: Vec<Message>) -> Vec<Message> {
    let border = |kind| Message {
        kind,
        flags: 0,
        fixed: fixed(0, SUBSYSTEM),
        attributes: Attributes::new(),
    };
    [vec![border(BATCH_BEGIN)], changes, vec![border(BATCH_END)]].concat()
}

/// Makes a table unless it is there. The comment is kept as the `nft` command keeps it.
pub(crate) fn make_table(name: &str, comment: Option<&str>) -> Message {
    let mut attributes = Attributes::new().text(TABLE_NAME, name);
    if let Some(comment) = comment {
        attributes = attributes.bytes(TABLE_USERDATA, &comment_bytes(comment));
    }
    message(NEW_TABLE, CREATE, attributes)
}

/// A comment as the `nft` command writes it: kind, length, text.
pub(crate) fn comment_bytes(comment: &str) -> Vec<u8> {
    const COMMENT: u8 = 0;
    let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
    [&[COMMENT, length], comment.as_bytes(), &[0]].concat()
}

/// Removes a table with all that is in it.
pub(crate) fn delete_table(name: &str) -> Message {
    message(DELETE_TABLE, 0, Attributes::new().text(TABLE_NAME, name))
}

/// Asks for a table.
pub(crate) fn get_table(name: &str) -> Message {
    message(GET_TABLE, 0, Attributes::new().text(TABLE_NAME, name))
}

/// Asks for the chains of all tables, of every family.
pub(crate) fn get_chains() -> Message {
    Message { fixed: fixed(0, 0), ..message(GET_CHAIN, 0, Attributes::new()) }
}

/// Asks for the rules of a table.
pub(crate) fn get_rules(table: &str) -> Message {
    message(GET_RULE, 0, Attributes::new().text(RULE_TABLE, table))
}

/// Asks for the number of the last transaction, which every kernel with nf_tables knows.
pub(crate) fn get_generation() -> Message {
    message(GET_GENERATION, 0, Attributes::new())
}

/// Where a chain is called from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    /// `nat`, `filter` or `route`.
    pub(crate) kind: &'static str,
    pub(crate) place: HookPlace,
    pub(crate) priority: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HookPlace {
    Prerouting = 0,
    Output = 3,
}

/// What tells a chain from others.
pub(crate) fn chain(table: &str, name: &str, hook: Hook) -> Attributes {
    const HOOK: u16 = 4;
    const KIND: u16 = 7;
    let hooked =
        Attributes::new().big_endian(1, hook.place as u32).bytes(2, &hook.priority.to_be_bytes());
    Attributes::new()
        .text(CHAIN_TABLE, table)
        .text(CHAIN_NAME, name)
        .nested(HOOK, hooked)
        .text(KIND, hook.kind)
}

/// Makes a chain.
pub(crate) fn make_chain(chain: Attributes) -> Message {
    message(NEW_CHAIN, CREATE, chain)
}

/// What tells a rule from others.
pub(crate) fn rule(table: &str, chain: &str, expressions: Vec<Expression>) -> Attributes {
    const ELEMENT: u16 = 1;
    let list = expressions
        .into_iter()
        .fold(Attributes::new(), |list, Expression(expression)| list.nested(ELEMENT, expression));
    Attributes::new().text(RULE_TABLE, table).text(RULE_CHAIN, chain).nested(RULE_EXPRESSIONS, list)
}

/// Puts a rule behind the others of its chain.
pub(crate) fn append_rule(rule: Attributes) -> Message {
    message(NEW_RULE, CREATE | APPEND, rule)
}

/// A step of a rule. Each may break off the rule; the registers hold what steps hand on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expression(Attributes);

/// The register that our rules use: 16 bytes.
const REGISTER: u32 = 1;
/// The register that decides about the packet.
const VERDICT_REGISTER: u32 = 0;

/// What of a packet's surroundings can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meta {
    Mark = 3,
    InterfaceName = 6,
    User = 10,
    Family = 15,
    Protocol = 16,
}

/// Where in a packet a field is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Network = 1,
    Transport = 2,
}

/// How a register is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    Equal = 0,
    Different = 1,
    AtMost = 3,
    AtLeast = 5,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept = 1,
    Return = -5,
}

fn expression(name: &str, data: Attributes) -> Expression {
    Expression(Attributes::new().text(1, name).nested(2, data))
}

fn value(bytes: &[u8]) -> Attributes {
    Attributes::new().bytes(1, bytes)
}

/// Loads what surrounds the packet.
pub(crate) fn load_meta(key: Meta) -> Expression {
    expression("meta", Attributes::new().big_endian(1, REGISTER).big_endian(2, key as u32))
}

/// Sets what surrounds the packet to what was loaded.
pub(crate) fn set_meta(key: Meta) -> Expression {
    expression("meta", Attributes::new().big_endian(2, key as u32).big_endian(3, REGISTER))
}

/// Loads a field of the packet.
pub(crate) fn load_payload(part: Part, offset: u32, bytes: u32) -> Expression {
    let data = Attributes::new()
        .big_endian(1, REGISTER)
        .big_endian(2, part as u32)
        .big_endian(3, offset)
        .big_endian(4, bytes);
    expression("payload", data)
}

/// Loads what kind of address the packet's destination is (`RTN_*`).
pub(crate) fn load_destination_kind() -> Expression {
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
pub(crate) fn decide(verdict: Verdict) -> Expression {
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
pub(crate) fn hand_to(port: u16) -> [Expression; 2] {
    const EITHER_FAMILY: u32 = 0;
    let data = Attributes::new().big_endian(1, EITHER_FAMILY).big_endian(3, REGISTER);
    [load_port(port), expression("tproxy", data)]
}
