//! Where a response goes: the client's HTTP/1.1 connection or HTTP/2 stream.

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use weft_model::HeaderCase;

use crate::connection::ClientConnection;
use crate::denial::Denial;
use crate::header_mutation::HeaderChanges;
use crate::http::body::BodySink;
use crate::http::h1::{
    BodyCoding, BodyFraming, BodyWriter, Http1Writer, capitalize_names, write_interim,
    write_response,
};
use crate::http::h2 as http2;
use crate::http::head::{HttpVersion, RequestHead, ResponseHead};
use crate::http::headers::Headers;
use crate::upstream::ExchangeOutcome;
use crate::worker::SidecarWorker;

/// The content type of what we say ourselves.
const PLAIN_TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The way back to the client.
#[derive(Debug)]
pub(crate) enum Responder<'a> {
    Http1(Http1Responder<'a>),
    Http2 { respond: &'a mut SendResponse<Bytes>, started: bool },
}

/// The way back over HTTP/1.1.
#[derive(Debug)]
pub(crate) struct Http1Responder<'a> {
    pub(crate) writer: &'a mut Http1Writer,
    pub(crate) version: HttpVersion,
    pub(crate) is_head: bool,
    pub(crate) reuse: ConnectionReuse,
    pub(crate) started: bool,
    pub(crate) end: ResponseEnd,
    pub(crate) header_case: HeaderCase,
    /// None where the connection ends with this response anyway.
    pub(crate) close_signal: Option<CloseSignal<'a>>,
}

/// What ends a connection of HTTP/1.1 after the response that is being made: draining, or the end of what its
/// client proved.
#[derive(Clone, Copy)]
pub(crate) struct CloseSignal<'a> {
    pub(crate) worker: &'a SidecarWorker,
    pub(crate) connection: &'a ClientConnection,
}

impl CloseSignal<'_> {
    /// Whether the connection takes no further request.
    pub(crate) fn has_begun(self) -> bool {
        self.worker.is_draining() || self.connection.is_draining()
    }
}

impl std::fmt::Debug for CloseSignal<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("CloseSignal").field(&self.has_begun()).finish()
    }
}

/// A response that a route makes without an endpoint: a redirect or a fixed text.
#[derive(Debug)]
pub(crate) struct LocalReply {
    pub(crate) status: u16,
    /// Where a redirect leads.
    pub(crate) location: Option<String>,
    /// Plain text.
    pub(crate) body: String,
}

/// How the client knows where a response ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResponseEnd {
    /// From the response itself.
    Framed,
    /// By the end of the connection.
    Close,
    /// It must not take the end of the connection for it: the response was broken off.
    Aborted,
}

/// Whether a connection may be used for another request after the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectionReuse {
    No,
    /// Only once the request's body was read whole: what is left of it must not be read as a request.
    AfterBody,
    Yes,
}

