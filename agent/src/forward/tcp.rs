//! Relays a TCP connection in both directions, and forwards the close and reset of each side.
//!
//! A small message is copied through the worker's scratch buffer. As soon as a read fills the buffer, the
//! direction switches to splice, where the kernel moves pages through a pipe without a copy. An idle
//! connection owns neither buffer nor pipe. The rest of its state is small, and written as an enum
//! ([`DirectionState`]) instead of nested futures, which would each add to the size.

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
use tokio::time::Sleep;
use weft_model::IdleEnd;
use weft_runtime::connections::ConnectionStatus;
use weft_runtime::socket::reset_on_close;

use weft_runtime::clock::now;

/// The size of the scratch buffer. A read that fills it indicates a bulk transfer.
const SCRATCH_BYTES: usize = 16 * 1024;
/// The most bytes of one splice: the default size of a pipe.
const SPLICE_BYTES: usize = 64 * 1024;
/// The most splices of one connection before other tasks run.
const SPLICES_PER_POLL: usize = 16;
/// The checks per idle timeout: a timeout is detected late by one check at most.
const IDLE_CHECKS: u32 = 8;
/// The most idle pipes of a worker.
const PIPE_LIMIT: usize = 64;

/// Buffers and pipes of a worker, which a connection borrows while it is polled.
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

    /// Takes back an empty pipe.
    fn return_pipe(&self, pipe: Pipe) {
        let mut pipes = self.0.pipes.borrow_mut();
        if pipes.len() < PIPE_LIMIT {
            pipes.push(pipe);
        }
    }
}

/// How a relayed connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RelayOutcome {
    /// Both sides closed.
    Closed,
    /// One side reset the connection, and the other side was reset too.
    Reset,
    /// The idle timeout passed.
    Idle,
    /// The drain timeout passed.
    Aborted,
}

/// The relayed bytes in each direction.
#[derive(Debug, Default)]
pub(crate) struct RelayedBytes {
    pub(crate) to_endpoint: Cell<u64>,
    pub(crate) to_client: Cell<u64>,
}

/// The two sides of a relayed connection.
pub(crate) struct RelaySides<'a> {
    pub(crate) client: &'a mut TcpStream,
    pub(crate) endpoint: &'a mut TcpStream,
}

/// What happens to a connection without traffic.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IdlePolicy {
    /// How long the connection may be idle; `None` means forever.
    pub(crate) timeout: Option<Duration>,
    /// How it then ends.
    pub(crate) end: IdleEnd,
}

