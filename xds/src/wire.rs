//! Encodes messages directly from the proto3 JSON form that this crate writes, without a `DynamicMessage` in between: a
//! control plane with thousands of services encodes hundreds of thousands of resources.

use prost_reflect::prost::Message as _;
use prost_reflect::prost::encoding::{WireType, encode_key, encode_varint};
use prost_reflect::{DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value};

use crate::descriptor;

/// Encodes a message from its proto3 JSON form, as written by this crate.
///
/// # Errors
/// When the JSON does not fit the message, which is a bug.
pub(crate) fn from_json(full_name: &str, value: Value) -> Result<Vec<u8>, String> {
    let kind =
        descriptor::message(full_name).ok_or_else(|| format!("unknown message {full_name}"))?;
    encode(&kind, &value).map_or_else(|| by_reflection(&kind, value), Ok)
}

/// The same with `prost-reflect`, which supports every JSON form.
pub(crate) fn by_reflection(kind: &MessageDescriptor, value: Value) -> Result<Vec<u8>, String> {
    let strict = DeserializeOptions::new().deny_unknown_fields(true);
    let message = DynamicMessage::deserialize_with_options(kind.clone(), value, &strict)
        .map_err(|error| format!("{}: {error}", kind.full_name()))?;
    Ok(message.encode_to_vec())
}

/// The encoded message. None when the JSON uses something that is not supported here, or does not fit the message.
pub(crate) fn encode(kind: &MessageDescriptor, value: &Value) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    message(kind, value, &mut bytes)?;
    Some(bytes)
}

fn message(kind: &MessageDescriptor, value: &Value, out: &mut Vec<u8>) -> Option<()> {
    match kind.full_name().strip_prefix("google.protobuf.") {
        None | Some("Empty") => fields(kind, value.as_object()?.iter(), out),
        Some("Any") => any(value.as_object()?, out),
        Some("Duration") => duration(value.as_str()?, out),
        Some("Struct") => structure(value.as_object()?, out),
        Some(
            "BoolValue" | "UInt32Value" | "UInt64Value" | "Int32Value" | "Int64Value"
            | "StringValue" | "DoubleValue" | "FloatValue",
        ) => scalar(&kind.get_field(1)?, value, out),
        Some(_) => None,
    }
}

fn fields<'v>(
    kind: &MessageDescriptor,
    object: impl Iterator<Item = (&'v String, &'v Value)>,
    out: &mut Vec<u8>,
) -> Option<()> {
    let mut choices = Vec::new();
    for (name, value) in object {
        let field = kind.get_field_by_json_name(name).or_else(|| kind.get_field_by_name(name))?;
        if let Some(choice) = field.containing_oneof() {
            // Two fields of one `oneof` are invalid.
            if choices.contains(&choice) {
                return None;
            }
            choices.push(choice);
        }
        if field.is_map() {
            map(&field, value.as_object()?, out)?;
        } else if field.is_list() {
            list(&field, value.as_array()?, out)?;
        } else {
            single(&field, value, out)?;
        }
    }
    Some(())
}

fn single(field: &FieldDescriptor, value: &Value, out: &mut Vec<u8>) -> Option<()> {
    match field.kind() {
        Kind::Message(kind) => {
            let mut inner = Vec::new();
            message(&kind, value, &mut inner)?;
            delimited(field.number(), &inner, out);
            Some(())
        }
        _ => scalar(field, value, out),
    }
}

fn list(field: &FieldDescriptor, values: &[Value], out: &mut Vec<u8>) -> Option<()> {
    if !field.is_packed() {
        return values.iter().try_for_each(|value| match field.kind() {
            Kind::String => {
                delimited(field.number(), value.as_str()?.as_bytes(), out);
                Some(())
            }
            Kind::Message(_) => single(field, value, out),
            _ => None,
        });
    }
    let mut packed = Vec::new();
    for value in values {
        encode_varint(whole(&field.kind(), value)?, &mut packed);
    }
    if !packed.is_empty() {
        delimited(field.number(), &packed, out);
    }
    Some(())
}

fn map(field: &FieldDescriptor, entries: &Map<String, Value>, out: &mut Vec<u8>) -> Option<()> {
    let kind = field.kind();
    let entry = kind.as_message()?;
    let key = entry.map_entry_key_field();
    let value = entry.map_entry_value_field();
    if key.kind() != Kind::String {
        return None;
    }
    for (name, content) in entries {
        let mut inner = Vec::new();
        delimited(key.number(), name.as_bytes(), &mut inner);
        single(&value, content, &mut inner)?;
        delimited(field.number(), &inner, out);
    }
    Some(())
}

/// A value other than a message. The default value of a field without presence is not written.
fn scalar(field: &FieldDescriptor, value: &Value, out: &mut Vec<u8>) -> Option<()> {
    let is_written = |is_default: bool| field.supports_presence() || !is_default;
    match field.kind() {
        Kind::String => {
            let text = value.as_str()?;
            if is_written(text.is_empty()) {
                delimited(field.number(), text.as_bytes(), out);
            }
        }
        Kind::Double => {
            let number = value.as_f64()?;
            if is_written(number.to_bits() == 0) {
                encode_key(field.number(), WireType::SixtyFourBit, out);
                out.extend_from_slice(&number.to_le_bytes());
            }
        }
        kind => {
            let number = whole(&kind, value)?;
            if is_written(number == 0) {
                encode_key(field.number(), WireType::Varint, out);
                encode_varint(number, out);
            }
        }
    }
    Some(())
}

