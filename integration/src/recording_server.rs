//! An HTTP/1.1 server that records the requests it receives, so that tests can check that a
//! rejected request did not reach it.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};

use crate::scripted_server::{ScriptedServer, read_head};

/// A part of a request that the server received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordedRequest {
    /// The head.
    Head(String),
    /// The complete request: its body and trailers.
    Whole(String),
}

/// An HTTP/1.1 server that records requests. It responds to `/bytes/N` with N bytes, never responds
/// to `/hold`, does not read the body of `/unread`, and responds to all other paths with an empty
/// body.
#[derive(Debug)]
pub struct RecordingServer {
    /// The port it listens on.
    pub port: u16,
    seen: Arc<Mutex<Vec<RecordedRequest>>>,
}

impl RecordingServer {
    /// Starts the server.
    #[must_use]
    pub fn start() -> Self {
        let seen = Arc::<Mutex<Vec<RecordedRequest>>>::default();
        let remembered = seen.clone();
        let note = move |what| lock(&remembered).push(what);
        let port = ScriptedServer::start(move |stream| {
            // How a connection ends does not matter.
            serve(stream, &note).unwrap_or_default();
        })
        .port;
        Self { port, seen }
    }

    /// Takes what was recorded since the last call.
    #[must_use]
    pub fn take(&self) -> Vec<RecordedRequest> {
        std::mem::take(&mut *lock(&self.seen))
    }
}

fn lock(seen: &Mutex<Vec<RecordedRequest>>) -> std::sync::MutexGuard<'_, Vec<RecordedRequest>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves a connection; `None` at its end.
fn serve(stream: TcpStream, note: &impl Fn(RecordedRequest)) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let head = read_head(&mut reader)?;
        note(RecordedRequest::Head(head.clone()));
        let path = head.split(' ').nth(1).unwrap_or_default();
        if path == "/unread" {
            loop {
                std::thread::park();
            }
        }
        note(RecordedRequest::Whole(body(&mut reader, &head)?));
        if path.starts_with("/hold") {
            drop(std::io::copy(&mut reader, &mut std::io::sink()));
            return None;
        }
        let bytes = path.strip_prefix("/bytes/").and_then(|number| number.parse().ok());
        let bytes = bytes.unwrap_or(0);
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {bytes}\r\n\r\n");
        let answer = [answer.into_bytes(), vec![b'x'; bytes]].concat();
        reader.get_mut().write_all(&answer).ok()?;
    }
}

/// Reads the complete body of a request, decoded; `None` if it ends too early.
fn body(reader: &mut impl BufRead, head: &str) -> Option<String> {
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
    let mut body = Vec::new();
    if let Some(length) = field("content-length: ") {
        body.resize(length.parse().ok()?, 0);
        reader.read_exact(&mut body).ok()?;
    } else if field("transfer-encoding: ").is_some() {
        loop {
            let size = usize::from_str_radix(line(reader)?.trim_end(), 16).ok()?;
            if size == 0 {
                break;
            }
            let start = body.len();
            body.resize(start + size, 0);
            reader.read_exact(body.get_mut(start..)?).ok()?;
            line(reader)?;
        }
        loop {
            let trailer = line(reader)?;
            if trailer.trim_end().is_empty() {
                break;
            }
            body.extend_from_slice(trailer.as_bytes());
        }
    }
    Some(String::from_utf8_lossy(&body).into_owned())
}

fn line(reader: &mut impl BufRead) -> Option<String> {
    let mut line = String::new();
    (reader.read_line(&mut line).ok()? > 0).then_some(line)
}
