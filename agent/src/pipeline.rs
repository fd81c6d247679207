//! The path of a connection through the agent, one step after the other.
//!
//! ```text
//! accept -> destination -> service -> security group -> endpoint -> connect -> relay -> access log
//! ```

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tokio::net::TcpStream;
use weft_model::{FlowTuple, IdleEnd, Listener, Name, SourceAddress, Transport};
use weft_runtime::metrics::GaugeGuard;
use weft_runtime::socket::{PROBE_PORT, connect_tcp, original_destination, reset_on_close};
use weft_runtime::syn::saved_sequence;

use crate::clock::{now, unix_ms};
use crate::forward::tcp::{IdlePolicy, RelayOutcome, RelaySides, RelayedBytes, relay};
use crate::plan::{AgentPlan, AgentTarget, EndpointChoice, OTHER_ENDPOINTS};
use crate::record::AgentAccessRecord;
use crate::refusal::FlowRefusal;
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
        let Some(_active) = worker.active_connections.try_acquire(worker.shared.limits.connections)
        else {
            worker.metrics.refuse(FlowRefusal::Limit);
            return reset_on_close(&accepted.stream);
        };
        let mut log = FlowLog::new(accepted.client);
        let outcome = match proxy_tcp(&mut accepted, &worker, &mut log).await {
            Ok(outcome) => outcome,
            Err(refusal) => {
                worker.metrics.refuse(refusal);
                reset_on_close(&accepted.stream);
                refusal.reason()
            }
        };
        log.write(outcome, &worker);
    }
}

async fn proxy_tcp(
    accepted: &mut AcceptedTcp,
    worker: &AgentWorker,
    log: &mut FlowLog,
) -> Result<&'static str, FlowRefusal> {
    let destination = destination(accepted)?;
    log.destination = Some(destination);
    if accepted.listener.use_original_destination && destination.port() == PROBE_PORT {
        log.logged = false;
        return Ok("probe");
    }
    let plan = worker.plan();
    let listener = plan.listener_for(&accepted.listener, destination);
    check_security_group(listener, accepted.client)?;
    let tcp = plan.tcp(listener, destination).ok_or(FlowRefusal::NoService)?;
    log.logged = tcp.access_log;
    let flow = FlowTuple { transport: Transport::Tcp, client: accepted.client, destination };
    let sequence = match tcp.flow_key.takes_sequence(Transport::Tcp) {
        true => saved_sequence(&accepted.stream).unwrap_or_default(),
        false => 0,
    };
    let target = plan.target(tcp, &flow, sequence).ok_or(FlowRefusal::NoService)?;
    log.service = Some(target.name.clone());
    let hash = plan.hash(&flow, tcp.flow_key, sequence);
    let flow = HashedFlow { tuple: &flow, hash, source: listener.source_address };
    let mut endpoint = boxed_connect(&plan, target, flow, worker, log).await?;
    let idle =
        IdlePolicy { timeout: tcp.idle_timeout, end: listener.idle_end.unwrap_or(IdleEnd::Reset) };
    let flow_counts = worker.flow_counts(listener);
    // A connection may live long and must not keep an old plan in memory.
    drop(plan);
    if worker.is_aborted.get() {
        reset_on_close(&accepted.stream);
        reset_on_close(&endpoint);
        return Ok(RelayOutcome::Aborted.word());
    }

    worker.metrics.connections.increment();
    let open = GaugeGuard::new(&worker.metrics.connections_open);
    let flow = flow_counts.begin();
    let abort = pin!(worker.abort.notified());
    let sides = RelaySides { client: &mut accepted.stream, endpoint: &mut endpoint };
    let end = relay(sides, idle, abort, &worker.relay_buffers, &log.relayed).await;
    drop((open, flow));
    worker.metrics.bytes_to_endpoint.add(log.relayed.to_endpoint.get());
    worker.metrics.bytes_to_client.add(log.relayed.to_client.get());
    Ok(end.word())
}

