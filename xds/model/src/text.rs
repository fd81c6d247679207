//! Text matches and address ranges of policies and routes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Pattern;

/// A match of a text (`envoy.type.matcher.v3.StringMatcher`). Texts are bytes: a header value may have bytes that are
/// not UTF-8. Case is ignored for ASCII letters only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StringMatch {
    /// The whole text.
    Exact(String),
    /// The whole text, without case.
    ExactIgnoreCase(String),
    /// The beginning of the text.
    Prefix(String),
    /// The beginning of the text, without case.
    PrefixIgnoreCase(String),
    /// The end of the text.
    Suffix(String),
    /// The end of the text, without case.
    SuffixIgnoreCase(String),
    /// Any part of the text.
    Contains(String),
    /// Any part of the text, without case.
    ContainsIgnoreCase(String),
    /// A regular expression that matches the whole text (`safe_regex`).
    Regex(Pattern),
}

impl StringMatch {
    /// Whether `text` matches.
    #[must_use]
    pub fn matches(&self, text: impl AsRef<[u8]>) -> bool {
        let text = text.as_ref();
        let same = |part: Option<&[u8]>, want: &str| {
            part.is_some_and(|part| part.eq_ignore_ascii_case(want.as_bytes()))
        };
        match self {
            Self::Exact(want) => text == want.as_bytes(),
            Self::ExactIgnoreCase(want) => same(Some(text), want),
            Self::Prefix(want) => text.starts_with(want.as_bytes()),
            Self::PrefixIgnoreCase(want) => same(text.get(..want.len()), want),
            Self::Suffix(want) => text.ends_with(want.as_bytes()),
            Self::SuffixIgnoreCase(want) => {
                let start = text.len().checked_sub(want.len());
                same(start.and_then(|start| text.get(start..)), want)
            }
            Self::Contains(want) => {
                want.is_empty() || text.windows(want.len()).any(|part| part == want.as_bytes())
            }
            Self::ContainsIgnoreCase(want) => {
                want.is_empty() || text.windows(want.len()).any(|part| same(Some(part), want))
            }
            Self::Regex(pattern) => pattern.matches(text),
        }
    }
}

/// An address range such as `10.96.0.0/16` or `fd00::/64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    /// The first address of the range; the host bits are zero.
    address: IpAddr,
    /// How many leading bits are fixed: at most 32 or 128.
    prefix_bits: u8,
}

impl Cidr {
    /// The loopback addresses of both families.
    pub const LOOPBACK: [Self; 2] = [
        Self { address: IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), prefix_bits: 8 },
        Self { address: IpAddr::V6(Ipv6Addr::LOCALHOST), prefix_bits: 128 },
    ];

    /// The range of addresses that share `prefix_bits` leading bits with `address`.
    ///
    /// # Errors
    /// When `prefix_bits` is greater than 32 for IPv4 or 128 for IPv6.
    pub fn new(address: IpAddr, prefix_bits: u8) -> Result<Self, InvalidCidr> {
        let width = if address.is_ipv4() { 32 } else { 128 };
        if prefix_bits > width {
            return Err(InvalidCidr { text: format!("{address}/{prefix_bits}") });
        }
        Ok(Self { address: masked(address, prefix_bits), prefix_bits })
    }

    /// Parses `ADDRESS/BITS`, or `ADDRESS` for the range of that address alone.
    ///
    /// # Errors
    /// When the text has neither form, or too many bits.
    pub fn parse(text: &str) -> Result<Self, InvalidCidr> {
        let invalid = || InvalidCidr { text: text.to_owned() };
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u8>().map_err(|_| invalid())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| invalid())?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        Self::new(address, bits.unwrap_or(width))
    }

    /// Whether `address` is in the range. An IPv4 range contains no IPv6 address, and the reverse.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4()
            && masked(address, self.prefix_bits) == self.address
    }

    /// The first address of the range.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The last address of the range.
    #[must_use]
    pub fn last(&self) -> IpAddr {
        let free = |width: u8| u128::MAX.checked_shr(u32::from(128 - (width - self.prefix_bits)));
        match self.address {
            IpAddr::V4(v4) => {
                let free = u32::try_from(free(32).unwrap_or(0)).unwrap_or(u32::MAX);
                IpAddr::V4((u32::from(v4) | free).into())
            }
            IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) | free(128).unwrap_or(0)).into()),
        }
    }

    /// Whether it is an IPv4 range.
    #[must_use]
    pub fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// How many leading bits are fixed.
    #[must_use]
    pub fn prefix_bits(&self) -> u8 {
        self.prefix_bits
    }
}

