//! Frames of HTTP/2, as far as they are seen on their way past the library (RFC 9113, section 4.1).

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
/// What a client sends before its first frame (RFC 9113, section 3.4).
pub(super) const PREFACE_BYTES: u32 = 24;

/// What a frame says before its payload.
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

    /// Whether its payload has a size that its kind may have. The library calls every other size a
    /// breach of protocol, which the standard does not.
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

    /// Whether a SETTINGS frame asks for a window that none may have (RFC 9113, section 6.5.2), as far as
    /// its payload is at hand.
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

    /// Why it resets a stream, as far as its payload is at hand.
    pub(super) fn reset_reason(self, payload: &[u8]) -> Option<Reason> {
        let code = payload.first_chunk().filter(|_| self.kind == RST_STREAM)?;
        Some(u32::from_be_bytes(*code).into())
    }

    /// Whether a SETTINGS frame makes the table of header compression smaller than it is at first (RFC 7541,
    /// section 4.2), as far as its payload is at hand.
    pub(super) fn shrinks_table(self, payload: &[u8]) -> bool {
        const FIRST_BYTES: u32 = 4096;
        let (settings, _) = payload.as_chunks::<6>();
        let shrinks = |setting: &[u8; 6]| {
            let [a, b, size @ ..] = *setting;
            [a, b] == [0, 1] && u32::from_be_bytes(size) < FIRST_BYTES
        };
        self.kind == SETTINGS && self.flags & ACK == 0 && settings.iter().any(shrinks)
    }

    /// Whether it may be the first (RFC 9113, section 3.4).
    pub(super) fn check_first(self) -> Result<(), Reason> {
        let is_settings = self.kind == SETTINGS && self.flags & ACK == 0;
        if is_settings { Ok(()) } else { Err(Reason::PROTOCOL_ERROR) }
    }

    /// Whether a field section is open behind it, which nothing may interrupt; none when it has nothing
    /// to do with one.
    pub(super) fn leaves_section_open(self) -> Option<bool> {
        matches!(self.kind, HEADERS | CONTINUATION).then_some(self.flags & END_HEADERS == 0)
    }
}

/// Sees frames in the bytes of one direction.
#[derive(Debug)]
pub(super) struct Frames {
    /// The bytes of the frame's payload that are still to come, or of what stands before the first.
    pub(super) left: u32,
    header: [u8; HEADER_BYTES],
    /// How many of them have come.
    pub(super) have: usize,
}

impl Frames {
    pub(super) fn behind(preface: u32) -> Self {
        Self { left: preface, header: [0; HEADER_BYTES], have: 0 }
    }

    /// How many of the next bytes belong to the frame that has begun. None when its header ends behind them.
    pub(super) fn open_bytes(&self, next: &[u8]) -> Option<usize> {
        if self.have == 0 {
            return Some(self.left as usize);
        }
        let mut header = self.header;
        let missing = header.get_mut(self.have..)?;
        let count = missing.len();
        missing.copy_from_slice(next.get(..count)?);
        Some(count + FrameHeader::read(header).length as usize)
    }

    /// Goes through bytes; gives each frame whose header is whole, with what of its payload is at hand.
    pub(super) fn see(&mut self, mut bytes: &[u8], mut each: impl FnMut(FrameHeader, &[u8])) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let skipped = bytes.len().min(self.left as usize);
                bytes = bytes.get(skipped..).unwrap_or_default();
                self.left -= u32::try_from(skipped).unwrap_or(self.left);
                continue;
            }
            let header = match bytes.split_first_chunk() {
                // As it nearly always is, all of it has come at once.
                Some((header, rest)) if self.have == 0 => {
                    bytes = rest;
                    *header
                }
                _ => {
                    let room = self.header.iter_mut().skip(self.have);
                    let came = room.zip(bytes).map(|(place, byte)| *place = *byte).count();
                    bytes = bytes.get(came..).unwrap_or_default();
                    self.have += came;
                    if self.have < HEADER_BYTES {
                        return;
                    }
                    self.have = 0;
                    self.header
                }
            };
            let header = FrameHeader::read(header);
            self.left = header.length;
            let payload = bytes.get(..bytes.len().min(header.length as usize)).unwrap_or_default();
            each(header, payload);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let [_, high, middle, low] = u32::try_from(payload).expect("short").to_be_bytes();
        [&[high, middle, low, kind, 0, 0, 0, 0, 1][..], &vec![kind; payload]].concat()
    }

    #[test]
    fn frames_are_seen_however_the_bytes_come() {
        let all = [frame(DATA, 300), frame(PING, 8), frame(DATA, 0), frame(HEADERS, 1)].concat();
        let wanted = [(DATA, 300), (PING, 8), (DATA, 0), (HEADERS, 1)];
        for size in 1..all.len() {
            let (mut frames, mut seen) = (Frames::behind(0), Vec::new());
            for part in all.chunks(size) {
                frames.see(part, |header, _| seen.push((header.kind, header.length)));
            }
            assert_eq!(seen, wanted, "in parts of {size}");
            assert_eq!((frames.left, frames.have), (0, 0));
        }
    }

    #[test]
    fn end_of_a_frame_is_found_wherever_it_was_divided() {
        let all = frame(DATA, 20);
        for seen in 0..=all.len() {
            let mut frames = Frames::behind(0);
            frames.see(&all[..seen], |_, _| {});
            let rest = &all[seen..];
            let expected = if seen == 0 { 0 } else { rest.len() };
            assert_eq!(frames.open_bytes(rest), Some(expected), "{seen} bytes");
            let part = &rest[..rest.len().min(1)];
            let is_header = (1..HEADER_BYTES - 1).contains(&seen);
            assert_eq!(frames.open_bytes(part).is_none(), is_header, "{seen} bytes");
        }
    }

    #[test]
    fn sizes_are_those_of_the_kind() {
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
