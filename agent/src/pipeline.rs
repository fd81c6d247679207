//! The path of a connection and of a datagram, a line a stage.
//!
//! ```text
//! TCP   accept -> destination -> service -> admit -> pick -> connect -> forward -> record
//! UDP   intake -> flow known? its endpoint
//!              -> flow new?   service -> admit -> pick -> remember -> forward
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
use weft_runtime::metrics::{Gauge, Opened};
use weft_runtime::socket::{
    PROBE_PORT, connect_tcp, connect_udp, original_destination, reset_on_close,
};
use weft_runtime::syn::saved_sequence;

use crate::forward::pace::Looks;
use crate::forward::tcp::{End, Moved, relay};
use crate::forward::udp::{Datagram, Width, send_all, take_trains};
use crate::plan::{Choice, OTHER_ENDPOINTS, Plan, Target};
use crate::record::Record;
use crate::refusal::Refusal;
use crate::source::{first_with_port, has_no_port};
use crate::worker::{Worker, now, unix_ms};

/// A connection that was taken in.
pub(crate) struct Accepted {
    pub(crate) client: SocketAddr,
    pub(crate) stream: TcpStream,
    pub(crate) listener: Arc<Listener>,
}

/// Carries a connection from its acceptance to its end. There are many, and most wait: what one keeps
/// is counted.
#[allow(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice")]
pub(crate) fn connection(mut accepted: Accepted, worker: Rc<Worker>) -> impl Future<Output = ()> {
    async move {
        let Some(_in_hand) = worker.live.take(worker.shared.limits.connections) else {
            worker.metrics.refuse(Refusal::Limit);
            return reset_on_close(&accepted.stream);
        };
        let mut story = Story::new(accepted.client);
        let outcome = match carry(&mut accepted, &worker, &mut story).await {
            Ok(outcome) => outcome,
            Err(refusal) => {
                worker.metrics.refuse(refusal);
                reset_on_close(&accepted.stream);
                refusal.reason()
            }
        };
        story.tell(outcome, &worker);
    }
}

async fn carry(
    accepted: &mut Accepted,
    worker: &Worker,
    story: &mut Story,
) -> Result<&'static str, Refusal> {
    let destination = destination(accepted)?;
    story.destination = Some(destination);
    if accepted.listener.use_original_destination && destination.port() == PROBE_PORT {
        story.logged = false;
        return Ok("probe");
    }
    let plan = worker.plan();
    let listener = plan.listener_for(&accepted.listener, destination);
    admit(listener, accepted.client)?;
    let tcp = plan.tcp(listener, destination).ok_or(Refusal::NoService)?;
    story.logged = tcp.access_log;
    let flow = FlowTuple { transport: Transport::Tcp, client: accepted.client, destination };
    let sequence = match tcp.flow_key.takes_sequence(Transport::Tcp) {
        true => saved_sequence(&accepted.stream).unwrap_or_default(),
        false => 0,
    };
    let target = plan.target(tcp, &flow, sequence).ok_or(Refusal::NoService)?;
    story.service = Some(target.name.clone());
    let hash = plan.hash(&flow, tcp.flow_key, sequence);
    let flow = (&flow, hash, listener.source_address);
    let mut endpoint = connecting(&plan, target, flow, worker, story).await?;
    let idle = (tcp.idle_timeout, listener.idle_end.unwrap_or(IdleEnd::Reset));
    let tally = worker.tally(listener);
    // A connection may live long; it must not keep the plan it was made by.
    drop(plan);
    if worker.is_cut_off.get() {
        reset_on_close(&accepted.stream);
        reset_on_close(&endpoint);
        return Ok(End::CutOff.word());
    }

    worker.metrics.connections.increment();
    let open = Opened::new(&worker.metrics.connections_open);
    let flow = tally.begin();
    let cut_off = pin!(worker.cut_off.notified());
    let ends = (&mut accepted.stream, &mut endpoint);
    let end = relay(ends, idle, cut_off, &worker.lender, &story.moved).await;
    drop((open, flow));
    worker.metrics.bytes_to_endpoint.add(story.moved.to_endpoint.get());
    worker.metrics.bytes_to_client.add(story.moved.to_client.get());
    Ok(end.word())
}

