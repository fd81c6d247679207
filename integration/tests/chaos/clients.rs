//! The clients: each sends one kind of traffic from its host, and checks every answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::Scope;
use std::time::Duration;

use tempfile::TempDir;
use weft::demo::hosts::Host;
use weft_certs::tls::Identity;
use weft_integration::curl::Curl;
use weft_integration::http1::Http1Client;
use weft_integration::mesh_pki::text;
use weft_integration::scripted_server::read_head;
use weft_integration::wait::{DEADLINE, pause};

use crate::http2::Http2;
use crate::stage::Addresses;
use crate::tally::{Kind, Tally};

/// How long a client that keeps its connection waits after an answer.
const BETWEEN: Duration = Duration::from_millis(50);
/// How long a client waits that makes a connection, or starts a process, for each request.
const BETWEEN_NEW: Duration = Duration::from_millis(300);
/// How long a session waits between two messages.
const STEP: Duration = Duration::from_millis(100);
/// How many messages a session has.
const MESSAGES: u64 = 8;
/// How long a datagram's answer may take before the datagram is sent again, and how often it is sent.
const ANSWER_TIME: Duration = Duration::from_millis(750);
const SENDS: u32 = 5;

/// Makes each request another one, so that an access line can be found by it.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// What an attempt gives: how many exchanges it had, or what went wrong.
pub(crate) type Attempted = Result<u64, String>;

/// A number that no other request has.
pub(crate) fn number() -> u64 {
    NEXT.fetch_add(1, Relaxed)
}

/// Starts every client.
pub(crate) fn start<'s>(scope: &'s Scope<'s, '_>, at: &'s Addresses, tally: &'s Tally) {
    let client = |kind: Kind, host: &'s Host, between: Duration, attempt: Ask<'s>| {
        scope.spawn(move || {
            host.on(|| tally.repeat(kind, between, attempt)).expect("the host can be entered");
        });
    };
    let web = &at.web;
    let outside = &at.client;
    let mut kept = None;
    let http = at.http;
    client(Kind::Http1, web, BETWEEN, Box::new(move || http1(&mut kept, http, "/orders")));
    client(Kind::Http1New, web, BETWEEN_NEW, Box::new(move || http1(&mut None, http, "/orders")));
    let mut http2 = Http2::to(at.http);
    client(Kind::Http2, web, BETWEEN, Box::new(move || http2.get()));
    let mut grpc = Http2::to(at.grpc);
    client(Kind::GrpcUnary, web, BETWEEN, Box::new(move || grpc.unary()));
    let mut grpc = Http2::to(at.grpc);
    client(Kind::GrpcStream, web, STEP, Box::new(move || grpc.streams(MESSAGES, STEP)));
    let at_websocket = at.websocket;
    client(Kind::WebSocket, web, STEP, Box::new(move || websocket(at_websocket)));
    let opaque = at.opaque;
    client(Kind::TcpSidecars, web, STEP, Box::new(move || opaque_session(opaque)));
    client(Kind::HttpsAgent, outside, BETWEEN_NEW, Box::new(move || ask_web(at)));
    for (kind, echo) in [(Kind::TcpKernel, at.kernel_echo), (Kind::TcpProxy, at.proxy_echo)] {
        client(kind, outside, STEP, Box::new(move || echo_session(echo)));
    }
    for (kind, echo) in [(Kind::UdpKernel, at.kernel_echo), (Kind::UdpProxy, at.proxy_echo)] {
        let echo = SocketAddr::new(echo.ip(), echo.port() + 1);
        client(kind, outside, STEP, Box::new(move || datagrams(echo, &tally.resends)));
    }
}

type Ask<'s> = Box<dyn FnMut() -> Attempted + Send + 's>;

fn wrong(what: &str) -> impl FnOnce(std::io::Error) -> String {
    move |error| format!("{what}: {error}")
}

/// One request over the connection that is kept, or a new one.
fn http1(kept: &mut Option<Http1Client>, at: SocketAddr, path: &str) -> Attempted {
    let path = format!("{path}/{}", number());
    let is_new = kept.is_none();
    let mut client = match kept.take() {
        Some(client) => client,
        None => Http1Client::try_connect(at).map_err(wrong("no connection"))?,
    };
    let answer = client.ask(&format!("GET {path} HTTP/1.1\r\nhost: orders\r\n\r\n"));
    if answer.status != 200 || answer.broken {
        return Err(format!("{path} (new connection: {is_new}): {answer:?}"));
    }
    if answer.header("connection") != Some("close") {
        *kept = Some(client);
    }
    Ok(1)
}

/// A session of requests over a connection that the mesh takes for bytes.
fn opaque_session(at: SocketAddr) -> Attempted {
    let mut kept = None;
    for step in 0..MESSAGES {
        http1(&mut kept, at, "/opaque").map_err(|fault| format!("request {step}: {fault}"))?;
        if kept.is_none() {
            return Err(format!("request {step}: the service closed the connection"));
        }
        pause(STEP);
    }
    Ok(MESSAGES)
}

fn ask_web(at: &Addresses) -> Attempted {
    let folder = TempDir::new().map_err(wrong("no folder"))?;
    let identity = copy_identity(&at.identity, folder.path()).map_err(wrong("no certificate"))?;
    let [certificate, key] = identity.each_ref().map(|file| text(file));
    let at = at.https;
    let options = ["--insecure", "--cert", certificate, "--key", key];
    let path = format!("/orders/{}", number());
    let answer = Curl::to(format!("https://{at}{path}")).with(&options).run();
    if answer.exit == 0 && answer.status == 200 {
        Ok(1)
    } else {
        Err(format!("{path}: {answer:?}"))
    }
}

