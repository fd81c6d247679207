//! Finds and removes the token of a request.

use weft_model::TokenLocation;

use crate::http::head::RequestHead;
use crate::http::headers::Headers;

/// The result of looking for a token.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TokenLookup {
    /// No credentials.
    Missing,
    /// Credentials other than a token.
    OtherCredentials,
    /// One token.
    Token(String),
    /// More than one, so that the service may use another one than was verified.
    Several,
}

impl TokenLookup {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Missing, found) | (found, Self::Missing) => found,
            (Self::OtherCredentials, found) | (found, Self::OtherCredentials) => found,
            _ => Self::Several,
        }
    }
}

/// The token of a request. Without `places` it is the bearer token of `authorization` (RFC 6750, section 2.1).
pub(crate) fn find_token(head: &RequestHead, places: &[TokenLocation]) -> TokenLookup {
    if places.is_empty() {
        return bearer(&head.headers);
    }
    let found = places.iter().map(|place| match place {
        TokenLocation::Header { name, prefix } => prefixed(&head.headers, name, prefix),
        TokenLocation::QueryParameter(name) => parameter(head, name),
        TokenLocation::Cookie(name) => cookie(&head.headers, name),
    });
    found.fold(TokenLookup::Missing, TokenLookup::and)
}

fn bearer(headers: &Headers) -> TokenLookup {
    let mut found = TokenLookup::Missing;
    headers.each("authorization", |value| {
        let token = std::str::from_utf8(value).ok().and_then(|value| value.split_once(' '));
        let token = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let one = match token {
            Some((_, token)) => TokenLookup::Token(token.trim().to_owned()),
            None => TokenLookup::OtherCredentials,
        };
        // With two values, whatever they are, the service may read either of them.
        let before = std::mem::replace(&mut found, TokenLookup::Missing);
        found = if before == TokenLookup::Missing { one } else { TokenLookup::Several };
    });
    found
}

fn prefixed(headers: &Headers, name: &str, prefix: &str) -> TokenLookup {
    let mut found = TokenLookup::Missing;
    headers.each(name, |value| {
        let value = std::str::from_utf8(value).ok();
        let one = match value.and_then(|value| value.strip_prefix(prefix)) {
            Some(token) => TokenLookup::Token(token.trim().to_owned()),
            None => TokenLookup::OtherCredentials,
        };
        let before = std::mem::replace(&mut found, TokenLookup::Missing);
        found = if before == TokenLookup::Missing { one } else { TokenLookup::Several };
    });
    found
}

/// Whether a query key has this name as a service reads it: percent-decoded, with `+` as a space.
fn is_key(key: &str, name: &str) -> bool {
    let mut bytes = key.bytes();
    let mut decoded = Vec::with_capacity(key.len());
    while let Some(byte) = bytes.next() {
        let mut rest = bytes.clone();
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        match (byte, digit(rest.next()), digit(rest.next())) {
            (b'%', Some(high), Some(low)) => {
                decoded.push(u8::try_from(high * 16 + low).unwrap_or_default());
                bytes = rest;
            }
            (b'+', ..) => decoded.push(b' '),
            _ => decoded.push(byte),
        }
    }
    decoded.trim_ascii() == name.as_bytes()
}

fn parameter(head: &RequestHead, name: &str) -> TokenLookup {
    let query = head.target.split_once('?').map_or("", |(_, query)| query);
    let values = query.split('&').filter_map(|pair| pair.split_once('='));
    let values = values
        .filter(|(key, _)| is_key(key, name))
        .map(|(_, value)| TokenLookup::Token(value.to_owned()));
    values.fold(TokenLookup::Missing, TokenLookup::and)
}

fn cookie(headers: &Headers, name: &str) -> TokenLookup {
    let mut found = TokenLookup::Missing;
    headers.each("cookie", |value| {
        for pair in value.split(|byte| *byte == b';') {
            let pair = std::str::from_utf8(pair).ok().and_then(|pair| pair.trim().split_once('='));
            if let Some((_, token)) = pair.filter(|(key, _)| key.trim() == name) {
                let before = std::mem::replace(&mut found, TokenLookup::Missing);
                found = before.and(TokenLookup::Token(token.to_owned()));
            }
        }
    });
    found
}

