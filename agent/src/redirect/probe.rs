//! Probes whether outbound traffic is really redirected: our rules may be installed, and another program's
//! rules before them may capture the traffic. The probe opens a connection as any program would, and asks
//! conntrack where it went. Inbound redirection cannot be probed from inside a namespace.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::SockProtocol;
use nix::unistd::Uid;
use socket2::{Domain, Socket, Type};
use weft_model::{Cidr, FlowTuple, Transport};
use weft_runtime::clock::now;
use weft_runtime::socket::PROBE_PORT;

use super::config::RedirectConfig;
use super::namespace::{Namespace, in_namespace};
use super::types::{RedirectError, kernel_error};
use crate::netlink::{Netlink, Notification, conntrack};

/// How long to wait for the notification about a probe connection.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
/// Where services may have any address, the probe connects to documentation addresses (RFC 5737, RFC 3849).
const UNASSIGNED: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// The outcome of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// The connections to these addresses were redirected.
    Redirected(Vec<SocketAddr>),
    /// The connection to this address was not redirected, and what happened instead.
    NotRedirected(SocketAddr, String),
    /// Nothing was probed, and why.
    Skipped(String),
}

impl fmt::Display for ProbeOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Redirected(destinations) => {
                let all: Vec<String> = destinations.iter().map(ToString::to_string).collect();
                write!(f, "connections are redirected: {}", all.join(", "))
            }
            Self::NotRedirected(destination, how) => {
                write!(f, "connection to {destination} was not redirected: {how}")
            }
            Self::Skipped(why) => write!(f, "probe skipped: {why}"),
        }
    }
}

/// Opens a connection per address family from inside a namespace, and checks where it goes.
///
/// # Errors
/// When the namespace cannot be entered, or conntrack notifications cannot be read.
pub fn probe(
    redirect: &RedirectConfig,
    namespace: &Namespace,
) -> Result<ProbeOutcome, RedirectError> {
    let Some(port) = redirect.outbound else {
        return Ok(ProbeOutcome::Skipped("only outbound redirection can be probed".into()));
    };
    if redirect.exclude_outbound_ports.contains(&PROBE_PORT) {
        return Ok(ProbeOutcome::Skipped(format!("port {PROBE_PORT} is excluded")));
    }
    let user = Uid::effective().as_raw();
    if redirect.uid == Some(user) || redirect.exclude_users.contains(&user) {
        return Ok(ProbeOutcome::Skipped(format!(
            "this process runs as user {user}, whose traffic is excluded"
        )));
    }
    in_namespace(namespace, || {
        let mut redirected = Vec::new();
        for destination in destinations(redirect) {
            let path = send(destination).map_err(kernel_error("probing a connection"))?;
            match path {
                ConnectionPath::NoRoute => {}
                ConnectionPath::Endpoint(at) if at.port() == port && at.ip().is_loopback() => {
                    redirected.push(destination);
                }
                ConnectionPath::Endpoint(at) if at == destination => {
                    let how = "it was sent unchanged: another program's rule runs before the redirect rules";
                    return Ok(ProbeOutcome::NotRedirected(destination, how.into()));
                }
                ConnectionPath::Endpoint(at) => {
                    let how = format!("another program's rule sent it to {at}");
                    return Ok(ProbeOutcome::NotRedirected(destination, how));
                }
                ConnectionPath::Untracked => {
                    let how = "it was dropped, or conntrack does not track it";
                    return Ok(ProbeOutcome::NotRedirected(destination, how.into()));
                }
            }
        }
        if redirected.is_empty() {
            return Ok(ProbeOutcome::Skipped("no route to any service from the namespace".into()));
        }
        Ok(ProbeOutcome::Redirected(redirected))
    })
}

