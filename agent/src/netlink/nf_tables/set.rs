//! Sets and maps: what a rule looks a packet's fields up in.

use super::{Attributes, CREATE, Message, Verdict, message};
use crate::netlink::Reply;
use crate::netlink::message::{ATTRIBUTE_HEADER_BYTES as HEADER_BYTES, NESTED, attribute_header};

const NEW_SET: u16 = 9;
const GET_SET: u16 = 10;
const DELETE_SET: u16 = 11;
const NEW_ELEMENTS: u16 = 12;
const GET_ELEMENTS: u16 = 13;
const DELETE_ELEMENTS: u16 = 14;

pub(crate) const SET_TABLE: u16 = 1;
pub(crate) const SET_NAME: u16 = 2;
const ELEMENTS_TABLE: u16 = 1;
const ELEMENTS_SET: u16 = 2;
/// The list of elements in a message that holds some.
pub(crate) const ELEMENTS: u16 = 3;

/// What the `nft` command calls the kinds of values (its `include/datatype.h`); the kernel only keeps
/// them, so that the command can list a set. A concatenation has six bits for each part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueKind {
    Number = 19,
    Ipv4 = 7,
    Ipv6 = 8,
    Protocol = 12,
    Port = 13,
}

fn concatenated(kinds: &[ValueKind]) -> u32 {
    kinds.iter().fold(0, |all, kind| all << 6 | *kind as u32)
}

/// A set, or a map when it holds something for its keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Set<'a> {
    pub(crate) name: &'a str,
    pub(crate) key: &'a [ValueKind],
    /// Of the whole key, each part filled up to four bytes.
    pub(crate) key_bytes: u32,
    pub(crate) holds: Holds<'a>,
    /// How many elements it will have, where that is known and does not change.
    pub(crate) size: Option<u32>,
}

/// What a set holds for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holds<'a> {
    /// Nothing: a key is in it or is not.
    Nothing,
    /// What becomes of the packet.
    Verdicts,
    /// A value of this kind and length.
    Values(&'a [ValueKind], u32),
}

/// Makes a set unless it is there.
pub(crate) fn make_set(table: &str, set: Set<'_>) -> Message {
    const IS_MAP: u32 = 8;
    const ANY_ID: u32 = 1;
    let flags = if set.holds == Holds::Nothing { 0 } else { IS_MAP };
    let mut attributes = set_named(table, set.name)
        .big_endian(3, flags)
        .big_endian(4, concatenated(set.key))
        .big_endian(5, set.key_bytes);
    match set.holds {
        Holds::Nothing => {}
        Holds::Verdicts => attributes = attributes.big_endian(6, 0xffff_ff00),
        Holds::Values(kinds, bytes) => {
            attributes = attributes.big_endian(6, concatenated(kinds)).big_endian(7, bytes);
        }
    }
    if let Some(size) = set.size {
        attributes = attributes.nested(9, Attributes::new().big_endian(1, size));
    }
    message(NEW_SET, CREATE, attributes.big_endian(10, ANY_ID))
}

fn set_named(table: &str, name: &str) -> Attributes {
    Attributes::new().text(SET_TABLE, table).text(SET_NAME, name)
}

/// Removes a set with its elements; no rule may look into it any more.
pub(crate) fn delete_set(table: &str, name: &str) -> Message {
    message(DELETE_SET, 0, set_named(table, name))
}

/// Asks for the sets of a table.
pub(crate) fn get_sets(table: &str) -> Message {
    message(GET_SET, 0, Attributes::new().text(SET_TABLE, table))
}

/// Asks for the elements of a set.
pub(crate) fn get_elements(table: &str, set: &str) -> Message {
    message(GET_ELEMENTS, 0, Attributes::new().text(ELEMENTS_TABLE, table).text(ELEMENTS_SET, set))
}

/// An element in a list, and its parts.
const ELEMENT: u16 = 1;
const KEY: u16 = 1;
const DATA: u16 = 2;
/// The value of either part.
const VALUE: u16 = 1;

/// An element, with what the set holds for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Element(Attributes);

impl Element {
    /// A key alone.
    pub(crate) fn key(key: &[u8]) -> Self {
        Self(Attributes::new().nested(KEY, Attributes::new().bytes(VALUE, key)))
    }

    /// A key whose packets another chain decides about.
    pub(crate) fn chain(key: &[u8], chain: &str) -> Self {
        let verdict =
            Attributes::new().bytes(1, &(Verdict::Goto as i32).to_be_bytes()).text(2, chain);
        Self(Self::key(key).0.nested(DATA, Attributes::new().nested(2, verdict)))
    }

