//! Whether traffic is really handed over: rules may be as they are wanted, and another's before them
//! take what is ours. A connection is made as any program would make it, and the kernel asked where it
//! went. Only what leaves can be tried from here.

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
use weft_runtime::socket::PROBE_PORT;

use super::apply::{in_namespace, kernel};
use super::{Namespace, RedirectConfig, RedirectError};
use crate::clock::now;
use crate::netlink::{Netlink, Notification, conntrack};

/// How long the kernel may take to tell where a connection went.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
/// Where services may be anywhere, the probe aims at addresses that are nobody's (RFC 5737, RFC 3849).
const UNASSIGNED: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// What came of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// It was handed over, to these addresses.
    Redirected(Vec<SocketAddr>),
    /// It was not: whereto, and what became of it.
    NotRedirected(SocketAddr, String),
    /// Nothing could be tried, and why.
    Skipped(String),
}

impl fmt::Display for ProbeOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Redirected(destinations) => {
                let told: Vec<String> = destinations.iter().map(ToString::to_string).collect();
                write!(f, "connections are handed over: {}", told.join(", "))
            }
            Self::NotRedirected(destination, how) => {
                write!(f, "a connection to {destination} was not handed over: {how}")
            }
            Self::Skipped(why) => write!(f, "not tried: {why}"),
        }
    }
}

/// Makes connections from inside a namespace, one of each family, and sees where they go.
///
/// # Errors
/// When the kernel does not tell.
pub fn probe(
    redirect: &RedirectConfig,
    namespace: &Namespace,
) -> Result<ProbeOutcome, RedirectError> {
    let Some(port) = redirect.outbound else {
        return Ok(ProbeOutcome::Skipped("only what leaves can be tried from here".into()));
    };
    if redirect.exclude_outbound_ports.contains(&PROBE_PORT) {
        return Ok(ProbeOutcome::Skipped(format!("port {PROBE_PORT} is excluded")));
    }
    let user = Uid::effective().as_raw();
    if redirect.uid == Some(user) || redirect.exclude_users.contains(&user) {
        return Ok(ProbeOutcome::Skipped(format!(
            "what user {user} sends is excluded, and we are"
        )));
    }
    in_namespace(namespace, || {
        let mut taken = Vec::new();
        for destination in destinations(redirect) {
            let reached = send(destination).map_err(kernel("asking where a connection went"))?;
            match reached {
                ConnectionPath::NoRoute => {}
                ConnectionPath::Endpoint(at) if at.port() == port && at.ip().is_loopback() => {
                    taken.push(destination);
                }
                ConnectionPath::Endpoint(at) if at == destination => {
                    let how = "it went there, past our rules: another rule goes before them";
                    return Ok(ProbeOutcome::NotRedirected(destination, how.into()));
                }
                ConnectionPath::Endpoint(at) => {
                    return Ok(ProbeOutcome::NotRedirected(
                        destination,
                        format!("another rule led it to {at}"),
                    ));
                }
                ConnectionPath::Nothing => {
                    let how = "it was dropped, or the kernel does not track it";
                    return Ok(ProbeOutcome::NotRedirected(destination, how.into()));
                }
            }
        }
        if taken.is_empty() {
            return Ok(ProbeOutcome::Skipped("there is no route to any service from there".into()));
        }
        Ok(ProbeOutcome::Redirected(taken))
    })
}

/// An address of each family that must be handed over.
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
    /// The kernel knows no way there.
    NoRoute,
    /// The kernel sent it there.
    Endpoint(SocketAddr),
    /// The kernel knows of no such connection.
    Nothing,
}

/// Begins a connection, and asks the kernel where it went. It bears no mark: it is anybody's.
fn send(destination: SocketAddr) -> io::Result<ConnectionPath> {
    const NO_ROUTE: [io::ErrorKind; 3] = [
        io::ErrorKind::NetworkUnreachable,
        io::ErrorKind::HostUnreachable,
        io::ErrorKind::AddrNotAvailable,
    ];
    // What nobody listens to is reset, and then forgotten at once: what the kernel tells is heard.
    let told = conntrack::NEW_GROUP | conntrack::DESTROY_GROUP;
    let told = Netlink::listen(SockProtocol::NetlinkNetFilter, told)?;
    let socket = Socket::new(Domain::for_address(destination), Type::STREAM.nonblocking(), None)?;
    // Whoever takes it hears a reset, and not a close that it would have to answer.
    socket.set_linger(Some(Duration::ZERO))?;
    match socket.connect(&destination.into()) {
        Err(error) if NO_ROUTE.contains(&error.kind()) => return Ok(ConnectionPath::NoRoute),
        // It is under way, was refused at once, or is not let out: the kernel tells.
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
        told.drain(|told| {
            let Notification::Message(told) = told else {
                is_all = false;
                return;
            };
            let entry = conntrack::parse_entry(&told).filter(|entry| entry.flow == flow);
            endpoint = entry.map(|entry| entry.endpoint).or(endpoint);
        })?;
        if endpoint.is_none() && !is_all {
            return Err(io::Error::other("more connections began than could be heard of"));
        }
        let left = deadline.saturating_duration_since(now());
        if endpoint.is_some() || left.is_zero() {
            return Ok(endpoint.map_or(ConnectionPath::Nothing, ConnectionPath::Endpoint));
        }
        let left = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(told.as_fd(), PollFlags::POLLIN)], left) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_aims_at_what_must_be_handed_over() {
        let range = |text: &str| Cidr::parse(text).expect("a range");
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
