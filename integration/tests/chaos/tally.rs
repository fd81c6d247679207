//! The results of the clients' requests, and which failures a killed process explains.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use weft_integration::wait::{eventually, pause};

/// A kind of traffic: its protocol and its path through the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// HTTP/1.1 through two sidecars, over one connection until the server closes it.
    Http1,
    /// HTTP/1.1 through two sidecars, over a new connection for each request.
    Http1New,
    /// HTTP/2 through two sidecars, over one connection.
    Http2,
    /// Unary gRPC calls through two sidecars.
    GrpcUnary,
    /// gRPC calls with many messages in either direction, through two sidecars.
    GrpcStream,
    /// A WebSocket echo through two sidecars.
    WebSocket,
    /// A TCP connection through two sidecars, which forward it without parsing it.
    TcpSidecars,
    /// HTTPS of a client without a sidecar: through the agent to `web`, which calls `orders`.
    HttpsAgent,
    /// A TCP echo that the kernel forwards.
    TcpKernel,
    /// A TCP echo that the agent forwards.
    TcpProxy,
    /// A UDP echo that the kernel forwards.
    UdpKernel,
    /// A UDP echo that the agent forwards.
    UdpProxy,
}

/// Every kind, in the order of [`Kind`].
pub(crate) const KINDS: [Kind; 12] = [
    Kind::Http1,
    Kind::Http1New,
    Kind::Http2,
    Kind::GrpcUnary,
    Kind::GrpcStream,
    Kind::WebSocket,
    Kind::TcpSidecars,
    Kind::HttpsAgent,
    Kind::TcpKernel,
    Kind::TcpProxy,
    Kind::UdpKernel,
    Kind::UdpProxy,
];

/// A kind of process whose kill makes some requests fail. The control plane is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    /// The agent.
    Agent,
    /// The sidecar of one endpoint.
    Sidecar,
    /// The program of one endpoint that serves HTTP/1.1 and the echoes.
    Program,
    /// The program of one endpoint that serves gRPC.
    GrpcProgram,
    /// The program of one endpoint that serves WebSocket.
    WebSocketProgram,
}

impl Victim {
    /// Whether traffic of that kind passes through such a process. Flows that the kernel forwards do not pass through
    /// the agent.
    fn carries(self, kind: Kind) -> bool {
        use Kind::*;
        match self {
            Self::Agent => matches!(kind, HttpsAgent | TcpProxy | UdpProxy),
            Self::Sidecar => !matches!(kind, TcpKernel | TcpProxy | UdpKernel | UdpProxy),
            Self::Program => !matches!(kind, GrpcUnary | GrpcStream | WebSocket),
            Self::GrpcProgram => matches!(kind, GrpcUnary | GrpcStream),
            Self::WebSocketProgram => kind == WebSocket,
        }
    }
}

/// A time in which requests to the killed process may fail.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outage {
    /// The killed process.
    pub(crate) victim: Victim,
    /// The moment before the signal was sent.
    pub(crate) from: Instant,
    /// The time from which new requests may not fail. For a sidecar, when its process is gone, because callers then
    /// connect to another endpoint; for a program or the agent, when its next process is ready.
    pub(crate) until: Instant,
}

impl Outage {
    fn explains(&self, kind: Kind, attempt: &Attempt) -> bool {
        self.victim.carries(kind) && attempt.began <= self.until && attempt.ended >= self.from
    }

    fn contains_start_of(&self, attempt: &Attempt) -> bool {
        (self.from..=self.until).contains(&attempt.began)
    }
}

/// One request, or one session of several exchanges, from its first byte to its end.
#[derive(Debug)]
struct Attempt {
    began: Instant,
    ended: Instant,
    /// The failure, if any.
    fault: Option<String>,
}

/// The results of one kind of traffic.
#[derive(Debug, Default)]
struct Record {
    attempts: Mutex<Vec<Attempt>>,
    exchanges: AtomicU64,
}

/// The results of all traffic.
#[derive(Debug)]
pub(crate) struct Tally {
    records: [Record; KINDS.len()],
    outages: Mutex<Vec<Outage>>,
    /// Number of datagrams sent again because no response arrived in time.
    pub(crate) resends: AtomicU64,
    /// Whether the clients must stop.
    pub(crate) stop: AtomicBool,
    /// The time from which failures count: when every kind of traffic is served.
    start: OnceLock<Instant>,
}

/// The failures of one kind of traffic.
#[derive(Debug)]
pub(crate) struct Failures {
    kind: Kind,
    /// Number of failures that a killed process explains.
    explained: usize,
    /// All other failures, as text.
    unexplained: Vec<String>,
    /// Outages in which more requests failed than the killed process explains.
    excesses: Vec<String>,
}

