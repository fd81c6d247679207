//! Deserializes a file with errors, so that all of them are reported in one run.
//!
//! serde stops at the first error. Here an error is recorded with its path, the value with the error is omitted, and
//! deserialization starts again, until the rest fits the type. A missing required field gets a placeholder value.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{self, DeserializeOwned, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use crate::located::{Located, Scalar, YamlMap, YamlNode};

/// The most errors that are looked for: each one restarts the deserialization.
const MISTAKES_LIMIT: usize = 50;

/// The error text of a missing required field.
pub const MISSING: &str = "this field is missing";

/// The deserializable part of a file, and the errors of the rest.
#[derive(Debug)]
pub struct Recovered<T> {
    /// The value without the parts that have errors; none when nothing is left.
    pub value: Option<T>,
    /// The errors: path and reason. Not sorted.
    pub mistakes: Vec<(String, String)>,
    omitted: BTreeSet<String>,
}

impl<T> Recovered<T> {
    /// Converts a path of [`Self::value`] to the path in the file: omitted list items count there.
    #[must_use]
    pub fn path_in_file(&self, path: &str) -> String {
        let mut found = String::new();
        for part in path.split_inclusive(']') {
            let Some((before, index)) = part.rsplit_once('[') else {
                found.push_str(part);
                continue;
            };
            found.push_str(before);
            let index = index.trim_end_matches(']').parse::<usize>();
            let Ok(index) = index else {
                found.push_str(part.get(before.len()..).unwrap_or_default());
                continue;
            };
            let is_kept = |number: &usize| !self.omitted.contains(&format!("{found}[{number}]"));
            let original = (0..).filter(is_kept).nth(index).unwrap_or(index);
            found = format!("{found}[{original}]");
        }
        found
    }

