//! The one form of a path that routing, authorization and the service all see.

use std::borrow::Cow;

use weft_model::{EscapedSlashes, PathRules};

use crate::denial::Denial;

/// The target with its path in the form that `rules` ask for; as it was when it is in that form. Of
/// the query, only what no query may have is encoded.
///
/// # Errors
/// When the path could be read in more than one way and the rules do not say which.
pub(crate) fn normalized(target: &str, rules: PathRules) -> Result<Cow<'_, str>, Denial> {
    let (path, query) = match target.find('?') {
        Some(at) => target.split_at(at),
        None => (target, ""),
    };
    if !path.starts_with('/') {
        return Err(Denial::Malformed("the path does not start with /"));
    }
    let allowed = |b: u8| (0x21..0x7f).contains(&b) && b != b'#';
    if !target.bytes().all(allowed) {
        return Err(Denial::Malformed("the path has a character that no path may have"));
    }
    let query = encoded_query(query);
    let with_path_as_is = || match &query {
        Cow::Borrowed(_) => Cow::Borrowed(target),
        Cow::Owned(query) => Cow::Owned(path.to_owned() + query),
    };
    if is_plain(path) {
        return Ok(with_path_as_is());
    }
    if rules.as_sent && !rules.normalize && !rules.merge_slashes {
        check_as_sent(path, rules)?;
        return Ok(with_path_as_is());
    }
    let decoded = decoded(path, rules)?;
    let path = resolved(&decoded, rules)?;
    Ok(Cow::Owned(path + &query))
}

/// The query with what RFC 3986 forbids in one encoded, though clients send it: services differ in what they
/// make of it.
fn encoded_query(query: &str) -> Cow<'_, str> {
    const FORBIDDEN: &[u8] = b"\"<>\\^`{|}";
    if !query.bytes().any(|byte| FORBIDDEN.contains(&byte)) {
        return Cow::Borrowed(query);
    }
    let mut out = String::with_capacity(query.len() + 16);
    for byte in query.bytes() {
        if FORBIDDEN.contains(&byte) {
            out.push('%');
            out.extend([byte >> 4, byte & 15].map(hexadecimal));
        } else {
            out.push(char::from(byte));
        }
    }
    Cow::Owned(out)
}

/// Refuses what no service must get: a NUL, a backslash, and escaped slashes where they are refused.
fn check_as_sent(path: &str, rules: PathRules) -> Result<(), Denial> {
    let upper = path.to_ascii_uppercase();
    if path.contains('\\') {
        return Err(Denial::Malformed("the path has a backslash"));
    }
    if upper.contains("%00") {
        return Err(Denial::Malformed("the path has an encoded NUL"));
    }
    let is_escaped = upper.contains("%2F") || upper.contains("%5C");
    if is_escaped && rules.escaped_slashes == EscapedSlashes::Reject {
        return Err(Denial::Malformed("the path has an encoded slash"));
    }
    Ok(())
}

/// Whether nothing about a path needs a second look: no escape, no empty or dotted segment.
fn is_plain(path: &str) -> bool {
    let mut before = 0;
    path.bytes().all(|byte| {
        let fine = match byte {
            b'%' | b'\\' => false,
            b'/' | b'.' | b';' => before != b'/',
            _ => true,
        };
        before = byte;
        fine
    })
}

