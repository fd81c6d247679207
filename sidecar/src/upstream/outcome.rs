//! How an exchange with an endpoint ended, for the access log.

use crate::http::body_error::BodyError;
use crate::timeouts::RequestProgress;

/// The result of an exchange whose response began.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ExchangeOutcome {
    pub(crate) status: u16,
    pub(crate) bytes_to_endpoint: u64,
    pub(crate) bytes_to_client: u64,
    /// The side that aborted the exchange; none when it completed.
    pub(crate) aborted: Option<ExchangeAbort>,
    /// Why it was aborted, if that is known, as text for people.
    pub(crate) detail: Option<&'static str>,
}

/// A finished exchange over HTTP/1.1, and whether its connection can be reused.
pub(super) struct Http1Exchange {
    pub(super) outcome: ExchangeOutcome,
    pub(super) is_reusable: bool,
}

/// The side that aborted an exchange after the response had begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExchangeAbort {
    /// The endpoint.
    Upstream,
    /// The client.
    Downstream,
}

impl ExchangeOutcome {
    /// Records how forwarding the response's body ended.
    pub(super) fn record_download(
        &mut self,
        result: Result<u64, BodyError>,
        progress: &RequestProgress,
    ) {
        match result {
            Ok(bytes) => self.bytes_to_client = bytes,
            Err(error) => {
                // The bytes that were forwarded before.
                self.bytes_to_client = progress.bytes_to_client();
                self.aborted = Some(match error {
                    BodyError::SourceClosed
                    | BodyError::StreamEnded(_)
                    | BodyError::Malformed(_) => ExchangeAbort::Upstream,
                    BodyError::SinkClosed => ExchangeAbort::Downstream,
                });
                self.detail = match error {
                    BodyError::StreamEnded(reason) | BodyError::Malformed(reason) => Some(reason),
                    BodyError::SourceClosed => Some("the connection was lost"),
                    BodyError::SinkClosed => None,
                };
            }
        }
    }
}
