//! Decides what happens to one request under one plan: forward it, answer it, or refuse it.
//!
//! Does no I/O: clocks and randomness are arguments, and the worker is unknown here.

use std::time::{Duration, Instant};

use weft_model::path::unescaped_location;
use weft_model::{
    EscapedSlashes, HttpTimeouts, PathMatch, PathRewrite, RouteAction, WeightedCluster,
};

use crate::authenticate::{TokenPolicy, authenticate};
use crate::authorize::{AuthorizationInputs, Authorized, authorize};
use crate::decision_context::DecisionContext;
use crate::denial::Denial;
use crate::forwarded;
use crate::forwarded_request::ForwardedRequest;
use crate::header_mutation::{HeaderChanges, HeaderVariables};
use crate::http::head::{RequestHead, Upgrade};
use crate::http::header_filter::HeaderFilter;
use crate::normalize::normalize_request;
use crate::plan::PlannedHttp;
use crate::refused_request::RefusedRequest;
use crate::request_facts::ClientInfo;
use crate::request_log::RequestLog;
use crate::responder::LocalReply;
use crate::route::{Routed, redirect_location, rewritten_target, route};
use crate::timeouts::RequestTimeouts;

/// What to do with a request.
#[expect(
    clippy::large_enum_variant,
    reason = "one exists per request, and a box would cost an allocation per request"
)]
#[derive(Debug)]
pub(crate) enum RequestDecision<'p> {
    /// Send the request to an endpoint.
    Forward(ForwardedRequest<'p>),
    /// Answer the request without an endpoint.
    Answer { answer: LocalReply<'p>, changes: Option<Box<HeaderChanges<'p>>> },
}

/// The timeouts of a request. `response` is the timeout of its route, `until` the end of its token's validity.
fn request_timeouts(
    response: Option<Duration>,
    settings: HttpTimeouts,
    is_grpc: bool,
    until: Option<Instant>,
) -> RequestTimeouts {
    RequestTimeouts {
        response,
        request: settings.request,
        idle: settings.stream_idle.limit(is_grpc),
        stall: settings.stall_limit(),
        until,
    }
}

/// Checks the tokens of a request, then its policies.
fn allow<'h>(
    head: &'h mut RequestHead,
    client: ClientInfo<'h>,
    http: &PlannedHttp,
    context: DecisionContext<'_>,
    log: &mut RequestLog,
) -> Result<Authorized<'h>, Denial> {
    let tokens = http.tokens.as_ref();
    let authenticated = authenticate(head, client, tokens, context.time.wall, context.tokens)?;
    let (judgement, authorized) = authorize(authenticated, &http.rules);
    log.judged(&judgement);
    authorized
}

/// The redirect to the target with its escaped slashes decoded, where the listener is configured to send one.
fn unescaping_redirect(http: &PlannedHttp, head: &RequestHead) -> Option<LocalReply<'static>> {
    if http.http.path.escaped_slashes != EscapedSlashes::Redirect {
        return None;
    }
    let location = unescaped_location(&head.target)?;
    Some(LocalReply { status: 307, location: Some(location), body: "" })
}

