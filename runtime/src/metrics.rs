//! Metrics: counters that each worker moves without locks, and the page that a scraper reads.
//!
//! A counter has one writer, its worker, so to increment it is a load and a store without a bus lock. When a
//! scraper asks, the values of all workers are added and encoded by `prometheus-client`.

use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::Registry;

/// A number that one thread increments and any thread may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning worker may call this.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Adds one. Only the owning worker may call this.
    pub fn increment(&self) {
        self.add(1);
    }

    /// The current value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number of open things. Only [`GaugeGuard`] changes it.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// The current value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn move_by(&self, n: i64) {
        let value = self.0.load(Ordering::Relaxed).wrapping_add_signed(n);
        self.0.store(value, Ordering::Relaxed);
    }
}

/// Counts one open thing in a [`Gauge`] until it is dropped, also when its task is aborted or panics. Only the
/// gauge's worker may make and drop it.
#[derive(Debug)]
pub struct GaugeGuard<G: Deref<Target = Gauge>>(G);

impl<G: Deref<Target = Gauge>> GaugeGuard<G> {
    /// Increments the gauge.
    #[must_use = "dropping the guard decrements the gauge"]
    pub fn new(gauge: G) -> Self {
        gauge.move_by(1);
        Self(gauge)
    }
}

impl<G: Deref<Target = Gauge>> Drop for GaugeGuard<G> {
    fn drop(&mut self) {
        self.0.move_by(-1);
    }
}

/// The upper bounds of the buckets of a [`Histogram`], in microseconds.
pub const BUCKETS_US: [u64; 14] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 500_000, 2_000_000,
    10_000_000,
];

/// A distribution of durations.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BUCKETS_US.len() + 1],
    sum_us: Counter,
}

impl Histogram {
    /// Counts one duration. Only the owning worker may call this.
    pub fn observe(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS_US.partition_point(|end| *end < us);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.increment();
        }
        self.sum_us.add(us);
    }
}

/// The metrics of all workers of a process, one set of type `S` each.
#[derive(Debug)]
pub struct WorkerMetrics<S>(Arc<Mutex<Vec<Arc<S>>>>);

impl<S> Clone for WorkerMetrics<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> Default for WorkerMetrics<S> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<S: Default> WorkerMetrics<S> {
    /// Adds the set of one more worker.
    #[must_use]
    pub fn worker(&self) -> Arc<S> {
        let set = Arc::new(S::default());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(set.clone());
        set
    }
}

impl<S> WorkerMetrics<S> {
    /// The sets of all workers.
    #[must_use]
    pub fn sets(&self) -> Vec<Arc<S>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Names and values of labels.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// The metrics of one scrape, in the order in which they are added.
///
/// Names of counters are given without `_total`, which the page appends.
#[derive(Debug)]
pub struct MetricsPage<'a>(DescriptorEncoder<'a>);

