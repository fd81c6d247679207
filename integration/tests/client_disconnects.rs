//! Clients that disconnect before they have their response. Both sidecars cancel the request and close the upstream
//! connection, without any timeout.

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};

use weft_integration::process::Process;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair, TestSidecar};
use weft_integration::wait::{DEADLINE, eventually};

/// An upstream of two sidecars that sends `response` and then only reads. The receiver gets `"request"` when a
/// request arrives, and `"closed"` when its connection ends.
fn reading_upstream(response: &'static [u8]) -> (SidecarPair, Receiver<&'static str>) {
    let (sender, events) = channel();
    let sender = Mutex::new(sender);
    let backend = ScriptedServer::start(move |stream| {
        let sender = sender.lock().expect("no thread panics while it holds the lock").clone();
        let mut reader = BufReader::new(stream);
        if read_head(&mut reader).is_none() {
            return;
        }
        sender.send("request").expect("the test receives events");
        let begun = reader.get_mut().write_all(response);
        drop(begun.and_then(|()| std::io::copy(&mut reader, &mut std::io::sink()).map(drop)));
        sender.send("closed").expect("the test receives events");
    });
    let pair =
        SidecarPair::start(&PairConfig { timeout_seconds: 0, ..PairConfig::http1(backend.port) });
    (pair, events)
}

#[track_caller]
fn assert_event(events: &Receiver<&'static str>, event: &str) {
    assert_eq!(events.recv_timeout(DEADLINE), Ok(event));
}

/// Waits until a sidecar has no open request and has counted `gone` requests of disconnected clients.
#[track_caller]
fn assert_cancelled(sidecar: &TestSidecar, gone: usize) {
    let gone = format!("weft_sidecar_requests_denied_total{{reason=\"client_gone\"}} {gone}");
    eventually(format!("{sidecar:?} reports {gone}"), || {
        let metrics = sidecar.metrics();
        let reports = |line: &str| metrics.lines().any(|reported| reported == line);
        (reports("weft_sidecar_requests_open 0") && reports(&gone)).then_some(())
    });
}

/// Sends `request` and waits until it arrives upstream and, if `responds`, for the first byte of the response.
#[track_caller]
fn begin(
    pair: &SidecarPair,
    events: &Receiver<&'static str>,
    request: &[u8],
    responds: bool,
) -> TcpStream {
    let mut client = TcpStream::connect(pair.address()).expect("the sidecar listens");
    client.write_all(request).expect("the sidecar reads");
    assert_event(events, "request");
    if responds {
        client.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        client.read_exact(&mut [0]).expect("the response begins");
    }
    client
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

#[test]
fn http1_client_that_disconnects_while_waiting_cancels_its_request() {
    let (pair, events) = reading_upstream(b"");
    let upgrade = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let pipelined = [GET, GET].concat();
    let upload = b"PUT / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n";
    for (turn, request) in [GET, upgrade, &pipelined, upload].into_iter().enumerate() {
        drop(begin(&pair, &events, request, false));
        assert_event(&events, "closed");
        // The last client disconnects within its request body, which counts as a malformed request.
        assert_cancelled(&pair.caller, (turn + 1).min(3));
    }
}

#[test]
fn client_that_disconnects_within_a_response_cancels_it() {
    let (pair, events) =
        reading_upstream(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n");
    drop(begin(&pair, &events, GET, true));
    assert_event(&events, "closed");
    assert_cancelled(&pair.caller, 0);
    assert_cancelled(&pair.callee, 0);
}

#[test]
fn upgraded_connection_closes_upstream_when_its_client_disconnects() {
    let (pair, events) = reading_upstream(
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    );
    let request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let client = begin(&pair, &events, request, true);
    // Unread response bytes make the kernel send a reset instead of a FIN.
    drop(client);
    assert_event(&events, "closed");
    assert_cancelled(&pair.caller, 0);
    assert_cancelled(&pair.callee, 0);
}

#[test]
fn http2_client_that_disconnects_while_waiting_cancels_its_request() {
    let (pair, events) = reading_upstream(b"");
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--http2-prior-knowledge"]).arg(format!("http://{}/", pair.address()));
    let mut curl = Process::start("curl", &mut curl);
    assert_event(&events, "request");
    curl.kill();
    assert_event(&events, "closed");
    assert_cancelled(&pair.caller, 1);
    assert_cancelled(&pair.callee, 1);
}
