//! HTTP/2 over the `h2` crate: converts heads in both directions, and reads and writes bodies with flow control.

use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use weft_model::HttpLimits;

use super::authority::is_authority;
use super::body_error::BodyError;
use super::head::{
    BODY_LIMIT_BYTES, HttpVersion, RequestHead, ResponseHead, Upgrade, is_grpc, is_hop_by_hop,
};
use super::headers::Headers;
use crate::denial::Denial;
use crate::upstream_failure::ResponseFault;

/// The flow-control window of a stream: how much a peer may send before we have forwarded it.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// How much of a stream the h2 crate buffers while the receiver's window is full.
pub(crate) const SEND_BUFFER_BYTES: usize = 64 * 1024;
/// The h2 crate's budget for small DATA frames of a client connection, where each frame counts as at least 256 bytes:
/// 64 frames for each stream that a connection may have. Streams of small messages stay below it, floods do not.
pub(crate) const DATA_FRAME_BUDGET_BYTES: usize = 4 * 1024 * 1024;
/// The same budget for a peer with a verified identity: a sidecar forwards the messages of many clients.
pub(crate) const DATA_FRAME_BUDGET_OF_PEER_BYTES: usize = 32 * 1024 * 1024;

/// A request that is refused because of its head.
#[derive(Debug)]
pub(crate) struct RefusedHead {
    pub(crate) denial: Denial,
    /// Whether this is a gRPC call, which must be refused with a gRPC status.
    pub(crate) is_grpc: bool,
}

/// The head and body of a received request.
///
/// # Errors
/// [`RefusedHead`] when the head violates a rule of RFC 9113, section 8, that the h2 crate does not check, or a limit.
pub(crate) fn received_request(
    request: Request<h2::RecvStream>,
    limits: &HttpLimits,
) -> (Result<RequestHead, RefusedHead>, ReceivedBody) {
    let (parts, body) = request.into_parts();
    let body = ReceivedBody::new(body);
    let kind = parts.headers.get(http::header::CONTENT_TYPE);
    let is_grpc = kind.is_some_and(|kind| is_grpc(kind.as_bytes()));
    let target = parts.uri.path_and_query().map_or(0, |target| target.as_str().len());
    let head = check_limits(&parts.headers, target, limits).and_then(|()| head(parts));
    (head.map_err(|denial| RefusedHead { denial, is_grpc }), body)
}

fn check_limits(headers: &HeaderMap, target: usize, limits: &HttpLimits) -> Result<(), Denial> {
    if target > limits.target_bytes {
        return Err(Denial::TargetTooLong);
    }
    // Header list size as RFC 9113, section 10.5.1, defines it.
    let size = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len();
    let total: usize = headers.iter().map(|field| size(field) + 32).sum();
    let largest = headers.iter().map(size).max().unwrap_or(0);
    if total > limits.head_bytes
        || largest > limits.header_bytes
        || headers.len() > limits.header_count
    {
        return Err(Denial::HeadTooLarge);
    }
    Ok(())
}

