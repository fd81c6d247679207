//! What requests and connections cost, where it can be counted, so that nothing creeps in: calls of the
//! kernel and of the allocator for each request, and memory for each connection that waits.

use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;

use nix::sys::signal::Signal;
use weft_integration::bootstrap::verify_mode;
use weft_integration::http1::Http1Client;
use weft_integration::mesh_pki::{IdentityFiles, MeshPki};
use weft_integration::nginx::Nginx;
use weft_integration::process::{Process, counterpart, run, tool, weft};
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

fn wanted() -> (Nginx, SingleSidecarConfig) {
    let nginx = Nginx::start();
    nginx.serve("small", &[b'x'; 100]);
    let mut wanted = SingleSidecarConfig::for_upstream(nginx.port, UpstreamHttp::Http1);
    // Lines are written by another thread, which is another cost.
    wanted.http.as_object_mut().expect("a message is an object").remove("access_log");
    (nginx, wanted)
}

fn start() -> (Nginx, SingleSidecar) {
    let (nginx, wanted) = wanted();
    (nginx, wanted.start())
}

/// A sidecar of one worker, so that what is counted does not hang on who of several did it.
fn with_one_worker(mut command: Command) -> Command {
    command.args(["sidecar", "--workers", "1", "--drain-timeout", "10"]);
    command
}

fn load(alone: &SingleSidecar, clients: &[&str], requests: u32) {
    let mut load = tool("h2load");
    load.args(clients).args(["--requests", &requests.to_string()]);
    let told = run(load.arg(format!("http://127.0.0.1:{}/small", alone.port)));
    assert!(told.contains(&format!("{requests} 2xx")), "{told}");
}

/// How many calls a process made while `work` was done, by the kernel's own account of them.
fn calls_during(alone: &SingleSidecar, work: impl FnOnce()) -> u64 {
    let folder = tempfile::TempDir::new().expect("a temporary folder can be made");
    let file = folder.path().join("calls");
    let mut strace = tool("strace");
    strace.args(["-f", "-c", "-p", &alone.sidecar.process.id().to_string(), "-o"]).arg(&file);
    let strace = Process::start("strace", &mut strace);
    eventually("it is attached", || strace.errors().contains("attached").then_some(()));
    work();
    strace.signal(Signal::SIGINT);
    let told = eventually("strace tells", || {
        let told = std::fs::read_to_string(&file).ok()?;
        told.contains("total").then_some(told)
    });
    // % time, seconds, usecs/call, calls, errors where there were any, name.
    let total = told.lines().find(|line| line.ends_with("total")).expect("a line of totals");
    let calls = total.split_whitespace().nth(3).expect("a column of calls");
    calls.parse().expect("a number")
}

#[test]
fn a_request_costs_four_calls_of_the_kernel() {
    const REQUESTS: u32 = 40_000;
    const CLIENTS: [&str; 3] = ["--h1", "--clients", "64"];
    let (_nginx, alone) = start();
    load(&alone, &CLIENTS, 1000);
    let calls = calls_during(&alone, || load(&alone, &CLIENTS, REQUESTS));
    // Two reads and two writes; beside them a wait for each bunch of connections, and 64 connections.
    let each = f64::from(u32::try_from(calls).expect("few")) / f64::from(REQUESTS);
    assert!(each <= 4.1, "{each} calls for each request");
    assert!(each >= 4.0, "{each} calls for each request: what was counted?");
}

/// How often a sidecar allocated in its life, in which so many requests came over one connection. A
/// `realloc` counts as one.
fn allocations(client: &[&str], requests: u32) -> u32 {
    let (_nginx, wanted) = wanted();
    let mut valgrind = tool("valgrind");
    // Its count of allocations is all that is asked of it.
    valgrind.args(["--leak-check=no", "--undef-value-errors=no"]).arg(weft().get_program());
    let mut alone = wanted.start_with_command(MeshPki::create(), with_one_worker(valgrind));
    load(&alone, client, requests);
    let process = &mut alone.sidecar.process;
    process.signal(Signal::SIGTERM);
    assert!(process.ended().success(), "{process:?} did not end well");
    let told = eventually("valgrind tells", || {
        let told = process.errors();
        let (_, told) = told.split_once("total heap usage: ")?;
        told.split_once(" allocs").map(|(allocations, _)| allocations.replace(',', ""))
    });
    told.parse().expect("a number")
}

