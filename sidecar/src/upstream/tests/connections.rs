//! Which endpoint and connection a request is sent over, when it is sent again, and which connections are reused.

use super::*;
use crate::header_mutation::HeaderVariables;
use crate::http::test_head::{get, request};
use Reaction::{Close, Send, Wait};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

fn post() -> TestRequest<'static> {
    request("POST", "/", &[]).into()
}

#[test]
fn connection_is_reused_after_a_complete_response() {
    on_worker(async {
        let endpoint = TestEndpoint::start([&[Send(OK), Send(OK), Send(OK)]]).await;
        let sidecar = Sidecar::to(&endpoint);
        for _ in 0..3 {
            assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
        }
        assert_eq!(endpoint.counts(), [3]);
        assert_eq!(sidecar.worker.metrics.upstream_connections.get(), 1);
        assert_eq!(sidecar.retries(), 0);
    });
}

#[test]
fn connection_is_not_reused_after_a_response_that_ends_it() {
    let isolated = || RequestHead { is_isolated: true, ..get("/") };
    let close = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";
    let http10 = "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let soon = "HTTP/1.1 200 OK\r\nkeep-alive: timeout=1\r\ncontent-length: 2\r\n\r\nok";
    let longer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n";
    let after_head = "HTTP/1.1 204 No Content\r\n\r\nrest";
    let rows = [
        ("connection: close", get("/"), Send(close)),
        ("HTTP/1.0", get("/"), Send(http10)),
        ("body until the end of the connection", get("/"), Close("HTTP/1.1 200 OK\r\n\r\nok")),
        ("keep-alive: timeout=1", get("/"), Send(soon)),
        ("bytes after the body", get("/"), Send(longer)),
        ("bytes after a response without a body", get("/"), Send(after_head)),
        ("request with ambiguous framing", isolated(), Send(OK)),
    ];
    for (name, head, first) in rows {
        on_worker(async {
            let endpoint = TestEndpoint::start([&[first, Wait], &[Send(OK)]]).await;
            let sidecar = Sidecar::to(&endpoint);
            let sent = sidecar.send(head.into()).await;
            assert!(sent.result.is_ok_and(|outcome| outcome.aborted.is_none()), "{name}");
            assert_eq!(sidecar.send(get("/").into()).await.result(), "200", "{name}");
            assert_eq!(endpoint.counts(), [1, 1], "{name}");
            assert_eq!(sidecar.retries(), 0, "{name}");
        });
    }
}

#[test]
fn bytes_after_the_body_are_not_forwarded() {
    on_worker(async {
        let longer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n";
        let endpoint = TestEndpoint::answering(longer).await;
        let sent = Sidecar::to(&endpoint).send(get("/").into()).await;
        assert_eq!(sent.response, OK);
    });
}

#[test]
fn endpoint_that_refuses_connections_is_replaced_by_the_next() {
    on_worker(async {
        let endpoint = TestEndpoint::start([&[Send(OK)], &[Send(OK)]]).await;
        let [first, second] = [refusing(), refusing()];
        let sidecar = Sidecar::new(&[first.0, second.0, endpoint.address]);
        // A request that is not idempotent too: nothing was sent.
        let sent = sidecar.send(post()).await;
        assert_eq!(sent.result(), "200");
        assert_eq!(sent.endpoint, Some(endpoint.address));
        assert_eq!(sidecar.retries(), 2);
        assert_eq!(endpoint.counts(), [1]);
    });
}

#[test]
fn each_endpoint_is_tried_once_and_three_at_most() {
    on_worker(async {
        let refusing = [refusing(), refusing(), refusing()];
        let [first, second, third] = refusing.each_ref().map(|(address, _)| *address);
        let endpoint = TestEndpoint::answering(OK).await;
        let rows = [
            (vec![first], first),
            (vec![first, second], second),
            (vec![first, second, third, endpoint.address], third),
        ];
        for (endpoints, last) in rows {
            let sidecar = Sidecar::new(&endpoints);
            let sent = sidecar.send(get("/").into()).await;
            assert_eq!(sent.result(), "unreachable connection_refused", "{endpoints:?}");
            assert_eq!(sent.endpoint, Some(last), "{endpoints:?}");
            assert_eq!(sent.response, "", "{endpoints:?}");
            let attempts = endpoints.len().min(3) as u64;
            assert_eq!(sidecar.retries(), attempts - 1, "{endpoints:?}");
        }
        assert!(endpoint.counts().is_empty());
    });
}

