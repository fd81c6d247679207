//! Reading heads. What could be read in two ways is refused (RFC 9112, sections 2.2, 3, 6).

use bytes::BytesMut;
use http::Method;
use tokio::io::AsyncReadExt;

use super::body::{Framing, Reader};
use crate::denial::Denial;
use crate::http::fields::{Fields, Span, SpanFields};
use crate::http::head::{HttpVersion, RequestHead, ResponseHead, Upgrade, is_authority};

/// The most fields of a head.
const FIELD_LIMIT: usize = 128;
/// The largest body that is carried: no service means one of more.
const BODY_LIMIT_BYTES: u64 = 1 << 40;
/// The largest head of a response.
const RESPONSE_HEAD_LIMIT_BYTES: usize = 256 * 1024;

/// Why there is no head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadError {
    /// The other side closed before it began one: the good end of a connection.
    Closed,
    /// The connection broke.
    Broken,
    /// What came must be refused.
    Refused(Denial),
}

/// A request with how its body is framed, and whether the connection may be used again.
#[derive(Debug)]
pub(crate) struct ReadRequest {
    pub(crate) head: RequestHead,
    pub(crate) framing: Framing,
    pub(crate) keep_alive: bool,
    /// Whether the client waits for `100 Continue` before it sends the body.
    pub(crate) expects_continue: bool,
}

/// Reads the head of a request of at most `limit` bytes.
pub(crate) async fn read_request(
    reader: &mut Reader,
    limit: usize,
) -> Result<ReadRequest, HeadError> {
    loop {
        if !reader.buffer.is_empty()
            && let Some(request) =
                parse_request(&mut reader.buffer, limit).map_err(HeadError::Refused)?
        {
            return Ok(request);
        }
        if reader.buffer.len() >= limit {
            return Err(HeadError::Refused(Denial::HeadTooLarge));
        }
        more(reader).await?;
    }
}

async fn more(reader: &mut Reader) -> Result<(), HeadError> {
    reader.buffer.reserve(4096);
    match reader.half.read_buf(&mut reader.buffer).await {
        Ok(0) if reader.buffer.is_empty() => Err(HeadError::Closed),
        Ok(0) | Err(_) => Err(HeadError::Broken),
        Ok(_) => Ok(()),
    }
}

fn parse_request(buffer: &mut BytesMut, limit: usize) -> Result<Option<ReadRequest>, Denial> {
    let malformed = Denial::Malformed;
    if buffer.starts_with(b"\r") || buffer.starts_with(b"\n") {
        return Err(malformed("an empty line before the request"));
    }
    let mut storage = [httparse::EMPTY_HEADER; FIELD_LIMIT];
    let mut parsed = httparse::Request::new(&mut storage);
    let length = match parsed.parse(buffer) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Denial::HeadTooLarge),
        Err(_) => return Err(malformed("the head is no HTTP/1 request")),
    };
    if length > limit {
        return Err(Denial::HeadTooLarge);
    }
    let head = buffer.get(..length).unwrap_or_default();
    check_line_ends(head)?;
    let method = parsed.method.and_then(|m| Method::from_bytes(m.as_bytes()).ok());
    let method = method.ok_or_else(|| malformed("the method is no token"))?;
    if method == Method::CONNECT {
        return Err(malformed("CONNECT is not supported"));
    }
    let version = if parsed.version == Some(0) { HttpVersion::Http10 } else { HttpVersion::Http11 };
    let target = parsed.path.unwrap_or_default().to_owned();
    let facts = Facts::of(parsed.headers, version)?;
    let spans = spans(head, parsed.headers);
    let (target, from_target) = origin_form(target)?;
    let authority = match (from_target, facts.host) {
        (Some(authority), _) => authority,
        (None, Some(host)) => host,
        (None, None) if version == HttpVersion::Http10 => "localhost".to_owned(),
        (None, None) => return Err(malformed("there is no host")),
    };
    let framing = match (facts.chunked, facts.content_length) {
        (true, _) => Framing::Chunked,
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::None,
    };
    let upgrade = facts.upgrade;
    let keep_alive = match version {
        HttpVersion::Http10 => facts.keep_alive && !facts.close,
        HttpVersion::Http11 | HttpVersion::Http2 => !facts.close,
    };
    let expects_continue = facts.expects_continue && framing != Framing::None;
    let mut fields = Fields::Spans(SpanFields::new(buffer.split_to(length).freeze(), spans));
    fields.remove(|name| {
        name.eq_ignore_ascii_case(b"host")
            || name.eq_ignore_ascii_case(b"content-length")
            || name.eq_ignore_ascii_case(b"expect")
    });
    let content_length = facts.content_length;
    let head = RequestHead { method, target, authority, fields, upgrade, content_length, version };
    Ok(Some(ReadRequest { head, framing, keep_alive, expects_continue }))
}

