//! Netlink messages (man 7 netlink): a header, a fixed part, then attributes of kind, length and value. The
//! value of an attribute can be a list of attributes.

/// The length of a message header.
pub(super) const HEADER_BYTES: usize = 16;
/// The length of an attribute header.
pub(crate) const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// The flag bits in the kind of an attribute, which say how its value is encoded.
const KIND_FLAGS: u16 = 0xc000;
pub(crate) const NESTED: u16 = 0x8000;

/// The kind of the message that ends a batch (`NFNL_MSG_BATCH_END`). The kernel does not acknowledge it.
pub(super) const BATCH_END: u16 = 0x11;

/// The attributes of a message, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Attributes(Vec<(u16, AttributeValue)>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AttributeValue {
    Bytes(Vec<u8>),
    Nested(Attributes),
    /// Encoded attributes, as received from the kernel.
    Encoded(Vec<u8>),
}

impl Attributes {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Appends an attribute.
    #[must_use]
    pub(crate) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.push((kind, AttributeValue::Bytes(value.to_vec())));
        self
    }

    /// Appends a number in network byte order.
    #[must_use]
    pub(crate) fn big_endian(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Appends a number in the byte order of this host.
    #[must_use]
    pub(crate) fn native(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Appends a zero-terminated text.
    #[must_use]
    pub(crate) fn text(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Appends an attribute that contains attributes.
    #[must_use]
    pub(crate) fn nested(mut self, kind: u16, value: Self) -> Self {
        self.0.push((kind, AttributeValue::Nested(value)));
        self
    }

    /// Appends an attribute that contains encoded attributes.
    #[must_use]
    pub(crate) fn nested_bytes(mut self, kind: u16, encoded: &[u8]) -> Self {
        self.0.push((kind, AttributeValue::Encoded(encoded.to_vec())));
        self
    }

    /// The first attribute.
    pub(crate) fn first(&self) -> Option<&(u16, AttributeValue)> {
        self.0.first()
    }

    /// The encoded length in bytes.
    fn length(&self) -> usize {
        let value = |value: &AttributeValue| match value {
            AttributeValue::Bytes(bytes) | AttributeValue::Encoded(bytes) => bytes.len(),
            AttributeValue::Nested(attributes) => attributes.length(),
        };
        let lengths = self.0.iter().map(|(_, attribute)| ATTRIBUTE_HEADER_BYTES + value(attribute));
        lengths.map(|length| length.next_multiple_of(4)).sum()
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        for (kind, value) in &self.0 {
            let start = out.len();
            let flag = match value {
                AttributeValue::Bytes(_) => 0,
                AttributeValue::Nested(_) | AttributeValue::Encoded(_) => NESTED,
            };
            out.extend([0, 0]);
            out.extend((kind | flag).to_ne_bytes());
            match value {
                AttributeValue::Bytes(bytes) | AttributeValue::Encoded(bytes) => out.extend(bytes),
                AttributeValue::Nested(attributes) => attributes.write(out),
            }
            set_length(out, start);
            pad(out);
        }
    }

    /// Whether the encoded attributes in `bytes` contain these ones: for each kind present here, exactly
    /// these values in this order. The kernel orders kinds as it likes and adds kinds of its own.
    pub(crate) fn is_contained_in(&self, bytes: &[u8]) -> bool {
        self.0.iter().all(|(kind, _)| {
            let expected = self.0.iter().filter(|(other, _)| other == kind).map(|(_, value)| value);
            let actual =
                attributes(bytes).filter(|(other, _)| other == kind).map(|(_, value)| value);
            expected.clone().count() == actual.clone().count()
                && expected.zip(actual).all(|(expected, actual)| expected.is(actual))
        })
    }
}

impl AttributeValue {
    fn is(&self, bytes: &[u8]) -> bool {
        match self {
            Self::Bytes(value) | Self::Encoded(value) => value == bytes,
            Self::Nested(attributes) => attributes.is_contained_in(bytes),
        }
    }
}

/// Decodes attributes into kind and value, up to the first malformed one.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> + Clone {
    std::iter::from_fn(move || {
        let (header, _) = bytes.split_first_chunk::<ATTRIBUTE_HEADER_BYTES>()?;
        let [length, kind] =
            [[header[0], header[1]], [header[2], header[3]]].map(u16::from_ne_bytes);
        let value = bytes.get(ATTRIBUTE_HEADER_BYTES..usize::from(length))?;
        bytes = bytes.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !KIND_FLAGS, value))
    })
}

/// The value of the first attribute of a kind.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(here, _)| *here == kind).map(|(_, value)| value)
}

/// A message to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetlinkMessage {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    /// The part before the attributes, whose layout depends on the kind.
    pub(crate) fixed: Vec<u8>,
    pub(crate) attributes: Attributes,
}

