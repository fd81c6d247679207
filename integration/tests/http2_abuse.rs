//! Clients that abuse well-formed HTTP/2: the sidecar closes their connections, or serves them without harm. Other
//! clients are served meanwhile, and memory does not grow. Floods of frames without content are in `frame_floods`.

use std::net::Shutdown;

use weft_integration::curl::Curl;
use weft_integration::http2_frames::flag::{END_HEADERS, END_STREAM, NONE, PADDED, WHOLE};
use weft_integration::http2_frames::kind::{
    CONTINUATION, DATA, GOAWAY, HEADERS, RST_STREAM, WINDOW_UPDATE,
};
use weft_integration::http2_frames::{
    Http2Frame, Http2FrameClient, StreamOutcome, block, code, frame, get, headers,
};
use weft_integration::http2_probe::{POST, data, post};
use weft_integration::recording_server::{RecordedRequest, RecordingServer};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};
use weft_integration::wait::eventually;

/// Number of streams or frames per round.
const AT_ONCE: u32 = 100;
const GROWTH_BYTES: u64 = 10 * 1024 * 1024;
/// Number of requests of other clients that must be served during each abuse.
const OTHERS: usize = 20;

/// The frames that an abusive client sends.
struct Abuse {
    name: &'static str,
    /// Frames before the first round.
    first: Vec<u8>,
    /// Frames of each round.
    round: Box<dyn Fn(u32) -> Vec<u8> + Sync>,
    /// Number of rounds.
    rounds: u32,
    /// Whether the sidecar may serve all rounds, because they do no harm.
    tolerated: bool,
}

impl Abuse {
    /// Abuse by streams: the frames of `stream` for each stream number.
    fn by_streams(name: &'static str, stream: impl Fn(u32) -> Vec<u8> + Sync + 'static) -> Self {
        let round = move |round| {
            let numbers = round * AT_ONCE..(round + 1) * AT_ONCE;
            numbers.flat_map(|number| stream(2 * number + 1)).collect()
        };
        let round = Box::new(round);
        Self { name, first: Vec::new(), round, rounds: 1000, tolerated: false }
    }

    /// Abuse by one frame that is repeated after `first`.
    fn by_frames(name: &'static str, first: Vec<u8>, frame: &[u8]) -> Self {
        let frames = frame.repeat(AT_ONCE as usize);
        let round = Box::new(move |_| frames.clone());
        Self { name, first, round, rounds: 10_000, tolerated: false }
    }

    fn tolerated_for(self, rounds: u32) -> Self {
        Self { rounds, tolerated: true, ..self }
    }
}

/// The number of rounds that were sent before the sidecar closed the connection, and the error code of its GOAWAY.
fn run_abuse(port: u16, abuse: &Abuse) -> (u32, Option<u32>) {
    let mut client = Http2FrameClient::connect(port);
    let mut answers = client.reader();
    let reader = std::thread::spawn(move || {
        let mut error_code = None;
        while let Ok(frame) = answers.receive() {
            error_code = (frame.kind == GOAWAY).then(|| frame.number(4)).or(error_code);
        }
        error_code
    });
    client.send(&abuse.first);
    let sent = (0..abuse.rounds).take_while(|round| client.send(&(abuse.round)(*round))).count();
    // An error is allowed: the connection may be closed already.
    drop(client.tcp().shutdown(Shutdown::Write));
    let error_code = reader.join().expect("the reader thread does not panic");
    (u32::try_from(sent).expect("the number of rounds fits into u32"), error_code)
}

/// Sends enough requests that each worker has a connection to the other sidecar, which takes memory once.
fn warm_up(port: u16) {
    for _ in 0..OTHERS {
        let answer = Curl::get(port, "/").with(&["--http2-prior-knowledge"]).run();
        assert_eq!(answer.status, 200, "{answer:?}");
    }
}

fn check(abuse: &Abuse) {
    let Abuse { name, rounds, tolerated, .. } = abuse;
    let service = RecordingServer::start();
    let mut pair = SidecarPair::start(&PairConfig::http1(service.port));
    let port = pair.caller.port;
    warm_up(port);
    let before = [pair.caller.resident_memory(), pair.callee.resident_memory()];
    let (sent, error_code) = std::thread::scope(|scope| {
        let abusing = scope.spawn(|| run_abuse(port, abuse));
        for _ in 0..OTHERS {
            assert_eq!(Curl::get(port, "/").run().status, 200, "during {name}");
        }
        abusing.join().expect("the abusing thread does not panic")
    });
    let summary = format!("{name}: GOAWAY with {error_code:?} in round {sent} of {rounds}");
    assert!(*tolerated || sent < *rounds, "{summary}");
    assert_bounded_growth(&pair, before, &summary);
    eventually(format!("no request is open after {name}"), || {
        let sidecars = [&pair.caller, &pair.callee];
        sidecars.iter().all(|s| s.metric("weft_sidecar_requests_open") == 0).then_some(())
    });
    pair.assert_healthy();
}

