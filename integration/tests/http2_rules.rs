//! HTTP/2 rules for frames and streams: each violation gets the response of RFC 9113, no part of what is refused
//! reaches the service, and other clients are served. Each probe names the section of its rule; probes for windows
//! are in `http2_windows`, those for requests in `http2_requests`.

use weft_integration::http2_frames::code::{
    COMPRESSION_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, PROTOCOL_ERROR, REFUSED_STREAM,
    STREAM_CLOSED,
};
use weft_integration::http2_frames::flag::{
    ACK, END_HEADERS, END_STREAM, NONE, PADDED, PRIORITY as PRIORITIZED, WHOLE,
};
use weft_integration::http2_frames::kind::{
    CONTINUATION, GOAWAY, HEADERS, PING, PRIORITY, PUSH_PROMISE, RST_STREAM, SETTINGS, UNKNOWN,
    WINDOW_UPDATE,
};
use weft_integration::http2_frames::{
    Http2FrameClient, PREFACE, StreamOutcome, block, frame, get, headers, setting,
};
use weft_integration::http2_probe::{
    FRAME_BYTES, Http2Probe, INITIAL_WINDOW_SIZE, ProbedSidecar, any, ask, connection, data, hold,
    malformed, post, served, set, stream, window,
};
use weft_integration::recording_server::RecordedRequest;

// Settings (RFC 9113, section 6.5.2).
const HEADER_TABLE_SIZE: u16 = 1;
const ENABLE_PUSH: u16 = 2;
const MAX_CONCURRENT_STREAMS: u16 = 3;
const MAX_FRAME_SIZE: u16 = 5;

static TOO_LARGE: [u8; FRAME_BYTES + 1] = [0; FRAME_BYTES + 1];
const LARGEST_WINDOW: u32 = 0x7fff_ffff;
/// The priority of a stream that depends on no other.
const NO_DEPENDENCY: [u8; 5] = [0, 0, 0, 0, 16];
const DEPENDS_ON_1: [u8; 5] = [0, 0, 0, 1, 16];

fn priority(stream: u32) -> Vec<u8> {
    frame(PRIORITY, NONE, stream, &NO_DEPENDENCY)
}

fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, NONE, stream, &[0, 0, 0, 8])
}

fn ping() -> Vec<u8> {
    frame(PING, NONE, 0, &[7; 8])
}

/// A HEADERS frame with END_STREAM, whose payload is these parts.
fn whole(flags: u8, parts: &[&[u8]]) -> Vec<u8> {
    frame(HEADERS, WHOLE | flags, 1, &parts.concat())
}

/// A probe of one frame that is a connection error.
fn violation(name: &'static str, frame: Vec<u8>, code: u32) -> Http2Probe {
    Http2Probe::new(name, &[frame], connection(code))
}

fn unknown_extensions() -> Vec<Http2Probe> {
    let ignored = |name, frames: &[Vec<u8>]| Http2Probe::new(name, frames, served());
    let fields = block(&get("/"));
    let reserved = frame(HEADERS, WHOLE, 0x8000_0001, &fields);
    let unknown = |stream| frame(UNKNOWN, 0xff, stream, &[0; 9]);
    let late = frame(RST_STREAM, 0xff, 1, &[0; 4]);
    let unknown_code = frame(RST_STREAM, NONE, 1, &[0xde, 0xad, 0, 0]);
    vec![
        ignored("4.1: an unknown frame type", &[unknown(0), ask(1)]),
        ignored(
            "4.1: an unknown frame type in a body",
            &[post(1), unknown(1), data(END_STREAM, 1, b"x")],
        ),
        ignored("4.1: the reserved bit", &[reserved]),
        ignored("4.1: unknown flags of HEADERS", &[whole(0xd2, &[&fields])]),
        ignored("4.1: unknown flags of DATA", &[post(1), data(END_STREAM | 0xf6, 1, b"x")]),
        ignored("4.1: unknown flags of SETTINGS", &[frame(SETTINGS, 0xfe, 0, &[]), ask(1)]),
        ignored("4.1: unknown flags of PING", &[frame(PING, 0xfe, 0, &[0; 8]), ask(1)]),
        ignored("4.1: unknown flags of RST_STREAM", &[hold(1), late, ask(3)]).on(3),
        ignored("6.4: an unknown error code", &[hold(1), unknown_code, ask(3)]).on(3),
        ignored("6.5.2: an unknown setting", &[set(0xfafa, 1), ask(1)]),
    ]
}

