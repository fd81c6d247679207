//! Access lines: one JSON object a connection or request, on standard output.
//!
//! A worker gathers its lines and hands them over in blocks, so that a line costs no system call
//! and a slow reader stops no request: when too many blocks wait, the newest is lost. Lost lines are counted, and
//! logged once a burst. A write that fails loses the lines of its block only, unless the reader is gone.

use std::cell::{Cell, RefCell};
use std::io::{Error, ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use crate::log_limit::LogLimit;

/// How many bytes a worker gathers before it hands them over.
const BLOCK_BYTES: usize = 32 * 1024;
/// How many blocks may wait for the writer.
const BLOCK_LIMIT: usize = 64;
/// How long a line waits at most.
const LONGEST_WAIT: Duration = Duration::from_millis(200);
/// How many lines are lost in a burst that does not end before it is logged nevertheless.
const LONG_BURST_LINES: u64 = 10_000;

/// What the writer's thread is given.
#[derive(Debug)]
enum Block {
    Lines(Lines),
    /// Everything before it is written when it is answered.
    Last(SyncSender<()>),
}

/// Access lines, each with its line feed.
#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
    count: u64,
}

/// Writes what the workers hand over.
#[derive(Debug, Clone)]
pub struct Writer {
    blocks: SyncSender<Block>,
    lost: Arc<AtomicU64>,
}

impl Writer {
    /// Starts the thread that writes to `output`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(output: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (blocks, waiting) = sync_channel(BLOCK_LIMIT);
        let lost = Arc::<AtomicU64>::default();
        let counted = lost.clone();
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_all(&waiting, output, &counted))?;
        Ok(Self { blocks, lost })
    }

    /// How many lines were lost because their reader was too slow or gone, or a write failed.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits, not longer than `patience`, until all that was handed over is written.
    pub fn finish(self, patience: Duration) {
        const STEP: Duration = Duration::from_millis(10);
        let (done, finished) = sync_channel(1);
        let mut left = patience;
        while let Err(TrySendError::Full(_)) = self.blocks.try_send(Block::Last(done.clone())) {
            let Some(less) = left.checked_sub(STEP) else { return };
            left = less;
            // Nothing can come yet: it only waits until a block was written.
            let _ = finished.recv_timeout(STEP);
        }
        drop(done);
        // Whether the writer answered or not, we have waited long enough.
        let _ = finished.recv_timeout(left);
    }

    /// A log of its own for a thread that hands over its lines itself.
    #[must_use]
    pub fn log(&self) -> AccessLog {
        AccessLog { writer: self.clone(), lines: RefCell::default(), count: Cell::new(0) }
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

/// Writes blocks until no thread sends more, or the reader is gone.
fn write_all(blocks: &Receiver<Block>, output: impl Write, lost: &AtomicU64) {
    let mut output = LineOutput { to: output, is_torn: false };
    let mut bursts = Bursts::default();
    let failures = LogLimit::default();
    loop {
        let block = match blocks.try_recv() {
            Ok(block) => block,
            Err(TryRecvError::Empty) => {
                // No block waits, so the burst of lost lines has ended.
                if let Some(lines) = bursts.end(lost.load(Ordering::Relaxed)) {
                    log_lost(lines);
                }
                match blocks.recv() {
                    Ok(block) => block,
                    Err(_) => return,
                }
            }
            Err(TryRecvError::Disconnected) => return,
        };
        let lines = match block {
            Block::Lines(lines) => lines,
            Block::Last(done) => {
                // Its receiver has stopped waiting when the limit was reached.
                let _ = done.send(());
                continue;
            }
        };
        if let Err((error, lines)) = output.write(&lines.bytes) {
            lost.fetch_add(lines, Ordering::Relaxed);
            bursts.skip(lines);
            if error.kind() == ErrorKind::BrokenPipe {
                tracing::warn!(%error, "access lines cannot be written, all further lines are lost");
                return count_all(blocks, lost);
            }
            if let Some(failed_writes) = failures.event(now()) {
                tracing::warn!(%error, failed_writes, "access lines lost: write to standard output failed");
            }
        }
        if let Some(lines) = bursts.look(lost.load(Ordering::Relaxed)) {
            log_lost(lines);
        }
    }
}

fn log_lost(lines: u64) {
    tracing::warn!(lines, "access lines lost: standard output is read too slowly");
}

#[allow(clippy::disallowed_methods, reason = "the writer's thread limits its own log lines")]
fn now() -> Instant {
    Instant::now()
}

/// What blocks are written to.
struct LineOutput<W> {
    to: W,
    /// Whether the last write ended within a line.
    is_torn: bool,
}

impl<W: Write> LineOutput<W> {
    /// Writes a block. A line that a failed write has torn is ended first, so that it spoils no other.
    ///
    /// # Errors
    /// Why writing failed, and how many lines were not written whole.
    fn write(&mut self, lines: &[u8]) -> Result<(), (Error, u64)> {
        let mut rest = lines;
        let written = self.write_rest(&mut rest);
        written.map_err(|error| (error, rest.iter().filter(|byte| **byte == b'\n').count() as u64))
    }

    fn write_rest(&mut self, rest: &mut &[u8]) -> Result<(), Error> {
        if self.is_torn {
            self.to.write_all(b"\n")?;
            self.is_torn = false;
        }
        while !rest.is_empty() {
            let written = match self.to.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                written => written?,
            };
            let (done, left) = rest.split_at(written.min(rest.len()));
            self.is_torn = !done.ends_with(b"\n");
            *rest = left;
        }
        self.to.flush()
    }
}

