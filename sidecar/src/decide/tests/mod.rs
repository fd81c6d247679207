//! Decisions about single requests, each by a plan that is built from a snapshot.

mod normalization;
mod policies;
mod routing;
mod tokens;

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use weft_certs::VerifiedPeer;
use weft_model::{
    AccessLogSinks, AppendAction, DEFAULT_ROUTE_TIMEOUT, HeaderAddition, HeaderFormat,
    HeaderMutation, HeaderMutations, HttpFilter, HttpService, PathMatch, Rbac, RbacAction,
    RbacFilter, Route, RouteAction, RouteMatch, RouteTable, TransportKind, VirtualHost,
    WeightedCluster,
};
use weft_runtime::clock::now;

use super::{RequestDecision, decide};
use crate::authenticate::TokenCache;
use crate::connection::ClientConnection;
use crate::decision_context::{DecisionContext, DecisionTime};
use crate::forwarded_request::ForwardedRequest;
use crate::header_mutation::HeaderChanges;
use crate::http::head::{RequestHead, ResponseHead};
use crate::http::headers::Headers;
use crate::http::test_head::{header_lines, header_map};
use crate::metrics::SidecarMetrics;
use crate::plan::SidecarPlan;
use crate::plan::build::Builder;
use crate::plan::test_model::{Model, address, http};
use crate::refused_request::RefusedRequest;
use crate::request_log::RequestLog;
use crate::request_metrics::ConnectionSeries;

/// The wall clock of the decisions, in seconds since the Unix epoch.
const NOW: u64 = 1_800_000_000;

/// What a request is decided with: a listener with its routes, a connection to it, time and randomness.
struct Setup {
    http: HttpService,
    table: RouteTable,
    /// Changes the snapshot before the plan is built.
    change_model: fn(Model) -> Model,
    client: SocketAddr,
    peer: Option<VerifiedPeer>,
    is_tls: bool,
    has_body: bool,
    random: u32,
    monotonic: Instant,
    wall: SystemTime,
}

impl Default for Setup {
    /// A listener without filters, which forwards every request to the cluster `web`.
    fn default() -> Self {
        let table = RouteTable::new("routes".into(), Vec::new());
        let setup = Self {
            http: http(),
            table,
            change_model: |model| model,
            client: ([10, 0, 0, 9], 4711).into(),
            peer: None,
            is_tls: false,
            has_body: false,
            random: 0,
            monotonic: now(),
            wall: at(0),
        };
        setup.routes(vec![route(prefix("/"), forward(&[("web", 1)]))])
    }
}

/// The result of a decision.
type Decision<'p> = Result<RequestDecision<'p>, RefusedRequest<'p>>;

impl Setup {
    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn http(self, change: impl FnOnce(&mut HttpService)) -> Self {
        self.with(|setup| change(&mut setup.http))
    }

    /// Replaces the routes by these, in a virtual host for every domain.
    fn routes(self, routes: Vec<Route>) -> Self {
        self.with(|setup| setup.table.hosts = vec![host("*", routes)])
    }

    fn filter(self, filter: HttpFilter) -> Self {
        self.http(|http| http.filters.push(filter))
    }

    /// Adds a policy that allows nothing.
    fn allowing_nothing(self) -> Self {
        let nothing = Rbac { action: RbacAction::Allow, policies: BTreeMap::new() };
        self.filter(enforced(nothing))
    }

    fn plan(&self) -> SidecarPlan {
        let model = Model::default().listener(None, self.http.clone()).routes(self.table.clone());
        (self.change_model)(model).build(&mut Builder::new()).plan
    }

    fn connection(&self) -> ClientConnection {
        ClientConnection {
            client: self.client,
            destination: address(1),
            peer: self.peer.clone(),
            certificate_headers: None,
            status: Rc::default(),
            kind: if self.is_tls { TransportKind::Tls } else { TransportKind::Plain },
            tls_version: self.is_tls.then_some("TLSv1.3"),
            trace: None,
            listener: "in".into(),
            pinned: RefCell::default(),
            metrics: Arc::<SidecarMetrics>::default(),
            dropped: OnceCell::new(),
            series: ConnectionSeries::default(),
        }
    }

