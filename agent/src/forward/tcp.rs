//! Moves a TCP connection: both ways at once, each end's close and reset passed on.
//!
//! A small message is copied through the worker's scratch buffer; as soon as a read fills it, the
//! direction goes over to splice, where the kernel moves pages through a pipe and we copy nothing.
//! A connection that waits owns neither buffer nor pipe; what it does own is small, and written as
//! states ([`Way`]) rather than as nested futures, each of which would keep room of its own.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::fcntl::{OFlag, SpliceFFlags, splice};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;
use tokio::sync::futures::Notified;
use tokio::time::Sleep;
use weft_model::IdleEnd;
use weft_runtime::socket::reset_on_close;

use crate::worker::now;

/// What a read through the scratch buffer takes at most; a read that fills it means bulk.
const SCRATCH_BYTES: usize = 16 * 1024;
/// What one splice asks for: the default size of a pipe.
const SPLICE_BYTES: usize = 64 * 1024;
/// How many splices one connection does before others have their turn.
const SPLICES_AT_ONCE: usize = 16;
/// In how many looks a timeout is divided: silence is seen so much of it late, at most.
const LOOKS: u32 = 8;
/// How many idle pipes a worker keeps.
const PIPE_LIMIT: usize = 64;

/// What a worker lends to the connection that is being served.
#[derive(Debug, Clone)]
pub(crate) struct Lender(Rc<LenderInner>);

#[derive(Debug)]
struct LenderInner {
    scratch: RefCell<Box<[u8]>>,
    pipes: RefCell<Vec<Pipe>>,
}

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Lender {
    pub(crate) fn new() -> Self {
        let scratch = RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice());
        Self(Rc::new(LenderInner { scratch, pipes: RefCell::default() }))
    }

    fn pipe(&self) -> io::Result<Pipe> {
        if let Some(pipe) = self.0.pipes.borrow_mut().pop() {
            return Ok(pipe);
        }
        let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        Ok(Pipe { read, write })
    }

    /// Takes back a pipe that is empty.
    fn give_back(&self, pipe: Pipe) {
        let mut pipes = self.0.pipes.borrow_mut();
        if pipes.len() < PIPE_LIMIT {
            pipes.push(pipe);
        }
    }
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Both sides closed.
    Closed,
    /// A side reset it, and the other was told so.
    Reset,
    /// It was silent for too long.
    Idle,
    /// The process ends and could not wait for it.
    CutOff,
}

impl End {
    /// The word in logs.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Reset => "reset",
            Self::Idle => "idle",
            Self::CutOff => "cut_off",
        }
    }
}

/// What was moved.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    pub(crate) to_endpoint: Cell<u64>,
    pub(crate) to_client: Cell<u64>,
}

