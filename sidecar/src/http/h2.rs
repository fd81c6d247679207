//! HTTP/2 by the `h2` crate: pieces with flow control, heads in both directions.

use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use weft_model::HttpLimits;

use super::authority::is_authority;
use super::body::BodyError;
use super::head::{
    BODY_LIMIT_BYTES, HttpVersion, RequestHead, ResponseHead, Upgrade, is_grpc, is_hop_by_hop,
};
use super::headers::Headers;
use crate::denial::Denial;
use crate::upstream_failure::ResponseFault;

/// How much a peer may send on a stream before we have passed it on.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// How much of one stream waits in our memory for the other side to take it.
pub(crate) const SEND_BUFFER_BYTES: usize = 64 * 1024;
/// How much the library lets small frames waste, each counted as if it had 256 bytes: 64 for each of
/// the streams that a connection may have. Streams of small messages need some; a flood needs more.
pub(crate) const DATA_FRAME_BUDGET_BYTES: usize = 4 * 1024 * 1024;
/// The same for a peer that proved its identity: a sidecar passes on the messages of many clients.
pub(crate) const DATA_FRAME_BUDGET_OF_PEER_BYTES: usize = 32 * 1024 * 1024;

/// A request that was refused by its head.
#[derive(Debug)]
pub(crate) struct RefusedHead {
    pub(crate) denial: Denial,
    /// Whether it is a gRPC call, to which the refusal must be a gRPC status.
    pub(crate) is_grpc: bool,
}

/// The head of a request and where its body comes from.
///
/// # Errors
/// When it breaks the rules of RFC 9113, section 8, beyond what the library checks, or the limits.
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
    // The size of a field section by RFC 9113, section 10.5.1.
    let size = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len();
    let total: usize = headers.iter().map(|field| size(field) + 32).sum();
    let largest = headers.iter().map(size).max().unwrap_or(0);
    if total > limits.head_bytes
        || largest > limits.field_bytes
        || headers.len() > limits.field_count
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
        return Err(Denial::Malformed("HTTP/2 has no connection headers"));
    }
    // The h2 crate refuses every value but `trailers` in lower case before the request reaches this check.
    let is_trailers = |te: &HeaderValue| te.as_bytes().eq_ignore_ascii_case(b"trailers");
    if !headers.get_all(http::header::TE).iter().all(is_trailers) {
        return Err(Denial::Malformed("te may only ask for trailers in HTTP/2"));
    }
    if headers.keys().any(|name| name.as_str().contains('"')) {
        // The one byte that the library lets into a name, and no token has (RFC 9110, section 5.6.2).
        return Err(Denial::Malformed("a field's name is no token"));
    }
    let is_padded = |value: &HeaderValue| {
        let is_space = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
        is_space(value.as_bytes().first()) || is_space(value.as_bytes().last())
    };
    if headers.values().any(is_padded) {
        // RFC 9113, section 8.2.1: with it, HTTP/1.1 would have another value.
        return Err(Denial::Malformed("a field's value has space around it"));
    }
    let scheme = parts.uri.scheme_str();
    // Without an authority the library gives no scheme either, though it has looked at it.
    let has_scheme = upgrade != Some(Upgrade::Tunnel) && parts.uri.authority().is_some();
    if has_scheme && !matches!(scheme, Some("http" | "https")) {
        return Err(Denial::Malformed("the scheme is neither http nor https"));
    }
    headers.remove(http::header::HOST);
    let content_length = take_length(&mut headers)?;
    let target = parts.uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
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

/// What a CONNECT is for (RFC 9113, section 8.5; RFC 8441).
fn upgrade(parts: &http::request::Parts) -> Result<Option<Upgrade>, Denial> {
    if parts.method != Method::CONNECT {
        return Ok(None);
    }
    match parts.extensions.get::<h2::ext::Protocol>() {
        Some(protocol) if protocol.as_str() == "websocket" => Ok(Some(Upgrade::WebSocket)),
        Some(_) => Err(Denial::NotImplemented("the protocol of a CONNECT is not websocket")),
        None => Ok(Some(Upgrade::Tunnel)),
    }
}

