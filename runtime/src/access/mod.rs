//! The access log: one JSON object per request, connection, flow or TLS handshake, one per line.
//!
//! A worker collects its lines and sends them to the writer thread in batches, so that a line costs no system call
//! and a slow output delays no request. When the queue of batches is full, the newest batch is discarded. Lost lines are
//! counted, and logged once per burst. A failed write loses only lines of its own batch, and only lines of its own sink.

mod output;
mod record;
mod values;

use std::cell::RefCell;
use std::io::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::Duration;

use weft_model::{AccessLogSink, AccessLogSinks};

pub use output::OpenedSink;
use output::{Outputs, SINK_LIMIT};
pub use record::{AccessRecord, ConnectionTraceId, FIELDS, FieldInfo, RecordKind, StartTime};
pub use values::{RefusalInfo, ResponseFlag, TerminationDetails, WordInfo};

use crate::clock::now;
use crate::log_limit::LogLimit;

/// The size at which a worker sends a batch before the flush interval has passed.
const BATCH_BYTES: usize = 32 * 1024;
/// The most batches in the queue of the writer thread.
const QUEUE_LIMIT: usize = 64;
/// The longest time that a line waits in a worker.
const FLUSH_INTERVAL: Duration = Duration::from_millis(200);
/// After this many lost lines a burst is logged before it has ended.
const LONG_BURST_LINES: u64 = 10_000;

/// A message to the writer thread.
#[derive(Debug)]
enum WriterMessage {
    Lines(LineBatch),
    /// Asks for an answer when every earlier batch is written.
    Flush(SyncSender<()>),
}

/// Access log lines for one sink, each with its line feed.
#[derive(Debug)]
struct LineBatch {
    sink: AccessLogSink,
    bytes: Vec<u8>,
    lines: u64,
}

/// A handle of the thread that writes access log lines.
#[derive(Debug, Clone)]
pub struct Writer {
    queue: SyncSender<WriterMessage>,
    lost: Arc<AtomicU64>,
}

impl Writer {
    /// Starts the writer thread. It opens a sink when the first line for it arrives.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start() -> std::io::Result<Self> {
        Self::start_with(OpenedSink::open)
    }

    /// Starts the writer thread with another way to open sinks.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start_with(
        open: impl FnMut(&AccessLogSink) -> std::io::Result<OpenedSink> + Send + 'static,
    ) -> std::io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE_LIMIT);
        let lost = Arc::<AtomicU64>::default();
        let counted = lost.clone();
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_all(&messages, Outputs::new(Box::new(open)), &counted))?;
        Ok(Self { queue, lost })
    }

    /// The number of lines that were lost because the output was too slow, or opening or writing it failed.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until every batch in the queue is written, at most for `timeout`.
    pub fn finish(self, timeout: Duration) {
        const STEP: Duration = Duration::from_millis(10);
        let (done, finished) = sync_channel(1);
        let mut left = timeout;
        while let Err(TrySendError::Full(_)) =
            self.queue.try_send(WriterMessage::Flush(done.clone()))
        {
            let Some(less) = left.checked_sub(STEP) else { return };
            left = less;
            // No answer can arrive yet. This only waits until a batch was taken out of the queue.
            let _ = finished.recv_timeout(STEP);
        }
        drop(done);
        // After the timeout the rest is lost.
        let _ = finished.recv_timeout(left);
    }

    /// A log for a thread that flushes it itself.
    #[must_use]
    pub fn log(&self) -> AccessLog {
        AccessLog { writer: self.clone(), pending: RefCell::default() }
    }

    /// The log of a worker. Must be called on the worker, whose runtime flushes the log.
    #[must_use]
    pub fn worker(&self) -> std::rc::Rc<AccessLog> {
        let log = std::rc::Rc::new(self.log());
        let weak = std::rc::Rc::downgrade(&log);
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(FLUSH_INTERVAL).await;
                let Some(log) = weak.upgrade() else {
                    return;
                };
                log.flush();
            }
        });
        log
    }
}

