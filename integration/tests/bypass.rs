//! Ways past a sidecar, and that none of them leads to the program behind it, or out of its host.

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

/// A port of the program's that nobody has told the mesh of.
const PORT: u16 = 9000;
/// Another, in the range of ports that weft itself uses.
const OWN_RANGE_PORT: u16 = 15050;
/// A protocol that is nobody's (RFC 3692).
const EXPERIMENT: i32 = 253;
/// What is sent, before the name of the way.
const MARKER: &str = "past-the-sidecar:";
/// What stands before a way's name while there are no rules.
const OPEN: &str = "open: ";
/// How long a connection may take on a way that leads somewhere.
const PATIENCE: Duration = Duration::from_millis(200);

/// A program that listens to everything, and what it has heard.
#[derive(Clone, Default)]
struct Program(Arc<Mutex<Vec<String>>>);

impl Program {
    /// Starts it on the host that this thread is on.
    fn start() -> Self {
        let program = Self::default();
        for port in [PORT, OWN_RANGE_PORT] {
            for kind in [Type::STREAM, Type::DGRAM] {
                let socket = Socket::new(Domain::IPV6, kind, None).expect("a socket");
                socket.set_only_v6(false).expect("one socket for both families");
                let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
                socket.bind(&any.into()).expect("the port is free");
                if kind == Type::STREAM {
                    socket.listen(64).expect("it can listen");
                    program.clone().take_connections(socket);
                } else {
                    program.clone().listen_to(socket);
                }
            }
        }
        for (domain, icmp) in [(Domain::IPV4, Protocol::ICMPV4), (Domain::IPV6, Protocol::ICMPV6)] {
            for protocol in [icmp, Protocol::from(EXPERIMENT)] {
                let socket = Socket::new(domain, Type::RAW, Some(protocol)).expect("we may");
                program.clone().listen_to(socket);
            }
        }
        program
    }

    fn take_connections(self, listener: Socket) {
        std::thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                self.clone().listen_to(socket);
            }
        });
    }

    fn listen_to(self, mut socket: Socket) {
        std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 16];
            while let Ok(read @ 1..) = socket.read(&mut bytes) {
                let text = String::from_utf8_lossy(bytes.get(..read).unwrap_or_default());
                if let Some((_, rest)) = text.split_once(MARKER) {
                    let way = rest.split(';').next().unwrap_or_default().to_owned();
                    self.0.lock().unwrap_or_else(PoisonError::into_inner).push(way);
                }
            }
        });
    }

    fn has_heard(&self, way: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|heard| heard == way)
    }

    fn forget(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sends bytes to an address. Whether that fails tells nothing: what arrives does.
type Send = fn(SocketAddr, &[u8]) -> io::Result<()>;

/// A way: what is done, from where, and whereto.
struct Way<'a> {
    name: String,
    from: Option<&'a Host>,
    to: SocketAddr,
    send: Send,
}

fn tcp(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    say(TcpStream::connect_timeout(&to, PATIENCE)?, bytes)
}

/// Says it, and waits until the other side has had enough, so that nothing of it is lost on the way.
fn say(mut stream: TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.set_read_timeout(Some(PATIENCE))?;
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

/// As a program would that may set marks and knows ours.
fn tcp_with_our_mark(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_mark(0x539)?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    say(socket.into(), bytes)
}

/// By a socket of IPv6 to an address of IPv4.
fn tcp_mapped(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
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

fn udp_with_our_mark(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    socket.set_mark(0x539)?;
    socket.send_to(bytes, &to.into()).map(drop)
}

/// Of more bytes than a packet takes.
fn udp_in_fragments(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    udp(to, &[bytes, &[b'.'; 4000]].concat())
}

/// As an answer to what nobody asked.
fn udp_as_an_answer(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 53))?;
    socket.send_to(bytes, to).map(drop)
}

