//! Clients that keep the form of HTTP/2 and abuse it: each is ended, or does no harm. Others are served
//! meanwhile, and memory does not grow. Floods of frames that carry nothing are in `abuse`.

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

/// How many streams or frames a round has.
const AT_ONCE: u32 = 100;
const GROWTH_BYTES: u64 = 10 * 1024 * 1024;
/// How many requests of others are served beside each client.
const OTHERS: usize = 20;

/// How a client goes about it.
struct Abuse {
    name: &'static str,
    /// What it sends first.
    first: Vec<u8>,
    /// What it sends in each round.
    round: Box<dyn Fn(u32) -> Vec<u8> + Sync>,
    /// How many rounds it would go on for.
    rounds: u32,
    /// Whether it may go on for so long, since it does no harm.
    may_go_on: bool,
}

impl Abuse {
    /// By streams, of each of which `stream` is sent.
    fn by_streams(name: &'static str, stream: impl Fn(u32) -> Vec<u8> + Sync + 'static) -> Self {
        let round = move |round| {
            let numbers = round * AT_ONCE..(round + 1) * AT_ONCE;
            numbers.flat_map(|number| stream(2 * number + 1)).collect()
        };
        let round = Box::new(round);
        Self { name, first: Vec::new(), round, rounds: 1000, may_go_on: false }
    }

    /// By one frame again and again, behind others.
    fn by_frames(name: &'static str, first: Vec<u8>, frame: &[u8]) -> Self {
        let frames = frame.repeat(AT_ONCE as usize);
        let round = Box::new(move |_| frames.clone());
        Self { name, first, round, rounds: 10_000, may_go_on: false }
    }

    fn may_go_on_for(self, rounds: u32) -> Self {
        Self { rounds, may_go_on: true, ..self }
    }
}

/// How many rounds it came through, and the reason that it was told in the end.
fn commit(port: u16, abuse: &Abuse) -> (u32, Option<u32>) {
    let mut client = Http2FrameClient::connect(port);
    let mut answers = client.reader();
    let reader = std::thread::spawn(move || {
        let mut told = None;
        while let Ok(frame) = answers.receive() {
            told = (frame.kind == GOAWAY).then(|| frame.number(4)).or(told);
        }
        told
    });
    client.send(&abuse.first);
    let came = (0..abuse.rounds).take_while(|round| client.send(&(abuse.round)(*round))).count();
    // It may be closed already.
    drop(client.tcp().shutdown(Shutdown::Write));
    let told = reader.join().expect("it reads to the end, whichever");
    (u32::try_from(came).expect("there are not so many"), told)
}

/// As much as comes with being used at all: each worker has then a connection to the other sidecar.
fn warm_up(port: u16) {
    for _ in 0..OTHERS {
        let answer = Curl::get(port, "/").with(&["--http2-prior-knowledge"]).run();
        assert_eq!(answer.status, 200, "{answer:?}");
    }
}

fn check(abuse: &Abuse) {
    let Abuse { name, rounds, may_go_on, .. } = abuse;
    let service = RecordingServer::start();
    let mut pair = SidecarPair::start(&PairConfig::http1(service.port));
    let port = pair.caller.port;
    warm_up(port);
    let before = [pair.caller.resident_memory(), pair.callee.resident_memory()];
    let (came, told) = std::thread::scope(|scope| {
        let committing = scope.spawn(|| commit(port, abuse));
        for _ in 0..OTHERS {
            assert_eq!(Curl::get(port, "/").run().status, 200, "beside {name}");
        }
        committing.join().expect("it ends")
    });
    let ended = format!("{name}: told {told:?} in round {came} of {rounds}");
    assert!(*may_go_on || came < *rounds, "{ended}");
    assert_small(&pair, before, &ended);
    eventually(format!("nothing is left of {name}"), || {
        let sidecars = [&pair.caller, &pair.callee];
        sidecars.iter().all(|s| s.metric("weft_sidecar_requests_open") == 0).then_some(())
    });
    pair.assert_healthy();
}

/// Holds that neither sidecar had so much more memory at any time.
fn assert_small(pair: &SidecarPair, before: [u64; 2], beside: &str) {
    for (sidecar, before) in [&pair.caller, &pair.callee].into_iter().zip(before) {
        let grown = sidecar.peak_memory().saturating_sub(before);
        assert!(grown < GROWTH_BYTES, "{beside}: {sidecar:?} grew by {grown} bytes");
    }
}

fn window(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, NONE, stream, &by.to_be_bytes())
}

fn announced(flags: u8, stream: u32, length: &str) -> Vec<u8> {
    headers(flags, stream, &[&POST[..], &[("content-length", length)]].concat())
}

/// CVE-2023-44487.
#[test]
fn rapid_resets_are_ended() {
    let reset = |stream| frame(RST_STREAM, NONE, stream, &[0, 0, 0, 8]);
    check(&Abuse::by_streams("rapid reset", move |stream| {
        [headers(WHOLE, stream, &get("/")), reset(stream)].concat()
    }));
    check(&Abuse::by_streams("rapid reset of bodies", move |stream| {
        [post(stream), data(NONE, stream, b"x"), reset(stream)].concat()
    }));
}

