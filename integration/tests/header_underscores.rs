//! Headers with `_` in their names: every setting, over both HTTP versions, and in trailers.

use serde_json::{Value, json};
use weft_integration::bootstrap::with;
use weft_integration::http1;
use weft_integration::http2::{self, request};
use weft_integration::single_sidecar::{SidecarPerHttpVersion, SingleSidecarConfig};

fn start(action: Option<&str>) -> SidecarPerHttpVersion {
    SidecarPerHttpVersion::start(|wanted: SingleSidecarConfig| match action {
        Some(action) => wanted.with(
            "common_http_protocol_options",
            json!({"headers_with_underscores_action": action}),
        ),
        None => wanted,
    })
}

/// Sends requests with `_` in a header and in a trailer; returns what the service received of each.
fn responses(port: u16) -> [(u16, String); 4] {
    let head = "POST /x.Y/Z HTTP/1.1\r\nhost: a\r\n";
    let by_http1 = http1::ask(
        port,
        &format!("{head}X_Tenant: a\r\nx_weft_peer: b\r\nx-plain: c\r\ncontent-length: 0\r\n\r\n"),
    );
    let trailed = http1::ask(
        port,
        &format!(
            "{head}transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx_sum: 1\r\nx_weft_peer: b\r\nx-plain: c\r\n\r\n"
        ),
    );
    let metadata = [("x_tenant", "a"), ("x_weft_peer", "b"), ("x-plain", "c")];
    let by_http2 = http2::ask_one(port, request("POST", "/x.Y/Z", &metadata));
    let post = with(request("POST", "/x.Y/Z", &[]), "body", json!("x"));
    let trailers: Value = json!([("x_sum", "1"), ("x_weft_peer", "b"), ("x-plain", "c")]);
    let trailed_by_http2 = http2::ask_one(port, with(post, "trailers", trailers));
    [
        (by_http1.status, by_http1.body.to_ascii_lowercase()),
        (trailed.status, trailed.body.to_ascii_lowercase()),
        (by_http2.status(), by_http2.body().to_owned()),
        (trailed_by_http2.status(), trailed_by_http2.body().to_owned()),
    ]
}

#[track_caller]
fn check_passed(both: &SidecarPerHttpVersion, passes: bool) {
    for (way, port) in both.ports() {
        for (number, (status, received)) in responses(port).into_iter().enumerate() {
            assert_eq!(status, 200, "{way} {number}: {received}");
            let has = |text: &str| received.contains(text);
            assert_eq!(
                has("x_tenant: a") || has("trailer x_sum: 1"),
                passes,
                "{way} {number}: {received}"
            );
            assert!(has("x-plain: c") && !has("x_weft_peer"), "{way} {number}: {received}");
        }
    }
}

#[test]
fn headers_with_underscores_pass_by_default_and_where_allowed() {
    for action in [None, Some("ALLOW")] {
        let both = start(action);
        check_passed(&both, true);
        assert_eq!(both.http1.1.metric("weft_sidecar_headers_dropped_total"), 0);
    }
}

#[test]
fn dropped_headers_with_underscores_are_counted_and_each_name_is_logged_once() {
    let both = start(Some("DROP_HEADER"));
    check_passed(&both, false);
    check_passed(&both, false);
    for sidecar in [&both.http1.1, &both.http2.1] {
        assert_eq!(sidecar.metric("weft_sidecar_headers_dropped_total"), 8);
        let errors = sidecar.sidecar.process.errors();
        for name in ["x_tenant", "x_sum"] {
            let lines: Vec<&str> = errors
                .lines()
                .filter(|line| line.contains("its name contains an underscore"))
                .collect();
            let of_name = lines.iter().filter(|line| line.contains(name));
            assert_eq!(of_name.count(), 1, "{name}: {errors}");
            assert!(lines.iter().all(|line| line.contains("listener=inbound")), "{errors}");
        }
    }
}

#[test]
fn requests_with_underscores_in_headers_or_trailers_are_rejected_with_400() {
    let both = start(Some("REJECT_REQUEST"));
    for (way, port) in both.ports() {
        for (number, (status, received)) in responses(port).into_iter().enumerate() {
            assert_eq!(status, 400, "{way} {number}: {received}");
        }
        let plain = http1::ask(port, "GET / HTTP/1.1\r\nhost: a\r\nx-plain: a_b\r\n\r\n");
        assert_eq!(plain.status, 200, "{way}");
    }
}

/// A service that reads `_` as `-` could take such a header for one of the sidecar's.
#[test]
fn underscore_spellings_of_forwarded_headers_are_replaced_at_the_edge() {
    let both =
        SidecarPerHttpVersion::start(|wanted| wanted.with("use_remote_address", json!(true)));
    for (way, port) in both.ports() {
        let answer = http1::ask(
            port,
            "GET / HTTP/1.1\r\nhost: a\r\nX_Forwarded_For: 6.6.6.6\r\nx-forwarded_proto: https\r\n\r\n",
        );
        let received = answer.body.to_ascii_lowercase();
        assert!(received.contains("x-forwarded-for: 127.0.0.1"), "{way}: {received}");
        assert!(!received.contains("6.6.6.6") && !received.contains("_proto"), "{way}: {received}");
    }
}
