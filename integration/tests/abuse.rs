//! Clients that mean harm: each is ended soon, and nobody else feels it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use weft_integration::backend::Backend;
use weft_integration::curl::Curl;
use weft_integration::pair::{Pair, Wanted};
use weft_integration::wait::{DEADLINE, eventually};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: u8 = 4;
/// How many frames a client may send at most before it is ended, with what waits in the sockets' buffers.
const FRAMES_AT_MOST: usize = 1_000_000;
const ENHANCE_YOUR_CALM: [u8; 4] = [0, 0, 0, 11];

fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let [_, length @ ..] = length;
    [&length[..], &[kind, 0], &stream.to_be_bytes(), payload].concat()
}

/// A connection that has said hello.
fn begin(port: u16) -> TcpStream {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("it is above zero");
    stream.set_write_timeout(Some(DEADLINE)).expect("it is above zero");
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, &[])].concat()).expect("it is open");
    stream
}

/// Sends a frame again and again until the connection is ended; how many it took.
fn flood(port: u16, frame: &[u8]) -> usize {
    const AT_ONCE: usize = 1000;
    let mut stream = begin(port);
    let mut answers = stream.try_clone().expect("it can be");
    // Whoever floods may well read what is answered.
    let reader = std::thread::spawn(move || std::io::copy(&mut answers, &mut std::io::sink()));
    let frames = frame.repeat(AT_ONCE);
    let rounds = (0..FRAMES_AT_MOST / AT_ONCE).take_while(|_| stream.write_all(&frames).is_ok());
    let sent = rounds.count() * AT_ONCE;
    drop(reader.join().expect("it reads to the end, whichever"));
    sent
}

fn start() -> Pair {
    Pair::start(&Wanted::http1(Backend::telling_heads().port))
}

fn metric(pair: &Pair, name: &str) -> u64 {
    pair.caller.metric(name)
}

#[test]
fn floods_of_frames_are_ended_and_nobody_else_feels_them() {
    let pair = start();
    let port = pair.caller.port;
    let resident = || metric(&pair, "process_resident_memory_bytes");
    assert_eq!(Curl::get(port, "/").run().status, 200);
    let before = resident();
    let floods = [
        ("PING", frame(6, 0, &[7; 8])),
        ("SETTINGS", frame(SETTINGS, 0, &[])),
        ("PRIORITY", frame(2, 1, &[0, 0, 0, 0, 1])),
        ("WINDOW_UPDATE", frame(8, 0, &[0, 0, 0, 1])),
        ("an unknown kind", frame(0xfa, 0, &[0; 3])),
    ];
    for (number, (name, frame)) in (1..).zip(&floods) {
        std::thread::scope(|scope| {
            let flooding = scope.spawn(|| flood(port, frame));
            for _ in 0..20 {
                assert_eq!(Curl::get(port, "/").run().status, 200, "beside a flood of {name}");
            }
            let sent = flooding.join().expect("it ends");
            assert!(sent < FRAMES_AT_MOST, "{name}: {sent} frames, and no end");
        });
        eventually(format!("a flood of {name} is counted"), || {
            (metric(&pair, "weft_sidecar_floods_total") == number).then_some(())
        });
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 10 * 1024 * 1024, "the sidecar grew by {grown} bytes");
}

#[test]
fn a_flood_is_told_to_calm_down() {
    let pair = start();
    let mut stream = begin(pair.caller.port);
    // Not many more than are allowed, so that all of them are read.
    stream.write_all(&frame(2, 1, &[0, 0, 0, 0, 1]).repeat(10_100)).expect("it is open");
    let mut told = Vec::new();
    // It may end in a reset.
    drop(stream.read_to_end(&mut told));
    let goodbye = told.windows(4).any(|bytes| bytes == ENHANCE_YOUR_CALM);
    assert!(goodbye, "{told:?}");
}

#[test]
fn whoever_is_served_may_go_on() {
    let pair = start();
    let mut h2load = std::process::Command::new("h2load");
    let url = format!("http://127.0.0.1:{}/", pair.caller.port);
    h2load.args(["-n", "10001", "-c", "1", "-m", "100", &url]);
    let told = weft_integration::process::run(&mut h2load);
    assert!(told.contains("10001 succeeded, 0 failed, 0 errored"), "{told}");
    assert_eq!(metric(&pair, "weft_sidecar_floods_total"), 0);
}
