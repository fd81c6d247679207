//! Counters that each worker moves alone, folded into one text when somebody asks.
//!
//! A metric has one writer, its worker, so moving it is a load and a store without a lock on the
//! bus. The reader adds up what all workers hold.

use std::fmt::Write;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A number that one thread moves and any may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. To be called by the owning worker only.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// The value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How many things are open. Only [`Opened`] moves it.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// The value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn move_by(&self, n: i64) {
        let value = self.0.load(Ordering::Relaxed).wrapping_add_signed(n);
        self.0.store(value, Ordering::Relaxed);
    }
}

/// One open thing in a [`Gauge`], to be dropped with it: however a task ends, and wherever it is aborted,
/// the gauge then counts one less. To be made and dropped by the gauge's worker only.
#[derive(Debug)]
pub struct Opened<G: Deref<Target = Gauge>>(G);

impl<G: Deref<Target = Gauge>> Opened<G> {
    /// Counts one more.
    #[must_use = "dropping it counts one less"]
    pub fn new(gauge: G) -> Self {
        gauge.move_by(1);
        Self(gauge)
    }
}

impl<G: Deref<Target = Gauge>> Drop for Opened<G> {
    fn drop(&mut self) {
        self.0.move_by(-1);
    }
}

/// The upper ends of the buckets of a [`Histogram`], in microseconds.
pub const BUCKETS_US: [u64; 14] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 500_000, 2_000_000,
    10_000_000,
];

/// How long things took.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKETS_US.len() + 1],
    sum_us: Counter,
}

impl Histogram {
    /// Counts one duration. To be called by the owning worker only.
    pub fn observe(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS_US.partition_point(|end| *end < us);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.increment();
        }
        self.sum_us.add(us);
    }
}

/// The metrics of all workers of a process.
#[derive(Debug)]
pub struct Registry<S>(Arc<Mutex<Vec<Arc<S>>>>);

impl<S> Clone for Registry<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> Default for Registry<S> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<S: Default> Registry<S> {
    /// A set for one more worker.
    #[must_use]
    pub fn worker(&self) -> Arc<S> {
        let set = Arc::new(S::default());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(set.clone());
        set
    }
}

impl<S> Registry<S> {
    /// The sets of all workers, to be folded.
    #[must_use]
    pub fn sets(&self) -> Vec<Arc<S>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A page in Prometheus' text format.
#[derive(Debug, Default)]
pub struct Page(String);

impl Page {
    /// A counter: its name without `_total`, and its value.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(&format!("{name}_total"), help, "counter");
        self.line(&format!("{name}_total"), "", value);
    }

    /// A counter with one label, whose values come from a closed set.
    pub fn counter_by(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        self.family(&format!("{name}_total"), help, "counter");
        for (text, value) in values {
            self.line(&format!("{name}_total"), &format!("{{{label}=\"{text}\"}}"), *value);
        }
    }

    /// A gauge.
    pub fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, help, "gauge");
        self.line(name, "", value);
    }

    /// A gauge with one label, whose values come from a closed set.
    pub fn gauge_by(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        self.family(name, help, "gauge");
        for (text, value) in values {
            self.line(name, &format!("{{{label}=\"{text}\"}}"), *value);
        }
    }

    /// A histogram in seconds, folded over workers.
    pub fn histogram<'a>(
        &mut self,
        name: &str,
        help: &str,
        workers: impl Iterator<Item = &'a Histogram> + Clone,
    ) {
        self.family(name, help, "histogram");
        let mut total = 0;
        let ends =
            BUCKETS_US.iter().map(|us| format!("{}", Duration::from_micros(*us).as_secs_f64()));
        for (index, end) in ends.chain(["+Inf".to_owned()]).enumerate() {
            total +=
                workers.clone().filter_map(|h| h.buckets.get(index)).map(Counter::get).sum::<u64>();
            self.line(&format!("{name}_bucket"), &format!("{{le=\"{end}\"}}"), total);
        }
        let sum = Duration::from_micros(workers.map(|h| h.sum_us.get()).sum());
        self.write(format_args!("{name}_sum {}\n{name}_count {total}\n", sum.as_secs_f64()));
    }

    /// The text.
    #[must_use]
    pub fn finish(self) -> String {
        self.0
    }

    fn family(&mut self, name: &str, help: &str, kind: &str) {
        self.write(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn line(&mut self, name: &str, labels: &str, value: u64) {
        self.write(format_args!("{name}{labels} {value}\n"));
    }

    fn write(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.0.write_fmt(text);
    }
}

/// What the kernel says of this process: memory and open files, for every role.
pub fn process(page: &mut Page) {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let resident: u64 = pages.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    page.gauge(
        "process_resident_memory_bytes",
        "Memory of this process that is in RAM.",
        resident * 4096,
    );
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    page.gauge(
        "process_open_fds",
        "Open files of the main thread.",
        u64::try_from(open).unwrap_or(0),
    );
    page.counter(
        "weft_clock_jumps",
        "How often the wall clock was set by more than 10 s.",
        crate::clock::jumps(),
    );
    page.gauge(
        "weft_clock_skew_seconds",
        "Difference between this host's clock and the control plane's at the last certificate.",
        crate::clock::skew_seconds(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauge_counts_what_is_not_dropped() {
        let gauge = Arc::<Gauge>::default();
        let (first, second) = (Opened::new(&*gauge), Opened::new(gauge.clone()));
        assert_eq!(gauge.get(), 2);
        drop(first);
        drop(second);
        assert_eq!(gauge.get(), 0);
    }

    #[test]
    fn what_workers_count_alone_adds_up() {
        let registry = Registry::<Histogram>::default();
        let (a, b) = (registry.worker(), registry.worker());
        a.observe(Duration::from_micros(50));
        b.observe(Duration::from_micros(51));
        b.observe(Duration::from_secs(60));
        let sets = registry.sets();
        let mut page = Page::default();
        page.histogram("weft_test_seconds", "A test.", sets.iter().map(AsRef::as_ref));
        let text = page.finish();
        for line in [
            "weft_test_seconds_bucket{le=\"0.00005\"} 1",
            "weft_test_seconds_bucket{le=\"0.0001\"} 2",
            "weft_test_seconds_bucket{le=\"+Inf\"} 3",
            "weft_test_seconds_count 3",
            "weft_test_seconds_sum 60.000101",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
