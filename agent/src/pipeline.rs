//! The path of a connection through the agent, one step after the other.
//!
//! ```text
//! accept -> destination -> service -> security group -> endpoint -> connect -> relay -> access log
//! ```

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::TcpStream;
use weft_model::{
    AccessLogSinks, FlowTuple, IdleEnd, Listener, Name, SourceAddress, TcpProxy, Transport,
};
use weft_runtime::access::{AccessRecord, RecordKind};
use weft_runtime::clock::{now, unix_ms};
use weft_runtime::connections::ConnectionStatus;
use weft_runtime::metrics::{Gauge, GaugeGuard};
use weft_runtime::socket::{PROBE_PORT, connect_tcp, original_destination, reset_on_close};
use weft_runtime::syn::saved_sequence;

use crate::decide::{FlowDecision, admit, choose_tcp};
use crate::flow_counts::FlowCounts;
use crate::flow_end::FlowEnd;
use crate::forward::tcp::{IdlePolicy, RelayOutcome, RelaySides, RelayedBytes, relay};
use crate::plan::{EndpointChoice, OTHER_ENDPOINTS};
use crate::refusal::{FlowRefusal, connect_refusal};
use crate::source::is_out_of_ports;
use crate::worker::AgentWorker;

/// An accepted TCP connection.
pub(crate) struct AcceptedTcp {
    pub(crate) client: SocketAddr,
    pub(crate) stream: TcpStream,
    pub(crate) listener: Arc<Listener>,
}

/// Carries a connection from accept to end. Most of the many connections wait, so the size of this future matters.
#[expect(clippy::manual_async_fn, reason = "an async fn would store its arguments twice")]
pub(crate) fn connection(
    mut accepted: AcceptedTcp,
    worker: Rc<AgentWorker>,
) -> impl Future<Output = ()> {
    async move {
        let limit = worker.shared.limits.connections;
        let Some(handle) = worker.connections.try_register(limit) else {
            worker.metrics.count_refusal(FlowRefusal::Limit);
            return reset_on_close(&accepted.stream);
        };
        let mut log = FlowLog::new(accepted.client);
        let outcome = proxy(&mut accepted, handle.status(), &worker, &mut log).await;
        let end = outcome.map(FlowEnd::from).unwrap_or_else(|refusal| {
            worker.metrics.count_refusal(refusal);
            reset_on_close(&accepted.stream);
            FlowEnd::Refused(refusal)
        });
        worker.metrics.bytes_to_endpoint.add(log.relayed.to_endpoint.get());
        worker.metrics.bytes_to_client.add(log.relayed.to_client.get());
        log.write(end, &worker);
    }
}

/// The stages of a connection.
async fn proxy(
    accepted: &mut AcceptedTcp,
    status: &ConnectionStatus,
    worker: &AgentWorker,
    log: &mut FlowLog,
) -> Result<RelayOutcome, FlowRefusal> {
    let flow = &flow_of(accepted)?;
    log.destination = Some(flow.destination);
    if is_probe(accepted, flow) {
        log.sinks = AccessLogSinks::Off;
        return Ok(RelayOutcome::Closed);
    }
    let plan = worker.plan();
    let listener = admit(&plan, &accepted.listener, flow)?;
    let tcp = plan.tcp(listener, flow.destination).ok_or(FlowRefusal::NoService)?;
    log.sinks = tcp.access_log.clone();
    let decision = choose_tcp(&plan, tcp, flow, sequence(accepted, tcp))?;
    log.service = Some(decision.target.name.clone());
    let mut endpoint = connect(decision, listener.source_address, worker, log).await?;
    let idle =
        IdlePolicy { timeout: tcp.idle_timeout, end: listener.idle_end.unwrap_or(IdleEnd::Reset) };
    let flow_counts = worker.flow_counts(listener);
    // A connection may live long and must not keep an old plan in memory.
    drop(plan);
    let _open = OpenConnection::begin(worker, &flow_counts);
    let sides = RelaySides { client: &mut accepted.stream, endpoint: &mut endpoint };
    Ok(relay(sides, idle, status, &worker.relay_buffers, &log.relayed).await)
}

/// The 5-tuple of a connection, with its original destination. A direct connection to a capture port is a mistake or a
/// loop.
fn flow_of(accepted: &AcceptedTcp) -> Result<FlowTuple, FlowRefusal> {
    let flow =
        |destination| FlowTuple { transport: Transport::Tcp, client: accepted.client, destination };
    let listening_socket = || accepted.stream.local_addr().map_err(|_| FlowRefusal::NotRedirected);
    if !accepted.listener.use_original_destination {
        return listening_socket().map(flow);
    }
    let capture = accepted.listener.address;
    let destination = original_destination(&accepted.stream, capture);
    // A connection to our own port may have been redirected from the same port, or have been made to it directly.
    let is_ours = destination.port() == capture.port() && destination == listening_socket()?;
    let is_known = !destination.ip().is_unspecified();
    if is_known && !is_ours { Ok(flow(destination)) } else { Err(FlowRefusal::NotRedirected) }
}

