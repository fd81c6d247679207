//! A connection under TLS that owns no buffer while it waits.
//!
//! Records are decrypted and encrypted in room that all connections of a worker share, one at a time.
//! A connection keeps only what is left over: the part of a record that has come so far, plain bytes
//! that had no place in the reader's buffer, and records that the socket has not taken yet. Most of
//! the time it is none of these.

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
use super::refused_handshake::RefusedHandshake;

/// The most plain bytes in a record (RFC 8446, section 5.1).
const RECORD_BYTES: usize = 16 * 1024;
/// More than a record adds to its plain bytes: head, padding's end, tag.
const RECORD_OVERHEAD_BYTES: usize = 256;
/// How many plain bytes are encrypted, and then written, at once.
const WRITE_BYTES: usize = 4 * RECORD_BYTES;
/// How many bytes may wait for others, to be sent with them by one call.
const LITTLE_BYTES: usize = 4 * 1024;
/// The room that is shared. A message of the handshake must fit in whole: the library takes none
/// larger than 64 KiB.
const SCRATCH_BYTES: usize = WRITE_BYTES + 8 * RECORD_OVERHEAD_BYTES;
thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_BYTES]);
}

/// A connection under TLS.
pub(crate) struct TlsStream {
    pub(super) tcp: TcpStream,
    session: Session,
    /// What came from the socket and is no whole record yet.
    received: BytesMut,
    kept: Kept,
    /// Whether our side has said that it is done.
    closed: bool,
    /// Whether the session broke: it must not be asked for anything any more.
    failed: bool,
}

/// Whose side of the connection is ours.
enum Session {
    Server(UnbufferedServerConnection),
    Client(UnbufferedClientConnection),
}

/// What a session gave that had no place elsewhere.
#[derive(Default)]
struct Kept {
    /// Plain bytes that nobody has read yet.
    plain: BytesMut,
    /// Records that the socket has not taken yet.
    unsent: BytesMut,
    /// Whether the peer has said that nothing follows.
    ended: bool,
}

/// What is wanted of a session once it can encrypt.
enum Wish<'a> {
    /// Nothing: that it reads what came.
    None,
    /// That it encrypts these bytes into that room.
    Encrypt(&'a [u8], &'a mut [u8]),
    /// That it says that our side is done.
    Close,
}

/// What came of one step.
enum Step {
    /// There is more to do.
    Again,
    /// All is done that can be; so many bytes were encrypted.
    Done(usize),
}

impl TlsStream {
    /// Does the server's side of a handshake.
    ///
    /// # Errors
    /// Why there is no connection; the alert has been given to the socket as far as the socket took it. The
    /// caller passes the error to [`RefusedHandshake::close`], so that the client receives the alert.
    pub(crate) async fn accept(
        config: Arc<ServerConfig>,
        tcp: TcpStream,
    ) -> Result<Box<Self>, RefusedHandshake> {
        let session = UnbufferedServerConnection::new(config).map_err(io::Error::other)?;
        let mut stream = Self::new(Session::Server(session), tcp);
        match stream.handshake().await {
            Ok(()) => Ok(stream),
            Err(error) => Err(RefusedHandshake::new(error, stream)),
        }
    }

    /// Does the client's side of a handshake.
    ///
    /// # Errors
    /// A [`FailedHandshake`] with the reason; the alert has been sent to the server.
    pub(crate) async fn connect(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        tcp: TcpStream,
    ) -> io::Result<Box<Self>> {
        let session = UnbufferedClientConnection::new(config, name).map_err(io::Error::other)?;
        let mut stream = Self::new(Session::Client(session), tcp);
        stream.handshake().await.map_err(|error| {
            let has_begun = stream.session().protocol_version().is_some();
            let failure = TlsFailure::of_handshake(&error, has_begun);
            FailedHandshake::wrap(error, failure)
        })?;
        Ok(stream)
    }

    fn new(session: Session, tcp: TcpStream) -> Box<Self> {
        let (received, kept) = (BytesMut::new(), Kept::default());
        Box::new(Self { tcp, session, received, kept, closed: false, failed: false })
    }

