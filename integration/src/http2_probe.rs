//! Probes: a few frames of HTTP/2, and what RFC 9113 wants a server to do about them.

use serde_json::Value;

use crate::bootstrap::{UpstreamHttp, bootstrap, cluster, http, listener, route_to};
use crate::http2_frames::code::PROTOCOL_ERROR;
use crate::http2_frames::flag::{END_HEADERS, WHOLE};
use crate::http2_frames::{
    Http2FrameClient, StreamOutcome, flag, frame, get, headers, kind, setting,
};
use crate::mesh_pki::MeshPki;
use crate::port;
use crate::recording_server::{RecordedRequest, RecordingServer};
use crate::sidecar_pair::TestSidecar;

/// How far a request may get that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Reach {
    /// The service sees nothing of it.
    Nothing,
    /// It was good when it began, so the service may have seen its head, but never the whole.
    Head,
    /// What is refused came after a whole request.
    Whole,
}

/// Frames, and what must become of them.
#[derive(Debug, Clone)]
pub struct Http2Probe {
    name: &'static str,
    /// Sent first; then the answer on stream 1 is awaited.
    before: Vec<u8>,
    frames: Vec<u8>,
    /// The stream whose fate is awaited.
    stream: u32,
    wanted: Vec<StreamOutcome>,
    reach: Reach,
    /// Whether the end is known to be told by a more general word than the RFC's.
    allows_general_code: bool,
}

impl Http2Probe {
    /// A probe by its name, which begins with the section of its rule. Stream 1 is looked at, and what is
    /// not served must not reach the service.
    #[must_use]
    pub fn new(name: &'static str, frames: &[Vec<u8>], wanted: Vec<StreamOutcome>) -> Self {
        let is_served = wanted.contains(&StreamOutcome::Answered(200));
        let reach = if is_served { Reach::Whole } else { Reach::Nothing };
        let (before, frames) = (Vec::new(), frames.concat());
        Self { name, before, frames, stream: 1, wanted, reach, allows_general_code: false }
    }

    /// A request that is refused for its fields.
    #[must_use]
    pub fn malformed(name: &'static str, fields: &[(&str, &str)]) -> Self {
        Self::new(name, &[headers(WHOLE, 1, fields)], malformed())
    }

    /// A request that keeps every rule.
    #[must_use]
    pub fn good(name: &'static str, fields: &[(&str, &str)]) -> Self {
        Self::new(name, &[headers(WHOLE, 1, fields)], served())
    }

    /// Looks at another stream than the first.
    #[must_use]
    pub fn on(self, stream: u32) -> Self {
        Self { stream, ..self }
    }

    /// The head of the request was good, and may have reached the service.
    #[must_use]
    pub fn after_head(self) -> Self {
        Self { reach: Reach::Head, ..self }
    }

    /// There was a whole request before, which may have reached the service.
    #[must_use]
    pub fn after_request(self) -> Self {
        Self { reach: Reach::Whole, ..self }
    }

    /// There was a request before, which was answered.
    #[must_use]
    pub fn after_answer(self) -> Self {
        Self { before: headers(WHOLE, 1, &get("/first")), ..self.after_request() }
    }

    /// The library ends the connection by `PROTOCOL_ERROR`, where the RFC has a better word.
    #[must_use]
    pub fn allows_general_code(self) -> Self {
        Self { allows_general_code: true, ..self }
    }

    /// The same by the RFC's word, if it is one that is told loosely.
    #[must_use]
    pub fn with_exact_code(self) -> Option<Self> {
        self.allows_general_code.then_some(Self { allows_general_code: false, ..self })
    }
}

/// A connection error (section 5.4.1).
#[must_use]
pub fn connection(code: u32) -> Vec<StreamOutcome> {
    vec![StreamOutcome::Goaway(code)]
}

/// A stream error, which may be treated as a connection error (section 5.4.2).
#[must_use]
pub fn stream(code: u32) -> Vec<StreamOutcome> {
    vec![StreamOutcome::Reset(code), StreamOutcome::Goaway(code)]
}

/// A malformed request, of which the client may be told (section 8.1.1).
#[must_use]
pub fn malformed() -> Vec<StreamOutcome> {
    any(&[stream(PROTOCOL_ERROR), vec![StreamOutcome::Answered(400)]])
}

/// What keeps the rules.
#[must_use]
pub fn served() -> Vec<StreamOutcome> {
    vec![StreamOutcome::Answered(200)]
}

/// One of these.
#[must_use]
pub fn any(outcomes: &[Vec<StreamOutcome>]) -> Vec<StreamOutcome> {
    outcomes.concat()
}

