//! Forwards bytes in both directions after an upgrade or CONNECT, until both sides have closed.

use std::cell::Cell;

use futures_util::FutureExt;

use crate::http::body::{BodySink, BodySource};
use crate::http::body_error::BodyError;
use crate::timeouts::RequestProgress;

/// One side of a tunnel.
pub(crate) struct TunnelSide<'a> {
    pub(crate) source: BodySource<'a>,
    pub(crate) sink: BodySink<'a>,
}

/// Forwards bytes between two sides. Returns how many were sent to `b` and to `a`. When one direction ends, the other
/// stays open. An error ends both.
pub(crate) async fn tunnel(
    mut a: TunnelSide<'_>,
    mut b: TunnelSide<'_>,
    progress: &RequestProgress,
) -> (u64, u64) {
    progress.become_tunnel();
    let to_b = Cell::new(0);
    let to_a = Cell::new(0);
    let both = tokio::try_join!(
        one_way(&mut a.source, &mut b.sink, &to_b, progress),
        one_way(&mut b.source, &mut a.sink, &to_a, progress)
    );
    if let Err(error) = both {
        tracing::debug!(?error, "tunnel aborted");
        a.sink.abort();
        b.sink.abort();
    }
    (to_b.get(), to_a.get())
}

async fn one_way(
    source: &mut BodySource<'_>,
    sink: &mut BodySink<'_>,
    moved: &Cell<u64>,
    progress: &RequestProgress,
) -> Result<(), BodyError> {
    // The response that accepted the tunnel may not be written yet.
    sink.flush().await?;
    loop {
        let piece = match source.piece().now_or_never() {
            Some(piece) => piece?,
            None => {
                sink.flush().await?;
                source.piece().await?
            }
        };
        let Some(piece) = piece else {
            return sink.finish(None).await;
        };
        moved.set(moved.get() + piece.len() as u64);
        progress.record_activity();
        sink.send(piece).await?;
    }
}
