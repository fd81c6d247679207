//! A TLS connection that owns no buffers while it is idle.
//!
//! Records are decrypted and encrypted in a scratch buffer that all connections of a worker share. A connection stores
//! only a partial record, decrypted bytes that did not fit into the reader's buffer, and unsent encrypted records.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
};
use rustls::{ClientConfig, CommonState, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::failure::{FailedHandshake, TlsFailure};

/// The most plain bytes in a record (RFC 8446, section 5.1).
const RECORD_BYTES: usize = 16 * 1024;
/// An upper bound of what encryption adds to a record: header, content type, tag.
const RECORD_OVERHEAD_BYTES: usize = 256;
/// How many plain bytes are encrypted and written at once.
const WRITE_BYTES: usize = 4 * RECORD_BYTES;
/// Up to this many unsent bytes, a write adds its records before sending, so that one system call sends all.
const COALESCE_BYTES: usize = 4 * 1024;
/// The size of the shared scratch buffer. A handshake message must fit completely; rustls accepts at most 64 KiB.
const SCRATCH_BYTES: usize = WRITE_BYTES + 8 * RECORD_OVERHEAD_BYTES;
thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_BYTES]);
}

/// A TLS connection.
pub(crate) struct TlsStream {
    pub(super) tcp: TcpStream,
    session: TlsSession,
    /// A partially received record.
    received: BytesMut,
    output: SessionOutput,
    /// Whether close_notify was queued.
    closed: bool,
    /// Whether the session failed. It must not be used after that.
    failed: bool,
}

/// The rustls session, for our side of the connection.
enum TlsSession {
    Server(UnbufferedServerConnection),
    Client(UnbufferedClientConnection),
}

/// The output of a session that was not consumed yet.
#[derive(Default)]
struct SessionOutput {
    /// Decrypted bytes that were not read yet.
    plain: BytesMut,
    /// Encrypted records that the socket has not accepted yet.
    unsent: BytesMut,
    /// Whether the peer has sent close_notify.
    ended: bool,
}

/// What a session does after it has processed its input.
enum SessionTask<'a> {
    /// Nothing.
    None,
    /// Encrypts the first bytes into the second buffer.
    Encrypt(&'a [u8], &'a mut [u8]),
    /// Queues close_notify.
    Close,
}

/// The result of one step of a session.
enum SessionStep {
    /// Call again: there is more to process.
    Continue,
    /// The session is blocked or its task is done. Holds how many bytes were encrypted.
    Done(usize),
}

impl TlsStream {
    /// The server side of a connection, before its handshake.
    ///
    /// # Errors
    /// When rustls does not accept the configuration.
    pub(super) fn server(config: Arc<ServerConfig>, tcp: TcpStream) -> io::Result<Box<Self>> {
        let session = UnbufferedServerConnection::new(config).map_err(io::Error::other)?;
        Ok(Self::new(TlsSession::Server(session), tcp))
    }

    /// Performs the client side of a handshake.
    ///
    /// # Errors
    /// A [`FailedHandshake`] with the reason. The alert was sent to the server.
    pub(crate) async fn connect(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        tcp: TcpStream,
    ) -> io::Result<Box<Self>> {
        let session = UnbufferedClientConnection::new(config, name).map_err(io::Error::other)?;
        let mut stream = Self::new(TlsSession::Client(session), tcp);
        stream.handshake().await.map_err(|error| {
            let has_begun = stream.session().protocol_version().is_some();
            let failure = TlsFailure::of_handshake(&error, has_begun);
            FailedHandshake::wrap(error, failure)
        })?;
        Ok(stream)
    }

    fn new(session: TlsSession, tcp: TcpStream) -> Box<Self> {
        let received = BytesMut::new();
        let output = SessionOutput::default();
        Box::new(Self { tcp, session, received, output, closed: false, failed: false })
    }

