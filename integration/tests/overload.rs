//! More than there is room for: each limit is held to, who comes too late is told so, the others are served
//! meanwhile, and whoever comes when there is room again is served.

use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_integration::bootstrap::endpoints;
use weft_integration::curl::Curl;
use weft_integration::http1;
use weft_integration::http2_frames::flag::{ACK, END_HEADERS, NONE, WHOLE};
use weft_integration::http2_frames::kind::{HEADERS, PING, SETTINGS, WINDOW_UPDATE};
use weft_integration::http2_frames::{
    Http2Frame, Http2FrameClient, PREFACE, StreamOutcome, frame, get, headers, setting,
};
use weft_integration::http2_probe::{FRAME_BYTES, INITIAL_WINDOW_SIZE, POST, data};
use weft_integration::origin_server::OriginServer;
use weft_integration::process::{run, tool};
use weft_integration::recording_server::RecordingServer;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::SidecarLaunch;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
const HOLD: &str = "GET /hold HTTP/1.1\r\nhost: a\r\n\r\n";
const REFUSED: &str = "weft_sidecar_http2_window_refusals_total";
const OVERLOADED: &str = "weft_sidecar_requests_denied_total{reason=\"overloaded\"}";
/// The window that a connection has by the RFC, and the sidecar's while it has plenty.
const SMALL_BYTES: u32 = 65_535;
const FULL_BYTES: u32 = 4 * 1024 * 1024;

#[allow(clippy::disallowed_methods, reason = "how long something takes is what is tested")]
fn now() -> Instant {
    Instant::now()
}

/// A service that counts its connections.
struct Counted {
    port: u16,
    count: Arc<Count>,
}

#[derive(Default)]
struct Count {
    open: AtomicUsize,
    most: AtomicUsize,
    requests: AtomicUsize,
}

impl Count {
    fn enter(&self) {
        let open = self.open.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(open, Ordering::SeqCst);
    }

