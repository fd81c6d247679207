//! A request that is to be sent to an endpoint: the last link of the proof chain `Authenticated -> Authorized ->
//! Routed`, which [`exchange`](crate::upstream::exchange) requires.

use weft_model::Name;

use crate::authorize::AuthorizationInputs;
use crate::header_mutation::HeaderChanges;
use crate::http::header_filter::HeaderFilter;
use crate::timeouts::RequestTimeouts;

/// A request that is to be sent to an endpoint of a cluster. Only [`decide`](crate::decide::decide) makes one, from a
/// routed request.
#[derive(Debug)]
pub(crate) struct ForwardedRequest<'p> {
    pub(crate) cluster: Name,
    /// The headers and trailers that are not forwarded.
    pub(crate) header_filter: HeaderFilter,
    pub(crate) timeouts: RequestTimeouts,
    /// Whether a CONNECT tunnel ends here: the endpoint gets the bytes inside the tunnel, without the CONNECT.
    pub(crate) ends_tunnel: bool,
    /// What authorization is repeated with when the policies change.
    pub(crate) inputs: AuthorizationInputs,
    /// The route's changes to the headers of the response.
    pub(crate) changes: Option<Box<HeaderChanges<'p>>>,
}
