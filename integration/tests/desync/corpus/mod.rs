//! HTTP/1.1 requests, valid and invalid, and the expected handling of each.

mod bodies;
mod framing;
mod headers;
mod request_lines;
mod sequences;

use std::fmt;

pub(crate) use bodies::forbidden_trailers;
pub(crate) use request_lines::endless_request_line;
pub(crate) use sequences::{refused_tunnels, tunnel_where_connect_is_disabled};

/// A request that must never be served. A parser that reads the surrounding bytes in another way finds this request.
pub(crate) const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";

/// The bytes that a client sends, and their expected handling.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) bytes: Vec<u8>,
    /// Whether the client closes its sending direction after the bytes.
    pub(crate) closes: bool,
    pub(crate) expected: Expected,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = &self.bytes[..self.bytes.len().min(300)];
        write!(f, "{:?} -> {:?}", String::from_utf8_lossy(start), self.expected)
    }
}

/// The expected handling of a connection. Requests that are served are given as the service records them: method,
/// target, host, body.
#[derive(Debug, Clone)]
pub(crate) enum Expected {
    /// These requests are served, and the connection stays open.
    Served(Vec<&'static str>),
    /// These requests are served, and the connection closes.
    Last(Vec<&'static str>),
    /// These requests are served, then one is refused with this status, and the connection closes.
    Refused(Vec<&'static str>, u16),
    /// The service receives this request, but the client gets this status, and the connection closes.
    RefusedAfterForwarding(&'static str, u16),
    /// A request is refused with this status, and the connection stays open.
    Declined(u16),
    /// The request is noncompliant for this reason. The second string is what the service receives in modes that
    /// forward the request, or empty if every mode refuses it.
    Noncompliant(&'static str, &'static str),
    /// The connection is closed without an HTTP/1.1 response.
    Closed,
}

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    [
        framing::cases(),
        bodies::cases(),
        headers::cases(),
        request_lines::cases(),
        sequences::cases(),
    ]
    .concat()
}

fn case(bytes: impl Into<Vec<u8>>, expected: Expected) -> Case {
    Case { bytes: bytes.into(), closes: false, expected }
}

fn served(bytes: impl Into<Vec<u8>>, received: &'static str) -> Case {
    case(bytes, Expected::Served(vec![received]))
}

fn refused(bytes: impl Into<Vec<u8>>, status: u16) -> Case {
    case(bytes, Expected::Refused(Vec::new(), status))
}

/// `received` is empty for a request that every mode refuses.
fn noncompliant(bytes: impl Into<Vec<u8>>, reason: &'static str, received: &'static str) -> Case {
    case(bytes, Expected::Noncompliant(reason, received))
}

/// A POST with these headers and this body.
fn post(headers: &str, body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n{body}")
}

/// A GET with these headers.
fn get(headers: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n")
}

/// A request with this request line.
fn line(line: &str) -> String {
    format!("{line}\r\nHost: a\r\n\r\n")
}
