//! The head of a request and of a response, whatever version they came in.

use http::Method;

use super::fields::Fields;
use crate::denial::Denial;

/// The head of a request.
#[derive(Debug)]
pub(crate) struct RequestHead {
    pub(crate) method: Method,
    /// Path and query, as it will be sent on.
    pub(crate) target: String,
    /// Host and port, as it will be sent on.
    pub(crate) authority: String,
    pub(crate) fields: Fields,
    /// What the connection should become, if the request asks for it.
    pub(crate) upgrade: Option<Upgrade>,
    /// The length of the body, when it was announced. It is no field: each hop writes its own.
    pub(crate) content_length: Option<u64>,
    pub(crate) version: HttpVersion,
}

/// What a connection can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upgrade {
    WebSocket,
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
        self.target.split('?').next().unwrap_or_default()
    }

    /// The value of a query parameter, as it stands in the target.
    pub(crate) fn query(&self, name: &str) -> Option<&str> {
        let (_, query) = self.target.split_once('?')?;
        query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == name).then_some(value)
        })
    }

    /// Whether it is a gRPC call, whose refusals must be gRPC statuses.
    pub(crate) fn is_grpc(&self) -> bool {
        self.fields.get("content-type").is_some_and(|kind| kind.starts_with(b"application/grpc"))
    }

    /// Whether the path can be read in only one way. A path that a service might resolve to another
    /// than the one we authorized is refused.
    ///
    /// # Errors
    /// What is ambiguous about it.
    pub(crate) fn check_path(&self) -> Result<(), Denial> {
        let path = self.path();
        if self.method == Method::OPTIONS && path == "*" {
            return Ok(());
        }
        if !path.starts_with('/') {
            return Err(Denial::Malformed("the path does not start with /"));
        }
        if path.bytes().any(|b| !(0x21..0x7f).contains(&b) || b == b'\\' || b == b'#') {
            return Err(Denial::Malformed("the path has a character that no path may have"));
        }
        let lower = path.to_ascii_lowercase();
        if ["%2f", "%5c", "%2e", "%00", "//"].iter().any(|ambiguous| lower.contains(ambiguous)) {
            return Err(Denial::Malformed("the path has an encoded or empty segment"));
        }
        if path.split('/').any(|segment| segment == "." || segment == "..") {
            return Err(Denial::Malformed("the path has a dot segment"));
        }
        Ok(())
    }
}

/// Whether a text is a host with an optional port, as an authority must be.
pub(crate) fn is_authority(text: &[u8]) -> bool {
    let allowed = |b: &u8| b.is_ascii_alphanumeric() || b"-._~:[]%!$&'()*+,;=".contains(b);
    !text.is_empty() && text.len() <= 1024 && text.iter().all(allowed)
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
    NAMES.iter().any(|hop| name.eq_ignore_ascii_case(hop.as_bytes()))
}

/// Removes the fields that concern one connection, and those that `connection` names.
pub(crate) fn strip_hop_by_hop(fields: &mut Fields) {
    let named: Vec<String> = fields
        .text("connection")
        .map(|list| list.split(',').map(|name| name.trim().to_ascii_lowercase()).collect())
        .unwrap_or_default();
    let te_trailers = fields
        .text("te")
        .is_some_and(|te| te.split(',').any(|t| t.trim().eq_ignore_ascii_case("trailers")));
    fields.remove(|name| {
        is_hop_by_hop(name) || named.iter().any(|n| name.eq_ignore_ascii_case(n.as_bytes()))
    });
    if te_trailers {
        // gRPC asks for it end to end, and every hop of ours keeps trailers.
        fields.add(http::header::TE, http::HeaderValue::from_static("trailers"));
    }
}
