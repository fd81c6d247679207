//! Ways around a strict sidecar: none of them reaches the application behind it, or leaves its host.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, Socket, Type};
use weft::demo::hosts::Host;
use weft_integration::mesh::{MeshIpFamily, TestMesh};
use weft_integration::process::{run, weft};
use weft_integration::wait::eventually;

/// A port of the application that the mesh configuration does not name.
const PORT: u16 = 9000;
/// Another port of the application, in the port range that weft itself uses.
const OWN_RANGE_PORT: u16 = 15050;
/// A protocol number reserved for experiments (RFC 3692).
const EXPERIMENT: i32 = 253;
/// Prefix of every payload; the name of the path follows it.
const MARKER: &str = "past-the-sidecar:";
/// Prefix of a path's name in payloads that are sent while no rules are installed.
const OPEN: &str = "open: ";
/// Timeout of a connection attempt; paths that are open answer within it.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(200);

/// An application that listens on every port and protocol of the test, and the payloads that it has received.
#[derive(Clone, Default)]
struct Program(Arc<Mutex<Vec<String>>>);

impl Program {
    /// Starts the application on the host of the current thread.
    fn start() -> Self {
        let program = Self::default();
        for port in [PORT, OWN_RANGE_PORT] {
            for kind in [Type::STREAM, Type::DGRAM] {
                let socket = Socket::new(Domain::IPV6, kind, None).expect("a socket");
                socket.set_only_v6(false).expect("one socket for both families");
                let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
                socket.bind(&any.into()).expect("the port is free");
                if kind == Type::STREAM {
                    socket.listen(64).expect("the socket can listen");
                    program.clone().accept_connections(socket);
                } else {
                    program.clone().receive_from(socket);
                }
            }
        }
        for (domain, icmp) in [(Domain::IPV4, Protocol::ICMPV4), (Domain::IPV6, Protocol::ICMPV6)] {
            for protocol in [icmp, Protocol::from(EXPERIMENT)] {
                let socket = Socket::new(domain, Type::RAW, Some(protocol))
                    .expect("the test may open raw sockets");
                program.clone().receive_from(socket);
            }
        }
        program
    }

    fn accept_connections(self, listener: Socket) {
        std::thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                self.clone().receive_from(socket);
            }
        });
    }

    fn receive_from(self, mut socket: Socket) {
        std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 16];
            while let Ok(read @ 1..) = socket.read(&mut bytes) {
                let text = String::from_utf8_lossy(bytes.get(..read).unwrap_or_default());
                if let Some((_, rest)) = text.split_once(MARKER) {
                    let path = rest.split(';').next().unwrap_or_default().to_owned();
                    self.0.lock().unwrap_or_else(PoisonError::into_inner).push(path);
                }
            }
        });
    }

    fn has_received(&self, path: &str) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .any(|received| received == path)
    }

    fn take_received(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sends bytes to an address. Errors are ignored: what counts is whether the payload arrives.
type SendFn = fn(SocketAddr, &[u8]) -> io::Result<()>;

/// A network path to try: how the bytes are sent, from which host, and to which address.
struct Attempt<'a> {
    name: String,
    from: Option<&'a Host>,
    to: SocketAddr,
    send: SendFn,
}

fn tcp(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    send_and_wait(TcpStream::connect_timeout(&to, CONNECT_TIMEOUT)?, bytes)
}

/// Sends the bytes and waits until the other side has read them, so that closing the socket loses none of them.
fn send_and_wait(mut stream: TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    stream.read(&mut [0; 64]).map(drop)
}

fn to_own_range(to: SocketAddr) -> SocketAddr {
    let mut to = to;
    to.set_port(OWN_RANGE_PORT);
    to
}

fn tcp_to_own_range(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    tcp(to_own_range(to), bytes)
}

/// Connects with weft's own socket mark, as an application with the capability to set marks could.
fn tcp_with_weft_mark(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_mark(0x539)?;
    socket.connect_timeout(&to.into(), CONNECT_TIMEOUT)?;
    send_and_wait(socket.into(), bytes)
}

/// Connects to an IPv4 address through an IPv6 socket.
fn tcp_ipv4_mapped(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let IpAddr::V4(address) = to.ip() else { return tcp(to, bytes) };
    tcp(SocketAddr::new(address.to_ipv6_mapped().into(), to.port()), bytes)
}

fn udp(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    socket.set_broadcast(true)?;
    socket.send_to(bytes, &to.into()).map(drop)
}

fn udp_to_own_range(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    udp(to_own_range(to), bytes)
}