fn sizes() -> Vec<Http2Probe> {
    let large = |name, frame| violation(name, frame, FRAME_SIZE_ERROR);
    let largest = data(END_STREAM, 1, &[b'x'; FRAME_BYTES]);
    let body = [post(1), data(END_STREAM, 1, &TOO_LARGE)];
    let continuation = frame(CONTINUATION, END_HEADERS, 1, &TOO_LARGE);
    let fields = [headers(END_STREAM, 1, &get("/")), continuation];
    vec![
        Http2Probe::new("4.2: the largest frame", &[post(1), largest], served()),
        Http2Probe::new("4.2: too large DATA", &body, stream(FRAME_SIZE_ERROR)).after_head(),
        Http2Probe::new("4.2: too large CONTINUATION", &fields, connection(FRAME_SIZE_ERROR)),
        large("4.2: too large HEADERS", whole(NONE, &[&TOO_LARGE])),
        large("4.2: too large SETTINGS", frame(SETTINGS, NONE, 0, &[0; FRAME_BYTES + 2])),
        large("4.2: too large, an unknown frame type", frame(UNKNOWN, NONE, 0, &TOO_LARGE)),
    ]
}

fn data_frames() -> Vec<Http2Probe> {
    let padded = |payload: &[u8]| [post(1), data(END_STREAM | PADDED, 1, payload)];
    let wrong = |name, payload: &[u8]| {
        let expected = any(&[connection(PROTOCOL_ERROR), connection(FRAME_SIZE_ERROR)]);
        Http2Probe::new(name, &padded(payload), expected).after_head()
    };
    let nowhere = [post(1), data(NONE, 0, b"x")];
    vec![
        Http2Probe::new("6.1: stream 0", &nowhere, connection(PROTOCOL_ERROR)).after_head(),
        Http2Probe::new("6.1: padding", &padded(&[2, b'x', 0, 0]), served()),
        Http2Probe::new("6.1: only padding", &padded(&[2, 0, 0]), served()),
        wrong("6.1: as much padding as payload", &[3, 0, 0]),
        wrong("6.1: more padding than payload", &[255, 0, 0]),
        wrong("6.1: no padding length", &[]),
    ]
}

fn headers_frames() -> Vec<Http2Probe> {
    let valid = |name, frame| Http2Probe::new(name, &[frame], served());
    let wrong = |name, frame| {
        let expected = any(&[connection(PROTOCOL_ERROR), connection(FRAME_SIZE_ERROR)]);
        Http2Probe::new(name, &[frame], expected)
    };
    let fields = block(&get("/"));
    let own = whole(PRIORITIZED, &[&DEPENDS_ON_1, &fields]);
    let promise = [&[0, 0, 0, 2], &fields[..]].concat();
    let promise = [post(1), frame(PUSH_PROMISE, END_HEADERS, 1, &promise)];
    vec![
        valid("6.2: padding", whole(PADDED, &[&[3], &fields, &[0; 3]])),
        valid("6.2: a priority", whole(PRIORITIZED, &[&NO_DEPENDENCY, &fields])),
        valid(
            "6.2: padding and a priority",
            whole(PADDED | PRIORITIZED, &[&[3], &NO_DEPENDENCY, &fields, &[0; 3]]),
        ),
        violation("6.2: stream 0", ask(0), PROTOCOL_ERROR),
        wrong("6.2: more padding than payload", whole(PADDED, &[&[200], &fields])),
        wrong("6.2: no padding length", whole(PADDED, &[])),
        wrong("6.2: too short for a priority", whole(PRIORITIZED, &[&[0; 3]])),
        Http2Probe::new(
            "5.3.1: a stream that depends on itself",
            &[own],
            any(&[served(), malformed()]),
        ),
        Http2Probe::new("6.6: a push", &promise, connection(PROTOCOL_ERROR)).after_head(),
    ]
}

