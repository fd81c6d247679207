//! Clients that take their time: none holds a place for longer than the configuration gives it, memory
//! does not grow, and others are served meanwhile.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use weft_integration::bootstrap::{http, route_to, with};
use weft_integration::http2_frames::flag::{ACK, END_HEADERS, END_STREAM, NONE, WHOLE};
use weft_integration::http2_frames::{
    Http2FrameClient, PREFACE, ReceiveError, StreamOutcome, frame, get, headers, kind, setting,
};
use weft_integration::http2_probe::{POST, ProbedSidecar};
use weft_integration::wait::{DEADLINE, eventually};

const CLIENTS: usize = 50;
const GROWTH_BYTES: u64 = 10 * 1024 * 1024;
/// How long a slow client waits before its next byte: the time is far above what a byte needs, and far
/// below what a head may take.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves where heads may take a second, request bodies and answers two each, and nothing may be idle for
/// more than three.
fn impatient() -> ProbedSidecar {
    let http = http(&route_to("service", 2), &[]);
    let http = with(http, "request_headers_timeout", json!("1s"));
    let http = with(http, "request_timeout", json!("2s"));
    let idle: Value = json!({"idle_timeout": "3s"});
    ProbedSidecar::serving(with(http, "common_http_protocol_options", idle))
}

/// Sends bytes one by one, the last for ever again, until something comes back; what that begins with.
fn dribble(port: u16, at_once: &[u8], bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
    stream.set_read_timeout(Some(PAUSE)).expect("it is above zero");
    stream.write_all(at_once).expect("it is open");
    let last = bytes.last().expect("there is a byte");
    let mut bytes = bytes.iter().chain(std::iter::repeat(last));
    let mut answer = [0; 256];
    loop {
        // It may be closed by now, which reading will tell.
        drop(stream.write_all(&[*bytes.next().expect("it goes on for ever")]));
        match stream.read(&mut answer) {
            // The rest of the buffer is zeros.
            Ok(_) => return String::from_utf8_lossy(&answer).into_owned(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return error.to_string(),
        }
    }
}

/// Many clients at once that dribble; others are served meanwhile, and each ends with `status`.
fn check(name: &str, at_once: &[u8], bytes: &[u8], status: &str) {
    let mut world = impatient();
    world.assert_others_served("nobody");
    let before = world.sidecar.resident_memory();
    let port = world.sidecar.port;
    std::thread::scope(|scope| {
        let dribble = || dribble(port, at_once, bytes);
        let slow: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(dribble)).collect();
        while !slow.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            world.assert_others_served(name);
        }
        for client in slow {
            let answer = client.join().expect("it ends");
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{name}: {answer:?}");
        }
    });
    let grown = world.sidecar.peak_memory().saturating_sub(before);
    assert!(grown < GROWTH_BYTES, "{name}: it grew by {grown} bytes");
    nothing_is_left(&mut world, name);
}

fn nothing_is_left(world: &mut ProbedSidecar, of: &str) {
    eventually(format!("nothing is left of {of}"), || {
        (world.sidecar.metric("weft_sidecar_requests_open") == 0).then_some(())
    });
    let process = &mut world.sidecar.process;
    assert!(process.is_running() && !process.errors().contains("panicked"), "{process:?}: {of}");
}

#[test]
fn a_slow_head_is_ended_with_408() {
    check("a slow head", b"", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: b", "408");
    check("slow fields", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: ", b"b", "408");
}

#[test]
fn slow_body_is_refused_with_408_by_the_request_timeout() {
    let head = |field| format!("POST / HTTP/1.1\r\nhost: a\r\n{field}\r\n\r\n");
    check("a slow body", head("content-length: 1000").as_bytes(), b"x", "408");
    check("a slow chunk", head("transfer-encoding: chunked").as_bytes(), b"400\r\nx", "408");
}

/// Clients that ask for much and take nothing.
#[test]
fn a_slow_reader_costs_no_memory() {
    let mut world = impatient();
    world.assert_others_served("nobody");
    let before = world.sidecar.resident_memory();
    let ask = |_| {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, world.sidecar.port))?;
        stream.write_all(b"GET /bytes/8000000 HTTP/1.1\r\nhost: a\r\n\r\n")?;
        Ok::<_, std::io::Error>(stream)
    };
    let slow: Result<Vec<TcpStream>, _> = (0..20).map(ask).collect();
    let slow = slow.expect("they are taken in");
    none_waits_for_ever(&world, 20);
    let grown = world.sidecar.peak_memory().saturating_sub(before);
    assert!(grown < GROWTH_BYTES, "it grew by {grown} bytes");
    for mut stream in slow {
        stream.set_read_timeout(Some(DEADLINE)).expect("it is above zero");
        let taken = std::io::copy(&mut stream, &mut std::io::sink());
        // Less than was announced, or a reset: it can tell that it did not get all.
        assert!(taken.as_ref().map_or(true, |bytes| *bytes < 8_000_000), "{taken:?}");
    }
    nothing_is_left(&mut world, "slow readers");
}

