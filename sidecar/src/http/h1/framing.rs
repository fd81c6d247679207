//! What the headers of a message say of the message itself: how its body is framed, and what becomes
//! of the connection (RFC 9112, sections 6, 7 and 9).

use std::time::Duration;

use httparse::Header;

use crate::denial::Denial;
use crate::http::authority::is_authority;
use crate::http::desync::{DesyncFindings, DesyncReason};
use crate::http::head::{BODY_LIMIT_BYTES, HttpVersion, list_elements};

/// What the headers say.
#[derive(Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is whether a token stood in its field")]
pub(super) struct FramingHeaders {
    pub(super) host: Option<String>,
    pub(super) content_length: Option<u64>,
    pub(super) chunked: bool,
    pub(super) close: bool,
    pub(super) keep_alive: bool,
    /// Whether `connection` names `upgrade`.
    pub(super) upgrades: bool,
    /// Whether `upgrade` asks for WebSocket.
    pub(super) websocket: bool,
    pub(super) expects_continue: bool,
    /// How long the other side keeps the connection (RFC 2068, section 19.7.1.1).
    pub(super) kept_for: Option<Duration>,
    /// Whether a field's name looks like one of those that frame a message.
    suspicious: bool,
}

impl FramingHeaders {
    /// Reads the headers of a message of that version. What departs from the standard is added to
    /// `found`.
    ///
    /// # Errors
    /// What has no reading at all.
    pub(super) fn of(
        headers: &[Header<'_>],
        version: HttpVersion,
        found: &mut DesyncFindings,
    ) -> Result<Self, Denial> {
        let mut facts = Self::default();
        for header in headers {
            facts.take(header, found)?;
        }
        let frames = facts.chunked || facts.content_length.is_some();
        if facts.suspicious && frames {
            return Err(Denial::Desync(DesyncReason::SuspiciousTeClPresent));
        }
        if facts.suspicious {
            found.add(DesyncReason::SuspiciousHeader);
        }
        if facts.chunked && version == HttpVersion::Http10 {
            return Err(Denial::Malformed("transfer-encoding in HTTP/1.0"));
        }
        if facts.chunked && facts.content_length.is_some() {
            found.add(DesyncReason::BothTeClPresent);
            facts.content_length = None;
        }
        Ok(facts)
    }

    fn take(&mut self, header: &Header<'_>, found: &mut DesyncFindings) -> Result<(), Denial> {
        // Most names are none of these, and their length tells.
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
                self.kept_for = seconds.map(Duration::from_secs);
            }
            14 if header.name.eq_ignore_ascii_case("content-length") => {
                self.take_length(header.value, found)?;
            }
            17 if header.name.eq_ignore_ascii_case("transfer-encoding") => {
                self.take_coding(header.value)?;
            }
            _ => self.suspicious |= looks_like_framing(header.name.as_bytes()),
        }
        if !header.value.is_ascii() {
            found.add(DesyncReason::NonCompliantHeader);
        }
        Ok(())
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

    fn take_length(&mut self, value: &[u8], found: &mut DesyncFindings) -> Result<(), Denial> {
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
            Some(_) => found.add(DesyncReason::DuplicateContentLength),
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
        // What is a coding, only not one of ours, is told apart from what merely looks like one.
        if list_elements(value).all(known) {
            return Err(Denial::NotImplemented("a transfer-encoding other than chunked"));
        }
        Err(Denial::Desync(DesyncReason::BadTransferEncoding))
    }
}

/// Whether a name would be one that frames a message, were it not for its separators: some services
/// take `_` for `-`.
pub(crate) fn looks_like_framing(name: &[u8]) -> bool {
    let letters = |text: &'static [u8]| text.iter().filter(|byte| byte.is_ascii_alphanumeric());
    let same = |word: &'static [u8]| {
        let own = name.iter().filter(|byte| byte.is_ascii_alphanumeric());
        own.map(u8::to_ascii_lowercase).eq(letters(word).copied())
    };
    // The letters of neither can be fewer than this, nor with a separator or two more than that.
    matches!(name.len(), 13..=20) && (same(b"content-length") || same(b"transfer-encoding"))
}
