//! Sorts the map entries of encoded messages, so that equal resources have equal bytes in every process.
//!
//! The generated types hold a map as a `HashMap`, whose order differs between processes, but a resource's version is a
//! hash of its bytes. The entries are sorted after encoding, and not where a map is filled: a map may be anywhere, also in
//! an `Any` or a `Struct`, and a new one cannot be forgotten. Sorting changes no length, so it is done in place.

use std::collections::BTreeMap;
use std::ops::Range;

use prost::encoding::{WireType, decode_key, decode_varint};
use prost_reflect::{Kind, MessageDescriptor};

use crate::descriptor;

/// Sorts the entries of every map in an encoded message. Bytes that are not such a message may stay unsorted.
pub(crate) fn sort_maps(full_name: &str, bytes: &mut [u8]) {
    let sorted = descriptor::message(full_name).and_then(|kind| sort(&kind, bytes));
    debug_assert!(sorted.is_some(), "invalid {full_name}");
}

/// A field of an encoded message: where it is, and where its content is.
struct EncodedField {
    number: u32,
    wire_type: WireType,
    whole: Range<usize>,
    content: Range<usize>,
}

impl EncodedField {
    /// The field that begins at `start`. None when no whole field begins there.
    fn read(bytes: &[u8], start: usize) -> Option<Self> {
        let mut rest = bytes.get(start..)?;
        let (number, wire_type) = decode_key(&mut rest).ok()?;
        let length = match wire_type {
            WireType::Varint => {
                decode_varint(&mut rest).ok()?;
                0
            }
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => usize::try_from(decode_varint(&mut rest).ok()?).ok()?,
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        let begin = bytes.len() - rest.len();
        let end = begin.checked_add(length).filter(|end| *end <= bytes.len())?;
        Some(Self { number, wire_type, whole: start..end, content: begin..end })
    }
}

fn sort(kind: &MessageDescriptor, bytes: &mut [u8]) -> Option<()> {
    if kind.full_name() == "google.protobuf.Any" {
        return sort_any(bytes);
    }
    let mut maps: BTreeMap<u32, Vec<Range<usize>>> = BTreeMap::new();
    let mut start = 0;
    while start < bytes.len() {
        let encoded = EncodedField::read(bytes, start)?;
        start = encoded.whole.end;
        if encoded.wire_type != WireType::LengthDelimited {
            continue;
        }
        let field = kind.get_field(encoded.number)?;
        let Kind::Message(inner) = field.kind() else { continue };
        sort(&inner, bytes.get_mut(encoded.content)?)?;
        if field.is_map() {
            maps.entry(encoded.number).or_default().push(encoded.whole);
        }
    }
    maps.into_values().filter(|entries| entries.len() > 1).try_for_each(|mut entries| {
        let span = entries.first()?.start..entries.last()?.end;
        // An encoder writes the entries of a map one after another.
        if entries.iter().map(Range::len).sum::<usize>() != span.len() {
            return None;
        }
        entries.sort_by(|one, other| bytes.get(one.clone()).cmp(&bytes.get(other.clone())));
        let sorted: Vec<&[u8]> = entries.into_iter().filter_map(|entry| bytes.get(entry)).collect();
        let sorted = sorted.concat();
        bytes.get_mut(span)?.copy_from_slice(&sorted);
        Some(())
    })
}

/// Sorts the maps of the message in an `Any`.
fn sort_any(bytes: &mut [u8]) -> Option<()> {
    let type_url = EncodedField::read(bytes, 0)?;
    let name = std::str::from_utf8(bytes.get(type_url.content)?).ok()?;
    let kind = descriptor::message(name.strip_prefix(descriptor::TYPE_URL_PREFIX)?)?;
    if type_url.whole.end == bytes.len() {
        return Some(());
    }
    let message = EncodedField::read(bytes, type_url.whole.end)?;
    sort(&kind, bytes.get_mut(message.content)?)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use envoy_types::pb::envoy::config::core::v3::Metadata;
    use envoy_types::pb::google::protobuf::value::Kind as ValueKind;
    use envoy_types::pb::google::protobuf::{Struct, Value};
    use envoy_types::util::pack_any;
    use prost::Message as _;

    use super::*;

    const METADATA: &str = "envoy.config.core.v3.Metadata";

    /// A map of each of these names to `value`. Each `HashMap` has an order of its own.
    fn map<T: Clone>(value: &T) -> HashMap<String, T> {
        (0..20).map(|number| (format!("key {number}"), value.clone())).collect()
    }

    /// Metadata with maps at several depths, also in an `Any`.
    fn metadata() -> Metadata {
        let text = Value { kind: Some(ValueKind::StringValue("text".into())) };
        let inner = Value { kind: Some(ValueKind::StructValue(Struct { fields: map(&text) })) };
        let outer = Struct { fields: map(&inner) };
        Metadata {
            filter_metadata: map(&outer),
            typed_filter_metadata: map(&pack_any(Metadata {
                filter_metadata: map(&outer),
                ..Metadata::default()
            })),
        }
    }

    #[test]
    fn equal_messages_have_equal_bytes() {
        let encode = || {
            let mut bytes = metadata().encode_to_vec();
            sort_maps(METADATA, &mut bytes);
            bytes
        };
        let first = encode();
        assert_eq!(encode(), first);
        let read = Metadata::decode(&*first).expect("a message");
        assert_eq!(read.filter_metadata, metadata().filter_metadata);
        assert_eq!(read.typed_filter_metadata.len(), 20);
    }

    #[test]
    fn bytes_that_are_no_message_stay_as_they_are() {
        let kind = descriptor::message(METADATA).expect("a known message");
        let whole = Metadata { filter_metadata: map(&Struct::default()), ..Metadata::default() };
        let bytes = whole.encode_to_vec();
        // Within the first entry, and within the last one.
        for end in [1, bytes.len() - 1] {
            let mut cut = bytes[..end].to_vec();
            assert_eq!(sort(&kind, &mut cut), None, "{end}");
            assert_eq!(cut, bytes[..end]);
        }
        let mut apart = [&*bytes, b"\x12\x00", &*bytes].concat();
        let before = apart.clone();
        assert_eq!(sort(&kind, &mut apart), None);
        assert_eq!(apart, before);
    }
}
