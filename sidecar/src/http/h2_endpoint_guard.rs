//! A connection of HTTP/2 to an endpoint, which requests of many clients share. No behaviour of one client
//! may end it, so the library counts neither resets nor small frames on it. What the library would keep
//! without a limit is what it has to answer to an endpoint that sends and does not read: that is limited here.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::h2_frames::Frames;
use crate::tls::failure::TlsFailure;

/// How many frames an endpoint may send while it takes nothing of what we have to write. The windows of one
/// that keeps to the protocol are used up before: 4 MiB in frames of 256 bytes.
const FRAMES_LIMIT: u32 = 16_384;

/// The connection.
#[derive(Debug)]
pub(crate) struct Http2EndpointGuard<S> {
    stream: S,
    received: Frames,
    /// How many frames came since the endpoint stopped reading; none while it reads.
    since_blocked: Option<u32>,
    has_received: bool,
    alert: EndpointAlert,
}

/// The alert by which an endpoint ended the connection before it sent anything: in TLS 1.3 it refuses our
/// certificate so. The library passes no cause of an error on.
pub(crate) type EndpointAlert = Rc<Cell<Option<TlsFailure>>>;

impl<S> Http2EndpointGuard<S> {
    pub(crate) fn new(stream: S, alert: EndpointAlert) -> Self {
        let received = Frames::behind(0);
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
        received.see(buf.filled().get(before..).unwrap_or_default(), |_, _| count += 1);
        if let Some(all) = since_blocked {
            *all = all.saturating_add(count);
            if *all > FRAMES_LIMIT {
                let why = "the endpoint sends HTTP/2 frames without reading";
                return Poll::Ready(Err(io::Error::other(why)));
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

    /// How many empty frames of DATA are taken from an endpoint, before which `written` bytes are written.
    async fn frames_taken(written: usize) -> usize {
        const ROOM: usize = 1024;
        let (endpoint, ours) = duplex(ROOM);
        let mut ours = Http2EndpointGuard::new(ours, EndpointAlert::default());
        let bytes = vec![0; written];
        let writing = ours.write_all(&bytes);
        drop(tokio::time::timeout(std::time::Duration::from_millis(1), writing).await);
        let (_unread, mut endpoint) = tokio::io::split(endpoint);
        let sending = tokio::spawn(async move {
            for _ in 0..2 * FRAMES_LIMIT {
                if endpoint.write_all(&[0, 0, 0, 0, 0, 0, 0, 0, 1]).await.is_err() {
                    return;
                }
            }
        });
        let (mut bytes, mut buffer) = (0, [0; ROOM]);
        let all = 2 * FRAMES_LIMIT as usize * 9;
        while bytes < all {
            match ours.read(&mut buffer).await {
                Ok(more) => bytes += more,
                Err(_) => break,
            }
        }
        drop(ours);
        sending.await.expect("it ends");
        bytes / 9
    }

    #[tokio::test(start_paused = true)]
    async fn endpoint_that_sends_without_reading_is_ended() {
        assert_eq!(frames_taken(10).await, 2 * FRAMES_LIMIT as usize, "it takes what we write");
        let taken = frames_taken(2000).await;
        assert!(taken <= FRAMES_LIMIT as usize, "{taken} frames");
    }
}
