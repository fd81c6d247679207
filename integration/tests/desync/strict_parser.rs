//! A strict HTTP/1.1 request parser (RFC 9112), for the bytes that a service receives. It shares no code with the
//! sidecar, so that both cannot have the same fault.

/// A parsed request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) target: String,
    /// Headers; names are lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<(String, String)>,
}

impl Request {
    /// The first value of a header, or `None`.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| &**value)
    }

    /// The request in one line: method, target, host, body.
    pub(crate) fn summary(&self) -> String {
        let host = self.header("host").unwrap_or_default();
        let body = String::from_utf8_lossy(&self.body);
        format!("{} {} {host} {body}", self.method, self.target).trim_end().to_owned()
    }
}

/// The request at the start of some bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// A complete request, and its length in bytes.
    Complete(Request, usize),
    /// A complete header section with a part of its body.
    Head(Request),
    /// A part of a header section.
    Incomplete,
}

/// Parses the request at the start of `bytes`.
///
/// # Errors
/// The first violation of the strict rules.
pub(crate) fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let Some((head, body)) = split_at_empty_line(bytes) else {
        return Ok(Parsed::Incomplete);
    };
    let head = std::str::from_utf8(head)
        .map_or_else(|_| head.iter().copied().map(char::from).collect(), str::to_owned);
    let mut lines = head.split("\r\n");
    let (method, target) = request_line(lines.next().unwrap_or_default())?;
    let headers = lines.map(header_line).collect::<Result<Vec<_>, _>>()?;
    let mut request = Request { method, target, headers, ..Request::default() };
    one_host(&request)?;
    connection_headers(&request)?;
    let rest = match framing(&request)? {
        Framing::Length(length) if body.len() < length => None,
        Framing::Length(length) => {
            let (own, rest) = body.split_at(length);
            request.body = own.to_vec();
            Some(rest)
        }
        Framing::Chunked => chunks(body, &mut request)?,
    };
    Ok(match rest {
        Some(rest) => Parsed::Complete(request, bytes.len() - rest.len()),
        None => Parsed::Head(request),
    })
}

/// The bytes before and after the first empty line.
fn split_at_empty_line(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some((&bytes[..end], &bytes[end + 4..]))
}

fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// RFC 9112, section 3: exactly two single spaces as separators, and RFC 3986 for the target.
fn request_line(line: &str) -> Result<(String, String), String> {
    let parts: Vec<&str> = line.split(' ').collect();
    let [method, target, "HTTP/1.1"] = parts[..] else {
        return Err(format!("invalid request line: {line:?}"));
    };
    // All parsers read visible characters the same way, even those that a URI may not contain. Exceptions are `#`,
    // which ends the path for some, and `\` in the path, which some treat as a slash.
    let path = target.split('?').next().unwrap_or_default();
    let in_uri = |b: u8| b.is_ascii_graphic() && b != b'#';
    let is_target = match method {
        "CONNECT" => is_host(target) && target.contains(':'),
        "OPTIONS" if target == "*" => true,
        _ => path.starts_with('/') && !path.contains('\\') && target.bytes().all(in_uri),
    };
    if !is_token(method) || !is_target {
        return Err(format!("invalid method or target: {line:?}"));
    }
    Ok((method.to_owned(), target.to_owned()))
}

/// RFC 9112, section 5: a name, a colon, and a value without control characters. The only whitespace around them is
/// the usual one space after the colon.
fn header_line(line: &str) -> Result<(String, String), String> {
    let (name, value) = line.split_once(':').ok_or_else(|| format!("no colon in {line:?}"))?;
    let value = value.strip_prefix(' ').unwrap_or(value);
    let blank = |c: char| c == ' ' || c == '\t';
    let is_value = !value.starts_with(blank)
        && !value.ends_with(blank)
        && !value.chars().any(|c| c.is_ascii_control() && c != '\t');
    if !is_token(name) || !is_value {
        return Err(format!("invalid header line: {line:?}"));
    }
    Ok((name.to_ascii_lowercase(), value.to_owned()))
}

fn all<'r>(request: &'r Request, name: &str) -> Vec<&'r str> {
    request.headers.iter().filter(|(own, _)| own == name).map(|(_, value)| &**value).collect()
}

