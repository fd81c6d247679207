//! Lifecycle of a sidecar: readiness, draining and crashes.

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

/// curl's options for both HTTP versions.
const BOTH_VERSIONS: [&[&str]; 2] = [&["--http1.1"], &["--http2-prior-knowledge"]];

#[track_caller]
fn assert_whole(answer: &CurlResponse, status: u16) {
    assert_eq!((answer.exit, answer.status), (0, status), "{answer:?}");
}

fn pair_with_server(server: ScriptedServer) -> SidecarPair {
    SidecarPair::start(&PairConfig::http1(server.port))
}

/// A server that sends half of a response, notifies the test, and sends the rest on request.
fn half_response_server() -> (ScriptedServer, Receiver<()>, Sender<()>) {
    let (started, begun) = channel();
    let (finish, finishing) = channel::<()>();
    let finishing = Mutex::new(finishing);
    let server = ScriptedServer::start(move |stream| {
        let mut reader = BufReader::new(stream);
        if read_head(&mut reader).is_none() {
            return;
        }
        let out = reader.get_mut();
        out.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf")
            .expect("the sidecar reads");
        started.send(()).expect("the test waits");
        let signal = finishing.lock().expect("one request").recv_timeout(DEADLINE);
        signal.expect("the test requests the rest");
        out.write_all(b"half").expect("the sidecar reads");
    });
    (server, begun, finish)
}

#[test]
fn draining_sidecar_finishes_open_requests() {
    for option in BOTH_VERSIONS {
        let (server, begun, finish) = half_response_server();
        let mut pair = pair_with_server(server);
        let port = pair.caller.port;
        let asking = std::thread::spawn(move || Curl::get(port, "/slow").with(option).run());
        begun.recv_timeout(DEADLINE).expect("the request arrives");
        for sidecar in [&pair.callee, &pair.caller] {
            sidecar.process.signal(Signal::SIGTERM);
            eventually(format!("{:?} refuses new connections", sidecar.process), || {
                TcpStream::connect(("127.0.0.1", sidecar.port)).is_err().then_some(())
            });
        }
        finish.send(()).expect("the server waits");
        let answer = asking.join().expect("curl runs");
        assert_whole(&answer, 200);
        assert_eq!(answer.text(), "halfhalf");
        for sidecar in [&mut pair.callee, &mut pair.caller] {
            assert!(sidecar.process.ended().success());
            let errors = sidecar.process.errors();
            assert!(!errors.contains("drain timeout"), "no connection was open:\n{errors}");
        }
    }
}

/// The client's sidecar keeps its connection open for the next request. That must not delay the end
/// of a sidecar that drains.
#[test]
fn kept_alive_connection_does_not_delay_draining() {
    for option in BOTH_VERSIONS {
        let (server, begun, finish) = half_response_server();
        let mut pair = pair_with_server(server);
        let port = pair.caller.port;
        let asking = std::thread::spawn(move || Curl::get(port, "/slow").with(option).run());
        begun.recv_timeout(DEADLINE).expect("the request arrives");
        pair.callee.process.signal(Signal::SIGTERM);
        eventually("the callee refuses new connections", || {
            TcpStream::connect(("127.0.0.1", pair.callee.port)).is_err().then_some(())
        });
        finish.send(()).expect("the server waits");
        assert_whole(&asking.join().expect("curl runs"), 200);
        assert!(pair.callee.process.ended().success());
        let errors = pair.callee.process.errors();
        assert!(!errors.contains("drain timeout"), "no connection was open:\n{errors}");
        assert!(pair.caller.process.is_running());
    }
}

