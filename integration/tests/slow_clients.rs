//! Slow clients: each is disconnected by a timeout, memory does not grow, and other clients are
//! served meanwhile.

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
/// The pause of a slow client before its next byte: much longer than a byte needs, and much shorter
/// than the timeout of a head.
const PAUSE: Duration = Duration::from_millis(200);

/// A sidecar with a timeout of one second for heads, two seconds each for request bodies and
/// responses, and an idle timeout of three seconds.
fn with_short_timeouts() -> ProbedSidecar {
    let http = http(&route_to("service", 2), &[]);
    let http = with(http, "request_headers_timeout", json!("1s"));
    let http = with(http, "request_timeout", json!("2s"));
    let idle: Value = json!({"idle_timeout": "3s"});
    ProbedSidecar::serving(with(http, "common_http_protocol_options", idle))
}

/// Sends `at_once`, then `bytes` one by one, repeating the last one, until a response is received;
/// returns its first bytes.
fn send_slowly(port: u16, at_once: &[u8], bytes: &[u8]) -> String {
    let mut stream =
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the port accepts connections");
    stream.set_read_timeout(Some(PAUSE)).expect("the timeout is not zero");
    stream.write_all(at_once).expect("the connection is open");
    let last = bytes.last().expect("there is a byte to send");
    let mut bytes = bytes.iter().chain(std::iter::repeat(last));
    let mut answer = [0; 256];
    loop {
        // The connection may be closed already; the read below detects that.
        drop(stream.write_all(&[*bytes.next().expect("the iterator is endless")]));
        match stream.read(&mut answer) {
            // The rest of the buffer is zeros.
            Ok(_) => return String::from_utf8_lossy(&answer).into_owned(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return error.to_string(),
        }
    }
}

/// Runs many slow clients; other clients are served meanwhile, and each slow client ends with
/// `status`.
fn check(name: &str, at_once: &[u8], bytes: &[u8], status: &str) {
    let mut setup = with_short_timeouts();
    setup.assert_others_served("the first measurement");
    let before = setup.sidecar.resident_memory();
    let port = setup.sidecar.port;
    std::thread::scope(|scope| {
        let send_slowly = || send_slowly(port, at_once, bytes);
        let slow: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(send_slowly)).collect();
        while !slow.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            setup.assert_others_served(name);
        }
        for client in slow {
            let answer = client.join().expect("the client does not panic");
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{name}: {answer:?}");
        }
    });
    let grown = setup.sidecar.peak_memory().saturating_sub(before);
    assert!(grown < GROWTH_BYTES, "{name}: memory grew by {grown} bytes");
    assert_all_released(&mut setup, name);
}

fn assert_all_released(setup: &mut ProbedSidecar, of: &str) {
    eventually(format!("all connections of {of} are closed"), || {
        (setup.sidecar.metric("weft_sidecar_requests_open") == 0).then_some(())
    });
    let process = &mut setup.sidecar.process;
    assert!(process.is_running() && !process.errors().contains("panicked"), "{process:?}: {of}");
}

#[test]
fn slow_request_head_gets_408() {
    check("a slow head", b"", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: b", "408");
    check("slow headers", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: ", b"b", "408");
}

#[test]
fn slow_request_body_gets_408() {
    let head = |field| format!("POST / HTTP/1.1\r\nhost: a\r\n{field}\r\n\r\n");
    check("a slow body", head("content-length: 1000").as_bytes(), b"x", "408");
    check("a slow chunk", head("transfer-encoding: chunked").as_bytes(), b"400\r\nx", "408");
}

/// Clients that request large responses and read nothing.
#[test]
fn slow_readers_cost_no_memory() {
    let mut setup = with_short_timeouts();
    setup.assert_others_served("the first measurement");
    let before = setup.sidecar.resident_memory();
    let ask = |_| {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, setup.sidecar.port))?;
        stream.write_all(b"GET /bytes/8000000 HTTP/1.1\r\nhost: a\r\n\r\n")?;
        Ok::<_, std::io::Error>(stream)
    };
    let slow: Result<Vec<TcpStream>, _> = (0..20).map(ask).collect();
    let slow = slow.expect("the connections are accepted");
    assert_requests_time_out(&setup, 20);
    let grown = setup.sidecar.peak_memory().saturating_sub(before);
    assert!(grown < GROWTH_BYTES, "memory grew by {grown} bytes");
    for mut stream in slow {
        stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        let taken = std::io::copy(&mut stream, &mut std::io::sink());
        // The response is shorter than announced, or the connection is reset: the client can detect
        // that it is incomplete.
        assert!(taken.as_ref().map_or(true, |bytes| *bytes < 8_000_000), "{taken:?}");
    }
    assert_all_released(&mut setup, "slow readers");
}

