//! Opens the connections of gRPC channels. The caller provides the connections, because it holds the certificates.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::HeaderMap;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint, Uri};

/// A connection, plain or TLS.
pub trait DialedConnection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> DialedConnection for T {}

/// The future of a dialed connection.
pub type DialFuture = Pin<Box<dyn Future<Output = io::Result<Box<dyn DialedConnection>>> + Send>>;

/// Opens connections to a server. With TLS, the handshake is complete when the future resolves.
#[derive(Clone)]
pub struct Dialer {
    open: Arc<dyn Fn() -> DialFuture + Send + Sync>,
    metadata: HeaderMap,
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Dialer")
    }
}

/// The HTTP/2 flow-control window of the connection and of each stream, in bytes. The `h2` crate counts tiny frames
/// against half of it.
const WINDOW_BYTES: u32 = 4 * 1024 * 1024;

impl Dialer {
    /// A dialer that calls `open` for each connection.
    pub fn new(open: impl Fn() -> DialFuture + Send + Sync + 'static) -> Self {
        Self { open: Arc::new(open), metadata: HeaderMap::new() }
    }

    /// Adds gRPC metadata to each stream.
    #[must_use]
    pub fn with_metadata(self, metadata: HeaderMap) -> Self {
        Self { metadata, ..self }
    }

    /// A gRPC request with the metadata.
    pub(crate) fn request<T>(&self, messages: T) -> tonic::Request<T> {
        let metadata = MetadataMap::from_headers(self.metadata.clone());
        tonic::Request::from_parts(metadata, tonic::Extensions::default(), messages)
    }

    /// Opens one connection.
    #[must_use]
    pub fn open(&self) -> DialFuture {
        (self.open)()
    }

    /// A channel that dials on first use and after the connection is lost. HTTP/2 PINGs detect a server that stops
    /// answering.
    pub(crate) fn channel(&self) -> Channel {
        Endpoint::from_static("http://control.weft")
            .initial_connection_window_size(WINDOW_BYTES)
            .initial_stream_window_size(WINDOW_BYTES)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .connect_timeout(Duration::from_secs(10))
            .connect_with_connector_lazy(self.clone())
    }
}

impl tower_service::Service<Uri> for Dialer {
    type Response = TokioIo<Box<dyn DialedConnection>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let opening = self.open();
        Box::pin(async move { opening.await.map(TokioIo::new) })
    }
}
