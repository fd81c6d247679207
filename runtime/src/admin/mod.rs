//! The admin, metrics and readiness ports: read-only reports, and the few POST requests that change the
//! process.
//!
//! The ports run on a thread of their own, so they and the data plane cannot slow each other. Slow reports
//! are made on blocking threads, and slow clients cannot block a port: see `connections`.

mod access;
mod connections;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::drain::{Drain, Phase};
use crate::log::LogLevel;
use crate::metrics::{MetricsFormat, MetricsPage};

/// The most configuration dumps in memory at once: one can be tens of MiB.
const DUMP_LIMIT: usize = 4;
/// Threads that make metrics pages and dumps. There are more than dumps, so that dumps never delay metrics.
const BLOCKING_THREADS: usize = DUMP_LIMIT + 2;

/// What a role reports on its admin port.
pub trait AdminRole: Send + Sync + 'static {
    /// Checks whether the role can serve.
    ///
    /// # Errors
    /// What the role waits for.
    fn ready(&self) -> Result<(), String>;

    /// Adds the role's metrics to a page.
    fn metrics(&self, page: &mut MetricsPage<'_>);

    /// The configuration in force, without secrets.
    fn config_dump(&self) -> serde_json::Value;

    /// Where a flow would go, for roles that carry flows.
    ///
    /// # Errors
    /// An invalid query, a flow that no listener serves, or a role that carries no flows.
    fn explain(&self, _query: &str) -> Result<serde_json::Value, String> {
        Err("this role carries no flows".into())
    }
}

/// The addresses of the admin ports of a process, and their access rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdminConfig {
    /// The address of the admin port, which serves every path; `None` disables it.
    pub admin: Option<SocketAddr>,
    /// The address of a port that serves `/metrics` only.
    pub metrics: Option<SocketAddr>,
    /// The address of a port that serves `/ready` and `/live` only.
    pub readiness: Option<SocketAddr>,
    /// Whether an admin port that is not on loopback accepts POST requests.
    pub allows_remote_post: bool,
    /// Host names accepted in `Host`, besides IP addresses and `localhost`.
    pub host_names: Vec<String>,
}

/// The parts of a process that the ports report and change.
pub struct Admin {
    /// The role that the ports report on.
    pub role: Arc<dyn AdminRole>,
    /// What `POST /drain` starts.
    pub drain: Drain,
    /// What `/logging` reads and sets.
    pub log: LogLevel,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Admin")
    }
}

const HELP: &str = "weft admin\n\
GET  /ready           200 when this process can serve, 503 with the reason when it cannot\n\
GET  /live            200 while this process runs\n\
GET  /metrics         metrics in Prometheus text format\n\
GET  /config_dump     the configuration in force, JSON, without secrets\n\
GET  /flow?transport=tcp&client=A:P&destination=A:P  where a flow would go (agent)\n\
GET  /logging         the log filter\n\
POST /logging?level=F set the log filter, such as debug or weft_xds=trace,info\n\
POST /drain           accept no new connections, let open ones finish, then exit\n";

/// Which paths a port serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PortScope {
    All,
    Metrics,
    Readiness,
}

impl PortScope {
    fn serves(self, path: &str) -> bool {
        match self {
            Self::All => true,
            Self::Metrics => path == "/metrics",
            Self::Readiness => path == "/ready" || path == "/live",
        }
    }
}

struct AdminPort {
    scope: PortScope,
    access: access::AdminAccess,
    admin: Arc<Admin>,
    dumps: Arc<Semaphore>,
}

