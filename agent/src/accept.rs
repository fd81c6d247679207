//! The loop of a worker thread: its listening sockets follow the plan, and accept connections and datagrams.

use std::io;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::TcpListener;
use weft_model::{Listener, Name, Transport};
use weft_runtime::connections::CloseReason;
use weft_runtime::drain::Phase;
use weft_runtime::listener_sockets::{BoundSocket, ListenerSockets, accept_connections};
use weft_runtime::socket::{bind_udp, listen_tcp};
use weft_runtime::syn::save_syn;

use crate::datagrams;
use crate::forward::pacer::ReadSide;
use crate::forward::udp::{Datagram, UdpReceiver};
use crate::pipeline::{self, AcceptedTcp};
use crate::worker::{AgentShared, AgentWorker};

/// How often idle flows are expired, and failed listeners retried.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long receiving pauses after an error.
const RECEIVE_PAUSE: Duration = Duration::from_millis(20);
/// How long closed connections have to reset both sides.
const RESET_TIMEOUT: Duration = Duration::from_secs(1);

/// The listening socket of a TCP listener; none for UDP.
type TcpSocket = Option<Rc<TcpListener>>;

/// Runs the worker with this number until the process has drained.
pub async fn run(shared: AgentShared, number: usize) {
    let mut plans = shared.plans.clone();
    let plan = plans.borrow_and_update().clone();
    let worker = Rc::new(AgentWorker::new(shared, plan));
    let drain = worker.shared.drain.clone();
    let mut sockets = ListenerSockets::new(number);
    follow(&mut sockets, &worker);
    let mut sweep = tokio::time::interval(EXPIRY_INTERVAL);
    let work = async {
        loop {
            tokio::select! {
                changed = plans.changed() => {
                    if changed.is_err() {
                        return std::future::pending().await;
                    }
                    worker.replace_plan(plans.borrow_and_update().clone());
                    follow(&mut sockets, &worker);
                    datagrams::end_flows_of_removed_endpoints(&worker);
                }
                _ = sweep.tick() => {
                    datagrams::expire(&worker);
                    if !sockets.is_complete() {
                        follow(&mut sockets, &worker);
                    }
                }
                () = drain.reached(Phase::Draining) => return,
            }
        }
    };
    work.await;
    // UDP has no connections to wait for: datagrams are forwarded until the end.
    sockets.close_tcp();
    drain.finished(&worker.connections).await;
    worker.connections.close_all(CloseReason::Shutdown);
    drop(tokio::time::timeout(RESET_TIMEOUT, worker.connections.emptied()).await);
}

/// Binds listeners that the plan has added, and closes those that it has removed.
fn follow(sockets: &mut ListenerSockets<TcpSocket>, worker: &Rc<AgentWorker>) {
    let plan = worker.plan();
    let listeners = plan.bound().map(|listener| &**listener);
    let report = sockets.follow(listeners, plan.revision, |listener| bind(listener, worker));
    for (key, socket) in sockets.iter() {
        if let (Some(socket), Some(listener)) = (socket, plan.listener(&key.name))
            // Makes the kernel save the SYNs of connections, if the plan hashes their sequence numbers.
            && let Err(error) = save_syn(socket, plan.takes_sequence(listener))
        {
            tracing::warn!(listener = &*key.name, %error, "SYN sequence numbers not available");
        }
    }
    // The receiver is dropped when the process ends.
    drop(worker.shared.reports.send(report));
}

fn bind(listener: &Listener, worker: &Rc<AgentWorker>) -> io::Result<BoundSocket<TcpSocket>> {
    let name = listener.name.clone();
    let worker = worker.clone();
    match listener.transport {
        Transport::Tcp => {
            let socket = Rc::new(listen_tcp(listener.address, listener.transparent)?);
            Ok(BoundSocket::new(Some(socket.clone()), accept(socket, name, worker)))
        }
        Transport::Udp => {
            let socket =
                Rc::new(bind_udp(listener.address, listener.transparent, worker.shared.mark)?);
            let receiver = UdpReceiver::new(socket.clone(), listener.use_original_destination)?;
            Ok(BoundSocket::new(None, receive_datagrams(receiver, socket, name, worker)))
        }
    }
}

async fn accept(socket: Rc<TcpListener>, name: Name, worker: Rc<AgentWorker>) {
    let serve = |stream, client| {
        let Some(listener) = worker.plan().listener(&name).cloned() else {
            return ControlFlow::Break(());
        };
        let accepted = AcceptedTcp { client, stream, listener };
        tokio::task::spawn_local(pipeline::connection(accepted, worker.clone()));
        ControlFlow::Continue(())
    };
    accept_connections(&socket, &name, serve).await;
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
        let forward = |received: &[Datagram<'_>]| {
            datagrams::forward_datagrams(received, &listener, &socket, &worker);
        };
        let received = is_ready
            .and_then(|()| receiver.receive(&mut worker.receive_buffer.borrow_mut(), forward));
        if let Err(error) = received {
            tracing::debug!(%error, "receiving datagrams failed");
            tokio::time::sleep(RECEIVE_PAUSE).await;
        }
    }
}