    /// Decides a request, and passes the decision to `inspect`, with the head that the request then has and its log.
    fn inspect<T>(
        &self,
        mut head: RequestHead,
        tokens: &TokenCache,
        inspect: impl FnOnce(&Decision<'_>, &RequestHead, &RequestLog) -> T,
    ) -> T {
        let plan = self.plan();
        let connection = self.connection();
        let context = DecisionContext {
            connection: &connection,
            plan: &plan,
            tokens,
            time: DecisionTime { monotonic: self.monotonic, wall: self.wall },
            random: self.random,
        };
        let mut log = RequestLog::new(&head, AccessLogSinks::Stdout);
        let decision = decide(&mut head, self.has_body, context, &mut log);
        inspect(&decision, &head, &log)
    }

    /// The decision about a request, as text.
    fn decide(&self, head: RequestHead) -> String {
        self.inspect(head, &TokenCache::default(), |decision, head, _| text(decision, head))
    }

    /// What `of` returns for a request that is forwarded.
    fn forwarded<T>(
        &self,
        head: RequestHead,
        of: impl FnOnce(&ForwardedRequest<'_>, &RequestHead) -> T,
    ) -> T {
        self.inspect(head, &TokenCache::default(), |decision, head, _| match decision {
            Ok(RequestDecision::Forward(request)) => of(request, head),
            other => panic!("the request is not forwarded: {}", text(other, head)),
        })
    }
}

/// A request with what it is decided with and the expected decision.
type Row = (&'static str, Setup, RequestHead, &'static str);

fn check(rows: impl IntoIterator<Item = Row>) {
    for (name, setup, head, expected) in rows {
        assert_eq!(setup.decide(head), expected, "{name}");
    }
}

/// A decision as text: what is done, with the headers of the request that is forwarded, and the headers that the route adds to
/// the response.
fn text(decision: &Decision<'_>, head: &RequestHead) -> String {
    let (action, changes) = match decision {
        Ok(RequestDecision::Forward(request)) => {
            let RequestHead { method, authority, target, headers, .. } = head;
            let headers = bracketed("", &header_lines(headers));
            let action =
                format!("forward {} {method} {authority}{target}{headers}", request.cluster);
            (action, request.changes.as_deref())
        }
        Ok(RequestDecision::Answer { answer, changes }) => {
            let location = answer.location.as_ref().map(|location| format!(" {location}"));
            let body = Some(answer.body).filter(|body| !body.is_empty());
            let body = body.map(|body| format!(" {body:?}"));
            let parts = [location, body].into_iter().flatten();
            let action = format!("answer {}{}", answer.status, parts.collect::<String>());
            (action, changes.as_deref())
        }
        Err(RefusedRequest { denial, changes }) => {
            let reason = denial.body();
            (format!("refuse {} {}", denial.status(), reason.trim_end()), changes.as_deref())
        }
    };
    let response = changes.map(|changes| response_headers(changes, head));
    action + &bracketed("response ", &response.unwrap_or_default())
}

fn bracketed(title: &str, lines: &[String]) -> String {
    if lines.is_empty() { String::new() } else { format!(" {title}[{}]", lines.join(", ")) }
}

/// The headers of a response without headers, after these changes.
fn response_headers(changes: &HeaderChanges<'_>, request: &RequestHead) -> Vec<String> {
    let headers = Headers::from(header_map(&[]));
    let mut response = ResponseHead { status: 200, headers, content_length: None };
    changes.apply_to_response(request, &mut response);
    header_lines(&response.headers)
}

/// The wall clock this many seconds after [`NOW`].
fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(NOW + seconds)
}

fn prefix(path: &str) -> PathMatch {
    PathMatch::Prefix(path.into())
}

fn host(domain: &str, routes: Vec<Route>) -> VirtualHost {
    VirtualHost { name: domain.into(), domains: vec![domain.into()], routes, mutations: None }
}

/// A route with the name `route`.
fn route(path: PathMatch, action: RouteAction) -> Route {
    let matches = RouteMatch { path, ..RouteMatch::any() };
    Route { name: "route".into(), matches, action, mutations: None }
}

/// The action to forward requests to these clusters, by weight.
fn forward(clusters: &[(&str, u32)]) -> RouteAction {
    let cluster = |(name, weight): &(&str, u32)| WeightedCluster::new((*name).into(), *weight);
    RouteAction::Forward {
        clusters: clusters.iter().map(cluster).collect(),
        path_rewrite: None,
        host_rewrite: None,
        timeout: Some(DEFAULT_ROUTE_TIMEOUT),
        ends_tunnels: false,
    }
}

fn respond(body: &str) -> RouteAction {
    RouteAction::Respond { status: 200, body: body.into() }
}

fn enforced(rules: Rbac) -> HttpFilter {
    HttpFilter::Rbac(Arc::new(RbacFilter { rules: Some(rules), shadow: None }))
}

/// A change that overwrites a header.
fn overwrite(name: &str, value: &str) -> HeaderMutation {
    let value = HeaderFormat::parse(value).expect("a format");
    let action = AppendAction::Overwrite;
    let addition = HeaderAddition { name: name.into(), value, action, keep_empty: false };
    HeaderMutation { remove: Vec::new(), add: vec![addition] }
}

fn on_request(request: HeaderMutation) -> Option<Arc<HeaderMutations>> {
    Some(Arc::new(HeaderMutations { request, ..HeaderMutations::default() }))
}

fn on_response(response: HeaderMutation) -> Option<Arc<HeaderMutations>> {
    Some(Arc::new(HeaderMutations { response, ..HeaderMutations::default() }))
}
