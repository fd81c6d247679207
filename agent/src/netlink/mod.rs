//! Talks to the kernel over netlink, so that no tool needs to be installed: packet filter
//! ([`nf_tables`]), its connections ([`conntrack`]) and policy routing ([`route`]). Blocking, since
//! the kernel answers at once.

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

use message::replies;
pub(crate) use message::{Attributes, NetlinkMessage, NetlinkReply, attributes, find};

const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
pub(crate) const REPLACE: u16 = 0x100;
pub(crate) const EXCLUSIVE: u16 = 0x200;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const APPEND: u16 = 0x800;
/// A dump that was disturbed by a change, and has to be made again.
const DUMP_INTERRUPTED: u16 = 0x10;

const ERROR: u16 = 2;
const DONE: u16 = 3;

/// The largest datagram that the kernel sends.
const RECEIVE_BYTES: usize = 64 * 1024;
/// How much may be on its way to the kernel.
const SEND_BYTES: usize = 4 << 20;
/// How much that the kernel told may wait to be taken in.
const WAITING_BYTES: usize = 8 << 20;
/// How long the kernel may take. It answers within the call; this is against waiting for ever.
const RECEIVE_TIMEOUT_SECONDS: i64 = 10;
/// How often a disturbed dump is made again.
const DUMP_ATTEMPTS: usize = 10;

/// A connection to a part of the kernel, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// What the kernel tells of itself.
#[derive(Debug)]
pub(crate) enum Notification {
    /// This.
    Message(NetlinkReply),
    /// More than there was room for: anything may have changed.
    Overflow,
}

impl Netlink {
    /// Opens one.
    ///
    /// # Errors
    /// When the kernel has no such part.
    pub(crate) fn open(part: SockProtocol) -> io::Result<Self> {
        Self::listen(part, 0)
    }

    /// Opens one that the kernel tells of changes. `groups` is a bit for each kind of change.
    ///
    /// # Errors
    /// When the kernel has no such part.
    pub(crate) fn listen(part: SockProtocol, groups: u32) -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, part)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(RECEIVE_TIMEOUT_SECONDS))?;
        // A transaction is sent whole. Where we may not ask for room, it has to fit what there is.
        for result in [
            setsockopt(&socket, sockopt::SndBufForce, &SEND_BYTES),
            setsockopt(&socket, sockopt::RcvBufForce, &WAITING_BYTES),
        ] {
            if let Err(error) = result {
                tracing::trace!(%error, "no more room than every socket has");
            }
        }
        Ok(Self { socket, sequence: 0 })
    }

    /// How many bytes one batch may have.
    pub(crate) fn batch_limit_bytes(&self) -> usize {
        // The kernel keeps a little of it to itself.
        getsockopt(&self.socket, sockopt::SndBuf).map_or(0, |bytes| bytes / 8 * 7)
    }

    /// Sends a message and waits until the kernel has done what it asks.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn request(&mut self, message: &NetlinkMessage) -> io::Result<()> {
        self.batch(std::slice::from_ref(message))
    }

    /// Sends messages together and waits until the kernel has done with the last of them.
    ///
    /// # Errors
    /// The kernel's first.
    pub(crate) fn batch(&mut self, messages: &[NetlinkMessage]) -> io::Result<()> {
        let first = self.sequence.wrapping_add(1);
        // The one behind which a batch ends asks for no answer, so that of the one before it counts.
        let answering = messages.iter().rposition(|message| !nf_tables::is_end(message));
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
                // When the first message of a batch is refused, none of the others is looked at.
                if reply.sequence == awaited || (reply.sequence == first && error != 0) {
                    return failed.map_or(Ok(()), |error| Err(io::Error::from_raw_os_error(error)));
                }
            }
        }
    }

    /// Asks for one thing and gives what the kernel tells of it.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn get(&mut self, message: &NetlinkMessage) -> io::Result<Vec<NetlinkReply>> {
        self.ask(message, ACK)
    }

    /// Asks for a list and gives the kernel's messages.
    ///
    /// # Errors
    /// The kernel's, or that the list changed each time it was asked for.
    pub(crate) fn dump(&mut self, message: &NetlinkMessage) -> io::Result<Vec<NetlinkReply>> {
        for _ in 0..DUMP_ATTEMPTS {
            let told = self.ask(message, DUMP)?;
            if told.iter().all(|reply| reply.flags & DUMP_INTERRUPTED == 0) {
                return Ok(told);
            }
        }
        Err(io::Error::other("the kernel's list changed each time it was read"))
    }

    /// Takes in all that the kernel has told of itself, and gives each message to `each`; whether it
    /// was anything. [`Notification::Overflow`] stands for what there was no room for.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(crate) fn drain(&self, mut each: impl FnMut(Notification)) -> io::Result<bool> {
        let mut buffer = vec![0; RECEIVE_BYTES];
        let mut heard = false;
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EAGAIN) => return Ok(heard),
                Ok(bytes) => {
                    replies(buffer.get(..bytes).unwrap_or_default())
                        .for_each(|reply| each(Notification::Message(reply)));
                }
                Err(Errno::ENOBUFS) => each(Notification::Overflow),
                Err(error) => return Err(error.into()),
            }
            heard = true;
        }
    }

    /// Asks for a list that may be long, and gives each of the kernel's messages to `each` as it
    /// comes. What changes meanwhile may be missed.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn stream(
        &mut self,
        message: &NetlinkMessage,
        each: impl FnMut(&NetlinkReply),
    ) -> io::Result<()> {
        self.ask_each(message, DUMP, each)
    }

    fn ask(&mut self, message: &NetlinkMessage, flags: u16) -> io::Result<Vec<NetlinkReply>> {
        let mut told = Vec::new();
        self.ask_each(message, flags, |reply| told.push(reply.clone()))?;
        Ok(told)
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
                    // A list that broke off ends with an error number.
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
            Err(Errno::EAGAIN) => return Err(io::Error::other("the kernel did not answer")),
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

/// The error number that an error message tells, positive; 0 is success.
fn error(reply: &NetlinkReply) -> Option<i32> {
    let number = i32::from_ne_bytes(*reply.body.first_chunk()?);
    Some(number.saturating_neg())
}
