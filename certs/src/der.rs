//! A reader for the subset of DER (X.690) that certificates and CRLs use.
//!
//! x509-parser reads what is read once, such as the certificates of a trust bundle. It does not replace this reader in
//! handshakes and for CRLs:
//!
//! - It skips malformed parts. Name constraints with a malformed list become no constraints, a distribution point whose
//!   `onlyContainsUserCerts` is neither TRUE nor FALSE covers all certificates, and a malformed attribute disappears from
//!   its name. Such certificates and CRLs must be rejected.
//! - It allocates for each name, extension and CRL entry. One certificate takes 2.0 microseconds, twice as long as the
//!   whole check of a client with a cached path. A CRL of 100,000 entries takes 20 ms, with 88 bytes an entry before a limit on
//!   their number can apply. Loading it with this reader, including its signature and the sorted index, takes 8 ms.
//! - It does not keep the bytes of the names of distribution points, by which a certificate and its CRL are matched.

use std::time::Duration;

use rustls_pki_types::UnixTime;

/// An element: its tag, its content, and all its bytes including the header.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Element<'a> {
    pub(crate) tag: u8,
    pub(crate) content: &'a [u8],
    pub(crate) whole: &'a [u8],
}

pub(crate) const BOOLEAN: u8 = 0x01;
pub(crate) const INTEGER: u8 = 0x02;
pub(crate) const BIT_STRING: u8 = 0x03;
pub(crate) const OCTET_STRING: u8 = 0x04;
pub(crate) const OBJECT_IDENTIFIER: u8 = 0x06;
pub(crate) const UTC_TIME: u8 = 0x17;
pub(crate) const GENERALIZED_TIME: u8 = 0x18;
pub(crate) const SEQUENCE: u8 = 0x30;

/// Reads elements in order. No method reads past the end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DerReader<'a>(pub(crate) &'a [u8]);

impl<'a> DerReader<'a> {
    /// The next element of any tag.
    pub(crate) fn any(&mut self) -> Option<Element<'a>> {
        let (&[tag, first], after) = self.0.split_first_chunk::<2>()?;
        let (length, header) = if first < 0x80 {
            (usize::from(first), 2)
        } else {
            let count = usize::from(first & 0x7f);
            if count == 0 || count > 4 {
                return None;
            }
            let digits = after.get(..count)?;
            (
                digits.iter().fold(0usize, |length, digit| length << 8 | usize::from(*digit)),
                2 + count,
            )
        };
        let end = header.checked_add(length)?;
        let whole = self.0.get(..end)?;
        let content = whole.get(header..)?;
        self.0 = self.0.get(end..)?;
        Some(Element { tag, content, whole })
    }

    /// The next element, which must have this tag.
    pub(crate) fn expect(&mut self, tag: u8) -> Option<Element<'a>> {
        self.any().filter(|element| element.tag == tag)
    }

    /// The next element if it has this tag; otherwise nothing is read.
    pub(crate) fn optional(&mut self, tag: u8) -> Option<Element<'a>> {
        if self.0.first() == Some(&tag) { self.any() } else { None }
    }

    /// Whether everything was read.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A SEQUENCE with this content.
pub(crate) fn sequence(content: &[u8]) -> Vec<u8> {
    let digits = content.len().to_be_bytes();
    let digits: Vec<u8> = digits.into_iter().skip_while(|digit| *digit == 0).collect();
    let header = match (content.len(), u8::try_from(digits.len())) {
        (short @ 0..0x80, _) => vec![SEQUENCE, u8::try_from(short).unwrap_or_default()],
        (_, count) => [&[SEQUENCE, 0x80 | count.unwrap_or_default()], digits.as_slice()].concat(),
    };
    [header.as_slice(), content].concat()
}

/// The value of a BOOLEAN. X.690, section 11.1: DER allows two encodings.
pub(crate) fn boolean(content: &[u8]) -> Option<bool> {
    match content {
        [0] => Some(false),
        [0xff] => Some(true),
        _ => None,
    }
}

/// The value of a `Time` (RFC 5280, section 4.1.2.5). None if it is malformed or before 1970.
pub(crate) fn time(element: Element<'_>) -> Option<UnixTime> {
    let text = std::str::from_utf8(element.content).ok()?.strip_suffix('Z')?;
    let (year, rest) = match element.tag {
        UTC_TIME => {
            let (year, rest) = text.split_at_checked(2)?;
            let year: i32 = year.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        GENERALIZED_TIME => {
            let (year, rest) = text.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    let two = |at: usize| rest.get(at..at + 2)?.parse::<u8>().ok();
    if rest.len() != 10 {
        return None;
    }
    let month = time::Month::try_from(two(0)?).ok()?;
    let date = time::Date::from_calendar_date(year, month, two(2)?).ok()?;
    let at = time::Time::from_hms(two(4)?, two(6)?, two(8)?).ok()?;
    let seconds = u64::try_from(time::OffsetDateTime::new_utc(date, at).unix_timestamp()).ok()?;
    Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_with_invalid_length_is_rejected() {
        let check = |bytes: &[u8]| assert!(DerReader(bytes).any().is_none(), "{bytes:x?}");
        check(&[]);
        check(&[0x30]);
        check(&[0x30, 0x05, 0x00]);
        check(&[0x30, 0x80]);
        check(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]);
        check(&[0x30, 0x85, 0, 0, 0, 0, 1, 0]);
        assert_eq!(DerReader(&[0x04, 0x01, 0x07, 0x09]).any().map(|e| e.content), Some(&[7u8][..]));
    }

    #[test]
    fn utc_time_and_generalized_time_are_read() {
        let check = |tag, text: &str, expected| {
            let element = Element { tag, content: text.as_bytes(), whole: &[] };
            assert_eq!(time(element).map(|time| time.as_secs()), expected, "{text}");
        };
        check(UTC_TIME, "700101000000Z", Some(0));
        check(GENERALIZED_TIME, "20260101000000Z", Some(1_767_225_600));
        check(UTC_TIME, "261331000000Z", None);
        check(UTC_TIME, "2601010000Z", None);
    }
}