/// Where the client wanted to go. A capture port that was dialled itself is a mistake or a loop.
fn destination(accepted: &Accepted) -> Result<SocketAddr, Refusal> {
    let own = || accepted.stream.local_addr().map_err(|_| Refusal::NotRedirected);
    if !accepted.listener.use_original_destination {
        return own();
    }
    let capture = accepted.listener.address;
    let destination = original_destination(&accepted.stream, capture);
    // Another port than ours was redirected here. The same one may have been, or we were dialled.
    let is_ours = destination.port() == capture.port() && destination == own()?;
    let is_told = !destination.ip().is_unspecified();
    if is_told && !is_ours { Ok(destination) } else { Err(Refusal::NotRedirected) }
}

/// Holds the security group, where the kernel could not be told to.
fn admit(listener: &Listener, client: SocketAddr) -> Result<(), Refusal> {
    if listener.admits(client.ip()) { Ok(()) } else { Err(Refusal::NotAllowed) }
}

/// Connects, in a box for as long as that takes: it needs more room than all that follows, which may
/// take hours. Made here, so that the connection does not keep room for what goes into the box.
fn connecting<'a>(
    plan: &'a Plan,
    target: &'a Target,
    flow: (&'a FlowTuple, u32, SourceAddress),
    worker: &'a Worker,
    story: &'a mut Story,
) -> Pin<Box<impl Future<Output = Result<TcpStream, Refusal>> + 'a>> {
    Box::pin(connect(plan, target, flow, worker, story))
}

/// Connects to the flow's endpoint, or to the next ones when it cannot be reached.
async fn connect(
    plan: &Plan,
    target: &Target,
    (flow, hash, source): (&FlowTuple, u32, SourceAddress),
    worker: &Worker,
    story: &mut Story,
) -> Result<TcpStream, Refusal> {
    let mut tried = false;
    for attempt in 0..=OTHER_ENDPOINTS {
        let choice = plan.pick(target, flow, hash, attempt);
        let Some(endpoint) = choice.endpoint() else {
            break;
        };
        tried = true;
        story.choice = choice;
        let started = now();
        match reach(endpoint, (flow.client, source), target.connect_timeout, worker).await {
            Ok(stream) => {
                worker.metrics.connect.observe(now() - started);
                return Ok(stream);
            }
            Err(error) if unreachable_for(&error) == Refusal::Limit => return Err(Refusal::Limit),
            Err(error) => tracing::debug!(%endpoint, %error, "an endpoint could not be reached"),
        }
    }
    Err(if tried { Refusal::Unreachable } else { Refusal::NoEndpoint })
}

/// Connects to an endpoint, from the next of our addresses when one has no port left.
async fn reach(
    endpoint: SocketAddr,
    (client, source): (SocketAddr, SourceAddress),
    timeout: Duration,
    worker: &Worker,
) -> io::Result<TcpStream> {
    let mut failed = None;
    for leaving in worker.sources.ways(endpoint, client, source, worker.shared.mark) {
        match connect_tcp(endpoint, leaving, timeout).await {
            Err(error) if has_no_port(&error) => failed = Some(error),
            outcome => return outcome,
        }
    }
    Err(failed.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()))
}

/// Why an endpoint was not reached: for want of descriptors it is we who could not.
fn unreachable_for(error: &io::Error) -> Refusal {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE | Errno::ENFILE) => Refusal::Limit,
        _ => Refusal::Unreachable,
    }
}

/// What there is to tell of a connection.
struct Story {
    client: SocketAddr,
    destination: Option<SocketAddr>,
    service: Option<Name>,
    choice: Choice,
    moved: Moved,
    started: Instant,
    logged: bool,
}