    async fn handshake(&mut self) -> io::Result<()> {
        let stream = self;
        // A client speaks first.
        stream.act(Wish::None)?;
        while stream.session().is_handshaking() {
            std::future::poll_fn(|cx| {
                ready!(stream.poll_send(cx))?;
                stream.poll_receive(cx, &mut nowhere())
            })
            .await?;
            // It may say all that it has to say, and that this is all, with the end of its handshake.
            if stream.kept.ended && stream.session().is_handshaking() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        // Who has asked for something already gets the end of the handshake, a ticket, with the answer.
        if stream.kept.plain.is_empty() {
            std::future::poll_fn(|cx| stream.poll_send(cx)).await?;
        }
        Ok(())
    }

    /// The socket below.
    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// What both sides agreed on.
    pub(crate) fn session(&self) -> &CommonState {
        self.session.common()
    }

    /// Whether a read would give something without the socket.
    pub(crate) fn has_read_ahead(&self) -> bool {
        !self.kept.plain.is_empty() || self.kept.ended
    }

    /// Takes once from the socket, and decrypts: into `buf` first, the rest is kept.
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
                let held = self.received.len();
                let wanted =
                    buf.remaining().clamp(RECORD_BYTES, WRITE_BYTES) + RECORD_OVERHEAD_BYTES;
                let end = (held + wanted).min(scratch.len());
                let (before, free) = scratch.split_at_mut(held);
                let Some(free) = free.get_mut(..end - held).filter(|free| !free.is_empty()) else {
                    let reason = "a message of the handshake is larger than 64 KiB";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::FileTooLarge, reason)));
                };
                let mut free = ReadBuf::new(free);
                ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut free))?;
                let more = free.filled().len();
                if more == 0 {
                    // Without the peer's word that it is done, what came may have been cut short.
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                before.copy_from_slice(&self.received);
                let all = scratch.get_mut(..held + more).unwrap_or_default();
                let (used, result) = self.session.run(all, Wish::None, buf, &mut self.kept);
                let rest = all.get(used..).filter(|_| !self.kept.ended).unwrap_or_default();
                self.received = if rest.is_empty() { BytesMut::new() } else { rest.into() };
                self.failed |= result.is_err();
                Poll::Ready(result.map(drop))
            })
            .map_err(|error| {
                // The peer may still be told why.
                drop(self.poll_send(cx));
                error
            })
    }

    /// Has the session do something without more from the socket.
    fn act(&mut self, wish: Wish<'_>) -> io::Result<usize> {
        if self.failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let received = &mut self.received;
        let (used, result) = self.session.run(received, wish, &mut nowhere(), &mut self.kept);
        received.advance(used);
        self.failed |= result.is_err();
        result
    }

    /// Gives the socket what it takes at once of what it has not taken yet. Whoever waits for the rest goes
    /// on waiting.
    fn try_send(&mut self) {
        let unsent = &mut self.kept.unsent;
        // An error will be the next writer's.
        while !unsent.is_empty()
            && let Ok(sent @ 1..) = self.tcp.try_write(unsent)
        {
            unsent.advance(sent);
        }
        if unsent.is_empty() {
            *unsent = BytesMut::new();
        }
    }

    /// Gives the socket what it has not taken yet.
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let unsent = &mut self.kept.unsent;
        while !unsent.is_empty() {
            match ready!(Pin::new(&mut self.tcp).poll_write(cx, unsent))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                // What is at its end still owns its room.
                all if all == unsent.len() => *unsent = BytesMut::new(),
                sent => unsent.advance(sent),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Session {
    /// Reads records, and does what is wished once there are no more. Gives how many bytes of `input` it
    /// is done with, and how many bytes it encrypted. `input` must begin with what was left of the last
    /// one, even where nothing is added: the session remembers places in it.
    fn run(
        &mut self,
        input: &mut [u8],
        mut wish: Wish<'_>,
        buf: &mut ReadBuf<'_>,
        kept: &mut Kept,
    ) -> (usize, io::Result<usize>) {
        let mut used = 0;
        loop {
            let rest = input.get_mut(used..).unwrap_or_default();
            let (discard, step) = self.step(rest, &mut wish, buf, kept);
            used += discard;
            match step {
                Ok(Ok(Step::Again)) => {}
                Ok(Ok(Step::Done(encrypted))) => return (used, Ok(encrypted)),
                Ok(Err(error)) => return (used, Err(error)),
                Err(error) => {
                    self.encode_queued(input.get_mut(used..).unwrap_or_default(), kept);
                    return (used, Err(io::Error::new(io::ErrorKind::InvalidData, error)));
                }
            }
        }
    }

    /// Has the session process `input` until it asks for something, and does that. Gives how many bytes of
    /// `input` it is done with.
    fn step(
        &mut self,
        input: &mut [u8],
        wish: &mut Wish<'_>,
        buf: &mut ReadBuf<'_>,
        kept: &mut Kept,
    ) -> (usize, Result<io::Result<Step>, rustls::Error>) {
        match self {
            Self::Server(session) => {
                let UnbufferedStatus { discard, state } = session.process_tls_records(input);
                (discard, state.map(|state| carry_out(state, wish, buf, kept)))
            }
            Self::Client(session) => {
                let UnbufferedStatus { discard, state } = session.process_tls_records(input);
                (discard, state.map(|state| carry_out(state, wish, buf, kept)))
            }
        }
    }

    /// Encodes the records that a failed session has queued for the peer: the alert, and before it, in TLS 1.3,
    /// the ServerHello without which the peer cannot decrypt the alert. The session gives one record a call; a
    /// call without a queued record would process more input, which a failed session must not do.
    fn encode_queued(&mut self, mut input: &mut [u8], kept: &mut Kept) {
        while self.common().wants_write() {
            let (discard, step) = self.step(input, &mut Wish::None, &mut nowhere(), kept);
            if !matches!(step, Ok(Ok(Step::Again))) {
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

/// Does what a session asks for.
fn carry_out<Side>(
    state: ConnectionState<'_, '_, Side>,
    wish: &mut Wish<'_>,
    buf: &mut ReadBuf<'_>,
    kept: &mut Kept,
) -> io::Result<Step> {
    match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                kept.put(record.map_err(io::Error::other)?.payload, buf);
            }
            Ok(Step::Again)
        }
        ConnectionState::EncodeTlsData(mut data) => {
            let encoded = append(&mut kept.unsent, |room| match data.encode(room) {
                Err(EncodeError::InsufficientSize(error)) => Err(error),
                other => Ok(other),
            });
            encoded.map_err(io::Error::other)?;
            Ok(Step::Again)
        }
        // What was encoded goes before all that follows.
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(Step::Again)
        }
        ConnectionState::PeerClosed => {
            kept.ended = true;
            Ok(Step::Again)
        }
        ConnectionState::WriteTraffic(mut traffic) => match wish {
            Wish::None => Ok(Step::Done(0)),
            Wish::Encrypt(plain, room) => {
                traffic.encrypt(plain, room).map(Step::Done).map_err(io::Error::other)
            }
            Wish::Close => {
                let closed =
                    append(&mut kept.unsent, |room| match traffic.queue_close_notify(room) {
                        Err(EncryptError::InsufficientSize(error)) => Err(error),
                        other => Ok(other),
                    });
                closed.map_err(io::Error::other)?;
                Ok(Step::Done(0))
            }
        },
        ConnectionState::BlockedHandshake | ConnectionState::Closed => Ok(Step::Done(0)),
        // Early data is never agreed to, and there is no other state yet.
        other => Err(io::Error::other(format!("not agreed to: {other:?}"))),
    }
}

/// Appends what `write` has to write, which it says the size of when there is no room for it.
fn append<E>(
    out: &mut BytesMut,
    mut write: impl FnMut(&mut [u8]) -> Result<Result<usize, E>, InsufficientSizeError>,
) -> Result<(), E> {
    let before = out.len();
    let mut room = 0;
    loop {
        out.resize(before + room, 0);
        match write(out.get_mut(before..).unwrap_or_default()) {
            Ok(written) => {
                let result = written.map(|written| out.truncate(before + written));
                return result;
            }
            Err(InsufficientSizeError { required_size }) => room = required_size,
        }
    }
}

impl Kept {
    /// Gives plain bytes to the reader, and keeps what it has no place for.
    fn put(&mut self, plain: &[u8], buf: &mut ReadBuf<'_>) {
        let here = if self.plain.is_empty() { plain.len().min(buf.remaining()) } else { 0 };
        let (first, rest) = plain.split_at(here);
        buf.put_slice(first);
        self.plain.extend_from_slice(rest);
    }

    /// Gives the reader what was kept for it.
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
            if !this.kept.plain.is_empty() {
                this.kept.take(buf);
            } else if this.kept.ended {
                break;
            } else if let Poll::Ready(received) = this.poll_receive(cx, buf) {
                received?;
            } else {
                // The peer may wait for it before it says more.
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
        if this.kept.unsent.len() > LITTLE_BYTES {
            ready!(this.poll_send(cx))?;
        }
        let plain = plain.get(..WRITE_BYTES).unwrap_or(plain);
        let encrypted = SCRATCH.with_borrow_mut(|scratch| {
            let encrypted = this.act(Wish::Encrypt(plain, scratch))?;
            // What the session itself had to say goes first.
            let mut records = scratch.get(..encrypted).unwrap_or_default();
            if this.kept.unsent.is_empty()
                && let Poll::Ready(sent) = Pin::new(&mut this.tcp).poll_write(cx, records)
            {
                records = records.get(sent?..).unwrap_or_default();
            }
            this.kept.unsent.extend_from_slice(records);
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
            this.act(Wish::Close)?;
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

/// A reader's buffer where nothing is read.
fn nowhere() -> ReadBuf<'static> {
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
    use weft_certs::tls::{self, ClientAuthentication, Identity};
    use weft_certs::{Authority, TrustStore};

    use super::*;

    const AT_ONCE: usize = usize::MAX;

    struct Sides {
        server: Arc<ServerConfig>,
        client: Arc<ClientConfig>,
        /// A client that has no certificate.
        anonymous: Arc<ClientConfig>,
    }

    fn sides() -> Sides {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(UnixTime::now().as_secs());
        let files = Authority::create("mesh.test", now).unwrap();
        let authority = Authority::load(files, "mesh.test").unwrap();
        let id = weft_model::SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").unwrap();
        let pending = request::make(&id).unwrap();
        let asked = CheckedRequest::parse(&pending.request_pem).unwrap();
        let issued = authority.issue(&asked, Duration::from_secs(3600), now).unwrap();
        let own = Identity::load(issued.chain.concat().as_bytes(), pending.key_pem.as_bytes());
        let own = own.unwrap();
        let roots = authority.trust_bundle().as_bytes();
        let trust = TrustStore::load(roots, None, Vec::new(), None, UnixTime::now()).unwrap();
        let trust = Arc::new(trust);
        let client = |identity| {
            let names = vec![weft_model::StringMatch::Exact(id.to_string())];
            tls::client(identity, trust.clone(), names, &[]).unwrap()
        };
        let clients = ClientAuthentication::Required(trust.clone(), Vec::new());
        Sides {
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

    /// A connection whose bytes arrive in pieces of at most `size`, in both directions.
    async fn in_pieces(size: usize) -> (TcpStream, TcpStream) {
        let ((near, left), (right, far)) = (tcp().await, tcp().await);
        if size == AT_ONCE {
            return tcp().await;
        }
        let (left, right) = (left.into_split(), right.into_split());
        for (mut from, mut to) in [(left.0, right.1), (right.0, left.1)] {
            tokio::spawn(async move {
                let mut piece = vec![0; size];
                while let Ok(more @ 1..) = from.read(&mut piece).await {
                    to.write_all(&piece[..more]).await.unwrap();
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
        let TlsStream { received, kept, .. } = stream;
        received.capacity() + kept.plain.capacity() + kept.unsent.capacity() == 0
    }

    /// Sends and receives `bytes` at once: the other side sends them back.
    async fn converse(stream: TlsStream, bytes: &[u8]) -> TlsStream {
        let (mut read, mut write) = split(stream);
        let sending = async {
            write.write_all(bytes).await.unwrap();
            write.flush().await.unwrap();
        };
        let mut came = vec![0; bytes.len()];
        let (_, received) = tokio::join!(sending, read.read_exact(&mut came));
        received.unwrap();
        assert!(came == bytes, "what came back differs");
        read.unsplit(write)
    }

    async fn echo(stream: impl AsyncRead + AsyncWrite) {
        let (mut read, mut write) = split(stream);
        tokio::io::copy(&mut read, &mut write).await.unwrap();
        write.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn bytes_arrive_whole_however_they_are_cut() {
        let sides = sides();
        let bytes: Vec<u8> =
            (0..150_000_u32).map(|n| n.to_le_bytes()[usize::from(n % 7 == 0)]).collect();
        for size in [1, 4, 5, 6, 23, 1000, 16_384, 16_406, 40_000, AT_ONCE] {
            let bytes = if size < 100 { &bytes[..20_000] } else { &bytes[..] };
            let (near, far) = in_pieces(size).await;
            let connector = TlsConnector::from(sides.client.clone());
            let other = tokio::spawn(async move {
                echo(connector.connect(server_name(), far).await.unwrap()).await;
            });
            let stream = *TlsStream::accept(sides.server.clone(), near).await.unwrap();
            let mut stream = converse(stream, bytes).await;
            assert!(owns_no_buffer(&stream), "after pieces of {size}");
            stream.shutdown().await.unwrap();
            assert_eq!(stream.read(&mut [0; 9]).await.unwrap(), 0, "it ends well");
            other.await.unwrap();

            let (near, far) = in_pieces(size).await;
            // Small records, and words of the server's own between them.
            let mut server = ServerConfig::clone(&sides.server);
            (server.max_fragment_size, server.send_tls13_tickets) = (Some(64), 3);
            let acceptor = TlsAcceptor::from(Arc::new(server));
            let other = tokio::spawn(async move {
                echo(acceptor.accept(far).await.unwrap()).await;
            });
            let stream = TlsStream::connect(sides.client.clone(), server_name(), near).await;
            let mut stream = converse(*stream.unwrap(), bytes).await;
            assert!(owns_no_buffer(&stream), "after pieces of {size}");
            stream.shutdown().await.unwrap();
            assert_eq!(stream.read(&mut [0; 9]).await.unwrap(), 0, "it ends well");
            other.await.unwrap();
        }
    }

    async fn pair(sides: &Sides) -> (TlsStream, tokio_rustls::client::TlsStream<TcpStream>) {
        let (near, far) = tcp().await;
        let connector = TlsConnector::from(sides.client.clone());
        let (ours, theirs) = tokio::join!(
            TlsStream::accept(sides.server.clone(), near),
            connector.connect(server_name(), far)
        );
        (*ours.unwrap(), theirs.unwrap())
    }

    #[tokio::test]
    async fn an_end_without_a_word_is_an_error() {
        let sides = sides();
        let (mut ours, mut theirs) = pair(&sides).await;
        theirs.write_all(b"all of it?").await.unwrap();
        theirs.get_mut().0.shutdown().await.unwrap();
        assert_eq!(ours.read(&mut [0; 99]).await.unwrap(), 10);
        let error = ours.read(&mut [0; 99]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn one_side_may_end_before_the_other() {
        let sides = sides();
        let (mut ours, mut theirs) = pair(&sides).await;
        theirs.shutdown().await.unwrap();
        assert_eq!(ours.read(&mut [0; 9]).await.unwrap(), 0);
        ours.write_all(b"and yet").await.unwrap();
        ours.shutdown().await.unwrap();
        assert!(ours.write_all(b"no more").await.is_err());
        let mut came = Vec::new();
        theirs.read_to_end(&mut came).await.unwrap();
        assert_eq!(came, b"and yet");
    }

    #[tokio::test]
    async fn new_keys_are_followed_both_ways() {
        let sides = sides();
        let (mut ours, mut theirs) = pair(&sides).await;
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
    async fn who_takes_nothing_stops_the_writer() {
        let sides = sides();
        let (mut ours, mut theirs) = pair(&sides).await;
        let piece = [7; 100_000];
        let mut taken = 0;
        // The sockets hold some megabytes.
        while let Ok(more) =
            tokio::time::timeout(Duration::from_millis(200), ours.write(&piece)).await
        {
            taken += more.unwrap();
            assert!(taken < 100_000_000, "somebody holds it all");
        }
        assert!(ours.kept.unsent.len() <= SCRATCH_BYTES);
        let rest = async {
            let mut came = vec![0; taken];
            theirs.read_exact(&mut came).await.unwrap();
            assert!(came.iter().all(|byte| *byte == 7));
        };
        let (flushed, ()) = tokio::join!(ours.flush(), rest);
        flushed.unwrap();
        assert!(owns_no_buffer(&ours));
    }

    #[tokio::test]
    async fn everything_may_come_with_the_end_of_the_handshake() {
        let sides = sides();
        let (near, far) = tcp().await;
        let connector = TlsConnector::from(sides.client.clone());
        // What the client sends waits until it has sent all.
        let (mut held, far) = (far, tcp().await);
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
            held.write_all(&hello[..first]).await.unwrap();
            let mut answer = vec![0; 65_536];
            let told = held.read(&mut answer).await.unwrap();
            theirs.write_all(&answer[..told]).await.unwrap();
            let mut rest = Vec::new();
            theirs.read_to_end(&mut rest).await.unwrap();
            held.write_all(&rest).await.unwrap();
            held
        };
        let accepting = TlsStream::accept(sides.server.clone(), near);
        let (ours, _client, _held) = tokio::join!(accepting, client, between);
        let mut came = Vec::new();
        ours.unwrap().read_to_end(&mut came).await.unwrap();
        assert_eq!(came, b"all of it");
    }

    #[tokio::test]
    async fn a_reader_does_not_take_the_place_of_the_writer() {
        let sides = sides();
        let (ours, mut theirs) = pair(&sides).await;
        let (mut read, mut write) = split(ours);
        let piece = vec![7; 10_000_000];
        let writing = tokio::spawn(async move {
            write.write_all(&piece).await.unwrap();
            write.flush().await.unwrap();
        });
        // It is stuck when a byte comes, and who takes that in does not wait for more.
        theirs.write_all(b"!").await.unwrap();
        let mut byte = [0];
        while read.read(&mut byte).now_or_never().is_none() {
            tokio::task::yield_now().await;
        }
        let taking = async {
            let mut came = vec![0; 10_000_000];
            theirs.read_exact(&mut came).await.unwrap();
        };
        let both = tokio::time::timeout(Duration::from_secs(10), async {
            tokio::join!(taking, writing).1.unwrap();
        });
        both.await.expect("the writer is woken");
    }

    #[tokio::test]
    async fn who_is_refused_is_told_why() {
        let sides = sides();
        let (near, far) = tcp().await;
        let connector = TlsConnector::from(sides.anonymous.clone());
        let other = async {
            // With TLS 1.3 the client learns it with its first read.
            let mut stream = connector.connect(server_name(), far).await?;
            stream.read_u8().await
        };
        let (ours, theirs) = tokio::join!(TlsStream::accept(sides.server.clone(), near), other);
        assert!(
            ours.unwrap_err().error.to_string().contains("no certificate"),
            "the reason is named"
        );
        let told = theirs.unwrap_err().to_string();
        assert!(told.contains("CertificateRequired"), "{told}");
    }

    #[tokio::test]
    async fn client_without_a_common_application_protocol_receives_the_alert() {
        let sides = sides();
        let mut server = ServerConfig::clone(&sides.server);
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let mut client = ClientConfig::clone(&sides.client);
        client.alpn_protocols = vec![b"foo".to_vec()];
        let (near, far) = tcp().await;
        let connector = TlsConnector::from(Arc::new(client));
        let connecting = connector.connect(server_name(), far);
        let (ours, theirs) = tokio::join!(TlsStream::accept(Arc::new(server), near), connecting);
        let ours = ours.unwrap_err().error.to_string();
        assert!(ours.contains("known protocol"), "{ours}");
        let theirs = theirs.unwrap_err().to_string();
        assert!(theirs.contains("NoApplicationProtocol"), "{theirs}");
    }

    #[tokio::test]
    async fn refused_client_that_sends_more_reads_the_alert_and_no_reset() {
        let sides = sides();
        let (near, far) = tcp().await;
        let connector = TlsConnector::from(sides.anonymous.clone());
        let client = async {
            let mut stream = connector.connect(server_name(), far).await.unwrap();
            // More than the server takes with the client's last message of the handshake.
            stream.write_all(&[7; 300_000]).await.unwrap();
            let alert = stream.read_u8().await.unwrap_err().to_string();
            (alert, stream.get_mut().0.read(&mut [0]).await)
        };
        let server = async {
            // The refusal comes when all of it has arrived.
            let refused = TlsStream::accept(sides.server.clone(), near).await.unwrap_err();
            refused.close().await;
        };
        let ((alert, end), ()) = tokio::join!(client, server);
        assert!(alert.contains("CertificateRequired"), "{alert}");
        assert_eq!(end.unwrap(), 0, "the connection ends without a reset");
    }

    #[tokio::test]
    async fn what_is_no_tls_is_an_error() {
        let sides = sides();
        for (name, bytes) in [
            ("text", &b"GET / HTTP/1.1\r\n\r\n"[..]),
            ("a record that is too long", b"\x16\x03\x01\xff\xff"),
            ("an alert", b"\x15\x03\x03\x00\x02\x02\x28"),
            ("nothing", b""),
        ] {
            let (near, mut far) = tcp().await;
            far.write_all(bytes).await.unwrap();
            far.shutdown().await.unwrap();
            assert!(TlsStream::accept(sides.server.clone(), near).await.is_err(), "{name}");
        }
    }
}