/// Asserts that the peak_memory memory of neither sidecar exceeds its memory before by `GROWTH_BYTES`.
fn assert_bounded_growth(pair: &SidecarPair, before: [u64; 2], during: &str) {
    for (sidecar, before) in [&pair.caller, &pair.callee].into_iter().zip(before) {
        let grown = sidecar.peak_memory().saturating_sub(before);
        assert!(grown < GROWTH_BYTES, "{during}: {sidecar:?} grew by {grown} bytes");
    }
}

fn window(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, NONE, stream, &by.to_be_bytes())
}

fn post_with_length(flags: u8, stream: u32, length: &str) -> Vec<u8> {
    headers(flags, stream, &[&POST[..], &[("content-length", length)]].concat())
}

/// CVE-2023-44487.
#[test]
fn rapid_reset_client_is_disconnected() {
    let reset = |stream| frame(RST_STREAM, NONE, stream, &[0, 0, 0, 8]);
    check(&Abuse::by_streams("rapid reset", move |stream| {
        [headers(WHOLE, stream, &get("/")), reset(stream)].concat()
    }));
    check(&Abuse::by_streams("rapid reset of bodies", move |stream| {
        [post(stream), data(NONE, stream, b"x"), reset(stream)].concat()
    }));
}

/// CVE-2025-8671 ("made you reset"): the client provokes the server into resetting its streams.
#[test]
fn client_that_provokes_resets_is_disconnected() {
    check(&Abuse::by_streams("WINDOW_UPDATE with an increment of 0", |stream| {
        [post(stream), window(stream, 0)].concat()
    }));
    check(&Abuse::by_streams("WINDOW_UPDATE beyond the largest window", |stream| {
        [post(stream), window(stream, 0x7fff_ffff)].concat()
    }));
    check(&Abuse::by_streams("less than content-length", |stream| {
        post_with_length(WHOLE, stream, "5")
    }));
    check(&Abuse::by_streams("more than content-length", |stream| {
        [post_with_length(END_HEADERS, stream, "1"), data(END_STREAM, stream, b"xx")].concat()
    }));
    check(&Abuse::by_streams("malformed requests", |stream| {
        headers(WHOLE, stream, &[(":status", "200")])
    }));
}

/// CVE-2024-27919.
#[test]
fn client_with_an_endless_header_section_is_disconnected() {
    let start = || headers(END_STREAM, 1, &get("/"));
    let large = block(&[("x-a", &"b".repeat(16_000))]);
    let continuation = |large: &[u8]| frame(CONTINUATION, NONE, 1, large);
    check(&Abuse::by_frames("CONTINUATION", start(), &continuation(&large)));
    check(&Abuse::by_frames("empty CONTINUATION", start(), &continuation(&[])));
    check(&Abuse::by_frames("small CONTINUATION", start(), &continuation(&block(&[("x-a", "b")]))));
}

/// RUSTSEC-2026-0258, and frames with the most overhead per byte.
#[test]
fn bodies_of_tiny_frames_do_no_harm() {
    check(&Abuse::by_frames("empty DATA", post(1), &data(NONE, 1, &[])));
    let padded = |payload: &[u8]| frame(DATA, PADDED, 1, payload);
    check(&Abuse::by_frames("only padding", post(1), &padded(&[1, 0])).tolerated_for(1000));
    let byte = padded(&[1, b'x', 0]);
    check(&Abuse::by_frames("a byte and padding", post(1), &byte).tolerated_for(1000));
}

/// An HPACK bomb, a few bytes that expand to many (CVE-2026-47774): a header that enters the dynamic table, and
/// `references` to it.
fn hpack_bomb(value: &str, references: usize) -> (Vec<u8>, Vec<u8>) {
    // RFC 7541, sections 6.2.1 and 6.1: the first entry after the static table.
    let literal = block(&[("cookie", value)]);
    let insert = std::iter::once(0x40).chain(literal.into_iter().skip(1));
    (insert.collect(), vec![0xbe; references])
}

