//! HTTP/2 by single frames, right or wrong, as no proper client would send them.
//!
//! Field sections are literals without Huffman coding that no table remembers, so that each stands for
//! itself. Of answers no more is understood than their status.

use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use crate::wait::DEADLINE;

/// What a client says first (RFC 9113, section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Kinds of frames (RFC 9113, section 6).
pub mod kind {
    #![allow(missing_docs, reason = "the RFC's own words")]
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PUSH_PROMISE: u8 = 5;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
    /// None that anybody has given a meaning.
    pub const UNKNOWN: u8 = 0xfa;
}

/// Flags of frames.
pub mod flag {
    #![allow(missing_docs, reason = "the RFC's own words")]
    pub const NONE: u8 = 0;
    pub const ACK: u8 = 1;
    pub const END_STREAM: u8 = 1;
    pub const END_HEADERS: u8 = 4;
    pub const PADDED: u8 = 8;
    pub const PRIORITY: u8 = 0x20;
    /// A whole request in one frame.
    pub const WHOLE: u8 = END_STREAM | END_HEADERS;
}

/// Reasons of an end (RFC 9113, section 7).
pub mod code {
    #![allow(missing_docs, reason = "the RFC's own words")]
    pub const NO_ERROR: u32 = 0;
    pub const PROTOCOL_ERROR: u32 = 1;
    pub const FLOW_CONTROL_ERROR: u32 = 3;
    pub const STREAM_CLOSED: u32 = 5;
    pub const FRAME_SIZE_ERROR: u32 = 6;
    pub const REFUSED_STREAM: u32 = 7;
    pub const CANCEL: u32 = 8;
    pub const COMPRESSION_ERROR: u32 = 9;
    pub const ENHANCE_YOUR_CALM: u32 = 11;
}

/// A frame to send.
///
/// # Panics
/// When the payload has more than 24 bits can tell.
#[must_use]
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [none, length @ ..] = u32::try_from(payload.len()).expect("it is short").to_be_bytes();
    assert_eq!(none, 0, "{} bytes are too many for a frame", payload.len());
    [&length[..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A frame of HEADERS with these fields.
#[must_use]
pub fn headers(flags: u8, stream: u32, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(kind::HEADERS, flags, stream, &block(fields))
}

/// The fields of a plain GET of a path.
#[must_use]
pub fn get(path: &str) -> [(&str, &str); 4] {
    [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", path)]
}

/// Fields, coded (RFC 7541, section 6.2.2).
#[must_use]
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| header(name, value)).collect()
}

fn header(name: &str, value: &str) -> Vec<u8> {
    [vec![0], text(name), text(value)].concat()
}

/// A text behind its length, an integer with a prefix of seven bits (RFC 7541, section 5.1).
fn text(text: &str) -> Vec<u8> {
    const PREFIX: u8 = 0x7f;
    let mut coded = match u8::try_from(text.len()) {
        Ok(length) if length < PREFIX => vec![length],
        _ => {
            let mut rest = text.len() - usize::from(PREFIX);
            let mut bytes = vec![PREFIX];
            while rest >= 0x80 {
                bytes.push(0x80 | u8::try_from(rest % 0x80).unwrap_or_default());
                rest /= 0x80;
            }
            bytes.push(u8::try_from(rest).unwrap_or_default());
            bytes
        }
    };
    coded.extend_from_slice(text.as_bytes());
    coded
}

/// One setting, as it stands in a frame of SETTINGS.
#[must_use]
pub fn setting(id: u16, value: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()
}

/// A frame that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http2Frame {
    /// Its kind.
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// Its stream; 0 is the connection.
    pub stream: u32,
    /// What it carries.
    pub payload: Vec<u8>,
}

impl Http2Frame {
    /// Whether nothing comes after it on its stream.
    #[must_use]
    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, kind::DATA | kind::HEADERS) && self.flags & flag::END_STREAM != 0
    }

    /// The four bytes at `at`, where RST_STREAM (0) and GOAWAY (4) say why.
    #[must_use]
    pub fn number(&self, at: usize) -> u32 {
        let bytes = self.payload.get(at..at + 4).and_then(|four| four.try_into().ok());
        bytes.map_or(u32::MAX, u32::from_be_bytes)
    }
}

/// The status that a field section begins with. It is understood in the first answer of a connection
/// only: later ones may refer to what a table remembers.
fn status(block: &[u8]) -> Option<u16> {
    // RFC 7541, appendix A.
    const KNOWN: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    match block {
        // A change of the table's size.
        [0x20..=0x3e, rest @ ..] => status(rest),
        [indexed @ 0x88..=0x8e, ..] => KNOWN.get(usize::from(indexed - 0x88)).copied(),
        [0x08 | 0x48, length, digits @ ..] if *length >= 0x80 => Some(huffman_digits(digits)),
        [0x08 | 0x48, 3, digits @ ..] => std::str::from_utf8(digits.get(..3)?).ok()?.parse().ok(),
        _ => None,
    }
}

