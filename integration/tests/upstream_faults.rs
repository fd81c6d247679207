//! Services that fail their clients in every way: what could be asked again is asked again, nothing is
//! asked twice that may have been done, nobody gets another's answer, and what broke off looks broken.
//!
//! Each request has an id, which its answer must give back.

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
/// With sixteen clients, a thousand requests a second.
const PACE: Duration = Duration::from_millis(16);
/// For each client: three seconds.
const REQUESTS: usize = 180;

/// What became of the requests of all clients.
#[derive(Debug, Default)]
struct Tally {
    statuses: BTreeMap<u16, usize>,
    /// Answers that look whole and give another id.
    wrong: Vec<String>,
    /// Answers that do not look whole.
    broken: usize,
}

impl Tally {
    fn add(&mut self, other: Self) {
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self.wrong.extend(other.wrong);
        self.broken += other.broken;
    }

    /// Holds that all went as if nothing had failed.
    #[track_caller]
    fn assert_all_served(&self, fault: &str) {
        let total = self.statuses.values().sum::<usize>();
        let served = self.statuses.get(&200).copied().unwrap_or_default();
        assert_eq!((served, self.broken, self.wrong.len()), (total, 0, 0), "{fault}: {self:?}");
    }
}

/// Makes the requests of one client over as few connections as it can.
fn requests(port: u16, client: usize, method: &str, (pace, count): (Duration, usize)) -> Tally {
    let mut tally = Tally::default();
    // Nothing is ever sent: it is a clock.
    let (_never, clock) = channel::<()>();
    let mut connection = Http1Client::connect(port);
    for number in 0..count {
        let id = format!("{client}-{number}");
        let body = if method == "POST" { "content-length: 4\r\n\r\nsent" } else { "\r\n" };
        let answer = connection.ask(&format!("{method} /{id} HTTP/1.1\r\nhost: a\r\n{body}"));
        *tally.statuses.entry(answer.status).or_default() += 1;
        tally.broken += usize::from(answer.broken);
        if answer.status == 200 && !answer.broken && answer.body != id {
            tally.wrong.push(format!("{id} got {:?}", answer.body));
        }
        if answer.broken || answer.header("connection") == Some("close") {
            connection = Http1Client::connect(port);
        }
        assert!(clock.recv_timeout(pace).is_err(), "nobody sends anything");
    }
    tally
}

/// Makes the requests of all clients.
fn load(port: u16, method: &str, rhythm: (Duration, usize)) -> Tally {
    let mut all = Tally::default();
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| scope.spawn(move || requests(port, client, method, rhythm)))
            .collect();
        for client in clients {
            all.add(client.join().expect("a client comes to its end"));
        }
    });
    assert_eq!(all.statuses.values().sum::<usize>(), CLIENTS * rhythm.1);
    all
}

/// How often each id was seen by the service.
type Seen = Arc<Mutex<HashMap<String, usize>>>;

/// One request at a faulty service.
struct Asked<'a> {
    stream: &'a mut TcpStream,
    id: &'a str,
    /// Which of its connection it is, from 0.
    number: usize,
}

impl Asked<'_> {
    /// Gives the answer that is wanted, with more fields.
    fn answer(&mut self, fields: &str) -> bool {
        let answer = right_answer(self.id, fields);
        self.stream.write_all(answer.as_bytes()).is_ok()
    }

    fn say(&mut self, text: &str) -> bool {
        self.stream.write_all(text.as_bytes()).is_ok()
    }

    /// Says it, and nothing after it.
    fn last(&mut self, text: &str) -> bool {
        self.say(text);
        false
    }

    /// Makes the end of the connection a reset.
    fn reset(&self) -> bool {
        let socket = SockRef::from(&*self.stream);
        socket.set_linger(Some(Duration::ZERO)).expect("it is a TCP socket");
        false
    }
}

fn right_answer(id: &str, fields: &str) -> String {
    format!("HTTP/1.1 200 OK\r\n{fields}content-length: {}\r\n\r\n{id}", id.len())
}