/// Binds the ports and serves them on a thread of their own until the process ends.
///
/// # Errors
/// When an address cannot be bound, or the runtime or its thread cannot be started.
pub fn start(ports: &AdminConfig, admin: Admin) -> io::Result<()> {
    let admin = Arc::new(admin);
    let dumps = Arc::new(Semaphore::new(DUMP_LIMIT));
    let mut listeners = Vec::new();
    for (scope, name, address) in [
        (PortScope::All, "admin", ports.admin),
        (PortScope::Metrics, "metrics", ports.metrics),
        (PortScope::Readiness, "readiness", ports.readiness),
    ] {
        let Some(address) = address else { continue };
        let describe = |error: io::Error| {
            io::Error::new(error.kind(), format!("{name} address {address}: {error}"))
        };
        let listener = std::net::TcpListener::bind(address).map_err(describe)?;
        listener.set_nonblocking(true)?;
        let bound = listener.local_addr()?;
        tracing::info!(%bound, "{name} port listening");
        let allows_post = bound.ip().is_loopback() || ports.allows_remote_post;
        let access = access::AdminAccess { allows_post, host_names: ports.host_names.clone() };
        let port = AdminPort { scope, access, admin: admin.clone(), dumps: dumps.clone() };
        listeners.push((listener, Arc::new(port)));
    }
    if listeners.is_empty() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()?;
    std::thread::Builder::new()
        .name("admin".into())
        .spawn(move || runtime.block_on(serve_all(listeners)))?;
    Ok(())
}

async fn serve_all(listeners: Vec<(std::net::TcpListener, Arc<AdminPort>)>) {
    let mut tasks = tokio::task::JoinSet::new();
    for (listener, port) in listeners {
        let answer = move |request| respond(port.clone(), request);
        tasks.spawn(connections::serve(listener, answer));
    }
    while let Some(ended) = tasks.join_next().await {
        if let Ok(Err(error)) = ended {
            tracing::error!(%error, "admin port closed");
        }
    }
}

async fn respond(
    port: Arc<AdminPort>,
    request: Request<Incoming>,
) -> Result<Response<AdminBody>, Infallible> {
    let path = request.uri().path();
    if !port.scope.serves(path) {
        return Ok(text(StatusCode::NOT_FOUND, "not served on this port\n".to_owned()));
    }
    let refused = match port.scope {
        PortScope::All => port.access.check(&request).err(),
        // These ports serve nothing private and accept no POST, so a scraper may use any host name.
        PortScope::Metrics | PortScope::Readiness => None,
    };
    if let Some(refusal) = refused {
        return Ok(text(StatusCode::FORBIDDEN, format!("{refusal}\n")));
    }
    Ok(match path {
        "/metrics" if is_read(&request) => {
            let accept =
                request.headers().get(header::ACCEPT).and_then(|value| value.to_str().ok());
            metrics(&port, MetricsFormat::accepted(accept)).await
        }
        "/config_dump" if is_read(&request) => config_dump(&port.admin.role, &port.dumps).await,
        _ => respond_inline(&port.admin, &request),
    })
}

fn is_read<B>(request: &Request<B>) -> bool {
    request.method() == Method::GET || request.method() == Method::HEAD
}

