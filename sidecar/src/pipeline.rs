//! The path of a connection and of a request, a line a stage.
//!
//! ```text
//! connection   accept -> destination -> chain -> TLS: VerifiedPeer -> HTTP version
//! request      admit -> authenticate: Authenticated -> authorize: Authorized
//!              -> route: Routed -> balance -> exchange -> record
//! ```

use std::cell::{Cell, OnceCell, RefCell};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::TcpStream;
use weft_certs::VerifiedPeer;
use weft_model::{Codec, HttpService, Name, TransportKind};
use weft_runtime::metrics::Opened;
use weft_runtime::socket::{PROBE_PORT, original_destination, reset_on_close};

use crate::authorize::{Caller, Case, judge_again};
use crate::changes::Following;
pub(crate) use crate::connection::Connection;
use crate::decide::{Decision, decide};
use crate::denial::Denial;
use crate::detect::{self, Protocol};
use crate::http::body::BodySource;
use crate::http::head::{HttpVersion, RequestHead};
use crate::identity_headers::{Proof, ProvedFields};
use crate::opaque::Opaque;
use crate::patience::Pulse;
use crate::plan::{Plan, PlannedChain, PlannedListener, Service, Tls};
pub(crate) use crate::reply::Reply;
use crate::story::Story;
use crate::stream::Stream;
use crate::tls::Alpn;
use crate::tls::handshake::{HandshakeContext, SecuredConnection, secure};
use crate::upstream::{Call, ExchangeOutcome, exchange};
use crate::worker::{Worker, now};
use crate::{opaque, serve, serve_http2};

/// A connection that was taken in.
pub(crate) struct Accepted {
    pub(crate) client: SocketAddr,
    pub(crate) stream: TcpStream,
    pub(crate) listener: Arc<PlannedListener>,
}

/// Serves a connection from its acceptance to its end.
pub(crate) async fn connection(accepted: Accepted, worker: Rc<Worker>) {
    let Some(_in_hand) = worker.live.try_acquire(worker.shared.limits.connections) else {
        return worker.refuse_connection(accepted.client);
    };
    worker.metrics.connections.increment();
    let _open = Opened::new(&worker.metrics.connections_open);
    if serve_connection(accepted, &worker).await.is_none() {
        worker.metrics.connections_refused.increment();
    }
}

/// Whether a connection to a capture port was meant for somebody.
fn is_captured(client: SocketAddr, destination: SocketAddr, own: SocketAddr) -> bool {
    if destination == own {
        tracing::debug!(%client, "a capture port was dialled itself: a mistake or a loop");
    }
    destination != own && destination.port() != PROBE_PORT
}

/// None when the connection was refused before anything was served.
async fn serve_connection(accepted: Accepted, worker: &Rc<Worker>) -> Option<()> {
    let Accepted { client, stream, listener } = accepted;
    let own = stream.local_addr().ok()?;
    let destination = original_destination(&stream, own);
    if listener.listener.use_original_destination && !is_captured(client, destination, own) {
        return None;
    }
    let (plan, following) = (worker.plan(), worker.changes.follow());
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
    let is_logged = chain.service.is_logged();
    let handshake = HandshakeContext { client, port: destination.port(), is_logged };
    let SecuredConnection { stream, alpn, peer, passed, trace } =
        secure(&chain.tls, stream, handshake, worker).await?;
    let caller = Caller { peer: peer.as_ref(), client, destination };
    if !caller.is_let_in(&chain.rules) {
        tracing::debug!(%client, "no policy lets the connection in");
        worker.metrics.deny(Denial::NotAllowed);
        reset_on_close(stream.tcp());
        return None;
    }
    match &chain.service {
        Service::Tcp(tcp) => {
            let about = Opaque { client, destination, peer: peer.as_ref(), trace };
            let carrying = opaque::carry(stream, about, tcp, worker);
            let place = (&*serving, &*chain, kind);
            tokio::select! {
                () = Box::pin(carrying) => {}
                () = is_shut_out(caller, place, following, worker) => {}
            }
        }
        Service::Http(http) => {
            let proved = proved_fields(peer.as_ref(), passed, &stream, &chain.tls, &http.http);
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
                pinned: RefCell::default(),
                dropped: OnceCell::new(),
            });
            let settings = http.http.clone();
            drop((chain, serving));
            serve_http(stream, alpn, connection, &settings, worker).await;
        }
    }
    Some(())
}

/// The headers that say who a peer is; or those of a chain that is `passed` on unchecked.
fn proved_fields(
    peer: Option<&VerifiedPeer>,
    passed: bool,
    stream: &Stream,
    tls: &Tls,
    http: &HttpService,
) -> Option<ProvedFields> {
    let chain = stream.certificates();
    let own = match tls {
        Tls::Terminate(server) => server.leaf(),
        Tls::None | Tls::Broken => None,
    };
    match peer {
        Some(peer) => Some(ProvedFields::new(Proof { peer, chain, own }, http)),
        None => passed.then(|| ProvedFields::passed(chain)),
    }
}