/// A service that does this to each request, and closes the connection when that says so, or when it
/// was idle behind a request for `patience`, if there is an end to it.
fn faulty(
    patience: Option<Duration>,
    act: impl Fn(&mut Asked<'_>) -> bool + Send + Sync + 'static,
) -> (u16, Seen) {
    let seen = Seen::default();
    let noted = seen.clone();
    let backend = ScriptedServer::start(move |stream| {
        stream.set_nodelay(true).expect("it is a TCP socket");
        let mut reader = BufReader::new(stream);
        for number in 0.. {
            let Some(head) = read_head(&mut reader) else { return };
            let length = http1::header(&head, "content-length").unwrap_or("0");
            let mut body = vec![0; length.parse().expect("a number")];
            let id = head.split(' ').nth(1).unwrap_or_default().trim_start_matches('/');
            *lock(&noted).entry(id.to_owned()).or_default() += 1;
            // A large one is not read here.
            if body.len() < 1024 && reader.read_exact(&mut body).is_err() {
                return;
            }
            if !act(&mut Asked { stream: reader.get_mut(), id, number }) {
                return;
            }
            reader.get_ref().set_read_timeout(patience).expect("it is above zero");
        }
    });
    (backend.port, seen)
}

fn lock(seen: &Seen) -> std::sync::MutexGuard<'_, HashMap<String, usize>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn before(port: u16) -> SingleSidecar {
    SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1).start()
}

const STEADY: (Duration, usize) = (PACE, REQUESTS);

#[test]
fn connections_that_close_behind_an_answer_are_not_felt() {
    let (port, _) = faulty(None, |asked| {
        asked.answer("");
        false
    });
    let alone = before(port);
    load(alone.port, "GET", STEADY).assert_all_served("closed behind each answer");
    let (port, _) = faulty(None, |asked| {
        asked.answer("connection: close\r\n");
        false
    });
    let alone = before(port);
    load(alone.port, "GET", STEADY).assert_all_served("closed behind each answer, as announced");
    assert_eq!(alone.metric("weft_sidecar_upstream_retries_total"), 0, "it was announced");
}

/// A service that closes, or resets, connections that were idle for so long.
fn impatient(patience: Duration, resets: bool) -> SingleSidecar {
    let (port, _) = faulty(Some(patience), move |asked| {
        if resets {
            asked.reset();
        }
        asked.answer("")
    });
    before(port)
}

/// Each request comes when its service closes: of one client, of whom one connection waits at most.
#[test]
fn a_connection_that_ends_while_idle_is_not_felt() {
    for patience in [2, 8, 16].map(Duration::from_millis) {
        for resets in [false, true] {
            let alone = impatient(patience, resets);
            let tally = requests(alone.port, 0, "GET", (patience, 150));
            tally.assert_all_served(&format!("idle for {patience:?}, reset: {resets}"));
        }
    }
}

/// Alone on a machine it passes; beside other tests one of some thousand requests gets 502.
#[test]
fn many_connections_that_end_while_idle_are_not_felt() {
    for patience in [2, 8, 16].map(Duration::from_millis) {
        for resets in [false, true] {
            let alone = impatient(patience, resets);
            let tally = load(alone.port, "GET", STEADY);
            tally.assert_all_served(&format!("idle for {patience:?}, reset: {resets}"));
        }
    }
}

/// Each client asks again just when the service closes.
#[test]
fn a_service_that_keeps_connections_for_a_second_is_not_felt() {
    const SECOND: Duration = Duration::from_secs(1);
    let (port, _) = faulty(Some(SECOND), |asked| asked.answer("keep-alive: timeout=1\r\n"));
    let alone = before(port);
    std::thread::scope(|scope| {
        let steady = scope.spawn(|| load(alone.port, "GET", STEADY));
        load(alone.port, "GET", (SECOND, 4)).assert_all_served("a second apart");
        steady.join().expect("it ends").assert_all_served("all the while");
    });
}

#[test]
fn a_connection_is_closed_before_its_service_would() {
    let (sender, ends) = channel();
    let sender = Mutex::new(sender);
    let (port, _) = faulty(None, move |asked| {
        asked.answer("keep-alive: timeout=2\r\n");
        asked.stream.set_read_timeout(Some(Duration::from_secs(2))).expect("it is above zero");
        let ended = asked.stream.read(&mut [0]).is_ok_and(|read| read == 0);
        lock_sender(&sender).send(ended).expect("the test waits for it");
        false
    });
    let alone = before(port);
    assert_eq!(http1::ask(alone.port, "GET /x HTTP/1.1\r\nhost: a\r\n\r\n").status, 200);
    assert_eq!(ends.recv_timeout(DEADLINE), Ok(true), "the service had to close it");
}

