//! Receives responses of an endpoint over HTTP/2.

use h2::client::ResponseFuture;

use super::failure::ExchangeFailure;
use crate::denial::Denial;
use crate::http::head::ResponseHead;
use crate::http::headers::Headers;
use crate::upstream_failure::ResponseFault;

/// A response of an endpoint over HTTP/2.
pub(super) enum UpstreamResponse {
    Interim(ResponseHead),
    Final(http::Response<h2::RecvStream>),
}

/// Waits for the next response, interim or final.
///
/// # Errors
/// When the stream or the connection ends without a final response.
pub(super) async fn next_response(
    response: &mut ResponseFuture,
) -> Result<UpstreamResponse, ExchangeFailure> {
    std::future::poll_fn(|cx| {
        if let std::task::Poll::Ready(Some(Ok(interim))) = response.poll_informational(cx) {
            let (parts, ()) = interim.into_parts();
            let headers = Headers::from(parts.headers);
            let head =
                ResponseHead { status: parts.status.as_u16(), headers, content_length: None };
            return std::task::Poll::Ready(Ok(UpstreamResponse::Interim(head)));
        }
        std::pin::Pin::new(&mut *response).poll(cx).map(|response| match response {
            Ok(response) => Ok(UpstreamResponse::Final(response)),
            Err(error) => Err(without_response(&error)),
        })
    })
    .await
}

/// Classifies a stream that ended without a response by whether the endpoint may have processed the request. A GOAWAY
/// with NO_ERROR ends only streams that the endpoint did not process (RFC 9113, section 6.8).
fn without_response(error: &h2::Error) -> ExchangeFailure {
    let fault = ResponseFault::of_http2(error);
    match error.reason() {
        Some(h2::Reason::REFUSED_STREAM) => ExchangeFailure::NotProcessed,
        Some(h2::Reason::NO_ERROR) if error.is_go_away() => ExchangeFailure::NotProcessed,
        _ if error.is_go_away() || error.is_io() => ExchangeFailure::Stale(fault),
        _ => ExchangeFailure::Denied(Denial::UpstreamBroken(fault)),
    }
}
