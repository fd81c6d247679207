//! Finds HTTP/2 frames in the bytes that are exchanged with the h2 crate (RFC 9113, section 4.1).

use h2::Reason;

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;
pub(super) const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

pub(super) const HEADER_BYTES: usize = 9;
/// The length of the connection preface, which a client sends before its first frame (RFC 9113, section 3.4).
pub(super) const PREFACE_BYTES: u32 = 24;

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHeader {
    pub(super) length: u32,
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
}

impl FrameHeader {
    pub(super) fn read(bytes: [u8; HEADER_BYTES]) -> Self {
        let [high, middle, low, kind, flags, a, b, c, d] = bytes;
        let stream = u32::from_be_bytes([a, b, c, d]) & 0x7fff_ffff;
        Self { length: u32::from_be_bytes([0, high, middle, low]), kind, flags, stream }
    }

    /// Checks that the payload has a size that its frame type allows. The h2 crate reports every other size as
    /// PROTOCOL_ERROR, while the standard requires FRAME_SIZE_ERROR.
    ///
    /// # Errors
    /// FRAME_SIZE_ERROR.
    pub(super) fn check_size(self) -> Result<(), Reason> {
        let fits = match self.kind {
            PRIORITY => self.length == 5,
            RST_STREAM | WINDOW_UPDATE => self.length == 4,
            SETTINGS if self.flags & ACK != 0 => self.length == 0,
            SETTINGS => self.length.is_multiple_of(6),
            PING => self.length == 8,
            GOAWAY => self.length >= 8,
            _ => true,
        };
        if fits { Ok(()) } else { Err(Reason::FRAME_SIZE_ERROR) }
    }

    /// Checks that a SETTINGS frame sets no window above 2^31-1 (RFC 9113, section 6.5.2), as far as its payload was
    /// received.
    ///
    /// # Errors
    /// FLOW_CONTROL_ERROR.
    pub(super) fn check_settings(self, payload: &[u8]) -> Result<(), Reason> {
        const INITIAL_WINDOW_SIZE: [u8; 2] = [0, 4];
        let (settings, _) = payload.as_chunks::<6>();
        let is_beyond = |setting: &[u8; 6]| {
            let [a, b, high, ..] = *setting;
            [a, b] == INITIAL_WINDOW_SIZE && high & 0x80 != 0
        };
        let beyond =
            self.kind == SETTINGS && self.flags & ACK == 0 && settings.iter().any(is_beyond);
        if beyond { Err(Reason::FLOW_CONTROL_ERROR) } else { Ok(()) }
    }

    /// The error code of an RST_STREAM frame. None for other frames, and when its payload was not received.
    pub(super) fn reset_reason(self, payload: &[u8]) -> Option<Reason> {
        let code = payload.first_chunk().filter(|_| self.kind == RST_STREAM)?;
        Some(u32::from_be_bytes(*code).into())
    }

    /// Whether a SETTINGS frame makes the HPACK table smaller than its initial size (RFC 7541, section 4.2), as far as
    /// its payload was received.
    pub(super) fn shrinks_table(self, payload: &[u8]) -> bool {
        const INITIAL_BYTES: u32 = 4096;
        let (settings, _) = payload.as_chunks::<6>();
        let shrinks = |setting: &[u8; 6]| {
            let [a, b, size @ ..] = *setting;
            [a, b] == [0, 1] && u32::from_be_bytes(size) < INITIAL_BYTES
        };
        self.kind == SETTINGS && self.flags & ACK == 0 && settings.iter().any(shrinks)
    }

    /// Checks that the first frame of a connection is SETTINGS (RFC 9113, section 3.4).
    ///
    /// # Errors
    /// PROTOCOL_ERROR.
    pub(super) fn check_first(self) -> Result<(), Reason> {
        let is_settings = self.kind == SETTINGS && self.flags & ACK == 0;
        if is_settings { Ok(()) } else { Err(Reason::PROTOCOL_ERROR) }
    }

    /// Whether CONTINUATION frames must follow. None for frames that carry no headers.
    pub(super) fn needs_continuation(self) -> Option<bool> {
        matches!(self.kind, HEADERS | CONTINUATION).then_some(self.flags & END_HEADERS == 0)
    }
}

/// Scans the bytes of one direction for frames.
#[derive(Debug)]
pub(super) struct FrameScanner {
    /// The missing bytes of the current frame's payload, or of the connection preface.
    pub(super) remaining: u32,
    header: [u8; HEADER_BYTES],
    /// How many bytes of a partial frame header were received.
    pub(super) header_bytes: usize,
}

