//! Failing services: requests are retried where that is safe, never where the service may have
//! processed them; no client gets the response of another, and an incomplete response is
//! recognizable as incomplete.
//!
//! Each request has an ID, which its response must contain.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;
use socket2::SockRef;
use weft_integration::bootstrap::{bootstrap, static_cluster, tcp_listener};
use weft_integration::http1::{self, Http1Client};
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::TestSidecar;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::DEADLINE;

const CLIENTS: usize = 16;
/// Sixteen clients make a thousand requests per second.
const PACE: Duration = Duration::from_millis(16);
/// For each client: three seconds of requests.
const REQUESTS: usize = 180;

/// The results of the requests of all clients.
#[derive(Debug, Default)]
struct LoadResults {
    statuses: BTreeMap<u16, usize>,
    /// Complete responses with the ID of another request.
    wrong: Vec<String>,
    /// Incomplete responses.
    broken: usize,
}

impl LoadResults {
    fn add(&mut self, other: Self) {
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self.wrong.extend(other.wrong);
        self.broken += other.broken;
    }

    /// Checks that every request was served.
    #[track_caller]
    fn assert_all_served(&self, failure: &str) {
        let total = self.statuses.values().sum::<usize>();
        let served = self.statuses.get(&200).copied().unwrap_or_default();
        assert_eq!((served, self.broken, self.wrong.len()), (total, 0, 0), "{failure}: {self:?}");
    }
}

/// Makes the requests of one client over as few connections as possible.
fn requests(
    port: u16,
    client: usize,
    method: &str,
    (pace, count): (Duration, usize),
) -> LoadResults {
    let mut results = LoadResults::default();
    // A channel without messages serves as a timer.
    let (_never, clock) = channel::<()>();
    let mut connection = Http1Client::connect(port);
    for number in 0..count {
        let id = format!("{client}-{number}");
        let body = if method == "POST" { "content-length: 4\r\n\r\nsent" } else { "\r\n" };
        let answer = connection.ask(&format!("{method} /{id} HTTP/1.1\r\nhost: a\r\n{body}"));
        *results.statuses.entry(answer.status).or_default() += 1;
        results.broken += usize::from(answer.broken);
        if answer.status == 200 && !answer.broken && answer.body != id {
            results.wrong.push(format!("{id} got {:?}", answer.body));
        }
        if answer.broken || answer.header("connection") == Some("close") {
            connection = Http1Client::connect(port);
        }
        assert!(clock.recv_timeout(pace).is_err(), "the timer channel has no messages");
    }
    results
}

/// Makes the requests of all clients.
fn load(port: u16, method: &str, rhythm: (Duration, usize)) -> LoadResults {
    let mut all = LoadResults::default();
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| scope.spawn(move || requests(port, client, method, rhythm)))
            .collect();
        for client in clients {
            all.add(client.join().expect("the client does not panic"));
        }
    });
    assert_eq!(all.statuses.values().sum::<usize>(), CLIENTS * rhythm.1);
    all
}

/// How often the service received each ID.
type ReceivedIds = Arc<Mutex<HashMap<String, usize>>>;

/// One request at a faulty service.
struct FaultyExchange<'a> {
    stream: &'a mut TcpStream,
    id: &'a str,
    /// The position of the request on its connection, from 0.
    number: usize,
}

impl FaultyExchange<'_> {
    /// Sends the expected response with further headers.
    fn answer(&mut self, fields: &str) -> bool {
        let answer = right_answer(self.id, fields);
        self.stream.write_all(answer.as_bytes()).is_ok()
    }

    /// Sends text.
    fn send(&mut self, text: &str) -> bool {
        self.stream.write_all(text.as_bytes()).is_ok()
    }

    /// Sends text and closes the sending side.
    fn last(&mut self, text: &str) -> bool {
        self.send(text);
        false
    }

    /// Makes the connection end with a reset.
    fn reset(&self) -> bool {
        let socket = SockRef::from(&*self.stream);
        socket.set_linger(Some(Duration::ZERO)).expect("the socket option can be set");
        false
    }
}

fn right_answer(id: &str, fields: &str) -> String {
    format!("HTTP/1.1 200 OK\r\n{fields}content-length: {}\r\n\r\n{id}", id.len())
}

