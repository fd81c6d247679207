//! What follows an upgrade: bytes, both ways, until both sides are done.

use std::cell::Cell;
use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::http::h1::{Reader, Writer};

/// How much is read at once.
const PIECE_BYTES: usize = 8 * 1024;

/// One side of a tunnel.
pub(crate) struct Side<'a> {
    pub(crate) reader: &'a mut Reader,
    pub(crate) writer: &'a mut Writer,
}

/// Moves bytes between two sides; how many went to `b` and to `a`. What was read behind the heads
/// goes first. The end of one direction leaves the other open; a break ends both, since a side that
/// is gone has nothing more to say and nobody to say it to.
pub(crate) async fn tunnel(a: Side<'_>, b: Side<'_>) -> (u64, u64) {
    let (to_b, to_a) = (Cell::new(0), Cell::new(0));
    let both =
        tokio::try_join!(one_way(a.reader, b.writer, &to_b), one_way(b.reader, a.writer, &to_a));
    if let Err(error) = both {
        tracing::debug!(%error, "a tunnel broke");
    }
    (to_b.get(), to_a.get())
}

async fn one_way(from: &mut Reader, to: &mut Writer, moved: &Cell<u64>) -> io::Result<()> {
    let mut piece = from.buffer.split();
    to.flush().await?;
    loop {
        to.half.write_all(&piece).await?;
        to.half.flush().await?;
        moved.set(moved.get() + piece.len() as u64);
        piece.clear();
        piece.reserve(PIECE_BYTES);
        if from.half.read_buf(&mut piece).await? == 0 {
            return to.half.shutdown().await;
        }
    }
}
