//! A worker: binds the listeners of the plan, serves their connections, and enforces limits.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use weft_certs::{Proof, TrustStore};
use weft_model::Name;
use weft_runtime::access::{AccessLog, Writer};
use weft_runtime::drain::{ActiveConnections, Drain, Phase};
use weft_runtime::listening::ListenReport;
use weft_runtime::log_limit::LogLimit;
use weft_runtime::memory;
use weft_runtime::metrics::WorkerMetrics;
use weft_runtime::socket::{Mark, is_ipv6_unavailable, listen_tcp};

use crate::authenticate::TokenCache;
use crate::connection_registry::{self, ConnectionRegistry};
use crate::detect::ServerFirstCache;
use crate::http2_windows::WindowBudget;
use crate::metrics::SidecarMetrics;
use crate::pipeline::{self, AcceptedSocket, ClientConnection};
use crate::plan::{PlannedListener, SidecarPlan};
use crate::plan_changes::PlanChanges;
use crate::request_metrics::WorkerSeries;
use crate::upstream::Pools;

/// The interval of periodic work: expired certificates, idle upstream connections, unbound listeners.
const SWEEP_INTERVAL: Duration = Duration::from_millis(500);
/// How many connections must close before the heap is trimmed.
const TRIM_AFTER_CLOSED: usize = 256;
/// How long accepting is paused after an error such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// The limits of one worker. At a limit, new connections are refused and counted; open ones stay.
#[derive(Debug, Clone, Copy)]
pub struct SidecarLimits {
    /// The most client connections.
    pub connections: usize,
    /// The limit for a TLS handshake.
    pub handshake: Duration,
    /// The receive windows of all HTTP/2 connections together, in bytes.
    pub window_bytes: u64,
}

/// What all workers share.
#[derive(Debug, Clone)]
pub struct SidecarShared {
    /// The plan in force.
    pub plans: watch::Receiver<Arc<SidecarPlan>>,
    /// The drain state of the process.
    pub drain: Drain,
    /// The registry of the workers' metrics.
    pub metrics: WorkerMetrics<SidecarMetrics>,
    /// The access log.
    pub access: Writer,
    /// The limits of one worker.
    pub limits: SidecarLimits,
    /// The mark of outgoing connections, where the process may set it.
    pub mark: Option<Mark>,
    /// Where each worker reports its bound listeners.
    pub reports: tokio::sync::mpsc::UnboundedSender<ListenReport>,
}

/// The state of one worker.
pub(crate) struct SidecarWorker {
    pub(crate) shared: SidecarShared,
    pub(crate) metrics: Arc<SidecarMetrics>,
    pub(crate) access: Rc<AccessLog>,
    pub(crate) live: ActiveConnections,
    pub(crate) pools: Pools,
    /// The window budget of client connections; a quarter of the limit is reserved for upstream connections, so that
    /// clients cannot exhaust it.
    pub(crate) windows: WindowBudget,
    pub(crate) upstream_windows: WindowBudget,
    pub(crate) server_first: ServerFirstCache,
    /// The tokens that were verified before.
    pub(crate) tokens: TokenCache,
    /// The request metrics of this worker.
    pub(crate) series: WorkerSeries,
    /// Wakes the requests and connections that an earlier plan allowed.
    pub(crate) changes: PlanChanges,
    /// The connections whose peers proved their identity.
    registry: Rc<ConnectionRegistry>,
    plan: RefCell<Arc<SidecarPlan>>,
    draining: Cell<bool>,
    /// Connections that draining may close while they are idle.
    drainable: RefCell<HashMap<u64, DrainableTask>>,
    next_drainable_id: Cell<u64>,
    /// Rate limits of the logs for refused connections and for pauses of accepting.
    refusals: LogLimit,
    pauses: LogLimit,
    /// The most connections since the heap was last trimmed.
    peak_connections: Cell<usize>,
}

/// A connection's task, and whether the connection is idle.
type DrainableTask = (AbortHandle, Rc<Cell<bool>>);

/// The registration of a connection that draining may close while idle. Dropping it removes the entry.
pub(crate) struct DrainRegistration<'a>(&'a SidecarWorker, u64);

impl Drop for DrainRegistration<'_> {
    fn drop(&mut self) {
        self.0.drainable.borrow_mut().remove(&self.1);
    }
}

