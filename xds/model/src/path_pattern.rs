//! Path patterns of policies, and path templates (Envoy's `uri_template`).
//!
//! A pattern is compared with the normalized path without its query, case-sensitively:
//!
//! | pattern | matches |
//! |---|---|
//! | `/cart` | whole segments: `/cart` and `/cart/1`, not `/cartoon` |
//! | `{type: Exact, value: /cart}` | `/cart` alone |
//! | `/cart*` | every path that begins with `/cart` |
//! | `*.php` | every path that ends with `.php` |
//! | `*` | every path |
//! | `/items/{id}` | one non-empty segment in place of `{id}`, and nothing after it |
//! | `/items/**/x` | zero or more segments in place of `**` |

use crate::path::canonical;
use crate::{InvalidPathPattern, PathMatch, PathTemplate, Permission, StringMatch};

/// A path pattern of a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathPattern {
    /// Every path.
    Any,
    /// Whole segments, without a slash at the end: `/cart` covers `/cart` and `/cart/1`.
    Segments(String),
    /// The whole path.
    Exact(String),
    /// The beginning.
    Prefix(String),
    /// The end.
    Suffix(String),
    /// One of these templates.
    Templates(Vec<PathTemplate>),
}

impl PathPattern {
    /// Parses a pattern of `mesh.yaml`.
    ///
    /// # Errors
    /// When the text is not a valid pattern, or no normalized path can match it.
    pub fn parse(text: &str) -> Result<Self, InvalidPathPattern> {
        let invalid = |reason: &str| InvalidPathPattern { reason: reason.to_owned() };
        if text == "*" || text == "/*" {
            return Ok(Self::Any);
        }
        if text.contains(['{', '}']) || text.contains("**") {
            return templates(text);
        }
        let (pattern, literal) = match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(end), None) => (Self::Suffix(end.to_owned()), format!("/x{end}")),
            (None, Some(start)) => (Self::Prefix(start.to_owned()), format!("{start}x")),
            (Some(_), Some(_)) => {
                return Err(invalid(
                    "must have * at one end only; /** matches any number of segments",
                ));
            }
            (None, None) => (segments(text), text.to_owned()),
        };
        if text.trim_matches('*').contains('*') {
            return Err(invalid(
                "must have * first or last only; {name} matches one segment, ** any number",
            ));
        }
        check_literal(&literal, literal == text)?;
        Ok(pattern)
    }

    /// The pattern that matches one path only.
    ///
    /// # Errors
    /// When the text is not a normalized path.
    pub fn exact(text: &str) -> Result<Self, InvalidPathPattern> {
        check_literal(text, true)?;
        Ok(Self::Exact(text.to_owned()))
    }

    /// The pattern that matches a path and all paths below it.
    ///
    /// # Errors
    /// When no normalized path begins with the text.
    pub fn below(text: &str) -> Result<Self, InvalidPathPattern> {
        check_literal(text, true)?;
        Ok(segments(text))
    }

    /// Whether the pattern matches a normalized path.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        self.route_paths().iter().any(|one| one.matches(path))
    }

    /// A path that the pattern matches, below `like` where a wildcard allows it.
    #[must_use]
    pub fn example(&self, like: &str) -> String {
        let like = like.trim_end_matches('/');
        match self {
            Self::Any => format!("{like}/"),
            Self::Segments(text) | Self::Exact(text) | Self::Prefix(text) => text.clone(),
            Self::Suffix(text) if text.starts_with('/') => format!("{like}{text}"),
            Self::Suffix(text) => format!("{like}/x{text}"),
            Self::Templates(all) => all.first().map_or_else(String::new, |one| one.example(like)),
        }
    }

    /// The RBAC permission for the same paths (`Permission.url_path`, `Permission.uri_template`).
    #[must_use]
    pub fn permission(&self) -> Permission {
        let path =
            |form: fn(String) -> StringMatch, text: &str| Permission::Path(form(text.to_owned()));
        match self {
            Self::Any => Permission::Any,
            Self::Segments(text) => Permission::OneOf(vec![
                path(StringMatch::Exact, text),
                path(StringMatch::Prefix, &format!("{text}/")),
            ]),
            Self::Exact(text) => path(StringMatch::Exact, text),
            Self::Prefix(text) => path(StringMatch::Prefix, text),
            Self::Suffix(text) => path(StringMatch::Suffix, text),
            Self::Templates(all) => {
                Permission::OneOf(all.iter().cloned().map(Permission::PathTemplate).collect())
            }
        }
    }

    /// Route matches for the same paths: a path is matched when one of them matches.
    #[must_use]
    pub fn route_paths(&self) -> Vec<PathMatch> {
        match self {
            Self::Any => vec![PathMatch::Prefix("/".into())],
            Self::Segments(text) => vec![PathMatch::Segments(text.clone())],
            Self::Exact(text) => vec![PathMatch::Exact(text.clone())],
            Self::Prefix(text) => vec![PathMatch::Prefix(text.clone())],
            Self::Suffix(text) => {
                let whole = text.starts_with('/').then(|| PathMatch::Exact(text.clone()));
                let template = PathTemplate::ending_in(text);
                whole.into_iter().chain([PathMatch::Template(template)]).collect()
            }
            Self::Templates(all) => all.iter().cloned().map(PathMatch::Template).collect(),
        }
    }
}

