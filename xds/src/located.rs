//! Parses YAML and JSON files with the line of each field, so that errors can name it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;

use serde::Deserialize;
use serde::de::{DeserializeOwned, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;
use serde_saphyr::options::DuplicateKeyPolicy;

/// A value of a file, with the lines of its fields.
#[derive(Debug, Deserialize)]
pub struct Located(Spanned<YamlNode>);

/// A value of a file.
#[derive(Debug)]
pub(crate) enum YamlNode {
    Map(YamlMap),
    List(Vec<Located>),
    Scalar(Scalar),
}

/// The fields of a map.
#[derive(Debug, Default)]
pub(crate) struct YamlMap {
    pub(crate) values: BTreeMap<String, Located>,
    /// The names of repeated fields; the last value is used.
    pub(crate) repeated: Vec<String>,
}

impl Deref for YamlMap {
    type Target = BTreeMap<String, Located>;

    fn deref(&self) -> &Self::Target {
        &self.values
    }
}

/// A value that is neither a map nor a list.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Scalar {
    Null,
    Bool(bool),
    Whole(i128),
    Real(f64),
    Text(String),
}

/// An error in a configuration file, with its line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The line, from 1; 0 when the text contains it.
    pub line: u64,
    /// The field and the reason.
    pub text: String,
}

impl ConfigError {
    /// The error with its file, as `FILE:LINE: FIELD: REASON`.
    #[must_use]
    pub fn in_file(&self, file: impl fmt::Display) -> String {
        match self.line {
            0 => format!("{file}: {}", self.text),
            line => format!("{file}:{line}: {}", self.text),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}: {}", self.line, self.text)
        } else {
            f.write_str(&self.text)
        }
    }
}

/// The most values of a file, and the most bytes of text in them: enough for 100,000 services.
const NODE_LIMIT: usize = 10_000_000;
const SCALAR_LIMIT_BYTES: usize = 256 * 1024 * 1024;

/// Deserializes a YAML or JSON file. The lines of fields are not kept, but an error of serde has its line.
///
/// # Errors
/// When the text is not YAML, exceeds the size limits, or does not fit the type.
pub fn read<T: DeserializeOwned>(text: &str) -> Result<T, ConfigError> {
    serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
        let line = error.location().map_or(0, |location| location.line());
        ConfigError { line, text: error.without_snippet().to_string() }
    })
}

fn options() -> serde_saphyr::Options {
    // The file is trusted, and 10,000 services have more nodes than the library's default limit.
    let budget = serde_saphyr::budget! {
        max_nodes: NODE_LIMIT,
        max_events: 2 * NODE_LIMIT,
        max_total_scalar_bytes: SCALAR_LIMIT_BYTES,
    };
    // Errors must not show lines of the file: they may contain a private key.
    serde_saphyr::options! { budget: budget, with_snippet: false }
}

impl Located {
    /// Parses a YAML or JSON file.
    ///
    /// # Errors
    /// When the text is not YAML, or exceeds the size limits. The message has line and column.
    pub fn parse(text: &str) -> Result<Self, String> {
        serde_saphyr::from_str_with_options(text, options()).map_err(|error| error.to_string())
    }

    /// Parses a file that may have repeated fields, to find its other errors: the last value of a field is used.
    ///
    /// # Errors
    /// Those of [`Self::parse`].
    pub fn parse_with_repetitions(text: &str) -> Result<Self, String> {
        let mut options = options();
        options.duplicate_keys = DuplicateKeyPolicy::PassThrough;
        serde_saphyr::from_str_with_options(text, options).map_err(|error| error.to_string())
    }

    /// The value at the root.
    pub(crate) fn node(&self) -> &YamlNode {
        &self.0.value
    }

    /// The text of `field` in each item of the root's list `list`; none for an item without such a text. A number is
    /// returned as text.
    #[must_use]
    pub fn texts_of(&self, list: &str, field: &str) -> Vec<Option<String>> {
        let YamlNode::Map(root) = self.node() else { return Vec::new() };
        let Some(YamlNode::List(items)) = root.get(list).map(Self::node) else { return Vec::new() };
        let text = |item: &Self| match item.node() {
            YamlNode::Map(fields) => match fields.get(field)?.node() {
                YamlNode::Scalar(Scalar::Text(text)) => Some(text.clone()),
                YamlNode::Scalar(Scalar::Whole(number)) => Some(number.to_string()),
                _ => None,
            },
            YamlNode::List(_) | YamlNode::Scalar(_) => None,
        };
        items.iter().map(text).collect()
    }