/// Decides a request, and turns its head into the one that is sent upstream.
pub(crate) fn decide<'p>(
    head: &mut RequestHead,
    has_body: bool,
    context: DecisionContext<'p>,
    log: &mut RequestLog,
) -> Result<RequestDecision<'p>, RefusedRequest<'p>> {
    let DecisionContext { connection, plan, time, random, .. } = context;
    let http = connection.service(plan).ok_or(Denial::NoEndpoint)?;
    let address = forwarded::client(&head.headers, http.http.forwarded, connection.previous_hop());
    let normalized = normalize_request(head, has_body, &http.http, connection);
    // A refused request is logged with its deviation from the standard too.
    log.desync = head.desync;
    let mut header_filter = normalized?;
    if let Some(answer) = unescaping_redirect(http, head) {
        return Ok(RequestDecision::Answer { answer, changes: None });
    }

    let client = connection.client_info(address);
    let tokens = http.tokens.as_ref();
    header_filter.reserve(tokens.into_iter().flat_map(TokenPolicy::written_headers));
    let authorized = match allow(head, client, http, context, log) {
        Ok(authorized) => authorized,
        Err(denial) => {
            return Err(RefusedRequest::with_headers_of_route(denial, head, client, http, context));
        }
    };
    let routed: Routed<'_, '_> = route(authorized, http.routes.as_ref())?;

    let Routed { found, stream_deadline, mut inputs, .. } = routed;
    let route = found.route;
    let variables = |cluster| HeaderVariables {
        client: address,
        cluster,
        ..connection.header_variables(&route.name)
    };
    let answered = |answer| {
        let changes = HeaderChanges::of(found.mutations(None), || variables(""));
        RequestDecision::Answer { answer, changes }
    };
    log.route(&found, inputs.tokens.subject.as_ref());
    match &route.action {
        RouteAction::Forward { clusters, path_rewrite, host_rewrite, timeout, ends_tunnels } => {
            let cluster = WeightedCluster::pick(clusters, random).ok_or(Denial::NoRoute)?;
            let is_grpc = head.is_grpc();
            let levels = found.mutations(Some(cluster));
            let changes = HeaderChanges::of(levels, || variables(&*cluster.name));
            let rewrite = HeadRewrite {
                changes: changes.as_deref(),
                path: path_rewrite.as_ref(),
                matched: &route.matches.path,
                host: host_rewrite.as_deref(),
                tokens,
            };
            rewrite.apply(head, has_body, &mut header_filter, &mut inputs);
            let until = stream_deadline.map(|deadline| time.until(deadline));
            let timeouts = request_timeouts(*timeout, http.http.timeouts, is_grpc, until);
            let ends_tunnel = *ends_tunnels && head.upgrade == Some(Upgrade::Tunnel);
            Ok(RequestDecision::Forward(ForwardedRequest {
                cluster: cluster.name.clone(),
                header_filter,
                timeouts,
                ends_tunnel,
                inputs,
                changes,
            }))
        }
        RouteAction::Redirect(redirect) => {
            let location =
                redirect_location(redirect, &route.matches.path, head, connection.is_tls());
            let status = redirect.status;
            let location = Some(location);
            Ok(answered(LocalReply { status, location, body: "" }))
        }
        RouteAction::Respond { status, body } => {
            Ok(answered(LocalReply { status: *status, location: None, body }))
        }
    }
}

/// How the head of a client's request becomes the head of the upstream request.
struct HeadRewrite<'r, 'p> {
    changes: Option<&'r HeaderChanges<'p>>,
    path: Option<&'r PathRewrite>,
    /// The path match of the route.
    matched: &'r PathMatch,
    host: Option<&'r str>,
    tokens: Option<&'r TokenPolicy>,
}

impl HeadRewrite<'_, '_> {
    /// Rewrites `head`. `inputs` keeps the original of everything that changes, because authorization may be
    /// repeated later; `header_filter` learns which trailers could bring back a header that is removed here.
    fn apply(
        &self,
        head: &mut RequestHead,
        has_body: bool,
        header_filter: &mut HeaderFilter,
        inputs: &mut AuthorizationInputs,
    ) {
        inputs.headers = header_filter.strip_connection_named(&mut head.headers).map(Box::new);
        if let Some(changes) = self.changes.filter(|changes| changes.change_request()) {
            let before = changes.apply_to_request(head);
            inputs.headers.get_or_insert_with(|| Box::new(before));
            header_filter.reserve(changes.names());
        }
        if let Some(target) = rewritten_target(self.path, self.matched, head) {
            inputs.target = Some(std::mem::replace(&mut head.target, target));
        }
        if let Some(host) = self.host {
            inputs.authority = Some(std::mem::replace(&mut head.authority, host.to_owned()));
        }
        if let Some(tokens) = self.tokens {
            let before = tokens.remove_verified(head, &inputs.tokens);
            inputs.headers = inputs.headers.take().or_else(|| before.headers.map(Box::new));
            inputs.target = inputs.target.take().or(before.target);
        }
        let may_follow = head.may_have_trailers(has_body);
        let before = header_filter.strip_trailer_announcements(&mut head.headers, may_follow);
        inputs.headers = inputs.headers.take().or_else(|| before.map(Box::new));
    }
}

#[cfg(test)]
mod tests;
