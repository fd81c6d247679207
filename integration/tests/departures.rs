//! Clients that leave before they have their answer. What was done for them ends with them, on every
//! stretch of the way, though no timeout would end it.

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};

use weft_integration::process::Process;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair, TestSidecar};
use weft_integration::wait::{DEADLINE, eventually};

/// A service behind two sidecars that begins with `answer`, then only listens. It says when a request
/// came, and when its connection ended.
fn listening(answer: &'static [u8]) -> (SidecarPair, Receiver<&'static str>) {
    let (says, said) = channel();
    let says = Mutex::new(says);
    let backend = ScriptedServer::start(move |stream| {
        let says = says.lock().expect("nobody panics with it").clone();
        let mut reader = BufReader::new(stream);
        if read_head(&mut reader).is_none() {
            return;
        }
        says.send("came").expect("the test listens");
        let begun = reader.get_mut().write_all(answer);
        drop(begun.and_then(|()| std::io::copy(&mut reader, &mut std::io::sink()).map(drop)));
        says.send("left").expect("the test listens");
    });
    let pair =
        SidecarPair::start(&PairConfig { timeout_seconds: 0, ..PairConfig::http1(backend.port) });
    (pair, said)
}

#[track_caller]
fn assert_said(said: &Receiver<&'static str>, word: &str) {
    assert_eq!(said.recv_timeout(DEADLINE), Ok(word));
}

/// Waits until a sidecar has no request open, and has counted one whose client had gone.
#[track_caller]
fn assert_forgotten(sidecar: &TestSidecar, gone: usize) {
    let gone = format!("weft_sidecar_denied_total{{reason=\"client_gone\"}} {gone}");
    eventually(format!("{sidecar:?} says {gone}"), || {
        let metrics = sidecar.metrics();
        let says = |line: &str| metrics.lines().any(|said| said == line);
        (says("weft_sidecar_requests_open 0") && says(&gone)).then_some(())
    });
}

/// Sends `request`, waits until it arrived and, when there is one, for the answer's first byte.
#[track_caller]
fn begin(
    pair: &SidecarPair,
    said: &Receiver<&'static str>,
    request: &[u8],
    answered: bool,
) -> TcpStream {
    let mut client = TcpStream::connect(pair.address()).expect("the sidecar listens");
    client.write_all(request).expect("the sidecar reads");
    assert_said(said, "came");
    if answered {
        client.set_read_timeout(Some(DEADLINE)).expect("a deadline above zero");
        client.read_exact(&mut [0]).expect("the answer begins");
    }
    client
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

#[test]
fn a_client_that_leaves_while_it_waits_takes_its_request_along() {
    let (pair, said) = listening(b"");
    let upgrade = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let pipelined = [GET, GET].concat();
    let upload = b"PUT / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n";
    for (turn, request) in [GET, upgrade, &pipelined, upload].into_iter().enumerate() {
        drop(begin(&pair, &said, request, false));
        assert_said(&said, "left");
        // The one in the middle of its body has broken the rules of HTTP by leaving.
        assert_forgotten(&pair.caller, (turn + 1).min(3));
    }
}

#[test]
fn a_client_that_leaves_in_the_middle_of_an_answer_ends_it() {
    let (pair, said) =
        listening(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n");
    drop(begin(&pair, &said, GET, true));
    assert_said(&said, "left");
    assert_forgotten(&pair.caller, 0);
    assert_forgotten(&pair.callee, 0);
}

#[test]
fn an_upgraded_connection_ends_with_either_side() {
    let (pair, said) = listening(
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    );
    let request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let client = begin(&pair, &said, request, true);
    // With the answer unread, the kernel resets the connection instead of ending it.
    drop(client);
    assert_said(&said, "left");
    assert_forgotten(&pair.caller, 0);
    assert_forgotten(&pair.callee, 0);
}

#[test]
fn a_client_of_http2_that_leaves_takes_its_request_along() {
    let (pair, said) = listening(b"");
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--http2-prior-knowledge"]).arg(format!("http://{}/", pair.address()));
    let mut curl = Process::start("curl", &mut curl);
    assert_said(&said, "came");
    curl.kill();
    assert_said(&said, "left");
    assert_forgotten(&pair.caller, 1);
    assert_forgotten(&pair.callee, 1);
}
