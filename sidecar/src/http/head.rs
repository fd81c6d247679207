//! The head of a request and of a response, whatever version they came in.

use std::borrow::Cow;

use http::Method;
use weft_model::path::Readings;
use weft_model::{AmbiguousPath, PathRules};

use super::desync::DesyncReason;
use super::headers::Headers;
use super::name_set::NameSet;
use super::path;
use crate::denial::Denial;

/// The largest body that is carried: no service means one of more.
pub(crate) const BODY_LIMIT_BYTES: u64 = 1 << 40;

/// The head of a request.
#[derive(Debug, Clone)]
pub(crate) struct RequestHead {
    pub(crate) method: Method,
    /// Path and query, as it will be sent on.
    pub(crate) target: String,
    /// The ways in which services read the path, where there are several and it is sent on as it came.
    pub(crate) readings: Option<Box<Readings>>,
    /// Host and port, as it will be sent on.
    pub(crate) authority: String,
    pub(crate) headers: Headers,
    /// What the connection should become, if the request asks for it.
    pub(crate) upgrade: Option<Upgrade>,
    /// The length of the body, when it was announced. It is no field: each hop writes its own.
    pub(crate) content_length: Option<u64>,
    pub(crate) version: HttpVersion,
    /// How it departed from strict HTTP/1.1, if it did and was let through.
    pub(crate) desync: Option<DesyncReason>,
    /// Whether nothing may follow it on the connection to the service.
    pub(crate) is_isolated: bool,
}

/// The path of a target.
pub(crate) fn path_of(target: &str) -> &str {
    memchr::memchr(b'?', target.as_bytes()).and_then(|at| target.get(..at)).unwrap_or(target)
}

/// The query of a target with its question mark; empty when there is none.
pub(crate) fn query_part_of(target: &str) -> &str {
    target.find('?').and_then(|at| target.get(at..)).unwrap_or_default()
}

/// What a connection or a stream can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upgrade {
    /// WebSocket (RFC 6455; RFC 8441 over HTTP/2).
    WebSocket,
    /// A tunnel (RFC 9110, section 9.3.6).
    Tunnel,
}

/// The version a message came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HttpVersion {
    Http10,
    Http11,
    Http2,
}

impl HttpVersion {
    /// The word in logs.
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
    /// The length of the body that follows, when it was announced.
    pub(crate) content_length: Option<u64>,
}

impl RequestHead {
    /// The path without the query.
    pub(crate) fn path(&self) -> &str {
        path_of(&self.target)
    }

    /// Whether it is a gRPC call, whose refusals must be gRPC statuses.
    pub(crate) fn is_grpc(&self) -> bool {
        self.headers.get("content-type").is_some_and(is_grpc)
    }

    /// Whether trailers may follow the body, which `has_body` says is there.
    pub(crate) fn may_have_trailers(&self, has_body: bool) -> bool {
        let is_chunked = self.version == HttpVersion::Http2 || self.content_length.is_none();
        has_body && is_chunked && self.upgrade.is_none()
    }

    /// Brings the target into the form that everything behind sees, and finds how services read it.
    ///
    /// # Errors
    /// What is ambiguous about it.
    pub(crate) fn normalize(&mut self, rules: PathRules) -> Result<(), Denial> {
        if self.upgrade == Some(Upgrade::Tunnel) {
            return Ok(());
        }
        if self.method == Method::OPTIONS && self.target == "*" {
            self.readings = Some(Box::new(Readings::of_asterisk()));
            return Ok(());
        }
        if let Cow::Owned(target) = path::normalized(&self.target, rules)? {
            self.target = target;
        }
        let readings = match rules.ambiguous {
            AmbiguousPath::RouteAsSent => Readings::behind_path_as_sent(self.path()),
            AmbiguousPath::RouteNormalized => Readings::of(self.path()),
            AmbiguousPath::Refuse => None,
        };
        self.readings = readings.map(Box::new);
        Ok(())
    }
}

/// Headers that concern one connection and are never passed on (RFC 9110, section 7.6.1).
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

/// The names of those headers.
pub(crate) const HOP_BY_HOP_NAMES: NameSet = NameSet::of(&HOP_BY_HOP);

/// Whether a field concerns one connection.
pub(crate) fn is_hop_by_hop(name: &[u8]) -> bool {
    // Most names have another length than all of these.
    matches!(name.len(), 2 | 7 | 10 | 16..=19)
        && HOP_BY_HOP.iter().any(|hop| name.eq_ignore_ascii_case(hop.as_bytes()))
}

/// Whether a content type is that of gRPC calls: `application/grpc`, with a coding (`+proto`) or parameters.
pub(crate) fn is_grpc(kind: &[u8]) -> bool {
    const KIND: &[u8] = b"application/grpc";
    let Some((start, rest)) = kind.split_at_checked(KIND.len()) else { return false };
    // Not that of gRPC-Web, `application/grpc-web`, which any version of HTTP carries.
    start.eq_ignore_ascii_case(KIND)
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
    NAMES.iter().any(|early| name.eq_ignore_ascii_case(early.as_bytes())) || is_hop_by_hop(name)
}

/// The elements of a field that is a list (RFC 9110, section 5.6.1).
pub(crate) fn list_elements(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
}
