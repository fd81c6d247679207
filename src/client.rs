//! An HTTP/1.1 client, plain or with mutual TLS, for admin ports and the demo.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

const TIMEOUT: Duration = Duration::from_secs(10);

trait ClientIo: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ClientIo for T {}

/// A connection to a service.
pub(crate) struct HttpClient {
    sender: SendRequest<Empty<Bytes>>,
    authority: String,
    connection: tokio::task::JoinHandle<()>,
}

/// A response with its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HttpResponse {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl HttpClient {
    /// Connects, with TLS when there is a configuration for it.
    pub(crate) async fn connect(
        target: SocketAddr,
        tls: Option<Arc<ClientConfig>>,
    ) -> Result<Self, String> {
        tokio::time::timeout(TIMEOUT, Self::open(target, tls))
            .await
            .map_err(|_| format!("{target} did not answer within {TIMEOUT:?}"))?
    }

    async fn open(target: SocketAddr, tls: Option<Arc<ClientConfig>>) -> Result<Self, String> {
        let tcp = TcpStream::connect(target).await.map_err(|error| format!("{target}: {error}"))?;
        tcp.set_nodelay(true).map_err(|error| error.to_string())?;
        let io: Box<dyn ClientIo> = match tls {
            None => Box::new(tcp),
            Some(config) => {
                let name = ServerName::IpAddress(target.ip().into());
                let connector = tokio_rustls::TlsConnector::from(config);
                Box::new(connector.connect(name, tcp).await.map_err(|error| error.to_string())?)
            }
        };
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io))
            .await
            .map_err(|error| error.to_string())?;
        // Only the end of the connection matters, not its result.
        let connection = tokio::spawn(async { drop(connection.await) });
        Ok(Self { sender, authority: target.to_string(), connection })
    }

    /// Sends a GET request for a path, with an optional bearer token.
    pub(crate) async fn get(
        &mut self,
        path: &str,
        token: Option<&str>,
    ) -> Result<HttpResponse, String> {
        let mut request = Request::get(path).header("host", &self.authority);
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(Empty::new()).map_err(|error| error.to_string())?;
        let exchange = async {
            self.sender.ready().await.map_err(|error| explain(&error))?;
            let response =
                self.sender.send_request(request).await.map_err(|error| explain(&error))?;
            let status = response.status().as_u16();
            let body =
                response.into_body().collect().await.map_err(|error| explain(&error))?.to_bytes();
            Ok(HttpResponse { status, body: String::from_utf8_lossy(&body).into_owned() })
        };
        tokio::time::timeout(TIMEOUT, exchange)
            .await
            .map_err(|_| format!("no answer within {TIMEOUT:?}"))?
    }
}

impl HttpClient {
    /// Waits until the server closes the connection.
    ///
    /// # Errors
    /// The connection is still open after [`TIMEOUT`].
    pub(crate) async fn ended(self) -> Result<(), String> {
        let kept = self.sender;
        let ended = tokio::time::timeout(TIMEOUT, self.connection).await;
        drop(kept);
        ended.map(drop).map_err(|_| format!("connection still open after {TIMEOUT:?}"))
    }
}

/// The cause of a hyper error, which is its source.
fn explain(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// Connects and sends one GET request.
pub(crate) async fn get(
    target: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
    path: &str,
    token: Option<&str>,
) -> Result<HttpResponse, String> {
    HttpClient::connect(target, tls).await?.get(path, token).await
}

fn admin() -> SocketAddr {
    ([127, 0, 0, 1], 15000).into()
}

/// Whether the process on this host is ready.
pub(crate) async fn is_ready() -> bool {
    get(admin(), None, "/ready", None).await.is_ok_and(|answer| answer.status == 200)
}

/// The config dump of the process on this host.
pub(crate) async fn config_dump() -> Result<serde_json::Value, String> {
    let answer = get(admin(), None, "/config_dump", None).await?;
    serde_json::from_str(&answer.body).map_err(|error| error.to_string())
}

/// The explanation of the agent on this host for a new flow.
pub(crate) async fn explain_flow(
    transport: &str,
    client: SocketAddr,
    destination: SocketAddr,
) -> Result<serde_json::Value, String> {
    let path = format!("/flow?transport={transport}&client={client}&destination={destination}");
    let answer = get(admin(), None, &path, None).await?;
    serde_json::from_str(&answer.body).map_err(|error| error.to_string())
}

/// The metrics of the process on this host.
pub(crate) async fn metrics() -> Result<String, String> {
    get(admin(), None, "/metrics", None).await.map(|answer| answer.body)
}
