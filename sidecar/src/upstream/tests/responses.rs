//! How responses are forwarded, and what an endpoint or a client may do wrong.

use super::super::ExchangeAbort;
use super::*;
use crate::http::test_head::{get, http2_request, request};
use Reaction::{Close, Send, SendEarly, Wait};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[test]
fn request_and_response_are_forwarded_with_headers_and_body() {
    on_worker(async {
        let response = "HTTP/1.1 201 Created\r\nX-A: 1\r\nconnection: x-hop\r\nx-hop: 1\r\n\
                        content-length: 5\r\n\r\nworld";
        let endpoint = TestEndpoint::answering(response).await;
        let head = request("POST", "/x?q", &[("X-B", "2")]);
        let head = RequestHead { content_length: Some(5), ..head };
        let sidecar = Sidecar::to(&endpoint);
        let request = TestRequest { framing: BodyFraming::Length(5), body: "hello", ..head.into() };
        let sent = sidecar.send(request).await;
        let expected =
            "POST /x?q HTTP/1.1\r\nhost: a.test\r\nX-B: 2\r\ncontent-length: 5\r\n\r\nhello";
        assert_eq!(endpoint.request(), expected);
        let expected = "HTTP/1.1 201 Created\r\nX-A: 1\r\ncontent-length: 5\r\n\r\nworld";
        assert_eq!(sent.response, expected);
        assert_eq!(sent.endpoint, Some(endpoint.address));
        let outcome = sent.result.expect("a response");
        let bytes = [outcome.bytes_to_endpoint, outcome.bytes_to_client];
        assert_eq!((outcome.status, bytes, outcome.aborted), (201, [5, 5], None));
        assert!(sent.keeps_client);
    });
}

#[test]
fn body_keeps_its_chunks_and_trailers() {
    on_worker(async {
        let response = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
                        2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n";
        let endpoint = TestEndpoint::answering(response).await;
        let head = request("POST", "/", &[("trailer", "x-sum")]);
        let body = "5\r\nhello\r\n0\r\nx-sum: 1\r\n\r\n";
        let sidecar = Sidecar::to(&endpoint);
        let request = TestRequest { framing: BodyFraming::Chunked, body, ..head.into() };
        let sent = sidecar.send(request).await;
        let expected = format!(
            "POST / HTTP/1.1\r\nhost: a.test\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n{body}"
        );
        assert_eq!(endpoint.request(), expected);
        let expected = "HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n\
                        2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n";
        assert_eq!(sent.response, expected);
    });
}

