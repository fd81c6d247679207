//! Moves a TCP connection: both ways at once, each end's close and reset passed on.
//!
//! A small message is copied through the worker's scratch buffer; as soon as a read fills it, the
//! direction goes over to splice, where the kernel moves pages through a pipe and we copy nothing.
//! A connection that waits owns neither buffer nor pipe.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, ready};
use std::time::Duration;

use nix::fcntl::{OFlag, SpliceFFlags, splice};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;
use weft_runtime::socket::reset_on_close;

/// What a read through the scratch buffer takes at most; a read that fills it means bulk.
const SCRATCH_BYTES: usize = 16 * 1024;
/// What one splice asks for: the default size of a pipe.
const SPLICE_BYTES: usize = 64 * 1024;
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
}

impl End {
    /// The word in logs.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Reset => "reset",
            Self::Idle => "idle",
        }
    }
}

/// What was moved.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    pub(crate) to_endpoint: Cell<u64>,
    pub(crate) to_client: Cell<u64>,
}

/// Moves bytes between `client` and `endpoint` until both are done.
pub(crate) async fn relay(
    client: &mut TcpStream,
    endpoint: &mut TcpStream,
    idle_timeout: Option<Duration>,
    lender: &Lender,
    moved: &Moved,
) -> End {
    let (mut from_client, to_client) = client.split();
    let (mut from_endpoint, to_endpoint) = endpoint.split();
    let both = async {
        tokio::try_join!(
            one_way(&mut from_client, to_endpoint.as_ref(), lender, &moved.to_endpoint),
            one_way(&mut from_endpoint, to_client.as_ref(), lender, &moved.to_client),
        )
    };
    let end = tokio::select! {
        result = both => match result {
            Ok(_) => End::Closed,
            Err(_) => End::Reset,
        },
        () = silence(idle_timeout, moved) => End::Idle,
    };
    if end != End::Closed {
        reset_on_close(client);
        reset_on_close(endpoint);
    }
    end
}

/// Resolves when nothing was moved for `timeout`, give or take the same again: the clock is read
/// once per period and not once per message.
async fn silence(timeout: Option<Duration>, moved: &Moved) {
    let Some(timeout) = timeout else {
        return std::future::pending().await;
    };
    let mut seen = None;
    loop {
        let now = (moved.to_endpoint.get(), moved.to_client.get());
        if seen.replace(now) == Some(now) {
            return;
        }
        tokio::time::sleep(timeout).await;
    }
}

/// Moves one direction until its source closes, then closes the sink's side.
async fn one_way(
    from: &mut ReadHalf<'_>,
    to: &TcpStream,
    lender: &Lender,
    moved: &Cell<u64>,
) -> io::Result<()> {
    loop {
        match copy_once(from, to, lender).await? {
            Step::Nothing => {}
            Step::End => break,
            Step::Copied { bytes, rest } => {
                write_rest(to, &rest).await?;
                moved.set(moved.get() + bytes as u64);
                if bytes == SCRATCH_BYTES
                    && splice_on(from.as_ref(), to, lender, moved).await? == Step::End
                {
                    break;
                }
            }
        }
    }
    socket2::SockRef::from(to).shutdown(std::net::Shutdown::Write).or_else(ignore_not_connected)
}

/// The other side may have reset the connection since; its own direction will tell.
fn ignore_not_connected(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotConnected { Ok(()) } else { Err(error) }
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    End,
    Copied { bytes: usize, rest: Vec<u8> },
}

/// Waits for bytes, reads once and writes once. What the sink did not take is given back.
///
/// A read that does not fill the buffer has taken all there was, which `poll_read` remembers: the next
/// one waits without asking the system in vain.
async fn copy_once(from: &mut ReadHalf<'_>, to: &TcpStream, lender: &Lender) -> io::Result<Step> {
    poll_fn(|context| {
        // Lent for this moment only: a connection that waits holds no buffer.
        let mut scratch = lender.0.scratch.borrow_mut();
        let mut buffer = ReadBuf::new(&mut scratch);
        ready!(Pin::new(&mut *from).poll_read(context, &mut buffer))?;
        let read = buffer.filled();
        if read.is_empty() {
            return Poll::Ready(Ok(Step::End));
        }
        let written = match to.try_write(read) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Poll::Ready(Err(error)),
        };
        let rest = read.get(written..).unwrap_or_default().to_vec();
        Poll::Ready(Ok(Step::Copied { bytes: read.len(), rest }))
    })
    .await
}

async fn write_rest(to: &TcpStream, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        to.writable().await?;
        match to.try_write(rest) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Splices until the source has nothing more at hand.
async fn splice_on(
    from: &TcpStream,
    to: &TcpStream,
    lender: &Lender,
    moved: &Cell<u64>,
) -> io::Result<Step> {
    // Without descriptors for a pipe, bytes go on through the scratch buffer.
    let Ok(pipe) = lender.pipe() else { return Ok(Step::Nothing) };
    loop {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        let taken = from.try_io(Interest::READABLE, || {
            splice(from, None, &pipe.write, None, SPLICE_BYTES, flags).map_err(Into::into)
        });
        let bytes = match taken {
            Ok(0) => {
                lender.give_back(pipe);
                return Ok(Step::End);
            }
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                lender.give_back(pipe);
                return Ok(Step::Nothing);
            }
            Err(error) => return Err(error),
        };
        let mut left = bytes;
        while left > 0 {
            let given = to.try_io(Interest::WRITABLE, || {
                splice(&pipe.read, None, to, None, left, flags).map_err(Into::into)
            });
            match given {
                Ok(given) => left = left.saturating_sub(given),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                Err(error) => return Err(error),
            }
        }
        moved.set(moved.get() + bytes as u64);
    }
}