impl FrameScanner {
    /// A scanner for a direction that begins with a preface of this many bytes.
    pub(super) fn after_preface(preface: u32) -> Self {
        Self { remaining: preface, header: [0; HEADER_BYTES], header_bytes: 0 }
    }

    /// How many of the `next` bytes belong to the current frame. None when its header is not complete with them.
    pub(super) fn current_frame_bytes(&self, next: &[u8]) -> Option<usize> {
        if self.header_bytes == 0 {
            return Some(self.remaining as usize);
        }
        let mut header = self.header;
        let missing = header.get_mut(self.header_bytes..)?;
        let count = missing.len();
        missing.copy_from_slice(next.get(..count)?);
        Some(count + FrameHeader::read(header).length as usize)
    }

    /// Scans bytes. Calls `each` for every frame whose header is complete, with the payload received so far.
    pub(super) fn scan(&mut self, mut bytes: &[u8], mut each: impl FnMut(FrameHeader, &[u8])) {
        while !bytes.is_empty() {
            if self.remaining > 0 {
                let skipped = bytes.len().min(self.remaining as usize);
                bytes = bytes.get(skipped..).unwrap_or_default();
                self.remaining -= u32::try_from(skipped).unwrap_or(self.remaining);
                continue;
            }
            let header = match bytes.split_first_chunk() {
                // The usual case: the whole header was received at once.
                Some((header, rest)) if self.header_bytes == 0 => {
                    bytes = rest;
                    *header
                }
                _ => {
                    let free = self.header.iter_mut().skip(self.header_bytes);
                    let copied = free.zip(bytes).map(|(slot, byte)| *slot = *byte).count();
                    bytes = bytes.get(copied..).unwrap_or_default();
                    self.header_bytes += copied;
                    if self.header_bytes < HEADER_BYTES {
                        return;
                    }
                    self.header_bytes = 0;
                    self.header
                }
            };
            let header = FrameHeader::read(header);
            self.remaining = header.length;
            let payload = bytes.get(..bytes.len().min(header.length as usize)).unwrap_or_default();
            each(header, payload);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let [_, high, middle, low] = u32::try_from(payload).expect("a short payload").to_be_bytes();
        [&[high, middle, low, kind, 0, 0, 0, 0, 1][..], &vec![kind; payload]].concat()
    }

    #[test]
    fn frames_are_found_however_the_bytes_are_split() {
        let all = [frame(DATA, 300), frame(PING, 8), frame(DATA, 0), frame(HEADERS, 1)].concat();
        let wanted = [(DATA, 300), (PING, 8), (DATA, 0), (HEADERS, 1)];
        for size in 1..all.len() {
            let mut frames = FrameScanner::after_preface(0);
            let mut seen = Vec::new();
            for part in all.chunks(size) {
                frames.scan(part, |header, _| seen.push((header.kind, header.length)));
            }
            assert_eq!(seen, wanted, "in parts of {size}");
            assert_eq!((frames.remaining, frames.header_bytes), (0, 0));
        }
    }

    #[test]
    fn end_of_a_frame_is_found_wherever_it_was_split() {
        let all = frame(DATA, 20);
        for seen in 0..=all.len() {
            let mut frames = FrameScanner::after_preface(0);
            frames.scan(&all[..seen], |_, _| {});
            let rest = &all[seen..];
            let expected = if seen == 0 { 0 } else { rest.len() };
            assert_eq!(frames.current_frame_bytes(rest), Some(expected), "{seen} bytes");
            let part = &rest[..rest.len().min(1)];
            let is_header = (1..HEADER_BYTES - 1).contains(&seen);
            assert_eq!(frames.current_frame_bytes(part).is_none(), is_header, "{seen} bytes");
        }
    }

    #[test]
    fn payload_sizes_not_allowed_for_a_frame_type_are_rejected() {
        let check = |kind: u8, flags: u8, length: u32, fits: bool| {
            let header = FrameHeader { length, kind, flags, stream: 0 };
            assert_eq!(header.check_size().is_ok(), fits, "{header:?}");
        };
        for (kind, length) in [(PRIORITY, 5), (RST_STREAM, 4), (PING, 8), (WINDOW_UPDATE, 4)] {
            check(kind, 0, length - 1, false);
            check(kind, 0, length, true);
            check(kind, 0, length + 1, false);
        }
        check(SETTINGS, 0, 0, true);
        check(SETTINGS, 0, 7, false);
        check(SETTINGS, 0, 12, true);
        check(SETTINGS, ACK, 6, false);
        check(SETTINGS, ACK, 0, true);
        check(GOAWAY, 0, 7, false);
        check(GOAWAY, 0, 100, true);
        check(DATA, 0, 1, true);
        check(250, 0, 1, true);
    }
}
