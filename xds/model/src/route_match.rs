//! Which requests a route or a rule matches: path, headers and query parameters
//! (`envoy.config.route.v3.RouteMatch`), with the results of Envoy 1.40.

use crate::{HeaderMatch, PathTemplate, Pattern, RequestFacts, StringMatch};

/// Which requests a route or rule matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteMatch {
    /// The path.
    pub path: PathMatch,
    /// Conditions on headers; all must be met.
    pub headers: Vec<HeaderMatch>,
    /// Conditions on query parameters; all must be met.
    pub query: Vec<QueryMatch>,
}

impl RouteMatch {
    /// A match for every request.
    #[must_use]
    pub fn any() -> Self {
        Self { path: PathMatch::Prefix("/".into()), headers: Vec::new(), query: Vec::new() }
    }

    /// Whether the request matches.
    #[must_use]
    pub fn covers(&self, facts: &dyn RequestFacts) -> bool {
        facts.path_fits(&mut |path| self.path.matches(path))
            && self.headers.iter().all(|header| header.matches(facts))
            && self.query.iter().all(|parameter| parameter.matches(facts))
    }
}

/// A condition on a query parameter (`QueryParameterMatcher`), with the results of Envoy 1.40: names and values are
/// compared as sent, with their escapes, and the first of several values is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryMatch {
    /// The name, as sent.
    pub name: String,
    /// The condition on the value.
    pub check: QueryCheck,
}

/// A condition on the value of a query parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QueryCheck {
    /// The parameter is present, with or without a value.
    Present,
    /// The parameter is missing (`present_match: false`).
    Absent,
    /// The parameter is present and its value matches; without `=`, the value is empty.
    Value(StringMatch),
}

impl QueryMatch {
    /// Whether the request meets the condition.
    #[must_use]
    pub fn matches(&self, facts: &dyn RequestFacts) -> bool {
        let value = facts.query(&self.name);
        match &self.check {
            QueryCheck::Present => value.is_some(),
            QueryCheck::Absent => value.is_none(),
            QueryCheck::Value(wanted) => value.is_some_and(|value| wanted.matches(value)),
        }
    }
}

/// The first value of a query parameter of a target, as sent; empty when it has no `=`.
#[must_use]
pub fn query_parameter<'t>(target: &'t str, name: &str) -> Option<&'t str> {
    let (_, query) = target.split_once('?')?;
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

/// A condition on the path without its query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    /// The beginning of the path, byte by byte (`prefix`).
    Prefix(String),
    /// The whole path (`path`).
    Exact(String),
    /// Whole segments: `/cart` matches `/cart` and `/cart/1`, not `/cartoon` (`path_separated_prefix`).
    Segments(String),
    /// One of the above, with ASCII letters compared case-insensitively (`case_sensitive: false`).
    IgnoreCase(Box<Self>),
    /// A regular expression for the whole path (`safe_regex`). Always case-sensitive, as in Envoy, which ignores
    /// `case_sensitive` here.
    Regex(Pattern),
    /// A path with wildcards (`path_match_policy` with `uri_template`).
    Template(PathTemplate),
    /// No path: the request is a `CONNECT` (`connect_matcher`).
    Connect,
}

impl PathMatch {
    /// Whether the path matches.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        self.covers(path, CaseSensitivity::Kept)
    }

    fn covers(&self, path: &str, case: CaseSensitivity) -> bool {
        match self {
            // `OPTIONS *` addresses the whole server; the route for every path matches it.
            Self::Prefix(want) | Self::Segments(want) if want == "/" && path == "*" => true,
            Self::Prefix(want) => case.without_prefix(path, want).is_some(),
            Self::Exact(want) => case.without_prefix(path, want).is_some_and(<[u8]>::is_empty),
            Self::Segments(want) => case
                .without_prefix(path, want.trim_end_matches('/'))
                .is_some_and(|rest| matches!(rest.first(), None | Some(b'/'))),
            Self::IgnoreCase(inner) => inner.covers(path, CaseSensitivity::Ignored),
            Self::Regex(pattern) => pattern.matches(path.as_bytes()),
            Self::Template(want) => want.matches(path),
            // Only a CONNECT request has no path.
            Self::Connect => path.is_empty(),
        }
    }

    /// The text with which every matching path begins.
    #[must_use]
    pub fn literal_prefix(&self) -> String {
        match self {
            Self::Prefix(want) | Self::Exact(want) => want.clone(),
            Self::Segments(want) => want.trim_end_matches('/').to_owned(),
            Self::Template(want) => want.literal_prefix(),
            Self::IgnoreCase(_) | Self::Regex(_) | Self::Connect => String::new(),
        }
    }

    /// Whether some path may match both. Also true where that cannot be decided.
    #[must_use]
    pub fn may_overlap(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Connect, _) | (_, Self::Connect) => self == other,
            (Self::Exact(path), other) | (other, Self::Exact(path)) => other.matches(path),
            _ => {
                let ours = self.literal_prefix();
                let theirs = other.literal_prefix();
                ours.starts_with(&theirs) || theirs.starts_with(&ours)
            }
        }
    }

    /// The length of the part of a matching path that a prefix rewrite replaces, in bytes.
    #[must_use]
    pub fn matched_bytes(&self, path: &str) -> usize {
        match self {
            Self::Prefix(want) | Self::Exact(want) => want.len(),
            Self::Segments(want) => want.trim_end_matches('/').len(),
            Self::IgnoreCase(inner) => inner.matched_bytes(path),
            Self::Regex(_) => path.len(),
            // Translation refuses a prefix rewrite with a template.
            Self::Template(_) | Self::Connect => 0,
        }
    }
}

