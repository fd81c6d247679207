//! Exchanges of a worker with endpoints on the loopback interface, which the tests script byte by byte.

mod connections;
mod responses;

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use weft_model::{Cluster, HeaderCase};
use weft_runtime::access::{OpenedSink, Writer};
use weft_runtime::drain::Drain;
use weft_runtime::metrics::WorkerMetrics;

use super::{Call, ExchangeOutcome, PinnedConnection, exchange};
use crate::authenticate::verified::VerifiedTokens;
use crate::authorize::AuthorizationInputs;
use crate::denial::Denial;
use crate::forwarded_request::ForwardedRequest;
use crate::header_mutation::HeaderChanges;
use crate::http::body::BodySource;
use crate::http::h1::{BodyFraming, BodyReader, Http1Reader, Http1Writer};
use crate::http::head::RequestHead;
use crate::http::header_filter::HeaderFilter;
use crate::plan::PlannedCluster;
use crate::plan::build::Builder;
use crate::plan::test_model::Model;
use crate::responder::{ConnectionReuse, Http1Responder, Responder, ResponseEnd};
use crate::stream::{StreamHalf, TransportStream};
use crate::timeouts::{RequestProgress, RequestTimeouts};
use crate::worker::{SidecarLimits, SidecarShared, SidecarWorker};

/// The longest time that a test may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs a test on a runtime like that of a worker.
fn on_worker(test: impl Future<Output = ()>) {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().build_local(tokio::runtime::LocalOptions::default());
    let limited = async { tokio::time::timeout(LIMIT, test).await };
    runtime.expect("a runtime").block_on(limited).expect("the test ends in time");
}

