//! Which headers and trailers of a message are not passed on.

use std::rc::Rc;

use http::{HeaderMap, HeaderValue};
use weft_model::is_identity_header;

use super::body::BodyError;
use super::head::{HOP_BY_HOP_NAMES, is_forbidden_in_trailers, is_hop_by_hop, list_elements};
use super::headers::Headers;
use super::name_set::{NameSet, has_special};
use crate::underscore_headers::DroppedHeaders;

/// Which headers and trailers of a message are not passed on.
#[derive(Debug, Default)]
pub(crate) struct HeaderFilter {
    /// The headers that `connection` names beside the usual, in lower case. Policies judge a request with
    /// them, and they are removed afterwards: a client must not hide a header from a policy by naming it.
    named: Vec<Box<[u8]>>,
    /// What becomes of names with `_`.
    underscores: UnderscoreAction,
    /// Whether claims of an identity are among them.
    claims: bool,
    /// The headers that only weft sets, by the policy of tokens or the route table.
    ours: Vec<Box<[u8]>>,
}

/// What becomes of names with `_`.
#[derive(Debug, Clone, Default)]
pub(crate) enum UnderscoreAction {
    /// They pass.
    #[default]
    Allowed,
    /// They are removed and noted here.
    Dropped(Rc<DroppedHeaders>),
    /// The message is refused.
    Rejected,
}

/// Whether two names are one to a service that takes `_` for `-`.
pub(crate) fn is_same_header_name(name: &[u8], other: &[u8]) -> bool {
    let same = |a: &u8, b: &u8| a.eq_ignore_ascii_case(b) || (*a == b'_' && *b == b'-');
    name.len() == other.len() && name.iter().zip(other).all(|(a, b)| same(a, b))
}

/// The name as a service reads it that takes `_` for `-`.
fn dashed(name: &[u8]) -> Vec<u8> {
    name.iter().map(|byte| if *byte == b'_' { b'-' } else { *byte }).collect()
}

impl HeaderFilter {
    /// Those of a request.
    pub(crate) fn of_request(headers: &Headers, underscores: UnderscoreAction) -> Self {
        Self { named: named(headers), underscores, claims: true, ours: Vec::new() }
    }

    /// Those of a response.
    pub(crate) fn of_response(headers: &Headers) -> Self {
        Self { named: named(headers), ..Self::default() }
    }