impl SidecarWorker {
    /// The plan in force.
    pub(crate) fn plan(&self) -> Arc<SidecarPlan> {
        self.plan.borrow().clone()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// Whether the requests of a connection are logged.
    pub(crate) fn logs_requests(&self, connection: &ClientConnection) -> bool {
        connection.service(&self.plan.borrow()).is_none_or(|http| http.http.access_log)
    }

    /// Registers the connection of the running task as one that draining may close while idle.
    pub(crate) fn register_drainable(
        &self,
        connection: &ClientConnection,
    ) -> Option<DrainRegistration<'_>> {
        let id = self.next_drainable_id.get();
        self.next_drainable_id.set(id + 1);
        let handle = CURRENT.with(|current| current.borrow().clone())?;
        self.drainable.borrow_mut().insert(id, (handle, connection.idle.clone()));
        Some(DrainRegistration(self, id))
    }

    /// Registers a connection whose peer proved its identity to `trust` with `proof`.
    pub(crate) fn register_connection(
        &self,
        socket: &TcpStream,
        proof: Proof,
        trust: &TrustStore,
    ) -> connection_registry::RegisteredConnection {
        // The published plan, since the worker's own may be an older one.
        let latest = self.shared.plans.borrow().revocations.clone();
        self.registry.register(socket.as_raw_fd(), proof, trust, &latest)
    }

    /// Counts and logs a connection beyond the limit.
    pub(crate) fn refuse_connection(&self, client: SocketAddr) {
        self.metrics.connections_refused.increment();
        if let Some(refused) = self.refusals.event(now()) {
            let limit = self.shared.limits.connections;
            tracing::warn!(
                %client,
                refused,
                limit,
                "connections refused: the limit of a worker (--connection-limit) is reached"
            );
        }
    }

    /// Closes the connections whose peers' certificates the plan revokes.
    fn apply_revocations(&self) {
        self.registry.apply(&self.plan.borrow().revocations, unix_seconds(), &self.metrics);
        let registry = self.registry.clone();
        if registry.notify_closed() {
            tokio::task::spawn_local(async move {
                // Other tasks run in between.
                while registry.notify_closed() {
                    tokio::task::yield_now().await;
                }
            });
        }
    }

    /// Closes the idle connections.
    fn close_idle(&self) {
        self.draining.set(true);
        let idle: Vec<AbortHandle> = self
            .drainable
            .borrow()
            .values()
            .filter(|(_, idle)| idle.get())
            .map(|(task, _)| task.clone())
            .collect();
        idle.iter().for_each(AbortHandle::abort);
    }
}

tokio::task_local! {
    static CURRENT: RefCell<Option<AbortHandle>>;
}

/// Runs the worker with this number until the process has drained.
pub async fn run(shared: SidecarShared, number: usize) {
    let mut plans = shared.plans.clone();
    let plan = plans.borrow_and_update().clone();
    let worker = Rc::new(SidecarWorker {
        metrics: shared.metrics.worker(),
        access: shared.access.worker(),
        live: ActiveConnections::default(),
        pools: Pools::default(),
        server_first: ServerFirstCache::default(),
        tokens: TokenCache::default(),
        series: WorkerSeries::default(),
        changes: PlanChanges::default(),
        registry: Rc::default(),
        windows: WindowBudget::new(shared.limits.window_bytes / 4 * 3),
        upstream_windows: WindowBudget::new(shared.limits.window_bytes / 4),
        plan: RefCell::new(plan),
        draining: Cell::new(false),
        drainable: RefCell::default(),
        next_drainable_id: Cell::new(0),
        refusals: LogLimit::default(),
        pauses: LogLimit::default(),
        peak_connections: Cell::new(0),
        shared,
    });
    let drain = worker.shared.drain.clone();
    let mut sockets = SidecarSockets { worker: number, ..SidecarSockets::default() };
    sockets.follow(&worker);
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            changed = plans.changed() => {
                if changed.is_err() {
                    break;
                }
                worker.plan.replace(plans.borrow_and_update().clone());
                worker.apply_revocations();
                worker.changes.notify();
                sockets.follow(&worker);
                worker.forget_series();
                worker.sweep();
            }
            _ = sweep.tick() => {
                worker.sweep();
                sockets.bind_missing(&worker);
            }
            () = drain.reached(Phase::Draining) => break,
        }
    }
    sockets.close();
    worker.close_idle();
    drain.finished(&worker.live).await;
}

