//! HTTP/1.1 by hand, for what no proper client would send, and to see each byte of what comes back.

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

/// A response, as far as it came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Http1Response {
    /// The status; 0 when nothing came.
    pub status: u16,
    /// The heads of the responses before it that another follows.
    pub interim: Vec<String>,
    /// Its head.
    pub head: String,
    /// Its body, without its coding.
    pub body: String,
    /// The trailers, a line each.
    pub trailers: String,
    /// Whether it broke off, in a way that a client can see.
    pub broken: bool,
}

impl Http1Response {
    /// The value of a field; `name` is lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

/// The value of a field of a head; `name` is lower case.
#[must_use]
pub fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    let named = |line: &'h str| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    };
    head.lines().skip(1).find_map(named)
}

impl Http1Client {
    /// A new connection.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn connect(port: u16) -> Self {
        Self::connect_to((Ipv4Addr::LOCALHOST, port).into())
    }

    /// A new connection to an address.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn connect_to(at: SocketAddr) -> Self {
        Self::try_connect(at).expect("somebody listens")
    }

    /// A new connection to an address where perhaps no server listens.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn try_connect(at: SocketAddr) -> std::io::Result<Self> {
        Self::over(TcpStream::connect(at)?)
    }

    /// A new connection from an address of this host.
    ///
    /// # Panics
    /// When nobody listens, or the host has no such address.
    #[must_use]
    pub fn connect_from(from: IpAddr, to: SocketAddr) -> Self {
        let connect = || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.bind(&SocketAddr::new(from, 0).into())?;
            socket.connect(&to.into())?;
            Self::over(socket.into())
        };
        connect().expect("somebody listens, and the address is one of this host")
    }

    fn over(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// The client's own address.
    ///
    /// # Panics
    /// When it is not connected.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.stream.get_ref().local_addr().expect("it is connected")
    }

    /// Sends bytes; whether they were taken.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.get_mut().write_all(bytes.as_ref()).is_ok()
    }

    /// Says that no more follows.
    pub fn finish(&self) {
        // It may be closed by now.
        drop(self.stream.get_ref().shutdown(Shutdown::Write));
    }

    /// The next response to a request of `method`, as far as it comes.
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

    /// The body behind a head, the trailers, and whether it broke off.
    fn body(&mut self, head: &str) -> (String, String, bool) {
        let mut body = Vec::new();
        let mut trailers = String::new();
        let whole = if header(head, "transfer-encoding").is_some() {
            chunked(&mut self.stream, &mut body, &mut trailers).is_some()
        } else if let Some(length) = header(head, "content-length") {
            let length: u64 = length.parse().expect("a length is a number");
            let read = self.stream.by_ref().take(length).read_to_end(&mut body);
            read.is_ok() && body.len() as u64 == length
        } else {
            self.stream.read_to_end(&mut body).is_ok()
        };
        (String::from_utf8_lossy(&body).into_owned(), trailers, !whole)
    }

    /// Sends a request and gives its answer. The method is its first word.
    #[must_use]
    pub fn ask(&mut self, request: &str) -> Http1Response {
        self.send(request);
        self.answer(request.split(' ').next().unwrap_or_default())
    }

    /// The next bytes of what is no message any more; none at the end.
    #[must_use]
    pub fn bytes(&mut self, count: usize) -> Option<String> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether the other side has closed it, and said nothing more.
    ///
    /// # Panics
    /// When it neither closes it nor says anything.
    #[must_use]
    pub fn is_at_end(&mut self) -> bool {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(read) => read == 0,
            Err(error) => {
                assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "it is still open");
                true
            }
        }
    }
}

/// Sends one request over a connection of its own.
#[must_use]
pub fn ask(port: u16, request: &str) -> Http1Response {
    Http1Client::connect(port).ask(request)
}

/// Reads a chunked body; none when it breaks off.
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
