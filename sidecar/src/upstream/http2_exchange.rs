//! One request and its response over an HTTP/2 connection to an endpoint.

use std::net::SocketAddr;
use std::pin::pin;

use bytes::Bytes;
use h2::client::SendRequest;
use http::Method;

use super::call::Call;
use super::failure::{ExchangeFailure, connect_failure};
use super::interim::forward_interim;
use super::outcome::ExchangeOutcome;
use super::pool::StreamLease;
use super::upgrade;
use super::upload::Upload;
use super::upstream_response::{UpstreamResponse, next_response};
use crate::denial::Denial;
use crate::http::body::{BodyProgress, BodySink, BodySource};
use crate::http::forward_body::forward_body;
use crate::http::h2 as http2;
use crate::http::head::Upgrade;
use crate::plan::PlannedCluster;
use crate::upstream_failure::ResponseFault;
use crate::worker::SidecarWorker;

/// Sends the request to an endpoint over HTTP/2, on a pooled connection, and forwards the response.
///
/// # Errors
/// When the endpoint cannot be reached, no valid response arrives, or the client is gone.
pub(super) async fn over_http2(
    call: &mut Call<'_, '_, '_>,
    cluster: &PlannedCluster,
    address: SocketAddr,
    worker: &SidecarWorker,
) -> Result<ExchangeOutcome, ExchangeFailure> {
    let StreamLease { sender, settings, alert, open: _open } = worker
        .pools
        .http2(cluster, address)
        .await
        .map_err(|error| connect_failure(address, &error))?;
    let scheme = if cluster.settings.tls.is_some() { "https" } else { "http" };
    let result = match call.head.upgrade {
        Some(upgrade) => {
            if upgrade == Upgrade::WebSocket {
                // The endpoint's SETTINGS say whether it supports WebSocket (RFC 8441, section 3).
                let limit = cluster.settings.connect_timeout;
                drop(tokio::time::timeout(limit, settings.wait()).await);
            }
            Box::pin(upgrade::over_http2(call, sender, upgrade, scheme)).await
        }
        None => match http2::to_request(call.head, scheme) {
            Ok(request) => {
                let count = cluster.settings.response_header_count;
                exchange_http2(call, sender, request, count).await
            }
            Err(denial) => Err(ExchangeFailure::Denied(denial)),
        },
    };
    if matches!(result, Err(ExchangeFailure::Stale(_) | ExchangeFailure::NotProcessed)) {
        worker.pools.remove_http2(cluster, address);
    }
    match (result, alert.get()) {
        (Err(ExchangeFailure::Stale(_)), Some(failure)) => {
            Err(ExchangeFailure::Stale(ResponseFault::Tls(failure)))
        }
        (result, _) => result,
    }
}

/// Sends the request's body and forwards the response at the same time: either may end first.
async fn exchange_http2(
    call: &mut Call<'_, '_, '_>,
    mut sender: SendRequest<Bytes>,
    request: http::Request<()>,
    header_limit: usize,
) -> Result<ExchangeOutcome, ExchangeFailure> {
    let changes = call.changes();
    let Call { head, request: forwarded, source, responder, progress, replay, .. } = call;
    let is_bodiless = source.is_empty();
    let (mut response, stream) =
        sender.send_request(request, is_bodiless).map_err(|_| ExchangeFailure::NotProcessed)?;
    let mut sink = if is_bodiless { BodySink::Closed } else { BodySink::Http2(stream) };
    let mut outcome = ExchangeOutcome::default();
    let forwarding_body = pin!(async {
        if is_bodiless {
            return Ok(0);
        }
        forward_body(
            source,
            &mut sink,
            &forwarded.header_filter,
            BodyProgress::of_repeatable(progress, replay),
        )
        .await
    });
    let mut upload = Upload::new(forwarding_body, progress);
    let mut interim = 0;
    let response = loop {
        let next = pin!(next_response(&mut response));
        let next = upload.until_response(next, responder).await;
        match next.map_err(ExchangeFailure::Denied)?? {
            UpstreamResponse::Final(response) => break response,
            UpstreamResponse::Interim(head) => {
                interim += 1;
                let forwarding = Box::pin(forward_interim(head, interim, responder));
                forwarding.await.map_err(ExchangeFailure::Denied)?;
            }
        }
    };
    let (parts, body) = response.into_parts();
    let mut body = http2::ReceivedBody::new(body);
    if parts.headers.len() > header_limit {
        let fault = ResponseFault::TooManyHeaders;
        return Err(ExchangeFailure::Denied(Denial::UpstreamBroken(fault)));
    }
    let bodiless = head.method == Method::HEAD || parts.status == 304 || parts.status == 204;
    let response = http2::received_response(parts, bodiless);
    let response =
        response.map_err(|fault| ExchangeFailure::Denied(Denial::UpstreamBroken(fault)))?;
    outcome.status = response.status;
    let mut body = BodySource::Http2(&mut body);
    if !upload.is_whole() {
        responder.record_early_response();
    }
    let (header_filter, mut downstream) = responder.start(response, &body, head, changes);
    {
        let forwarding_body = pin!(forward_body(
            &mut body,
            &mut downstream,
            &header_filter,
            BodyProgress::of_response(progress)
        ));
        outcome.record_download(upload.until_downloaded(forwarding_body).await, progress);
    }
    outcome.bytes_to_endpoint = upload.bytes();
    if outcome.aborted.is_some() {
        downstream.flush_and_abort().await;
    }
    responder.record_end(outcome.aborted.is_none() && upload.is_whole());
    Ok(outcome)
}