/// Whether a connection only tests that it is redirected.
fn is_probe(accepted: &AcceptedTcp, flow: &FlowTuple) -> bool {
    accepted.listener.use_original_destination && flow.destination.port() == PROBE_PORT
}

/// The sequence number of the SYN, where the flow is hashed with it.
fn sequence(accepted: &AcceptedTcp, tcp: &TcpProxy) -> u32 {
    match tcp.flow_key.takes_sequence(Transport::Tcp) {
        true => saved_sequence(&accepted.stream).unwrap_or_default(),
        false => 0,
    }
}

/// Connects to the endpoint of the flow, or to the next endpoints when it cannot be reached. The future is boxed and
/// exists only while connecting: it is larger than all that follows, and the connection may last for hours.
fn connect<'a>(
    decision: FlowDecision<'a>,
    source: SourceAddress,
    worker: &'a AgentWorker,
    log: &'a mut FlowLog,
) -> Pin<Box<impl Future<Output = Result<TcpStream, FlowRefusal>> + 'a>> {
    Box::pin(async move {
        let mut tried = false;
        for attempt in 0..=OTHER_ENDPOINTS {
            let choice = decision.endpoint(attempt);
            let Some(endpoint) = choice.endpoint() else {
                break;
            };
            tried = true;
            log.choice = choice;
            let started = now();
            match connect_from_any_source(endpoint, decision, source, worker).await {
                Ok(stream) => {
                    worker.metrics.connect.observe(now() - started);
                    return Ok(stream);
                }
                Err(error) if connect_refusal(&error) == FlowRefusal::Limit => {
                    return Err(FlowRefusal::Limit);
                }
                Err(error) => tracing::debug!(%endpoint, %error, "connect to endpoint failed"),
            }
        }
        Err(if tried { FlowRefusal::Unreachable } else { FlowRefusal::NoEndpoint })
    })
}

/// Connects to an endpoint. When a source address has no free port, tries the next source address.
async fn connect_from_any_source(
    endpoint: SocketAddr,
    decision: FlowDecision<'_>,
    source: SourceAddress,
    worker: &AgentWorker,
) -> io::Result<TcpStream> {
    let mut failed = None;
    let client = decision.flow.client;
    for options in worker.sources.connect_options(endpoint, client, source, worker.shared.mark) {
        match connect_tcp(endpoint, options, decision.target.connect_timeout).await {
            Err(error) if is_out_of_ports(&error) => failed = Some(error),
            outcome => return outcome,
        }
    }
    Err(failed.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()))
}

/// The gauges that count a connection as open.
struct OpenConnection<'a> {
    _of_worker: GaugeGuard<&'a Gauge>,
    _of_service: GaugeGuard<Arc<Gauge>>,
}

impl<'a> OpenConnection<'a> {
    /// Counts a connection that starts.
    fn begin(worker: &'a AgentWorker, flow_counts: &FlowCounts) -> Self {
        worker.metrics.connections.increment();
        Self {
            _of_worker: GaugeGuard::new(&worker.metrics.connections_open),
            _of_service: flow_counts.begin(),
        }
    }
}

/// What the access log says about a TCP connection.
struct FlowLog {
    client: SocketAddr,
    destination: Option<SocketAddr>,
    service: Option<Name>,
    choice: EndpointChoice,
    relayed: RelayedBytes,
    started: Instant,
    sinks: AccessLogSinks,
}

impl FlowLog {
    fn new(client: SocketAddr) -> Self {
        Self {
            client,
            destination: None,
            service: None,
            choice: EndpointChoice::NoEndpoint,
            relayed: RelayedBytes::default(),
            started: now(),
            sinks: AccessLogSinks::Stdout,
        }
    }

    fn write(&self, end: FlowEnd, worker: &AgentWorker) {
        if self.sinks.is_off() {
            return;
        }
        let duration = now() - self.started;
        let record = AccessRecord::new(RecordKind::Tcp, unix_ms(), duration, self.client);
        let record = AccessRecord {
            downstream_local_address: self.destination,
            protocol: Some("TCP"),
            response_flags: end.flag(),
            connection_termination_details: Some(end.details()),
            bytes_received: Some(self.relayed.to_endpoint.get()),
            bytes_sent: Some(self.relayed.to_client.get()),
            service: self.service.as_deref(),
            upstream_cluster: self.service.as_deref(),
            upstream_host: self.choice.endpoint(),
            data_path: Some("proxy"),
            endpoint_selection: Some(self.choice.word()),
            ..record
        };
        worker.access.line(&self.sinks, &record);
    }
}