/// The headers and the target of a request before its tokens were removed, each where it changed.
#[derive(Debug, Default)]
pub(crate) struct OriginalHead {
    pub(crate) headers: Option<Headers>,
    pub(crate) target: Option<String>,
}

/// Removes the tokens of a request, keeping the originals in `before`.
pub(crate) fn remove_tokens(
    head: &mut RequestHead,
    places: &[TokenLocation],
    before: &mut OriginalHead,
) {
    let RequestHead { headers, target, .. } = head;
    if places.is_empty() {
        remove_header(headers, "authorization", &mut before.headers);
    }
    for place in places {
        match place {
            TokenLocation::Header { name, .. } => remove_header(headers, name, &mut before.headers),
            TokenLocation::QueryParameter(name) => {
                remove_parameter(target, name, &mut before.target)
            }
            TokenLocation::Cookie(name) => remove_cookie(headers, name, &mut before.headers),
        }
    }
}

fn remove_header(headers: &mut Headers, name: &str, before: &mut Option<Headers>) {
    let is_it = |field: &[u8]| field.eq_ignore_ascii_case(name.as_bytes());
    if headers.any_name(is_it) {
        before.get_or_insert_with(|| headers.clone());
        headers.remove(is_it);
    }
}

fn remove_parameter(target: &mut String, name: &str, before: &mut Option<String>) {
    let Some((path, query)) = target.split_once('?') else {
        return;
    };
    let is_it = |pair: &&str| pair.split_once('=').is_some_and(|(key, _)| is_key(key, name));
    if !query.split('&').any(|pair| is_it(&pair)) {
        return;
    }
    let rest: Vec<&str> = query.split('&').filter(|pair| !is_it(pair)).collect();
    let rest = if rest.is_empty() { path.to_owned() } else { format!("{path}?{}", rest.join("&")) };
    let whole = std::mem::replace(target, rest);
    before.get_or_insert(whole);
}

