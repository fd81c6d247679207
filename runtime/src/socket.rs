//! Sockets with the options that the data plane needs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{SockaddrIn, SockaddrIn6, getsockopt, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

/// The length of the accept queue of each listening socket.
const BACKLOG: i32 = 4096;

/// The destination port of redirect probes. A capture port closes such a connection without an access-log
/// line.
pub const PROBE_PORT: u16 = 15_098;

/// The mark (`SO_MARK`) on packets that weft sends, which excludes them from redirection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(pub u32);

impl Mark {
    /// The mark that the redirect rules exclude, the same as Istio's.
    pub const DEFAULT: Self = Self(0x539);

    /// Returns the mark if this process may set it (CAP_NET_RAW or CAP_NET_ADMIN).
    #[must_use]
    pub fn if_permitted(self) -> Option<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).ok()?;
        socket.set_mark(self.0).is_ok().then_some(self)
    }
}

/// Listens on a TCP address. All workers may listen on the same address: the kernel distributes connections
/// among them. A socket on an IPv6 address accepts IPv6 connections only.
///
/// # Errors
/// When the address is in use, or is not an address of this host and `transparent` is false.
pub fn listen_tcp(address: SocketAddr, transparent: bool) -> io::Result<TcpListener> {
    let socket = bound(address, Type::STREAM, transparent)?;
    // Accepted sockets inherit TCP_NODELAY, so small messages are sent at once.
    socket.set_tcp_nodelay(true)?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Binds a UDP address. With `transparent` the socket may bind, and receive datagrams for, addresses that are
/// not the host's.
///
/// # Errors
/// When the address is in use, or is not an address of this host and `transparent` is false.
pub fn bind_udp(
    address: SocketAddr,
    transparent: bool,
    mark: Option<Mark>,
) -> io::Result<UdpSocket> {
    let socket = bound(address, Type::DGRAM, transparent)?;
    if let Some(Mark(mark)) = mark {
        socket.set_mark(mark)?;
    }
    UdpSocket::from_std(socket.into())
}

/// Whether binding the unspecified IPv6 address failed because the host has no IPv6. The host then has no
/// address of that family, so no listener is missing.
#[must_use]
pub fn is_ipv6_unavailable(address: SocketAddr, error: &io::Error) -> bool {
    let unsupported = error.raw_os_error() == Some(libc::EAFNOSUPPORT);
    unsupported && address.ip() == Ipv6Addr::UNSPECIFIED
}

fn bound(address: SocketAddr, kind: Type, transparent: bool) -> io::Result<Socket> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), Some(protocol))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if transparent {
        match address {
            SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
            SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
        }
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Options of an outgoing connection.
#[derive(Debug, Clone, Copy, Default)]
pub struct ConnectOptions {
    /// The mark on its packets.
    pub mark: Option<Mark>,
    /// Its source address; the kernel chooses when `None`.
    pub source: Option<SourceIp>,
}

/// The source IP address of an outgoing connection. The kernel chooses the port, one that is unused towards
/// the same destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceIp {
    /// An address of this host.
    Local(IpAddr),
    /// An address of another host, which needs CAP_NET_RAW or CAP_NET_ADMIN.
    Foreign(IpAddr),
}

impl From<Option<Mark>> for ConnectOptions {
    fn from(mark: Option<Mark>) -> Self {
        Self { mark, source: None }
    }
}

impl ConnectOptions {
    /// Sets the options on a socket, and returns the address to bind, if any.
    fn prepare<S: AsFd>(self, socket: &S) -> io::Result<Option<SocketAddr>> {
        let options = SockRef::from(socket);
        if let Some(Mark(mark)) = self.mark {
            options.set_mark(mark)?;
        }
        let address = match self.source {
            None => return Ok(None),
            Some(SourceIp::Local(address)) => address,
            Some(SourceIp::Foreign(address)) => {
                match address {
                    IpAddr::V4(_) => options.set_ip_transparent_v4(true)?,
                    IpAddr::V6(_) => options.set_ip_transparent_v6(true)?,
                }
                address
            }
        };
        // The kernel chooses the port at connect time, so that connections to different destinations can
        // share one.
        setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
        Ok(Some((address, 0).into()))
    }
}

/// Whether this process may send from addresses of other hosts.
#[must_use]
pub fn can_bind_foreign_addresses() -> bool {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None);
    socket.is_ok_and(|socket| socket.set_ip_transparent_v4(true).is_ok())
}

/// Opens a UDP socket connected to one address.
///
/// # Errors
/// When the destination has no route, no port is free, or the source address may not be used.
pub fn connect_udp(target: SocketAddr, options: ConnectOptions) -> io::Result<UdpSocket> {
    let socket =
        Socket::new(Domain::for_address(target), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let from = options.prepare(&socket)?.unwrap_or(any);
    socket.bind(&from.into())?;
    socket.connect(&target.into())?;
    UdpSocket::from_std(socket.into())
}

/// Connects to a TCP address within `timeout`.
///
/// # Errors
/// When the connection is refused, the destination is unreachable, or the timeout passes
/// ([`io::ErrorKind::TimedOut`]); when no source port is free ([`io::ErrorKind::AddrNotAvailable`]), or the
/// source address may not be used.
pub async fn connect_tcp(
    target: SocketAddr,
    options: ConnectOptions,
    timeout: Duration,
) -> io::Result<TcpStream> {
    let socket = match target {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if let Some(from) = options.prepare(&socket)? {
        socket.bind(from)?;
    }
    let stream = tokio::time::timeout(timeout, socket.connect(target)).await.map_err(|_| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no connection to {target} within {timeout:?}"),
        )
    })??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The destination of a redirected connection before redirection; `local`, the socket's own address, for a
/// connection that was not redirected.
#[must_use]
pub fn original_destination(stream: &TcpStream, local: SocketAddr) -> SocketAddr {
    let redirected = match local {
        SocketAddr::V4(_) => getsockopt(&stream.as_fd(), sockopt::OriginalDst)
            .ok()
            .map(|raw| SocketAddr::V4(SockaddrIn::from(raw).into())),
        SocketAddr::V6(_) => getsockopt(&stream.as_fd(), sockopt::Ip6tOriginalDst)
            .ok()
            .map(|raw| SocketAddr::V6(SockaddrIn6::from(raw).into())),
    };
    redirected.unwrap_or(local)
}

/// Makes closing this connection send RST instead of FIN, to forward a reset that was received.
pub fn reset_on_close(stream: &TcpStream) {
    if let Err(error) = SockRef::from(stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "reset not possible: connection closes with FIN");
    }
}
