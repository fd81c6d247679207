//! The path of a connection and of a request, a line a stage.
//!
//! ```text
//! connection   accept -> destination -> chain -> TLS: VerifiedPeer -> HTTP version
//! request      admit -> authenticate: Authenticated -> authorize: Authorized
//!              -> route: Routed -> balance -> exchange -> record
//! ```

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::TcpStream;
use weft_certs::VerifiedPeer;
use weft_model::{
    Action, ClientCertificateDetails, Codec, HttpService, Name, TransportKind, WeightedCluster,
};
use weft_runtime::socket::{PROBE_PORT, original_destination};

use crate::admission::admit;
use crate::authenticate::{Sender, authenticate};
use crate::authorize::authorize;
use crate::denial::Denial;
use crate::detect::{self, Protocol};
use crate::forwarded::Origin;
use crate::http::body::Source;
use crate::http::desync::Reason;
use crate::http::head::{HttpVersion, RequestHead, Unwanted, Upgrade};
use crate::identity_headers::ProvedFields;
use crate::patience::{Patience, Pulse};
use crate::plan::{Plan, PlannedHttp, PlannedListener, Service, Target};
use crate::record::{Record, Trace};
pub(crate) use crate::reply::Reply;
use crate::route::{Routed, rewritten, route};
use crate::standing::Standing;
use crate::stream::Stream;
use crate::tls::Alpn;
use crate::tls::handshake::{self, Secure};
use crate::upstream::{Call, Outcome, exchange};
use crate::worker::{Worker, now, unix_ms, wall_clock};
use crate::{opaque, serve, serve_http2};

/// A connection that was taken in.
pub(crate) struct Accepted {
    pub(crate) client: SocketAddr,
    pub(crate) stream: TcpStream,
    pub(crate) listener: Arc<PlannedListener>,
}

/// What is known of a connection, for all its requests.
pub(crate) struct Connection {
    pub(crate) client: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) peer: Option<VerifiedPeer>,
    proved: Option<ProvedFields>,
    /// Whether what the peer proved still stands; none where it proved nothing.
    standing: Option<Rc<Standing>>,
    kind: TransportKind,
    is_tls: bool,
    /// How lines of its requests name it.
    trace: Option<Trace>,
    listener: Name,
    /// Whether it waits for a request, so that draining may end it.
    pub(crate) idle: Rc<Cell<bool>>,
}

/// Serves a connection from its acceptance to its end.
pub(crate) async fn connection(accepted: Accepted, worker: Rc<Worker>) {
    let Some(_in_hand) = worker.live.take(worker.shared.limits.connections) else {
        return worker.metrics.connections_refused.increment();
    };
    worker.metrics.connections.increment();
    worker.metrics.connections_open.increment();
    if serve_connection(accepted, &worker).await.is_none() {
        worker.metrics.connections_refused.increment();
    }
    worker.metrics.connections_open.decrement();
}

/// None when the connection was refused before anything was served.
async fn serve_connection(accepted: Accepted, worker: &Rc<Worker>) -> Option<()> {
    let Accepted { client, stream, listener } = accepted;
    let own = stream.local_addr().ok()?;
    let destination = original_destination(&stream, own);
    if listener.listener.use_original_destination && destination == own {
        tracing::debug!(%client, "a capture port was dialled itself: a mistake or a loop");
        return None;
    }
    if listener.listener.use_original_destination && destination.port() == PROBE_PORT {
        return None;
    }
    let plan = worker.plan();
    let serving = plan.listener_for(&listener, destination).clone();
    drop(plan);
    if !serving.listener.admits(client.ip()) {
        tracing::debug!(%client, "the listener's security group does not let it in");
        return None;
    }
    let kind = if serving.listener.inspects_transport() {
        detect::transport_kind(&stream).await?
    } else {
        TransportKind::Plain
    };
    let chain = serving.chain(destination, kind)?.clone();
    let about =
        handshake::About { client, port: destination.port(), is_logged: chain.service.is_logged() };
    let Secure { stream, alpn, peer, trace } =
        handshake::secure(&chain.tls, stream, about, worker).await?;
    match &chain.service {
        Service::Tcp(tcp) => {
            Box::pin(opaque::carry(stream, client, destination, tcp, worker)).await;
        }
        Service::Http(http) => {
            let whole = http.http.client_certificate == ClientCertificateDetails::Whole;
            let certificate = stream.certificate().filter(|_| whole);
            let proved = peer.as_ref().map(|peer| ProvedFields::new(peer, certificate));
            let listener = serving.listener.name.clone();
            let idle = Rc::new(Cell::new(false));
            let is_tls = !matches!(stream, Stream::Plain(_));
            let standing = stream.standing().cloned();
            let connection = Rc::new(Connection {
                client,
                destination,
                peer,
                proved,
                standing,
                kind,
                is_tls,
                trace,
                listener,
                idle,
            });
            let settings = http.http.clone();
            drop((chain, serving));
            serve_http(stream, alpn, connection, &settings, worker).await;
        }
    }
    Some(())
}

