//! A client that sends arbitrary bytes and parses responses strictly.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};

use weft_integration::wait::DEADLINE;

/// A client connection.
#[derive(Debug)]
pub(crate) struct Client(BufReader<TcpStream>);

/// A final response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
    /// Whether the response has `connection: close`.
    pub(crate) is_last: bool,
}

impl Client {
    pub(crate) fn connect(port: u16) -> Self {
        let stream =
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the port accepts connections");
        stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        stream.set_nodelay(true).expect("the socket is a TCP socket");
        Self(BufReader::new(stream))
    }

    /// Sends bytes. A write error is ignored: the sidecar may refuse a request before it has read all of it.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        drop(self.0.get_mut().write_all(bytes));
    }

    /// Closes the sending direction.
    pub(crate) fn finish(&self) {
        drop(self.0.get_ref().shutdown(Shutdown::Write));
    }

    /// The next final response; `None` when the connection ends or the bytes are not a response.
    pub(crate) fn answer(&mut self, is_to_head: bool) -> Option<Answer> {
        loop {
            let head = self.head()?;
            let status = head.split(' ').nth(1)?.parse().ok()?;
            if (100..200).contains(&status) && status != 101 {
                continue;
            }
            let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
            let length: usize = header("content-length: ").unwrap_or("0").parse().ok()?;
            let mut body = vec![0; if is_to_head { 0 } else { length }];
            self.0.read_exact(&mut body).ok()?;
            let body = String::from_utf8_lossy(&body).into_owned();
            return Some(Answer { status, body, is_last: header("connection: ") == Some("close") });
        }
    }

    fn head(&mut self) -> Option<String> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            (self.0.read_line(&mut head).ok()? > 0).then_some(())?;
        }
        head.starts_with("HTTP/1.1 ").then_some(head)
    }

    /// The bytes until the connection ends or is reset.
    ///
    /// # Errors
    ///
    /// The connection stays open until the read timeout.
    pub(crate) fn rest(&mut self) -> Result<Vec<u8>, String> {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                Err("the connection stays open".to_owned())
            }
            Ok(_) | Err(_) => Ok(rest),
        }
    }
}
