//! A DNS server that can fail in several ways, and the `resolv.conf` and `hosts` files that make
//! this namespace use it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nix::mount::{MsFlags, mount};
use tempfile::TempDir;

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const NO_ERROR: u8 = 0;
const SERVER_FAILURE: u8 = 2;
const NO_SUCH_NAME: u8 = 3;

/// How queries for a name are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DnsReply {
    /// These addresses, with this TTL in seconds.
    Addresses(Vec<IpAddr>, u32),
    /// These addresses over TCP; over UDP a truncated response without addresses.
    Truncated(Vec<IpAddr>),
    /// A response with code SERVFAIL.
    ServerFailure,
    /// No response.
    Silence,
    /// A response with code NXDOMAIN.
    NoSuchName,
}

/// The replies of the server, and how many queries it received.
#[derive(Debug, Default)]
struct Zone {
    replies: BTreeMap<String, DnsReply>,
    queries: BTreeMap<String, usize>,
}

/// The server, at port 53 of loopback. Names without a reply are answered with NXDOMAIN.
#[derive(Debug)]
pub struct DnsServer {
    zone: Arc<Mutex<Zone>>,
    folder: TempDir,
}

impl DnsServer {
    /// Starts the server and makes this namespace use it, with `options` as further lines of
    /// `/etc/resolv.conf` and `hosts` as `/etc/hosts`.
    ///
    /// # Panics
    /// If the port is in use, or a file cannot be replaced.
    #[must_use]
    pub fn start(options: &str, hosts: &str) -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        for (name, text) in [
            ("resolv.conf", format!("nameserver 127.0.0.1\n{options}\n")),
            ("hosts", hosts.to_owned()),
        ] {
            let file = folder.path().join(name);
            std::fs::write(&file, text).expect("the folder is writable");
            let none: Option<&str> = None;
            mount(Some(&file), &PathBuf::from("/etc").join(name), none, MsFlags::MS_BIND, none)
                .expect("files of the test's mount namespace can be replaced");
        }
        let zone = Arc::<Mutex<Zone>>::default();
        let address = (Ipv4Addr::LOCALHOST, 53);
        let udp = UdpSocket::bind(address).expect("the port is free");
        let tcp = TcpListener::bind(address).expect("the port is free");
        let udp_zone = zone.clone();
        std::thread::spawn(move || serve_udp(&udp, &udp_zone));
        let tcp_zone = zone.clone();
        std::thread::spawn(move || {
            for stream in tcp.incoming().flatten() {
                drop(serve_tcp(stream, &tcp_zone));
            }
        });
        Self { zone, folder }
    }

    /// Sets the reply for a name.
    pub fn set(&self, name: &str, reply: DnsReply) {
        lock(&self.zone).replies.insert(name.to_owned(), reply);
    }

    /// The number of queries for a name.
    #[must_use]
    pub fn query_count(&self, name: &str) -> usize {
        lock(&self.zone).queries.get(name).copied().unwrap_or_default()
    }

    /// Replaces `/etc/hosts`.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn set_hosts(&self, hosts: &str) {
        std::fs::write(self.folder.path().join("hosts"), hosts)
            .expect("the hosts file is writable");
    }
}

fn lock(zone: &Mutex<Zone>) -> std::sync::MutexGuard<'_, Zone> {
    zone.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve_udp(socket: &UdpSocket, zone: &Mutex<Zone>) {
    let mut question = [0; 512];
    while let Ok((bytes, from)) = socket.recv_from(&mut question) {
        let answer = question.get(..bytes).and_then(|question| answer(question, zone, true));
        if let Some(answer) = answer {
            send(socket, &answer, from);
        }
    }
}

/// Sends a response; a client that has closed its socket is ignored.
fn send(socket: &UdpSocket, answer: &[u8], to: SocketAddr) {
    drop(socket.send_to(answer, to));
}

fn serve_tcp(mut stream: TcpStream, zone: &Mutex<Zone>) -> std::io::Result<()> {
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut question)?;
        if let Some(answer) = answer(&question, zone, false) {
            let length = u16::try_from(answer.len()).unwrap_or(u16::MAX).to_be_bytes();
            stream.write_all(&[&length[..], &answer].concat())?;
        }
    }
}

/// The response to a query; `None` where the reply is silence.
fn answer(question: &[u8], zone: &Mutex<Zone>, over_udp: bool) -> Option<Vec<u8>> {
    let (name, end) = name(question)?;
    let kind = u16::from_be_bytes([*question.get(end)?, *question.get(end + 1)?]);
    let reply = {
        let mut zone = lock(zone);
        *zone.queries.entry(name.clone()).or_default() += 1;
        zone.replies.get(&name).cloned().unwrap_or(DnsReply::NoSuchName)
    };
    let question = question.get(..end + 4)?;
    let of_kind = |addresses: Vec<IpAddr>| -> Vec<IpAddr> {
        let is_wanted = |address: &IpAddr| match kind {
            TYPE_A => address.is_ipv4(),
            TYPE_AAAA => address.is_ipv6(),
            _ => false,
        };
        addresses.into_iter().filter(is_wanted).collect()
    };
    match reply {
        DnsReply::Silence => None,
        DnsReply::ServerFailure => Some(message(question, SERVER_FAILURE, false, &[], 0)),
        DnsReply::NoSuchName => Some(message(question, NO_SUCH_NAME, false, &[], 0)),
        DnsReply::Truncated(_) if over_udp => Some(message(question, NO_ERROR, true, &[], 0)),
        DnsReply::Truncated(addresses) => {
            Some(message(question, NO_ERROR, false, &of_kind(addresses), 60))
        }
        DnsReply::Addresses(addresses, ttl) => {
            Some(message(question, NO_ERROR, false, &of_kind(addresses), ttl))
        }
    }
}

fn message(
    question: &[u8],
    code: u8,
    is_truncated: bool,
    addresses: &[IpAddr],
    ttl: u32,
) -> Vec<u8> {
    let mut message = question.to_vec();
    let count = u16::try_from(addresses.len()).unwrap_or(u16::MAX).to_be_bytes();
    // Flags: response, truncated, recursion desired and available. One question, no authority or
    // additional records.
    let head =
        [0x81 | u8::from(is_truncated) << 1, 0x80 | code, 0, 1, count[0], count[1], 0, 0, 0, 0];
    for (place, byte) in message.iter_mut().skip(2).zip(head) {
        *place = byte;
    }
    for address in addresses {
        let (kind, bytes) = match address {
            IpAddr::V4(address) => (TYPE_A, address.octets().to_vec()),
            IpAddr::V6(address) => (TYPE_AAAA, address.octets().to_vec()),
        };
        // The name is a pointer to the question's name.
        message.extend([0xc0, 12]);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message.extend(ttl.to_be_bytes());
        message.extend(u16::try_from(bytes.len()).unwrap_or_default().to_be_bytes());
        message.extend(bytes);
    }
    message
}

/// The name of a question in lower case, without the final dot, and the offset at which it ends.
fn name(question: &[u8]) -> Option<(String, usize)> {
    let mut labels = Vec::new();
    let mut at = 12;
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            return Some((labels.join("."), at));
        }
        let label = question.get(at..at + length)?;
        labels.push(String::from_utf8_lossy(label).to_lowercase());
        at += length;
    }
}