/// Three digits: 0 to 2 have five bits, the others six (RFC 7541, appendix B).
fn huffman_digits(coded: &[u8]) -> u16 {
    let bytes = coded.iter().chain(&[0; 4]).take(4);
    let mut bits = bytes.fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
    (0..3).fold(0, |number, _| {
        let (digit, width) = match (bits >> 27, bits >> 26) {
            (short @ 0..=2, _) => (short, 5),
            (_, long) => (long.saturating_sub(0x19) + 3, 6),
        };
        bits <<= width;
        number * 10 + u16::try_from(digit).unwrap_or_default()
    })
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamOutcome {
    /// It was answered, to the end.
    Answered(u16),
    /// Its stream was reset for this reason.
    Reset(u32),
    /// The connection was ended for this reason, and closed.
    Goaway(u32),
    /// The connection was ended for this reason, and yet left open.
    LeftOpen(u32),
    /// The connection was closed without a word.
    Closed,
    /// Nothing, for as long as one may wait.
    Silent,
}

/// Why no frame came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceiveError {
    /// The connection is closed, or was reset.
    Closed,
    /// Nothing comes, for as long as one may wait.
    Silent,
}

/// A connection.
#[derive(Debug)]
pub struct Http2FrameClient {
    stream: BufReader<TcpStream>,
}

impl Http2FrameClient {
    /// A connection that has said nothing.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn without_preface(port: u16) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("it is above zero");
        stream.set_write_timeout(Some(DEADLINE)).expect("it is above zero");
        Self { stream: BufReader::new(stream) }
    }

    /// A connection that has said hello.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn connect(port: u16) -> Self {
        Self::with_settings(port, &[])
    }

    /// The same with settings.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn with_settings(port: u16, settings: &[u8]) -> Self {
        let mut client = Self::without_preface(port);
        let hello = [PREFACE, &frame(kind::SETTINGS, flag::NONE, 0, settings)].concat();
        assert!(client.send(&hello), "it was taken in a moment ago");
        client
    }

    /// The same connection again, to read it while it is written to.
    ///
    /// # Panics
    /// When there are too many files open.
    #[must_use]
    pub fn reader(&self) -> Self {
        Self { stream: BufReader::new(self.tcp().try_clone().expect("a file more")) }
    }

    /// The connection itself.
    #[must_use]
    pub fn tcp(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    /// Sends bytes; whether they were taken.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.get_mut().write_all(bytes).is_ok()
    }

    /// The next frame.
    ///
    /// # Errors
    /// When none comes.
    pub fn receive(&mut self) -> Result<Http2Frame, ReceiveError> {
        let mut header = [0; 9];
        self.read(&mut header)?;
        let [high, middle, low, kind, flags, stream @ ..] = header;
        let length = u32::from_be_bytes([0, high, middle, low]);
        let stream = u32::from_be_bytes(stream) & 0x7fff_ffff;
        let mut payload = vec![0; length as usize];
        self.read(&mut payload)?;
        Ok(Http2Frame { kind, flags, stream, payload })
    }

    fn read(&mut self, into: &mut [u8]) -> Result<(), ReceiveError> {
        self.stream.read_exact(into).map_err(|error| match error.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => ReceiveError::Silent,
            _ => ReceiveError::Closed,
        })
    }

    /// The next frame that `is_it` picks; those before it are passed over.
    ///
    /// # Panics
    /// When none comes.
    pub fn find(&mut self, awaited: &str, is_it: impl Fn(&Http2Frame) -> bool) -> Http2Frame {
        loop {
            let frame = self.receive();
            assert!(frame.is_ok(), "no {awaited} came: {frame:?}");
            if let Some(frame) = frame.ok().filter(&is_it) {
                return frame;
            }
        }
    }

    /// What becomes of the request of a stream, or of the whole connection.
    pub fn outcome(&mut self, stream: u32) -> StreamOutcome {
        let mut answered = 0;
        loop {
            let frame = match self.receive() {
                Ok(frame) => frame,
                Err(ReceiveError::Closed) => return StreamOutcome::Closed,
                Err(ReceiveError::Silent) => return StreamOutcome::Silent,
            };
            match frame.kind {
                kind::GOAWAY if frame.number(4) != code::NO_ERROR => {
                    return self.ended(frame.number(4));
                }
                kind::RST_STREAM if frame.stream == stream => {
                    return StreamOutcome::Reset(frame.number(0));
                }
                kind::HEADERS if frame.stream == stream && answered == 0 => {
                    answered = status(&frame.payload).unwrap_or_default();
                }
                _ => {}
            }
            if frame.stream == stream && frame.ends_stream() {
                return StreamOutcome::Answered(answered);
            }
        }
    }

    /// Who says that a connection has ended must close it (RFC 9113, section 5.4.1).
    fn ended(&mut self, reason: u32) -> StreamOutcome {
        loop {
            match self.receive() {
                Ok(_) => {}
                Err(ReceiveError::Closed) => return StreamOutcome::Goaway(reason),
                Err(ReceiveError::Silent) => return StreamOutcome::LeftOpen(reason),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_status_is_understood() {
        let check = |block: &[u8], wanted| assert_eq!(status(block), wanted, "{block:x?}");
        check(&[0x88], Some(200));
        check(&[0x8c, 0x01], Some(400));
        check(&[0x20, 0x88], Some(200));
        check(&[0x48, 3, b'4', b'3', b'1'], Some(431));
        // RFC 7541, appendices C.6.1 and C.6.3.
        check(&[0x48, 0x82, 0x64, 0x02], Some(302));
        check(&[0x48, 0x83, 0x64, 0x0e, 0xff], Some(307));
        check(&[0xbf], None);
    }

    #[test]
    fn a_long_text_has_a_long_length() {
        assert_eq!(text("abc"), [3, b'a', b'b', b'c']);
        // 1337, of which 127 stand in the prefix: 1210 = 9 * 128 + 58.
        assert_eq!(text(&"a".repeat(1337))[..3], [0x7f, 0x80 | 58, 9]);
    }
}