/// A line feed without its carriage return ends a line for some and not for others.
fn check_line_ends(head: &[u8]) -> Result<(), Denial> {
    let mut before = 0;
    for byte in head {
        if *byte == b'\n' && before != b'\r' {
            return Err(Denial::Malformed("a line ends without a carriage return"));
        }
        before = *byte;
    }
    Ok(())
}

fn spans(head: &[u8], headers: &[httparse::Header<'_>]) -> Vec<Span> {
    let base = head.as_ptr() as usize;
    let place = |part: &[u8]| {
        let start = (part.as_ptr() as usize).wrapping_sub(base);
        let narrow = |n: usize| u32::try_from(n).unwrap_or(0);
        // An empty value may point anywhere.
        if part.is_empty() { (0, 0) } else { (narrow(start), narrow(start + part.len())) }
    };
    headers.iter().map(|h| Span { name: place(h.name.as_bytes()), value: place(h.value) }).collect()
}

/// The target in origin form, and the authority when it was in absolute form (RFC 9112, section 3.2).
fn origin_form(target: String) -> Result<(String, Option<String>), Denial> {
    if target.starts_with('/') || target == "*" {
        return Ok((target, None));
    }
    let rest = target.strip_prefix("http://").or_else(|| target.strip_prefix("https://"));
    let rest = rest.ok_or(Denial::Malformed("the target is neither a path nor a URI"))?;
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if !is_authority(authority.as_bytes()) {
        return Err(Denial::Malformed("the target's authority is no host and port"));
    }
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    Ok((path, Some(authority.to_owned())))
}

/// What the fields say of the message itself.
#[derive(Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is whether a token stood in its field")]
struct Facts {
    host: Option<String>,
    content_length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
    upgrade: Option<Upgrade>,
    expects_continue: bool,
}

impl Facts {
    fn of(headers: &[httparse::Header<'_>], version: HttpVersion) -> Result<Self, Denial> {
        let mut facts = Self::default();
        let mut upgrades = false;
        let mut websocket = false;
        for header in headers {
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            if is("host") {
                facts.take_host(header.value)?;
            } else if is("content-length") {
                facts.take_length(header.value)?;
            } else if is("transfer-encoding") {
                facts.take_encoding(header.value)?;
            } else if is("connection") {
                let tokens = tokens(header.value);
                facts.close |= tokens.iter().any(|t| t == "close");
                facts.keep_alive |= tokens.iter().any(|t| t == "keep-alive");
                upgrades |= tokens.iter().any(|t| t == "upgrade");
            } else if is("upgrade") {
                websocket |= header.value.eq_ignore_ascii_case(b"websocket");
            } else if is("expect") {
                facts.expects_continue = header.value.eq_ignore_ascii_case(b"100-continue");
            }
        }
        if facts.chunked && facts.content_length.is_some() {
            return Err(Denial::Malformed("both content-length and transfer-encoding"));
        }
        if facts.chunked && version == HttpVersion::Http10 {
            return Err(Denial::Malformed("transfer-encoding in HTTP/1.0"));
        }
        if upgrades && websocket && version == HttpVersion::Http11 {
            facts.upgrade = Some(Upgrade::WebSocket);
        }
        Ok(facts)
    }

    fn take_host(&mut self, value: &[u8]) -> Result<(), Denial> {
        if self.host.is_some() {
            return Err(Denial::Malformed("more than one host"));
        }
        if !is_authority(value) {
            return Err(Denial::Malformed("the host is no host and port"));
        }
        self.host = Some(String::from_utf8_lossy(value).into_owned());
        Ok(())
    }

    fn take_length(&mut self, value: &[u8]) -> Result<(), Denial> {
        if self.content_length.is_some() {
            return Err(Denial::Malformed("more than one content-length"));
        }
        if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
            return Err(Denial::Malformed("the content-length is no number"));
        }
        let length = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
        match length {
            Some(length) if length <= BODY_LIMIT_BYTES => self.content_length = Some(length),
            _ => return Err(Denial::BodyTooLarge),
        }
        Ok(())
    }

    fn take_encoding(&mut self, value: &[u8]) -> Result<(), Denial> {
        if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(Denial::Malformed("a transfer-encoding other than chunked, once"));
        }
        self.chunked = true;
        Ok(())
    }
}

fn tokens(value: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(value)
        .split(',')
        .map(|token| token.trim().to_ascii_lowercase())
        .collect()
}

/// A response with how its body is framed, and whether the connection may be used again.
#[derive(Debug)]
pub(crate) struct ReadResponse {
    pub(crate) head: ResponseHead,
    pub(crate) framing: Framing,
    pub(crate) keep_alive: bool,
}

/// Reads the head of the response to a request of `method`. Interim responses but 101 are left out.
pub(crate) async fn read_response(
    reader: &mut Reader,
    method: &Method,
) -> Result<ReadResponse, HeadError> {
    loop {
        while !reader.buffer.is_empty() {
            let Some(response) =
                parse_response(&mut reader.buffer, method).map_err(HeadError::Refused)?
            else {
                break;
            };
            if !(100..200).contains(&response.head.status) || response.head.status == 101 {
                return Ok(response);
            }
        }
        if reader.buffer.len() >= RESPONSE_HEAD_LIMIT_BYTES {
            return Err(HeadError::Refused(Denial::UpstreamBroken));
        }
        more(reader).await?;
    }
}