/// A service that calls `act` for each request. It closes the connection when `act` returns false,
/// or after `idle_timeout` without a request.
fn faulty(
    idle_timeout: Option<Duration>,
    act: impl Fn(&mut FaultyExchange<'_>) -> bool + Send + Sync + 'static,
) -> (u16, ReceivedIds) {
    let seen = ReceivedIds::default();
    let noted = seen.clone();
    let backend = ScriptedServer::start(move |stream| {
        stream.set_nodelay(true).expect("the socket option can be set");
        let mut reader = BufReader::new(stream);
        for number in 0.. {
            let Some(head) = read_head(&mut reader) else { return };
            let length = http1::header(&head, "content-length").unwrap_or("0");
            let mut body = vec![0; length.parse().expect("the text is a number")];
            let id = head.split(' ').nth(1).unwrap_or_default().trim_start_matches('/');
            *lock(&noted).entry(id.to_owned()).or_default() += 1;
            // A large body is not read here.
            if body.len() < 1024 && reader.read_exact(&mut body).is_err() {
                return;
            }
            if !act(&mut FaultyExchange { stream: reader.get_mut(), id, number }) {
                return;
            }
            reader.get_ref().set_read_timeout(idle_timeout).expect("the timeout is not zero");
        }
    });
    (backend.port, seen)
}

fn lock(seen: &ReceivedIds) -> std::sync::MutexGuard<'_, HashMap<String, usize>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn before(port: u16) -> SingleSidecar {
    SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1).start()
}

const STEADY: (Duration, usize) = (PACE, REQUESTS);

#[test]
fn connections_closed_after_each_response_cause_no_errors() {
    let (port, _) = faulty(None, |asked| {
        asked.answer("");
        false
    });
    let sidecar = before(port);
    load(sidecar.port, "GET", STEADY).assert_all_served("closed after each response");
    let (port, _) = faulty(None, |asked| {
        asked.answer("connection: close\r\n");
        false
    });
    let sidecar = before(port);
    load(sidecar.port, "GET", STEADY).assert_all_served("closed after each response, as announced");
    assert_eq!(sidecar.metric("weft_sidecar_upstream_retries_total"), 0, "the close was announced");
}

/// A service that closes, or resets, connections after this idle time.
fn with_idle_timeout(idle_timeout: Duration, resets: bool) -> SingleSidecar {
    let (port, _) = faulty(Some(idle_timeout), move |asked| {
        if resets {
            asked.reset();
        }
        asked.answer("")
    });
    before(port)
}

/// Each request arrives when its service closes; with one client, at most one connection is idle.
#[test]
fn connection_closed_while_idle_causes_no_error() {
    for idle_timeout in [2, 8, 16].map(Duration::from_millis) {
        for resets in [false, true] {
            let sidecar = with_idle_timeout(idle_timeout, resets);
            let results = requests(sidecar.port, 0, "GET", (idle_timeout, 150));
            results.assert_all_served(&format!("idle for {idle_timeout:?}, reset: {resets}"));
        }
    }
}

/// Passes on an idle machine; next to other tests, one of some thousand requests gets 502.
#[test]
fn many_connections_closed_while_idle_cause_no_errors() {
    for idle_timeout in [2, 8, 16].map(Duration::from_millis) {
        for resets in [false, true] {
            let sidecar = with_idle_timeout(idle_timeout, resets);
            let results = load(sidecar.port, "GET", STEADY);
            results.assert_all_served(&format!("idle for {idle_timeout:?}, reset: {resets}"));
        }
    }
}

/// Each client sends its next request just when the service closes.
#[test]
fn service_with_keepalive_of_one_second_causes_no_errors() {
    const SECOND: Duration = Duration::from_secs(1);
    let (port, _) = faulty(Some(SECOND), |asked| asked.answer("keep-alive: timeout=1\r\n"));
    let sidecar = before(port);
    std::thread::scope(|scope| {
        let steady = scope.spawn(|| load(sidecar.port, "GET", STEADY));
        load(sidecar.port, "GET", (SECOND, 4)).assert_all_served("a second apart");
        steady.join().expect("the load does not panic").assert_all_served("all the while");
    });
}

#[test]
fn sidecar_closes_idle_connections_before_the_service_does() {
    let (sender, ends) = channel();
    let sender = Mutex::new(sender);
    let (port, _) = faulty(None, move |asked| {
        asked.answer("keep-alive: timeout=2\r\n");
        asked
            .stream
            .set_read_timeout(Some(Duration::from_secs(2)))
            .expect("the timeout is not zero");
        let ended = asked.stream.read(&mut [0]).is_ok_and(|read| read == 0);
        lock_sender(&sender).send(ended).expect("the test receives");
        false
    });
    let sidecar = before(port);
    assert_eq!(http1::ask(sidecar.port, "GET /x HTTP/1.1\r\nhost: a\r\n\r\n").status, 200);
    assert_eq!(ends.recv_timeout(DEADLINE), Ok(true), "the sidecar closed the connection");
}