async fn serve_http(
    stream: Stream,
    alpn: Alpn,
    connection: Rc<Connection>,
    settings: &HttpService,
    worker: &Rc<Worker>,
) {
    let http2 = match (settings.codec, alpn, &stream) {
        (Codec::Http2, _, _) | (Codec::Auto, Alpn::Http2, _) => true,
        (Codec::Auto, Alpn::None, Stream::Plain(tcp)) => {
            let (destination, target) = (connection.destination, connection.only_target(worker));
            let patience = settings.timeouts.head;
            let telling = detect::protocol(tcp, destination, target, patience, worker);
            match Box::pin(telling).await {
                Protocol::Http1 => false,
                Protocol::Http2 => true,
                Protocol::Opaque(spoken) => {
                    worker.metrics.spoken_first.increment();
                    let relaying = opaque::relay(stream, connection.client, spoken);
                    return Box::pin(relaying).await;
                }
            }
        }
        (Codec::Http1 | Codec::Auto, _, _) => false,
    };
    if http2 {
        // Apart, so that connections of HTTP/1.1 keep no room for it.
        Box::pin(serve_http2::serve(stream, connection, settings, worker)).await;
    } else {
        serve::http1(stream, connection, settings, worker).await;
    }
}

/// Serves one request: decides, then carries it out, and leaves a line behind.
#[allow(clippy::large_futures, reason = "who waits for requests boxes this, once for each")]
pub(crate) async fn request(
    head: RequestHead,
    source: Source<'_>,
    reply: &mut Reply<'_>,
    connection: &Connection,
    worker: &Worker,
) {
    let started = now();
    worker.metrics.requests.increment();
    worker.metrics.requests_open.increment();
    let mut story = Story::new(&head, connection, worker.logs_requests(connection));
    let pulse = Pulse::default();
    let mut call = Call::new(head, source, reply, &pulse);
    let result = perform(&mut call, connection, worker, &mut story, started).await;
    story.finish(result, started, connection, worker);
    worker.metrics.requests_open.decrement();
}

/// Leaves a line behind for a request that was refused before its head was read.
pub(crate) fn refused(
    denial: Denial,
    version: HttpVersion,
    connection: &Connection,
    worker: &Worker,
) {
    worker.metrics.requests.increment();
    let logged = worker.logs_requests(connection);
    let desync = match denial {
        Denial::Desync(reason) => Some(reason),
        _ => None,
    };
    let line = logged.then(|| Line { version: version.word(), ..Line::default() });
    let story = Story { line, service: None, subject: None, endpoint: None, desync };
    story.finish(Err(denial), now(), connection, worker);
}

