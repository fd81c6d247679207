//! Forwards the interim (1xx) responses of an endpoint.

use crate::denial::Denial;
use crate::http::head::ResponseHead;
use crate::http::header_filter::HeaderFilter;
use crate::responder::Responder;
use crate::upstream_failure::ResponseFault;

/// How many interim responses an endpoint may send before the final one.
const INTERIM_LIMIT: usize = 16;

/// Forwards an interim response. `number` counts them from 1.
///
/// # Errors
/// When there are too many, or the client is gone.
pub(super) async fn forward_interim(
    mut head: ResponseHead,
    number: usize,
    responder: &mut Responder<'_>,
) -> Result<(), Denial> {
    if number > INTERIM_LIMIT {
        return Err(Denial::UpstreamBroken(ResponseFault::TooManyInterim));
    }
    HeaderFilter::of_response(&head.headers).strip(&mut head.headers);
    responder.interim(head).await.map_err(|_| Denial::ClientGone)
}
