//! A UDP flow on the proxy path.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::UdpSocket;
use tokio::sync::Notify;
use weft_model::{AccessLogSinks, FlowTuple, Name};
use weft_runtime::metrics::{Gauge, GaugeGuard};

use crate::forward::tcp::RelayedBytes;
use crate::plan::EndpointChoice;

/// A UDP flow: the socket to its endpoint, and the socket for responses to its client.
pub(crate) struct UdpFlow {
    pub(crate) tuple: FlowTuple,
    pub(crate) service: Name,
    pub(crate) choice: EndpointChoice,
    pub(crate) endpoint: UdpSocket,
    pub(crate) response_socket: Rc<UdpSocket>,
    pub(crate) relayed: RelayedBytes,
    pub(crate) started: Instant,
    pub(crate) sinks: AccessLogSinks,
    /// Counts the flow as open until it ends.
    pub(crate) open: Cell<Option<OpenUdpFlow>>,
    pub(crate) ended: Cell<bool>,
    pub(crate) stopped: Notify,
}

impl UdpFlow {
    /// Ends the flow: its responses are not forwarded any longer, and the gauges do not count it.
    pub(crate) fn end(&self) {
        self.ended.set(true);
        self.stopped.notify_one();
        drop(self.open.take());
    }
}

/// The gauges that count a flow as open.
pub(crate) struct OpenUdpFlow {
    pub(crate) _of_worker: GaugeGuard<Arc<Gauge>>,
    pub(crate) _of_service: GaugeGuard<Arc<Gauge>>,
}