fn segments(text: &str) -> PathPattern {
    match text.trim_end_matches('/') {
        "" => PathPattern::Any,
        bare => PathPattern::Segments(bare.to_owned()),
    }
}

/// Parses a pattern with `{name}` or `**`.
fn templates(text: &str) -> Result<PathPattern, InvalidPathPattern> {
    let invalid = |reason: &str| InvalidPathPattern { reason: reason.to_owned() };
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}', '*']) {
        let (before, here) = rest.split_at(at);
        plain.push_str(before);
        let braced = here.strip_prefix('{').and_then(|inside| inside.split_once('}'));
        if plain.ends_with('*') {
            return Err(invalid("must have one wildcard in a segment"));
        }
        rest = match (braced, here.strip_prefix("**")) {
            (Some((name, behind)), _) if is_variable(name) => {
                plain.push_str(if name == "**" { "**" } else { "*" });
                behind
            }
            (None, Some(behind)) => {
                plain.push_str("**");
                behind
            }
            (Some(_), _) => {
                return Err(invalid("must name a variable with letters, digits, _ - and . only"));
            }
            (None, None) if here.starts_with('*') => {
                return Err(invalid("must have {name} for one segment, ** for any number"));
            }
            (None, None) => return Err(invalid("must close each { with a }")),
        };
    }
    plain.push_str(rest);
    check_literal(&plain.replace("**", "x").replace('*', "x"), false)?;
    let template = PathTemplate::parse(&plain)?;
    // `**` also matches zero segments, which Envoy's `**` does not: that takes a second template.
    let mut all = vec![template];
    let around = plain
        .split_once("/**")
        .filter(|(_, behind)| matches!(behind.bytes().next(), None | Some(b'/')));
    if let Some((before, behind)) = around {
        match format!("{before}{behind}").as_str() {
            "" => return Ok(PathPattern::Any),
            without => all.push(PathTemplate::parse(without)?),
        }
    }
    Ok(PathPattern::Templates(all))
}

fn is_variable(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    name == "*" || name == "**" || (!name.is_empty() && name.bytes().all(allowed))
}