    /// Adds header names that only weft sets: a client may set them neither in the head nor in trailers.
    pub(crate) fn reserve<'t>(&mut self, names: impl Iterator<Item = &'t str>) {
        self.ours.extend(names.map(|name| name.as_bytes().into()));
    }

    /// Whether one of these names may be removed before policies see the request.
    fn may_cover_at_entry(&self, names: NameSet) -> bool {
        names.may_have_any(HOP_BY_HOP_NAMES)
            || names.has_special()
            || (self.claims && names.has_extension())
    }

    /// Whether a header of this name is removed before policies see the request.
    fn covers_at_entry(&self, name: &[u8]) -> bool {
        is_hop_by_hop(name)
            || (self.claims && is_identity_header(name))
            || (has_special(name) && self.covers_special(name))
    }

    /// Whether a header with a `"` or a `_` in its name is removed: any with a `"`; one of a request with a `_`
    /// where the listener says so, and wherever it is a spelling of one that frames the message or concerns the
    /// connection.
    fn covers_special(&self, name: &[u8]) -> bool {
        let is_spelling = || {
            let dashed = dashed(name);
            is_hop_by_hop(&dashed) || dashed.eq_ignore_ascii_case(b"content-length")
        };
        name.contains(&b'"')
            || (self.claims
                && (!matches!(self.underscores, UnderscoreAction::Allowed) || is_spelling()))
    }

    fn is_reserved(&self, name: &[u8]) -> bool {
        self.ours.iter().any(|own| is_same_header_name(name, own))
    }

    /// Whether `connection` names the header, and it is not one that we set.
    fn is_named(&self, name: &[u8]) -> bool {
        self.named.iter().any(|named| name.eq_ignore_ascii_case(named)) && !self.is_reserved(name)
    }

    /// Whether a trailer of this name is not passed on.
    fn covers_trailer(&self, name: &[u8]) -> bool {
        self.covers_at_entry(name)
            || is_forbidden_in_trailers(name)
            || (self.claims && name.contains(&b'_') && is_forbidden_in_trailers(&dashed(name)))
            || self.is_named(name)
            || self.is_reserved(name)
    }

    /// Whether a name with `_` refuses the message.
    fn rejects(&self, name: &[u8]) -> bool {
        matches!(self.underscores, UnderscoreAction::Rejected) && name.contains(&b'_')
    }

    /// Notes a header that is removed for its `_` alone.
    fn note(&self, name: &[u8]) {
        if let UnderscoreAction::Dropped(dropped) = &self.underscores
            && name.contains(&b'_')
            && !(self.claims && is_identity_header(name))
        {
            dropped.record(name);
        }
    }

    /// Removes what no policy may see: connection headers, claims, and names with `_` where they are
    /// dropped. What `connection` names stays until [`Self::strip_connection_named`].
    pub(crate) fn strip_before_policies(&self, headers: &mut Headers) {
        if !self.may_cover_at_entry(headers.names()) {
            return;
        }
        // gRPC asks for trailers end to end, and every hop of ours keeps them.
        let mut asks_trailers = false;
        let mut asks_more = false;
        headers.each("te", |te| {
            asks_trailers |=
                list_elements(te).any(|coding| coding.eq_ignore_ascii_case(b"trailers"));
            asks_more |= te != b"trailers";
        });
        let keeps_te = asks_trailers && !asks_more;
        headers.remove(|name| {
            let is_covered =
                self.covers_at_entry(name) && !(keeps_te && name.eq_ignore_ascii_case(b"te"));
            if is_covered {
                self.note(name);
            }
            is_covered
        });
        if asks_trailers && asks_more {
            headers.add(http::header::TE, HeaderValue::from_static("trailers"));
        }
    }

    /// Removes the headers that `connection` names. Gives the headers as they were, if any was there.
    pub(crate) fn strip_connection_named(&self, headers: &mut Headers) -> Option<Headers> {
        if self.named.is_empty() || !headers.any_name(|name| self.is_named(name)) {
            return None;
        }
        let before = headers.clone();
        headers.remove(|name| self.is_named(name));
        Some(before)
    }

    /// Removes all of it from a head that no policy judges.
    pub(crate) fn strip(&self, headers: &mut Headers) {
        self.strip_before_policies(headers);
        if !self.named.is_empty() {
            headers.remove(|name| self.is_named(name));
        }
    }

    /// Takes out of `trailer` what will not follow: the trailers that are not passed on, or all when none
    /// can follow. Gives the headers as they were, if that changed them.
    pub(crate) fn strip_trailer_announcements(
        &self,
        headers: &mut Headers,
        may_follow: bool,
    ) -> Option<Headers> {
        let stays = |name: &[u8]| may_follow && !self.covers_trailer(name);
        let mut left = Vec::new();
        let mut is_changed = false;
        headers.each("trailer", |value| {
            for name in list_elements(value) {
                if stays(name) {
                    left.push(name.to_vec());
                } else {
                    is_changed = true;
                }
            }
        });
        if !is_changed {
            return None;
        }
        let before = headers.clone();
        headers.remove(|name| name.eq_ignore_ascii_case(b"trailer"));
        if let Ok(value) = HeaderValue::from_bytes(&left.join(&b", "[..]))
            && !left.is_empty()
        {
            headers.add(http::header::TRAILER, value);
        }
        Some(before)
    }

    /// Removes what is not passed on from trailers.
    ///
    /// # Errors
    /// [`BodyError::Malformed`] when a name has a `_` and such messages are refused.
    pub(crate) fn strip_trailers(&self, trailers: HeaderMap) -> Result<HeaderMap, BodyError> {
        let names = || trailers.keys().map(|name| name.as_str().as_bytes());
        if names().any(|name| self.rejects(name)) {
            return Err(BodyError::Malformed("a trailer's name has an underscore"));
        }
        if !names().any(|name| self.covers_trailer(name)) {
            return Ok(trailers);
        }
        let mut headers = Headers::from(trailers);
        headers.remove(|name| {
            let is_covered = self.covers_trailer(name);
            if is_covered {
                self.note(name);
            }
            is_covered
        });
        Ok(headers.into_map())
    }
}

/// What the `connection` headers name beside what is never passed on anyway, and beside what is meant for
/// every recipient.
fn named(headers: &Headers) -> Vec<Box<[u8]>> {
    let mut named = Vec::new();
    headers.each("connection", |value| {
        if value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close") {
            return;
        }
        for token in list_elements(value) {
            let is_usual = token.eq_ignore_ascii_case(b"close") || is_hop_by_hop(token);
            if !is_usual && !is_end_to_end(token) {
                named.push(token.to_ascii_lowercase().into_boxed_slice());
            }
        }
    });
    named
}

