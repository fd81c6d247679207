//! Normalizes the path of a request for routing, authorization and the service.

use std::borrow::Cow;

use weft_model::{AmbiguousPath, EscapedSlashes, PathRules};

use crate::denial::Denial;

const ENCODED_SLASH: Denial = Denial::Malformed("path contains an encoded slash");
const ENCODED_NUL: Denial = Denial::Malformed("path contains an encoded NUL");
const BACKSLASH: Denial = Denial::Malformed("path contains a backslash");

/// Normalizes the path of a target as `rules` require, and percent-encodes the characters in its query that RFC 3986
/// forbids. Borrows when nothing changes.
///
/// # Errors
/// When the path does not start with `/`, has a forbidden character, or is rejected by the rules.
pub(crate) fn normalized(target: &str, rules: PathRules) -> Result<Cow<'_, str>, Denial> {
    let (path, query) = match target.find('?') {
        Some(at) => target.split_at(at),
        None => (target, ""),
    };
    if !path.starts_with('/') {
        return Err(Denial::Malformed("path does not start with /"));
    }
    let allowed = |b: u8| (0x21..0x7f).contains(&b) && b != b'#';
    if !target.bytes().all(allowed) {
        return Err(Denial::Malformed("path contains an invalid character"));
    }
    let path = match rules.ambiguous {
        AmbiguousPath::Refuse if is_plain(path) => Cow::Borrowed(path),
        AmbiguousPath::Refuse => Cow::Owned(resolved(&decoded(path, rules)?, rules)?),
        AmbiguousPath::RouteAsSent | AmbiguousPath::RouteNormalized => as_configured(path, rules)?,
    };
    Ok(match (path, encoded_query(query)) {
        (Cow::Borrowed(_), Cow::Borrowed(_)) => Cow::Borrowed(target),
        (path, query) => Cow::Owned(path.into_owned() + &query),
    })
}

/// Percent-encodes characters such as `"<>^`, which RFC 3986 forbids although clients send them: services treat them
/// differently.
fn encoded<'t>(text: &'t str, forbidden: &[u8]) -> Cow<'t, str> {
    if !text.bytes().any(|byte| forbidden.contains(&byte)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for byte in text.bytes() {
        if forbidden.contains(&byte) {
            out.push('%');
            out.extend([byte >> 4, byte & 15].map(hexadecimal));
        } else {
            out.push(char::from(byte));
        }
    }
    Cow::Owned(out)
}

/// Percent-encodes the characters of a query that RFC 3986 forbids.
fn encoded_query(query: &str) -> Cow<'_, str> {
    encoded(query, b"\"<>\\^`{|}")
}

/// Normalizes the path as Envoy does with these settings: first escaped slashes, then dot segments and unnecessary
/// escapes, then empty segments. Everything else stays unchanged.
fn as_configured(path: &str, rules: PathRules) -> Result<Cow<'_, str>, Denial> {
    let has_escapes = path.contains('%');
    let has_backslash = path.contains('\\');
    if has_escapes && path.contains("%00") {
        return Err(ENCODED_NUL);
    }
    let mut path = Cow::Borrowed(path);
    if has_escapes && has_escaped_slash(&path) {
        match rules.escaped_slashes {
            EscapedSlashes::Reject => return Err(ENCODED_SLASH),
            EscapedSlashes::Unescape => path = Cow::Owned(with_decoded_slashes(&path)),
            EscapedSlashes::Keep | EscapedSlashes::Redirect => {}
        }
    }
    if has_backslash && !rules.normalize {
        return Err(BACKSLASH);
    }
    if rules.normalize {
        path = canonical(path);
    }
    if rules.merge_slashes && path.contains("//") {
        path = Cow::Owned(with_merged_slashes(&path));
    }
    Ok(path)
}

fn has_escaped_slash(path: &str) -> bool {
    path.as_bytes().windows(3).any(|escape| is_escaped(escape, b"2F") || is_escaped(escape, b"5C"))
}

