//! How an exchange with an endpoint ended, for its access line.

use crate::http::body::BodyError;
use crate::timeouts::RequestProgress;

/// How an exchange ended that began.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ExchangeOutcome {
    pub(crate) status: u16,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    /// Which side broke it off, if one did.
    pub(crate) broken: Option<&'static str>,
    /// Why it was broken off, as far as that is known.
    pub(crate) detail: Option<&'static str>,
}

impl ExchangeOutcome {
    /// Takes down how the response's body ended.
    pub(super) fn downloaded(
        &mut self,
        result: Result<u64, BodyError>,
        progress: &RequestProgress,
    ) {
        match result {
            Ok(bytes) => self.bytes_received = bytes,
            Err(broken) => {
                // What passed before.
                self.bytes_received = progress.bytes_received();
                self.broken = Some(match broken {
                    BodyError::SourceClosed
                    | BodyError::StreamEnded(_)
                    | BodyError::Malformed(_) => "endpoint_broke_off",
                    BodyError::SinkClosed => "client_broke_off",
                });
                self.detail = match broken {
                    BodyError::StreamEnded(why) | BodyError::Malformed(why) => Some(why),
                    BodyError::SourceClosed => Some("the connection was lost"),
                    BodyError::SinkClosed => None,
                };
            }
        }
    }
}
