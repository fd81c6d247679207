//! Moves a TCP connection: both ways at once, each end's close and reset passed on.
//!
//! A small message is copied through the worker's scratch buffer; as soon as a read fills it, the
//! direction goes over to splice, where the kernel moves pages through a pipe and we copy nothing.
//! A connection that waits owns neither buffer nor pipe; what it does own is small, and written as
//! states ([`DirectionState`]) rather than as nested futures, each of which would keep room of its own.

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

use crate::clock::now;

/// What a read through the scratch buffer takes at most; a read that fills it means bulk.
const SCRATCH_BYTES: usize = 16 * 1024;
/// What one splice asks for: the default size of a pipe.
const SPLICE_BYTES: usize = 64 * 1024;
/// How many splices one connection does before others have their turn.
const SPLICES_PER_POLL: usize = 16;
/// In how many looks a timeout is divided: silence is seen so much of it late, at most.
const IDLE_CHECKS: u32 = 8;
/// How many idle pipes a worker keeps.
const PIPE_LIMIT: usize = 64;

/// What a worker lends to the connection that is being served.
#[derive(Debug, Clone)]
pub(crate) struct RelayBuffers(Rc<RelayBuffersInner>);

#[derive(Debug)]
struct RelayBuffersInner {
    scratch: RefCell<Box<[u8]>>,
    pipes: RefCell<Vec<Pipe>>,
}

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl RelayBuffers {
    pub(crate) fn new() -> Self {
        let scratch = RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice());
        Self(Rc::new(RelayBuffersInner { scratch, pipes: RefCell::default() }))
    }

    fn pipe(&self) -> io::Result<Pipe> {
        if let Some(pipe) = self.0.pipes.borrow_mut().pop() {
            return Ok(pipe);
        }
        let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        Ok(Pipe { read, write })
    }

    /// Takes back a pipe that is empty.
    fn return_pipe(&self, pipe: Pipe) {
        let mut pipes = self.0.pipes.borrow_mut();
        if pipes.len() < PIPE_LIMIT {
            pipes.push(pipe);
        }
    }
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RelayOutcome {
    /// Both sides closed.
    Closed,
    /// A side reset it, and the other was told so.
    Reset,
    /// It was silent for too long.
    Idle,
    /// The process ends and could not wait for it.
    Aborted,
}

impl RelayOutcome {
    /// The word in logs.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Reset => "reset",
            Self::Idle => "idle",
            Self::Aborted => "cut_off",
        }
    }
}

