//! A raw HTTP/1.1 client: sends any bytes, and returns each part of the response as received.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};

use socket2::{Domain, Socket, Type};

use crate::scripted_server::read_head;
use crate::wait::DEADLINE;

/// A connection.
#[derive(Debug)]
pub struct Http1Client {
    stream: BufReader<TcpStream>,
}

/// A response, possibly incomplete.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Http1Response {
    /// The status; 0 when nothing was received.
    pub status: u16,
    /// The heads of interim (1xx) responses before it.
    pub interim: Vec<String>,
    /// The response head.
    pub head: String,
    /// The body, with chunked coding removed.
    pub body: String,
    /// The trailers, one per line.
    pub trailers: String,
    /// Whether the response ended before it was complete.
    pub broken: bool,
}

impl Http1Response {
    /// The value of a header; `name` is lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

/// The value of a header in a head; `name` is lower case.
#[must_use]
pub fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    let named = |line: &'h str| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    };
    head.lines().skip(1).find_map(named)
}

impl Http1Client {
    /// Connects to a port of loopback.
    ///
    /// # Panics
    /// If the port refuses connections.
    #[must_use]
    pub fn connect(port: u16) -> Self {
        Self::connect_to((Ipv4Addr::LOCALHOST, port).into())
    }

    /// Connects to an address.
    ///
    /// # Panics
    /// If the address refuses connections.
    #[must_use]
    pub fn connect_to(at: SocketAddr) -> Self {
        Self::try_connect(at).expect("the port accepts connections")
    }

    /// Connects to an address that may refuse connections.
    ///
    /// # Errors
    /// The error of `connect(2)`.
    pub fn try_connect(at: SocketAddr) -> std::io::Result<Self> {
        Self::over(TcpStream::connect(at)?)
    }

    /// Connects from this local address.
    ///
    /// # Panics
    /// If `to` refuses connections, or the host does not have the address `from`.
    #[must_use]
    pub fn connect_from(from: IpAddr, to: SocketAddr) -> Self {
        let connect = || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.bind(&SocketAddr::new(from, 0).into())?;
            socket.connect(&to.into())?;
            Self::over(socket.into())
        };
        connect().expect("the server accepts connections, and the local address exists")
    }

    fn over(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// The local address of the connection.
    ///
    /// # Panics
    /// If the connection has ended.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.stream.get_ref().local_addr().expect("the socket is connected")
    }

    /// Sends bytes; returns whether the socket accepted them.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.get_mut().write_all(bytes.as_ref()).is_ok()
    }

    /// Closes the sending side.
    pub fn finish(&self) {
        // The connection may already be closed.
        drop(self.stream.get_ref().shutdown(Shutdown::Write));
    }

    /// Reads the response to a request of `method`, as far as it is received.
    pub fn answer(&mut self, method: &str) -> Http1Response {
        let mut answer = Http1Response::default();
        loop {
            let Some(head) = read_head(&mut self.stream) else {
                answer.broken = true;
                return answer;
            };
            let status = head.get(9..12).and_then(|digits| digits.parse().ok()).unwrap_or(0);
            if (100..200).contains(&status) && status != 101 {
                answer.interim.push(head);
                continue;
            }
            (answer.status, answer.head) = (status, head);
            break;
        }
        let is_tunnel = answer.status == 101 || (method == "CONNECT" && answer.status / 100 == 2);
        let has_no_body = method == "HEAD" || matches!(answer.status, 204 | 304) || is_tunnel;
        if !has_no_body {
            let body = self.body(&answer.head);
            (answer.body, answer.trailers, answer.broken) = body;
        }
        answer
    }

    /// Reads the body after a head: the body, the trailers, and whether it ended too early.
    fn body(&mut self, head: &str) -> (String, String, bool) {
        let mut body = Vec::new();
        let mut trailers = String::new();
        let whole = if header(head, "transfer-encoding").is_some() {
            chunked(&mut self.stream, &mut body, &mut trailers).is_some()
        } else if let Some(length) = header(head, "content-length") {
            let length: u64 = length.parse().expect("content-length is a number");
            let read = self.stream.by_ref().take(length).read_to_end(&mut body);
            read.is_ok() && body.len() as u64 == length
        } else {
            self.stream.read_to_end(&mut body).is_ok()
        };
        (String::from_utf8_lossy(&body).into_owned(), trailers, !whole)
    }

    /// Sends a request and reads the response. The method is the first word of the request.
    #[must_use]
    pub fn ask(&mut self, request: &str) -> Http1Response {
        self.send(request);
        self.answer(request.split(' ').next().unwrap_or_default())
    }

    /// Reads bytes that are not HTTP messages, for instance of a tunnel; `None` at the end.
    #[must_use]
    pub fn bytes(&mut self, count: usize) -> Option<String> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether the peer has closed the connection without sending more.
    ///
    /// # Panics
    /// If the connection stays open and silent until the deadline.
    #[must_use]
    pub fn is_at_end(&mut self) -> bool {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(read) => read == 0,
            Err(error) => {
                assert_ne!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock,
                    "the connection is still open"
                );
                true
            }
        }
    }
}

/// Sends one request over a new connection.
#[must_use]
pub fn ask(port: u16, request: &str) -> Http1Response {
    Http1Client::connect(port).ask(request)
}

/// Reads a chunked body; `None` when it ends too early.
pub fn chunked(stream: &mut impl BufRead, body: &mut Vec<u8>, trailers: &mut String) -> Option<()> {
    loop {
        let size = line(stream)?;
        let size = u64::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        if size == 0 {
            break;
        }
        let before = body.len() as u64;
        stream.by_ref().take(size).read_to_end(body).ok()?;
        (body.len() as u64 == before + size).then_some(())?;
        line(stream)?;
    }
    loop {
        let trailer = line(stream)?;
        if trailer == "\r\n" {
            return Some(());
        }
        trailers.push_str(&trailer);
    }
}

fn line(stream: &mut impl BufRead) -> Option<String> {
    let mut line = String::new();
    stream.read_line(&mut line).ok()?;
    line.ends_with("\r\n").then_some(line)
}
