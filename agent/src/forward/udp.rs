//! Moves datagrams: in by batches with the address each was sent to, out through a socket per flow.
//!
//! A flow has a socket of its own towards its endpoint, so answers find their way without looking
//! into them. They leave again from the very address the client sent to: through the listening
//! socket, or, for intercepted traffic, through a socket bound to the service's address.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::rc::Rc;

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrIn, SockaddrIn6,
    SockaddrLike, SockaddrStorage, recvmmsg, setsockopt, sockopt,
};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use weft_runtime::socket::{Mark, bind_udp};

/// How many datagrams one system call takes in.
const BATCH: usize = 32;
/// The largest datagram.
const DATAGRAM_BYTES: usize = 65_536;
/// How many addresses a worker holds a socket for, to answer from.
const REPLY_SOCKET_LIMIT: usize = 4096;

/// A datagram taken in.
#[derive(Debug)]
pub(crate) struct Datagram<'a> {
    pub(crate) client: SocketAddr,
    /// The address it was sent to; none when the socket was not asked to tell.
    pub(crate) destination: Option<SocketAddr>,
    pub(crate) bytes: &'a [u8],
}

/// Takes in datagrams by batches.
pub(crate) struct Intake {
    socket: Rc<UdpSocket>,
    buffers: Vec<u8>,
    headers: MultiHeaders<SockaddrStorage>,
}

impl Intake {
    /// Reads from `socket`. With `intercepted` each datagram tells the address it was sent to.
    pub(crate) fn new(socket: Rc<UdpSocket>, intercepted: bool) -> io::Result<Self> {
        if intercepted {
            match socket.local_addr()? {
                SocketAddr::V4(_) => setsockopt(&*socket, sockopt::Ipv4OrigDstAddr, &true)?,
                SocketAddr::V6(_) => setsockopt(&*socket, sockopt::Ipv6OrigDstAddr, &true)?,
            }
        }
        let space = nix::cmsg_space!(nix::libc::sockaddr_in6, nix::libc::sockaddr_in);
        let headers = MultiHeaders::preallocate(BATCH, Some(space));
        Ok(Self { socket, buffers: vec![0; BATCH * DATAGRAM_BYTES], headers })
    }

    /// Waits for datagrams and gives each to `take`.
    pub(crate) async fn next(&mut self, mut take: impl FnMut(Datagram<'_>)) -> io::Result<()> {
        let mut slices: Vec<[IoSliceMut<'_>; 1]> = self
            .buffers
            .chunks_mut(DATAGRAM_BYTES)
            .map(|buffer| [IoSliceMut::new(buffer)])
            .collect();
        let headers = &mut self.headers;
        self.socket.readable().await?;
        let socket = self.socket.clone();
        let taken = socket.try_io(Interest::READABLE, || {
            let received = recvmmsg(
                socket.as_raw_fd(),
                headers,
                slices.iter_mut(),
                MsgFlags::MSG_DONTWAIT,
                None,
            )?;
            for message in received {
                let Some(client) = message.address.as_ref().and_then(address) else {
                    continue;
                };
                let destination =
                    message.cmsgs().ok().and_then(|mut all| all.find_map(|m| original(&m)));
                let bytes = message.iovs().next().unwrap_or_default();
                take(Datagram { client, destination, bytes });
            }
            Ok(())
        });
        match taken {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

/// Sends a datagram now or not at all. The system is asked, not what is remembered of the socket:
/// nothing is, of one that was made a moment ago, and the first datagram of a flow would be lost.
pub(crate) fn send(socket: &UdpSocket, bytes: &[u8], to: Option<SocketAddr>) -> io::Result<usize> {
    let socket = SockRef::from(socket);
    match to {
        Some(to) => socket.send_to(bytes, &to.into()),
        None => socket.send(bytes),
    }
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    match storage.family()? {
        AddressFamily::Inet => Some(SocketAddr::V4((*storage.as_sockaddr_in()?).into())),
        AddressFamily::Inet6 => Some(SocketAddr::V6((*storage.as_sockaddr_in6()?).into())),
        _ => None,
    }
}

fn original(message: &ControlMessageOwned) -> Option<SocketAddr> {
    match message {
        ControlMessageOwned::Ipv4OrigDstAddr(raw) => {
            Some(SocketAddr::V4(SockaddrIn::from(*raw).into()))
        }
        ControlMessageOwned::Ipv6OrigDstAddr(raw) => {
            Some(SocketAddr::V6(SockaddrIn6::from(*raw).into()))
        }
        _ => None,
    }
}

/// The sockets of a worker from which answers to intercepted datagrams leave.
#[derive(Debug, Default)]
pub(crate) struct ReplySockets(RefCell<HashMap<SocketAddr, Rc<UdpSocket>>>);

impl ReplySockets {
    /// The socket bound to `address`, which is a service's and not the host's.
    pub(crate) fn from(
        &self,
        address: SocketAddr,
        mark: Option<Mark>,
    ) -> io::Result<Rc<UdpSocket>> {
        let mut sockets = self.0.borrow_mut();
        if let Some(socket) = sockets.get(&address) {
            return Ok(socket.clone());
        }
        if sockets.len() >= REPLY_SOCKET_LIMIT {
            // Those in use live on in their flows.
            sockets.clear();
        }
        let socket = Rc::new(bind_udp(address, true, mark)?);
        sockets.insert(address, socket.clone());
        Ok(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_runtime::socket::connect_udp;

    #[tokio::test(flavor = "current_thread")]
    async fn a_socket_made_a_moment_ago_sends_its_first_datagram() {
        let endpoint = bind_udp(([127, 0, 0, 1], 0).into(), false, None).expect("a port");
        let address = endpoint.local_addr().expect("bound");
        let flow = connect_udp(address, None).expect("a socket");
        assert_eq!(send(&flow, b"first", None).expect("sent"), 5);

        let mut buffer = [0; 16];
        let (bytes, client) = endpoint.recv_from(&mut buffer).await.expect("received");
        assert_eq!(&buffer[..bytes], b"first");

        let answers = bind_udp(([127, 0, 0, 1], 0).into(), false, None).expect("a port");
        assert_eq!(send(&answers, b"to", Some(client)).expect("sent"), 2);
    }
}