/// Decodes what is unreserved, and writes every other escape in upper case (RFC 3986, section 6.2.2).
fn decoded(path: &str, rules: PathRules) -> Result<String, Denial> {
    let mut out = String::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [byte, behind @ ..] = rest {
        rest = behind;
        if *byte == b'\\' {
            return Err(Denial::Malformed("the path has a backslash"));
        }
        if *byte != b'%' {
            out.push(char::from(*byte));
            continue;
        }
        let escaped = match behind {
            [high, low, behind @ ..] => {
                rest = behind;
                digit(*high).zip(digit(*low)).map(|(high, low)| high * 16 + low)
            }
            _ => None,
        };
        let Some(escaped) = escaped else {
            if !rules.as_sent {
                return Err(Denial::Malformed("the path has a % without two digits behind it"));
            }
            rest = behind;
            out.push('%');
            continue;
        };
        match (escaped, rules.escaped_slashes) {
            (0, _) => return Err(Denial::Malformed("the path has an encoded NUL")),
            (b'/' | b'\\', EscapedSlashes::Reject) | (b'\\', EscapedSlashes::Unescape) => {
                return Err(Denial::Malformed("the path has an encoded slash"));
            }
            (b'/', EscapedSlashes::Unescape) => out.push('/'),
            (unreserved, _) if is_unreserved(unreserved) => {
                if !rules.normalize && !rules.as_sent {
                    return Err(Denial::Malformed(
                        "the path has an encoded character that needs no encoding",
                    ));
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

/// RFC 3986, section 2.3.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// Resolves dot segments (RFC 3986, section 5.2.4) and removes empty ones, or refuses them.
fn resolved(path: &str, rules: PathRules) -> Result<String, Denial> {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment {
            "." | ".." if !rules.normalize && rules.as_sent => kept.push(segment),
            "." | ".." if !rules.normalize => {
                return Err(Denial::Malformed("the path has a dot segment"));
            }
            "" if !is_last && !rules.merge_slashes && rules.as_sent => kept.push(segment),
            "" if !is_last => {
                if !rules.merge_slashes {
                    return Err(Denial::Malformed("the path has an empty segment"));
                }
                continue;
            }
            ".." => {
                if kept.pop().is_none() {
                    return Err(Denial::Malformed("the path leads above the root"));
                }
            }
            "." => {}
            other if has_parameter_dots(other) && !rules.as_sent => {
                // Servlet containers cut `;...` off before they look for dots.
                return Err(Denial::Malformed(
                    "the path has a dot or empty segment with a parameter",
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
        as_sent: false,
    };
    const NORMALIZE: PathRules = PathRules { normalize: true, merge_slashes: true, ..REFUSE };

    #[test]
    fn a_path_has_one_form_or_is_refused() {
        let check = |target: &str, strict: Option<&str>, normal: Option<&str>| {
            let of = |rules| normalized(target, rules).ok().map(Cow::into_owned);
            assert_eq!(of(REFUSE).as_deref(), strict, "{target} as it is");
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
        both("/.well-known/a.b", None.or(Some("/.well-known/a.b")));
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
    fn paths_reach_the_service_as_sent_where_that_is_set() {
        let keep = PathRules { as_sent: true, escaped_slashes: EscapedSlashes::Keep, ..REFUSE };
        for path in [
            "/@babel%2fcore",
            "/group%2Fproject",
            "/vhosts/%2F/queues",
            "/bucket//key",
            "/%7Euser",
            "/%2E",
            "/100%",
            "/a/../b",
            "/a/..;/b",
            "/a%5cb",
            "/a%zz?x=%",
        ] {
            assert_eq!(normalized(path, keep).ok().as_deref(), Some(path));
        }
        for path in ["/a%00", "/a\\b", "a", "/a b", "/a#b"] {
            assert!(normalized(path, keep).is_err(), "{path}");
        }
        let reject = PathRules { escaped_slashes: EscapedSlashes::Reject, ..keep };
        assert!(normalized("/a%2fb", reject).is_err());
        assert_eq!(normalized("/a//%7E", reject).ok().as_deref(), Some("/a//%7E"));
        let resolve = PathRules { normalize: true, ..keep };
        assert_eq!(normalized("/a//./%7E%2fb%", resolve).ok().as_deref(), Some("/a//~%2Fb%"));
        let merge = PathRules { merge_slashes: true, ..keep };
        assert_eq!(normalized("/a//./b", merge).ok().as_deref(), Some("/a/./b"));
    }

    #[test]
    fn encoded_slashes_are_treated_as_told() {
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
