//! The clients: each sends one kind of traffic from its host and checks every response.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::Scope;
use std::time::Duration;

use tempfile::TempDir;
use weft::demo::hosts::Host;
use weft_certs::tls::LoadedIdentity;
use weft_integration::curl::Curl;
use weft_integration::http1::Http1Client;
use weft_integration::mesh_pki::text;
use weft_integration::scripted_server::read_head;
use weft_integration::wait::{DEADLINE, pause};

use crate::http2::Http2;
use crate::tally::{Kind, Tally};
use crate::testbed::Addresses;

/// Pause of a client that keeps its connection, after each response.
const BETWEEN: Duration = Duration::from_millis(50);
/// Pause of a client that opens a connection or starts a process for each request.
const BETWEEN_NEW: Duration = Duration::from_millis(300);
/// Pause of a session between two messages.
const STEP: Duration = Duration::from_millis(100);
/// Number of messages per session.
const MESSAGES: u64 = 8;
/// Time after which a datagram without a response is sent again.
const RESPONSE_TIME: Duration = Duration::from_millis(750);
/// Number of times that a datagram is sent before the session fails.
const SENDS: u32 = 5;

/// Makes each request unique, so that its access line can be found.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// The number of exchanges of an attempt, or what went with_context.
pub(crate) type AttemptResult = Result<u64, String>;

/// A number that is unique among all requests.
pub(crate) fn number() -> u64 {
    NEXT.fetch_add(1, Relaxed)
}

/// Starts every client.
pub(crate) fn start<'s>(scope: &'s Scope<'s, '_>, at: &'s Addresses, tally: &'s Tally) {
    let client = |kind: Kind, host: &'s Host, between: Duration, attempt: AttemptFn<'s>| {
        scope.spawn(move || {
            host.on(|| tally.repeat(kind, between, attempt)).expect("the host can be entered");
        });
    };
    let web = &at.web;
    let outside = &at.client;
    let mut connection = None;
    let http = at.http;
    client(Kind::Http1, web, BETWEEN, Box::new(move || http1(&mut connection, http, "/orders")));
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
    client(Kind::HttpsAgent, outside, BETWEEN_NEW, Box::new(move || https_through_agent(at)));
    for (kind, echo) in [(Kind::TcpKernel, at.kernel_echo), (Kind::TcpProxy, at.proxy_echo)] {
        client(kind, outside, STEP, Box::new(move || echo_session(echo)));
    }
    for (kind, echo) in [(Kind::UdpKernel, at.kernel_echo), (Kind::UdpProxy, at.proxy_echo)] {
        let echo = SocketAddr::new(echo.ip(), echo.port() + 1);
        client(kind, outside, STEP, Box::new(move || datagrams(echo, &tally.resends)));
    }
}

type AttemptFn<'s> = Box<dyn FnMut() -> AttemptResult + Send + 's>;

fn with_context(context: &str) -> impl FnOnce(std::io::Error) -> String {
    move |error| format!("{context}: {error}")
}

/// Sends one request over `connection`, or over a new one. Keeps the connection unless the response closes it.
fn http1(connection: &mut Option<Http1Client>, at: SocketAddr, path: &str) -> AttemptResult {
    let path = format!("{path}/{}", number());
    let is_new = connection.is_none();
    let mut client = match connection.take() {
        Some(client) => client,
        None => Http1Client::try_connect(at).map_err(with_context("no connection"))?,
    };
    let answer = client.ask(&format!("GET {path} HTTP/1.1\r\nhost: orders\r\n\r\n"));
    if answer.status != 200 || answer.broken {
        return Err(format!("{path} (new connection: {is_new}): {answer:?}"));
    }
    if answer.header("connection") != Some("close") {
        *connection = Some(client);
    }
    Ok(1)
}

/// Sends a session of requests over a connection that the mesh forwards as opaque TCP.
fn opaque_session(at: SocketAddr) -> AttemptResult {
    let mut connection = None;
    for step in 0..MESSAGES {
        http1(&mut connection, at, "/opaque")
            .map_err(|fault| format!("request {step}: {fault}"))?;
        if connection.is_none() {
            return Err(format!("request {step}: the service closed the connection"));
        }
        pause(STEP);
    }
    Ok(MESSAGES)
}