#[test]
fn cluster_without_endpoints_has_no_endpoint() {
    on_worker(async {
        let sent = Sidecar::new(&[]).send(get("/").into()).await;
        assert_eq!(sent.result(), "no_endpoint");
        assert_eq!(sent.endpoint, None);
    });
}

#[test]
fn response_headers_name_the_endpoint_that_responded() {
    use weft_model::{HeaderAddition, HeaderFormat, HeaderMutation, HeaderMutations};
    on_worker(async {
        let endpoint = TestEndpoint::answering(OK).await;
        let refusing = refusing();
        let sidecar = Sidecar::new(&[refusing.0, endpoint.address]);
        let value = HeaderFormat::parse("%UPSTREAM_HOST%").expect("a format");
        let action = weft_model::AppendAction::Append;
        let host = HeaderAddition { name: "x-host".into(), value, action, keep_empty: false };
        let response = HeaderMutation { remove: Vec::new(), add: vec![host] };
        let level = HeaderMutations { response, ..HeaderMutations::default() };
        let variables = || HeaderVariables {
            client: [10, 0, 0, 9].into(),
            peer_address: ([10, 0, 0, 9], 1).into(),
            local: ([10, 0, 0, 1], 80).into(),
            peer: None,
            is_tls: false,
            route: "",
            cluster: "web",
        };
        let changes = HeaderChanges::of([&level].into_iter(), variables);
        let sent = sidecar.send(TestRequest { changes, ..get("/").into() }).await;
        let expected = format!("x-host: {}\r\n", endpoint.address);
        assert!(sent.response.contains(&expected), "{}", sent.response);
    });
}

/// A worker whose idle connection is closed by the endpoint when the next request arrives.
async fn with_stale_connection() -> (TestEndpoint, Sidecar) {
    let endpoint = TestEndpoint::start([&[Send(OK), Close("")], &[Send(OK)]]).await;
    let sidecar = Sidecar::to(&endpoint);
    assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
    (endpoint, sidecar)
}

#[test]
fn idempotent_request_on_a_stale_connection_is_sent_again_on_a_new_one() {
    for method in ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"] {
        on_worker(async {
            let (endpoint, sidecar) = with_stale_connection().await;
            let sent = sidecar.send(request(method, "/", &[]).into()).await;
            assert_eq!(sent.result(), "200", "{method}");
            assert_eq!(endpoint.counts(), [2, 1], "{method}");
            assert_eq!(sidecar.retries(), 1, "{method}");
        });
    }
}

#[test]
fn request_is_sent_again_on_a_new_connection_although_others_are_idle() {
    on_worker(async {
        let stale = [Send(OK), Close("")];
        let endpoint = TestEndpoint::start([&stale, &stale, &[Send(OK)]]).await;
        let sidecar = Sidecar::to(&endpoint);
        let both = tokio::join!(sidecar.send(get("/").into()), sidecar.send(get("/").into()));
        assert_eq!([both.0.result(), both.1.result()], ["200", "200"]);
        assert_eq!(endpoint.counts(), [1, 1]);
        assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
        assert_eq!(sidecar.retries(), 1);
        assert_eq!(endpoint.counts().iter().sum::<usize>(), 4);
    });
}

