//! A connection's byte stream, plaintext or TLS, and its two halves on one thread.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use rustls::{CommonState, ProtocolVersion};
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use weft_runtime::connections::{CloseReason, ConnectionStatus};

use crate::certificate_index::IndexedConnection;
use crate::tls::stream::TlsStream;

/// The interval at which the end of a stream is checked for while unread bytes are waiting.
const CLOSE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A connection's byte stream.
#[derive(Debug)]
pub(crate) enum TransportStream {
    Plain(TcpStream),
    Tls(RegisteredTlsStream),
}

/// A TLS stream that fails once the [`ConnectionStatus`] of its connection is closed.
#[derive(Debug)]
pub(crate) struct RegisteredTlsStream {
    /// None where the peer proved nothing.
    registered: Option<IndexedConnection>,
    tls: Box<TlsStream>,
}

impl RegisteredTlsStream {
    /// A stream with a completed handshake.
    pub(crate) fn new(tls: Box<TlsStream>, registered: Option<IndexedConnection>) -> Self {
        Self { registered, tls }
    }

    fn status(&self) -> Option<&Rc<ConnectionStatus>> {
        self.registered.as_ref().map(|registered| &registered.status)
    }

    /// The stream to read from. Fails once the connection is closed by its status, even for bytes received before.
    fn reading(&mut self, cx: &Context<'_>) -> io::Result<Pin<&mut TlsStream>> {
        if let Some(status) = self.status() {
            if let Some(reason) = status.close_reason() {
                return Err(self.closed_error(reason));
            }
            status.watch(cx);
        }
        Ok(Pin::new(&mut self.tls))
    }

    /// The stream to write to.
    fn writing(&mut self, cx: &Context<'_>) -> io::Result<Pin<&mut TlsStream>> {
        if let Some(status) = self.status() {
            if let Some(reason) = status.close_reason().filter(|_| status.is_write_closed()) {
                return Err(self.closed_error(reason));
            }
            status.watch(cx);
        }
        Ok(Pin::new(&mut self.tls))
    }

    fn closed_error(&self, reason: CloseReason) -> io::Error {
        if self.status().is_some_and(|status| status.is_write_closed()) {
            weft_runtime::socket::reset_on_close(self.tls.tcp());
        }
        io::Error::new(io::ErrorKind::ConnectionAborted, reason.to_string())
    }
}

impl TransportStream {
    /// The TCP socket.
    pub(crate) fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(secured) => secured.tls.tcp(),
        }
    }

    /// Whether bytes were read from the socket and not returned yet.
    fn has_read_ahead(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(secured) => secured.tls.has_read_ahead(),
        }
    }

    /// The certificates of the peer, leaf first.
    pub(crate) fn certificates(&self) -> &[CertificateDer<'static>] {
        match self {
            Self::Plain(_) => &[],
            Self::Tls(secured) => secured.tls.session().peer_certificates().unwrap_or_default(),
        }
    }

    /// The state of the TLS session; none without TLS.
    pub(crate) fn session(&self) -> Option<&CommonState> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(secured) => Some(secured.tls.session()),
        }
    }

    /// The TLS version, with Envoy's name; none without TLS.
    pub(crate) fn tls_version(&self) -> Option<&'static str> {
        let version = self.session()?.protocol_version();
        Some(match version {
            Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
            // The only other version that is ever negotiated.
            _ => "TLSv1.3",
        })
    }

    /// Whether the status has closed the connection. Otherwise the task of `cx` is woken when it does.
    fn is_closed_by_status(&self, cx: &Context<'_>) -> bool {
        self.status().is_some_and(|status| status.poll_closed(cx).is_ready())
    }

    /// Whether the connection may be used; none where the peer proved nothing.
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
            Self::Tls(io) => io.reading(cx)?.poll_read(cx, buf),
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
            Self::Tls(io) => io.writing(cx)?.poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io) => io.writing(cx)?.poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io) => io.writing(cx)?.poll_shutdown(cx),
        }
    }
}

/// One of the two halves of a connection. Both live on one thread, so they share a cell instead of a lock.
#[derive(Debug, Clone)]
pub(crate) struct StreamHalf(Rc<RefCell<TransportStream>>);

impl StreamHalf {
    /// Both halves of a connection. Each can read and write; by convention the first reads and the second writes.
    pub(crate) fn pair(stream: TransportStream) -> (Self, Self) {
        let shared = Rc::new(RefCell::new(stream));
        (Self(shared.clone()), Self(shared))
    }

    /// Resolves when the peer has closed its side or the connection is closed by its status, while nothing is read. A peer
    /// that closes its side before it has its response counts as gone: nearly all such peers are, and the others cannot be
    /// distinguished from them.
    pub(crate) async fn closed(&self) {
        loop {
            std::future::poll_fn(|cx| {
                let stream = self.0.borrow();
                if stream.is_closed_by_status(cx) {
                    return Poll::Ready(());
                }
                stream.tcp().poll_read_ready(cx).map(drop)
            })
            .await;
            if self.is_closed() {
                return;
            }
            // Unread bytes are waiting, so the socket reports no event for the end of the stream.
            tokio::time::sleep(CLOSE_CHECK_INTERVAL).await;
        }
    }

    /// Whether the peer has sent bytes that were not read, or has closed its side. Asks the event loop, not the kernel.
    pub(crate) fn has_events(&self) -> bool {
        let stream = self.0.borrow();
        stream.has_read_ahead() || stream.tcp().try_io(Interest::READABLE, || Ok(())).is_ok()
    }

    /// Resolves when the stream may be readable, without a buffer.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        std::future::poll_fn(|cx| {
            let stream = self.0.borrow();
            if stream.has_read_ahead() || stream.is_closed_by_status(cx) {
                Poll::Ready(Ok(()))
            } else {
                stream.tcp().poll_read_ready(cx)
            }
        })
        .await
    }

    /// Whether no request may begin on the connection.
    pub(crate) fn is_draining(&self) -> bool {
        self.0.borrow().status().is_some_and(|status| status.is_draining())
    }

    /// Resets the connection when it is dropped, if its status closed it. Otherwise the close would wait for the peer's
    /// kernel.
    pub(crate) fn reset_if_closed(&self) {
        if self.0.borrow().status().is_some_and(|status| status.is_closed()) {
            self.reset();
        }
    }

    /// Resets the connection when it is dropped.
    pub(crate) fn reset(&self) {
        weft_runtime::socket::reset_on_close(self.0.borrow().tcp());
    }

    fn is_closed(&self) -> bool {
        let stream = self.0.borrow();
        if stream.status().is_some_and(|status| status.is_closed()) {
            return true;
        }
        // Readiness for priority data reports urgent data or the end of the stream, whatever else is unread.
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