impl Story {
    fn new(client: SocketAddr) -> Self {
        Self {
            client,
            destination: None,
            service: None,
            choice: Choice::NoEndpoint,
            moved: Moved::default(),
            started: now(),
            logged: true,
        }
    }

    fn tell(&self, outcome: &'static str, worker: &Worker) {
        if !self.logged {
            return;
        }
        worker.access.line(&Record {
            kind: Transport::Tcp.word(),
            path: "proxy",
            time_ms: unix_ms(),
            client: self.client,
            original_destination: self.destination.unwrap_or(self.client),
            service: self.service.as_ref(),
            endpoint: self.choice.endpoint(),
            choice: self.choice.word(),
            bytes_sent: self.moved.to_endpoint.get(),
            bytes_received: self.moved.to_client.get(),
            duration_ms: (now() - self.started).as_millis(),
            outcome,
        });
    }
}

/// A UDP flow: its endpoint, and the way back to its client.
pub(crate) struct UdpFlow {
    tuple: FlowTuple,
    service: Name,
    choice: Choice,
    endpoint: UdpSocket,
    answers: Rc<UdpSocket>,
    moved: Moved,
    started: Instant,
    logged: bool,
    /// What counts it as open, until it ends.
    open: Cell<Option<OpenFlow>>,
    ended: Cell<bool>,
    stopped: tokio::sync::Notify,
}

/// What counts a flow as open.
struct OpenFlow {
    _of_worker: Opened<Arc<Gauge>>,
    _of_service: Opened<Arc<Gauge>>,
}

