//! Questions to resolvers are handed over as long as somebody answers them, beside Docker's own rules.

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

/// A resolver's address in Docker's containers, and where Docker's own rules lead it.
const DOCKER: &str = "127.0.0.11:53";
const DOCKER_IN_TRUTH: &str = "127.0.0.11:41234";
const PLAIN: &str = "[fd05::53]:53";
/// The mark on what weft sends.
const MARK: u32 = 0x539;
const QUESTION: &[u8] =
    b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x00\x00\x01\x00\x01";

/// Answers whatever it is asked, with its name behind the question.
struct Server {
    ends: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

fn answer(question: &[u8], name: &str) -> Vec<u8> {
    let mut answer = question.to_vec();
    if let Some(flags) = answer.get_mut(2) {
        *flags |= 0x80;
    }
    [&answer, name.as_bytes()].concat()
}

/// Answers a question, if one comes within a moment.
fn answer_udp(socket: &UdpSocket, name: &str) {
    let mut question = [0; 512];
    if let Ok((bytes, from)) = socket.recv_from(&mut question) {
        let question = question.get(..bytes).expect("it was read");
        socket.send_to(&answer(question, name), from).expect("it is sent");
    }
}

/// Answers a question, if one has come.
fn answer_tcp(listener: &TcpListener, name: &str) {
    if let Ok((mut stream, _)) = listener.accept() {
        stream.set_nonblocking(false).expect("it can be");
        let mut question = vec![0; QUESTION.len()];
        stream.read_exact(&mut question).expect("it is asked");
        stream.write_all(&answer(&question, name)).expect("it is open");
    }
}

impl Server {
    fn start(name: &'static str, addresses: &[&str]) -> Self {
        let ends = Arc::<AtomicBool>::default();
        let mut threads = Vec::new();
        for address in addresses {
            let udp = UdpSocket::bind(address).expect("the address is free");
            udp.set_read_timeout(Some(Duration::from_millis(20))).expect("it is above zero");
            let tcp = TcpListener::bind(address).expect("the address is free");
            tcp.set_nonblocking(true).expect("it can be");
            let told = ends.clone();
            threads.push(std::thread::spawn(move || {
                while !told.load(Ordering::Relaxed) {
                    answer_udp(&udp, name);
                    answer_tcp(&tcp, name);
                }
            }));
        }
        Self { ends, threads }
    }

    fn stop(self) {
        self.ends.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("it went well"));
    }
}

/// Who answers a question over UDP, from this port; nobody within a moment, perhaps.
fn who_answers(resolver: &str, from: u16, mark: Option<u32>) -> Option<String> {
    let resolver: SocketAddr = resolver.parse().expect("an address");
    let socket = Socket::new(Domain::for_address(resolver), Type::DGRAM, None).expect("a socket");
    if let Some(mark) = mark {
        socket.set_mark(mark).expect("the namespace is ours");
    }
    let any: SocketAddr =
        if resolver.is_ipv4() { ([0; 4], from).into() } else { ([0u16; 8], from).into() };
    socket.bind(&any.into()).expect("the port is free");
    // As programs do: an answer from elsewhere is none.
    socket.connect(&resolver.into()).expect("there is a route");
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(Duration::from_millis(500))).expect("it is above zero");
    socket.send(QUESTION).ok()?;
    let mut answer = [0; 512];
    let bytes = socket.recv(&mut answer).ok()?;
    let name = answer.get(QUESTION.len()..bytes).expect("the question is in front");
    Some(String::from_utf8_lossy(name).into_owned())
}

fn who_answers_tcp(resolver: &str) -> String {
    let mut stream = TcpStream::connect(resolver).expect("somebody listens");
    stream.write_all(QUESTION).expect("it is open");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("it is answered");
    let name = answer.get(QUESTION.len()..).expect("the question is in front");
    String::from_utf8_lossy(name).into_owned()
}