fn lock_sender<T>(sender: &Mutex<Sender<T>>) -> std::sync::MutexGuard<'_, Sender<T>> {
    sender.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Each connection serves one request, and is closed without a response at the second.
fn single_request_service() -> (u16, ReceivedIds) {
    faulty(None, |asked| asked.number == 0 && asked.answer(""))
}

#[test]
fn retriable_request_is_retried_when_a_reused_connection_fails() {
    let (port, seen) = single_request_service();
    let sidecar = before(port);
    // With one client, at most one connection can fail.
    let results = requests(sidecar.port, 0, "GET", (Duration::from_millis(1), 200));
    results.assert_all_served("closed at the second request");
    assert!(sidecar.metric("weft_sidecar_upstream_retries_total") > 0, "no request was retried");
    assert!(lock(&seen).values().all(|times| *times <= 2), "{:?}", lock(&seen));
}

/// The retry uses a new connection, which cannot have been closed for being idle.
#[test]
fn retry_uses_a_new_connection() {
    let (port, _) = single_request_service();
    let sidecar = before(port);
    load(sidecar.port, "GET", STEADY).assert_all_served("closed at the second request");
}

#[test]
fn post_that_the_service_may_have_received_is_not_retried() {
    let idle = faulty(Some(Duration::from_millis(8)), |asked| asked.answer(""));
    for (failure, (port, seen)) in [("idle", idle), ("the second", single_request_service())] {
        let sidecar = before(port);
        let results = load(sidecar.port, "POST", STEADY);
        let twice: Vec<_> =
            lock(&seen).iter().filter(|(_, times)| **times > 1).map(|(id, _)| id.clone()).collect();
        assert_eq!(twice, Vec::<String>::new(), "{failure}");
        assert_eq!((results.wrong.len(), results.broken), (0, 0), "{failure}: {results:?}");
        let only = results.statuses.keys().all(|status| [200, 502].contains(status));
        assert!(only && results.statuses.contains_key(&200), "{failure}: {results:?}");
    }
}

#[test]
fn request_is_not_retried_when_the_service_closes_during_the_upload() {
    let (port, seen) = faulty(None, |asked| asked.reset());
    let sidecar = before(port);
    let body = "x".repeat(4 * 1024 * 1024);
    for number in 0..20 {
        let mut client = Http1Client::connect(sidecar.port);
        let length = body.len();
        client.send(format!(
            "POST /{number} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n"
        ));
        // The client may be rejected before it has sent everything.
        client.send(&body);
        let answer = client.answer("POST");
        assert!(answer.status == 502 || answer.broken, "{number}: {answer:?}");
    }
    assert_eq!(lock(&seen).len(), 20);
    assert!(lock(&seen).values().all(|times| *times == 1), "{:?}", lock(&seen));
}

#[test]
fn hanging_service_affects_only_its_own_requests() {
    let (port, _) = faulty(None, |asked| {
        if !asked.id.ends_with("7") {
            return asked.answer("");
        }
        drop(std::io::copy(asked.stream, &mut std::io::sink()));
        false
    });
    let sidecar = SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1)
        .with_route_action("timeout", &json!("0.3s"))
        .start();
    let results = load(sidecar.port, "GET", (PACE, 50));
    assert_eq!((results.wrong.len(), results.broken), (0, 0), "{results:?}");
    // One request in ten.
    assert_eq!(results.statuses, BTreeMap::from([(200, 720), (504, 80)]));
}