#[test]
fn malformed_frames_get_the_error_of_their_rule() {
    let probes = [unknown_extensions(), sizes(), data_frames(), headers_frames()].concat();
    ProbedSidecar::start().check_all(&probes);
}

#[test]
fn interrupted_header_sections_are_connection_errors() {
    let fields = block(&get("/"));
    let start = frame(HEADERS, END_STREAM, 1, &fields);
    let (first, rest) = fields.split_at(7);
    let more = |flags, bytes: &[u8]| frame(CONTINUATION, flags, 1, bytes);
    let split = [frame(HEADERS, END_STREAM, 1, first), more(END_HEADERS, rest)];
    let later = [frame(HEADERS, END_STREAM, 1, &[]), more(NONE, &fields), more(END_HEADERS, &[])];
    let by = |name, interruption: Vec<u8>| {
        let frames = [start.clone(), interruption, more(END_HEADERS, &[])];
        Http2Probe::new(name, &frames, connection(PROTOCOL_ERROR))
    };
    let after = |name, before: &[Vec<u8>]| {
        let frames = [before.concat(), more(END_HEADERS, &[])];
        Http2Probe::new(name, &frames, connection(PROTOCOL_ERROR))
    };
    ProbedSidecar::start().check_all(&[
        Http2Probe::new("6.10: a header in two parts", &split, served()),
        Http2Probe::new("6.10: the whole header section in CONTINUATION", &later, served()),
        by("4.3: by DATA", data(NONE, 1, b"x")),
        by("4.3: by HEADERS", ask(3)),
        by("4.3: by HEADERS of the same stream", ask(1)),
        by("4.3: by PRIORITY", priority(1)),
        by("4.3: by RST_STREAM", reset(1)),
        by("4.3: by SETTINGS", set(MAX_FRAME_SIZE, 16_384)),
        by("4.3: by an ACK of SETTINGS", frame(SETTINGS, ACK, 0, &[])),
        by("4.3: by PUSH_PROMISE", frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2])),
        by("4.3: by PING", ping()),
        by("4.3: by GOAWAY", frame(GOAWAY, NONE, 0, &[0; 8])),
        by("4.3: by WINDOW_UPDATE", window(0, 1)),
        by("5.5: by an unknown frame type", frame(UNKNOWN, NONE, 0, &[])),
        by("6.10: on another stream", frame(CONTINUATION, NONE, 3, &[])),
        by("6.10: on stream 0", frame(CONTINUATION, NONE, 0, &[])),
        after("6.10: CONTINUATION without HEADERS", &[]),
        after("6.10: CONTINUATION after END_HEADERS", &[hold(1)]).after_request(),
        after("6.10: CONTINUATION after DATA", &[post(1), data(NONE, 1, b"x")]).after_head(),
    ]);
}

fn hpack() -> Vec<Http2Probe> {
    let fields = block(&get("/"));
    let bad = |name, more: &[u8]| {
        violation(name, whole(NONE, &[&fields, more]), COMPRESSION_ERROR).allows_general_code()
    };
    let table = |size: &[u8]| whole(NONE, &[size, &fields]);
    let valid = |name, size: &[u8]| Http2Probe::new(name, &[table(size)], served());
    let bad_trailers = [post(1), whole(NONE, &[&[0x80]])];
    let bad_later = [hold(1), reset(1), frame(HEADERS, WHOLE, 3, &[0x80])];
    let small = set(HEADER_TABLE_SIZE, 0);
    let expected = connection(COMPRESSION_ERROR);
    vec![
        // Sections of RFC 7541.
        bad("6.1: index 0", &[0x80]),
        bad("2.3.3: an index beyond the table", &[0xc6]),
        bad("2.3.3: a name index beyond the table", &[0x7f, 0, 1, b'x']),
        bad("5.1: an integer that does not end", &[0xff; 12]),
        bad("5.2: a truncated name", &[0, 9, b'x']),
        bad("5.2: a missing value", &[0, 1, b'x']),
        bad("5.2: a truncated value", &[0, 1, b'x', 100, b'y']),
        bad("5.2: Huffman padding of eight bits", &[0, 1, b'x', 0x82, 0x1f, 0xff]),
        bad("5.2: Huffman padding of zeros", &[0, 1, b'x', 0x81, 0x18]),
        bad("5.2: Huffman data with EOS inside", &[0, 1, b'x', 0x84, 0xff, 0xff, 0xff, 0xff]),
        bad("4.2: a table size update after a header", &[0x20]),
        violation(
            "6.3: a table larger than the setting",
            table(&[0x3f, 0xe2, 0x1f]),
            COMPRESSION_ERROR,
        )
        .allows_general_code(),
        valid("4.2: a smaller table", &[0x20]),
        valid("4.2: a smaller table, then the largest", &[0x20, 0x3f, 0xe1, 0x1f]),
        // Sections of RFC 9113.
        Http2Probe::new("6.5.2: no table for responses", &[small, ask(1)], served()),
        Http2Probe::new("4.3: bad trailers", &bad_trailers, expected.clone())
            .after_head()
            .allows_general_code(),
        Http2Probe::new("4.3: a bad header section after a reset", &bad_later, expected)
            .after_request()
            .allows_general_code(),
    ]
}