fn udp_with_weft_mark(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    socket.set_mark(0x539)?;
    socket.send_to(bytes, &to.into()).map(drop)
}

/// Sends a datagram larger than the MTU.
fn udp_in_fragments(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    udp(to, &[bytes, &[b'.'; 4000]].concat())
}

/// Sends a datagram from port 53, as the response to a DNS query that was never sent.
fn udp_unsolicited_response(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 53))?;
    socket.send_to(bytes, to).map(drop)
}

fn icmp(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let (protocol, echo_request) =
        if to.is_ipv4() { (Protocol::ICMPV4, 8) } else { (Protocol::ICMPV6, 128) };
    let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(protocol))?;
    let mut to = to;
    to.set_port(0);
    // The checksum is wrong, but raw sockets receive the packet nevertheless.
    socket.send_to(&[&[echo_request, 0, 0, 0, 0, 1, 0, 1], bytes].concat(), &to.into()).map(drop)
}

/// Sends an ICMPv6 neighbor advertisement from a host that is not on the link. On IPv4, sends an echo request.
fn neighbor_advertisement(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    if to.is_ipv4() {
        return icmp(to, bytes);
    }
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    let mut to = to;
    to.set_port(0);
    socket.send_to(&[&[136, 0, 0, 0, 0, 0, 0, 0], bytes].concat(), &to.into()).map(drop)
}

fn unknown_ip_protocol(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let protocol = Some(Protocol::from(EXPERIMENT));
    let socket = Socket::new(Domain::for_address(to), Type::RAW, protocol)?;
    let mut to = to;
    to.set_port(0);
    socket.send_to(bytes, &to.into()).map(drop)
}

/// Every way to send bytes to an address, with its name.
const SENDS: [(&str, SendFn); 12] = [
    ("TCP", tcp),
    ("TCP to a port in weft's own range", tcp_to_own_range),
    ("TCP with weft's mark", tcp_with_weft_mark),
    ("TCP by an IPv4-mapped address", tcp_ipv4_mapped),
    ("UDP", udp),
    ("UDP to a port in weft's own range", udp_to_own_range),
    ("UDP with weft's mark", udp_with_weft_mark),
    ("UDP in fragments", udp_in_fragments),
    ("UDP as an unsolicited response", udp_unsolicited_response),
    ("ICMP", icmp),
    ("ICMPv6 neighbor advertisement", neighbor_advertisement),
    ("unknown IP protocol", unknown_ip_protocol),
];

/// Every way to send from a host (the router when `None`) to an address.
fn all_attempts(from: Option<&Host>, to: IpAddr) -> Vec<Attempt<'_>> {
    let name = from.map_or("the router", |host| &host.name).to_owned();
    let attempt = |(send_name, send): (&str, SendFn)| {
        let name = format!("{send_name} from {name} to {to}");
        Attempt { name, from, to: SocketAddr::new(to, PORT), send }
    };
    SENDS.into_iter().map(attempt).collect()
}

/// Attempts that are possible only from the next hop: link-local, multicast and broadcast addresses.
fn link_local_attempts(host: &Host) -> Vec<Attempt<'static>> {
    let [_, _, number, _] = host.address.octets();
    let index = if_nametoindex(format!("to-{number}").as_str())
        .expect("the router has a device to the host");
    let show = format!("-n {} -6 -o addr show dev eth0 scope link", host.name);
    let shown = run(Command::new("ip").args(show.split_whitespace()));
    let word = shown.split_whitespace().find(|word| word.starts_with("fe80:"));
    let own =
        word.and_then(|word| word.split('/').next()).expect("the host has a link-local address");
    let on_link = |address| SocketAddr::V6(SocketAddrV6::new(address, PORT, 0, index));
    let own = on_link(own.parse().expect("an IPv6 address"));
    let mut attempts: Vec<Attempt<'static>> = all_attempts(None, own.ip());
    attempts.iter_mut().for_each(|attempt| attempt.to = own);
    let all_nodes = on_link(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
    let broadcast = SocketAddr::new(Ipv4Addr::new(10, 90, number, 255).into(), PORT);
    for (name, to) in
        [("to the all-nodes multicast address", all_nodes), ("by broadcast", broadcast)]
    {
        attempts.push(Attempt { name: format!("UDP {name}"), from: None, to, send: udp });
    }
    attempts
}

