//! What the clients saw, and which failures a killed process explains.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use weft_integration::wait::{eventually, pause};

/// A kind of traffic, named by its protocol and its path through the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// HTTP/1.1 through two sidecars, over one connection for as long as it lives.
    Http1,
    /// HTTP/1.1 through two sidecars, over a connection for each request.
    Http1New,
    /// HTTP/2 through two sidecars, over one connection.
    Http2,
    /// Unary gRPC calls through two sidecars.
    GrpcUnary,
    /// gRPC calls with many messages in either direction, through two sidecars.
    GrpcStream,
    /// A WebSocket echo through two sidecars.
    WebSocket,
    /// A TCP connection through two sidecars, whose bytes neither sidecar reads.
    TcpSidecars,
    /// HTTPS of a client without a sidecar: through the agent to `web`, which asks `orders`.
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

/// A process that fails some traffic when it is killed: not the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    /// The agent.
    Agent,
    /// The sidecar of one replica.
    Sidecar,
    /// The program of one replica that serves HTTP/1.1 and the echoes.
    Program,
    /// The program of one replica that serves gRPC.
    GrpcProgram,
    /// The program of one replica that serves WebSocket.
    WebSocketProgram,
}

impl Victim {
    /// Whether traffic of that kind passes through such a process. What the kernel forwards does not pass through
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

/// A time in which requests may fail: at the killed process, and nowhere else.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outage {
    /// Which process was killed.
    pub(crate) victim: Victim,
    /// The moment before the signal was sent.
    pub(crate) from: Instant,
    /// When no new request may fail: for a sidecar when its process is gone, since callers then connect to
    /// another replica; for a program or the agent when its next process is ready.
    pub(crate) until: Instant,
}

impl Outage {
    fn explains(&self, kind: Kind, attempt: &Attempt) -> bool {
        self.victim.carries(kind) && attempt.began <= self.until && attempt.ended >= self.from
    }

    fn is_beginning_of(&self, attempt: &Attempt) -> bool {
        (self.from..=self.until).contains(&attempt.began)
    }
}

/// One request, or one session of several exchanges, from its first byte to its end.
#[derive(Debug)]
struct Attempt {
    began: Instant,
    ended: Instant,
    /// What went wrong, if anything did.
    fault: Option<String>,
}

/// What came of one kind of traffic.
#[derive(Debug, Default)]
struct Record {
    attempts: Mutex<Vec<Attempt>>,
    exchanges: AtomicU64,
}

/// What came of all traffic.
#[derive(Debug)]
pub(crate) struct Tally {
    records: [Record; KINDS.len()],
    outages: Mutex<Vec<Outage>>,
    /// How many datagrams were sent again because no answer came in time.
    pub(crate) resends: AtomicU64,
    /// Whether the clients are to end.
    pub(crate) stop: AtomicBool,
    /// Since when every service is known everywhere, and failures count.
    start: OnceLock<Instant>,
}

/// The failures of one kind of traffic.
#[derive(Debug)]
pub(crate) struct Failures {
    kind: Kind,
    /// Those at a killed process.
    explained: usize,
    /// All others, as text.
    unexplained: Vec<String>,
    /// Outages in which more failed than a process that is down can explain.
    excesses: Vec<String>,
}

fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The time.
#[allow(
    clippy::disallowed_methods,
    reason = "traffic and outages are compared by the time they took"
)]
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

    #[allow(clippy::indexing_slicing, reason = "there is a record for each kind")]
    fn record(&self, kind: Kind) -> &Record {
        &self.records[kind as usize]
    }

    /// Has a client of that kind make one request or session after another. `attempt` gives the number of its
    /// exchanges, or what went wrong.
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
            held(&record.attempts).push(attempt);
            pause(between);
        }
    }

    /// Waits until each kind has had a request or session that began now and succeeded.
    ///
    /// # Panics
    /// When one has none before the deadline.
    pub(crate) fn await_all(&self) {
        let from = now();
        for kind in KINDS {
            let record = self.record(kind);
            eventually(format!("{kind:?} is served"), || {
                let attempts = held(&record.attempts);
                let recent = attempts.iter().rev().take_while(|attempt| attempt.began > from);
                recent.into_iter().any(|attempt| attempt.fault.is_none()).then_some(())
            });
        }
    }

    /// Waits until each kind is served; failures of later requests count.
    ///
    /// # Panics
    /// When one is not before the deadline.
    pub(crate) fn begin(&self) {
        self.await_all();
        self.start.get_or_init(now);
    }

    /// Records an outage that has ended.
    pub(crate) fn was_out(&self, victim: Victim, from: Instant, until: Instant) {
        held(&self.outages).push(Outage { victim, from, until });
    }

    /// The time since failures count, for people.
    pub(crate) fn since(&self, moment: Instant) -> Duration {
        let start = self.start.get();
        start.map_or(Duration::ZERO, |start| moment.saturating_duration_since(*start))
    }

    /// Divides the failures of a kind by whether a killed process explains them.
    pub(crate) fn failures(&self, kind: Kind) -> Failures {
        let attempts = held(&self.record(kind).attempts);
        let outages = held(&self.outages);
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

    /// Whether more of the requests that began in an outage failed than go to the killed process. With the agent
    /// all do. One replica of three gets a third of the requests; when another is out of the mesh, and by their
    /// weights, it may get two thirds. Failed requests are repeated sooner than good ones end, and chance counts
    /// where there are few.
    fn excess(&self, outage: &Outage, attempts: &[Attempt]) -> Option<String> {
        const BY_CHANCE: usize = 12;
        const FOR_EACH_GOOD: usize = 3;
        let begun = attempts.iter().filter(|attempt| outage.is_beginning_of(attempt));
        let (failed, good): (Vec<_>, Vec<_>) = begun.partition(|attempt| attempt.fault.is_some());
        let is_excess = failed.len() > BY_CHANCE + FOR_EACH_GOOD * good.len();
        (is_excess && outage.victim != Victim::Agent).then(|| {
            let from = self.since(outage.from);
            let until = self.since(outage.until);
            let failed = failed.len();
            let good = good.len();
            let victim = outage.victim;
            format!("{victim:?} down {from:.3?} to {until:.3?}: {failed} failed, {good} served")
        })
    }

    /// One line for each kind of traffic, for people.
    pub(crate) fn summary(&self) -> String {
        let line = |kind: Kind| {
            let record = self.record(kind);
            let attempts = held(&record.attempts).len();
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
    /// What must not have happened, for people; none when all is well.
    pub(crate) fn complaint(&self) -> Option<String> {
        let Self { kind, unexplained, excesses, .. } = self;
        let is_well = unexplained.is_empty() && excesses.is_empty();
        (!is_well).then(|| format!("{kind:?}: {unexplained:#?}, {excesses:#?}"))
    }
}
