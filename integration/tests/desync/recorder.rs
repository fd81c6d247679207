//! A service that remembers what it got, read by the strictest of readings.

use std::io::{Read as _, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use weft_integration::scripted_server::ScriptedServer;

use crate::strict::{Read, Request, read};

/// What a service got since it was last asked.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// The requests that were whole, in their order.
    pub(crate) requests: Vec<Request>,
    /// What was not strict.
    pub(crate) violations: Vec<String>,
}

/// A service of HTTP/1.1 that tells each client the very request that it got, in a line. It turns down
/// tunnels to the host `declined`, and agrees to WebSocket at `/agreed`.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) port: u16,
    seen: Arc<Mutex<Seen>>,
}

impl Recorder {
    pub(crate) fn start() -> Self {
        let seen = Arc::<Mutex<Seen>>::default();
        let shared = seen.clone();
        let port = ScriptedServer::start(move |stream| serve(stream, &shared)).port;
        Self { port, seen }
    }

    /// What it got since it was last asked.
    pub(crate) fn take(&self) -> Seen {
        std::mem::take(&mut *lock(&self.seen))
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What becomes of a connection.
enum Next {
    /// More is read.
    More,
    /// It ends.
    End,
    /// It is no longer HTTP.
    Tunnel,
}

fn serve(mut stream: TcpStream, seen: &Mutex<Seen>) {
    let mut bytes = Vec::new();
    let mut more = [0; 16 * 1024];
    let mut asked_to_go_on = false;
    loop {
        match requests(&mut stream, &mut bytes, seen, &mut asked_to_go_on) {
            Next::More => {}
            Next::End => return,
            Next::Tunnel => {
                // Whatever is said in it is no matter of HTTP; it ends when the other side ends it.
                drop(std::io::copy(&mut stream, &mut std::io::sink()));
                return;
            }
        }
        match stream.read(&mut more) {
            Ok(count @ 1..) => bytes.extend_from_slice(&more[..count]),
            Ok(0) | Err(_) => break,
        }
    }
    // A request may be broken off in its body, never in its head: that is written at once.
    if !bytes.is_empty() && matches!(read(&bytes), Ok(Read::Less)) {
        violation(seen, &bytes, "it ended in a head");
    }
}

fn violation(seen: &Mutex<Seen>, bytes: &[u8], why: &str) {
    let bytes = String::from_utf8_lossy(bytes).into_owned();
    lock(seen).violations.push(format!("{why}, of {bytes:?}"));
}

/// Answers the requests that are whole.
fn requests(
    stream: &mut TcpStream,
    bytes: &mut Vec<u8>,
    seen: &Mutex<Seen>,
    asked_to_go_on: &mut bool,
) -> Next {
    while !bytes.is_empty() {
        let (request, length) = match read(bytes) {
            Ok(Read::Whole(request, length)) => (request, length),
            Ok(Read::Head(head)) => {
                let expects = head.header("expect") == Some("100-continue") && !*asked_to_go_on;
                if expects && stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").is_err() {
                    return Next::End;
                }
                *asked_to_go_on |= expects;
                return Next::More;
            }
            Ok(Read::Less) => return Next::More,
            Err(why) => {
                violation(seen, bytes, &why);
                return Next::End;
            }
        };
        bytes.drain(..length);
        *asked_to_go_on = false;
        // It is remembered before its client can know that it was answered.
        lock(seen).requests.push(request.clone());
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
    let told = request.told();
    let is_last = request.header("connection") == Some("close");
    let close = if is_last { "connection: close\r\n" } else { "" };
    let status = if told.starts_with("CONNECT declined") { "403 Forbidden" } else { "200 OK" };
    let (answer, next) = match &*request.method {
        "CONNECT" if status == "200 OK" => ("HTTP/1.1 200 OK\r\n\r\n".to_owned(), Next::Tunnel),
        _ if request.target == "/agreed" && request.header("upgrade").is_some() => {
            (SWITCHED.to_owned(), Next::Tunnel)
        }
        method => {
            let length = told.len();
            let body = if method == "HEAD" { "" } else { &*told };
            let head = format!("HTTP/1.1 {status}\r\n{close}content-length: {length}\r\n\r\n");
            (head + body, if is_last { Next::End } else { Next::More })
        }
    };
    match stream.write_all(answer.as_bytes()) {
        Ok(()) => next,
        Err(_) => Next::End,
    }
}