fn head(mut parts: http::request::Parts) -> Result<RequestHead, Denial> {
    let upgrade = upgrade(&parts)?;
    let mut headers = parts.headers;
    let authority = authority(parts.uri.authority(), &headers)?;
    if headers
        .keys()
        .any(|name| is_hop_by_hop(name.as_str().as_bytes()) && name != http::header::TE)
    {
        return Err(Denial::Malformed("connection-specific header in HTTP/2"));
    }
    // The h2 crate refuses every value but `trailers` in lower case before the request reaches this check.
    let is_trailers = |te: &HeaderValue| te.as_bytes().eq_ignore_ascii_case(b"trailers");
    if !headers.get_all(http::header::TE).iter().all(is_trailers) {
        return Err(Denial::Malformed("te must be trailers in HTTP/2"));
    }
    if headers.keys().any(|name| name.as_str().contains('"')) {
        // The h2 crate accepts `"`, which is not a token character (RFC 9110, section 5.6.2).
        return Err(Denial::Malformed("invalid header name: must be a token"));
    }
    let is_padded = |value: &HeaderValue| {
        let is_space = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
        is_space(value.as_bytes().first()) || is_space(value.as_bytes().last())
    };
    if headers.values().any(is_padded) {
        // Forbidden by RFC 9113, section 8.2.1: over HTTP/1.1 the value would change.
        return Err(Denial::Malformed("header value with leading or trailing whitespace"));
    }
    let scheme = parts.uri.scheme_str();
    // Without an authority the h2 crate reports no scheme, although it has checked it.
    let has_scheme = upgrade != Some(Upgrade::Tunnel) && parts.uri.authority().is_some();
    if has_scheme && !matches!(scheme, Some("http" | "https")) {
        return Err(Denial::Malformed("invalid scheme: must be http or https"));
    }
    headers.remove(http::header::HOST);
    let content_length = take_length(&mut headers)?;
    let target = match upgrade {
        // As over HTTP/1.1, a CONNECT request has no path.
        Some(Upgrade::Tunnel) => "",
        Some(Upgrade::WebSocket) | None => {
            parts.uri.path_and_query().map_or("/", |target| target.as_str())
        }
    };
    let target = target.to_owned();
    if upgrade == Some(Upgrade::WebSocket) {
        parts.method = Method::GET;
    }
    Ok(RequestHead {
        readings: None,
        method: parts.method,
        target,
        authority,
        headers: Headers::from(headers),
        upgrade,
        content_length,
        version: HttpVersion::Http2,
        desync: None,
        is_isolated: false,
    })
}

/// The protocol that a CONNECT asks for (RFC 9113, section 8.5; RFC 8441); none for other methods.
fn upgrade(parts: &http::request::Parts) -> Result<Option<Upgrade>, Denial> {
    if parts.method != Method::CONNECT {
        return Ok(None);
    }
    match parts.extensions.get::<h2::ext::Protocol>() {
        Some(protocol) if protocol.as_str() == "websocket" => Ok(Some(Upgrade::WebSocket)),
        Some(_) => Err(Denial::NotImplemented(
            "unsupported :protocol of an extended CONNECT: only websocket is supported",
        )),
        None => Ok(Some(Upgrade::Tunnel)),
    }
}

/// The authority of a request: `:authority`, or `host` without it. They must not differ (RFC 9113, section 8.3.1).
fn authority(
    from_pseudo_header: Option<&Authority>,
    headers: &HeaderMap,
) -> Result<String, Denial> {
    let mut hosts = headers.get_all(http::header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Denial::Malformed("more than one host header"));
    }
    let host = host.map(HeaderValue::to_str).transpose();
    let host = host.map_err(|_| Denial::Malformed("invalid host: not a host and port"))?;
    let authority = match (from_pseudo_header.map(Authority::as_str), host) {
        (Some(authority), Some(host)) if !authority.eq_ignore_ascii_case(host) => {
            return Err(Denial::Malformed("host differs from :authority"));
        }
        (Some(authority), _) | (None, Some(authority)) => authority,
        (None, None) => return Err(Denial::Malformed("missing :authority")),
    };
    if !is_authority(authority.as_bytes()) {
        return Err(Denial::Malformed("invalid :authority: not a host and port"));
    }
    Ok(authority.to_owned())
}

fn take_length(headers: &mut HeaderMap) -> Result<Option<u64>, Denial> {
    let Some(value) = headers.remove(http::header::CONTENT_LENGTH) else {
        return Ok(None);
    };
    let length = value
        .to_str()
        .ok()
        .filter(|text| text.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|t| t.parse().ok());
    let length = length.ok_or(Denial::Malformed("invalid content-length: must be a number"))?;
    if length > BODY_LIMIT_BYTES { Err(Denial::BodyTooLarge) } else { Ok(Some(length)) }
}