fn is_escaped(escape: &[u8], digits: &[u8]) -> bool {
    matches!(escape, [b'%', rest @ ..] if rest.eq_ignore_ascii_case(digits))
}

/// Decodes escaped slashes and backslashes. A backslash becomes a slash, because some services treat it as one.
fn with_decoded_slashes(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        let (before, tail) = rest.split_at(at);
        out.push_str(before);
        let is_slash = tail.get(..3).is_some_and(has_escaped_slash);
        out.push(if is_slash { '/' } else { '%' });
        rest = tail.get(if is_slash { 3 } else { 1 }..).unwrap_or_default();
    }
    out + rest
}

/// Decodes unreserved characters, encodes those that RFC 3986 forbids, turns backslashes into slashes, and resolves dot
/// segments, where `..` at the root is ignored (RFC 3986, sections 5.2.4 and 6.2.2). Other escapes keep their letter
/// case.
fn canonical(path: Cow<'_, str>) -> Cow<'_, str> {
    const FORBIDDEN: &[u8] = b"\"<>^`{|}";
    if is_plain(&path) && !path.bytes().any(|byte| FORBIDDEN.contains(&byte)) {
        return path;
    }
    let path = encoded(&path, FORBIDDEN).replace('\\', "/");
    let mut decoded = String::with_capacity(path.len());
    let mut rest = &*path;
    while let Some(at) = rest.find('%') {
        let (before, tail) = rest.split_at(at);
        decoded.push_str(before);
        let escaped = match tail.as_bytes() {
            [b'%', high, low, ..] => digit(*high).zip(digit(*low)).map(|(h, l)| h * 16 + l),
            _ => None,
        };
        let unreserved = escaped.filter(|byte| is_unreserved(*byte));
        decoded.push(unreserved.map_or('%', char::from));
        rest = tail.get(if unreserved.is_some() { 3 } else { 1 }..).unwrap_or_default();
    }
    decoded.push_str(rest);
    Cow::Owned(without_dots(&decoded))
}

/// Resolves dot segments. Empty segments stay.
fn without_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment {
            ".." => drop(kept.pop()),
            "." => {}
            other => kept.push(other),
        }
        if is_last && matches!(segment, "." | "..") {
            kept.push("");
        }
    }
    format!("/{}", kept.join("/"))
}

/// Removes empty segments except a trailing one.
fn with_merged_slashes(path: &str) -> String {
    let kept: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let end = if path.ends_with('/') && !kept.is_empty() { "/" } else { "" };
    format!("/{}{end}", kept.join("/"))
}

/// Whether a path needs no normalization: it has no escape, no backslash, and no segment that is empty or begins with
/// `.` or `;`.
fn is_plain(path: &str) -> bool {
    let mut before = 0;
    path.bytes().all(|byte| {
        let is_plain = match byte {
            b'%' | b'\\' => false,
            b'/' | b'.' | b';' => before != b'/',
            _ => true,
        };
        before = byte;
        is_plain
    })
}

