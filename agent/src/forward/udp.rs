//! Forwards datagrams. They are received in batches, each with its original destination, and sent through a
//! socket per flow. Datagrams of equal size are received and sent in one system call with GRO and GSO.
//!
//! Each flow has its own socket towards its endpoint, so responses need no inspection. They are sent from the
//! address that the client used: through the listening socket, or, for redirected traffic, through a socket
//! bound to the virtual address of the service.

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

/// The most and fewest messages of one receive call. A message is a datagram or a GRO batch.
const BATCH: usize = 32;
const SMALLEST_BATCH: usize = 4;
/// The largest message.
const MESSAGE_BYTES: usize = 65_536;
/// The distance between the buffers of two messages: not a power of two, so that their beginnings do not
/// compete for the same lines of the processor cache.
const SLOT_BYTES: usize = MESSAGE_BYTES + 320;
/// The socket receive buffer, if this process may set it: about 20 ms of traffic, for which a busy host may
/// not schedule a worker. By default the kernel holds fewer than 300 small datagrams.
const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;
/// The most service addresses that a worker keeps a response socket for.
const REPLY_SOCKET_LIMIT: usize = 4096;

/// A received datagram.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Datagram<'a> {
    pub(crate) client: SocketAddr,
    /// The original destination.
    pub(crate) destination: SocketAddr,
    pub(crate) bytes: &'a [u8],
}

/// The buffer for one receive call. A worker lends it to whichever task reads.
pub(crate) struct ReceiveBuffer(Vec<u8>);

/// How many messages one receive call asks for. Each costs a little even if it does not arrive, so the number
/// follows that of the last call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchSize {
    messages: usize,
    /// Whether the last call returned as many messages as it asked for, so there may be more.
    pub(crate) is_behind: bool,
}

impl BatchSize {
    pub(crate) fn new() -> Self {
        Self { messages: SMALLEST_BATCH, is_behind: false }
    }

    fn adjust(&mut self, came: usize) {
        self.is_behind = came >= self.messages;
        self.messages = (came * 2).clamp(SMALLEST_BATCH, BATCH);
    }
}

/// A received message.
struct ReceivedMessage<'a, S> {
    from: Option<S>,
    /// The original destination, if the socket reports it.
    destination: Option<SocketAddr>,
    bytes: &'a [u8],
    /// The size of each datagram in a GRO batch, of which the last may be shorter.
    segment_bytes: Option<usize>,
}

impl<'a, S> ReceivedMessage<'a, S> {
    fn datagrams(&self) -> impl Iterator<Item = &'a [u8]> + use<'a, S> {
        // An empty message is one empty datagram.
        let size = self.segment_bytes.unwrap_or(self.bytes.len()).max(1);
        let empty = self.bytes.is_empty().then_some(self.bytes);
        empty.into_iter().chain(self.bytes.chunks(size))
    }
}

impl ReceiveBuffer {
    pub(crate) fn new() -> Self {
        Self(vec![0; BATCH * SLOT_BYTES])
    }

