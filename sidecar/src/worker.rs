//! The state of a worker: the plan in force, the pools and caches that its connections share, and its limits.

use std::cell::{Cell, Ref, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use weft_runtime::access::{AccessLog, Writer};
use weft_runtime::clock::{now, unix_seconds};
use weft_runtime::connections::ConnectionRegistry;
use weft_runtime::drain::Drain;
use weft_runtime::listening::ListenReport;
use weft_runtime::log_limit::LogLimit;
use weft_runtime::memory;
use weft_runtime::metrics::WorkerMetrics;
use weft_runtime::socket::Mark;

use crate::authenticate::TokenCache;
use crate::certificate_index::{CertificateIndex, PeerRegistrar};
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
    /// The connections from clients.
    pub(crate) connections: ConnectionRegistry,
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
    /// Adds connections to the certificate index.
    pub(crate) registrar: Rc<PeerRegistrar>,
    certificates: Rc<CertificateIndex>,
    plan: RefCell<Arc<SidecarPlan>>,
    /// Limits the log lines for refused connections.
    refusals: LogLimit,
    /// The most connections since the heap was last trimmed.
    peak_connections: Cell<usize>,
}

impl SidecarWorker {
    /// A worker that serves `plan`. To be called on the worker's thread.
    pub(crate) fn new(shared: SidecarShared, plan: Arc<SidecarPlan>) -> Self {
        let metrics = shared.metrics.worker();
        let certificates = Rc::<CertificateIndex>::default();
        let registrar = Rc::new(PeerRegistrar::new(certificates.clone(), shared.plans.clone()));
        let connector = Rc::new(Connector {
            metrics: metrics.clone(),
            mark: shared.mark,
            registrar: registrar.clone(),
        });
        let upstream_windows = WindowBudget::new(shared.limits.window_bytes / 4);
        Self {
            metrics,
            access: shared.access.worker(),
            connections: ConnectionRegistry::default(),
            pools: Pools::new(connector.clone(), upstream_windows),
            connector,
            registrar,
            server_first: ServerFirstCache::default(),
            tokens: TokenCache::default(),
            series: WorkerSeries::default(),
            changes: PlanChanges::default(),
            certificates,
            windows: WindowBudget::new(shared.limits.window_bytes / 4 * 3),
            plan: RefCell::new(plan),
            refusals: LogLimit::default(),
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
        self.certificates.apply(&self.plan.borrow().revocations, unix_seconds(), &self.metrics);
        let certificates = self.certificates.clone();
        if certificates.wake_closed() {
            tokio::task::spawn_local(async move {
                // Other tasks run in between.
                while certificates.wake_closed() {
                    tokio::task::yield_now().await;
                }
            });
        }
    }
}

impl SidecarWorker {
    /// Trims the heap when many connections have closed: the C library keeps free blocks between used ones.
    fn trim_heap(&self) {
        let open = self.connections.count();
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
        self.certificates.tick(unix_seconds(), &self.metrics);
        self.windows.update();
        self.trim_heap();
        let plan = self.plan();
        self.pools.sweep(|id| plan.has_target(id));
    }
}
