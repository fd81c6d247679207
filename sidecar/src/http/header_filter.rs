//! Removes the headers and trailers of a message that must not be forwarded: hop-by-hop headers, forged identity
//! headers, names with `_` where the listener drops them, and trailers that RFC 9110, section 6.5.1, forbids.

use std::rc::Rc;

use http::{HeaderMap, HeaderValue};
use weft_model::is_identity_header;

use super::body_error::BodyError;
use super::head::{HOP_BY_HOP_NAMES, is_forbidden_in_trailers, is_hop_by_hop, list_elements};
use super::headers::Headers;
use super::name_set::{NameSet, has_special};
use crate::underscore_headers::DroppedHeaders;

/// Decides which headers and trailers of one message are not forwarded.
#[derive(Debug, Default)]
pub(crate) struct HeaderFilter {
    /// The headers that `connection` names, in lower case, without those that are always removed. They are removed
    /// only after policies were evaluated: a client must not hide a header from a policy by naming it.
    connection_named: Vec<Box<[u8]>>,
    /// What is done with names that have a `_`.
    underscores: UnderscoreAction,
    /// Whether headers that claim an identity are removed: for requests, not for responses.
    strips_identity: bool,
    /// The headers that only weft sets, from token policies or the route table.
    reserved: Vec<Box<[u8]>>,
}

/// What is done with header names that have a `_` (`headers_with_underscores_action`).
#[derive(Debug, Clone, Default)]
pub(crate) enum UnderscoreAction {
    /// The headers are forwarded.
    #[default]
    Allowed,
    /// The headers are removed and counted here.
    Dropped(Rc<DroppedHeaders>),
    /// The message is rejected.
    Rejected,
}

/// Whether a service that reads `_` as `-` treats two header names as the same.
pub(crate) fn is_same_header_name(name: &[u8], other: &[u8]) -> bool {
    let same = |a: &u8, b: &u8| a.eq_ignore_ascii_case(b) || (*a == b'_' && *b == b'-');
    name.len() == other.len() && name.iter().zip(other).all(|(a, b)| same(a, b))
}

/// The name as read by a service that treats `_` as `-`.
fn with_dashes(name: &[u8]) -> Vec<u8> {
    name.iter().map(|byte| if *byte == b'_' { b'-' } else { *byte }).collect()
}

impl HeaderFilter {
    /// The filter for a request. Reads its `connection` header.
    pub(crate) fn of_request(headers: &Headers, underscores: UnderscoreAction) -> Self {
        Self {
            connection_named: connection_named(headers),
            underscores,
            strips_identity: true,
            reserved: Vec::new(),
        }
    }

    /// The filter for a response. Reads its `connection` header.
    pub(crate) fn of_response(headers: &Headers) -> Self {
        Self { connection_named: connection_named(headers), ..Self::default() }
    }

