//! Countable costs of requests and connections, so that regressions show: system calls and heap allocations per
//! request, and memory per idle connection.

use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::json;
use weft_integration::http1::Http1Client;
use weft_integration::mesh_pki::{IdentityFiles, MeshPki};
use weft_integration::nginx::Nginx;
use weft_integration::process::{Process, counterpart, run, tool, weft};
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::tls_contexts::verify_mode;
use weft_integration::wait::eventually;

fn wanted() -> (Nginx, SingleSidecarConfig) {
    let nginx = Nginx::start();
    nginx.serve("small", &[b'x'; 100]);
    // Access lines are written by another thread, whose system calls are a cost of their own.
    let wanted = SingleSidecarConfig::for_upstream(nginx.port, UpstreamHttp::Http1)
        .with("access_log", json!([]));
    (nginx, wanted)
}

fn start() -> (Nginx, SingleSidecar) {
    let (nginx, wanted) = wanted();
    (nginx, wanted.start())
}

/// A sidecar with one worker, so that the counts do not depend on how connections spread over workers.
fn with_one_worker(mut command: Command) -> Command {
    command.args(["sidecar", "--workers", "1", "--drain-timeout", "10"]);
    command
}

fn load(alone: &SingleSidecar, clients: &[&str], requests: u32) {
    let mut load = tool("h2load");
    load.args(clients).args(["--requests", &requests.to_string()]);
    let output = run(load.arg(format!("http://127.0.0.1:{}/small", alone.port)));
    assert!(output.contains(&format!("{requests} 2xx")), "{output}");
}

/// The system calls that the sidecar made while some work ran.
#[derive(Debug)]
struct SystemCalls {
    /// Calls that move bytes: reads and writes of any kind.
    transfers: u64,
    /// All others, among them waiting for readiness. How many requests one wait covers depends on how fast
    /// clients and upstreams answer, so this count varies with the load of the machine.
    others: u64,
}

/// Runs `work` and counts the sidecar's system calls meanwhile with `strace`.
fn calls_during(alone: &SingleSidecar, work: impl FnOnce()) -> SystemCalls {
    const TRANSFERS: [&str; 8] =
        ["read", "readv", "recvfrom", "recvmsg", "write", "writev", "sendto", "sendmsg"];
    let folder = tempfile::TempDir::new().expect("a temporary folder can be created");
    let file = folder.path().join("calls");
    let mut strace = tool("strace");
    strace.args(["-f", "-c", "-p", &alone.sidecar.process.id().to_string(), "-o"]).arg(&file);
    let strace = Process::start("strace", &mut strace);
    eventually("strace is attached", || strace.errors().contains("attached").then_some(()));
    work();
    strace.signal(Signal::SIGINT);
    let output = eventually("strace prints its table", || {
        let output = std::fs::read_to_string(&file).ok()?;
        output.contains("total").then_some(output)
    });
    let mut calls = SystemCalls { transfers: 0, others: 0 };
    for line in output.lines() {
        // Columns: % time, seconds, usecs/call, calls, errors (only where there were any), name.
        let columns: Vec<&str> = line.split_whitespace().collect();
        let Some((name, count)) = columns.last().zip(columns.get(3)) else { continue };
        let Ok(count) = count.parse::<u64>() else { continue };
        match *name {
            "total" => {}
            name if TRANSFERS.contains(&name) => calls.transfers += count,
            _ => calls.others += count,
        }
    }
    calls
}

#[test]
fn http1_request_costs_four_system_calls() {
    const REQUESTS: u32 = 40_000;
    const CLIENTS: [&str; 3] = ["--h1", "--clients", "64"];
    let (_nginx, alone) = start();
    load(&alone, &CLIENTS, 1000);
    let calls = calls_during(&alone, || load(&alone, &CLIENTS, REQUESTS));
    let per_request = |count: u64| {
        f64::from(u32::try_from(count).expect("the count fits into u32")) / f64::from(REQUESTS)
    };
    // Two reads and two writes per request. Opening 64 connections, and each to nginx after 1000 requests, add little.
    let transfers = per_request(calls.transfers);
    assert!(transfers <= 4.02, "{transfers} reads and writes per request: {calls:?}");
    assert!(transfers >= 4.0, "{transfers} per request: the count is implausibly low: {calls:?}");
    // One wait covers many requests: measured 0.05 to 0.11.
    let others = per_request(calls.others);
    assert!(others <= 0.5, "{others} other calls per request: {calls:?}");
}

