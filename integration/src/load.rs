//! Background load of several kinds, during which a test changes a mesh. No request may fail.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::json;
use weft::demo::hosts::Host;

use crate::curl::Curl;
use crate::http1::Http1Client;
use crate::mesh::TestMesh;
use crate::wait::{eventually, pause};

/// A port of `orders` with protocol `tcp`: each client connection uses a mutual TLS connection of
/// its own.
pub const OPAQUE_PORT: u16 = 81;
/// Where the program of `orders` also listens.
const DIRECT_PORT: u16 = 7002;
/// How long each client waits between a response and its next request.
const REQUEST_INTERVAL: Duration = Duration::from_millis(200);

/// Starts a mesh with certificates of one minute, in which `orders` is reachable at two ports.
///
/// # Panics
/// If a part of the mesh does not become ready.
#[must_use]
pub fn start_mesh_with_short_certificates() -> TestMesh {
    let mut mesh = TestMesh::builder().control_arguments(&["--certificate-minutes", "1"]).start();
    mesh.change(|file| {
        let opaque = json!({"port": OPAQUE_PORT, "target": DIRECT_PORT, "protocol": "tcp"});
        file.service("orders").add_port(opaque);
        file.policy("orders").set_allow(json!([{"from": ["web"]}]));
    });
    let opaque = mesh.orders_at(OPAQUE_PORT);
    eventually("all endpoints serve the opaque port", || {
        let mut all = (0..8).map(|_| mesh.on(Some(&mesh.web.host), || curl(opaque, "http", &[])));
        all.all(|answer| answer.is_ok()).then_some(())
    });
    mesh
}

/// A client that sends requests on a host until it is stopped, and counts its responses and
/// failures.
pub struct LoadClient {
    name: &'static str,
    host: Host,
    ask: Mutex<SendRequest>,
    answers: AtomicU64,
    failures: Mutex<Vec<String>>,
}

type SendRequest = Box<dyn FnMut() -> Result<(), String> + Send>;

impl std::fmt::Debug for LoadClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} responses", self.name, self.answers.load(Relaxed))
    }
}

impl LoadClient {
    /// A client whose requests are made by `ask`; an error describes an unexpected response.
    pub fn new(
        name: &'static str,
        host: &Host,
        ask: impl FnMut() -> Result<(), String> + Send + 'static,
    ) -> Self {
        let ask: Mutex<SendRequest> = Mutex::new(Box::new(ask));
        let answers = AtomicU64::new(0);
        let failures = Mutex::default();
        Self { name, host: host.clone(), ask, answers, failures }
    }

    /// A client that sends all requests over one HTTP/1.1 connection.
    #[must_use]
    pub fn over_one_connection(name: &'static str, host: &Host, at: SocketAddr) -> Self {
        let mut kept = None;
        Self::new(name, host, move || ask(kept.get_or_insert_with(|| Http1Client::connect_to(at))))
    }

    /// A client that opens an HTTP/1.1 connection per request.
    #[must_use]
    pub fn over_new_connections(name: &'static str, host: &Host, at: SocketAddr) -> Self {
        Self::new(name, host, move || ask(&mut Http1Client::connect_to(at)))
    }

    fn assert_no_failures(&self) {
        let failures = lock_ignoring_poison(&self.failures);
        assert!(failures.is_empty(), "{self:?}, {} failures: {failures:#?}", failures.len());
    }

    fn run(&self, stop: &AtomicBool) {
        let mut ask = lock_ignoring_poison(&self.ask);
        while !stop.load(Relaxed) {
            match ask() {
                Ok(()) => drop(self.answers.fetch_add(1, Relaxed)),
                Err(failure) => lock_ignoring_poison(&self.failures).push(failure),
            }
            pause(REQUEST_INTERVAL);
        }
    }
}

fn lock_ignoring_poison<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Several load clients.
#[derive(Debug)]
pub struct BackgroundLoad(pub Vec<LoadClient>);

impl BackgroundLoad {
    /// Runs all clients while `work` runs, and checks that no request failed.
    ///
    /// # Panics
    /// If a request fails or `work` panics.
    pub fn during(&self, work: impl FnOnce()) {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop = StopLoadOnDrop(&stop);
            for client in &self.0 {
                let host = &client.host;
                let stop = &stop;
                scope.spawn(move || {
                    host.on(|| client.run(stop)).expect("the host can be entered");
                });
            }
            work();
        });
        self.0.iter().for_each(LoadClient::assert_no_failures);
    }

    /// Waits until each client has received a response to a request that it sent after this call.
    ///
    /// # Panics
    /// If a client receives none before the deadline, or a request failed.
    pub fn await_answers(&self) {
        for client in &self.0 {
            let before = client.answers.load(Relaxed);
            eventually(client.name, || {
                client.assert_no_failures();
                (client.answers.load(Relaxed) > before + 1).then_some(())
            });
        }
    }
}

/// Stops the clients also when the test panics.
struct StopLoadOnDrop<'l>(&'l AtomicBool);

impl Drop for StopLoadOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

const ORDER: &str = "GET /orders HTTP/1.1\r\nhost: orders\r\n\r\n";

/// Sends a request over an HTTP/1.1 connection.
///
/// # Errors
/// The response, if it is not a complete 200.
pub fn ask(client: &mut Http1Client) -> Result<(), String> {
    let answer = client.ask(ORDER);
    if answer.status == 200 && !answer.broken { Ok(()) } else { Err(format!("{answer:?}")) }
}

/// Sends a request with `curl` and further options.
///
/// # Errors
/// The response, if it is not a complete 200.
pub fn curl(at: SocketAddr, scheme: &str, options: &[&str]) -> Result<(), String> {
    let answer = Curl::to(format!("{scheme}://{at}/orders")).with(options).run();
    if answer.exit == 0 && answer.status == 200 { Ok(()) } else { Err(format!("{answer:?}")) }
}