async fn perform(
    call: &mut Call<'_, '_, '_>,
    connection: &Connection,
    worker: &Worker,
    story: &mut Story,
    started: Instant,
) -> Result<Outcome, Denial> {
    let is_grpc = call.head.is_grpc();
    let plan = worker.plan();
    let has_body = !call.source.is_empty();
    let result = match decide(&mut call.head, has_body, connection, &plan, (worker, story)) {
        Ok(Decision::Forward { target, unwanted, patience, ends_tunnel }) => {
            (call.unwanted, call.ends_tunnel) = (unwanted, ends_tunnel);
            match plan.target(&target) {
                Some(target) => {
                    story.service = Some(target.cluster.name.clone());
                    let pulse = call.pulse;
                    tokio::select! {
                        biased;
                        result = exchange(call, target, worker, &mut story.endpoint) => result,
                        denial = patience.ends(started, pulse) => Err(denial),
                    }
                }
                None => Err(Denial::NoEndpoint),
            }
        }
        Ok(Decision::Answer { status, location, body }) => {
            Ok(call.reply.answer(status, location, body).await)
        }
        Err(denial) => Err(denial),
    };
    if let Err(denial) = result {
        call.reply.deny(denial, is_grpc).await;
    }
    result
}

/// What to do with a request.
enum Decision {
    Forward { target: Name, unwanted: Unwanted, patience: Patience, ends_tunnel: bool },
    Answer { status: u16, location: Option<String>, body: String },
}

/// Decides a request by one plan, and turns its head into the one that is sent on.
fn decide(
    head: &mut RequestHead,
    has_body: bool,
    connection: &Connection,
    plan: &Plan,
    (worker, story): (&Worker, &mut Story),
) -> Result<Decision, Denial> {
    let http = connection.service(plan).ok_or(Denial::NoEndpoint)?;
    let origin = Origin {
        client: connection.client,
        port: connection.destination.port(),
        is_tls: connection.is_tls,
    };
    let unwanted = admit(head, has_body, &http.http, origin, connection.proved.as_ref());
    story.desync = head.desync;
    let mut unwanted = unwanted?;

    let sender = Sender {
        peer: connection.peer.as_ref(),
        address: connection.client.ip(),
        destination_port: connection.destination.port(),
    };
    let tokens = http.tokens.as_ref();
    if let Some(tokens) = tokens {
        unwanted.add_told(tokens.told());
    }
    let authenticated = authenticate(head, sender, tokens, wall_clock(), &worker.tokens)?;
    let authorized = authorize(authenticated, &http.rules)?;
    let routed: Routed<'_, '_> = route(authorized, http.routes.as_ref())?;

    story.subject = routed.subject;
    let (route, ends) = (routed.route, routed.ends);
    match &route.action {
        Action::Forward { clusters, host_rewrite, timeout, ends_tunnels, .. } => {
            let target = WeightedCluster::draw(clusters, fastrand::u32(..))
                .ok_or(Denial::NoRoute)?
                .name
                .clone();
            if let Some(target) = rewritten(route, &head.target) {
                head.target = target;
            }
            if let Some(host) = host_rewrite {
                head.authority.clone_from(host);
            }
            if let Some(tokens) = tokens {
                tokens.conceal(head);
            }
            let timeouts = &http.http.timeouts;
            let patience = Patience {
                whole: *timeout,
                request: timeouts.request,
                silence: timeouts.stream_idle.limit(head.is_grpc()),
                until: ends
                    .map(|ends| now() + ends.duration_since(wall_clock()).unwrap_or_default()),
            };
            let ends_tunnel = *ends_tunnels && head.upgrade == Some(Upgrade::Tunnel);
            Ok(Decision::Forward { target, unwanted, patience, ends_tunnel })
        }
        Action::Redirect(redirect) => {
            let own = if connection.is_tls { "https" } else { "http" };
            let scheme = redirect.scheme.as_deref().unwrap_or(own);
            let host = redirect.host.as_deref().unwrap_or(&head.authority);
            let location = Some(match &redirect.path {
                Some(path) if path.contains('?') => format!("{scheme}://{host}{path}"),
                Some(path) => format!("{scheme}://{host}{path}{}", head.query_part()),
                None => format!("{scheme}://{host}{}", head.target),
            });
            Ok(Decision::Answer { status: redirect.status, location, body: String::new() })
        }
        Action::Respond { status, body } => {
            Ok(Decision::Answer { status: *status, location: None, body: body.clone() })
        }
    }
}