fn lock_sender<T>(sender: &Mutex<Sender<T>>) -> std::sync::MutexGuard<'_, Sender<T>> {
    sender.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every connection takes one request, and fails the second without a word.
fn single_minded() -> (u16, Seen) {
    faulty(None, |asked| asked.number == 0 && asked.answer(""))
}

#[test]
fn a_request_that_may_be_repeated_is_repeated_when_its_connection_was_used() {
    let (port, seen) = single_minded();
    let alone = before(port);
    // One client alone: there is one connection at most to fail.
    let tally = requests(alone.port, 0, "GET", (Duration::from_millis(1), 200));
    tally.assert_all_served("failed at the second request");
    assert!(alone.metric("weft_sidecar_upstream_retries_total") > 0, "nothing was repeated");
    assert!(lock(&seen).values().all(|times| *times <= 2), "{:?}", lock(&seen));
}

/// A connection that was never used before cannot have been closed for being idle.
#[test]
fn a_request_is_repeated_over_a_new_connection() {
    let (port, _) = single_minded();
    let alone = before(port);
    load(alone.port, "GET", STEADY).assert_all_served("failed at the second request");
}

#[test]
fn a_post_that_may_have_been_seen_is_not_repeated() {
    let idle = faulty(Some(Duration::from_millis(8)), |asked| asked.answer(""));
    for (fault, (port, seen)) in [("idle", idle), ("the second", single_minded())] {
        let alone = before(port);
        let tally = load(alone.port, "POST", STEADY);
        let twice: Vec<_> =
            lock(&seen).iter().filter(|(_, times)| **times > 1).map(|(id, _)| id.clone()).collect();
        assert_eq!(twice, Vec::<String>::new(), "{fault}");
        assert_eq!((tally.wrong.len(), tally.broken), (0, 0), "{fault}: {tally:?}");
        let only = tally.statuses.keys().all(|status| [200, 502].contains(status));
        assert!(only && tally.statuses.contains_key(&200), "{fault}: {tally:?}");
    }
}

#[test]
fn a_service_that_closes_while_it_is_written_to_is_not_asked_again() {
    let (port, seen) = faulty(None, |asked| asked.reset());
    let alone = before(port);
    let body = "x".repeat(4 * 1024 * 1024);
    for number in 0..20 {
        let mut client = Http1Client::connect(alone.port);
        let length = body.len();
        client.send(format!(
            "POST /{number} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n"
        ));
        // It may be refused before all of it was sent.
        client.send(&body);
        let answer = client.answer("POST");
        assert!(answer.status == 502 || answer.broken, "{number}: {answer:?}");
    }
    assert_eq!(lock(&seen).len(), 20);
    assert!(lock(&seen).values().all(|times| *times == 1), "{:?}", lock(&seen));
}

#[test]
fn a_service_that_hangs_costs_its_own_requests_only() {
    let (port, _) = faulty(None, |asked| {
        if !asked.id.ends_with("7") {
            return asked.answer("");
        }
        drop(std::io::copy(asked.stream, &mut std::io::sink()));
        false
    });
    let mut wanted = SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1);
    wanted.http["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["timeout"] =
        json!("0.3s");
    let alone = wanted.start();
    let tally = load(alone.port, "GET", (PACE, 50));
    assert_eq!((tally.wrong.len(), tally.broken), (0, 0), "{tally:?}");
    // One in ten.
    assert_eq!(tally.statuses, BTreeMap::from([(200, 720), (504, 80)]));
}

