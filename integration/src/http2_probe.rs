//! Protocol probes: sequences of HTTP/2 frames, with the reaction that RFC 9113 requires of a
//! server.

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

/// How much of a rejected request may reach the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Reached {
    /// No part of it.
    Nothing,
    /// Its head, but not the complete request: the violation comes after the head.
    Head,
    /// The complete request: the violation comes after its end.
    Whole,
}

/// A sequence of frames, and the outcomes that are accepted.
#[derive(Debug, Clone)]
pub struct Http2Probe {
    name: &'static str,
    /// Sent first; the probe then waits for the response on stream 1.
    before: Vec<u8>,
    frames: Vec<u8>,
    /// The stream whose outcome is checked.
    stream: u32,
    wanted: Vec<StreamOutcome>,
    reach: Reached,
    /// Whether PROTOCOL_ERROR is accepted where the RFC has a more specific code.
    allows_general_code: bool,
}

impl Http2Probe {
    /// A probe; `name` begins with the RFC section of the rule. It checks stream 1, and that
    /// nothing of a rejected request reaches the service.
    #[must_use]
    pub fn new(name: &'static str, frames: &[Vec<u8>], wanted: Vec<StreamOutcome>) -> Self {
        let is_served = wanted.contains(&StreamOutcome::Answered(200));
        let reach = if is_served { Reached::Whole } else { Reached::Nothing };
        let before = Vec::new();
        let frames = frames.concat();
        Self { name, before, frames, stream: 1, wanted, reach, allows_general_code: false }
    }

    /// A request with malformed headers.
    #[must_use]
    pub fn malformed(name: &'static str, fields: &[(&str, &str)]) -> Self {
        Self::new(name, &[headers(WHOLE, 1, fields)], malformed())
    }

    /// A valid request.
    #[must_use]
    pub fn good(name: &'static str, fields: &[(&str, &str)]) -> Self {
        Self::new(name, &[headers(WHOLE, 1, fields)], served())
    }

    /// Checks another stream than stream 1.
    #[must_use]
    pub fn on(self, stream: u32) -> Self {
        Self { stream, ..self }
    }

    /// The violation comes after a valid head, which may reach the service.
    #[must_use]
    pub fn after_head(self) -> Self {
        Self { reach: Reached::Head, ..self }
    }

    /// The violation comes after a complete request, which may reach the service.
    #[must_use]
    pub fn after_request(self) -> Self {
        Self { reach: Reached::Whole, ..self }
    }

    /// The violation comes after a request that was answered.
    #[must_use]
    pub fn after_answer(self) -> Self {
        Self { before: headers(WHOLE, 1, &get("/first")), ..self.after_request() }
    }

    /// Accepts a connection error with PROTOCOL_ERROR, where the RFC has a more specific code.
    #[must_use]
    pub fn allows_general_code(self) -> Self {
        Self { allows_general_code: true, ..self }
    }

