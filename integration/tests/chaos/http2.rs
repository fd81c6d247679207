//! HTTP/2 clients: requests and gRPC calls.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use http::{HeaderMap, Request};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use weft_integration::wait::DEADLINE;

use crate::clients::{AttemptResult, number};

/// Number of messages that the service streams.
const STREAMED: u64 = 50;

/// A client with one connection, which it reopens when the server has closed it.
pub(crate) struct Http2 {
    at: SocketAddr,
    runtime: Runtime,
    connection: Option<SendRequest<Bytes>>,
}

/// The reason for which a request failed.
enum Fault {
    /// The server did not process the request, so the client may send it again (RFC 9113, section 8.7).
    NotProcessed,
    /// Any other failure.
    Other(String),
}

impl From<h2::Error> for Fault {
    fn from(error: h2::Error) -> Self {
        let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
        let going_away = error.is_go_away() && error.reason() == Some(Reason::NO_ERROR);
        if error.is_remote() && (refused || going_away) {
            Self::NotProcessed
        } else {
            Self::Other(error.to_string())
        }
    }
}

impl From<String> for Fault {
    fn from(text: String) -> Self {
        Self::Other(text)
    }
}

/// A complete response.
struct Answer {
    head: http::response::Parts,
    body: Bytes,
    trailers: HeaderMap,
}

impl Http2 {
    /// A client for that address, without a connection yet.
    pub(crate) fn to(at: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Self { at, runtime: runtime.expect("a runtime can be created"), connection: None }
    }

    /// Sends a GET.
    pub(crate) fn get(&mut self) -> AttemptResult {
        let path = format!("/orders/{}", number());
        let uri = format!("http://orders{path}");
        let answer = self.run(&path, &async |sender: &mut SendRequest<Bytes>| {
            let request = Request::get(&uri).body(()).map_err(|error| error.to_string())?;
            let (response, _) = sender.send_request(request, true)?;
            whole(response).await
        })?;
        let status = answer.head.status;
        if status == 200 { Ok(1) } else { Err(format!("{path}: {status} {:?}", answer.body)) }
    }

    /// Makes a unary call.
    pub(crate) fn unary(&mut self) -> AttemptResult {
        let message = format!("message {}", number());
        let messages = self.call("Unary", &[message.clone().into()], Duration::ZERO)?;
        if messages == [Bytes::from(message)] { Ok(1) } else { Err(format!("{messages:?}")) }
    }

    /// Makes a client-streaming call, then a server-streaming call.
    pub(crate) fn streams(&mut self, count: u64, step: Duration) -> AttemptResult {
        let sent = vec![Bytes::from_static(b"seven b"); usize::try_from(count).unwrap_or(0)];
        let bytes: usize = sent.iter().map(Bytes::len).sum();
        let counted = self.call("ClientStream", &sent, step)?;
        if counted != [Bytes::from(bytes.to_string())] {
            return Err(format!("{bytes} bytes sent, {counted:?} counted"));
        }
        let streamed = self.call("ServerStream", &[STREAMED.to_string().into()], Duration::ZERO)?;
        let expected = (0..STREAMED).map(|number| Bytes::from(number.to_string()));
        if !expected.eq(streamed.iter().cloned()) {
            return Err(format!("{} of {STREAMED} messages: {streamed:?}", streamed.len()));
        }
        Ok(count + STREAMED)
    }

