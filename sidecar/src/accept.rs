//! Binds the listeners of the plan, accepts their connections, and follows changes of the plan.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use weft_model::Name;
use weft_runtime::connections::CloseReason;
use weft_runtime::drain::Phase;
use weft_runtime::listening::ListenReport;
use weft_runtime::socket::{is_ipv6_unavailable, listen_tcp};

use crate::clock::now;
use crate::pipeline::{self, AcceptedSocket};
use crate::plan::PlannedListener;
use crate::worker::{SidecarShared, SidecarWorker};

/// The interval of periodic work: expired certificates, idle upstream connections, unbound listeners.
const SWEEP_INTERVAL: Duration = Duration::from_millis(500);
/// How long accepting is paused after an error such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Runs the worker with this number until the process has drained.
pub async fn run(shared: SidecarShared, number: usize) {
    let mut plans = shared.plans.clone();
    let plan = plans.borrow_and_update().clone();
    let worker = Rc::new(SidecarWorker::new(shared, plan));
    let drain = worker.shared.drain.clone();
    let mut sockets = SidecarSockets { worker: number, ..SidecarSockets::default() };
    sockets.follow(&worker);
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            changed = plans.changed() => {
                if changed.is_err() {
                    break;
                }
                worker.replace_plan(plans.borrow_and_update().clone());
                sockets.follow(&worker);
                worker.forget_series();
                worker.sweep();
            }
            _ = sweep.tick() => {
                worker.sweep();
                sockets.bind_missing(&worker);
            }
            () = drain.reached(Phase::Draining) => break,
        }
    }
    sockets.close();
    worker.connections.drain_all(CloseReason::Shutdown);
    drain.finished(&worker.connections).await;
}

/// The bound sockets.
#[derive(Default)]
struct SidecarSockets {
    /// The number of the worker.
    worker: usize,
    /// Whether all listeners of the plan are bound.
    is_complete: bool,
    bound: HashMap<(Name, SocketAddr, bool), JoinHandle<()>>,
}

impl SidecarSockets {
    /// Binds the new listeners of the plan, and closes the sockets of removed listeners.
    fn follow(&mut self, worker: &Rc<SidecarWorker>) {
        let plan = worker.plan();
        let key = |planned: &PlannedListener| {
            (planned.listener.name.clone(), planned.listener.address, planned.listener.transparent)
        };
        let wanted: HashMap<_, _> = plan.bound().map(|planned| (key(planned), planned)).collect();
        self.bound.retain(|key, task| {
            let keep = wanted.contains_key(key) && !task.is_finished();
            if !keep {
                task.abort();
            }
            keep
        });
        let mut failures = Vec::new();
        for (key, planned) in wanted {
            if self.bound.contains_key(&key) {
                continue;
            }
            match listen_tcp(key.1, key.2) {
                Ok(socket) => {
                    let task = tokio::task::spawn_local(accept(
                        socket,
                        planned.listener.name.clone(),
                        worker.clone(),
                    ));
                    self.bound.insert(key, task);
                }
                Err(error) if is_ipv6_unavailable(key.1, &error) => {
                    tracing::debug!(listener = &*key.0, "IPv6 not available, listener skipped");
                }
                Err(error) => {
                    failures.push(format!("listener {:?} on {}: {error}", &*key.0, key.1))
                }
            }
        }
        self.is_complete = failures.is_empty();
        // The receiver is dropped when the process ends.
        let report = ListenReport { worker: self.worker, revision: plan.revision, failures };
        drop(worker.shared.reports.send(report));
    }

    /// Binds what could not be bound before: the port may be free now.
    fn bind_missing(&mut self, worker: &Rc<SidecarWorker>) {
        if !self.is_complete {
            self.follow(worker);
        }
    }

    fn close(&mut self) {
        self.bound.drain().for_each(|(_, task)| task.abort());
    }
}

async fn accept(socket: tokio::net::TcpListener, name: Name, worker: Rc<SidecarWorker>) {
    loop {
        let (stream, client) = match socket.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(pauses) = worker.pauses.event(now()) {
                    let open = worker.connections.count();
                    tracing::warn!(listener = &*name, %error, pauses, open, "accept paused");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(error) = serve_accepted(stream, client, &name, &worker) {
            tracing::debug!(%client, %error, "client closed the connection before it was served");
        }
    }
}

fn serve_accepted(
    stream: TcpStream,
    client: SocketAddr,
    name: &Name,
    worker: &Rc<SidecarWorker>,
) -> io::Result<()> {
    let plan = worker.plan();
    let Some(listener) = plan.listener(name).cloned() else {
        return Ok(());
    };
    drop(plan);
    let accepted = AcceptedSocket { client, stream, listener };
    tokio::task::spawn_local(pipeline::connection(accepted, worker.clone()));
    Ok(())
}
