//! A data plane as a process: its control work on a runtime of its own, its workers beside it, the
//! admin port, signals, and the end in good order.

use std::collections::BTreeMap;
use std::future::Future;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use weft_model::{Name, Secret, Snapshot};
use weft_runtime::access::Writer;
use weft_runtime::drain::{Drain, drain_on_signals};
use weft_runtime::listening::{ListenReport, ListenStatus};
use weft_runtime::log::LogLevel;
use weft_runtime::metrics::{MetricsPage, add_process_metrics};
use weft_runtime::problems::Problems;
use weft_runtime::socket::Mark;
use weft_runtime::worker::PreparedWorkers;
use weft_runtime::{admin, log, memory, open_files, worker};
use weft_xds::bootstrap::Bootstrap;
use weft_xds::client::XdsStatus;
use weft_xds::translate::Notes;

use crate::configuration::{self, Channels};
use crate::identity::{self, Enrolment};
use crate::resolver::Failing;

/// What a data plane is started with.
pub struct Setup {
    /// The file, read.
    pub bootstrap: Bootstrap,
    /// How it gets its certificate and configuration, when by a control plane.
    pub enrolment: Option<Enrolment>,
    /// Where the admin, metrics and readiness ports listen.
    pub ports: admin::AdminConfig,
    /// How long draining waits.
    pub patience: Duration,
    /// Where access lines go.
    pub access: Writer,
    /// What it tells of itself beyond what every data plane does.
    pub particulars: Arc<dyn Particulars>,
}

/// What one role tells of itself beyond what every data plane does.
pub trait Particulars: Send + Sync + 'static {
    /// Adds its metrics to a page.
    fn metrics(&self, page: &mut MetricsPage<'_>);

    /// Whether it can serve, as far as this is its own matter.
    ///
    /// # Errors
    /// What it waits for.
    fn ready(&self) -> Result<(), String> {
        Ok(())
    }

    /// What is in force beyond the configuration.
    fn dump(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }

    /// Where a flow would go, as a query such as
    /// `transport=tcp&client=10.0.0.1:4000&destination=10.96.0.1:80` names it.
    ///
    /// # Errors
    /// What is wrong with the query, or why the flow would go nowhere.
    fn explain(&self, _query: &str) -> Result<serde_json::Value, String> {
        Err("this role carries no flows".into())
    }
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Setup").field("ports", &self.ports).finish_non_exhaustive()
    }
}

/// A process with its log and its threads, and nothing else open yet: see [`worker::prepare`].
#[derive(Debug)]
pub struct Begun {
    name: &'static str,
    level: LogLevel,
    runtime: Runtime,
    count: NonZeroUsize,
    workers: PreparedWorkers,
}

/// A data plane whose control work runs.
#[derive(Debug)]
pub struct DataPlaneProcess {
    name: &'static str,
    runtime: Runtime,
    waiting: PreparedWorkers,
    drain: Drain,
    access: Writer,
    mark: Option<Mark>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    problems: watch::Sender<Problems>,
    count: NonZeroUsize,
    reports: mpsc::UnboundedSender<ListenReport>,
}

/// Begins a process: its log, its control runtime and its workers, named after the role; one per
/// processor when their number is not said.
///
/// # Errors
/// What keeps it from starting.
pub fn begin(
    role: &'static str,
    workers: Option<NonZeroUsize>,
    log: &str,
) -> Result<Begun, String> {
    let level = log::start(log)?;
    open_files::raise_limit();
    memory::disable_core_dumps();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let count = workers.unwrap_or_else(worker::default_count);
    let workers = worker::prepare(role, count);
    let workers = workers.map_err(|error| format!("a worker could not be started: {error}"))?;
    Ok(Begun { name: role, level, runtime, count, workers })
}

