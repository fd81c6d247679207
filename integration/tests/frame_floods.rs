//! HTTP/2 frame floods: the sidecar closes the flooding connection soon, and other clients are not affected.

use weft_integration::curl::Curl;
use weft_integration::http2_frames::flag::NONE;
use weft_integration::http2_frames::{Http2FrameClient, StreamOutcome, code, frame, kind};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};
use weft_integration::wait::eventually;

/// Upper bound of the frames one client can send before its connection is closed, including what the socket buffers
/// hold.
const FRAMES_AT_MOST: usize = 1_000_000;

/// Sends a frame repeatedly until the connection is closed. Returns the number of frames sent.
fn flood(port: u16, frame: &[u8]) -> usize {
    const AT_ONCE: usize = 1000;
    let mut client = Http2FrameClient::connect(port);
    let mut answers = client.reader();
    // A flooding client may well read the responses.
    let reader = std::thread::spawn(move || while answers.receive().is_ok() {});
    let frames = frame.repeat(AT_ONCE);
    let rounds = (0..FRAMES_AT_MOST / AT_ONCE).take_while(|_| client.send(&frames));
    let sent = rounds.count() * AT_ONCE;
    reader.join().expect("the reader thread does not panic");
    sent
}

fn start() -> SidecarPair {
    SidecarPair::start(&PairConfig::http1(ScriptedServer::echoing_heads().port))
}

#[test]
fn frame_floods_are_cut_off_while_other_clients_are_served() {
    let pair = start();
    let port = pair.caller.port;
    assert_eq!(Curl::get(port, "/").run().status, 200);
    let before = pair.caller.resident_memory();
    let floods = [
        ("PING", frame(kind::PING, NONE, 0, &[7; 8])),
        ("SETTINGS", frame(kind::SETTINGS, NONE, 0, &[])),
        ("PRIORITY", frame(kind::PRIORITY, NONE, 1, &[0, 0, 0, 0, 1])),
        ("WINDOW_UPDATE", frame(kind::WINDOW_UPDATE, NONE, 0, &[0, 0, 0, 1])),
        ("an unknown frame type", frame(kind::UNKNOWN, NONE, 0, &[0; 3])),
    ];
    for (number, (name, frame)) in (1..).zip(&floods) {
        std::thread::scope(|scope| {
            let flooding = scope.spawn(|| flood(port, frame));
            for _ in 0..20 {
                assert_eq!(Curl::get(port, "/").run().status, 200, "during a flood of {name}");
            }
            let sent = flooding.join().expect("the flooding thread does not panic");
            assert!(sent < FRAMES_AT_MOST, "{name}: connection still open after {sent} frames");
        });
        eventually(format!("the flood of {name} is counted"), || {
            (pair.caller.metric("weft_sidecar_http2_flood_disconnects_total") == number)
                .then_some(())
        });
    }
    let grown = pair.caller.resident_memory().saturating_sub(before);
    assert!(grown < 10 * 1024 * 1024, "the sidecar grew by {grown} bytes");
}

#[test]
fn flooding_client_gets_goaway_enhance_your_calm() {
    let pair = start();
    let mut client = Http2FrameClient::connect(pair.caller.port);
    // Only slightly more frames than allowed, so that the sidecar reads all of them.
    client.send(&frame(kind::PRIORITY, NONE, 1, &[0, 0, 0, 0, 1]).repeat(10_100));
    assert_eq!(client.outcome(1), StreamOutcome::Goaway(code::ENHANCE_YOUR_CALM));
}

#[test]
fn client_with_many_served_requests_is_not_counted_as_flood() {
    let pair = start();
    let mut h2load = std::process::Command::new("h2load");
    let url = format!("http://127.0.0.1:{}/", pair.caller.port);
    h2load.args(["-n", "10001", "-c", "1", "-m", "100", &url]);
    let output = weft_integration::process::run(&mut h2load);
    assert!(output.contains("10001 succeeded, 0 failed, 0 errored"), "{output}");
    assert_eq!(pair.caller.metric("weft_sidecar_http2_flood_disconnects_total"), 0);
}
