//! Accepted connections, and the clients at their other end.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use weft_model::SpiffeId;

/// The number of connections so far.
static CONNECTIONS: AtomicU64 = AtomicU64::new(0);

/// The client of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// The SPIFFE ID, verified by mutual TLS; none without a certificate.
    pub id: Option<SpiffeId>,
    /// The unique number of the connection.
    pub(super) connection: u64,
}

/// An accepted connection, after the TLS handshake.
#[derive(Debug)]
pub struct IncomingConnection<T> {
    /// The byte stream.
    pub io: T,
    /// The verified SPIFFE ID of the client.
    pub peer: Option<SpiffeId>,
    /// The permit that limits the number of connections, released on drop.
    pub permit: Option<OwnedSemaphorePermit>,
}

impl<T> tonic::transport::server::Connected for IncomingConnection<T> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer { id: self.peer.clone(), connection: CONNECTIONS.fetch_add(1, Relaxed) }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for IncomingConnection<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for IncomingConnection<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
