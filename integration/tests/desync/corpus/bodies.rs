//! Chunked bodies: sizes, extensions, line ends, trailers and truncation (RFC 9112, section 7.1).

use super::{Case, SMUGGLED, post, refused, served};

const HELLO: &str = "POST / a hello";

pub(super) fn cases() -> Vec<Case> {
    [sizes(), line_ends(), extensions(), trailers(), truncated()].concat()
}

fn chunked(body: &str) -> String {
    post("Transfer-Encoding: chunked", body)
}

fn good(body: &str) -> Case {
    served(chunked(body), HELLO)
}

fn bad(body: &str) -> Case {
    refused(chunked(&format!("{body}{SMUGGLED}")), 400)
}

fn sizes() -> Vec<Case> {
    let sized = |size: &str| format!("{size}\r\nhello\r\n0\r\n\r\n");
    let mut cases: Vec<Case> = [
        "+5",
        "-5",
        "0x5",
        "0X5",
        "5h",
        "h5",
        "x",
        "",
        " 5",
        "\t5",
        "5 5",
        "5,5",
        "5.0",
        "\"5\"",
        "5_",
        "_5",
        "\u{665}",
        "5\0",
        "\x005",
        "5\u{b}",
        "\u{b}5",
        "5=",
        "-0",
        "+0",
        "0x0",
        "10000000000000005",
        "fffffffffffffffff",
        "8000000000000000",
        "FFFFFFFFFFFFFFFF",
        "100000000000000000000000000000005",
        "0000000000000000000000000000000000005\u{7f}",
    ]
    .iter()
    .map(|size| bad(&sized(size)))
    .collect();
    cases.extend([
        good(&sized("05")),
        good(&sized("000000000005")),
        good("2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
        good("1\r\nh\r\n1\r\ne\r\n1\r\nl\r\n1\r\nl\r\n1\r\no\r\n000\r\n\r\n"),
        served(chunked("A\r\n0123456789\r\n0\r\n\r\n"), "POST / a 0123456789"),
        served(chunked("a\r\n0123456789\r\n0\r\n\r\n"), "POST / a 0123456789"),
        served(chunked("0\r\n\r\n"), "POST / a"),
        served(chunked("0000\r\n\r\n"), "POST / a"),
        served(chunked("7\r\n0\r\n\r\nGE\r\n0\r\n\r\n"), "POST / a 0\r\n\r\nGE"),
    ]);
    cases
}

/// A parser that accepts another line end finds other chunks.
fn line_ends() -> Vec<Case> {
    let mut cases: Vec<Case> = [
        "5\nhello\r\n0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhello\r\n0\n\r\n",
        "5\rhello\r\n0\r\n\r\n",
        "5\r\nhello\r0\r\n\r\n",
        "5\r\r\nhello\r\n0\r\n\r\n",
        "5\n\rhello\r\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhelloX\r\n0\r\n\r\n",
        "5\r\nhello\r\r0\r\n\r\n",
        "5\r\nhello\r\n\r\n0\r\n\r\n",
        "5\r\nhelloworld\r\n0\r\n\r\n",
        "4\r\nhello\r\n0\r\n\r\n",
        "\r\n5\r\nhello\r\n0\r\n\r\n",
        "\n5\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello\r\nX\r\n0\r\n\r\n",
        "5;\nhello\r\n0\r\n\r\n",
        "5;x\nhello\r\n0\r\n\r\n",
        "5;x=\"\n\"\r\nhello\r\n0\r\n\r\n",
        "5;x\rx\r\nhello\r\n0\r\n\r\n",
        "0\n\n",
        "0\r\r\n\r\n",
        "0\n\r\n",
        "2;\nxx\r\n4c\r\n0\r\n\r\n",
    ]
    .into_iter()
    .map(bad)
    .collect();
    // The size covers bytes beyond the body, into the next request.
    cases.push(bad("6\r\nhello\r\n0\r\n\r\n"));
    cases
}

/// Chunk extensions are accepted and removed.
fn extensions() -> Vec<Case> {
    let extended = |extension: &str| format!("5{extension}\r\nhello\r\n0\r\n\r\n");
    let long = format!(";x={}", "y".repeat(4200));
    let mut cases: Vec<Case> = [
        ";",
        ";x",
        ";x=y",
        "; x = y",
        ";x=\"y z\"",
        ";x;y;z",
        " ;x",
        "\t;x",
        " ",
        ";x=\"0\\\"\"",
        ";\u{e9}",
    ]
    .iter()
    .map(|extension| good(&extended(extension)))
    .collect();
    cases.extend([
        good("5\r\nhello\r\n0;x=y\r\n\r\n"),
        bad(&extended(&long)),
        bad(&extended(";x=\r\n\"")),
    ]);
    cases
}

fn trailers() -> Vec<Case> {
    let trailed = |trailer: &str| format!("5\r\nhello\r\n0\r\n{trailer}\r\n\r\n");
    let long = format!("x: {}", "y".repeat(70 * 1024));
    let many = "x: y\r\n".repeat(200);
    let mut cases: Vec<Case> = [
        "Content-Length: 5",
        "content-length: 0",
        "Transfer-Encoding: chunked",
        "TRANSFER-ENCODING: identity",
        "x: y\r\nContent-Length: 5",
        "x : y",
        " x: y",
        "x: y\r\n z",
        "x: y\0",
        "x\0: y",
        ": y",
        "x",
        "x: y\rz: a",
        "x y: z",
        "\u{e9}: y",
        "x: y\u{7f}",
        &long,
        &many,
    ]
    .iter()
    .map(|trailer| bad(&trailed(trailer)))
    .collect();
    cases.extend(
        ["x: y", "x:y", "x: y\r\nx: z", "x:", "grpc-status: 0", "x: \u{e9}"]
            .iter()
            .map(|trailer| good(&trailed(trailer))),
    );
    cases
}

/// Trailers that RFC 9110, section 6.5.1, forbids, except those that frame a message: the request is served without
/// them. The recorder reports a violation when one of them reaches the service.
pub(crate) fn forbidden_trailers() -> Vec<Case> {
    [
        "Host: b",
        "Connection: close",
        "Connection: keep-alive",
        "Keep-Alive: x",
        "Proxy-Connection: x",
        "Upgrade: websocket",
        "TE: trailers",
        "Trailer: x",
        "Authorization: Basic eDp5",
        "Proxy-Authorization: Basic eDp5",
        "Content-Type: x/y",
        "Expect: 100-continue",
        "Max-Forwards: 0",
        "Range: bytes=0-0",
        "Cache-Control: no-cache",
        "Content-Encoding: gzip",
        "Content-Range: bytes 0-0/1",
    ]
    .iter()
    .map(|trailer| good(&format!("5\r\nhello\r\n0\r\nx: y\r\n{trailer}\r\n\r\n")))
    .collect()
}

fn truncated() -> Vec<Case> {
    [
        post("Content-Length: 6", "hello"),
        post(&format!("Content-Length: {}", 1_u64 << 40), SMUGGLED),
        chunked("5\r\nhel"),
        chunked("5\r\nhello\r\n"),
        chunked("5\r\nhello\r\n0\r\n"),
        chunked("5\r\nhello\r\n0\r\nx: y\r\n"),
        chunked("5"),
        chunked("ffffffff\r\nhello\r\n0\r\n\r\n"),
        chunked("fffffffffff\r\nhello\r\n0\r\n\r\n"),
        chunked(""),
    ]
    .into_iter()
    .map(|bytes| Case { closes: true, ..refused(bytes, 400) })
    .collect()
}