/// Whether a text contains `?` or `#`, which end a path, so that no path can match it.
#[must_use]
pub fn has_query_or_fragment(path: &str) -> bool {
    path.contains(['?', '#'])
}

/// Whether a text may be a part of a URI: printable ASCII without spaces. A space or a line end would allow request
/// injection.
#[must_use]
pub fn is_uri_part(text: &str) -> bool {
    text.bytes().all(|byte| (0x21..0x7f).contains(&byte))
}

/// Whether ASCII letters are compared case-sensitively.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CaseSensitivity {
    Kept,
    Ignored,
}

impl CaseSensitivity {
    /// The text after the prefix; none when the text does not begin with it.
    fn without_prefix<'t>(self, text: &'t str, prefix: &str) -> Option<&'t [u8]> {
        let (start, rest) = text.as_bytes().split_at_checked(prefix.len())?;
        let is_there = match self {
            Self::Kept => start == prefix.as_bytes(),
            Self::Ignored => start.eq_ignore_ascii_case(prefix.as_bytes()),
        };
        is_there.then_some(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_request::TestRequest;

    #[test]
    fn segments_match_whole_segments_only() {
        let check = |prefix: &str, path: &str, expected: bool| {
            let covered = PathMatch::Segments(prefix.into()).matches(path);
            assert_eq!(covered, expected, "{prefix} {path}");
        };
        check("/cart", "/cart", true);
        check("/cart", "/cart/1", true);
        check("/cart", "/cartoon", false);
        check("/", "/anything", true);
        check("/cart/", "/cart/1", true);
        // The route for every path also matches `OPTIONS *`.
        check("/", "*", true);
        check("/cart", "*", false);
    }

    #[test]
    fn case_is_ignored_by_ignore_case() {
        let check = |path: PathMatch, covered: &[&str], others: &[&str]| {
            let path = PathMatch::IgnoreCase(path.into());
            for text in covered {
                assert!(path.matches(text), "{path:?} matches {text}");
            }
            for text in others {
                assert!(!path.matches(text), "{path:?} does not match {text}");
            }
        };
        check(PathMatch::Prefix("/Ab".into()), &["/ab", "/aBc"], &["/a", "/xab"]);
        check(PathMatch::Exact("/Ab".into()), &["/ab", "/AB"], &["/abc", "/a"]);
        check(PathMatch::Segments("/Ab".into()), &["/ab", "/AB/c"], &["/abc", "/a"]);
    }

    #[test]
    fn regular_expression_matches_the_whole_path() {
        let path = PathMatch::Regex(Pattern::parse("/a|/a/.*").expect("an expression"));
        assert!(path.matches("/a") && path.matches("/a/b"));
        assert!(!path.matches("/ab") && !path.matches("/x/a") && !path.matches("/A"));
        assert_eq!(path.matched_bytes("/a/b"), 4);
        assert!(path.may_overlap(&PathMatch::Exact("/a".into())));
        assert!(!path.may_overlap(&PathMatch::Exact("/b".into())));
        assert!(path.may_overlap(&PathMatch::Prefix("/b".into())));
    }

    #[test]
    fn first_value_of_a_query_parameter_is_compared_as_sent() {
        let text =
            |form: fn(String) -> StringMatch, text: &str| QueryCheck::Value(form(text.into()));
        let check = |check: QueryCheck, met: &[&str], others: &[&str]| {
            let parameter = QueryMatch { name: "q".into(), check };
            let meets = |target: &str| {
                parameter.matches(&TestRequest { target: target.into(), ..TestRequest::default() })
            };
            for target in met {
                assert!(meets(target), "{parameter:?} is met by {target}");
            }
            for target in others {
                assert!(!meets(target), "{parameter:?} is not met by {target}");
            }
        };
        let with = ["/?q", "/?q=", "/?q=1", "/?x&q=1", "/?&q", "/?q=%31"];
        let without = ["/", "/?", "/?Q=1", "/?%71=1", "/?x=q", "/??q=1", "/?a;q=1"];
        check(QueryCheck::Present, &with, &without);
        check(QueryCheck::Absent, &without, &with);
        let exact = text(StringMatch::Exact, "1");
        check(exact, &["/?q=1", "/?q=1&q=2"], &["/?q=2&q=1", "/?q=%31", "/?q=1/", "/?q&q=1"]);
        check(text(StringMatch::Exact, ""), &["/?q", "/?q=", "/?q&q=1"], &["/?q=1", "/"]);
    }
}
