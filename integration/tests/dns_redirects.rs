//! DNS queries are redirected to weft's DNS server only while it answers, next to the NAT rules of Docker.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use weft_integration::process::{Process, ip, run, tool, weft};
use weft_integration::wait::eventually;

/// Docker's resolver address in containers, and the address to which Docker's NAT rules translate it.
const DOCKER: &str = "127.0.0.11:53";
const DOCKER_TRANSLATED: &str = "127.0.0.11:41234";
/// A resolver without NAT rules.
const PLAIN: &str = "[fd05::53]:53";
/// Socket mark of packets that weft sends.
const MARK: u32 = 0x539;
const QUERY: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x00\x00\x01\x00\x01";

/// A DNS server that responds to every query with the query followed by the server's name.
struct Server {
    stops: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

fn response(query: &[u8], name: &str) -> Vec<u8> {
    let mut response = query.to_vec();
    if let Some(flags) = response.get_mut(2) {
        *flags |= 0x80;
    }
    [&response, name.as_bytes()].concat()
}

/// Responds to one UDP query, if one arrives within the socket's read timeout.
fn respond_udp(socket: &UdpSocket, name: &str) {
    let mut query = [0; 512];
    if let Ok((bytes, from)) = socket.recv_from(&mut query) {
        let query = query.get(..bytes).expect("the datagram fits the buffer");
        socket.send_to(&response(query, name), from).expect("the response is sent");
    }
}

/// Responds to one TCP query, if a connection is waiting.
fn respond_tcp(listener: &TcpListener, name: &str) {
    if let Ok((mut stream, _)) = listener.accept() {
        stream.set_nonblocking(false).expect("the stream can be made blocking");
        let mut query = vec![0; QUERY.len()];
        stream.read_exact(&mut query).expect("the client sends a query");
        stream.write_all(&response(&query, name)).expect("the connection is open");
    }
}

impl Server {
    fn start(name: &'static str, addresses: &[&str]) -> Self {
        let stops = Arc::<AtomicBool>::default();
        let mut threads = Vec::new();
        for address in addresses {
            let udp = UdpSocket::bind(address).expect("the address is free");
            udp.set_read_timeout(Some(Duration::from_millis(20))).expect("the timeout is not zero");
            let tcp = TcpListener::bind(address).expect("the address is free");
            tcp.set_nonblocking(true).expect("the listener can be made non-blocking");
            let stopped = stops.clone();
            threads.push(std::thread::spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    respond_udp(&udp, name);
                    respond_tcp(&tcp, name);
                }
            }));
        }
        Self { stops, threads }
    }

    fn stop(self) {
        self.stops.store(true, Ordering::Relaxed);
        self.threads
            .into_iter()
            .for_each(|thread| thread.join().expect("the server does not panic"));
    }
}

/// Sends a query over UDP from this port. Returns the name of the server that responds, or `None` without a response
/// within 500 ms.
fn answering_server(resolver: &str, from: u16, mark: Option<u32>) -> Option<String> {
    let resolver: SocketAddr = resolver.parse().expect("the resolver is an address with a port");
    let socket = Socket::new(Domain::for_address(resolver), Type::DGRAM, None).expect("a socket");
    if let Some(mark) = mark {
        socket.set_mark(mark).expect("the test may set marks in its namespace");
    }
    let any: SocketAddr =
        if resolver.is_ipv4() { ([0; 4], from).into() } else { ([0u16; 8], from).into() };
    socket.bind(&any.into()).expect("the port is free");
    // A connected socket, as in applications: it ignores responses from other addresses.
    socket.connect(&resolver.into()).expect("there is a route");
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(Duration::from_millis(500))).expect("the timeout is not zero");
    socket.send(QUERY).ok()?;
    let mut response = [0; 512];
    let bytes = socket.recv(&mut response).ok()?;
    let name = response.get(QUERY.len()..bytes).expect("the response begins with the query");
    Some(String::from_utf8_lossy(name).into_owned())
}

fn answering_server_tcp(resolver: &str) -> String {
    let mut stream = TcpStream::connect(resolver).expect("a server listens");
    stream.write_all(QUERY).expect("the connection is open");
    let mut response = Vec::new();
    stream.read_to_end(&mut response).expect("the server responds");
    let name = response.get(QUERY.len()..).expect("the response begins with the query");
    String::from_utf8_lossy(name).into_owned()
}

/// Sets up the NAT rules that Docker installs in a container's network namespace.
fn install_docker_rules() {
    ip("addr add fd05::53/128 dev lo");
    let iptables = |words: &str| run(tool("iptables").args(["-t", "nat"]).args(words.split(' ')));
    for words in [
        "-N DOCKER_OUTPUT",
        "-N DOCKER_POSTROUTING",
        "-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT",
        "-A POSTROUTING -d 127.0.0.11/32 -j DOCKER_POSTROUTING",
        "-A DOCKER_OUTPUT -d 127.0.0.11/32 -p udp --dport 53 -j DNAT --to-destination 127.0.0.11:41234",
        "-A DOCKER_OUTPUT -d 127.0.0.11/32 -p tcp --dport 53 -j DNAT --to-destination 127.0.0.11:41234",
        "-A DOCKER_POSTROUTING -s 127.0.0.11/32 -p udp --sport 41234 -j SNAT --to-source :53",
        "-A DOCKER_POSTROUTING -s 127.0.0.11/32 -p tcp --sport 41234 -j SNAT --to-source :53",
    ] {
        iptables(words);
    }
}

