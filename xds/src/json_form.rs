//! Reads a protobuf message from YAML or JSON as leniently as Envoy's parser, and reports all syntax errors at once.
//!
//! In addition to protobuf's JSON form, Envoy's parser accepts: enum names in any case, a single value in place of a
//! list, a duration or a wrapped value as an object (`{seconds: 5}`, `{value: 5}`), booleans as text, and null for an
//! absent field. An `Any` of an unknown type keeps its type URL and loses its content: code that reads it refuses the
//! type, and code that ignores it does not need the content.
//!
//! [`Located::parse`] limits the nesting of messages.

use prost_reflect::bytes::Bytes;
use prost_reflect::prost::Message as _;
use prost_reflect::{
    DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value,
};

use crate::descriptor;
use crate::located::{Located, Scalar, YamlNode};
use crate::translate::FieldError;

/// The longest value that an error shows, in bytes.
const SHOWN_LIMIT_BYTES: usize = 64;
/// The most seconds of a duration: 10,000 years, protobuf's limit.
const SECONDS_LIMIT: i64 = 315_576_000_000;

/// Reads a message of a known type; returns the readable part and the errors.
pub(crate) fn read(full_name: &str, file: &Located) -> (Option<DynamicMessage>, Vec<FieldError>) {
    let mut reader = JsonReader { mistakes: Vec::new() };
    let Some(kind) = descriptor::message(full_name) else {
        reader.mistake("", format!("unknown message type {full_name:?}"));
        return (None, reader.mistakes);
    };
    let message = match file.node() {
        YamlNode::Scalar(Scalar::Null) => Some(DynamicMessage::new(kind)),
        _ => reader.message(&kind, file, ""),
    };
    (message, reader.mistakes)
}

struct JsonReader {
    mistakes: Vec<FieldError>,
}

impl JsonReader {
    fn mistake(&mut self, path: &str, reason: impl Into<String>) {
        self.mistakes.push(FieldError { path: path.to_owned(), reason: reason.into() });
    }

    fn message(
        &mut self,
        kind: &MessageDescriptor,
        node: &Located,
        path: &str,
    ) -> Option<DynamicMessage> {
        let is_map = matches!(node.node(), YamlNode::Map(_));
        match kind.full_name() {
            "google.protobuf.Any" => self.any(kind, node, path),
            "google.protobuf.Duration" if !is_map => {
                let duration = duration(kind, node);
                duration.map_err(|reason| self.mistake(path, reason)).ok()
            }
            "google.protobuf.Struct" | "google.protobuf.Value" | "google.protobuf.ListValue" => {
                self.by_library(kind, node, path)
            }
            "google.protobuf.Timestamp" | "google.protobuf.FieldMask" if !is_map => {
                self.by_library(kind, node, path)
            }
            name if !is_map && name.starts_with("google.protobuf.") && name.ends_with("Value") => {
                let field = kind.get_field_by_name("value")?;
                let value = self.singular(&field.kind(), node, path)?;
                let mut message = DynamicMessage::new(kind.clone());
                message.set_field(&field, value);
                Some(message)
            }
            name => {
                let YamlNode::Map(map) = node.node() else {
                    let reason = format!("invalid {}: expected the fields of {name}", shown(node));
                    self.mistake(path, reason);
                    return None;
                };
                Some(self.fields(kind, &mut map.iter(), path))
            }
        }
    }

    /// The fields of a message without a special JSON form.
    fn fields(
        &mut self,
        kind: &MessageDescriptor,
        entries: &mut dyn Iterator<Item = (&String, &Located)>,
        path: &str,
    ) -> DynamicMessage {
        let mut message = DynamicMessage::new(kind.clone());
        for (key, value) in entries {
            let field = kind.get_field_by_name(key).or_else(|| kind.get_field_by_json_name(key));
            let Some(field) = field else {
                let here = join(path, key);
                self.mistake(&here, format!("unknown field {key:?} of {}", kind.name()));
                continue;
            };
            let here = join(path, field.name());
            if is_null(value) && !takes_null(&field) {
                continue;
            }
            if let Some(other) = already_set(&message, &field) {
                self.mistake(&here, format!("invalid beside {other}: only one of them may be set"));
                continue;
            }
            if let Some(value) = self.field(&field, value, &here) {
                message.set_field(&field, value);
            }
        }
        message
    }

