//! A request that is refused before it has an endpoint, with the response headers of its route.
//!
//! Envoy chooses the route before it authenticates, so a response of its own has the `response_headers_to_add` of the
//! route that the request matches. Here the route is looked up for them alone, after the refusal: nothing else of the
//! route applies to a request that was not allowed.

use weft_model::{Action, WeightedCluster};

use crate::authenticate::{Facts, Sender};
use crate::connection::Connection;
use crate::denial::Denial;
use crate::http::head::RequestHead;
use crate::mutate::{About, Changes};
use crate::plan::PlannedHttp;

/// A request that is refused before it has an endpoint.
pub(crate) struct Refused<'p> {
    pub(crate) denial: Denial,
    /// The header changes of the route that the request matches. None where no route is known.
    pub(crate) changes: Option<Box<Changes<'p>>>,
}

impl From<Denial> for Refused<'_> {
    fn from(denial: Denial) -> Self {
        Self { denial, changes: None }
    }
}

impl<'p> Refused<'p> {
    /// A request that its token or a policy refuses. Claims of tokens choose no route here.
    pub(crate) fn by_route(
        denial: Denial,
        head: &RequestHead,
        sender: Sender<'p>,
        (http, connection): (&'p PlannedHttp, &'p Connection),
    ) -> Self {
        let table = http.routes.as_ref();
        let found = table.and_then(|table| table.route(&Facts::new(head, sender, None)));
        let changes = found.and_then(|found| {
            let about = || About { client: sender.client, ..connection.about(&found.route.name) };
            Changes::of(found.mutations(drawn(&found.route.action)), about)
        });
        Self { denial, changes }
    }
}

/// One of the clusters that a route forwards to.
fn drawn(action: &Action) -> Option<&WeightedCluster> {
    match action {
        Action::Forward { clusters, .. } => WeightedCluster::draw(clusters, fastrand::u32(..)),
        Action::Redirect(_) | Action::Respond { .. } => None,
    }
}
