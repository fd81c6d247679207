//! HTTP/2 by the crate `h2`, for many streams at once with flow control.

use std::future::poll_fn;
use std::net::Ipv4Addr;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{Method, Request};
use tokio::net::TcpStream;

/// A connection.
#[derive(Debug, Clone)]
pub struct Http2Client(SendRequest<Bytes>);

/// How a response ended: its status and the bytes of its body, or why there is none.
pub type BodyResult = Result<(u16, usize), String>;

fn told(error: &h2::Error) -> String {
    error.to_string()
}

impl Http2Client {
    /// Connects to a port of loopback. Each stream may have `window` bytes in flight, the connection 16 MiB.
    ///
    /// # Panics
    /// When there is no server of HTTP/2.
    pub async fn connect(port: u16, window: u32) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("it listens");
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(window)
            .initial_connection_window_size(16 << 20)
            .max_local_error_reset_streams(None)
            .data_frame_budget(usize::MAX);
        let (sender, connection) = builder.handshake(stream).await.expect("it greets");
        tokio::spawn(connection);
        Self(sender)
    }

    /// Begins a request.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn begin(
        &self,
        method: Method,
        path: &str,
        ended: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), String> {
        let mut sender = self.0.clone().ready().await.map_err(|error| told(&error))?;
        let uri = format!("http://a{path}");
        let request = Request::builder().method(method).uri(uri).body(()).expect("it is a URI");
        sender.send_request(request, ended).map_err(|error| told(&error))
    }

    /// Gets a path; what became of it.
    ///
    /// # Errors
    /// Why it did not come whole.
    pub async fn get(&self, path: &str) -> BodyResult {
        let (response, _) = self.begin(Method::GET, path, true).await?;
        whole(response).await
    }

    /// Sends a body of so many bytes, all of it unless the server resets the stream; what became of it.
    ///
    /// # Errors
    /// Why its answer did not come whole.
    pub async fn post(&self, path: &str, bytes: usize) -> BodyResult {
        let (response, mut stream) = self.begin(Method::POST, path, false).await?;
        send(&mut stream, bytes).await;
        whole(response).await
    }
}

/// Sends so many bytes and the end, as far as the stream is not reset.
pub async fn send(stream: &mut SendStream<Bytes>, bytes: usize) {
    const PIECE_BYTES: usize = 16 * 1024;
    let piece = Bytes::from(vec![b'x'; PIECE_BYTES]);
    let mut left = bytes;
    while left > 0 {
        stream.reserve_capacity(left.min(PIECE_BYTES));
        let Some(Ok(_)) = poll_fn(|cx| stream.poll_capacity(cx)).await else { return };
        let now = stream.capacity().min(left).min(PIECE_BYTES);
        if stream.send_data(piece.slice(..now), false).is_err() {
            return;
        }
        left -= now;
    }
    // A stream that was reset takes no end either.
    drop(stream.send_data(Bytes::new(), true));
}

/// Reads a response to its end.
///
/// # Errors
/// Why it did not come whole.
pub async fn whole(response: ResponseFuture) -> BodyResult {
    let response = response.await.map_err(|error| told(&error))?;
    let status = response.status().as_u16();
    let mut body = response.into_body();
    let mut bytes = 0;
    while let Some(piece) = next(&mut body).await {
        bytes += piece.map_err(|why| format!("{status}, {bytes} bytes: {why}"))?;
    }
    Ok((status, bytes))
}

/// Takes the next piece of a body; how many bytes it has.
pub async fn next(body: &mut RecvStream) -> Option<Result<usize, String>> {
    let piece = body.data().await?;
    Some(piece.map_err(|error| told(&error)).map(|piece| {
        // Only a stream that has ended refuses.
        drop(body.flow_control().release_capacity(piece.len()));
        piece.len()
    }))
}
