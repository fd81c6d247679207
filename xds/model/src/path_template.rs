//! Path templates: paths with wildcards in Envoy's syntax.

use std::fmt;

/// A path with wildcards (`envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig`).
///
/// Supported: `*` or `{name}` for a segment or a part of it, at most one in each segment; and one `**` at the beginning
/// of a segment for any characters, with no wildcard after it. Envoy's wildcards match only the characters that
/// RFC 3986 allows in a segment, without `*`; these match all characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathTemplate {
    /// The segments before `**`; all of them where there is no `**`.
    front: Vec<Segment>,
    /// The end of the path, after `**`.
    tail: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Variable { before: String, after: String },
}

impl Segment {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Literal(want) => text == want,
            Self::Variable { before, after } => {
                text.len() > before.len() + after.len()
                    && text.starts_with(before.as_str())
                    && text.ends_with(after.as_str())
                    && !text.contains('/')
            }
        }
    }

    fn example(&self) -> String {
        match self {
            Self::Literal(text) => text.clone(),
            Self::Variable { before, after } => format!("{before}x{after}"),
        }
    }

    fn parse(text: &str) -> Result<Self, InvalidPathPattern> {
        let invalid = |reason: &str| InvalidPathPattern { reason: reason.to_owned() };
        let Some(at) = text.find(['*', '{', '}']) else {
            return Ok(Self::Literal(text.to_owned()));
        };
        let (before, here) = text.split_at(at);
        let after = match here.strip_prefix('*') {
            Some(after) => after,
            None => {
                let inside = here.strip_prefix('{').and_then(|inside| inside.split_once('}'));
                let (name, after) = inside.ok_or_else(|| invalid("must close each { with a }"))?;
                let name = name.strip_suffix("=*").unwrap_or(name);
                if name.is_empty() || name.contains(['*', '{', '=']) {
                    return Err(invalid("must have {name} or {name=*} for a variable"));
                }
                after
            }
        };
        if after.contains(['*', '{', '}']) {
            return Err(invalid("must have one wildcard in a segment"));
        }
        Ok(Self::Variable { before: before.to_owned(), after: after.to_owned() })
    }
}

impl PathTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// When it does not start with `/`, or has an unsupported wildcard.
    pub fn parse(text: &str) -> Result<Self, InvalidPathPattern> {
        let invalid = |reason: &str| InvalidPathPattern { reason: reason.to_owned() };
        let Some(inside) = text.strip_prefix('/') else {
            return Err(invalid("must start with /"));
        };
        let named = inside.find('{').filter(|_| inside.contains("=**}"));
        if named.is_some() {
            return Err(invalid("must have ** instead of a variable for several segments"));
        }
        let (front, tail) = match inside.split_once("**") {
            Some((_, tail)) if tail.contains(['*', '{', '}']) => {
                return Err(invalid("must have ** as its last wildcard"));
            }
            Some((front, _)) if !front.is_empty() && !front.ends_with('/') => {
                return Err(invalid("must have ** at the beginning of a segment"));
            }
            Some((front, tail)) => (front.strip_suffix('/'), Some(tail.to_owned())),
            None => (Some(inside), None),
        };
        let front = front.map(|front| front.split('/').map(Segment::parse).collect());
        Ok(Self { front: front.unwrap_or(Ok(Vec::new()))?, tail })
    }

    /// The template of all paths that end in `tail`.
    pub(crate) fn ending_in(tail: &str) -> Self {
        Self { front: Vec::new(), tail: Some(tail.to_owned()) }
    }

    /// Whether the template matches a path.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        let Some(mut rest) = path.strip_prefix('/') else {
            return false;
        };
        let mut front = self.front.iter().peekable();
        while let Some(segment) = front.next() {
            if front.peek().is_none() && self.tail.is_none() {
                return segment.matches(rest);
            }
            match rest.split_once('/') {
                Some((first, behind)) if segment.matches(first) => rest = behind,
                _ => return false,
            }
        }
        self.tail.as_ref().is_some_and(|tail| rest.ends_with(tail.as_str()))
    }

    /// A path that the template matches, with the segments of `like` in place of wildcards where they fit.
    pub(crate) fn example(&self, like: &str) -> String {
        let mut rest = like.split('/').skip(1);
        let mut path = String::new();
        for segment in &self.front {
            let given = rest.next().filter(|given| segment.matches(given));
            path.push('/');
            path.push_str(&given.map_or_else(|| segment.example(), str::to_owned));
        }
        let Some(tail) = &self.tail else { return path };
        for given in rest {
            path.push('/');
            path.push_str(given);
        }
        let tail = tail.strip_prefix('/').unwrap_or(tail);
        if tail.is_empty() || tail.starts_with('.') {
            path.push_str("/x");
        } else {
            path.push('/');
        }
        path + tail
    }

    /// The text with which every matching path begins.
    #[must_use]
    pub fn literal_prefix(&self) -> String {
        let mut prefix = String::new();
        for segment in &self.front {
            prefix.push('/');
            match segment {
                Segment::Literal(text) => prefix.push_str(text),
                Segment::Variable { before, .. } => {
                    prefix.push_str(before);
                    return prefix;
                }
            }
        }
        if self.tail.is_some() {
            prefix.push('/');
        }
        prefix
    }
}

impl fmt::Display for PathTemplate {
    /// In Envoy's syntax, with `*` for every variable.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in &self.front {
            match segment {
                Segment::Literal(text) => write!(f, "/{text}")?,
                Segment::Variable { before, after } => write!(f, "/{before}*{after}")?,
            }
        }
        match &self.tail {
            Some(tail) => write!(f, "/**{tail}"),
            None => Ok(()),
        }
    }
}

/// The reason why a text is not a valid path pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidPathPattern {
    /// What it must be, or why it can never match.
    pub reason: String,
}

impl fmt::Display for InvalidPathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for InvalidPathPattern {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_is_written_in_envoy_syntax() {
        let check = |text: &str, written: &str| {
            let template = PathTemplate::parse(text).expect(text);
            assert_eq!(template.to_string(), written);
            assert_eq!(PathTemplate::parse(written), Ok(template), "{text}");
        };
        check("/a/{id}/b", "/a/*/b");
        check("/a/{id=*}.json", "/a/*.json");
        check("/a/**", "/a/**");
        check("/**.m3u8", "/**.m3u8");
        check("/a/*/**/x", "/a/*/**/x");
        for text in ["a", "/{a=**}", "/{a=b/*}", "/{}", "/***", "/**/*", "/a{b"] {
            assert!(PathTemplate::parse(text).is_err(), "{text}");
        }
    }
}
