//! A service that remembers what reached it, so that a test can say what must not.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};

use crate::scripted_server::{ScriptedServer, read_head};

/// What reached the service of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordedRequest {
    /// Its head.
    Head(String),
    /// The whole of it; its body and what came behind that.
    Whole(String),
}

/// A service of HTTP/1.1 that remembers. Asked for `/bytes/N` it answers with so many bytes, asked for
/// `/hold` never, of `/unread` it does not even take the body, and all else it answers with none.
#[derive(Debug)]
pub struct RecordingServer {
    /// Where it listens.
    pub port: u16,
    seen: Arc<Mutex<Vec<RecordedRequest>>>,
}

impl RecordingServer {
    /// Starts it.
    #[must_use]
    pub fn start() -> Self {
        let seen = Arc::<Mutex<Vec<RecordedRequest>>>::default();
        let remembered = seen.clone();
        let note = move |what| lock(&remembered).push(what);
        let port = ScriptedServer::start(move |stream| {
            // Every connection ends, and each way is as good.
            serve(stream, &note).unwrap_or_default();
        })
        .port;
        Self { port, seen }
    }

    /// What it saw since it was last asked.
    #[must_use]
    pub fn take(&self) -> Vec<RecordedRequest> {
        std::mem::take(&mut *lock(&self.seen))
    }
}

fn lock(seen: &Mutex<Vec<RecordedRequest>>) -> std::sync::MutexGuard<'_, Vec<RecordedRequest>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// None at the end of the connection.
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

/// The whole body of a request, decoded; none when it is broken off.
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
