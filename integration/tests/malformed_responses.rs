//! Malformed responses of endpoints: the client gets 502, and the access log names the error.

#![expect(clippy::indexing_slicing, reason = "a test may panic on unexpected values")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::json;
use socket2::SockRef;
use weft_integration::bootstrap::cluster;
use weft_integration::curl::Curl;
use weft_integration::http2_frames::{PREFACE, code, flag, frame, headers, kind};
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};

/// A sidecar in front of several services, each below a path of its name.
fn before(services: &[(&str, u16)], speaks: UpstreamHttp) -> SingleSidecar {
    let mut wanted = SingleSidecarConfig::for_upstream(1, speaks);
    wanted.clusters =
        services.iter().map(|(word, port)| cluster(word, &[*port], speaks, None)).collect();
    let route = |(word, _): &(&str, u16)| {
        json!({"match": {"prefix": format!("/{word}")},
            "route": {"cluster": word, "timeout": "15s"}})
    };
    wanted.routes = services.iter().map(route).collect();
    wanted.start()
}

/// Sends a request to each service, with a method that is not retried.
fn check_all(services: &[(&str, u16)], speaks: UpstreamHttp) {
    let sidecar = before(services, speaks);
    for (word, _) in services {
        let curl = Curl::get(sidecar.port, &format!("/{word}"));
        let answer = curl.with(&["--request", "POST", "--data", ""]).run();
        assert_eq!((answer.status, answer.text().as_str()), (502, "upstream_broken\n"), "{word}");
        let line = sidecar.access_line(&format!("\"path\":\"/{word}\""));
        assert_eq!(
            line["response_code_details"], "upstream_reset_before_response_started",
            "{line}"
        );
        assert_eq!(line["upstream_failure_reason"], *word, "{line}");
    }
}