/// The wire value of a boolean, a number or an enum name.
fn whole(kind: &Kind, value: &Value) -> Option<u64> {
    match kind {
        Kind::Bool => value.as_bool().map(u64::from),
        Kind::Uint32 => value.as_u64().filter(|number| u32::try_from(*number).is_ok()),
        Kind::Uint64 => value.as_u64(),
        Kind::Int32 => value.as_u64().filter(|number| i32::try_from(*number).is_ok()),
        Kind::Int64 => value.as_u64().filter(|number| i64::try_from(*number).is_ok()),
        Kind::Enum(names) => {
            let number = names.get_value_by_name(value.as_str()?)?.number();
            u64::try_from(number).ok()
        }
        _ => None,
    }
}

fn any(object: &Map<String, Value>, out: &mut Vec<u8>) -> Option<()> {
    let url = object.get("@type")?.as_str()?;
    let kind = descriptor::message(url.strip_prefix(descriptor::TYPE_URL_PREFIX)?)?;
    if kind.full_name().starts_with("google.protobuf.") {
        return None;
    }
    let mut inner = Vec::new();
    fields(&kind, object.iter().filter(|(name, _)| *name != "@type"), &mut inner)?;
    delimited(1, url.as_bytes(), out);
    if !inner.is_empty() {
        delimited(2, &inner, out);
    }
    Some(())
}

/// A duration such as `15s` or `0.25s`.
fn duration(text: &str, out: &mut Vec<u8>) -> Option<()> {
    let number = text.strip_suffix('s')?;
    let (seconds, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(seconds) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    let nanos = format!("{fraction:0<9}").parse().ok()?;
    for (number, part) in [(1, seconds.parse().ok()?), (2, nanos)] {
        if part != 0 {
            encode_key(number, WireType::Varint, out);
            encode_varint(part, out);
        }
    }
    Some(())
}

fn structure(object: &Map<String, Value>, out: &mut Vec<u8>) -> Option<()> {
    for (name, content) in object {
        let mut entry = Vec::new();
        delimited(1, name.as_bytes(), &mut entry);
        let mut inner = Vec::new();
        dynamic(content, &mut inner)?;
        delimited(2, &inner, &mut entry);
        delimited(1, &entry, out);
    }
    Some(())
}

/// A `google.protobuf.Value`.
fn dynamic(value: &Value, out: &mut Vec<u8>) -> Option<()> {
    let mut inner = Vec::new();
    match value {
        Value::Null => out.extend_from_slice(&[1 << 3, 0]),
        Value::Number(number) => {
            encode_key(2, WireType::SixtyFourBit, out);
            out.extend_from_slice(&number.as_f64()?.to_le_bytes());
        }
        Value::String(text) => delimited(3, text.as_bytes(), out),
        Value::Bool(flag) => out.extend_from_slice(&[4 << 3, u8::from(*flag)]),
        Value::Object(object) => {
            structure(object, &mut inner)?;
            delimited(5, &inner, out);
        }
        Value::Array(values) => {
            for value in values {
                let mut item = Vec::new();
                dynamic(value, &mut item)?;
                delimited(1, &item, &mut inner);
            }
            delimited(6, &inner, out);
        }
    }
    Some(())
}

fn delimited(number: u32, bytes: &[u8], out: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(u64::try_from(bytes.len()).unwrap_or(u64::MAX), out);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn same(name: &str, value: &Value) {
        let kind = descriptor::message(name).expect(name);
        let bytes =
            encode(&kind, value).unwrap_or_else(|| panic!("{name} is not written: {value}"));
        // As JSON, since bytes inside an `Any` may have their fields in any order.
        let decode = |bytes: &[u8]| {
            let message = descriptor::decode(name, bytes).expect("a message");
            serde_json::to_value(message).expect("a form")
        };
        let reflected = by_reflection(&kind, value.clone()).expect("a message");
        assert_eq!(decode(&bytes), decode(&reflected), "{value}");
    }

    #[test]
    fn bytes_decode_to_the_same_message_as_the_librarys() {
        let any = |name: &str, mut value: Value| {
            value["@type"] = format!("{}{name}", descriptor::TYPE_URL_PREFIX).into();
            value
        };
        let tls = any(
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            json!({"sni": "", "maxSessionKeys": 0, "allowRenegotiation": false,
                "commonTlsContext": {"alpnProtocols": ["h2", ""], "tlsParams": {"tlsMinimumProtocolVersion": "TLSv1_3"}}}),
        );
        same(
            "envoy.config.cluster.v3.Cluster",
            &json!({"name": "c", "type": "EDS", "connectTimeout": "0.250s", "lbPolicy": "ROUND_ROBIN",
                "perConnectionBufferLimitBytes": 0, "edsClusterConfig": {"edsConfig": {"ads": {}}, "serviceName": "s"},
                "circuitBreakers": {"thresholds": [{"maxConnections": 7, "trackRemaining": true}]},
                "maglevLbConfig": {"tableSize": 65537}, "transportSocket": {"name": "t", "typedConfig": tls},
                "metadata": {"filterMetadata": {"weft": {"a": [1, "b", null, {"c": -0.5}, true], "d": {}, "e": []}}}}),
        );
        same(
            "envoy.extensions.filters.http.rbac.v3.RBAC",
            &json!({"rules": {"action": "DENY", "policies": {"": {"permissions": [{"any": false}],
                "principals": [{"orIds": {"ids": [{"any": true}]}}]}, "p": {}}}}),
        );
        same("envoy.type.v3.Percent", &json!({"value": 12.5}));
    }
}