    /// The line, from 1, of a field such as `services[0].ports[1].port`. A missing field has the line of the nearest
    /// field around it.
    #[must_use]
    pub fn line_of(&self, path: &str) -> u64 {
        let mut here = self;
        for segment in segments(path) {
            let next = match &here.0.value {
                YamlNode::Map(map) => map.get(segment).or_else(|| map.get(&camel_case(segment))),
                YamlNode::List(list) => {
                    segment.parse::<usize>().ok().and_then(|index| list.get(index))
                }
                YamlNode::Scalar(_) => None,
            };
            match next {
                Some(next) => here = next,
                None => break,
            }
        }
        here.0.referenced.line()
    }
}

/// The lowerCamelCase spelling of a field, which protobuf's JSON form also accepts.
fn camel_case(name: &str) -> String {
    let mut words = name.split('_');
    let mut camel = words.next().unwrap_or_default().to_owned();
    for word in words {
        let mut letters = word.chars();
        camel.extend(letters.next().map(|first| first.to_ascii_uppercase()));
        camel.push_str(letters.as_str());
    }
    camel
}

/// `a.b[0]["c.d"].e` as `a`, `b`, `0`, `c.d`, `e`.
fn segments(path: &str) -> Vec<&str> {
    let mut segments = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(quoted) = rest.strip_prefix("[\"") {
            let (segment, after) = quoted.split_once("\"]").unwrap_or((quoted, ""));
            segments.push(segment);
            rest = after;
        } else if let Some(index) = rest.strip_prefix('[') {
            let (segment, after) = index.split_once(']').unwrap_or((index, ""));
            segments.push(segment);
            rest = after;
        } else {
            rest = rest.strip_prefix('.').unwrap_or(rest);
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            let (segment, after) = rest.split_at(end);
            segments.push(segment);
            rest = after;
        }
    }
    segments
}

impl<'de> Deserialize<'de> for YamlNode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct YamlNodeVisitor;
        impl<'de> Visitor<'de> for YamlNodeVisitor {
            type Value = YamlNode;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<YamlNode, A::Error> {
                let mut fields = YamlMap::default();
                while let Some((key, value)) = access.next_entry::<String, Located>()? {
                    let former = fields.values.insert(key.clone(), value);
                    fields.repeated.extend(former.map(|_| key));
                }
                Ok(YamlNode::Map(fields))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<YamlNode, A::Error> {
                let mut list = Vec::new();
                while let Some(value) = access.next_element()? {
                    list.push(value);
                }
                Ok(YamlNode::List(list))
            }
            fn visit_bool<E>(self, flag: bool) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Scalar::Bool(flag)))
            }
            fn visit_i64<E>(self, number: i64) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Scalar::Whole(number.into())))
            }
            fn visit_u64<E>(self, number: u64) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Scalar::Whole(number.into())))
            }
            fn visit_i128<E>(self, number: i128) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Scalar::Whole(number)))
            }
            fn visit_f64<E>(self, number: f64) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Scalar::Real(number)))
            }
            fn visit_str<E>(self, text: &str) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Scalar::Text(text.to_owned())))
            }
            fn visit_unit<E>(self) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Scalar::Null))
            }
            fn visit_none<E>(self) -> Result<YamlNode, E> {
                Ok(YamlNode::Scalar(Scalar::Null))
            }
        }
        deserializer.deserialize_any(YamlNodeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_of_300000_values_is_read() {
        let text = "- 1\n".repeat(300_000);
        let values: Vec<u8> = read(&text).expect("within the limits");
        assert_eq!(values.len(), 300_000);
    }

    #[test]
    fn texts_of_returns_the_field_of_each_list_item() {
        let text = "a: [{b: one}, {c: two}, {b: [x]}, {b: 3}, four]\nd: {b: five}\n";
        let located = Located::parse(text).expect("YAML");
        let texts = [Some("one".into()), None, None, Some("3".into()), None];
        assert_eq!(located.texts_of("a", "b"), texts);
        assert!(located.texts_of("d", "b").is_empty() && located.texts_of("e", "b").is_empty());
    }

    #[test]
    fn line_of_a_path_is_found() {
        let text = "a:\n  - b: 1\n    c:\n      x.y: 2\n  - b: 3\n";
        let located = Located::parse(text).expect("YAML");
        let check = |path: &str, line| assert_eq!(located.line_of(path), line, "{path}");
        check("a[0].b", 2);
        check("a[0].c[\"x.y\"]", 4);
        check("a[1].b", 5);
        check("a[1].missing", 5);
        check("", 1);
    }
}
