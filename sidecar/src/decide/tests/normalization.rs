//! Methods, upgrades, paths and headers: what is refused, and the form in which the rest is forwarded.

use weft_model::{
    AmbiguousPath, DesyncMode, EscapedSlashes, ForwardedFor, HeadersWithUnderscores, HostPort,
    PathRules,
};

use super::*;
use crate::http::desync::DesyncReason;
use crate::http::head::{HttpVersion, Upgrade};
use crate::http::test_head::{get, http2_request, request};

#[test]
fn trace_and_standard_methods_in_lower_case_are_refused() {
    let head = |method| request(method, "/", &[]);
    let lower = "refuse 400 malformed: invalid method: standard methods are upper case";
    let trace = "refuse 405 method_not_allowed: TRACE is not served";
    let setup = Setup::default;
    check([
        ("TRACE", setup(), head("TRACE"), trace),
        ("TRACE over HTTP/2", setup(), http2_request("TRACE", "/", &[]), trace),
        ("get", setup(), head("get"), lower),
        ("Trace", setup(), head("Trace"), lower),
        ("DELETE", setup(), head("DELETE"), "forward web DELETE a.test/"),
        ("other method", setup(), head("purge"), "forward web purge a.test/"),
    ]);
}

fn tunnel(version: HttpVersion) -> RequestHead {
    RequestHead { upgrade: Some(Upgrade::Tunnel), version, ..request("CONNECT", "", &[]) }
}

fn websocket(version: HttpVersion) -> RequestHead {
    RequestHead { upgrade: Some(Upgrade::WebSocket), version, ..get("/") }
}

#[test]
fn connect_is_served_only_where_it_is_enabled() {
    let setup = |connect| {
        let setup = Setup::default().http(|http| http.upgrades.connect = connect);
        setup.routes(vec![route(PathMatch::Connect, forward(&[("web", 1)]))])
    };
    let refused = "refuse 405 method_not_allowed: CONNECT is not enabled on this listener";
    for version in [HttpVersion::Http11, HttpVersion::Http2] {
        check([
            ("enabled", setup(true), tunnel(version), "forward web CONNECT a.test"),
            ("not enabled", setup(false), tunnel(version), refused),
        ]);
        let head = setup(true).forwarded(tunnel(version), |_, head| head.upgrade);
        assert_eq!(head, Some(Upgrade::Tunnel));
    }
}

#[test]
fn websocket_that_is_not_enabled_is_ignored_over_http1_and_refused_over_http2() {
    let setup = |websocket| Setup::default().http(|http| http.upgrades.websocket = websocket);
    let upgrade = |is_enabled, version| {
        setup(is_enabled).forwarded(websocket(version), |_, head| head.upgrade)
    };
    assert_eq!(upgrade(true, HttpVersion::Http11), Some(Upgrade::WebSocket));
    assert_eq!(upgrade(true, HttpVersion::Http2), Some(Upgrade::WebSocket));
    assert_eq!(upgrade(false, HttpVersion::Http11), None);
    let refused = "refuse 405 method_not_allowed: WebSocket is not enabled on this listener";
    assert_eq!(setup(false).decide(websocket(HttpVersion::Http2)), refused);
}

fn paths(rules: PathRules) -> Setup {
    Setup::default().http(|http| http.path = rules)
}

#[test]
fn escaped_slashes_are_kept_rejected_decoded_or_redirected() {
    let setup = |escaped_slashes| paths(PathRules { escaped_slashes, ..PathRules::default() });
    let changed = || {
        setup(EscapedSlashes::Redirect).allowing_nothing().with(|setup| {
            setup.table.mutations = on_response(overwrite("x-a", "1"));
        })
    };
    let encoded = "refuse 400 malformed: path contains an encoded slash";
    let moved = "answer 307 /a/b?q=%2F";
    check([
        ("kept", setup(EscapedSlashes::Keep), get("/a%2Fb"), "forward web GET a.test/a%2Fb"),
        ("rejected", setup(EscapedSlashes::Reject), get("/a%5Cb"), encoded),
        ("decoded", setup(EscapedSlashes::Unescape), get("/a%2fb"), "forward web GET a.test/a/b"),
        ("redirected", setup(EscapedSlashes::Redirect), get("/a%2Fb?q=%2F"), moved),
        (
            "backslash",
            setup(EscapedSlashes::Redirect),
            get("/%5cevil.test/"),
            "answer 307 /evil.test/",
        ),
        (
            "in the query",
            setup(EscapedSlashes::Redirect),
            get("/a?%2F"),
            "forward web GET a.test/a?%2F",
        ),
        // The location repeats only what the client sent, so neither policies nor the route apply to it.
        ("redirected before policies", changed(), get("/a%2Fb"), "answer 307 /a/b"),
        ("no escaped slash", changed(), get("/a"), "refuse 403 not_allowed response [x-a: 1]"),
    ]);
}

