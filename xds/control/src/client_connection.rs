//! A connection of a client that proved who it is: it ends when that is not so any more.

use std::collections::BTreeSet;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;

use crate::clock::wall_clock;

/// The serial numbers that are revoked, lower-case hex.
pub(crate) type RevokedSerials = watch::Receiver<Arc<BTreeSet<String>>>;

/// How long at most and at least until the clock is looked at again.
const CLOCK_CHECK_MAX: Duration = Duration::from_secs(10);
const CLOCK_CHECK_MIN: Duration = Duration::from_millis(1);

/// What a connection stands on.
#[derive(Debug)]
pub(crate) struct CertificateValidity {
    /// The serial number of the certificate, lower-case hex.
    pub(crate) serial: String,
    /// When it ends.
    pub(crate) not_after: SystemTime,
}

impl CertificateValidity {
    /// Resolves when it stands no more.
    pub(crate) async fn ended(self, mut revoked: RevokedSerials) {
        // The clock may be set meanwhile, so it is looked at again and again.
        let has_expired = async {
            while let Ok(left) = self.not_after.duration_since(wall_clock()) {
                tokio::time::sleep(left.clamp(CLOCK_CHECK_MIN, CLOCK_CHECK_MAX)).await;
            }
        };
        let is_revoked = async {
            if revoked.wait_for(|revoked| revoked.contains(&self.serial)).await.is_err() {
                // Whoever revokes is gone, and with it this process, or nearly so.
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = has_expired => {}
            () = is_revoked => {}
        }
    }
}

/// The connection.
pub(crate) struct ClientConnection<T> {
    io: T,
    /// None once it has ended.
    ended: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    has_ended: bool,
}

impl<T> ClientConnection<T> {
    /// A connection that is cut off when `ends` resolves.
    pub(crate) fn new(io: T, ends: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { io, ended: Some(Box::pin(ends)), has_ended: false }
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Some(ended) = &mut self.ended
            && ended.as_mut().poll(cx).is_ready()
        {
            self.ended = None;
            self.has_ended = true;
        }
        if self.has_ended {
            let reason =
                "client certificate revoked or expired, or the connection gave way to others";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason));
        }
        Ok(())
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for ClientConnection<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.check(cx)?;
        Pin::new(&mut this.io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for ClientConnection<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check(cx)?;
        Pin::new(&mut this.io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