/// One destination per address family that must be redirected.
fn destinations(redirect: &RedirectConfig) -> impl Iterator<Item = SocketAddr> {
    let is_kept = |address: IpAddr| {
        let excluded = redirect.exclude_destinations.iter();
        excluded.chain(&Cidr::LOOPBACK).any(|range| range.contains(address))
    };
    UNASSIGNED.into_iter().filter_map(move |nobody| {
        let ranges =
            redirect.services.iter().filter(move |range| range.is_ipv4() == nobody.is_ipv4());
        let ends = ranges.flat_map(|range| [range.last(), range.address()]);
        let anywhere = redirect.services.is_empty().then_some(nobody);
        let address = ends.chain(anywhere).find(|address| !is_kept(*address))?;
        Some(SocketAddr::new(address, PROBE_PORT))
    })
}

enum ConnectionPath {
    /// The kernel has no route to the destination.
    NoRoute,
    /// The kernel sent the connection to this address.
    Endpoint(SocketAddr),
    /// conntrack has no such connection.
    Untracked,
}

/// Opens a connection without a mark, as any program would, and asks conntrack where it went.
fn send(destination: SocketAddr) -> io::Result<ConnectionPath> {
    const NO_ROUTE: [io::ErrorKind; 3] = [
        io::ErrorKind::NetworkUnreachable,
        io::ErrorKind::HostUnreachable,
        io::ErrorKind::AddrNotAvailable,
    ];
    // A connection to a closed port is reset and forgotten at once, so the probe also reads notifications about its
    // end.
    let groups = conntrack::NEW_GROUP | conntrack::DESTROY_GROUP;
    let notifications = Netlink::listen(SockProtocol::NetlinkNetFilter, groups)?;
    let socket = Socket::new(Domain::for_address(destination), Type::STREAM.nonblocking(), None)?;
    // The accepting process sees a reset, not a close that it would have to answer.
    socket.set_linger(Some(Duration::ZERO))?;
    match socket.connect(&destination.into()) {
        Err(error) if NO_ROUTE.contains(&error.kind()) => return Ok(ConnectionPath::NoRoute),
        // In progress, refused at once, or dropped: conntrack knows.
        _ => {}
    }
    let client = socket.local_addr()?.as_socket();
    let Some(client) = client.filter(|client| client.port() != 0) else {
        return Ok(ConnectionPath::NoRoute);
    };
    let flow = FlowTuple { transport: Transport::Tcp, client, destination };
    let deadline = now() + PROBE_TIMEOUT;
    let mut is_all = true;
    loop {
        let mut endpoint = None;
        notifications.drain(|notification| {
            let Notification::Message(message) = notification else {
                is_all = false;
                return;
            };
            let entry = conntrack::parse_entry(&message).filter(|entry| entry.flow == flow);
            endpoint = entry.map(|entry| entry.endpoint).or(endpoint);
        })?;
        if endpoint.is_none() && !is_all {
            return Err(io::Error::other("conntrack notifications were lost"));
        }
        let left = deadline.saturating_duration_since(now());
        if endpoint.is_some() || left.is_zero() {
            return Ok(endpoint.map_or(ConnectionPath::Untracked, ConnectionPath::Endpoint));
        }
        let left = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(notifications.as_fd(), PollFlags::POLLIN)], left) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_connects_to_addresses_that_must_be_redirected() {
        let range = |text: &str| Cidr::parse(text).expect("the range is valid");
        let aimed = |services: &[&str], excluded: &[&str]| {
            let redirect = RedirectConfig {
                services: services.iter().map(|text| range(text)).collect(),
                exclude_destinations: excluded.iter().map(|text| range(text)).collect(),
                ..super::super::tests::workload()
            };
            destinations(&redirect).map(|to| to.ip().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(
            aimed(&["10.96.0.0/16", "fd96::/64"], &[]),
            ["10.96.255.255", "fd96::ffff:ffff:ffff:ffff"]
        );
        assert_eq!(aimed(&["10.96.0.0/16"], &["10.96.128.0/17"]), ["10.96.0.0"]);
        assert_eq!(aimed(&["10.96.0.0/16"], &["10.0.0.0/8"]), [""; 0]);
        assert_eq!(aimed(&["127.0.0.0/8", "10.96.0.3"], &[]), ["10.96.0.3"]);
        assert_eq!(aimed(&[], &[]), ["192.0.2.1", "2001:db8::1"]);
    }
}
