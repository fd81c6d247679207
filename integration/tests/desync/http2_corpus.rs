//! HTTP/2 requests, valid and invalid, and the expected handling of each.

use crate::http2_requests::{
    Expected, HELLO, Http2Case, PLAIN, changed, owned, request, with_data, with_trailer,
};

pub(crate) fn values() -> Vec<Http2Case> {
    let bad = [
        "y\r\nTransfer-Encoding: chunked",
        "y\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
        "y\rTransfer-Encoding: chunked",
        "y\nTransfer-Encoding: chunked",
        "y\r\n",
        "\r\ny",
        "y\0",
        "\0",
        "y\u{1}",
        "y\u{b}z",
        "y\u{7f}",
        "\r",
        "\n",
    ];
    let good = [
        "y",
        "",
        "%0d%0aContent-Length: 5",
        "\\r\\nX: y",
        "y: z",
        "\u{e9}",
        "\u{560a}\u{560d}X: y",
    ];
    let each = |values: &[&str], expected: Expected| -> Vec<Http2Case> {
        values.iter().map(|value| request("GET", &[("x", value)], expected)).collect()
    };
    [each(&bad, Expected::Refused), each(&good, PLAIN)].concat()
}

/// Whitespace around a value must be removed or refused, and never forwarded (RFC 9113, section 8.2.1).
pub(crate) fn surrounding_whitespace() -> Vec<Http2Case> {
    [" y", "y ", "\ty", "y\t", " ", "  y: z"]
        .iter()
        .map(|value| request("GET", &[("x", value)], Expected::ServedOrRefused("GET / a")))
        .collect()
}

/// Names that are not tokens (RFC 9110, section 5.6.2).
pub(crate) fn invalid_names() -> Vec<Http2Case> {
    ["x\"", "\"x\"", "\"", "\"transfer-encoding"]
        .iter()
        .map(|name| request("GET", &[(name, "chunked")], Expected::Refused))
        .collect()
}

/// Violations that leave nothing in what the service receives (RFC 9113, sections 8.1 and 8.3.1; RFC 3986, section
/// 3.1). `expected` gives the expected handling of a request, by what the service may receive of it.
pub(crate) fn ignored_violations(expected: impl Fn(&'static str) -> Expected) -> Vec<Http2Case> {
    let trailers = [(":path", "/smuggled"), (":method", "GET"), (":status", "200")];
    let trailers =
        trailers.iter().map(|trailer| with_trailer(*trailer, expected("POST / a hello")));
    let targets = [("/x#/../y", "GET /x a"), ("/#", "GET / a"), ("/x?y#z", "GET /x?y a")];
    let targets = targets.map(|(path, summary)| changed(":path", Some(path), expected(summary)));
    trailers.chain(targets).collect()
}

pub(crate) fn schemes() -> Vec<Http2Case> {
    ["", "1http"].map(|scheme| changed(":scheme", Some(scheme), Expected::Refused)).to_vec()
}

pub(crate) fn names() -> Vec<Http2Case> {
    let bad = [
        "x y",
        "x:y",
        "x: y\r\nz",
        "x\r\ny: z\r\nq",
        "x\r",
        "x\n",
        "x\0",
        "",
        " x",
        "x ",
        "x\t",
        "x(",
        "x)",
        "x,",
        "x/",
        "x;",
        "x<",
        "x>",
        "x?",
        "x@",
        "x\\",
        "x]",
        "x}",
        "x\u{e9}",
        "x\u{7f}",
        "x[",
        "x{",
        "x=",
        "X",
        "Transfer-Encoding",
        "Content-Length",
        "Host",
        "X-Weft-Peer",
        "transfer-encoding ",
        "transfer-encoding: chunked\r\nx",
        "content-length: 5\r\nx",
        "transfer-encoding\0",
    ];
    bad.iter().map(|name| request("GET", &[(name, "chunked")], Expected::Refused)).collect()
}

/// Headers that frame the message or concern the connection.
pub(crate) fn framing() -> Vec<Http2Case> {
    let bad = [
        ("transfer-encoding", "chunked"),
        ("transfer-encoding", "identity"),
        ("transfer-encoding", ""),
        ("transfer-encoding", "gzip, chunked"),
        ("connection", "close"),
        ("connection", "keep-alive"),
        ("connection", "transfer-encoding"),
        ("connection", ""),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "keep-alive"),
        ("upgrade", "websocket"),
        ("upgrade", "h2c"),
        ("te", "gzip"),
        ("te", "trailers, chunked"),
        ("te", "chunked"),
        ("content-length", "x"),
        ("content-length", "+5"),
        ("content-length", "-5"),
        ("content-length", "5, 5"),
        ("content-length", "0x5"),
        ("content-length", ""),
        ("content-length", "5\r\nX: y"),
        ("content-length", "99999999999999999999"),
        ("content-length", "4"),
        ("content-length", "6"),
        ("content-length", "0"),
        ("content-length", "500"),
    ];
    let mut cases: Vec<Http2Case> =
        bad.iter().map(|header| with_data(&[*header], "hello", Expected::Refused)).collect();
    let two = |first: &'static str, second: &'static str, expected: Expected| {
        with_data(&[("content-length", first), ("content-length", second)], "hello", expected)
    };
    let either = Expected::ServedOrRefused("POST / a hello");
    cases.extend([
        with_data(&[("content-length", "5")], "hello", HELLO),
        with_data(&[("te", "trailers")], "hello", HELLO),
        with_data(&[], "hello", HELLO),
        with_data(
            &[],
            "0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n",
            Expected::Served("POST / a 0\r\n\r\nGET /smuggled HTTP/1.1"),
        ),
        request("GET", &[("content-length", "5")], Expected::Refused),
        request("POST", &[("content-length", "5")], Expected::Refused),
        request("GET", &[("content-length", "0")], PLAIN),
        two("5", "6", Expected::Refused),
        two("6", "5", Expected::Refused),
        two("5", "5", either),
        Http2Case {
            data: Some("hello"),
            ..request("GET", &[], Expected::ServedOrRefused("GET / a hello"))
        },
        // Headers with names that a service may treat as others are removed.
        with_data(&[("transfer_encoding", "chunked")], "hello", HELLO),
        with_data(&[("content_length", "3")], "hello", HELLO),
        with_data(&[("expect", "100-continue")], "hello", HELLO),
    ]);
    cases
}

