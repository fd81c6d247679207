//! Rolling restarts: endpoints restart one after the other while clients open connections
//! continuously.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use serde_json::Value;
use weft::demo::hosts::Host;
use weft_integration::mesh::TestMesh;
use weft_integration::wait::{DEADLINE, eventually};

const RESTARTS: usize = 20;
/// The number of clients, each of which opens one connection after the other.
const CLIENTS: usize = 3;

/// A program that responds to each connection with its host's name.
struct Program {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: JoinHandle<()>,
    port: u16,
}

impl Program {
    /// Starts the program on the host whose namespace this thread is in.
    fn start(at: SocketAddr, name: &str) -> Self {
        let listener = TcpListener::bind(at).expect("the port is free");
        let stop = Arc::new(AtomicBool::new(false));
        let served = Arc::new(AtomicU64::new(0));
        let stopping = stop.clone();
        let counter = served.clone();
        let name = name.to_owned();
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopping.load(Ordering::Relaxed) {
                    // Stops accepting; accepted connections are still served.
                    listener.set_nonblocking(true).expect("the socket mode can be set");
                }
                counter.fetch_add(1, Ordering::Relaxed);
                stream.set_nonblocking(false).expect("the socket mode can be set");
                serve(stream, &name);
            }
        });
        Self { stop, served, thread, port: at.port() }
    }
}

fn serve(stream: TcpStream, name: &str) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).is_ok_and(|read| read > 0) {
        drop(writeln!(reader.get_mut(), "{name}"));
    }
}

fn nft(host: &Host, rule: &str) {
    host.on(|| weft_integration::process::nft(rule)).expect("the host's namespace can be entered");
}

/// The observations of all clients.
#[derive(Default)]
struct ClientResults {
    answers: AtomicU64,
    errors: Mutex<Vec<String>>,
    /// The endpoints that responded since the last query.
    names: Mutex<Vec<String>>,
}

fn ask(service: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&service, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(b"hello\n")?;
    let mut name = String::new();
    stream.read_to_string(&mut name)?;
    Ok(name.trim().to_owned())
}

fn make_connections(service: SocketAddr, stop: &AtomicBool, seen: &ClientResults) {
    let lock = |list: &Mutex<Vec<String>>, text: String| {
        list.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    };
    while !stop.load(Ordering::Relaxed) {
        match ask(service) {
            Ok(name) if !name.is_empty() => {
                seen.answers.fetch_add(1, Ordering::Relaxed);
                lock(&seen.names, name);
            }
            Ok(_) => lock(&seen.errors, "no answer".into()),
            Err(error) => lock(&seen.errors, error.to_string()),
        }
    }
}

/// Waits until the agent has this many endpoints.
fn await_configuration(mesh: &TestMesh, endpoints: usize) {
    eventually(format!("the agent has {endpoints} endpoints"), || {
        let dump: Value = serde_json::from_slice(&mesh.agent.admin("/config_dump").body).ok()?;
        let known = dump.pointer("/endpoints/sink|7100/endpoints/0/lb_endpoints")?.as_array()?;
        (known.len() == endpoints).then_some(())
    });
}

/// Stops the clients also when the test panics.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until each client's last connections reached exactly these endpoints.
fn await_answers_of(seen: &ClientResults, wanted: &[&str]) {
    let wanted: BTreeSet<&str> = wanted.iter().copied().collect();
    let take = || std::mem::take(&mut *seen.names.lock().unwrap_or_else(PoisonError::into_inner));
    take();
    let mut recent = Vec::new();
    eventually(format!("{wanted:?} answer"), || {
        recent.extend(take());
        if recent.len() < 100 {
            return None;
        }
        let names: BTreeSet<String> = std::mem::take(&mut recent).into_iter().collect();
        names.iter().map(String::as_str).eq(wanted.iter().copied()).then_some(())
    });
}

/// Restarts endpoints in turn. With `with_notice`, each endpoint is first removed from the
/// configuration, and restarts once the agent has applied that; otherwise it stops first, and the
/// configuration follows.
fn assert_restarts_fail_no_connection(path: &str, with_notice: bool) {
    let mut mesh = TestMesh::builder().agent_arguments(&["--path", path]).start();
    let hosts: Vec<Host> = mesh.orders.iter().map(|workload| workload.host.clone()).collect();
    let start = |mesh: &TestMesh, number: usize| {
        let host = hosts.get(number).expect("orders has two hosts");
        let at = mesh.sink_endpoint(number);
        mesh.on(Some(host), || Program::start(at, &host.name))
    };
    let mut programs = [0, 1].map(|number| (number, start(&mesh, number)));
    for host in &hosts {
        nft(host, "add table inet stop");
        nft(host, "add chain inet stop arriving { type filter hook input priority 10; }");
    }
    let stop = AtomicBool::new(false);
    let seen = ClientResults::default();
    let service = mesh.sink();
    let client = mesh.client.clone();
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for _ in 0..CLIENTS {
            let client = &client;
            let stop = &stop;
            let seen = &seen;
            scope.spawn(move || client.on(|| make_connections(service, stop, seen)));
        }
        for _ in 0..RESTARTS {
            let [(stays, _), (leaves, _)] = &programs;
            let stays = *stays;
            let leaves = *leaves;
            let [staying_host, host] =
                [stays, leaves].map(|number| hosts.get(number).expect("orders has two hosts"));
            await_answers_of(&seen, &[&host.name, &staying_host.name]);
            if with_notice {
                mesh.change_sink(&[stays]);
                await_answers_of(&seen, &[&staying_host.name]);
            }
            let [first, (_, program)] = programs;
            end(&mesh, host, program);
            if !with_notice {
                await_answers_of(&seen, &[&staying_host.name]);
                mesh.change_sink(&[stays]);
            }
            await_configuration(&mesh, 1);
            // The other endpoint restarts next.
            programs = [(leaves, start(&mesh, leaves)), first];
            mesh.change_sink(&[0, 1]);
            await_configuration(&mesh, 2);
        }
    });
    let errors = seen.errors.into_inner().unwrap_or_else(PoisonError::into_inner);
    let answers = seen.answers.load(Ordering::Relaxed);
    assert!(errors.is_empty(), "{} of {answers}: {errors:?}", errors.len());
}

/// Stops a program gracefully: it refuses new connections and serves accepted ones.
fn end(mesh: &TestMesh, host: &Host, program: Program) {
    // On close, the kernel resets connections that it has established and the program has not
    // accepted. New connections are therefore rejected a moment before the port is closed.
    let rule = format!(
        "add rule inet stop arriving iifname eth0 tcp dport {} tcp flags & (syn|ack) == syn reject with tcp reset",
        program.port
    );
    nft(host, &rule);
    program.stop.store(true, Ordering::Relaxed);
    // Wakes the program, if no client does.
    drop(mesh.on(Some(host), || TcpStream::connect((host.address, program.port))));
    program.thread.join().expect("the program does not panic");
    assert!(program.served.load(Ordering::Relaxed) > 1);
    nft(host, "flush chain inet stop arriving");
    assert!(
        mesh.on(Some(host), || TcpStream::connect((Ipv4Addr::LOCALHOST, program.port))).is_err(),
        "the port is closed"
    );
}

#[test]
fn endpoint_restart_without_notice_fails_no_connection_on_the_proxy_path() {
    assert_restarts_fail_no_connection("proxy", false);
}

#[test]
fn announced_endpoint_restart_fails_no_connection_on_the_kernel_path() {
    assert_restarts_fail_no_connection("kernel", true);
}
