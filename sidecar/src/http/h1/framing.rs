//! Reads the headers that frame a message or control its connection (RFC 9112, sections 6, 7 and 9).

use std::time::Duration;

use httparse::Header;

use crate::denial::Denial;
use crate::http::authority::is_authority;
use crate::http::desync::{DesyncFindings, DesyncReason};
use crate::http::head::{BODY_LIMIT_BYTES, HttpVersion, list_elements};
use crate::upstream_failure::ResponseFault;

/// How a body is framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyFraming {
    /// No body.
    None,
    /// This many bytes.
    Length(u64),
    /// Chunked transfer coding.
    Chunked,
    /// Until the end of the connection: for responses, and after an upgrade.
    UntilClose,
}

/// The headers that frame a message or control its connection.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each says whether a header has a token")]
pub(super) struct FramingHeaders {
    pub(super) host: Option<String>,
    pub(super) content_length: Option<u64>,
    pub(super) chunked: bool,
    pub(super) close: bool,
    pub(super) keep_alive: bool,
    /// Whether `connection` names `upgrade`.
    pub(super) upgrades: bool,
    /// Whether `upgrade` is `websocket`.
    pub(super) websocket: bool,
    pub(super) expects_continue: bool,
    /// How long the peer keeps an idle connection: `keep-alive: timeout=` (RFC 2068, section 19.7.1.1).
    pub(super) keep_alive_timeout: Option<Duration>,
    /// Whether a header name resembles `content-length` or `transfer-encoding`.
    suspicious: bool,
}

impl FramingHeaders {
    /// Reads the headers of a message. Adds tolerable deviations from the standard to `findings`.
    ///
    /// # Errors
    /// When the headers are invalid in every mode.
    pub(super) fn of(
        headers: &[Header<'_>],
        version: HttpVersion,
        findings: &mut DesyncFindings,
    ) -> Result<Self, Denial> {
        let mut framing = Self::default();
        for header in headers {
            framing.take(header, findings)?;
        }
        let has_framing = framing.chunked || framing.content_length.is_some();
        if framing.suspicious && has_framing {
            return Err(Denial::Desync(DesyncReason::SuspiciousTeClPresent));
        }
        if framing.suspicious {
            findings.add(DesyncReason::SuspiciousHeader);
        }
        if framing.chunked && version == HttpVersion::Http10 {
            return Err(Denial::Malformed("transfer-encoding in HTTP/1.0"));
        }
        if framing.chunked && framing.content_length.is_some() {
            findings.add(DesyncReason::BothTeClPresent);
            framing.content_length = None;
        }
        Ok(framing)
    }

    fn take(&mut self, header: &Header<'_>, findings: &mut DesyncFindings) -> Result<(), Denial> {
        // The length rules out most other names.
        match header.name.len() {
            4 if header.name.eq_ignore_ascii_case("host") => self.take_host(header.value)?,
            6 if header.name.eq_ignore_ascii_case("expect") => {
                self.expects_continue = header.value.eq_ignore_ascii_case(b"100-continue");
            }
            7 if header.name.eq_ignore_ascii_case("upgrade") => {
                self.websocket |= header.value.eq_ignore_ascii_case(b"websocket");
            }
            10 if header.name.eq_ignore_ascii_case("connection") => {
                for token in list_elements(header.value) {
                    self.close |= token.eq_ignore_ascii_case(b"close");
                    self.keep_alive |= token.eq_ignore_ascii_case(b"keep-alive");
                    self.upgrades |= token.eq_ignore_ascii_case(b"upgrade");
                }
            }
            10 if header.name.eq_ignore_ascii_case("keep-alive") => {
                let seconds =
                    list_elements(header.value).find_map(|item| item.strip_prefix(b"timeout="));
                let seconds = seconds.and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
                self.keep_alive_timeout = seconds.map(Duration::from_secs);
            }
            14 if header.name.eq_ignore_ascii_case("content-length") => {
                self.take_length(header.value, findings)?;
            }
            17 if header.name.eq_ignore_ascii_case("transfer-encoding") => {
                self.take_coding(header.value)?;
            }
            _ => self.suspicious |= looks_like_framing(header.name.as_bytes()),
        }
        if !header.value.is_ascii() {
            findings.add(DesyncReason::NonCompliantHeader);
        }
        Ok(())
    }

    fn take_host(&mut self, value: &[u8]) -> Result<(), Denial> {
        if self.host.is_some() {
            return Err(Denial::Malformed("more than one host header"));
        }
        if !is_authority(value) {
            return Err(Denial::Malformed("invalid host: not a host and port"));
        }
        self.host = Some(String::from_utf8_lossy(value).into_owned());
        Ok(())
    }

    fn take_length(&mut self, value: &[u8], findings: &mut DesyncFindings) -> Result<(), Denial> {
        if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
            return Err(Denial::Desync(DesyncReason::BadContentLength));
        }
        let length = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
        let length = length.filter(|length| *length <= BODY_LIMIT_BYTES);
        let length = length.ok_or(Denial::BodyTooLarge)?;
        match self.content_length {
            Some(before) if before != length => {
                return Err(Denial::Desync(DesyncReason::MultipleContentLength));
            }
            Some(_) => findings.add(DesyncReason::DuplicateContentLength),
            None => self.content_length = Some(length),
        }
        Ok(())
    }

