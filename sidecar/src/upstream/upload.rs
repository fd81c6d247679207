//! The request's body on its way, while the response is awaited and carried back: either may end first.

use crate::denial::Denial;
use crate::http::body::BodyError;
use crate::pipeline::Responder;
use crate::timeouts::RequestProgress;

/// A body being sent.
pub(super) struct Upload<'p, F> {
    carrying: F,
    /// How it ended, once it has.
    ended: Option<Result<u64, BodyError>>,
    progress: &'p RequestProgress,
}

impl<'p, F: Future<Output = Result<u64, BodyError>> + Unpin> Upload<'p, F> {
    pub(super) fn new(carrying: F, progress: &'p RequestProgress) -> Self {
        Self { carrying, ended: None, progress }
    }

    /// Sends on until the response is there, or the client no longer wants it.
    pub(super) async fn until_answered<R>(
        &mut self,
        mut response: impl Future<Output = R> + Unpin,
        reply: &mut Responder<'_>,
    ) -> Result<R, Denial> {
        loop {
            tokio::select! {
                biased;
                result = &mut self.carrying, if self.ended.is_none() => {
                    self.progress.request_received();
                    match result {
                        Err(BodyError::SourceClosed | BodyError::StreamEnded(_)) => return Err(Denial::ClientGone),
                        Err(BodyError::Malformed(why)) => return Err(Denial::Malformed(why)),
                        // An endpoint that takes no more may have answered before; that counts.
                        Err(BodyError::SinkClosed) | Ok(_) => self.ended = Some(result),
                    }
                }
                response = &mut response => return Ok(response),
                () = reply.refused() => return Err(Denial::ClientGone),
            }
        }
    }

    /// Sends on until the response was carried to its end.
    pub(super) async fn until_carried(
        &mut self,
        mut download: impl Future<Output = Result<u64, BodyError>> + Unpin,
    ) -> Result<u64, BodyError> {
        loop {
            tokio::select! {
                biased;
                result = &mut self.carrying, if self.ended.is_none() => {
                    self.progress.request_received();
                    self.ended = Some(result);
                }
                downloaded = &mut download => return downloaded,
            }
        }
    }

    /// Whether all of it was sent.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self.ended, Some(Ok(_)))
    }

    /// How much was sent: of a body that was broken off, what passed.
    pub(super) fn bytes(&self) -> u64 {
        self.ended.and_then(Result::ok).unwrap_or_else(|| self.progress.bytes_sent())
    }
}