fn locked<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The current time.
#[expect(clippy::disallowed_methods, reason = "attempts and outages are compared by their times")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            records: Default::default(),
            outages: Mutex::default(),
            resends: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            start: OnceLock::new(),
        }
    }

    #[expect(clippy::indexing_slicing, reason = "the array has a record for each kind")]
    fn record(&self, kind: Kind) -> &Record {
        &self.records[kind as usize]
    }

    /// Makes requests or sessions of that kind, one after the other, until [`Tally::stop`] is set. `attempt` returns
    /// the number of its exchanges, or what went with_context.
    pub(crate) fn repeat(
        &self,
        kind: Kind,
        between: Duration,
        mut attempt: impl FnMut() -> Result<u64, String>,
    ) {
        let record = self.record(kind);
        while !self.stop.load(Relaxed) {
            let began = now();
            let result = attempt();
            record.exchanges.fetch_add(*result.as_ref().unwrap_or(&0), Relaxed);
            let attempt = Attempt { began, ended: now(), fault: result.err() };
            locked(&record.attempts).push(attempt);
            pause(between);
        }
    }

    /// Waits until each kind has a request or session that began after this call and succeeded.
    ///
    /// # Panics
    /// When a kind has none before the deadline.
    pub(crate) fn wait_until_all_served(&self) {
        let from = now();
        for kind in KINDS {
            let record = self.record(kind);
            eventually(format!("{kind:?} is served"), || {
                let attempts = locked(&record.attempts);
                let recent = attempts.iter().rev().take_while(|attempt| attempt.began > from);
                recent.into_iter().any(|attempt| attempt.fault.is_none()).then_some(())
            });
        }
    }

    /// Waits until each kind is served. Failures of later requests count.
    ///
    /// # Panics
    /// When a kind is not served before the deadline.
    pub(crate) fn begin(&self) {
        self.wait_until_all_served();
        self.start.get_or_init(now);
    }

    /// Records an outage that has ended.
    pub(crate) fn add_outage(&self, victim: Victim, from: Instant, until: Instant) {
        locked(&self.outages).push(Outage { victim, from, until });
    }

    /// The time from the moment at which failures began to count.
    pub(crate) fn since(&self, moment: Instant) -> Duration {
        let start = self.start.get();
        start.map_or(Duration::ZERO, |start| moment.saturating_duration_since(*start))
    }

    /// Divides the failures of a kind into those that a killed process explains, and others.
    pub(crate) fn failures(&self, kind: Kind) -> Failures {
        let attempts = locked(&self.record(kind).attempts);
        let outages = locked(&self.outages);
        let mut failures =
            Failures { kind, explained: 0, unexplained: Vec::new(), excesses: Vec::new() };
        for attempt in attempts.iter() {
            let counts = self.start.get().is_some_and(|start| attempt.began >= *start);
            let Some(fault) = attempt.fault.as_ref().filter(|_| counts) else { continue };
            if outages.iter().any(|outage| outage.explains(kind, attempt)) {
                failures.explained += 1;
                continue;
            }
            let began = self.since(attempt.began);
            let ended = self.since(attempt.ended);
            failures.unexplained.push(format!("{began:.3?} to {ended:.3?}: {fault}"));
        }
        let outages = outages.iter().filter(|outage| outage.victim.carries(kind));
        failures.excesses = outages.filter_map(|outage| self.excess(outage, &attempts)).collect();
        failures
    }

    /// Whether more requests that began in an outage failed than the killed process should get. The agent gets all of
    /// them. One endpoint of three gets a third of the requests, or up to two thirds when another is removed, by their
    /// weights. Failed requests end sooner than successful ones, so more of them are made, and small numbers vary.
    fn excess(&self, outage: &Outage, attempts: &[Attempt]) -> Option<String> {
        const ALLOWED_ANYWAY: usize = 12;
        const ALLOWED_PER_SUCCESS: usize = 3;
        let began = attempts.iter().filter(|attempt| outage.contains_start_of(attempt));
        let (failed, succeeded): (Vec<_>, Vec<_>) =
            began.partition(|attempt| attempt.fault.is_some());
        let is_excess = failed.len() > ALLOWED_ANYWAY + ALLOWED_PER_SUCCESS * succeeded.len();
        (is_excess && outage.victim != Victim::Agent).then(|| {
            let from = self.since(outage.from);
            let until = self.since(outage.until);
            let failed = failed.len();
            let succeeded = succeeded.len();
            let victim = outage.victim;
            format!(
                "{victim:?} down {from:.3?} to {until:.3?}: {failed} failed, {succeeded} served"
            )
        })
    }

    /// One line per kind of traffic.
    pub(crate) fn summary(&self) -> String {
        let line = |kind: Kind| {
            let record = self.record(kind);
            let attempts = locked(&record.attempts).len();
            let exchanges = record.exchanges.load(Relaxed);
            let failures = self.failures(kind);
            let explained = failures.explained;
            let others = failures.unexplained.len();
            format!(
                "{kind:?}: {attempts} attempts, {exchanges} exchanges, failed: {explained} at killed processes, \
                 {others} otherwise\n"
            )
        };
        let resends = self.resends.load(Relaxed);
        KINDS.map(line).concat() + &format!("datagrams sent again: {resends}\n")
    }
}

impl Failures {
    /// The failures that must not happen, as text; `None` if there are none.
    pub(crate) fn unexpected(&self) -> Option<String> {
        let Self { kind, unexplained, excesses, .. } = self;
        let is_empty = unexplained.is_empty() && excesses.is_empty();
        (!is_empty).then(|| format!("{kind:?}: {unexplained:#?}, {excesses:#?}"))
    }
}
