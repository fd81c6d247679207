//! A bloom filter of the header names in a message: most tests for an absent header cost one bit test and no search.

/// A summary of header names, with false positives and without false negatives. Letter case is ignored, and `-` equals
/// `_` after the first letter.
///
/// 62 bits are set by length and first letter, two by properties of a name ([`HAS_EXTENSION`], [`HAS_SPECIAL`]). The
/// set is one word because message heads are moved by value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct NameSet(u64);

/// The number of bits set by length and first letter.
const NAME_BITS: usize = 62;
/// Set when a name begins with `x`.
const HAS_EXTENSION: u64 = 1 << 62;
/// Set when a name has a `_` or a `"`.
const HAS_SPECIAL: u64 = 1 << 63;

/// The bit of a name. The factor is chosen so that the names that we search for do not share a bit with those that
/// browsers, gRPC clients and services send most.
const fn bit(name: &[u8]) -> u64 {
    match name.first() {
        Some(first) => 1 << ((name.len() + 41 * (*first | 0x20) as usize) % NAME_BITS),
        None => 0,
    }
}

/// Whether a name has a `_` or a `"`. Tests eight bytes at a time.
pub(crate) fn has_special(name: &[u8]) -> bool {
    let (words, rest) = name.as_chunks::<8>();
    words.iter().any(|word| has_special_byte(u64::from_ne_bytes(*word)))
        || rest.iter().any(|byte| matches!(byte, b'_' | b'"'))
}

/// Whether one of eight bytes is a `_` or a `"`.
const fn has_special_byte(word: u64) -> bool {
    const ONES: u64 = u64::MAX / 255;
    const fn zero_byte(word: u64) -> u64 {
        // The subtraction borrows from the highest bit of a zero byte, and possibly of the byte above it.
        word.wrapping_sub(ONES) & !word & (ONES << 7)
    }
    zero_byte(word ^ (ONES * b'_' as u64)) | zero_byte(word ^ (ONES * b'"' as u64)) != 0
}

impl NameSet {
    /// The set of these names, which must be lower case without `_` and `"`. Used with [`Self::may_have_any`].
    pub(crate) const fn of(names: &[&str]) -> Self {
        let mut bits = 0;
        let mut at = 0;
        while at < names.len() {
            #[expect(clippy::indexing_slicing, reason = "a constant function has no iterators")]
            let name = names[at];
            bits |= bit(name.as_bytes());
            at += 1;
        }
        Self(bits)
    }

    /// The set of the header names in a message head. `text` is the whole head: when it has neither `_` nor `"`, the
    /// names are not searched for them one by one.
    pub(crate) fn of_head<'n>(text: &[u8], names: impl Iterator<Item = &'n [u8]>) -> Self {
        if memchr::memchr2(b'_', b'"', text).is_some() {
            return names.collect();
        }
        let mut set = Self::default();
        names.for_each(|name| set.insert_plain(name));
        set
    }

    /// Adds a name in the letter case that it was sent in.
    pub(crate) fn insert(&mut self, name: &[u8]) {
        self.insert_plain(name);
        if has_special(name) {
            self.0 |= HAS_SPECIAL;
        }
    }

    /// Adds a name that is known to have neither `_` nor `"`.
    fn insert_plain(&mut self, name: &[u8]) {
        self.0 |= bit(name);
        if name.first().is_some_and(|first| first | 0x20 == b'x') {
            self.0 |= HAS_EXTENSION;
        }
    }

    /// Whether the set may contain this name, which must be lower case.
    #[inline]
    pub(crate) fn may_have(self, name: &str) -> bool {
        self.0 & bit(name.as_bytes()) != 0
    }

    /// Whether the set may contain one of these names.
    pub(crate) fn may_have_any(self, names: Self) -> bool {
        self.0 & names.0 != 0
    }

    /// Whether a name begins with `x`.
    pub(crate) fn has_extension(self) -> bool {
        self.0 & HAS_EXTENSION != 0
    }

    /// Whether a name has a `_` or a `"`.
    pub(crate) fn has_special(self) -> bool {
        self.0 & HAS_SPECIAL != 0
    }
}

impl<'n> FromIterator<&'n [u8]> for NameSet {
    fn from_iter<I: IntoIterator<Item = &'n [u8]>>(names: I) -> Self {
        let mut set = Self::default();
        names.into_iter().for_each(|name| set.insert(name));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inserted_name_is_found_in_any_spelling() {
        for name in ["te", "connection", "x-forwarded-for", "www-authenticate", "a"] {
            for written in [name.to_owned(), name.to_uppercase(), name.replace('-', "_")] {
                let set: NameSet = [written.as_bytes()].into_iter().collect();
                assert!(set.may_have(name), "{written}");
                assert!(set.may_have_any(NameSet::of(&["accept", name])), "{written}");
                assert_eq!(set.has_special(), written.contains('_'), "{written}");
                assert_eq!(set.has_extension(), name.starts_with('x'), "{written}");
            }
        }
    }

    #[test]
    fn underscore_or_quote_is_found_at_every_position() {
        for length in 1..30 {
            for filler in [b'a', b'-', b'^', b'!', b'\x7f', b'\xff', b'#'] {
                let plain = vec![filler; length];
                assert!(!has_special(&plain), "{plain:?}");
                for (at, special) in (0..length).flat_map(|at| [(at, b'_'), (at, b'"')]) {
                    let mut name = plain.clone();
                    name[at] = special;
                    assert!(has_special(&name), "{name:?}");
                    let set =
                        NameSet::of_head(b"no such character in this text", [&*plain].into_iter());
                    assert!(!set.has_special());
                    let set = NameSet::of_head(&name, [&*plain, &*name].into_iter());
                    assert!(set.has_special());
                }
            }
        }
    }

    #[test]
    fn browser_headers_do_not_match_hop_by_hop_headers() {
        let sent = ["host", "user-agent", "accept", "accept-encoding", "accept-language", "cookie"];
        let set: NameSet = sent.into_iter().map(str::as_bytes).collect();
        for name in ["te", "connection", "trailer", "upgrade", "authorization", "content-type"] {
            assert!(!set.may_have(name), "{name}");
        }
        assert!(!set.has_extension() && !set.has_special());
        assert!(!NameSet::default().may_have(""));
    }
}