#[test]
fn request_that_may_have_been_processed_is_not_sent_again() {
    let with_body = || {
        let head = RequestHead { content_length: Some(2), ..request("PUT", "/", &[]) };
        TestRequest { framing: BodyFraming::Length(2), body: "ok", ..head.into() }
    };
    let rows: [(&str, &dyn Fn() -> TestRequest<'static>); 3] = [
        ("POST", &post),
        ("PATCH", &|| request("PATCH", "/", &[]).into()),
        ("PUT with a body", &with_body),
    ];
    for (name, request) in rows {
        on_worker(async {
            let (endpoint, sidecar) = with_stale_connection().await;
            let sent = sidecar.send(request()).await;
            assert_eq!(sent.result(), "upstream_broken closed_before_response", "{name}");
            assert_eq!(endpoint.counts(), [2], "{name}");
            assert_eq!(sidecar.retries(), 0, "{name}");
        });
    }
}

#[test]
fn request_on_a_new_connection_is_not_sent_again() {
    on_worker(async {
        let endpoint = TestEndpoint::start([&[Close("")], &[Send(OK)]]).await;
        let sidecar = Sidecar::to(&endpoint);
        let sent = sidecar.send(get("/").into()).await;
        assert_eq!(sent.result(), "upstream_broken closed_before_response");
        assert_eq!(endpoint.counts(), [1]);
    });
}

#[test]
fn idle_connection_that_the_endpoint_has_closed_is_not_used() {
    on_worker(async {
        let endpoint = TestEndpoint::start([&[Close(OK)], &[Send(OK)]]).await;
        let sidecar = Sidecar::to(&endpoint);
        assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
        // The event loop learns of the end of the connection when it waits.
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(sidecar.send(post()).await.result(), "200");
        assert_eq!(endpoint.counts(), [1, 1]);
        assert_eq!(sidecar.retries(), 0);
    });
}

#[test]
fn limit_of_requests_refuses_the_next_without_a_connection() {
    on_worker(async {
        let endpoint = TestEndpoint::start([&[Send(OK), Send(OK)]]).await;
        let sidecar = Sidecar::with(&[endpoint.address], |cluster| cluster.request_limit = 2);
        let open = [sidecar.cluster.balancer.choose(&[]), sidecar.cluster.balancer.choose(&[])];
        let sent = sidecar.send(get("/").into()).await;
        assert_eq!(sent.result(), "overloaded");
        assert_eq!(sent.endpoint, None);
        assert!(endpoint.counts().is_empty());
        let [first, _second] = open;
        drop(first);
        assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
        // The request no longer counts once it has ended.
        assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
    });
}

#[test]
fn limit_of_connections_delays_a_request_until_one_is_free_or_the_connect_timeout() {
    on_worker(async {
        let endpoint = TestEndpoint::start([&[Send(OK), Send(OK)]]).await;
        let sidecar = Sidecar::with(&[endpoint.address], |cluster| cluster.connection_limit = 1);
        let sent = tokio::join!(sidecar.send(get("/").into()), sidecar.send(get("/").into()));
        assert_eq!([sent.0.result(), sent.1.result()], ["200", "200"]);
        assert_eq!(endpoint.counts(), [2]);
    });
    on_worker(async {
        let endpoint = TestEndpoint::start([&[Wait]]).await;
        let sidecar = Sidecar::with(&[endpoint.address], |cluster| {
            cluster.connection_limit = 1;
            cluster.connect_timeout = Duration::from_millis(50);
        });
        tokio::select! {
            biased;
            _ = sidecar.send(get("/").into()) => panic!("the endpoint does not respond"),
            sent = sidecar.send(get("/").into()) => assert_eq!(sent.result(), "overloaded"),
        }
        assert_eq!(endpoint.counts(), [1]);
    });
}

#[test]
fn connection_with_a_login_is_reused_only_for_its_client() {
    on_worker(async {
        let login =
            "HTTP/1.1 401 Unauthorized\r\nwww-authenticate: NTLM\r\ncontent-length: 0\r\n\r\n";
        let endpoint = TestEndpoint::start([&[Send(login), Send(OK)], &[Send(OK)]]).await;
        let sidecar = Sidecar::to(&endpoint);
        let pin = RefCell::default();
        let pinned = || TestRequest { pin: Some(&pin), ..get("/").into() };
        assert_eq!(sidecar.send(pinned()).await.result(), "401");
        assert_eq!(sidecar.send(get("/").into()).await.result(), "200");
        assert_eq!(endpoint.counts(), [1, 1]);
        assert_eq!(sidecar.send(pinned()).await.result(), "200");
        assert_eq!(endpoint.counts(), [2, 1]);
    });
}
