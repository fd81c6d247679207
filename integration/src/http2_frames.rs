//! Sends and reads single HTTP/2 frames, including malformed ones that no HTTP/2 library would
//! send.
//!
//! Field sections are encoded as literals without indexing and without Huffman coding, so each can
//! be decoded by itself. Of a response, only the status is decoded.

use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use crate::wait::DEADLINE;

/// The client connection preface (RFC 9113, section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Frame types (RFC 9113, section 6).
pub mod kind {
    #![expect(missing_docs, reason = "the names of the RFC")]
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
    /// A type that no specification defines.
    pub const UNKNOWN: u8 = 0xfa;
}

/// Frame flags.
pub mod flag {
    #![expect(missing_docs, reason = "the names of the RFC")]
    pub const NONE: u8 = 0;
    pub const ACK: u8 = 1;
    pub const END_STREAM: u8 = 1;
    pub const END_HEADERS: u8 = 4;
    pub const PADDED: u8 = 8;
    pub const PRIORITY: u8 = 0x20;
    /// A complete request in one HEADERS frame.
    pub const WHOLE: u8 = END_STREAM | END_HEADERS;
}

/// Error codes (RFC 9113, section 7).
pub mod code {
    #![expect(missing_docs, reason = "the names of the RFC")]
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

/// Encodes a frame.
///
/// # Panics
/// If the payload is longer than a 24-bit length can express.
#[must_use]
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [none, length @ ..] =
        u32::try_from(payload.len()).expect("the payload length fits in 32 bits").to_be_bytes();
    assert_eq!(none, 0, "{} bytes are too many for a frame", payload.len());
    [&length[..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Encodes a HEADERS frame.
#[must_use]
pub fn headers(flags: u8, stream: u32, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(kind::HEADERS, flags, stream, &block(fields))
}

/// The header fields of a GET of a path.
#[must_use]
pub fn get(path: &str) -> [(&str, &str); 4] {
    [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", path)]
}

/// Encodes header fields (RFC 7541, section 6.2.2).
#[must_use]
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| header(name, value)).collect()
}

fn header(name: &str, value: &str) -> Vec<u8> {
    [vec![0], text(name), text(value)].concat()
}

/// A string after its length, an integer with a seven-bit prefix (RFC 7541, section 5.1).
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

/// One setting of a SETTINGS frame.
#[must_use]
pub fn setting(id: u16, value: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()
}

/// A received frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http2Frame {
    /// The frame type.
    pub kind: u8,
    /// The flags.
    pub flags: u8,
    /// The stream; 0 is the connection.
    pub stream: u32,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Http2Frame {
    /// Whether the frame ends its stream.
    #[must_use]
    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, kind::DATA | kind::HEADERS) && self.flags & flag::END_STREAM != 0
    }

    /// The 32-bit number at this offset of the payload: the error code of RST_STREAM (0) or GOAWAY
    /// (4).
    #[must_use]
    pub fn number(&self, at: usize) -> u32 {
        let bytes = self.payload.get(at..at + 4).and_then(|four| four.try_into().ok());
        bytes.map_or(u32::MAX, u32::from_be_bytes)
    }
}

/// The status at the start of a field section. Only the first response of a connection is decoded
/// correctly: later ones may use the dynamic table.
fn status(block: &[u8]) -> Option<u16> {
    // RFC 7541, appendix A.
    const KNOWN: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    match block {
        // A dynamic table size update.
        [0x20..=0x3e, rest @ ..] => status(rest),
        [indexed @ 0x88..=0x8e, ..] => KNOWN.get(usize::from(indexed - 0x88)).copied(),
        [0x08 | 0x48, length, digits @ ..] if *length >= 0x80 => Some(huffman_digits(digits)),
        [0x08 | 0x48, 3, digits @ ..] => std::str::from_utf8(digits.get(..3)?).ok()?.parse().ok(),
        _ => None,
    }
}

/// Decodes three Huffman-coded digits: 0 to 2 have five bits, the others six (RFC 7541, appendix
/// B).
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

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamOutcome {
    /// A complete response with this status.
    Answered(u16),
    /// The stream was reset with this error code.
    Reset(u32),
    /// GOAWAY with this error code, and the connection was closed.
    Goaway(u32),
    /// GOAWAY with this error code, but the connection stayed open.
    LeftOpen(u32),
    /// The connection was closed without GOAWAY.
    Closed,
    /// Nothing was received before the deadline.
    Silent,
}

/// Why no frame was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceiveError {
    /// The connection was closed or reset.
    Closed,
    /// Nothing was received before the deadline.
    Silent,
}

/// A connection.
#[derive(Debug)]
pub struct Http2FrameClient {
    stream: BufReader<TcpStream>,
}

impl Http2FrameClient {
    /// Connects, and sends nothing.
    ///
    /// # Panics
    /// If the port refuses connections.
    #[must_use]
    pub fn without_preface(port: u16) -> Self {
        let stream =
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the port accepts connections");
        stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        stream.set_write_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        Self { stream: BufReader::new(stream) }
    }

    /// Connects and sends the preface with empty SETTINGS.
    ///
    /// # Panics
    /// If the port refuses connections.
    #[must_use]
    pub fn connect(port: u16) -> Self {
        Self::with_settings(port, &[])
    }

    /// Connects and sends the preface with these settings.
    ///
    /// # Panics
    /// If the port refuses connections.
    #[must_use]
    pub fn with_settings(port: u16, settings: &[u8]) -> Self {
        let mut client = Self::without_preface(port);
        let hello = [PREFACE, &frame(kind::SETTINGS, flag::NONE, 0, settings)].concat();
        assert!(client.send(&hello), "the new connection is writable");
        client
    }

    /// A second handle of the connection, to read while another thread writes.
    ///
    /// # Panics
    /// If the file descriptor cannot be duplicated.
    #[must_use]
    pub fn reader(&self) -> Self {
        Self {
            stream: BufReader::new(self.tcp().try_clone().expect("the socket can be duplicated")),
        }
    }

    /// The TCP socket.
    #[must_use]
    pub fn tcp(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    /// Sends bytes; returns whether the socket accepted them.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.get_mut().write_all(bytes).is_ok()
    }

    /// Reads the next frame.
    ///
    /// # Errors
    /// If the connection ended, or nothing was received before the deadline.
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

    /// Reads frames until one matches `is_it`, and returns it.
    ///
    /// # Panics
    /// If no such frame is received.
    pub fn find(&mut self, awaited: &str, is_it: impl Fn(&Http2Frame) -> bool) -> Http2Frame {
        loop {
            let frame = self.receive();
            assert!(frame.is_ok(), "no {awaited} was received: {frame:?}");
            if let Some(frame) = frame.ok().filter(&is_it) {
                return frame;
            }
        }
    }

    /// Reads until the request of a stream, or the whole connection, has ended.
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

    /// An endpoint that reports a connection error must close the connection (RFC 9113, section
    /// 5.4.1).
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
    fn every_encoding_of_a_status_is_decoded() {
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
    fn string_length_above_126_uses_several_bytes() {
        assert_eq!(text("abc"), [3, b'a', b'b', b'c']);
        // 1337 - 127 (the prefix) = 1210 = 9 * 128 + 58.
        assert_eq!(text(&"a".repeat(1337))[..3], [0x7f, 0x80 | 58, 9]);
    }
}
