//! A netlink client, so that no tool needs to be installed: packet filter ([`nf_tables`]), connection
//! tracking ([`conntrack`]) and policy routing ([`route`]). Calls block: the kernel answers at once.

pub(crate) mod conntrack;
mod message;
pub(crate) mod nf_tables;
pub(crate) mod route;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockopt, recv,
    sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use message::BATCH_END;
use message::replies;
pub(crate) use message::{Attributes, NetlinkMessage, NetlinkReply, attributes, find};

const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
pub(crate) const REPLACE: u16 = 0x100;
pub(crate) const EXCLUSIVE: u16 = 0x200;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const APPEND: u16 = 0x800;
/// The flag of a dump that a concurrent change has interrupted; the dump must be repeated.
const DUMP_INTERRUPTED: u16 = 0x10;

const ERROR: u16 = 2;
const DONE: u16 = 3;

/// The largest datagram from the kernel.
const RECEIVE_BYTES: usize = 64 * 1024;
/// The size of the send buffer.
const SEND_BYTES: usize = 4 << 20;
/// The size of the receive buffer, for notifications that wait to be read.
const WAITING_BYTES: usize = 8 << 20;
/// The receive timeout. The kernel answers within the call; the timeout only guards against blocking forever.
const RECEIVE_TIMEOUT_SECONDS: i64 = 10;
/// How often an interrupted dump is repeated.
const DUMP_ATTEMPTS: usize = 10;

/// A netlink socket, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// A notification from the kernel.
#[derive(Debug)]
pub(crate) enum Notification {
    /// A message about one change.
    Message(NetlinkReply),
    /// Notifications were lost because the receive buffer was full: anything may have changed.
    Overflow,
}

impl Netlink {
    /// Opens a socket for requests.
    ///
    /// # Errors
    /// When the kernel lacks this netlink protocol, or the socket cannot be opened.
    pub(crate) fn open(part: SockProtocol) -> io::Result<Self> {
        Self::listen(part, 0)
    }