#[test]
fn response_without_a_body_ends_with_its_head() {
    let rows = [
        ("HEAD", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", "content-length: 5\r\n"),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\n", ""),
        ("GET", "HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", "content-length: 5\r\n"),
        ("GET", "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "content-length: 0\r\n"),
    ];
    for (method, response, headers) in rows {
        on_worker(async {
            let endpoint = TestEndpoint::start([&[Send(response), Send(OK)]]).await;
            let sidecar = Sidecar::to(&endpoint);
            let sent = sidecar.send(request(method, "/", &[]).into()).await;
            let (line, _) = response.split_once("\r\n").expect("a status line");
            assert_eq!(sent.response, format!("{line}\r\n{headers}\r\n"));
            assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
            assert_eq!(endpoint.counts(), [2], "{response}");
        });
    }
}

#[test]
fn body_until_the_end_of_the_connection_is_sent_in_chunks() {
    on_worker(async {
        let endpoint = TestEndpoint::start([&[Close("HTTP/1.1 200 OK\r\n\r\nok")]]).await;
        let sent = Sidecar::to(&endpoint).send(get("/").into()).await;
        let expected = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
        assert_eq!(sent.response, expected);
    });
}

#[test]
fn interim_responses_are_forwarded_before_the_final_one() {
    on_worker(async {
        let response = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\nkeep-alive: x\r\n\r\n\
                        HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        let endpoint = TestEndpoint::answering(response).await;
        let sent = Sidecar::to(&endpoint).send(get("/").into()).await;
        assert_eq!(sent.response, format!("HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n{OK}"));
    });
}

#[test]
fn malformed_response_is_a_denial_with_its_reason() {
    let leaked = |text: String| &*Box::leak(text.into_boxed_str());
    let head = |headers: &str| leaked(format!("HTTP/1.1 200 OK\r\n{headers}\r\n\r\n"));
    let many = leaked("HTTP/1.1 100 Continue\r\n\r\n".repeat(17));
    let rows = [
        (Close(""), "closed_before_response"),
        (Close("HTTP/1.1 200 OK\r\na: b\r\n"), "incomplete_head"),
        (Send("nonsense\r\n\r\n"), "bad_status_line"),
        (Send("HTTP/1.1 20x OK\r\n\r\n"), "bad_status_line"),
        (Send("HTTP/1.1 200 OK\r\na: b\n\r\n"), "bare_line_feed"),
        (Send(head("a: b\r\n c")), "folded_header"),
        (Send(head("a")), "header_without_colon"),
        (
            Send(head("content-length: 1\r\ntransfer-encoding: chunked")),
            "content_length_and_transfer_encoding",
        ),
        (Send(head("content-length: 1\r\ncontent-length: 2")), "several_content_lengths"),
        (Send(head("content-length: +1")), "bad_content_length"),
        (Send(head("transfer-encoding: gzip")), "bad_transfer_encoding"),
        (Send(head("a: b\r\n".repeat(101).trim_end())), "too_many_headers"),
        (Send(head(&format!("a: {}", "b".repeat(4096)))), "head_too_large"),
        (Send(many), "too_many_interim_responses"),
        (Send("HTTP/1.1 101 Switching Protocols\r\n\r\n"), "bad_upgrade_response"),
    ];
    for (reaction, word) in rows {
        on_worker(async {
            let endpoint = TestEndpoint::start([&[reaction], &[Send(OK)]]).await;
            let sidecar = Sidecar::to(&endpoint);
            let sent = sidecar.send(get("/").into()).await;
            assert_eq!(sent.result(), format!("upstream_broken {word}"));
            assert_eq!(sidecar.retries(), 0, "{word}");
            // The rest of the response is not used for the next request.
            assert_eq!(sidecar.send(get("/").into()).await.result(), "200", "{word}");
            assert_eq!(endpoint.counts(), [1, 1], "{word}");
        });
    }
}

#[test]
fn body_that_ends_early_aborts_the_response() {
    let rows = [
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\nx\r\n",
    ];
    for response in rows {
        on_worker(async {
            let endpoint = TestEndpoint::start([&[Close(response)], &[Send(OK)]]).await;
            let sidecar = Sidecar::to(&endpoint);
            let sent = sidecar.send(get("/").into()).await;
            let outcome = sent.result.expect("the response has begun");
            assert_eq!(outcome.aborted, Some(ExchangeAbort::Upstream), "{response}");
            assert_eq!(outcome.bytes_to_client, 2, "{response}");
            assert!(outcome.detail.is_some(), "{response}");
            assert!(!sent.keeps_client, "{response}");
            assert!(!sent.response.ends_with("0\r\n\r\n"), "{}", sent.response);
            assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
            assert_eq!(endpoint.counts(), [1, 1], "{response}");
        });
    }
}

#[test]
fn response_before_the_end_of_the_request_ends_both_connections() {
    on_worker(async {
        let early = "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n";
        let endpoint = TestEndpoint::start([&[SendEarly(early)], &[Send(OK)]]).await;
        let sidecar = Sidecar::to(&endpoint);
        let head = RequestHead { content_length: Some(5), ..request("POST", "/", &[]) };
        let request = TestRequest { framing: BodyFraming::Length(5), body: "he", ..head.into() };
        let sent = sidecar.send(request).await;
        let expected = "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        assert_eq!(sent.response, expected);
        assert!(!sent.keeps_client);
        assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
        assert_eq!(endpoint.counts(), [1, 1]);
    });
}

#[test]
fn client_that_leaves_or_sends_a_malformed_body_ends_the_exchange() {
    let chunked = |body| {
        let head = request("POST", "/", &[]);
        TestRequest { framing: BodyFraming::Chunked, body, ..head.into() }
    };
    let gone = || TestRequest { leaves_after: Some(""), ..get("/").into() };
    let rows: [(&str, &dyn Fn() -> TestRequest<'static>, &str); 2] = [
        ("gone", &gone, "client_gone"),
        ("invalid chunk", &|| chunked("5\r\nhello\r\nx\r\n"), "malformed"),
    ];
    for (name, request, expected) in rows {
        on_worker(async {
            let endpoint = TestEndpoint::start([&[Wait], &[Send(OK)]]).await;
            let sidecar = Sidecar::to(&endpoint);
            let sent = sidecar.send(request()).await;
            assert_eq!(sent.result(), expected, "{name}");
            assert_eq!(sent.response, "", "{name}");
            assert_eq!(sidecar.send(get("/").into()).await.result(), "200", "{name}");
            assert_eq!(endpoint.counts().last(), Some(&1), "{name}");
        });
    }
}

#[test]
fn connection_with_the_rest_of_a_response_is_not_reused() {
    on_worker(async {
        let begun = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhe";
        let endpoint = TestEndpoint::start([&[Send(begun), Wait], &[Send(OK)]]).await;
        let sidecar = Sidecar::to(&endpoint);
        let sent = sidecar.send(TestRequest { leaves_after: Some("he"), ..get("/").into() }).await;
        let outcome = sent.result.expect("the response has begun");
        assert_eq!(outcome.aborted, Some(ExchangeAbort::Downstream));
        assert_eq!(outcome.bytes_to_client, 2);
        assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
        assert_eq!(endpoint.counts(), [1, 1]);
    });
}

#[test]
fn grpc_over_http2_is_not_sent_to_an_endpoint_of_http1() {
    on_worker(async {
        let endpoint = TestEndpoint::answering(OK).await;
        let head = http2_request("POST", "/", &[("content-type", "application/grpc")]);
        let sent = Sidecar::to(&endpoint).send(head.into()).await;
        assert_eq!(sent.result(), "protocol_mismatch");
        assert!(endpoint.counts().is_empty());
    });
}
