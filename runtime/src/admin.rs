//! The admin port: readiness, metrics, what is in force, draining, and the log level.
//!
//! It listens on loopback and runs on a thread of its own, so that neither can slow the other.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};

use crate::drain::{Drain, Phase};
use crate::log::LogLevel;

/// How many admin connections there may be at once.
const CONNECTION_LIMIT: usize = 64;

/// What a role tells of itself.
pub trait Role: Send + Sync + 'static {
    /// Whether it can serve; otherwise what it waits for.
    ///
    /// # Errors
    /// What it waits for.
    fn ready(&self) -> Result<(), String>;

    /// Its metrics in Prometheus' text format.
    fn metrics(&self) -> String;

    /// What is in force, without any secret.
    fn config_dump(&self) -> serde_json::Value;

    /// Where a flow would go, for roles that carry flows.
    ///
    /// # Errors
    /// What is wrong with the query, or why the flow would go nowhere.
    fn explain(&self, _query: &str) -> Result<serde_json::Value, String> {
        Err("this role carries no flows".into())
    }
}

/// The admin port of a process.
pub struct Admin {
    /// What it tells of.
    pub role: Arc<dyn Role>,
    /// What `/drain` drains.
    pub drain: Drain,
    /// What `/logging` changes.
    pub log: LogLevel,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Admin")
    }
}

const HELP: &str = "weft admin\n\
GET  /ready           200 when this process can serve, 503 with what it waits for\n\
GET  /live            200 while this process runs\n\
GET  /metrics         Prometheus text\n\
GET  /config_dump     what is in force, JSON, without secrets\n\
GET  /flow?transport=tcp&client=A:P&destination=A:P  where a flow would go (agent)\n\
GET  /logging         the log filter\n\
POST /logging?level=F set the log filter, such as debug or weft_xds=trace,info\n\
POST /drain           take nothing new, let the old finish, end\n";

/// Serves the admin port on a thread of its own, for as long as the process lives.
///
/// # Errors
/// When the address is taken.
pub fn start(address: SocketAddr, admin: Admin) -> io::Result<SocketAddr> {
    let listener = std::net::TcpListener::bind(address).map_err(|error| {
        io::Error::new(error.kind(), format!("admin address {address}: {error}"))
    })?;
    listener.set_nonblocking(true)?;
    let bound = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("admin".into()).spawn(move || {
        if let Err(error) = runtime.block_on(serve(listener, Arc::new(admin))) {
            tracing::error!(%error, "the admin port is gone");
        }
    })?;
    Ok(bound)
}

async fn serve(listener: std::net::TcpListener, admin: Arc<Admin>) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let room = Arc::new(tokio::sync::Semaphore::new(CONNECTION_LIMIT));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else {
            return Ok(());
        };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let admin = admin.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| {
                std::future::ready(Ok::<_, std::convert::Infallible>(answer(&admin, &request)))
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an admin connection ended badly");
            }
            drop(permit);
        });
    }
}

fn answer(admin: &Admin, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let get = request.method() == Method::GET || request.method() == Method::HEAD;
    let post = request.method() == Method::POST;
    match request.uri().path() {
        "/" if get => reply(StatusCode::OK, TEXT, HELP.to_owned()),
        "/live" if get => reply(StatusCode::OK, TEXT, "live\n".to_owned()),
        "/ready" if get => match ready(admin) {
            Ok(()) => reply(StatusCode::OK, TEXT, "ready\n".to_owned()),
            Err(reason) => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{reason}\n")),
        },
        "/metrics" if get => {
            reply(StatusCode::OK, "text/plain; version=0.0.4", admin.role.metrics())
        }
        "/config_dump" if get => {
            reply(StatusCode::OK, "application/json", format!("{:#}\n", admin.role.config_dump()))
        }
        "/flow" if get => match admin.role.explain(request.uri().query().unwrap_or_default()) {
            Ok(told) => reply(StatusCode::OK, "application/json", format!("{told:#}\n")),
            Err(reason) => reply(StatusCode::BAD_REQUEST, TEXT, format!("{reason}\n")),
        },
        "/logging" if get => reply(StatusCode::OK, TEXT, format!("{}\n", admin.log.get())),
        "/logging" if post => set_level(admin, request.uri().query()),
        "/drain" if post => {
            admin.drain.begin();
            reply(StatusCode::ACCEPTED, TEXT, "draining\n".to_owned())
        }
        "/" | "/live" | "/ready" | "/metrics" | "/config_dump" | "/flow" | "/logging"
        | "/drain" => reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, HELP.to_owned()),
        _ => reply(StatusCode::NOT_FOUND, TEXT, HELP.to_owned()),
    }
}

fn ready(admin: &Admin) -> Result<(), String> {
    match admin.drain.phase() {
        Phase::Running => admin.role.ready(),
        Phase::Draining | Phase::Ended => Err("draining".into()),
    }
}

fn set_level(admin: &Admin, query: Option<&str>) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let level =
        query.and_then(|query| query.split('&').find_map(|pair| pair.strip_prefix("level=")));
    let Some(level) = level else {
        return reply(
            StatusCode::BAD_REQUEST,
            TEXT,
            "level is missing, such as /logging?level=debug\n".to_owned(),
        );
    };
    match admin.log.set(level) {
        Ok(()) => reply(StatusCode::OK, TEXT, format!("{}\n", admin.log.get())),
        Err(reason) => reply(StatusCode::BAD_REQUEST, TEXT, format!("{reason}\n")),
    }
}

fn reply(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}
