//! Prefix rewrites of routes, by the rules of the Gateway API.
//!
//! Envoy's `prefix_rewrite` concatenates the replacement and the rest of the path. The Gateway API replaces whole
//! segments: a slash at the end of the prefix or of the replacement does not count. The rewrites that this module gives
//! have the same result in Envoy and in weft's own sidecars.

use weft_model::{PathMatch, PathRewrite, Pattern, Substitution};

/// The rewrite for `ReplacePrefixMatch` with this replacement in a route that matches this path (`HTTPPathModifier` in
/// `gateway.networking.k8s.io/v1`). An empty replacement counts as `/`. None where the path stays unchanged.
#[must_use]
pub fn prefix_rewrite(matched: &PathMatch, replacement: &str) -> Option<PathRewrite> {
    let segments = replacement.trim_end_matches('/');
    match matched {
        PathMatch::Segments(prefix) if segments.is_empty() => {
            Some(PathRewrite::Regex(strip_prefix(prefix.trim_end_matches('/'))?.into()))
        }
        PathMatch::Segments(_) => Some(PathRewrite::Prefix(segments.to_owned())),
        // The slash that begins the path is the part that the route matched.
        PathMatch::Prefix(prefix) if prefix == "/" && segments.is_empty() => None,
        PathMatch::Prefix(prefix) if prefix == "/" => {
            Some(PathRewrite::Prefix(format!("{segments}/")))
        }
        // An exact match has no rest to append.
        _ if replacement.is_empty() => Some(PathRewrite::Prefix("/".to_owned())),
        _ => Some(PathRewrite::Prefix(replacement.to_owned())),
    }
}

/// A substitution that replaces the prefix and the slashes after it by `/`. `prefix_rewrite: /` would turn `/v1/x` into
/// `//x` in Envoy, which some services read as the host `x`.
fn strip_prefix(prefix: &str) -> Option<Substitution> {
    let mut source = "^".to_owned();
    for character in prefix.chars() {
        if r"\.+*?()|[]{}^$".contains(character) {
            source.push('\\');
        }
        source.push(character);
    }
    source.push_str("/*");
    Substitution::parse(Pattern::parse(&source).ok()?, "/").ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_rewrites_follow_the_table_of_the_gateway_api() {
        let check = |target: &str, prefix: &str, replacement: &str, expected: &str| {
            let matched = PathMatch::Segments(prefix.into());
            let rewrite = prefix_rewrite(&matched, replacement).expect("a rewrite");
            let rewritten = rewrite.target(&matched, target, None);
            assert_eq!(rewritten.as_deref(), Some(expected), "{target} {prefix} {replacement}");
        };
        check("/foo/bar", "/foo", "/xyz", "/xyz/bar");
        check("/foo/bar", "/foo", "/xyz/", "/xyz/bar");
        check("/foo/bar", "/foo/", "/xyz", "/xyz/bar");
        check("/foo/bar", "/foo/", "/xyz/", "/xyz/bar");
        check("/foo", "/foo", "/xyz", "/xyz");
        check("/foo/", "/foo", "/xyz", "/xyz/");
        check("/foo/bar", "/foo", "", "/bar");
        check("/foo/", "/foo", "", "/");
        check("/foo", "/foo", "", "/");
        check("/foo/", "/foo", "/", "/");
        check("/foo", "/foo", "/", "/");
        // Not in the table: queries, empty segments, and characters that have a meaning in expressions.
        check("/foo?q=/foo", "/foo", "/", "/?q=/foo");
        check("/foo//bar", "/foo", "/", "/bar");
        check("/f.o(o)/bar", "/f.o(o)", "/", "/bar");
        check("/ä/bar", "/ä", "/", "/bar");
    }

    #[test]
    fn rewrite_of_every_path_prepends_the_replacement() {
        let every = PathMatch::Prefix("/".into());
        assert_eq!(prefix_rewrite(&every, "/"), None);
        assert_eq!(prefix_rewrite(&every, ""), None);
        for replacement in ["/api", "/api/"] {
            let rewrite = prefix_rewrite(&every, replacement).expect("a rewrite");
            assert_eq!(rewrite, PathRewrite::Prefix("/api/".into()));
            assert_eq!(rewrite.target(&every, "/x?q", None).as_deref(), Some("/api/x?q"));
            assert_eq!(rewrite.target(&every, "/", None).as_deref(), Some("/api/"));
        }
    }

    #[test]
    fn rewrite_of_an_exact_path_is_the_whole_replacement() {
        let exact = PathMatch::Exact("/foo".into());
        for (replacement, expected) in [("/xyz", "/xyz"), ("/xyz/", "/xyz/"), ("", "/")] {
            let rewrite = prefix_rewrite(&exact, replacement).expect("a rewrite");
            assert_eq!(rewrite.target(&exact, "/foo?q", None), Some(format!("{expected}?q")));
        }
    }
}