/// Checks that a normalized path can contain this text, in every reading of the path.
fn check_literal(text: &str, is_whole: bool) -> Result<(), InvalidPathPattern> {
    let invalid = |reason: String| Err(InvalidPathPattern { reason });
    if !text.starts_with('/') {
        return invalid("must start with /".into());
    }
    if text.contains(['?', '#']) {
        return invalid(
            "must have neither a query nor a fragment: paths are compared without them".into(),
        );
    }
    if text.contains(';') {
        return invalid(
            "must have no path parameter: services may remove ; and the text after it".into(),
        );
    }
    let upper = text.to_ascii_uppercase();
    if ["%2F", "%5C", "%00", "\\"].iter().any(|never| upper.contains(never)) {
        return invalid("must have / for an escaped slash or backslash, and no NUL".into());
    }
    let right = canonical(text);
    if right == text {
        return Ok(());
    }
    let reason = "can never match: paths are compared without dot segments, empty segments and needless escapes";
    if is_whole { invalid(format!("{reason}; write {right:?}")) } else { invalid(reason.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn example_of_a_pattern_matches_the_pattern() {
        let check = |text: &str, like: &str, expected: &str| {
            let pattern = PathPattern::parse(text).expect("a pattern");
            let example = pattern.example(like);
            assert_eq!(example, expected, "{text}");
            assert!(pattern.matches(&example), "{text} matches {example}");
        };
        check("/cart", "/v1", "/cart");
        check("/cart*", "/v1", "/cart");
        check("*", "/v1", "/v1/");
        check("*.php", "/v1/", "/v1/x.php");
        check("*/admin", "/v1", "/v1/admin");
        check("/{tenant}/admin", "/v1/b", "/v1/admin");
        check("/items/{id}", "/v1/b", "/items/b");
        check("/items/{id}.json", "/v1/b", "/items/x.json");
        check("/files/**", "/v1", "/files/x");
        check("/files/**", "/files/a", "/files/a/x");
        check("/**/admin", "/v1", "/v1/admin");
        check("/**.bak", "/v1", "/v1/x.bak");
    }
    use crate::test_request::TestRequest;

    #[test]
    fn patterns_match_the_paths_of_the_module_table() {
        let check = |pattern: &str, covered: &[&str], others: &[&str]| {
            let pattern = PathPattern::parse(pattern).expect(pattern);
            for path in covered {
                assert!(pattern.matches(path), "{pattern:?} matches {path}");
            }
            for path in others {
                assert!(!pattern.matches(path), "{pattern:?} does not match {path}");
            }
        };
        check("/cart", &["/cart", "/cart/", "/cart/1"], &["/", "/cartoon", "/Cart", "/x/cart"]);
        check("/cart/", &["/cart", "/cart/1"], &["/cartoon"]);
        check("/", &["/", "/x"], &[]);
        check("*", &["/", "/x"], &[]);
        check("/cart*", &["/cart", "/cartoon", "/cart/1"], &["/car", "/x/cart"]);
        check("/internal/*", &["/internal/", "/internal/x/y"], &["/internal", "/internals"]);
        check("*.php", &["/x.php", "/a/b.php"], &["/x.php/", "/x.php5", "/php"]);
        check("*/internal", &["/internal", "/a/internal"], &["/internal/x", "/ainternal"]);
        check("/items/{id}", &["/items/7"], &["/items", "/items/", "/items/7/", "/items/7/x"]);
        check("/items/{id}/price", &["/items/7/price"], &["/items/price", "/items/7/8/price"]);
        check("/i/{id}.json", &["/i/7.json"], &["/i/.json", "/i/7.xml", "/i/a/b.json"]);
        check("/a/**", &["/a", "/a/", "/a/b/c"], &["/ab", "/b/a"]);
        check("/a/**/z", &["/a/z", "/a/b/z", "/a/b/c/z"], &["/a", "/a/b", "/az", "/a/bz/"]);
        check("/**/z", &["/z", "/a/b/z"], &["/az", "/z/a"]);
        check("/**", &["/", "/a"], &[]);
        check("/a/**.ts", &["/a/b.ts", "/a/b/c.ts"], &["/a.ts", "/b.ts"]);
        check("/a/{*}/c/{**}", &["/a/b/c", "/a/b/c/d"], &["/a/c", "/a/b/d"]);
        check("/caf%C3%A9", &["/caf%C3%A9/x"], &["/cafe"]);
        check("/pkg.Service/*", &["/pkg.Service/Get"], &["/pkg.Service"]);
        let exact = PathPattern::exact("/a*b").expect("a path");
        assert!(exact.matches("/a*b") && !exact.matches("/axb") && !exact.matches("/a*b/"));
    }

    #[test]
    fn patterns_that_can_never_match_are_refused() {
        for (pattern, reason) in [
            ("", "must start with /"),
            ("internal", "must start with /"),
            ("{id}", "must start with /"),
            ("http://a/b", "must start with /"),
            ("/a/../b", "write \"/b\""),
            ("/a/./b", "write \"/a/b\""),
            ("/a/..", "can never match"),
            ("//a", "write \"/a\""),
            ("/a//b", "write \"/a/b\""),
            ("/%61dmin", "write \"/admin\""),
            ("/%7euser", "write \"/~user\""),
            ("/%40a", "write \"/@a\""),
            ("/a%c3%a9", "write \"/a%C3%A9\""),
            ("/caf\u{e9}", "write \"/caf%C3%A9\""),
            ("/a b", "write \"/a%20b\""),
            ("/100%", "write \"/100%25\""),
            ("/a%2Fb", "must have / for an escaped slash"),
            ("/a\\b", "must have / for an escaped slash"),
            ("/a?x=1", "neither a query"),
            ("/a#b", "neither a query"),
            ("/a;v=1", "no path parameter"),
            ("/a/*/b", "* first or last only"),
            ("/a*b", "* first or last only"),
            ("*a*", "* at one end only"),
            ("/items/{id", "must close each {"),
            ("/items/id}", "must close each {"),
            ("/items/{}", "must name a variable"),
            ("/items/{a b}", "must name a variable"),
            ("/items/{a{b}}", "must name a variable"),
            ("/items/{a}{b}", "one wildcard in a segment"),
            ("/items/{a}/*", "must have {name} for one segment"),
            ("/a/**/{id}", "** as its last wildcard"),
            ("/a/***", "one wildcard in a segment"),
            ("/a/b**", "** at the beginning of a segment"),
            ("**/a", "must start with /"),
            ("/a/../{id}", "can never match"),
            ("/a//**", "can never match"),
        ] {
            let found = PathPattern::parse(pattern).expect_err(pattern);
            assert!(found.reason.contains(reason), "{pattern}: {found}");
        }
    }

    #[test]
    fn policies_and_routes_match_the_same_paths() {
        use crate::{Principal, Rbac, RbacAction, RbacFilter, RbacPolicy};
        const PIECES: [&str; 9] = ["a", "b", "/", "/a", "/b", ".php", "1", "/a/b", "*"];
        let patterns = [
            "*",
            "/a",
            "/a/b",
            "/a*",
            "*b",
            "*/b",
            "/{x}",
            "/a/{x}",
            "/a/**",
            "/**/b",
            "/a/{x}.php",
            "/a/{x}/**/b",
            "/{x}/a",
        ];
        let mut paths: Vec<String> = vec!["/".into()];
        for _ in 0..3 {
            let longer = paths.iter().flat_map(|path| {
                PIECES.iter().map(move |piece| format!("{path}{piece}").replace("//", "/"))
            });
            paths = longer.collect();
        }
        for text in patterns {
            let pattern = PathPattern::parse(text).expect(text);
            let permissions = vec![pattern.permission()];
            let policy = RbacPolicy { permissions, principals: vec![Principal::Any] };
            let policies = [("p".into(), policy)].into_iter().collect();
            let rules = Some(Rbac { action: RbacAction::Allow, policies });
            let filter = RbacFilter { rules, shadow: None };
            for path in &paths {
                let allowed = !crate::evaluate_rbac(
                    [&filter],
                    &TestRequest { target: path.clone(), ..TestRequest::default() },
                )
                .enforced
                .refused;
                assert_eq!(allowed, pattern.matches(path), "{text} {path}");
            }
        }
    }
}
