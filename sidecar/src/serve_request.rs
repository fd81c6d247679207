//! The stages of a request: decide, exchange with an endpoint or answer, access log.
//!
//! [`decide`] normalizes, authenticates, authorizes and routes. While the exchange lasts, a changed policy can still deny the
//! request.

use std::cell::RefCell;
use std::pin::Pin;
use std::time::Instant;

use weft_model::Name;
use weft_runtime::clock::{now, wall_clock};
use weft_runtime::metrics::GaugeGuard;

use crate::authorize::{AuthorizationInputs, judge_again};
use crate::connection::ClientConnection;
use crate::decide::{RequestDecision, decide};
use crate::decision_context::{DecisionContext, DecisionTime};
use crate::denial::Denial;
use crate::http::body::BodySource;
use crate::http::head::{HttpVersion, RequestHead};
use crate::plan::SidecarPlan;
use crate::plan_changes::PlanSubscription;
use crate::request_log::RequestLog;
use crate::responder::Responder;
use crate::timeouts::RequestProgress;
use crate::upstream::{Call, ExchangeOutcome, exchange};
use crate::worker::SidecarWorker;

/// Serves one request: decides it, carries it out, and writes its access log entry.
///
/// The future is on the heap, so that a connection that waits for requests does not reserve its space. The future is created in
/// place: moving it there would cost more cache misses than everything else that a request does.
#[inline]
pub(crate) fn request<'a>(
    head: RequestHead,
    source: BodySource<'a>,
    reply: &'a mut Responder<'_>,
    connection: &'a ClientConnection,
    worker: &'a SidecarWorker,
) -> Pin<Box<impl Future<Output = ()>>> {
    let room = Box::new_uninit();
    Box::into_pin(Box::write(room, serve_and_log(head, source, reply, connection, worker)))
}

#[expect(clippy::large_futures, reason = "all of it is one allocation, made by `request`")]
async fn serve_and_log(
    mut head: RequestHead,
    source: BodySource<'_>,
    reply: &mut Responder<'_>,
    connection: &ClientConnection,
    worker: &SidecarWorker,
) {
    let started = now();
    let _open = GaugeGuard::new(&worker.metrics.requests_open);
    let mut log = RequestLog::new(&head, connection.access_log(worker));
    let progress = RequestProgress::new(source.is_empty());
    let io = RequestIo { source, reply, progress: &progress, started };
    let result = perform(&mut head, io, connection, worker, &mut log).await;
    log.finish(result, started, connection, worker);
}

/// Counts and logs a request that was refused without a usable head.
pub(crate) fn log_refused(
    denial: Denial,
    version: HttpVersion,
    connection: &ClientConnection,
    worker: &SidecarWorker,
) {
    let sinks = connection.access_log(worker);
    let desync = match denial {
        Denial::Desync(reason) => Some(reason),
        _ => None,
    };
    let log = RequestLog::unread(version, desync, sinks);
    log.finish(Err(denial), now(), connection, worker);
}

/// What a request has besides its head: its body, the response writer, and its start time.
struct RequestIo<'s, 'r, 'w> {
    source: BodySource<'s>,
    reply: &'r mut Responder<'w>,
    progress: &'r RequestProgress,
    started: Instant,
}

async fn perform(
    head: &mut RequestHead,
    io: RequestIo<'_, '_, '_>,
    connection: &ClientConnection,
    worker: &SidecarWorker,
    log: &mut RequestLog,
) -> Result<ExchangeOutcome, Denial> {
    let RequestIo { source, reply, progress, started } = io;
    let is_grpc = head.is_grpc();
    let plan = worker.plan();
    let plan_changes = worker.changes.subscribe();
    let has_body = !source.is_empty();
    let context = DecisionContext {
        connection,
        plan: &plan,
        tokens: &worker.tokens,
        time: DecisionTime { monotonic: started, wall: wall_clock() },
        random: fastrand::u32(..),
    };
    let decision = decide(head, has_body, context, log);
    let head = &*head;
    let result = match &decision {
        Ok(RequestDecision::Forward(request)) => match plan.cluster(&request.cluster) {
            Some(cluster) => {
                log.cluster = Some(cluster.settings.name.clone());
                let mut call = Call {
                    head,
                    request,
                    source,
                    responder: &mut *reply,
                    progress,
                    replay: RefCell::default(),
                    pin: (head.version != HttpVersion::Http2).then_some(&connection.pinned),
                };
                let inputs = &request.inputs;
                let authorized = AuthorizedRequest { inputs, head, plan: &plan };
                tokio::select! {
                    biased;
                    result = exchange(&mut call, cluster, worker, &mut log.endpoint) => result,
                    denial = request.timeouts.expired(started, progress) => Err(denial),
                    (denial, policy) = until_denied(authorized, connection, plan_changes, worker) => {
                        log.policy = policy;
                        Err(denial)
                    }
                }
            }
            None => Err(Denial::NoEndpoint),
        },
        Ok(RequestDecision::Answer { answer, changes }) => {
            Ok(reply.answer(answer, head, changes.as_deref()).await)
        }
        Err(refused) => Err(refused.denial),
    };
    if let Err(denial) = result {
        let changes = match &decision {
            Ok(RequestDecision::Forward(request)) => request.changes.as_deref(),
            Ok(RequestDecision::Answer { changes, .. }) => changes.as_deref(),
            Err(refused) => refused.changes.as_deref(),
        };
        reply.deny(denial, is_grpc, changes.map(|changes| (changes, head))).await;
    }
    result
}

/// A request in flight with the plan that allowed it.
struct AuthorizedRequest<'a> {
    inputs: &'a AuthorizationInputs,
    head: &'a RequestHead,
    plan: &'a SidecarPlan,
}

/// Resolves when a new plan no longer allows the request by its policies or token requirements, with the policy that denies
/// it. A request whose listener or chain is not in the new plan continues.
async fn until_denied(
    authorized: AuthorizedRequest<'_>,
    connection: &ClientConnection,
    mut plan_changes: PlanSubscription<'_>,
    worker: &SidecarWorker,
) -> (Denial, Option<Name>) {
    let AuthorizedRequest { inputs, head, plan } = authorized;
    loop {
        plan_changes.next().await;
        let before = connection.service(plan);
        let plan = worker.plan();
        let Some(http) = connection.service(&plan) else {
            continue;
        };
        let facts = inputs.facts(head, connection.client_info(inputs.client_address));
        if before.map(|before| &before.rules) != Some(&http.rules) {
            let decision = judge_again(&facts, &http.rules);
            if decision.refused {
                worker.metrics.requests_policy_changed.increment();
                return (Denial::NotAllowed, decision.policy.cloned());
            }
        }
        let known = before.and_then(|before| before.tokens.as_ref());
        let changed = http.tokens.as_ref().filter(|tokens| known.is_none_or(|k| tokens.differ(k)));
        if let Some(Err(refused)) =
            changed.map(|tokens| tokens.recheck(&inputs.tokens, facts, connection.peer.as_ref()))
        {
            worker.metrics.requests_policy_changed.increment();
            return (Denial::Token(refused.fault, refused.detail), None);
        }
    }
}
