//! A client's connection, which is closed when its certificate expires or is revoked.

use std::collections::BTreeSet;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;

use crate::clock::wall_clock;

/// The serial numbers of revoked certificates, lower-case hex.
pub(crate) type RevokedSerials = watch::Receiver<Arc<BTreeSet<String>>>;

/// The longest and the shortest time between two looks at the wall clock, which may be set meanwhile.
const CLOCK_CHECK_MAX: Duration = Duration::from_secs(10);
const CLOCK_CHECK_MIN: Duration = Duration::from_millis(1);

/// What limits the life of a client's connection: its certificate.
#[derive(Debug)]
pub(crate) struct CertificateValidity {
    /// The serial number of the certificate, lower-case hex.
    pub(crate) serial: String,
    /// When the certificate expires.
    pub(crate) not_after: SystemTime,
}

impl CertificateValidity {
    /// Resolves when the certificate has expired or is revoked.
    pub(crate) async fn ended(self, mut revoked: RevokedSerials) {
        let has_expired = async {
            while let Ok(left) = self.not_after.duration_since(wall_clock()) {
                tokio::time::sleep(left.clamp(CLOCK_CHECK_MIN, CLOCK_CHECK_MAX)).await;
            }
        };
        let is_revoked = async {
            if revoked.wait_for(|revoked| revoked.contains(&self.serial)).await.is_err() {
                // The publisher has ended, so the process is about to end.
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = has_expired => {}
            () = is_revoked => {}
        }
    }
}

/// A connection that fails all reads and writes once a future has resolved.
pub(crate) struct XdsClientConnection<T> {
    io: T,
    /// Resolves when the connection must close. None once it has resolved.
    ended: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    has_ended: bool,
}

impl<T> XdsClientConnection<T> {
    /// A connection that is closed when `ends` resolves.
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
                "client certificate revoked or expired, or connection slot taken by another client";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason));
        }
        Ok(())
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for XdsClientConnection<T> {
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

impl<T: AsyncWrite + Unpin> AsyncWrite for XdsClientConnection<T> {
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
