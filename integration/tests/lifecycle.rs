//! The beginning and the end of a sidecar's life: readiness, draining, sudden death.

use std::io::{BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::sys::signal::Signal;
use weft_integration::bootstrap::{UpstreamHttp, bootstrap, cluster, http, listener, route_to};
use weft_integration::curl::{Curl, CurlResponse};
use weft_integration::http1::Http1Client;
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair, TestSidecar};
use weft_integration::single_sidecar::{self, SingleSidecar};
use weft_integration::wait::{DEADLINE, eventually};

/// Both versions of HTTP, by curl's options for them.
const BOTH_VERSIONS: [&[&str]; 2] = [&["--http1.1"], &["--http2-prior-knowledge"]];

#[track_caller]
fn assert_whole(answer: &CurlResponse, status: u16) {
    assert_eq!((answer.exit, answer.status), (0, status), "{answer:?}");
}

fn with_backend(backend: ScriptedServer) -> SidecarPair {
    SidecarPair::start(&PairConfig::http1(backend.port))
}

/// A backend that sends half of its answer, tells so, and sends the rest when it is told to.
fn answering_in_halves() -> (ScriptedServer, Receiver<()>, Sender<()>) {
    let (started, begun) = channel();
    let (finish, finishing) = channel::<()>();
    let finishing = Mutex::new(finishing);
    let backend = ScriptedServer::start(move |stream| {
        let mut reader = BufReader::new(stream);
        if read_head(&mut reader).is_none() {
            return;
        }
        let out = reader.get_mut();
        out.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf").expect("it listens");
        started.send(()).expect("the test waits");
        let told = finishing.lock().expect("one request").recv_timeout(DEADLINE);
        told.expect("the test tells when");
        out.write_all(b"half").expect("it still listens");
    });
    (backend, begun, finish)
}

#[test]
fn a_sidecar_that_is_told_to_end_finishes_what_it_has() {
    for option in BOTH_VERSIONS {
        let (backend, begun, finish) = answering_in_halves();
        let mut pair = with_backend(backend);
        let port = pair.caller.port;
        let asking = std::thread::spawn(move || Curl::get(port, "/slow").with(option).run());
        begun.recv_timeout(DEADLINE).expect("the request arrives");
        for sidecar in [&pair.callee, &pair.caller] {
            sidecar.process.signal(Signal::SIGTERM);
            eventually(format!("{:?} takes nothing new", sidecar.process), || {
                TcpStream::connect(("127.0.0.1", sidecar.port)).is_err().then_some(())
            });
        }
        finish.send(()).expect("the backend waits");
        let answer = asking.join().expect("curl runs");
        assert_whole(&answer, 200);
        assert_eq!(answer.text(), "halfhalf");
        for sidecar in [&mut pair.callee, &mut pair.caller] {
            assert!(sidecar.process.ended().success());
            let errors = sidecar.process.errors();
            assert!(!errors.contains("drain timeout"), "nothing was left to wait for:\n{errors}");
        }
    }
}

/// The caller's sidecar keeps its connection for the next request. That must not hold up the end of a
/// sidecar that will take none.
#[test]
fn a_connection_that_others_keep_open_does_not_hold_up_the_end() {
    for option in BOTH_VERSIONS {
        let (backend, begun, finish) = answering_in_halves();
        let mut pair = with_backend(backend);
        let port = pair.caller.port;
        let asking = std::thread::spawn(move || Curl::get(port, "/slow").with(option).run());
        begun.recv_timeout(DEADLINE).expect("the request arrives");
        pair.callee.process.signal(Signal::SIGTERM);
        eventually("the callee takes nothing new", || {
            TcpStream::connect(("127.0.0.1", pair.callee.port)).is_err().then_some(())
        });
        finish.send(()).expect("the backend waits");
        assert_whole(&asking.join().expect("curl runs"), 200);
        assert!(pair.callee.process.ended().success());
        let errors = pair.callee.process.errors();
        assert!(!errors.contains("drain timeout"), "nothing was left to wait for:\n{errors}");
        assert!(pair.caller.process.is_running());
    }
}

#[test]
fn a_sidecar_that_dies_harms_nobody_and_may_come_back() {
    let mut pair = with_backend(ScriptedServer::echoing_heads());
    for option in BOTH_VERSIONS {
        assert_whole(&Curl::get(pair.caller.port, "/").with(option).run(), 200);
        pair.callee.process.kill();
        let gone = Curl::get(pair.caller.port, "/").with(option).run();
        assert!(matches!(gone.status, 502 | 503), "{gone:?}");
        pair.restart_callee();
        assert_whole(&Curl::get(pair.caller.port, "/").with(option).run(), 200);
        pair.assert_healthy();
    }
}

