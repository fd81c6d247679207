//! Responses in tiny pieces, and clients that read them slowly: neither breaks an upstream connection that requests of
//! other clients share.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Response};
use serde_json::json;
use tokio::net::TcpListener;
use weft_integration::http2_client::{Http2Client, next};
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::{PairConfig, SidecarPair};
use weft_integration::single_sidecar::{self, SingleSidecar, UpstreamHttp};

const WINDOW_BYTES: u32 = 1 << 20;
/// Number of one-byte pieces in a response: more small frames than the h2 library lets wait.
const PIECES: usize = 60_000;
const OTHERS: usize = 5;

/// Begins a download in tiny pieces and reads none of it until the requests of other clients have complete responses.
async fn assert_others_served_beside_slow_reader(port: u16, size: usize) {
    let slow = Http2Client::connect(port, WINDOW_BYTES).await;
    let (response, _) =
        slow.begin(Method::GET, "/tiny", true).await.expect("the connection is open");
    let mut body = response.await.expect("the response begins").into_body();
    let others: Vec<_> = (0..OTHERS)
        .map(|_| {
            tokio::spawn(async move {
                let client = Http2Client::connect(port, WINDOW_BYTES).await;
                let mut bytes = Vec::new();
                for _ in 0..20 {
                    bytes.push(client.get("/one").await);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                bytes
            })
        })
        .collect();
    for other in others {
        for answer in other.await.expect("the client task does not panic") {
            assert_eq!(answer, Ok((200, 1)));
        }
    }
    let mut bytes = 0;
    while let Some(piece) = next(&mut body).await {
        bytes += piece.expect("the response is complete");
    }
    assert_eq!(bytes, size);
}

/// An HTTP/1.1 service that responds in chunks of one byte.
fn tiny_chunks(mut stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    while let Some(head) = read_head(&mut reader) {
        if head.starts_with("GET /one ") {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx").ok()?;
            continue;
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").ok()?;
        for _ in 0..PIECES / 1000 {
            stream.write_all(&b"1\r\nx\r\n".repeat(1000)).ok()?;
        }
        stream.write_all(b"0\r\n\r\n").ok()?;
    }
    Some(())
}

#[tokio::test]
async fn tiny_http1_chunks_do_not_break_responses_to_other_clients() {
    let service = ScriptedServer::start(|stream| tiny_chunks(stream).unwrap_or_default());
    let mut pair =
        SidecarPair::start(&PairConfig { timeout_seconds: 0, ..PairConfig::http1(service.port) });
    assert_others_served_beside_slow_reader(pair.caller.port, PIECES).await;
    let connections = pair.caller.metric("weft_sidecar_upstream_connections_total");
    assert!(connections <= 2, "{connections} upstream connections with two workers");
    pair.assert_healthy();
}

/// An HTTP/2 service: `/tiny` in frames of one byte, `/cut` is reset after 1,000 bytes.
async fn tiny_frames() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let port = listener.local_addr().expect("the listener is bound").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut connection =
                    h2::server::handshake(stream).await.expect("the handshake succeeds");
                while let Some(Ok((request, respond))) = connection.accept().await {
                    tokio::spawn(respond_to(request.uri().path().to_owned(), respond));
                }
            });
        }
    });
    port
}

async fn respond_to(path: String, mut respond: h2::server::SendResponse<Bytes>) -> Option<()> {
    let mut stream = respond.send_response(Response::new(()), false).ok()?;
    if path == "/cut" {
        stream.send_data(Bytes::from(vec![b'x'; 1000]), false).ok()?;
        // Time for the header section and the body to be sent before the reset.
        tokio::time::sleep(Duration::from_millis(200)).await;
        stream.send_reset(h2::Reason::INTERNAL_ERROR);
        return Some(());
    }
    let pieces = if path == "/one" { 1 } else { PIECES };
    for left in (0..pieces).rev() {
        stream.reserve_capacity(1);
        while stream.capacity() == 0 {
            std::future::poll_fn(|cx| stream.poll_capacity(cx)).await?.ok()?;
        }
        stream.send_data(Bytes::from_static(b"x"), left == 0).ok()?;
    }
    Some(())
}

fn sidecar_before(port: u16) -> SingleSidecar {
    single_sidecar::SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http2)
        .with_one_worker(&[])
        .start()
}

#[tokio::test]
async fn tiny_http2_frames_do_not_break_responses_to_other_clients() {
    let mut sidecar = sidecar_before(tiny_frames().await);
    assert_others_served_beside_slow_reader(sidecar.port, PIECES).await;
    assert_eq!(sidecar.metric("weft_sidecar_upstream_connections_total"), 1);
    sidecar.assert_healthy();
}

#[tokio::test]
async fn truncated_response_is_logged_with_its_reason_and_size() {
    let sidecar = sidecar_before(tiny_frames().await);
    let client = Http2Client::connect(sidecar.port, WINDOW_BYTES).await;
    let answer = client.get("/cut").await;
    assert!(answer.as_ref().is_err_and(|error| error.contains("200, 1000 bytes")), "{answer:?}");
    let line = sidecar.access_line("upstream_reset_after_response_started");
    let get = |field: &str| line.get(field).cloned();
    assert_eq!(
        get("error_detail"),
        Some(json!("the stream was reset with INTERNAL_ERROR")),
        "{line}"
    );
    assert_eq!(get("bytes_sent"), Some(json!(1000)), "{line}");
}
