//! Writes the response of a request to the client's HTTP/1.1 connection or HTTP/2 stream.

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use weft_model::HeaderCase;
use weft_runtime::connections::ConnectionStatus;

use crate::denial::Denial;
use crate::header_mutation::HeaderChanges;
use crate::http::body::{BodySink, BodySource};
use crate::http::h1::{
    BodyCoding, BodyFraming, BodyWriter, Http1Writer, capitalize_names, write_interim,
    write_response,
};
use crate::http::h2 as http2;
use crate::http::head::{HttpVersion, RequestHead, ResponseHead};
use crate::http::header_filter::HeaderFilter;
use crate::http::headers::Headers;
use crate::upstream::ExchangeOutcome;

/// The content type of local replies.
const PLAIN_TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Writes the response of one request.
#[derive(Debug)]
pub(crate) enum Responder<'a> {
    Http1(Http1Responder<'a>),
    Http2 { respond: &'a mut SendResponse<Bytes>, started: bool },
}

/// Writes a response over HTTP/1.1.
#[derive(Debug)]
pub(crate) struct Http1Responder<'a> {
    pub(crate) writer: &'a mut Http1Writer,
    pub(crate) version: HttpVersion,
    pub(crate) is_head: bool,
    pub(crate) reuse: ConnectionReuse,
    pub(crate) started: bool,
    pub(crate) end: ResponseEnd,
    pub(crate) header_case: HeaderCase,
    /// The status of the connection, which is closed after the response if it drains. None where it is closed anyway.
    pub(crate) status: Option<&'a ConnectionStatus>,
}

/// A response that the sidecar makes without an endpoint: a redirect or a fixed text.
#[derive(Debug)]
pub(crate) struct LocalReply<'p> {
    pub(crate) status: u16,
    /// The `location` of a redirect.
    pub(crate) location: Option<String>,
    /// The body, as plain text.
    pub(crate) body: &'p str,
}

/// How the client finds the end of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResponseEnd {
    /// From the response framing.
    Framed,
    /// By the end of the connection.
    Close,
    /// The response is incomplete: the connection must be reset, so that its end does not look like the end of the response.
    Aborted,
}

/// Whether a connection may be used for another request after the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectionReuse {
    No,
    /// Only once the request body was read completely: its remaining bytes must not be parsed as a request.
    AfterBody,
    Yes,
}

