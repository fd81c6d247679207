//! An HTTP/1.1 server whose behaviour depends on the path; `counterparts/http2_origin.py` is the
//! same over HTTP/2.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};

use crate::http1::{chunked, header};
use crate::port;
use crate::process::{Process, counterpart};
use crate::scripted_server::{ScriptedServer, read_head};

/// The server.
#[derive(Debug)]
pub struct OriginServer {
    /// The port it listens on.
    pub port: u16,
    seen: Arc<Mutex<Vec<String>>>,
}

impl OriginServer {
    /// Starts the server.
    #[must_use]
    pub fn start() -> Self {
        let seen = Arc::<Mutex<Vec<String>>>::default();
        let notes = seen.clone();
        let note = move |line: String| lock(&notes).push(line);
        let port = ScriptedServer::start(move |stream| {
            let mut reader = BufReader::new(stream);
            while one(&mut reader, &note) == Some(()) {}
        })
        .port;
        Self { port, seen }
    }

    /// Starts the HTTP/2 server; returns its process and port.
    #[must_use]
    pub fn start_http2() -> (Process, u16) {
        let port = port::free();
        let process =
            Process::start("origin", counterpart("http2_origin.py").arg(port.to_string()));
        process.line_with("ready");
        (process, port)
    }

    /// What the server has received: `head METHOD TARGET` per request, and `body BYTES TARGET` once
    /// its body was complete.
    #[must_use]
    pub fn seen(&self) -> Vec<String> {
        lock(&self.seen).clone()
    }
}

fn lock(seen: &Mutex<Vec<String>>) -> std::sync::MutexGuard<'_, Vec<String>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves one request; `None` at the end of the connection.
fn one(reader: &mut BufReader<TcpStream>, note: &impl Fn(String)) -> Option<()> {
    let head = read_head(reader)?;
    let mut words = head.split(' ');
    let method = words.next()?;
    let target = words.next()?;
    note(format!("head {method} {target}"));
    let say = |reader: &mut BufReader<TcpStream>, text: &str| {
        reader.get_mut().write_all(text.as_bytes()).ok()
    };
    if method == "CONNECT" {
        say(reader, "HTTP/1.1 200 OK\r\n\r\n")?;
        return echo(reader, note);
    }
    if let Some(status) = target.strip_prefix("/refuse/") {
        say(reader, &format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\n\r\n"))?;
        let mut left = Vec::new();
        reader.read_to_end(&mut left).ok();
        note(format!("left {} {target}", left.len()));
        return None;
    }
    if target == "/hints" {
        say(reader, "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n")?;
    }
    if header(&head, "expect").is_some() {
        say(reader, "HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let (body, trailers) = body(reader, &head)?;
    note(format!("body {} {target}", body.len()));
    let described = describe(&head, &String::from_utf8_lossy(&body), &trailers);
    let answer = match target {
        "/trailers" => {
            "transfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nx-checksum: 1\r\n\r\n".to_owned()
        }
        "/length" => {
            let body = if method == "HEAD" { "" } else { "hello\n" };
            format!("content-length: 6\r\n\r\n{body}")
        }
        "/empty" => return say(reader, "HTTP/1.1 204 No Content\r\n\r\n"),
        "/unmodified" => return say(reader, "HTTP/1.1 304 Not Modified\r\netag: \"1\"\r\n\r\n"),
        _ => format!("content-length: {}\r\n\r\n{described}", described.len()),
    };
    say(reader, &format!("HTTP/1.1 200 OK\r\n{answer}"))
}

/// Reads the complete body of a request, and its trailers.
fn body(reader: &mut impl BufRead, head: &str) -> Option<(Vec<u8>, String)> {
    let mut body = Vec::new();
    let mut trailers = String::new();
    if header(head, "transfer-encoding").is_some() {
        chunked(reader, &mut body, &mut trailers)?;
    } else if let Some(length) = header(head, "content-length") {
        body.resize(length.parse().ok()?, 0);
        reader.read_exact(&mut body).ok()?;
    }
    Some((body, trailers))
}

fn describe(head: &str, body: &str, trailers: &str) -> String {
    let line = head.lines().next().unwrap_or_default();
    let line = line.strip_suffix(" HTTP/1.1").unwrap_or(line);
    let fields: Vec<&str> =
        [line].into_iter().chain(head.lines().skip(1).filter(|line| !line.is_empty())).collect();
    let trailers: String = trailers.lines().map(|line| format!("\ntrailer {line}")).collect();
    format!("{}\n\n{body}{trailers}", fields.join("\n"))
}

/// Sends every byte back.
fn echo(reader: &mut BufReader<TcpStream>, note: &impl Fn(String)) -> Option<()> {
    let mut bytes = [0; 1024];
    loop {
        let read = reader.read(&mut bytes).ok()?;
        let piece = bytes.get(..read).filter(|piece| !piece.is_empty())?;
        note(format!("tunnelled {}", String::from_utf8_lossy(piece)));
        reader.get_mut().write_all(piece).ok()?;
    }
}