#[test]
fn a_listener_that_cannot_be_bound_keeps_readiness_away_until_it_can() {
    let pki = MeshPki::create();
    let (port, admin) = (port::free(), port::free());
    let taken = TcpListener::bind(("127.0.0.1", port)).expect("it was free");
    let outbound = listener("outbound", port, http(&route_to("next", 1), &[]), None);
    let next = cluster("next", &[port::free()], UpstreamHttp::Http1, None);
    let config = bootstrap(admin, &[outbound], &[next]);
    let mut sidecar = TestSidecar::start_without_waiting("caller", &pki, port, admin, &config);
    let unready = eventually("readiness says why not", || {
        let ready = Curl::get(admin, "/ready").run();
        (ready.status == 503 && ready.text().contains("outbound")).then(|| ready.text())
    });
    assert!(unready.contains(&port.to_string()), "{unready}");

    drop(taken);
    sidecar.wait_until_ready();
    sidecar.process.signal(Signal::SIGTERM);
    assert!(sidecar.process.ended().success());
}

/// Draining closes idle connections by ending their tasks.
#[test]
fn open_connections_are_counted_right_while_draining() {
    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    let backend = ScriptedServer::start(|stream| {
        let mut reader = BufReader::new(stream);
        // Requests for /held are never answered.
        while read_head(&mut reader).is_some_and(|head| !head.starts_with("GET /held ")) {
            if reader.get_mut().write_all(OK.as_bytes()).is_err() {
                return;
            }
        }
        drop(std::io::copy(&mut reader, &mut std::io::sink()));
    });
    let alone =
        single_sidecar::SingleSidecarConfig::for_upstream(backend.port, UpstreamHttp::Http1)
            .start();
    let open = |alone: &SingleSidecar| alone.metric("weft_sidecar_connections_open");
    let mut idle: Vec<Http1Client> = (0..10).map(|_| Http1Client::connect(alone.port)).collect();
    for client in &mut idle {
        assert_eq!(client.ask("GET / HTTP/1.1\r\nhost: a\r\n\r\n").status, 200);
    }
    let mut held = Http1Client::connect(alone.port);
    assert!(held.send("GET /held HTTP/1.1\r\nhost: a\r\n\r\n"));
    eventually("one request is held", || {
        (alone.metric("weft_sidecar_requests_open") == 1).then_some(())
    });
    assert!(open(&alone) >= 11);
    alone.sidecar.process.signal(Signal::SIGTERM);
    assert!(idle.iter_mut().all(Http1Client::is_at_end));
    eventually("only the held connection is open", || (open(&alone) == 1).then_some(()));
}

#[test]
fn response_that_begins_while_draining_announces_the_end_of_its_connection() {
    let (requested, begun) = channel();
    let (answer, answering) = channel::<()>();
    let answering = Mutex::new(answering);
    let backend = ScriptedServer::start(move |stream| {
        let mut reader = BufReader::new(stream);
        while read_head(&mut reader).is_some() {
            requested.send(()).expect("the test waits");
            let answer = answering.lock().expect("one request").recv_timeout(DEADLINE);
            answer.expect("the test says when to answer");
            let response = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
            reader.get_mut().write_all(response).expect("the sidecar reads");
        }
    });
    let alone =
        single_sidecar::SingleSidecarConfig::for_upstream(backend.port, UpstreamHttp::Http1)
            .start();
    let mut client = Http1Client::connect(alone.port);
    let mut ask = |drains: bool| {
        assert!(client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n"));
        begun.recv_timeout(DEADLINE).expect("the request arrives");
        if drains {
            alone.sidecar.process.signal(Signal::SIGTERM);
            eventually("the sidecar takes nothing new", || {
                TcpStream::connect(("127.0.0.1", alone.port)).is_err().then_some(())
            });
        }
        answer.send(()).expect("the backend waits");
        let answer = client.answer("GET");
        assert_eq!((answer.status, &*answer.body), (200, "ok"), "{}", answer.head);
        answer.header("connection").map(str::to_owned)
    };
    assert_eq!(ask(false), None);
    assert_eq!(ask(true).as_deref(), Some("close"));
    assert!(client.is_at_end());
}
