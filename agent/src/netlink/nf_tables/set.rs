//! Sets and maps, which rules look up packet fields in.

use super::expression::PacketVerdict;
use super::wire::message;
use crate::netlink::message::{ATTRIBUTE_HEADER_BYTES as HEADER_BYTES, NESTED, attribute_header};
use crate::netlink::{Attributes, CREATE, NetlinkMessage, NetlinkReply};

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
/// The attribute with the list of elements.
pub(crate) const ELEMENTS: u16 = 3;

/// The data types of the `nft` command (its `include/datatype.h`). The kernel only stores them, so that the
/// command can list a set. A concatenation takes six bits per part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueKind {
    Number = 19,
    Ipv4 = 7,
    Ipv6 = 8,
    Protocol = 12,
    Port = 13,
}

impl ValueKind {
    /// The length of a value in bytes.
    fn bytes(self) -> u32 {
        match self {
            Self::Protocol => 1,
            Self::Port => 2,
            Self::Number | Self::Ipv4 => 4,
            Self::Ipv6 => 16,
        }
    }
}

fn concatenated(kinds: &[ValueKind]) -> u32 {
    kinds.iter().fold(0, |all, kind| all << 6 | *kind as u32)
}

/// A set, or a map if it has data for its keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SetSpec<'a> {
    pub(crate) name: &'a str,
    pub(crate) key: &'a [ValueKind],
    /// Whether an element covers all keys from one to another, in each part. Elements may not overlap.
    pub(crate) has_ranges: bool,
    pub(crate) holds: SetData<'a>,
    /// The number of elements, if it is known and constant.
    pub(crate) size: Option<u32>,
}

/// The data of a set for each key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SetData<'a> {
    /// No data: a key is in the set or not.
    None,
    /// The verdict on the packet.
    Verdicts,
    /// A value of this type and length.
    Values(&'a [ValueKind], u32),
}

/// Creates a set unless it exists.
pub(crate) fn make_set(table: &str, set: SetSpec<'_>) -> NetlinkMessage {
    const INTERVAL: u32 = 4;
    const IS_MAP: u32 = 8;
    const CONCATENATED: u32 = 0x80;
    const ANY_ID: u32 = 1;
    const FIELD: u16 = 1;
    let mut flags = if set.holds == SetData::None { 0 } else { IS_MAP };
    if set.has_ranges {
        flags |= INTERVAL | CONCATENATED;
    }
    let words: u32 = set.key.iter().map(|part| part.bytes().div_ceil(4)).sum();
    let mut attributes = set_named(table, set.name)
        .big_endian(3, flags)
        .big_endian(4, concatenated(set.key))
        .big_endian(5, words * 4);
    match set.holds {
        SetData::None => {}
        SetData::Verdicts => attributes = attributes.big_endian(6, 0xffff_ff00),
        SetData::Values(kinds, bytes) => {
            attributes = attributes.big_endian(6, concatenated(kinds)).big_endian(7, bytes);
        }
    }
    let mut description = Attributes::new();
    if let Some(size) = set.size {
        description = description.big_endian(1, size);
    }
    if set.has_ranges {
        let field = |part: &ValueKind| Attributes::new().big_endian(1, part.bytes());
        let fields = set.key.iter().map(field);
        let list = fields.fold(Attributes::new(), |list, field| list.nested(FIELD, field));
        description = description.nested(2, list);
    }
    if description.first().is_some() {
        attributes = attributes.nested(9, description);
    }
    message(NEW_SET, CREATE, attributes.big_endian(10, ANY_ID))
}

fn set_named(table: &str, name: &str) -> Attributes {
    Attributes::new().text(SET_TABLE, table).text(SET_NAME, name)
}

/// Deletes a set with its elements. No rule may use it.
pub(crate) fn delete_set(table: &str, name: &str) -> NetlinkMessage {
    message(DELETE_SET, 0, set_named(table, name))
}

/// Requests the sets of a table.
pub(crate) fn get_sets(table: &str) -> NetlinkMessage {
    message(GET_SET, 0, Attributes::new().text(SET_TABLE, table))
}

/// Requests the elements of a set.
pub(crate) fn get_elements(table: &str, set: &str) -> NetlinkMessage {
    message(GET_ELEMENTS, 0, Attributes::new().text(ELEMENTS_TABLE, table).text(ELEMENTS_SET, set))
}

/// The attribute of one element in a list, and those of its parts.
const ELEMENT: u16 = 1;
const KEY: u16 = 1;
const DATA: u16 = 2;
const KEY_END: u16 = 10;
/// The attribute with the value of a part.
const VALUE: u16 = 1;

/// The key of an element: one key, or all keys from one to another, in each part.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ElementKeys {
    first: Vec<u8>,
    last: Option<Vec<u8>>,
}

impl ElementKeys {
    /// One key.
    pub(crate) fn one(key: &[u8]) -> Self {
        Self { first: key.to_vec(), last: None }
    }

    /// All keys from `first` to `last`.
    pub(crate) fn range(first: &[u8], last: &[u8]) -> Self {
        Self { first: first.to_vec(), last: Some(last.to_vec()) }
    }