/// The number of heap allocations over the sidecar's life while it serves this many requests over one connection.
/// A `realloc` counts as one allocation.
fn allocations(client: &[&str], requests: u32) -> u32 {
    let (_nginx, wanted) = wanted();
    let mut valgrind = tool("valgrind");
    // Only the allocation count is needed: memory checks are switched off.
    valgrind.args(["--leak-check=no", "--undef-value-errors=no"]).arg(weft().get_program());
    let mut alone = wanted.start_with_command(MeshPki::create(), with_one_worker(valgrind));
    load(&alone, client, requests);
    let process = &mut alone.sidecar.process;
    process.signal(Signal::SIGTERM);
    assert!(process.ended().success(), "{process:?} exited with an error");
    let output = eventually("valgrind prints its summary", || {
        let output = process.errors();
        let (_, output) = output.split_once("total heap usage: ")?;
        output.split_once(" allocs").map(|(allocations, _)| allocations.replace(',', ""))
    });
    output.parse().expect("the number of allocations is an integer")
}

#[test]
fn requests_allocate_5_times_on_http1_and_15_times_on_http2() {
    const FEW: u32 = 100;
    // nginx closes a connection after 1000 requests, and opening another one would add costs.
    const MANY: u32 = 900;
    let check = |version: &str, client: &[&str], expected: f64| {
        // Start and shutdown cost the same in both runs, so the difference comes from the requests.
        let (few, many) = std::thread::scope(|scope| {
            let few = scope.spawn(|| allocations(client, FEW));
            let many = allocations(client, MANY);
            (few.join().expect("the counting thread does not panic"), many)
        });
        let each = f64::from(many.saturating_sub(few)) / f64::from(MANY - FEW);
        let output = format!(
            "{version}: {each} allocations per request: {few} with {FEW} requests, {many} with {MANY}"
        );
        assert!(each <= expected + 0.5, "{output}");
        assert!(each >= expected - 0.5, "{output}: the count is implausibly low");
    };
    check("HTTP/1.1", &["--h1", "--clients", "1"], 5.0);
    check("HTTP/2", &["--clients", "1", "--max-concurrent-streams", "1"], 15.0);
}

#[test]
fn idle_connection_owns_no_buffer() {
    const CONNECTIONS: u64 = 1000;
    let (_nginx, alone) = start();
    let get_small = |client: &mut Http1Client| {
        let answer = client.ask("GET /small HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!(answer.status, 200);
    };
    let at = (Ipv4Addr::LOCALHOST, alone.port);
    // Warm-up: memory that is allocated once, with the first connections.
    let mut first: Vec<Http1Client> =
        (0..100).map(|_| Http1Client::connect_to(at.into())).collect();
    first.iter_mut().for_each(get_small);
    let before = alone.metric("process_resident_memory_bytes");
    let more: Vec<Http1Client> = (0..CONNECTIONS)
        .map(|_| {
            let mut client = Http1Client::connect_to(at.into());
            get_small(&mut client);
            client
        })
        .collect();
    let open = alone.metric("weft_sidecar_connections_open");
    assert!(open >= CONNECTIONS, "{open} connections open of {}", more.len());
    let grown = alone.metric("process_resident_memory_bytes").saturating_sub(before);
    // The task with its state, in a debug build.
    assert!(grown / CONNECTIONS < 6 * 1024, "{} bytes per connection", grown / CONNECTIONS);
    drop(TcpStream::connect(at).expect("the sidecar still listens"));
}

/// Opens mutual TLS connections that have received a response of 100 bytes and one of 60 KB, and are now idle.
fn idle_tls_connections(
    alone: &SingleSidecar,
    client: &IdentityFiles,
    connections: u64,
) -> Process {
    let mut command = counterpart("waiting_caller.py");
    command.args([alone.port.to_string(), connections.to_string()]);
    command.args([&alone.pki.root(), &client.certificate, &client.key]);
    let caller = Process::start("caller", command.args(["/small", "/large"]));
    caller.line_with("they wait");
    caller
}

#[test]
fn idle_mutual_tls_connection_owns_no_buffer() {
    const FIRST: u64 = 100;
    const CONNECTIONS: u64 = 500;
    let pki = MeshPki::create();
    let server = pki.issue("server");
    let client = pki.issue("client");
    let (nginx, mut wanted) = wanted();
    nginx.serve("large", &[b'x'; 60_000]);
    wanted.tls = Some(verify_mode(&server, &pki.root(), &pki.crl_file()));
    let alone = wanted.start_with_command(pki, with_one_worker(weft()));
    // Warm-up: memory that is allocated once, with the first connections.
    let _first = idle_tls_connections(&alone, &client, FIRST);
    // Each thread that makes a metrics page keeps memory of its own.
    let pages = 8;
    (0..pages).for_each(|_| drop(alone.sidecar.metrics()));
    let before = alone.metric("process_resident_memory_bytes");
    let _more = idle_tls_connections(&alone, &client, CONNECTIONS);
    let open = alone.metric("weft_sidecar_connections_open");
    assert!(open >= CONNECTIONS + FIRST, "{open} connections open of {}", CONNECTIONS + FIRST);
    let grown = alone.metric("process_resident_memory_bytes").saturating_sub(before);
    // Measured: 8.9 KiB per connection in a debug build. A leftover buffer of as little as 2 KiB would exceed the bound.
    assert!(grown / CONNECTIONS < 10 * 1024, "{} bytes per connection", grown / CONNECTIONS);
}