/// A service that reads a request, then runs `act`.
fn doing(act: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> u16 {
    let backend = ScriptedServer::start(move |stream| {
        let mut reader = std::io::BufReader::new(stream);
        if read_head(&mut reader).is_some() {
            act(reader.get_mut());
        }
    });
    backend.port
}

#[test]
fn malformed_response_is_named_in_the_access_log() {
    let answering = |lines: &str| ScriptedServer::replying_once(lines.replace('|', "\r\n")).port;
    let coded = |coding: &str| answering(&format!("HTTP/1.1 200 OK|{coding}||0||"));
    let reset = |stream: &mut TcpStream| {
        let linger = SockRef::from(&*stream).set_linger(Some(Duration::ZERO));
        linger.expect("SO_LINGER can be set");
    };
    let many = "x-many: x|".repeat(2000);
    let long = format!("x-long: {}|", "x".repeat(70_000));
    let interim = "HTTP/1.1 103 Early Hints||".repeat(40);
    let services = [
        ("closed_before_response", doing(|_| {})),
        ("connection_lost", doing(reset)),
        ("incomplete_head", answering("HTTP/1.1 200 OK|content-le")),
        ("head_too_large", answering(&format!("HTTP/1.1 200 OK|{long}|"))),
        ("too_many_headers", answering(&format!("HTTP/1.1 200 OK|{many}|"))),
        ("bad_status_line", answering("HTTP/1.1 OK||")),
        ("folded_header", answering("HTTP/1.1 200 OK|x-a: b| c|content-length: 0||")),
        ("header_without_colon", answering("HTTP/1.1 200 OK|x-a||")),
        ("bad_header", answering("HTTP/1.1 200 OK|x a: b||")),
        ("suspicious_header", answering("HTTP/1.1 200 OK|content_length: 3||abc")),
        ("bare_line_feed", answering("HTTP/1.1 200 OK\ncontent-length: 0||")),
        (
            "content_length_and_transfer_encoding",
            coded("content-length: 5|transfer-encoding: chunked"),
        ),
        (
            "several_content_lengths",
            answering("HTTP/1.1 200 OK|content-length: 1|content-length: 1||a"),
        ),
        ("bad_content_length", answering("HTTP/1.1 200 OK|content-length: -1||a")),
        (
            "several_transfer_encodings",
            coded("transfer-encoding: chunked|transfer-encoding: chunked"),
        ),
        ("bad_transfer_encoding", coded("transfer-encoding: xchunked")),
        ("body_too_large", answering("HTTP/1.1 200 OK|content-length: 99999999999999||")),
        ("too_many_interim_responses", answering(&format!("{interim}HTTP/1.1 200 OK||"))),
        ("bad_upgrade_response", answering("HTTP/1.1 101 Switching Protocols||")),
    ];
    check_all(&services, UpstreamHttp::Http1);
}

#[test]
fn malformed_chunked_body_is_named_in_the_access_log() {
    let answering = |body: &str| {
        let head = "HTTP/1.1 200 OK|transfer-encoding: chunked||5|hello|";
        ScriptedServer::replying_once(format!("{head}{body}").replace('|', "\r\n")).port
    };
    let services = [
        ("no_number", answering("x|"), "invalid chunk size"),
        ("wrong_end", answering("1|ab|"), "longer than its chunk size"),
        ("cut_off", answering("5|he"), "connection closed before the end of the body"),
        ("trailer", answering("0|content-length: 1||"), "in the trailer section"),
    ];
    let ports = services.map(|(word, port, _)| (word, port));
    let sidecar = before(&ports, UpstreamHttp::Http1);
    for (word, _, detail) in services {
        let answer = Curl::get(sidecar.port, &format!("/{word}")).run();
        assert_eq!((answer.status, answer.exit == 0), (200, false), "{word}");
        let line = sidecar.access_line(&format!("\"path\":\"/{word}\""));
        assert_eq!(
            line["response_code_details"], "upstream_reset_after_response_started",
            "{line}"
        );
        assert_eq!(line["response_flags"], "UC", "{line}");
        let logged = line["error_detail"].as_str();
        assert!(logged.is_some_and(|logged| logged.contains(detail)), "{line}");
    }
}

/// An HTTP/2 service that reads a request, then sends these bytes.
fn framing(bytes: Vec<u8>) -> u16 {
    let backend = ScriptedServer::start(move |mut stream| {
        let mut preface = [0; PREFACE.len()];
        if stream.read_exact(&mut preface).is_err() {
            return;
        }
        drop(stream.write_all(&frame(kind::SETTINGS, flag::NONE, 0, &[])));
        let mut head = [0; 9];
        while stream.read_exact(&mut head).is_ok() {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            if stream.read_exact(&mut payload).is_err() {
                return;
            }
            if head[3] == kind::HEADERS {
                drop(stream.write_all(&bytes));
            }
        }
    });
    backend.port
}

#[test]
fn malformed_http2_response_is_named_in_the_access_log() {
    const INTERNAL_ERROR: u32 = 2;
    let reset = |code: u32| framing(frame(kind::RST_STREAM, flag::NONE, 1, &code.to_be_bytes()));
    let leaving = |code: u32| {
        framing(frame(kind::GOAWAY, flag::NONE, 0, &[[0; 4], code.to_be_bytes()].concat()))
    };
    let many: Vec<(String, String)> =
        (0..1200).map(|at| (format!("x-{at}"), String::new())).collect();
    let many: Vec<(&str, &str)> = [(":status", "200")]
        .into_iter()
        .chain(many.iter().map(|(name, value)| (name.as_str(), value.as_str())))
        .collect();
    let (first, rest) = many.split_at(600);
    let block = |fields: &[(&str, &str)]| weft_integration::http2_frames::block(fields);
    let many = [
        frame(kind::HEADERS, flag::END_STREAM, 1, &block(first)),
        frame(kind::CONTINUATION, flag::END_HEADERS, 1, &block(rest)),
    ];
    let services = [
        ("http2_reset_internal_error", reset(INTERNAL_ERROR)),
        ("http2_reset_protocol_error", reset(code::PROTOCOL_ERROR)),
        ("http2_goaway_enhance_your_calm", leaving(code::ENHANCE_YOUR_CALM)),
        ("too_many_headers", framing(many.concat())),
        ("http2_protocol_error", framing(headers(flag::WHOLE, 1, &[("x-no-status", "1")]))),
        ("http2_frame_size_error", framing(frame(kind::DATA, flag::NONE, 1, &[0; 20_000]))),
    ];
    check_all(&services, UpstreamHttp::Http2);
}