impl Responder<'_> {
    /// Writes the head of a response and gives where its body goes.
    pub(crate) fn begin(
        &mut self,
        head: ResponseHead,
        bodiless: bool,
        empty: bool,
    ) -> BodySink<'_> {
        match self {
            Self::Http1(reply) => reply.begin(&head, bodiless, empty),
            Self::Http2 { respond, started } => {
                *started = true;
                match respond.send_response(http2::to_response(head), bodiless || empty) {
                    Ok(stream) if !bodiless && !empty => BodySink::Http2(stream),
                    Ok(_) | Err(_) => BodySink::Closed,
                }
            }
        }
    }

    /// Whether the client can be sent trailers. HTTP/1.0 knows none.
    pub(crate) fn takes_trailers(&self) -> bool {
        !matches!(self, Self::Http1(reply) if reply.version == HttpVersion::Http10)
    }

    /// Passes on a response that another follows. HTTP/1.0 knows none.
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

    /// Agrees to an upgrade, and gives where everything else goes. None when the client is gone.
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

    /// Notes whether the response went out whole; if not, the connection must not be used again.
    pub(crate) fn finished(&mut self, whole: bool) {
        if let Self::Http1(reply) = self
            && !whole
        {
            reply.reuse = ConnectionReuse::No;
            if reply.end == ResponseEnd::Close {
                reply.end = ResponseEnd::Aborted;
            }
        }
    }

    /// Notes that the response comes before the request was read whole: the connection ends with it.
    pub(crate) fn comes_early(&mut self) {
        if let Self::Http1(reply) = self {
            reply.reuse = ConnectionReuse::No;
        }
    }

    /// Resolves when the client wants no response any more, as far as it can tell us.
    pub(crate) async fn refused(&mut self) {
        match self {
            Self::Http2 { respond, started: false } => {
                drop(std::future::poll_fn(|cx| respond.poll_reset(cx)).await);
            }
            Self::Http1(reply) => reply.writer.half.gone().await,
            Self::Http2 { .. } => std::future::pending().await,
        }
    }

    /// Answers by ourselves.
    pub(crate) async fn answer(
        &mut self,
        answer: LocalReply,
        request: &RequestHead,
        changes: Option<&HeaderChanges<'_>>,
    ) -> ExchangeOutcome {
        let LocalReply { status, location, mut body } = answer;
        if has_no_body(status) {
            body.clear();
        }
        let mut headers = HeaderMap::new();
        if let Some(location) = location.and_then(|text| HeaderValue::from_str(&text).ok()) {
            headers.insert(header::LOCATION, location);
        }
        if !body.is_empty() {
            headers.insert(header::CONTENT_TYPE, PLAIN_TEXT);
        }
        let mut head = own(status, headers, &body);
        if let Some(changes) = changes {
            changes.apply_to_response(request, &mut head);
        }
        self.send(head, body).await;
        ExchangeOutcome { status, ..ExchangeOutcome::default() }
    }

    /// Says no, unless nobody is there to hear it, or a response was begun already: then that is
    /// broken off. `changes` are those of the request's route, if one was chosen.
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
            Self::Http1(_) | Self::Http2 { .. } => self.say(denial, is_grpc, changes).await,
        }
    }

    async fn say(
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
        let mut head = own(denial.status(), HeaderMap::new(), &body);
        // Before the headers of the refusal itself, as in Envoy: a route may choose the content type, and cannot
        // change what a refusal means.
        if let Some((changes, request)) = changes {
            changes.apply_to_response(request, &mut head);
        }
        let headers = &mut head.headers;
        if let Some(challenge) = denial.challenge() {
            headers.set(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        if is_grpc {
            // A response of trailers only (gRPC over HTTP/2, "Responses").
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
        let bodiless = answers_head || has_no_body(head.status);
        match self {
            Self::Http1(reply) => {
                if reply.reuse == ConnectionReuse::AfterBody {
                    reply.reuse = ConnectionReuse::No;
                }
                drop(reply.begin(&head, bodiless, body.is_empty()));
                if !bodiless {
                    reply.writer.output().extend_from_slice(body.as_bytes());
                }
                // A client that is gone needs no answer.
                drop(reply.writer.flush().await);
            }
            Self::Http2 { .. } => {
                if let BodySink::Http2(mut stream) = self.begin(head, bodiless, body.is_empty()) {
                    // A stream that is gone needs no answer.
                    drop(stream.send_data(Bytes::from(body), true));
                }
            }
        }
    }
}

/// The head of an answer of ours.
fn own(status: u16, headers: HeaderMap, body: &str) -> ResponseHead {
    let content_length = (!has_no_body(status)).then_some(body.len() as u64);
    ResponseHead { status, headers: Headers::from(headers), content_length }
}

/// Whether a response of this status ends with its head (RFC 9112, section 6.3): a client would take a body for
/// the next response.
fn has_no_body(status: u16) -> bool {
    matches!(status, 100..=199 | 204 | 304)
}

impl Http1Responder<'_> {
    /// Writes a head, with its names as the listener wants them.
    fn write(&mut self, write: impl FnOnce(&mut BytesMut)) {
        let out = self.writer.output();
        let start = out.len();
        write(out);
        if self.header_case == HeaderCase::Words {
            capitalize_names(out.get_mut(start..).unwrap_or_default());
        }
    }

    fn begin(&mut self, head: &ResponseHead, bodiless: bool, empty: bool) -> BodySink<'_> {
        self.started = true;
        let framing = match (bodiless, head.content_length) {
            (true, _) => BodyFraming::None,
            // HTTP/1.1 has trailers behind chunks only.
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
        // It may have begun since the request came. The client must not send another request (RFC 9112, section 9.6).
        if self.close_signal.is_some_and(CloseSignal::has_begun) {
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
