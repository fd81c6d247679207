//! The head of a request and of a response, whatever version they came in.

use std::borrow::Cow;

use http::{HeaderMap, Method};
use weft_model::path::Readings;
use weft_model::{PathRules, Underscores, is_identity_header};

use super::desync::Reason;
use super::fields::Fields;
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
    pub(crate) fields: Fields,
    /// What the connection should become, if the request asks for it.
    pub(crate) upgrade: Option<Upgrade>,
    /// The length of the body, when it was announced. It is no field: each hop writes its own.
    pub(crate) content_length: Option<u64>,
    pub(crate) version: HttpVersion,
    /// How it departed from strict HTTP/1.1, if it did and was let through.
    pub(crate) desync: Option<Reason>,
    /// Whether nothing may follow it on the connection to the service.
    pub(crate) is_isolated: bool,
}

/// The path of a target.
pub(crate) fn path_of(target: &str) -> &str {
    target.split('?').next().unwrap_or_default()
}

/// The query of a target with its question mark; empty when there is none.
pub(crate) fn query_part_of(target: &str) -> &str {
    target.find('?').and_then(|at| target.get(at..)).unwrap_or_default()
}

/// The value of a query parameter of a target, as it stands there.
pub(crate) fn query_of<'t>(target: &'t str, name: &str) -> Option<&'t str> {
    let (_, query) = target.split_once('?')?;
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
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
    pub(crate) fields: Fields,
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
        self.fields.get("content-type").is_some_and(is_grpc)
    }

    /// Brings the target into the one form that everything behind sees.
    ///
    /// # Errors
    /// What is ambiguous about it.
    pub(crate) fn normalize(&mut self, rules: PathRules) -> Result<(), Denial> {
        let has_no_path = self.method == Method::OPTIONS && self.target == "*"
            || self.upgrade == Some(Upgrade::Tunnel);
        if has_no_path {
            return Ok(());
        }
        if let Cow::Owned(target) = path::normalized(&self.target, rules)? {
            self.target = target;
        }
        if rules.as_sent {
            self.readings = Readings::of(self.path()).map(Box::new);
        }
        Ok(())
    }
}

/// Fields that concern one connection and are never passed on (RFC 9110, section 7.6.1).
pub(crate) fn is_hop_by_hop(name: &[u8]) -> bool {
    const NAMES: [&str; 8] = [
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "transfer-encoding",
        "upgrade",
    ];
    // Most names have another length than all of these.
    matches!(name.len(), 2 | 7 | 10 | 16..=19)
        && NAMES.iter().any(|hop| name.eq_ignore_ascii_case(hop.as_bytes()))
}

/// Whether a content type is that of gRPC calls: `application/grpc`, with a coding (`+proto`) or parameters.
pub(crate) fn is_grpc(kind: &[u8]) -> bool {
    const KIND: &[u8] = b"application/grpc";
    let Some((start, rest)) = kind.split_at_checked(KIND.len()) else { return false };
    // Not that of gRPC-Web, `application/grpc-web`, which any version of HTTP carries.
    start.eq_ignore_ascii_case(KIND)
        && matches!(rest.first(), None | Some(b'+' | b';' | b' ' | b'\t'))
}

/// Whether a field says how the message is framed, routed, authenticated, modified or coded: then it
/// comes too late behind the body (RFC 9110, section 6.5.1), and whoever reads it there is misled.
pub(crate) fn belongs_before_body(name: &[u8]) -> bool {
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
pub(crate) fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
}

/// Which fields of a message are not passed on, neither in its head nor in its trailers.
#[derive(Debug, Default)]
pub(crate) struct Unwanted {
    /// What `connection` names beside the usual, in lower case.
    named: Vec<Box<[u8]>>,
    /// Whether names with `_` are among them.
    underscores: bool,
    /// Whether claims of an identity are among them.
    claims: bool,
    /// What only we say, by the policy of tokens.
    told: Vec<Box<[u8]>>,
}

/// Whether two names are one to a service that takes `_` for `-`.
pub(crate) fn is_alike(name: &[u8], other: &[u8]) -> bool {
    let same = |a: &u8, b: &u8| a.eq_ignore_ascii_case(b) || (*a == b'_' && *b == b'-');
    name.len() == other.len() && name.iter().zip(other).all(|(a, b)| same(a, b))
}

impl Unwanted {
    /// Those of a request.
    pub(crate) fn of_request(fields: &Fields, underscores: Underscores) -> Self {
        let underscores = underscores != Underscores::Allow;
        Self { named: named(fields), underscores, claims: true, told: Vec::new() }
    }

    /// Those of a response.
    pub(crate) fn of_response(fields: &Fields) -> Self {
        Self { named: named(fields), underscores: false, claims: false, told: Vec::new() }
    }

    /// Adds what only we say: nobody else may, in trailers as little as in the head.
    pub(crate) fn add_told<'t>(&mut self, names: impl Iterator<Item = &'t str>) {
        self.told.extend(names.map(|name| name.as_bytes().into()));
    }

    /// Whether a field of this name is not passed on.
    pub(crate) fn covers(&self, name: &[u8]) -> bool {
        is_hop_by_hop(name)
            || name.contains(&b'"')
            || (self.underscores && name.contains(&b'_'))
            || (self.claims && is_identity_header(name))
            || self.named.iter().any(|named| name.eq_ignore_ascii_case(named))
            || self.told.iter().any(|told| is_alike(name, told))
    }

    /// Removes them from a head.
    pub(crate) fn strip(&self, fields: &mut Fields) {
        let te_trailers = fields
            .get("te")
            .is_some_and(|te| list(te).any(|coding| coding.eq_ignore_ascii_case(b"trailers")));
        fields.remove(|name| self.covers(name));
        if te_trailers {
            // gRPC asks for it end to end, and every hop of ours keeps trailers.
            fields.add(http::header::TE, http::HeaderValue::from_static("trailers"));
        }
    }

    /// Removes them from trailers.
    pub(crate) fn strip_trailers(&self, trailers: HeaderMap) -> HeaderMap {
        let covers = |name: &[u8]| self.covers(name) || belongs_before_body(name);
        if !trailers.keys().any(|name| covers(name.as_str().as_bytes())) {
            return trailers;
        }
        let mut fields = Fields::Map(trailers);
        fields.remove(covers);
        fields.into_map()
    }
}

/// What the `connection` fields name beside what is never passed on anyway.
fn named(fields: &Fields) -> Vec<Box<[u8]>> {
    let mut named = Vec::new();
    fields.each("connection", |value| {
        for token in list(value) {
            let is_usual = token.eq_ignore_ascii_case(b"close") || is_hop_by_hop(token);
            if !is_usual {
                named.push(token.to_ascii_lowercase().into_boxed_slice());
            }
        }
    });
    named
}