fn remove_cookie(headers: &mut Headers, name: &str, before: &mut Option<Headers>) {
    let mut rest: Vec<Vec<u8>> = Vec::new();
    let mut is_there = false;
    headers.each("cookie", |value| {
        for pair in value.split(|byte| *byte == b';').map(<[u8]>::trim_ascii) {
            let key = pair.split(|byte| *byte == b'=').next().unwrap_or_default();
            if key.trim_ascii() == name.as_bytes() {
                is_there = true;
            } else if !pair.is_empty() {
                rest.push(pair.to_vec());
            }
        }
    });
    if !is_there {
        return;
    }
    before.get_or_insert_with(|| headers.clone());
    headers.remove(|field| field.eq_ignore_ascii_case(b"cookie"));
    if !rest.is_empty()
        && let Ok(value) = http::HeaderValue::from_bytes(&rest.join(&b"; "[..]))
    {
        headers.add(http::header::COOKIE, value);
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderName, HeaderValue};

    use super::*;
    use crate::http::head::HttpVersion;

    fn map(headers: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            map.append(name, HeaderValue::from_str(value).expect("a value"));
        }
        map
    }

    fn head(target: &str, headers: &[(&str, &str)]) -> RequestHead {
        RequestHead {
            readings: None,
            method: http::Method::GET,
            target: target.into(),
            authority: String::new(),
            headers: Headers::from(map(headers)),
            upgrade: None,
            content_length: None,
            version: HttpVersion::Http2,
            desync: None,
            is_isolated: false,
        }
    }

    #[test]
    fn token_is_found_in_each_configured_location() {
        let one = |text: &str| TokenLookup::Token(text.into());
        let default = |headers: &[(&str, &str)]| find_token(&head("/", headers), &[]);
        assert_eq!(default(&[]), TokenLookup::Missing);
        assert_eq!(default(&[("authorization", "Bearer a.b.c")]), one("a.b.c"));
        assert_eq!(default(&[("authorization", "bEARER  a.b.c ")]), one("a.b.c"));
        assert_eq!(default(&[("authorization", "Basic eDp5")]), TokenLookup::OtherCredentials);
        assert_eq!(default(&[("authorization", "Bearer")]), TokenLookup::OtherCredentials);
        let both = [("authorization", "Bearer a"), ("authorization", "Basic b")];
        assert_eq!(default(&both), TokenLookup::Several);
        let places = [
            TokenLocation::Header { name: "x-token".into(), prefix: "JWT ".into() },
            TokenLocation::QueryParameter("access_token".into()),
            TokenLocation::Cookie("session".into()),
        ];
        let check = |target: &str, headers: &[(&str, &str)], expected| {
            assert_eq!(
                find_token(&head(target, headers), &places),
                expected,
                "{target} {headers:?}"
            );
        };
        check("/?a=1&access_token=t", &[], one("t"));
        check("/?access_token=t&access_token=t", &[], TokenLookup::Several);
        check("/", &[("x-token", "JWT t")], one("t"));
        check("/", &[("x-token", "t")], TokenLookup::OtherCredentials);
        check("/", &[("cookie", "a=b; session=t"), ("cookie", "c=d")], one("t"));
        check("/?access_token=t", &[("cookie", "session=t")], TokenLookup::Several);
        check("/?access%5Ftoken=t&access_token=t", &[], TokenLookup::Several);
        check("/?access%5ftoken=t", &[], one("t"));
        check("/", &[("cookie", "session =t; session=t")], TokenLookup::Several);
        check("/", &[("x-token", "t"), ("x-token", "JWT t")], TokenLookup::Several);
        check("/?access_tokens=t", &[("authorization", "Bearer t")], TokenLookup::Missing);
    }

    #[test]
    fn original_headers_are_kept_when_a_token_is_removed() {
        let headers = [("authorization", "Bearer a"), ("x-token", "b"), ("x-other", "c")];
        let check = |places: &[TokenLocation], is_changed: bool| {
            let mut head = head("/", &headers);
            let mut before = OriginalHead::default();
            remove_tokens(&mut head, places, &mut before);
            let was_there = before.headers.map(Headers::into_map);
            assert_eq!(was_there, is_changed.then(|| map(&headers)), "{places:?}");
            assert_eq!(head.headers.to_map() != map(&headers), is_changed, "{places:?}");
        };
        let field = |name: &str| TokenLocation::Header { name: name.into(), prefix: String::new() };
        check(&[], true);
        check(&[field("x-token"), field("x-other")], true);
        check(&[field("x-none"), TokenLocation::Cookie("a".into())], false);
    }

    #[test]
    fn token_parameters_and_cookies_are_removed_and_others_stay() {
        let places = [TokenLocation::QueryParameter("t".into()), TokenLocation::Cookie("t".into())];
        let check = |target: &str, cookies: &[&str], expected: (&str, Option<&str>)| {
            let headers: Vec<_> = cookies.iter().map(|cookie| ("cookie", *cookie)).collect();
            let mut head = head(target, &headers);
            let mut before = OriginalHead::default();
            remove_tokens(&mut head, &places, &mut before);
            let was_there = before.headers.map(Headers::into_map);
            assert_eq!(was_there, (expected.1 != cookies.first().copied()).then(|| map(&headers)));
            let whole = (expected.0 != target).then(|| target.to_owned());
            assert_eq!(before.target, whole);
            let cookie =
                head.headers.get("cookie").map(|value| std::str::from_utf8(value).expect("a text"));
            assert_eq!((head.target.as_str(), cookie), expected);
        };
        check("/a?t=1", &["t=1"], ("/a", None));
        check("/a?x=1&t=2&tt=3", &["a=b; t=1; c=d"], ("/a?x=1&tt=3", Some("a=b; c=d")));
        check("/a?%74=1&x", &["t =1;c=d"], ("/a?x", Some("c=d")));
        check("/a?x", &["a=b;c=d"], ("/a?x", Some("a=b;c=d")));
    }
}