/// Converts the head of a request into an HTTP/2 request.
///
/// # Errors
/// When authority and target form no valid URI. Admitted requests always have valid ones.
pub(crate) fn to_request(head: &RequestHead, scheme: &str) -> Result<Request<()>, Denial> {
    let malformed = Denial::Malformed("invalid request target: not a URI");
    let uri = Uri::builder().authority(head.authority.as_str());
    let uri = match head.upgrade {
        // A plain CONNECT has only an authority (RFC 9113, section 8.5).
        Some(Upgrade::Tunnel) => uri,
        Some(Upgrade::WebSocket) | None => uri.scheme(scheme).path_and_query(head.target.as_str()),
    };
    let uri = uri.build().map_err(|_| malformed)?;
    let mut request = Request::new(());
    *request.method_mut() = head.method.clone();
    if head.upgrade == Some(Upgrade::WebSocket) {
        *request.method_mut() = Method::CONNECT;
        request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    }
    *request.uri_mut() = uri;
    *request.version_mut() = http::Version::HTTP_2;
    let mut headers = head.headers.to_map();
    headers.remove(http::header::HOST);
    if let Some(length) = head.content_length {
        headers.insert(http::header::CONTENT_LENGTH, length.into());
    }
    *request.headers_mut() = headers;
    Ok(request)
}

/// The head of a received response. `bodiless` says that no body follows.
///
/// # Errors
/// When `content-length` is not a number or exceeds [`BODY_LIMIT_BYTES`].
pub(crate) fn received_response(
    parts: http::response::Parts,
    bodiless: bool,
) -> Result<ResponseHead, ResponseFault> {
    let mut headers = parts.headers;
    // For HEAD and 304 the length describes a body that is not sent, and is forwarded as a header.
    let content_length = if bodiless {
        None
    } else {
        take_length(&mut headers).map_err(|denial| match denial {
            Denial::BodyTooLarge => ResponseFault::BodyTooLarge,
            _ => ResponseFault::BadLength,
        })?
    };
    Ok(ResponseHead {
        status: parts.status.as_u16(),
        headers: Headers::from(headers),
        content_length,
    })
}

/// Converts the head of a response into an HTTP/2 response.
pub(crate) fn to_response(head: ResponseHead) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(head.status).unwrap_or(StatusCode::BAD_GATEWAY);
    let mut headers = head.headers.into_map();
    if let Some(length) = head.content_length {
        headers.insert(http::header::CONTENT_LENGTH, length.into());
    }
    *response.headers_mut() = headers;
    response
}

/// A body that is received over HTTP/2.
#[derive(Debug)]
pub(crate) struct ReceivedBody {
    stream: h2::RecvStream,
    /// How many bytes of the pieces that were read still occupy the flow-control windows. The h2 crate's count includes
    /// unread pieces.
    unreleased: usize,
}

impl ReceivedBody {
    pub(crate) fn new(stream: h2::RecvStream) -> Self {
        Self { stream, unreleased: 0 }
    }

    /// Whether the body has ended.
    pub(crate) fn is_end(&self) -> bool {
        self.stream.is_end_stream()
    }

    /// The next piece, whose window is released at once. The sender is limited by how fast the receiver takes pieces,
    /// since no piece is read before the last one was sent.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        let piece = self.next().await?;
        self.release(piece.as_ref().map_or(0, Bytes::len));
        Ok(piece)
    }

    /// The next piece. It occupies the flow-control windows until [`Self::release_beyond`].
    pub(crate) async fn unreleased_piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        let piece = self.next().await?;
        self.unreleased += piece.as_ref().map_or(0, Bytes::len);
        Ok(piece)
    }

    /// Releases the window of all but the last `kept` unreleased bytes.
    pub(crate) fn release_beyond(&mut self, kept: usize) {
        let released = self.unreleased.saturating_sub(kept);
        self.unreleased -= released;
        self.release(released);
    }

    /// The trailers. Call it after the last piece.
    pub(crate) async fn trailers(&mut self) -> Result<Option<HeaderMap>, BodyError> {
        self.stream.trailers().await.map_err(|error| body_error(&error))
    }

    async fn next(&mut self) -> Result<Option<Bytes>, BodyError> {
        self.stream.data().await.transpose().map_err(|error| body_error(&error))
    }

    fn release(&mut self, bytes: usize) {
        // Fails only after the stream has ended, since no byte is released twice.
        drop(self.stream.flow_control().release_capacity(bytes));
    }

    /// How many bytes occupy the flow-control windows according to the h2 crate.
    #[cfg(test)]
    pub(crate) fn in_flight(&mut self) -> usize {
        self.stream.flow_control().used_capacity()
    }
}

