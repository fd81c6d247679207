//! A service that records the requests it receives, as the strict parser reads them.

use std::io::{Read as _, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use weft_integration::scripted_server::ScriptedServer;

use crate::strict_parser::{Parsed, Request, parse};

/// The requests and violations that a service has recorded.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    /// The complete requests, in order.
    pub(crate) requests: Vec<Request>,
    /// Bytes that the strict parser rejects, with the reason.
    pub(crate) violations: Vec<String>,
}

/// An HTTP/1.1 service that responds with the summary of the request that it received. It refuses tunnels to the host
/// `declined`, and accepts WebSocket upgrades at `/agreed`.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) port: u16,
    recorded: Arc<Mutex<Recorded>>,
}

impl Recorder {
    pub(crate) fn start() -> Self {
        let recorded = Arc::<Mutex<Recorded>>::default();
        let shared = recorded.clone();
        let port = ScriptedServer::start(move |stream| serve(stream, &shared)).port;
        Self { port, recorded }
    }

    /// Takes what was recorded since the last call.
    pub(crate) fn take(&self) -> Recorded {
        std::mem::take(&mut *lock(&self.recorded))
    }
}

fn lock(recorded: &Mutex<Recorded>) -> MutexGuard<'_, Recorded> {
    recorded.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the service does next with a connection.
enum Next {
    /// Reads more bytes.
    More,
    /// Closes the connection.
    End,
    /// Treats the connection as a tunnel.
    Tunnel,
}

fn serve(mut stream: TcpStream, recorded: &Mutex<Recorded>) {
    let mut bytes = Vec::new();
    let mut more = [0; 16 * 1024];
    let mut sent_continue = false;
    loop {
        match requests(&mut stream, &mut bytes, recorded, &mut sent_continue) {
            Next::More => {}
            Next::End => return,
            Next::Tunnel => {
                // Bytes in the tunnel are not HTTP. The other side closes it.
                drop(std::io::copy(&mut stream, &mut std::io::sink()));
                return;
            }
        }
        match stream.read(&mut more) {
            Ok(count @ 1..) => bytes.extend_from_slice(&more[..count]),
            Ok(0) | Err(_) => break,
        }
    }
    // The sidecar may send a part of a body, but never a part of a header section, which it writes at once.
    if !bytes.is_empty() && matches!(parse(&bytes), Ok(Parsed::Incomplete)) {
        violation(recorded, &bytes, "the connection ended within a header section");
    }
}

fn violation(recorded: &Mutex<Recorded>, bytes: &[u8], reason: &str) {
    let bytes = String::from_utf8_lossy(bytes).into_owned();
    lock(recorded).violations.push(format!("{reason}, in {bytes:?}"));
}

/// Responds to the complete requests in `bytes`.
fn requests(
    stream: &mut TcpStream,
    bytes: &mut Vec<u8>,
    recorded: &Mutex<Recorded>,
    sent_continue: &mut bool,
) -> Next {
    while !bytes.is_empty() {
        let (request, length) = match parse(bytes) {
            Ok(Parsed::Complete(request, length)) => (request, length),
            Ok(Parsed::Head(head)) => {
                let expects = head.header("expect") == Some("100-continue") && !*sent_continue;
                if expects && stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").is_err() {
                    return Next::End;
                }
                *sent_continue |= expects;
                return Next::More;
            }
            Ok(Parsed::Incomplete) => return Next::More,
            Err(reason) => {
                violation(recorded, bytes, &reason);
                return Next::End;
            }
        };
        bytes.drain(..length);
        *sent_continue = false;
        // Recorded before the response is sent, so that the client of the response can rely on it.
        lock(recorded).requests.push(request.clone());
        match answer(stream, &request) {
            Next::More => {}
            other => return other,
        }
    }
    Next::More
}

fn answer(stream: &mut TcpStream, request: &Request) -> Next {
    const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
        upgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    let summary = request.summary();
    let is_last = request.header("connection") == Some("close");
    let close = if is_last { "connection: close\r\n" } else { "" };
    let status = if summary.starts_with("CONNECT declined") { "403 Forbidden" } else { "200 OK" };
    let (answer, next) = match &*request.method {
        "CONNECT" if status == "200 OK" => ("HTTP/1.1 200 OK\r\n\r\n".to_owned(), Next::Tunnel),
        _ if request.target == "/agreed" && request.header("upgrade").is_some() => {
            (SWITCHED.to_owned(), Next::Tunnel)
        }
        method => {
            let length = summary.len();
            let body = if method == "HEAD" { "" } else { &*summary };
            let head = format!("HTTP/1.1 {status}\r\n{close}content-length: {length}\r\n\r\n");
            (head + body, if is_last { Next::End } else { Next::More })
        }
    };
    match stream.write_all(answer.as_bytes()) {
        Ok(()) => next,
        Err(_) => Next::End,
    }
}