async fn metrics(port: &AdminPort, format: MetricsFormat) -> Response<AdminBody> {
    let role = port.admin.role.clone();
    let encode = move || format.encode(move |page| role.metrics(page));
    match tokio::task::spawn_blocking(encode).await {
        Ok(Ok(page)) => reply(StatusCode::OK, format.content_type(), page),
        Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

async fn config_dump(role: &Arc<dyn AdminRole>, dumps: &Arc<Semaphore>) -> Response<AdminBody> {
    let Ok(permit) = dumps.clone().try_acquire_owned() else {
        let full = format!("{DUMP_LIMIT} configuration dumps are in progress: retry later\n");
        return text(StatusCode::SERVICE_UNAVAILABLE, full);
    };
    let role = role.clone();
    // The thread keeps the permit until the dump is made, also when the client has disconnected.
    let make = move || (format!("{:#}\n", role.config_dump()), permit);
    match tokio::task::spawn_blocking(make).await {
        Ok((dump, permit)) => {
            let mut answer = reply(StatusCode::OK, "application/json", dump);
            answer.body_mut().permit = Some(permit);
            answer
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn respond_inline<B>(admin: &Admin, request: &Request<B>) -> Response<AdminBody> {
    let get = is_read(request);
    let post = request.method() == Method::POST;
    match request.uri().path() {
        "/" if get => text(StatusCode::OK, HELP.to_owned()),
        "/live" if get => text(StatusCode::OK, "live\n".to_owned()),
        "/ready" if get => match ready(admin) {
            Ok(()) => text(StatusCode::OK, "ready\n".to_owned()),
            Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        },
        "/flow" if get => match admin.role.explain(request.uri().query().unwrap_or_default()) {
            Ok(flow) => reply(StatusCode::OK, "application/json", format!("{flow:#}\n")),
            Err(reason) => text(StatusCode::BAD_REQUEST, format!("{reason}\n")),
        },
        "/logging" if get => text(StatusCode::OK, format!("{}\n", admin.log.get())),
        "/logging" if post => set_level(admin, request.uri().query()),
        "/drain" if post => {
            admin.drain.begin();
            text(StatusCode::ACCEPTED, "draining\n".to_owned())
        }
        "/" | "/live" | "/ready" | "/metrics" | "/config_dump" | "/flow" | "/logging"
        | "/drain" => text(StatusCode::METHOD_NOT_ALLOWED, HELP.to_owned()),
        _ => text(StatusCode::NOT_FOUND, HELP.to_owned()),
    }
}

fn ready(admin: &Admin) -> Result<(), String> {
    match admin.drain.phase() {
        Phase::Running => admin.role.ready(),
        Phase::Draining | Phase::Ended => Err("draining".into()),
    }
}

fn set_level(admin: &Admin, query: Option<&str>) -> Response<AdminBody> {
    let level =
        query.and_then(|query| query.split('&').find_map(|pair| pair.strip_prefix("level=")));
    let Some(level) = level else {
        let missing = "missing parameter level, such as /logging?level=debug\n";
        return text(StatusCode::BAD_REQUEST, missing.to_owned());
    };
    match admin.log.set(level) {
        Ok(()) => text(StatusCode::OK, format!("{}\n", admin.log.get())),
        Err(reason) => text(StatusCode::BAD_REQUEST, format!("{reason}\n")),
    }
}

fn text(status: StatusCode, body: String) -> Response<AdminBody> {
    reply(status, "text/plain; charset=utf-8", body)
}

fn reply(status: StatusCode, kind: &'static str, body: String) -> Response<AdminBody> {
    let body = AdminBody { body: Full::new(Bytes::from(body)), permit: None };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}

/// The body of a response. The body of a dump holds its permit, so a dump counts as long as it is in memory.
#[derive(Debug)]
struct AdminBody {
    body: Full<Bytes>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Body for AdminBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// A role whose dumps block until the test releases them.
    struct SlowRole(Mutex<Receiver<()>>);

    impl AdminRole for SlowRole {
        fn ready(&self) -> Result<(), String> {
            Ok(())
        }

        fn metrics(&self, _page: &mut MetricsPage<'_>) {}

        fn config_dump(&self) -> serde_json::Value {
            // An error means that the test has dropped the sender.
            let _ = self.0.lock().expect("no test panics while it holds the lock").recv();
            serde_json::Value::Null
        }
    }

    fn slow() -> (Sender<()>, Arc<dyn AdminRole>) {
        let (end, ended) = channel();
        (end, Arc::new(SlowRole(Mutex::new(ended))))
    }

    #[tokio::test]
    async fn dump_of_a_disconnected_client_counts_until_it_is_made() {
        let (end, role) = slow();
        let dumps = Arc::new(Semaphore::new(DUMP_LIMIT));
        let mut context = Context::from_waker(std::task::Waker::noop());
        for _ in 0..DUMP_LIMIT {
            let mut dump = Box::pin(config_dump(&role, &dumps));
            assert!(dump.as_mut().poll(&mut context).is_pending());
        }
        let refused = config_dump(&role, &dumps).await;
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        (0..=DUMP_LIMIT).for_each(|_| end.send(()).expect("the role holds the receiver"));
        let permit = dumps.acquire().await.expect("the semaphore is never closed");
        drop(permit);
        assert_eq!(config_dump(&role, &dumps).await.status(), StatusCode::OK);
    }
}
