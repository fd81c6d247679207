//! Validates a request and brings it into the normal form that authentication, authorization, routing and the service
//! see.

use http::Method;
use weft_model::{DesyncMode, HeadersWithUnderscores, HttpService, MethodRefusal, method_refusal};

use crate::connection::ClientConnection;
use crate::denial::Denial;
use crate::forwarded;
use crate::http::authority;
use crate::http::desync::{DesyncAction, DesyncFindings, DesyncReason};
use crate::http::h1::looks_like_framing;
use crate::http::head::{HttpVersion, RequestHead, Upgrade};
use crate::http::header_filter::{HeaderFilter, UnderscoreAction};
use crate::identity_headers;

/// Applies the desync checks of HTTP/1.1 to an HTTP/2 request, because the service may speak HTTP/1.1.
fn check_desync(head: &mut RequestHead, has_body: bool, mode: DesyncMode) -> Result<(), Denial> {
    let mut found = DesyncFindings::default();
    let has_no_body = head.method == Method::GET || head.method == Method::HEAD;
    match head.content_length {
        _ if !has_no_body || head.upgrade.is_some() => {}
        Some(0) => found.add(DesyncReason::GetHeadZeroContentLength),
        Some(_) => found.add(DesyncReason::UndefinedContentLengthSemantics),
        None if has_body => found.add(DesyncReason::UndefinedTransferEncodingSemantics),
        None => {}
    }
    if head.headers.any_name(looks_like_framing) {
        found.add(DesyncReason::SuspiciousHeader);
    }
    let Some(reason) = found.worst() else {
        return Ok(());
    };
    head.desync = Some(reason);
    match reason.action(mode) {
        DesyncAction::Refuse => return Err(Denial::Desync(reason)),
        DesyncAction::Isolate | DesyncAction::AllowAndClose => head.is_isolated = true,
        DesyncAction::Allow => {}
    }
    Ok(())
}

/// Validates and normalizes a request. Returns the filter for its trailers.
///
/// # Errors
/// Refuses a request that departs from HTTP in a way that `http.desync` does not allow, has a method or upgrade that is
/// not served, has an invalid path, names too many forwarders, or has a header with an underscore where those are
/// rejected.
pub(crate) fn normalize_request(
    head: &mut RequestHead,
    has_body: bool,
    http: &HttpService,
    connection: &ClientConnection,
) -> Result<HeaderFilter, Denial> {
    let previous_hop = connection.previous_hop();
    if head.version == HttpVersion::Http2 {
        check_desync(head, has_body, http.desync)?;
    }
    match method_refusal(head.method.as_str()) {
        Some(MethodRefusal::NotUpperCase) => {
            return Err(Denial::Malformed("invalid method: standard methods are upper case"));
        }
        Some(MethodRefusal::Trace) => return Err(Denial::MethodNotAllowed("TRACE is not served")),
        None => {}
    }
    head.upgrade = match head.upgrade {
        Some(Upgrade::Tunnel) if !http.upgrades.connect => {
            return Err(Denial::MethodNotAllowed("CONNECT is not enabled on this listener"));
        }
        Some(Upgrade::WebSocket) if !http.upgrades.websocket => {
            if head.version == HttpVersion::Http2 {
                return Err(Denial::MethodNotAllowed("WebSocket is not enabled on this listener"));
            }
            // Over HTTP/1.1 a server may ignore the upgrade (RFC 9110, section 7.8).
            None
        }
        upgrade => upgrade,
    };
    head.normalize(http.path)?;
    let authority = authority::with_port(&head.authority, http.host_port, previous_hop.port);
    if authority != head.authority {
        head.authority = authority.into_owned();
    }
    if http.underscores == HeadersWithUnderscores::Reject
        && head.headers.any_name(|name| name.contains(&b'_'))
    {
        return Err(Denial::Malformed("a header name contains an underscore"));
    }
    let underscored = match http.underscores {
        HeadersWithUnderscores::Allow => UnderscoreAction::Allowed,
        HeadersWithUnderscores::Drop => UnderscoreAction::Dropped(connection.dropped().clone()),
        HeadersWithUnderscores::Reject => UnderscoreAction::Rejected,
    };
    let header_filter = HeaderFilter::of_request(&head.headers, underscored);
    header_filter.strip_before_policies(&mut head.headers);
    forwarded::apply(&mut head.headers, http.forwarded, previous_hop)?;
    identity_headers::apply(
        &mut head.headers,
        http.client_certificate,
        connection.certificate_headers.as_ref(),
    );
    Ok(header_filter)
}