    /// Whether its key is this one.
    pub(crate) fn has_key(&self, key: &[u8]) -> bool {
        self.0.first() == Self::key(key).0.first()
    }

    /// Whether `bytes`, an element as the kernel tells it, is this one.
    pub(crate) fn is(&self, bytes: &[u8]) -> bool {
        self.0.are_in(bytes)
    }
}

/// The list of elements that a message of the kernel's holds, as the kernel tells each.
pub(crate) fn told_elements(attributes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let list = crate::netlink::find(attributes, ELEMENTS).unwrap_or_default();
    crate::netlink::attributes(list).map(|(_, element)| element)
}

/// Whether the kernel tells of elements that came or went.
pub(crate) fn is_of_elements(told: &Reply) -> bool {
    [NEW_ELEMENTS, DELETE_ELEMENTS].contains(&(told.kind & 0xff))
}

/// The key of an element as the kernel tells it.
pub(crate) fn told_key(element: &[u8]) -> Option<&[u8]> {
    crate::netlink::find(crate::netlink::find(element, KEY)?, VALUE)
}

/// What a map holds for an element's key, as the kernel tells it.
pub(crate) fn told_value(element: &[u8]) -> Option<&[u8]> {
    crate::netlink::find(crate::netlink::find(element, DATA)?, VALUE)
}

/// The most elements of one message: a list is a single attribute, of at most 64 KiB.
pub(crate) const ELEMENT_LIMIT: usize = 1000;

/// Puts elements into a set; at most [`ELEMENT_LIMIT`].
pub(crate) fn add_elements(table: &str, set: &str, elements: Vec<Element>) -> Message {
    message(NEW_ELEMENTS, CREATE, listed(table, set, elements))
}

/// Puts keys with their values into a map; at most [`ELEMENT_LIMIT`]. A map may be large, so its
/// elements are written as they go to the kernel, without a value for each of their parts.
pub(crate) fn add_values<'a>(
    table: &str,
    map: &str,
    elements: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> Message {
    let mut list = Vec::new();
    for (key, value) in elements {
        let parts = [(KEY, key), (DATA, value)];
        let bytes = parts.iter().map(|(_, part)| 2 * HEADER_BYTES + part.len()).sum();
        attribute_header(&mut list, bytes, ELEMENT | NESTED);
        for (kind, part) in parts {
            attribute_header(&mut list, HEADER_BYTES + part.len(), kind | NESTED);
            attribute_header(&mut list, part.len(), VALUE);
            list.extend(part);
        }
    }
    let attributes = Attributes::new().text(ELEMENTS_TABLE, table).text(ELEMENTS_SET, map);
    message(NEW_ELEMENTS, CREATE, attributes.nested_bytes(ELEMENTS, &list))
}

/// Takes elements out of a set; at most [`ELEMENT_LIMIT`].
pub(crate) fn delete_elements(table: &str, set: &str, elements: Vec<Element>) -> Message {
    message(DELETE_ELEMENTS, 0, listed(table, set, elements))
}

fn listed(table: &str, set: &str, elements: Vec<Element>) -> Attributes {
    debug_assert!(elements.len() <= ELEMENT_LIMIT, "the list would not fit its attribute");
    let list = elements
        .into_iter()
        .fold(Attributes::new(), |list, Element(element)| list.nested(ELEMENT, element));
    Attributes::new().text(ELEMENTS_TABLE, table).text(ELEMENTS_SET, set).nested(ELEMENTS, list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_told_as_elements_are() {
        let elements: Vec<([u8; 4], [u8; 8])> = (0..3).map(|n| ([n; 4], [n + 7; 8])).collect();
        let pairs = elements.iter().map(|(key, value)| (&key[..], &value[..]));
        let value = |bytes: &[u8]| Attributes::new().bytes(VALUE, bytes);
        let element = |(key, data): &([u8; 4], [u8; 8])| {
            Element(Attributes::new().nested(KEY, value(key)).nested(DATA, value(data)))
        };
        let listed = elements.iter().map(element).collect();
        let bytes = |message: Message| {
            let mut out = Vec::new();
            message.write(1, 0, &mut out);
            out
        };
        assert_eq!(
            bytes(add_values("table", "map", pairs)),
            bytes(add_elements("table", "map", listed))
        );
    }
}
