//! The health check of the DNS server that queries are redirected to. Queries are redirected only while it answers: a
//! program without a resolver is worse off than a program that queries its resolver outside the mesh.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use weft_model::Transport;
use weft_runtime::clock::now;

use super::apply::apply;
use super::config::{DNS_PORT, RedirectConfig};
use super::namespace::{Namespace, in_namespace};
use super::types::{RedirectBackend, RedirectError, kernel_error};
use crate::netlink::conntrack::Conntrack;

/// The interval of health checks.
const QUERY_INTERVAL: Duration = Duration::from_secs(1);
/// How long after its last answer the server counts as failed.
const SILENCE_LIMIT: Duration = Duration::from_millis(2500);
/// The timeout of a single health check.
const QUERY_TIMEOUT: Duration = Duration::from_millis(700);

/// The state of the health check of one server.
#[derive(Debug)]
pub(super) struct DnsHealthCheck {
    /// The socket that queries are sent from, in the namespace of the server.
    socket: UdpSocket,
    query_id: u16,
    last_query: Option<Instant>,
    last_answer: Option<Instant>,
}

impl DnsHealthCheck {
    /// Creates the health check of the server at a port of a namespace's loopback.
    pub(super) fn at(port: u16, namespace: &Namespace) -> Result<Self, RedirectError> {
        in_namespace(namespace, || {
            let connect = || {
                let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
                socket.connect((Ipv4Addr::LOCALHOST, port))?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            };
            let socket = connect().map_err(kernel_error("opening a socket to the DNS server"))?;
            Ok(Self { socket, query_id: 0, last_query: None, last_answer: None })
        })
    }

    /// Reads pending answers, and sends a query when one is due. Returns whether the server answers.
    pub(super) fn poll(&mut self, now: Instant) -> bool {
        let mut answer = [0; 512];
        loop {
            match self.socket.recv(&mut answer) {
                Ok(bytes) if is_answer(answer.get(..bytes).unwrap_or_default(), self.query_id) => {
                    self.last_answer = Some(now);
                }
                // A late answer, or another packet.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The port is closed (ICMP error).
                Err(_) => {
                    self.last_answer = None;
                    break;
                }
            }
        }
        if self
            .last_query
            .is_none_or(|last_query| now.saturating_duration_since(last_query) >= QUERY_INTERVAL)
        {
            self.query_id = self.query_id.wrapping_add(1);
            self.last_query = Some(now);
            if self.socket.send(&query(self.query_id)).is_err() {
                self.last_answer = None;
            }
        }
        self.last_answer
            .is_some_and(|last_answer| now.saturating_duration_since(last_answer) < SILENCE_LIMIT)
    }
}

/// Checks whether a server answers now.
pub(super) fn answers(port: u16, namespace: &Namespace) -> Result<bool, RedirectError> {
    let mut server = DnsHealthCheck::at(port, namespace)?;
    let deadline = now() + QUERY_TIMEOUT;
    loop {
        let is_answering = server.poll(now());
        let left = deadline.saturating_duration_since(now());
        if is_answering || left.is_zero() {
            return Ok(is_answering);
        }
        let left = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::ZERO);
        let waited = poll(&mut [PollFd::new(server.socket.as_fd(), PollFlags::POLLIN)], left);
        if let Err(error) = waited
            && error != Errno::EINTR
        {
            return Err(kernel_error("waiting for the DNS server")(error.into()));
        }
    }
}

/// Installs a redirect once, without a guard. DNS is redirected only if its server answers.
///
/// # Errors
/// When the configuration is invalid, no DNS server answers, or installing fails.
pub fn apply_once(
    redirect: &RedirectConfig,
    backend: RedirectBackend,
    namespace: &Namespace,
) -> Result<(), RedirectError> {
    redirect.check().map_err(RedirectError::Invalid)?;
    if let Some(port) = redirect.dns
        && !answers(port, namespace)?
    {
        return Err(RedirectError::NoDns(port));
    }
    apply(redirect, backend, namespace)?;
    flush_conntrack(&redirect.resolvers, namespace)
}

