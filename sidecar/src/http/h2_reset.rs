//! Sends status 400 for malformed HTTP/2 requests that the h2 crate refuses before weft sees them.
//!
//! The h2 crate resets the stream of a malformed request with `PROTOCOL_ERROR` (RFC 9113, section 8.1.1). The client
//! does not learn the reason, and many clients treat it as a broken connection. The reset is therefore replaced by a
//! response with status 400 and no body, followed by a reset with `NO_ERROR`.

use super::h2_frames::{FrameHeader, HEADER_BYTES, HEADERS, RST_STREAM};

const RESET_BYTES: usize = HEADER_BYTES + 4;
const PROTOCOL_ERROR: [u8; 4] = [0, 0, 0, 1];
const NO_ERROR: [u8; 4] = [0, 0, 0, 0];
/// The flags END_STREAM and END_HEADERS.
const END_STREAM_AND_HEADERS: u8 = 5;
/// `:status: 400` from the static HPACK table (RFC 7541, appendix A), which does not change the compression state.
const STATUS_400: u8 = 0x80 | 12;

/// An RST_STREAM frame in the output of the h2 crate that is to be replaced by a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReplaceableReset {
    /// Where it begins in the output.
    pub(super) offset: usize,
    pub(super) stream: u32,
}

impl ReplaceableReset {
    /// The size of the RST_STREAM frame.
    pub(super) const BYTES: usize = RESET_BYTES;

    /// Finds the first reset with PROTOCOL_ERROR of a stream for which `is_refused` is true. The first `skipped` bytes
    /// belong to an earlier frame.
    pub(super) fn find(
        bytes: &[u8],
        skipped: usize,
        is_refused: impl Fn(u32) -> bool,
    ) -> Option<Self> {
        let mut offset = skipped;
        loop {
            let (header, rest) = bytes.get(offset..)?.split_first_chunk::<HEADER_BYTES>()?;
            let frame = FrameHeader::read(*header);
            let is_protocol_error = frame.kind == RST_STREAM && rest.starts_with(&PROTOCOL_ERROR);
            if is_protocol_error && is_refused(frame.stream) {
                return Some(Self { offset, stream: frame.stream });
            }
            offset += HEADER_BYTES + frame.length as usize;
        }
    }

    /// The frames that are sent instead: a response and the end of the stream.
    pub(super) fn response(self) -> Vec<u8> {
        let stream = self.stream.to_be_bytes();
        let response =
            [&[0, 0, 1, HEADERS, END_STREAM_AND_HEADERS][..], &stream, &[STATUS_400]].concat();
        let reset = [&[0, 0, 4, RST_STREAM, 0][..], &stream, &NO_ERROR].concat();
        [response, reset].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("a short payload");
        [&[0, 0, length, kind, 0, 0, 0, 0, stream], payload].concat()
    }

    #[test]
    fn only_protocol_errors_of_requests_not_yet_accepted_are_found() {
        let ping = frame(6, 0, &[0; 8]);
        let reset = |stream, code| frame(RST_STREAM, stream, &[0, 0, 0, code]);
        let bytes = [&[9; 3][..], &ping, &reset(3, 1), &reset(5, 8), &reset(5, 1), &ping].concat();
        let reset_found = ReplaceableReset::find(&bytes, 3, |stream| stream == 5);
        assert_eq!(reset_found, Some(ReplaceableReset { offset: 3 + 17 + 13 + 13, stream: 5 }));
        assert_eq!(ReplaceableReset::find(&bytes, 3, |_| false), None);
        assert_eq!(ReplaceableReset::find(&bytes[..40], 3, |stream| stream == 5), None);
        assert_eq!(ReplaceableReset::find(&bytes, 500, |_| true), None);
    }

    #[test]
    fn replacement_is_a_400_response_and_a_no_error_reset() {
        let replacement = ReplaceableReset { offset: 0, stream: 7 }.response();
        let (response, reset) = replacement.split_at(10);
        assert_eq!(response, [0, 0, 1, 1, 5, 0, 0, 0, 7, 0x8c]);
        assert_eq!(reset, frame(RST_STREAM, 7, &[0; 4]));
    }
}