impl Connection {
    /// How the connection's requests are served by a plan; none when the plan no longer serves it.
    pub(crate) fn service<'p>(&self, plan: &'p Plan) -> Option<&'p PlannedHttp> {
        match &plan.listener(&self.listener)?.chain(self.destination, self.kind)?.service {
            Service::Http(http) => Some(http),
            Service::Tcp(_) => None,
        }
    }

    /// Says whether it waits for a request, so that it may be ended.
    pub(crate) fn rest(&self, rests: bool) {
        self.idle.set(rests);
        if let Some(standing) = &self.standing {
            standing.rest(rests);
        }
    }

    /// Whether no request may be begun over it any more.
    pub(crate) fn is_leaving(&self) -> bool {
        self.standing.as_ref().is_some_and(|standing| standing.is_leaving())
    }

    /// Resolves when no request may be begun over it any more.
    pub(crate) async fn leaves(&self) {
        match &self.standing {
            Some(standing) => standing.leaves().await,
            None => std::future::pending().await,
        }
    }

    /// Resolves when it must end at once. Whoever asks tells the client of it, and closes.
    pub(crate) async fn ends(&self) {
        match &self.standing {
            Some(standing) => {
                standing.will_bid_farewell();
                standing.ends().await;
            }
            None => std::future::pending().await,
        }
    }

    /// Where the connection would go whatever comes over it, if there is one such place.
    fn only_target(&self, worker: &Worker) -> Option<Arc<Target>> {
        let plan = worker.plan();
        plan.target(self.service(&plan)?.only.as_ref()?).cloned()
    }
}

/// What there is to tell of a request.
struct Story {
    line: Option<Line>,
    service: Option<Name>,
    subject: Option<String>,
    endpoint: Option<SocketAddr>,
    /// How the request departed from strict HTTP/1.1.
    desync: Option<Reason>,
}

#[derive(Default)]
struct Line {
    method: String,
    authority: String,
    path: String,
    version: &'static str,
}

impl Story {
    fn new(head: &RequestHead, _: &Connection, logged: bool) -> Self {
        let line = logged.then(|| Line {
            method: head.method.to_string(),
            authority: head.authority.clone(),
            path: head.path().to_owned(),
            version: head.version.word(),
        });
        Self { line, service: None, subject: None, endpoint: None, desync: head.desync }
    }

    fn finish(
        self,
        result: Result<Outcome, Denial>,
        started: Instant,
        connection: &Connection,
        worker: &Worker,
    ) {
        let duration = now() - started;
        let (status, outcome) = match result {
            Ok(outcome) => (outcome.status, outcome),
            Err(denial) => {
                worker.metrics.deny(denial);
                (denial.status(), Outcome::default())
            }
        };
        worker.metrics.respond(status);
        if let Some(reason) = self.desync {
            worker.metrics.depart(reason);
        }
        worker.metrics.duration.observe(duration);
        let Some(line) = self.line else {
            return;
        };
        worker.access.line(&Record {
            kind: "http",
            time_ms: unix_ms(),
            client: connection.client,
            original_destination: connection.destination,
            conn_trace_id: connection.trace,
            peer: connection
                .peer
                .as_ref()
                .and_then(VerifiedPeer::identity)
                .map(weft_model::SpiffeId::as_str),
            subject: self.subject.as_deref(),
            version: line.version,
            method: &line.method,
            authority: &line.authority,
            path: &line.path,
            status,
            denial: result.err().map(Denial::reason),
            detail: result.err().map(Denial::detail).filter(|detail| !detail.is_empty()),
            desync: self.desync.map(Reason::word),
            service: self.service.as_deref(),
            endpoint: self.endpoint,
            bytes_sent: outcome.bytes_sent,
            bytes_received: outcome.bytes_received,
            duration_us: duration.as_micros(),
            outcome: match (outcome.broken, result) {
                (Some(broken), _) => broken,
                (None, Ok(_)) => "served",
                (None, Err(_)) => "denied",
            },
        });
    }
}