    fn leave(&self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Counted {
    fn start(serve: impl Fn(TcpStream, &Count) + Send + Sync + 'static) -> Self {
        let count = Arc::<Count>::default();
        let counted = count.clone();
        let port = ScriptedServer::start(move |stream| {
            counted.enter();
            serve(stream, &counted);
            counted.leave();
        })
        .port;
        Self { port, count }
    }

    /// Answers when so many requests wait for it, and no earlier.
    fn in_groups_of(size: usize) -> Self {
        let together = Barrier::new(size);
        Self::start(move |stream, count| {
            let mut reader = BufReader::new(stream);
            while read_head(&mut reader).is_some() {
                together.wait();
                count.requests.fetch_add(1, Ordering::SeqCst);
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                // Whoever is gone reads no more either.
                drop(reader.get_mut().write_all(answer));
            }
        })
    }

    /// Takes one request at a time on each connection of HTTP/2, and never answers.
    fn silent_http2() -> Self {
        Self::start(|stream, count| drop(take_requests(stream, count)))
    }

    /// Stands before another service.
    fn before(port: u16) -> Self {
        Self::start(move |mut client, _| {
            let mut service = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
            let mut back = service.try_clone().expect("a file more");
            let mut answers = client.try_clone().expect("a file more");
            std::thread::spawn(move || std::io::copy(&mut back, &mut answers));
            // It ends one way or the other.
            drop(std::io::copy(&mut client, &mut service));
            drop(service.shutdown(std::net::Shutdown::Both));
        })
    }

    fn most(&self) -> usize {
        self.count.most.load(Ordering::SeqCst)
    }
}

/// Counts each request once the client has acknowledged that a connection takes one at a time.
fn take_requests(mut stream: TcpStream, count: &Count) -> std::io::Result<()> {
    const MAX_CONCURRENT_STREAMS: u16 = 3;
    stream.write_all(&frame(SETTINGS, NONE, 0, &setting(MAX_CONCURRENT_STREAMS, 1)))?;
    stream.read_exact(&mut [0; PREFACE.len()])?;
    let mut waiting = 0;
    let mut is_settled = false;
    loop {
        let mut header = [0; 9];
        stream.read_exact(&mut header)?;
        let [a, b, c, kind, flags, ..] = header;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        stream.read_exact(&mut payload)?;
        match (kind, flags & ACK != 0) {
            (SETTINGS, true) => is_settled = true,
            (SETTINGS, false) => stream.write_all(&frame(SETTINGS, ACK, 0, &[]))?,
            (PING, false) => stream.write_all(&frame(PING, ACK, 0, &payload))?,
            (HEADERS, _) => waiting += 1,
            _ => {}
        }
        if is_settled {
            count.requests.fetch_add(std::mem::take(&mut waiting), Ordering::SeqCst);
        }
    }
}

fn at_most(connections: u32) -> Value {
    json!({"thresholds": [{"max_connections": connections}]})
}

/// A sidecar of one worker before a service to which it may have so many connections.
fn limited(
    port: u16,
    speaks: UpstreamHttp,
    connections: u32,
    connect_timeout: &str,
) -> SingleSidecarConfig {
    SingleSidecarConfig::for_upstream(port, speaks)
        .with_cluster("circuit_breakers", &at_most(connections))
        .with_cluster("connect_timeout", &json!(connect_timeout))
        .with_one_worker(&[])
}

/// The statuses that so many clients get at once, each over a connection of its own.
fn ask_at_once(port: u16, clients: usize) -> Vec<u16> {
    let start = Barrier::new(clients);
    std::thread::scope(|scope| {
        let ask = || {
            let mut client = http1::Http1Client::connect(port);
            start.wait();
            client.ask(GET).status
        };
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(ask)).collect();
        clients.into_iter().map(|client| client.join().expect("it is answered")).collect()
    })
}

#[test]
fn a_cluster_has_as_many_connections_as_it_may_and_others_wait() {
    // It answers nobody before the limit is reached.
    let service = Counted::in_groups_of(2);
    let mut alone = limited(service.port, UpstreamHttp::Http1, 2, "10s").start();
    assert_eq!(ask_at_once(alone.port, 10), [200; 10]);
    assert_eq!(service.most(), 2);
    assert_eq!(alone.metric("weft_sidecar_upstream_connections_total"), 2);
    assert_eq!(alone.metric(OVERLOADED), 0);
    alone.assert_healthy();
}

#[test]
fn whoever_waits_longer_than_for_a_connection_is_refused() {
    let service = RecordingServer::start();
    let mut alone = limited(service.port, UpstreamHttp::Http1, 2, "0.3s").start();
    let hold = |_| {
        let mut client = http1::Http1Client::connect(alone.port);
        client.send(HOLD);
        client
    };
    let held: Vec<http1::Http1Client> = (0..2).map(hold).collect();
    eventually("both are held", || {
        (alone.metric("weft_sidecar_upstream_connections_total") == 2).then_some(())
    });
    let before = now();
    let answer = http1::ask(alone.port, GET);
    let waited = before.elapsed();
    assert_eq!((answer.status, answer.body.as_str()), (503, "overloaded\n"), "{}", answer.head);
    assert!(waited >= Duration::from_millis(300), "it waited {waited:?}");
    assert!(waited < Duration::from_secs(5), "it waited {waited:?}");
    let line = alone.access_line("\"overloaded\"");
    assert_eq!(line.get("status"), Some(&json!(503)), "{line}");
    let mut client = Http2FrameClient::connect(alone.port);
    client.send(&headers(WHOLE, 1, &get("/")));
    assert_eq!(client.outcome(1), StreamOutcome::Answered(503));
    assert_eq!(alone.metric(OVERLOADED), 2);
    drop(held);
    eventually("there is room again", || (http1::ask(alone.port, GET).status == 200).then_some(()));
    alone.assert_healthy();
}

#[test]
fn every_endpoint_is_served_whatever_the_others_hold() {
    let services = [Counted::in_groups_of(1), Counted::in_groups_of(1)];
    let ports = services.each_ref().map(|service| service.port);
    let mut alone = limited(ports[0], UpstreamHttp::Http1, 1, "10s")
        .with_cluster("load_assignment", &endpoints("service", &ports))
        .start();
    assert_eq!(ask_at_once(alone.port, 20), [200; 20]);
    for Counted { port, count } in &services {
        let served = count.requests.load(Ordering::SeqCst);
        assert!(served > 0, "port {port} got nothing");
        assert_eq!(count.most.load(Ordering::SeqCst), 1, "port {port}");
    }
    alone.assert_healthy();
}

#[test]
fn calls_to_a_service_of_http2_share_the_one_connection() {
    let (_process, port) = OriginServer::start_http2();
    let service = Counted::before(port);
    let mut alone = limited(service.port, UpstreamHttp::Http2, 1, "10s").start();
    assert_eq!(ask_at_once(alone.port, 10), [200; 10]);
    // Twice as many at once as the service takes streams.
    let mut load = tool("h2load");
    load.args(["--clients", "4", "--max-concurrent-streams", "50", "--requests", "400"]);
    let told = run(load.arg(format!("http://127.0.0.1:{}/length", alone.port)));
    assert!(told.contains("400 2xx"), "{told}");
    assert_eq!(service.most(), 1);
    alone.assert_healthy();
}

/// What becomes of a request over a connection of HTTP/2, which stays open.
fn ask_by_http2(port: u16) -> (Http2FrameClient, StreamOutcome) {
    let mut client = Http2FrameClient::connect(port);
    client.send(&headers(WHOLE, 1, &get("/")));
    let outcome = client.outcome(1);
    (client, outcome)
}

/// Begins a body on a connection of its own, which does not end; whether it is let in.
fn begin_body(alone: &SingleSidecar) -> (Http2FrameClient, bool) {
    let count = |alone: &SingleSidecar| alone.metric("weft_sidecar_requests_total");
    let (refused, before) = (alone.metric(REFUSED), count(alone));
    let mut client = Http2FrameClient::connect(alone.port);
    client.send(&headers(END_HEADERS, 1, &POST));
    eventually("the request is there", || (count(alone) > before).then_some(()));
    (client, alone.metric(REFUSED) == refused)
}

/// Connections of HTTP/2 on each of which a body may arrive, until one more is refused.
fn use_up(alone: &SingleSidecar) -> Vec<Http2FrameClient> {
    let mut held = Vec::new();
    loop {
        let (client, is_let_in) = begin_body(alone);
        if !is_let_in {
            return held;
        }
        held.push(client);
        assert!(held.len() <= 16, "{} windows of {SMALL_BYTES} are more than 1 MiB", held.len());
    }
}

/// The window of a connection and that of each stream, as the sidecar says at the start; none when it
/// says instead that the connection ends.
fn windows(client: &mut Http2FrameClient) -> Option<(u32, u32)> {
    let (mut connection, mut stream) = (SMALL_BYTES, SMALL_BYTES);
    let mut see = |frame: &Http2Frame| match (frame.kind, frame.stream) {
        (WINDOW_UPDATE, 0) => connection += frame.number(0),
        (SETTINGS, 0) => stream = initial_window(frame).unwrap_or(stream),
        _ => {}
    };
    // What is said at the start may follow the answer to the first, and never that to the second.
    round_trip(client, &mut see)?;
    round_trip(client, &mut see)?;
    Some((connection, stream))
}

/// All that has come when a PING is answered; none when the connection ends before.
fn round_trip(client: &mut Http2FrameClient, see: &mut impl FnMut(&Http2Frame)) -> Option<()> {
    client.send(&frame(PING, NONE, 0, &[7; 8]));
    loop {
        let came = client.receive().ok()?;
        match (came.kind, came.flags & ACK != 0) {
            (PING, true) => return Some(()),
            // Until then its windows are the RFC's (RFC 9113, section 6.5.3).
            (SETTINGS, false) => drop(client.send(&frame(SETTINGS, ACK, 0, &[]))),
            _ => {}
        }
        see(&came);
    }
}

fn initial_window(settings: &Http2Frame) -> Option<u32> {
    let setting = settings
        .payload
        .chunks_exact(6)
        .find(|setting| setting.starts_with(&INITIAL_WINDOW_SIZE.to_be_bytes()))?;
    Some(u32::from_be_bytes(setting.get(2..)?.try_into().ok()?))
}

fn with_one_mib(port: u16, speaks: UpstreamHttp) -> SingleSidecar {
    SingleSidecarConfig::for_upstream(port, speaks)
        .with_one_worker(&["--window-limit", "1"])
        .start()
}

#[test]
fn bodies_beyond_the_window_limit_are_refused_with_503() {
    const TOO_MANY: u64 = 10;
    let mut alone = with_one_mib(ScriptedServer::echoing_heads().port, UpstreamHttp::Http1);
    let mut held = use_up(&alone);
    assert!((11..=12).contains(&held.len()), "{} have a window", held.len());
    let refused = alone.metric(REFUSED);
    for _ in 0..TOO_MANY {
        let (mut client, is_let_in) = begin_body(&alone);
        assert!(!is_let_in);
        assert_eq!(client.outcome(1), StreamOutcome::Answered(503));
        assert_eq!(ask_by_http2(alone.port).1, StreamOutcome::Answered(200), "without a body");
        assert_eq!(http1::ask(alone.port, GET).status, 200, "HTTP/1.1 needs no window");
    }
    assert_eq!(alone.metric(REFUSED) - refused, TOO_MANY);
    // The connections that came before are served.
    for client in &mut held {
        client.send(&headers(WHOLE, 3, &get("/")));
        assert_eq!(client.outcome(3), StreamOutcome::Answered(200));
    }
    drop(held);
    eventually("there is room again", || begin_body(&alone).1.then_some(()));
    let again = use_up(&alone);
    assert!((10..=12).contains(&again.len()), "{} have a window again", again.len());
    alone.assert_healthy();
}

#[test]
fn a_window_is_full_while_there_is_plenty() {
    let service = ScriptedServer::echoing_heads();
    let check = |arguments: &[&str], bytes: &[u32]| {
        let alone = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1)
            .with_one_worker(arguments)
            .start();
        // All of them stay open.
        let mut clients: Vec<Http2FrameClient> =
            bytes.iter().map(|_| Http2FrameClient::connect(alone.port)).collect();
        let told: Vec<u32> =
            clients.iter_mut().map(|client| windows(client).map_or(0, |(all, _)| all)).collect();
        // Which of them is taken in first is not said.
        let full = |told: &[u32]| told.iter().filter(|told| **told == FULL_BYTES).count();
        let small = |told: &[u32]| told.iter().filter(|told| **told == SMALL_BYTES).count();
        assert_eq!((full(&told), small(&told)), (full(bytes), small(bytes)), "{arguments:?}");
    };
    check(&[], &[FULL_BYTES; 3]);
    check(&["--window-limit", "32"], &[FULL_BYTES, FULL_BYTES, FULL_BYTES, SMALL_BYTES]);
    check(&["--window-limit", "16"], &[FULL_BYTES, SMALL_BYTES, SMALL_BYTES]);
    check(&["--window-limit", "10"], &[SMALL_BYTES; 3]);
}