/// Sends datagrams the way of their flows; new flows are decided here. Those of a flow keep their
/// order, and go together.
pub(crate) fn datagrams(
    taken: &[Datagram<'_>],
    listener: &Listener,
    own: &Rc<UdpSocket>,
    worker: &Rc<Worker>,
) {
    worker.pace.count(taken.len(), now());
    let mut flows: Vec<(Rc<UdpFlow>, Vec<&[u8]>)> = Vec::new();
    for datagram in taken {
        let (client, destination) = (datagram.client, datagram.destination);
        let tuple = FlowTuple { transport: Transport::Udp, client, destination };
        if let Some((_, bytes)) = flows.iter_mut().rev().find(|(flow, _)| flow.tuple == tuple) {
            bytes.push(datagram.bytes);
            continue;
        }
        let known = worker.flows.borrow_mut().get(&tuple, now()).cloned();
        match known.map_or_else(|| begin(tuple, listener, own, worker), Ok) {
            Ok(flow) => flows.push((flow, vec![datagram.bytes])),
            Err(refusal) => worker.metrics.refuse(refusal),
        }
    }
    for (flow, bytes) in flows {
        let sent = send_all(&flow.endpoint, &bytes, None);
        worker.metrics.datagrams_to_endpoint.add(sent.datagrams);
        worker.metrics.datagrams_lost.add(sent.lost);
        flow.moved.to_endpoint.set(flow.moved.to_endpoint.get() + sent.bytes);
    }
}

fn begin(
    tuple: FlowTuple,
    listener: &Listener,
    own: &Rc<UdpSocket>,
    worker: &Rc<Worker>,
) -> Result<Rc<UdpFlow>, Refusal> {
    let plan = worker.plan();
    let serving = plan.listener_for(listener, tuple.destination);
    admit(serving, tuple.client)?;
    let udp: &UdpProxy = plan.udp(serving).ok_or(Refusal::NoService)?;
    let target = plan.target_named(&udp.cluster).ok_or(Refusal::NoService)?;
    let choice = plan.pick(target, &tuple, plan.hash(&tuple, udp.flow_key, 0), 0);
    let address = choice.endpoint().ok_or(Refusal::NoEndpoint)?;
    if !worker.flows.borrow().has_room() {
        return Err(Refusal::Limit);
    }
    let mark = worker.shared.mark;
    let ways = worker.sources.ways(address, tuple.client, serving.source_address, mark);
    let endpoint = first_with_port(ways.map(|leaving| connect_udp(address, leaving)));
    let endpoint = endpoint.map_err(|error| unreachable_for(&error))?;
    take_trains(&endpoint);
    let answers = if listener.use_original_destination {
        let socket = worker.reply_sockets.from(tuple.destination, mark);
        socket.map_err(|error| unreachable_for(&error))?
    } else {
        own.clone()
    };
    let flow = Rc::new(UdpFlow {
        tuple,
        service: target.name.clone(),
        choice,
        endpoint,
        answers,
        moved: Moved::default(),
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
        .map_err(|_| Refusal::Limit)?;
    worker.metrics.flows.increment();
    flow.open.set(Some(OpenFlow {
        _of_worker: Opened::new(worker.metrics.flows_open.clone()),
        _of_service: worker.tally(serving).begin(),
    }));
    tokio::task::spawn_local(answer(flow.clone(), worker.clone()));
    Ok(flow)
}

/// Carries a flow's answers back to its client until the flow ends.
async fn answer(flow: Rc<UdpFlow>, worker: Rc<Worker>) {
    let mut width = Width::new();
    while !flow.ended.get() {
        tokio::select! {
            ready = flow.endpoint.readable() => if ready.is_err() { break },
            () = flow.stopped.notified() => break,
        }
        if !width.is_behind {
            worker.rest(Looks::Back);
        }
        let to = Some(flow.tuple.client);
        let sent = worker
            .room
            .borrow_mut()
            .answers(&flow.endpoint, &mut width, |answers| send_all(&flow.answers, answers, to));
        // An endpoint may have no such port (ICMP): it may come back, so the flow stays.
        let Ok(sent) = sent else { continue };
        worker.flows.borrow_mut().touch(&flow.tuple, now());
        worker.pace.count(usize::try_from(sent.datagrams).unwrap_or(usize::MAX), now());
        worker.metrics.datagrams_to_client.add(sent.datagrams);
        worker.metrics.datagrams_lost.add(sent.lost);
        flow.moved.to_client.set(flow.moved.to_client.get() + sent.bytes);
    }
}

/// Ends the flows whose endpoint the plan in force no longer has: their next datagram begins a new
/// one.
pub(crate) fn leave_lost_endpoints(worker: &Worker) {
    let plan = worker.plan();
    let is_lost = |flow: &Rc<UdpFlow>| {
        let target = plan.target_named(&flow.service);
        !target.zip(flow.choice.endpoint()).is_some_and(|(target, at)| target.keeps(at))
    };
    let lost = worker.flows.borrow_mut().forget(is_lost);
    for flow in lost {
        end_flow(&flow, "endpoint_gone", worker);
    }
}

/// Ends the flows that were silent for too long.
pub(crate) fn expire(worker: &Worker) {
    let gone = worker.flows.borrow_mut().expire(now());
    for (_, flow) in gone {
        end_flow(&flow, "idle", worker);
    }
}

fn end_flow(flow: &UdpFlow, outcome: &'static str, worker: &Worker) {
    flow.ended.set(true);
    flow.stopped.notify_one();
    drop(flow.open.take());
    if !flow.logged {
        return;
    }
    worker.access.line(&Record {
        kind: Transport::Udp.word(),
        path: "proxy",
        time_ms: unix_ms(),
        client: flow.tuple.client,
        original_destination: flow.tuple.destination,
        service: Some(&flow.service),
        endpoint: flow.choice.endpoint(),
        choice: flow.choice.word(),
        bytes_sent: flow.moved.to_endpoint.get(),
        bytes_received: flow.moved.to_client.get(),
        duration_ms: now().saturating_duration_since(flow.started).as_millis(),
        outcome,
    });
}
