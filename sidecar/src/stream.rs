//! A connection's bytes, plain or TLS, and its two halves on one thread.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use rustls::CommonState;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use crate::connection_registry::{ConnectionStatus, RegisteredConnection};
use crate::tls::stream::TlsStream;

/// How often the end of a connection is looked for behind bytes that nobody reads.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A connection.
#[derive(Debug)]
pub(crate) enum TransportStream {
    Plain(TcpStream),
    Tls(RegisteredTlsStream),
}

/// A connection under TLS, which ends when its peer is not who it was any more.
#[derive(Debug)]
pub(crate) struct RegisteredTlsStream {
    /// None where the peer proved nothing. Gone before the socket is.
    registered: Option<RegisteredConnection>,
    tls: Box<TlsStream>,
}

impl RegisteredTlsStream {
    /// A connection whose handshake is done.
    pub(crate) fn new(tls: Box<TlsStream>, registered: Option<RegisteredConnection>) -> Self {
        Self { registered, tls }
    }

    fn status(&self) -> Option<&Rc<ConnectionStatus>> {
        self.registered.as_ref().map(|registered| &registered.status)
    }

    /// The connection to read from: nothing is taken from a peer that has fallen, not even what it sent
    /// before.
    fn reading(&mut self) -> io::Result<Pin<&mut TlsStream>> {
        match self.status() {
            Some(status) if status.is_closed() => Err(self.fallen()),
            _ => Ok(Pin::new(&mut self.tls)),
        }
    }

    /// The connection to write to.
    fn writing(&mut self) -> io::Result<Pin<&mut TlsStream>> {
        match self.status() {
            Some(status) if status.is_write_closed() => Err(self.fallen()),
            _ => Ok(Pin::new(&mut self.tls)),
        }
    }

    fn fallen(&self) -> io::Error {
        if self.status().is_some_and(|status| status.is_write_closed()) {
            weft_runtime::socket::reset_on_close(self.tls.tcp());
        }
        io::Error::new(io::ErrorKind::ConnectionAborted, "its peer is trusted no more")
    }
}

impl TransportStream {
    /// The socket below.
    pub(crate) fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(secured) => secured.tls.tcp(),
        }
    }

    /// Whether bytes wait that were taken from the socket already.
    fn has_read_ahead(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(secured) => secured.tls.has_read_ahead(),
        }
    }

    /// The certificates that the peer showed, its own first.
    pub(crate) fn certificates(&self) -> &[CertificateDer<'static>] {
        match self {
            Self::Plain(_) => &[],
            Self::Tls(secured) => secured.tls.session().peer_certificates().unwrap_or_default(),
        }
    }

    /// What both sides agreed on; none without TLS.
    pub(crate) fn session(&self) -> Option<&CommonState> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(secured) => Some(secured.tls.session()),
        }
    }

    /// How it stands with the connection; none where its peer proved nothing.
    pub(crate) fn status(&self) -> Option<&Rc<ConnectionStatus>> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(secured) => secured.status(),
        }
    }
}

impl AsyncRead for TransportStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Self::Tls(io) => io.reading()?.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for TransportStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Self::Tls(io) => io.writing()?.poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io) => io.writing()?.poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io) => io.writing()?.poll_shutdown(cx),
        }
    }
}

/// One of two halves of a connection. Both live on one thread, so a cell does what elsewhere takes
/// a lock.
#[derive(Debug, Clone)]
pub(crate) struct StreamHalf(Rc<RefCell<TransportStream>>);

impl StreamHalf {
    /// Both halves of a connection: each may read and write, and by custom one does each.
    pub(crate) fn pair(stream: TransportStream) -> (Self, Self) {
        let shared = Rc::new(RefCell::new(stream));
        (Self(shared.clone()), Self(shared))
    }

    /// Resolves when the peer has closed its side, while nobody reads. A peer that closes its side
    /// before it has its answer is taken for gone: nearly all that do are, and the few that are not
    /// cannot be told from them.
    pub(crate) async fn gone(&self) {
        loop {
            std::future::poll_fn(|cx| self.0.borrow().tcp().poll_read_ready(cx).map(drop)).await;
            if self.is_closed_by_peer() {
                return;
            }
            // Bytes wait that nobody reads for now, so the socket has no news to wake us with.
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Whether the peer has sent something, or closed, that was not read. Asks the event loop only, not
    /// the kernel.
    pub(crate) fn has_events(&self) -> bool {
        let stream = self.0.borrow();
        stream.has_read_ahead() || stream.tcp().try_io(Interest::READABLE, || Ok(())).is_ok()
    }

    /// Resolves when there may be something to read, without room to read it into.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        std::future::poll_fn(|cx| {
            let stream = self.0.borrow();
            if stream.has_read_ahead() {
                Poll::Ready(Ok(()))
            } else {
                stream.tcp().poll_read_ready(cx)
            }
        })
        .await
    }

    /// Whether no request may be begun over it any more.
    pub(crate) fn is_draining(&self) -> bool {
        self.0.borrow().status().is_some_and(|status| status.is_draining())
    }

    /// Lets the connection end by a reset where it has ended already by what its peer is. Without, the
    /// peer's system would have to be awaited.
    pub(crate) fn reset_if_closed(&self) {
        if self.0.borrow().status().is_some_and(|status| status.is_closed()) {
            self.reset();
        }
    }

    /// Lets the connection end by a reset.
    pub(crate) fn reset(&self) {
        weft_runtime::socket::reset_on_close(self.0.borrow().tcp());
    }

    fn is_closed_by_peer(&self) -> bool {
        // To wait for priority is to wait for urgent data or the end, whatever else waits unread.
        let stream = self.0.borrow();
        let ready = stream.tcp().ready(Interest::PRIORITY).now_or_never();
        ready.is_some_and(|ready| ready.is_ok_and(|ready| ready.is_read_closed()))
    }
}

impl AsyncRead for StreamHalf {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buf)
    }
}

impl AsyncWrite for StreamHalf {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_shutdown(cx)
    }
}
