//! Acknowledgements and flow-control windows of HTTP/2 (RFC 9113, sections 5.2, 6.5.3, 6.7 and 6.9).

use std::io::Write;

use weft_integration::http2_frames::code::FLOW_CONTROL_ERROR;
use weft_integration::http2_frames::flag::{ACK, END_HEADERS, NONE, WHOLE};
use weft_integration::http2_frames::kind::{DATA, HEADERS, PING, SETTINGS};
use weft_integration::http2_frames::{Http2Frame, Http2FrameClient, frame, get, headers, setting};
use weft_integration::http2_probe::{
    FRAME_BYTES, INITIAL_WINDOW_SIZE, POST, ProbedSidecar, data, set, stream, window,
};

fn is_ack(kind: u8) -> impl Fn(&Http2Frame) -> bool {
    move |frame| frame.kind == kind && frame.flags & ACK != 0
}

#[test]
fn settings_and_pings_are_acknowledged() {
    let probed = ProbedSidecar::start();
    let mut client = probed.connect();
    let ack = client.find("ACK", is_ack(SETTINGS));
    assert_eq!((ack.stream, ack.payload.len()), (0, 0), "6.5.3");
    for payload in [*b"01234567", [0; 8], [0xff; 8]] {
        // The first PING is an ACK, which gets no response.
        client.send(&[frame(PING, ACK, 0, b"answered"), frame(PING, NONE, 0, &payload)].concat());
        let ack = client.find("ACK", is_ack(PING));
        assert_eq!((ack.stream, &ack.payload[..]), (0, &payload[..]), "6.7");
    }
    client.send(&set(INITIAL_WINDOW_SIZE, 1));
    client.find("second ACK", is_ack(SETTINGS));
}

/// The number of body bytes received: `awaited`, and any that arrive beyond that.
fn received(client: &mut Http2FrameClient, awaited: usize) -> usize {
    let mut bytes = 0;
    let mut take = |frame: &Http2Frame| {
        assert!(frame.payload.len() <= FRAME_BYTES, "4.2: {} bytes", frame.payload.len());
        bytes += frame.payload.len();
        bytes
    };
    while awaited > 0 && take(&client.find("DATA", |frame| frame.kind == DATA)) < awaited {}
    // After two round trips the sidecar has sent all that the windows allow.
    for _ in 0..2 {
        client.send(&frame(PING, NONE, 0, &[7; 8]));
        loop {
            let frame = client.find("frame", |frame| matches!(frame.kind, DATA | PING));
            if frame.kind == PING {
                break;
            }
            take(&frame);
        }
    }
    bytes
}

#[test]
fn responses_stay_within_the_client_windows() {
    let probed = ProbedSidecar::start();
    let small = setting(INITIAL_WINDOW_SIZE, 0);
    let mut client = Http2FrameClient::with_settings(probed.sidecar.port, &small);
    client.send(&headers(WHOLE, 1, &get("/bytes/100")));
    client.find("HEADERS", |frame| frame.kind == HEADERS);
    assert_eq!(received(&mut client, 0), 0, "6.9.2: a window of 0");
    client.send(&window(1, 10));
    assert_eq!(received(&mut client, 10), 10, "6.9: a window of 10");
    client.send(&set(INITIAL_WINDOW_SIZE, 5));
    assert_eq!(received(&mut client, 5), 5, "6.9.2: 5 more for each stream");
    client.send(&set(INITIAL_WINDOW_SIZE, 0));
    client.send(&window(1, 5));
    assert_eq!(received(&mut client, 0), 0, "6.9.2: a negative window");
    client.send(&window(1, 85));
    client.find("end", |frame| frame.stream == 1 && frame.ends_stream());

    let large = setting(INITIAL_WINDOW_SIZE, 1 << 20);
    let mut client = Http2FrameClient::with_settings(probed.sidecar.port, &large);
    client.send(&headers(WHOLE, 1, &get("/bytes/100000")));
    assert_eq!(received(&mut client, 65_535), 65_535, "6.9.1: the window of the connection");
    client.send(&window(0, 65_535));
    assert_eq!(received(&mut client, 34_465), 34_465, "6.9.1: the rest");
}

/// Sends more than the windows allow to a service that reads nothing.
#[test]
fn client_that_exceeds_the_sidecar_windows_gets_flow_control_error() {
    const FRAMES: usize = 4096;
    let probed = ProbedSidecar::start();
    let mut client = probed.connect();
    let post = [&POST[..3], &[(":path", "/unread")]].concat();
    client.send(&headers(END_HEADERS, 1, &post));
    let piece = data(NONE, 1, &[b'x'; FRAME_BYTES]);
    let sent = (0..FRAMES).take_while(|_| client.tcp().write_all(&piece).is_ok()).count();
    let outcome = client.outcome(1);
    let expected = stream(FLOW_CONTROL_ERROR);
    assert!(expected.contains(&outcome), "6.9.1: {outcome:?} after {sent} of {FRAMES} frames");
    probed.assert_others_served("an endless body");
}