/// The fields of a POST.
pub const POST: [(&str, &str); 4] =
    [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/")];

/// A request.
#[must_use]
pub fn ask(stream: u32) -> Vec<u8> {
    headers(WHOLE, stream, &get("/"))
}

/// A request that is whole, and not answered.
#[must_use]
pub fn hold(stream: u32) -> Vec<u8> {
    headers(WHOLE, stream, &get("/hold"))
}

/// A request whose body is still to come.
#[must_use]
pub fn post(stream: u32) -> Vec<u8> {
    headers(END_HEADERS, stream, &POST)
}

/// A piece of a body.
#[must_use]
pub fn data(flags: u8, stream: u32, bytes: &[u8]) -> Vec<u8> {
    frame(kind::DATA, flags, stream, bytes)
}

/// A sidecar that takes plain HTTP, with a service behind it that remembers.
#[derive(Debug)]
pub struct ProbedSidecar {
    /// The sidecar.
    pub sidecar: TestSidecar,
    /// The service.
    pub service: RecordingServer,
    // Its folder holds the sidecar's file.
    _pki: MeshPki,
}

impl ProbedSidecar {
    /// Starts them.
    #[must_use]
    pub fn start() -> Self {
        Self::serving(http(&route_to("service", 15), &[]))
    }

    /// Starts them with another way to serve HTTP, whose routes lead to `service`.
    #[must_use]
    pub fn serving(http: Value) -> Self {
        let (pki, service) = (MeshPki::create(), RecordingServer::start());
        let (port, admin) = (port::free(), port::free());
        let inbound = listener("inbound", port, http, None);
        let cluster = cluster("service", &[service.port], UpstreamHttp::Http1, None);
        let config = bootstrap(admin, &[inbound], &[cluster]);
        let sidecar = TestSidecar::start("sidecar", &pki, port, admin, &config);
        Self { sidecar, service, _pki: pki }
    }

    /// A connection to the sidecar, which has said hello.
    #[must_use]
    pub fn connect(&self) -> Http2FrameClient {
        Http2FrameClient::connect(self.sidecar.port)
    }

    /// Holds that somebody else is served.
    ///
    /// # Panics
    /// When nobody is.
    pub fn assert_others_served(&self, beside: &str) {
        let mut other = self.connect();
        other.send(&headers(WHOLE, 1, &get("/other")));
        assert_eq!(other.outcome(1), StreamOutcome::Answered(200), "beside {beside}");
    }

    /// What is wrong with how the sidecar takes a probe; none when nothing is.
    fn check(&self, probe: &Http2Probe) -> Option<String> {
        let Http2Probe { name, wanted, .. } = probe;
        let mut client = self.connect();
        if !probe.before.is_empty() {
            client.send(&probe.before);
            assert_eq!(client.outcome(1), StreamOutcome::Answered(200), "before {name}");
        }
        // It may be refused before all of it was sent.
        client.send(&probe.frames);
        let outcome = client.outcome(probe.stream);
        self.assert_others_served(name);
        let seen = self.service.take();
        let as_wanted = wanted.contains(&outcome)
            || (probe.allows_general_code && outcome == StreamOutcome::Goaway(PROTOCOL_ERROR));
        let wrong = !as_wanted || reached(&seen) > probe.reach;
        wrong.then(|| format!("{name}: {outcome:?}, not {wanted:?}; the service saw {seen:?}"))
    }

    /// Holds that the sidecar takes each probe as it should.
    ///
    /// # Panics
    /// When it does not, with a line for each that went wrong.
    pub fn check_all(&mut self, probes: &[Http2Probe]) {
        let wrong: Vec<String> = probes.iter().filter_map(|probe| self.check(probe)).collect();
        assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), probes.len(), wrong.join("\n"));
        let process = &mut self.sidecar.process;
        assert!(process.is_running(), "{process:?} has ended");
        assert!(!process.errors().contains("panicked"), "{process:?} panicked");
    }
}

/// How far anything else reached than the other's request.
fn reached(seen: &[RecordedRequest]) -> Reach {
    let count =
        |is_it: fn(&RecordedRequest) -> bool| seen.iter().filter(|seen| is_it(seen)).count();
    match (
        count(|seen| matches!(seen, RecordedRequest::Head(_))),
        count(|s| matches!(s, RecordedRequest::Whole(_))),
    ) {
        (..=1, _) => Reach::Nothing,
        (_, ..=1) => Reach::Head,
        _ => Reach::Whole,
    }
}

/// The setting of a stream's first window (RFC 9113, section 6.5.2).
pub const INITIAL_WINDOW_SIZE: u16 = 4;
/// What a peer may send in one frame, where nothing else was agreed.
pub const FRAME_BYTES: usize = 16_384;

/// Opens the window of a stream, or of the connection.
#[must_use]
pub fn window(stream: u32, by: u32) -> Vec<u8> {
    frame(kind::WINDOW_UPDATE, flag::NONE, stream, &by.to_be_bytes())
}

/// Makes a setting.
#[must_use]
pub fn set(id: u16, value: u32) -> Vec<u8> {
    frame(kind::SETTINGS, flag::NONE, 0, &setting(id, value))
}