fn icmp(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let (protocol, echo) =
        if to.is_ipv4() { (Protocol::ICMPV4, 8) } else { (Protocol::ICMPV6, 128) };
    let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(protocol))?;
    let mut to = to;
    to.set_port(0);
    // The check sum is wrong; who listens to raw packets sees them nevertheless.
    socket.send_to(&[&[echo, 0, 0, 0, 0, 1, 0, 1], bytes].concat(), &to.into()).map(drop)
}

/// As neighbours tell each other their addresses, from afar. IPv4 has no such thing.
fn a_neighbours_message(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    if to.is_ipv4() {
        return icmp(to, bytes);
    }
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    let mut to = to;
    to.set_port(0);
    socket.send_to(&[&[136, 0, 0, 0, 0, 0, 0, 0], bytes].concat(), &to.into()).map(drop)
}

fn another_protocol(to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let protocol = Some(Protocol::from(EXPERIMENT));
    let socket = Socket::new(Domain::for_address(to), Type::RAW, protocol)?;
    let mut to = to;
    to.set_port(0);
    socket.send_to(bytes, &to.into()).map(drop)
}

/// What can be sent to an address.
const SENDS: [(&str, Send); 12] = [
    ("TCP", tcp),
    ("TCP to a port in weft's own range", tcp_to_own_range),
    ("TCP with our mark", tcp_with_our_mark),
    ("TCP by a mapped address", tcp_mapped),
    ("UDP", udp),
    ("UDP to a port in weft's own range", udp_to_own_range),
    ("UDP with our mark", udp_with_our_mark),
    ("UDP in fragments", udp_in_fragments),
    ("UDP as an answer", udp_as_an_answer),
    ("ICMP", icmp),
    ("a neighbour's message", a_neighbours_message),
    ("another protocol", another_protocol),
];

/// Every way from a host to an address.
fn all_ways(from: Option<&Host>, to: IpAddr) -> Vec<Way<'_>> {
    let name = from.map_or("the router", |host| &host.name).to_owned();
    let way = |(send_name, send): (&str, Send)| {
        let name = format!("{send_name} from {name} to {to}");
        Way { name, from, to: SocketAddr::new(to, PORT), send }
    };
    SENDS.into_iter().map(way).collect()
}

/// Ways that lead from the next hop only: addresses of the link, and addresses of many hosts.
fn ways_of_the_link(host: &Host) -> Vec<Way<'static>> {
    let [_, _, number, _] = host.address.octets();
    let index = if_nametoindex(format!("to-{number}").as_str()).expect("the router's device");
    let show = format!("-n {} -6 -o addr show dev eth0 scope link", host.name);
    let shown = run(Command::new("ip").args(show.split_whitespace()));
    let word = shown.split_whitespace().find(|word| word.starts_with("fe80:"));
    let own = word.and_then(|word| word.split('/').next()).expect("an address of the link");
    let of_link = |address| SocketAddr::V6(SocketAddrV6::new(address, PORT, 0, index));
    let own = of_link(own.parse().expect("an address"));
    let mut ways: Vec<Way<'static>> = all_ways(None, own.ip());
    ways.iter_mut().for_each(|way| way.to = own);
    let all_hosts = of_link(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
    let broadcast = SocketAddr::new(Ipv4Addr::new(10, 90, number, 255).into(), PORT);
    for (name, to) in [("to all hosts of the link", all_hosts), ("by broadcast", broadcast)] {
        ways.push(Way { name: format!("UDP {name}"), from: None, to, send: udp });
    }
    ways
}

fn go(mesh: &TestMesh, way: &Way<'_>, name: &str) {
    let bytes = format!("{MARKER}{name};");
    // A refusal is one way of not getting through.
    drop(mesh.on(way.from, || (way.send)(way.to, bytes.as_bytes())));
}