    fn field(&mut self, field: &FieldDescriptor, node: &Located, path: &str) -> Option<Value> {
        if field.is_map() {
            return self.map(field, node, path);
        }
        if !field.is_list() {
            return self.singular(&field.kind(), node, path);
        }
        let alone = std::slice::from_ref(node);
        let items = if let YamlNode::List(items) = node.node() { items.as_slice() } else { alone };
        let mut list = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let here = format!("{path}[{index}]");
            if is_null(item) && !takes_null(field) {
                self.mistake(&here, "invalid null: expected a value");
                continue;
            }
            list.extend(self.singular(&field.kind(), item, &here));
        }
        Some(Value::List(list))
    }

    fn map(&mut self, field: &FieldDescriptor, node: &Located, path: &str) -> Option<Value> {
        let kind = field.kind();
        let entry = kind.as_message()?;
        let YamlNode::Map(entries) = node.node() else {
            self.mistake(path, format!("invalid {}: expected names with values", shown(node)));
            return None;
        };
        let mut map = std::collections::HashMap::new();
        for (key, value) in entries.iter() {
            let here = format!("{path}[{key:?}]");
            let text = Scalar::Text(key.clone());
            let key = match entry.map_entry_key_field().kind() {
                Kind::String => Some(MapKey::String(key.clone())),
                other => match scalar(&other, &text) {
                    Ok(key) => key.into_map_key(),
                    Err(reason) => {
                        self.mistake(&here, reason);
                        None
                    }
                },
            };
            let kind = entry.map_entry_value_field().kind();
            if let (Some(key), Some(value)) = (key, self.singular(&kind, value, &here)) {
                map.insert(key, value);
            }
        }
        Some(Value::Map(map))
    }

    /// One value that is neither list nor map.
    fn singular(&mut self, kind: &Kind, node: &Located, path: &str) -> Option<Value> {
        if let Kind::Message(message) = kind {
            return self.message(message, node, path).map(Value::Message);
        }
        let YamlNode::Scalar(value) = node.node() else {
            self.mistake(path, format!("invalid {}: expected one value", shown(node)));
            return None;
        };
        scalar(kind, value).map_err(|reason| self.mistake(path, reason)).ok()
    }

    fn any(
        &mut self,
        kind: &MessageDescriptor,
        node: &Located,
        path: &str,
    ) -> Option<DynamicMessage> {
        let mut any = DynamicMessage::new(kind.clone());
        let YamlNode::Map(map) = node.node() else {
            self.mistake(path, format!("invalid {}: expected @type and fields", shown(node)));
            return None;
        };
        let Some(YamlNode::Scalar(Scalar::Text(url))) = map.get("@type").map(Located::node) else {
            if map.is_empty() {
                return Some(any);
            }
            self.mistake(path, "@type is missing: expected type.googleapis.com/TYPE");
            return None;
        };
        let Some((_, name)) = url.rsplit_once('/') else {
            let reason = format!("invalid type URL {url:?}: expected type.googleapis.com/TYPE");
            self.mistake(&join(path, "@type"), reason);
            return None;
        };
        any.set_field_by_name("type_url", Value::String(url.clone()));
        if let Some(kind) = descriptor::message(name) {
            // A type with a special JSON form has it in this field.
            let value = map.get("value").filter(|_| name.starts_with("google.protobuf."));
            let message = match value {
                Some(value) => self.message(&kind, value, &join(path, "value"))?,
                None => {
                    let mut fields = map.iter().filter(|(key, _)| *key != "@type");
                    self.fields(&kind, &mut fields, path)
                }
            };
            any.set_field_by_name("value", Value::Bytes(Bytes::from(message.encode_to_vec())));
        }
        Some(any)
    }

    /// A message with a special JSON form that Envoy reads exactly as protobuf defines it.
    fn by_library(
        &mut self,
        kind: &MessageDescriptor,
        node: &Located,
        path: &str,
    ) -> Option<DynamicMessage> {
        let message = DynamicMessage::deserialize(kind.clone(), json(node));
        message.map_err(|error| self.mistake(path, error.to_string())).ok()
    }
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

