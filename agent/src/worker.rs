//! The state of a worker thread: its flows, buffers and counters, and the plan that it follows.

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::watch;
use weft_model::{Listener, Name};
use weft_runtime::access::{AccessLog, Writer};
use weft_runtime::clock::now;
use weft_runtime::connections::ConnectionRegistry;
use weft_runtime::drain::Drain;
use weft_runtime::listening::ListenReport;
use weft_runtime::metrics::WorkerMetrics;
use weft_runtime::socket::Mark;

use crate::flow::{FlowTable, UdpFlow};
use crate::flow_counts::{FlowCounts, WorkerFlowCounts};
use crate::forward::pacer::{BatchPacer, PAUSE, ReadSide};
use crate::forward::tcp::RelayBuffers;
use crate::forward::udp::{ReceiveBuffer, ReplySockets};
use crate::metrics::AgentMetrics;
use crate::plan::AgentPlan;
use crate::source::SourceAddresses;

/// Limits of one worker. At a limit, new flows are refused and counted; existing ones are kept.
#[derive(Debug, Clone, Copy)]
pub struct AgentLimits {
    /// TCP connections.
    pub connections: usize,
    /// UDP flows.
    pub flows: usize,
}

/// What all workers share: handles, but no data that a worker writes.
#[derive(Debug, Clone)]
pub struct AgentShared {
    /// The plan in force.
    pub plans: watch::Receiver<Arc<AgentPlan>>,
    /// The shutdown of the process.
    pub drain: Drain,
    /// The registry of the workers' counters.
    pub metrics: WorkerMetrics<AgentMetrics>,
    /// The writer of access logs.
    pub access: Writer,
    /// The limits of one worker.
    pub limits: AgentLimits,
    /// The mark on packets that the agent sends, if it may set one.
    pub mark: Option<Mark>,
    /// The host addresses to connect to endpoints from; the kernel chooses when empty.
    pub sources: Arc<[IpAddr]>,
    /// Where each worker reports which listeners it has bound.
    pub reports: tokio::sync::mpsc::UnboundedSender<ListenReport>,
}

/// One worker.
pub(crate) struct AgentWorker {
    pub(crate) shared: AgentShared,
    pub(crate) metrics: Arc<AgentMetrics>,
    pub(crate) access: Rc<AccessLog>,
    pub(crate) connections: ConnectionRegistry,
    pub(crate) relay_buffers: RelayBuffers,
    pub(crate) flows: RefCell<FlowTable<Rc<UdpFlow>>>,
    pub(crate) reply_sockets: ReplySockets,
    pub(crate) pacer: BatchPacer,
    /// The buffer for received datagrams, borrowed by whichever task reads.
    pub(crate) receive_buffer: RefCell<ReceiveBuffer>,
    pub(crate) sources: SourceAddresses,
    flow_counts: WorkerFlowCounts,
    plan: RefCell<Arc<AgentPlan>>,
}

impl AgentWorker {
    pub(crate) fn new(shared: AgentShared, plan: Arc<AgentPlan>) -> Self {
        Self {
            metrics: shared.metrics.worker(),
            access: shared.access.worker(),
            connections: ConnectionRegistry::default(),
            relay_buffers: RelayBuffers::new(),
            flows: RefCell::new(FlowTable::new(shared.limits.flows)),
            reply_sockets: ReplySockets::default(),
            pacer: BatchPacer::new(now()),
            receive_buffer: RefCell::new(ReceiveBuffer::new()),
            sources: SourceAddresses::new(&shared.sources),
            flow_counts: WorkerFlowCounts::default(),
            plan: RefCell::new(plan),
            shared,
        }
    }

    /// The plan in force.
    pub(crate) fn plan(&self) -> Arc<AgentPlan> {
        self.plan.borrow().clone()
    }

    /// The counters of flows to the service of a listener.
    pub(crate) fn flow_counts(&self, listener: &Listener) -> Arc<FlowCounts> {
        self.flow_counts.of(&listener.name, &self.metrics.services)
    }

    /// Pauses before datagrams are read, where that pays. The thread sleeps, because waking a task is what
    /// costs; so the worker must have no other work.
    #[expect(
        clippy::disallowed_methods,
        reason = "the pause itself, below 0.1 ms, only while the worker carries UDP alone"
    )]
    pub(crate) fn pause_before_read(&self, side: ReadSide) {
        let carries_tcp = self.connections.count() > 0;
        if self.pacer.should_pause(side, carries_tcp, now()) {
            std::thread::sleep(PAUSE);
        }
    }

    /// Serves `plan` from now on.
    pub(crate) fn replace_plan(&self, plan: Arc<AgentPlan>) {
        let is_gone = |name: &Name| plan.listener(name).is_none();
        self.flow_counts.forget(is_gone, &self.metrics.services);
        self.plan.replace(plan);
    }
}
