//! Requests of HTTP/1.1, right and wrong, and what should become of each.

mod bodies;
mod fields;
mod framing;
mod lines;
mod sequences;

use std::fmt;

pub(crate) use bodies::forbidden_trailers;
pub(crate) use lines::slow_to_end;
pub(crate) use sequences::{tunnel_where_none_is_served, tunnels_turned_down};

/// A request that must never be served: where a request is read in two ways, this is what one of them
/// finds in it.
pub(crate) const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";

/// What is sent, and what should become of it.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) bytes: Vec<u8>,
    /// Whether the client ends its direction behind the bytes.
    pub(crate) ends: bool,
    pub(crate) wanted: Wanted,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = &self.bytes[..self.bytes.len().min(300)];
        write!(f, "{:?} -> {:?}", String::from_utf8_lossy(start), self.wanted)
    }
}

/// What should become of a connection. Requests that are served are given as the service tells them:
/// method, target, host, body.
#[derive(Debug, Clone)]
pub(crate) enum Wanted {
    /// These are served, and the connection goes on.
    Served(Vec<&'static str>),
    /// These are served, and the connection ends.
    Last(Vec<&'static str>),
    /// These are served, then one is refused with this status, and the connection ends.
    Refused(Vec<&'static str>, u16),
    /// The service is asked this, and yet the client gets this status, and the connection ends.
    RefusedBehind(&'static str, u16),
    /// One is refused with this status, and the connection goes on.
    Declined(u16),
    /// It departs from the standard for this reason; told is what the service sees where the mode
    /// lets it through.
    Departs(&'static str, &'static str),
    /// It is closed without a word of HTTP/1.1.
    Closed,
}

/// Every case.
pub(crate) fn cases() -> Vec<Case> {
    [framing::cases(), bodies::cases(), fields::cases(), lines::cases(), sequences::cases()]
        .concat()
}

fn case(bytes: impl Into<Vec<u8>>, wanted: Wanted) -> Case {
    Case { bytes: bytes.into(), ends: false, wanted }
}

fn served(bytes: impl Into<Vec<u8>>, told: &'static str) -> Case {
    case(bytes, Wanted::Served(vec![told]))
}

fn refused(bytes: impl Into<Vec<u8>>, status: u16) -> Case {
    case(bytes, Wanted::Refused(Vec::new(), status))
}

/// `told` is empty for what no mode lets through.
fn departs(bytes: impl Into<Vec<u8>>, reason: &'static str, told: &'static str) -> Case {
    case(bytes, Wanted::Departs(reason, told))
}

/// A POST with these fields and this body.
fn post(fields: &str, body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n{body}")
}

/// A GET with these fields.
fn get(fields: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n")
}

/// A request with this first line.
fn line(line: &str) -> String {
    format!("{line}\r\nHost: a\r\n\r\n")
}
