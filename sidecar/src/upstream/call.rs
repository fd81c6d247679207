//! A request to be sent to an endpoint: its body, where its response goes, and whether it may be sent again.

use std::cell::RefCell;

use http::Method;

use super::pinned::PinnedConnection;
use crate::denial::Denial;
use crate::forwarded_request::ForwardedRequest;
use crate::header_mutation::HeaderChanges;
use crate::http::body::{BodySource, ReplayBuffer};
use crate::http::h1::BodyFraming;
use crate::http::head::{HttpVersion, RequestHead};
use crate::plan::PlannedCluster;
use crate::responder::Responder;
use crate::timeouts::RequestProgress;
use crate::tls::Alpn;

/// A request to be sent, and where its response is forwarded to.
pub(crate) struct Call<'s, 'r, 'w> {
    pub(crate) head: &'r RequestHead,
    pub(crate) request: &'r ForwardedRequest<'r>,
    pub(crate) source: BodySource<'s>,
    pub(crate) responder: &'r mut Responder<'w>,
    pub(crate) progress: &'r RequestProgress,
    /// The body pieces sent so far, in case an endpoint does not process the request.
    pub(crate) replay: RefCell<ReplayBuffer>,
    /// The upstream connection that is pinned to this client connection; none when the client connection may carry
    /// requests of several clients.
    pub(crate) pin: Option<&'r RefCell<Option<PinnedConnection>>>,
}

impl<'s, 'r, 'w> Call<'s, 'r, 'w> {
    /// The route's changes to the response headers.
    pub(super) fn changes(&self) -> Option<&'r HeaderChanges<'r>> {
        self.request.changes.as_deref()
    }

    /// The HTTP version to speak with the endpoint.
    ///
    /// # Errors
    /// When a gRPC call over HTTP/2 would be forwarded over HTTP/1.1.
    pub(super) fn protocol(&self, cluster: &PlannedCluster) -> Result<Alpn, Denial> {
        use weft_model::UpstreamProtocol;
        let http2 = match cluster.settings.protocol {
            UpstreamProtocol::Http1 => false,
            UpstreamProtocol::Http2 => true,
            UpstreamProtocol::AsDownstream => self.head.version == HttpVersion::Http2,
        };
        if !http2 && self.head.is_grpc() && self.head.version == HttpVersion::Http2 {
            return Err(Denial::ProtocolMismatch("gRPC requires a service that speaks HTTP/2"));
        }
        Ok(if http2 { Alpn::Http2 } else { Alpn::Http1 })
    }

    /// Whether the request is idempotent (RFC 9110, section 9.2.2) and has no body, so that it can be retried.
    pub(super) fn is_retriable(&self) -> bool {
        let idempotent = [
            Method::GET,
            Method::HEAD,
            Method::OPTIONS,
            Method::PUT,
            Method::DELETE,
            Method::TRACE,
        ];
        matches!(self.source, BodySource::Empty) && idempotent.contains(&self.head.method)
    }

    /// Rewinds the body. Returns whether that was possible.
    pub(super) fn rewind(&mut self) -> bool {
        let source = std::mem::replace(&mut self.source, BodySource::Empty);
        let rewound = source.rewound(self.replay.take());
        let is_rewound = rewound.is_ok();
        self.source = rewound.unwrap_or_else(|rest| rest);
        is_rewound
    }

    /// The framing of the body over HTTP/1.1.
    pub(super) fn framing(&self) -> BodyFraming {
        match (self.source.is_empty(), self.head.content_length) {
            _ if self.head.upgrade.is_some() => BodyFraming::None,
            // HTTP/1.1 has trailers only with the chunked coding.
            (false, Some(_)) if self.head.headers.has("trailer") => BodyFraming::Chunked,
            (_, Some(length)) => BodyFraming::Length(length),
            // These methods define a meaning for a body, so an empty one is announced (RFC 9110, section 8.6).
            (true, None)
                if [Method::POST, Method::PUT, Method::PATCH].contains(&self.head.method) =>
            {
                BodyFraming::Length(0)
            }
            (true, None) => BodyFraming::None,
            (false, None) => BodyFraming::Chunked,
        }
    }
}