    /// Reserves header names that only weft sets: a client can set them neither in the head nor in trailers.
    pub(crate) fn reserve<'t>(&mut self, names: impl Iterator<Item = &'t str>) {
        self.reserved.extend(names.map(|name| name.as_bytes().into()));
    }

    /// Whether [`Self::is_stripped_before_policies`] may be true for one of these names.
    fn may_strip_before_policies(&self, names: NameSet) -> bool {
        names.may_have_any(HOP_BY_HOP_NAMES)
            || names.has_special()
            || (self.strips_identity && names.has_extension())
    }

    /// Whether a header of this name is removed before policies are evaluated.
    fn is_stripped_before_policies(&self, name: &[u8]) -> bool {
        is_hop_by_hop(name)
            || (self.strips_identity && is_identity_header(name))
            || (has_special(name) && self.is_special_stripped(name))
    }

    /// Whether a header with a `"` or a `_` in its name is removed. Every name with a `"` is. A request header with a
    /// `_` is when the listener drops such names, or when it is another spelling of a framing or hop-by-hop header.
    fn is_special_stripped(&self, name: &[u8]) -> bool {
        let is_spelling = || {
            let name = with_dashes(name);
            is_hop_by_hop(&name) || name.eq_ignore_ascii_case(b"content-length")
        };
        name.contains(&b'"')
            || (self.strips_identity
                && (!matches!(self.underscores, UnderscoreAction::Allowed) || is_spelling()))
    }

    /// Whether only weft sets this header.
    fn is_reserved(&self, name: &[u8]) -> bool {
        self.reserved.iter().any(|reserved| is_same_header_name(name, reserved))
    }

    /// Whether `connection` names the header, and weft does not set it.
    fn is_connection_named(&self, name: &[u8]) -> bool {
        self.connection_named.iter().any(|named| name.eq_ignore_ascii_case(named))
            && !self.is_reserved(name)
    }

    /// Whether a trailer of this name is removed.
    fn is_stripped_trailer(&self, name: &[u8]) -> bool {
        self.is_stripped_before_policies(name)
            || is_forbidden_in_trailers(name)
            || (self.strips_identity
                && name.contains(&b'_')
                && is_forbidden_in_trailers(&with_dashes(name)))
            || self.is_connection_named(name)
            || self.is_reserved(name)
    }

    /// Whether a header of this name causes the message to be rejected.
    fn rejects(&self, name: &[u8]) -> bool {
        matches!(self.underscores, UnderscoreAction::Rejected) && name.contains(&b'_')
    }

    /// Counts a header that is removed only because of its `_`.
    fn count_dropped(&self, name: &[u8]) {
        if let UnderscoreAction::Dropped(dropped) = &self.underscores
            && name.contains(&b'_')
            && !(self.strips_identity && is_identity_header(name))
        {
            dropped.record(name);
        }
    }

    /// Removes headers that no policy may match on: hop-by-hop headers, identity claims of the client, and names with
    /// `_` where they are dropped. Headers that `connection` names stay until [`Self::strip_connection_named`].
    pub(crate) fn strip_before_policies(&self, headers: &mut Headers) {
        if !self.may_strip_before_policies(headers.names()) {
            return;
        }
        // `te: trailers` is kept: gRPC needs it at the service, and trailers are forwarded.
        let mut accepts_trailers = false;
        let mut has_other_value = false;
        headers.each("te", |te| {
            accepts_trailers |=
                list_elements(te).any(|coding| coding.eq_ignore_ascii_case(b"trailers"));
            has_other_value |= te != b"trailers";
        });
        let keeps_te = accepts_trailers && !has_other_value;
        headers.remove(|name| {
            let is_stripped = self.is_stripped_before_policies(name)
                && !(keeps_te && name.eq_ignore_ascii_case(b"te"));
            if is_stripped {
                self.count_dropped(name);
            }
            is_stripped
        });
        if accepts_trailers && has_other_value {
            headers.add(http::header::TE, HeaderValue::from_static("trailers"));
        }
    }

    /// Removes the headers that `connection` names. Returns the headers before, if any was removed.
    pub(crate) fn strip_connection_named(&self, headers: &mut Headers) -> Option<Headers> {
        if self.connection_named.is_empty()
            || !headers.any_name(|name| self.is_connection_named(name))
        {
            return None;
        }
        let before = headers.clone();
        headers.remove(|name| self.is_connection_named(name));
        Some(before)
    }

    /// Removes all unwanted headers from a head that is not subject to policies.
    pub(crate) fn strip(&self, headers: &mut Headers) {
        self.strip_before_policies(headers);
        if !self.connection_named.is_empty() {
            headers.remove(|name| self.is_connection_named(name));
        }
    }

    /// Removes from the `trailer` header the names of trailers that will not be sent: stripped ones, or all when the
    /// message cannot have trailers. Returns the headers before, if they changed.
    pub(crate) fn strip_trailer_announcements(
        &self,
        headers: &mut Headers,
        may_follow: bool,
    ) -> Option<Headers> {
        let is_sent = |name: &[u8]| may_follow && !self.is_stripped_trailer(name);
        let mut announced = Vec::new();
        let mut is_changed = false;
        headers.each("trailer", |value| {
            for name in list_elements(value) {
                if is_sent(name) {
                    announced.push(name.to_vec());
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
        if let Ok(value) = HeaderValue::from_bytes(&announced.join(&b", "[..]))
            && !announced.is_empty()
        {
            headers.add(http::header::TRAILER, value);
        }
        Some(before)
    }

    /// Removes the trailers that are not forwarded.
    ///
    /// # Errors
    /// [`BodyError::Malformed`] when a name has a `_` and the listener rejects such names.
    pub(crate) fn strip_trailers(&self, trailers: HeaderMap) -> Result<HeaderMap, BodyError> {
        let names = || trailers.keys().map(|name| name.as_str().as_bytes());
        if names().any(|name| self.rejects(name)) {
            return Err(BodyError::Malformed("trailer name has an underscore"));
        }
        if !names().any(|name| self.is_stripped_trailer(name)) {
            return Ok(trailers);
        }
        let mut headers = Headers::from(trailers);
        headers.remove(|name| {
            let is_stripped = self.is_stripped_trailer(name);
            if is_stripped {
                self.count_dropped(name);
            }
            is_stripped
        });
        Ok(headers.into_map())
    }
}

/// The header names in `connection`, without those that are always removed and without end-to-end headers.
fn connection_named(headers: &Headers) -> Vec<Box<[u8]>> {
    let mut names = Vec::new();
    headers.each("connection", |value| {
        if value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close") {
            return;
        }
        for token in list_elements(value) {
            let is_always_removed = token.eq_ignore_ascii_case(b"close") || is_hop_by_hop(token);
            if !is_always_removed && !is_end_to_end(token) {
                names.push(token.to_ascii_lowercase().into_boxed_slice());
            }
        }
    });
    names
}

/// Whether a header is meant for every recipient, so that `connection` must not name it (RFC 9110, section 7.6.1).
/// Without this exception a client could remove a header that an earlier proxy set, or its own credentials after
/// authorization.
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
    fn name_set_covers_every_name_stripped_before_policies() {
        let header_filter = of(&[]);
        let hop = ["connection", "keep-alive", "proxy-connection", "proxy-authenticate"];
        let more = ["proxy-authorization", "te", "transfer-encoding", "upgrade"];
        let claims = ["x-weft-peer", "x-forwarded-client-cert", "x-amzn-mtls-clientcert"];
        let odd = ["content_length", "a\"b"];
        for name in hop.into_iter().chain(more).chain(claims).chain(odd) {
            for written in [name.to_owned(), name.to_uppercase(), name.replace('-', "_")] {
                let written = written.as_bytes();
                assert!(header_filter.is_stripped_before_policies(written), "{name}");
                assert!(
                    header_filter.may_strip_before_policies([written].into_iter().collect()),
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn header_named_by_connection_is_removed_only_after_policies() {
        let lines = [("connection", "close, X-Mark"), ("x-mark", "1"), ("x-other", "1")];
        let mut headers = headers(&lines);
        let header_filter = of(&lines);
        header_filter.strip_before_policies(&mut headers);
        assert_eq!(names(&headers), ["x-mark", "x-other"]);
        let before =
            header_filter.strip_connection_named(&mut headers).expect("a header was removed");
        assert_eq!(names(&before), ["x-mark", "x-other"]);
        assert_eq!(names(&headers), ["x-other"]);
        assert!(header_filter.strip_connection_named(&mut headers).is_none());
    }

    #[test]
    fn te_header_is_reduced_to_trailers() {
        let check = |values: &[&str], left: Option<&str>| {
            let lines: Vec<_> = values.iter().map(|value| ("te", *value)).collect();
            let mut headers = headers(&lines);
            of(&lines).strip_before_policies(&mut headers);
            let mut values_left = Vec::new();
            headers
                .each("te", |value| values_left.push(String::from_utf8_lossy(value).into_owned()));
            values_left.dedup();
            assert_eq!(values_left, Vec::from_iter(left), "{values:?}");
        };
        check(&["trailers"], Some("trailers"));
        check(&["trailers", "trailers"], Some("trailers"));
        check(&["gzip, Trailers"], Some("trailers"));
        check(&["trailers", "gzip"], Some("trailers"));
        check(&["gzip"], None);
        check(&[], None);
    }

    #[test]
    fn end_to_end_header_stays_although_connection_names_it() {
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
        // A reserved header stays as well.
        let lines = [("connection", "x-user"), ("x-user", "1")];
        let mut headers = headers(&lines);
        let mut header_filter = of(&lines);
        header_filter.reserve(["x-user"].into_iter());
        header_filter.strip(&mut headers);
        assert_eq!(names(&headers), ["x-user"]);
    }

    #[test]
    fn trailer_header_announces_only_forwarded_trailers() {
        let check = |announced: &[&str], may_follow: bool, left: Option<&str>| {
            let connection = ("connection", "x-hop");
            let lines: Vec<_> = announced.iter().map(|value| ("trailer", *value)).collect();
            let mut headers = headers(&lines);
            let mut header_filter = of(&[connection]);
            header_filter.reserve(["x-user"].into_iter());
            header_filter.strip_trailer_announcements(&mut headers, may_follow);
            let announcement = headers.get("trailer").map(|value| String::from_utf8_lossy(value));
            assert_eq!(announcement.as_deref(), left, "{announced:?}");
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
                let forwarded =
                    header_filter.strip_trailers(trailers).expect("no name is rejected");
                assert_eq!(names(&Headers::from(forwarded)), ["x-sum"], "{name}");
                let mut head = headers(&[("trailer", name), ("trailer", "x-sum")]);
                header_filter.strip_trailer_announcements(&mut head, true);
                assert_eq!(head.get("trailer"), Some(&b"x-sum"[..]), "{name}");
            }
        }
    }

    #[test]
    fn other_spellings_of_framing_headers_are_removed() {
        let lines = [("content_length", "5"), ("transfer_encoding", "chunked"), ("x_a", "1")];
        let mut head = headers(&lines);
        let header_filter = of(&lines);
        header_filter.strip_before_policies(&mut head);
        assert_eq!(names(&head), ["x_a"]);
        let trailers = [("transfer_encoding", "1"), ("content_type", "1"), ("x_a", "1")];
        let trailers = header_filter.strip_trailers(headers(&trailers).into_map());
        assert_eq!(names(&Headers::from(trailers.expect("no name is rejected"))), ["x_a"]);
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
        assert_eq!(allowed.expect("no name is rejected"), ["x-b", "x_a"]);
        let dropped = Rc::new(DroppedHeaders::default());
        let left = check(UnderscoreAction::Dropped(dropped.clone()), &["x-b"]);
        assert_eq!(left.expect("no name is rejected"), ["x-b"]);
        assert_eq!(dropped.count(), 2, "one in the head and one in the trailers");
        assert!(check(UnderscoreAction::Rejected, &["x-b"]).is_err());
    }
}
