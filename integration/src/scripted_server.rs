//! TCP servers with scripted behaviour: malformed responses, silence, or an echo of the request
//! head.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use crate::wait::DEADLINE;

/// A server on its own thread, which runs until the test process ends.
#[derive(Debug, Clone, Copy)]
pub struct ScriptedServer {
    /// The port it listens on.
    pub port: u16,
}

impl ScriptedServer {
    /// Passes each connection to `serve`, on a thread of its own.
    ///
    /// # Panics
    /// If no port can be bound.
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

    /// Responds to each request with the request's head as the body, and keeps the connection open.
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

    /// Sends `answer` to the first request of each connection, then closes the connection.
    pub fn replying_once(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(move |stream| {
            let mut reader = BufReader::new(stream);
            if read_head(&mut reader).is_some() {
                // The client may have closed the connection; some tests check exactly that.
                drop(reader.get_mut().write_all(&answer));
            }
        })
    }

    /// Reads requests and never responds.
    #[must_use]
    pub fn silent() -> Self {
        Self::start(|mut stream| drop(std::io::copy(&mut stream, &mut std::io::sink())))
    }
}

/// Reads the next head, including its final empty line; `None` at the end of the connection.
pub fn read_head(reader: &mut impl BufRead) -> Option<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

/// Sends bytes to a port of loopback and returns everything received until the connection ends. A
/// reset counts as an end.
///
/// # Panics
/// If the port refuses connections, or the connection is still open at the deadline.
#[must_use]
pub fn send_and_read_all(port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut stream =
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the port accepts connections");
    stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    // A server may respond before it has read everything; the response is what counts.
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
