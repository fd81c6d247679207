//! Decodes the chunked transfer coding (RFC 9112, section 7.1) incrementally.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::line::has_strict_ends;
use crate::http::head::is_framing_header;

/// The longest chunk size line, with chunk extensions.
const SIZE_LINE_LIMIT: usize = 4096;
/// The largest trailer section.
const TRAILER_LIMIT_BYTES: usize = 16 * 1024;

/// The state of decoding a chunked body: what is expected next.
#[derive(Debug)]
pub(crate) enum ChunkedDecoder {
    /// A chunk size line.
    Size,
    /// This many bytes of chunk data.
    Data(u64),
    /// The line end after chunk data.
    DataEnd,
    /// The trailer section.
    Trailers,
    /// Nothing: the body is complete. Holds the trailers.
    Done(Option<HeaderMap>),
}

/// The result of one decoding step.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ChunkedStep {
    Piece(Bytes),
    NeedMore,
    End,
}

impl ChunkedDecoder {
    /// Decodes the next piece from the buffer.
    ///
    /// # Errors
    /// A description of the violation, when the body is malformed or a limit is exceeded.
    pub(crate) fn step(&mut self, buffer: &mut BytesMut) -> Result<ChunkedStep, &'static str> {
        loop {
            match self {
                Self::Size => {
                    let Some(line) = take_line(buffer, SIZE_LINE_LIMIT)? else {
                        return Ok(ChunkedStep::NeedMore);
                    };
                    *self = match size(&line)? {
                        0 => Self::Trailers,
                        size => Self::Data(size),
                    };
                }
                Self::Data(remaining) => {
                    if buffer.is_empty() {
                        return Ok(ChunkedStep::NeedMore);
                    }
                    let count = usize::try_from(*remaining).unwrap_or(usize::MAX).min(buffer.len());
                    let piece = buffer.split_to(count).freeze();
                    *remaining -= count as u64;
                    if *remaining == 0 {
                        *self = Self::DataEnd;
                    }
                    return Ok(ChunkedStep::Piece(piece));
                }
                Self::DataEnd => {
                    match (buffer.first(), buffer.get(1)) {
                        (Some(b'\r'), Some(b'\n')) => buffer.advance(2),
                        (Some(b'\r') | None, None) => return Ok(ChunkedStep::NeedMore),
                        _ => return Err("chunk data is longer than its chunk size"),
                    }
                    *self = Self::Size;
                }
                Self::Trailers => match take_trailers(buffer)? {
                    Some(trailers) => *self = Self::Done(trailers),
                    None => return Ok(ChunkedStep::NeedMore),
                },
                Self::Done(_) => return Ok(ChunkedStep::End),
            }
        }
    }
}

fn take_line(buffer: &mut BytesMut, limit: usize) -> Result<Option<Bytes>, &'static str> {
    let Some(end) = buffer.iter().position(|byte| *byte == b'\n') else {
        return if buffer.len() > limit { Err("chunk size line is too long") } else { Ok(None) };
    };
    let line = buffer.split_to(end + 1).freeze();
    match line.strip_suffix(b"\r\n") {
        Some(content) if content.len() <= limit && !content.contains(&b'\r') => {
            Ok(Some(line.slice_ref(content)))
        }
        _ => Err("chunk size line does not end with CR LF"),
    }
}

fn size(line: &[u8]) -> Result<u64, &'static str> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
    // Only spaces and tabs may follow (RFC 9112, section 7.1.1), not every character that parsers call whitespace.
    let last = digits.iter().rposition(|byte| !matches!(byte, b' ' | b'\t'));
    let digits = last.and_then(|last| digits.get(..=last)).unwrap_or_default();
    if digits.is_empty() || digits.len() > 12 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err("invalid chunk size: must be 1 to 12 hexadecimal digits");
    }
    let text = std::str::from_utf8(digits)
        .map_err(|_| "invalid chunk size: must be 1 to 12 hexadecimal digits")?;
    u64::from_str_radix(text, 16)
        .map_err(|_| "invalid chunk size: must be 1 to 12 hexadecimal digits")
}