fn one_host(request: &Request) -> Result<(), String> {
    match all(request, "host")[..] {
        [host] if is_host(host) => Ok(()),
        ref other => Err(format!("expected exactly one valid host: {other:?}")),
    }
}

/// A name or an address, with an optional port, without a user (RFC 9110, section 7.2).
fn is_host(text: &str) -> bool {
    let end = text.rfind(']').map_or(0, |at| at + 1);
    let (host, port) = match text[end..].find(':') {
        Some(at) => (&text[..end + at], &text[end + at + 1..]),
        None => (text, ""),
    };
    let in_name = |b: u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+;=".contains(&b);
    let in_address = |b: u8| b.is_ascii_hexdigit() || b":.".contains(&b);
    let is_named = match host.strip_prefix('[') {
        Some(address) => {
            address.strip_suffix(']').is_some_and(|address| address.bytes().all(in_address))
        }
        None => host.bytes().all(in_name),
    };
    !host.is_empty() && is_named && port.bytes().all(|b| b.is_ascii_digit())
}

/// Connection headers must be those that a proxy writes itself (RFC 9110, section 7.6.1).
fn connection_headers(request: &Request) -> Result<(), String> {
    let connection = all(request, "connection");
    if !matches!(connection[..], [] | ["close" | "upgrade"]) {
        return Err(format!("connection header of the client: {connection:?}"));
    }
    let is_upgrade = connection == ["upgrade"];
    if all(request, "upgrade") != if is_upgrade { vec!["websocket"] } else { Vec::new() } {
        return Err(format!("unexpected upgrade header: {:?}", request.headers));
    }
    let others = ["keep-alive", "proxy-connection", "proxy-authorization", "proxy-authenticate"];
    match others.iter().find(|name| request.header(name).is_some()) {
        Some(name) => Err(format!("hop-by-hop header {name} was forwarded")),
        None => Ok(()),
    }
}

enum Framing {
    Length(usize),
    Chunked,
}

/// RFC 9112, section 6.3.
fn framing(request: &Request) -> Result<Framing, String> {
    let lengths = all(request, "content-length");
    let codings = all(request, "transfer-encoding");
    match (&lengths[..], &codings[..]) {
        ([], []) => Ok(Framing::Length(0)),
        ([], ["chunked"]) => Ok(Framing::Chunked),
        ([length], []) if !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit()) => {
            length.parse().map(Framing::Length).map_err(|error| format!("{length}: {error}"))
        }
        _ => Err(format!("ambiguous body length: {lengths:?}, {codings:?}")),
    }
}

/// RFC 9112, section 7.1, without chunk extensions. Returns the bytes after the body, or `None` if it is incomplete.
fn chunks<'b>(mut rest: &'b [u8], request: &mut Request) -> Result<Option<&'b [u8]>, String> {
    loop {
        let Some(end) = rest.windows(2).position(|two| two == b"\r\n") else {
            return Ok(None);
        };
        let line = String::from_utf8_lossy(&rest[..end]).into_owned();
        rest = &rest[end + 2..];
        let size = usize::from_str_radix(&line, 16)
            .ok()
            .filter(|_| line.bytes().all(|b| b.is_ascii_hexdigit()) && line.len() < 9)
            .ok_or_else(|| format!("invalid chunk size: {line:?}"))?;
        if size == 0 {
            return trailers(rest, request);
        }
        let Some((piece, after)) = rest.split_at_checked(size + 2) else {
            return Ok(None);
        };
        let data =
            piece.strip_suffix(b"\r\n").ok_or("the chunk has another length than its size")?;
        request.body.extend_from_slice(data);
        rest = after;
    }
}

fn trailers<'b>(rest: &'b [u8], request: &mut Request) -> Result<Option<&'b [u8]>, String> {
    if let Some(rest) = rest.strip_prefix(b"\r\n") {
        return Ok(Some(rest));
    }
    let Some((section, rest)) = split_at_empty_line(rest) else {
        return Ok(None);
    };
    let section: String = section.iter().copied().map(char::from).collect();
    request.trailers = section.split("\r\n").map(header_line).collect::<Result<_, _>>()?;
    match request.trailers.iter().find(|(name, _)| FORBIDDEN_TRAILERS.contains(&&**name)) {
        Some((name, _)) => Err(format!("{name} is not allowed as a trailer")),
        None => Ok(Some(rest)),
    }
}

