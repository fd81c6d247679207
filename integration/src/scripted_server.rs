//! Services that behave as no proper server would, or that tell what they were sent.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use crate::wait::DEADLINE;

/// A service on a thread of its own, for as long as the test process lives.
#[derive(Debug, Clone, Copy)]
pub struct ScriptedServer {
    /// Where it listens.
    pub port: u16,
}

impl ScriptedServer {
    /// Hands every connection to `serve`, each on a thread of its own.
    ///
    /// # Panics
    /// When no port can be bound.
    pub fn start(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a port");
        let port = listener.local_addr().as_ref().map(SocketAddr::port).expect("it is bound");
        let serve = Arc::new(serve);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serve = serve.clone();
                std::thread::spawn(move || serve(stream));
            }
        });
        Self { port }
    }

    /// Answers every request with the head that it came with, and keeps the connection.
    #[must_use]
    pub fn echoing_heads() -> Self {
        Self::start(|stream| {
            let mut reader = BufReader::new(stream);
            while let Some(head) = read_head(&mut reader) {
                let answer =
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{head}", head.len());
                if reader.get_mut().write_all(answer.as_bytes()).is_err() {
                    return;
                }
            }
        })
    }

    /// Sends `answer` to the first request of each connection, then closes it.
    pub fn replying_once(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(move |stream| {
            let mut reader = BufReader::new(stream);
            if read_head(&mut reader).is_some() {
                // A client that wants no more of it is what some tests are about.
                drop(reader.get_mut().write_all(&answer));
            }
        })
    }

    /// Takes requests, and never answers.
    #[must_use]
    pub fn silent() -> Self {
        Self::start(|mut stream| drop(std::io::copy(&mut stream, &mut std::io::sink())))
    }
}

/// The next head, up to and with its empty line; none at the end of the connection.
pub fn read_head(reader: &mut impl BufRead) -> Option<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

/// Sends bytes to a port of loopback and gives all that comes back until the connection ends. Only a
/// connection that stays open and silent past the deadline is a failure: being reset is an end.
///
/// # Panics
/// When nobody listens there, or the connection does not end.
#[must_use]
pub fn send_and_read_all(port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("somebody listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a deadline above zero");
    // A server may refuse before it has read all; its answer is what counts.
    if stream.write_all(bytes).is_ok() {
        drop(stream.shutdown(std::net::Shutdown::Write));
    }
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => {
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe, "port {port}: {error}");
        }
        Ok(_) | Err(_) => {}
    }
    answer
}