/// Decodes unreserved characters and converts other escapes to upper case (RFC 3986, section 6.2.2).
fn decoded(path: &str, rules: PathRules) -> Result<String, Denial> {
    let mut out = String::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [byte, following @ ..] = rest {
        rest = following;
        if *byte == b'\\' {
            return Err(BACKSLASH);
        }
        if *byte != b'%' {
            out.push(char::from(*byte));
            continue;
        }
        let escaped = match following {
            [high, low, following @ ..] => {
                rest = following;
                digit(*high).zip(digit(*low)).map(|(high, low)| high * 16 + low)
            }
            _ => None,
        };
        let Some(escaped) = escaped else {
            return Err(Denial::Malformed(
                "path contains a % that is not followed by two hexadecimal digits",
            ));
        };
        match (escaped, rules.escaped_slashes) {
            (0, _) => return Err(ENCODED_NUL),
            (b'/' | b'\\', EscapedSlashes::Reject) | (b'\\', EscapedSlashes::Unescape) => {
                return Err(ENCODED_SLASH);
            }
            (b'/', EscapedSlashes::Unescape) => out.push('/'),
            (unreserved, _) if is_unreserved(unreserved) => {
                if !rules.normalize {
                    return Err(Denial::Malformed("path contains an unnecessary percent-encoding"));
                }
                out.push(char::from(unreserved));
            }
            (other, _) => {
                out.push('%');
                out.extend([other >> 4, other & 15].map(hexadecimal));
            }
        }
    }
    Ok(out)
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

fn hexadecimal(digit: u8) -> char {
    char::from_digit(u32::from(digit), 16).unwrap_or('0').to_ascii_uppercase()
}

/// Whether RFC 3986, section 2.3, calls the character unreserved.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// Resolves dot segments (RFC 3986, section 5.2.4) and removes empty segments, or rejects them, as `rules` require.
fn resolved(path: &str, rules: PathRules) -> Result<String, Denial> {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment {
            "." | ".." if !rules.normalize => {
                return Err(Denial::Malformed("path contains a dot segment"));
            }
            "" if !is_last => {
                if !rules.merge_slashes {
                    return Err(Denial::Malformed("path contains an empty segment"));
                }
                continue;
            }
            ".." => {
                if kept.pop().is_none() {
                    return Err(Denial::Malformed("path leads above the root"));
                }
            }
            "." => {}
            other if has_parameter_dots(other) => {
                // Servlet containers remove `;...` before they resolve dot segments.
                return Err(Denial::Malformed(
                    "path contains a dot segment or empty segment with a parameter",
                ));
            }
            other => kept.push(other),
        }
        if is_last && rules.normalize && (segment == "." || segment == "..") {
            kept.push("");
        }
    }
    Ok(format!("/{}", kept.join("/")))
}

