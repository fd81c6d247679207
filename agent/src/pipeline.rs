//! The path of a connection and of a datagram through the agent, one step after the other.
//!
//! ```text
//! TCP   accept -> destination -> service -> security group -> endpoint -> connect -> relay -> access log
//! UDP   receive -> known flow: its endpoint
//!               -> new flow: service -> security group -> endpoint -> add to table -> forward
//! ```

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tokio::net::{TcpStream, UdpSocket};
use weft_model::{FlowTuple, IdleEnd, Listener, Name, SourceAddress, Transport, UdpProxy};
use weft_runtime::metrics::{Gauge, GaugeGuard};
use weft_runtime::socket::{
    PROBE_PORT, connect_tcp, connect_udp, original_destination, reset_on_close,
};
use weft_runtime::syn::saved_sequence;

use crate::clock::{now, unix_ms};
use crate::forward::pacer::ReadSide;
use crate::forward::tcp::{IdlePolicy, RelayOutcome, RelaySides, RelayedBytes, relay};
use crate::forward::udp::{BatchSize, Datagram, enable_gro, send_all};
use crate::plan::{AgentPlan, AgentTarget, EndpointChoice, OTHER_ENDPOINTS};
use crate::record::AgentAccessRecord;
use crate::refusal::FlowRefusal;
use crate::source::{first_not_out_of_ports, is_out_of_ports};
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
fn check_security_group(listener: &Listener, client: SocketAddr) -> Result<(), FlowRefusal> {
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
fn connect_refusal(error: &io::Error) -> FlowRefusal {
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

/// A UDP flow: the socket to its endpoint, and the socket for responses to its client.
pub(crate) struct UdpFlow {
    tuple: FlowTuple,
    service: Name,
    choice: EndpointChoice,
    endpoint: UdpSocket,
    response_socket: Rc<UdpSocket>,
    relayed: RelayedBytes,
    started: Instant,
    logged: bool,
    /// Counts the flow as open until it ends.
    open: Cell<Option<OpenFlow>>,
    ended: Cell<bool>,
    stopped: tokio::sync::Notify,
}

/// The gauges that count a flow as open.
struct OpenFlow {
    _of_worker: GaugeGuard<Arc<Gauge>>,
    _of_service: GaugeGuard<Arc<Gauge>>,
}

/// Forwards received datagrams to the endpoints of their flows, and starts new flows. Datagrams of one flow
/// keep their order and are sent together.
pub(crate) fn forward_datagrams(
    taken: &[Datagram<'_>],
    listener: &Listener,
    listening_socket: &Rc<UdpSocket>,
    worker: &Rc<AgentWorker>,
) {
    worker.pacer.count(taken.len(), now());
    let mut flows: Vec<(Rc<UdpFlow>, Vec<&[u8]>)> = Vec::new();
    for datagram in taken {
        let client = datagram.client;
        let destination = datagram.destination;
        let tuple = FlowTuple { transport: Transport::Udp, client, destination };
        if let Some((_, bytes)) = flows.iter_mut().rev().find(|(flow, _)| flow.tuple == tuple) {
            bytes.push(datagram.bytes);
            continue;
        }
        let known = worker.flows.borrow_mut().get(&tuple, now()).cloned();
        match known.map_or_else(|| start_flow(tuple, listener, listening_socket, worker), Ok) {
            Ok(flow) => flows.push((flow, vec![datagram.bytes])),
            Err(refusal) => worker.metrics.refuse(refusal),
        }
    }
    for (flow, bytes) in flows {
        let sent = send_all(&flow.endpoint, &bytes, None);
        worker.metrics.datagrams_to_endpoint.add(sent.datagrams);
        worker.metrics.datagrams_lost.add(sent.lost);
        flow.relayed.to_endpoint.set(flow.relayed.to_endpoint.get() + sent.bytes);
    }
}

fn start_flow(
    tuple: FlowTuple,
    listener: &Listener,
    listening_socket: &Rc<UdpSocket>,
    worker: &Rc<AgentWorker>,
) -> Result<Rc<UdpFlow>, FlowRefusal> {
    let plan = worker.plan();
    let serving = plan.listener_for(listener, tuple.destination);
    check_security_group(serving, tuple.client)?;
    let udp: &UdpProxy = plan.udp(serving).ok_or(FlowRefusal::NoService)?;
    let target = plan.target_named(&udp.cluster).ok_or(FlowRefusal::NoService)?;
    let choice = plan.pick(target, &tuple, plan.hash(&tuple, udp.flow_key, 0), 0);
    let address = choice.endpoint().ok_or(FlowRefusal::NoEndpoint)?;
    if !worker.flows.borrow().has_room() {
        return Err(FlowRefusal::Limit);
    }
    let mark = worker.shared.mark;
    let connect_options =
        worker.sources.connect_options(address, tuple.client, serving.source_address, mark);
    let endpoint =
        first_not_out_of_ports(connect_options.map(|options| connect_udp(address, options)));
    let endpoint = endpoint.map_err(|error| connect_refusal(&error))?;
    enable_gro(&endpoint);
    let response_socket = if listener.use_original_destination {
        let socket = worker.reply_sockets.from(tuple.destination, mark);
        socket.map_err(|error| connect_refusal(&error))?
    } else {
        listening_socket.clone()
    };
    let flow = Rc::new(UdpFlow {
        tuple,
        service: target.name.clone(),
        choice,
        endpoint,
        response_socket,
        relayed: RelayedBytes::default(),
        started: now(),
        logged: udp.access_log,
        open: Cell::new(None),
        ended: Cell::new(false),
        stopped: tokio::sync::Notify::new(),
    });
    worker
        .flows
        .borrow_mut()
        .insert(tuple, flow.clone(), udp.idle_timeout, now())
        .map_err(|_| FlowRefusal::Limit)?;
    worker.metrics.flows.increment();
    flow.open.set(Some(OpenFlow {
        _of_worker: GaugeGuard::new(worker.metrics.flows_open.clone()),
        _of_service: worker.flow_counts(serving).begin(),
    }));
    tokio::task::spawn_local(forward_responses(flow.clone(), worker.clone()));
    Ok(flow)
}

/// Forwards responses of a flow to its client until the flow ends.
async fn forward_responses(flow: Rc<UdpFlow>, worker: Rc<AgentWorker>) {
    let mut batch_size = BatchSize::new();
    while !flow.ended.get() {
        tokio::select! {
            ready = flow.endpoint.readable() => if ready.is_err() { break },
            () = flow.stopped.notified() => break,
        }
        if !batch_size.is_behind {
            worker.pause_before_read(ReadSide::Endpoint);
        }
        let to = Some(flow.tuple.client);
        let sent = worker.receive_buffer.borrow_mut().responses(
            &flow.endpoint,
            &mut batch_size,
            |responses| send_all(&flow.response_socket, responses, to),
        );
        // An ICMP error says that the endpoint has no such port. The endpoint may come back, so the flow stays.
        let Ok(sent) = sent else { continue };
        worker.flows.borrow_mut().touch(&flow.tuple, now());
        worker.pacer.count(usize::try_from(sent.datagrams).unwrap_or(usize::MAX), now());
        worker.metrics.datagrams_to_client.add(sent.datagrams);
        worker.metrics.datagrams_lost.add(sent.lost);
        flow.relayed.to_client.set(flow.relayed.to_client.get() + sent.bytes);
    }
}

/// Ends the flows whose endpoint is not in the current plan. Their next datagram starts a new flow.
pub(crate) fn end_flows_of_removed_endpoints(worker: &AgentWorker) {
    let plan = worker.plan();
    let is_orphaned = |flow: &Rc<UdpFlow>| {
        let target = plan.target_named(&flow.service);
        !target.zip(flow.choice.endpoint()).is_some_and(|(target, at)| target.retains(at))
    };
    let lost = worker.flows.borrow_mut().remove_if(is_orphaned);
    for flow in lost {
        end_flow(&flow, "endpoint_gone", worker);
    }
}

/// Ends the flows that were silent for their idle timeout.
pub(crate) fn expire(worker: &AgentWorker) {
    let removed = worker.flows.borrow_mut().expire(now());
    for (_, flow) in removed {
        end_flow(&flow, "idle", worker);
    }
}

fn end_flow(flow: &UdpFlow, outcome: &'static str, worker: &AgentWorker) {
    flow.ended.set(true);
    flow.stopped.notify_one();
    drop(flow.open.take());
    if !flow.logged {
        return;
    }
    worker.access.line(&AgentAccessRecord {
        kind: Transport::Udp.word(),
        path: "proxy",
        time_ms: unix_ms(),
        client: flow.tuple.client,
        original_destination: flow.tuple.destination,
        service: Some(&flow.service),
        endpoint: flow.choice.endpoint(),
        choice: flow.choice.word(),
        bytes_sent: flow.relayed.to_endpoint.get(),
        bytes_received: flow.relayed.to_client.get(),
        duration_ms: now().saturating_duration_since(flow.started).as_millis(),
        outcome,
    });
}
