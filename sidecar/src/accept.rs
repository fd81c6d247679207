//! The loop of a worker thread: its listening sockets follow the plan, and accept connections.

use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::TcpStream;
use weft_model::Name;
use weft_runtime::connections::CloseReason;
use weft_runtime::drain::Phase;
use weft_runtime::listener_sockets::{BoundSocket, ListenerSockets, accept_connections};
use weft_runtime::socket::listen_tcp;

use crate::pipeline::{self, AcceptedSocket};
use crate::worker::{SidecarShared, SidecarWorker};

/// The interval of periodic work: expired certificates, idle upstream connections, unbound listeners.
const SWEEP_INTERVAL: Duration = Duration::from_millis(500);

/// Runs the worker with this number until the process has drained.
pub async fn run(shared: SidecarShared, number: usize) {
    let mut plans = shared.plans.clone();
    let plan = plans.borrow_and_update().clone();
    let worker = Rc::new(SidecarWorker::new(shared, plan));
    let drain = worker.shared.drain.clone();
    let mut sockets = ListenerSockets::new(number);
    follow(&mut sockets, &worker);
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            changed = plans.changed() => {
                if changed.is_err() {
                    break;
                }
                worker.replace_plan(plans.borrow_and_update().clone());
                follow(&mut sockets, &worker);
                worker.forget_series();
                worker.sweep();
            }
            _ = sweep.tick() => {
                worker.sweep();
                if !sockets.is_complete() {
                    follow(&mut sockets, &worker);
                }
            }
            () = drain.reached(Phase::Draining) => break,
        }
    }
    sockets.close_tcp();
    worker.connections.drain_all(CloseReason::Shutdown);
    drain.finished(&worker.connections).await;
}

/// Binds the new listeners of the plan, and closes the sockets of removed listeners.
fn follow(sockets: &mut ListenerSockets<()>, worker: &Rc<SidecarWorker>) {
    let plan = worker.plan();
    let listeners = plan.bound().map(|planned| &*planned.listener);
    let report = sockets.follow(listeners, plan.revision, |listener| {
        let socket = listen_tcp(listener.address, listener.transparent)?;
        let name = listener.name.clone();
        let worker = worker.clone();
        Ok(BoundSocket::new((), async move {
            let serve = |stream, client| serve_accepted(stream, client, &name, &worker);
            accept_connections(&socket, &name, serve).await;
        }))
    });
    // The receiver is dropped when the process ends.
    drop(worker.shared.reports.send(report));
}

/// Serves an accepted connection in a task of its own. A listener that the plan no longer has accepts no more.
fn serve_accepted(
    stream: TcpStream,
    client: SocketAddr,
    name: &Name,
    worker: &Rc<SidecarWorker>,
) -> ControlFlow<()> {
    let Some(listener) = worker.plan_ref().listener(name).cloned() else {
        return ControlFlow::Break(());
    };
    let accepted = AcceptedSocket { client, stream, listener };
    tokio::task::spawn_local(pipeline::connection(accepted, worker.clone()));
    ControlFlow::Continue(())
}