pub(crate) fn paths() -> Vec<Http2Case> {
    let bad = [
        "",
        "x",
        "?x",
        "*",
        "/a b",
        "/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\nX: y",
        "/ HTTP/1.1\r\nHost: b\r\n\r\nGET /smuggled",
        "/ HTTP/1.1",
        "/a\tb",
        "/\r",
        "/\n",
        "/\0",
        "/\u{1}",
        "/\u{e9}",
        "http://b/",
        "https://b/x",
        "b:80",
        "//b/",
        "/../x",
        "/x/./y",
        "/a//b",
        "/%2f",
        "/%5c",
        "/\\",
        "/%00",
        "/%zz",
        " /",
        "/ ",
        "@b/",
    ];
    let mut cases: Vec<Http2Case> =
        bad.iter().map(|path| changed(":path", Some(path), Expected::Refused)).collect();
    cases.extend([
        changed(":path", None, Expected::Refused),
        changed(":path", Some("/x?y"), Expected::Served("GET /x?y a")),
        changed(":path", Some("/%0d%0aX:y"), Expected::Served("GET /%0D%0AX:y a")),
    ]);
    cases
}

pub(crate) fn methods() -> Vec<Http2Case> {
    let bad = [
        "",
        "GET ",
        " GET",
        "GE T",
        "GET / HTTP/1.1\r\nX: y\r\n\r\nGET",
        "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\nGET",
        "GET\r\n",
        "GET\n",
        "GET\0",
        "GET\t",
        "GET:",
        "G(T",
        "G/T",
        "G\u{e9}T",
    ];
    let mut cases: Vec<Http2Case> =
        bad.iter().map(|method| request(method, &[], Expected::Refused)).collect();
    cases.extend([
        changed(":method", None, Expected::Refused),
        request("get", &[], Expected::Refused),
        request("purge", &[], Expected::Served("purge / a")),
        request("M-SEARCH", &[], Expected::Served("M-SEARCH / a")),
        // CONNECT has neither a scheme nor a path (RFC 9113, section 8.5).
        request("CONNECT", &[], Expected::Refused),
        request("CONNECT", &[(":protocol", "x\r\ny: z")], Expected::Refused),
        request("CONNECT", &[(":protocol", "connect-udp")], Expected::Refused),
        request("TRACE", &[], Expected::Refused),
    ]);
    cases
}