/// Checks that no response looks complete, and that the only error status is 502.
#[track_caller]
fn check_incomplete(
    failure: &str,
    act: impl Fn(&mut FaultyExchange<'_>) -> bool + Send + Sync + 'static,
) {
    let (port, _) = faulty(None, act);
    let mut sidecar = before(port);
    let results = load(sidecar.port, "GET", (PACE, 40));
    let refused = results.statuses.get(&502).copied().unwrap_or_default();
    let total = results.statuses.values().sum::<usize>();
    assert_eq!(
        (results.broken + refused, results.wrong.len()),
        (total, 0),
        "{failure}: {results:?}"
    );
    sidecar.assert_healthy();
}

#[test]
fn incomplete_response_is_recognizable_as_incomplete() {
    const LENGTH: &str = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf";
    const CHUNKS: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n";
    check_incomplete("ended within its length", |asked| asked.last(LENGTH));
    check_incomplete("reset within its length", |asked| asked.send(LENGTH) && asked.reset());
    check_incomplete("ended within its chunks", |asked| asked.last(CHUNKS));
    check_incomplete("reset within its chunks", |asked| asked.send(CHUNKS) && asked.reset());
    check_incomplete("bad chunks", |asked| asked.send(&format!("{CHUNKS}zz\r\n")));
    check_incomplete("garbage", |asked| asked.send("\u{1}\u{2}\u{3}garbage\r\n\r\n"));
    check_incomplete("half a head", |asked| asked.last("HTTP/1.1 200 OK\r\nx-"));
}

/// HTTP/1.0 has no chunked coding: an early end looks complete unless the connection is reset (RFC
/// 9112, section 8).
#[test]
fn incomplete_response_is_recognizable_over_http10() {
    let large = "x".repeat(100_000);
    let (port, _) = faulty(None, move |asked| {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        asked.send(&format!("{head}186a0\r\n{large}\r\n")) && asked.reset()
    });
    let sidecar = before(port);
    let answer = http1::ask(sidecar.port, "GET /x HTTP/1.0\r\nhost: a\r\n\r\n");
    assert!(answer.broken || answer.status == 502, "{} bytes look complete", answer.body.len());
}

#[test]
fn data_after_a_response_is_not_sent_to_another_client() {
    let check = |failure: &str, behind: fn(&str) -> String| {
        let (port, _) = faulty(None, move |asked| {
            let answer = right_answer(asked.id, "") + &behind(asked.id);
            asked.send(&answer)
        });
        let sidecar = before(port);
        load(sidecar.port, "GET", STEADY).assert_all_served(failure);
    };
    check("a length too short", |_| "tail".to_owned());
    check("two answers", |id| right_answer(id, ""));
    check("an interim response after the response", |_| {
        "HTTP/1.1 103 Early Hints\r\n\r\n".to_owned()
    });
    check("a request", |_| "GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned());
}

/// A service that sends more data once its response has reached the client, and notifies the test
/// when it is sent.
fn late_data_service() -> (u16, Sender<()>, Receiver<()>) {
    let (arrived, go_on) = channel::<()>();
    let (send_notice, sent) = channel();
    let go_on = Mutex::new(go_on);
    let send_notice = Mutex::new(send_notice);
    let first = AtomicUsize::new(0);
    let (port, _) = faulty(None, move |asked| {
        let is_open = asked.answer("");
        if first.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            let go_on = go_on.lock().unwrap_or_else(PoisonError::into_inner);
            go_on.recv_timeout(DEADLINE).unwrap_or_default();
            asked.send(&right_answer("stray", ""));
            lock_sender(&send_notice).send(()).expect("the test receives");
        }
        is_open
    });
    (port, arrived, sent)
}

#[test]
fn unsolicited_response_is_discarded() {
    let (port, arrived, sent) = late_data_service();
    let sidecar = before(port);
    let mut client = Http1Client::connect(sidecar.port);
    for number in 0..200 {
        for turn in ["first", "second"] {
            let id = format!("{number}-{turn}");
            let answer = client.ask(&format!("GET /{id} HTTP/1.1\r\nhost: a\r\n\r\n"));
            assert_eq!((answer.status, answer.body.as_str()), (200, id.as_str()));
            if turn == "first" {
                arrived.send(()).expect("the service receives");
                sent.recv_timeout(DEADLINE).expect("the service has sent the data");
            }
        }
    }
}

#[test]
fn response_of_a_half_closed_connection_is_accepted() {
    let (port, _) = faulty(None, |asked| {
        let whole = asked.answer("");
        drop(asked.stream.shutdown(Shutdown::Write));
        whole
    });
    let sidecar = before(port);
    load(sidecar.port, "GET", (PACE, 40)).assert_all_served("half closed");
}

#[test]
fn tcp_connection_fails_over_when_an_endpoint_refuses() {
    let service = ScriptedServer::echoing_heads();
    let refusing = port::free();
    let admin = port::free();
    let port = port::free();
    let at = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let cluster = static_cluster("service", &[at(refusing), at(service.port)]);
    let listener = tcp_listener("bytes", at(port), json!({"cluster": "service"}));
    let config = bootstrap(admin, &[listener], &[cluster]);
    let sidecar = TestSidecar::start("sidecar", &MeshPki::create(), port, admin, &config);
    for _ in 0..8 {
        assert_eq!(http1::ask(port, "GET / HTTP/1.1\r\nhost: a\r\n\r\n").status, 200);
    }
    assert_ne!(sidecar.metric("weft_sidecar_upstream_retries_total"), 0);
}