/// Writes batches until every handle is dropped.
fn write_all(messages: &Receiver<WriterMessage>, mut outputs: Outputs, lost: &AtomicU64) {
    let mut reports = LossReports::default();
    let failures = LogLimit::default();
    loop {
        let message = match messages.try_recv() {
            Ok(message) => message,
            Err(TryRecvError::Empty) => {
                // The queue is empty, so the burst of lost lines has ended.
                if let Some(lines) = reports.burst_ended(lost.load(Ordering::Relaxed)) {
                    log_lost(lines);
                }
                match messages.recv() {
                    Ok(message) => message,
                    Err(_) => return,
                }
            }
            Err(TryRecvError::Disconnected) => return,
        };
        let batch = match message {
            WriterMessage::Lines(batch) => batch,
            WriterMessage::Flush(done) => {
                // `finish` may have reached its timeout.
                let _ = done.send(());
                continue;
            }
        };
        if let Err(failed) = outputs.write(&batch) {
            lost.fetch_add(failed.lines, Ordering::Relaxed);
            reports.exclude(failed.lines);
            if let Some(error) = failed.error {
                log_failure(&batch.sink, &error, &failures);
            }
        }
        if let Some(lines) = reports.batch_written(lost.load(Ordering::Relaxed)) {
            log_lost(lines);
        }
    }
}

fn log_lost(lines: u64) {
    tracing::warn!(lines, "access log lines lost: output too slow");
}

fn log_failure(sink: &AccessLogSink, error: &Error, failures: &LogLimit) {
    if let Some(failures) = failures.event(now()) {
        tracing::warn!(%sink, %error, failures, "access log lines lost: write failed");
    }
}

/// Decides when lost lines are logged: at the end of a burst, and during a long burst each time that the number of lost
/// lines has tripled.
#[derive(Debug, Default)]
struct LossReports {
    /// The lost lines that have been logged.
    logged: u64,
}

impl LossReports {
    /// The queue is empty, and `lost` lines were lost so far. Returns how many of them to log.
    fn burst_ended(&mut self, lost: u64) -> Option<u64> {
        let new = lost - self.logged;
        self.logged = lost;
        (new > 0).then_some(new)
    }

    /// Excludes lost lines that have a log line of their own.
    fn exclude(&mut self, lines: u64) {
        self.logged += lines;
    }

    /// A batch was written, and the queue may contain more.
    fn batch_written(&mut self, lost: u64) -> Option<u64> {
        let is_long = lost - self.logged >= LONG_BURST_LINES.max(2 * self.logged);
        if is_long { self.burst_ended(lost) } else { None }
    }
}

/// The access log of one worker.
#[derive(Debug)]
pub struct AccessLog {
    writer: Writer,
    /// At most one batch per sink.
    pending: RefCell<Vec<LineBatch>>,
}

impl AccessLog {
    /// Adds a line for each sink: `record` as one JSON object.
    pub fn line(&self, sinks: &AccessLogSinks, record: &impl serde::Serialize) {
        for sink in sinks.iter() {
            if self.add(sink, record) >= BATCH_BYTES {
                self.flush();
            }
        }
    }

    /// Adds a line to the batch of a sink. Returns the size of the batch.
    fn add(&self, sink: &AccessLogSink, record: &impl serde::Serialize) -> usize {
        if !self.has_room(sink) {
            self.flush();
        }
        let mut pending = self.pending.borrow_mut();
        if !pending.iter().any(|batch| batch.sink == *sink) {
            pending.push(LineBatch { sink: sink.clone(), bytes: Vec::new(), lines: 0 });
        }
        let Some(batch) = pending.iter_mut().find(|batch| batch.sink == *sink) else { return 0 };
        let start = batch.bytes.len();
        if serde_json::to_writer(&mut batch.bytes, record).is_err() {
            batch.bytes.truncate(start);
        } else {
            batch.bytes.push(b'\n');
            batch.lines += 1;
        }
        batch.bytes.len()
    }

    fn has_room(&self, sink: &AccessLogSink) -> bool {
        let pending = self.pending.borrow();
        pending.len() < SINK_LIMIT || pending.iter().any(|batch| batch.sink == *sink)
    }

