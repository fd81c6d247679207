//! One worker: its listening sockets follow the plan, its connections its limits.

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
use crate::metrics::Metrics;
use crate::pipeline::{self, AcceptedSocket, ClientConnection};
use crate::plan::{PlannedListener, SidecarPlan};
use crate::plan_changes::PlanChanges;
use crate::request_metrics::WorkerSeries;
use crate::upstream::Pools;

/// How often idle connections are looked for.
const SWEEP: Duration = Duration::from_millis(500);
/// How many connections close before memory is given back.
const MANY_CLOSED: usize = 256;
/// How long accepting rests when there are no more descriptors.
const REST: Duration = Duration::from_millis(20);

/// What one worker may have at once. At a limit the new is refused and counted, the old is kept.
#[derive(Debug, Clone, Copy)]
pub struct SidecarLimits {
    /// Connections from clients.
    pub connections: usize,
    /// How long a TLS handshake may take.
    pub handshake: Duration,
    /// The windows of all connections of HTTP/2 together, in bytes: what they can make a worker hold.
    pub window_bytes: u64,
}

/// What all workers share: handles, and nothing that they write to.
#[derive(Debug, Clone)]
pub struct SidecarShared {
    /// The plan in force.
    pub plans: watch::Receiver<Arc<SidecarPlan>>,
    /// The end of the process.
    pub drain: Drain,
    /// Where the counters are folded.
    pub metrics: WorkerMetrics<Metrics>,
    /// Where access lines go.
    pub access: Writer,
    /// What one worker may have at once.
    pub limits: SidecarLimits,
    /// The mark on what we send, if we may set it.
    pub mark: Option<Mark>,
    /// Where each worker tells what it listens on.
    pub reports: tokio::sync::mpsc::UnboundedSender<ListenReport>,
}

/// One worker.
pub(crate) struct SidecarWorker {
    pub(crate) shared: SidecarShared,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) access: Rc<AccessLog>,
    pub(crate) live: ActiveConnections,
    pub(crate) pools: Pools,
    /// For connections from clients, and a quarter of all for those to endpoints, which clients cannot use
    /// up by waiting.
    pub(crate) windows: WindowBudget,
    pub(crate) upstream_windows: WindowBudget,
    pub(crate) server_first: ServerFirstCache,
    /// The tokens that were verified before.
    pub(crate) tokens: TokenCache,
    /// The request metrics of this worker.
    pub(crate) series: WorkerSeries,
    /// Who was let in by an earlier plan than the one in force.
    pub(crate) changes: PlanChanges,
    /// The connections whose peers proved who they are.
    registry: Rc<ConnectionRegistry>,
    plan: RefCell<Arc<SidecarPlan>>,
    draining: Cell<bool>,
    /// Connections that draining may end while they are idle.
    drainable: RefCell<HashMap<u64, DrainableTask>>,
    next_drainable_id: Cell<u64>,
    /// What is logged of connections beyond the limit, and of pauses of accepting.
    refusals: LogLimit,
    pauses: LogLimit,
    /// The most connections since memory was last given back.
    most_open: Cell<usize>,
}

/// A connection's task, and whether it waits for a request.
type DrainableTask = (AbortHandle, Rc<Cell<bool>>);

/// A connection's place on the list of those that draining may end.
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

    /// Whether the requests of a connection leave a line.
    pub(crate) fn logs_requests(&self, connection: &ClientConnection) -> bool {
        connection.service(&self.plan.borrow()).is_none_or(|http| http.http.access_log)
    }

    /// Puts the running task's connection on the list of those that draining may end.
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

    /// Has a connection stand for as long as its peer's proof does, which `trust` accepted.
    pub(crate) fn register_connection(
        &self,
        socket: &TcpStream,
        proof: Proof,
        trust: &TrustStore,
    ) -> connection_registry::RegisteredConnection {
        // Not the worker's own plan, which may be the one before.
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

    /// Ends the connections that rest on what the plan withdraws.
    fn apply_revocations(&self) {
        self.registry.apply(&self.plan.borrow().revocations, unix_seconds(), &self.metrics);
        let registry = self.registry.clone();
        if registry.notify_closed() {
            tokio::task::spawn_local(async move {
                // In between others are served.
                while registry.notify_closed() {
                    tokio::task::yield_now().await;
                }
            });
        }
    }

    /// Ends the connections that wait for a request.
    fn end_idle(&self) {
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

/// Runs the worker with that number until the process has drained.
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
        most_open: Cell::new(0),
        shared,
    });
    let drain = worker.shared.drain.clone();
    let mut sockets = SidecarSockets { worker: number, ..SidecarSockets::default() };
    sockets.follow(&worker);
    let mut sweep = tokio::time::interval(SWEEP);
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
                sockets.complete(&worker);
            }
            () = drain.reached(Phase::Draining) => break,
        }
    }
    sockets.close();
    worker.end_idle();
    drain.finished(&worker.live).await;
}

impl SidecarWorker {
    /// Gives memory back when many connections have closed: the C library keeps what lies between others.
    fn give_memory_back(&self) {
        let open = self.live.count();
        let most = self.most_open.get().max(open);
        self.most_open.set(most);
        if open + MANY_CLOSED <= most && open <= most / 4 * 3 {
            self.most_open.set(open);
            memory::trim_heap();
        }
    }

    /// Drops the request metrics of listeners that the plan no longer has.
    fn forget_series(&self) {
        let plan = self.plan();
        self.series.retain(|listener| plan.listener(listener).is_some(), &self.metrics.requests);
    }

    fn sweep(&self) {
        self.registry.tick(unix_seconds(), &self.metrics);
        self.windows.look();
        self.give_memory_back();
        let plan = self.plan();
        self.pools.sweep(|id| plan.has_target(id));
    }
}

/// The bound sockets, by what is bound.
#[derive(Default)]
struct SidecarSockets {
    /// The number of the worker that they belong to.
    worker: usize,
    /// Whether nothing is missing.
    is_whole: bool,
    bound: HashMap<(Name, SocketAddr, bool), JoinHandle<()>>,
}

impl SidecarSockets {
    /// Binds what the plan has and is not bound, closes what it no longer has.
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
                    tracing::debug!(listener = &*key.0, "there is no IPv6 here");
                }
                Err(error) => {
                    failures.push(format!("listener {:?} on {}: {error}", &*key.0, key.1))
                }
            }
        }
        self.is_whole = failures.is_empty();
        // Nobody takes it any more once the process ends.
        let report = ListenReport { worker: self.worker, revision: plan.revision, failures };
        drop(worker.shared.reports.send(report));
    }

    /// Tries again what could not be bound: whoever had the port may have ended.
    fn complete(&mut self, worker: &Rc<SidecarWorker>) {
        if !self.is_whole {
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
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        if let Err(error) = take_in(stream, client, &name, &worker) {
            tracing::debug!(%client, %error, "a connection was gone before it was served");
        }
    }
}

fn take_in(
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

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
pub(crate) fn wall_clock() -> SystemTime {
    SystemTime::now()
}

fn unix_seconds() -> u64 {
    wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

pub(crate) fn unix_ms() -> u128 {
    wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}