/// The one authority: `:authority`, and `host` must not say another (RFC 9113, section 8.3.1).
fn authority(told: Option<&Authority>, headers: &HeaderMap) -> Result<String, Denial> {
    let mut hosts = headers.get_all(http::header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Denial::Malformed("more than one host"));
    }
    let host = host.map(HeaderValue::to_str).transpose();
    let host = host.map_err(|_| Denial::Malformed("the host is no text"))?;
    let authority = match (told.map(Authority::as_str), host) {
        (Some(told), Some(host)) if !told.eq_ignore_ascii_case(host) => {
            return Err(Denial::Malformed("the host is not the authority"));
        }
        (Some(authority), _) | (None, Some(authority)) => authority,
        (None, None) => return Err(Denial::Malformed("there is no authority")),
    };
    if !is_authority(authority.as_bytes()) {
        return Err(Denial::Malformed("the authority is no host and port"));
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
    let length = length.ok_or(Denial::Malformed("the content-length is no number"))?;
    if length > BODY_LIMIT_BYTES { Err(Denial::BodyTooLarge) } else { Ok(Some(length)) }
}

/// The head of a request to send.
///
/// # Errors
/// When the head has no form in HTTP/2, which a checked one always has.
pub(crate) fn to_request(head: &RequestHead, scheme: &str) -> Result<Request<()>, Denial> {
    let malformed = Denial::Malformed("the target is no URI");
    let uri = Uri::builder().authority(head.authority.as_str());
    let uri = match head.upgrade {
        // A plain CONNECT names nothing but where to (RFC 9113, section 8.5).
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

/// The head of a response that came.
///
/// # Errors
/// When its announced length is no number.
pub(crate) fn received_response(
    parts: http::response::Parts,
    bodiless: bool,
) -> Result<ResponseHead, ResponseFault> {
    let mut headers = parts.headers;
    // Without a body the length is a fact about what is not sent, and stays a field.
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

/// The head of a response to send.
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

/// A body that comes over HTTP/2.
#[derive(Debug)]
pub(crate) struct ReceivedBody {
    stream: h2::RecvStream,
    /// How many bytes of the pieces that were taken still count against the windows. The library's own count
    /// includes those that were not taken.
    held: usize,
}

impl ReceivedBody {
    pub(crate) fn new(stream: h2::RecvStream) -> Self {
        Self { stream, held: 0 }
    }

    /// Whether nothing will come.
    pub(crate) fn is_end(&self) -> bool {
        self.stream.is_end_stream()
    }

    /// The next piece. Its sender may send as much again at once: what limits it is how fast the receiver
    /// takes pieces, since none is asked for before the last was sent.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        let piece = self.next().await?;
        self.release(piece.as_ref().map_or(0, Bytes::len));
        Ok(piece)
    }

    /// The next piece, which counts against the windows until it is released.
    pub(crate) async fn held_piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        let piece = self.next().await?;
        self.held += piece.as_ref().map_or(0, Bytes::len);
        Ok(piece)
    }

    /// Lets the sender send as much again as is held beyond the last `kept` bytes.
    pub(crate) fn release_beyond(&mut self, kept: usize) {
        let released = self.held.saturating_sub(kept);
        self.held -= released;
        self.release(released);
    }

    /// The trailers, after the last piece.
    pub(crate) async fn trailers(&mut self) -> Result<Option<HeaderMap>, BodyError> {
        self.stream.trailers().await.map_err(|error| broken(&error))
    }

    async fn next(&mut self) -> Result<Option<Bytes>, BodyError> {
        self.stream.data().await.transpose().map_err(|error| broken(&error))
    }

    fn release(&mut self, bytes: usize) {
        // Fails only for a stream that has ended: no byte is released twice.
        drop(self.stream.flow_control().release_capacity(bytes));
    }

    /// How many bytes count against the windows, as the library has it.
    #[cfg(test)]
    pub(crate) fn in_flight(&mut self) -> usize {
        self.stream.flow_control().used_capacity()
    }
}

/// How a stream broke.
pub(crate) fn broken(error: &h2::Error) -> BodyError {
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

/// Sends a piece as the receiver's window allows.
pub(crate) async fn send(
    stream: &mut h2::SendStream<Bytes>,
    mut piece: Bytes,
) -> Result<(), BodyError> {
    while !piece.is_empty() {
        stream.reserve_capacity(piece.len());
        if stream.capacity() == 0 {
            let granted = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
            if !matches!(granted, Some(Ok(_))) {
                return Err(BodyError::SinkClosed);
            }
        }
        let now = stream.capacity().min(piece.len());
        stream.send_data(piece.split_to(now), false).map_err(|_| BodyError::SinkClosed)?;
    }
    Ok(())
}

/// Ends a body.
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