/// The same over HTTP/2 streams whose windows stay closed.
#[test]
fn streams_with_closed_windows_cost_no_memory() {
    const STREAMS: u32 = 50;
    let mut setup = with_short_timeouts();
    setup.assert_others_served("the first measurement");
    let before = setup.sidecar.resident_memory();
    let mut client = Http2FrameClient::with_settings(setup.sidecar.port, &setting(4, 0));
    for number in 0..STREAMS {
        client.send(&headers(WHOLE, 2 * number + 1, &get("/bytes/8000000")));
    }
    assert_requests_time_out(&setup, STREAMS);
    let grown = setup.sidecar.peak_memory().saturating_sub(before);
    assert!(grown < GROWTH_BYTES, "memory grew by {grown} bytes");
    assert_all_released(&mut setup, "closed windows");
}

/// Waits until this many requests are open, and then until none is; other clients are served
/// meanwhile.
fn assert_requests_time_out(setup: &ProbedSidecar, requests: u32) {
    let open = || setup.sidecar.metric("weft_sidecar_requests_open");
    eventually("all requests are open", || (open() >= requests.into()).then_some(()));
    eventually("all requests are timed out", || {
        setup.assert_others_served("the open requests");
        (open() == 0).then_some(())
    });
}

/// Whether the connection is closed within the deadline. The client may answer PINGs, which the
/// sidecar sends first.
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

/// Incomplete starts of an HTTP/2 connection.
fn incomplete_starts() -> [(&'static str, Vec<u8>); 4] {
    let hello = [PREFACE, &frame(kind::SETTINGS, NONE, 0, &[])].concat();
    let half = [&hello[..], &headers(END_STREAM, 1, &get("/"))].concat();
    let cut = [&hello[..], &[0, 0]].concat();
    let preface = PREFACE.to_vec();
    [("a preface", preface), ("SETTINGS", hello), ("half a head", half), ("half a frame", cut)]
}

#[test]
fn incomplete_http2_preface_is_disconnected() {
    let setup = with_short_timeouts();
    for length in [2, 20] {
        let mut client = Http2FrameClient::without_preface(setup.sidecar.port);
        client.send(&PREFACE[..length]);
        assert!(is_closed(&mut client, true), "{length} bytes of a preface");
    }
    setup.assert_others_served("half a preface");
}

#[test]
fn http2_client_that_stops_sending_is_disconnected() {
    let setup = with_short_timeouts();
    for (name, beginning) in incomplete_starts() {
        let mut client = Http2FrameClient::without_preface(setup.sidecar.port);
        client.send(&beginning);
        assert!(is_closed(&mut client, true), "{name}");
    }
    setup.assert_others_served("beginnings");
}

#[test]
fn http2_client_that_ignores_pings_is_disconnected() {
    let setup = with_short_timeouts();
    let begun = incomplete_starts().map(|(name, beginning)| {
        let mut client = Http2FrameClient::without_preface(setup.sidecar.port);
        client.send(&beginning);
        (name, client)
    });
    for (name, mut client) in begun {
        assert!(is_closed(&mut client, false), "{name}");
    }
    setup.assert_others_served("beginnings");
}

#[test]
fn incomplete_http2_request_body_is_timed_out() {
    let mut setup = with_short_timeouts();
    let mut client = setup.connect();
    client.send(&headers(END_HEADERS, 1, &POST));
    client.send(&frame(kind::DATA, NONE, 1, b"x"));
    assert_eq!(client.outcome(1), StreamOutcome::Answered(408));
    assert_all_released(&mut setup, "half a body");
}
