//! Answers to requests that the library refuses by itself, before anything of them reaches us.
//!
//! The library resets the stream of a request whose head breaks a rule (RFC 9113, section 8.1.1), by
//! `PROTOCOL_ERROR`: its client learns nothing, and many clients take it for a broken connection. The reset is
//! replaced by a response with status 400 and no body, and a reset by `NO_ERROR` behind it.

use super::h2_frames::{FrameHeader, HEADER_BYTES, HEADERS, RST_STREAM};

const RESET_BYTES: usize = HEADER_BYTES + 4;
const PROTOCOL_ERROR: [u8; 4] = [0, 0, 0, 1];
const NO_ERROR: [u8; 4] = [0, 0, 0, 0];
/// END_STREAM and END_HEADERS.
const WHOLE: u8 = 5;
/// `:status: 400` in the static table of HPACK (RFC 7541, appendix A), which changes no state.
const STATUS_400: u8 = 0x80 | 12;

/// A reset among the frames that the library writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReplaceableReset {
    /// Where it begins.
    pub(super) offset: usize,
    pub(super) stream: u32,
}

impl ReplaceableReset {
    /// How many bytes the reset has.
    pub(super) const BYTES: usize = RESET_BYTES;

    /// The first in `bytes`, of which the first `skipped` belong to a frame before.
    pub(super) fn find(
        bytes: &[u8],
        skipped: usize,
        is_refused: impl Fn(u32) -> bool,
    ) -> Option<Self> {
        let mut offset = skipped;
        loop {
            let (header, rest) = bytes.get(offset..)?.split_first_chunk::<HEADER_BYTES>()?;
            let frame = FrameHeader::read(*header);
            let is_breach = frame.kind == RST_STREAM && rest.starts_with(&PROTOCOL_ERROR);
            if is_breach && is_refused(frame.stream) {
                return Some(Self { offset, stream: frame.stream });
            }
            offset += HEADER_BYTES + frame.length as usize;
        }
    }

    /// What is sent instead of the reset: a response, and the end of the stream.
    pub(super) fn answer(self) -> Vec<u8> {
        let stream = self.stream.to_be_bytes();
        let response = [&[0, 0, 1, HEADERS, WHOLE][..], &stream, &[STATUS_400]].concat();
        let reset = [&[0, 0, 4, RST_STREAM, 0][..], &stream, &NO_ERROR].concat();
        [response, reset].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("short");
        [&[0, 0, length, kind, 0, 0, 0, 0, stream], payload].concat()
    }

    #[test]
    fn only_a_protocol_error_on_a_stream_that_was_kept_back_is_a_refusal() {
        let ping = frame(6, 0, &[0; 8]);
        let reset = |stream, code| frame(RST_STREAM, stream, &[0, 0, 0, code]);
        let bytes = [&[9; 3][..], &ping, &reset(3, 1), &reset(5, 8), &reset(5, 1), &ping].concat();
        let found = ReplaceableReset::find(&bytes, 3, |stream| stream == 5);
        assert_eq!(found, Some(ReplaceableReset { offset: 3 + 17 + 13 + 13, stream: 5 }));
        assert_eq!(ReplaceableReset::find(&bytes, 3, |_| false), None);
        assert_eq!(ReplaceableReset::find(&bytes[..40], 3, |stream| stream == 5), None);
        assert_eq!(ReplaceableReset::find(&bytes, 500, |_| true), None);
    }

    #[test]
    fn answer_is_a_response_and_a_reset() {
        let answer = ReplaceableReset { offset: 0, stream: 7 }.answer();
        let (response, reset) = answer.split_at(10);
        assert_eq!(response, [0, 0, 1, 1, 5, 0, 0, 0, 7, 0x8c]);
        assert_eq!(reset, frame(RST_STREAM, 7, &[0; 4]));
    }
}