    /// Receives messages and passes them to `take` together. `S` is the address type; `()` requests no addresses.
    fn receive<S: Copy + SockaddrLike, T>(
        &mut self,
        socket: &UdpSocket,
        batch_size: &mut BatchSize,
        take: impl FnOnce(&[ReceivedMessage<'_, S>]) -> T,
    ) -> io::Result<T> {
        // New headers for each call: the kernel stores in them how much space it used, and would use no more next
        // time.
        let space = nix::cmsg_space!(nix::libc::sockaddr_in6, i32);
        let mut headers = MultiHeaders::<S>::preallocate(batch_size.messages, Some(space));
        let slots = self.0.chunks_mut(SLOT_BYTES).take(batch_size.messages);
        let slots = slots.filter_map(|slot| slot.get_mut(..MESSAGE_BYTES));
        let mut slots: Vec<[IoSliceMut<'_>; 1]> = slots.map(|s| [IoSliceMut::new(s)]).collect();
        let flags = MsgFlags::MSG_DONTWAIT;
        batch_size.is_behind = false;
        let received = socket.try_io(Interest::READABLE, || {
            recvmmsg(socket.as_raw_fd(), &mut headers, slots.iter_mut(), flags, None)
                .map_err(Into::into)
        })?;
        let mut messages = Vec::with_capacity(batch_size.messages);
        for message in received {
            let mut taken = ReceivedMessage {
                from: message.address,
                destination: None,
                bytes: message.iovs().next().unwrap_or_default(),
                segment_bytes: None,
            };
            for control in message.cmsgs().into_iter().flatten() {
                match control {
                    ControlMessageOwned::UdpGroSegments(bytes) => {
                        taken.segment_bytes = usize::try_from(bytes).ok();
                    }
                    other => taken.destination = original(&other).or(taken.destination),
                }
            }
            messages.push(taken);
        }
        batch_size.adjust(messages.len());
        Ok(take(&messages))
    }

    /// Receives the responses that are pending on the socket of a flow.
    pub(crate) fn responses<T>(
        &mut self,
        endpoint: &UdpSocket,
        batch_size: &mut BatchSize,
        take: impl FnOnce(&[&[u8]]) -> T,
    ) -> io::Result<T> {
        self.receive(endpoint, batch_size, |answers: &[ReceivedMessage<'_, ()>]| {
            take(&answers.iter().flat_map(ReceivedMessage::datagrams).collect::<Vec<_>>())
        })
    }
}

/// Enables `UDP_GRO` (udp(7)): the kernel passes equal-sized datagrams as one message, which costs as much as one
/// datagram.
pub(crate) fn enable_gro(socket: &UdpSocket) {
    if let Err(error) = setsockopt(socket, sockopt::UdpGroSegment, &true) {
        tracing::debug!(%error, "UDP GRO not available");
    }
}

/// Receives datagrams in batches.
pub(crate) struct UdpReceiver {
    socket: Rc<UdpSocket>,
    /// The destination of datagrams without an original destination.
    own: SocketAddr,
    batch_size: BatchSize,
}

impl UdpReceiver {
    /// Receives from `socket`. With `intercepted` the kernel reports the original destination of each datagram.
    pub(crate) fn new(socket: Rc<UdpSocket>, intercepted: bool) -> io::Result<Self> {
        let own = socket.local_addr()?;
        if intercepted {
            match own {
                SocketAddr::V4(_) => setsockopt(&*socket, sockopt::Ipv4OrigDstAddr, &true)?,
                SocketAddr::V6(_) => setsockopt(&*socket, sockopt::Ipv6OrigDstAddr, &true)?,
            }
        }
        enable_gro(&socket);
        if let Err(error) = setsockopt(&*socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES) {
            tracing::debug!(%error, "UDP receive buffer not raised");
        }
        Ok(Self { socket, own, batch_size: BatchSize::new() })
    }

    /// Whether more datagrams may be pending than the last call returned.
    pub(crate) fn is_behind(&self) -> bool {
        self.batch_size.is_behind
    }

    /// Waits for datagrams.
    pub(crate) async fn ready(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// Receives pending datagrams and passes them to `forward` together.
    pub(crate) fn receive(
        &mut self,
        buffer: &mut ReceiveBuffer,
        forward: impl FnOnce(&[Datagram<'_>]),
    ) -> io::Result<()> {
        let socket = &self.socket;
        let own = self.own;
        let pass_on = |messages: &[ReceivedMessage<'_, SockaddrStorage>]| {
            let datagrams = messages.iter().filter_map(|message| {
                let client = message.from.as_ref().and_then(address)?;
                let destination = message.destination.unwrap_or(own);
                Some(message.datagrams().map(move |bytes| Datagram { client, destination, bytes }))
            });
            forward(&datagrams.flatten().collect::<Vec<_>>());
        };
        match buffer.receive(socket, &mut self.batch_size, pass_on) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

/// The most datagrams of one GSO batch (`UDP_MAX_SEGMENTS`), and the most bytes (the size of an IP packet).
const GSO_SEGMENT_LIMIT: usize = 64;
const GSO_BYTES: usize = 65_000;

/// The result of sending datagrams.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SendCounts {
    pub(crate) datagrams: u64,
    pub(crate) bytes: u64,
    pub(crate) lost: u64,
}

/// Sends datagrams of one flow in order, without blocking. Datagrams of equal size are sent together: the
/// kernel carries such a GSO batch as one packet and splits it at the end (`UDP_SEGMENT`, udp(7)).
pub(crate) fn send_all(
    socket: &UdpSocket,
    datagrams: &[&[u8]],
    to: Option<SocketAddr>,
) -> SendCounts {
    let mut sent = SendCounts::default();
    let mut rest = datagrams;
    while let Some((batch, behind)) = next_gso_batch(rest) {
        rest = behind;
        let bytes: usize = batch.iter().map(|datagram| datagram.len()).sum();
        if batch.len() > 1 && send_gso(socket, batch, to).is_ok() {
            sent.datagrams += batch.len() as u64;
            sent.bytes += bytes as u64;
            continue;
        }
        // A single datagram, or the kernel refused the batch: for this path or size, or because the socket is full.
        for datagram in batch {
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
type DatagramSlice<'a, 'b> = &'a [&'b [u8]];

/// Splits off the datagrams at the front that can be sent as one GSO batch: all of one size, except that the
/// last may be shorter.
fn next_gso_batch<'a, 'b>(
    datagrams: DatagramSlice<'a, 'b>,
) -> Option<(DatagramSlice<'a, 'b>, DatagramSlice<'a, 'b>)> {
    let size = datagrams.first()?.len();
    let limit = GSO_BYTES.checked_div(size).unwrap_or(1).clamp(1, GSO_SEGMENT_LIMIT);
    let equal = datagrams.iter().take(limit).take_while(|next| next.len() == size).count();
    let shorter = datagrams
        .get(equal)
        .is_some_and(|next| equal < limit && next.len() < size && !next.is_empty());
    datagrams.split_at_checked(equal + usize::from(shorter))
}

fn send_gso(socket: &UdpSocket, batch: &[&[u8]], to: Option<SocketAddr>) -> io::Result<()> {
    let size = batch.first().map_or(0, |datagram| datagram.len());
    let size = u16::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let slices: Vec<IoSlice<'_>> = batch.iter().map(|datagram| IoSlice::new(datagram)).collect();
    let segments = [ControlMessage::UdpGsoSegments(&size)];
    let to = to.map(SockaddrStorage::from);
    let flags = MsgFlags::MSG_DONTWAIT;
    sendmsg(socket.as_raw_fd(), &slices, &segments, flags, to.as_ref())?;
    Ok(())
}

/// Sends a datagram without blocking. It calls the system directly: tokio knows no readiness of a new socket
/// yet, and would drop the first datagram of a flow.
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

/// The sockets of a worker that responses to redirected datagrams are sent from.
#[derive(Debug, Default)]
pub(crate) struct ReplySockets(RefCell<HashMap<SocketAddr, Rc<UdpSocket>>>);

impl ReplySockets {
    /// Returns a socket bound to `address`, the virtual address of a service.
    pub(crate) fn socket_for(
        &self,
        address: SocketAddr,
        mark: Option<Mark>,
    ) -> io::Result<Rc<UdpSocket>> {
        let mut sockets = self.0.borrow_mut();
        if let Some(socket) = sockets.get(&address) {
            return Ok(socket.clone());
        }
        if sockets.len() >= REPLY_SOCKET_LIMIT {
            // Flows keep the sockets that they use.
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
    use weft_runtime::socket::{ConnectOptions, connect_udp};

    #[tokio::test(flavor = "current_thread")]
    async fn new_socket_sends_its_first_datagram() {
        let endpoint = bind_udp(([127, 0, 0, 1], 0).into(), false, None).expect("a port is free");
        let address = endpoint.local_addr().expect("the socket is bound");
        let flow = connect_udp(address, ConnectOptions::default()).expect("a port is free");
        assert_eq!(send_all(&flow, &[b"first"], None).datagrams, 1);

        let mut buffer = [0; 16];
        let (bytes, client) = endpoint.recv_from(&mut buffer).await.expect("a datagram arrives");
        assert_eq!(&buffer[..bytes], b"first");

        let answers = bind_udp(([127, 0, 0, 1], 0).into(), false, None).expect("a port is free");
        assert_eq!(send_all(&answers, &[b"to"], Some(client)).bytes, 2);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn datagrams_sent_in_batches_arrive_whole_and_separate() {
        let endpoint = bind_udp(([127, 0, 0, 1], 0).into(), false, None).expect("a port is free");
        let to = endpoint.local_addr().expect("the socket is bound");
        let flow = connect_udp(to, ConnectOptions::default()).expect("a port is free");
        let sizes = [1200, 1200, 1200, 300, 7, 7, 8, 60_000, 60_000, 0, 0, 1, 1200, 1201];
        let wanted: Vec<Vec<u8>> = (0..).zip(sizes).map(|(n, size)| vec![n; size]).collect();
        let datagrams: Vec<&[u8]> = wanted.iter().map(Vec::as_slice).collect();
        let sent = send_all(&flow, &datagrams, None);
        assert_eq!((sent.datagrams, sent.lost), (sizes.len() as u64, 0));
        assert_eq!(sent.bytes, sizes.iter().sum::<usize>() as u64);

        let mut buffer = ReceiveBuffer::new();
        let mut arrived: Vec<Vec<u8>> = Vec::new();
        let mut receiver =
            UdpReceiver::new(Rc::new(endpoint), false).expect("the kernel supports the options");
        while arrived.len() < wanted.len() {
            receiver.ready().await.expect("the socket is open");
            let take = |datagrams: &[Datagram<'_>]| {
                assert!(datagrams.iter().all(|datagram| datagram.destination == to));
                arrived.extend(datagrams.iter().map(|datagram| datagram.bytes.to_vec()));
            };
            receiver.receive(&mut buffer, take).expect("the socket is readable");
        }
        assert_eq!(arrived, wanted);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn gso_batch_is_received_as_one_message() {
        const BATCH_DATAGRAMS: usize = 40;
        let endpoint = bind_udp(([127, 0, 0, 1], 0).into(), false, None).expect("a port is free");
        enable_gro(&endpoint);
        let to = endpoint.local_addr().expect("the socket is bound");
        let flow = connect_udp(to, ConnectOptions::default()).expect("a port is free");
        let wanted: Vec<Vec<u8>> = (0..BATCH_DATAGRAMS)
            .map(|n| vec![u8::try_from(n).expect("n is below 40"); 1200])
            .collect();
        let datagrams: Vec<&[u8]> = wanted.iter().map(Vec::as_slice).collect();
        let mut buffer = ReceiveBuffer::new();
        let mut batch_size = BatchSize::new();
        // More than once, because the kernel changes the headers of a receive call.
        for _ in 0..3 {
            assert_eq!(send_all(&flow, &[b"alone"], None).datagrams, 1);
            assert_eq!(send_all(&flow, &datagrams, None).datagrams, BATCH_DATAGRAMS as u64);
            let mut arrived: Vec<Vec<u8>> = Vec::new();
            let mut messages = 0;
            let mut take = |taken: &[ReceivedMessage<'_, ()>]| {
                messages += taken.len();
                arrived
                    .extend(taken.iter().flat_map(ReceivedMessage::datagrams).map(<[u8]>::to_vec));
                arrived.len()
            };
            let mut count = 0;
            while count <= BATCH_DATAGRAMS {
                endpoint.readable().await.expect("the socket is open");
                count = buffer
                    .receive(&endpoint, &mut batch_size, &mut take)
                    .expect("messages have arrived");
            }
            assert_eq!(arrived.remove(0), b"alone");
            assert_eq!((arrived, messages), (wanted.clone(), 2));
        }
    }

    #[test]
    fn gso_batch_has_datagrams_of_one_size_and_may_end_with_a_shorter_one() {
        let bytes = vec![0; 65_000];
        let check = |sizes: &[usize], batch: usize| {
            let datagrams: Vec<&[u8]> = sizes.iter().map(|size| &bytes[..*size]).collect();
            let (first, behind) = next_gso_batch(&datagrams).expect("there are datagrams");
            assert_eq!((first.len(), behind.len()), (batch, sizes.len() - batch), "{sizes:?}");
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
        assert!(next_gso_batch(&[]).is_none());
    }
}