/// The same over streams whose windows stay shut.
#[test]
fn a_shut_window_costs_no_memory() {
    const STREAMS: u32 = 50;
    let mut world = impatient();
    world.assert_others_served("nobody");
    let before = world.sidecar.resident_memory();
    let mut client = Http2FrameClient::with_settings(world.sidecar.port, &setting(4, 0));
    for number in 0..STREAMS {
        client.send(&headers(WHOLE, 2 * number + 1, &get("/bytes/8000000")));
    }
    none_waits_for_ever(&world, STREAMS);
    let grown = world.sidecar.peak_memory().saturating_sub(before);
    assert!(grown < GROWTH_BYTES, "it grew by {grown} bytes");
    nothing_is_left(&mut world, "shut windows");
}

/// Waits until so many requests are open, and then until none is; others are served meanwhile.
fn none_waits_for_ever(world: &ProbedSidecar, requests: u32) {
    let open = || world.sidecar.metric("weft_sidecar_requests_open");
    eventually("all wait", || (open() >= requests.into()).then_some(()));
    eventually("none waits for ever", || {
        world.assert_others_served("those that wait");
        (open() == 0).then_some(())
    });
}

/// Whether a connection is closed in the end. Its client may answer PINGs, which come before that.
fn is_closed(client: &mut Http2FrameClient, answers: bool) -> bool {
    loop {
        match client.receive() {
            Ok(ping) if answers && ping.kind == kind::PING && ping.flags == NONE => {
                client.send(&frame(kind::PING, ACK, 0, &ping.payload));
            }
            Ok(_) => {}
            Err(end) => return end == ReceiveError::Closed,
        }
    }
}

/// What a client may begin with, and then stop.
fn beginnings() -> [(&'static str, Vec<u8>); 4] {
    let hello = [PREFACE, &frame(kind::SETTINGS, NONE, 0, &[])].concat();
    let half = [&hello[..], &headers(END_STREAM, 1, &get("/"))].concat();
    let cut = [&hello[..], &[0, 0]].concat();
    let alone = PREFACE.to_vec();
    [("a preface", alone), ("SETTINGS", hello), ("half a head", half), ("half a frame", cut)]
}

#[test]
fn a_preface_that_does_not_end_is_ended() {
    let world = impatient();
    for length in [2, 20] {
        let mut client = Http2FrameClient::without_preface(world.sidecar.port);
        client.send(&PREFACE[..length]);
        assert!(is_closed(&mut client, true), "{length} bytes of a preface");
    }
    world.assert_others_served("half a preface");
}

#[test]
fn a_client_of_http2_that_stops_is_ended() {
    let world = impatient();
    for (name, beginning) in beginnings() {
        let mut client = Http2FrameClient::without_preface(world.sidecar.port);
        client.send(&beginning);
        assert!(is_closed(&mut client, true), "{name}");
    }
    world.assert_others_served("beginnings");
}

#[test]
fn a_client_of_http2_that_falls_silent_is_ended() {
    let world = impatient();
    let begun = beginnings().map(|(name, beginning)| {
        let mut client = Http2FrameClient::without_preface(world.sidecar.port);
        client.send(&beginning);
        (name, client)
    });
    for (name, mut client) in begun {
        assert!(is_closed(&mut client, false), "{name}");
    }
    world.assert_others_served("beginnings");
}

#[test]
fn a_body_that_does_not_come_over_http2_is_ended() {
    let mut world = impatient();
    let mut client = world.connect();
    client.send(&headers(END_HEADERS, 1, &POST));
    client.send(&frame(kind::DATA, NONE, 1, b"x"));
    assert_eq!(client.outcome(1), StreamOutcome::Answered(408));
    nothing_is_left(&mut world, "half a body");
}