impl MetricsPage<'_> {
    /// Adds a counter.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.counters(name, help, [(&[] as Labels<'_>, value)]);
    }

    /// Adds a counter with one label, whose values come from a closed set.
    pub fn counter_by(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        self.family(name, help, MetricType::Counter, |family| {
            values
                .iter()
                .try_for_each(|(text, value)| add_counter(family, &[(label, text)], *value))
        });
    }

    /// Adds a counter with these series.
    pub fn counters<'l>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels<'l>, u64)>,
    ) {
        self.family(name, help, MetricType::Counter, |family| {
            series.into_iter().try_for_each(|(labels, value)| add_counter(family, labels, value))
        });
    }

    /// Adds a gauge.
    pub fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, help, MetricType::Gauge, |family| family.encode_gauge(&value));
    }

    /// Adds a gauge with one label, whose values come from a closed set.
    pub fn gauge_by(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        self.family(name, help, MetricType::Gauge, |family| {
            values.iter().try_for_each(|(text, value)| {
                family.encode_family(&[(label, *text)])?.encode_gauge(value)
            })
        });
    }

    /// Adds a histogram in seconds: the sum over workers.
    pub fn histogram<'h>(
        &mut self,
        name: &str,
        help: &str,
        workers: impl IntoIterator<Item = &'h Histogram>,
    ) {
        let sum = HistogramSum::of(workers);
        self.histograms(name, help, [(&[] as Labels<'_>, &sum)]);
    }

    /// Adds a histogram in seconds with these series.
    pub fn histograms<'l>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels<'l>, &'l HistogramSum)>,
    ) {
        self.family(name, help, MetricType::Histogram, |family| {
            series.into_iter().try_for_each(|(labels, sum)| {
                if labels.is_empty() {
                    return sum.encode(family);
                }
                sum.encode(&mut family.encode_family(&labels)?)
            })
        });
    }

    fn family(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        add: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
    ) {
        // The page is written to a String, which cannot fail.
        let _ = self
            .0
            .encode_descriptor(name, help, None, kind)
            .and_then(|mut family| add(&mut family));
    }
}

fn add_counter(family: &mut MetricEncoder<'_>, labels: Labels<'_>, value: u64) -> fmt::Result {
    const NO_EXEMPLAR: Option<&Exemplar<[(&str, &str); 0], f64>> = None;
    if labels.is_empty() {
        return family.encode_counter(&value, NO_EXEMPLAR);
    }
    family.encode_family(&labels)?.encode_counter(&value, NO_EXEMPLAR)
}

/// The sum of several [`Histogram`]s.
#[derive(Debug, Clone, Default)]
pub struct HistogramSum {
    buckets: [u64; BUCKETS_US.len() + 1],
    sum: Duration,
}

impl HistogramSum {
    /// Adds the histograms of workers.
    #[must_use]
    pub fn of<'h>(workers: impl IntoIterator<Item = &'h Histogram>) -> Self {
        let mut sum = Self::default();
        workers.into_iter().for_each(|histogram| sum.add(histogram));
        sum
    }

    /// Adds one histogram.
    pub fn add(&mut self, histogram: &Histogram) {
        for (total, bucket) in self.buckets.iter_mut().zip(&histogram.buckets) {
            *total += bucket.get();
        }
        self.sum += Duration::from_micros(histogram.sum_us.get());
    }

    fn encode(&self, metric: &mut MetricEncoder<'_>) -> fmt::Result {
        let bounds = BUCKETS_US.iter().map(|us| Duration::from_micros(*us).as_secs_f64());
        let buckets: Vec<(f64, u64)> =
            bounds.chain([f64::INFINITY]).zip(self.buckets.iter().copied()).collect();
        let count = self.buckets.iter().sum();
        metric.encode_histogram::<[(&str, &str); 0]>(self.sum.as_secs_f64(), count, &buckets, None)
    }
}

/// A text format of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricsFormat {
    /// Prometheus' text format, version 0.0.4.
    Prometheus,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl MetricsFormat {
    /// The format that a scraper's `Accept` header asks for: OpenMetrics where it names it, and otherwise
    /// Prometheus' own.
    #[must_use]
    pub fn accepted(accept: Option<&str>) -> Self {
        if accept.is_some_and(|accept| accept.contains("application/openmetrics-text")) {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    /// The value of the `Content-Type` header.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The text of the metrics that `add` adds to a page.
    ///
    /// # Errors
    /// Formatting a metric failed.
    pub fn encode(
        self,
        add: impl Fn(&mut MetricsPage<'_>) + Send + Sync + 'static,
    ) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(PageCollector(add)));
        let mut out = String::new();
        match self {
            Self::Prometheus => prometheus_text::encode(&mut out, &registry)?,
            Self::OpenMetrics => text::encode(&mut out, &registry)?,
        }
        Ok(out)
    }
}

struct PageCollector<F>(F);

impl<F> fmt::Debug for PageCollector<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PageCollector")
    }
}

impl<F: Fn(&mut MetricsPage<'_>) + Send + Sync + 'static> Collector for PageCollector<F> {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        (self.0)(&mut MetricsPage(encoder));
        Ok(())
    }
}