#[test]
fn path_is_normalized_refused_or_forwarded_as_sent() {
    let rules = |ambiguous, normalize, merge_slashes| {
        paths(PathRules { normalize, merge_slashes, ambiguous, ..PathRules::default() })
    };
    let as_sent = || rules(AmbiguousPath::RouteAsSent, false, false);
    let normalized = || rules(AmbiguousPath::RouteAsSent, true, true);
    let strict = || rules(AmbiguousPath::Refuse, false, false);
    let strict_reject = strict().http(|http| http.path.escaped_slashes = EscapedSlashes::Reject);
    let strict_normalized = || rules(AmbiguousPath::Refuse, true, true);
    let encoded = "refuse 400 malformed: path contains an encoded slash";
    let backslash = "refuse 400 malformed: path contains a backslash";
    let dots = "refuse 400 malformed: path contains a dot segment";
    let slashes = "refuse 400 malformed: path contains an empty segment";
    check([
        ("dots as sent", as_sent(), get("/a/../b"), "forward web GET a.test/a/../b"),
        ("dots normalized", normalized(), get("/a/%2e%2E/b"), "forward web GET a.test/b"),
        ("dots, strict", strict(), get("/a/../b"), dots),
        (
            "dots, strict and normalized",
            strict_normalized(),
            get("/a/../b"),
            "forward web GET a.test/b",
        ),
        ("slashes, strict", strict(), get("/a//b"), slashes),
        ("slashes as sent", as_sent(), get("/a//b"), "forward web GET a.test/a//b"),
        ("slashes merged", normalized(), get("/a//b"), "forward web GET a.test/a/b"),
        ("escape as sent", as_sent(), get("/%61"), "forward web GET a.test/%61"),
        ("escape normalized", normalized(), get("/%61?%61"), "forward web GET a.test/a?%61"),
        ("encoded slash, strict", strict_reject, get("/a%2fb"), encoded),
        ("backslash", as_sent(), get("/a\\b"), backslash),
        ("no slash", as_sent(), get("a"), "refuse 400 malformed: path does not start with /"),
        (
            "control",
            as_sent(),
            get("/a\u{7f}"),
            "refuse 400 malformed: path contains an invalid character",
        ),
        ("OPTIONS *", as_sent(), request("OPTIONS", "*", &[]), "forward web OPTIONS a.test*"),
    ]);
}

#[test]
fn ambiguous_path_is_routed_by_the_form_that_the_listener_chooses() {
    let setup = |ambiguous| {
        let setup = paths(PathRules { ambiguous, ..PathRules::default() });
        let by_path =
            |path: &str, cluster| route(PathMatch::Segments(path.into()), forward(&[(cluster, 1)]));
        setup.routes(vec![by_path("/a", "a"), by_path("/b", "b")])
    };
    let sent = get("/a/../b");
    check([
        ("as sent", setup(AmbiguousPath::RouteAsSent), sent.clone(), "forward a GET a.test/a/../b"),
        (
            "normalized",
            setup(AmbiguousPath::RouteNormalized),
            sent.clone(),
            "forward b GET a.test/a/../b",
        ),
        (
            "strict",
            setup(AmbiguousPath::Refuse),
            sent,
            "refuse 400 malformed: path contains a dot segment",
        ),
    ]);
}

#[test]
fn headers_with_underscores_are_allowed_dropped_or_rejected() {
    use HeadersWithUnderscores::{Allow, Drop, Reject};
    let setup = |underscores| Setup::default().http(|http| http.underscores = underscores);
    let head = || request("GET", "/", &[("x_a", "1"), ("x-b", "2")]);
    let h2 = || http2_request("GET", "/", &[("x_a", "1"), ("x-b", "2")]);
    let rejected = "refuse 400 malformed: a header name contains an underscore";
    let spelled = request("GET", "/", &[("transfer_encoding", "chunked"), ("x_a", "1")]);
    check([
        ("allowed", setup(Allow), head(), "forward web GET a.test/ [x-b: 2, x_a: 1]"),
        ("dropped", setup(Drop), head(), "forward web GET a.test/ [x-b: 2]"),
        ("dropped over HTTP/2", setup(Drop), h2(), "forward web GET a.test/ [x-b: 2]"),
        ("rejected", setup(Reject), head(), rejected),
        ("rejected over HTTP/2", setup(Reject), h2(), rejected),
        (
            "no underscore",
            setup(Reject),
            request("GET", "/", &[("x-b", "2")]),
            "forward web GET a.test/ [x-b: 2]",
        ),
        ("spelling of a framing header", setup(Allow), spelled, "forward web GET a.test/ [x_a: 1]"),
    ]);
}