/// What Docker does in a container's namespace.
fn be_a_container() {
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

const WISH: &str =
    "--outbound 15001 --services 10.96.0.0/16 --dns 15053 --resolvers 127.0.0.11,fd05::53";

fn apply_by_hand(backend: &str) -> std::process::Output {
    let mut command = weft();
    command.args(["redirect", "apply", "--backend", backend]).args(WISH.split(' '));
    command.output().expect("weft can be started")
}

fn assert_handed_over_while_answered(backend: &str) {
    be_a_container();
    let _docker = Server::start("docker", &[DOCKER_IN_TRUTH]);
    let _plain = Server::start("plain", &[PLAIN]);
    let asks = |resolver, from| move || who_answers(resolver, from, None);
    assert_eq!(asks(DOCKER, 5454)().as_deref(), Some("docker"), "without rules of ours");

    let refused = apply_by_hand(backend);
    let complaint = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{complaint}");
    assert!(complaint.contains("nobody answers DNS at port 15053"), "{complaint}");

    let folder = TempDir::new().expect("a temporary folder can be made");
    let file = folder.path().join("redirects.yaml");
    let wish = format!(
        "redirects:\n- {{backend: {backend}, outbound: 15001, services: [10.96.0.0/16],\n   dns: 15053, resolvers: [127.0.0.11, 'fd05::53']}}\n"
    );
    std::fs::write(&file, wish).expect("the folder takes files");
    let guard = Process::start("guard", weft().args(["redirect", "guard"]).arg(&file));
    let without = WISH.split(" --dns").next().expect("it begins so");
    eventually(format!("{guard:?} has the rest in force"), || {
        let mut verify = weft();
        verify.args(["redirect", "verify", "--backend", backend]).args(without.split(' '));
        verify.output().expect("weft can be started").status.success().then_some(())
    });
    for _ in 0..2 {
        let answers = |who: &str| {
            // From the same port each time: what the kernel remembers of it must not decide.
            for (resolver, from, past) in [(DOCKER, 5454, "docker"), (PLAIN, 5455, "plain")] {
                let wanted = if who == "mesh" { who } else { past };
                eventually(format!("{resolver} is {wanted}"), || {
                    (asks(resolver, from)()? == wanted).then_some(())
                });
                assert_eq!(who_answers_tcp(resolver), wanted);
                let own = who_answers(resolver, from + 10, Some(MARK));
                assert_eq!(own.as_deref(), Some(past), "what bears our mark goes its way");
            }
        };
        answers("nobody of ours");
        let mesh = Server::start("mesh", &["127.0.0.1:15053", "[::1]:15053"]);
        answers("mesh");
        assert!(apply_by_hand(backend).status.success(), "somebody answers");
        mesh.stop();
    }
    eventually("what happened is told", || {
        let told = guard.errors();
        let both = ["DNS is handed over: its", "DNS is not handed over any more"];
        both.iter().all(|text| told.contains(text)).then_some(())
    });
    assert!(!guard.errors().contains("had been changed"), "{}", guard.errors());
}

#[test]
fn questions_are_handed_over_while_they_are_answered() {
    assert_handed_over_while_answered("native");
}

#[test]
fn questions_are_handed_over_while_they_are_answered_by_iptables() {
    assert_handed_over_while_answered("iptables");
}

#[test]
fn the_kernel_is_told_of_dns_what_nft_would_tell_it() {
    let _mesh = Server::start("mesh", &["127.0.0.1:15053"]);
    for (by, read_by) in [("native", "nft"), ("nft", "native")] {
        assert!(apply_by_hand(by).status.success());
        let mut diff = weft();
        diff.args(["redirect", "diff", "--backend", read_by]).args(WISH.split(' '));
        assert_eq!(run(&mut diff), "", "told by {by}, read by {read_by}");
    }
}

#[test]
fn what_cannot_be_is_said() {
    for (wish, why) in [
        ("--dns 15053", "need each other"),
        ("--outbound 15001 --resolvers 127.0.0.11", "need each other"),
        ("--dns 15053 --resolvers 127.0.0.11 --exclude-outbound-ports 53", "53 is what dns takes"),
        ("--dns 0 --resolvers 127.0.0.11", "0 is not in 1..=65535"),
    ] {
        let mut command = weft();
        let output = command.args(["redirect", "plan"]).args(wish.split(' ')).output();
        let complaint = String::from_utf8_lossy(&output.expect("it runs").stderr).into_owned();
        assert!(complaint.contains(why), "{wish}: {complaint}");
    }
}