fn is_null(node: &Located) -> bool {
    matches!(node.node(), YamlNode::Scalar(Scalar::Null))
}

/// Whether null is a value of the field rather than its absence.
fn takes_null(field: &FieldDescriptor) -> bool {
    field.kind().as_message().is_some_and(|kind| kind.full_name() == "google.protobuf.Value")
}

/// The field that excludes this one: itself in its other spelling, or another field of its `oneof`.
fn already_set(message: &DynamicMessage, field: &FieldDescriptor) -> Option<String> {
    if message.has_field(field) {
        return Some(format!("{} under another spelling", field.name()));
    }
    let other = field.containing_oneof()?.fields().find(|other| message.has_field(other))?;
    Some(other.name().to_owned())
}

/// A node as shown in errors. A long value is not shown: it may contain a private key.
fn shown(node: &Located) -> String {
    match node.node() {
        YamlNode::Map(_) => "object".to_owned(),
        YamlNode::List(_) => "list".to_owned(),
        YamlNode::Scalar(scalar) => scalar_shown(scalar),
    }
}

fn scalar_shown(scalar: &Scalar) -> String {
    match scalar {
        Scalar::Null => "null".to_owned(),
        Scalar::Bool(flag) => format!("boolean {flag}"),
        Scalar::Whole(number) => format!("number {number}"),
        Scalar::Real(number) => format!("number {number}"),
        Scalar::Text(text) if text.len() <= SHOWN_LIMIT_BYTES => format!("value {text:?}"),
        Scalar::Text(text) => format!("text of {} bytes", text.len()),
    }
}

/// A value of a kind other than a message.
fn scalar(kind: &Kind, value: &Scalar) -> Result<Value, String> {
    let whole = |least: i128, most: i128| whole(value, least, most);
    let wide = |least: i64, most: u64| whole(i128::from(least), i128::from(most));
    match kind {
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
            let number = wide(i32::MIN.into(), i32::MAX as u64)?;
            Ok(Value::I32(i32::try_from(number).map_err(|error| error.to_string())?))
        }
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
            let number = wide(i64::MIN, i64::MAX as u64)?;
            Ok(Value::I64(i64::try_from(number).map_err(|error| error.to_string())?))
        }
        Kind::Uint32 | Kind::Fixed32 => {
            let number = wide(0, u32::MAX.into())?;
            Ok(Value::U32(u32::try_from(number).map_err(|error| error.to_string())?))
        }
        Kind::Uint64 | Kind::Fixed64 => {
            let number = wide(0, u64::MAX)?;
            Ok(Value::U64(u64::try_from(number).map_err(|error| error.to_string())?))
        }
        #[expect(clippy::cast_possible_truncation, reason = "a float field has this precision")]
        Kind::Float => real(value).map(|number| Value::F32(number as f32)),
        Kind::Double => real(value).map(Value::F64),
        Kind::Bool => flag(value).map(Value::Bool),
        Kind::String => match value {
            Scalar::Text(text) => Ok(Value::String(text.clone())),
            other => Err(format!("invalid {}: expected text, in quotes", scalar_shown(other))),
        },
        Kind::Bytes => base64(value),
        Kind::Enum(descriptor) => choice(descriptor, value),
        Kind::Message(_) => Err("expected a message".to_owned()),
    }
}