/// Counts what is handed over as lost.
fn count_all(blocks: &Receiver<Block>, lost: &AtomicU64) {
    for block in blocks {
        if let Block::Lines(lines) = block {
            lost.fetch_add(lines.count, Ordering::Relaxed);
        }
    }
}

/// Decides when lost lines are logged: once a burst, and a burst that lasts each time that its number has
/// tripled.
#[derive(Debug, Default)]
struct Bursts {
    /// How many lost lines have been logged.
    logged: u64,
}

impl Bursts {
    /// No block is waiting. `lost` lines were lost so far; gives how many are to be logged.
    fn end(&mut self, lost: u64) -> Option<u64> {
        let new = lost - self.logged;
        self.logged = lost;
        (new > 0).then_some(new)
    }

    /// These lost lines are logged elsewhere.
    fn skip(&mut self, lines: u64) {
        self.logged += lines;
    }

    /// A block was written while others may wait.
    fn look(&mut self, lost: u64) -> Option<u64> {
        let is_long = lost - self.logged >= LONG_BURST_LINES.max(2 * self.logged);
        if is_long { self.end(lost) } else { None }
    }
}

/// The access lines of one worker.
#[derive(Debug)]
pub struct AccessLog {
    writer: Writer,
    lines: RefCell<Vec<u8>>,
    /// How many lines they are.
    count: Cell<u64>,
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
        self.count.set(self.count.get() + 1);
        let full = lines.len() >= BLOCK_BYTES;
        drop(lines);
        if full {
            self.hand_over();
        }
    }

    /// Hands over what was gathered.
    pub fn hand_over(&self) {
        let bytes = self.lines.take();
        let count = self.count.take();
        if bytes.is_empty() {
            return;
        }
        let block = Block::Lines(Lines { bytes, count });
        if self.writer.blocks.try_send(block).is_err() {
            self.writer.lost.fetch_add(count, Ordering::Relaxed);
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.hand_over();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Standard output whose reader takes a block each time that the test asks it to.
    struct Gated(Receiver<()>, Arc<AtomicU64>);

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.recv().map_err(Error::other)?;
            self.1
                .fetch_add(bytes.iter().filter(|b| **b == b'\n').count() as u64, Ordering::Relaxed);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_no_reader_takes_are_counted_as_lost() {
        let (open, gate) = std::sync::mpsc::channel();
        let written = Arc::<AtomicU64>::default();
        let writer = Writer::start(Gated(gate, written.clone())).expect("a thread can be started");
        let log = writer.log();
        let blocks = BLOCK_LIMIT as u64 + 10;
        for _ in 0..blocks {
            for number in 0..3 {
                log.line(&number);
            }
            log.hand_over();
        }
        // One block is with the thread, or still among those that wait.
        assert!([9 * 3, 10 * 3].contains(&writer.lost()), "{}", writer.lost());
        for _ in 0..blocks {
            open.send(()).expect("the thread waits");
        }
        let lost = writer.lost();
        writer.clone().finish(Duration::from_secs(10));
        assert_eq!(written.load(Ordering::Relaxed) + lost, 3 * blocks);
        // The reader goes away.
        drop(open);
        let mut handed_over = 3 * blocks;
        while writer.lost() == lost {
            log.line(&1);
            log.hand_over();
            handed_over += 1;
            writer.clone().finish(Duration::from_secs(10));
        }
        assert_eq!(written.load(Ordering::Relaxed) + writer.lost(), handed_over);
    }

    /// Standard output that takes so many bytes, then fails once in this way.
    type Plan = Vec<(usize, ErrorKind)>;

    /// Standard output whose writes fail as planned, and then no more.
    struct Failing {
        plan: Plan,
        taken: Arc<std::sync::Mutex<Vec<u8>>>,
    }

    impl Write for Failing {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let count = match self.plan.first_mut() {
                Some((0, kind)) => {
                    let error = (*kind).into();
                    self.plan.remove(0);
                    return Err(error);
                }
                Some((left, _)) => {
                    let count = bytes.len().min(*left);
                    *left -= count;
                    count
                }
                None => bytes.len(),
            };
            self.taken.lock().expect("no test panics here").extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What is written of ten blocks of the lines 100, 101 and 102, and how many lines are lost.
    fn write_ten(plan: Plan) -> (String, u64) {
        let taken = Arc::<std::sync::Mutex<Vec<u8>>>::default();
        let writer = Writer::start(Failing { plan, taken: taken.clone() }).expect("a thread");
        let log = writer.log();
        for _ in 0..10 {
            (100..103).for_each(|number| log.line(&number));
            log.hand_over();
        }
        writer.clone().finish(Duration::from_secs(10));
        let taken = taken.lock().expect("no test panics here").clone();
        (String::from_utf8(taken).expect("lines are text"), writer.lost())
    }

    #[test]
    fn failed_write_loses_the_rest_of_its_block_only() {
        let block = "100\n101\n102\n";
        let full = ErrorKind::StorageFull;
        assert_eq!(write_ten(vec![(12, full)]), (block.repeat(9), 3));
        let torn = format!("{block}100\n10\n{}", block.repeat(8));
        assert_eq!(write_ten(vec![(18, ErrorKind::WouldBlock)]), (torn, 2));
        // The line feed that ends the torn line fails as well.
        let torn = format!("{block}100\n10\n{}", block.repeat(7));
        assert_eq!(write_ten(vec![(18, full), (0, full)]), (torn, 5));
        assert_eq!(write_ten(vec![(5, ErrorKind::Interrupted)]), (block.repeat(10), 0));
        let gone = ErrorKind::BrokenPipe;
        assert_eq!(write_ten(vec![(12, gone)]), (block.to_owned(), 27));
    }

    #[test]
    fn lost_lines_are_reported_once_a_burst() {
        let mut bursts = Bursts::default();
        assert_eq!(bursts.end(0), None);
        assert_eq!(bursts.look(9_999), None);
        assert_eq!(bursts.end(9_999), Some(9_999));
        assert_eq!(bursts.end(9_999), None);
        // One that lasts is reported at 30,000, 90,000 and so on.
        let reported: Vec<u64> = (9_999..1_000_000).filter_map(|lost| bursts.look(lost)).collect();
        assert_eq!(reported, [19_998, 59_994, 179_982, 539_946]);
    }
}
