//! One worker: its listening sockets follow the plan, its connections and flows its limits.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use weft_model::{Listener, Name, Transport};
use weft_runtime::access::{AccessLog, Writer};
use weft_runtime::drain::{Drain, Live, Phase};
use weft_runtime::listening::Report;
use weft_runtime::metrics::Registry;
use weft_runtime::socket::{Mark, bind_udp, is_without_ipv6, listen_tcp};
use weft_runtime::syn::save_syn;

use crate::flow::FlowTable;
use crate::forward::pace::{Looks, MOMENT, Pace};
use crate::forward::tcp::Lender;
use crate::forward::udp::{Datagram, Intake, ReplySockets, Room};
use crate::metrics::Metrics;
use crate::pipeline::{self, Accepted, UdpFlow};
use crate::plan::Plan;
use crate::source::Sources;
use crate::tally::{Tallies, Tally};

/// How often silent flows are looked for.
const SWEEP: Duration = Duration::from_secs(1);
/// How long accepting rests when there are no more descriptors.
const REST: Duration = Duration::from_millis(20);

/// How long connections that are cut off have to reset both sides.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What one worker may have at once. At a limit the new is refused and counted, the old is kept.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// TCP connections.
    pub connections: usize,
    /// UDP flows.
    pub flows: usize,
}

/// What all workers share: handles, and nothing that they write to.
#[derive(Debug, Clone)]
pub struct Shared {
    /// The plan in force.
    pub plans: watch::Receiver<Arc<Plan>>,
    /// The end of the process.
    pub drain: Drain,
    /// Where the counters are folded.
    pub metrics: Registry<Metrics>,
    /// Where access lines go.
    pub access: Writer,
    /// What one worker may have at once.
    pub limits: Limits,
    /// The mark on what we send, if we may set it.
    pub mark: Option<Mark>,
    /// The host's addresses from which endpoints are connected to; the kernel's choice when empty.
    pub sources: Arc<[IpAddr]>,
    /// Where each worker tells what it listens on.
    pub reports: tokio::sync::mpsc::UnboundedSender<Report>,
}

/// One worker.
pub(crate) struct Worker {
    pub(crate) shared: Shared,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) access: Rc<AccessLog>,
    pub(crate) live: Live,
    pub(crate) lender: Lender,
    /// Tells connections that nobody waits for them any longer.
    pub(crate) cut_off: Notify,
    /// Whether they were told, for those that begin to listen later.
    pub(crate) is_cut_off: Cell<bool>,
    pub(crate) flows: RefCell<FlowTable<Rc<UdpFlow>>>,
    pub(crate) reply_sockets: ReplySockets,
    pub(crate) pace: Pace,
    /// Room to take datagrams in, lent to whoever has some.
    pub(crate) room: RefCell<Room>,
    pub(crate) sources: Sources,
    tallies: Tallies,
    plan: RefCell<Arc<Plan>>,
}

impl Worker {
    /// The plan in force.
    pub(crate) fn plan(&self) -> Arc<Plan> {
        self.plan.borrow().clone()
    }

    /// What counts the flows of the service behind this listener.
    pub(crate) fn tally(&self, listener: &Listener) -> Arc<Tally> {
        self.tallies.of(&listener.name, &self.metrics.services)
    }

    /// Rests a moment before datagrams are looked for, where that pays. The thread stands still meanwhile,
    /// for it is waking up that costs; so it must have nothing else to do.
    #[expect(clippy::disallowed_methods, reason = "the rest itself, below 0.1 ms, of UDP alone")]
    pub(crate) fn rest(&self, looks: Looks) {
        let carries_tcp = self.live.count() > 0;
        if self.pace.rests(looks, carries_tcp, now()) {
            std::thread::sleep(MOMENT);
        }
    }

    /// Takes over a plan.
    fn follow(&self, plan: Arc<Plan>) {
        let is_gone = |name: &Name| plan.listener(name).is_none();
        self.tallies.forget(is_gone, &self.metrics.services);
        self.plan.replace(plan);
    }
}

/// Runs the worker with that number until the process has drained.
pub async fn run(shared: Shared, number: usize) {
    let mut plans = shared.plans.clone();
    let plan = plans.borrow_and_update().clone();
    let worker = Rc::new(Worker {
        metrics: shared.metrics.worker(),
        access: shared.access.worker(),
        live: Live::default(),
        lender: Lender::new(),
        cut_off: Notify::new(),
        is_cut_off: Cell::new(false),
        flows: RefCell::new(FlowTable::new(shared.limits.flows)),
        reply_sockets: ReplySockets::default(),
        pace: Pace::new(now()),
        room: RefCell::new(Room::new()),
        sources: Sources::new(&shared.sources),
        tallies: Tallies::default(),
        plan: RefCell::new(plan),
        shared,
    });
    let drain = worker.shared.drain.clone();
    let mut sockets = Sockets { worker: number, ..Sockets::default() };
    sockets.follow(&worker);
    let mut sweep = tokio::time::interval(SWEEP);
    let work = async {
        loop {
            tokio::select! {
                changed = plans.changed() => {
                    if changed.is_err() {
                        return std::future::pending().await;
                    }
                    worker.follow(plans.borrow_and_update().clone());
                    sockets.follow(&worker);
                    pipeline::leave_lost_endpoints(&worker);
                }
                _ = sweep.tick() => {
                    pipeline::expire(&worker);
                    sockets.complete(&worker);
                }
                () = drain.reached(Phase::Draining) => return,
            }
        }
    };
    work.await;
    sockets.close_tcp();
    drain.finished(&worker.live).await;
    worker.is_cut_off.set(true);
    worker.cut_off.notify_waiters();
    drop(tokio::time::timeout(LAST_WORDS, worker.live.none_left()).await);
}