/// Describes why a stream ended early.
pub(crate) fn body_error(error: &h2::Error) -> BodyError {
    BodyError::StreamEnded(match error.reason() {
        _ if error.is_io() => "the connection was lost",
        Some(h2::Reason::ENHANCE_YOUR_CALM) if error.is_go_away() => {
            "the connection ended with ENHANCE_YOUR_CALM"
        }
        Some(h2::Reason::NO_ERROR) if error.is_go_away() => "the connection ended with NO_ERROR",
        Some(h2::Reason::PROTOCOL_ERROR) if error.is_go_away() => {
            "the connection ended with PROTOCOL_ERROR"
        }
        _ if error.is_go_away() => "the connection ended with an error",
        Some(h2::Reason::CANCEL) => "the stream was reset with CANCEL",
        Some(h2::Reason::NO_ERROR) => "the stream was reset with NO_ERROR",
        Some(h2::Reason::INTERNAL_ERROR) => "the stream was reset with INTERNAL_ERROR",
        Some(h2::Reason::PROTOCOL_ERROR) => "the stream was reset with PROTOCOL_ERROR",
        Some(h2::Reason::REFUSED_STREAM) => "the stream was reset with REFUSED_STREAM",
        Some(h2::Reason::ENHANCE_YOUR_CALM) => "the stream was reset with ENHANCE_YOUR_CALM",
        Some(_) => "the stream was reset",
        None => "the connection was closed",
    })
}

/// Sends a piece, waiting for window capacity.
pub(crate) async fn send(
    stream: &mut h2::SendStream<Bytes>,
    mut piece: Bytes,
) -> Result<(), BodyError> {
    while !piece.is_empty() {
        stream.reserve_capacity(piece.len());
        if stream.capacity() == 0 {
            let capacity = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
            if !matches!(capacity, Some(Ok(_))) {
                return Err(BodyError::SinkClosed);
            }
        }
        let count = stream.capacity().min(piece.len());
        stream.send_data(piece.split_to(count), false).map_err(|_| BodyError::SinkClosed)?;
    }
    Ok(())
}

/// Ends a body, with trailers if there are any.
pub(crate) fn finish(
    stream: &mut h2::SendStream<Bytes>,
    trailers: Option<HeaderMap>,
) -> Result<(), BodyError> {
    let sent = match trailers {
        Some(trailers) => stream.send_trailers(trailers),
        None => stream.send_data(Bytes::new(), true),
    };
    sent.map_err(|_| BodyError::SinkClosed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(method: Method, uri: &str) -> RequestHead {
        let request = Request::builder().method(method).uri(uri).body(()).expect("a request");
        head(request.into_parts().0).expect("the head is valid")
    }

    #[test]
    fn connect_request_has_no_path() {
        let tunnel = received(Method::CONNECT, "a.test:443");
        assert_eq!(tunnel.upgrade, Some(Upgrade::Tunnel));
        assert_eq!([tunnel.target.as_str(), &tunnel.authority], ["", "a.test:443"]);
        let other = received(Method::GET, "http://a.test");
        assert_eq!([other.target.as_str(), &other.authority], ["/", "a.test"]);
    }
}