/// Sends a request to `web` through the agent, from a client without a sidecar.
fn https_through_agent(at: &Addresses) -> AttemptResult {
    let folder = TempDir::new().map_err(with_context("no folder"))?;
    let identity =
        copy_identity(&at.identity, folder.path()).map_err(with_context("no certificate"))?;
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

/// Copies a certificate and its key. Tries again while a renewal has replaced only one of the two files.
fn copy_identity(from: &Path, to: &Path) -> std::io::Result<[PathBuf; 2]> {
    const FILES: [&str; 2] = ["certificate.pem", "key.pem"];
    loop {
        let [certificate, key] = FILES.map(|name| std::fs::read(from.join(name)));
        let certificate = certificate?;
        let key = key?;
        if LoadedIdentity::load(&certificate, &key).is_err() {
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
    let stream =
        TcpStream::connect_timeout(&at, DEADLINE).map_err(with_context("no connection"))?;
    stream.set_read_timeout(Some(DEADLINE)).map_err(with_context("timeout"))?;
    stream.set_nodelay(true).map_err(with_context("no delay"))?;
    Ok(BufReader::new(stream))
}

fn line(stream: &mut BufReader<TcpStream>) -> Result<String, String> {
    let mut line = String::new();
    match stream.read_line(&mut line).map_err(with_context("no line"))? {
        0 => Err("the connection was closed".to_owned()),
        _ => Ok(line.trim_end().to_owned()),
    }
}

/// Sends lines to the echo service; each must come back from the endpoint that sent the greeting.
fn echo_session(at: SocketAddr) -> AttemptResult {
    let mut stream = connect(at)?;
    let from = stream.get_ref().local_addr().map_err(with_context("own address"))?;
    let at_step = |step: u64, fault: String| format!("{from}, message {step}: {fault}");
    let endpoint = line(&mut stream).map_err(|fault| at_step(0, fault))?;
    for step in 1..=MESSAGES {
        pause(STEP);
        writeln!(stream.get_mut(), "{step}").map_err(|e| at_step(step, e.to_string()))?;
        let answer =
            line(&mut stream).map_err(|fault| at_step(step, format!("{endpoint}: {fault}")))?;
        if answer != format!("{endpoint} {step}") {
            return Err(at_step(step, format!("{endpoint} answered {answer:?}")));
        }
    }
    Ok(MESSAGES)
}

/// Sends datagrams from one port. UDP may lose some: each is sent again until a response arrives.
fn datagrams(at: SocketAddr, resends: &AtomicU64) -> AttemptResult {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(with_context("no port"))?;
    socket.set_read_timeout(Some(RESPONSE_TIME)).map_err(with_context("timeout"))?;
    for step in 0..MESSAGES {
        let is_answered = (0..SENDS).any(|send| {
            resends.fetch_add(u64::from(send > 0), Relaxed);
            let mut answer = [0; 64];
            let answered = socket.send_to(b"?", at).and_then(|_| socket.recv_from(&mut answer));
            // Where no program listens, an ICMP error fails the receive at once.
            pause(if answered.is_err() { STEP } else { Duration::ZERO });
            answered.is_ok_and(|(bytes, from)| {
                from == at && answer.starts_with(b"orders-") && bytes > 7
            })
        });
        if !is_answered {
            return Err(format!("{socket:?}, datagram {step}: no response after {SENDS} sends"));
        }
        pause(STEP);
    }
    Ok(MESSAGES)
}

/// A WebSocket (RFC 6455): the handshake, messages and their echoes, the close handshake.
fn websocket(at: SocketAddr) -> AttemptResult {
    let path = format!("/chat/{}", number());
    let mut stream = connect(at)?;
    let at_step = |step: u64, fault: &str| format!("{path}, message {step}: {fault}");
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: orders\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.get_mut().write_all(request.as_bytes()).map_err(with_context("handshake"))?;
    let head = read_head(&mut stream).ok_or_else(|| at_step(0, "no response"))?;
    if !head.starts_with("HTTP/1.1 101 ") {
        return Err(at_step(0, &head));
    }
    for step in 1..=MESSAGES {
        let message = format!("message {step}");
        let echo = exchange(&mut stream, TEXT, message.as_bytes());
        let echo = echo.map_err(|fault| at_step(step, &fault))?;
        if echo != message.as_bytes() {
            return Err(at_step(step, &format!("echo {echo:?}")));
        }
        pause(STEP);
    }
    exchange(&mut stream, CLOSE, &[]).map_err(|fault| at_step(MESSAGES + 1, &fault))?;
    Ok(MESSAGES)
}

/// First byte of a text message in one frame, and of a close frame.
const TEXT: u8 = 0x81;
const CLOSE: u8 = 0x88;

/// Sends a frame and returns the payload of the next frame, which must have the same type.
fn exchange(
    stream: &mut BufReader<TcpStream>,
    kind: u8,
    payload: &[u8],
) -> Result<Vec<u8>, String> {
    const MASKED: u8 = 0x80;
    let length = u8::try_from(payload.len()).map_err(|_| "the message is too long")?;
    // A mask of zeros leaves the payload unchanged.
    let mut frame = vec![kind, MASKED | length, 0, 0, 0, 0];
    frame.extend_from_slice(payload);
    stream.get_mut().write_all(&frame).map_err(with_context("send"))?;
    let mut head = [0; 2];
    stream.read_exact(&mut head).map_err(with_context("no frame"))?;
    let [received, length] = head;
    let mut payload = vec![0; length.into()];
    stream.read_exact(&mut payload).map_err(with_context("no payload"))?;
    if received == kind { Ok(payload) } else { Err(format!("a frame {received:#x}: {payload:?}")) }
}
