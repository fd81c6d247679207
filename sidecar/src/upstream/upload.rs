//! Sends a request's body while the response is received and forwarded: either may end first.

use crate::denial::Denial;
use crate::http::body_error::BodyError;
use crate::responder::Responder;
use crate::timeouts::RequestProgress;

/// A request body that is being sent.
pub(super) struct Upload<'p, F> {
    sending: F,
    /// The result, once sending has ended.
    result: Option<Result<u64, BodyError>>,
    progress: &'p RequestProgress,
}

impl<'p, F: Future<Output = Result<u64, BodyError>> + Unpin> Upload<'p, F> {
    pub(super) fn new(sending: F, progress: &'p RequestProgress) -> Self {
        Self { sending, result: None, progress }
    }

    /// Sends the body until the response arrives.
    ///
    /// # Errors
    /// When the client is gone, or its request body is malformed.
    pub(super) async fn until_response<R>(
        &mut self,
        mut response: impl Future<Output = R> + Unpin,
        responder: &mut Responder<'_>,
    ) -> Result<R, Denial> {
        loop {
            tokio::select! {
                biased;
                result = &mut self.sending, if self.result.is_none() => {
                    self.progress.request_received();
                    match result {
                        Err(BodyError::SourceClosed | BodyError::StreamEnded(_)) => return Err(Denial::ClientGone),
                        Err(BodyError::Malformed(reason)) => return Err(Denial::Malformed(reason)),
                        // An endpoint that stopped reading may have sent a response before, which is forwarded.
                        Err(BodyError::SinkClosed) | Ok(_) => self.result = Some(result),
                    }
                }
                response = &mut response => return Ok(response),
                () = responder.cancelled() => return Err(Denial::ClientGone),
            }
        }
    }

    /// Sends the body until the response has been forwarded completely.
    pub(super) async fn until_downloaded(
        &mut self,
        mut download: impl Future<Output = Result<u64, BodyError>> + Unpin,
    ) -> Result<u64, BodyError> {
        loop {
            tokio::select! {
                biased;
                result = &mut self.sending, if self.result.is_none() => {
                    self.progress.request_received();
                    self.result = Some(result);
                }
                downloaded = &mut download => return downloaded,
            }
        }
    }

    /// Whether the whole body was sent.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self.result, Some(Ok(_)))
    }

    /// How many bytes were sent, also when the body was aborted.
    pub(super) fn bytes(&self) -> u64 {
        self.result.and_then(Result::ok).unwrap_or_else(|| self.progress.bytes_to_endpoint())
    }
}