impl From<IpAddr> for Cidr {
    /// The range of one address.
    fn from(address: IpAddr) -> Self {
        Self { address, prefix_bits: if address.is_ipv4() { 32 } else { 128 } }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

fn masked(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits.min(32))).unwrap_or(0);
            IpAddr::V4((u32::from(v4) & mask).into())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(bits.min(128))).unwrap_or(0);
            IpAddr::V6((u128::from(v6) & mask).into())
        }
    }
}

/// A text that is not a valid address range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidCidr {
    /// The text.
    pub text: String,
}

impl fmt::Display for InvalidCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "invalid address range {:?}: must be ADDRESS/BITS, such as 10.96.0.0/16 or fd00::/64",
            self.text
        )
    }
}

impl std::error::Error for InvalidCidr {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_text_match_compares_its_part_of_the_text() {
        let check = |form: fn(String) -> StringMatch, want: &str, met: &[&str], others: &[&str]| {
            let matcher = form(want.into());
            for text in met {
                assert!(matcher.matches(text), "{matcher:?} {text}");
            }
            for text in others {
                assert!(!matcher.matches(text), "{matcher:?} {text}");
            }
        };
        check(StringMatch::Exact, "aB", &["aB"], &["ab", "aBc", "", "xaB"]);
        check(StringMatch::ExactIgnoreCase, "aB", &["aB", "Ab"], &["aBc", "", "xaB"]);
        check(StringMatch::Prefix, "aB", &["aB", "aBc"], &["abc", "a", "xaB", ""]);
        check(StringMatch::PrefixIgnoreCase, "aB", &["aB", "ABc"], &["a", "xaB", ""]);
        check(StringMatch::Suffix, "aB", &["aB", "xaB"], &["xab", "B", "aBx", ""]);
        check(StringMatch::SuffixIgnoreCase, "aB", &["aB", "xAb"], &["B", "aBx", ""]);
        check(StringMatch::Contains, "aB", &["aB", "xaBx"], &["xabx", "a-B", ""]);
        check(StringMatch::ContainsIgnoreCase, "aB", &["aB", "xAbx"], &["a-B", ""]);
        check(StringMatch::Exact, "", &[""], &["a"]);
        check(StringMatch::Prefix, "", &["", "a"], &[]);
        check(StringMatch::Contains, "", &["", "a"], &[]);
        check(StringMatch::ExactIgnoreCase, "\u{c9}", &["\u{c9}"], &["\u{e9}"]);
        let regex =
            |text: String| StringMatch::Regex(Pattern::parse(&text).expect("an expression"));
        check(regex, "a|ab", &["a", "ab"], &["abc", "A", "xa"]);
        assert!(StringMatch::Prefix("a".into()).matches(b"a\xff"));
    }

    #[test]
    fn address_range_contains_addresses_of_its_family_only() {
        let check = |range: &str, address: &str, expected: bool| {
            let range = Cidr::parse(range).expect("a range");
            assert_eq!(
                range.contains(address.parse().expect("an address")),
                expected,
                "{range} {address}"
            );
        };
        check("10.96.0.0/16", "10.96.255.255", true);
        check("10.96.0.0/16", "10.97.0.0", false);
        check("0.0.0.0/0", "8.8.8.8", true);
        check("0.0.0.0/0", "::1", false);
        check("fd00::/64", "fd00::ffff", true);
        check("fd00::/64", "fd00:0:0:1::", false);
        check("10.0.0.1", "10.0.0.1", true);
        assert!(Cidr::parse("10.0.0.0/33").is_err());
        assert!(Cidr::parse("10.0.0/8").is_err());
    }
}