    /// Sends the collected lines to the writer thread.
    pub fn flush(&self) {
        for batch in self.pending.borrow_mut().drain(..) {
            let lines = batch.lines;
            if self.writer.queue.try_send(WriterMessage::Lines(batch)).is_err() {
                self.writer.lost.fetch_add(lines, Ordering::Relaxed);
            }
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Write};

    use super::*;

    /// A writer whose standard output is `output`.
    fn start(output: impl Write + Send + 'static) -> Writer {
        let mut output = Some(output);
        let open = move |_: &AccessLogSink| {
            output.take().map(OpenedSink::stream).ok_or_else(|| ErrorKind::NotFound.into())
        };
        Writer::start_with(open).expect("a thread can be started")
    }

    fn log_number(log: &AccessLog, number: &u64) {
        log.line(&AccessLogSinks::Stdout, number);
    }

    /// An output that accepts one batch for each message of the test.
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
    fn lines_beyond_the_queue_limit_are_counted_as_lost() {
        let (open, gate) = std::sync::mpsc::channel();
        let written = Arc::<AtomicU64>::default();
        let writer = start(Gated(gate, written.clone()));
        let log = writer.log();
        let batches = QUEUE_LIMIT as u64 + 10;
        for _ in 0..batches {
            for number in 0..3 {
                log_number(&log, &number);
            }
            log.flush();
        }
        // The thread may have taken one batch out of the queue.
        assert!([9 * 3, 10 * 3].contains(&writer.lost()), "{}", writer.lost());
        for _ in 0..batches {
            open.send(()).expect("the thread waits");
        }
        let lost = writer.lost();
        writer.clone().finish(Duration::from_secs(10));
        assert_eq!(written.load(Ordering::Relaxed) + lost, 3 * batches);
        // Every further write fails.
        drop(open);
        let mut sent = 3 * batches;
        while writer.lost() == lost {
            log_number(&log, &1);
            log.flush();
            sent += 1;
            writer.clone().finish(Duration::from_secs(10));
        }
        assert_eq!(written.load(Ordering::Relaxed) + writer.lost(), sent);
    }

    /// The errors of an output, each after it has accepted this many bytes.
    type Plan = Vec<(usize, ErrorKind)>;

    /// An output whose writes fail as planned, and then succeed.
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

    /// Sends ten batches of the lines 100, 101 and 102. Returns the written text and the number of lost lines.
    fn write_ten(plan: Plan) -> (String, u64) {
        let taken = Arc::<std::sync::Mutex<Vec<u8>>>::default();
        let writer = start(Failing { plan, taken: taken.clone() });
        let log = writer.log();
        for _ in 0..10 {
            (100..103).for_each(|number| log_number(&log, &number));
            log.flush();
        }
        writer.clone().finish(Duration::from_secs(10));
        let taken = taken.lock().expect("no test panics here").clone();
        (String::from_utf8(taken).expect("lines are text"), writer.lost())
    }

    #[test]
    fn failed_write_loses_the_rest_of_its_batch_only() {
        let batch = "100\n101\n102\n";
        let full = ErrorKind::StorageFull;
        assert_eq!(write_ten(vec![(12, full)]), (batch.repeat(9), 3));
        let torn = format!("{batch}100\n10\n{}", batch.repeat(8));
        assert_eq!(write_ten(vec![(18, ErrorKind::WouldBlock)]), (torn, 2));
        // The line feed that ends the torn line fails as well.
        let torn = format!("{batch}100\n10\n{}", batch.repeat(7));
        assert_eq!(write_ten(vec![(18, full), (0, full)]), (torn, 5));
        assert_eq!(write_ten(vec![(5, ErrorKind::Interrupted)]), (batch.repeat(10), 0));
        let closed = ErrorKind::BrokenPipe;
        assert_eq!(write_ten(vec![(12, closed)]), (batch.to_owned(), 27));
    }

    #[test]
    fn lost_lines_are_reported_once_a_burst() {
        let mut reports = LossReports::default();
        assert_eq!(reports.burst_ended(0), None);
        assert_eq!(reports.batch_written(9_999), None);
        assert_eq!(reports.burst_ended(9_999), Some(9_999));
        assert_eq!(reports.burst_ended(9_999), None);
        // A long burst is reported each time that the number of lost lines has tripled.
        let reported: Vec<u64> =
            (9_999..1_000_000).filter_map(|lost| reports.batch_written(lost)).collect();
        assert_eq!(reported, [19_998, 59_994, 179_982, 539_946]);
    }
}