/// Copies a certificate and its key, which may be renewed meanwhile: then they do not belong together.
fn copy_identity(from: &Path, to: &Path) -> std::io::Result<[PathBuf; 2]> {
    const FILES: [&str; 2] = ["certificate.pem", "key.pem"];
    loop {
        let [certificate, key] = FILES.map(|name| std::fs::read(from.join(name)));
        let certificate = certificate?;
        let key = key?;
        if Identity::load(&certificate, &key).is_err() {
            pause(Duration::from_millis(5));
            continue;
        }
        let files = FILES.map(|name| to.join(name));
        let [certificate_file, key_file] = &files;
        std::fs::write(certificate_file, certificate)?;
        std::fs::write(key_file, key)?;
        return Ok(files);
    }
}

fn connect(at: SocketAddr) -> Result<BufReader<TcpStream>, String> {
    let stream = TcpStream::connect_timeout(&at, DEADLINE).map_err(wrong("no connection"))?;
    stream.set_read_timeout(Some(DEADLINE)).map_err(wrong("timeout"))?;
    stream.set_nodelay(true).map_err(wrong("no delay"))?;
    Ok(BufReader::new(stream))
}

fn line(stream: &mut BufReader<TcpStream>) -> Result<String, String> {
    let mut line = String::new();
    match stream.read_line(&mut line).map_err(wrong("no line"))? {
        0 => Err("the connection ended".to_owned()),
        _ => Ok(line.trim_end().to_owned()),
    }
}

/// Lines to the echo and back; all must be of the replica that greeted.
fn echo_session(at: SocketAddr) -> Attempted {
    let mut stream = connect(at)?;
    let from = stream.get_ref().local_addr().map_err(wrong("own address"))?;
    let at_step = |step: u64, fault: String| format!("{from}, message {step}: {fault}");
    let replica = line(&mut stream).map_err(|fault| at_step(0, fault))?;
    for step in 1..=MESSAGES {
        pause(STEP);
        writeln!(stream.get_mut(), "{step}").map_err(|e| at_step(step, e.to_string()))?;
        let answer =
            line(&mut stream).map_err(|fault| at_step(step, format!("{replica}: {fault}")))?;
        if answer != format!("{replica} {step}") {
            return Err(at_step(step, format!("{replica} answered {answer:?}")));
        }
    }
    Ok(MESSAGES)
}

/// Datagrams from one port. UDP may lose some: each is sent again until it is answered.
fn datagrams(at: SocketAddr, resends: &AtomicU64) -> Attempted {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(wrong("no port"))?;
    socket.set_read_timeout(Some(ANSWER_TIME)).map_err(wrong("timeout"))?;
    for step in 0..MESSAGES {
        let is_answered = (0..SENDS).any(|send| {
            resends.fetch_add(u64::from(send > 0), Relaxed);
            let mut answer = [0; 64];
            let answered = socket.send_to(b"?", at).and_then(|_| socket.recv_from(&mut answer));
            // Its answer may be refused at once, where no program listens.
            pause(if answered.is_err() { STEP } else { Duration::ZERO });
            answered.is_ok_and(|(bytes, from)| {
                from == at && answer.starts_with(b"orders-") && bytes > 7
            })
        });
        if !is_answered {
            return Err(format!("{socket:?}, datagram {step}: not answered after {SENDS} sends"));
        }
        pause(STEP);
    }
    Ok(MESSAGES)
}

/// A WebSocket (RFC 6455): the handshake, messages and their echoes, the close of both sides.
fn websocket(at: SocketAddr) -> Attempted {
    let path = format!("/chat/{}", number());
    let mut stream = connect(at)?;
    let at_step = |step: u64, fault: &str| format!("{path}, message {step}: {fault}");
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: orders\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.get_mut().write_all(request.as_bytes()).map_err(wrong("handshake"))?;
    let head = read_head(&mut stream).ok_or_else(|| at_step(0, "no response"))?;
    if !head.starts_with("HTTP/1.1 101 ") {
        return Err(at_step(0, &head));
    }
    for step in 1..=MESSAGES {
        let message = format!("message {step}");
        let echo = exchange(&mut stream, TEXT, message.as_bytes());
        let echo = echo.map_err(|fault| at_step(step, &fault))?;
        if echo != message.as_bytes() {
            return Err(at_step(step, &format!("{echo:?} came back")));
        }
        pause(STEP);
    }
    exchange(&mut stream, CLOSE, &[]).map_err(|fault| at_step(MESSAGES + 1, &fault))?;
    Ok(MESSAGES)
}

/// The first byte of a whole message of text, and of a close.
const TEXT: u8 = 0x81;
const CLOSE: u8 = 0x88;

/// Sends a frame and gives the payload of the next one, which must be of the same type.
fn exchange(
    stream: &mut BufReader<TcpStream>,
    kind: u8,
    payload: &[u8],
) -> Result<Vec<u8>, String> {
    const MASKED: u8 = 0x80;
    let length = u8::try_from(payload.len()).map_err(|_| "the message is too long")?;
    // A mask of zeros is a mask.
    let mut frame = vec![kind, MASKED | length, 0, 0, 0, 0];
    frame.extend_from_slice(payload);
    stream.get_mut().write_all(&frame).map_err(wrong("send"))?;
    let mut head = [0; 2];
    stream.read_exact(&mut head).map_err(wrong("no frame"))?;
    let [answered, length] = head;
    let mut payload = vec![0; length.into()];
    stream.read_exact(&mut payload).map_err(wrong("no payload"))?;
    if answered == kind { Ok(payload) } else { Err(format!("a frame {answered:#x}: {payload:?}")) }
}
