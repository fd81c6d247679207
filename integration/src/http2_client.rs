//! An HTTP/2 client based on the crate `h2`, for many concurrent streams with flow control.

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

/// The status of a response and the number of bytes of its body, or the error.
pub type BodyResult = Result<(u16, usize), String>;

fn describe(error: &h2::Error) -> String {
    error.to_string()
}

impl Http2Client {
    /// Connects to a port of loopback. The window of each stream is `window` bytes, that of the
    /// connection 16 MiB.
    ///
    /// # Panics
    /// If the port refuses connections or does not speak HTTP/2.
    pub async fn connect(port: u16, window: u32) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .expect("the port accepts connections");
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(window)
            .initial_connection_window_size(16 << 20)
            .max_local_error_reset_streams(None)
            .data_frame_budget(usize::MAX);
        let (sender, connection) =
            builder.handshake(stream).await.expect("the server speaks HTTP/2");
        tokio::spawn(connection);
        Self(sender)
    }

    /// Sends the head of a request; `ended` says that it has no body.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn begin(
        &self,
        method: Method,
        path: &str,
        ended: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), String> {
        let mut sender = self.0.clone().ready().await.map_err(|error| describe(&error))?;
        let uri = format!("http://a{path}");
        let request =
            Request::builder().method(method).uri(uri).body(()).expect("the URI is valid");
        sender.send_request(request, ended).map_err(|error| describe(&error))
    }

    /// Sends a GET and reads the response.
    ///
    /// # Errors
    /// If the response is not complete.
    pub async fn get(&self, path: &str) -> BodyResult {
        let (response, _) = self.begin(Method::GET, path, true).await?;
        whole(response).await
    }

    /// Sends a POST with a body of this many bytes, unless the server resets the stream, and reads
    /// the response.
    ///
    /// # Errors
    /// If the response is not complete.
    pub async fn post(&self, path: &str, bytes: usize) -> BodyResult {
        let (response, mut stream) = self.begin(Method::POST, path, false).await?;
        send(&mut stream, bytes).await;
        whole(response).await
    }
}

/// Sends this many bytes and the end of the stream; stops when the stream is reset.
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
    // Sending the end fails on a stream that was reset.
    drop(stream.send_data(Bytes::new(), true));
}

/// Reads a response to its end.
///
/// # Errors
/// If the response is not complete.
pub async fn whole(response: ResponseFuture) -> BodyResult {
    let response = response.await.map_err(|error| describe(&error))?;
    let status = response.status().as_u16();
    let mut body = response.into_body();
    let mut bytes = 0;
    while let Some(piece) = next(&mut body).await {
        bytes += piece.map_err(|why| format!("{status}, {bytes} bytes: {why}"))?;
    }
    Ok((status, bytes))
}

/// Reads the next chunk of a body and returns its size; `None` at the end.
pub async fn next(body: &mut RecvStream) -> Option<Result<usize, String>> {
    let piece = body.data().await?;
    Some(piece.map_err(|error| describe(&error)).map(|piece| {
        // This fails only on a stream that has ended.
        drop(body.flow_control().release_capacity(piece.len()));
        piece.len()
    }))
}