const OPTIONS: &str =
    "--outbound 15001 --services 10.96.0.0/16 --dns 15053 --resolvers 127.0.0.11,fd05::53";

fn apply_once(backend: &str) -> std::process::Output {
    let mut command = weft();
    command.args(["redirect", "apply", "--backend", backend]).args(OPTIONS.split(' '));
    command.output().expect("weft can be started")
}

fn assert_redirected_while_answered(backend: &str) {
    install_docker_rules();
    let _docker = Server::start("docker", &[DOCKER_TRANSLATED]);
    let _plain = Server::start("plain", &[PLAIN]);
    let query = |resolver, from| move || answering_server(resolver, from, None);
    assert_eq!(query(DOCKER, 5454)().as_deref(), Some("docker"), "without rules of weft");

    let refused = apply_once(backend);
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{errors}");
    assert!(errors.contains("no DNS server answers at port 15053"), "{errors}");

    let folder = TempDir::new().expect("a temporary folder can be created");
    let file = folder.path().join("redirects.yaml");
    let redirects = format!(
        "redirects:\n- {{backend: {backend}, outbound: 15001, services: [10.96.0.0/16],\n   dns: 15053, resolvers: [127.0.0.11, 'fd05::53']}}\n"
    );
    std::fs::write(&file, redirects).expect("the folder is writable");
    let guard = Process::start("guard", weft().args(["redirect", "guard"]).arg(&file));
    let without_dns = OPTIONS.split(" --dns").next().expect("the options come before --dns");
    eventually(format!("{guard:?} has installed the other redirects"), || {
        let mut verify = weft();
        verify.args(["redirect", "verify", "--backend", backend]).args(without_dns.split(' '));
        verify.output().expect("weft can be started").status.success().then_some(())
    });
    for _ in 0..2 {
        let assert_answered_by_mesh = |redirected: bool| {
            // From the same port each time, to show that an old conntrack entry does not decide.
            for (resolver, from, original) in [(DOCKER, 5454, "docker"), (PLAIN, 5455, "plain")] {
                let expected = if redirected { "mesh" } else { original };
                eventually(format!("{resolver} is answered by {expected}"), || {
                    (query(resolver, from)()? == expected).then_some(())
                });
                assert_eq!(answering_server_tcp(resolver), expected);
                let own = answering_server(resolver, from + 10, Some(MARK));
                assert_eq!(own.as_deref(), Some(original), "weft's own queries are not redirected");
            }
        };
        assert_answered_by_mesh(false);
        let mesh = Server::start("mesh", &["127.0.0.1:15053", "[::1]:15053"]);
        assert_answered_by_mesh(true);
        assert!(apply_once(backend).status.success(), "applied while the DNS server answers");
        mesh.stop();
    }
    eventually("both changes are logged", || {
        let errors = guard.errors();
        let both = ["DNS redirected: the", "DNS redirection suspended"];
        both.iter().all(|text| errors.contains(text)).then_some(())
    });
    assert!(!guard.errors().contains("had drifted"), "{}", guard.errors());
}

#[test]
fn dns_queries_are_redirected_only_while_answered() {
    assert_redirected_while_answered("native");
}

#[test]
fn dns_queries_are_redirected_only_while_answered_with_iptables() {
    assert_redirected_while_answered("iptables");
}

#[test]
fn native_and_nft_backends_install_the_same_dns_rules() {
    let _mesh = Server::start("mesh", &["127.0.0.1:15053"]);
    for (applied_by, read_by) in [("native", "nft"), ("nft", "native")] {
        assert!(apply_once(applied_by).status.success());
        let mut diff = weft();
        diff.args(["redirect", "diff", "--backend", read_by]).args(OPTIONS.split(' '));
        assert_eq!(run(&mut diff), "", "applied by {applied_by}, read by {read_by}");
    }
}

#[test]
fn invalid_dns_options_are_refused_with_their_reason() {
    for (options, reason) in [
        ("--dns 15053", "set together"),
        ("--outbound 15001 --resolvers 127.0.0.11", "set together"),
        (
            "--dns 15053 --resolvers 127.0.0.11 --exclude-outbound-ports 53",
            "port 53 conflicts with dns",
        ),
        ("--dns 0 --resolvers 127.0.0.11", "0 is not in 1..=65535"),
    ] {
        let mut command = weft();
        let output = command.args(["redirect", "plan"]).args(options.split(' ')).output();
        let output = output.expect("weft can be started");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(errors.contains(reason), "{options}: {errors}");
    }
}