fn parse_response(buffer: &mut BytesMut, method: &Method) -> Result<Option<ReadResponse>, Denial> {
    let mut storage = [httparse::EMPTY_HEADER; FIELD_LIMIT];
    let mut parsed = httparse::Response::new(&mut storage);
    let length = match parsed.parse(buffer) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(Denial::UpstreamBroken),
    };
    let head = buffer.get(..length).unwrap_or_default();
    check_line_ends(head).map_err(|_| Denial::UpstreamBroken)?;
    let version = if parsed.version == Some(0) { HttpVersion::Http10 } else { HttpVersion::Http11 };
    let status =
        parsed.code.filter(|code| (100..600).contains(code)).ok_or(Denial::UpstreamBroken)?;
    let facts = Facts::of_response(parsed.headers)?;
    let spans = spans(head, parsed.headers);
    let bodiless = *method == Method::HEAD || status < 200 || status == 204 || status == 304;
    let framing = match (bodiless, facts.chunked, facts.content_length) {
        (true, _, _) => Framing::None,
        (false, true, _) => Framing::Chunked,
        (false, false, Some(length)) => Framing::Length(length),
        (false, false, None) => Framing::UntilClose,
    };
    let keep_alive = framing != Framing::UntilClose
        && match version {
            HttpVersion::Http10 => facts.keep_alive && !facts.close,
            HttpVersion::Http11 | HttpVersion::Http2 => !facts.close,
        };
    let mut fields = Fields::Spans(SpanFields::new(buffer.split_to(length).freeze(), spans));
    if !bodiless {
        fields.remove(|name| name.eq_ignore_ascii_case(b"content-length"));
    }
    let content_length = if bodiless { None } else { facts.content_length };
    Ok(Some(ReadResponse {
        head: ResponseHead { status, fields, content_length },
        framing,
        keep_alive,
    }))
}

impl Facts {
    fn of_response(headers: &[httparse::Header<'_>]) -> Result<Self, Denial> {
        let relevant: Vec<httparse::Header<'_>> =
            headers.iter().filter(|h| !h.name.eq_ignore_ascii_case("host")).copied().collect();
        Self::of(&relevant, HttpVersion::Http11).map_err(|_| Denial::UpstreamBroken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(request: &str, expected: &str) {
        let mut buffer = BytesMut::from(request);
        let got = match parse_request(&mut buffer, 4096) {
            Ok(Some(r)) => format!(
                "{} {} {} {:?} {}",
                r.head.method, r.head.authority, r.head.target, r.framing, r.keep_alive
            ),
            Ok(None) => "more".to_owned(),
            Err(denial) => format!("{} {}", denial.status(), denial.detail()),
        };
        assert_eq!(got, expected, "{request:?}");
    }

    #[test]
    fn a_head_has_one_reading() {
        check("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET a / None true");
        check("GET / HTTP/1.1\r\nHost: a\r\n", "more");
        check("GET http://b:1/x?y HTTP/1.1\r\nHost: a\r\n\r\n", "GET b:1 /x?y None true");
        check("GET http://b?y HTTP/1.1\r\nHost: a\r\n\r\n", "GET b /?y None true");
        check("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n", "POST a / Length(3) true");
        check(
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST a / Chunked true",
        );
        check("GET / HTTP/1.0\r\n\r\n", "GET localhost / None false");
        check("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "GET localhost / None true");
        check("GET / HTTP/1.1\r\nHost: a\r\nConnection: x, close\r\n\r\n", "GET a / None false");
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        check("GET / HTTP/1.1\r\n\r\n", "400 there is no host");
        check("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400 more than one host");
        check("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "400 the host is no host and port");
        check("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "400 an empty line before the request");
        check("GET / HTTP/1.1\nHost: a\r\n\r\n", "400 a line ends without a carriage return");
        check(
            "GET / HTTP/1.1\r\nHost: a\r\nX: y\n\r\n",
            "400 a line ends without a carriage return",
        );
        check(
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n",
            "400 more than one content-length",
        );
        check(
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\n",
            "400 the content-length is no number",
        );
        check(
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            "400 both content-length and transfer-encoding",
        );
        check(
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "400 a transfer-encoding other than chunked, once",
        );
        check(
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            "400 a transfer-encoding other than chunked, once",
        );
        check(
            "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            "400 transfer-encoding in HTTP/1.0",
        );
        check("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n", "413 ");
        check("GET / HTTP/1.1\r\nHost : a\r\n\r\n", "400 the head is no HTTP/1 request");
        check(&format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(4096)), "431 ");
        check("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", "400 CONNECT is not supported");
        check("GET x HTTP/1.1\r\nHost: a\r\n\r\n", "400 the target is neither a path nor a URI");
    }
}
