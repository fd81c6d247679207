//! Whether a request is one that is served at all, and the form of it that everything behind sees:
//! authentication, authorization, routing and the service.

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
use crate::worker::SidecarWorker;

/// Judges a request of HTTP/2 by what it would be in HTTP/1.1, which the service may speak.
fn judge_translated(
    head: &mut RequestHead,
    has_body: bool,
    mode: DesyncMode,
) -> Result<(), Denial> {
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

/// Brings a request into that form. Gives which of its trailers are not passed on.
///
/// # Errors
/// Why it is not served.
pub(crate) fn normalize_request(
    head: &mut RequestHead,
    has_body: bool,
    http: &HttpService,
    connection: &ClientConnection,
    worker: &SidecarWorker,
) -> Result<HeaderFilter, Denial> {
    let origin = connection.previous_hop();
    if head.version == HttpVersion::Http2 {
        judge_translated(head, has_body, http.desync)?;
    }
    match method_refusal(head.method.as_str()) {
        Some(MethodRefusal::NotUpperCase) => {
            return Err(Denial::Malformed(
                "the method is a standard one that is not in upper case",
            ));
        }
        Some(MethodRefusal::Trace) => return Err(Denial::MethodNotAllowed("TRACE is not served")),
        None => {}
    }
    head.upgrade = match head.upgrade {
        Some(Upgrade::Tunnel) if !http.upgrades.connect => {
            return Err(Denial::MethodNotAllowed("CONNECT is not served here"));
        }
        Some(Upgrade::WebSocket) if !http.upgrades.websocket => {
            if head.version == HttpVersion::Http2 {
                return Err(Denial::MethodNotAllowed("WebSocket is not served here"));
            }
            // Over HTTP/1.1 a server may take no notice of it (RFC 9110, section 7.8).
            None
        }
        upgrade => upgrade,
    };
    head.normalize(http.path)?;
    let authority = authority::with_port(&head.authority, http.host_port, origin.port);
    if authority != head.authority {
        head.authority = authority.into_owned();
    }
    if http.underscores == HeadersWithUnderscores::Reject
        && head.headers.any_name(|name| name.contains(&b'_'))
    {
        return Err(Denial::Malformed("a header's name has an underscore"));
    }
    let underscored = match http.underscores {
        HeadersWithUnderscores::Allow => UnderscoreAction::Allowed,
        HeadersWithUnderscores::Drop => {
            UnderscoreAction::Dropped(connection.dropped(worker).clone())
        }
        HeadersWithUnderscores::Reject => UnderscoreAction::Rejected,
    };
    let header_filter = HeaderFilter::of_request(&head.headers, underscored);
    header_filter.strip_before_policies(&mut head.headers);
    forwarded::apply(&mut head.headers, http.forwarded, origin)?;
    identity_headers::apply(&mut head.headers, http.client_certificate, connection.proved.as_ref());
    Ok(header_filter)
}