    /// Whether the value at this path of the file was omitted, is a placeholder, or is inside one.
    #[must_use]
    pub fn is_omitted(&self, path: &str) -> bool {
        self.omitted.iter().any(|left_out| {
            path.strip_prefix(left_out.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        })
    }

    /// Whether the value at this path of the file, or a value below it, was omitted or is a placeholder.
    #[must_use]
    pub fn is_incomplete(&self, path: &str) -> bool {
        let is_below = |left_out: &str| {
            left_out
                .strip_prefix(path)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        self.is_omitted(path) || self.omitted.iter().any(|left_out| is_below(left_out))
    }
}

/// Deserializes a file as far as possible.
#[must_use]
pub fn recover<T: DeserializeOwned>(file: &Located) -> Recovered<T> {
    let mut state = RecoveryState::default();
    let mut value = None;
    for _ in 0..MISTAKES_LIMIT {
        let reading = NodeDeserializer { node: Some(file), path: String::new(), state: &state };
        let error = match T::deserialize(reading) {
            Ok(read) => {
                value = Some(read);
                break;
            }
            Err(error) => error,
        };
        if !state.note(error) {
            break;
        }
    }
    let RecoveryState { left_out, placeholders, mut mistakes, non_fatal } = state;
    mistakes.extend(non_fatal.into_inner());
    let omitted = left_out.into_iter().chain(placeholders).collect();
    Recovered { value, mistakes: mistakes.into_iter().collect(), omitted }
}

/// The errors found so far.
#[derive(Default)]
struct RecoveryState {
    /// The paths of omitted values.
    left_out: BTreeSet<String>,
    /// The paths of missing required fields.
    placeholders: BTreeSet<String>,
    mistakes: BTreeMap<String, String>,
    /// Errors that do not stop the deserialization: unknown and repeated fields.
    non_fatal: RefCell<BTreeMap<String, String>>,
}

impl RecoveryState {
    /// Records why deserialization stopped; returns whether another attempt can get further.
    fn note(&mut self, error: ReadError) -> bool {
        let path = error.path.unwrap_or_default();
        if let ReadErrorReason::Missing(field) = error.reason {
            let missing = join(&path, field);
            if !self.left_out.contains(&missing) {
                self.mistakes.insert(missing.clone(), MISSING.to_owned());
            }
            return self.placeholders.insert(missing);
        }
        if self.placeholders.contains(&path) {
            // The type does not accept the placeholder: the value around the field is omitted.
            let around = path.rsplit_once('.').map_or("", |(around, _)| around);
            return !around.is_empty() && self.left_out.insert(around.to_owned());
        }
        self.mistakes.insert(path.clone(), error.reason.to_string());
        !path.is_empty() && self.left_out.insert(path)
    }
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

/// Why deserialization stopped.
#[derive(Debug)]
struct ReadError {
    /// The path of the value; none until it is known.
    path: Option<String>,
    reason: ReadErrorReason,
}

#[derive(Debug)]
enum ReadErrorReason {
    Missing(&'static str),
    Other(String),
}

impl fmt::Display for ReadErrorReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(field) => write!(f, "the field {field} is missing"),
            Self::Other(reason) => f.write_str(reason),
        }
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

impl std::error::Error for ReadError {}

impl ReadError {
    fn at(mut self, path: &str) -> Self {
        self.path.get_or_insert_with(|| path.to_owned());
        self
    }
}

impl de::Error for ReadError {
    fn custom<T: fmt::Display>(reason: T) -> Self {
        Self { path: None, reason: ReadErrorReason::Other(reason.to_string()) }
    }
    fn invalid_type(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::custom(format!(
            "invalid value {}: must be {}",
            shown(found),
            describe_expected(found, expected)
        ))
    }
    fn invalid_value(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(found, expected)
    }
    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::custom(format!("invalid value {variant:?}: must be one of {}", expected.join(", ")))
    }
    fn missing_field(field: &'static str) -> Self {
        Self { path: None, reason: ReadErrorReason::Missing(field) }
    }
}

/// A value as written in the file.
fn shown(found: de::Unexpected<'_>) -> String {
    match found {
        de::Unexpected::Str(text) => format!("{text:?}"),
        de::Unexpected::Bool(flag) => flag.to_string(),
        de::Unexpected::Unsigned(number) => number.to_string(),
        de::Unexpected::Signed(number) => number.to_string(),
        de::Unexpected::Float(number) => number.to_string(),
        de::Unexpected::Map => "{...}".to_owned(),
        de::Unexpected::Seq => "[...]".to_owned(),
        de::Unexpected::Unit => "null".to_owned(),
        other => other.to_string(),
    }
}

/// The text for what serde expects, without Rust type names.
fn describe_expected(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> String {
    let is_whole = matches!(found, de::Unexpected::Unsigned(_) | de::Unexpected::Signed(_));
    let number = |range: &str| match is_whole {
        true => range.to_owned(),
        false => format!("a whole number, {range}"),
    };
    match expected.to_string().as_str() {
        "u8" => number("0 to 255"),
        "u16" => number("0 to 65535"),
        "a nonzero u16" => number("1 to 65535"),
        "u32" => number("0 to 4294967295"),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a string" => "text".to_owned(),
        "a map" => "a map".to_owned(),
        text if text.starts_with("struct ") => "a map of fields".to_owned(),
        text if text.starts_with("enum ") => "text".to_owned(),
        text => text.to_owned(),
    }
}

/// A deserializer of one value and its path; without a node, of a placeholder.
struct NodeDeserializer<'a> {
    node: Option<&'a Located>,
    path: String,
    state: &'a RecoveryState,
}

impl<'a> NodeDeserializer<'a> {
    fn entries(
        self,
        fields: &'a YamlMap,
        known: Option<&'static [&'static str]>,
    ) -> impl Iterator<Item = (String, Self)> {
        let Self { path, state, .. } = self;
        let add = |path: String, reason: String| {
            state.non_fatal.borrow_mut().insert(path, reason);
        };
        for name in &fields.repeated {
            add(join(&path, name), "this field is repeated".to_owned());
        }
        let mut entries = Vec::new();
        for (name, node) in &fields.values {
            let child = match known {
                Some(_) => join(&path, name),
                None => format!("{path}[{name:?}]"),
            };
            match known {
                Some(known) if !known.contains(&name.as_str()) => {
                    let known = known.join(", ");
                    add(child, format!("unknown field {name:?}: must be one of {known}"));
                }
                _ if state.left_out.contains(&child) => {}
                _ => entries.push((name.clone(), Self { node: Some(node), path: child, state })),
            }
        }
        for name in known.unwrap_or_default() {
            let child = join(&path, name);
            if state.placeholders.contains(&child) {
                entries.push(((*name).to_owned(), Self { node: None, path: child, state }));
            }
        }
        entries.into_iter()
    }

    fn items(self, list: &'a [Located]) -> impl Iterator<Item = Self> {
        let Self { path, state, .. } = self;
        list.iter()
            .enumerate()
            .map(move |(index, node)| Self {
                node: Some(node),
                path: format!("{path}[{index}]"),
                state,
            })
            .filter(|item| !item.state.left_out.contains(&item.path))
    }

    fn scalar<'de, V: Visitor<'de>>(scalar: &Scalar, visitor: V) -> Result<V::Value, ReadError> {
        match scalar {
            Scalar::Null => visitor.visit_unit(),
            Scalar::Bool(flag) => visitor.visit_bool(*flag),
            Scalar::Whole(number) => match (u64::try_from(*number), i64::try_from(*number)) {
                (Ok(number), _) => visitor.visit_u64(number),
                (_, Ok(number)) => visitor.visit_i64(number),
                _ => visitor.visit_i128(*number),
            },
            Scalar::Real(number) => visitor.visit_f64(*number),
            Scalar::Text(text) => visitor.visit_str(text),
        }
    }
}

/// Calls `read`, and adds the path to its error.
fn with_path<'a, T>(
    at: NodeDeserializer<'a>,
    read: impl FnOnce(NodeDeserializer<'a>) -> Result<T, ReadError>,
) -> Result<T, ReadError> {
    let path = at.path.clone();
    read(at).map_err(|error| error.at(&path))
}

impl<'de> de::Deserializer<'de> for NodeDeserializer<'_> {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        with_path(self, |at| match at.node.map(Located::node) {
            None => visitor.visit_u64(1),
            Some(YamlNode::Map(fields)) => {
                visitor.visit_map(MapDeserializer::new(at.entries(fields, None)))
            }
            Some(YamlNode::List(list)) => visitor.visit_seq(SeqDeserializer::new(at.items(list))),
            Some(YamlNode::Scalar(scalar)) => NodeDeserializer::scalar(scalar, visitor),
        })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match self.node.map(Located::node) {
            Some(YamlNode::Map(map)) => with_path(self, |at| {
                visitor.visit_map(MapDeserializer::new(at.entries(map, Some(fields))))
            }),
            // serde would read the items as the fields in order.
            Some(YamlNode::List(_)) => with_path(self, |_| {
                Err(de::Error::invalid_type(de::Unexpected::Seq, &"a map of fields"))
            }),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        with_path(self, |at| {
            let text = match at.node.map(Located::node) {
                None => String::new(),
                Some(YamlNode::Scalar(Scalar::Text(text))) => text.clone(),
                Some(YamlNode::Scalar(Scalar::Bool(flag))) => flag.to_string(),
                Some(YamlNode::Scalar(Scalar::Whole(number))) => number.to_string(),
                Some(YamlNode::Scalar(Scalar::Real(number))) => format!("{number:?}"),
                Some(YamlNode::Scalar(Scalar::Null) | YamlNode::Map(_) | YamlNode::List(_)) => {
                    return at.deserialize_any(visitor);
                }
            };
            visitor.visit_str(&text).map_err(|mut error: ReadError| {
                if let ReadErrorReason::Other(reason) = &mut error.reason
                    && !reason.contains(&format!("{text:?}"))
                {
                    *reason = format!("invalid value {text:?}: {reason}");
                }
                error
            })
        })
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.node.map(Located::node) {
            Some(YamlNode::Scalar(Scalar::Null)) | None => visitor.visit_none(),
            Some(_) => visitor.visit_some(self),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.node.map(Located::node) {
            None => {
                visitor.visit_seq(SeqDeserializer::new(std::iter::empty::<NodeDeserializer<'_>>()))
            }
            Some(_) => self.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        with_path(self, |at| match at.node.map(Located::node) {
            Some(YamlNode::Scalar(Scalar::Text(text))) => {
                visitor.visit_enum(text.as_str().into_deserializer())
            }
            _ => at.deserialize_any(visitor),
        })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct
        newtype_struct tuple tuple_struct map identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, ReadError> for NodeDeserializer<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Fleet {
        name: String,
        ships: Vec<Ship>,
        #[serde(default)]
        harbours: BTreeMap<String, Harbour>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Ship {
        name: String,
        port: u16,
        #[serde(default)]
        kind: Kind,
        address: Option<std::net::IpAddr>,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        #[default]
        Small,
        Large,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Harbour {
        depth: u8,
        address: std::net::IpAddr,
    }

    fn of(text: &str) -> Recovered<Fleet> {
        recover(&Located::parse_with_repetitions(text).expect("YAML"))
    }

    #[test]
    fn every_error_is_reported_with_its_path() {
        let found = of("nmae: x\nships:\n- {name: a, port: x, kind: huge}\n- 7\n\
            - {port: 70000, port: 1, address: 10.0}\n- {name: d, port: 4, knid: 1, kind: large}\n\
            harbours: {one: {depth: 300, address: 1.1.1.1}, two: {depth: 1}, three: []}\n");
        let mut lines: Vec<String> =
            found.mistakes.iter().map(|(path, reason)| format!("{path}: {reason}")).collect();
        lines.sort();
        assert_eq!(
            lines,
            [
                "harbours[\"one\"].depth: invalid value 300: must be 0 to 255",
                "harbours[\"three\"]: invalid value [...]: must be a map of fields",
                "harbours[\"two\"].address: this field is missing",
                "name: this field is missing",
                "nmae: unknown field \"nmae\": must be one of name, ships, harbours",
                "ships[0].kind: invalid value \"huge\": must be one of small, large",
                "ships[0].port: invalid value \"x\": must be a whole number, 0 to 65535",
                "ships[1]: invalid value 7: must be a map of fields",
                "ships[2].address: invalid value \"10.0\": invalid IP address syntax",
                "ships[2].name: this field is missing",
                "ships[2].port: this field is repeated",
                "ships[3].knid: unknown field \"knid\": must be one of name, port, kind, address",
            ]
        );
        let fleet = found.value.as_ref().expect("the rest is valid");
        let names: Vec<&str> = fleet.ships.iter().map(|ship| ship.name.as_str()).collect();
        assert_eq!(names, ["a", "", "d"]);
        assert!(matches!(fleet.ships[2].kind, Kind::Large));
        assert_eq!(found.path_in_file("ships[1].name"), "ships[2].name");
        assert_eq!(found.path_in_file("ships[0].name"), "ships[0].name");
        assert!(found.is_omitted("ships[0].port") && !found.is_omitted("ships[0].name"));
        assert!(found.is_omitted("ships[1].port") && found.is_omitted("name"));
        assert!(found.is_incomplete("ships") && found.is_incomplete("ships[1]"));
        assert!(!found.is_incomplete("ship") && !found.is_incomplete("ships[0].name"));
    }

    #[test]
    fn file_without_errors_is_deserialized() {
        let found = of("{name: 7, ships: [{name: a, port: 1, address: \"::1\"}], \
            harbours: {one: {depth: 3, address: 127.0.0.1}}}");
        assert!(found.mistakes.is_empty(), "{:?}", found.mistakes);
        let fleet = found.value.expect("a valid file");
        assert_eq!((fleet.name.as_str(), fleet.ships[0].port), ("7", 1));
        assert!(fleet.ships[0].address.is_some());
        let harbour = fleet.harbours.get("one").expect("it is in the file");
        assert_eq!((harbour.depth, harbour.address.is_loopback()), (3, true));
    }

    #[test]
    fn file_with_a_list_at_its_root_has_one_error() {
        let found = of("[1, 2]");
        assert!(found.value.is_none());
        let expected = ("".to_owned(), "invalid value [...]: must be a map of fields".to_owned());
        assert_eq!(found.mistakes, [expected]);
    }
}