    pub(super) async fn handshake(&mut self) -> io::Result<()> {
        let stream = self;
        // A client sends its ClientHello first.
        stream.run_task(SessionTask::None)?;
        while stream.session().is_handshaking() {
            std::future::poll_fn(|cx| {
                ready!(stream.poll_send(cx))?;
                stream.poll_receive(cx, &mut empty_buffer())
            })
            .await?;
            // Valid after the handshake: a client may send data and close_notify together with its last handshake
            // message.
            if stream.output.ended && stream.session().is_handshaking() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        // A client that has already sent a request gets the session tickets together with the response.
        if stream.output.plain.is_empty() {
            std::future::poll_fn(|cx| stream.poll_send(cx)).await?;
        }
        Ok(())
    }

    /// The TCP socket.
    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// The negotiated parameters of the session.
    pub(crate) fn session(&self) -> &CommonState {
        self.session.common()
    }

    /// Whether a read would return without reading from the socket.
    pub(crate) fn has_read_ahead(&self) -> bool {
        !self.output.plain.is_empty() || self.output.ended
    }

    /// Reads from the socket once and decrypts into `buf`. Decrypted bytes that do not fit are stored.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.failed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        SCRATCH
            .with_borrow_mut(|scratch| {
                let partial = self.received.len();
                let size = buf.remaining().clamp(RECORD_BYTES, WRITE_BYTES) + RECORD_OVERHEAD_BYTES;
                let end = (partial + size).min(scratch.len());
                let (before, free) = scratch.split_at_mut(partial);
                let Some(free) = free.get_mut(..end - partial).filter(|free| !free.is_empty())
                else {
                    let reason = "TLS handshake message is larger than 64 KiB";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::FileTooLarge, reason)));
                };
                let mut free = ReadBuf::new(free);
                ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut free))?;
                let count = free.filled().len();
                if count == 0 {
                    // Without close_notify the data may have been truncated.
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                before.copy_from_slice(&self.received);
                let all = scratch.get_mut(..partial + count).unwrap_or_default();
                let (used, result) =
                    self.session.run(all, SessionTask::None, buf, &mut self.output);
                let rest = all.get(used..).filter(|_| !self.output.ended).unwrap_or_default();
                self.received = if rest.is_empty() { BytesMut::new() } else { rest.into() };
                self.failed |= result.is_err();
                Poll::Ready(result.map(drop))
            })
            .map_err(|error| {
                // Send the alert, if the session queued one.
                drop(self.poll_send(cx));
                error
            })
    }

    /// Runs a task of the session without reading from the socket. Returns how many bytes were encrypted.
    fn run_task(&mut self, task: SessionTask<'_>) -> io::Result<usize> {
        if self.failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let received = &mut self.received;
        let (used, result) =
            self.session.run(received, task, &mut empty_buffer(), &mut self.output);
        received.advance(used);
        self.failed |= result.is_err();
        result
    }

    /// Sends unsent records as far as the socket accepts them now. Does not replace the waker of a task that waits to
    /// send.
    fn try_send(&mut self) {
        let unsent = &mut self.output.unsent;
        // The next write reports an error.
        while !unsent.is_empty()
            && let Ok(sent @ 1..) = self.tcp.try_write(unsent)
        {
            unsent.advance(sent);
        }
        if unsent.is_empty() {
            *unsent = BytesMut::new();
        }
    }

    /// Sends all unsent records.
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let unsent = &mut self.output.unsent;
        while !unsent.is_empty() {
            match ready!(Pin::new(&mut self.tcp).poll_write(cx, unsent))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                // `advance` to the end would keep the allocation.
                all if all == unsent.len() => *unsent = BytesMut::new(),
                sent => unsent.advance(sent),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl TlsSession {
    /// Processes the records in `input`, then runs the task. Returns how many bytes of `input` were consumed, and how
    /// many bytes were encrypted. `input` must begin with the bytes that the last call did not consume, even when
    /// nothing is added: the session remembers positions in it.
    fn run(
        &mut self,
        input: &mut [u8],
        mut task: SessionTask<'_>,
        buf: &mut ReadBuf<'_>,
        output: &mut SessionOutput,
    ) -> (usize, io::Result<usize>) {
        let mut used = 0;
        loop {
            let rest = input.get_mut(used..).unwrap_or_default();
            let (discard, step) = self.step(rest, &mut task, buf, output);
            used += discard;
            match step {
                Ok(Ok(SessionStep::Continue)) => {}
                Ok(Ok(SessionStep::Done(encrypted))) => return (used, Ok(encrypted)),
                Ok(Err(error)) => return (used, Err(error)),
                Err(error) => {
                    self.encode_queued(input.get_mut(used..).unwrap_or_default(), output);
                    return (used, Err(io::Error::new(io::ErrorKind::InvalidData, error)));
                }
            }
        }
    }

    /// Lets the session process `input` until it requests an action, and carries that out. Returns how many bytes of
    /// `input` were consumed.
    fn step(
        &mut self,
        input: &mut [u8],
        task: &mut SessionTask<'_>,
        buf: &mut ReadBuf<'_>,
        output: &mut SessionOutput,
    ) -> (usize, Result<io::Result<SessionStep>, rustls::Error>) {
        match self {
            Self::Server(session) => {
                let UnbufferedStatus { discard, state } = session.process_tls_records(input);
                (discard, state.map(|state| carry_out(state, task, buf, output)))
            }
            Self::Client(session) => {
                let UnbufferedStatus { discard, state } = session.process_tls_records(input);
                (discard, state.map(|state| carry_out(state, task, buf, output)))
            }
        }
    }

    /// Encodes the records that a failed session has queued for the peer: the alert, and before it, in TLS 1.3,
    /// the ServerHello without which the peer cannot decrypt the alert. The session gives one record a call; a
    /// call without a queued record would process more input, which a failed session must not do.
    fn encode_queued(&mut self, mut input: &mut [u8], output: &mut SessionOutput) {
        while self.common().wants_write() {
            let (discard, step) =
                self.step(input, &mut SessionTask::None, &mut empty_buffer(), output);
            if !matches!(step, Ok(Ok(SessionStep::Continue))) {
                return;
            }
            input = input.get_mut(discard..).unwrap_or_default();
        }
    }

    fn common(&self) -> &CommonState {
        match self {
            Self::Server(session) => session,
            Self::Client(session) => session,
        }
    }
}

/// Carries out the action that a session requests.
fn carry_out<Side>(
    state: ConnectionState<'_, '_, Side>,
    task: &mut SessionTask<'_>,
    buf: &mut ReadBuf<'_>,
    output: &mut SessionOutput,
) -> io::Result<SessionStep> {
    match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                output.put(record.map_err(io::Error::other)?.payload, buf);
            }
            Ok(SessionStep::Continue)
        }
        ConnectionState::EncodeTlsData(mut data) => {
            let encoded = append(&mut output.unsent, |buffer| match data.encode(buffer) {
                Err(EncodeError::InsufficientSize(error)) => Err(error),
                other => Ok(other),
            });
            encoded.map_err(io::Error::other)?;
            Ok(SessionStep::Continue)
        }
        // Encoded records are already queued before all later ones.
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(SessionStep::Continue)
        }
        ConnectionState::PeerClosed => {
            output.ended = true;
            Ok(SessionStep::Continue)
        }
        ConnectionState::WriteTraffic(mut traffic) => match task {
            SessionTask::None => Ok(SessionStep::Done(0)),
            SessionTask::Encrypt(plain, buffer) => {
                traffic.encrypt(plain, buffer).map(SessionStep::Done).map_err(io::Error::other)
            }
            SessionTask::Close => {
                let closed =
                    append(&mut output.unsent, |buffer| match traffic.queue_close_notify(buffer) {
                        Err(EncryptError::InsufficientSize(error)) => Err(error),
                        other => Ok(other),
                    });
                closed.map_err(io::Error::other)?;
                Ok(SessionStep::Done(0))
            }
        },
        ConnectionState::BlockedHandshake | ConnectionState::Closed => Ok(SessionStep::Done(0)),
        // Early data is disabled, and rustls has no other state.
        other => Err(io::Error::other(format!("unexpected state of the TLS session: {other:?}"))),
    }
}