impl SidecarWorker {
    /// Trims the heap when many connections have closed: the C library keeps free blocks between used ones.
    fn trim_heap(&self) {
        let open = self.live.count();
        let most = self.peak_connections.get().max(open);
        self.peak_connections.set(most);
        if open + TRIM_AFTER_CLOSED <= most && open <= most / 4 * 3 {
            self.peak_connections.set(open);
            memory::trim_heap();
        }
    }

    /// Drops the request metrics of listeners that were removed from the plan.
    fn forget_series(&self) {
        let plan = self.plan();
        self.series.retain(|listener| plan.listener(listener).is_some(), &self.metrics.requests);
    }

    fn sweep(&self) {
        self.registry.tick(unix_seconds(), &self.metrics);
        self.windows.update();
        self.trim_heap();
        let plan = self.plan();
        self.pools.sweep(|id| plan.has_target(id));
    }
}

/// The bound sockets.
#[derive(Default)]
struct SidecarSockets {
    /// The number of the worker.
    worker: usize,
    /// Whether all listeners of the plan are bound.
    is_complete: bool,
    bound: HashMap<(Name, SocketAddr, bool), JoinHandle<()>>,
}

impl SidecarSockets {
    /// Binds the new listeners of the plan, and closes the sockets of removed listeners.
    fn follow(&mut self, worker: &Rc<SidecarWorker>) {
        let plan = worker.plan();
        let key = |planned: &PlannedListener| {
            (planned.listener.name.clone(), planned.listener.address, planned.listener.transparent)
        };
        let wanted: HashMap<_, _> = plan.bound().map(|planned| (key(planned), planned)).collect();
        self.bound.retain(|key, task| {
            let keep = wanted.contains_key(key) && !task.is_finished();
            if !keep {
                task.abort();
            }
            keep
        });
        let mut failures = Vec::new();
        for (key, planned) in wanted {
            if self.bound.contains_key(&key) {
                continue;
            }
            match listen_tcp(key.1, key.2) {
                Ok(socket) => {
                    let task = tokio::task::spawn_local(accept(
                        socket,
                        planned.listener.name.clone(),
                        worker.clone(),
                    ));
                    self.bound.insert(key, task);
                }
                Err(error) if is_ipv6_unavailable(key.1, &error) => {
                    tracing::debug!(listener = &*key.0, "IPv6 not available, listener skipped");
                }
                Err(error) => {
                    failures.push(format!("listener {:?} on {}: {error}", &*key.0, key.1))
                }
            }
        }
        self.is_complete = failures.is_empty();
        // The receiver is dropped when the process ends.
        let report = ListenReport { worker: self.worker, revision: plan.revision, failures };
        drop(worker.shared.reports.send(report));
    }

    /// Binds what could not be bound before: the port may be free now.
    fn bind_missing(&mut self, worker: &Rc<SidecarWorker>) {
        if !self.is_complete {
            self.follow(worker);
        }
    }

    fn close(&mut self) {
        self.bound.drain().for_each(|(_, task)| task.abort());
    }
}

async fn accept(socket: tokio::net::TcpListener, name: Name, worker: Rc<SidecarWorker>) {
    loop {
        let (stream, client) = match socket.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(pauses) = worker.pauses.event(now()) {
                    let open = worker.live.count();
                    tracing::warn!(listener = &*name, %error, pauses, open, "accept paused");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(error) = serve_accepted(stream, client, &name, &worker) {
            tracing::debug!(%client, %error, "client closed the connection before it was served");
        }
    }
}

fn serve_accepted(
    stream: TcpStream,
    client: SocketAddr,
    name: &Name,
    worker: &Rc<SidecarWorker>,
) -> io::Result<()> {
    let plan = worker.plan();
    let Some(listener) = plan.listener(name).cloned() else {
        return Ok(());
    };
    drop(plan);
    let accepted = AcceptedSocket { client, stream, listener };
    let handle = Rc::new(RefCell::new(None::<AbortHandle>));
    let own = handle.clone();
    let serving = worker.clone();
    let task = tokio::task::spawn_local(async move {
        let current = RefCell::new(own.borrow().clone());
        CURRENT.scope(current, pipeline::connection(accepted, serving)).await;
    });
    handle.replace(Some(task.abort_handle()));
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "the only place where this file reads the clock")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "the only place where this file reads the clock")]
pub(crate) fn wall_clock() -> SystemTime {
    SystemTime::now()
}

fn unix_seconds() -> u64 {
    wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

pub(crate) fn unix_ms() -> u128 {
    wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}