#[test]
fn forwarded_headers_are_preserved_appended_or_removed() {
    use ForwardedFor::{Append, Preserve, Remove};
    let setup = |addresses, is_edge| {
        Setup::default().http(|http| {
            http.forwarded.addresses = addresses;
            http.forwarded.is_edge = is_edge;
        })
    };
    let head = |addresses: &str| request("GET", "/", &[("x-forwarded-for", addresses)]);
    let many = vec!["1.1.1.1"; 31].join(",");
    let tls = Setup { is_tls: true, ..setup(Remove, true) };
    check([
        (
            "preserved",
            setup(Preserve, false),
            head("1.1.1.1"),
            "forward web GET a.test/ [x-forwarded-for: 1.1.1.1]",
        ),
        (
            "appended",
            setup(Append, true),
            head("1.1.1.1"),
            "forward web GET a.test/ [x-forwarded-for: 1.1.1.1, 10.0.0.9, x-forwarded-port: 80, x-forwarded-proto: http]",
        ),
        ("removed", setup(Remove, false), head("1.1.1.1"), "forward web GET a.test/"),
        (
            "over TLS",
            tls,
            get("/"),
            "forward web GET a.test/ [x-forwarded-port: 80, x-forwarded-proto: https]",
        ),
        ("too many", setup(Preserve, false), head(&many), "refuse 463 too_many_forwarders"),
    ]);
}

#[test]
fn port_of_the_authority_is_normalized_before_routing() {
    let setup = |host_port| {
        Setup::default().http(|http| http.host_port = host_port).with(|setup| {
            setup.table.hosts =
                vec![host("a.test", vec![route(prefix("/"), forward(&[("web", 1)]))])];
        })
    };
    let head = |authority: &str| RequestHead { authority: authority.into(), ..get("/") };
    let forwarded = "forward web GET a.test/";
    let no_route = "refuse 404 no_route";
    check([
        ("kept", setup(HostPort::Keep), head("a.test:80"), no_route),
        ("matching", setup(HostPort::StripMatching), head("a.test:80"), forwarded),
        ("other", setup(HostPort::StripMatching), head("a.test:81"), no_route),
        ("any", setup(HostPort::StripAny), head("a.test:81"), forwarded),
    ]);
}

#[test]
fn body_of_get_over_http2_is_handled_by_the_desync_mode() {
    use DesyncMode::{Defensive, Monitor, Strictest};
    let handled = |desync, has_body, head: RequestHead| {
        let setup = Setup::default().http(|http| http.desync = desync);
        let setup = Setup { has_body, ..setup };
        setup.inspect(head, &TokenCache::default(), |decision, head, log| {
            let reason = log.desync.map_or("none", DesyncReason::word);
            match decision {
                Ok(_) if head.is_isolated => format!("isolated: {reason}"),
                Ok(_) => format!("forwarded: {reason}"),
                Err(RefusedRequest { denial, .. }) => {
                    assert_eq!(denial.reason(), "malformed");
                    format!("refused: {reason}")
                }
            }
        })
    };
    let head = |content_length| RequestHead { content_length, ..http2_request("GET", "/", &[]) };
    let length = |mode| handled(mode, true, head(Some(5)));
    assert_eq!(length(Monitor), "forwarded: UndefinedContentLengthSemantics");
    assert_eq!(length(Defensive), "isolated: UndefinedContentLengthSemantics");
    assert_eq!(length(Strictest), "refused: UndefinedContentLengthSemantics");
    assert_eq!(
        handled(Defensive, true, head(None)),
        "isolated: UndefinedTransferEncodingSemantics"
    );
    assert_eq!(handled(Defensive, false, head(Some(0))), "forwarded: GetHeadZeroContentLength");
    assert_eq!(handled(Strictest, false, head(None)), "forwarded: none");
    let post = RequestHead { content_length: Some(5), ..http2_request("POST", "/", &[]) };
    assert_eq!(handled(Strictest, true, post), "forwarded: none");
    let suspicious = http2_request("GET", "/", &[("content_length", "5")]);
    assert_eq!(handled(Defensive, false, suspicious), "isolated: SuspiciousHeader");
}

#[test]
fn trailers_are_announced_only_where_the_request_may_have_some() {
    let setup = |has_body| Setup { has_body, ..Setup::default() };
    let head = |content_length| {
        let lines = [("trailer", "x-sum, content-length"), ("te", "trailers, gzip")];
        RequestHead { content_length, ..request("POST", "/", &lines) }
    };
    let without = "forward web POST a.test/ [te: trailers]";
    check([
        (
            "chunked",
            setup(true),
            head(None),
            "forward web POST a.test/ [te: trailers, trailer: x-sum]",
        ),
        ("length", setup(true), head(Some(5)), without),
        ("no body", setup(false), head(None), without),
    ]);
}

#[test]
fn dropped_headers_are_counted() {
    let setup = Setup::default().http(|http| http.underscores = HeadersWithUnderscores::Drop);
    let plan = setup.plan();
    let connection = setup.connection();
    let tokens = TokenCache::default();
    let time = DecisionTime { monotonic: setup.monotonic, wall: setup.wall };
    let context =
        DecisionContext { connection: &connection, plan: &plan, tokens: &tokens, time, random: 0 };
    let mut head = request("GET", "/", &[("x_a", "1"), ("x_b", "1"), ("x-c", "1")]);
    let mut log = RequestLog::new(&head, AccessLogSinks::Off);
    assert!(decide(&mut head, false, context, &mut log).is_ok());
    assert_eq!(connection.metrics.headers_dropped.get(), 2);
}
