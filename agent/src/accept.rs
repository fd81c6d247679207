//! The loop of a worker thread: its listening sockets follow the plan, and accept connections and datagrams.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use weft_model::{Listener, Name, Transport};
use weft_runtime::connections::CloseReason;
use weft_runtime::drain::Phase;
use weft_runtime::listening::ListenReport;
use weft_runtime::socket::{bind_udp, is_ipv6_unavailable, listen_tcp};
use weft_runtime::syn::save_syn;

use crate::datagrams;
use crate::forward::pacer::ReadSide;
use crate::forward::udp::{Datagram, UdpReceiver};
use crate::pipeline::{self, AcceptedTcp};
use crate::plan::AgentPlan;
use crate::worker::{AgentShared, AgentWorker};

/// How often idle flows are expired, and failed listeners retried.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long accepting pauses after an error, such as running out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// How long closed connections have to reset both sides.
const RESET_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs the worker with this number until the process has drained.
pub async fn run(shared: AgentShared, number: usize) {
    let mut plans = shared.plans.clone();
    let plan = plans.borrow_and_update().clone();
    let worker = Rc::new(AgentWorker::new(shared, plan));
    let drain = worker.shared.drain.clone();
    let mut sockets = ListenerSockets { worker: number, ..ListenerSockets::default() };
    sockets.follow(&worker);
    let mut sweep = tokio::time::interval(EXPIRY_INTERVAL);
    let work = async {
        loop {
            tokio::select! {
                changed = plans.changed() => {
                    if changed.is_err() {
                        return std::future::pending().await;
                    }
                    worker.follow(plans.borrow_and_update().clone());
                    sockets.follow(&worker);
                    datagrams::end_flows_of_removed_endpoints(&worker);
                }
                _ = sweep.tick() => {
                    datagrams::expire(&worker);
                    sockets.retry_failed(&worker);
                }
                () = drain.reached(Phase::Draining) => return,
            }
        }
    };
    work.await;
    sockets.close_tcp();
    drain.finished(&worker.connections).await;
    worker.connections.close_all(CloseReason::Shutdown);
    drop(tokio::time::timeout(RESET_TIMEOUT, worker.connections.emptied()).await);
}

/// The bound sockets of a worker.
#[derive(Default)]
struct ListenerSockets {
    /// The number of the worker.
    worker: usize,
    /// Whether every listener is bound.
    all_bound: bool,
    bound: HashMap<BoundSocketKey, ListenerTask>,
}

/// The task that serves a bound socket.
struct ListenerTask {
    handle: JoinHandle<()>,
    /// The listening socket, for TCP.
    socket: Option<Rc<TcpListener>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct BoundSocketKey {
    name: Name,
    address: SocketAddr,
    transport: Transport,
    transparent: bool,
}

impl ListenerSockets {
    /// Binds listeners that the plan has added, and closes those that it has removed.
    fn follow(&mut self, worker: &Rc<AgentWorker>) {
        let plan = worker.plan();
        let desired: HashMap<BoundSocketKey, &Arc<Listener>> = plan
            .bound()
            .map(|listener| {
                let key = BoundSocketKey {
                    name: listener.name.clone(),
                    address: listener.address,
                    transport: listener.transport,
                    transparent: listener.transparent,
                };
                (key, listener)
            })
            .collect();
        self.bound.retain(|key, task| {
            let keep = desired.contains_key(key) && !task.handle.is_finished();
            if !keep {
                task.handle.abort();
            }
            keep
        });
        let mut failures = Vec::new();
        for (key, listener) in desired {
            if let Some(task) = self.bound.get(&key) {
                task.follow(&plan, listener);
                continue;
            }
            match serve(listener, worker) {
                Ok(task) => {
                    task.follow(&plan, listener);
                    self.bound.insert(key, task);
                }
                Err(error) if is_ipv6_unavailable(listener.address, &error) => {
                    tracing::debug!(
                        listener = &*listener.name,
                        "IPv6 not available, listener skipped"
                    );
                }
                Err(error) => failures.push(format!(
                    "listener {:?} on {}: {error}",
                    &*listener.name, listener.address
                )),
            }
        }
        self.all_bound = failures.is_empty();
        // The receiver is gone once the process ends.
        let report = ListenReport { worker: self.worker, revision: plan.revision, failures };
        drop(worker.shared.reports.send(report));
    }

    /// Retries listeners that could not be bound: another process may have released the port.
    fn retry_failed(&mut self, worker: &Rc<AgentWorker>) {
        if !self.all_bound {
            self.follow(worker);
        }
    }

    fn close_tcp(&mut self) {
        for (_, task) in self.bound.drain().filter(|(key, _)| key.transport == Transport::Tcp) {
            task.handle.abort();
        }
    }
}

impl ListenerTask {
    /// Makes the kernel save the SYNs of connections, if the plan hashes their sequence numbers.
    fn follow(&self, plan: &AgentPlan, listener: &Listener) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = save_syn(socket, plan.takes_sequence(listener)) {
            tracing::warn!(listener = &*listener.name, %error, "SYN sequence numbers not available");
        }
    }
}

fn serve(listener: &Arc<Listener>, worker: &Rc<AgentWorker>) -> io::Result<ListenerTask> {
    let name = listener.name.clone();
    let worker = worker.clone();
    match listener.transport {
        Transport::Tcp => {
            let socket = Rc::new(listen_tcp(listener.address, listener.transparent)?);
            let handle = tokio::task::spawn_local(accept(socket.clone(), name, worker));
            Ok(ListenerTask { handle, socket: Some(socket) })
        }
        Transport::Udp => {
            let socket =
                Rc::new(bind_udp(listener.address, listener.transparent, worker.shared.mark)?);
            let receiver = UdpReceiver::new(socket.clone(), listener.use_original_destination)?;
            let handle =
                tokio::task::spawn_local(receive_datagrams(receiver, socket, name, worker));
            Ok(ListenerTask { handle, socket: None })
        }
    }
}

async fn accept(socket: Rc<TcpListener>, name: Name, worker: Rc<AgentWorker>) {
    let warned = OnceCell::new();
    loop {
        match socket.accept().await {
            Ok((stream, client)) => {
                let Some(listener) = worker.plan().listener(&name).cloned() else {
                    return;
                };
                let accepted = AcceptedTcp { client, stream, listener };
                tokio::task::spawn_local(pipeline::connection(accepted, worker.clone()));
            }
            Err(error) => {
                warned.get_or_init(|| {
                    tracing::warn!(%error, listener = &*name, "accept paused");
                });
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn receive_datagrams(
    mut receiver: UdpReceiver,
    socket: Rc<tokio::net::UdpSocket>,
    name: Name,
    worker: Rc<AgentWorker>,
) {
    loop {
        let is_ready = receiver.ready().await;
        if !receiver.is_behind() {
            worker.pause_before_read(ReadSide::Client);
        }
        let Some(listener) = worker.plan().listener(&name).cloned() else {
            return;
        };
        let take = |taken: &[Datagram<'_>]| {
            datagrams::forward_datagrams(taken, &listener, &socket, &worker);
        };
        let taken =
            is_ready.and_then(|()| receiver.take(&mut worker.receive_buffer.borrow_mut(), take));
        if let Err(error) = taken {
            tracing::debug!(%error, "receiving datagrams failed");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}
