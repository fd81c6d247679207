//! A data-plane process: the control runtime, the worker threads, the admin port, signals and graceful shutdown.

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
use crate::resolver::FailedLookups;

/// The configuration of a data-plane process.
pub struct DataPlaneSetup {
    /// The parsed bootstrap file.
    pub bootstrap: Bootstrap,
    /// How to obtain a certificate and configuration from a control plane; none with a bootstrap file.
    pub enrolment: Option<Enrolment>,
    /// Where the admin, metrics and readiness ports listen.
    pub ports: admin::AdminConfig,
    /// The grace period for in-flight connections on shutdown.
    pub grace_period: Duration,
    /// The writer of the access log.
    pub access: Writer,
    /// Role-specific metrics, readiness and state.
    pub role: Arc<dyn RoleReport>,
}

/// Metrics, readiness and state that are specific to one role.
pub trait RoleReport: Send + Sync + 'static {
    /// Adds its metrics to a page.
    fn metrics(&self, page: &mut MetricsPage<'_>);

    /// Role-specific readiness.
    ///
    /// # Errors
    /// The reason why the role is not ready.
    fn ready(&self) -> Result<(), String> {
        Ok(())
    }

    /// Role-specific fields of `/config_dump`.
    fn dump(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }

    /// Explains to which endpoint a flow would be sent, for a query such as
    /// `transport=tcp&client=10.0.0.1:4000&destination=10.96.0.1:80`.
    ///
    /// # Errors
    /// The query is invalid, no listener matches the flow, or the role has no flows.
    fn explain(&self, _query: &str) -> Result<serde_json::Value, String> {
        Err("this role carries no flows".into())
    }
}

impl std::fmt::Debug for DataPlaneSetup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Setup").field("ports", &self.ports).finish_non_exhaustive()
    }
}

/// A process with logging and threads, before it opens sockets; see [`worker::prepare`].
#[derive(Debug)]
pub struct PreparedProcess {
    name: &'static str,
    level: LogLevel,
    runtime: Runtime,
    count: NonZeroUsize,
    workers: PreparedWorkers,
}

/// A data-plane process whose control tasks run.
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

/// Starts logging, the control runtime and the worker threads, which are named after the role. `workers`: none starts
/// one worker per processor.
///
/// # Errors
/// The log filter is invalid, or a thread cannot be started.
pub fn prepare(
    role: &'static str,
    workers: Option<NonZeroUsize>,
    log: &str,
) -> Result<PreparedProcess, String> {
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
    let workers = workers.map_err(|error| format!("cannot start a worker: {error}"))?;
    Ok(PreparedProcess { name: role, level, runtime, count, workers })
}

impl PreparedProcess {
    /// Starts the admin port and the control tasks.
    ///
    /// # Errors
    /// Signal handlers cannot be installed, or an admin port cannot be bound.
    pub fn start(self, setup: DataPlaneSetup) -> Result<DataPlaneProcess, String> {
        let Self { name, level, runtime, count, workers } = self;
        let mark = Mark::DEFAULT.if_permitted();
        if mark.is_none() {
            tracing::info!(
                "no permission to set packet marks (CAP_NET_RAW): own traffic is not exempt from redirects by mark"
            );
        }
        let drain = Drain::new(setup.grace_period);
        runtime.block_on(async { drain_on_signals(&drain) }).map_err(|error| error.to_string())?;

        let local = watch::Sender::new(BTreeMap::<Name, Arc<Secret>>::new());
        let status = watch::Sender::new(XdsStatus::default());
        let published = watch::Sender::new(Arc::new(Snapshot::default()));
        let snapshots = published.subscribe();
        let unresolved = watch::Sender::new(FailedLookups::new());
        let problems = watch::Sender::new(Problems::default());
        let (reports, reported) = mpsc::unbounded_channel();

        let has_control = setup.enrolment.is_some() || setup.bootstrap.ads.is_some();
        let role = Arc::new(DataPlaneRole {
            has_control,
            snapshots: snapshots.clone(),
            status: status.subscribe(),
            unresolved: unresolved.subscribe(),
            problems: problems.subscribe(),
            listening: Mutex::new(ListenStatus::new(count)),
            was_ready: AtomicBool::new(false),
            role: setup.role,
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
    /// The stream of configuration snapshots.
    #[must_use]
    pub fn snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.clone()
    }

    /// The drain state of the process.
    #[must_use]
    pub fn drain(&self) -> Drain {
        self.drain.clone()
    }

    /// The packet mark of outgoing connections; none without permission to set it.
    #[must_use]
    pub fn mark(&self) -> Option<Mark> {
        self.mark
    }

    /// The channel for problems of the current plan.
    #[must_use]
    pub fn problems(&self) -> watch::Sender<Problems> {
        self.problems.clone()
    }

    /// The channel on which workers report their listeners.
    #[must_use]
    pub fn reports(&self) -> mpsc::UnboundedSender<ListenReport> {
        self.reports.clone()
    }

    /// Runs a future on the control runtime and waits for it.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Spawns a task on the control runtime.
    pub fn spawn(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// Runs the workers until the process has drained.
    ///
    /// # Errors
    /// A worker panicked.
    pub fn serve<F, W>(self, run: F) -> Result<(), String>
    where
        F: Fn(usize) -> W + Clone + Send + 'static,
        W: Future<Output = ()> + 'static,
    {
        let workers = self.waiting.start(run);
        tracing::info!(role = self.name, workers = self.count, "serving");
        let good = workers.join();
        self.runtime.shutdown_timeout(Duration::from_millis(200));
        // The writer thread still holds the last access-log lines.
        self.access.finish(Duration::from_secs(1));
        if good { Ok(()) } else { Err("a worker failed; see the log above".into()) }
    }
}

/// Obtains a certificate from the control plane, if there is one, then follows the configuration.
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

/// Records listener reports of the workers for the readiness check.
async fn collect(mut reported: mpsc::UnboundedReceiver<ListenReport>, role: Arc<DataPlaneRole>) {
    while let Some(report) = reported.recv().await {
        let mut listening = role.listening.lock().unwrap_or_else(PoisonError::into_inner);
        for failure in listening.record(report) {
            tracing::error!(failure, "failed to bind listener, will retry");
        }
    }
}

/// The admin-port view of a data plane.
struct DataPlaneRole {
    /// Whether a control plane or xDS server provides configuration.
    has_control: bool,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    status: watch::Receiver<XdsStatus>,
    unresolved: watch::Receiver<FailedLookups>,
    problems: watch::Receiver<Problems>,
    listening: Mutex<ListenStatus>,
    was_ready: AtomicBool,
    role: Arc<dyn RoleReport>,
    access: Writer,
}

impl admin::AdminRole for DataPlaneRole {
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
        self.role.ready()?;
        self.was_ready.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn metrics(&self, page: &mut MetricsPage<'_>) {
        self.role.metrics(page);
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
        self.role.explain(query)
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
            fields.append(&mut self.role.dump());
        }
        dump
    }
}