#[test]
fn hpack_violations_are_compression_errors() {
    ProbedSidecar::start().check_all(&hpack());
}

fn idle_streams() -> Vec<Http2Probe> {
    let last = u32::MAX >> 1;
    let frames = [headers(WHOLE, 5, &get("/hold")), headers(WHOLE, 3, &get("/"))];
    let lower_stream = any(&[connection(PROTOCOL_ERROR), connection(STREAM_CLOSED)]);
    vec![
        violation("5.1: DATA on an idle stream", data(END_STREAM, 1, b"x"), PROTOCOL_ERROR),
        violation("5.1: RST_STREAM on an idle stream", reset(1), PROTOCOL_ERROR),
        violation("5.1: WINDOW_UPDATE on an idle stream", window(1, 1), PROTOCOL_ERROR),
        violation("5.1: DATA on an idle server stream", data(END_STREAM, 2, b"x"), PROTOCOL_ERROR),
        violation("5.1: RST_STREAM on an idle server stream", reset(2), PROTOCOL_ERROR),
        violation("5.1: WINDOW_UPDATE on an idle server stream", window(2, 1), PROTOCOL_ERROR),
        violation("5.1.1: an even stream number", ask(2), PROTOCOL_ERROR),
        Http2Probe::new("5.1.1: a lower stream number", &frames, lower_stream)
            .on(3)
            .after_request(),
        Http2Probe::new("5.1.1: skipped stream numbers", &[ask(last)], served()).on(last),
        Http2Probe::new(
            "5.1: PRIORITY on idle streams",
            &[priority(1), priority(7), ask(1)],
            served(),
        ),
    ]
}

fn half_closed_streams() -> Vec<Http2Probe> {
    let wrong = |name, frames: &[Vec<u8>]| {
        Http2Probe::new(name, frames, stream(STREAM_CLOSED)).after_request().allows_general_code()
    };
    let valid = |name, frames: &[Vec<u8>]| Http2Probe::new(name, frames, served());
    let end = || data(END_STREAM, 1, b"x");
    let trailers = || headers(WHOLE, 1, &[("x-sum", "1")]);
    vec![
        wrong("5.1: DATA after HEADERS", &[hold(1), end()]),
        wrong("5.1: HEADERS after HEADERS", &[hold(1), trailers()]),
        wrong("5.1: DATA after DATA", &[post(1), end(), end()]),
        wrong("5.1: HEADERS after DATA", &[post(1), end(), trailers()]),
        wrong("5.1: DATA after trailers", &[post(1), data(NONE, 1, b"x"), trailers(), end()]),
        valid(
            "5.1: WINDOW_UPDATE and PRIORITY after the request",
            &[ask(1), window(1, 1), priority(1)],
        ),
        valid("5.1: RST_STREAM after the request", &[hold(1), reset(1), ask(3)]).on(3),
    ]
}

