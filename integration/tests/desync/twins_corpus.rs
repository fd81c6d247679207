//! Requests of HTTP/2, right and wrong, and what should become of each.

use crate::twins::{HELLO, PLAIN, Twin, Wanted, changed, owned, twin, with_data, with_trailer};

pub(crate) fn values() -> Vec<Twin> {
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
    let each = |values: &[&str], wanted: Wanted| -> Vec<Twin> {
        values.iter().map(|value| twin("GET", &[("x", value)], wanted)).collect()
    };
    [each(&bad, Wanted::Refused), each(&good, PLAIN)].concat()
}

/// Blanks around a value may be taken off, or refused, and never passed on (RFC 9113, section 8.2.1).
pub(crate) fn blanks() -> Vec<Twin> {
    [" y", "y ", "\ty", "y\t", " ", "  y: z"]
        .iter()
        .map(|value| twin("GET", &[("x", value)], Wanted::Either("GET / a")))
        .collect()
}

/// Names that are no tokens (RFC 9110, section 5.6.2).
pub(crate) fn quoted() -> Vec<Twin> {
    ["x\"", "\"x\"", "\"", "\"transfer-encoding"]
        .iter()
        .map(|name| twin("GET", &[(name, "chunked")], Wanted::Refused))
        .collect()
}

