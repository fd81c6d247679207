//! Access lines: one JSON object a connection or request, on standard output.
//!
//! A worker gathers its lines and hands them over in blocks, so that a line costs no system call
//! and a slow reader stops nobody: when too many blocks wait, the newest is dropped and counted.

use std::cell::RefCell;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// How many bytes a worker gathers before it hands them over.
const BLOCK_BYTES: usize = 32 * 1024;
/// How many blocks may wait for the writer.
const BLOCK_LIMIT: usize = 64;
/// How long a line waits at most.
const LONGEST_WAIT: Duration = Duration::from_millis(200);

/// What the writer's thread is given.
#[derive(Debug)]
enum Block {
    Lines(Vec<u8>),
    /// Everything before it is written when it is answered.
    Last(SyncSender<()>),
}

/// Writes what the workers hand over.
#[derive(Debug, Clone)]
pub struct Writer {
    blocks: SyncSender<Block>,
    dropped: Arc<AtomicU64>,
}

impl Writer {
    /// Starts the thread that writes to `output`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(output: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (blocks, waiting) = sync_channel(BLOCK_LIMIT);
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_all(&waiting, output))?;
        Ok(Self { blocks, dropped: Arc::default() })
    }

    /// How many blocks were dropped because the reader was too slow.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Waits, not longer than `patience`, until all that was handed over is written.
    pub fn finish(self, patience: Duration) {
        let (done, finished) = sync_channel(1);
        if self.blocks.try_send(Block::Last(done)).is_ok() {
            // Whether the writer answered or not, we have waited long enough.
            let _ = finished.recv_timeout(patience);
        }
    }

    /// A log of its own for a thread that hands over its lines itself.
    #[must_use]
    pub fn log(&self) -> AccessLog {
        AccessLog { writer: self.clone(), lines: RefCell::default() }
    }

    /// A worker's own log. To be called on the worker, whose runtime hands over what has waited.
    #[must_use]
    pub fn worker(&self) -> std::rc::Rc<AccessLog> {
        let log = std::rc::Rc::new(self.log());
        let weak = std::rc::Rc::downgrade(&log);
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(LONGEST_WAIT).await;
                let Some(log) = weak.upgrade() else {
                    return;
                };
                log.hand_over();
            }
        });
        log
    }
}

fn write_all(blocks: &Receiver<Block>, mut output: impl Write) {
    while let Ok(block) = blocks.recv() {
        let block = match block {
            Block::Lines(lines) => lines,
            Block::Last(done) => {
                // Nobody waits any more when the patience was over.
                let _ = done.send(());
                continue;
            }
        };
        if output.write_all(&block).and_then(|()| output.flush()).is_err() {
            // Nobody reads any more; the lines have nowhere to go.
            return;
        }
    }
}

/// The access lines of one worker.
#[derive(Debug)]
pub struct AccessLog {
    writer: Writer,
    lines: RefCell<Vec<u8>>,
}

impl AccessLog {
    /// Adds a line: `value` as one JSON object.
    pub fn line(&self, value: &impl serde::Serialize) {
        let mut lines = self.lines.borrow_mut();
        let start = lines.len();
        if serde_json::to_writer(&mut *lines, value).is_err() {
            lines.truncate(start);
            return;
        }
        lines.push(b'\n');
        let full = lines.len() >= BLOCK_BYTES;
        drop(lines);
        if full {
            self.hand_over();
        }
    }

    /// Hands over what was gathered.
    pub fn hand_over(&self) {
        let block = self.lines.take();
        if !block.is_empty() && self.writer.blocks.try_send(Block::Lines(block)).is_err() {
            self.writer.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.hand_over();
    }
}
