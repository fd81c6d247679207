//! Whether a request is one that is served at all, and the form of it that everything behind sees:
//! authentication, authorization, routing and the service.

use http::Method;
use weft_model::{HttpService, Underscores};

use crate::denial::Denial;
use crate::forwarded::{self, Origin};
use crate::http::authority;
use crate::http::head::{HttpVersion, RequestHead, Unwanted, Upgrade};
use crate::identity_headers::{self, ProvedFields};

/// Brings a request into that form. Gives which of its trailers are not passed on.
///
/// # Errors
/// Why it is not served.
pub(crate) fn admit(
    head: &mut RequestHead,
    http: &HttpService,
    origin: Origin,
    proved: Option<&ProvedFields>,
) -> Result<Unwanted, Denial> {
    if head.method == Method::TRACE {
        // It would tell a script what only the browser and we should know (RFC 9110, section 9.3.8).
        return Err(Denial::MethodNotAllowed("TRACE is not served"));
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
    if http.underscores == Underscores::Reject && head.fields.any_name(|name| name.contains(&b'_'))
    {
        return Err(Denial::Malformed("a field's name has an underscore"));
    }
    let unwanted = Unwanted::of_request(&head.fields, http.underscores);
    unwanted.strip(&mut head.fields);
    forwarded::apply(&mut head.fields, http.forwarded, origin)?;
    identity_headers::apply(&mut head.fields, http.client_certificate, proved);
    Ok(unwanted)
}