fn send(mesh: &TestMesh, attempt: &Attempt<'_>, name: &str) {
    let bytes = format!("{MARKER}{name};");
    // An error means that the payload did not get through, which the caller checks at the receiver.
    drop(mesh.on(attempt.from, || (attempt.send)(attempt.to, bytes.as_bytes())));
}

/// Repeats each attempt until it reaches the application. Without this, a blocked attempt would prove nothing.
fn assert_all_reach(program: &Program, mesh: &TestMesh, attempts: &[Attempt<'_>]) {
    for attempt in attempts {
        // A name of its own distinguishes payloads that are still in flight when the rules are installed.
        let name = format!("{OPEN}{}", attempt.name);
        eventually(format!("{} arrives", attempt.name), || {
            send(mesh, attempt, &name);
            program.has_received(&name).then_some(())
        });
    }
}

/// Makes every attempt, and asserts that none reaches the application.
#[track_caller]
fn assert_none_reaches(program: &Program, mesh: &TestMesh, host: &Host, attempts: &[Attempt<'_>]) {
    for _ in 0..2 {
        attempts.iter().for_each(|attempt| send(mesh, attempt, &attempt.name));
    }
    // Traffic within the host is allowed. Once it has arrived, earlier payloads have been read too.
    let local = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let within: Vec<Attempt<'_>> =
        local.into_iter().flat_map(|address| all_attempts(Some(host), address)).collect();
    for attempt in &within {
        eventually(format!("{} arrives", attempt.name), || {
            send(mesh, attempt, &attempt.name);
            program.has_received(&attempt.name).then_some(())
        });
    }
    let received = program.take_received();
    let is_bypass = |name: &&String| {
        !name.starts_with(OPEN) && !within.iter().any(|attempt| attempt.name == **name)
    };
    let bypasses: Vec<&String> = received.iter().filter(is_bypass).collect();
    assert!(bypasses.is_empty(), "{bypasses:#?}");
}

fn install_strict_redirects(host: &Host, more: &[&str]) {
    let services = "10.96.0.0/16,fd96::/64";
    let mut command = weft();
    command.args(["redirect", "apply", "--inbound", "15006", "--outbound", "15001"]);
    command.args(["--services", services, "--strict", "--netns"]).arg(host.namespace());
    run(command.args(more));
}

fn assert_no_bypass(family: MeshIpFamily, backend: &str) {
    let mesh = TestMesh::builder().family(family).start();
    let web = mesh.web.host.clone();
    let client = mesh.client.clone();
    let [first, second] = [0, 1].map(|n| mesh.orders.get(n).expect("two endpoints").host.clone());
    let addresses: Vec<IpAddr> = web.addresses().collect();
    // The programs of the first endpoint run as the sidecar's own user, those of the second do not.
    let mut arriving = link_local_attempts(&web);
    for address in addresses {
        for from in [&client, &first, &second] {
            arriving.extend(all_attempts(Some(from), address));
        }
    }
    let leaving: Vec<Attempt<'_>> =
        client.addresses().flat_map(|address| all_attempts(Some(&web), address)).collect();
    let inside = mesh.on(Some(&web), Program::start);
    let outside = mesh.on(Some(&client), Program::start);

    for host in [&web, &first, &second] {
        run(weft().args(["redirect", "remove", "--netns"]).arg(host.namespace()));
    }
    assert_all_reach(&inside, &mesh, &arriving);
    assert_all_reach(&outside, &mesh, &leaving);
    let backend = ["--backend", backend];
    install_strict_redirects(&web, &backend);
    install_strict_redirects(&first, &[&backend[..], &["--uid", "0"]].concat());
    install_strict_redirects(&second, &backend);
    assert_none_reaches(&inside, &mesh, &web, &arriving);
    // A process that may set weft's mark may send out of the host, as weft does; the next host does not trust the mark.
    let leaving: Vec<Attempt<'_>> =
        leaving.into_iter().filter(|attempt| !attempt.name.contains("weft's mark")).collect();
    assert_none_reaches(&outside, &mesh, &client, &leaving);

    // The mesh itself still works, also when neighbors must be resolved again.
    for host in [&web, &first, &second] {
        run(Command::new("ip").args(["-n", &host.name, "neigh", "flush", "dev", "eth0"]));
    }
    let answer = mesh.ask();
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(mesh.ask_orders().status, 200);
}

#[test]
fn strict_sidecar_cannot_be_bypassed() {
    assert_no_bypass(MeshIpFamily::V4, "native");
}

#[test]
fn strict_sidecar_cannot_be_bypassed_over_ipv6() {
    assert_no_bypass(MeshIpFamily::V6, "iptables");
}
