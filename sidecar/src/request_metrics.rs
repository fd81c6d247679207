//! Request metrics by listener, service, upstream cluster and peer.
//!
//! A worker finds the series of a request without a lock: its connection keeps the series of the request before, and
//! the worker keeps a map of its own. Only the first request of a series locks the map that scrapers read.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use weft_model::Name;
use weft_runtime::metrics::{Counter, Histogram, HistogramSum, MetricsPage};

/// The most series of one worker. Requests beyond them are counted in one series whose labels are all [`OTHER`].
const SERIES_LIMIT: usize = 1_000;
/// The value of labels for series beyond the limit.
const OTHER: &str = "other";
/// The value of a label that a request does not have: no route matched, no cluster was chosen, the peer has no SPIFFE ID.
const NONE: &str = "none";
/// Classes of response codes; the last is for codes outside the standard, 600 to 999.
const RESPONSE_CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", OTHER];

/// The labels of a series.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct SeriesLabels {
    listener: Name,
    service: Name,
    cluster: Name,
    peer: Name,
}

/// What a finished request is counted by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestLabels<'a> {
    pub(crate) listener: &'a Name,
    /// The virtual host that matched.
    pub(crate) service: Option<&'a Name>,
    /// The upstream cluster.
    pub(crate) cluster: Option<&'a Name>,
    /// The client's SPIFFE ID.
    pub(crate) peer: Option<&'a str>,
}

/// The result of a finished request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestResult {
    pub(crate) status: u16,
    pub(crate) duration: Duration,
}

/// The counters of one series.
#[derive(Debug, Default)]
pub(crate) struct RequestSeries {
    responses: [Counter; RESPONSE_CLASSES.len()],
    duration: Histogram,
}

impl RequestSeries {
    fn count(&self, result: RequestResult) {
        let class =
            usize::from(result.status / 100).wrapping_sub(1).min(RESPONSE_CLASSES.len() - 1);
        if let Some(counter) = self.responses.get(class) {
            counter.increment();
        }
        self.duration.observe(result.duration);
    }
}

/// One worker's series, for scrapers.
#[derive(Debug, Default)]
pub(crate) struct SharedSeries(Mutex<HashMap<SeriesLabels, Arc<RequestSeries>>>);

impl SharedSeries {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SeriesLabels, Arc<RequestSeries>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The series of a connection's last request, and the names that it was found by.
#[derive(Debug)]
struct LastSeries {
    service: Option<Name>,
    cluster: Option<Name>,
    series: Arc<RequestSeries>,
}

/// A connection's cache of the series of its last request. All requests of a connection have the same listener and
/// peer.
#[derive(Debug, Default)]
pub(crate) struct ConnectionSeries(RefCell<Option<LastSeries>>);

/// One worker's series, for itself.
#[derive(Debug, Default)]
pub(crate) struct WorkerSeries(RefCell<HashMap<SeriesLabels, Arc<RequestSeries>>>);

impl WorkerSeries {
    /// Counts a finished request.
    pub(crate) fn count(
        &self,
        labels: RequestLabels<'_>,
        result: RequestResult,
        last: &ConnectionSeries,
        shared: &SharedSeries,
    ) {
        let mut last = last.0.borrow_mut();
        if let Some(last) = last.as_ref()
            && is_same(last.service.as_ref(), labels.service)
            && is_same(last.cluster.as_ref(), labels.cluster)
        {
            return last.series.count(result);
        }
        let series = self.find(labels, shared);
        series.count(result);
        *last = Some(LastSeries {
            service: labels.service.cloned(),
            cluster: labels.cluster.cloned(),
            series,
        });
    }

    fn find(&self, labels: RequestLabels<'_>, shared: &SharedSeries) -> Arc<RequestSeries> {
        let none = || Name::from(NONE);
        let mut labels = SeriesLabels {
            listener: labels.listener.clone(),
            service: labels.service.cloned().unwrap_or_else(none),
            cluster: labels.cluster.cloned().unwrap_or_else(none),
            peer: labels.peer.map_or_else(none, Name::from),
        };
        let mut own = self.0.borrow_mut();
        if let Some(series) = own.get(&labels) {
            return series.clone();
        }
        if own.len() >= SERIES_LIMIT {
            let other = Name::from(OTHER);
            labels = SeriesLabels {
                listener: other.clone(),
                service: other.clone(),
                cluster: other.clone(),
                peer: other,
            };
        }
        let series = own.entry(labels.clone()).or_default().clone();
        shared.lock().insert(labels, series.clone());
        series
    }

    /// Drops the series of listeners that are gone.
    pub(crate) fn retain(&self, has_listener: impl Fn(&str) -> bool, shared: &SharedSeries) {
        let mut own = self.0.borrow_mut();
        let before = own.len();
        own.retain(|labels, _| &*labels.listener == OTHER || has_listener(&labels.listener));
        if own.len() < before {
            shared.lock().retain(|labels, _| own.contains_key(labels));
        }
    }
}

/// Whether two names are the same value of the same plan. Names of different plans count as different, which
/// costs one lookup.
fn is_same(one: Option<&Name>, other: Option<&Name>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    }
}