/// Appends the output of `write`, which reports the required size when the buffer is too small.
fn append<E>(
    out: &mut BytesMut,
    mut write: impl FnMut(&mut [u8]) -> Result<Result<usize, E>, InsufficientSizeError>,
) -> Result<(), E> {
    let before = out.len();
    let mut size = 0;
    loop {
        out.resize(before + size, 0);
        match write(out.get_mut(before..).unwrap_or_default()) {
            Ok(written) => {
                let result = written.map(|written| out.truncate(before + written));
                return result;
            }
            Err(InsufficientSizeError { required_size }) => size = required_size,
        }
    }
}

impl SessionOutput {
    /// Copies decrypted bytes to the reader's buffer, and stores those that do not fit.
    fn put(&mut self, plain: &[u8], buf: &mut ReadBuf<'_>) {
        let fitting = if self.plain.is_empty() { plain.len().min(buf.remaining()) } else { 0 };
        let (first, rest) = plain.split_at(fitting);
        buf.put_slice(first);
        self.plain.extend_from_slice(rest);
    }

    /// Copies stored bytes to the reader's buffer.
    fn take(&mut self, buf: &mut ReadBuf<'_>) {
        let first = self.plain.split_to(self.plain.len().min(buf.remaining()));
        buf.put_slice(&first);
        if self.plain.is_empty() {
            self.plain = BytesMut::new();
        }
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        while buf.filled().len() == before && buf.remaining() > 0 {
            if !this.output.plain.is_empty() {
                this.output.take(buf);
            } else if this.output.ended {
                break;
            } else if let Poll::Ready(received) = this.poll_receive(cx, buf) {
                received?;
            } else {
                // The peer may wait for these records before it sends more.
                this.try_send();
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        plain: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.output.unsent.len() > COALESCE_BYTES {
            ready!(this.poll_send(cx))?;
        }
        let plain = plain.get(..WRITE_BYTES).unwrap_or(plain);
        let encrypted = SCRATCH.with_borrow_mut(|scratch| {
            let encrypted = this.run_task(SessionTask::Encrypt(plain, scratch))?;
            // Records that the session queued itself are sent first.
            let mut records = scratch.get(..encrypted).unwrap_or_default();
            if this.output.unsent.is_empty()
                && let Poll::Ready(sent) = Pin::new(&mut this.tcp).poll_write(cx, records)
            {
                records = records.get(sent?..).unwrap_or_default();
            }
            this.output.unsent.extend_from_slice(records);
            io::Result::Ok(encrypted)
        })?;
        if let Poll::Ready(sent) = this.poll_send(cx) {
            sent?;
        }
        match encrypted {
            0 if !plain.is_empty() => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            _ => Poll::Ready(Ok(plain.len())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_send(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closed {
            this.closed = true;
            this.run_task(SessionTask::Close)?;
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.tcp).poll_shutdown(cx)
    }
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream").field("tcp", &self.tcp).finish_non_exhaustive()
    }
}

/// A reader's buffer without space.
fn empty_buffer() -> ReadBuf<'static> {
    ReadBuf::new(&mut [])
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use futures_util::FutureExt;
    use rustls_pki_types::UnixTime;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, split};
    use tokio::net::TcpListener;
    use tokio_rustls::{TlsAcceptor, TlsConnector};
    use weft_certs::request::{self, CheckedRequest};
    use weft_certs::tls::{self, ClientAuthentication, LoadedIdentity};
    use weft_certs::{Authority, TrustStore};

    use super::*;
    use crate::tls::server_handshake::server_handshake;

    const UNSPLIT: usize = usize::MAX;

    struct TestConfigs {
        server: Arc<ServerConfig>,
        client: Arc<ClientConfig>,
        /// A client that has no certificate.
        anonymous: Arc<ClientConfig>,
    }

    fn configs() -> TestConfigs {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(UnixTime::now().as_secs());
        let files = Authority::create("mesh.test", now).unwrap();
        let authority = Authority::load(files, "mesh.test").unwrap();
        let id = weft_model::SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").unwrap();
        let pending = request::make(&id).unwrap();
        let asked = CheckedRequest::parse(&pending.request_pem).unwrap();
        let issued = authority.issue(&asked, Duration::from_secs(3600), now).unwrap();
        let own =
            LoadedIdentity::load(issued.chain.concat().as_bytes(), pending.key_pem.as_bytes());
        let own = own.unwrap();
        let roots = authority.trust_bundle().as_bytes();
        let trust = TrustStore::load(roots, None, Vec::new(), None, UnixTime::now()).unwrap();
        let trust = Arc::new(trust);
        let client = |identity| {
            let names = vec![weft_model::StringMatch::Exact(id.to_string())];
            tls::client(identity, trust.clone(), names, &[]).unwrap()
        };
        let clients = ClientAuthentication::Required(trust.clone(), Vec::new());
        TestConfigs {
            server: tls::server(&own, clients, &[]).unwrap(),
            client: client(Some(&own)),
            anonymous: client(None),
        }
    }

    async fn tcp() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        near.set_nodelay(true).unwrap();
        far.set_nodelay(true).unwrap();
        (near, far)
    }

    /// A connection that delivers bytes in pieces of at most `size`, in both directions.
    async fn in_pieces(size: usize) -> (TcpStream, TcpStream) {
        let (near, left) = tcp().await;
        let (right, far) = tcp().await;
        if size == UNSPLIT {
            return tcp().await;
        }
        let left = left.into_split();
        let right = right.into_split();
        for (mut from, mut to) in [(left.0, right.1), (right.0, left.1)] {
            tokio::spawn(async move {
                let mut piece = vec![0; size];
                while let Ok(count @ 1..) = from.read(&mut piece).await {
                    to.write_all(&piece[..count]).await.unwrap();
                    tokio::task::yield_now().await;
                }
                drop(to.shutdown().await);
            });
        }
        (near, far)
    }

    fn server_name() -> ServerName<'static> {
        ServerName::try_from("localhost").unwrap()
    }

