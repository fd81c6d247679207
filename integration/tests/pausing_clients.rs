//! Clients that stop reading a response for a while, and then continue.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use serde_json::json;
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::single_sidecar::{SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::DEADLINE;

/// More than the buffers of both connections hold.
const BYTES: usize = 32 << 20;

/// A service with a very large response.
fn large() -> ScriptedServer {
    ScriptedServer::start(|stream| {
        let mut reader = std::io::BufReader::new(stream);
        if read_head(&mut reader).is_none() {
            return;
        }
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {BYTES}\r\n\r\n");
        let piece = vec![b'x'; 1 << 20];
        let mut written = reader.get_mut().write_all(head.as_bytes());
        for _ in 0..BYTES >> 20 {
            // The test checks how the response ends.
            written = written.and_then(|()| reader.get_mut().write_all(&piece));
        }
    })
}

/// Requests the response, reads its start, reads nothing for `pause`, then reads the rest; returns
/// the number of bytes.
fn read_with_a_pause(port: u16, pause: Duration) -> usize {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the sidecar listens");
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").expect("the sidecar takes a head");
    stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
    let mut bytes = vec![0; 64 * 1024];
    let mut read = stream.read(&mut bytes).expect("the answer begins");
    let (never, pausing) = std::sync::mpsc::channel::<()>();
    assert!(pausing.recv_timeout(pause).is_err(), "no message is sent");
    drop(never);
    // A response that is cut ends early, or with a reset.
    while let Ok(more @ 1..) = stream.read(&mut bytes) {
        read += more;
        if read >= BYTES {
            break;
        }
    }
    read
}

#[test]
fn reader_that_pauses_for_35_seconds_gets_the_whole_response() {
    let sidecar = SingleSidecarConfig::for_upstream(large().port, UpstreamHttp::Http1)
        .with(
            "route_config",
            json!({"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
            {"match": {"prefix": "/"}, "route": {"cluster": "service", "timeout": "0s"}}]}]}),
        )
        .start();
    assert!(read_with_a_pause(sidecar.port, Duration::from_secs(35)) >= BYTES);
}

#[test]
fn reader_that_pauses_longer_than_the_stream_idle_timeout_is_disconnected() {
    let sidecar = SingleSidecarConfig::for_upstream(large().port, UpstreamHttp::Http1)
        .with("stream_idle_timeout", json!("1s"))
        .start();
    assert!(read_with_a_pause(sidecar.port, Duration::from_secs(5)) < BYTES);
    assert!(read_with_a_pause(sidecar.port, Duration::from_millis(100)) >= BYTES);
}