/// Moves bytes between `client` and `endpoint` until both are done, until nothing was moved for so
/// long, or until it is cut off. What was not done is reset on both sides, so that nobody takes what
/// came for the whole; silence may end otherwise, when nothing is held back.
#[allow(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice")]
pub(crate) fn relay<'a>(
    (client, endpoint): (&'a mut TcpStream, &'a mut TcpStream),
    (idle_timeout, idle_end): (Option<Duration>, IdleEnd),
    mut cut_off: Pin<&'a mut Notified<'_>>,
    lender: &'a Lender,
    moved: &'a Moved,
) -> impl Future<Output = End> {
    async move {
        let (mut there, mut back) = (Way::Reads, Way::Reads);
        let mut silence = Silence::new(idle_timeout);
        let mut sleep = pin!(tokio::time::sleep(silence.look.unwrap_or_default()));
        let end = poll_fn(|context| {
            if cut_off.as_mut().poll(context).is_ready() {
                return Poll::Ready(End::CutOff);
            }
            let (mut from_client, to_client) = client.split();
            let (mut from_endpoint, to_endpoint) = endpoint.split();
            let polled_there = there.poll(
                context,
                &mut Direction {
                    from: &mut from_client,
                    to: to_endpoint.as_ref(),
                    lender,
                    moved: &moved.to_endpoint,
                    is_last: matches!(back, Way::Done),
                },
            );
            let polled_back = back.poll(
                context,
                &mut Direction {
                    from: &mut from_endpoint,
                    to: to_client.as_ref(),
                    lender,
                    moved: &moved.to_client,
                    is_last: matches!(there, Way::Done),
                },
            );
            match (polled_there, polled_back) {
                (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) => Poll::Ready(End::Reset),
                (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(End::Closed),
                (Poll::Pending, _) | (_, Poll::Pending) => {
                    let total = moved.to_endpoint.get() + moved.to_client.get();
                    silence.poll(context, sleep.as_mut(), total).map(|()| End::Idle)
                }
            }
        })
        .await;
        let holds_nothing = |way: &Way| matches!(way, Way::Reads | Way::Done);
        let is_whole = holds_nothing(&there) && holds_nothing(&back);
        let in_good_order =
            end == End::Closed || (end == End::Idle && idle_end == IdleEnd::Close && is_whole);
        if !in_good_order {
            reset_on_close(client);
            reset_on_close(endpoint);
        }
        end
    }
}

/// Sees when nothing is moved. The clock is looked at a few times per timeout, and not once per
/// message.
#[derive(Debug)]
struct Silence {
    /// The time between two looks; none when silence is no matter.
    look: Option<Duration>,
    /// What was moved at the last look, and how many looks in a row saw that.
    seen: (u64, u32),
}

impl Silence {
    fn new(timeout: Option<Duration>) -> Self {
        Self { look: timeout.map(|timeout| timeout / LOOKS), seen: (0, 0) }
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
        mut sleep: Pin<&mut Sleep>,
        total: u64,
    ) -> Poll<()> {
        let Some(look) = self.look else { return Poll::Pending };
        loop {
            ready!(sleep.as_mut().poll(context));
            self.seen = if self.seen.0 == total { (total, self.seen.1 + 1) } else { (total, 0) };
            if self.seen.1 == LOOKS {
                return Poll::Ready(());
            }
            // From now, so that a process that stood still does not make up for looks it missed.
            sleep.as_mut().reset((now() + look).into());
        }
    }
}

/// What one direction works with.
struct Direction<'a, 'b> {
    from: &'a mut ReadHalf<'b>,
    to: &'a TcpStream,
    lender: &'a Lender,
    moved: &'a Cell<u64>,
    /// Whether the other one is done, so that both sides are closed when this one is.
    is_last: bool,
}

/// Where one direction stands.
#[derive(Debug)]
enum Way {
    /// It waits for bytes.
    Reads,
    /// It has bytes that the sink has not taken yet.
    Writes(Rest),
    /// It moves pages through a pipe, which holds so many bytes.
    Splices(Pipe, usize),
    /// The source has closed, and the sink's side was closed after it.
    Done,
}

/// Bytes that were read.
#[derive(Debug)]
struct Rest {
    bytes: Vec<u8>,
    /// How many of them are written.
    written: usize,
    /// Whether they are what is left of a full buffer.
    is_bulk: bool,
}

impl Way {
    /// Goes on as far as it can. Ready when the direction is done.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        direction: &mut Direction<'_, '_>,
    ) -> Poll<io::Result<()>> {
        let mut splices = 0;
        loop {
            *self = match self {
                Self::Reads => ready!(direction.copy_once(context))?,
                Self::Writes(rest) => {
                    ready!(rest.write(context, direction))?;
                    if rest.is_bulk { Self::after_bulk(direction.lender) } else { Self::Reads }
                }
                Self::Splices(pipe, held) => {
                    ready!(direction.splice_out(context, pipe, held))?;
                    if splices == SPLICES_AT_ONCE {
                        context.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    splices += 1;
                    match direction.splice_in(pipe) {
                        Ok(0) => self.pipe_back(direction.lender, direction.close()?),
                        Ok(bytes) => {
                            *held = bytes;
                            continue;
                        }
                        // It has nothing more at hand.
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            self.pipe_back(direction.lender, Self::Reads)
                        }
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
                Self::Done => return Poll::Ready(Ok(())),
            };
        }
    }

    /// A full read means that more is coming. Without descriptors for a pipe, it goes on through the
    /// scratch buffer.
    fn after_bulk(lender: &Lender) -> Self {
        lender.pipe().map_or(Self::Reads, |pipe| Self::Splices(pipe, 0))
    }

    /// Gives the pipe back, and goes on to `next`.
    fn pipe_back(&mut self, lender: &Lender, next: Self) -> Self {
        if let Self::Splices(pipe, _) = std::mem::replace(self, Self::Done) {
            lender.give_back(pipe);
        }
        next
    }
}

impl Direction<'_, '_> {
    /// Closes the sink's side.
    fn close(&self) -> io::Result<Way> {
        if self.is_last {
            // The caller closes both sockets now, which says the same.
            return Ok(Way::Done);
        }
        match socket2::SockRef::from(self.to).shutdown(Shutdown::Write) {
            // It may have reset the connection since; its own direction will tell.
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
            _ => Ok(Way::Done),
        }
    }

    /// Waits for bytes, reads once and writes once.
    ///
    /// A read that does not fill the buffer has taken all there was, which `poll_read` remembers: the
    /// next one waits without asking the system in vain.
    fn copy_once(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Way>> {
        // Lent for this moment only: a connection that waits holds no buffer.
        let mut scratch = self.lender.0.scratch.borrow_mut();
        let mut buffer = ReadBuf::new(&mut scratch);
        ready!(Pin::new(&mut *self.from).poll_read(context, &mut buffer))?;
        let read = buffer.filled();
        if read.is_empty() {
            return Poll::Ready(self.close());
        }
        let is_bulk = read.len() == SCRATCH_BYTES;
        let written = match self.to.try_write(read) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Poll::Ready(Err(error)),
        };
        self.count(written);
        let rest = read.get(written..).unwrap_or_default();
        Poll::Ready(Ok(match rest {
            [] if is_bulk => Way::after_bulk(self.lender),
            [] => Way::Reads,
            rest => Way::Writes(Rest { bytes: rest.to_vec(), written: 0, is_bulk }),
        }))
    }

    fn count(&self, bytes: usize) {
        self.moved.set(self.moved.get() + bytes as u64);
    }

    /// Takes in what the source has at hand; 0 at its end.
    fn splice_in(&self, pipe: &Pipe) -> io::Result<usize> {
        let from: &TcpStream = self.from.as_ref();
        from.try_io(Interest::READABLE, || {
            splice(from, None, &pipe.write, None, SPLICE_BYTES, splice_flags()).map_err(Into::into)
        })
    }

    /// Gives out what the pipe holds.
    fn splice_out(
        &self,
        context: &mut Context<'_>,
        pipe: &Pipe,
        held: &mut usize,
    ) -> Poll<io::Result<()>> {
        while *held > 0 {
            let given = self.to.try_io(Interest::WRITABLE, || {
                splice(&pipe.read, None, self.to, None, *held, splice_flags()).map_err(Into::into)
            });
            match given {
                Ok(given) => {
                    *held = held.saturating_sub(given);
                    self.count(given);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.to.poll_write_ready(context))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Rest {
    fn write(
        &mut self,
        context: &mut Context<'_>,
        direction: &Direction<'_, '_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let left = self.bytes.get(self.written..).unwrap_or_default();
            if left.is_empty() {
                return Poll::Ready(Ok(()));
            }
            match direction.to.try_write(left) {
                Ok(written) => {
                    self.written += written;
                    direction.count(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(direction.to.poll_write_ready(context))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

fn splice_flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE
}