    /// Calls a method with messages that are sent `step` apart. Returns the messages of the response.
    fn call(
        &mut self,
        method: &str,
        messages: &[Bytes],
        step: Duration,
    ) -> Result<Vec<Bytes>, String> {
        let authority = format!("call-{}", number());
        let uri = format!("http://{authority}/weft.Test/{method}");
        let answer =
            self.run(&format!("{authority} {method}"), &async |sender: &mut SendRequest<
                Bytes,
            >| {
                let request = Request::post(&uri).header("te", "trailers");
                let request = request.header("content-type", "application/grpc").body(());
                let request = request.map_err(|error| error.to_string())?;
                let (response, stream) = sender.send_request(request, false)?;
                let (sent, answer) = tokio::join!(send(stream, messages, step), whole(response));
                let answer = answer?;
                // A call that fails may get its response before all messages are sent; its status reports the failure.
                drop(sent);
                Ok(answer)
            })?;
        let status =
            answer.trailers.get("grpc-status").or_else(|| answer.head.headers.get("grpc-status"));
        if status.is_none_or(|status| status != "0") {
            return Err(format!("{authority} {method}: {:?} {:?}", answer.head, answer.trailers));
        }
        unframed(answer.body).ok_or_else(|| format!("{authority} {method}: truncated message"))
    }

    /// Runs a request over the open connection or a new one. Repeats it when the server did not process it.
    fn run(
        &mut self,
        what: &str,
        ask: &impl AsyncFn(&mut SendRequest<Bytes>) -> Result<Answer, Fault>,
    ) -> Result<Answer, String> {
        let Self { at, runtime, connection } = self;
        runtime.block_on(async {
            for _ in 0..3 {
                let is_new = connection.is_none();
                let mut sender = match connection.take() {
                    Some(sender) => sender,
                    None => connect(*at).await?,
                };
                let answer = async {
                    let mut ready = sender.clone().ready().await?;
                    ask(&mut ready).await
                };
                match tokio::time::timeout(DEADLINE, answer).await {
                    Ok(Ok(answer)) => {
                        *connection = Some(sender);
                        return Ok(answer);
                    }
                    Ok(Err(Fault::NotProcessed)) => {}
                    Ok(Err(Fault::Other(fault))) => {
                        return Err(format!("{what} (new connection: {is_new}): {fault}"));
                    }
                    Err(_) => return Err(format!("{what}: no response within {DEADLINE:?}")),
                }
                sender = connect(*at).await?;
                *connection = Some(sender);
            }
            Err(format!("{what}: refused three times"))
        })
    }
}

async fn connect(at: SocketAddr) -> Result<SendRequest<Bytes>, String> {
    let stream = TcpStream::connect(at).await.map_err(|error| format!("no connection: {error}"))?;
    let handshake = h2::client::handshake(stream).await;
    let (sender, connection) = handshake.map_err(|error| format!("no handshake: {error}"))?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Sends messages `step` apart, then ends the stream.
async fn send(
    mut stream: SendStream<Bytes>,
    messages: &[Bytes],
    step: Duration,
) -> Result<(), Fault> {
    for message in messages {
        let length = u32::try_from(message.len()).map_err(|error| error.to_string())?;
        let mut framed = BytesMut::new();
        framed.put_u8(0);
        framed.put_u32(length);
        framed.put_slice(message);
        stream.send_data(framed.freeze(), false)?;
        tokio::time::sleep(step).await;
    }
    stream.send_data(Bytes::new(), true)?;
    Ok(())
}

/// Reads a response completely.
async fn whole(response: ResponseFuture) -> Result<Answer, Fault> {
    let (head, mut stream) = response.await?.into_parts();
    let mut body = BytesMut::new();
    while let Some(piece) = stream.data().await {
        let piece = piece?;
        stream.flow_control().release_capacity(piece.len())?;
        body.put_slice(&piece);
    }
    let trailers = stream.trailers().await?.unwrap_or_default();
    Ok(Answer { head, body: body.freeze(), trailers })
}

/// The gRPC messages of a body; `None` when the last is truncated.
fn unframed(mut body: Bytes) -> Option<Vec<Bytes>> {
    let mut messages = Vec::new();
    while !body.is_empty() {
        let [0, a, b, c, d] = *body.first_chunk()? else { return None };
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).ok()?;
        let mut message = body.split_off(5);
        body = (length <= message.len()).then(|| message.split_off(length))?;
        messages.push(message);
    }
    Some(messages)
}