/// The sum of one series over workers.
#[derive(Debug, Default)]
struct SeriesSum {
    responses: [u64; RESPONSE_CLASSES.len()],
    duration: HistogramSum,
}

/// Adds the request metrics of all workers to a page.
pub(crate) fn add_request_metrics<'w>(
    workers: impl Iterator<Item = &'w SharedSeries>,
    page: &mut MetricsPage<'_>,
) {
    let mut sums = BTreeMap::<SeriesLabels, SeriesSum>::new();
    for worker in workers {
        for (labels, series) in &*worker.lock() {
            let sum = sums.entry(labels.clone()).or_default();
            for (total, counter) in sum.responses.iter_mut().zip(&series.responses) {
                *total += counter.get();
            }
            sum.duration.add(&series.duration);
        }
    }
    let series: Vec<_> = sums
        .iter()
        .flat_map(|(labels, sum)| {
            let classes = RESPONSE_CLASSES.into_iter().zip(sum.responses);
            classes.filter(|(_, count)| *count > 0).map(|(class, count)| {
                let labels = [
                    ("listener", &*labels.listener),
                    ("service", &*labels.service),
                    ("cluster", &*labels.cluster),
                    ("peer", &*labels.peer),
                    ("response_class", class),
                ];
                (labels, count)
            })
        })
        .collect();
    page.counters(
        "weft_sidecar_requests",
        "Finished requests.",
        series.iter().map(|(labels, count)| (labels.as_slice(), *count)),
    );
    let durations: Vec<_> = sums
        .iter()
        .map(|(labels, sum)| {
            let labels = [
                ("listener", &*labels.listener),
                ("service", &*labels.service),
                ("cluster", &*labels.cluster),
                ("peer", &*labels.peer),
            ];
            (labels, &sum.duration)
        })
        .collect();
    page.histograms(
        "weft_sidecar_request_duration_seconds",
        "Duration of requests, from the request's head to the end of the response.",
        durations.iter().map(|(labels, sum)| (labels.as_slice(), *sum)),
    );
}

#[cfg(test)]
mod tests {
    use weft_runtime::metrics::MetricsFormat;

    use super::*;

    fn text(shared: Arc<SharedSeries>) -> String {
        let add =
            move |page: &mut MetricsPage<'_>| add_request_metrics([&*shared].into_iter(), page);
        MetricsFormat::Prometheus.encode(add).expect("a String takes it")
    }

    #[test]
    fn requests_are_counted_by_listener_service_cluster_peer_and_class() {
        let worker = WorkerSeries::default();
        let shared = Arc::<SharedSeries>::default();
        let last = ConnectionSeries::default();
        let listener = Name::from("inbound");
        let service = Name::from("orders");
        let cluster = Name::from("inbound|80");
        let routed = RequestLabels {
            listener: &listener,
            service: Some(&service),
            cluster: Some(&cluster),
            peer: Some("spiffe://t/web"),
        };
        let unrouted = RequestLabels { service: None, cluster: None, ..routed };
        let duration = Duration::from_millis(3);
        for (labels, status) in [(routed, 200), (routed, 204), (unrouted, 404), (routed, 799)] {
            worker.count(labels, RequestResult { status, duration }, &last, &shared);
        }
        let text = text(shared);
        let routed =
            r#"listener="inbound",service="orders",cluster="inbound|80",peer="spiffe://t/web""#;
        let unrouted = r#"listener="inbound",service="none",cluster="none",peer="spiffe://t/web""#;
        for line in [
            format!("weft_sidecar_requests_total{{{routed},response_class=\"2xx\"}} 2"),
            format!("weft_sidecar_requests_total{{{routed},response_class=\"other\"}} 1"),
            format!("weft_sidecar_requests_total{{{unrouted},response_class=\"4xx\"}} 1"),
            format!("weft_sidecar_request_duration_seconds_count{{{routed}}} 3"),
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
        assert!(!text.contains("5xx"), "{text}");
    }

    #[test]
    fn series_beyond_the_limit_are_counted_together() {
        let worker = WorkerSeries::default();
        let shared = Arc::<SharedSeries>::default();
        let listener = Name::from("inbound");
        for number in 0..SERIES_LIMIT + 50 {
            let peer = format!("spiffe://t/{number}");
            let labels = RequestLabels {
                listener: &listener,
                service: None,
                cluster: None,
                peer: Some(&peer),
            };
            let result = RequestResult { status: 200, duration: Duration::from_millis(1) };
            worker.count(labels, result, &ConnectionSeries::default(), &shared);
        }
        let other = r#"listener="other",service="other",cluster="other",peer="other",response_class="2xx"} 50"#;
        let page = text(shared.clone());
        assert!(page.contains(other), "{page}");
        assert_eq!(shared.lock().len(), SERIES_LIMIT + 1);
        worker.retain(|_| false, &shared);
        assert_eq!(shared.lock().len(), 1, "only the series beyond the limit is left");
    }
}