/// Takes the trailer section from the buffer. The outer option is none when it is incomplete, the inner one when it is
/// empty.
fn take_trailers(buffer: &mut BytesMut) -> Result<Option<Option<HeaderMap>>, &'static str> {
    if buffer.starts_with(b"\r\n") {
        buffer.advance(2);
        return Ok(Some(None));
    }
    let end = buffer.windows(4).position(|window| window == b"\r\n\r\n");
    if !has_strict_ends(buffer.get(..end.unwrap_or(buffer.len())).unwrap_or_default()) {
        return Err("bare line feed in the trailer section");
    }
    let Some(end) = end else {
        let full = buffer.len() > TRAILER_LIMIT_BYTES;
        return if full { Err("trailer section is too large") } else { Ok(None) };
    };
    if end > TRAILER_LIMIT_BYTES {
        return Err("trailer section is too large");
    }
    let section = buffer.split_to(end + 4).freeze();
    let mut storage = [httparse::EMPTY_HEADER; 64];
    let headers = match httparse::parse_headers(&section, &mut storage) {
        Ok(httparse::Status::Complete((_, headers))) => headers,
        Ok(httparse::Status::Partial) | Err(_) => return Err("malformed trailer section"),
    };
    let mut trailers = HeaderMap::new();
    for header in headers {
        let name = HeaderName::from_bytes(header.name.as_bytes())
            .map_err(|_| "invalid trailer name: must be a token")?;
        let value = HeaderValue::from_bytes(header.value).map_err(|_| "invalid trailer value")?;
        // Other forbidden trailers are dropped when the trailers are forwarded. A framing header in a trailer section
        // has no legitimate use: it is an attempt to make parsers disagree on where the message ends.
        if is_framing_header(name.as_str().as_bytes()) {
            return Err("content-length or transfer-encoding in the trailer section");
        }
        trailers.append(name, value);
    }
    Ok(Some(Some(trailers)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(
        decoder: &mut ChunkedDecoder,
        buffer: &mut BytesMut,
        body: &mut Vec<u8>,
    ) -> Result<(), &'static str> {
        while let ChunkedStep::Piece(piece) = decoder.step(buffer)? {
            body.extend_from_slice(&piece);
        }
        Ok(())
    }

    /// Feeds the text at once and byte by byte, and expects the same result: body and number of trailers, or an error.
    fn check(text: &str, expected: Result<(&str, usize), &str>) {
        for step in [text.len().max(1), 1] {
            let mut decoder = ChunkedDecoder::Size;
            let mut buffer = BytesMut::new();
            let mut body = Vec::new();
            let mut result = Ok(());
            for part in text.as_bytes().chunks(step) {
                buffer.extend_from_slice(part);
                result = decode(&mut decoder, &mut buffer, &mut body);
                if result.is_err() {
                    break;
                }
            }
            let trailers = if let ChunkedDecoder::Done(Some(trailers)) = &decoder {
                trailers.len()
            } else {
                0
            };
            let body = String::from_utf8(body).expect("UTF-8");
            match expected {
                Ok(want) => assert_eq!(
                    (result, body.as_str(), trailers),
                    (Ok(()), want.0, want.1),
                    "{text:?} by {step}"
                ),
                Err(part) => assert!(result.is_err_and(|e| e.contains(part)), "{text:?} by {step}"),
            }
        }
    }

    #[test]
    fn chunks_are_decoded_however_they_are_split() {
        check("0\r\n\r\n", Ok(("", 0)));
        check("5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n", Ok(("hello world", 0)));
        check("1\r\na\r\n0\r\nA: b\r\nC: d\r\n\r\n", Ok(("a", 2)));
    }

    #[test]
    fn ambiguous_chunked_coding_is_refused() {
        check("5\nhello\r\n0\r\n\r\n", Err("does not end with CR LF"));
        check("5\r\nhelloX\r\n0\r\n\r\n", Err("longer than its chunk size"));
        check("-5\r\nhello\r\n", Err("invalid chunk size"));
        check("0x5\r\nhello\r\n", Err("invalid chunk size"));
        check("fffffffffffff\r\n", Err("invalid chunk size"));
    }

    #[test]
    fn only_framing_headers_in_the_trailer_section_are_refused() {
        for name in ["Content-Length", "content-length", "Transfer-Encoding", "TRANSFER-ENCODING"] {
            check(&format!("0\r\n{name}: 5\r\n\r\n"), Err("in the trailer section"));
            check(&format!("0\r\na: b\r\n{name}: 5\r\n\r\n"), Err("in the trailer section"));
        }
        for name in ["Set-Cookie", "Cache-Control", "WWW-Authenticate", "TE", "Host", "Connection"]
        {
            check(&format!("1\r\na\r\n0\r\n{name}: x\r\nb: c\r\n\r\n"), Ok(("a", 2)));
        }
    }
}
