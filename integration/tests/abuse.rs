//! Clients that mean harm: each is ended soon, and nobody else feels it.

use weft_integration::curl::Curl;
use weft_integration::http2_frames::flag::NONE;
use weft_integration::http2_frames::{Http2FrameClient, StreamOutcome, code, frame, kind};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};
use weft_integration::wait::eventually;

/// How many frames a client may send at most before it is ended, with what waits in the sockets' buffers.
const FRAMES_AT_MOST: usize = 1_000_000;

/// Sends a frame again and again until the connection is ended; how many it took.
fn flood(port: u16, frame: &[u8]) -> usize {
    const AT_ONCE: usize = 1000;
    let mut client = Http2FrameClient::connect(port);
    let mut answers = client.reader();
    // Whoever floods may well read what is answered.
    let reader = std::thread::spawn(move || while answers.receive().is_ok() {});
    let frames = frame.repeat(AT_ONCE);
    let rounds = (0..FRAMES_AT_MOST / AT_ONCE).take_while(|_| client.send(&frames));
    let sent = rounds.count() * AT_ONCE;
    reader.join().expect("it reads to the end, whichever");
    sent
}

fn start() -> SidecarPair {
    SidecarPair::start(&PairConfig::http1(ScriptedServer::echoing_heads().port))
}

#[test]
fn floods_of_frames_are_ended_and_nobody_else_feels_them() {
    let pair = start();
    let port = pair.caller.port;
    assert_eq!(Curl::get(port, "/").run().status, 200);
    let before = pair.caller.resident_memory();
    let floods = [
        ("PING", frame(kind::PING, NONE, 0, &[7; 8])),
        ("SETTINGS", frame(kind::SETTINGS, NONE, 0, &[])),
        ("PRIORITY", frame(kind::PRIORITY, NONE, 1, &[0, 0, 0, 0, 1])),
        ("WINDOW_UPDATE", frame(kind::WINDOW_UPDATE, NONE, 0, &[0, 0, 0, 1])),
        ("an unknown kind", frame(kind::UNKNOWN, NONE, 0, &[0; 3])),
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
            (pair.caller.metric("weft_sidecar_floods_total") == number).then_some(())
        });
    }
    let grown = pair.caller.resident_memory().saturating_sub(before);
    assert!(grown < 10 * 1024 * 1024, "the sidecar grew by {grown} bytes");
}

#[test]
fn a_flood_is_told_to_calm_down() {
    let pair = start();
    let mut client = Http2FrameClient::connect(pair.caller.port);
    // Not many more than are allowed, so that all of them are read.
    client.send(&frame(kind::PRIORITY, NONE, 1, &[0, 0, 0, 0, 1]).repeat(10_100));
    assert_eq!(client.outcome(1), StreamOutcome::Goaway(code::ENHANCE_YOUR_CALM));
}

#[test]
fn whoever_is_served_may_go_on() {
    let pair = start();
    let mut h2load = std::process::Command::new("h2load");
    let url = format!("http://127.0.0.1:{}/", pair.caller.port);
    h2load.args(["-n", "10001", "-c", "1", "-m", "100", &url]);
    let told = weft_integration::process::run(&mut h2load);
    assert!(told.contains("10001 succeeded, 0 failed, 0 errored"), "{told}");
    assert_eq!(pair.caller.metric("weft_sidecar_floods_total"), 0);
}
