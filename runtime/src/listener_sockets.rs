//! The listening sockets of one worker: they follow the plan, and hand on the connections that they accept.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use weft_model::{Listener, Name, Transport};

use crate::clock::now;
use crate::listening::ListenReport;
use crate::log_limit::LogLimit;
use crate::socket::is_ipv6_unavailable;

/// How long accepting pauses after an error, such as running out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// What distinguishes a bound socket from others. A listener that changes in one of these gets a new socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    /// The name of the listener.
    pub name: Name,
    /// The bound address.
    pub address: SocketAddr,
    /// TCP or UDP.
    pub transport: Transport,
    /// Whether the socket accepts traffic to addresses that the host does not have (TPROXY).
    pub transparent: bool,
}

impl ListenerKey {
    fn of(listener: &Listener) -> Self {
        Self {
            name: listener.name.clone(),
            address: listener.address,
            transport: listener.transport,
            transparent: listener.transparent,
        }
    }
}

/// A bound socket. Dropping it ends the task that serves it.
#[derive(Debug)]
pub struct BoundSocket<S> {
    socket: S,
    task: JoinHandle<()>,
}

impl<S> BoundSocket<S> {
    /// A socket that `serving` serves, on this thread.
    pub fn new(socket: S, serving: impl Future<Output = ()> + 'static) -> Self {
        Self { socket, task: tokio::task::spawn_local(serving) }
    }
}

impl<S> Drop for BoundSocket<S> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The bound sockets of one worker. `S` is what the worker keeps of each.
#[derive(Debug)]
pub struct ListenerSockets<S> {
    worker: usize,
    is_complete: bool,
    bound: HashMap<ListenerKey, BoundSocket<S>>,
}

impl<S> ListenerSockets<S> {
    /// No socket yet. `worker` is the number of the worker, for its reports.
    #[must_use]
    pub fn new(worker: usize) -> Self {
        Self { worker, is_complete: true, bound: HashMap::new() }
    }

    /// Whether all listeners of the last plan are bound. Otherwise [`Self::follow`] is worth another try: a port may be
    /// free now.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Closes the sockets of listeners that `listeners` does not have, and binds the others with `bind`, unless they are
    /// bound already. `revision` is that of the plan. Returns the report of the worker.
    pub fn follow<'p>(
        &mut self,
        listeners: impl Iterator<Item = &'p Listener>,
        revision: u64,
        bind: impl Fn(&Listener) -> io::Result<BoundSocket<S>>,
    ) -> ListenReport {
        let wanted: HashMap<ListenerKey, &Listener> =
            listeners.map(|listener| (ListenerKey::of(listener), listener)).collect();
        self.bound.retain(|key, bound| wanted.contains_key(key) && !bound.task.is_finished());
        let mut failures = Vec::new();
        for (key, listener) in wanted {
            if self.bound.contains_key(&key) {
                continue;
            }
            match bind(listener) {
                Ok(bound) => drop(self.bound.insert(key, bound)),
                Err(error) if is_ipv6_unavailable(key.address, &error) => {
                    tracing::debug!(listener = &*key.name, "IPv6 not available, listener skipped");
                }
                Err(error) => {
                    failures.push(format!("listener {:?} on {}: {error}", &*key.name, key.address));
                }
            }
        }
        self.is_complete = failures.is_empty();
        ListenReport { worker: self.worker, revision, failures }
    }

    /// The bound sockets.
    pub fn iter(&self) -> impl Iterator<Item = (&ListenerKey, &S)> {
        self.bound.iter().map(|(key, bound)| (key, &bound.socket))
    }

    /// Closes the sockets that accept TCP connections.
    pub fn close_tcp(&mut self) {
        self.bound.retain(|key, _| key.transport != Transport::Tcp);
    }
}

/// Hands each accepted connection to `serve`, until that breaks the loop. `name` is that of the listener.
pub async fn accept_connections(
    socket: &TcpListener,
    name: &Name,
    mut serve: impl FnMut(TcpStream, SocketAddr) -> ControlFlow<()>,
) {
    let pauses = LogLimit::default();
    loop {
        match socket.accept().await {
            Ok((stream, client)) => {
                if serve(stream, client).is_break() {
                    return;
                }
            }
            Err(error) => {
                if let Some(pauses) = pauses.event(now()) {
                    tracing::warn!(listener = &**name, %error, pauses, "accept paused");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use weft_model::SourceAddress;

    use super::*;
    use crate::socket::listen_tcp;

    fn listener(name: &str, address: SocketAddr) -> Listener {
        Listener {
            name: name.into(),
            address,
            transport: Transport::Tcp,
            bind: true,
            use_original_destination: false,
            transparent: false,
            chains: Vec::new(),
            default_chain: None,
            udp: None,
            allow_from: None,
            idle_end: None,
            flow_seed: None,
            source_address: SourceAddress::Agent,
        }
    }

    /// Binds a listener and greets each connection.
    fn bind(listener: &Listener) -> io::Result<BoundSocket<()>> {
        let socket = listen_tcp(listener.address, false)?;
        let name = listener.name.clone();
        Ok(BoundSocket::new((), async move {
            let serve = |mut stream: TcpStream, _| {
                tokio::task::spawn_local(async move { stream.write_all(b"hello").await });
                ControlFlow::Continue(())
            };
            accept_connections(&socket, &name, serve).await;
        }))
    }

    async fn greeting(address: SocketAddr) -> io::Result<String> {
        let mut text = String::new();
        TcpStream::connect(address).await?.read_to_string(&mut text).await?;
        Ok(text)
    }

    #[tokio::test(flavor = "local")]
    async fn sockets_follow_the_plan_and_a_taken_port_is_bound_once_it_is_free() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let web = listener("web", address);
        let mut sockets = ListenerSockets::new(3);
        let report = sockets.follow([&web].into_iter(), 1, bind);
        assert_eq!((report.worker, report.revision), (3, 1));
        let failure = report.failures.concat();
        assert!(failure.starts_with(&format!("listener \"web\" on {address}: ")), "{failure}");
        assert!(!sockets.is_complete());
        drop(taken);
        let report = sockets.follow([&web].into_iter(), 1, bind);
        assert!(report.failures.is_empty() && sockets.is_complete(), "{report:?}");
        assert_eq!(greeting(address).await.unwrap(), "hello");
        // The same listener keeps its socket, so nothing that waits in it is lost.
        sockets.follow([&web].into_iter(), 2, |_| panic!("it is bound already"));
        assert_eq!(sockets.iter().count(), 1);
        sockets.follow([].into_iter(), 3, bind);
        tokio::task::yield_now().await;
        assert!(greeting(address).await.is_err(), "the listener was removed");
    }
}
