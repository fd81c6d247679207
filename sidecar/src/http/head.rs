//! The head of a request and of a response, independent of the HTTP version.

use std::borrow::Cow;

use http::Method;
use weft_model::path::PathReadings;
use weft_model::{AmbiguousPath, PathRules};

use super::desync::DesyncReason;
use super::headers::Headers;
use super::name_set::NameSet;
use super::path;
use crate::denial::Denial;

/// The largest `content-length` that is accepted (1 TiB).
pub(crate) const BODY_LIMIT_BYTES: u64 = 1 << 40;

/// The head of a request.
#[derive(Debug, Clone)]
pub(crate) struct RequestHead {
    pub(crate) method: Method,
    /// Path and query, as they are forwarded.
    pub(crate) target: String,
    /// The ways in which services may interpret the path, where the path is ambiguous and forwarded unchanged.
    pub(crate) readings: Option<Box<PathReadings>>,
    /// Host and port, as they are forwarded.
    pub(crate) authority: String,
    pub(crate) headers: Headers,
    /// The protocol that the request asks to switch to.
    pub(crate) upgrade: Option<Upgrade>,
    /// The announced length of the body. Not in `headers`, because each hop writes its own.
    pub(crate) content_length: Option<u64>,
    pub(crate) version: HttpVersion,
    /// The deviation from strict HTTP/1.1 that was tolerated.
    pub(crate) desync: Option<DesyncReason>,
    /// Whether the upstream connection is closed after this request.
    pub(crate) is_isolated: bool,
}

/// The scheme of a request, by whether its connection uses TLS.
pub(crate) fn scheme(is_tls: bool) -> &'static str {
    if is_tls { "https" } else { "http" }
}

/// The path of a request target.
pub(crate) fn path_of(target: &str) -> &str {
    memchr::memchr(b'?', target.as_bytes()).and_then(|at| target.get(..at)).unwrap_or(target)
}

/// The query of a request target with its `?`; empty when there is none.
pub(crate) fn query_part_of(target: &str) -> &str {
    target.find('?').and_then(|at| target.get(at..)).unwrap_or_default()
}

/// A protocol that a connection or an HTTP/2 stream can switch to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upgrade {
    /// WebSocket (RFC 6455, over HTTP/2: RFC 8441).
    WebSocket,
    /// A CONNECT tunnel (RFC 9110, section 9.3.6).
    Tunnel,
}

/// The HTTP version of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HttpVersion {
    Http10,
    Http11,
    Http2,
}

impl HttpVersion {
    /// The name in logs.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Http10 => "HTTP/1.0",
            Self::Http11 => "HTTP/1.1",
            Self::Http2 => "HTTP/2",
        }
    }
}

/// The head of a response.
#[derive(Debug)]
pub(crate) struct ResponseHead {
    pub(crate) status: u16,
    pub(crate) headers: Headers,
    /// The announced length of the body that follows.
    pub(crate) content_length: Option<u64>,
}

impl RequestHead {
    /// The path without the query.
    pub(crate) fn path(&self) -> &str {
        path_of(&self.target)
    }

    /// Whether this is a gRPC call, which must be refused with a gRPC status.
    pub(crate) fn is_grpc(&self) -> bool {
        self.headers.get("content-type").is_some_and(is_grpc)
    }

    /// Whether trailers may follow. `has_body` says whether the request has a body.
    pub(crate) fn may_have_trailers(&self, has_body: bool) -> bool {
        let is_chunked = self.version == HttpVersion::Http2 || self.content_length.is_none();
        has_body && is_chunked && self.upgrade.is_none()
    }

    /// Normalizes the target for routing, policies and the service, and sets `readings`.
    ///
    /// # Errors
    /// When `rules` reject the path.
    pub(crate) fn normalize(&mut self, rules: PathRules) -> Result<(), Denial> {
        if self.upgrade == Some(Upgrade::Tunnel) {
            return Ok(());
        }
        if self.method == Method::OPTIONS && self.target == "*" {
            self.readings = Some(Box::new(PathReadings::of_asterisk()));
            return Ok(());
        }
        if let Cow::Owned(target) = path::normalized(&self.target, rules)? {
            self.target = target;
        }
        let readings = match rules.ambiguous {
            AmbiguousPath::RouteAsSent => PathReadings::with_path_as_sent_first(self.path()),
            AmbiguousPath::RouteNormalized => PathReadings::of(self.path()),
            AmbiguousPath::Refuse => None,
        };
        self.readings = readings.map(Box::new);
        Ok(())
    }
}

/// Hop-by-hop headers, which are never forwarded (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// [`HOP_BY_HOP`] as a set.
pub(crate) const HOP_BY_HOP_NAMES: NameSet = NameSet::of(&HOP_BY_HOP);

/// Whether a header is hop-by-hop.
pub(crate) fn is_hop_by_hop(name: &[u8]) -> bool {
    // The length rules out most other names.
    matches!(name.len(), 2 | 7 | 10 | 16..=19)
        && HOP_BY_HOP.iter().any(|hop| name.eq_ignore_ascii_case(hop.as_bytes()))
}

/// Whether a content type is `application/grpc`, with or without an encoding (`+proto`) or parameters.
pub(crate) fn is_grpc(content_type: &[u8]) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let Some((start, rest)) = content_type.split_at_checked(GRPC.len()) else { return false };
    // gRPC-Web (`application/grpc-web`) is excluded: it works over every HTTP version.
    start.eq_ignore_ascii_case(GRPC)
        && matches!(rest.first(), None | Some(b'+' | b';' | b' ' | b'\t'))
}

/// Whether a header says where the body of its message ends.
pub(crate) fn is_framing_header(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"content-length") || name.eq_ignore_ascii_case(b"transfer-encoding")
}

/// Whether a header must not be a trailer (RFC 9110, section 6.5.1): it controls framing, routing, authentication,
/// caching or decoding, and a recipient that applied it after the body would be misled.
pub(crate) fn is_forbidden_in_trailers(name: &[u8]) -> bool {
    const NAMES: [&str; 22] = [
        "content-length",
        "transfer-encoding",
        "host",
        "authorization",
        "content-type",
        "content-encoding",
        "content-range",
        "trailer",
        "expect",
        "range",
        "max-forwards",
        "cache-control",
        "cookie",
        "set-cookie",
        "if-match",
        "if-none-match",
        "if-modified-since",
        "if-unmodified-since",
        "if-range",
        "location",
        "www-authenticate",
        "pragma",
    ];
    NAMES.iter().any(|forbidden| name.eq_ignore_ascii_case(forbidden.as_bytes()))
        || is_hop_by_hop(name)
}

/// The elements of a comma-separated header value (RFC 9110, section 5.6.1).
pub(crate) fn list_elements(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
}