#[test]
fn a_service_of_http2_is_reached_whatever_clients_hold() {
    let (_process, port) = OriginServer::start_http2();
    let mut alone = with_one_mib(port, UpstreamHttp::Http2);
    let held = use_up(&alone);
    assert!((11..=12).contains(&held.len()), "{} have a window", held.len());
    assert_eq!(http1::ask(alone.port, GET).status, 200);
    alone.assert_healthy();
}

#[test]
fn request_beyond_the_window_limit_of_endpoints_is_refused_without_a_connection() {
    // A quarter of 1 MiB.
    const WINDOWS: usize = 4;
    let service = Counted::silent_http2();
    let mut alone = with_one_mib(service.port, UpstreamHttp::Http2);
    let taken = || service.count.requests.load(Ordering::SeqCst);
    let hold = || {
        let mut client = http1::Http1Client::connect(alone.port);
        assert!(client.send(GET));
        client
    };
    let mut held = Vec::new();
    for number in 1..=WINDOWS {
        held.push(hold());
        eventually("the service has the request", || (taken() == number).then_some(()));
    }
    let overloaded = alone.metric(OVERLOADED);
    for _ in 0..10 {
        assert_eq!(http1::ask(alone.port, GET).status, 503);
    }
    assert_eq!(alone.metric(OVERLOADED) - overloaded, 10);
    assert_eq!(service.most(), WINDOWS, "no connection was opened for a refused request");
    drop(held);
    let mut again = Vec::new();
    eventually("there is room again", || {
        again.push(hold());
        (taken() > WINDOWS).then_some(())
    });
    alone.assert_healthy();
}