#[test]
fn killed_sidecar_gives_503_and_serves_again_after_restart() {
    let mut pair = pair_with_server(ScriptedServer::echoing_heads());
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
fn sidecar_is_not_ready_until_its_listener_is_bound() {
    let pki = MeshPki::create();
    let port = port::free();
    let admin = port::free();
    let taken = TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
    let outbound = listener("outbound", port, http(&route_to("next", 1), &[]), None);
    let next = cluster("next", &[port::free()], UpstreamHttp::Http1, None);
    let config = bootstrap(admin, &[outbound], &[next]);
    let mut sidecar = TestSidecar::start_without_waiting("caller", &pki, port, admin, &config);
    let unready = eventually("/ready reports the reason", || {
        let ready = Curl::get(admin, "/ready").run();
        (ready.status == 503 && ready.text().contains("outbound")).then(|| ready.text())
    });
    assert!(unready.contains(&port.to_string()), "{unready}");

    drop(taken);
    sidecar.wait_until_ready();
    sidecar.process.signal(Signal::SIGTERM);
    assert!(sidecar.process.ended().success());
}

/// Draining closes idle connections by dropping their tasks.
#[test]
fn open_connections_are_counted_correctly_while_draining() {
    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    let server = ScriptedServer::start(|stream| {
        let mut reader = BufReader::new(stream);
        // Requests for /held are never answered.
        while read_head(&mut reader).is_some_and(|head| !head.starts_with("GET /held ")) {
            if reader.get_mut().write_all(OK.as_bytes()).is_err() {
                return;
            }
        }
        drop(std::io::copy(&mut reader, &mut std::io::sink()));
    });
    let sidecar =
        single_sidecar::SingleSidecarConfig::for_upstream(server.port, UpstreamHttp::Http1).start();
    let open = |sidecar: &SingleSidecar| sidecar.metric("weft_sidecar_connections_open");
    let mut idle: Vec<Http1Client> = (0..10).map(|_| Http1Client::connect(sidecar.port)).collect();
    for client in &mut idle {
        assert_eq!(client.ask("GET / HTTP/1.1\r\nhost: a\r\n\r\n").status, 200);
    }
    let mut held = Http1Client::connect(sidecar.port);
    assert!(held.send("GET /held HTTP/1.1\r\nhost: a\r\n\r\n"));
    eventually("the service has the held request", || {
        (sidecar.metric("weft_sidecar_requests_open") == 1).then_some(())
    });
    assert!(open(&sidecar) >= 11);
    sidecar.sidecar.process.signal(Signal::SIGTERM);
    assert!(idle.iter_mut().all(Http1Client::is_at_end));
    eventually("only the held connection is open", || (open(&sidecar) == 1).then_some(()));
}

#[test]
fn response_started_while_draining_has_connection_close() {
    let (requested, begun) = channel();
    let (answer, answering) = channel::<()>();
    let answering = Mutex::new(answering);
    let server = ScriptedServer::start(move |stream| {
        let mut reader = BufReader::new(stream);
        while read_head(&mut reader).is_some() {
            requested.send(()).expect("the test waits");
            let answer = answering.lock().expect("one request").recv_timeout(DEADLINE);
            answer.expect("the test requests the response");
            let response = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
            reader.get_mut().write_all(response).expect("the sidecar reads");
        }
    });
    let sidecar =
        single_sidecar::SingleSidecarConfig::for_upstream(server.port, UpstreamHttp::Http1).start();
    let mut client = Http1Client::connect(sidecar.port);
    let mut ask = |drains: bool| {
        assert!(client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n"));
        begun.recv_timeout(DEADLINE).expect("the request arrives");
        if drains {
            sidecar.sidecar.process.signal(Signal::SIGTERM);
            eventually("the sidecar refuses new connections", || {
                TcpStream::connect(("127.0.0.1", sidecar.port)).is_err().then_some(())
            });
        }
        answer.send(()).expect("the server waits");
        let answer = client.answer("GET");
        assert_eq!((answer.status, &*answer.body), (200, "ok"), "{}", answer.head);
        answer.header("connection").map(str::to_owned)
    };
    assert_eq!(ask(false), None);
    assert_eq!(ask(true).as_deref(), Some("close"));
    assert!(client.is_at_end());
}
