//! Serial numbers: the content of an INTEGER, two's complement, big-endian.

use crate::digest::hex;

/// The maximum length in bytes: 20 (RFC 5280, section 4.1.2.2), and one for the sign. A longer serial number could not
/// be revoked, because CRL entries have the same limit.
pub(crate) const SERIAL_LIMIT_BYTES: usize = 21;

/// Strips redundant sign bytes.
pub(crate) fn shortest(serial: &[u8]) -> &[u8] {
    let mut rest = serial;
    while let [sign @ (0 | 0xff), after @ ..] = rest
        && after.first().is_some_and(|next| (next & 0x80) == (sign & 0x80))
    {
        rest = after;
    }
    rest
}

/// Formats a serial number in upper-case hex with an even number of digits, without the sign byte.
pub(crate) fn serial_hex(serial: &[u8]) -> String {
    match serial {
        [0, digits @ ..] if !digits.is_empty() => hex(digits).to_uppercase(),
        digits => hex(digits).to_uppercase(),
    }
}
