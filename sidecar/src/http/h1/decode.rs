//! Reads and parses HTTP/1.1 message heads. Ambiguous heads are refused (RFC 9112, sections 2.2, 3, 6).

use std::time::Duration;

use bytes::BytesMut;
use http::Method;
use httparse::Header;
use tokio::io::AsyncReadExt;
use weft_model::{Cluster, DesyncMode, HttpLimits};

use super::body::Http1Reader;
use super::framing::{BodyFraming, FramingHeaders, framing_fault};
use super::line::{BESIDE_TARGET_BYTES, RequestLine, has_strict_ends, request_line};
use crate::denial::Denial;
use crate::http::desync::{DesyncAction, DesyncFindings, DesyncReason};
use crate::http::head::{HttpVersion, RequestHead, ResponseHead, Upgrade};
use crate::http::headers::{BufferedHeaders, HeaderSpan, Headers};
use crate::tls::failure::TlsFailure;
use crate::upstream_failure::ResponseFault;

/// How many headers are parsed without a heap allocation.
const STACK_HEADERS: usize = 64;
/// How many bytes are read at once while waiting for a head.
const READ_BYTES: usize = 4096;

/// Why no head was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadError {
    /// The peer closed the connection before it began a head: the regular end of a connection.
    Closed,
    /// The connection was lost. Holds the TLS alert, if one was received.
    ConnectionLost(Option<TlsFailure>),
    /// The message must be refused.
    Refused(Denial),
}

/// A request head, the framing of its body, and whether the connection may serve more requests.
#[derive(Debug)]
pub(crate) struct ReadRequest {
    pub(crate) head: RequestHead,
    pub(crate) framing: BodyFraming,
    pub(crate) keep_alive: bool,
}

/// Reads the head of a request.
///
/// # Errors
/// [`HeadError`] when the connection ends, or the head is malformed, ambiguous in this mode, or above a limit.
pub(crate) async fn read_request(
    reader: &mut Http1Reader,
    limits: &HttpLimits,
    mode: DesyncMode,
) -> Result<ReadRequest, HeadError> {
    let mut parsed_bytes = 0;
    loop {
        let is_full = reader.buffer.len() >= limits.head_bytes;
        let line_limit = limits.target_bytes + BESIDE_TARGET_BYTES;
        let is_line_full = parsed_bytes <= line_limit && reader.buffer.len() > line_limit;
        // A head that is received in small pieces is parsed again only when it may be complete.
        if !reader.buffer.is_empty()
            && (parsed_bytes == 0
                || is_full
                || is_line_full
                || may_end(&reader.buffer, parsed_bytes))
        {
            let request = parse_request(&mut reader.buffer, limits, mode);
            if let Some(request) = request.map_err(HeadError::Refused)? {
                return Ok(request);
            }
        }
        if is_full {
            let has_line = memchr::memchr(b'\n', &reader.buffer).is_some();
            let denial = if has_line { Denial::HeadTooLarge } else { Denial::TargetTooLong };
            return Err(HeadError::Refused(denial));
        }
        parsed_bytes = reader.buffer.len();
        read_more(reader).await?;
    }
}

/// Whether an empty line ends after the first `parsed` bytes.
fn may_end(buffer: &[u8], parsed: usize) -> bool {
    let new = buffer.get(parsed.saturating_sub(3)..).unwrap_or_default();
    new.windows(2).any(|pair| pair == b"\n\n") || new.windows(3).any(|three| three == b"\n\r\n")
}

/// Reads more bytes of a head into the buffer.
async fn read_more(reader: &mut Http1Reader) -> Result<(), HeadError> {
    reader.reserve(READ_BYTES);
    match reader.half.read_buf(&mut reader.buffer).await {
        Ok(0) if reader.buffer.is_empty() => Err(HeadError::Closed),
        Ok(0) if reader.buffer.ends_with(b"\n") => {
            Err(HeadError::Refused(Denial::Desync(DesyncReason::MissingLastEmptyLine)))
        }
        Ok(0) => Err(HeadError::Refused(Denial::Desync(DesyncReason::PartialHeaderLine))),
        Err(error) => Err(HeadError::ConnectionLost(TlsFailure::of_read(&error))),
        Ok(_) => Ok(()),
    }
}