/// Headers that frame, route, authenticate, modify or describe a message are not allowed as trailers (RFC 9110, section
/// 6.5.1).
const FORBIDDEN_TRAILERS: [&str; 19] = [
    "content-length",
    "transfer-encoding",
    "host",
    "connection",
    "keep-alive",
    "proxy-connection",
    "upgrade",
    "te",
    "trailer",
    "expect",
    "max-forwards",
    "authorization",
    "proxy-authorization",
    "proxy-authenticate",
    "content-type",
    "content-encoding",
    "content-range",
    "cache-control",
    "range",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_requests_are_parsed() {
        let check = |bytes: &str, summary: &str, rest: usize| match parse(bytes.as_bytes()) {
            Ok(Parsed::Complete(request, length)) => {
                assert_eq!(
                    (&*request.summary(), bytes.len() - length),
                    (summary, rest),
                    "{bytes:?}"
                );
            }
            other => assert_eq!(other, Ok(Parsed::Incomplete), "{bytes:?}"),
        };
        check("GET / HTTP/1.1\r\nhost: a\r\n\r\nGET", "GET / a", 3);
        check("PUT /x HTTP/1.1\r\nhost: a:1\r\ncontent-length: 2\r\n\r\nabc", "PUT /x a:1 ab", 1);
        let chunked = "PUT / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
        check(&format!("{chunked}2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"), "PUT / a abc", 0);
        check(&format!("{chunked}0\r\nx: y\r\n\r\nz"), "PUT / a", 1);
        check(
            "CONNECT [::1]:80 HTTP/1.1\r\nhost: [::1]:80\r\n\r\n",
            "CONNECT [::1]:80 [::1]:80",
            0,
        );
        let part =
            parse(format!("{chunked}2\r\na").as_bytes()).expect("a part of a body is allowed");
        assert!(matches!(part, Parsed::Head(_)), "{part:?}");
        assert_eq!(parse(b"GET / HTTP/1.1\r\nhost: a\r\n"), Ok(Parsed::Incomplete));
    }

    #[test]
    fn violations_of_strict_parsing_are_errors() {
        let head = "GET / HTTP/1.1\r\nhost: a\r\n";
        let chunked = "PUT / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n";
        for bytes in [
            "GET / HTTP/1.1\r\n\r\n".to_owned(),
            "GET / HTTP/1.0\r\nhost: a\r\n\r\n".to_owned(),
            "GET  / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
            "GET /\u{e9} HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
            "GET http://a/ HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
            "\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
            "GET / HTTP/1.1\r\nhost: u@a\r\n\r\n".to_owned(),
            format!("{head}host: a\r\n\r\n"),
            format!("{head}x : y\r\n\r\n"),
            format!("{head}x: y\n z\r\n\r\n"),
            format!("{head}x: y\0\r\n\r\n"),
            format!("{head}x:  y\r\n\r\n"),
            format!("{head}connection: x\r\n\r\n"),
            format!("{head}upgrade: h2c\r\n\r\n"),
            format!("{head}content-length: +1\r\n\r\n"),
            format!("{head}content-length: 1\r\ncontent-length: 1\r\n\r\n"),
            format!("{head}transfer-encoding: Chunked\r\n\r\n"),
            format!("{chunked}content-length: 1\r\n\r\n"),
            format!("{chunked}\r\n0x1\r\na\r\n0\r\n\r\n"),
            format!("{chunked}\r\n1;x\r\na\r\n0\r\n\r\n"),
            format!("{chunked}\r\n1\nx\r\na\r\n0\r\n\r\n"),
            format!("{chunked}\r\n1\r\nab\r\n0\r\n\r\n"),
            format!("{chunked}\r\n0\r\nhost: b\r\n\r\n"),
        ] {
            assert!(parse(bytes.as_bytes()).is_err(), "{bytes:?}");
        }
    }
}
