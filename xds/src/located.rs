//! Where in a YAML or JSON file a field stands, so that every mistake can name its line.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// A file's fields with their lines.
#[derive(Debug, Deserialize)]
pub struct Located(Spanned<Node>);

#[derive(Debug)]
enum Node {
    Map(BTreeMap<String, Located>),
    List(Vec<Located>),
    Scalar,
}

impl Located {
    /// Reads a file; none when it is no YAML.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        serde_saphyr::from_str(text).ok()
    }

    /// The line of a field such as `services[0].ports[1].port`, counted from 1. A field that is not
    /// there has the line of the nearest one around it.
    #[must_use]
    pub fn line_of(&self, path: &str) -> u64 {
        let mut here = self;
        for segment in segments(path) {
            let next = match &here.0.value {
                Node::Map(map) => map.get(segment),
                Node::List(list) => segment.parse::<usize>().ok().and_then(|index| list.get(index)),
                Node::Scalar => None,
            };
            match next {
                Some(next) => here = next,
                None => break,
            }
        }
        here.0.referenced.line()
    }
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

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NodeVisitor;
        impl<'de> Visitor<'de> for NodeVisitor {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((key, value)) = access.next_entry()? {
                    map.insert(key, value);
                }
                Ok(Node::Map(map))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
                let mut list = Vec::new();
                while let Some(value) = access.next_element()? {
                    list.push(value);
                }
                Ok(Node::List(list))
            }
            fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
                Ok(Node::Scalar)
            }
            fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
                Ok(Node::Scalar)
            }
            fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
                Ok(Node::Scalar)
            }
            fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
                Ok(Node::Scalar)
            }
            fn visit_str<E>(self, _: &str) -> Result<Node, E> {
                Ok(Node::Scalar)
            }
            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Scalar)
            }
            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Scalar)
            }
        }
        deserializer.deserialize_any(NodeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_finds_its_line() {
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