pub(crate) fn authorities() -> Vec<Http2Case> {
    let bad = [
        "",
        "u@a",
        "u:p@a",
        "a b",
        "a/b",
        "a?b",
        "a#b",
        "a,b",
        "a\\b",
        "a:x",
        "a:65536",
        "a:1:2",
        "[::1",
        "::1",
        ":80",
        "a\r\nTransfer-Encoding: chunked",
        "a\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a",
        "a\n",
        "a\0",
        "a%2fb",
        "a\u{e9}",
        "http://b",
    ];
    let mut cases: Vec<Http2Case> =
        bad.iter().map(|host| changed(":authority", Some(host), Expected::Refused)).collect();
    let by_host = |hosts: &[&str], expected: Expected| {
        let mut case = changed(":authority", None, expected);
        case.headers.extend(hosts.iter().map(|host| ("host".to_owned(), (*host).to_owned())));
        case
    };
    let with_host = |host: &str, expected: Expected| request("GET", &[("host", host)], expected);
    cases.extend([
        by_host(&[], Expected::Refused),
        by_host(&["b"], Expected::Served("GET / b")),
        by_host(&["b", "b"], Expected::Refused),
        by_host(&["b", "c"], Expected::Refused),
        by_host(&["u@b"], Expected::Refused),
        by_host(&["b\r\nX: y"], Expected::Refused),
        by_host(&[""], Expected::Refused),
        with_host("a", PLAIN),
        with_host("A", PLAIN),
        with_host("b", Expected::Refused),
        with_host("", Expected::Refused),
        with_host("a:80", Expected::Refused),
        with_host("a, b", Expected::Refused),
        changed(":authority", Some("[::1]:80"), Expected::Served("GET / [::1]:80")),
    ]);
    cases
}

/// Invalid pseudo-headers, and values of `:scheme`.
pub(crate) fn pseudo_headers() -> Vec<Http2Case> {
    let more = [
        (":path", "/smuggled"),
        (":path", "/"),
        (":method", "POST"),
        (":authority", "b"),
        (":scheme", "https"),
        (":status", "200"),
        (":x", "y"),
        (":", "y"),
        (":protocol", "websocket"),
    ];
    let mut cases: Vec<Http2Case> =
        more.iter().map(|header| request("GET", &[*header], Expected::Refused)).collect();
    let schemes = ["ht tp", "http://b/x?", "http\r\nX: y", "http\0"];
    cases.extend(schemes.iter().map(|scheme| changed(":scheme", Some(scheme), Expected::Refused)));
    cases.push(changed(":scheme", None, Expected::Refused));
    cases.push(changed(":scheme", Some("https"), PLAIN));
    let mut late = changed(":path", None, Expected::Refused);
    late.headers.extend(owned(&[("x", "y"), (":path", "/")]));
    cases.push(late);
    cases
}

pub(crate) fn trailers() -> Vec<Http2Case> {
    let bad = [
        ("x", "y\r\nX: z"),
        ("x", "y\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("x", "y\n"),
        ("x", "y\0"),
        ("x y", "z"),
        ("x:y", "z"),
        ("x\r\ny", "z"),
        ("X", "y"),
        ("Content-Length", "5"),
    ];
    // These trailers are removed, or the request is refused.
    let removed_or_refused = [
        ("transfer-encoding", "chunked"),
        ("connection", "close"),
        ("keep-alive", "x"),
        ("upgrade", "websocket"),
        ("te", "trailers"),
        ("proxy-authorization", "forged"),
        ("x-weft-peer", "forged"),
        ("x_weft_peer", "forged"),
        ("x-forwarded-client-cert", "forged"),
        ("x-amzn-mtls-clientcert-subject", "forged"),
        ("transfer_encoding", "forged"),
    ];
    let either = Expected::ServedOrRefused("POST / a hello");
    let refused = bad.iter().map(|trailer| with_trailer(*trailer, Expected::Refused));
    let other = removed_or_refused.iter().map(|trailer| with_trailer(*trailer, either));
    refused.chain(other).chain([with_trailer(("x", "y"), HELLO)]).collect()
}

/// Trailers that a service must not treat as headers (RFC 9110, section 6.5.1).
pub(crate) fn misplaced() -> Vec<Http2Case> {
    let either = Expected::ServedOrRefused("POST / a hello");
    ["content-length", "host", "authorization", "content-type", "trailer", "expect", "range"]
        .iter()
        .map(|name| with_trailer((name, "5"), either))
        .collect()
}

pub(crate) fn identity_headers() -> Vec<Http2Case> {
    [
        "x-forwarded-client-cert",
        "x-weft-peer",
        "x-weft-anything",
        "x-amzn-mtls-clientcert-subject",
        "x-amzn-mtls-clientcert-serial-number",
        "x_forwarded_client_cert",
        "x_weft_peer",
        "x-weft_peer",
        "x_amzn-mtls_clientcert",
    ]
    .iter()
    .map(|name| request("GET", &[(name, "forged"), (name, "forged")], PLAIN))
    .collect()
}