/// Holds that no answer looks whole, and that only 502 is said beside.
#[track_caller]
fn check_broken(fault: &str, act: impl Fn(&mut Asked<'_>) -> bool + Send + Sync + 'static) {
    let (port, _) = faulty(None, act);
    let mut alone = before(port);
    let tally = load(alone.port, "GET", (PACE, 40));
    let refused = tally.statuses.get(&502).copied().unwrap_or_default();
    let total = tally.statuses.values().sum::<usize>();
    assert_eq!((tally.broken + refused, tally.wrong.len()), (total, 0), "{fault}: {tally:?}");
    alone.assert_healthy();
}

#[test]
fn an_answer_that_breaks_off_looks_broken() {
    const LENGTH: &str = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf";
    const CHUNKS: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n";
    check_broken("ended within its length", |asked| asked.last(LENGTH));
    check_broken("reset within its length", |asked| asked.say(LENGTH) && asked.reset());
    check_broken("ended within its chunks", |asked| asked.last(CHUNKS));
    check_broken("reset within its chunks", |asked| asked.say(CHUNKS) && asked.reset());
    check_broken("bad chunks", |asked| asked.say(&format!("{CHUNKS}zz\r\n")));
    check_broken("garbage", |asked| asked.say("\u{1}\u{2}\u{3}garbage\r\n\r\n"));
    check_broken("half a head", |asked| asked.last("HTTP/1.1 200 OK\r\nx-"));
}

/// HTTP/1.0 has no chunks: but for a reset, what ends early looks whole (RFC 9112, section 8).
#[test]
fn an_answer_that_breaks_off_looks_broken_to_http10() {
    let large = "x".repeat(100_000);
    let (port, _) = faulty(None, move |asked| {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        asked.say(&format!("{head}186a0\r\n{large}\r\n")) && asked.reset()
    });
    let alone = before(port);
    let answer = http1::ask(alone.port, "GET /x HTTP/1.0\r\nhost: a\r\n\r\n");
    assert!(answer.broken || answer.status == 502, "{} bytes looked whole", answer.body.len());
}

#[test]
fn what_follows_an_answer_is_nobodys() {
    let check = |fault: &str, behind: fn(&str) -> String| {
        let (port, _) = faulty(None, move |asked| {
            let answer = right_answer(asked.id, "") + &behind(asked.id);
            asked.say(&answer)
        });
        let alone = before(port);
        load(alone.port, "GET", STEADY).assert_all_served(fault);
    };
    check("a length too short", |_| "tail".to_owned());
    check("two answers", |id| right_answer(id, ""));
    check("an interim one behind", |_| "HTTP/1.1 103 Early Hints\r\n\r\n".to_owned());
    check("a request", |_| "GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned());
}

/// A service that says something more once its answer has come to the client, and tells when it is said.
fn afterthoughts() -> (u16, Sender<()>, Receiver<()>) {
    let (arrived, go_on) = channel::<()>();
    let (say, said) = channel();
    let (go_on, say) = (Mutex::new(go_on), Mutex::new(say));
    let first = AtomicUsize::new(0);
    let (port, _) = faulty(None, move |asked| {
        let is_open = asked.answer("");
        if first.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            let go_on = go_on.lock().unwrap_or_else(PoisonError::into_inner);
            go_on.recv_timeout(DEADLINE).unwrap_or_default();
            asked.say(&right_answer("stray", ""));
            lock_sender(&say).send(()).expect("the test waits for it");
        }
        is_open
    });
    (port, arrived, said)
}

#[test]
fn an_answer_that_nobody_asked_for_is_given_to_nobody() {
    let (port, arrived, said) = afterthoughts();
    let alone = before(port);
    let mut client = Http1Client::connect(alone.port);
    for number in 0..200 {
        for turn in ["first", "second"] {
            let id = format!("{number}-{turn}");
            let answer = client.ask(&format!("GET /{id} HTTP/1.1\r\nhost: a\r\n\r\n"));
            assert_eq!((answer.status, answer.body.as_str()), (200, id.as_str()));
            if turn == "first" {
                arrived.send(()).expect("the service waits for it");
                said.recv_timeout(DEADLINE).expect("the service has said it");
            }
        }
    }
}

#[test]
fn a_service_that_ends_its_side_may_still_be_heard() {
    let (port, _) = faulty(None, |asked| {
        let whole = asked.answer("");
        drop(asked.stream.shutdown(Shutdown::Write));
        whole
    });
    let alone = before(port);
    load(alone.port, "GET", (PACE, 40)).assert_all_served("half closed");
}

#[test]
fn opaque_connection_goes_to_another_endpoint_when_one_refuses() {
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