fn closed_streams() -> Vec<Http2Probe> {
    let closed = || any(&[stream(STREAM_CLOSED), connection(PROTOCOL_ERROR)]);
    let reset_first = |name, frame, expected| {
        Http2Probe::new(name, &[hold(1), reset(1), frame], expected).after_request()
    };
    let answered = |name, frame, expected| Http2Probe::new(name, &[frame], expected).after_answer();
    let end = || data(END_STREAM, 1, b"x");
    let continuation = frame(CONTINUATION, END_HEADERS, 1, &[]);
    let allowed = || [priority(1), window(1, 1), reset(1), ask(3)].concat();
    vec![
        reset_first("5.1: DATA after a reset", end(), stream(STREAM_CLOSED)),
        reset_first("5.1: HEADERS after a reset", ask(1), closed()),
        reset_first("5.1: allowed frames after a reset", allowed(), served()).on(3),
        answered("5.1: DATA after a response", end(), stream(STREAM_CLOSED)),
        answered("5.1: HEADERS after a response", ask(1), closed()),
        answered("5.1: CONTINUATION after a response", continuation, connection(PROTOCOL_ERROR)),
        answered("5.1: allowed frames after a response", allowed(), served()).on(3),
    ]
}

#[test]
fn frames_in_the_wrong_stream_state_get_the_error_of_their_rule() {
    let probes = [idle_streams(), half_closed_streams(), closed_streams()].concat();
    ProbedSidecar::start().check_all(&probes);
}

fn priorities_and_resets() -> Vec<Http2Probe> {
    let sized = |name, kind, payload: &[u8], expected| {
        let frames = [hold(1), frame(kind, NONE, 1, payload)];
        Http2Probe::new(name, &frames, expected).after_request().allows_general_code()
    };
    let own = [frame(PRIORITY, NONE, 1, &DEPENDS_ON_1), ask(1)];
    vec![
        violation("6.3: PRIORITY on stream 0", priority(0), PROTOCOL_ERROR),
        violation("6.4: RST_STREAM on stream 0", reset(0), PROTOCOL_ERROR),
        sized("6.3: PRIORITY of four bytes", PRIORITY, &[0; 4], stream(FRAME_SIZE_ERROR)),
        sized("6.3: PRIORITY of six bytes", PRIORITY, &[0; 6], stream(FRAME_SIZE_ERROR)),
        sized("6.4: RST_STREAM of three bytes", RST_STREAM, &[0; 3], connection(FRAME_SIZE_ERROR)),
        sized("6.4: RST_STREAM of five bytes", RST_STREAM, &[0; 5], connection(FRAME_SIZE_ERROR)),
        Http2Probe::new(
            "5.3.1: a stream that depends on itself",
            &own,
            any(&[served(), malformed()]),
        ),
    ]
}

fn settings() -> Vec<Http2Probe> {
    let sized = |name, flags, payload: &[u8]| {
        violation(name, frame(SETTINGS, flags, 0, payload), FRAME_SIZE_ERROR).allows_general_code()
    };
    let value = |name, id, value| violation(name, set(id, value), PROTOCOL_ERROR);
    let limits = [
        set(MAX_FRAME_SIZE, (1 << 24) - 1),
        set(MAX_FRAME_SIZE, 16_384),
        set(INITIAL_WINDOW_SIZE, LARGEST_WINDOW),
        set(ENABLE_PUSH, 1),
        set(ENABLE_PUSH, 0),
        ask(1),
    ];
    let beyond = set(INITIAL_WINDOW_SIZE, LARGEST_WINDOW + 1);
    vec![
        violation("6.5: SETTINGS on a stream", frame(SETTINGS, NONE, 1, &[]), PROTOCOL_ERROR),
        sized("6.5: an ACK with a payload", ACK, &setting(MAX_FRAME_SIZE, 16_384)),
        sized("6.5: SETTINGS of five bytes", NONE, &[0; 5]),
        sized("6.5: SETTINGS of seven bytes", NONE, &[0; 7]),
        value("6.5.2: ENABLE_PUSH of 2", ENABLE_PUSH, 2),
        value("6.5.2: MAX_FRAME_SIZE of 16383", MAX_FRAME_SIZE, 16_383),
        value("6.5.2: MAX_FRAME_SIZE of 2^24", MAX_FRAME_SIZE, 1 << 24),
        violation("6.5.2: INITIAL_WINDOW_SIZE of 2^31", beyond, FLOW_CONTROL_ERROR)
            .allows_general_code(),
        Http2Probe::new("6.5.2: the largest and smallest values", &limits, served()),
    ]
}