impl Responder<'_> {
    /// Begins the response. The head is sent with the first bytes of the body. Returns the filter for the response's
    /// trailers, and the sink for its body.
    pub(crate) fn start(
        &mut self,
        mut head: ResponseHead,
        body: &BodySource<'_>,
        request: &RequestHead,
        changes: Option<&HeaderChanges<'_>>,
    ) -> (HeaderFilter, BodySink<'_>) {
        let header_filter = HeaderFilter::of_response(&head.headers);
        header_filter.strip(&mut head.headers);
        if let Some(changes) = changes {
            changes.apply_to_response(request, &mut head);
        }
        let bodiless = request.method == Method::HEAD || head.status == 204 || head.status == 304;
        let may_follow = bodiless || (body.may_have_trailers() && self.takes_trailers());
        header_filter.strip_trailer_announcements(&mut head.headers, may_follow);
        (header_filter, self.begin(head, bodiless, body.is_empty()))
    }

    /// Writes the head of a response and returns the sink of its body.
    fn begin(&mut self, head: ResponseHead, has_no_body: bool, empty: bool) -> BodySink<'_> {
        match self {
            Self::Http1(reply) => reply.begin(&head, has_no_body, empty),
            Self::Http2 { respond, started } => {
                *started = true;
                match respond.send_response(http2::to_response(head), has_no_body || empty) {
                    Ok(stream) if !has_no_body && !empty => BodySink::Http2(stream),
                    Ok(_) | Err(_) => BodySink::Closed,
                }
            }
        }
    }

    /// Whether the response may have trailers. HTTP/1.0 has none.
    pub(crate) fn takes_trailers(&self) -> bool {
        !matches!(self, Self::Http1(reply) if reply.version == HttpVersion::Http10)
    }

    /// Forwards an interim (1xx) response. HTTP/1.0 has none.
    pub(crate) async fn interim(&mut self, head: ResponseHead) -> std::io::Result<()> {
        match self {
            Self::Http1(reply) if reply.version == HttpVersion::Http10 => Ok(()),
            Self::Http1(reply) => {
                reply.write(|out| write_interim(&head, out));
                reply.writer.flush().await
            }
            Self::Http2 { respond, .. } => {
                respond.send_informational(http2::to_response(head)).map_err(std::io::Error::other)
            }
        }
    }

    /// Accepts an upgrade, and returns the sink of the bytes that follow. None when the client has closed the stream.
    pub(crate) fn switch(&mut self, head: ResponseHead) -> Option<BodySink<'_>> {
        match self {
            Self::Http1(reply) => {
                reply.started = true;
                reply.reuse = ConnectionReuse::No;
                reply.write(|out| write_response(&head, BodyFraming::None, None, out));
                Some(BodySink::Http1(BodyWriter {
                    writer: reply.writer,
                    coding: BodyCoding::Tunnel,
                }))
            }
            Self::Http2 { respond, started } => {
                *started = true;
                respond.send_response(http2::to_response(head), false).ok().map(BodySink::Http2)
            }
        }
    }

    /// Records whether the response was complete. If it was not, the connection must not be reused.
    pub(crate) fn record_end(&mut self, whole: bool) {
        if let Self::Http1(reply) = self
            && !whole
        {
            reply.reuse = ConnectionReuse::No;
            if reply.end == ResponseEnd::Close {
                reply.end = ResponseEnd::Aborted;
            }
        }
    }

    /// Records that the response begins before the request was read completely: the connection is closed after the response.
    pub(crate) fn record_early_response(&mut self) {
        if let Self::Http1(reply) = self {
            reply.reuse = ConnectionReuse::No;
        }
    }

    /// Resolves when the client has cancelled the request or closed the connection.
    pub(crate) async fn cancelled(&mut self) {
        match self {
            Self::Http2 { respond, started: false } => {
                drop(std::future::poll_fn(|cx| respond.poll_reset(cx)).await);
            }
            Self::Http1(reply) => reply.writer.half.closed().await,
            Self::Http2 { .. } => std::future::pending().await,
        }
    }

    /// Sends a local reply.
    pub(crate) async fn answer(
        &mut self,
        answer: &LocalReply<'_>,
        request: &RequestHead,
        changes: Option<&HeaderChanges<'_>>,
    ) -> ExchangeOutcome {
        let status = answer.status;
        let body = if status_has_no_body(status) { "" } else { answer.body };
        let mut headers = HeaderMap::new();
        let location = answer.location.as_deref();
        if let Some(location) = location.and_then(|text| HeaderValue::from_str(text).ok()) {
            headers.insert(header::LOCATION, location);
        }
        if !body.is_empty() {
            headers.insert(header::CONTENT_TYPE, PLAIN_TEXT);
        }
        let mut head = local_head(status, headers, body);
        if let Some(changes) = changes {
            changes.apply_to_response(request, &mut head);
        }
        self.send(head, body.to_owned()).await;
        ExchangeOutcome { status, ..ExchangeOutcome::default() }
    }

    /// Sends a denial, or aborts a response that has begun. Sends nothing to a client that is gone. `changes` are those of the
    /// request's route, if one was chosen.
    pub(crate) async fn deny(
        &mut self,
        denial: Denial,
        is_grpc: bool,
        changes: Option<(&HeaderChanges<'_>, &RequestHead)>,
    ) {
        match self {
            Self::Http1(reply) if reply.started => {
                reply.reuse = ConnectionReuse::No;
                if reply.end == ResponseEnd::Close {
                    reply.end = ResponseEnd::Aborted;
                }
                reply.writer.out.clear();
            }
            Self::Http1(reply) if denial == Denial::ClientGone => reply.reuse = ConnectionReuse::No,
            Self::Http2 { respond, started } if *started || denial == Denial::ClientGone => {
                respond.send_reset(h2::Reason::CANCEL);
            }
            Self::Http1(_) | Self::Http2 { .. } => self.send_denial(denial, is_grpc, changes).await,
        }
    }

    async fn send_denial(
        &mut self,
        denial: Denial,
        is_grpc: bool,
        changes: Option<(&HeaderChanges<'_>, &RequestHead)>,
    ) {
        if let Self::Http1(reply) = &mut *self
            && denial.ends_connection()
        {
            reply.reuse = ConnectionReuse::No;
        }
        let body = if is_grpc { String::new() } else { denial.body() };
        let mut head = local_head(denial.status(), HeaderMap::new(), &body);
        // Before the headers of the denial itself, as in Envoy: a route may choose the content type, but cannot change the
        // meaning of a denial.
        if let Some((changes, request)) = changes {
            changes.apply_to_response(request, &mut head);
        }
        let headers = &mut head.headers;
        if let Some(challenge) = denial.challenge() {
            headers.set(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        if is_grpc {
            // A trailers-only response (gRPC over HTTP/2, "Responses").
            head.status = 200;
            headers.set(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.set(GRPC_STATUS, u16::from(denial.grpc_status()).into());
            let message = denial.body().trim_end().replace(' ', "%20");
            if let Ok(message) = HeaderValue::from_str(&message) {
                headers.set(GRPC_MESSAGE, message);
            }
        } else if !headers.has("content-type") {
            headers.set(header::CONTENT_TYPE, PLAIN_TEXT);
        }
        self.send(head, body).await;
    }

    async fn send(&mut self, head: ResponseHead, body: String) {
        let answers_head = matches!(self, Self::Http1(reply) if reply.is_head);
        let has_no_body = answers_head || status_has_no_body(head.status);
        match self {
            Self::Http1(reply) => {
                if reply.reuse == ConnectionReuse::AfterBody {
                    reply.reuse = ConnectionReuse::No;
                }
                drop(reply.begin(&head, has_no_body, body.is_empty()));
                if !has_no_body {
                    reply.writer.output().extend_from_slice(body.as_bytes());
                }
                // An error means that the client has closed the connection and needs no response.
                drop(reply.writer.flush().await);
            }
            Self::Http2 { .. } => {
                if let BodySink::Http2(mut stream) = self.begin(head, has_no_body, body.is_empty())
                {
                    // An error means that the stream is closed and needs no response.
                    drop(stream.send_data(Bytes::from(body), true));
                }
            }
        }
    }
}

/// The head of a local reply.
fn local_head(status: u16, headers: HeaderMap, body: &str) -> ResponseHead {
    let content_length = (!status_has_no_body(status)).then_some(body.len() as u64);
    ResponseHead { status, headers: Headers::from(headers), content_length }
}

/// Whether a response with this status ends with its head (RFC 9112, section 6.3): a client would parse a body as the next
/// response.
fn status_has_no_body(status: u16) -> bool {
    matches!(status, 100..=199 | 204 | 304)
}

impl Http1Responder<'_> {
    /// Writes a head, with header names in the case that the listener is configured to use.
    fn write(&mut self, write: impl FnOnce(&mut BytesMut)) {
        let out = self.writer.output();
        let start = out.len();
        write(out);
        if self.header_case == HeaderCase::Words {
            capitalize_names(out.get_mut(start..).unwrap_or_default());
        }
    }

    fn begin(&mut self, head: &ResponseHead, has_no_body: bool, empty: bool) -> BodySink<'_> {
        self.started = true;
        let framing = match (has_no_body, head.content_length) {
            (true, _) => BodyFraming::None,
            // HTTP/1.1 has trailers only after chunks.
            (false, Some(_)) if !empty && head.headers.has("trailer") => BodyFraming::Chunked,
            (false, Some(length)) => BodyFraming::Length(length),
            (false, None) if empty => BodyFraming::Length(0),
            (false, None) if self.version == HttpVersion::Http10 => BodyFraming::UntilClose,
            (false, None) => BodyFraming::Chunked,
        };
        if framing == BodyFraming::UntilClose {
            self.reuse = ConnectionReuse::No;
            self.end = ResponseEnd::Close;
        }
        // Draining may have begun since the request arrived. The client must not send another request (RFC 9112, section 9.6).
        if self.status.is_some_and(ConnectionStatus::is_draining) {
            self.reuse = ConnectionReuse::No;
        }
        let connection = match (self.reuse, self.version) {
            (ConnectionReuse::No, _) => Some("close"),
            (_, HttpVersion::Http10) => Some("keep-alive"),
            (_, HttpVersion::Http11 | HttpVersion::Http2) => None,
        };
        self.write(|out| write_response(head, framing, connection, out));
        BodySink::Http1(BodyWriter { writer: self.writer, coding: BodyCoding::of(framing) })
    }
}