/// Relays bytes between `client` and `endpoint` until both have closed, the idle timeout passes, or the
/// connection is closed by its `status`. A connection that has not finished is reset on both sides, so that neither takes the received
/// part for the whole. An idle connection may be closed instead if no bytes are pending.
pub(crate) fn relay<'a>(
    sides: RelaySides<'a>,
    idle: IdlePolicy,
    status: &'a ConnectionStatus,
    buffers: &'a RelayBuffers,
    relayed: &'a RelayedBytes,
) -> impl Future<Output = RelayOutcome> {
    // Destructured here: the future would store a value that it destructures twice.
    let RelaySides { client, endpoint } = sides;
    async move {
        let mut outbound_state = DirectionState::Reading;
        let mut inbound_state = DirectionState::Reading;
        let mut idle_timer = IdleTimer::new(idle.timeout);
        let mut sleep = pin!(tokio::time::sleep(idle_timer.check_interval.unwrap_or_default()));
        let end = poll_fn(|context| {
            if status.poll_closed(context).is_ready() {
                return Poll::Ready(RelayOutcome::Aborted);
            }
            let (mut from_client, to_client) = client.split();
            let (mut from_endpoint, to_endpoint) = endpoint.split();
            let polled_outbound = outbound_state.poll(
                context,
                &mut Direction {
                    from: &mut from_client,
                    to: to_endpoint.as_ref(),
                    buffers,
                    relayed: &relayed.to_endpoint,
                    is_last: matches!(inbound_state, DirectionState::Done),
                },
            );
            let polled_inbound = inbound_state.poll(
                context,
                &mut Direction {
                    from: &mut from_endpoint,
                    to: to_client.as_ref(),
                    buffers,
                    relayed: &relayed.to_client,
                    is_last: matches!(outbound_state, DirectionState::Done),
                },
            );
            match (polled_outbound, polled_inbound) {
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
        let is_flushed = |state: &DirectionState| {
            matches!(state, DirectionState::Reading | DirectionState::Done)
        };
        let all_flushed = is_flushed(&outbound_state) && is_flushed(&inbound_state);
        let closes_cleanly = end == RelayOutcome::Closed
            || (end == RelayOutcome::Idle && idle.end == IdleEnd::Close && all_flushed);
        if !closes_cleanly {
            reset_on_close(client);
            reset_on_close(endpoint);
        }
        end
    }
}

/// Detects idle connections. It checks a few times per timeout instead of reading the clock for each message.
#[derive(Debug)]
struct IdleTimer {
    /// The time between two checks; `None` without an idle timeout.
    check_interval: Option<Duration>,
    /// The relayed bytes at the last check, and how many checks in a row saw that number.
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
            // Counted from now, so that a process that was stopped does not catch up on missed checks.
            sleep.as_mut().reset((now() + check_interval).into());
        }
    }
}

/// One direction of a relayed connection while it is polled.
struct Direction<'a, 'b> {
    from: &'a mut ReadHalf<'b>,
    to: &'a TcpStream,
    buffers: &'a RelayBuffers,
    relayed: &'a Cell<u64>,
    /// Whether the other direction is done, so both sides close when this direction is done.
    is_last: bool,
}

/// The state of one direction.
#[derive(Debug)]
enum DirectionState {
    /// Waiting for bytes of the source.
    Reading,
    /// Holding bytes that the sink has not accepted yet.
    Writing(PendingWrite),
    /// Moving pages through a pipe, which holds this many bytes.
    Splicing(Pipe, usize),
    /// The source has closed, and the sink was shut down for writing.
    Done,
}

/// Bytes that were read and not yet written.
#[derive(Debug)]
struct PendingWrite {
    bytes: Vec<u8>,
    /// The number of bytes already written.
    written: usize,
    /// Whether they come from a full scratch buffer.
    is_bulk: bool,
}

impl DirectionState {
    /// Makes as much progress as possible. Ready when the direction is done.
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
                        // The source has no more bytes now.
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

    /// Switches to splice after a full read, or continues with the scratch buffer when no pipe can be opened.
    fn after_bulk(buffers: &RelayBuffers) -> Self {
        buffers.pipe().map_or(Self::Reading, |pipe| Self::Splicing(pipe, 0))
    }

    /// Returns the pipe to the worker, and continues with `next`.
    fn return_pipe(&mut self, buffers: &RelayBuffers, next: Self) -> Self {
        if let Self::Splicing(pipe, _) = std::mem::replace(self, Self::Done) {
            buffers.return_pipe(pipe);
        }
        next
    }
}

impl Direction<'_, '_> {
    /// Shuts down the sink for writing.
    fn close(&self) -> io::Result<DirectionState> {
        if self.is_last {
            // The caller closes both sockets now, which has the same effect.
            return Ok(DirectionState::Done);
        }
        match socket2::SockRef::from(self.to).shutdown(Shutdown::Write) {
            // The sink may have reset the connection; the other direction reports that.
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
            _ => Ok(DirectionState::Done),
        }
    }

    /// Waits for bytes, reads once and writes once.
    ///
    /// A read that does not fill the buffer has drained the socket. `poll_read` remembers that, so the next
    /// read waits without a system call.
    fn copy_once(&mut self, context: &mut Context<'_>) -> Poll<io::Result<DirectionState>> {
        // Borrowed for this call only: an idle connection holds no buffer.
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

    /// Moves available bytes from the source into the pipe; 0 at the end of the stream.
    fn splice_in(&self, pipe: &Pipe) -> io::Result<usize> {
        let from: &TcpStream = self.from.as_ref();
        from.try_io(Interest::READABLE, || {
            splice(from, None, &pipe.write, None, SPLICE_BYTES, splice_flags()).map_err(Into::into)
        })
    }

    /// Moves the contents of the pipe to the sink.
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
