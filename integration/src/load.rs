//! Load of several kinds that goes on while something happens to a mesh, and of which not one request may
//! fail.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use weft::demo::hosts::Host;

use crate::curl::Curl;
use crate::http1::Http1Client;
use crate::mesh::TestMesh;
use crate::wait::{eventually, pause};

/// The port of `orders` behind which bytes are not ours to read: each connection of a client is one of mutual
/// TLS, which nobody else uses.
pub const OPAQUE_PORT: u16 = 81;
/// Where the program of `orders` serves the same besides.
const DIRECT_PORT: u16 = 7002;
/// How long each who asks waits between an answer and the next request.
const BETWEEN: Duration = Duration::from_millis(200);

/// Starts a mesh whose certificates live for a minute, and where `orders` may be asked in two ways.
///
/// # Panics
/// When a part of it does not become ready.
#[must_use]
pub fn start_mesh_with_short_certificates() -> TestMesh {
    let mut mesh = TestMesh::start_with_control_arguments(&["--certificate-minutes", "1"]);
    mesh.change(|mesh| {
        let ports = mesh.pointer_mut("/services/1/ports").and_then(Value::as_array_mut);
        let opaque = json!({"port": OPAQUE_PORT, "target": DIRECT_PORT, "protocol": "tcp"});
        ports.expect("the file has the service").push(opaque);
        let policy = mesh.pointer_mut("/security/policies/1/allow");
        *policy.expect("the file has the policy") = json!([{"from": ["web"]}]);
    });
    let opaque = mesh.orders_at(OPAQUE_PORT);
    eventually("the other port is served by all", || {
        let mut all = (0..8).map(|_| mesh.on(Some(&mesh.web.host), || curl(opaque, "http", &[])));
        all.all(|answer| answer.is_ok()).then_some(())
    });
    mesh
}

/// One who asks, again and again, on its host, and what came of it.
pub struct LoadClient {
    how: &'static str,
    host: Host,
    ask: Mutex<Ask>,
    answers: AtomicU64,
    faults: Mutex<Vec<String>>,
}

type Ask = Box<dyn FnMut() -> Result<(), String> + Send>;

impl std::fmt::Debug for LoadClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} answers", self.how, self.answers.load(Relaxed))
    }
}

impl LoadClient {
    /// In the way that `ask` knows, which says what is wrong with an answer.
    pub fn new(
        how: &'static str,
        host: &Host,
        ask: impl FnMut() -> Result<(), String> + Send + 'static,
    ) -> Self {
        let ask: Mutex<Ask> = Mutex::new(Box::new(ask));
        let (answers, faults) = (AtomicU64::new(0), Mutex::default());
        Self { how, host: host.clone(), ask, answers, faults }
    }

    /// Over one connection of HTTP/1.1.
    #[must_use]
    pub fn over_one_connection(how: &'static str, host: &Host, at: SocketAddr) -> Self {
        let mut kept = None;
        Self::new(how, host, move || ask(kept.get_or_insert_with(|| Http1Client::connect_to(at))))
    }

    /// Over a connection of HTTP/1.1 for each request.
    #[must_use]
    pub fn over_new_connections(how: &'static str, host: &Host, at: SocketAddr) -> Self {
        Self::new(how, host, move || ask(&mut Http1Client::connect_to(at)))
    }

    fn assert_faultless(&self) {
        let faults = held(&self.faults);
        assert!(faults.is_empty(), "{self:?}, and {} faults: {faults:#?}", faults.len());
    }

    fn go_on(&self, stop: &AtomicBool) {
        let mut ask = held(&self.ask);
        while !stop.load(Relaxed) {
            match ask() {
                Ok(()) => drop(self.answers.fetch_add(1, Relaxed)),
                Err(fault) => held(&self.faults).push(fault),
            }
            pause(BETWEEN);
        }
    }
}

fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All who ask.
#[derive(Debug)]
pub struct BackgroundLoad(pub Vec<LoadClient>);

impl BackgroundLoad {
    /// Has them ask while something is done. Not one of their requests may fail.
    ///
    /// # Panics
    /// When one does, or what is done panics.
    pub fn during(&self, work: impl FnOnce()) {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop = StopWhenDropped(&stop);
            for asking in &self.0 {
                let (host, stop) = (&asking.host, &stop);
                scope.spawn(move || {
                    host.on(|| asking.go_on(stop)).expect("the host can be entered");
                });
            }
            work();
        });
        self.0.iter().for_each(LoadClient::assert_faultless);
    }

    /// Waits until each has had an answer to a request of now.
    ///
    /// # Panics
    /// When one has none before the deadline, or has had a bad one.
    pub fn await_answers(&self) {
        for asking in &self.0 {
            let before = asking.answers.load(Relaxed);
            eventually(asking.how, || {
                asking.assert_faultless();
                (asking.answers.load(Relaxed) > before + 1).then_some(())
            });
        }
    }
}

/// Stops those who ask also when the test fails.
struct StopWhenDropped<'l>(&'l AtomicBool);

impl Drop for StopWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

const ORDER: &str = "GET /orders HTTP/1.1\r\nhost: orders\r\n\r\n";

/// Asks over a connection of HTTP/1.1.
///
/// # Errors
/// The answer, where it is not a good one.
pub fn ask(client: &mut Http1Client) -> Result<(), String> {
    let answer = client.ask(ORDER);
    if answer.status == 200 && !answer.broken { Ok(()) } else { Err(format!("{answer:?}")) }
}

/// Asks by `curl`, with more of its options.
///
/// # Errors
/// The answer, where it is not a good one.
pub fn curl(at: SocketAddr, scheme: &str, options: &[&str]) -> Result<(), String> {
    let answer = Curl::to(format!("{scheme}://{at}/orders")).with(options).run();
    if answer.exit == 0 && answer.status == 200 { Ok(()) } else { Err(format!("{answer:?}")) }
}