/// The bound sockets, by what is bound.
#[derive(Default)]
struct Sockets {
    /// The number of the worker that they belong to.
    worker: usize,
    /// Whether nothing is missing.
    is_whole: bool,
    bound: HashMap<Bound, Task>,
}

/// What serves a bound socket.
struct Task {
    handle: JoinHandle<()>,
    /// The socket, of TCP.
    socket: Option<Rc<TcpListener>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Bound {
    name: Name,
    address: SocketAddr,
    transport: Transport,
    transparent: bool,
}

impl Sockets {
    /// Binds what the plan has and is not bound, closes what it no longer has.
    fn follow(&mut self, worker: &Rc<Worker>) {
        let plan = worker.plan();
        let wanted: HashMap<Bound, &Arc<Listener>> = plan
            .bound()
            .map(|listener| {
                let key = Bound {
                    name: listener.name.clone(),
                    address: listener.address,
                    transport: listener.transport,
                    transparent: listener.transparent,
                };
                (key, listener)
            })
            .collect();
        self.bound.retain(|key, task| {
            let keep = wanted.contains_key(key) && !task.handle.is_finished();
            if !keep {
                task.handle.abort();
            }
            keep
        });
        let mut failures = Vec::new();
        for (key, listener) in wanted {
            if let Some(task) = self.bound.get(&key) {
                task.follow(&plan, listener);
                continue;
            }
            match serve(listener, worker) {
                Ok(task) => {
                    task.follow(&plan, listener);
                    self.bound.insert(key, task);
                }
                Err(error) if is_without_ipv6(listener.address, &error) => {
                    tracing::debug!(listener = &*listener.name, "there is no IPv6 here");
                }
                Err(error) => failures.push(format!(
                    "listener {:?} on {}: {error}",
                    &*listener.name, listener.address
                )),
            }
        }
        self.is_whole = failures.is_empty();
        // Nobody takes it any more once the process ends.
        let report = Report { worker: self.worker, revision: plan.revision, failures };
        drop(worker.shared.reports.send(report));
    }

    /// Tries again what could not be bound: whoever had the port may have ended.
    fn complete(&mut self, worker: &Rc<Worker>) {
        if !self.is_whole {
            self.follow(worker);
        }
    }

    fn close_tcp(&mut self) {
        for (_, task) in self.bound.drain().filter(|(key, _)| key.transport == Transport::Tcp) {
            task.handle.abort();
        }
    }
}

impl Task {
    /// Has the kernel keep the SYNs of connections, where a plan looks at them.
    fn follow(&self, plan: &Plan, listener: &Listener) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = save_syn(socket, plan.takes_sequence(listener)) {
            tracing::warn!(listener = &*listener.name, %error, "SYNs cannot be looked at");
        }
    }
}

fn serve(listener: &Arc<Listener>, worker: &Rc<Worker>) -> io::Result<Task> {
    let name = listener.name.clone();
    let worker = worker.clone();
    match listener.transport {
        Transport::Tcp => {
            let socket = Rc::new(listen_tcp(listener.address, listener.transparent)?);
            let handle = tokio::task::spawn_local(accept(socket.clone(), name, worker));
            Ok(Task { handle, socket: Some(socket) })
        }
        Transport::Udp => {
            let socket =
                Rc::new(bind_udp(listener.address, listener.transparent, worker.shared.mark)?);
            let intake = Intake::new(socket.clone(), listener.use_original_destination)?;
            let handle = tokio::task::spawn_local(take_in(intake, socket, name, worker));
            Ok(Task { handle, socket: None })
        }
    }
}

async fn accept(socket: Rc<TcpListener>, name: Name, worker: Rc<Worker>) {
    let rested = OnceCell::new();
    loop {
        match socket.accept().await {
            Ok((stream, client)) => {
                let Some(listener) = worker.plan().listener(&name).cloned() else {
                    return;
                };
                let accepted = Accepted { client, stream, listener };
                tokio::task::spawn_local(pipeline::connection(accepted, worker.clone()));
            }
            Err(error) => {
                rested.get_or_init(
                    || tracing::warn!(%error, "accepting rests until there are descriptors again"),
                );
                tokio::time::sleep(REST).await;
            }
        }
    }
}

async fn take_in(
    mut intake: Intake,
    socket: Rc<tokio::net::UdpSocket>,
    name: Name,
    worker: Rc<Worker>,
) {
    loop {
        let is_ready = intake.ready().await;
        if !intake.is_behind() {
            worker.rest(Looks::In);
        }
        let Some(listener) = worker.plan().listener(&name).cloned() else {
            return;
        };
        let take = |taken: &[Datagram<'_>]| {
            pipeline::datagrams(taken, &listener, &socket, &worker);
        };
        let taken = is_ready.and_then(|()| intake.take(&mut worker.room.borrow_mut(), take));
        if let Err(error) = taken {
            tracing::debug!(%error, "a batch of datagrams was not taken in");
            tokio::time::sleep(REST).await;
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
pub(crate) fn unix_ms() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}
