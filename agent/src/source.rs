//! The source addresses of connections to endpoints.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};

use weft_model::SourceAddress;
use weft_runtime::socket::{ConnectOptions, Mark, SourceIp};

/// The host addresses that connections to endpoints come from, used in turn. Each address and endpoint can
/// have as many connections as there are ephemeral ports, about 28,000 by default; more addresses multiply
/// that.
#[derive(Debug, Default)]
pub(crate) struct SourceAddresses {
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    next: Cell<usize>,
}

impl SourceAddresses {
    pub(crate) fn new(addresses: &[IpAddr]) -> Self {
        let (v4, v6) = addresses.iter().partition(|address| address.is_ipv4());
        Self { v4, v6, next: Cell::default() }
    }

    /// The options to connect to an endpoint with, in the order to try them: the next when the one before has no free
    /// port.
    pub(crate) fn connect_options(
        &self,
        endpoint: SocketAddr,
        client: SocketAddr,
        kind: SourceAddress,
        mark: Option<Mark>,
    ) -> impl Iterator<Item = ConnectOptions> {
        let own = if endpoint.is_ipv4() { &self.v4 } else { &self.v6 };
        let client = client.ip().to_canonical();
        // The endpoint cannot answer a client of the other address family.
        let keeps_client = kind == SourceAddress::Client && client.is_ipv4() == endpoint.is_ipv4();
        let first = if keeps_client || own.is_empty() { 0 } else { self.next.get() % own.len() };
        let (count, client_source) = match (keeps_client, own.is_empty()) {
            (true, _) => (1, Some(SourceIp::Foreign(client))),
            (false, true) => (1, None),
            (false, false) => {
                self.next.set(first + 1);
                (own.len(), None)
            }
        };
        (0..count).map(move |step| {
            let own = own.iter().cycle().nth(first + step).copied().map(SourceIp::Local);
            ConnectOptions { mark, source: client_source.or(own) }
        })
    }
}

/// Whether a connection failed because the source address has no free port towards the endpoint. For a UDP socket the
/// kernel reports this as EAGAIN.
pub(crate) fn is_out_of_ports(error: &io::Error) -> bool {
    [io::ErrorKind::AddrNotAvailable, io::ErrorKind::WouldBlock].contains(&error.kind())
}

/// The first result that is not a lack of ports, or else the last result.
pub(crate) fn first_not_out_of_ports<T>(
    mut outcomes: impl Iterator<Item = io::Result<T>>,
) -> io::Result<T> {
    let mut last = Err(io::ErrorKind::AddrNotAvailable.into());
    for outcome in outcomes.by_ref() {
        last = outcome;
        if !last.as_ref().is_err_and(is_out_of_ports) {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(addresses: &[&str]) -> SourceAddresses {
        let addresses: Vec<IpAddr> =
            addresses.iter().map(|text| text.parse().expect("the address is valid")).collect();
        SourceAddresses::new(&addresses)
    }

    fn connect_options(
        sources: &SourceAddresses,
        endpoint: &str,
        kind: SourceAddress,
    ) -> Vec<Option<SourceIp>> {
        let [endpoint, client] =
            [endpoint, "10.0.0.9:4000"].map(|text| text.parse().expect("the address is valid"));
        sources
            .connect_options(endpoint, client, kind, None)
            .map(|options| options.source)
            .collect()
    }

    #[test]
    fn source_addresses_of_the_endpoint_family_are_used_in_turn() {
        let sources = sources(&["10.0.0.1", "fd00::1", "10.0.0.2"]);
        let own = |text: &str| Some(SourceIp::Local(text.parse().expect("the address is valid")));
        let one = own("10.0.0.1");
        let two = own("10.0.0.2");
        let agent = SourceAddress::Agent;
        assert_eq!(connect_options(&sources, "10.1.0.1:80", agent), [one, two]);
        assert_eq!(connect_options(&sources, "10.1.0.1:80", agent), [two, one]);
        assert_eq!(connect_options(&sources, "10.1.0.1:80", agent), [one, two]);
        assert_eq!(connect_options(&sources, "[fd01::1]:80", agent), [own("fd00::1")]);
        assert_eq!(connect_options(&SourceAddresses::default(), "10.1.0.1:80", agent), [None]);
    }

    #[test]
    fn next_source_address_is_tried_only_when_ports_run_out() {
        let none = || Err(io::ErrorKind::AddrNotAvailable.into());
        let refused = || Err(io::ErrorKind::PermissionDenied.into());
        let first = |outcomes: Vec<io::Result<u8>>| first_not_out_of_ports(outcomes.into_iter());
        assert_eq!(first(vec![none(), Ok(2), Ok(3)]).ok(), Some(2));
        let kind = |outcomes| first(outcomes).map_err(|error| error.kind());
        assert_eq!(kind(vec![none(), refused(), Ok(3)]), Err(io::ErrorKind::PermissionDenied));
        assert_eq!(kind(vec![none(), none()]), Err(io::ErrorKind::AddrNotAvailable));
    }

    #[test]
    fn client_address_is_kept_only_for_endpoints_of_its_family() {
        let sources = sources(&["10.0.0.1", "fd00::1"]);
        let client = Some(SourceIp::Foreign("10.0.0.9".parse().expect("the address is valid")));
        assert_eq!(connect_options(&sources, "10.1.0.1:80", SourceAddress::Client), [client]);
        let own = Some(SourceIp::Local("fd00::1".parse().expect("the address is valid")));
        assert_eq!(connect_options(&sources, "[fd01::1]:80", SourceAddress::Client), [own]);
    }
}