    fn owns_no_buffer(stream: &TlsStream) -> bool {
        let TlsStream { received, output, .. } = stream;
        received.capacity() + output.plain.capacity() + output.unsent.capacity() == 0
    }

    /// Sends `bytes` and receives them back, at the same time.
    async fn exchange_with_echo(stream: TlsStream, bytes: &[u8]) -> TlsStream {
        let (mut read, mut write) = split(stream);
        let sending = async {
            write.write_all(bytes).await.unwrap();
            write.flush().await.unwrap();
        };
        let mut received_bytes = vec![0; bytes.len()];
        let (_, received) = tokio::join!(sending, read.read_exact(&mut received_bytes));
        received.unwrap();
        assert!(received_bytes == bytes, "the echoed bytes differ");
        read.unsplit(write)
    }

    async fn echo(stream: impl AsyncRead + AsyncWrite) {
        let (mut read, mut write) = split(stream);
        tokio::io::copy(&mut read, &mut write).await.unwrap();
        write.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn data_is_intact_for_every_segment_size() {
        let configs = configs();
        let bytes: Vec<u8> =
            (0..150_000_u32).map(|n| n.to_le_bytes()[usize::from(n % 7 == 0)]).collect();
        for size in [1, 4, 5, 6, 23, 1000, 16_384, 16_406, 40_000, UNSPLIT] {
            let bytes = if size < 100 { &bytes[..20_000] } else { &bytes[..] };
            let (near, far) = in_pieces(size).await;
            let connector = TlsConnector::from(configs.client.clone());
            let other = tokio::spawn(async move {
                echo(connector.connect(server_name(), far).await.unwrap()).await;
            });
            let stream = *server_handshake(configs.server.clone(), near).await.unwrap();
            let mut stream = exchange_with_echo(stream, bytes).await;
            assert!(owns_no_buffer(&stream), "after pieces of {size}");
            stream.shutdown().await.unwrap();
            assert_eq!(stream.read(&mut [0; 9]).await.unwrap(), 0, "the peer closes cleanly");
            other.await.unwrap();

            let (near, far) = in_pieces(size).await;
            // Small records, with session tickets between them.
            let mut server = ServerConfig::clone(&configs.server);
            server.max_fragment_size = Some(64);
            server.send_tls13_tickets = 3;
            let acceptor = TlsAcceptor::from(Arc::new(server));
            let other = tokio::spawn(async move {
                echo(acceptor.accept(far).await.unwrap()).await;
            });
            let stream = TlsStream::connect(configs.client.clone(), server_name(), near).await;
            let mut stream = exchange_with_echo(*stream.unwrap(), bytes).await;
            assert!(owns_no_buffer(&stream), "after pieces of {size}");
            stream.shutdown().await.unwrap();
            assert_eq!(stream.read(&mut [0; 9]).await.unwrap(), 0, "the peer closes cleanly");
            other.await.unwrap();
        }
    }

    async fn pair(
        configs: &TestConfigs,
    ) -> (TlsStream, tokio_rustls::client::TlsStream<TcpStream>) {
        let (near, far) = tcp().await;
        let connector = TlsConnector::from(configs.client.clone());
        let (ours, theirs) = tokio::join!(
            server_handshake(configs.server.clone(), near),
            connector.connect(server_name(), far)
        );
        (*ours.unwrap(), theirs.unwrap())
    }

    #[tokio::test]
    async fn end_of_stream_without_close_notify_is_an_error() {
        let configs = configs();
        let (mut ours, mut theirs) = pair(&configs).await;
        theirs.write_all(b"all of it?").await.unwrap();
        theirs.get_mut().0.shutdown().await.unwrap();
        assert_eq!(ours.read(&mut [0; 99]).await.unwrap(), 10);
        let error = ours.read(&mut [0; 99]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn half_closed_connection_can_still_send() {
        let configs = configs();
        let (mut ours, mut theirs) = pair(&configs).await;
        theirs.shutdown().await.unwrap();
        assert_eq!(ours.read(&mut [0; 9]).await.unwrap(), 0);
        ours.write_all(b"and yet").await.unwrap();
        ours.shutdown().await.unwrap();
        assert!(ours.write_all(b"no more").await.is_err());
        let mut received_bytes = Vec::new();
        theirs.read_to_end(&mut received_bytes).await.unwrap();
        assert_eq!(received_bytes, b"and yet");
    }

    #[tokio::test]
    async fn key_updates_are_handled_in_both_directions() {
        let configs = configs();
        let (mut ours, mut theirs) = pair(&configs).await;
        for _ in 0..3 {
            theirs.get_mut().1.refresh_traffic_keys().unwrap();
            theirs.write_all(b"under new keys").await.unwrap();
            assert_eq!(ours.read(&mut [0; 99]).await.unwrap(), 14);
            ours.write_all(b"ours too").await.unwrap();
            assert_eq!(theirs.read(&mut [0; 99]).await.unwrap(), 8);
        }
        assert!(owns_no_buffer(&ours));
    }

    #[tokio::test]
    async fn writer_is_blocked_when_the_peer_does_not_read() {
        let configs = configs();
        let (mut ours, mut theirs) = pair(&configs).await;
        let piece = [7; 100_000];
        let mut taken = 0;
        // The socket buffers hold some megabytes.
        while let Ok(count) =
            tokio::time::timeout(Duration::from_millis(200), ours.write(&piece)).await
        {
            taken += count.unwrap();
            assert!(taken < 100_000_000, "unsent data is buffered without limit");
        }
        assert!(ours.output.unsent.len() <= SCRATCH_BYTES);
        let rest = async {
            let mut received_bytes = vec![0; taken];
            theirs.read_exact(&mut received_bytes).await.unwrap();
            assert!(received_bytes.iter().all(|byte| *byte == 7));
        };
        let (flushed, ()) = tokio::join!(ours.flush(), rest);
        flushed.unwrap();
        assert!(owns_no_buffer(&ours));
    }

    #[tokio::test]
    async fn data_and_close_notify_may_arrive_with_the_end_of_the_handshake() {
        let configs = configs();
        let (near, far) = tcp().await;
        let connector = TlsConnector::from(configs.client.clone());
        // The client's bytes after its ClientHello are delivered together.
        let mut to_client = far;
        let far = tcp().await;
        let client = async {
            let mut stream = connector.connect(server_name(), far.0).await.unwrap();
            stream.write_all(b"all of it").await.unwrap();
            stream.shutdown().await.unwrap();
            stream
        };
        let between = async {
            let mut theirs = far.1;
            let mut hello = vec![0; 4096];
            let first = theirs.read(&mut hello).await.unwrap();
            to_client.write_all(&hello[..first]).await.unwrap();
            let mut answer = vec![0; 65_536];
            let received = to_client.read(&mut answer).await.unwrap();
            theirs.write_all(&answer[..received]).await.unwrap();
            let mut rest = Vec::new();
            theirs.read_to_end(&mut rest).await.unwrap();
            to_client.write_all(&rest).await.unwrap();
            to_client
        };
        let accepting = server_handshake(configs.server.clone(), near);
        let (ours, _client, _held) = tokio::join!(accepting, client, between);
        let mut received_bytes = Vec::new();
        ours.unwrap().read_to_end(&mut received_bytes).await.unwrap();
        assert_eq!(received_bytes, b"all of it");
    }

    #[tokio::test]
    async fn reading_does_not_replace_the_waker_of_a_blocked_writer() {
        let configs = configs();
        let (ours, mut theirs) = pair(&configs).await;
        let (mut read, mut write) = split(ours);
        let piece = vec![7; 10_000_000];
        let writing = tokio::spawn(async move {
            write.write_all(&piece).await.unwrap();
            write.flush().await.unwrap();
        });
        // The writer is blocked when the byte arrives, and the reader does not poll again after it.
        theirs.write_all(b"!").await.unwrap();
        let mut byte = [0];
        while read.read(&mut byte).now_or_never().is_none() {
            tokio::task::yield_now().await;
        }
        let taking = async {
            let mut received_bytes = vec![0; 10_000_000];
            theirs.read_exact(&mut received_bytes).await.unwrap();
        };
        let both = tokio::time::timeout(Duration::from_secs(10), async {
            tokio::join!(taking, writing).1.unwrap();
        });
        both.await.expect("the writer is woken");
    }

    #[tokio::test]
    async fn refused_client_receives_the_alert() {
        let configs = configs();
        let (near, far) = tcp().await;
        let connector = TlsConnector::from(configs.anonymous.clone());
        let other = async {
            // With TLS 1.3 the client receives the alert with its first read.
            let mut stream = connector.connect(server_name(), far).await?;
            stream.read_u8().await
        };
        let (ours, theirs) = tokio::join!(server_handshake(configs.server.clone(), near), other);
        assert!(
            ours.unwrap_err().error.to_string().contains("no certificate"),
            "the error has the reason"
        );
        let theirs = theirs.unwrap_err().to_string();
        assert!(theirs.contains("CertificateRequired"), "{theirs}");
    }

    #[tokio::test]
    async fn client_without_a_common_application_protocol_receives_the_alert() {
        let configs = configs();
        let mut server = ServerConfig::clone(&configs.server);
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let mut client = ClientConfig::clone(&configs.client);
        client.alpn_protocols = vec![b"foo".to_vec()];
        let (near, far) = tcp().await;
        let connector = TlsConnector::from(Arc::new(client));
        let connecting = connector.connect(server_name(), far);
        let (ours, theirs) = tokio::join!(server_handshake(Arc::new(server), near), connecting);
        let ours = ours.unwrap_err().error.to_string();
        assert!(ours.contains("known protocol"), "{ours}");
        let theirs = theirs.unwrap_err().to_string();
        assert!(theirs.contains("NoApplicationProtocol"), "{theirs}");
    }

    #[tokio::test]
    async fn refused_client_that_sends_more_reads_the_alert_and_no_reset() {
        let configs = configs();
        let (near, far) = tcp().await;
        let connector = TlsConnector::from(configs.anonymous.clone());
        let client = async {
            let mut stream = connector.connect(server_name(), far).await.unwrap();
            // More than the server reads together with the client's last handshake message.
            stream.write_all(&[7; 300_000]).await.unwrap();
            let alert = stream.read_u8().await.unwrap_err().to_string();
            (alert, stream.get_mut().0.read(&mut [0]).await)
        };
        let server = async {
            // The handshake fails after the client's last message has arrived.
            let refused = server_handshake(configs.server.clone(), near).await.unwrap_err();
            refused.close().await;
        };
        let ((alert, end), ()) = tokio::join!(client, server);
        assert!(alert.contains("CertificateRequired"), "{alert}");
        assert_eq!(end.unwrap(), 0, "the connection ends without a reset");
    }

    #[tokio::test]
    async fn handshake_fails_for_bytes_that_are_not_tls() {
        let configs = configs();
        for (name, bytes) in [
            ("text", &b"GET / HTTP/1.1\r\n\r\n"[..]),
            ("a record that is too long", b"\x16\x03\x01\xff\xff"),
            ("an alert", b"\x15\x03\x03\x00\x02\x02\x28"),
            ("nothing", b""),
        ] {
            let (near, mut far) = tcp().await;
            far.write_all(bytes).await.unwrap();
            far.shutdown().await.unwrap();
            assert!(server_handshake(configs.server.clone(), near).await.is_err(), "{name}");
        }
    }
}
