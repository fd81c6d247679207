//! Parses the authority of a request: host and optional port (RFC 9110, section 7.2).

use std::borrow::Cow;
use std::net::Ipv6Addr;

use weft_model::HostPort;

/// The longest accepted authority. A host name has at most 253 characters, percent-encoded three times as many.
const LIMIT_BYTES: usize = 1024;

/// Splits an authority into host and port; none when it is invalid. The host is a name, an IPv4 address or an IPv6
/// address in brackets. User information is rejected: it is used only to disguise the host.
pub(crate) fn split(text: &str) -> Option<(&str, Option<&str>)> {
    if text.len() > LIMIT_BYTES {
        return None;
    }
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, suffix) = rest.split_once(']')?;
            address.parse::<Ipv6Addr>().ok()?;
            let host = text.get(..address.len() + 2)?;
            let port = match suffix.strip_prefix(':') {
                Some(port) => Some(port),
                None if suffix.is_empty() => None,
                None => return None,
            };
            (host, port)
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let is_host = host.starts_with('[') || (!host.is_empty() && host.bytes().all(is_name_byte));
    let is_port = port.is_none_or(|port| {
        port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
    });
    (is_host && is_port).then_some((host, port))
}

/// The characters of a host name (RFC 3986, section 3.2.2), without percent-encoding, and without `,`, which would make
/// a list of two names look like one.
fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+;=".contains(&byte)
}

/// Whether the text is a valid authority.
pub(crate) fn is_authority(text: &[u8]) -> bool {
    std::str::from_utf8(text).is_ok_and(|text| split(text).is_some())
}

/// The authority as forwarded to the service, for a request that arrived at the listener port `port`.
pub(crate) fn with_port(authority: &str, rule: HostPort, port: u16) -> Cow<'_, str> {
    if rule == HostPort::Keep {
        return Cow::Borrowed(authority);
    }
    let Some((host, given)) = split(authority) else {
        return Cow::Borrowed(authority);
    };
    let is_listener_port = given.is_some_and(|given| given.parse() == Ok(port));
    let strips = match rule {
        HostPort::Keep => false,
        HostPort::StripMatching => is_listener_port,
        HostPort::StripAny => true,
        HostPort::Canonical if port == 80 || port == 443 => true,
        HostPort::Canonical => {
            return match given {
                Some(_) => Cow::Borrowed(authority),
                None => Cow::Owned(format!("{host}:{port}")),
            };
        }
    };
    Cow::Borrowed(if strips { host } else { authority })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_authorities_are_split_and_others_rejected() {
        let check = |text: &str, expected: Option<(&str, Option<&str>)>| {
            assert_eq!(split(text), expected, "{text:?}");
        };
        check("a.example", Some(("a.example", None)));
        check("a_b.example:80", Some(("a_b.example", Some("80"))));
        check("a.example:80", Some(("a.example", Some("80"))));
        check("10.0.0.1:65535", Some(("10.0.0.1", Some("65535"))));
        check("[::1]", Some(("[::1]", None)));
        check("[2001:db8::1]:8080", Some(("[2001:db8::1]", Some("8080"))));
        for bad in [
            "",
            ":80",
            "a:x",
            "a:65536",
            "a:-1",
            "a:1:2",
            "::1",
            "[::1",
            "[::1]x",
            "[a]",
            "[::1%25x]",
            "u@a",
            "a/b",
            "a?b",
            "a b",
            "a,b",
            "a%2fb",
            "a\\b",
            "\u{e9}",
        ] {
            check(bad, None);
        }
        assert!(!is_authority(&[0xff]));
        assert!(!is_authority(&[b'a'; 2000]));
    }

    #[test]
    fn port_is_kept_stripped_or_added_by_rule() {
        let check = |rule: HostPort, at: u16, authority: &str, expected: &str| {
            assert_eq!(with_port(authority, rule, at), expected, "{rule:?} {authority} at {at}");
        };
        check(HostPort::Keep, 80, "a:80", "a:80");
        check(HostPort::StripMatching, 80, "a:80", "a");
        check(HostPort::StripMatching, 80, "a:81", "a:81");
        check(HostPort::StripAny, 80, "[::1]:81", "[::1]");
        // As AWS does: the port is removed at ports 80 and 443, and added at others.
        check(HostPort::Canonical, 80, "a:80", "a");
        check(HostPort::Canonical, 443, "a:8443", "a");
        check(HostPort::Canonical, 8080, "a", "a:8080");
        check(HostPort::Canonical, 8080, "a:81", "a:81");
        check(HostPort::Canonical, 8080, "[::1]", "[::1]:8080");
    }
}
