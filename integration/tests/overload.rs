//! Overload: each limit is enforced, requests above it are rejected, other requests are served
//! meanwhile, and new requests are served once there is capacity.

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
/// The initial window of the RFC, and the sidecar's window while memory is plentiful.
const SMALL_BYTES: u32 = 65_535;
const FULL_BYTES: u32 = 4 * 1024 * 1024;

#[expect(clippy::disallowed_methods, reason = "the test measures elapsed time")]
fn now() -> Instant {
    Instant::now()
}

/// A service that counts its connections and requests.
struct CountingServer {
    port: u16,
    count: Arc<Counters>,
}

#[derive(Default)]
struct Counters {
    open: AtomicUsize,
    most: AtomicUsize,
    requests: AtomicUsize,
}

impl Counters {
    fn enter(&self) {
        let open = self.open.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(open, Ordering::SeqCst);
    }

    fn leave(&self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl CountingServer {
    fn start(serve: impl Fn(TcpStream, &Counters) + Send + Sync + 'static) -> Self {
        let count = Arc::<Counters>::default();
        let counted = count.clone();
        let port = ScriptedServer::start(move |stream| {
            counted.enter();
            serve(stream, &counted);
            counted.leave();
        })
        .port;
        Self { port, count }
    }

    /// Responds only when this many requests wait.
    fn in_groups_of(size: usize) -> Self {
        let together = Barrier::new(size);
        Self::start(move |stream, count| {
            let mut reader = BufReader::new(stream);
            while read_head(&mut reader).is_some() {
                together.wait();
                count.requests.fetch_add(1, Ordering::SeqCst);
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                // The client may have closed the connection.
                drop(reader.get_mut().write_all(answer));
            }
        })
    }

    /// Accepts one stream at a time per HTTP/2 connection, and never responds.
    fn silent_http2() -> Self {
        Self::start(|stream, count| drop(take_requests(stream, count)))
    }

    /// Forwards connections to another service.
    fn before(port: u16) -> Self {
        Self::start(move |mut client, _| {
            let mut service = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
                .expect("the port accepts connections");
            let mut back = service.try_clone().expect("the socket can be duplicated");
            let mut answers = client.try_clone().expect("the socket can be duplicated");
            std::thread::spawn(move || std::io::copy(&mut back, &mut answers));
            // How the connection ends does not matter.
            drop(std::io::copy(&mut client, &mut service));
            drop(service.shutdown(std::net::Shutdown::Both));
        })
    }

    fn most(&self) -> usize {
        self.count.most.load(Ordering::SeqCst)
    }
}

/// Counts each request after the client has acknowledged SETTINGS_MAX_CONCURRENT_STREAMS of 1.
fn take_requests(mut stream: TcpStream, count: &Counters) -> std::io::Result<()> {
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

/// A sidecar with one worker, in front of a service with a connection limit.
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

/// The statuses of concurrent requests, each over a new connection.
fn ask_at_once(port: u16, clients: usize) -> Vec<u16> {
    let start = Barrier::new(clients);
    std::thread::scope(|scope| {
        let ask = || {
            let mut client = http1::Http1Client::connect(port);
            start.wait();
            client.ask(GET).status
        };
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(ask)).collect();
        clients.into_iter().map(|client| client.join().expect("the request is answered")).collect()
    })
}

#[test]
fn requests_above_the_connection_limit_wait_for_a_connection() {
    // The service responds only when the limit is reached.
    let service = CountingServer::in_groups_of(2);
    let mut sidecar = limited(service.port, UpstreamHttp::Http1, 2, "10s").start();
    assert_eq!(ask_at_once(sidecar.port, 10), [200; 10]);
    assert_eq!(service.most(), 2);
    assert_eq!(sidecar.metric("weft_sidecar_upstream_connections_total"), 2);
    assert_eq!(sidecar.metric(OVERLOADED), 0);
    sidecar.assert_healthy();
}

#[test]
fn request_that_waits_too_long_for_a_connection_gets_503() {
    let service = RecordingServer::start();
    let mut sidecar = limited(service.port, UpstreamHttp::Http1, 2, "0.3s").start();
    let hold = |_| {
        let mut client = http1::Http1Client::connect(sidecar.port);
        client.send(HOLD);
        client
    };
    let held: Vec<http1::Http1Client> = (0..2).map(hold).collect();
    eventually("both connections are in use", || {
        (sidecar.metric("weft_sidecar_upstream_connections_total") == 2).then_some(())
    });
    let before = now();
    let answer = http1::ask(sidecar.port, GET);
    let waited = before.elapsed();
    assert_eq!((answer.status, answer.body.as_str()), (503, "overloaded\n"), "{}", answer.head);
    assert!(waited >= Duration::from_millis(300), "the request waited {waited:?}");
    assert!(waited < Duration::from_secs(5), "the request waited {waited:?}");
    let line = sidecar.access_line("\"overflow\"");
    assert_eq!(line.get("response_code"), Some(&json!(503)), "{line}");
    let mut client = Http2FrameClient::connect(sidecar.port);
    client.send(&headers(WHOLE, 1, &get("/")));
    assert_eq!(client.outcome(1), StreamOutcome::Answered(503));
    assert_eq!(sidecar.metric(OVERLOADED), 2);
    drop(held);
    eventually("requests are served again", || {
        (http1::ask(sidecar.port, GET).status == 200).then_some(())
    });
    sidecar.assert_healthy();
}

#[test]
fn busy_endpoint_does_not_block_other_endpoints() {
    let services = [CountingServer::in_groups_of(1), CountingServer::in_groups_of(1)];
    let ports = services.each_ref().map(|service| service.port);
    let mut sidecar = limited(ports[0], UpstreamHttp::Http1, 1, "10s")
        .with_cluster("load_assignment", &endpoints("service", &ports))
        .start();
    assert_eq!(ask_at_once(sidecar.port, 20), [200; 20]);
    for CountingServer { port, count } in &services {
        let served = count.requests.load(Ordering::SeqCst);
        assert!(served > 0, "port {port} received no request");
        assert_eq!(count.most.load(Ordering::SeqCst), 1, "port {port}");
    }
    sidecar.assert_healthy();
}

#[test]
fn http2_requests_share_one_connection() {
    let (_process, port) = OriginServer::start_http2();
    let service = CountingServer::before(port);
    let mut sidecar = limited(service.port, UpstreamHttp::Http2, 1, "10s").start();
    assert_eq!(ask_at_once(sidecar.port, 10), [200; 10]);
    // Twice as many concurrent requests as the service accepts streams.
    let mut load = tool("h2load");
    load.args(["--clients", "4", "--max-concurrent-streams", "50", "--requests", "400"]);
    let updates = run(load.arg(format!("http://127.0.0.1:{}/length", sidecar.port)));
    assert!(updates.contains("400 2xx"), "{updates}");
    assert_eq!(service.most(), 1);
    sidecar.assert_healthy();
}

/// Sends a request over HTTP/2; returns the outcome and the open connection.
fn ask_by_http2(port: u16) -> (Http2FrameClient, StreamOutcome) {
    let mut client = Http2FrameClient::connect(port);
    client.send(&headers(WHOLE, 1, &get("/")));
    let outcome = client.outcome(1);
    (client, outcome)
}

/// Starts an upload on a new connection; returns whether it is accepted.
fn begin_body(sidecar: &SingleSidecar) -> (Http2FrameClient, bool) {
    let count = |sidecar: &SingleSidecar| {
        let finished = sidecar.metric("weft_sidecar_requests_total");
        finished + sidecar.metric("weft_sidecar_requests_open")
    };
    let refused = sidecar.metric(REFUSED);
    let before = count(sidecar);
    let mut client = Http2FrameClient::connect(sidecar.port);
    client.send(&headers(END_HEADERS, 1, &POST));
    eventually("the request is counted", || (count(sidecar) > before).then_some(()));
    (client, sidecar.metric(REFUSED) == refused)
}

/// Opens HTTP/2 connections with an upload each, until one is rejected.
fn use_up(sidecar: &SingleSidecar) -> Vec<Http2FrameClient> {
    let mut held = Vec::new();
    loop {
        let (client, is_let_in) = begin_body(sidecar);
        if !is_let_in {
            return held;
        }
        held.push(client);
        assert!(held.len() <= 16, "{} windows of {SMALL_BYTES} are more than 1 MiB", held.len());
    }
}

/// The window of a connection and of each stream, from the sidecar's first frames; `None` if it
/// closes the connection instead.
fn windows(client: &mut Http2FrameClient) -> Option<(u32, u32)> {
    let mut connection = SMALL_BYTES;
    let mut stream = SMALL_BYTES;
    let mut see = |frame: &Http2Frame| match (frame.kind, frame.stream) {
        (WINDOW_UPDATE, 0) => connection += frame.number(0),
        (SETTINGS, 0) => stream = initial_window(frame).unwrap_or(stream),
        _ => {}
    };
    // The first frames may follow the response to the first PING, but not the response to the
    // second.
    round_trip(client, &mut see)?;
    round_trip(client, &mut see)?;
    Some((connection, stream))
}

/// Reads frames until a PING is acknowledged; `None` when the connection ends before.
fn round_trip(client: &mut Http2FrameClient, see: &mut impl FnMut(&Http2Frame)) -> Option<()> {
    client.send(&frame(PING, NONE, 0, &[7; 8]));
    loop {
        let came = client.receive().ok()?;
        match (came.kind, came.flags & ACK != 0) {
            (PING, true) => return Some(()),
            // Until SETTINGS arrive, the windows have the default of RFC 9113, section 6.5.3.
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
fn uploads_above_the_window_limit_get_503() {
    const TOO_MANY: u64 = 10;
    let mut sidecar = with_one_mib(ScriptedServer::echoing_heads().port, UpstreamHttp::Http1);
    let mut held = use_up(&sidecar);
    assert!((11..=12).contains(&held.len()), "{} have a window", held.len());
    let refused = sidecar.metric(REFUSED);
    for _ in 0..TOO_MANY {
        let (mut client, is_let_in) = begin_body(&sidecar);
        assert!(!is_let_in);
        assert_eq!(client.outcome(1), StreamOutcome::Answered(503));
        assert_eq!(ask_by_http2(sidecar.port).1, StreamOutcome::Answered(200), "without a body");
        assert_eq!(http1::ask(sidecar.port, GET).status, 200, "HTTP/1.1 needs no window");
    }
    assert_eq!(sidecar.metric(REFUSED) - refused, TOO_MANY);
    // Earlier connections are served.
    for client in &mut held {
        client.send(&headers(WHOLE, 3, &get("/")));
        assert_eq!(client.outcome(3), StreamOutcome::Answered(200));
    }
    drop(held);
    eventually("requests are served again", || begin_body(&sidecar).1.then_some(()));
    let again = use_up(&sidecar);
    assert!((10..=12).contains(&again.len()), "{} have a window again", again.len());
    sidecar.assert_healthy();
}

#[test]
fn connection_gets_a_full_window_while_memory_is_plentiful() {
    let service = ScriptedServer::echoing_heads();
    let check = |arguments: &[&str], bytes: &[u32]| {
        let sidecar = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1)
            .with_one_worker(arguments)
            .start();
        // All connections stay open.
        let mut clients: Vec<Http2FrameClient> =
            bytes.iter().map(|_| Http2FrameClient::connect(sidecar.port)).collect();
        let updates: Vec<u32> =
            clients.iter_mut().map(|client| windows(client).map_or(0, |(all, _)| all)).collect();
        // The order in which connections are accepted is undefined.
        let full =
            |updates: &[u32]| updates.iter().filter(|updates| **updates == FULL_BYTES).count();
        let small =
            |updates: &[u32]| updates.iter().filter(|updates| **updates == SMALL_BYTES).count();
        assert_eq!((full(&updates), small(&updates)), (full(bytes), small(bytes)), "{arguments:?}");
    };
    check(&[], &[FULL_BYTES; 3]);
    check(&["--window-limit", "32"], &[FULL_BYTES, FULL_BYTES, FULL_BYTES, SMALL_BYTES]);
    check(&["--window-limit", "16"], &[FULL_BYTES, SMALL_BYTES, SMALL_BYTES]);
    check(&["--window-limit", "10"], &[SMALL_BYTES; 3]);
}

#[test]
fn exhausted_client_windows_do_not_block_an_http2_service() {
    let (_process, port) = OriginServer::start_http2();
    let mut sidecar = with_one_mib(port, UpstreamHttp::Http2);
    let held = use_up(&sidecar);
    assert!((11..=12).contains(&held.len()), "{} have a window", held.len());
    assert_eq!(http1::ask(sidecar.port, GET).status, 200);
    sidecar.assert_healthy();
}

#[test]
fn request_above_the_upstream_window_limit_is_rejected_without_a_connection() {
    // A quarter of 1 MiB.
    const WINDOWS: usize = 4;
    let service = CountingServer::silent_http2();
    let mut sidecar = with_one_mib(service.port, UpstreamHttp::Http2);
    let taken = || service.count.requests.load(Ordering::SeqCst);
    let hold = || {
        let mut client = http1::Http1Client::connect(sidecar.port);
        assert!(client.send(GET));
        client
    };
    let mut held = Vec::new();
    for number in 1..=WINDOWS {
        held.push(hold());
        eventually("the service has the request", || (taken() == number).then_some(()));
    }
    let overloaded = sidecar.metric(OVERLOADED);
    for _ in 0..10 {
        assert_eq!(http1::ask(sidecar.port, GET).status, 503);
    }
    assert_eq!(sidecar.metric(OVERLOADED) - overloaded, 10);
    assert_eq!(service.most(), WINDOWS, "no connection was opened for a refused request");
    drop(held);
    let mut again = Vec::new();
    eventually("requests are served again", || {
        again.push(hold());
        (taken() > WINDOWS).then_some(())
    });
    sidecar.assert_healthy();
}

/// Sends as many body bytes as the windows allow; returns their number.
fn fill(client: &mut Http2FrameClient) -> u32 {
    let (mut left, of_stream) = windows(client).expect("the connection has a window");
    let granted = left;
    for stream in (1..).step_by(2) {
        client.send(&headers(END_HEADERS, stream, &POST));
        let mut left_of_stream = of_stream.min(left);
        left -= left_of_stream;
        while left_of_stream > 0 {
            let bytes =
                left_of_stream.min(u32::try_from(FRAME_BYTES).expect("the frame size fits"));
            let piece = vec![b'x'; bytes as usize];
            assert!(client.send(&data(NONE, stream, &piece)), "the windows allow it");
            left_of_stream -= bytes;
        }
        if left == 0 {
            break;
        }
    }
    let mut updates = Vec::new();
    let is_answered = round_trip(client, &mut |frame| updates.push(frame.clone())).is_some();
    assert!(is_answered && updates.is_empty(), "no window was opened: {updates:?}");
    granted
}

#[test]
fn buffered_uploads_of_all_connections_are_bounded() {
    const CLIENTS: usize = 40;
    const GROWTH_BYTES: u64 = 16 * 1024 * 1024;
    let service = RecordingServer::start();
    // Requests wait for the connection that another request uses, so their bodies are not read, not
    // even into kernel buffers in front of a service.
    let wanted = limited(service.port, UpstreamHttp::Http1, 1, "60s");
    let mut sidecar = wanted.with_one_worker(&["--window-limit", "12"]).start();
    let mut blocking_client = http1::Http1Client::connect(sidecar.port);
    blocking_client.send(HOLD);
    eventually("the service has the first request", || (!service.take().is_empty()).then_some(()));
    let before = sidecar.sidecar.resident_memory();
    let mut clients: Vec<Http2FrameClient> =
        (0..CLIENTS).map(|_| Http2FrameClient::connect(sidecar.port)).collect();
    let sent: u64 = clients.iter_mut().map(|client| u64::from(fill(client))).sum();
    let [full, small] = [FULL_BYTES, SMALL_BYTES].map(u64::from);
    assert_eq!(
        sent,
        full + (CLIENTS as u64 - 1) * small,
        "one connection has a full window, the others small ones"
    );
    let grown = sidecar.sidecar.peak_memory().saturating_sub(before);
    assert!(grown < GROWTH_BYTES, "memory grew by {grown} bytes for {sent}");
    // If the sidecar kept nothing, the bound above would prove nothing.
    assert!(grown > sent / 2, "memory grew by only {grown} bytes for {sent}");
    sidecar.assert_healthy();
}

#[test]
fn sidecar_without_file_descriptors_pauses_accept_and_resumes() {
    const FILES: u32 = 120;
    const CLIENTS: usize = 300;
    const WATCHED: Duration = Duration::from_secs(3);
    let service = RecordingServer::start();
    let mut wanted =
        SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1).with_one_worker(&[]);
    wanted.launch = SidecarLaunch { open_files: Some(FILES), ..wanted.launch };
    let mut sidecar = wanted.start();
    let connect = |_| TcpStream::connect((Ipv4Addr::LOCALHOST, sidecar.port));
    let clients: Result<Vec<TcpStream>, _> = (0..CLIENTS).map(connect).collect();
    let mut clients = clients.expect("the kernel accepts the connections");
    eventually("all file descriptors are in use", || {
        (sidecar.sidecar.open_files() >= FILES as usize).then_some(())
    });
    let before = sidecar.sidecar.cpu_time();
    let last = clients.last_mut().expect("there are clients");
    last.write_all(GET.as_bytes()).expect("the connection is open");
    last.set_read_timeout(Some(WATCHED)).expect("the timeout is not zero");
    let unserved = last.read(&mut [0; 8]).expect_err("the client waits for a file descriptor");
    assert_eq!(unserved.kind(), ErrorKind::WouldBlock, "{unserved}");
    let taken = sidecar.sidecar.cpu_time().saturating_sub(before);
    assert!(taken < Duration::from_millis(300), "{taken:?} of CPU time in {WATCHED:?}");
    assert_eq!(Curl::get(sidecar.sidecar.admin, "/ready").run().status, 200);
    assert!(sidecar.metric("weft_sidecar_connections_open") < FILES.into());
    drop(clients);
    let gone = now();
    assert_eq!(http1::ask(sidecar.port, GET).status, 200);
    let waited = gone.elapsed();
    assert!(waited < Duration::from_secs(1), "the request waited {waited:?}");
    sidecar.assert_healthy();
}

/// Idle HTTP/2 connections that have been served.
fn idle(sidecar: &SingleSidecar, count: usize) -> Vec<Http2FrameClient> {
    let serve = |_| {
        let (client, outcome) = ask_by_http2(sidecar.port);
        assert_eq!(outcome, StreamOutcome::Answered(200));
        client
    };
    (0..count).map(serve).collect()
}

#[test]
fn idle_http2_connections_do_not_use_the_window_limit() {
    const FIRST: usize = 100;
    const CONNECTIONS: usize = 1_700;
    const EACH_BYTES: u64 = 40 * 1024;
    let service = ScriptedServer::echoing_heads();
    let mut sidecar = SingleSidecarConfig::for_upstream(service.port, UpstreamHttp::Http1)
        .with_one_worker(&[])
        .start();
    // One-time allocations were made for the first connections.
    let _first = idle(&sidecar, FIRST);
    let before = sidecar.sidecar.resident_memory();
    let held = idle(&sidecar, CONNECTIONS);
    let grown = sidecar.sidecar.resident_memory().saturating_sub(before);
    let each = grown / CONNECTIONS as u64;
    assert!(each < EACH_BYTES, "{each} bytes for each, in a build that is not optimized");
    assert_eq!(sidecar.metric(REFUSED), 0);
    drop(held);
    eventually("memory is released", || {
        let left = sidecar.sidecar.resident_memory().saturating_sub(before);
        (left < grown / 2).then_some(())
    });
    sidecar.assert_healthy();
}