/// CVE-2025-8671: the client breaks a rule, so that it is the server who resets.
#[test]
fn resets_that_a_client_provokes_are_ended() {
    check(&Abuse::by_streams("WINDOW_UPDATE by nothing", |stream| {
        [post(stream), window(stream, 0)].concat()
    }));
    check(&Abuse::by_streams("WINDOW_UPDATE beyond", |stream| {
        [post(stream), window(stream, 0x7fff_ffff)].concat()
    }));
    check(&Abuse::by_streams("less than announced", |stream| announced(WHOLE, stream, "5")));
    check(&Abuse::by_streams("more than announced", |stream| {
        [announced(END_HEADERS, stream, "1"), data(END_STREAM, stream, b"xx")].concat()
    }));
    check(&Abuse::by_streams("malformed requests", |stream| {
        headers(WHOLE, stream, &[(":status", "200")])
    }));
}

/// CVE-2024-27919.
#[test]
fn field_sections_without_end_are_ended() {
    let begun = || headers(END_STREAM, 1, &get("/"));
    let fields = block(&[("x-a", &"b".repeat(16_000))]);
    let more = |fields: &[u8]| frame(CONTINUATION, NONE, 1, fields);
    check(&Abuse::by_frames("CONTINUATION", begun(), &more(&fields)));
    check(&Abuse::by_frames("empty CONTINUATION", begun(), &more(&[])));
    check(&Abuse::by_frames("small CONTINUATION", begun(), &more(&block(&[("x-a", "b")]))));
}

/// RUSTSEC-2026-0258, and what costs most for a byte.
#[test]
fn bodies_of_next_to_nothing_do_no_harm() {
    check(&Abuse::by_frames("empty DATA", post(1), &data(NONE, 1, &[])));
    let padded = |payload: &[u8]| frame(DATA, PADDED, 1, payload);
    check(&Abuse::by_frames("padding alone", post(1), &padded(&[1, 0])).may_go_on_for(1000));
    let byte = padded(&[1, b'x', 0]);
    check(&Abuse::by_frames("a byte and padding", post(1), &byte).may_go_on_for(1000));
}

/// Few bytes that mean many (CVE-2026-47774): a field that the table remembers, and references to it.
fn bomb(value: &str, references: usize) -> (Vec<u8>, Vec<u8>) {
    // RFC 7541, sections 6.2.1 and 6.1: the first entry behind the static table.
    let literal = block(&[("cookie", value)]);
    let remember = std::iter::once(0x40).chain(literal.into_iter().skip(1));
    (remember.collect(), vec![0xbe; references])
}

/// A client that sends a bomb on each stream.
fn bombs(name: &'static str, value: &str, references: usize) -> Abuse {
    let (remember, reference) = bomb(value, references);
    let stream = move |stream| {
        let block = [&block(&get("/bomb"))[..], &remember, &reference].concat();
        frame(HEADERS, WHOLE, stream, &block)
    };
    Abuse::by_streams(name, stream)
}

#[test]
fn references_to_a_large_field_are_ended() {
    check(&bombs("references", &"x".repeat(3000), 13_000));
}

#[test]
fn crumbs_of_cookies_are_ended() {
    check(&bombs("crumbs", "a", 5000));
}

#[test]
fn a_request_of_many_crumbs_is_refused_and_reaches_nobody() {
    let service = RecordingServer::start();
    let pair = SidecarPair::start(&PairConfig::http1(service.port));
    for (value, references) in [("a", 5000), (&"x".repeat(3000)[..], 30)] {
        let (remember, reference) = bomb(value, references);
        let block = [&block(&get("/bomb"))[..], &remember, &reference].concat();
        let mut client = Http2FrameClient::connect(pair.caller.port);
        client.send(&frame(HEADERS, WHOLE, 1, &block));
        let outcome = client.outcome(1);
        let allowed =
            [StreamOutcome::Answered(431), StreamOutcome::Goaway(code::ENHANCE_YOUR_CALM)];
        assert!(allowed.contains(&outcome), "{references} references: {outcome:?}");
    }
    let seen = service.take();
    let bombs = seen
        .iter()
        .filter(|seen| matches!(seen, RecordedRequest::Head(head) if head.contains("/bomb")));
    assert_eq!(bombs.count(), 0);
}

/// As many streams as are allowed, none of which ends.
fn hoard(name: &str, path: &str, body: usize) {
    const STREAMS: u32 = 256;
    let service = RecordingServer::start();
    let mut pair = SidecarPair::start(&PairConfig::http1(service.port));
    let port = pair.caller.port;
    warm_up(port);
    let before = [pair.caller.resident_memory(), pair.callee.resident_memory()];
    let fields = [&POST[..3], &[(":path", path)]].concat();
    let body = vec![b'x'; body];
    let mut client = Http2FrameClient::connect(port);
    // Until then the connection has a smaller window than all bodies want.
    client.find("WINDOW_UPDATE", |frame| frame.kind == WINDOW_UPDATE && frame.stream == 0);
    for stream in (0..STREAMS).map(|number| 2 * number + 1) {
        client.send(&[headers(END_HEADERS, stream, &fields), data(NONE, stream, &body)].concat());
    }
    let open = |pair: &SidecarPair| pair.callee.metric("weft_sidecar_requests_open");
    eventually(format!("{name} are there"), || (open(&pair) == u64::from(STREAMS)).then_some(()));
    for _ in 0..OTHERS {
        assert_eq!(Curl::get(port, "/").run().status, 200, "beside {name}");
    }
    assert_small(&pair, before, name);
    drop(client);
    eventually(format!("{name} are gone"), || (open(&pair) == 0).then_some(()));
    pair.assert_healthy();
}

#[test]
fn bodies_that_never_end_do_no_harm() {
    hoard("bodies of a byte", "/", 1);
    // A window of the connection, and not one of each stream.
    hoard("bodies that nobody takes", "/unread", 16_000);
}

/// Whoever sends much at once must not make the sidecar do as many handshakes.
#[test]
fn streams_that_come_at_once_share_a_connection() {
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