/// Adds the metrics that every role has: memory, open files and the clock.
pub fn add_process_metrics(page: &mut MetricsPage<'_>) {
    page.gauge(
        "process_resident_memory_bytes",
        "Resident memory size in bytes.",
        crate::memory::resident_bytes(),
    );
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    page.gauge(
        "process_open_fds",
        "Number of open file descriptors.",
        u64::try_from(open).unwrap_or(0),
    );
    page.counter(
        "weft_clock_jumps",
        "Wall clock changes of more than 10 s.",
        crate::clock_watch::jumps(),
    );
    page.gauge(
        "weft_clock_skew_seconds",
        "Difference between this host's clock and the control plane's when the last certificate was issued.",
        crate::clock_watch::skew_seconds(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauge_counts_guards_until_they_are_dropped() {
        let gauge = Arc::<Gauge>::default();
        let first = GaugeGuard::new(&*gauge);
        let second = GaugeGuard::new(gauge.clone());
        assert_eq!(gauge.get(), 2);
        drop(first);
        drop(second);
        assert_eq!(gauge.get(), 0);
    }

    fn page_of_two_workers(format: MetricsFormat) -> String {
        let metrics = WorkerMetrics::<Histogram>::default();
        let first = metrics.worker();
        let second = metrics.worker();
        first.observe(Duration::from_micros(50));
        second.observe(Duration::from_micros(51));
        second.observe(Duration::from_secs(60));
        let add = move |page: &mut MetricsPage<'_>| {
            let sets = metrics.sets();
            page.histogram("weft_test_seconds", "A test.", sets.iter().map(AsRef::as_ref));
            page.counter("weft_test_plain", "A counter.", 3);
            let odd = [("quote \" and line\n", 7)];
            page.counter_by("weft_test_labelled", "A counter.", "reason", &odd);
            page.gauge_by("weft_test_open", "A gauge.", "path", &[("proxy", 1), ("kernel", 2)]);
        };
        format.encode(add).expect("a String takes it")
    }

    #[test]
    fn histograms_of_workers_are_added() {
        let text = page_of_two_workers(MetricsFormat::Prometheus);
        for line in [
            "weft_test_seconds_bucket{le=\"5e-05\"} 1",
            "weft_test_seconds_bucket{le=\"0.0001\"} 2",
            "weft_test_seconds_bucket{le=\"+Inf\"} 3",
            "weft_test_seconds_count 3",
            "weft_test_seconds_sum 60.000101",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
    }

    #[test]
    fn both_formats_name_counters_as_their_scrapers_expect() {
        let prometheus = page_of_two_workers(MetricsFormat::Prometheus);
        assert!(
            prometheus.contains("# TYPE weft_test_plain_total counter\nweft_test_plain_total 3\n")
        );
        assert!(prometheus.contains("weft_test_open{path=\"kernel\"} 2\n"), "{prometheus}");
        let open = page_of_two_workers(MetricsFormat::OpenMetrics);
        assert!(
            open.contains("# TYPE weft_test_plain counter\nweft_test_plain_total 3\n"),
            "{open}"
        );
        assert!(open.ends_with("# EOF\n"), "{open}");
    }

    #[test]
    fn label_values_are_escaped() {
        let text = page_of_two_workers(MetricsFormat::Prometheus);
        let escaped = "weft_test_labelled_total{reason=\"quote \\\" and line\\n\"} 7\n";
        assert!(text.contains(escaped), "{text}");
    }

    #[test]
    fn openmetrics_is_sent_to_scrapers_that_accept_it() {
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2";
        assert_eq!(MetricsFormat::accepted(Some(prometheus)), MetricsFormat::OpenMetrics);
        assert_eq!(MetricsFormat::accepted(Some("*/*")), MetricsFormat::Prometheus);
        assert_eq!(MetricsFormat::accepted(None), MetricsFormat::Prometheus);
    }
}