fn parse_request(
    buffer: &mut BytesMut,
    limits: &HttpLimits,
    mode: DesyncMode,
) -> Result<Option<ReadRequest>, Denial> {
    let mut findings = DesyncFindings::default();
    let Some(line) = request_line(buffer, limits, &mut findings)? else {
        return Ok(None);
    };
    let part = buffer.get(line.length..).unwrap_or_default();
    let Some(section) = HeaderSection::read(part, limits, line.version, &mut findings)? else {
        return Ok(None);
    };
    let length = line.length + section.length;
    if length > limits.head_bytes {
        return Err(Denial::HeadTooLarge);
    }
    let framing = section.body_framing(&line.method, &mut findings);
    let deviation = findings.worst().map(|reason| (reason, reason.action(mode)));
    let (is_isolated, is_last) = match deviation {
        Some((reason, DesyncAction::Refuse)) => return Err(Denial::Desync(reason)),
        Some((_, DesyncAction::AllowAndClose)) => (true, true),
        Some((_, DesyncAction::Isolate)) => (true, false),
        Some((_, DesyncAction::Allow)) | None => (false, false),
    };
    let RequestLine { method, target, version, length: line_bytes } = line;
    let HeaderSection { framing: framing_headers, mut spans, .. } = section;
    let authority = match (target.authority, framing_headers.host) {
        (Some(authority), Some(_)) => authority,
        (None, Some(host)) => host,
        (Some(authority), None) if version == HttpVersion::Http10 => authority,
        (None, None) if version == HttpVersion::Http10 => String::new(),
        (_, None) => return Err(Denial::Malformed("missing host header")),
    };
    let asks_websocket = framing_headers.upgrades && framing_headers.websocket;
    let upgrade = match framing {
        _ if method == Method::CONNECT => Some(Upgrade::Tunnel),
        BodyFraming::None if asks_websocket && version == HttpVersion::Http11 => {
            (method == Method::GET).then_some(Upgrade::WebSocket)
        }
        _ => None,
    };
    if method == Method::CONNECT && framing != BodyFraming::None {
        return Err(Denial::Malformed("CONNECT with a body"));
    }
    let keep_alive =
        !framing_headers.close && (version != HttpVersion::Http10 || framing_headers.keep_alive);
    let expects_continue = framing_headers.expects_continue
        && framing != BodyFraming::None
        && version != HttpVersion::Http10;
    spans.iter_mut().for_each(|span| span.shift(line_bytes));
    let mut headers = Headers::from(BufferedHeaders::new(buffer.split_to(length).freeze(), spans));
    headers.remove(|name| {
        name.eq_ignore_ascii_case(b"host")
            || name.eq_ignore_ascii_case(b"content-length")
            || (name.eq_ignore_ascii_case(b"expect") && !expects_continue)
    });
    let content_length = match framing {
        BodyFraming::Length(length) => Some(length),
        BodyFraming::None | BodyFraming::Chunked | BodyFraming::UntilClose => None,
    };
    let head = RequestHead {
        readings: None,
        method,
        target: target.path,
        authority,
        headers,
        upgrade,
        content_length,
        version,
        desync: deviation.map(|(reason, _)| reason),
        is_isolated,
    };
    Ok(Some(ReadRequest { head, framing, keep_alive: keep_alive && !is_last }))
}

/// The parsed headers of a message head.
struct HeaderSection {
    /// The size in bytes, including the empty line after the headers.
    length: usize,
    framing: FramingHeaders,
    /// The position of each header, relative to the first.
    spans: Vec<HeaderSpan>,
}

impl HeaderSection {
    /// Parses the headers at the start of `part`; none when they are incomplete.
    fn read(
        part: &[u8],
        limits: &HttpLimits,
        version: HttpVersion,
        findings: &mut DesyncFindings,
    ) -> Result<Option<Self>, Denial> {
        let mut few = [httparse::EMPTY_HEADER; STACK_HEADERS];
        let mut many = Vec::new();
        let mut parsed = httparse::parse_headers(part, &mut few);
        if parsed == Err(httparse::Error::TooManyHeaders) && limits.header_count > STACK_HEADERS {
            many.resize(limits.header_count, httparse::EMPTY_HEADER);
            parsed = httparse::parse_headers(part, &mut many);
        }
        let (length, headers) = match parsed {
            Ok(httparse::Status::Complete(complete)) => complete,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(Denial::HeadTooLarge),
            Err(_) => return Err(Denial::Desync(header_fault(part))),
        };
        let too_large = |h: &Header<'_>| h.name.len() + h.value.len() > limits.header_bytes;
        if headers.len() > limits.header_count || headers.iter().any(too_large) {
            return Err(Denial::HeadTooLarge);
        }
        let section = part.get(..length).unwrap_or_default();
        if !has_strict_ends(section) {
            findings.add(DesyncReason::NonCrLfLineTermination);
        }
        let framing = FramingHeaders::of(headers, version, findings)?;
        Ok(Some(Self { length, framing, spans: spans(section, headers) }))
    }

