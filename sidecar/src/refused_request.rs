//! A request that is refused before an endpoint is chosen, with the response headers of its route.
//!
//! Envoy chooses the route before it authenticates, so its local replies have the `response_headers_to_add` of the matching
//! route. The sidecar looks up the route for these headers only, after the refusal: nothing else of the route applies to a
//! request that was not allowed.

use weft_model::{RouteAction, WeightedCluster};

use crate::decision_context::DecisionContext;
use crate::denial::Denial;
use crate::header_mutation::{HeaderChanges, HeaderVariables};
use crate::http::head::RequestHead;
use crate::plan::PlannedHttp;
use crate::request_facts::{ClientInfo, HttpRequestFacts};

/// A request that is refused before an endpoint is chosen.
pub(crate) struct RefusedRequest<'p> {
    pub(crate) denial: Denial,
    /// The header changes of the matching route. None where no route matches.
    pub(crate) changes: Option<Box<HeaderChanges<'p>>>,
}

impl From<Denial> for RefusedRequest<'_> {
    fn from(denial: Denial) -> Self {
        Self { denial, changes: None }
    }
}

impl<'p> RefusedRequest<'p> {
    /// A request that its token or a policy refuses. Token claims are not available to route matching here.
    pub(crate) fn with_headers_of_route(
        denial: Denial,
        head: &RequestHead,
        client: ClientInfo<'p>,
        http: &'p PlannedHttp,
        context: DecisionContext<'p>,
    ) -> Self {
        let table = http.routes.as_ref();
        let found = table.and_then(|table| table.route(&HttpRequestFacts::new(head, client, None)));
        let changes = found.and_then(|found| {
            let route = &found.route.name;
            let variables = || HeaderVariables {
                client: client.address,
                ..context.connection.header_variables(route)
            };
            let cluster = drawn(&found.route.action, context.random);
            HeaderChanges::of(found.mutations(cluster), variables)
        });
        Self { denial, changes }
    }
}

/// A weighted choice among the clusters of a route.
fn drawn(action: &RouteAction, random: u32) -> Option<&WeightedCluster> {
    match action {
        RouteAction::Forward { clusters, .. } => WeightedCluster::pick(clusters, random),
        RouteAction::Redirect(_) | RouteAction::Respond { .. } => None,
    }
}