/// Sends as much of bodies as the windows let it; how much that was.
fn fill(client: &mut Http2FrameClient) -> u32 {
    let (mut left, of_stream) = windows(client).expect("it has a window");
    let granted = left;
    for stream in (1..).step_by(2) {
        client.send(&headers(END_HEADERS, stream, &POST));
        let mut left_of_stream = of_stream.min(left);
        left -= left_of_stream;
        while left_of_stream > 0 {
            let bytes = left_of_stream.min(u32::try_from(FRAME_BYTES).expect("it is small"));
            let piece = vec![b'x'; bytes as usize];
            assert!(client.send(&data(NONE, stream, &piece)), "the windows allow it");
            left_of_stream -= bytes;
        }
        if left == 0 {
            break;
        }
    }
    let mut told = Vec::new();
    let is_answered = round_trip(client, &mut |frame| told.push(frame.clone())).is_some();
    assert!(is_answered && told.is_empty(), "nobody took any of it: {told:?}");
    granted
}

#[test]
fn what_windows_let_in_is_bounded_for_all_connections_together() {
    const CLIENTS: usize = 40;
    const GROWTH_BYTES: u64 = 16 * 1024 * 1024;
    let service = RecordingServer::start();
    // Requests wait for the connection that somebody holds, so none of their bodies is taken: not even
    // by the kernel's buffers before a service.
    let wanted = limited(service.port, UpstreamHttp::Http1, 1, "60s");
    let mut alone = wanted.with_one_worker(&["--window-limit", "12"]).start();
    let mut holder = http1::Http1Client::connect(alone.port);
    holder.send(HOLD);
    eventually("it is held", || (!service.take().is_empty()).then_some(()));
    let before = alone.sidecar.resident_memory();
    let mut clients: Vec<Http2FrameClient> =
        (0..CLIENTS).map(|_| Http2FrameClient::connect(alone.port)).collect();
    let sent: u64 = clients.iter_mut().map(|client| u64::from(fill(client))).sum();
    let [full, small] = [FULL_BYTES, SMALL_BYTES].map(u64::from);
    assert_eq!(
        sent,
        full + (CLIENTS as u64 - 1) * small,
        "one has a full window, the others small"
    );
    let grown = alone.sidecar.peak_memory().saturating_sub(before);
    assert!(grown < GROWTH_BYTES, "it grew by {grown} bytes for {sent}");
    // Were nothing of it kept, this would tell nothing.
    assert!(grown > sent / 2, "it grew by {grown} bytes for {sent}: where are they?");
    alone.assert_healthy();
}

