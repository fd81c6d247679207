//! Encodes weft's own settings, for which Envoy has no field: values of a `google.protobuf.Struct`.

use std::collections::HashMap;

use super::pb::{core, google};

/// The key of weft's metadata.
pub(super) const OUR_METADATA: &str = "weft";

/// The fields of a `Struct`.
pub(super) type StructFields = HashMap<String, google::Value>;

fn value(kind: google::value::Kind) -> google::Value {
    google::Value { kind: Some(kind) }
}

/// A string.
pub(super) fn text(text: impl Into<String>) -> google::Value {
    value(google::value::Kind::StringValue(text.into()))
}

/// A whole number. A `Struct` has only floating-point numbers: it is exact below 2^53.
pub(super) fn number(number: u64) -> google::Value {
    value(google::value::Kind::NumberValue(number as f64))
}

/// A boolean.
pub(super) fn flag(flag: bool) -> google::Value {
    value(google::value::Kind::BoolValue(flag))
}

/// A list.
pub(super) fn list(values: impl IntoIterator<Item = google::Value>) -> google::Value {
    let values = values.into_iter().collect();
    value(google::value::Kind::ListValue(google::ListValue { values }))
}

/// An object.
pub(super) fn object(fields: StructFields) -> google::Value {
    value(google::value::Kind::StructValue(google::Struct { fields }))
}

/// The metadata with weft's own settings; none without settings.
pub(super) fn metadata(fields: StructFields) -> Option<core::Metadata> {
    let ours = (!fields.is_empty()).then_some(google::Struct { fields })?;
    let filter_metadata = HashMap::from([(OUR_METADATA.into(), ours)]);
    Some(core::Metadata { filter_metadata, ..core::Metadata::default() })
}
