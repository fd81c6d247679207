//! Performs the server side of a handshake. After a failed one, closes the connection so that the client receives the
//! alert first.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::stream::TlsStream;

/// How many bytes are read and discarded at once. Small, since many clients may be refused at one time.
const READ_BYTES: usize = 4 * 1024;

/// A client handshake that failed.
#[derive(Debug)]
pub(crate) struct RefusedHandshake {
    /// Why the handshake failed.
    pub(crate) error: io::Error,
    /// The connection, if an alert may not have been sent completely.
    stream: Option<Box<TlsStream>>,
}

impl From<io::Error> for RefusedHandshake {
    fn from(error: io::Error) -> Self {
        Self { error, stream: None }
    }
}

/// Performs the server side of a handshake.
///
/// # Errors
/// When the handshake fails. The alert was sent as far as the socket accepted it. The caller must call
/// [`RefusedHandshake::close`], so that the client receives the alert.
pub(super) async fn server_handshake(
    config: Arc<ServerConfig>,
    tcp: TcpStream,
) -> Result<Box<TlsStream>, RefusedHandshake> {
    let mut stream = TlsStream::server(config, tcp)?;
    match stream.handshake().await {
        Ok(()) => Ok(stream),
        Err(error) => Err(RefusedHandshake { error, stream: Some(stream) }),
    }
}

impl RefusedHandshake {
    /// The connection is closed when the client has sent nothing for this time.
    const IDLE_TIMEOUT: Duration = Duration::from_secs(1);
    /// The connection is closed after this time in any case.
    const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
    /// The connection is closed after this many discarded bytes.
    const DISCARD_LIMIT_BYTES: usize = 1024 * 1024;

    /// Sends the rest of the alert, closes our side, then reads and discards what the client still sends. Closing
    /// a socket with unread bytes resets the connection, and a reset can destroy the alert before the client has
    /// read it.
    pub(crate) async fn close(self) {
        let Some(mut stream) = self.stream else {
            return;
        };
        let closing = async {
            std::future::poll_fn(|cx| stream.poll_send(cx)).await?;
            stream.tcp.shutdown().await?;
            let mut discarded = vec![0; READ_BYTES];
            let mut remaining = Self::DISCARD_LIMIT_BYTES;
            while remaining > 0 {
                let reading = stream.tcp.read(&mut discarded);
                match tokio::time::timeout(Self::IDLE_TIMEOUT, reading).await?? {
                    0 => break,
                    read => remaining = remaining.saturating_sub(read),
                }
            }
            io::Result::Ok(())
        };
        // The connection is closed after any outcome: the client closed it, or a limit was reached.
        drop(tokio::time::timeout(Self::CLOSE_TIMEOUT, closing).await);
    }
}