    /// The framing of the request's body.
    fn body_framing(&self, method: &Method, findings: &mut DesyncFindings) -> BodyFraming {
        let has_no_body = *method == Method::GET || *method == Method::HEAD;
        match (self.framing.chunked, self.framing.content_length) {
            (true, _) => {
                if has_no_body {
                    findings.add(DesyncReason::UndefinedTransferEncodingSemantics);
                }
                BodyFraming::Chunked
            }
            (false, Some(0)) if has_no_body => {
                findings.add(DesyncReason::GetHeadZeroContentLength);
                BodyFraming::None
            }
            (false, Some(length)) => {
                if has_no_body {
                    findings.add(DesyncReason::UndefinedContentLengthSemantics);
                }
                BodyFraming::Length(length)
            }
            (false, None) => BodyFraming::None,
        }
    }
}

/// Why headers could not be parsed.
fn header_fault(part: &[u8]) -> DesyncReason {
    for line in part.split(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            return match line {
                [b' ' | b'\t', ..] => DesyncReason::MultilineHeader,
                _ => DesyncReason::MissingHeaderColon,
            };
        };
        let (name, value) = line.split_at(colon);
        let is_token = |b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b);
        let reason = match name {
            [] => DesyncReason::EmptyHeader,
            [b' ' | b'\t', ..] => DesyncReason::MultilineHeader,
            _ if !name.iter().all(is_token) => DesyncReason::BadHeader,
            _ if value.iter().any(|b| (*b < 0x20 && *b != b'\t') || *b == 0x7f) => {
                DesyncReason::BadHeader
            }
            _ => continue,
        };
        return reason;
    }
    DesyncReason::BadHeader
}

/// The position of each header in `section`.
fn spans(section: &[u8], headers: &[Header<'_>]) -> Vec<HeaderSpan> {
    let base = section.as_ptr() as usize;
    let range = |part: &[u8]| {
        let start = (part.as_ptr() as usize).wrapping_sub(base);
        let narrow = |n: usize| u32::try_from(n).unwrap_or(0);
        // The pointer of an empty value is arbitrary.
        if part.is_empty() { (0, 0) } else { (narrow(start), narrow(start + part.len())) }
    };
    headers
        .iter()
        .map(|h| HeaderSpan { name: range(h.name.as_bytes()), value: range(h.value) })
        .collect()
}

/// Limits for the head of a response.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResponseLimits {
    pub(crate) head_bytes: usize,
    pub(crate) header_count: usize,
}

impl ResponseLimits {
    /// The limits for the endpoints of a cluster.
    pub(crate) fn of(cluster: &Cluster) -> Self {
        Self {
            head_bytes: cluster.response_head_bytes,
            header_count: cluster.response_header_count,
        }
    }
}

/// A response head, the framing of its body, and whether the connection may be reused.
#[derive(Debug)]
pub(crate) struct ReadResponse {
    pub(crate) head: ResponseHead,
    pub(crate) framing: BodyFraming,
    pub(crate) keep_alive: bool,
    /// How long the endpoint keeps an idle connection (`keep-alive: timeout=`).
    pub(crate) keep_alive_timeout: Option<Duration>,
}

impl ReadResponse {
    /// Whether this is an interim response, which another response to the same request follows (RFC 9110, section
    /// 15.2).
    pub(crate) fn is_interim(&self) -> bool {
        (100..200).contains(&self.head.status) && self.head.status != 101
    }
}

