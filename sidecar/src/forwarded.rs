//! Maintains `x-forwarded-for`, `x-forwarded-proto` and `x-forwarded-port`, and determines the client address from them.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderName, HeaderValue};
use weft_model::{ForwardedFor, ForwardedHeaders};

use crate::denial::Denial;
use crate::http::head::{list_elements, scheme};
use crate::http::header_filter::is_same_header_name;
use crate::http::headers::Headers;

const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
/// Marks a request as coming from inside an Envoy mesh.
const INTERNAL: &[u8] = b"x-envoy-internal";
/// The prefix of the headers that Envoys exchange.
const ENVOY_PREFIX: &[u8] = b"x-envoy-";

/// Whether a header is one of Envoy's, including the spellings that a service reads as the same because it treats `_` as
/// `-`.
fn is_envoy_header(name: &[u8]) -> bool {
    name.get(..ENVOY_PREFIX.len()).is_some_and(|start| is_same_header_name(start, ENVOY_PREFIX))
}

/// The most addresses in `x-forwarded-for`. Each proxy adds one, so without a limit a loop of proxies would never end.
const ADDRESS_LIMIT: usize = 30;

/// The previous hop of a request: the other end of the client connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PreviousHop {
    pub(crate) client: SocketAddr,
    /// The destination port of the connection.
    pub(crate) port: u16,
    pub(crate) is_tls: bool,
}

/// The client address of a request: the address that trusted hops forwarded, or else that of the previous hop.
/// An edge trusts as many addresses at the end of `x-forwarded-for` as there are trusted hops; any other hop trusts one
/// more, the one that the previous hop added.
pub(crate) fn client(
    headers: &Headers,
    rule: ForwardedHeaders,
    previous_hop: PreviousHop,
) -> IpAddr {
    let peer = previous_hop.client.ip().to_canonical();
    let skipped = match (rule.is_edge, rule.trusted_hops) {
        (true, 0) => return peer,
        (true, hops) => hops - 1,
        (false, hops) => hops,
    };
    forwarded_by(headers, skipped).unwrap_or(peer)
}

/// The address of `x-forwarded-for` that precedes its last `skipped` addresses.
fn forwarded_by(headers: &Headers, skipped: u32) -> Option<IpAddr> {
    headers.get(FOR.as_str())?;
    let mut chain = Vec::new();
    headers.each(FOR.as_str(), |value| {
        if !chain.is_empty() {
            chain.push(b',');
        }
        chain.extend_from_slice(value);
    });
    let skipped = usize::try_from(skipped).ok()?;
    let address = chain.rsplit(|byte| *byte == b',').nth(skipped)?.trim_ascii();
    let address: IpAddr = std::str::from_utf8(address).ok()?.parse().ok()?;
    Some(address.to_canonical())
}

/// Applies `rule` to the headers.
///
/// # Errors
/// [`Denial::TooManyForwarders`] when there are more than [`ADDRESS_LIMIT`] addresses.
pub(crate) fn apply(
    headers: &mut Headers,
    rule: ForwardedHeaders,
    previous_hop: PreviousHop,
) -> Result<(), Denial> {
    match rule.addresses {
        ForwardedFor::Preserve => drop(existing_addresses(headers)?),
        ForwardedFor::Remove => set(headers, FOR, None),
        ForwardedFor::Append => {
            let mut chain = existing_addresses(headers)?;
            if !chain.is_empty() {
                chain.extend_from_slice(b", ");
            }
            chain.extend_from_slice(address_text(previous_hop.client, rule.client_port).as_bytes());
            set(headers, FOR, HeaderValue::try_from(chain).ok());
        }
    }
    // Only an Envoy that knows its clients sets these. One that a client sets would satisfy policies that match on it.
    if headers.names().has_extension() {
        headers.remove(|name| {
            is_same_header_name(name, INTERNAL) || (rule.is_edge && is_envoy_header(name))
        });
    }
    if rule.is_edge {
        // A trusted hop has set these for its own client.
        let is_open =
            |name: &HeaderName| rule.trusted_hops == 0 || headers.get(name.as_str()).is_none();
        let sets_proto = is_open(&PROTO);
        let sets_port = is_open(&PORT);
        if sets_proto {
            set(headers, PROTO, Some(HeaderValue::from_static(scheme(previous_hop.is_tls))));
        }
        if sets_port {
            set(headers, PORT, Some(previous_hop.port.into()));
        }
    }
    Ok(())
}