fn pings_and_goaways() -> Vec<Http2Probe> {
    let sized = |name, kind, flags, payload: &[u8]| {
        violation(name, frame(kind, flags, 0, payload), FRAME_SIZE_ERROR).allows_general_code()
    };
    let goaway = |payload: &[u8]| frame(GOAWAY, NONE, 0, payload);
    let unknown = goaway(&[0, 0, 0, 0, 0xde, 0xad, 0, 0, b'x']);
    let answer = frame(PING, ACK, 0, &[0; 8]);
    vec![
        violation("6.7: PING on a stream", frame(PING, NONE, 1, &[0; 8]), PROTOCOL_ERROR),
        sized("6.7: PING of seven bytes", PING, NONE, &[0; 7]),
        sized("6.7: PING of nine bytes", PING, NONE, &[0; 9]),
        sized("6.7: an ACK of nine bytes", PING, ACK, &[0; 9]),
        Http2Probe::new("6.7: an ACK without a PING", &[answer, ask(1)], served()),
        violation("6.8: GOAWAY on a stream", frame(GOAWAY, NONE, 1, &[0; 8]), PROTOCOL_ERROR),
        sized("4.2: GOAWAY of seven bytes", GOAWAY, NONE, &[0; 7]),
        Http2Probe::new("6.8: GOAWAY after a request", &[ask(1), goaway(&[0; 8])], served()),
        Http2Probe::new("7: GOAWAY with an unknown error code", &[ask(1), unknown], served()),
    ]
}

fn windows() -> Vec<Http2Probe> {
    let sized = |name, stream, payload: &[u8]| {
        let frames = [hold(1), frame(WINDOW_UPDATE, NONE, stream, payload)];
        let probe = Http2Probe::new(name, &frames, connection(FRAME_SIZE_ERROR));
        probe.after_request().allows_general_code()
    };
    let on_stream = |name, by, expected| {
        Http2Probe::new(name, &[hold(1), window(1, by)], expected).after_request()
    };
    let most = LARGEST_WINDOW - 65_535;
    let late = [hold(1), window(1, most), set(INITIAL_WINDOW_SIZE, 65_536)];
    vec![
        sized("6.9: WINDOW_UPDATE of three bytes", 0, &[0; 3]),
        sized("6.9: WINDOW_UPDATE of five bytes", 0, &[0; 5]),
        sized("6.9: WINDOW_UPDATE of five bytes on a stream", 1, &[0; 5]),
        violation("6.9: increment of 0", window(0, 0), PROTOCOL_ERROR),
        on_stream("6.9: increment of 0 on a stream", 0, stream(PROTOCOL_ERROR)),
        Http2Probe::new("6.9: the reserved bit", &[window(0, 0x8000_0001), ask(1)], served()),
        Http2Probe::new("6.9.1: the largest window", &[window(0, most), ask(1)], served()),
        violation("6.9.1: beyond the largest window", window(0, most + 1), FLOW_CONTROL_ERROR),
        on_stream(
            "6.9.1: beyond the largest window of a stream",
            most + 1,
            stream(FLOW_CONTROL_ERROR),
        ),
        Http2Probe::new(
            "6.9.2: beyond the largest window by a setting",
            &late,
            connection(FLOW_CONTROL_ERROR),
        )
        .after_request(),
    ]
}

#[test]
fn malformed_control_frames_get_an_error() {
    let probes = [priorities_and_resets(), settings(), pings_and_goaways(), windows()];
    ProbedSidecar::start().check_all(&probes.concat());
}

#[test]
fn malformed_control_frames_get_the_exact_error_code() {
    let probes = [priorities_and_resets(), settings(), pings_and_goaways(), windows()].concat();
    let strict: Vec<Http2Probe> =
        probes.into_iter().filter_map(Http2Probe::with_exact_code).collect();
    ProbedSidecar::start().check_all(&strict);
}