fn whole(value: &Scalar, least: i128, most: i128) -> Result<i128, String> {
    #[expect(clippy::cast_possible_truncation, reason = "the range is checked first")]
    let exact =
        |number: f64| (number.fract() == 0.0 && number.abs() < 1e19).then_some(number as i128);
    let number = match value {
        Scalar::Whole(number) => Some(*number),
        Scalar::Real(number) => exact(*number),
        Scalar::Text(text) => {
            text.parse().ok().or_else(|| text.parse::<f64>().ok().and_then(exact))
        }
        Scalar::Null | Scalar::Bool(_) => None,
    };
    number.filter(|number| (least..=most).contains(number)).ok_or_else(|| {
        let shown = scalar_shown(value);
        format!("invalid {shown}: expected a whole number from {least} to {most}")
    })
}

fn real(value: &Scalar) -> Result<f64, String> {
    #[expect(clippy::cast_precision_loss, reason = "the field has this precision")]
    let number = match value {
        Scalar::Whole(number) => Some(*number as f64),
        Scalar::Real(number) => Some(*number),
        Scalar::Text(text) => text.parse().ok(),
        Scalar::Null | Scalar::Bool(_) => None,
    };
    number.ok_or_else(|| format!("invalid {}: expected a number", scalar_shown(value)))
}

/// A boolean. Accepts the words of YAML 1.1, as Envoy's parser does.
fn flag(value: &Scalar) -> Result<bool, String> {
    let word = match value {
        Scalar::Bool(flag) => return Ok(*flag),
        Scalar::Text(text) => text.to_ascii_lowercase(),
        Scalar::Null | Scalar::Whole(_) | Scalar::Real(_) => String::new(),
    };
    match word.as_str() {
        "true" | "yes" | "on" | "y" => Ok(true),
        "false" | "no" | "off" | "n" => Ok(false),
        _ => Err(format!("invalid {}: expected true or false", scalar_shown(value))),
    }
}

fn base64(value: &Scalar) -> Result<Value, String> {
    let invalid = || "invalid bytes: expected base64".to_owned();
    let Scalar::Text(text) = value else { return Err(invalid()) };
    let wrapper = descriptor::message("google.protobuf.BytesValue").ok_or_else(invalid)?;
    let message = DynamicMessage::deserialize(wrapper, serde_json::json!(text));
    let message = message.map_err(|_| invalid())?;
    message.get_field_by_name("value").map(|value| value.into_owned()).ok_or_else(invalid)
}

fn choice(descriptor: &EnumDescriptor, value: &Scalar) -> Result<Value, String> {
    let found = match value {
        Scalar::Text(text) => descriptor
            .values()
            .find(|known| known.name().eq_ignore_ascii_case(text))
            .map(|known| known.number()),
        _ => None,
    };
    let by_number = || {
        let number = whole(value, i32::MIN.into(), i32::MAX.into()).ok()?;
        let number = i32::try_from(number).ok()?;
        descriptor.get_value(number).map(|known| known.number())
    };
    found.or_else(by_number).map(Value::EnumNumber).ok_or_else(|| {
        let known: Vec<String> = descriptor.values().map(|v| v.name().to_owned()).collect();
        format!("invalid {}: expected one of {}", scalar_shown(value), known.join(", "))
    })
}

/// A duration as text: seconds with up to nine decimal places, and `s`.
fn duration(kind: &MessageDescriptor, node: &Located) -> Result<DynamicMessage, String> {
    let invalid = || {
        format!("invalid {}: expected seconds such as 0.25s, or {{seconds, nanos}}", shown(node))
    };
    let YamlNode::Scalar(Scalar::Text(text)) = node.node() else { return Err(invalid()) };
    let number = text.strip_suffix('s').ok_or_else(invalid)?;
    let unsigned = number.strip_prefix('-').unwrap_or(number);
    let (whole, places) = unsigned.split_once('.').unwrap_or((unsigned, ""));
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_digits(whole) || !is_digits(places) || places.len() > 9 {
        return Err(invalid());
    }
    let sign = if number.len() == unsigned.len() { 1 } else { -1 };
    let seconds: i64 = whole.parse().ok().filter(|s| *s <= SECONDS_LIMIT).ok_or_else(invalid)?;
    let nanos: i32 = format!("{places:0<9}").parse().map_err(|_| invalid())?;
    let mut message = DynamicMessage::new(kind.clone());
    message.set_field_by_name("seconds", Value::I64(i64::from(sign) * seconds));
    message.set_field_by_name("nanos", Value::I32(sign * nanos));
    Ok(message)
}