impl Begun {
    /// Starts the admin port, and the stream of configurations.
    ///
    /// # Errors
    /// What keeps it from starting.
    pub fn start(self, setup: Setup) -> Result<DataPlaneProcess, String> {
        let Self { name, level, runtime, count, workers } = self;
        let mark = Mark::DEFAULT.if_permitted();
        if mark.is_none() {
            tracing::info!(
                "no permission to set marks (CAP_NET_RAW): what we send is not exempt from redirects by mark"
            );
        }
        let drain = Drain::new(setup.patience);
        runtime.block_on(async { drain_on_signals(&drain) }).map_err(|error| error.to_string())?;

        let local = watch::Sender::new(BTreeMap::<Name, Arc<Secret>>::new());
        let status = watch::Sender::new(XdsStatus::default());
        let published = watch::Sender::new(Arc::new(Snapshot::default()));
        let snapshots = published.subscribe();
        let unresolved = watch::Sender::new(Failing::new());
        let problems = watch::Sender::new(Problems::default());
        let (reports, reported) = mpsc::unbounded_channel();

        let has_control = setup.enrolment.is_some() || setup.bootstrap.ads.is_some();
        let role = Arc::new(Role {
            has_control,
            snapshots: snapshots.clone(),
            status: status.subscribe(),
            unresolved: unresolved.subscribe(),
            problems: problems.subscribe(),
            listening: Mutex::new(ListenStatus::new(count)),
            was_ready: AtomicBool::new(false),
            particulars: setup.particulars,
            access: setup.access.clone(),
        });
        let port = admin::Admin { role: role.clone(), drain: drain.clone(), log: level };
        admin::start(&setup.ports, port).map_err(|error| error.to_string())?;
        runtime.spawn(collect(reported, role));
        let channels = Channels { local, published, status, unresolved };
        runtime.spawn(run_control(setup.bootstrap, setup.enrolment, mark, channels));
        Ok(DataPlaneProcess {
            name,
            runtime,
            waiting: workers,
            count,
            drain,
            access: setup.access,
            mark,
            snapshots,
            problems,
            reports,
        })
    }
}

impl DataPlaneProcess {
    /// The configurations.
    #[must_use]
    pub fn snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.clone()
    }

    /// The end of the process.
    #[must_use]
    pub fn drain(&self) -> Drain {
        self.drain.clone()
    }

    /// The mark on what is sent, if it may be set.
    #[must_use]
    pub fn mark(&self) -> Option<Mark> {
        self.mark
    }

    /// Where planning tells what it could not build.
    #[must_use]
    pub fn problems(&self) -> watch::Sender<Problems> {
        self.problems.clone()
    }

    /// Where workers tell what they listen on.
    #[must_use]
    pub fn reports(&self) -> mpsc::UnboundedSender<ListenReport> {
        self.reports.clone()
    }

    /// Does something where control work runs, and waits for it.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Runs control work beside the workers.
    pub fn spawn(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// Runs the workers until the process has drained.
    ///
    /// # Errors
    /// When a worker ended badly.
    pub fn serve<F, W>(self, run: F) -> Result<(), String>
    where
        F: Fn(usize) -> W + Clone + Send + 'static,
        W: Future<Output = ()> + 'static,
    {
        let workers = self.waiting.start(run);
        tracing::info!(role = self.name, workers = self.count, "serving");
        let good = workers.join();
        self.runtime.shutdown_timeout(Duration::from_millis(200));
        // The last access lines are on their way to the writer's thread.
        self.access.finish(Duration::from_secs(1));
        if good { Ok(()) } else { Err("a worker ended badly; see the log above".into()) }
    }
}

/// Gets a certificate where there is a control plane, then follows it.
async fn run_control(
    bootstrap: Bootstrap,
    enrolment: Option<Enrolment>,
    mark: Option<Mark>,
    channels: Channels,
) {
    let current = match &enrolment {
        Some(enrolment) => Some(identity::enrol(enrolment, mark, channels.local.clone()).await),
        None => None,
    };
    Box::pin(configuration::follow(bootstrap, enrolment.zip(current), mark, channels)).await;
}

/// Keeps what the workers listen on, for readiness.
async fn collect(mut reported: mpsc::UnboundedReceiver<ListenReport>, role: Arc<Role>) {
    while let Some(report) = reported.recv().await {
        let mut listening = role.listening.lock().unwrap_or_else(PoisonError::into_inner);
        let news = listening.record(report);
        for failure in news {
            tracing::error!(failure, "a listener could not be bound; trying again");
        }
    }
}