/// A client that sends an HPACK bomb on each stream.
fn bombs(name: &'static str, value: &str, references: usize) -> Abuse {
    let (insert, reference) = hpack_bomb(value, references);
    let stream = move |stream| {
        let block = [&block(&get("/bomb"))[..], &insert, &reference].concat();
        frame(HEADERS, WHOLE, stream, &block)
    };
    Abuse::by_streams(name, stream)
}

#[test]
fn client_with_many_references_to_a_large_header_is_disconnected() {
    check(&bombs("references", &"x".repeat(3000), 13_000));
}

#[test]
fn client_with_thousands_of_split_cookies_is_disconnected() {
    check(&bombs("split cookies", "a", 5000));
}

#[test]
fn request_with_an_hpack_bomb_is_refused_and_not_forwarded() {
    let service = RecordingServer::start();
    let pair = SidecarPair::start(&PairConfig::http1(service.port));
    for (value, references) in [("a", 5000), (&"x".repeat(3000)[..], 30)] {
        let (insert, reference) = hpack_bomb(value, references);
        let block = [&block(&get("/bomb"))[..], &insert, &reference].concat();
        let mut client = Http2FrameClient::connect(pair.caller.port);
        client.send(&frame(HEADERS, WHOLE, 1, &block));
        let outcome = client.outcome(1);
        let allowed =
            [StreamOutcome::Answered(431), StreamOutcome::Goaway(code::ENHANCE_YOUR_CALM)];
        assert!(allowed.contains(&outcome), "{references} references: {outcome:?}");
    }
    let received = service.take();
    let is_bomb = |request: &&RecordedRequest| matches!(request, RecordedRequest::Head(head) if head.contains("/bomb"));
    let bombs = received.iter().filter(is_bomb);
    assert_eq!(bombs.count(), 0);
}

/// Opens as many streams as allowed, none of which ends its body.
fn open_endless_bodies(name: &str, path: &str, body: usize) {
    const STREAMS: u32 = 256;
    let service = RecordingServer::start();
    let mut pair = SidecarPair::start(&PairConfig::http1(service.port));
    let port = pair.caller.port;
    warm_up(port);
    let before = [pair.caller.resident_memory(), pair.callee.resident_memory()];
    let post = [&POST[..3], &[(":path", path)]].concat();
    let body = vec![b'x'; body];
    let mut client = Http2FrameClient::connect(port);
    // Wait for the larger connection window, which all bodies together need.
    client.find("WINDOW_UPDATE", |frame| frame.kind == WINDOW_UPDATE && frame.stream == 0);
    for stream in (0..STREAMS).map(|number| 2 * number + 1) {
        client.send(&[headers(END_HEADERS, stream, &post), data(NONE, stream, &body)].concat());
    }
    let open = |pair: &SidecarPair| pair.callee.metric("weft_sidecar_requests_open");
    eventually(format!("all {name} are open"), || {
        (open(&pair) == u64::from(STREAMS)).then_some(())
    });
    for _ in 0..OTHERS {
        assert_eq!(Curl::get(port, "/").run().status, 200, "during {name}");
    }
    assert_bounded_growth(&pair, before, name);
    drop(client);
    eventually(format!("no {name} are open"), || (open(&pair) == 0).then_some(()));
    pair.assert_healthy();
}

#[test]
fn endless_bodies_do_no_harm() {
    open_endless_bodies("bodies of a byte", "/", 1);
    // Together limited by the window of the connection, not by a window per stream.
    open_endless_bodies("bodies that the service does not read", "/unread", 16_000);
}

/// Otherwise a client that opens many streams would cause as many upstream handshakes.
#[test]
fn simultaneous_streams_share_one_upstream_connection() {
    const STREAMS: u32 = 100;
    let service = RecordingServer::start();
    let pair = SidecarPair::start(&PairConfig::http1(service.port));
    let mut client = Http2FrameClient::connect(pair.caller.port);
    let numbers = (0..STREAMS).map(|number| 2 * number + 1);
    client.send(&numbers.flat_map(|stream| headers(WHOLE, stream, &get("/"))).collect::<Vec<_>>());
    for _ in 0..STREAMS {
        client.find("answer", Http2Frame::ends_stream);
    }
    assert_eq!(pair.caller.metric("weft_sidecar_upstream_connections_total"), 1);
}