    /// Opens a socket that receives notifications. `groups` is a bit mask of multicast groups.
    ///
    /// # Errors
    /// When the kernel lacks this netlink protocol, or the socket cannot be opened.
    pub(crate) fn listen(part: SockProtocol, groups: u32) -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, part)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(RECEIVE_TIMEOUT_SECONDS))?;
        // A transaction is sent whole. Without the privilege to raise the buffers, it must fit the default
        // size.
        for result in [
            setsockopt(&socket, sockopt::SndBufForce, &SEND_BYTES),
            setsockopt(&socket, sockopt::RcvBufForce, &WAITING_BYTES),
        ] {
            if let Err(error) = result {
                tracing::trace!(%error, "socket buffer size not raised");
            }
        }
        Ok(Self { socket, sequence: 0 })
    }

    /// The most bytes of one batch.
    pub(crate) fn batch_limit_bytes(&self) -> usize {
        // The kernel uses part of the buffer for its own bookkeeping.
        getsockopt(&self.socket, sockopt::SndBuf).map_or(0, |bytes| bytes / 8 * 7)
    }

    /// Sends a message and waits for the acknowledgement.
    ///
    /// # Errors
    /// The error code of the kernel, or an I/O error of the socket.
    pub(crate) fn request(&mut self, message: &NetlinkMessage) -> io::Result<()> {
        self.batch(std::slice::from_ref(message))
    }

    /// Sends messages together and waits for the acknowledgement of the last one.
    ///
    /// # Errors
    /// The first error code of the kernel, or an I/O error of the socket.
    pub(crate) fn batch(&mut self, messages: &[NetlinkMessage]) -> io::Result<()> {
        let first = self.sequence.wrapping_add(1);
        // The message that ends a batch is not acknowledged, so the one before it asks for the
        // acknowledgement.
        let answering = messages.iter().rposition(|message| message.kind != BATCH_END);
        let mut out = Vec::new();
        let mut awaited = first;
        for (index, message) in messages.iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            let ask = if Some(index) == answering { ACK } else { 0 };
            if ask != 0 {
                awaited = self.sequence;
            }
            message.write(self.sequence, REQUEST | ask, &mut out);
        }
        self.send(&out)?;
        let mut failed = None;
        loop {
            for reply in self.receive()? {
                let (true, Some(error)) = (reply.kind == ERROR, error(&reply)) else { continue };
                if error != 0 {
                    failed.get_or_insert(error);
                }
                // When the kernel refuses the first message of a batch, it reads none of the others.
                if reply.sequence == awaited || (reply.sequence == first && error != 0) {
                    return failed.map_or(Ok(()), |error| Err(io::Error::from_raw_os_error(error)));
                }
            }
        }
    }

    /// Requests one object and returns the messages that describe it.
    ///
    /// # Errors
    /// The error code of the kernel, or an I/O error of the socket.
    pub(crate) fn get(&mut self, message: &NetlinkMessage) -> io::Result<Vec<NetlinkReply>> {
        self.ask(message, ACK)
    }

    /// Requests a list and returns its messages.
    ///
    /// # Errors
    /// The error code of the kernel, an I/O error of the socket, or a list that changed during every attempt.
    pub(crate) fn dump(&mut self, message: &NetlinkMessage) -> io::Result<Vec<NetlinkReply>> {
        for _ in 0..DUMP_ATTEMPTS {
            let replies = self.ask(message, DUMP)?;
            if replies.iter().all(|reply| reply.flags & DUMP_INTERRUPTED == 0) {
                return Ok(replies);
            }
        }
        Err(io::Error::other("the kernel's list changed during every attempt to read it"))
    }

    /// Passes every pending notification to `each`, without blocking. Returns whether there was one. Lost
    /// notifications are passed as [`Notification::Overflow`].
    ///
    /// # Errors
    /// When the socket fails.
    pub(crate) fn drain(&self, mut each: impl FnMut(Notification)) -> io::Result<bool> {
        let mut buffer = vec![0; RECEIVE_BYTES];
        let mut received = false;
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EAGAIN) => return Ok(received),
                Ok(bytes) => {
                    replies(buffer.get(..bytes).unwrap_or_default())
                        .for_each(|reply| each(Notification::Message(reply)));
                }
                Err(Errno::ENOBUFS) => each(Notification::Overflow),
                Err(error) => return Err(error.into()),
            }
            received = true;
        }
    }

    /// Requests a list that may be long, and passes each of its messages to `each` as it arrives. A
    /// concurrent change may be missed.
    ///
    /// # Errors
    /// The error code of the kernel, or an I/O error of the socket.
    pub(crate) fn stream(
        &mut self,
        message: &NetlinkMessage,
        each: impl FnMut(&NetlinkReply),
    ) -> io::Result<()> {
        self.ask_each(message, DUMP, each)
    }

    fn ask(&mut self, message: &NetlinkMessage, flags: u16) -> io::Result<Vec<NetlinkReply>> {
        let mut replies = Vec::new();
        self.ask_each(message, flags, |reply| replies.push(reply.clone()))?;
        Ok(replies)
    }

    fn ask_each(
        &mut self,
        message: &NetlinkMessage,
        flags: u16,
        mut each: impl FnMut(&NetlinkReply),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut out = Vec::new();
        message.write(self.sequence, REQUEST | flags, &mut out);
        self.send(&out)?;
        loop {
            for reply in self.receive()? {
                match reply.kind {
                    _ if reply.sequence != self.sequence => {}
                    ERROR => match error(&reply) {
                        Some(0) => return Ok(()),
                        Some(error) => return Err(io::Error::from_raw_os_error(error)),
                        None => return Err(io::ErrorKind::InvalidData.into()),
                    },
                    // A list that the kernel aborted ends with an error number.
                    DONE => match error(&reply) {
                        Some(broken) if broken > 0 => {
                            return Err(io::Error::from_raw_os_error(broken));
                        }
                        _ => return Ok(()),
                    },
                    _ => each(&reply),
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), bytes, &kernel, MsgFlags::empty())?;
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<NetlinkReply>> {
        let mut buffer = vec![0; RECEIVE_BYTES];
        let length = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(Errno::EAGAIN) => {
                return Err(io::Error::other(format!(
                    "no netlink answer within {RECEIVE_TIMEOUT_SECONDS} s"
                )));
            }
            received => received?,
        };
        Ok(replies(buffer.get(..length).unwrap_or_default()).collect())
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The error number in an error message, as a positive number; 0 is success.
fn error(reply: &NetlinkReply) -> Option<i32> {
    let number = i32::from_ne_bytes(*reply.body.first_chunk()?);
    Some(number.saturating_neg())
}