    /// The probe without that exception; `None` if it has no exception.
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

/// A malformed request; the server may also respond with 400 (section 8.1.1).
#[must_use]
pub fn malformed() -> Vec<StreamOutcome> {
    any(&[stream(PROTOCOL_ERROR), vec![StreamOutcome::Answered(400)]])
}

/// A 200 response.
#[must_use]
pub fn served() -> Vec<StreamOutcome> {
    vec![StreamOutcome::Answered(200)]
}

/// Any of these outcomes.
#[must_use]
pub fn any(outcomes: &[Vec<StreamOutcome>]) -> Vec<StreamOutcome> {
    outcomes.concat()
}

/// The header fields of a POST.
pub const POST: [(&str, &str); 4] =
    [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/")];

/// A complete request.
#[must_use]
pub fn ask(stream: u32) -> Vec<u8> {
    headers(WHOLE, stream, &get("/"))
}

/// A complete request that the service never answers.
#[must_use]
pub fn hold(stream: u32) -> Vec<u8> {
    headers(WHOLE, stream, &get("/hold"))
}

/// The head of a request with a body.
#[must_use]
pub fn post(stream: u32) -> Vec<u8> {
    headers(END_HEADERS, stream, &POST)
}

/// A DATA frame.
#[must_use]
pub fn data(flags: u8, stream: u32, bytes: &[u8]) -> Vec<u8> {
    frame(kind::DATA, flags, stream, bytes)
}

/// A sidecar with a plaintext HTTP listener, in front of a service that records requests.
#[derive(Debug)]
pub struct ProbedSidecar {
    /// The sidecar.
    pub sidecar: TestSidecar,
    /// The service.
    pub service: RecordingServer,
    // Keeps the folder with the sidecar's configuration file.
    _pki: MeshPki,
}

impl ProbedSidecar {
    /// Starts both.
    #[must_use]
    pub fn start() -> Self {
        Self::serving(http(&route_to("service", 15), &[]))
    }

    /// Starts both with another `HttpConnectionManager`, whose routes lead to cluster `service`.
    #[must_use]
    pub fn serving(http: Value) -> Self {
        let pki = MeshPki::create();
        let service = RecordingServer::start();
        let port = port::free();
        let admin = port::free();
        let inbound = listener("inbound", port, http, None);
        let cluster = cluster("service", &[service.port], UpstreamHttp::Http1, None);
        let config = bootstrap(admin, &[inbound], &[cluster]);
        let sidecar = TestSidecar::start("sidecar", &pki, port, admin, &config);
        Self { sidecar, service, _pki: pki }
    }

    /// Connects to the sidecar and sends the connection preface.
    #[must_use]
    pub fn connect(&self) -> Http2FrameClient {
        Http2FrameClient::connect(self.sidecar.port)
    }

    /// Checks that a request on another connection is served.
    ///
    /// # Panics
    /// If it is not answered with 200.
    pub fn assert_others_served(&self, beside: &str) {
        let mut other = self.connect();
        other.send(&headers(WHOLE, 1, &get("/other")));
        assert_eq!(other.outcome(1), StreamOutcome::Answered(200), "beside {beside}");
    }

    /// Runs a probe; returns a description of the failure, if any.
    fn check(&self, probe: &Http2Probe) -> Option<String> {
        let Http2Probe { name, wanted, .. } = probe;
        let mut client = self.connect();
        if !probe.before.is_empty() {
            client.send(&probe.before);
            assert_eq!(client.outcome(1), StreamOutcome::Answered(200), "before {name}");
        }
        // The server may close the connection before it has read all frames.
        client.send(&probe.frames);
        let outcome = client.outcome(probe.stream);
        self.assert_others_served(name);
        let seen = self.service.take();
        let as_wanted = wanted.contains(&outcome)
            || (probe.allows_general_code && outcome == StreamOutcome::Goaway(PROTOCOL_ERROR));
        let wrong = !as_wanted || reached(&seen) > probe.reach;
        wrong.then(|| {
            format!("{name}: {outcome:?}, expected {wanted:?}; the service received {seen:?}")
        })
    }

    /// Runs all probes and checks that the sidecar still runs.
    ///
    /// # Panics
    /// If a probe fails; the message has one line per failed probe.
    pub fn check_all(&mut self, probes: &[Http2Probe]) {
        let wrong: Vec<String> = probes.iter().filter_map(|probe| self.check(probe)).collect();
        assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), probes.len(), wrong.join("\n"));
        let process = &mut self.sidecar.process;
        assert!(process.is_running(), "{process:?} has ended");
        assert!(!process.errors().contains("panicked"), "{process:?} panicked");
    }
}

/// How much reached the service besides the request of `assert_others_served`.
fn reached(seen: &[RecordedRequest]) -> Reached {
    let count =
        |is_it: fn(&RecordedRequest) -> bool| seen.iter().filter(|seen| is_it(seen)).count();
    match (
        count(|seen| matches!(seen, RecordedRequest::Head(_))),
        count(|s| matches!(s, RecordedRequest::Whole(_))),
    ) {
        (..=1, _) => Reached::Nothing,
        (_, ..=1) => Reached::Head,
        _ => Reached::Whole,
    }
}

/// SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113, section 6.5.2).
pub const INITIAL_WINDOW_SIZE: u16 = 4;
/// The default SETTINGS_MAX_FRAME_SIZE.
pub const FRAME_BYTES: usize = 16_384;

/// A WINDOW_UPDATE for a stream, or for the connection (stream 0).
#[must_use]
pub fn window(stream: u32, by: u32) -> Vec<u8> {
    frame(kind::WINDOW_UPDATE, flag::NONE, stream, &by.to_be_bytes())
}

/// A SETTINGS frame with one setting.
#[must_use]
pub fn set(id: u16, value: u32) -> Vec<u8> {
    frame(kind::SETTINGS, flag::NONE, 0, &setting(id, value))
}