    /// Decodes the key of an element.
    pub(crate) fn parse(element: &[u8]) -> Option<Self> {
        let last = crate::netlink::find(element, KEY_END);
        let last = last.and_then(|last| crate::netlink::find(last, VALUE));
        Some(Self { first: element_key(element)?.to_vec(), last: last.map(<[u8]>::to_vec) })
    }
}

/// An element of a set, with its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SetElement {
    pub(crate) keys: ElementKeys,
    /// The chain that the verdict goes to.
    chain: Option<String>,
}

impl SetElement {
    /// An element without data.
    pub(crate) fn new(keys: ElementKeys) -> Self {
        Self { keys, chain: None }
    }

    /// A key whose packets go to a chain.
    pub(crate) fn chain(key: &[u8], chain: &str) -> Self {
        Self { keys: ElementKeys::one(key), chain: Some(chain.to_owned()) }
    }

    /// Whether the encoded element `bytes` equals this one.
    pub(crate) fn is(&self, bytes: &[u8]) -> bool {
        self.attributes().is_contained_in(bytes)
    }

    fn attributes(&self) -> Attributes {
        let value = |bytes: &[u8]| Attributes::new().bytes(VALUE, bytes);
        let mut attributes = Attributes::new().nested(KEY, value(&self.keys.first));
        if let Some(last) = &self.keys.last {
            attributes = attributes.nested(KEY_END, value(last));
        }
        if let Some(chain) = &self.chain {
            let goto = (PacketVerdict::Goto as i32).to_be_bytes();
            let verdict = Attributes::new().bytes(1, &goto).text(2, chain);
            attributes = attributes.nested(DATA, Attributes::new().nested(2, verdict));
        }
        attributes
    }
}

/// Splits the list of elements in a message.
pub(crate) fn parse_elements(attributes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let list = crate::netlink::find(attributes, ELEMENTS).unwrap_or_default();
    crate::netlink::attributes(list).map(|(_, element)| element)
}

/// Whether a notification is about added or deleted elements.
pub(crate) fn is_element_change(parse: &NetlinkReply) -> bool {
    [NEW_ELEMENTS, DELETE_ELEMENTS].contains(&(parse.kind & 0xff))
}

/// The first key of an encoded element.
pub(crate) fn element_key(element: &[u8]) -> Option<&[u8]> {
    crate::netlink::find(crate::netlink::find(element, KEY)?, VALUE)
}

/// The map value of an encoded element.
pub(crate) fn element_value(element: &[u8]) -> Option<&[u8]> {
    crate::netlink::find(crate::netlink::find(element, DATA)?, VALUE)
}

/// The most elements of one message: a list is a single attribute of at most 64 KiB, and the longest element,
/// of an IPv6 service with the name of its security group's chain, takes 112 bytes.
pub(crate) const ELEMENT_LIMIT: usize = 500;

/// Adds elements to a set, at most [`ELEMENT_LIMIT`].
pub(crate) fn add_elements(table: &str, set: &str, elements: &[SetElement]) -> NetlinkMessage {
    message(NEW_ELEMENTS, CREATE, listed(table, set, elements.iter().map(SetElement::attributes)))
}

/// Adds keys with values to a map, at most [`ELEMENT_LIMIT`]. A map may be large, so its elements are encoded
/// directly, without an `AttributeValue` per part.
pub(crate) fn add_values<'a>(
    table: &str,
    map: &str,
    elements: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> NetlinkMessage {
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

/// Removes elements from a set, at most [`ELEMENT_LIMIT`].
pub(crate) fn delete_elements(table: &str, set: &str, keys: &[ElementKeys]) -> NetlinkMessage {
    let elements = keys.iter().map(|keys| SetElement::new(keys.clone()).attributes());
    message(DELETE_ELEMENTS, 0, listed(table, set, elements))
}

fn listed(table: &str, set: &str, elements: impl Iterator<Item = Attributes>) -> Attributes {
    let list = elements.fold(Attributes::new(), |list, element| list.nested(ELEMENT, element));
    Attributes::new().text(ELEMENTS_TABLE, table).text(ELEMENTS_SET, set).nested(ELEMENTS, list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_encoded_like_elements() {
        let elements: Vec<([u8; 4], [u8; 8])> = (0..3).map(|n| ([n; 4], [n + 7; 8])).collect();
        let pairs = elements.iter().map(|(key, value)| (&key[..], &value[..]));
        let value = |bytes: &[u8]| Attributes::new().bytes(VALUE, bytes);
        let element = |(key, data): &([u8; 4], [u8; 8])| {
            Attributes::new().nested(KEY, value(key)).nested(DATA, value(data))
        };
        let list = listed("table", "map", elements.iter().map(element));
        let bytes = |message: NetlinkMessage| {
            let mut out = Vec::new();
            message.write(1, 0, &mut out);
            out
        };
        assert_eq!(
            bytes(add_values("table", "map", pairs)),
            bytes(message(NEW_ELEMENTS, CREATE, list))
        );
    }
}