/// Goes all ways until each has led to the program: without that, nothing would be shown.
fn assert_all_lead_to(program: &Program, mesh: &TestMesh, ways: &[Way<'_>]) {
    for way in ways {
        // Under another name: what is still on its way when the rules come is told apart by it.
        let name = format!("{OPEN}{}", way.name);
        eventually(format!("{} arrives", way.name), || {
            go(mesh, way, &name);
            program.has_heard(&name).then_some(())
        });
    }
}

/// Goes all ways, and holds that none leads to the program.
#[track_caller]
fn assert_none_leads_to(program: &Program, mesh: &TestMesh, host: &Host, ways: &[Way<'_>]) {
    for _ in 0..2 {
        ways.iter().for_each(|way| go(mesh, way, &way.name));
    }
    // The host's own programs do reach each other, so whatever came before has been read by now.
    let local = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let within: Vec<Way<'_>> =
        local.into_iter().flat_map(|address| all_ways(Some(host), address)).collect();
    for way in &within {
        eventually(format!("{} arrives", way.name), || {
            go(mesh, way, &way.name);
            program.has_heard(&way.name).then_some(())
        });
    }
    let heard = program.forget();
    let is_past =
        |heard: &&String| !heard.starts_with(OPEN) && !within.iter().any(|way| way.name == **heard);
    let past: Vec<&String> = heard.iter().filter(is_past).collect();
    assert!(past.is_empty(), "{past:#?}");
}

fn redirect(host: &Host, more: &[&str]) {
    let services = "10.96.0.0/16,fd96::/64";
    let mut command = weft();
    command.args(["redirect", "apply", "--inbound", "15006", "--outbound", "15001"]);
    command.args(["--services", services, "--strict", "--netns"]).arg(host.namespace());
    run(command.args(more));
}

fn nothing_passes_by(family: MeshIpFamily, backend: &str) {
    let mesh = TestMesh::start_in_family(family);
    let (web, client) = (mesh.web.host.clone(), mesh.client.clone());
    let [first, second] = [0, 1].map(|n| mesh.orders.get(n).expect("two replicas").host.clone());
    let addresses: Vec<IpAddr> = web.addresses().collect();
    // The first replica's programs run as the sidecar's own user, the second's do not.
    let mut arriving = ways_of_the_link(&web);
    for address in addresses {
        for from in [&client, &first, &second] {
            arriving.extend(all_ways(Some(from), address));
        }
    }
    let leaving: Vec<Way<'_>> =
        client.addresses().flat_map(|address| all_ways(Some(&web), address)).collect();
    let (inside, outside) =
        (mesh.on(Some(&web), Program::start), mesh.on(Some(&client), Program::start));

    for host in [&web, &first, &second] {
        run(weft().args(["redirect", "remove", "--netns"]).arg(host.namespace()));
    }
    assert_all_lead_to(&inside, &mesh, &arriving);
    assert_all_lead_to(&outside, &mesh, &leaving);
    let by = ["--backend", backend];
    redirect(&web, &by);
    redirect(&first, &[&by[..], &["--uid", "0"]].concat());
    redirect(&second, &by);
    assert_none_leads_to(&inside, &mesh, &web, &arriving);
    // Who may set our mark may leave, as we do; the next host does not take it for one of ours.
    let leaving: Vec<Way<'_>> =
        leaving.into_iter().filter(|way| !way.name.contains("our mark")).collect();
    assert_none_leads_to(&outside, &mesh, &client, &leaving);

    // The mesh itself goes on, also where neighbours must be found anew.
    for host in [&web, &first, &second] {
        run(Command::new("ip").args(["-n", &host.name, "neigh", "flush", "dev", "eth0"]));
    }
    let answer = mesh.ask();
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(mesh.ask_orders().status, 200);
}

#[test]
fn no_way_leads_past_a_strict_sidecar() {
    nothing_passes_by(MeshIpFamily::V4, "native");
}

#[test]
fn no_way_leads_past_a_strict_sidecar_over_ipv6() {
    nothing_passes_by(MeshIpFamily::V6, "iptables");
}
