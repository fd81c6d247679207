//! What ordinary clients and services do, which a proxy must not break.

use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};
use weft_integration::alone::{Alone, Speaks, Wanted};
use weft_integration::backend::{Backend, read_head};
use weft_integration::bootstrap::allow_only;
use weft_integration::http1::Client;
use weft_integration::origin::Origin;
use weft_integration::wait::DEADLINE;

/// A sidecar whose only route has this timeout.
fn with_route_timeout(port: u16, timeout: &str) -> Alone {
    let mut wanted = Wanted::before(port, Speaks::Http1);
    let path = "/route_config/virtual_hosts/0/routes/0/route/timeout";
    *wanted.http.pointer_mut(path).expect("the route has a timeout") = json!(timeout);
    wanted.start()
}

/// Sends a body of so many bytes, one each 100 ms, and reads the first line of the answer.
fn upload_slowly(port: u16, bytes: usize) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the sidecar listens");
    let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {bytes}\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("the sidecar takes a head");
    // An answer before the last byte ends the pauses, and is what the caller then sees.
    stream.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout above zero");
    let mut answer = vec![0; 64];
    for _ in 0..bytes {
        stream.write_all(b"x").expect("the sidecar takes the body");
        match stream.peek(&mut answer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Ok(_) | Err(_) => break,
        }
    }
    stream.set_read_timeout(Some(DEADLINE)).expect("a deadline above zero");
    let read = stream.read(&mut answer).expect("an answer comes");
    let answer = String::from_utf8_lossy(answer.get(..read).unwrap_or_default()).into_owned();
    answer.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn upload_longer_than_the_route_timeout_is_served() {
    let origin = Origin::start();
    let alone = with_route_timeout(origin.port, "0.5s");
    assert_eq!(upload_slowly(alone.port, 15), "HTTP/1.1 200 OK");
}

#[test]
fn route_timeout_begins_when_a_slow_upload_ends() {
    let alone = with_route_timeout(Backend::silent().port, "0.5s");
    assert_eq!(upload_slowly(alone.port, 15), "HTTP/1.1 504 Gateway Timeout");
    let line = alone.access_line("upstream_timeout");
    let took = line.get("duration_us").and_then(Value::as_u64).unwrap_or(0);
    assert!(took >= 1_900_000, "1.5 s of upload and 0.5 s of silence: {line}");
}

const MEBIBYTE: usize = 1024 * 1024;

/// Sends a whole body before it reads anything, as most clients of HTTP/1.1 do; the status of the answer, 0
/// when there is none.
fn upload_first(port: u16, path: &str, bytes: usize) -> u16 {
    let mut client = Client::connect(port);
    client.send(format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {bytes}\r\n\r\n"));
    let piece = vec![b'x'; MEBIBYTE];
    for _ in 0..bytes / MEBIBYTE {
        if !client.send(&piece) {
            return 0;
        }
    }
    client.answer("POST").status
}

#[track_caller]
fn check_uploads(alone: &Alone, name: &str, status: u16) {
    for bytes in [MEBIBYTE, 5 * MEBIBYTE, 64 * MEBIBYTE] {
        let answers: Vec<u16> = (0..8).map(|_| upload_first(alone.port, "/", bytes)).collect();
        assert_eq!(answers, [status; 8], "{name}: {bytes} bytes");
    }
}

#[test]
fn refusal_reaches_a_client_that_uploads() {
    let mut wanted = Wanted::before(Backend::silent().port, Speaks::Http1);
    let filters = wanted.http["http_filters"].as_array_mut().expect("filters are a list");
    filters.insert(0, allow_only("nobody", "/"));
    check_uploads(&wanted.start(), "by policy", 403);
}

#[test]
fn early_answer_of_a_service_reaches_a_client_that_uploads() {
    let answer =
        "HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 5\r\n\r\nlarge";
    let closing = Backend::answering(answer);
    let alone = Wanted::before(closing.port, Speaks::Http1).start();
    check_uploads(&alone, "a service that closes", 413);
    let kept = Mutex::new(Vec::new());
    let keeping = Backend::start(move |stream| {
        let mut reader = BufReader::new(stream);
        if read_head(&mut reader).is_some() {
            // A sidecar that is gone shows in the answers.
            drop(reader.get_mut().write_all(answer.as_bytes()));
            kept.lock().expect("no thread panics").push(reader);
        }
    });
    let alone = Wanted::before(keeping.port, Speaks::Http1).start();
    check_uploads(&alone, "a service that stops reading", 413);
}

/// How often the threads of a process have gone to sleep, which they do once for each time they are woken.
fn wake_ups(process: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("it is running");
    let sleeps = tasks.flatten().map(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or(0)
    });
    sleeps.sum()
}

#[test]
fn half_a_preface_costs_no_polling_and_is_refused_with_408() {
    let alone = Wanted::before(Backend::silent().port, Speaks::Http1)
        .with("request_headers_timeout", json!("2s"))
        .start();
    for bytes in ["P", "PR", "PRI"] {
        let mut client = Client::connect(alone.port);
        let before = wake_ups(alone.sidecar.process.id());
        for byte in bytes.chars() {
            assert!(client.send(byte.to_string()));
        }
        assert_eq!(client.answer("GET").status, 408, "{bytes}");
        let woken = wake_ups(alone.sidecar.process.id()) - before;
        // Two seconds of polling each millisecond are 2,000; workers look around twice a second.
        assert!(woken < 200, "{bytes}: {woken} wake-ups");
    }
}

#[test]
fn client_that_leaves_within_a_preface_is_seen_at_once() {
    let alone = Wanted::before(Backend::silent().port, Speaks::Http1)
        .with("request_headers_timeout", json!("1000s"))
        .start();
    for bytes in ["P", "PRI"] {
        let mut client = Client::connect(alone.port);
        assert!(client.send(bytes));
        client.finish();
        assert_eq!(client.answer("GET").status, 400, "{bytes}");
    }
}

#[test]
fn preface_in_pieces_and_a_method_like_it_are_served() {
    let origin = Origin::start();
    let alone = Wanted::before(origin.port, Speaks::Http1).start();
    let mut client = Client::connect(alone.port);
    for piece in ["P", "RI", "NT / HTTP/1.1\r\n", "host: a\r\n\r\n"] {
        assert!(client.send(piece));
        // Between two pieces the sidecar answers another client, so the first has been read by then.
        assert!(alone.metric("weft_sidecar_connections_open") > 0);
    }
    assert_eq!(client.answer("PRINT").status, 200);
    let mut client = Client::connect(alone.port);
    for piece in ["P", "R", "I * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0"] {
        assert!(client.send(piece));
        // Between two pieces the sidecar answers another client, so the first has been read by then.
        assert!(alone.metric("weft_sidecar_connections_open") > 0);
    }
    // The head of its SETTINGS frame, of type 4.
    let settings = client.bytes(9).expect("the sidecar sends its SETTINGS");
    assert_eq!(settings.as_bytes().get(3), Some(&4), "{settings:?}");
}
