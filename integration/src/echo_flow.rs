//! A TCP connection to the echo service of a mesh.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;

/// A TCP connection to an endpoint of the echo service, through the agent.
#[derive(Debug)]
pub struct EchoFlow(BufReader<TcpStream>);

impl EchoFlow {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self(BufReader::new(stream))
    }

    /// Sends a line and returns the name of the endpoint that echoed it; `None` if the connection
    /// is broken.
    pub fn send_line(&mut self, what: &str) -> Option<String> {
        writeln!(self.0.get_mut(), "{what}").ok()?;
        self.read_endpoint_name()
    }

    /// Reads a line and returns its first word, the name of the endpoint.
    pub(crate) fn read_endpoint_name(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = self.0.read_line(&mut line).ok()?;
        (read > 0).then(|| line.split_whitespace().next().unwrap_or_default().to_owned())
    }
}
