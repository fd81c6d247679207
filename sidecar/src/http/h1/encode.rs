//! Writing heads.

use bytes::{BufMut, BytesMut};
use http::StatusCode;

use super::body::Framing;
use crate::http::head::{RequestHead, ResponseHead, Upgrade};

/// Writes the head of a request.
pub(crate) fn write_request(head: &RequestHead, framing: Framing, out: &mut BytesMut) {
    out.reserve(256 + head.target.len());
    out.put_slice(head.method.as_str().as_bytes());
    out.put_slice(b" ");
    out.put_slice(head.target.as_bytes());
    out.put_slice(b" HTTP/1.1\r\nhost: ");
    out.put_slice(head.authority.as_bytes());
    out.put_slice(b"\r\n");
    head.fields.write(out);
    write_framing(framing, out);
    if head.upgrade == Some(Upgrade::WebSocket) {
        out.put_slice(b"connection: upgrade\r\nupgrade: websocket\r\n");
    }
    out.put_slice(b"\r\n");
}

/// Writes the head of a response. `keep_alive` tells the client whether it may use the connection again.
pub(crate) fn write_response(
    head: &ResponseHead,
    framing: Framing,
    keep_alive: bool,
    out: &mut BytesMut,
) {
    out.reserve(256);
    out.put_slice(b"HTTP/1.1 ");
    let status = StatusCode::from_u16(head.status).unwrap_or(StatusCode::BAD_GATEWAY);
    out.put_slice(status.as_str().as_bytes());
    out.put_slice(b" ");
    out.put_slice(status.canonical_reason().unwrap_or("").as_bytes());
    out.put_slice(b"\r\n");
    head.fields.write(out);
    if head.status == 101 {
        out.put_slice(b"connection: upgrade\r\nupgrade: websocket\r\n");
    } else {
        write_framing(framing, out);
        if !keep_alive {
            out.put_slice(b"connection: close\r\n");
        }
    }
    out.put_slice(b"\r\n");
}

fn write_framing(framing: Framing, out: &mut BytesMut) {
    match framing {
        Framing::None | Framing::UntilClose => {}
        Framing::Length(length) => {
            out.put_slice(format!("content-length: {length}\r\n").as_bytes())
        }
        Framing::Chunked => out.put_slice(b"transfer-encoding: chunked\r\n"),
    }
}
