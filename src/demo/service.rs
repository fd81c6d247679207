//! The demo services: `web`, which calls `orders`, and `orders`. Each process also runs an echo service over TCP and UDP
//! that returns the name of its endpoint. The services are not aware of the mesh.

use std::cell::RefCell;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;

use bytes::Bytes;
use clap::Args;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::LocalSet;

use crate::command::CommandError;

/// The HTTP port of the service.
pub(super) const HTTP_PORT: u16 = 8080;
/// The TCP port of the echo service; its UDP port is the next one.
pub(super) const ECHO_PORT: u16 = 7000;
/// A second HTTP port of the service, which is not redirected to the sidecar.
pub(super) const DIRECT_PORT: u16 = 7002;

/// The options of `weft demo-service`.
#[derive(Debug, Args)]
pub struct DemoServiceArgs {
    /// Name of the service
    #[arg(long)]
    name: String,
    /// Name of this endpoint
    #[arg(long)]
    replica: String,
    /// Address of the service that it calls
    #[arg(long)]
    asks: Option<SocketAddr>,
}

/// Runs a service until the process is stopped.
///
/// # Errors
/// A port cannot be bound.
pub fn run(arguments: &DemoServiceArgs) -> Result<(), CommandError> {
    let service = Rc::new(DemoService {
        name: arguments.name.clone(),
        replica: arguments.replica.clone(),
        asks: arguments.asks.map(|target| Asker { target, idle: RefCell::default() }),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| CommandError::Failed(error.to_string()))?;
    LocalSet::new()
        .block_on(&runtime, serve(service))
        .map_err(|error| CommandError::Failed(error.to_string()))
}

#[derive(Debug)]
struct DemoService {
    name: String,
    replica: String,
    asks: Option<Asker>,
}

async fn serve(service: Rc<DemoService>) -> std::io::Result<()> {
    // Bound to the IPv6 address, a socket takes both families; the other is for hosts without IPv6.
    let any = |port| {
        [SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), (Ipv4Addr::UNSPECIFIED, port).into()]
    };
    let http = TcpListener::bind(&any(HTTP_PORT)[..]).await?;
    let direct = TcpListener::bind(&any(DIRECT_PORT)[..]).await?;
    let echo = TcpListener::bind(&any(ECHO_PORT)[..]).await?;
    let datagrams = UdpSocket::bind(&any(ECHO_PORT + 1)[..]).await?;
    tokio::try_join!(
        serve_http(http, service.clone()),
        serve_http(direct, service.clone()),
        serve_echo(echo, service.clone()),
        serve_datagrams(datagrams, service),
    )
    .map(drop)
}

async fn serve_http(listener: TcpListener, service: Rc<DemoService>) -> std::io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let service = service.clone();
        tokio::task::spawn_local(async move {
            let answer = service_fn(move |request| {
                let service = service.clone();
                async move { Ok::<_, std::convert::Infallible>(service.answer(request).await) }
            });
            // The demo ignores clients that disconnect.
            drop(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), answer)
                    .await,
            );
        });
    }
}

impl DemoService {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let header = |name: &str| {
            request.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned)
        };
        let mut said = serde_json::json!({
            "service": self.name, "replica": self.replica, "path": request.uri().path(), "peer": header("x-weft-peer"),
        });
        let mut status = StatusCode::OK;
        if let Some(asker) =
            self.asks.as_ref().filter(|_| request.uri().path().starts_with("/orders"))
        {
            match asker.ask(request.uri().path(), header("authorization").as_deref()).await {
                Ok((answered, body)) => {
                    status = answered;
                    let body =
                        serde_json::from_str(&body).unwrap_or(serde_json::Value::String(body));
                    if let serde_json::Value::Object(fields) = &mut said {
                        fields.insert("orders".into(), body);
                    }
                }
                Err(error) => {
                    status = StatusCode::BAD_GATEWAY;
                    said = serde_json::json!({ "error": error });
                }
            }
        }
        let mut response = Response::new(Full::new(Bytes::from(format!("{said}\n"))));
        *response.status_mut() = status;
        response
    }
}

/// Calls another service by its address in plain HTTP, over pooled connections.
#[derive(Debug)]
struct Asker {
    target: SocketAddr,
    idle: RefCell<Vec<SendRequest<Empty<Bytes>>>>,
}

impl Asker {
    async fn ask(
        &self,
        path: &str,
        authorization: Option<&str>,
    ) -> Result<(StatusCode, String), String> {
        let kept = self.idle.borrow_mut().pop();
        if let Some(kept) = kept
            && let Ok(answer) = self.send(kept, path, authorization).await
        {
            return Ok(answer);
        }
        // None was kept, or the one that was had been closed meanwhile.
        let fresh = self.connect().await?;
        self.send(fresh, path, authorization).await
    }

    async fn connect(&self) -> Result<SendRequest<Empty<Bytes>>, String> {
        let text = |error: &dyn std::error::Error| error.to_string();
        let stream = TcpStream::connect(self.target).await.map_err(|error| text(&error))?;
        stream.set_nodelay(true).map_err(|error| text(&error))?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| text(&error))?;
        tokio::task::spawn_local(connection);
        Ok(sender)
    }

    async fn send(
        &self,
        mut sender: SendRequest<Empty<Bytes>>,
        path: &str,
        authorization: Option<&str>,
    ) -> Result<(StatusCode, String), String> {
        let text = |error: &dyn std::error::Error| error.to_string();
        let mut request = Request::get(path).header("host", "orders");
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        let request = request.body(Empty::new()).map_err(|error| text(&error))?;
        sender.ready().await.map_err(|error| text(&error))?;
        let response = sender.send_request(request).await.map_err(|error| text(&error))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| text(&error))?.to_bytes();
        self.idle.borrow_mut().push(sender);
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }
}

/// Sends the name of the endpoint, then echoes every line with that name in front.
async fn serve_echo(listener: TcpListener, service: Rc<DemoService>) -> std::io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        let service = service.clone();
        tokio::task::spawn_local(async move {
            let (read, mut write) = stream.into_split();
            let mut lines = BufReader::new(read).lines();
            let mut said = format!("{}\n", service.replica);
            while write.write_all(said.as_bytes()).await.is_ok() {
                let Ok(Some(line)) = lines.next_line().await else {
                    return;
                };
                said = format!("{} {line}\n", service.replica);
            }
        });
    }
}

async fn serve_datagrams(socket: UdpSocket, service: Rc<DemoService>) -> std::io::Result<()> {
    let mut buffer = [0; 2048];
    loop {
        let (_, from) = socket.recv_from(&mut buffer).await?;
        socket.send_to(service.replica.as_bytes(), from).await?;
    }
}