/// A query for the address of `localhost`, which a server answers by itself (RFC 6761, section 6.3).
fn query(query_id: u16) -> Vec<u8> {
    const RECURSION_DESIRED: [u8; 2] = [1, 0];
    const ONE_QUESTION: [u8; 8] = [0, 1, 0, 0, 0, 0, 0, 0];
    const ADDRESS_IN_INTERNET: [u8; 4] = [0, 1, 0, 1];
    let head = [&query_id.to_be_bytes()[..], &RECURSION_DESIRED, &ONE_QUESTION].concat();
    [&head[..], b"\x09localhost\x00", &ADDRESS_IN_INTERNET].concat()
}

/// Whether a message is an answer to the query with this ID, whatever its content.
fn is_answer(message: &[u8], query_id: u16) -> bool {
    const HEADER_BYTES: usize = 12;
    const ANSWERS: u8 = 0x80;
    match message {
        [high, low, flags, ..] if message.len() >= HEADER_BYTES => {
            [*high, *low] == query_id.to_be_bytes() && flags & ANSWERS != 0
        }
        _ => false,
    }
}

/// Deletes conntrack entries of earlier queries to these resolvers: they would keep queries from the same
/// source port on the earlier path.
pub(super) fn flush_conntrack(
    resolvers: &[IpAddr],
    namespace: &Namespace,
) -> Result<(), RedirectError> {
    if resolvers.is_empty() {
        // Listing all entries takes time where there are many.
        return Ok(());
    }
    let is_question = |destination: SocketAddr| {
        destination.port() == DNS_PORT && resolvers.contains(&destination.ip().to_canonical())
    };
    in_namespace(namespace, || {
        let flush_conntrack = || {
            let mut conntrack = Conntrack::open()?;
            let mut questions = Vec::new();
            conntrack.list(|entry| {
                let flow = entry.flow;
                if flow.transport == Transport::Udp && is_question(flow.destination) {
                    questions.push(entry);
                }
            })?;
            questions.iter().try_for_each(|entry| conntrack.delete(entry))
        };
        flush_conntrack().map_err(kernel_error("deleting conntrack entries of DNS queries"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers while the test keeps it.
    struct Answering(UdpSocket);

    impl Answering {
        fn answer(&self) {
            let mut query = [0; 512];
            let (bytes, from) = self.0.recv_from(&mut query).expect("a query has arrived");
            query[2] |= 0x80;
            self.0.send_to(&query[..bytes], from).expect("the answer is sent");
        }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn server_is_healthy_while_it_answers() {
        let answering = Answering(UdpSocket::bind("127.0.0.1:0").expect("a port is free"));
        let port = answering.0.local_addr().expect("the socket is bound").port();
        let mut server = DnsHealthCheck::at(port, &Namespace::Own).expect("a socket");
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        assert!(!server.poll(start), "no answer has arrived yet");
        answering.answer();
        assert!(server.poll(after(10)));
        assert!(server.poll(after(1100)), "the next query is sent");
        assert!(server.poll(after(2400)));
        assert!(!server.poll(after(2600)), "the last query was not answered");
        // Answers to earlier queries and to the last one are pending.
        (0..2).for_each(|_| answering.answer());
        assert!(server.poll(after(2700)));
        drop(answering);
        server.poll(after(3700));
        assert!(!server.poll(after(3800)), "a closed port is detected at once");
    }

    #[test]
    fn silent_port_is_not_treated_as_a_dns_server() {
        let silent = UdpSocket::bind("127.0.0.1:0").expect("a port is free");
        let port = silent.local_addr().expect("the socket is bound").port();
        assert!(!answers(port, &Namespace::Own).expect("the query is sent"));
        drop(silent);
        assert!(!answers(port, &Namespace::Own).expect("the query is sent"));
        for no_answer in
            [&[][..], &[0; 11], &[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[0, 2, 0x80, 0]]
        {
            assert!(!is_answer(no_answer, 1), "{no_answer:?}");
        }
        let mut answer = query(1);
        answer[2] |= 0x80;
        assert!(is_answer(&answer, 1));
    }
}