    fn take_coding(&mut self, value: &[u8]) -> Result<(), Denial> {
        if value.eq_ignore_ascii_case(b"chunked") {
            if self.chunked {
                return Err(Denial::Desync(DesyncReason::MultipleTransferEncodingChunked));
            }
            self.chunked = true;
            return Ok(());
        }
        let chunked =
            list_elements(value).filter(|coding| coding.eq_ignore_ascii_case(b"chunked")).count();
        if chunked > 1 {
            return Err(Denial::Desync(DesyncReason::MultipleTransferEncodingChunked));
        }
        let known = |coding: &[u8]| {
            [&b"gzip"[..], b"x-gzip", b"deflate", b"compress", b"x-compress", b"chunked"]
                .iter()
                .any(|known| coding.eq_ignore_ascii_case(known))
        };
        // A registered coding that is not supported gets 501; anything else is suspicious.
        if list_elements(value).all(known) {
            return Err(Denial::NotImplemented(
                "unsupported transfer-encoding: only chunked is supported",
            ));
        }
        Err(Denial::Desync(DesyncReason::BadTransferEncoding))
    }
}

/// Whether a header name equals `content-length` or `transfer-encoding` except for its separators: some services read
/// `_` as `-`.
pub(crate) fn looks_like_framing(name: &[u8]) -> bool {
    let letters = |text: &'static [u8]| text.iter().filter(|byte| byte.is_ascii_alphanumeric());
    let same = |word: &'static [u8]| {
        let own = name.iter().filter(|byte| byte.is_ascii_alphanumeric());
        own.map(u8::to_ascii_lowercase).eq(letters(word).copied())
    };
    // The shortest is `contentlength`; the longest, `transfer-encoding` with some extra separators.
    matches!(name.len(), 13..=20) && (same(b"content-length") || same(b"transfer-encoding"))
}

/// The fault of a response whose headers do not frame it. The number of framing headers says more than what is wrong
/// with one of them.
pub(super) fn framing_fault(headers: &[Header<'_>], denial: Denial) -> ResponseFault {
    let count =
        |name: &str| headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name)).count();
    match (count("transfer-encoding"), count("content-length"), denial) {
        (2.., _, _) => ResponseFault::SeveralCodings,
        (1, 1.., _) => ResponseFault::LengthAndCoding,
        (_, _, Denial::Desync(reason)) => ResponseFault::of_reason(reason),
        (_, _, Denial::BodyTooLarge) => ResponseFault::BodyTooLarge,
        (1, _, _) => ResponseFault::BadCoding,
        _ => ResponseFault::BadHeader,
    }
}