/// What the admin port tells of a data plane.
struct Role {
    /// Whether a control plane leads it, or its file alone.
    has_control: bool,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    status: watch::Receiver<XdsStatus>,
    unresolved: watch::Receiver<Failing>,
    problems: watch::Receiver<Problems>,
    listening: Mutex<ListenStatus>,
    was_ready: AtomicBool,
    particulars: Arc<dyn Particulars>,
    access: Writer,
}

impl admin::AdminRole for Role {
    fn ready(&self) -> Result<(), String> {
        let is_first = self.snapshots.borrow().revision == 0;
        let status = self.status.borrow().clone();
        if is_first || !status.is_settled {
            let waiting: Vec<String> = status.waiting_for.iter().map(ToString::to_string).collect();
            let reason =
                status.last_error.filter(|_| is_first).unwrap_or_else(|| waiting.join(", "));
            return Err(format!("waiting for the first configuration: {reason}"));
        }
        self.listening.lock().unwrap_or_else(PoisonError::into_inner).ready()?;
        self.problems.borrow().ready(self.was_ready.load(Ordering::Relaxed))?;
        self.particulars.ready()?;
        self.was_ready.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn metrics(&self, page: &mut MetricsPage<'_>) {
        self.particulars.metrics(page);
        let status = self.status.borrow();
        page.gauge(
            "weft_xds_connected",
            "1 while a control plane is connected and has answered, otherwise 0.",
            u64::from(status.connected),
        );
        page.gauge(
            "weft_xds_revision",
            "Revision of the configuration in force.",
            self.snapshots.borrow().revision,
        );
        page.gauge(
            "weft_xds_rejected_resources",
            "Resources rejected in their newest version.",
            status.rejected.len() as u64,
        );
        let count = |of: fn(&Notes) -> &Vec<String>| {
            status.notes.values().map(|notes| of(notes).len() as u64).sum()
        };
        page.gauge(
            "weft_xds_ignored_fields",
            "Fields of accepted resources that have no effect.",
            count(|notes| &notes.not_honoured),
        );
        page.gauge(
            "weft_xds_warnings",
            "Settings in force that weaken security.",
            count(|notes| &notes.warnings),
        );
        page.gauge(
            "weft_dns_failing_hosts",
            "Host names whose last DNS lookup failed. Their last known addresses stay in use.",
            self.unresolved.borrow().len() as u64,
        );
        page.counter(
            "weft_access_log_lost_lines",
            "Access log lines lost because their reader was too slow, or writing failed.",
            self.access.lost(),
        );
        add_process_metrics(page);
    }

    fn explain(&self, query: &str) -> Result<serde_json::Value, String> {
        self.particulars.explain(query)
    }

    fn config_dump(&self) -> serde_json::Value {
        let status = self.status.borrow();
        let noted = |of: fn(&Notes) -> &Vec<String>| -> serde_json::Value {
            let noted = status.notes.iter().filter(|(_, notes)| !of(notes).is_empty());
            noted.map(|(resource, notes)| (resource.clone(), of(notes).clone())).collect()
        };
        let mut dump = weft_xds::translate::dump(&self.snapshots.borrow());
        if let serde_json::Value::Object(fields) = &mut dump {
            fields.insert(
                "source".into(),
                serde_json::json!({
                    "control_plane": self.has_control,
                    "connected": status.connected,
                    "last_error": status.last_error,
                    "rejected": status.rejected,
                    "not_honoured": noted(|notes| &notes.not_honoured),
                    "warnings": noted(|notes| &notes.warnings),
                    "waiting_for": status.waiting_for.iter().map(ToString::to_string).collect::<Vec<_>>(),
                }),
            );
            fields.insert("dns_failures".into(), serde_json::json!(*self.unresolved.borrow()));
            fields.insert("problems".into(), self.problems.borrow().all().cloned().collect());
            fields.append(&mut self.particulars.dump());
        }
        dump
    }
}