/// Whether a header is meant for every recipient, so that `connection` must not name it (RFC 9110, section
/// 7.6.1). Otherwise a client could erase what an earlier hop says of it, or what it was authorized by.
fn is_end_to_end(name: &[u8]) -> bool {
    const EXACT: [&str; 16] = [
        "authorization",
        "cookie",
        "set-cookie",
        "forwarded",
        "via",
        "host",
        "origin",
        "date",
        "cache-control",
        "x-real-ip",
        "x-client-ip",
        "true-client-ip",
        "x-request-id",
        "x-correlation-id",
        "traceparent",
        "tracestate",
    ];
    const PREFIXES: [&[u8]; 5] = [b"x-forwarded-", b"x-envoy-", b"x-b3-", b"content-", b"sec-"];
    let starts = |prefix: &&[u8]| {
        name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    is_identity_header(name)
        || EXACT.iter().any(|exact| name.eq_ignore_ascii_case(exact.as_bytes()))
        || PREFIXES.iter().any(starts)
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    fn headers(lines: &[(&str, &str)]) -> Headers {
        let mut map = HeaderMap::new();
        for (name, value) in lines {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            map.append(name, HeaderValue::from_str(value).expect("a value"));
        }
        Headers::from(map)
    }

    fn names(headers: &Headers) -> Vec<String> {
        let mut names: Vec<String> = headers.to_map().keys().map(ToString::to_string).collect();
        names.sort();
        names
    }

    fn of(lines: &[(&str, &str)]) -> HeaderFilter {
        HeaderFilter::of_request(&headers(lines), UnderscoreAction::Allowed)
    }

    #[test]
    fn every_name_removed_at_entry_is_in_the_summary_of_names() {
        let header_filter = of(&[]);
        let hop = ["connection", "keep-alive", "proxy-connection", "proxy-authenticate"];
        let more = ["proxy-authorization", "te", "transfer-encoding", "upgrade"];
        let claims = ["x-weft-peer", "x-forwarded-client-cert", "x-amzn-mtls-clientcert"];
        let odd = ["content_length", "a\"b"];
        for name in hop.into_iter().chain(more).chain(claims).chain(odd) {
            for written in [name.to_owned(), name.to_uppercase(), name.replace('-', "_")] {
                let written = written.as_bytes();
                assert!(header_filter.covers_at_entry(written), "{name}");
                assert!(
                    header_filter.may_cover_at_entry([written].into_iter().collect()),
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn header_that_connection_names_is_removed_after_judgement_only() {
        let lines = [("connection", "close, X-Mark"), ("x-mark", "1"), ("x-other", "1")];
        let mut headers = headers(&lines);
        let header_filter = of(&lines);
        header_filter.strip_before_policies(&mut headers);
        assert_eq!(names(&headers), ["x-mark", "x-other"]);
        let before = header_filter.strip_connection_named(&mut headers).expect("there was one");
        assert_eq!(names(&before), ["x-mark", "x-other"]);
        assert_eq!(names(&headers), ["x-other"]);
        assert!(header_filter.strip_connection_named(&mut headers).is_none());
    }

    #[test]
    fn te_header_asks_for_trailers_only() {
        let check = |values: &[&str], left: Option<&str>| {
            let lines: Vec<_> = values.iter().map(|value| ("te", *value)).collect();
            let mut headers = headers(&lines);
            of(&lines).strip_before_policies(&mut headers);
            let mut found = Vec::new();
            headers.each("te", |value| found.push(String::from_utf8_lossy(value).into_owned()));
            found.dedup();
            assert_eq!(found, Vec::from_iter(left), "{values:?}");
        };
        check(&["trailers"], Some("trailers"));
        check(&["trailers", "trailers"], Some("trailers"));
        check(&["gzip, Trailers"], Some("trailers"));
        check(&["trailers", "gzip"], Some("trailers"));
        check(&["gzip"], None);
        check(&[], None);
    }

    #[test]
    fn header_for_every_recipient_stays_though_connection_names_it() {
        for name in [
            "Authorization",
            "X-Forwarded-For",
            "x-forwarded-proto",
            "cookie",
            "forwarded",
            "x-request-id",
            "content-type",
            "sec-websocket-key",
        ] {
            let lines = [("connection", name), (name, "1")];
            let mut headers = headers(&lines);
            of(&lines).strip(&mut headers);
            assert_eq!(names(&headers), [name.to_ascii_lowercase()]);
        }
        // One that we set stays as well.
        let lines = [("connection", "x-user"), ("x-user", "1")];
        let mut headers = headers(&lines);
        let mut header_filter = of(&lines);
        header_filter.reserve(["x-user"].into_iter());
        header_filter.strip(&mut headers);
        assert_eq!(names(&headers), ["x-user"]);
    }

    #[test]
    fn trailer_announces_only_what_follows() {
        let check = |announced: &[&str], may_follow: bool, left: Option<&str>| {
            let connection = ("connection", "x-hop");
            let lines: Vec<_> = announced.iter().map(|value| ("trailer", *value)).collect();
            let mut headers = headers(&lines);
            let mut header_filter = of(&[connection]);
            header_filter.reserve(["x-user"].into_iter());
            header_filter.strip_trailer_announcements(&mut headers, may_follow);
            let found = headers.get("trailer").map(|value| String::from_utf8_lossy(value));
            assert_eq!(found.as_deref(), left, "{announced:?}");
        };
        check(&["x-sum, Grpc-Status"], true, Some("x-sum, Grpc-Status"));
        check(&["x-sum", "x-other"], true, Some("x-sum"));
        check(&["x-sum"], false, None);
        check(&["X-Hop, x-sum,Authorization", "x-weft-peer"], true, Some("x-sum"));
        check(&["X-User, host"], true, None);
        check(&[], true, None);
    }

    #[test]
    fn forbidden_trailers_of_requests_and_responses_are_dropped() {
        let forbidden = [
            "set-cookie",
            "cache-control",
            "www-authenticate",
            "te",
            "host",
            "connection",
            "authorization",
            "content-encoding",
            "content-length",
            "trailer",
        ];
        for header_filter in [of(&[]), HeaderFilter::of_response(&headers(&[]))] {
            for name in forbidden {
                let trailers = headers(&[(name, "1"), ("x-sum", "1"), (name, "2")]).into_map();
                let forwarded = header_filter.strip_trailers(trailers).expect("no name has a `_`");
                assert_eq!(names(&Headers::from(forwarded)), ["x-sum"], "{name}");
                let mut head = headers(&[("trailer", name), ("trailer", "x-sum")]);
                header_filter.strip_trailer_announcements(&mut head, true);
                assert_eq!(head.get("trailer"), Some(&b"x-sum"[..]), "{name}");
            }
        }
    }

    #[test]
    fn other_spellings_of_framing_headers_never_pass() {
        let lines = [("content_length", "5"), ("transfer_encoding", "chunked"), ("x_a", "1")];
        let mut head = headers(&lines);
        let header_filter = of(&lines);
        header_filter.strip_before_policies(&mut head);
        assert_eq!(names(&head), ["x_a"]);
        let trailers = [("transfer_encoding", "1"), ("content_type", "1"), ("x_a", "1")];
        let trailers = header_filter.strip_trailers(headers(&trailers).into_map());
        assert_eq!(names(&Headers::from(trailers.expect("they pass"))), ["x_a"]);
    }

    #[test]
    fn names_with_underscores_are_allowed_dropped_or_rejected() {
        let lines = [("x_a", "1"), ("x_weft_peer", "1"), ("x-b", "1")];
        let trailers = || headers(&lines).into_map();
        let check = |underscores: UnderscoreAction, left: &[&str]| {
            let mut headers = headers(&lines);
            let header_filter = HeaderFilter::of_request(&headers, underscores);
            header_filter.strip_before_policies(&mut headers);
            assert_eq!(names(&headers), left);
            header_filter.strip_trailers(trailers()).map(|trailers| names(&Headers::from(trailers)))
        };
        let allowed = check(UnderscoreAction::Allowed, &["x-b", "x_a"]);
        assert_eq!(allowed.expect("they pass"), ["x-b", "x_a"]);
        let dropped = Rc::new(DroppedHeaders::default());
        let left = check(UnderscoreAction::Dropped(dropped.clone()), &["x-b"]);
        assert_eq!(left.expect("the rest passes"), ["x-b"]);
        assert_eq!(dropped.count(), 2, "one in the head and one in the trailers");
        assert!(check(UnderscoreAction::Rejected, &["x-b"]).is_err());
    }
}