/// What was moved.
#[derive(Debug, Default)]
pub(crate) struct RelayedBytes {
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
    mut abort: Pin<&'a mut Notified<'_>>,
    buffers: &'a RelayBuffers,
    relayed: &'a RelayedBytes,
) -> impl Future<Output = RelayOutcome> {
    async move {
        let mut endward = DirectionState::Reading;
        let mut clientward = DirectionState::Reading;
        let mut idle_timer = IdleTimer::new(idle_timeout);
        let mut sleep = pin!(tokio::time::sleep(idle_timer.check_interval.unwrap_or_default()));
        let end = poll_fn(|context| {
            if abort.as_mut().poll(context).is_ready() {
                return Poll::Ready(RelayOutcome::Aborted);
            }
            let (mut from_client, to_client) = client.split();
            let (mut from_endpoint, to_endpoint) = endpoint.split();
            let polled_endward = endward.poll(
                context,
                &mut Direction {
                    from: &mut from_client,
                    to: to_endpoint.as_ref(),
                    buffers,
                    relayed: &relayed.to_endpoint,
                    is_last: matches!(clientward, DirectionState::Done),
                },
            );
            let polled_clientward = clientward.poll(
                context,
                &mut Direction {
                    from: &mut from_endpoint,
                    to: to_client.as_ref(),
                    buffers,
                    relayed: &relayed.to_client,
                    is_last: matches!(endward, DirectionState::Done),
                },
            );
            match (polled_endward, polled_clientward) {
                (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) => {
                    Poll::Ready(RelayOutcome::Reset)
                }
                (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(RelayOutcome::Closed),
                (Poll::Pending, _) | (_, Poll::Pending) => {
                    let total = relayed.to_endpoint.get() + relayed.to_client.get();
                    idle_timer.poll(context, sleep.as_mut(), total).map(|()| RelayOutcome::Idle)
                }
            }
        })
        .await;
        let is_flushed =
            |way: &DirectionState| matches!(way, DirectionState::Reading | DirectionState::Done);
        let all_flushed = is_flushed(&endward) && is_flushed(&clientward);
        let closes_cleanly = end == RelayOutcome::Closed
            || (end == RelayOutcome::Idle && idle_end == IdleEnd::Close && all_flushed);
        if !closes_cleanly {
            reset_on_close(client);
            reset_on_close(endpoint);
        }
        end
    }
}

/// Sees when nothing is moved. The clock is looked at a few times per timeout, and not once per
/// message.
#[derive(Debug)]
struct IdleTimer {
    /// The time between two looks; none when silence is no matter.
    check_interval: Option<Duration>,
    /// What was moved at the last look, and how many looks in a row saw that.
    unchanged: (u64, u32),
}

impl IdleTimer {
    fn new(timeout: Option<Duration>) -> Self {
        Self { check_interval: timeout.map(|timeout| timeout / IDLE_CHECKS), unchanged: (0, 0) }
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
        mut sleep: Pin<&mut Sleep>,
        total: u64,
    ) -> Poll<()> {
        let Some(check_interval) = self.check_interval else { return Poll::Pending };
        loop {
            ready!(sleep.as_mut().poll(context));
            self.unchanged =
                if self.unchanged.0 == total { (total, self.unchanged.1 + 1) } else { (total, 0) };
            if self.unchanged.1 == IDLE_CHECKS {
                return Poll::Ready(());
            }
            // From now, so that a process that stood still does not make up for looks it missed.
            sleep.as_mut().reset((now() + check_interval).into());
        }
    }
}

/// What one direction works with.
struct Direction<'a, 'b> {
    from: &'a mut ReadHalf<'b>,
    to: &'a TcpStream,
    buffers: &'a RelayBuffers,
    relayed: &'a Cell<u64>,
    /// Whether the other one is done, so that both sides are closed when this one is.
    is_last: bool,
}

/// Where one direction stands.
#[derive(Debug)]
enum DirectionState {
    /// It waits for bytes.
    Reading,
    /// It has bytes that the sink has not taken yet.
    Writing(PendingWrite),
    /// It moves pages through a pipe, which holds so many bytes.
    Splicing(Pipe, usize),
    /// The source has closed, and the sink's side was closed after it.
    Done,
}

/// Bytes that were read.
#[derive(Debug)]
struct PendingWrite {
    bytes: Vec<u8>,
    /// How many of them are written.
    written: usize,
    /// Whether they are what is left of a full buffer.
    is_bulk: bool,
}

impl DirectionState {
    /// Goes on as far as it can. Ready when the direction is done.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        direction: &mut Direction<'_, '_>,
    ) -> Poll<io::Result<()>> {
        let mut splices = 0;
        loop {
            *self = match self {
                Self::Reading => ready!(direction.copy_once(context))?,
                Self::Writing(rest) => {
                    ready!(rest.write(context, direction))?;
                    if rest.is_bulk { Self::after_bulk(direction.buffers) } else { Self::Reading }
                }
                Self::Splicing(pipe, held) => {
                    ready!(direction.splice_out(context, pipe, held))?;
                    if splices == SPLICES_PER_POLL {
                        context.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    splices += 1;
                    match direction.splice_in(pipe) {
                        Ok(0) => self.return_pipe(direction.buffers, direction.close()?),
                        Ok(bytes) => {
                            *held = bytes;
                            continue;
                        }
                        // It has nothing more at hand.
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            self.return_pipe(direction.buffers, Self::Reading)
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
    fn after_bulk(buffers: &RelayBuffers) -> Self {
        buffers.pipe().map_or(Self::Reading, |pipe| Self::Splicing(pipe, 0))
    }

    /// Gives the pipe back, and goes on to `next`.
    fn return_pipe(&mut self, buffers: &RelayBuffers, next: Self) -> Self {
        if let Self::Splicing(pipe, _) = std::mem::replace(self, Self::Done) {
            buffers.return_pipe(pipe);
        }
        next
    }
}

impl Direction<'_, '_> {
    /// Closes the sink's side.
    fn close(&self) -> io::Result<DirectionState> {
        if self.is_last {
            // The caller closes both sockets now, which says the same.
            return Ok(DirectionState::Done);
        }
        match socket2::SockRef::from(self.to).shutdown(Shutdown::Write) {
            // It may have reset the connection since; its own direction will tell.
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
            _ => Ok(DirectionState::Done),
        }
    }

    /// Waits for bytes, reads once and writes once.
    ///
    /// A read that does not fill the buffer has taken all there was, which `poll_read` remembers: the
    /// next one waits without asking the system in vain.
    fn copy_once(&mut self, context: &mut Context<'_>) -> Poll<io::Result<DirectionState>> {
        // Lent for this moment only: a connection that waits holds no buffer.
        let mut scratch = self.buffers.0.scratch.borrow_mut();
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
            [] if is_bulk => DirectionState::after_bulk(self.buffers),
            [] => DirectionState::Reading,
            rest => {
                DirectionState::Writing(PendingWrite { bytes: rest.to_vec(), written: 0, is_bulk })
            }
        }))
    }

    fn count(&self, bytes: usize) {
        self.relayed.set(self.relayed.get() + bytes as u64);
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

impl PendingWrite {
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
