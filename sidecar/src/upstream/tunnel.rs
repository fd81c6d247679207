//! What follows an upgrade: bytes, both ways, until both sides are done.

use std::io;

use tokio::io::{AsyncWriteExt, copy};

use crate::http::h1::{Reader, Writer};

/// One side of a tunnel.
pub(crate) struct Side<'a> {
    pub(crate) reader: &'a mut Reader,
    pub(crate) writer: &'a mut Writer,
}

/// Moves bytes between two sides; how many went to `b` and to `a`. What was read behind the heads
/// goes first.
pub(crate) async fn tunnel(a: Side<'_>, b: Side<'_>) -> (u64, u64) {
    let (to_b, to_a) = tokio::join!(one_way(a.reader, b.writer), one_way(b.reader, a.writer));
    (to_b.unwrap_or_default(), to_a.unwrap_or_default())
}

async fn one_way(from: &mut Reader, to: &mut Writer) -> io::Result<u64> {
    let early = from.buffer.split();
    to.flush().await?;
    to.half.write_all(&early).await?;
    to.half.flush().await?;
    let rest = copy(&mut from.half, &mut to.half).await?;
    to.half.shutdown().await?;
    Ok(rest + early.len() as u64)
}