/// Reads the head of the next response, interim or final, to a request with this method.
///
/// # Errors
/// [`HeadError`] when the connection ends, or the head is malformed or above a limit.
pub(crate) async fn read_response(
    reader: &mut Http1Reader,
    method: &Method,
    limits: ResponseLimits,
) -> Result<ReadResponse, HeadError> {
    let mut parsed_bytes = 0;
    loop {
        let is_full = reader.buffer.len() >= limits.head_bytes;
        if !reader.buffer.is_empty()
            && (parsed_bytes == 0 || is_full || may_end(&reader.buffer, parsed_bytes))
        {
            let response = parse_response(&mut reader.buffer, method, limits);
            let response = response.map_err(Denial::UpstreamBroken);
            if let Some(response) = response.map_err(HeadError::Refused)? {
                return Ok(response);
            }
        }
        if is_full {
            return Err(HeadError::Refused(Denial::UpstreamBroken(ResponseFault::HeadTooLarge)));
        }
        parsed_bytes = reader.buffer.len();
        read_more(reader).await.map_err(|error| match error {
            HeadError::Refused(_) => {
                HeadError::Refused(Denial::UpstreamBroken(ResponseFault::IncompleteHead))
            }
            other => other,
        })?;
    }
}

fn parse_response(
    buffer: &mut BytesMut,
    method: &Method,
    limits: ResponseLimits,
) -> Result<Option<ReadResponse>, ResponseFault> {
    let mut few = [httparse::EMPTY_HEADER; STACK_HEADERS];
    let mut many = Vec::new();
    let mut parsed = httparse::Response::new(&mut few);
    let mut result = parsed.parse(buffer);
    if result == Err(httparse::Error::TooManyHeaders) && limits.header_count > STACK_HEADERS {
        many.resize(limits.header_count, httparse::EMPTY_HEADER);
        parsed = httparse::Response::new(&mut many);
        result = parsed.parse(buffer);
    }
    let length = match result {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(response_fault(buffer, error)),
    };
    let head = buffer.get(..length).unwrap_or_default();
    if length > limits.head_bytes {
        return Err(ResponseFault::HeadTooLarge);
    }
    if parsed.headers.len() > limits.header_count {
        return Err(ResponseFault::TooManyHeaders);
    }
    if !has_strict_ends(head) {
        return Err(ResponseFault::BareLineFeed);
    }
    let version = if parsed.version == Some(0) { HttpVersion::Http10 } else { HttpVersion::Http11 };
    let begins = head.starts_with(b"HTTP/");
    let status = parsed.code.filter(|code| begins && (100..1000).contains(code));
    let status = status.ok_or(ResponseFault::BadStatusLine)?;
    let framing_headers = framing_of_response(parsed.headers, version)?;
    let spans = spans(head, parsed.headers);
    let has_no_content = status < 200 || status == 204;
    let bodiless = has_no_content || *method == Method::HEAD || status == 304;
    let framing = match (bodiless, framing_headers.chunked, framing_headers.content_length) {
        (true, _, _) => BodyFraming::None,
        (false, true, _) => BodyFraming::Chunked,
        (false, false, Some(length)) => BodyFraming::Length(length),
        (false, false, None) => BodyFraming::UntilClose,
    };
    let keep_alive = framing != BodyFraming::UntilClose
        && !framing_headers.close
        && (version != HttpVersion::Http10 || framing_headers.keep_alive);
    let mut headers = Headers::from(BufferedHeaders::new(buffer.split_to(length).freeze(), spans));
    if !bodiless || has_no_content {
        // Only for HEAD and 304 may content-length describe a body that is not sent (RFC 9110, section 8.6).
        headers.remove(|name| name.eq_ignore_ascii_case(b"content-length"));
    }
    let content_length = if bodiless { None } else { framing_headers.content_length };
    let head = ResponseHead { status, headers, content_length };
    Ok(Some(ReadResponse {
        head,
        framing,
        keep_alive,
        keep_alive_timeout: framing_headers.keep_alive_timeout,
    }))
}

