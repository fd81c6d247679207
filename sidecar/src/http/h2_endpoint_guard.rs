//! Limits what an endpoint can make the h2 crate buffer on an HTTP/2 connection.
//!
//! Requests of many clients share such a connection. One client must not be able to close it, so the h2 crate's limits
//! on resets and small frames are disabled. This leaves one unlimited buffer: the replies (PING, SETTINGS
//! acknowledgements) to an endpoint that sends frames and does not read. The guard limits it by counting frames while
//! writing is blocked.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::h2_frames::FrameScanner;
use crate::tls::failure::TlsFailure;

/// How many frames an endpoint may send while it does not read. Well-behaved endpoints exhaust their flow-control
/// window earlier: 4 MiB in frames of 256 bytes.
const FRAME_LIMIT: u32 = 16_384;

/// A connection to an endpoint that fails when the endpoint sends without reading.
#[derive(Debug)]
pub(crate) struct Http2EndpointGuard<S> {
    stream: S,
    received: FrameScanner,
    /// How many frames were received since the endpoint stopped reading; none while it reads.
    since_blocked: Option<u32>,
    has_received: bool,
    alert: EndpointAlert,
}

/// The TLS alert with which an endpoint closed the connection before it sent any data: in TLS 1.3 an endpoint refuses
/// our certificate this way. Shared with the pool, because the h2 crate drops the cause of an I/O error.
pub(crate) type EndpointAlert = Rc<Cell<Option<TlsFailure>>>;

impl<S> Http2EndpointGuard<S> {
    pub(crate) fn new(stream: S, alert: EndpointAlert) -> Self {
        let received = FrameScanner::after_preface(0);
        Self { stream, received, since_blocked: None, has_received: false, alert }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Http2EndpointGuard<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        match &polled {
            Poll::Ready(Err(error)) if !this.has_received => {
                this.alert.set(TlsFailure::of_read(error));
            }
            _ => this.has_received |= buf.filled().len() > before,
        }
        let Self { received, since_blocked, .. } = this;
        let mut count = 0;
        received.scan(buf.filled().get(before..).unwrap_or_default(), |_, _| count += 1);
        if let Some(all) = since_blocked {
            *all = all.saturating_add(count);
            if *all > FRAME_LIMIT {
                let reason = "endpoint sends HTTP/2 frames without reading";
                return Poll::Ready(Err(io::Error::other(reason)));
            }
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Http2EndpointGuard<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.since_blocked = polled.is_pending().then(|| this.since_blocked.unwrap_or(0));
        polled
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    /// How many empty DATA frames are accepted from an endpoint that does not read the `written` bytes sent before.
    async fn frames_accepted(written: usize) -> usize {
        const ROOM: usize = 1024;
        let (endpoint, ours) = duplex(ROOM);
        let mut ours = Http2EndpointGuard::new(ours, EndpointAlert::default());
        let bytes = vec![0; written];
        let writing = ours.write_all(&bytes);
        drop(tokio::time::timeout(std::time::Duration::from_millis(1), writing).await);
        let (_unread, mut endpoint) = tokio::io::split(endpoint);
        let sending = tokio::spawn(async move {
            for _ in 0..2 * FRAME_LIMIT {
                if endpoint.write_all(&[0, 0, 0, 0, 0, 0, 0, 0, 1]).await.is_err() {
                    return;
                }
            }
        });
        let mut bytes = 0;
        let mut buffer = [0; ROOM];
        let all = 2 * FRAME_LIMIT as usize * 9;
        while bytes < all {
            match ours.read(&mut buffer).await {
                Ok(read) => bytes += read,
                Err(_) => break,
            }
        }
        drop(ours);
        sending.await.expect("the task ends");
        bytes / 9
    }

    #[tokio::test(start_paused = true)]
    async fn endpoint_that_sends_without_reading_is_disconnected() {
        assert_eq!(frames_accepted(10).await, 2 * FRAME_LIMIT as usize, "the endpoint reads");
        let accepted = frames_accepted(2000).await;
        assert!(accepted <= FRAME_LIMIT as usize, "{accepted} frames");
    }
}