#[test]
fn a_request_allocates_five_times() {
    const FEW: u32 = 100;
    // nginx ends a connection after 1000 requests, and another one has costs of its own.
    const MANY: u32 = 900;
    let check = |version: &str, client: &[&str], expected: f64| {
        // What else they do, from their start to their end, is the same.
        let (few, many) = std::thread::scope(|scope| {
            let few = scope.spawn(|| allocations(client, FEW));
            let many = allocations(client, MANY);
            (few.join().expect("it counted"), many)
        });
        let each = f64::from(many.saturating_sub(few)) / f64::from(MANY - FEW);
        let told =
            format!("{version}: {each} for each request: {few} with {FEW}, {many} with {MANY}");
        assert!(each <= expected + 0.5, "{told}");
        assert!(each >= expected - 0.5, "{told}: what was counted?");
    };
    check("HTTP/1.1", &["--h1", "--clients", "1"], 5.0);
    check("HTTP/2", &["--clients", "1", "--max-concurrent-streams", "1"], 15.0);
}

#[test]
fn a_connection_that_waits_owns_no_buffer() {
    const CONNECTIONS: u64 = 1000;
    let (_nginx, alone) = start();
    let ask = |client: &mut Http1Client| {
        let answer = client.ask("GET /small HTTP/1.1\r\nhost: a\r\n\r\n");
        assert_eq!(answer.status, 200);
    };
    let at = (Ipv4Addr::LOCALHOST, alone.port);
    // What the first ones need beside themselves is there.
    let mut kept: Vec<Http1Client> = (0..100).map(|_| Http1Client::connect_to(at.into())).collect();
    kept.iter_mut().for_each(ask);
    let before = alone.metric("process_resident_memory_bytes");
    let more: Vec<Http1Client> = (0..CONNECTIONS)
        .map(|_| {
            let mut client = Http1Client::connect_to(at.into());
            ask(&mut client);
            client
        })
        .collect();
    let open = alone.metric("weft_sidecar_connections_open");
    assert!(open >= CONNECTIONS, "{open} of {}", more.len());
    let grown = alone.metric("process_resident_memory_bytes").saturating_sub(before);
    // A task with its state, in a build that is not optimized.
    assert!(grown / CONNECTIONS < 6 * 1024, "{} bytes for each", grown / CONNECTIONS);
    drop(TcpStream::connect(at).expect("it still listens"));
}

/// Connections of mutual TLS that have had an answer of 100 bytes and one of 60 KB, and wait.
fn waiting_by_tls(alone: &SingleSidecar, client: &IdentityFiles, connections: u64) -> Process {
    let mut command = counterpart("waiting_caller.py");
    command.args([alone.port.to_string(), connections.to_string()]);
    command.args([&alone.pki.root(), &client.certificate, &client.key]);
    let caller = Process::start("caller", command.args(["/small", "/large"]));
    caller.line_with("they wait");
    caller
}

#[test]
fn a_connection_of_mutual_tls_that_waits_owns_no_buffer() {
    const FIRST: u64 = 100;
    const CONNECTIONS: u64 = 500;
    let pki = MeshPki::create();
    let (server, client) = (pki.issue("server"), pki.issue("client"));
    let (nginx, mut wanted) = wanted();
    nginx.serve("large", &[b'x'; 60_000]);
    wanted.tls = Some(verify_mode(&server, &pki.root(), &pki.crl_file()));
    let alone = wanted.start_with_command(pki, with_one_worker(weft()));
    // What the first ones need beside themselves is there.
    let _first = waiting_by_tls(&alone, &client, FIRST);
    let before = alone.metric("process_resident_memory_bytes");
    let _more = waiting_by_tls(&alone, &client, CONNECTIONS);
    let open = alone.metric("weft_sidecar_connections_open");
    assert!(open >= CONNECTIONS + FIRST, "{open} of {}", CONNECTIONS + FIRST);
    let grown = alone.metric("process_resident_memory_bytes").saturating_sub(before);
    // 8.9 KiB in a build that is not optimized: a buffer of no more than 2 KiB would show.
    assert!(grown / CONNECTIONS < 10 * 1024, "{} bytes for each", grown / CONNECTIONS);
}