/// Reads the framing headers of a response. Unlike for requests, every deviation from the standard is an error.
fn framing_of_response(
    headers: &[Header<'_>],
    version: HttpVersion,
) -> Result<FramingHeaders, ResponseFault> {
    let mut findings = DesyncFindings::default();
    let framing = FramingHeaders::of(headers, version, &mut findings)
        .map_err(|denial| framing_fault(headers, denial))?;
    match findings.worst() {
        Some(reason) if reason != DesyncReason::NonCompliantHeader => {
            Err(framing_fault(headers, Denial::Desync(reason)))
        }
        _ => Ok(framing),
    }
}

/// Why the head of a response could not be parsed.
fn response_fault(buffer: &[u8], error: httparse::Error) -> ResponseFault {
    let is_first_line = |error| {
        use httparse::Error::{NewLine, Status, Token, Version};
        matches!(error, Version | Status | Token | NewLine)
    };
    match (error, memchr::memchr(b'\n', buffer)) {
        (httparse::Error::TooManyHeaders, _) => ResponseFault::TooManyHeaders,
        (error, Some(end)) if !is_first_line(error) => {
            ResponseFault::of_reason(header_fault(buffer.get(end + 1..).unwrap_or_default()))
        }
        _ => ResponseFault::BadStatusLine,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HttpLimits = HttpLimits {
        head_bytes: 4096,
        target_bytes: 1024,
        header_bytes: 2048,
        header_count: 100,
        requests_per_connection: None,
        streams: 1,
    };

    fn read(request: &[u8], mode: DesyncMode) -> String {
        let mut buffer = BytesMut::from(request);
        match parse_request(&mut buffer, &LIMITS, mode) {
            Ok(Some(r)) => format!(
                "{} {} {} {:?} {}",
                r.head.method, r.head.authority, r.head.target, r.framing, r.keep_alive
            ),
            Ok(None) => "more".to_owned(),
            Err(Denial::Desync(reason)) => reason.word().to_owned(),
            Err(denial) => format!("{} {}", denial.status(), denial.detail()).trim().to_owned(),
        }
    }

    fn check(request: &str, expected: &str) {
        assert_eq!(read(request.as_bytes(), DesyncMode::Defensive), expected, "{request:?}");
    }

    #[test]
    fn valid_request_heads_are_parsed() {
        check("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET a / None true");
        check("GET / HTTP/1.1\r\nHost: a\r\n", "more");
        check("GET / HTTP/1.1\r\n", "more");
        check("GET / HT", "more");
        check("GET http://b:1/x?y HTTP/1.1\r\nHost: a\r\n\r\n", "GET b:1 /x?y None true");
        check("GET HTTP://b?y HTTP/1.1\r\nHost: a\r\n\r\n", "GET b /?y None true");
        check("GET http://[::1]:80/ HTTP/1.1\r\nHost: a\r\n\r\n", "GET [::1]:80 / None true");
        check("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS a * None true");
        check("CONNECT b:1 HTTP/1.1\r\nHost: a\r\n\r\n", "CONNECT b:1  None true");
        check("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n", "POST a / Length(3) true");
        check(
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n",
            "POST a / Chunked true",
        );
        check("GET / HTTP/1.0\r\n\r\n", "GET  / None false");
        check("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "GET  / None true");
        check("GET / HTTP/1.1\r\nHost: a\r\nConnection: x, close\r\n\r\n", "GET a / None false");
    }

    #[test]
    fn invalid_or_oversized_request_heads_are_refused() {
        check("GET / HTTP/1.1\r\n\r\n", "400 missing host header");
        check("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "400 more than one host header");
        check("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "400 invalid host: not a host and port");
        check("GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", "400 invalid host: not a host and port");
        check("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "400 empty line before the request line");
        check("\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "400 empty line before the request line");
        check(
            "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            "400 transfer-encoding in HTTP/1.0",
        );
        check("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n", "413");
        check(&format!("GET /{} HTTP/1.1\r\n", "x".repeat(1024)), "414");
        check(&format!("GET /{}", "x".repeat(2048)), "414");
        check(&format!("GET /{} HTTP/1.1\r\n", "x".repeat(1023)), "more");
        check(&format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(2048)), "431");
        let field = format!("X: {}\r\n", "x".repeat(1500));
        check(&format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", field.repeat(3)), "431");
        let headers =
            |count: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "a: b\r\n".repeat(count));
        check(&headers(99), "GET a / None true");
        check(&headers(100), "431");
        check("GET / HTTP/2.0\r\nHost: a\r\n\r\n", "505");
        check("GET / HTTP/0.9\r\nHost: a\r\n\r\n", "505");
        check("CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n", "400 CONNECT without host and port");
        check("CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", "400 CONNECT without host and port");
        check(
            "CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n",
            "400 CONNECT with a body",
        );
        check(
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "501 unsupported transfer-encoding: only chunked is supported",
        );
    }

    /// Expects what the modes monitor, defensive and strictest do with a request, in this order.
    fn check_modes(request: &str, expected: [&str; 3]) {
        let modes = [DesyncMode::Monitor, DesyncMode::Defensive, DesyncMode::Strictest];
        let got = modes.map(|mode| read(request.as_bytes(), mode));
        assert_eq!(got.each_ref().map(String::as_str), expected, "{request:?}");
    }

    #[test]
    fn every_desync_reason_is_detected() {
        let always = |request: &str, reason: &str| check_modes(request, [reason; 3]);
        let get = |target: &str, version: &str| format!("GET{target}{version}\r\nHost: a\r\n\r\n");
        let with = |headers: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n");
        always(&get(" /a b", " HTTP/1.1"), "SpaceInUri");
        always(&get(" /\u{e9}", " HTTP/1.1"), "AmbiguousUri");
        always(&get(" /\u{1}", " HTTP/1.1"), "AmbiguousUri");
        always(&get(" /a#b", " HTTP/1.1"), "AmbiguousUri");
        always(&get(" /\0", " HTTP/1.1"), "BadUri");
        always(&get(" x", " HTTP/1.1"), "BadUri");
        always(&get(" ftp://a/", " HTTP/1.1"), "BadUri");
        always(&get("", " HTTP/1.1"), "MissingUri");
        always(&get("  ", "HTTP/1.1"), "MissingUri");
        always(&get(" /", ""), "BadVersion");
        always(&get(" /", " HTTP/1.11"), "BadVersion");
        always(&get(" /", " http/1.1"), "BadVersion");
        always("G@T / HTTP/1.1\r\nHost: a\r\n\r\n", "BadMethod");
        always(" GET / HTTP/1.1\r\nHost: a\r\n\r\n", "SpaceInUri");
        always(&with(": b"), "EmptyHeader");
        always(&with("a"), "MissingHeaderColon");
        always(&with("a: b\r\n c"), "MultilineHeader");
        always(&with("a : b"), "BadHeader");
        always(&with("a\u{1}: b"), "BadHeader");
        always(&with("a: b\0"), "BadHeader");
        always(&with("Content-Length: x"), "BadContentLength");
        always(&with("Content-Length: +3"), "BadContentLength");
        always(&with("Content-Length: 3, 3"), "BadContentLength");
        always(&with("Content-Length:"), "BadContentLength");
        always(&with("Content-Length: 3\r\nContent-Length: 4"), "MultipleContentLength");
        always(&with("Transfer-Encoding: xchunked"), "BadTransferEncoding");
        always(&with("Transfer-Encoding: identity"), "BadTransferEncoding");
        always(&with("Transfer-Encoding: chunked;q=1"), "BadTransferEncoding");
        always(&with("Transfer-Encoding: \u{b}chunked"), "BadHeader");
        let twice = "MultipleTransferEncodingChunked";
        always(&with("Transfer-Encoding: chunked, chunked"), twice);
        always(&with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"), twice);
        always(&with("Content-Length: 3\r\nTransfer_Encoding: chunked"), "SuspiciousTeClPresent");
        always(&with("Transfer-Encoding: chunked\r\nContent_Length: 3"), "SuspiciousTeClPresent");

        check_modes(
            &with("Content-Length: 3\r\nTransfer-Encoding: chunked"),
            ["POST a / Chunked false", "BothTeClPresent", "BothTeClPresent"],
        );
        check_modes(
            &with("Content-Length: 3\r\nContent-Length: 3"),
            ["POST a / Length(3) false", "DuplicateContentLength", "DuplicateContentLength"],
        );
        let bare = "NonCrLfLineTermination";
        check_modes("GET / HTTP/1.1\nHost: a\r\n\r\n", ["GET a / None false", bare, bare]);
        check_modes("GET / HTTP/1.1\r\nHost: a\n\n", ["GET a / None false", bare, bare]);
        let suspicious = "SuspiciousHeader";
        check_modes(
            &with("Transfer_Encoding: chunked"),
            ["POST a / None true", "POST a / None false", suspicious],
        );
        let get_with = |headers: &str| format!("GET / HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n");
        check_modes(
            &get_with("Content-Length: 3"),
            ["GET a / Length(3) true", "GET a / Length(3) true", "UndefinedContentLengthSemantics"],
        );
        check_modes(
            &get_with("Transfer-Encoding: chunked"),
            ["GET a / Chunked true", "GET a / Chunked true", "UndefinedTransferEncodingSemantics"],
        );
        let served = "GET a / None true";
        check_modes(&get_with("Content-Length: 0"), [served, served, "GetHeadZeroContentLength"]);
        check_modes(&get_with("x: \u{e9}"), [served, served, "NonCompliantHeader"]);
        check_modes(&get(" /", " HTTP/1.2"), [served, served, "NonCompliantVersion"]);
    }

    fn parsed_response(response: &str, method: &Method) -> String {
        let mut buffer = BytesMut::from(response);
        match parse_response(
            &mut buffer,
            method,
            ResponseLimits { head_bytes: 1024, header_count: 100 },
        ) {
            Ok(Some(r)) => {
                format!("{} {:?} {} {}", r.head.status, r.framing, r.keep_alive, buffer.len())
            }
            Ok(None) => "more".to_owned(),
            Err(fault) => fault.word().to_owned(),
        }
    }

    #[test]
    fn valid_response_heads_are_parsed() {
        let check = |response: &str, expected: &str| {
            assert_eq!(parsed_response(response, &Method::GET), expected, "{response:?}");
        };
        check("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "200 Length(3) true 3");
        check("HTTP/1.1 200 OK\r\n", "more");
        check("HTTP/1.1 200 OK\r\n\r\nabc", "200 UntilClose false 3");
        check("HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n", "200 Length(3) false 0");
        check("HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n", "204 None true 0");
        check("HTTP/1.1 600 What\r\nContent-Length: 0\r\n\r\n", "600 Length(0) true 0");
        check("HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n", "999 Length(0) true 0");
        check("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", "103 None true 0");
        let large = format!("HTTP/1.1 200 OK\r\nA: {}\r\n\r\n", "x".repeat(1024));
        check(&large, "head_too_large");
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n";
        assert_eq!(parsed_response(head, &Method::HEAD), "200 None true 0");
    }

    #[test]
    fn invalid_response_head_is_refused_with_its_fault() {
        let check = |lines: &str, expected: &str| {
            let response = lines.replace('|', "\r\n");
            assert_eq!(parsed_response(&response, &Method::GET), expected, "{response:?}");
        };
        check("|HTTP/1.1 200 OK||", "bad_status_line");
        check("HTTP/1.1 099 What||", "bad_status_line");
        check("HTTP/1.1 1000 What||", "bad_status_line");
        check("HTTP/2.0 200 OK||", "bad_status_line");
        check("ICY 200 OK||", "bad_status_line");
        check("220 mail.test ESMTP|", "bad_status_line");
        check("HTTP/1.1 200 OK\nContent-Length: 3||", "bare_line_feed");
        check("HTTP/1.1 200 OK|Content-Length: 3|Content-Length: 3||", "several_content_lengths");
        check("HTTP/1.1 200 OK|Content-Length: 3|Content-Length: 4||", "several_content_lengths");
        let both = "content_length_and_transfer_encoding";
        check("HTTP/1.1 200 OK|Content-Length: 3|Transfer-Encoding: chunked||", both);
        check("HTTP/1.1 200 OK|Transfer-Encoding: gzip|Content-Length: 3||", both);
        let twice = "several_transfer_encodings";
        check("HTTP/1.1 200 OK|Transfer-Encoding: chunked|Transfer-Encoding: chunked||", twice);
        check("HTTP/1.1 200 OK|Transfer-Encoding: gzip|Transfer-Encoding: chunked||", twice);
        check("HTTP/1.1 200 OK|Transfer-Encoding: chunked|Transfer-Encoding: identity||", twice);
        check("HTTP/1.1 200 OK|Transfer-Encoding: chunked, chunked||", twice);
        check("HTTP/1.1 200 OK|Content-Length: x||", "bad_content_length");
        check("HTTP/1.1 200 OK|Content-Length: 9999999999999999||", "body_too_large");
        check("HTTP/1.1 200 OK|Transfer-Encoding: gzip||", "bad_transfer_encoding");
        check("HTTP/1.0 200 OK|Transfer-Encoding: chunked||", "bad_transfer_encoding");
        check("HTTP/1.1 200 OK|Transfer_Encoding: chunked||", "suspicious_header");
        check("HTTP/1.1 200 OK|A: b| c||", "folded_header");
        check("HTTP/1.1 200 OK|A b||", "header_without_colon");
        check("HTTP/1.1 200 OK|A b: c||", "bad_header");
        check("HTTP/1.1 200 OK|A: \u{1}||", "bad_header");
        let many = format!("HTTP/1.1 200 OK|{}|", "A: b|".repeat(101));
        check(&many, "too_many_headers");
    }
}