/// What breaks a rule, and yet has no trace in what the service gets (RFC 9113, sections 8.1 and 8.3.1;
/// RFC 3986, section 3.1).
/// `wanted` says what should become of each, given how it looks without what breaks the rule.
pub(crate) fn passed_over(wanted: impl Fn(&'static str) -> Wanted) -> Vec<Twin> {
    let trailers = [(":path", "/smuggled"), (":method", "GET"), (":status", "200")];
    let trailers = trailers.iter().map(|trailer| with_trailer(*trailer, wanted("POST / a hello")));
    let targets = [("/x#/../y", "GET /x a"), ("/#", "GET / a"), ("/x?y#z", "GET /x?y a")];
    let targets = targets.map(|(path, told)| changed(":path", Some(path), wanted(told)));
    trailers.chain(targets).collect()
}

pub(crate) fn schemes() -> Vec<Twin> {
    ["", "1http"].map(|scheme| changed(":scheme", Some(scheme), Wanted::Refused)).to_vec()
}

pub(crate) fn names() -> Vec<Twin> {
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
    bad.iter().map(|name| twin("GET", &[(name, "chunked")], Wanted::Refused)).collect()
}

/// Fields that frame the message or concern the connection.
pub(crate) fn framing() -> Vec<Twin> {
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
    let mut twins: Vec<Twin> =
        bad.iter().map(|field| with_data(&[*field], "hello", Wanted::Refused)).collect();
    let two = |first: &'static str, second: &'static str, wanted: Wanted| {
        with_data(&[("content-length", first), ("content-length", second)], "hello", wanted)
    };
    let either = Wanted::Either("POST / a hello");
    twins.extend([
        with_data(&[("content-length", "5")], "hello", HELLO),
        with_data(&[("te", "trailers")], "hello", HELLO),
        with_data(&[], "hello", HELLO),
        with_data(
            &[],
            "0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n",
            Wanted::Served("POST / a 0\r\n\r\nGET /smuggled HTTP/1.1"),
        ),
        twin("GET", &[("content-length", "5")], Wanted::Refused),
        twin("POST", &[("content-length", "5")], Wanted::Refused),
        twin("GET", &[("content-length", "0")], PLAIN),
        two("5", "6", Wanted::Refused),
        two("6", "5", Wanted::Refused),
        two("5", "5", either),
        Twin { data: Some("hello"), ..twin("GET", &[], Wanted::Either("GET / a hello")) },
        // Names that a service may take for others are left out.
        with_data(&[("transfer_encoding", "chunked")], "hello", HELLO),
        with_data(&[("content_length", "3")], "hello", HELLO),
        with_data(&[("expect", "100-continue")], "hello", HELLO),
    ]);
    twins
}

pub(crate) fn paths() -> Vec<Twin> {
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
    let mut twins: Vec<Twin> =
        bad.iter().map(|path| changed(":path", Some(path), Wanted::Refused)).collect();
    twins.extend([
        changed(":path", None, Wanted::Refused),
        changed(":path", Some("/x?y"), Wanted::Served("GET /x?y a")),
        changed(":path", Some("/%0d%0aX:y"), Wanted::Served("GET /%0D%0AX:y a")),
    ]);
    twins
}

pub(crate) fn methods() -> Vec<Twin> {
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
    let mut twins: Vec<Twin> =
        bad.iter().map(|method| twin(method, &[], Wanted::Refused)).collect();
    twins.extend([
        changed(":method", None, Wanted::Refused),
        twin("get", &[], Wanted::Refused),
        twin("purge", &[], Wanted::Served("purge / a")),
        twin("M-SEARCH", &[], Wanted::Served("M-SEARCH / a")),
        // A CONNECT has neither scheme nor path (RFC 9113, section 8.5).
        twin("CONNECT", &[], Wanted::Refused),
        twin("CONNECT", &[(":protocol", "x\r\ny: z")], Wanted::Refused),
        twin("CONNECT", &[(":protocol", "connect-udp")], Wanted::Refused),
        twin("TRACE", &[], Wanted::Refused),
    ]);
    twins
}

pub(crate) fn authorities() -> Vec<Twin> {
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
    let mut twins: Vec<Twin> =
        bad.iter().map(|host| changed(":authority", Some(host), Wanted::Refused)).collect();
    let by_host = |hosts: &[&str], wanted: Wanted| {
        let mut twin = changed(":authority", None, wanted);
        twin.fields.extend(hosts.iter().map(|host| ("host".to_owned(), (*host).to_owned())));
        twin
    };
    let twice = |host: &str, wanted: Wanted| twin("GET", &[("host", host)], wanted);
    twins.extend([
        by_host(&[], Wanted::Refused),
        by_host(&["b"], Wanted::Served("GET / b")),
        by_host(&["b", "b"], Wanted::Refused),
        by_host(&["b", "c"], Wanted::Refused),
        by_host(&["u@b"], Wanted::Refused),
        by_host(&["b\r\nX: y"], Wanted::Refused),
        by_host(&[""], Wanted::Refused),
        twice("a", PLAIN),
        twice("A", PLAIN),
        twice("b", Wanted::Refused),
        twice("", Wanted::Refused),
        twice("a:80", Wanted::Refused),
        twice("a, b", Wanted::Refused),
        changed(":authority", Some("[::1]:80"), Wanted::Served("GET / [::1]:80")),
    ]);
    twins
}

/// Fields that begin with a colon where they must not, and what the scheme may be.
pub(crate) fn pseudo() -> Vec<Twin> {
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
    let mut twins: Vec<Twin> =
        more.iter().map(|field| twin("GET", &[*field], Wanted::Refused)).collect();
    let schemes = ["ht tp", "http://b/x?", "http\r\nX: y", "http\0"];
    twins.extend(schemes.iter().map(|scheme| changed(":scheme", Some(scheme), Wanted::Refused)));
    twins.push(changed(":scheme", None, Wanted::Refused));
    twins.push(changed(":scheme", Some("https"), PLAIN));
    let mut late = changed(":path", None, Wanted::Refused);
    late.fields.extend(owned(&[("x", "y"), (":path", "/")]));
    twins.push(late);
    twins
}

pub(crate) fn trailers() -> Vec<Twin> {
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
    // Left out, or the whole of it refused.
    let left_out = [
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
    let either = Wanted::Either("POST / a hello");
    let refused = bad.iter().map(|trailer| with_trailer(*trailer, Wanted::Refused));
    let other = left_out.iter().map(|trailer| with_trailer(*trailer, either));
    refused.chain(other).chain([with_trailer(("x", "y"), HELLO)]).collect()
}

/// Trailers that no service must take for fields of a head (RFC 9110, section 6.5.1).
pub(crate) fn misplaced() -> Vec<Twin> {
    let either = Wanted::Either("POST / a hello");
    ["content-length", "host", "authorization", "content-type", "trailer", "expect", "range"]
        .iter()
        .map(|name| with_trailer((name, "5"), either))
        .collect()
}

pub(crate) fn claims() -> Vec<Twin> {
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
    .map(|name| twin("GET", &[(name, "forged"), (name, "forged")], PLAIN))
    .collect()
}