fn has_parameter_dots(segment: &str) -> bool {
    matches!(segment.split_once(';'), Some(("" | "." | "..", _)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFUSE: PathRules = PathRules {
        normalize: false,
        merge_slashes: false,
        escaped_slashes: EscapedSlashes::Reject,
        ambiguous: AmbiguousPath::Refuse,
    };
    const NORMALIZE: PathRules = PathRules { normalize: true, merge_slashes: true, ..REFUSE };

    #[test]
    fn path_is_normalized_or_rejected() {
        let check = |target: &str, strict: Option<&str>, normal: Option<&str>| {
            let of = |rules| normalized(target, rules).ok().map(Cow::into_owned);
            assert_eq!(of(REFUSE).as_deref(), strict, "{target} without normalization");
            assert_eq!(of(NORMALIZE).as_deref(), normal, "{target} normalized");
            if let Some(normal) = of(NORMALIZE) {
                assert_eq!(normalized(&normal, NORMALIZE).ok().as_deref(), Some(&*normal), "again");
                assert_eq!(normalized(&normal, REFUSE).ok().as_deref(), Some(&*normal), "strict");
            }
        };
        let both = |target: &str, form: Option<&str>| check(target, form, form);
        both("/", Some("/"));
        both("/a/b?x=/../%2e", Some("/a/b?x=/../%2e"));
        both("/a/", Some("/a/"));
        both("/.well-known/a.b", Some("/.well-known/a.b"));
        both("/...", Some("/..."));
        both("/a%20b", Some("/a%20b"));
        both("/a?{x|y}^`\\z", Some("/a?%7Bx%7Cy%7D%5E%60%5Cz"));
        both("/a?b=<\">", Some("/a?b=%3C%22%3E"));
        both("/{a}|^?x", Some("/{a}|^?x"));
        both("/a%c3%a9", Some("/a%C3%A9"));
        check("/a//b", None, Some("/a/b"));
        check("//a", None, Some("/a"));
        check("/a/./b", None, Some("/a/b"));
        check("/a/../b", None, Some("/b"));
        check("/a/..", None, Some("/"));
        check("/a/b/.", None, Some("/a/b/"));
        check("/a/%2e%2E/b", None, Some("/b"));
        check("/%61dmin", None, Some("/admin"));
        both("/..", None);
        both("/../a", None);
        both("/a/..;x/b", None);
        both("/a/.;/b", None);
        both("/;/a", None);
        both("/a/;x/b", None);
        both("/a;x/b", Some("/a;x/b"));
        both("/a%2fb", None);
        both("/a%5Cb", None);
        both("/a\\b", None);
        both("/a%00", None);
        both("/a%", None);
        both("/a%4", None);
        both("/a%zz", None);
        both("/a#b", None);
        both("/a b", None);
        both("/\u{e9}", None);
        both("a", None);
        both("", None);
        both("/a?b#c", None);
    }

    #[test]
    fn paths_are_unchanged_when_routed_as_sent() {
        let keep = PathRules::default();
        for path in [
            "/@babel%2fcore",
            "/group%2Fproject",
            "/vhosts/%2F/queues",
            "/bucket//key",
            "/%7Euser",
            "/%2E",
            "/%2e%2e/",
            "/100%",
            "/a/../b",
            "/a/..;/b",
            "/a%5cb",
            "/a%zz?x=%",
            "/{a}|^?x",
        ] {
            for ambiguous in [AmbiguousPath::RouteAsSent, AmbiguousPath::RouteNormalized] {
                let rules = PathRules { ambiguous, ..keep };
                assert_eq!(normalized(path, rules).ok().as_deref(), Some(path));
            }
        }
        for path in ["/a%00", "/a\\b", "a", "/a b", "/a#b"] {
            assert!(normalized(path, keep).is_err(), "{path}");
        }
    }

    #[test]
    fn paths_are_normalized_as_in_envoy_when_configured() {
        let check = |rules: PathRules, target: &str, expected: Option<&str>| {
            assert_eq!(normalized(target, rules).ok().as_deref(), expected, "{target} {rules:?}");
        };
        let keep = PathRules::default();
        let reject = PathRules { escaped_slashes: EscapedSlashes::Reject, ..keep };
        check(reject, "/a%2fb", None);
        check(reject, "/a%5Cb", None);
        check(reject, "/a//%7E", Some("/a//%7E"));
        let unescape = PathRules { escaped_slashes: EscapedSlashes::Unescape, ..keep };
        check(unescape, "/a%2fb%2F%5c%", Some("/a/b//%"));
        let resolve = PathRules { normalize: true, ..keep };
        check(resolve, "/a//./%7E%2fb%", Some("/a//~%2fb%"));
        check(resolve, "/../a", Some("/a"));
        check(resolve, "/%2e%2e/a/.%2E", Some("/"));
        check(resolve, "/a/b/.", Some("/a/b/"));
        check(resolve, "/a\\..\\b", Some("/b"));
        check(resolve, "/{a}%c3%a9", Some("/%7Ba%7D%c3%a9"));
        check(resolve, "/a?x=/../{", Some("/a?x=/../%7B"));
        let merge = PathRules { merge_slashes: true, ..keep };
        check(merge, "/a//./b", Some("/a/./b"));
        check(merge, "//a///", Some("/a/"));
        check(merge, "//", Some("/"));
        let both = PathRules { normalize: true, ..merge };
        check(both, "//a/..//b", Some("/b"));
    }

    #[test]
    fn encoded_slashes_are_handled_by_the_configured_action() {
        let check = |action: EscapedSlashes, target: &str, expected: Option<&str>| {
            let rules = PathRules { escaped_slashes: action, ..NORMALIZE };
            assert_eq!(normalized(target, rules).ok().as_deref(), expected, "{action:?} {target}");
        };
        check(EscapedSlashes::Keep, "/a%2fb", Some("/a%2Fb"));
        check(EscapedSlashes::Keep, "/a%5cb", Some("/a%5Cb"));
        check(EscapedSlashes::Unescape, "/a%2fb", Some("/a/b"));
        check(EscapedSlashes::Unescape, "/a%2f..%2Fb", Some("/b"));
        check(EscapedSlashes::Unescape, "/a%2f%2Fb", Some("/a/b"));
        check(EscapedSlashes::Unescape, "/a%5cb", None);
        check(EscapedSlashes::Reject, "/a%2fb", None);
    }
}