impl NetlinkMessage {
    /// The encoded length in bytes.
    pub(crate) fn length(&self) -> usize {
        HEADER_BYTES + self.fixed.len().next_multiple_of(4) + self.attributes.length()
    }

    pub(crate) fn write(&self, sequence: u32, extra_flags: u16, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend([0; 4]);
        out.extend(self.kind.to_ne_bytes());
        out.extend((self.flags | extra_flags).to_ne_bytes());
        out.extend(sequence.to_ne_bytes());
        out.extend([0; 4]);
        out.extend(&self.fixed);
        pad(out);
        self.attributes.write(out);
        let length = u32::try_from(out.len() - start).unwrap_or(u32::MAX);
        if let Some(place) = out.get_mut(start..start + 4) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
    }
}

/// A message from the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetlinkReply {
    pub(crate) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    /// The bytes after the header.
    pub(crate) body: Vec<u8>,
}

/// Decodes the messages in a datagram from the kernel, up to the first malformed one.
pub(super) fn replies(mut bytes: &[u8]) -> impl Iterator<Item = NetlinkReply> {
    std::iter::from_fn(move || {
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let body = bytes.get(HEADER_BYTES..length)?.to_vec();
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(NetlinkReply {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            body,
        })
    })
}

/// Writes the header of an attribute whose value has `value_bytes` bytes, a multiple of four.
pub(crate) fn attribute_header(out: &mut Vec<u8>, value_bytes: usize, kind: u16) {
    let length = u16::try_from(ATTRIBUTE_HEADER_BYTES + value_bytes).unwrap_or(u16::MAX);
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
}

fn set_length(out: &mut [u8], start: usize) {
    // Attributes that we write are far shorter than 64 KiB; the kernel refuses longer ones.
    let length = u16::try_from(out.len() - start).unwrap_or(u16::MAX);
    if let Some(place) = out.get_mut(start..start + 2) {
        place.copy_from_slice(&length.to_ne_bytes());
    }
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Attributes {
        let inner = Attributes::new().big_endian(1, 7).text(2, "abc");
        Attributes::new().bytes(3, b"odd").nested(4, inner).native(5, 9)
    }

    #[test]
    fn written_attributes_can_be_read_back() {
        let mut out = Vec::new();
        sample().write(&mut out);
        assert_eq!(out.len() % 4, 0);
        let kinds: Vec<u16> = attributes(&out).map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [3, 4, 5]);
        assert_eq!(find(&out, 3), Some(&b"odd"[..]));
        assert_eq!(find(find(&out, 4).expect("attribute 4 was written"), 2), Some(&b"abc\0"[..]));
        assert_eq!(find(&out, 6), None);
    }

    #[test]
    fn attributes_are_contained_only_with_the_same_values() {
        let mut out = Vec::new();
        sample().native(9, 1).native(5, 8).write(&mut out);
        let contains = |attributes: Attributes| attributes.is_contained_in(&out);
        assert!(
            contains(Attributes::new().native(9, 1).bytes(3, b"odd")),
            "kinds may be reordered"
        );
        assert!(contains(Attributes::new().native(5, 9).native(5, 8)));
        assert!(!contains(Attributes::new().native(5, 8).native(5, 9)), "values of a kind may not");
        assert!(!contains(Attributes::new().native(5, 9)), "a second value is missing");
        assert!(!contains(Attributes::new().bytes(3, b"add")));
        assert!(!contains(Attributes::new().nested(4, Attributes::new().big_endian(1, 8))));
        assert!(!contains(Attributes::new().native(6, 1)));
    }

    #[test]
    fn malformed_attributes_are_skipped() {
        let mut out = Vec::new();
        sample().write(&mut out);
        for end in 0..out.len() {
            let cut = out.get(..end).expect("the range is inside the buffer");
            assert!(attributes(cut).count() <= 3);
            assert!(replies(cut).count() <= 2);
        }
        for length in [0u16, 1, 3, u16::MAX] {
            assert_eq!(attributes(&[length.to_ne_bytes(), [1, 0]].concat()).count(), 0, "{length}");
        }
    }

    #[test]
    fn message_has_its_length_kind_flags_and_sequence() {
        let message =
            NetlinkMessage { kind: 77, flags: 1, fixed: vec![1, 2], attributes: sample() };
        let mut out = Vec::new();
        message.write(5, 4, &mut out);
        message.write(6, 0, &mut out);
        let read: Vec<NetlinkReply> = replies(&out).collect();
        assert_eq!(read.len(), 2);
        let decoded: Vec<_> =
            read.iter().map(|reply| (reply.kind, reply.flags, reply.sequence)).collect();
        assert_eq!(decoded, [(77, 5, 5), (77, 1, 6)]);
        let body = &read.first().expect("two messages were read").body;
        assert!(sample().is_contained_in(body.get(4..).expect("the fixed part is padded")));
    }
}
