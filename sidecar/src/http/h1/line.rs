//! Parses the request line (RFC 9112, section 3).

use http::Method;
use weft_model::HttpLimits;

use crate::denial::Denial;
use crate::http::authority;
use crate::http::desync::{DesyncFindings, DesyncReason};
use crate::http::head::HttpVersion;

/// The longest request line without its target: method, version, spaces and line end.
pub(super) const BESIDE_TARGET_BYTES: usize = 64;

/// A request line.
#[derive(Debug)]
pub(super) struct RequestLine {
    pub(super) method: Method,
    pub(super) target: RequestTarget,
    pub(super) version: HttpVersion,
    /// The size in bytes, including the line end.
    pub(super) length: usize,
}

/// The target of a request (RFC 9112, section 3.2).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RequestTarget {
    /// Path and query, or `*`; empty for `CONNECT`.
    pub(super) path: String,
    /// The authority in the target, which takes precedence over `host`.
    pub(super) authority: Option<String>,
}

/// Parses the request line at the start of `buffer`; none when it is incomplete.
///
/// # Errors
/// When it is malformed, ambiguous or above a limit.
pub(super) fn request_line(
    buffer: &[u8],
    limits: &HttpLimits,
    findings: &mut DesyncFindings,
) -> Result<Option<RequestLine>, Denial> {
    let line_limit = limits.target_bytes + BESIDE_TARGET_BYTES;
    let Some(end) = buffer.iter().take(line_limit + 1).position(|byte| *byte == b'\n') else {
        return if buffer.len() > line_limit { Err(Denial::TargetTooLong) } else { Ok(None) };
    };
    let line = buffer.get(..end).unwrap_or_default();
    let line = match line.strip_suffix(b"\r") {
        Some(line) => line,
        None => {
            findings.add(DesyncReason::NonCrLfLineTermination);
            line
        }
    };
    if line.is_empty() {
        return Err(Denial::Malformed("empty line before the request line"));
    }
    let (method, target, version) = parts(line)?;
    let method = Method::from_bytes(method).map_err(|_| Denial::Desync(DesyncReason::BadMethod))?;
    let version = http_version(version, findings)?;
    if target.len() > limits.target_bytes {
        return Err(Denial::TargetTooLong);
    }
    let target = check_bytes(target)?;
    let target = if method == Method::CONNECT {
        tunnel_target(target)?
    } else {
        ordinary_target(target, &method)?
    };
    Ok(Some(RequestLine { method, target, version, length: end + 1 }))
}

/// Method, target and version.
type LineParts<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Splits a request line at its first and last space.
fn parts(line: &[u8]) -> Result<LineParts<'_>, Denial> {
    let desync = |reason| Err(Denial::Desync(reason));
    let Some(first) = line.iter().position(|byte| *byte == b' ') else {
        return desync(DesyncReason::MissingUri);
    };
    let last = line.iter().rposition(|byte| *byte == b' ').unwrap_or(first);
    let method = line.get(..first).unwrap_or_default();
    let version = line.get(last + 1..).unwrap_or_default();
    let target = line.get(first + 1..last).unwrap_or_default();
    if first == last {
        // `GET HTTP/1.1`, or an HTTP/0.9 request, which has no version.
        let reason = if version.starts_with(b"HTTP/") || version.is_empty() {
            DesyncReason::MissingUri
        } else {
            DesyncReason::BadVersion
        };
        return desync(reason);
    }
    if target.iter().all(|byte| *byte == b' ') {
        return desync(DesyncReason::MissingUri);
    }
    if target.contains(&b' ') || version.is_empty() {
        return desync(DesyncReason::SpaceInUri);
    }
    Ok((method, target, version))
}

/// Parses the version. A higher minor version is treated as HTTP/1.1 (RFC 9112, section 2.3).
fn http_version(version: &[u8], findings: &mut DesyncFindings) -> Result<HttpVersion, Denial> {
    match version {
        b"HTTP/1.1" => Ok(HttpVersion::Http11),
        b"HTTP/1.0" => Ok(HttpVersion::Http10),
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'2'..=b'9'] => {
            findings.add(DesyncReason::NonCompliantVersion);
            Ok(HttpVersion::Http11)
        }
        [b'H', b'T', b'T', b'P', b'/', b'0'..=b'9', b'.', b'0'..=b'9'] => {
            Err(Denial::UnknownVersion)
        }
        _ => Err(Denial::Desync(DesyncReason::BadVersion)),
    }
}

/// Rejects targets with characters that cannot be forwarded.
fn check_bytes(target: &[u8]) -> Result<&str, Denial> {
    let mut in_query = false;
    for byte in target {
        match byte {
            // RFC 3986 forbids these, and the h2 crate refuses HTTP/2 requests with them, so both versions behave the
            // same. Other forbidden characters are percent-encoded when the target is normalized.
            b'#' | b'<' | b'>' => return Err(Denial::Desync(DesyncReason::AmbiguousUri)),
            b'"' if in_query => return Err(Denial::Desync(DesyncReason::AmbiguousUri)),
            b'`' if !in_query => return Err(Denial::Desync(DesyncReason::AmbiguousUri)),
            b'?' => in_query = true,
            0x21..=0x7e => {}
            0 | b'\r' => return Err(Denial::Desync(DesyncReason::BadUri)),
            _ => return Err(Denial::Desync(DesyncReason::AmbiguousUri)),
        }
    }
    std::str::from_utf8(target).map_err(|_| Denial::Desync(DesyncReason::AmbiguousUri))
}

fn tunnel_target(target: &str) -> Result<RequestTarget, Denial> {
    let has_port = authority::split(target).is_some_and(|(_, port)| port.is_some());
    if !has_port {
        return Err(Denial::Malformed("CONNECT without host and port"));
    }
    Ok(RequestTarget { path: String::new(), authority: Some(target.to_owned()) })
}

fn ordinary_target(target: &str, method: &Method) -> Result<RequestTarget, Denial> {
    if target.starts_with('/') || (target == "*" && *method == Method::OPTIONS) {
        return Ok(RequestTarget { path: target.to_owned(), authority: None });
    }
    let rest = ["http://", "https://"].iter().find_map(|scheme| {
        let (head, rest) = target.split_at_checked(scheme.len())?;
        head.eq_ignore_ascii_case(scheme).then_some(rest)
    });
    let rest = rest.ok_or(Denial::Desync(DesyncReason::BadUri))?;
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if authority::split(authority).is_none() {
        return Err(Denial::Malformed(
            "invalid authority in the request target: not a host and port",
        ));
    }
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    Ok(RequestTarget { path, authority: Some(authority.to_owned()) })
}

/// Whether each line ends with CR LF. Parsers disagree on whether a bare line feed ends a line.
pub(super) fn has_strict_ends(section: &[u8]) -> bool {
    memchr::memchr_iter(b'\n', section)
        .all(|at| at.checked_sub(1).and_then(|before| section.get(before)) == Some(&b'\r'))
}
