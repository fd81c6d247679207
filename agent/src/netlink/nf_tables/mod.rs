//! Messages and expressions of the packet filter (kernel `include/uapi/linux/netfilter/nf_tables.h`), with
//! the kernel's names and numbers. The rules themselves are defined elsewhere.

mod expression;
mod set;
mod wire;

use super::message::BATCH_END;
use super::{APPEND, Attributes, CREATE, NetlinkMessage, find};
use wire::{RULE_EXPRESSIONS, SUBSYSTEM, fixed, message};

pub(crate) use expression::*;
pub(crate) use set::*;
pub(crate) use wire::parse_text;

/// The multicast group for changes of tables, chains, rules and sets.
pub(crate) const CHANGES: u32 = 1 << 6;

const BATCH_BEGIN: u16 = 0x10;

const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DELETE_RULE: u16 = 8;
const GET_GENERATION: u16 = 16;
const NEW_OBJECT: u16 = 18;
const GET_OBJECT: u16 = 19;
const DELETE_OBJECT: u16 = 20;

pub(crate) const TABLE_NAME: u16 = 1;
pub(crate) const TABLE_USERDATA: u16 = 6;
pub(crate) const CHAIN_TABLE: u16 = 1;
pub(crate) const CHAIN_NAME: u16 = 3;
pub(crate) const RULE_TABLE: u16 = 1;
pub(crate) const RULE_CHAIN: u16 = 2;

/// Wraps messages so that they apply atomically.
pub(crate) fn transaction(changes: Vec<NetlinkMessage>) -> Vec<NetlinkMessage> {
    let border = |kind| NetlinkMessage {
        kind,
        flags: 0,
        fixed: fixed(0, SUBSYSTEM),
        attributes: Attributes::new(),
    };
    let border = |kind| std::iter::once(border(kind));
    border(BATCH_BEGIN).chain(changes).chain(border(BATCH_END)).collect()
}

/// Creates a table unless it exists. The comment is encoded as the `nft` command does.
pub(crate) fn make_table(name: &str, comment: Option<&str>) -> NetlinkMessage {
    let mut attributes = Attributes::new().text(TABLE_NAME, name);
    if let Some(comment) = comment {
        attributes = attributes.bytes(TABLE_USERDATA, &comment_bytes(comment));
    }
    message(NEW_TABLE, CREATE, attributes)
}

/// A comment in the encoding of the `nft` command: kind, length, text.
pub(crate) fn comment_bytes(comment: &str) -> Vec<u8> {
    const COMMENT: u8 = 0;
    let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
    [&[COMMENT, length], comment.as_bytes(), &[0]].concat()
}

/// Decodes a comment.
pub(crate) fn parse_comment(bytes: &[u8]) -> Option<String> {
    parse_text(bytes.get(2..)?)
}

/// Deletes a table with its contents.
pub(crate) fn delete_table(name: &str) -> NetlinkMessage {
    message(DELETE_TABLE, 0, Attributes::new().text(TABLE_NAME, name))
}

/// Requests a table.
pub(crate) fn get_table(name: &str) -> NetlinkMessage {
    message(GET_TABLE, 0, Attributes::new().text(TABLE_NAME, name))
}

/// Requests the chains of all tables, of every family.
pub(crate) fn get_chains() -> NetlinkMessage {
    NetlinkMessage { fixed: fixed(0, 0), ..message(GET_CHAIN, 0, Attributes::new()) }
}

/// Requests the rules of a table.
pub(crate) fn get_rules(table: &str) -> NetlinkMessage {
    message(GET_RULE, 0, Attributes::new().text(RULE_TABLE, table))
}

/// Requests the number of the last transaction, which every kernel with nf_tables supports.
pub(crate) fn get_generation() -> NetlinkMessage {
    message(GET_GENERATION, 0, Attributes::new())
}

/// Where the kernel calls a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hook {
    /// `nat`, `filter` or `route`.
    pub(crate) kind: &'static str,
    pub(crate) point: HookPoint,
    pub(crate) priority: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HookPoint {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// The attributes of a base chain.
pub(crate) fn chain(table: &str, name: &str, hook: Hook) -> Attributes {
    const HOOK: u16 = 4;
    const KIND: u16 = 7;
    let hooked =
        Attributes::new().big_endian(1, hook.point as u32).bytes(2, &hook.priority.to_be_bytes());
    chain_named(table, name).nested(HOOK, hooked).text(KIND, hook.kind)
}

/// The attributes of a regular chain, which only rules call; and, for any chain, its name.
pub(crate) fn chain_named(table: &str, name: &str) -> Attributes {
    Attributes::new().text(CHAIN_TABLE, table).text(CHAIN_NAME, name)
}

/// Deletes a chain with its rules. No rule may refer to it.
pub(crate) fn delete_chain(table: &str, name: &str) -> NetlinkMessage {
    message(DELETE_CHAIN, 0, chain_named(table, name))
}

/// Deletes the rules of a chain.
pub(crate) fn flush_chain(table: &str, name: &str) -> NetlinkMessage {
    let attributes = Attributes::new().text(RULE_TABLE, table).text(RULE_CHAIN, name);
    message(DELETE_RULE, 0, attributes)
}

/// Creates a chain.
pub(crate) fn make_chain(chain: Attributes) -> NetlinkMessage {
    message(NEW_CHAIN, CREATE, chain)
}

/// The attributes of a rule.
pub(crate) fn rule(table: &str, chain: &str, expressions: Vec<Expression>) -> Attributes {
    const ELEMENT: u16 = 1;
    let list = expressions
        .into_iter()
        .fold(Attributes::new(), |list, Expression(expression)| list.nested(ELEMENT, expression));
    Attributes::new().text(RULE_TABLE, table).text(RULE_CHAIN, chain).nested(RULE_EXPRESSIONS, list)
}

/// Appends a rule to its chain.
pub(crate) fn append_rule(rule: Attributes) -> NetlinkMessage {
    message(NEW_RULE, CREATE | APPEND, rule)
}

/// The object type of a counter.
const COUNTER: u32 = 1;

fn counter_named(table: &str, name: &str) -> Attributes {
    Attributes::new().text(1, table).text(2, name).big_endian(3, COUNTER)
}

/// Creates a named counter, which outlives the rules that use it, unless it exists.
pub(crate) fn make_counter(table: &str, name: &str) -> NetlinkMessage {
    message(NEW_OBJECT, CREATE, counter_named(table, name).nested(4, Attributes::new()))
}

/// Deletes a counter. No rule may use it.
pub(crate) fn delete_counter(table: &str, name: &str) -> NetlinkMessage {
    message(DELETE_OBJECT, 0, counter_named(table, name))
}

/// Requests the counters of a table.
pub(crate) fn get_counters(table: &str) -> NetlinkMessage {
    message(GET_OBJECT, 0, Attributes::new().text(1, table).big_endian(3, COUNTER))
}

/// Decodes the name and packet count of a counter.
pub(crate) fn parse_counter(attributes: &[u8]) -> Option<(String, u64)> {
    let packets = find(find(attributes, 4)?, 2)?;
    Some((parse_text(find(attributes, 2)?)?, u64::from_be_bytes(*packets.first_chunk()?)))
}
