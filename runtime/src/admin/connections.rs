//! The client connections of an admin port, at most [`CONNECTION_LIMIT`]. When the limit is reached, the
//! connection that has been idle longest is closed in favour of the new one, so slow clients cannot block the
//! port.

use crate::clock::now;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response};
use hyper::body::{Body, Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::Sleep;

/// The most connections of one port.
const CONNECTION_LIMIT: usize = 64;
/// The timeout for a request head, which is also the idle timeout between requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The timeout for a client that reads nothing of a response.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// The lifetime of a connection, active or not.
const LIFETIME: Duration = Duration::from_secs(60);
/// The most requests of one connection, pipelined or not.
const REQUEST_LIMIT: usize = 100;

/// Accepts and serves connections of a listener until the process ends.
pub(super) async fn serve<A, F, B>(listener: std::net::TcpListener, answer: A) -> io::Result<()>
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Response<B>, Infallible>> + Send + 'static,
    B: Body<Data = Bytes, Error = Infallible> + Send + 'static,
{
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let registry = Arc::new(Mutex::new(ConnectionTable::default()));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let number = lock(&registry).admit();
        let task = {
            let registry = registry.clone();
            let answer = answer.clone();
            let leave = DeregisterOnDrop { registry: registry.clone(), number };
            tokio::spawn(async move {
                let _leave = leave;
                serve_connection(stream, number, &registry, answer).await;
            })
        };
        lock(&registry).insert(number, task.abort_handle(), now());
    }
}

async fn serve_connection<A, F, B>(
    stream: TcpStream,
    number: u64,
    registry: &Arc<Mutex<ConnectionTable>>,
    answer: A,
) where
    A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Response<B>, Infallible>> + Send + 'static,
    B: Body<Data = Bytes, Error = Infallible> + Send + 'static,
{
    let requests = AtomicUsize::new(0);
    let service = service_fn(|request| {
        lock(registry).touch(number, now());
        let is_last = requests.fetch_add(1, Ordering::Relaxed) + 1 >= REQUEST_LIMIT;
        let answered = answer(request);
        async move {
            let mut answered = answered.await?;
            if is_last {
                answered.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(answered)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(TimedWrites::new(stream)), service);
    match tokio::time::timeout(LIFETIME, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "admin connection failed"),
        Err(_) => tracing::debug!("admin connection reached its lifetime"),
    }
}

/// The open connections of a port.
#[derive(Debug, Default)]
struct ConnectionTable {
    last: u64,
    open: BTreeMap<u64, AdminConnection>,
}

#[derive(Debug)]
struct AdminConnection {
    task: AbortHandle,
    /// When the connection was accepted or sent its last request.
    active: Instant,
}

impl ConnectionTable {
    /// Reserves the number of a new connection. When the table is full, aborts the connection that has been
    /// idle longest.
    fn admit(&mut self) -> u64 {
        while self.open.len() >= CONNECTION_LIMIT {
            let oldest =
                self.open.iter().min_by_key(|(number, connection)| (connection.active, **number));
            let Some(number) = oldest.map(|(number, _)| *number) else { break };
            if let Some(connection) = self.open.remove(&number) {
                connection.task.abort();
            }
        }
        self.last += 1;
        self.last
    }

    fn insert(&mut self, number: u64, task: AbortHandle, now: Instant) {
        if !task.is_finished() {
            self.open.insert(number, AdminConnection { task, active: now });
        }
    }

    fn touch(&mut self, number: u64, now: Instant) {
        if let Some(connection) = self.open.get_mut(&number) {
            connection.active = now;
        }
    }
}

fn lock(registry: &Mutex<ConnectionTable>) -> std::sync::MutexGuard<'_, ConnectionTable> {
    registry.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes a connection from the table when its task ends, also when the task is aborted.
struct DeregisterOnDrop {
    registry: Arc<Mutex<ConnectionTable>>,
    number: u64,
}

impl Drop for DeregisterOnDrop {
    fn drop(&mut self) {
        lock(&self.registry).open.remove(&self.number);
    }
}

/// A stream whose writes fail when the peer has accepted no bytes for [`WRITE_TIMEOUT`].
struct TimedWrites {
    stream: TcpStream,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl TimedWrites {
    fn new(stream: TcpStream) -> Self {
        Self { stream, stalled: None }
    }

    fn timed<T>(
        &mut self,
        context: &mut Context<'_>,
        poll: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.stalled = None;
            return poll;
        }
        let stalled =
            self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(WRITE_TIMEOUT)));
        stalled.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for TimedWrites {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for TimedWrites {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.timed(context, poll)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(context);
        self.timed(context, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
