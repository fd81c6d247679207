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

use super::apply::{inside, kernel};
use super::{Namespace, Redirect, RedirectError};
use crate::netlink::{Netlink, Told, conntrack};
use crate::worker::now;

/// How long the kernel may take to tell where a connection went.
const PATIENCE: Duration = Duration::from_millis(500);
/// Where services may be anywhere, the probe aims at addresses that are nobody's (RFC 5737, RFC 3849).
const NOBODY: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// What came of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// It was handed over, to these addresses.
    Taken(Vec<SocketAddr>),
    /// It was not: whereto, and what became of it.
    Passed(SocketAddr, String),
    /// Nothing could be tried, and why.
    Untried(String),
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken(destinations) => {
                let told: Vec<String> = destinations.iter().map(ToString::to_string).collect();
                write!(f, "connections are handed over: {}", told.join(", "))
            }
            Self::Passed(destination, how) => {
                write!(f, "a connection to {destination} was not handed over: {how}")
            }
            Self::Untried(why) => write!(f, "not tried: {why}"),
        }
    }
}

/// Makes connections from inside a namespace, one of each family, and sees where they go.
///
/// # Errors
/// When the kernel does not tell.
pub fn probe(redirect: &Redirect, namespace: &Namespace) -> Result<Probe, RedirectError> {
    let Some(port) = redirect.outbound else {
        return Ok(Probe::Untried("only what leaves can be tried from here".into()));
    };
    if redirect.exclude_outbound_ports.contains(&PROBE_PORT) {
        return Ok(Probe::Untried(format!("port {PROBE_PORT} is excluded")));
    }
    let user = Uid::effective().as_raw();
    if redirect.uid == Some(user) || redirect.exclude_users.contains(&user) {
        return Ok(Probe::Untried(format!("what user {user} sends is excluded, and we are")));
    }
    inside(namespace, || {
        let mut taken = Vec::new();
        for destination in destinations(redirect) {
            let reached = send(destination).map_err(kernel("asking where a connection went"))?;
            match reached {
                Reached::NoRoute => {}
                Reached::Endpoint(at) if at.port() == port && at.ip().is_loopback() => {
                    taken.push(destination);
                }
                Reached::Endpoint(at) if at == destination => {
                    let how = "it went there, past our rules: another rule goes before them";
                    return Ok(Probe::Passed(destination, how.into()));
                }
                Reached::Endpoint(at) => {
                    return Ok(Probe::Passed(destination, format!("another rule led it to {at}")));
                }
                Reached::Nothing => {
                    let how = "it was dropped, or the kernel does not track it";
                    return Ok(Probe::Passed(destination, how.into()));
                }
            }
        }
        if taken.is_empty() {
            return Ok(Probe::Untried("there is no route to any service from there".into()));
        }
        Ok(Probe::Taken(taken))
    })
}

/// An address of each family that must be handed over.
fn destinations(redirect: &Redirect) -> impl Iterator<Item = SocketAddr> {
    let is_kept = |address: IpAddr| {
        let excluded = redirect.exclude_destinations.iter();
        excluded.chain(&Cidr::LOOPBACK).any(|range| range.contains(address))
    };
    NOBODY.into_iter().filter_map(move |nobody| {
        let ranges =
            redirect.services.iter().filter(move |range| range.is_ipv4() == nobody.is_ipv4());
        let ends = ranges.flat_map(|range| [range.last(), range.address()]);
        let anywhere = redirect.services.is_empty().then_some(nobody);
        let address = ends.chain(anywhere).find(|address| !is_kept(*address))?;
        Some(SocketAddr::new(address, PROBE_PORT))
    })
}

enum Reached {
    /// The kernel knows no way there.
    NoRoute,
    /// The kernel sent it there.
    Endpoint(SocketAddr),
    /// The kernel knows of no such connection.
    Nothing,
}

/// Begins a connection, and asks the kernel where it went. It bears no mark: it is anybody's.
fn send(destination: SocketAddr) -> io::Result<Reached> {
    const NO_ROUTE: [io::ErrorKind; 3] = [
        io::ErrorKind::NetworkUnreachable,
        io::ErrorKind::HostUnreachable,
        io::ErrorKind::AddrNotAvailable,
    ];
    // What nobody listens to is reset, and then forgotten at once: what the kernel tells is heard.
    let told = conntrack::BEGINNINGS | conntrack::ENDS;
    let told = Netlink::listen(SockProtocol::NetlinkNetFilter, told)?;
    let socket = Socket::new(Domain::for_address(destination), Type::STREAM.nonblocking(), None)?;
    // Whoever takes it hears a reset, and not a close that it would have to answer.
    socket.set_linger(Some(Duration::ZERO))?;
    match socket.connect(&destination.into()) {
        Err(error) if NO_ROUTE.contains(&error.kind()) => return Ok(Reached::NoRoute),
        // It is under way, was refused at once, or is not let out: the kernel tells.
        _ => {}
    }
    let client = socket.local_addr()?.as_socket();
    let Some(client) = client.filter(|client| client.port() != 0) else {
        return Ok(Reached::NoRoute);
    };
    let flow = FlowTuple { transport: Transport::Tcp, client, destination };
    let deadline = now() + PATIENCE;
    let mut is_all = true;
    loop {
        let mut endpoint = None;
        told.drain(|told| {
            let Told::This(told) = told else {
                is_all = false;
                return;
            };
            let entry = conntrack::read(&told).filter(|entry| entry.flow == flow);
            endpoint = entry.map(|entry| entry.endpoint).or(endpoint);
        })?;
        if endpoint.is_none() && !is_all {
            return Err(io::Error::other("more connections began than could be heard of"));
        }
        let left = deadline.saturating_duration_since(now());
        if endpoint.is_some() || left.is_zero() {
            return Ok(endpoint.map_or(Reached::Nothing, Reached::Endpoint));
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
            let redirect = Redirect {
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
