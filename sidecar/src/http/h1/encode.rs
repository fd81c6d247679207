//! Writes HTTP/1.1 message heads.

use bytes::{BufMut, BytesMut};
use http::StatusCode;

use super::framing::BodyFraming;
use crate::http::head::{RequestHead, ResponseHead, Upgrade};

/// Writes the head of a request.
pub(crate) fn write_request(head: &RequestHead, framing: BodyFraming, out: &mut BytesMut) {
    out.reserve(256 + head.target.len());
    out.put_slice(head.method.as_str().as_bytes());
    out.put_slice(b" ");
    let is_tunnel = head.upgrade == Some(Upgrade::Tunnel);
    out.put_slice(if is_tunnel { head.authority.as_bytes() } else { head.target.as_bytes() });
    out.put_slice(b" HTTP/1.1\r\nhost: ");
    out.put_slice(head.authority.as_bytes());
    out.put_slice(b"\r\n");
    head.headers.write(out);
    write_framing(framing, out);
    if head.upgrade == Some(Upgrade::WebSocket) {
        out.put_slice(b"connection: upgrade\r\nupgrade: websocket\r\n");
    } else if head.is_isolated {
        out.put_slice(b"connection: close\r\n");
    }
    out.put_slice(b"\r\n");
}

/// Writes the head of a response. `connection` is the value of the `connection` header, if one is needed.
pub(crate) fn write_response(
    head: &ResponseHead,
    framing: BodyFraming,
    connection: Option<&str>,
    out: &mut BytesMut,
) {
    write_status(head, out);
    if head.status == 101 {
        out.put_slice(b"connection: upgrade\r\nupgrade: websocket\r\n");
    } else {
        write_framing(framing, out);
        if let Some(connection) = connection {
            out.put_slice(b"connection: ");
            out.put_slice(connection.as_bytes());
            out.put_slice(b"\r\n");
        }
    }
    out.put_slice(b"\r\n");
}

/// Writes an interim response (RFC 9110, section 15.2).
pub(crate) fn write_interim(head: &ResponseHead, out: &mut BytesMut) {
    write_status(head, out);
    out.put_slice(b"\r\n");
}

fn write_status(head: &ResponseHead, out: &mut BytesMut) {
    out.reserve(256);
    out.put_slice(b"HTTP/1.1 ");
    let status = StatusCode::from_u16(head.status).unwrap_or(StatusCode::BAD_GATEWAY);
    out.put_slice(status.as_str().as_bytes());
    out.put_slice(b" ");
    out.put_slice(status.canonical_reason().unwrap_or("").as_bytes());
    out.put_slice(b"\r\n");
    head.headers.write(out);
}

/// Capitalizes each word of the header names in a head, for clients that compare names with regard to case.
pub(crate) fn capitalize_names(head: &mut [u8]) {
    for line in head.split_mut(|byte| *byte == b'\n').skip(1) {
        let name = line.split_mut(|byte| *byte == b':').next().unwrap_or_default();
        let mut starts_word = true;
        for byte in name {
            if starts_word {
                byte.make_ascii_uppercase();
            }
            starts_word = *byte == b'-';
        }
    }
}

fn write_framing(framing: BodyFraming, out: &mut BytesMut) {
    match framing {
        BodyFraming::None | BodyFraming::UntilClose => {}
        BodyFraming::Length(length) => {
            out.put_slice(b"content-length: ");
            put_decimal(length, out);
            out.put_slice(b"\r\n");
        }
        BodyFraming::Chunked => out.put_slice(b"transfer-encoding: chunked\r\n"),
    }
}

fn put_decimal(mut number: u64, out: &mut BytesMut) {
    // `u64::MAX` has 20 digits.
    let mut digits = [b'0'; 20];
    let mut start = digits.len();
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
        start -= 1;
        if number == 0 {
            break;
        }
    }
    out.put_slice(digits.get(start..).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_names_are_capitalized_and_values_are_not() {
        let mut head =
            b"HTTP/1.1 200 ok\r\nx-request-id: a-b\r\netag: c:d\r\n-x--y: e\r\n\r\n".to_vec();
        capitalize_names(&mut head);
        let expected = "HTTP/1.1 200 ok\r\nX-Request-Id: a-b\r\nEtag: c:d\r\n-X--Y: e\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&head), expected);
    }

    #[test]
    fn lengths_are_written_in_decimal() {
        for number in [0, 1, 9, 10, 99, 100, 1_234_567_890, u64::MAX] {
            let mut out = BytesMut::new();
            put_decimal(number, &mut out);
            assert_eq!(out, number.to_string().as_bytes());
        }
    }
}