/// Resolves when other rules are in force for an opaque connection, and do not let it in.
async fn is_shut_out(
    caller: Caller<'_>,
    (listener, chain, kind): (&PlannedListener, &PlannedChain, TransportKind),
    mut following: Following<'_>,
    worker: &Worker,
) {
    loop {
        following.next().await;
        let plan = worker.plan();
        let now = plan.listener(&listener.listener.name);
        let Some(now) = now.and_then(|listener| listener.chain(caller.destination, kind)) else {
            continue;
        };
        if now.rules != chain.rules && !caller.is_let_in(&now.rules) {
            worker.metrics.connections_shut_out.increment();
            return;
        }
    }
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
                Protocol::Stalled => {
                    let Ok(stream) = detect::report_unread(stream) else { return };
                    return serve::refuse_stalled(stream, &connection, settings, worker).await;
                }
                Protocol::Opaque(spoken) => {
                    worker.metrics.spoken_first.increment();
                    let Ok(stream) = detect::report_unread(stream) else { return };
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
///
/// The future is on the heap, so that a connection that waits for requests keeps no room for it. It is made there:
/// moved there, it would cost more cache misses than all else that a request does.
#[inline]
pub(crate) fn request<'a>(
    head: RequestHead,
    source: BodySource<'a>,
    reply: &'a mut Reply<'_>,
    connection: &'a Connection,
    worker: &'a Worker,
) -> Pin<Box<impl Future<Output = ()>>> {
    let room = Box::new_uninit();
    Box::into_pin(Box::write(room, serve_request(head, source, reply, connection, worker)))
}

#[expect(clippy::large_futures, reason = "all of it is one allocation, made by `request`")]
async fn serve_request(
    mut head: RequestHead,
    source: BodySource<'_>,
    reply: &mut Reply<'_>,
    connection: &Connection,
    worker: &Worker,
) {
    let started = now();
    worker.metrics.requests.increment();
    let _open = Opened::new(&worker.metrics.requests_open);
    let mut story = Story::new(&head, worker.logs_requests(connection));
    let pulse = Pulse::new(source.is_empty());
    let asked = Asked { source, reply, pulse: &pulse, started };
    let result = perform(&mut head, asked, connection, worker, &mut story).await;
    story.finish(result, started, connection, worker);
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
    let story = Story::unread(version, desync, logged);
    story.finish(Err(denial), now(), connection, worker);
}

/// A request beside its head: its body, where the answer goes, and since when it lasts.
struct Asked<'s, 'r, 'w> {
    source: BodySource<'s>,
    reply: &'r mut Reply<'w>,
    pulse: &'r Pulse,
    started: Instant,
}

async fn perform(
    head: &mut RequestHead,
    asked: Asked<'_, '_, '_>,
    connection: &Connection,
    worker: &Worker,
    story: &mut Story,
) -> Result<ExchangeOutcome, Denial> {
    let Asked { source, reply, pulse, started } = asked;
    let is_grpc = head.is_grpc();
    let (plan, following) = (worker.plan(), worker.changes.follow());
    let has_body = !source.is_empty();
    let decision = decide(head, has_body, connection, &plan, (worker, story));
    let head = &*head;
    // Of the route, for the response or for the refusal.
    let mut changes = None;
    let result = match decision {
        Ok(Decision::Forward {
            target,
            header_filter,
            patience,
            ends_tunnel,
            case,
            changes: own,
        }) => {
            changes = own;
            match plan.target(&target) {
                Some(target) => {
                    story.service = Some(target.cluster.name.clone());
                    let mut call = Call::new(head, source, &mut *reply, pulse);
                    (call.header_filter, call.ends_tunnel, call.stall) =
                        (header_filter, ends_tunnel, patience.stall);
                    call.pin = (head.version != HttpVersion::Http2).then_some(&connection.pinned);
                    call.changes = changes.as_deref();
                    let decided = (&case, head, &*plan);
                    tokio::select! {
                        biased;
                        result = exchange(&mut call, target, worker, &mut story.endpoint) => result,
                        denial = patience.ends(started, pulse) => Err(denial),
                        (denial, rule) = falls(decided, connection, following, worker) => {
                            story.rule = rule;
                            Err(denial)
                        }
                    }
                }
                None => Err(Denial::NoEndpoint),
            }
        }
        Ok(Decision::Answer { answer, changes }) => {
            Ok(reply.answer(answer, head, changes.as_deref()).await)
        }
        Err(refused) => {
            changes = refused.changes;
            Err(refused.denial)
        }
    };
    if let Err(denial) = result {
        let changes = changes.as_deref().map(|changes| (changes, head));
        reply.deny(denial, is_grpc, changes).await;
    }
    result
}

/// Resolves when other rules are in force, or other tokens are asked for, and what the plan before allowed
/// is not any more; with the policy that says so. Where there are none for it any more, what has begun goes
/// on.
async fn falls(
    (case, head, plan): (&Case, &RequestHead, &Plan),
    connection: &Connection,
    mut following: Following<'_>,
    worker: &Worker,
) -> (Denial, Option<Name>) {
    loop {
        following.next().await;
        let before = connection.service(plan);
        let plan = worker.plan();
        let Some(http) = connection.service(&plan) else {
            continue;
        };
        let facts = case.facts(head, connection.sender(case.client));
        if before.map(|before| &before.rules) != Some(&http.rules) {
            let verdict = judge_again(&facts, &http.rules);
            if verdict.refused {
                worker.metrics.requests_withdrawn.increment();
                return (Denial::NotAllowed, verdict.by.cloned());
            }
        }
        let known = before.and_then(|before| before.tokens.as_ref());
        let asking = http.tokens.as_ref().filter(|tokens| known.is_none_or(|k| tokens.differ(k)));
        if let Some(Err(refused)) =
            asking.map(|tokens| tokens.recheck(&case.proved, facts, connection.peer.as_ref()))
        {
            worker.metrics.requests_withdrawn.increment();
            return (Denial::Token(refused.fault, refused.detail), None);
        }
    }
}