fn json(node: &Located) -> serde_json::Value {
    match node.node() {
        YamlNode::Map(map) => map.iter().map(|(key, value)| (key.clone(), json(value))).collect(),
        YamlNode::List(list) => list.iter().map(json).collect(),
        YamlNode::Scalar(Scalar::Null) => serde_json::Value::Null,
        YamlNode::Scalar(Scalar::Bool(flag)) => (*flag).into(),
        YamlNode::Scalar(Scalar::Whole(number)) => match i64::try_from(*number) {
            Ok(number) => number.into(),
            Err(_) => u64::try_from(*number).map_or(serde_json::Value::Null, Into::into),
        },
        YamlNode::Scalar(Scalar::Real(number)) => (*number).into(),
        YamlNode::Scalar(Scalar::Text(text)) => text.as_str().into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";

    fn read_text(kind: &str, text: &str) -> (DynamicMessage, Vec<String>) {
        let file = Located::parse(text).expect("YAML");
        let (message, mistakes) = read(kind, &file);
        let mistakes = mistakes.iter().map(ToString::to_string).collect();
        (message.expect("a message"), mistakes)
    }

    /// Checks that a text gives the same message as its canonical JSON form.
    fn means(kind: &str, text: &str, canonical: serde_json::Value) {
        let (message, mistakes) = read_text(kind, text);
        assert_eq!(mistakes, Vec::<String>::new(), "{text}");
        let kind = descriptor::message(kind).expect("a known message");
        let canonical = DynamicMessage::deserialize(kind, canonical).expect("the canonical form");
        // Compares bytes, because `Debug` of these messages does not terminate.
        assert_eq!(message.encode_to_vec(), canonical.encode_to_vec(), "{text}");
    }

    fn mistaken(kind: &str, text: &str, mistake: &str) {
        let (_, mistakes) = read_text(kind, text);
        assert_eq!(mistakes.len(), 1, "{text}: {mistakes:?}");
        assert!(mistakes[0].contains(mistake), "{text}: {mistakes:?}");
    }

    #[test]
    fn lenient_forms_give_the_same_message_as_in_envoy() {
        for text in ["type: strict_dns", "type: Strict_Dns", "type: 1", "type: '1'"] {
            means(CLUSTER, text, json!({"type": "STRICT_DNS"}));
        }
        for text in ["connect_timeout: {seconds: 1, nanos: 5}", "connectTimeout: 1.000000005s"] {
            means(CLUSTER, text, json!({"connect_timeout": "1.000000005s"}));
        }
        means(CLUSTER, "connect_timeout: {}", json!({"connect_timeout": "0s"}));
        means(CLUSTER, "connect_timeout: -0.5s", json!({"connect_timeout": "-0.500s"}));
        for text in ["on", "yes", "'true'", "True", "{value: true}"] {
            let text = format!(
                "max_requests_per_connection: 5\nignore_health_on_host_removal: on\nwait_for_warm_on_init: {text}"
            );
            let meant = json!({"max_requests_per_connection": 5, "wait_for_warm_on_init": true,
                               "ignore_health_on_host_removal": true});
            means(CLUSTER, &text, meant);
        }
        for text in ["'32768'", "32768.0", "3.2768e4", "{value: 32768}", "{value: '32768'}"] {
            let text = format!("per_connection_buffer_limit_bytes: {text}");
            means(CLUSTER, &text, json!({"per_connection_buffer_limit_bytes": 32768}));
        }
        for text in ["health_checks:", "health_checks: null", "health_checks: []", "{}", ""] {
            means(CLUSTER, text, json!({}));
        }
        means(
            CLUSTER,
            "metadata: {filter_metadata: {a: {b: [1, null, {c: true}]}}}",
            json!({"metadata": {"filter_metadata": {"a": {"b": [1, null, {"c": true}]}}}}),
        );
        let domains = json!({"virtual_hosts": [{"name": "a", "domains": ["*"]}]});
        let routes = "envoy.config.route.v3.RouteConfiguration";
        means(routes, "virtual_hosts: {name: a, domains: '*'}", domains);
    }

    #[test]
    fn any_of_an_unknown_type_keeps_only_its_type_url() {
        let text =
            "transport_socket: {name: a, typed_config: {'@type': type.googleapis.com/a.B, x: [1]}}";
        let any = json!({"@type": "type.googleapis.com/google.protobuf.Empty", "value": {}});
        let (message, mistakes) = read_text(CLUSTER, text);
        assert_eq!(mistakes, Vec::<String>::new());
        let socket = message.get_field_by_name("transport_socket").expect("it is set");
        let socket = socket.as_message().expect("a message").clone();
        let config = socket.get_field_by_name("typed_config").expect("it is set");
        let config = config.as_message().expect("a message");
        let url = config.get_field_by_name("type_url").expect("a URL").into_owned();
        assert_eq!(url.as_str(), Some("type.googleapis.com/a.B"));
        let known = "transport_socket: {typed_config: {'@type': type.googleapis.com/google.protobuf.Empty}}";
        means(CLUSTER, known, json!({"transport_socket": {"typed_config": any}}));
    }

    #[test]
    fn errors_state_the_accepted_values() {
        let cases = [
            ("type: strict-dns", "type: invalid value \"strict-dns\": expected one of STATIC"),
            ("type: 99", "type: invalid number 99: expected one of"),
            ("connect_timeout: 5", "connect_timeout: invalid number 5: expected seconds"),
            ("connect_timeout: 5ms", "invalid value \"5ms\""),
            ("connect_timeout: .5s", "invalid value \".5s\""),
            ("connect_timeout: 1.0123456789s", "invalid value"),
            ("connect_timeout: {seconds: 5, minutes: 1}", "connect_timeout.minutes: unknown field"),
            ("wait_for_warm_on_init: 1", "invalid number 1: expected true or false"),
            ("per_connection_buffer_limit_bytes: -1", "invalid number -1: expected a whole number"),
            ("per_connection_buffer_limit_bytes: 1.5", "invalid number 1.5"),
            ("per_connection_buffer_limit_bytes: ' 8'", "invalid value \" 8\""),
            ("name: 1", "name: invalid number 1: expected text, in quotes"),
            ("name: [a]", "name: invalid list: expected one value"),
            ("health_checks: [null]", "health_checks[0]: invalid null"),
            ("http_protocol_options: ''", "http_protocol_options: invalid value \"\""),
            ("nmae: a", "nmae: unknown field \"nmae\" of Cluster"),
            ("connect_timeout: 1s\nconnectTimeout: 2s", "under another spelling"),
            ("type: STATIC\ncluster_type: {name: a}", "type: invalid beside cluster_type"),
            ("transport_socket: {typed_config: {a: 1}}", "@type is missing"),
            ("transport_socket: {typed_config: {'@type': a.B}}", "invalid type URL \"a.B\""),
        ];
        for (text, mistake) in cases {
            mistaken(CLUSTER, text, mistake);
        }
    }

    #[test]
    fn long_values_are_not_shown() {
        let key = "A".repeat(100);
        let (_, mistakes) = read_text(CLUSTER, &format!("type: {key}"));
        assert!(mistakes[0].contains("text of 100 bytes") && !mistakes[0].contains(&key));
    }
}
