//! The state of a worker: the plan in force, the pools and caches that its connections share, and its limits.

use std::cell::{Cell, Ref, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use weft_runtime::access::{AccessLog, Writer};
use weft_runtime::drain::{ActiveConnections, Drain};
use weft_runtime::listening::ListenReport;
use weft_runtime::log_limit::LogLimit;
use weft_runtime::memory;
use weft_runtime::metrics::WorkerMetrics;
use weft_runtime::socket::Mark;

use crate::authenticate::TokenCache;
use crate::clock::{now, unix_seconds};
use crate::connection_registry::{ConnectionRegistry, PeerRegistrar};
use crate::http2_windows::WindowBudget;
use crate::metrics::SidecarMetrics;
use crate::plan::SidecarPlan;
use crate::plan_changes::PlanChanges;
use crate::request_metrics::WorkerSeries;
use crate::server_first_cache::ServerFirstCache;
use crate::tls::connector::Connector;
use crate::upstream::Pools;

/// How many connections must close before the heap is trimmed.
const TRIM_AFTER_CLOSED: usize = 256;

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
    /// The window budget of client connections. The pools have a quarter of the limit for upstream connections, so that
    /// clients cannot exhaust it.
    pub(crate) windows: WindowBudget,
    pub(crate) server_first: ServerFirstCache,
    /// The tokens that were verified before.
    pub(crate) tokens: TokenCache,
    /// The request metrics of this worker.
    pub(crate) series: WorkerSeries,
    /// Wakes the requests and connections that an earlier plan allowed.
    pub(crate) changes: PlanChanges,
    /// Connects to endpoints.
    pub(crate) connector: Rc<Connector>,
    /// Registers the connections whose peers proved their identity.
    pub(crate) registrar: Rc<PeerRegistrar>,
    registry: Rc<ConnectionRegistry>,
    plan: RefCell<Arc<SidecarPlan>>,
    draining: Cell<bool>,
    /// Connections that draining may close while they are idle.
    drainable: RefCell<HashMap<u64, DrainableTask>>,
    next_drainable_id: Cell<u64>,
    /// Rate limits of the logs for refused connections and for pauses of accepting.
    refusals: LogLimit,
    pub(crate) pauses: LogLimit,
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

tokio::task_local! {
    /// The abort handle of the running connection task.
    pub(crate) static CURRENT: RefCell<Option<AbortHandle>>;
}

impl SidecarWorker {
    /// A worker that serves `plan`. To be called on the worker's thread.
    pub(crate) fn new(shared: SidecarShared, plan: Arc<SidecarPlan>) -> Self {
        let metrics = shared.metrics.worker();
        let registry = Rc::<ConnectionRegistry>::default();
        let registrar = Rc::new(PeerRegistrar::new(registry.clone(), shared.plans.clone()));
        let connector = Rc::new(Connector {
            metrics: metrics.clone(),
            mark: shared.mark,
            registrar: registrar.clone(),
        });
        let upstream_windows = WindowBudget::new(shared.limits.window_bytes / 4);
        Self {
            metrics,
            access: shared.access.worker(),
            live: ActiveConnections::default(),
            pools: Pools::new(connector.clone(), upstream_windows),
            connector,
            registrar,
            server_first: ServerFirstCache::default(),
            tokens: TokenCache::default(),
            series: WorkerSeries::default(),
            changes: PlanChanges::default(),
            registry,
            windows: WindowBudget::new(shared.limits.window_bytes / 4 * 3),
            plan: RefCell::new(plan),
            draining: Cell::new(false),
            drainable: RefCell::default(),
            next_drainable_id: Cell::new(0),
            refusals: LogLimit::default(),
            pauses: LogLimit::default(),
            peak_connections: Cell::new(0),
            shared,
        }
    }

    /// Serves `plan` from now on: closes the connections whose peers it revokes, and wakes the requests and connections that
    /// an earlier plan allowed.
    pub(crate) fn replace_plan(&self, plan: Arc<SidecarPlan>) {
        self.plan.replace(plan);
        self.apply_revocations();
        self.changes.notify();
    }

    /// The plan in force.
    pub(crate) fn plan(&self) -> Arc<SidecarPlan> {
        self.plan.borrow().clone()
    }

    /// The plan in force, borrowed for a short lookup.
    pub(crate) fn plan_ref(&self) -> Ref<'_, Arc<SidecarPlan>> {
        self.plan.borrow()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// Registers the connection of the running task as one that draining may close while it is `idle`.
    pub(crate) fn register_drainable(&self, idle: Rc<Cell<bool>>) -> Option<DrainRegistration<'_>> {
        let id = self.next_drainable_id.get();
        self.next_drainable_id.set(id + 1);
        let handle = CURRENT.with(|current| current.borrow().clone())?;
        self.drainable.borrow_mut().insert(id, (handle, idle));
        Some(DrainRegistration(self, id))
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
    pub(crate) fn close_idle(&self) {
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
    pub(crate) fn forget_series(&self) {
        let plan = self.plan();
        self.series.retain(|listener| plan.listener(listener).is_some(), &self.metrics.requests);
    }

    /// Performs the periodic work.
    pub(crate) fn sweep(&self) {
        self.registry.tick(unix_seconds(), &self.metrics);
        self.windows.update();
        self.trim_heap();
        let plan = self.plan();
        self.pools.sweep(|id| plan.has_target(id));
    }
}