/// What an endpoint does with a request.
#[derive(Debug, Clone, Copy)]
enum Reaction {
    /// Sends these bytes once the request is complete.
    Send(&'static str),
    /// The same, then closes the connection.
    Close(&'static str),
    /// Sends these bytes once the head is complete, and never reads the body.
    SendEarly(&'static str),
    /// Receives the request, and sends nothing.
    Wait,
}

/// An endpoint that follows a script for each connection. When the script of a connection ends, the endpoint waits until the
/// sidecar closes it; when the last script has begun, the endpoint refuses further connections.
struct TestEndpoint {
    address: SocketAddr,
    /// The requests of each connection.
    requests: Rc<RefCell<Vec<Vec<String>>>>,
}

impl TestEndpoint {
    async fn start<const N: usize>(scripts: [&[Reaction]; N]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let requests = Rc::<RefCell<Vec<Vec<String>>>>::default();
        let seen = requests.clone();
        let scripts = scripts.map(<[Reaction]>::to_vec);
        tokio::task::spawn_local(async move {
            for script in scripts {
                let (socket, _) = listener.accept().await.expect("a connection");
                seen.borrow_mut().push(Vec::new());
                let number = seen.borrow().len() - 1;
                let seen = seen.clone();
                let record = move |request| seen.borrow_mut()[number].push(request);
                tokio::task::spawn_local(follow(script, socket, record));
            }
        });
        Self { address, requests }
    }

    /// An endpoint that answers one request on one connection.
    async fn answering(response: &'static str) -> Self {
        Self::start([&[Reaction::Send(response)]]).await
    }

    /// The number of requests of each connection.
    fn counts(&self) -> Vec<usize> {
        self.requests.borrow().iter().map(Vec::len).collect()
    }

    /// The only request.
    fn request(&self) -> String {
        let requests = self.requests.borrow();
        let all = requests.concat();
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    }
}

/// An address that refuses connections while the socket is open, because nothing listens there.
fn refusing() -> (SocketAddr, socket2::Socket) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    let socket = socket.expect("a socket");
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(&any.into()).expect("a free port");
    let address = socket.local_addr().expect("an address").as_socket().expect("an IP address");
    (address, socket)
}

async fn follow(script: Vec<Reaction>, mut socket: TcpStream, record: impl Fn(String)) {
    let mut unread = String::new();
    for reaction in script {
        let reads_body = !matches!(reaction, Reaction::SendEarly(_));
        let Some(request) = read_request(&mut socket, &mut unread, reads_body).await else {
            return;
        };
        record(request);
        match reaction {
            Reaction::Send(bytes) | Reaction::SendEarly(bytes) => {
                socket.write_all(bytes.as_bytes()).await.expect("the sidecar reads");
            }
            Reaction::Close(bytes) => {
                return socket.write_all(bytes.as_bytes()).await.expect("the sidecar reads");
            }
            Reaction::Wait => {}
        }
    }
    // An error means that the sidecar has reset the connection.
    drop(socket.read_to_end(&mut Vec::new()).await);
}

/// Reads a request, with its body if `reads_body`. None when the connection ends.
async fn read_request(
    socket: &mut TcpStream,
    unread: &mut String,
    reads_body: bool,
) -> Option<String> {
    loop {
        let end = unread.find("\r\n\r\n").map(|end| end + 4);
        let head = end.map_or("", |end| &unread[..end]);
        let body = end.map_or("", |end| &unread[end..]);
        let length = head.split("content-length: ").nth(1);
        let length = length.and_then(|rest| rest.split("\r\n").next()?.parse::<usize>().ok());
        let body_end = match length {
            _ if !reads_body => Some(0),
            Some(length) => Some(length).filter(|length| body.len() >= *length),
            None if head.contains("chunked") => last_chunk_end(body),
            None => Some(0),
        };
        if let (Some(end), Some(body_end)) = (end, body_end) {
            let rest = unread.split_off(end + body_end);
            return Some(std::mem::replace(unread, rest));
        }
        let mut bytes = Vec::new();
        match socket.read_buf(&mut bytes).await {
            Ok(0) | Err(_) => return None,
            Ok(_) => unread.push_str(std::str::from_utf8(&bytes).expect("a text")),
        }
    }
}

/// The end of a body in chunks, after its trailers.
fn last_chunk_end(body: &str) -> Option<usize> {
    let trailers = body.find("\r\n0\r\n")? + 3;
    let end = body[trailers..].find("\r\n\r\n")?;
    Some(trailers + end + 4)
}

/// A worker with the cluster `web`.
struct Sidecar {
    worker: SidecarWorker,
    cluster: Arc<PlannedCluster>,
}

impl Sidecar {
    fn new(endpoints: &[SocketAddr]) -> Self {
        Self::with(endpoints, |_| ())
    }

    fn with(endpoints: &[SocketAddr], change: impl FnOnce(&mut Cluster)) -> Self {
        let model = Model::default().cluster("web", None).addresses("web", endpoints);
        let model = model.change_cluster("web", |cluster| {
            cluster.connection_limit = 100;
            cluster.request_limit = 100;
            cluster.response_head_bytes = 4096;
            cluster.response_header_count = 100;
            cluster.connect_timeout = LIMIT;
            change(cluster);
        });
        let plan = Arc::new(model.build(&mut Builder::new()).plan);
        let cluster = plan.cluster("web").expect("the plan has the cluster").clone();
        let access = Writer::start_with(|_| Ok(OpenedSink::stream(std::io::sink())));
        let shared = SidecarShared {
            plans: watch::channel(plan.clone()).1,
            drain: Drain::new(Duration::ZERO),
            metrics: WorkerMetrics::default(),
            access: access.expect("a thread"),
            limits: SidecarLimits { connections: 10, handshake: LIMIT, window_bytes: 1 << 24 },
            mark: None,
            reports: mpsc::unbounded_channel().0,
        };
        Self { worker: SidecarWorker::new(shared, plan), cluster }
    }

    fn to(endpoint: &TestEndpoint) -> Self {
        Self::new(&[endpoint.address])
    }

    fn retries(&self) -> u64 {
        self.worker.metrics.upstream_retries.get()
    }

    /// Sends a request of a new client connection.
    async fn send(&self, request: TestRequest<'_>) -> Sent {
        let TestRequest { head, framing, body, leaves_after, pin, changes } = request;
        let (mut client, accepted) = socket_pair().await;
        client.write_all(body.as_bytes()).await.expect("the body fits the socket's buffer");
        let (read, write) = StreamHalf::pair(TransportStream::Plain(accepted));
        let mut reader = Http1Reader::new(read);
        let mut writer = Http1Writer::new(write, LIMIT);
        let mut responder = Responder::Http1(Http1Responder {
            writer: &mut writer,
            version: head.version,
            is_head: head.method == Method::HEAD,
            reuse: ConnectionReuse::Yes,
            started: false,
            end: ResponseEnd::Framed,
            header_case: HeaderCase::AsReceived,
            status: None,
        });
        let source = match framing {
            BodyFraming::None => BodySource::Empty,
            framing => BodySource::Http1(BodyReader::new(&mut reader, framing)),
        };
        let progress = RequestProgress::new(source.is_empty());
        let request = forwarded(changes);
        let mut call = Call {
            head: &head,
            request: &request,
            source,
            responder: &mut responder,
            progress: &progress,
            replay: RefCell::default(),
            pin,
        };
        let mut endpoint = None;
        let mut response = Vec::new();
        let leaving = async {
            if let Some(part) = leaves_after {
                while !String::from_utf8_lossy(&response).contains(part) {
                    let count = client.read_buf(&mut response).await.expect("a response");
                    assert_ne!(count, 0, "the response ended before {part:?}");
                }
                client.shutdown().await.expect("the connection is open");
            }
        };
        let exchange = exchange(&mut call, &self.cluster, &self.worker, &mut endpoint);
        let (result, ()) = tokio::join!(Box::pin(exchange), leaving);
        drop(call);
        let Responder::Http1(Http1Responder { reuse, .. }) = responder else {
            panic!("the client speaks HTTP/1.1");
        };
        drop((reader, writer));
        // An error means that the connection was reset because it had unread bytes.
        drop(client.read_to_end(&mut response).await);
        let response = String::from_utf8(response).expect("a text");
        let keeps_client = reuse == ConnectionReuse::Yes;
        Sent { result, endpoint, response, keeps_client }
    }
}

async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let connecting = TcpStream::connect(listener.local_addr().expect("an address"));
    let (client, accepted) = tokio::join!(connecting, listener.accept());
    (client.expect("a connection"), accepted.expect("a connection").0)
}

fn forwarded(changes: Option<Box<HeaderChanges<'_>>>) -> ForwardedRequest<'_> {
    ForwardedRequest {
        cluster: "web".into(),
        header_filter: HeaderFilter::default(),
        timeouts: RequestTimeouts {
            response: None,
            request: None,
            idle: None,
            stall: LIMIT,
            until: None,
        },
        ends_tunnel: false,
        inputs: AuthorizationInputs {
            client_address: [10, 0, 0, 9].into(),
            tokens: VerifiedTokens::default(),
            target: None,
            authority: None,
            headers: None,
        },
        changes,
    }
}

/// A request of a client.
struct TestRequest<'r> {
    head: RequestHead,
    framing: BodyFraming,
    /// The bytes after the head, which may differ from `framing`.
    body: &'r str,
    /// The client closes its side once it has received this text.
    leaves_after: Option<&'r str>,
    pin: Option<&'r RefCell<Option<PinnedConnection>>>,
    changes: Option<Box<HeaderChanges<'r>>>,
}

impl From<RequestHead> for TestRequest<'_> {
    /// A request without a body.
    fn from(head: RequestHead) -> Self {
        let framing = BodyFraming::None;
        Self { head, framing, body: "", leaves_after: None, pin: None, changes: None }
    }
}

/// The end of an exchange.
struct Sent {
    result: Result<ExchangeOutcome, Denial>,
    endpoint: Option<SocketAddr>,
    /// What the client received.
    response: String,
    /// Whether the client may send another request on its connection.
    keeps_client: bool,
}

impl Sent {
    /// The status of the response, or the reason of the denial with that of the endpoint's failure.
    fn result(&self) -> String {
        match self.result {
            Ok(outcome) => outcome.status.to_string(),
            Err(denial) => match denial.upstream_failure() {
                Some(failure) => format!("{} {failure}", denial.reason()),
                None => denial.reason().to_owned(),
            },
        }
    }
}
