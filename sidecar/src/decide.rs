//! Decides a request by one plan: whether it is served, and where it goes.

use std::time::{Duration, SystemTime};

use weft_model::path::unescaped_location;
use weft_model::{Action, EscapedSlashes, HttpTimeouts, Name, WeightedCluster};

use crate::admission::admit;
use crate::authenticate::{Sender, authenticate};
use crate::authorize::{Authorized, Case, authorize};
use crate::connection::Connection;
use crate::denial::Denial;
use crate::forwarded;
use crate::http::head::{RequestHead, Upgrade};
use crate::http::header_filter::HeaderFilter;
use crate::mutate::{About, Changes};
use crate::patience::Patience;
use crate::plan::{Plan, PlannedHttp};
use crate::refused::Refused;
use crate::reply::OwnAnswer;
use crate::route::{Routed, rewritten_target, route, sent_to};
use crate::story::Story;
use crate::worker::{Worker, now, wall_clock};

/// What to do with a request.
#[expect(
    clippy::large_enum_variant,
    reason = "it lives for one request, and a box would be an allocation for each"
)]
pub(crate) enum Decision<'p> {
    Forward {
        target: Name,
        header_filter: HeaderFilter,
        patience: Patience,
        ends_tunnel: bool,
        case: Case,
        changes: Option<Box<Changes<'p>>>,
    },
    Answer {
        answer: OwnAnswer,
        changes: Option<Box<Changes<'p>>>,
    },
}

/// How long a request may last.
fn patience(
    response: Option<Duration>,
    timeouts: HttpTimeouts,
    is_grpc: bool,
    ends: Option<SystemTime>,
) -> Patience {
    Patience {
        response,
        request: timeouts.request,
        silence: timeouts.stream_idle.limit(is_grpc),
        stall: timeouts.stall_limit(),
        until: ends.map(|ends| now() + ends.duration_since(wall_clock()).unwrap_or_default()),
    }
}

/// Checks the tokens of a request, then its policies.
fn allow<'h>(
    head: &'h mut RequestHead,
    sender: Sender<'h>,
    http: &PlannedHttp,
    (worker, story): (&Worker, &mut Story),
) -> Result<Authorized<'h>, Denial> {
    let tokens = http.tokens.as_ref();
    let authenticated = authenticate(head, sender, tokens, wall_clock(), &worker.tokens)?;
    let (judgement, authorized) = authorize(authenticated, &http.rules);
    story.judged(&judgement, worker);
    authorized
}

/// Decides a request by one plan, and turns its head into the one that is sent on.
pub(crate) fn decide<'p>(
    head: &mut RequestHead,
    has_body: bool,
    connection: &'p Connection,
    plan: &'p Plan,
    (worker, story): (&Worker, &mut Story),
) -> Result<Decision<'p>, Refused<'p>> {
    let http = connection.service(plan).ok_or(Denial::NoEndpoint)?;
    let client = forwarded::client(&head.headers, http.http.forwarded, connection.origin());
    let header_filter = admit(head, has_body, &http.http, connection, worker);
    story.desync = head.desync;
    let mut header_filter = header_filter?;
    if http.http.path.escaped_slashes == EscapedSlashes::Redirect
        && let Some(location) = unescaped_location(&head.target)
    {
        let answer = OwnAnswer { status: 307, location: Some(location), body: String::new() };
        return Ok(Decision::Answer { answer, changes: None });
    }

    let sender = connection.sender(client);
    let tokens = http.tokens.as_ref();
    if let Some(tokens) = tokens {
        header_filter.reserve(tokens.written_headers());
    }
    let authorized = match allow(head, sender, http, (worker, story)) {
        Ok(authorized) => authorized,
        Err(denial) => return Err(Refused::by_route(denial, head, sender, (http, connection))),
    };
    let routed: Routed<'_, '_> = route(authorized, http.routes.as_ref())?;

    let Routed { found, ends, mut case, .. } = routed;
    let route = found.route;
    let about = |cluster| About { client, cluster, ..connection.about(&route.name) };
    story.subject.clone_from(&case.proved.subject);
    match &route.action {
        Action::Forward { clusters, path_rewrite, host_rewrite, timeout, ends_tunnels } => {
            let cluster =
                WeightedCluster::draw(clusters, fastrand::u32(..)).ok_or(Denial::NoRoute)?;
            let target = cluster.name.clone();
            let levels = found.mutations(Some(cluster));
            let changes = Changes::of(levels, || about(&*cluster.name));
            let is_grpc = head.is_grpc();
            case.headers = header_filter.strip_connection_named(&mut head.headers).map(Box::new);
            if let Some(changes) = changes.as_deref().filter(|changes| changes.touch_request()) {
                let before = changes.apply_to_request(head);
                case.headers.get_or_insert_with(|| Box::new(before));
                header_filter.reserve(changes.names());
            }
            let matched = &route.matches.path;
            if let Some(target) = rewritten_target(path_rewrite.as_ref(), matched, head) {
                case.target = Some(std::mem::replace(&mut head.target, target));
            }
            if let Some(host) = host_rewrite {
                case.authority = Some(std::mem::replace(&mut head.authority, host.clone()));
            }
            if let Some(tokens) = tokens {
                let before = tokens.conceal(head, &case.proved);
                case.headers = case.headers.or_else(|| before.headers.map(Box::new));
                case.target = case.target.or(before.target);
            }
            let may_follow = head.may_have_trailers(has_body);
            let before = header_filter.strip_trailer_announcements(&mut head.headers, may_follow);
            case.headers = case.headers.or_else(|| before.map(Box::new));
            let patience = patience(*timeout, http.http.timeouts, is_grpc, ends);
            let ends_tunnel = *ends_tunnels && head.upgrade == Some(Upgrade::Tunnel);
            Ok(Decision::Forward { target, header_filter, patience, ends_tunnel, case, changes })
        }
        Action::Redirect(redirect) => {
            let location = Some(sent_to(redirect, &route.matches.path, head, connection.is_tls));
            let answer = OwnAnswer { status: redirect.status, location, body: String::new() };
            let changes = Changes::of(found.mutations(None), || about(""));
            Ok(Decision::Answer { answer, changes })
        }
        Action::Respond { status, body } => {
            let answer = OwnAnswer { status: *status, location: None, body: body.clone() };
            let changes = Changes::of(found.mutations(None), || about(""));
            Ok(Decision::Answer { answer, changes })
        }
    }
}
