//! What follows an upgrade: bytes, both ways, until both sides are done.

use std::cell::Cell;

use futures_util::FutureExt;

use crate::http::body::{BodyError, BodySink, BodySource};
use crate::timeouts::RequestProgress;

/// One side of a tunnel.
pub(crate) struct TunnelSide<'a> {
    pub(crate) source: BodySource<'a>,
    pub(crate) sink: BodySink<'a>,
}

/// Moves bytes between two sides; how many went to `b` and to `a`. The end of one direction leaves the
/// other open; a break ends both, since a side that is gone has nothing more to say and nobody to say
/// it to.
pub(crate) async fn tunnel(
    mut a: TunnelSide<'_>,
    mut b: TunnelSide<'_>,
    progress: &RequestProgress,
) -> (u64, u64) {
    progress.become_tunnel();
    let (to_b, to_a) = (Cell::new(0), Cell::new(0));
    let both = tokio::try_join!(
        one_way(&mut a.source, &mut b.sink, &to_b, progress),
        one_way(&mut b.source, &mut a.sink, &to_a, progress)
    );
    if let Err(broken) = both {
        tracing::debug!(?broken, "a tunnel broke");
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
    // The answer that agreed to the tunnel may still wait to be written.
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
