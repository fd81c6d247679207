//! Forwards a message body from one connection to another, whichever HTTP version each of them speaks.

use super::body::{BodyProgress, BodySink, BodySource};
use super::body_error::BodyError;
use super::header_filter::HeaderFilter;
use super::read_ahead::ReadAhead;

/// Forwards a whole body, then those of its trailers that `header_filter` lets pass. Returns the number of body bytes.
///
/// Pieces that are available at once are written together. The sink is flushed before every wait for the source, so
/// that a stream of small messages is never delayed.
///
/// # Errors
/// [`BodyError`] when either side ends early, the framing is violated, or a trailer name is rejected.
pub(crate) async fn forward_body(
    source: &mut BodySource<'_>,
    sink: &mut BodySink<'_>,
    header_filter: &HeaderFilter,
    progress: BodyProgress<'_>,
) -> Result<u64, BodyError> {
    let mut bytes = 0;
    let mut read_ahead = ReadAhead::new(progress.replay);
    loop {
        let piece = match read_ahead.next(source) {
            Some(piece) => piece?,
            None => {
                sink.flush().await?;
                tokio::select! {
                    piece = read_ahead.wait(source) => piece?,
                    () = sink.closed() => return Err(BodyError::SinkClosed),
                }
            }
        };
        let Some(piece) = piece else {
            break;
        };
        let piece = if sink.has_frames() { read_ahead.merge(piece, source) } else { piece };
        bytes += piece.len() as u64;
        progress.record(&piece, source.is_empty());
        tokio::select! {
            biased;
            sent = sink.send(piece) => sent?,
            () = read_ahead.fill(source) => {}
        }
    }
    let trailers = source.trailers().await?;
    let trailers = trailers.map(|trailers| header_filter.strip_trailers(trailers)).transpose()?;
    progress.record_end();
    if let (Some(replay), Some(_)) = (progress.replay, &trailers) {
        replay.borrow_mut().overflowed = true;
    }
    sink.finish(trailers).await?;
    Ok(bytes)
}
