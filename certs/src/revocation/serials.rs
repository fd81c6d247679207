//! A compact set of serial numbers: each takes as many bytes as it has, and a lookup is a binary search.

use crate::serial::{SERIAL_LIMIT_BYTES, shortest};

/// A set of serial numbers (two's complement, big-endian). Immutable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Serials {
    /// The serial numbers of each length, sorted and concatenated.
    groups: Box<[Group]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    length: usize,
    bytes: Box<[u8]>,
}

/// A serial number is longer than permitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLong;

impl Serials {
    /// Creates the set from serial numbers in any order.
    ///
    /// # Errors
    /// A serial number is too long.
    pub(crate) fn new(mut all: Vec<&[u8]>) -> Result<Self, TooLong> {
        for serial in &mut all {
            *serial = shortest(serial);
        }
        if all.iter().any(|serial| serial.len() > SERIAL_LIMIT_BYTES) {
            return Err(TooLong);
        }
        all.sort_unstable_by_key(|serial| (serial.len(), *serial));
        all.dedup();
        let groups = all.chunk_by(|a, b| a.len() == b.len()).map(|group| Group {
            length: group.first().map_or(0, |serial| serial.len()),
            bytes: group.concat().into(),
        });
        Ok(Self { groups: groups.collect() })
    }

    /// Whether the set contains the serial number.
    pub(crate) fn contain(&self, serial: &[u8]) -> bool {
        let serial = shortest(serial);
        let group = self.groups.iter().find(|group| group.length == serial.len());
        group.is_some_and(|group| group.contains(serial))
    }

    /// The number of serial numbers.
    pub(crate) fn len(&self) -> usize {
        self.groups.iter().map(Group::len).sum()
    }

    /// The memory of the serial numbers in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.groups.iter().map(|group| group.bytes.len()).sum()
    }

    /// Iterates over the serial numbers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.groups.iter().flat_map(|group| group.bytes.chunks_exact(group.length.max(1)))
    }
}

impl Group {
    fn len(&self) -> usize {
        self.bytes.len() / self.length.max(1)
    }

    fn get(&self, index: usize) -> &[u8] {
        self.bytes
            .get(index * self.length..)
            .and_then(|rest| rest.get(..self.length))
            .unwrap_or(&[])
    }

    fn contains(&self, serial: &[u8]) -> bool {
        let mut from = 0;
        let mut to = self.len();
        while from < to {
            let middle = from + (to - from) / 2;
            match self.get(middle).cmp(serial) {
                std::cmp::Ordering::Equal => return true,
                std::cmp::Ordering::Less => from = middle + 1,
                std::cmp::Ordering::Greater => to = middle,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_set_contains_only_added_numbers() {
        let all: Vec<Vec<u8>> = (0u32..70_000).map(|n| (n * 3).to_be_bytes().to_vec()).collect();
        let serials = Serials::new(all.iter().rev().map(Vec::as_slice).collect()).unwrap();
        assert_eq!((serials.len(), serials.iter().count()), (70_000, 70_000));
        for n in 0u32..210_000 {
            assert_eq!(serials.contain(&n.to_be_bytes()), n % 3 == 0, "{n}");
        }
    }

    #[test]
    fn serial_numbers_compare_without_padding_and_with_sign() {
        let serials = Serials::new(vec![&[0, 0xff], &[0, 0, 7], &[0], &[0xff, 0x80]]).unwrap();
        assert_eq!(serials.len(), 4);
        let check = |serial: &[u8], expected| {
            assert_eq!(serials.contain(serial), expected, "{serial:x?}");
        };
        check(&[0, 0xff], true);
        check(&[0, 0, 0xff], true);
        check(&[0xff], false);
        check(&[7], true);
        check(&[0, 0], true);
        check(&[0x80], true);
        check(&[0, 0x80], false);
        check(&[], false);
        check(&[1; 40], false);
    }

    #[test]
    fn serial_number_uses_only_its_own_bytes() {
        let all: Vec<[u8; 20]> = (0..=255).map(|n| [n % 0x7f + 1; 20]).collect();
        let serials = Serials::new(all.iter().map(<[u8; 20]>::as_slice).collect()).unwrap();
        assert_eq!(serials.bytes(), serials.len() * 20);
        assert_eq!(Serials::new(vec![&[1; 22]]), Err(TooLong));
    }
}
