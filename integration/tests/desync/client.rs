//! A client that writes what it is told to, and reads answers to the byte.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};

use weft_integration::wait::DEADLINE;

/// A connection.
#[derive(Debug)]
pub(crate) struct Client(BufReader<TcpStream>);

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
    /// Whether it is said to be the last.
    pub(crate) is_last: bool,
}

impl Client {
    pub(crate) fn connect(port: u16) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("it is above zero");
        stream.set_nodelay(true).expect("it is TCP");
        Self(BufReader::new(stream))
    }

    /// Sends bytes. They may be refused before all are read: the answer tells.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        drop(self.0.get_mut().write_all(bytes));
    }

    /// Says that nothing more comes.
    pub(crate) fn finish(&self) {
        drop(self.0.get_ref().shutdown(Shutdown::Write));
    }

    /// The next final answer; none when the connection ends, or when it is no answer.
    pub(crate) fn answer(&mut self, is_to_head: bool) -> Option<Answer> {
        loop {
            let head = self.head()?;
            let status = head.split(' ').nth(1)?.parse().ok()?;
            if (100..200).contains(&status) && status != 101 {
                continue;
            }
            let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
            let length: usize = field("content-length: ").unwrap_or("0").parse().ok()?;
            let mut body = vec![0; if is_to_head { 0 } else { length }];
            self.0.read_exact(&mut body).ok()?;
            let body = String::from_utf8_lossy(&body).into_owned();
            return Some(Answer { status, body, is_last: field("connection: ") == Some("close") });
        }
    }

    fn head(&mut self) -> Option<String> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            (self.0.read_line(&mut head).ok()? > 0).then_some(())?;
        }
        head.starts_with("HTTP/1.1 ").then_some(head)
    }

    /// Whatever comes until the connection ends. Being reset is an end.
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
