//! Moves datagrams: in by batches with the address each was sent to, out through a socket per flow,
//! those of a flow that are of equal size in trains.
//!
//! A flow has a socket of its own towards its endpoint, so answers find their way without looking
//! into them. They leave again from the very address the client sent to: through the listening
//! socket, or, for intercepted traffic, through a socket bound to the service's address.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::rc::Rc;

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrIn,
    SockaddrIn6, SockaddrLike, SockaddrStorage, recvmmsg, sendmsg, setsockopt, sockopt,
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
#[derive(Debug, Clone, Copy)]
pub(crate) struct Datagram<'a> {
    pub(crate) client: SocketAddr,
    /// The address it was sent to; none when the socket was not asked to tell.
    pub(crate) destination: Option<SocketAddr>,
    pub(crate) bytes: &'a [u8],
}

/// Room for the datagrams that one system call takes in. A worker lends one to all flows for their
/// answers. Each intake has its own: the kernel notes in the headers how much of the addresses and
/// ancillary data it has used, which is then all that it uses for the next.
pub(crate) struct Batch {
    buffers: Vec<u8>,
    headers: MultiHeaders<SockaddrStorage>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        let space = nix::cmsg_space!(nix::libc::sockaddr_in6, nix::libc::sockaddr_in);
        let headers = MultiHeaders::preallocate(BATCH, Some(space));
        Self { buffers: vec![0; BATCH * DATAGRAM_BYTES], headers }
    }

    /// Takes in what a socket has, and gives it to `take`, all at once.
    fn receive<T>(
        &mut self,
        socket: &UdpSocket,
        take: impl FnOnce(&[Datagram<'_>]) -> T,
    ) -> io::Result<T> {
        let mut slices: Vec<[IoSliceMut<'_>; 1]> = self
            .buffers
            .chunks_mut(DATAGRAM_BYTES)
            .map(|buffer| [IoSliceMut::new(buffer)])
            .collect();
        let flags = MsgFlags::MSG_DONTWAIT;
        let received = socket.try_io(Interest::READABLE, || {
            recvmmsg(socket.as_raw_fd(), &mut self.headers, slices.iter_mut(), flags, None)
                .map_err(Into::into)
        })?;
        let mut datagrams = Vec::with_capacity(BATCH);
        for message in received {
            // A connected socket's peer is known, and not told.
            let client = message.address.as_ref().and_then(address);
            let Some(client) = client.or_else(|| socket.peer_addr().ok()) else { continue };
            let destination =
                message.cmsgs().ok().and_then(|mut all| all.find_map(|m| original(&m)));
            let bytes = message.iovs().next().unwrap_or_default();
            datagrams.push(Datagram { client, destination, bytes });
        }
        Ok(take(&datagrams))
    }

    /// Takes in the answers that wait at a flow's socket.
    pub(crate) fn answers<T>(
        &mut self,
        endpoint: &UdpSocket,
        take: impl FnOnce(&[&[u8]]) -> T,
    ) -> io::Result<T> {
        self.receive(endpoint, |answers| {
            let bytes: Vec<&[u8]> = answers.iter().map(|answer| answer.bytes).collect();
            take(&bytes)
        })
    }
}

/// Takes in datagrams by batches.
pub(crate) struct Intake {
    socket: Rc<UdpSocket>,
    batch: Batch,
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
        Ok(Self { socket, batch: Batch::new() })
    }

    /// Waits for datagrams and gives those that are there to `take`, all at once.
    pub(crate) async fn next(&mut self, take: impl FnOnce(&[Datagram<'_>])) -> io::Result<()> {
        self.socket.readable().await?;
        match self.batch.receive(&self.socket, take) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

/// The most datagrams of one train, and the most bytes (`UDP_MAX_SEGMENTS`, and what a packet holds).
const TRAIN_LIMIT: usize = 64;
const TRAIN_BYTES: usize = 65_000;

/// What became of datagrams that were to be sent.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) datagrams: u64,
    pub(crate) bytes: u64,
    pub(crate) lost: u64,
}

/// Sends datagrams of one flow, in order, now or not at all. Those of equal size go together: the
/// kernel carries such a train as one packet and takes it apart at its end (`UDP_SEGMENT`, udp(7)).
pub(crate) fn send_all(socket: &UdpSocket, datagrams: &[&[u8]], to: Option<SocketAddr>) -> Sent {
    let mut sent = Sent::default();
    let mut rest = datagrams;
    while let Some((train, behind)) = next_train(rest) {
        rest = behind;
        let bytes: usize = train.iter().map(|datagram| datagram.len()).sum();
        if train.len() > 1 && send_train(socket, train, to).is_ok() {
            sent.datagrams += train.len() as u64;
            sent.bytes += bytes as u64;
            continue;
        }
        // Alone, or where the kernel takes no train: on this path, of this size, or not now.
        for datagram in train {
            match send(socket, datagram, to) {
                Ok(bytes) => {
                    sent.datagrams += 1;
                    sent.bytes += bytes as u64;
                }
                Err(_) => sent.lost += 1,
            }
        }
    }
    sent
}

/// Datagrams of one flow, in order.
type Row<'a, 'b> = &'a [&'b [u8]];

/// The datagrams at the front that can go as one train, and those behind: all of one size, but the
/// last may be shorter.
fn next_train<'a, 'b>(datagrams: Row<'a, 'b>) -> Option<(Row<'a, 'b>, Row<'a, 'b>)> {
    let size = datagrams.first()?.len();
    let limit = TRAIN_BYTES.checked_div(size).unwrap_or(1).clamp(1, TRAIN_LIMIT);
    let equal = datagrams.iter().take(limit).take_while(|next| next.len() == size).count();
    let shorter = datagrams
        .get(equal)
        .is_some_and(|next| equal < limit && next.len() < size && !next.is_empty());
    datagrams.split_at_checked(equal + usize::from(shorter))
}

fn send_train(socket: &UdpSocket, train: &[&[u8]], to: Option<SocketAddr>) -> io::Result<()> {
    let size = train.first().map_or(0, |datagram| datagram.len());
    let size = u16::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let slices: Vec<IoSlice<'_>> = train.iter().map(|datagram| IoSlice::new(datagram)).collect();
    let segments = [ControlMessage::UdpGsoSegments(&size)];
    let to = to.map(SockaddrStorage::from);
    let flags = MsgFlags::MSG_DONTWAIT;
    sendmsg(socket.as_raw_fd(), &slices, &segments, flags, to.as_ref())?;
    Ok(())
}

/// Sends a datagram now or not at all. The system is asked, not what is remembered of the socket:
/// nothing is, of one that was made a moment ago, and the first datagram of a flow would be lost.
fn send(socket: &UdpSocket, bytes: &[u8], to: Option<SocketAddr>) -> io::Result<usize> {
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
    use weft_runtime::socket::{Leaving, connect_udp};

    #[tokio::test(flavor = "current_thread")]
    async fn a_socket_made_a_moment_ago_sends_its_first_datagram() {
        let endpoint = bind_udp(([127, 0, 0, 1], 0).into(), false, None).expect("a port");
        let address = endpoint.local_addr().expect("bound");
        let flow = connect_udp(address, Leaving::default()).expect("a socket");
        assert_eq!(send_all(&flow, &[b"first"], None).datagrams, 1);

        let mut buffer = [0; 16];
        let (bytes, client) = endpoint.recv_from(&mut buffer).await.expect("received");
        assert_eq!(&buffer[..bytes], b"first");

        let answers = bind_udp(([127, 0, 0, 1], 0).into(), false, None).expect("a port");
        assert_eq!(send_all(&answers, &[b"to"], Some(client)).bytes, 2);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn datagrams_arrive_whole_and_apart_whatever_went_together() {
        let endpoint = bind_udp(([127, 0, 0, 1], 0).into(), false, None).expect("a port");
        let flow = connect_udp(endpoint.local_addr().expect("bound"), Leaving::default())
            .expect("a socket");
        let sizes = [1200, 1200, 1200, 300, 7, 7, 8, 60_000, 60_000, 0, 0, 1, 1200, 1201];
        let wanted: Vec<Vec<u8>> = (0..).zip(sizes).map(|(n, size)| vec![n; size]).collect();
        let datagrams: Vec<&[u8]> = wanted.iter().map(Vec::as_slice).collect();
        let sent = send_all(&flow, &datagrams, None);
        assert_eq!((sent.datagrams, sent.lost), (sizes.len() as u64, 0));
        assert_eq!(sent.bytes, sizes.iter().sum::<usize>() as u64);

        let mut batch = Batch::new();
        let mut arrived: Vec<Vec<u8>> = Vec::new();
        while arrived.len() < wanted.len() {
            endpoint.readable().await.expect("it is open");
            let taken = batch.receive(&endpoint, |datagrams| {
                arrived.extend(datagrams.iter().map(|datagram| datagram.bytes.to_vec()));
            });
            assert!(taken.is_ok() || arrived.len() < wanted.len(), "{taken:?}");
        }
        assert_eq!(arrived, wanted);
    }

    #[test]
    fn a_train_is_of_one_size_and_may_end_with_a_shorter_one() {
        let bytes = vec![0; 65_000];
        let check = |sizes: &[usize], train: usize| {
            let datagrams: Vec<&[u8]> = sizes.iter().map(|size| &bytes[..*size]).collect();
            let (first, behind) = next_train(&datagrams).expect("there are some");
            assert_eq!((first.len(), behind.len()), (train, sizes.len() - train), "{sizes:?}");
        };
        check(&[5], 1);
        check(&[5, 5, 5], 3);
        check(&[5, 5, 4, 5], 3);
        check(&[5, 6], 1);
        check(&[5, 0], 1);
        check(&[0, 0, 0], 1);
        check(&[30_000; 4], 2);
        check(&[32_500, 32_500, 1], 2);
        check(&[1; 65], 64);
        assert!(next_train(&[]).is_none());
    }
}