#[test]
fn without_files_it_rests_and_goes_on_when_there_are_some() {
    const FILES: u32 = 120;
    const CLIENTS: usize = 300;
    const WATCHED: Duration = Duration::from_secs(3);
    let service = RecordingServer::start();
    let mut wanted =
        SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1).with_one_worker(&[]);
    wanted.launch = SidecarLaunch { open_files: Some(FILES), ..wanted.launch };
    let mut alone = wanted.start();
    let connect = |_| TcpStream::connect((Ipv4Addr::LOCALHOST, alone.port));
    let clients: Result<Vec<TcpStream>, _> = (0..CLIENTS).map(connect).collect();
    let mut clients = clients.expect("the kernel takes them in");
    eventually("no file is left", || (alone.sidecar.open_files() >= FILES as usize).then_some(()));
    let before = alone.sidecar.cpu_time();
    let last = clients.last_mut().expect("there are some");
    last.write_all(GET.as_bytes()).expect("it is open");
    last.set_read_timeout(Some(WATCHED)).expect("it is above zero");
    let unserved = last.read(&mut [0; 8]).expect_err("it waits for a file");
    assert_eq!(unserved.kind(), ErrorKind::WouldBlock, "{unserved}");
    let taken = alone.sidecar.cpu_time().saturating_sub(before);
    assert!(taken < Duration::from_millis(300), "it took {taken:?} of {WATCHED:?}");
    assert_eq!(Curl::get(alone.sidecar.admin, "/ready").run().status, 200);
    assert!(alone.metric("weft_sidecar_connections_open") < FILES.into());
    drop(clients);
    let gone = now();
    assert_eq!(http1::ask(alone.port, GET).status, 200);
    let waited = gone.elapsed();
    assert!(waited < Duration::from_secs(1), "it waited {waited:?}");
    alone.assert_healthy();
}

/// Idle connections of HTTP/2 that have been served.
fn idle(alone: &SingleSidecar, count: usize) -> Vec<Http2FrameClient> {
    let serve = |_| {
        let (client, outcome) = ask_by_http2(alone.port);
        assert_eq!(outcome, StreamOutcome::Answered(200));
        client
    };
    (0..count).map(serve).collect()
}

#[test]
fn idle_http2_connections_are_no_burden_on_the_window_limit() {
    const FIRST: usize = 100;
    const CONNECTIONS: usize = 1_700;
    const EACH_BYTES: u64 = 40 * 1024;
    let service = ScriptedServer::echoing_heads();
    let mut alone = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1)
        .with_one_worker(&[])
        .start();
    // What the first ones need beside themselves is there.
    let _first = idle(&alone, FIRST);
    let before = alone.sidecar.resident_memory();
    let held = idle(&alone, CONNECTIONS);
    let grown = alone.sidecar.resident_memory().saturating_sub(before);
    let each = grown / CONNECTIONS as u64;
    assert!(each < EACH_BYTES, "{each} bytes for each, in a build that is not optimized");
    assert_eq!(alone.metric(REFUSED), 0);
    drop(held);
    eventually("memory is given back", || {
        let left = alone.sidecar.resident_memory().saturating_sub(before);
        (left < grown / 2).then_some(())
    });
    alone.assert_healthy();
}