/// The existing addresses, joined in one value.
fn existing_addresses(headers: &Headers) -> Result<Vec<u8>, Denial> {
    let mut chain = Vec::new();
    let mut addresses = 0;
    headers.each(FOR.as_str(), |value| {
        addresses += list_elements(value).count();
        if !chain.is_empty() {
            chain.extend_from_slice(b", ");
        }
        chain.extend_from_slice(value);
    });
    if addresses > ADDRESS_LIMIT { Err(Denial::TooManyForwarders) } else { Ok(chain) }
}

/// Replaces a header, with all spellings that a service reads as the same because it treats `_` as `-`.
fn set(headers: &mut Headers, name: HeaderName, value: Option<HeaderValue>) {
    if headers.names().may_have(name.as_str()) {
        headers.remove(|held| is_same_header_name(held, name.as_str().as_bytes()));
    }
    if let Some(value) = value {
        headers.add(name, value);
    }
}

/// The text of a client address. IPv6 addresses have brackets when a port follows.
fn address_text(client: SocketAddr, with_port: bool) -> String {
    let address: IpAddr = client.ip().to_canonical();
    if with_port {
        SocketAddr::new(address, client.port()).to_string()
    } else {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderMap;

    fn check(before: &[&str], addresses: ForwardedFor, client_port: bool, expected: &[&str]) {
        for client in ["10.0.0.9:4711", "[::ffff:10.0.0.9]:4711"] {
            let mut map = HeaderMap::new();
            for value in before {
                map.append(FOR, HeaderValue::from_str(value).expect("a value"));
            }
            let mut headers = Headers::from(map);
            let client = client.parse().expect("an address");
            let previous_hop = PreviousHop { client, port: 8080, is_tls: true };
            let is_edge = addresses != ForwardedFor::Preserve;
            let rule = ForwardedHeaders { addresses, client_port, is_edge, trusted_hops: 0 };
            apply(&mut headers, rule, previous_hop).expect("few");
            let mut after = Vec::new();
            headers.each(FOR.as_str(), |v| after.push(String::from_utf8_lossy(v).into_owned()));
            assert_eq!(after, expected, "{before:?} {addresses:?}");
            assert_eq!(headers.get(PROTO.as_str()), is_edge.then_some(&b"https"[..]));
            assert_eq!(headers.get(PORT.as_str()), is_edge.then_some(&b"8080"[..]));
        }
    }

    #[test]
    fn forwarded_addresses_are_appended_preserved_or_removed() {
        use ForwardedFor::{Append, Preserve, Remove};
        check(&[], Append, false, &["10.0.0.9"]);
        check(&["a"], Append, false, &["a, 10.0.0.9"]);
        check(&["a, b", "c"], Append, false, &["a, b, c, 10.0.0.9"]);
        check(&[], Preserve, false, &[]);
        check(&["a"], Preserve, false, &["a"]);
        check(&["a, b", "c"], Preserve, false, &["a, b", "c"]);
        check(&[], Remove, false, &[]);
        check(&["a"], Remove, false, &[]);
        check(&["a, b", "c"], Remove, false, &[]);
        check(&["a"], Append, true, &["a, 10.0.0.9:4711"]);
        check(&["a"], Preserve, true, &["a"]);
        check(&["a"], Remove, true, &[]);
    }

    #[test]
    fn envoy_headers_are_removed_at_the_edge_and_x_envoy_internal_everywhere() {
        let names = [
            "x-envoy-internal",
            "X_Envoy_Internal",
            "x-envoy-external-address",
            "x_envoy-retry_on",
            "x-envoys",
        ];
        let left = |is_edge| {
            let mut map = HeaderMap::new();
            for name in names {
                let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
                map.append(name, HeaderValue::from_static("true"));
            }
            let mut headers = Headers::from(map);
            let previous_hop =
                PreviousHop { client: ([10, 0, 0, 9], 1).into(), port: 80, is_tls: false };
            let rule = ForwardedHeaders { is_edge, ..ForwardedHeaders::default() };
            apply(&mut headers, rule, previous_hop).expect("few");
            names.map(|name| headers.has(&name.to_ascii_lowercase()))
        };
        assert_eq!(left(true), [false, false, false, false, true]);
        assert_eq!(left(false), [false, false, true, true, true]);
    }

    #[test]
    fn underscore_spellings_of_forwarded_headers_are_replaced_at_the_edge() {
        let mut map = HeaderMap::new();
        for name in ["x_forwarded_for", "x-forwarded_proto", "x_forwarded-port", "x_other"] {
            map.append(name, HeaderValue::from_static("6.6.6.6"));
        }
        let mut headers = Headers::from(map);
        let addresses = ForwardedFor::Append;
        let rule = ForwardedHeaders { addresses, is_edge: true, ..ForwardedHeaders::default() };
        let client = ([10, 0, 0, 9], 1).into();
        let previous_hop = PreviousHop { client, port: 80, is_tls: false };
        apply(&mut headers, rule, previous_hop).expect("few");
        let mut names: Vec<String> = headers.to_map().keys().map(ToString::to_string).collect();
        names.sort();
        assert_eq!(names, ["x-forwarded-for", "x-forwarded-port", "x-forwarded-proto", "x_other"]);
    }

    #[test]
    fn ipv6_address_has_brackets_before_a_port() {
        let client = "[2001:db8::1]:8080".parse().expect("an address");
        assert_eq!(address_text(client, false), "2001:db8::1");
        assert_eq!(address_text(client, true), "[2001:db8::1]:8080");
    }

    #[test]
    fn client_address_is_the_one_before_the_trusted_hops() {
        let check = |header: &[&str], is_edge: bool, hops: u32, expected: &str| {
            let mut map = HeaderMap::new();
            for value in header {
                map.append(FOR, HeaderValue::from_str(value).expect("a value"));
            }
            let rule =
                ForwardedHeaders { is_edge, trusted_hops: hops, ..ForwardedHeaders::default() };
            let previous_hop =
                PreviousHop { client: ([10, 0, 0, 9], 1).into(), port: 80, is_tls: false };
            let client = client(&Headers::from(map), rule, previous_hop);
            assert_eq!(client.to_string(), expected, "{header:?} {is_edge} {hops}");
        };
        let peer = "10.0.0.9";
        check(&["1.1.1.1, 2.2.2.2"], true, 0, peer);
        check(&["1.1.1.1, 2.2.2.2"], true, 1, "2.2.2.2");
        check(&["1.1.1.1", "2.2.2.2"], true, 2, "1.1.1.1");
        check(&["1.1.1.1, 2.2.2.2"], true, 3, peer);
        check(&["1.1.1.1,2.2.2.2"], false, 0, "2.2.2.2");
        check(&["1.1.1.1,2.2.2.2"], false, 1, "1.1.1.1");
        check(&["1.1.1.1,2.2.2.2"], false, 2, peer);
        check(&["1.1.1.1, x"], true, 1, peer);
        check(&["1.1.1.1, ::1"], true, 1, "::1");
        // An IPv4-mapped address counts as the IPv4 address. An address with a port or brackets is invalid.
        check(&["::ffff:2.2.2.2"], true, 1, "2.2.2.2");
        check(&["2.2.2.2:80"], true, 1, peer);
        check(&["[::1]"], true, 1, peer);
        check(&[], true, 1, peer);
    }

    #[test]
    fn request_with_more_than_30_forwarded_addresses_is_refused() {
        let with = |count: usize| {
            let mut map = HeaderMap::new();
            map.append(FOR, HeaderValue::try_from(vec!["a"; count].join(",")).expect("a value"));
            let rule = ForwardedHeaders {
                addresses: ForwardedFor::Append,
                client_port: false,
                is_edge: true,
                trusted_hops: 0,
            };
            let client = ([10, 0, 0, 9], 1).into();
            apply(&mut Headers::from(map), rule, PreviousHop { client, port: 1, is_tls: false })
        };
        assert_eq!(with(29), Ok(()));
        assert_eq!(with(30), Ok(()));
        assert_eq!(with(31), Err(Denial::TooManyForwarders));
    }
}