/// The original destination of a connection. A direct connection to a capture port is a mistake or a loop.
fn destination(accepted: &AcceptedTcp) -> Result<SocketAddr, FlowRefusal> {
    let listening_socket = || accepted.stream.local_addr().map_err(|_| FlowRefusal::NotRedirected);
    if !accepted.listener.use_original_destination {
        return listening_socket();
    }
    let capture = accepted.listener.address;
    let destination = original_destination(&accepted.stream, capture);
    // A connection to our own port may have been redirected from the same port, or have been made to it directly.
    let is_ours = destination.port() == capture.port() && destination == listening_socket()?;
    let is_known = !destination.ip().is_unspecified();
    if is_known && !is_ours { Ok(destination) } else { Err(FlowRefusal::NotRedirected) }
}

/// Enforces the security group, also where the kernel has no rule for it.
pub(crate) fn check_security_group(
    listener: &Listener,
    client: SocketAddr,
) -> Result<(), FlowRefusal> {
    if listener.admits(client.ip()) { Ok(()) } else { Err(FlowRefusal::NotAllowed) }
}

/// A TCP flow with its hash, and the kind of source address that its endpoint is to see.
#[derive(Clone, Copy)]
struct HashedFlow<'a> {
    tuple: &'a FlowTuple,
    hash: u32,
    source: SourceAddress,
}

/// Connects in a boxed future, which exists only while connecting: it is larger than all that follows, and
/// the connection may last for hours.
fn boxed_connect<'a>(
    plan: &'a AgentPlan,
    target: &'a AgentTarget,
    flow: HashedFlow<'a>,
    worker: &'a AgentWorker,
    log: &'a mut FlowLog,
) -> Pin<Box<impl Future<Output = Result<TcpStream, FlowRefusal>> + 'a>> {
    Box::pin(connect(plan, target, flow, worker, log))
}

/// Connects to the endpoint of the flow, or to the next endpoints when it cannot be reached.
async fn connect(
    plan: &AgentPlan,
    target: &AgentTarget,
    flow: HashedFlow<'_>,
    worker: &AgentWorker,
    log: &mut FlowLog,
) -> Result<TcpStream, FlowRefusal> {
    let mut tried = false;
    for attempt in 0..=OTHER_ENDPOINTS {
        let choice = plan.pick(target, flow.tuple, flow.hash, attempt);
        let Some(endpoint) = choice.endpoint() else {
            break;
        };
        tried = true;
        log.choice = choice;
        let started = now();
        match connect_from_any_source(endpoint, flow, target.connect_timeout, worker).await {
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
}

/// Connects to an endpoint. When a source address has no free port, tries the next source address.
async fn connect_from_any_source(
    endpoint: SocketAddr,
    flow: HashedFlow<'_>,
    timeout: Duration,
    worker: &AgentWorker,
) -> io::Result<TcpStream> {
    let mut failed = None;
    for options in
        worker.sources.connect_options(endpoint, flow.tuple.client, flow.source, worker.shared.mark)
    {
        match connect_tcp(endpoint, options, timeout).await {
            Err(error) if is_out_of_ports(&error) => failed = Some(error),
            outcome => return outcome,
        }
    }
    Err(failed.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()))
}

/// The refusal for a failed connect: running out of file descriptors is the agent's own limit.
pub(crate) fn connect_refusal(error: &io::Error) -> FlowRefusal {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE | Errno::ENFILE) => FlowRefusal::Limit,
        _ => FlowRefusal::Unreachable,
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
    logged: bool,
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
            logged: true,
        }
    }

    fn write(&self, outcome: &'static str, worker: &AgentWorker) {
        if !self.logged {
            return;
        }
        worker.access.line(&AgentAccessRecord {
            kind: Transport::Tcp.word(),
            path: "proxy",
            time_ms: unix_ms(),
            client: self.client,
            original_destination: self.destination.unwrap_or(self.client),
            service: self.service.as_ref(),
            endpoint: self.choice.endpoint(),
            choice: self.choice.word(),
            bytes_sent: self.relayed.to_endpoint.get(),
            bytes_received: self.relayed.to_client.get(),
            duration_ms: (now() - self.started).as_millis(),
            outcome,
        });
    }
}