#[test]
#[ignore = "the h2 library reports PROTOCOL_ERROR for HPACK errors and for half-closed streams"]
fn hpack_and_half_closed_stream_violations_get_the_exact_error_code() {
    let probes = [hpack(), half_closed_streams()].concat();
    let loose: Vec<Http2Probe> =
        probes.into_iter().filter_map(Http2Probe::with_exact_code).collect();
    ProbedSidecar::start().check_all(&loose);
}

/// Begins a connection with these bytes. Returns the outcome of stream 1, and whether its request reached the service.
fn begin(probed: &ProbedSidecar, bytes: &[&[u8]]) -> (StreamOutcome, bool) {
    let mut client = Http2FrameClient::without_preface(probed.sidecar.port);
    client.send(&bytes.concat());
    let outcome = client.outcome(1);
    probed.assert_others_served("another connection start");
    let received = probed.service.take();
    (outcome, received.iter().any(|request| is_head(request, "/")))
}

fn is_head(request: &RecordedRequest, path: &str) -> bool {
    matches!(request, RecordedRequest::Head(head) if head.starts_with(&format!("GET {path} ")))
}

#[test]
fn connection_without_the_preface_is_closed() {
    let probed = ProbedSidecar::start();
    let hello = frame(SETTINGS, NONE, 0, &[]);
    let whole = begin(&probed, &[PREFACE, &hello, &ask(1)]);
    assert_eq!(whole, (StreamOutcome::Answered(200), true), "3.4: all at once");
    let another = b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n";
    let (outcome, served) = begin(&probed, &[another, &hello, &ask(1)]);
    // A client of another protocol need not get a GOAWAY (section 3.4).
    let allowed = [StreamOutcome::Goaway(PROTOCOL_ERROR), StreamOutcome::Closed];
    assert!(allowed.contains(&outcome) && !served, "3.4: another preface: {outcome:?}");
}

#[test]
fn connection_whose_first_frame_is_not_settings_is_closed() {
    let probed = ProbedSidecar::start();
    let first = [
        ("PING", ping()),
        ("WINDOW_UPDATE", window(0, 1)),
        ("an unknown frame type", frame(UNKNOWN, NONE, 0, &[])),
        ("an ACK", frame(SETTINGS, ACK, 0, &[])),
        ("a request", Vec::new()),
    ];
    let wrong: Vec<_> = first
        .iter()
        .map(|(name, frame)| (name, begin(&probed, &[PREFACE, frame, &ask(1)])))
        .filter(|(_, end)| *end != (StreamOutcome::Goaway(PROTOCOL_ERROR), false))
        .collect();
    assert!(wrong.is_empty(), "3.4: {wrong:?}");
}

#[test]
fn stream_beyond_max_concurrent_streams_is_refused() {
    let probed = ProbedSidecar::start();
    let mut client = probed.connect();
    let settings = client.find("SETTINGS", |frame| frame.kind == SETTINGS && frame.flags == NONE);
    let mut values = settings.payload.chunks_exact(6);
    let id = MAX_CONCURRENT_STREAMS.to_be_bytes();
    let limit =
        values.find(|setting| setting.starts_with(&id)).expect("the sidecar announces a limit");
    let limit = u32::from_be_bytes(limit[2..].try_into().expect("four bytes"));
    for number in 0..limit {
        assert!(client.send(&hold(2 * number + 1)), "stream {number} of {limit}");
    }
    let beyond = 2 * limit + 1;
    client.send(&headers(WHOLE, beyond, &get("/beyond")));
    let outcome = client.outcome(beyond);
    let allowed = any(&[stream(PROTOCOL_ERROR), stream(REFUSED_STREAM)]);
    assert!(allowed.contains(&outcome), "5.1.2: stream {limit}: {outcome:?}");
    client.send(&[reset(1), ask(beyond + 2)].concat());
    assert_eq!(
        client.outcome(beyond + 2),
        StreamOutcome::Answered(200),
        "a new stream is served after one has ended"
    );
    assert!(!probed.service.take().iter().any(|request| is_head(request, "/beyond")));
}
