//! The end of a body: `content-length` and `transfer-encoding`, alone, together, repeated, and headers that resemble
//! them (RFC 9112, section 6).

use super::{Case, SMUGGLED, get, noncompliant, post, refused, served};

pub(super) fn cases() -> Vec<Case> {
    [lengths(), codings(), both(), lookalikes(), without_body()].concat()
}

fn lengths() -> Vec<Case> {
    let length = |value: &str| post(&format!("Content-Length:{value}"), "hello");
    let bad = |value: &str| noncompliant(length(value), "BadContentLength", "");
    let mut cases: Vec<Case> = [
        "", " ", " +5", " -5", " 5 5", " 5,5", " 5, 5", " 5,6", " 0x5", " 5.0", " 5e0", " five",
        " 5;", " \"5\"", " 5\u{a0}", " \u{665}", " ,5", " 5,", " 5\t5", " 05 a", " NaN", " 5_0",
        " ０",
    ]
    .into_iter()
    .map(bad)
    .collect();
    cases.extend([
        served(length(" 5"), "POST / a hello"),
        served(length("5"), "POST / a hello"),
        served(length("\t5\t "), "POST / a hello"),
        // Digits only: leading zeros do not change the number.
        served(length(" 0000000005"), "POST / a hello"),
        served(post("Content-Length: 0", ""), "POST / a"),
        served(post("X: y", ""), "POST / a"),
        refused(length(" 99999999999999999999"), 413),
        refused(length(" 18446744073709551616"), 413),
        refused(length(" 18446744073709551621"), 413),
        refused(length(" 9223372036854775808"), 413),
        refused(length(" 1099511627777"), 413),
        noncompliant(length(" 5\0"), "BadHeader", ""),
        noncompliant(length(" 5\u{b}"), "BadHeader", ""),
        noncompliant(length(" 5\r"), "BadHeader", ""),
        noncompliant(length(" \r5"), "BadHeader", ""),
    ]);
    let two = |first: &str, second: &str| {
        post(&format!("Content-Length: {first}\r\nContent-Length: {second}"), "hello")
    };
    cases.extend([
        noncompliant(two("5", "5"), "DuplicateContentLength", "POST / a hello"),
        noncompliant(two("5", "05"), "DuplicateContentLength", "POST / a hello"),
        noncompliant(two("5", "6"), "MultipleContentLength", ""),
        noncompliant(two("5", "0"), "MultipleContentLength", ""),
        noncompliant(two("0", "5"), "MultipleContentLength", ""),
        noncompliant(two("5", ""), "BadContentLength", ""),
        noncompliant(two("5", "5, 5"), "BadContentLength", ""),
        noncompliant(
            post("content-length: 5\r\nX: y\r\nCONTENT-LENGTH: 5", "hello"),
            "DuplicateContentLength",
            "POST / a hello",
        ),
    ]);
    cases
}

/// Some parsers read the coding of all these as chunked.
fn codings() -> Vec<Case> {
    let coded =
        |value: &str| post(&format!("Transfer-Encoding:{value}"), &format!("0\r\n\r\n{SMUGGLED}"));
    let complete =
        |value: &str| post(&format!("Transfer-Encoding:{value}"), "5\r\nhello\r\n0\r\n\r\n");
    let bad = |value: &str| noncompliant(coded(value), "BadTransferEncoding", "");
    let twice = |value: &str| noncompliant(coded(value), "MultipleTransferEncodingChunked", "");
    let mut cases: Vec<Case> = [
        " xchunked",
        " chunkedx",
        " chunk",
        " chunke",
        " \"chunked\"",
        " 'chunked'",
        " chunked;q=1",
        " chunked ;",
        " chunked;",
        " identity",
        " identity, chunked",
        " chunked, identity",
        " cow",
        " cow, chunked",
        " chunked, cow",
        " chunked chunked",
        " x chunked",
        " {chunked}",
        " chunKed\u{212a}",
        " \u{a0}chunked",
        " chunked\u{a0}",
        " trailers",
        " chunked=1",
        " http/1.1",
        " gzip;q=1, chunked",
    ]
    .into_iter()
    .map(bad)
    .collect();
    cases.extend([
        served(complete(" chunked"), "POST / a hello"),
        served(complete("chunked"), "POST / a hello"),
        served(complete(" Chunked"), "POST / a hello"),
        served(complete("\tCHUNKED \t"), "POST / a hello"),
        twice(" chunked, chunked"),
        twice(" chunked,chunked"),
        twice(" chunked\r\nTransfer-Encoding: chunked"),
        twice(" chunked, gzip, chunked"),
        noncompliant(coded(" chunked\r\nTransfer-Encoding: identity"), "BadTransferEncoding", ""),
        noncompliant(coded(" identity\r\nTransfer-Encoding: chunked"), "BadTransferEncoding", ""),
        noncompliant(coded(" chunked\r\nTransfer-Encoding: x"), "BadTransferEncoding", ""),
        noncompliant(coded(" chunked\r\nTransfer-encoding: cow"), "BadTransferEncoding", ""),
        refused(coded(" gzip, chunked"), 501),
        refused(coded(" gzip"), 501),
        refused(coded(" chunked, gzip"), 501),
        refused(coded(" deflate, chunked"), 501),
        refused(coded(" x-gzip"), 501),
        noncompliant(coded(" \u{b}chunked"), "BadHeader", ""),
        noncompliant(coded(" \u{c}chunked"), "BadHeader", ""),
        noncompliant(coded(" chunked\0"), "BadHeader", ""),
        noncompliant(coded(" chunked\u{7f}"), "BadHeader", ""),
        noncompliant(coded(" \rchunked"), "BadHeader", ""),
        noncompliant(coded("\r\n chunked"), "MultilineHeader", ""),
        noncompliant(coded("\r\n\tchunked"), "MultilineHeader", ""),
        noncompliant(coded(" chunked\r\n ,identity"), "MultilineHeader", ""),
    ]);
    cases
}

/// Both framing headers: CL.TE and TE.CL smuggling and variants.
fn both() -> Vec<Case> {
    let chunks = "5\r\nhello\r\n0\r\n\r\n";
    let short = |headers: &str| post(headers, &format!("{chunks}{SMUGGLED}"));
    let both = "BothTeClPresent";
    vec![
        noncompliant(
            short("Content-Length: 4\r\nTransfer-Encoding: chunked"),
            both,
            "POST / a hello",
        ),
        noncompliant(
            short("Content-Length: 50\r\nTransfer-Encoding: chunked"),
            both,
            "POST / a hello",
        ),
        noncompliant(
            short("Content-Length: 0\r\nTransfer-Encoding: chunked"),
            both,
            "POST / a hello",
        ),
        noncompliant(
            short("Transfer-Encoding: chunked\r\nContent-Length: 15"),
            both,
            "POST / a hello",
        ),
        noncompliant(
            short("transfer-encoding: CHUNKED\r\nCONTENT-LENGTH: 15"),
            both,
            "POST / a hello",
        ),
        noncompliant(
            post(
                "Content-Length: 6\r\nTransfer-Encoding: chunked",
                &format!("0\r\n\r\n{SMUGGLED}"),
            ),
            both,
            "POST / a",
        ),
        noncompliant(
            short("Content-Length: x\r\nTransfer-Encoding: chunked"),
            "BadContentLength",
            "",
        ),
        noncompliant(
            short("Content-Length: 4\r\nTransfer-Encoding: xchunked"),
            "BadTransferEncoding",
            "",
        ),
        noncompliant(
            short("Content-Length: 4\r\nTransfer-Encoding: identity"),
            "BadTransferEncoding",
            "",
        ),
        noncompliant(
            short("Content-Length: 4\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"),
            "MultipleContentLength",
            "",
        ),
        refused(short("Content-Length: 4\r\nTransfer-Encoding: gzip, chunked"), 501),
        refused(short("Content-Length: 99999999999999999999\r\nTransfer-Encoding: chunked"), 413),
    ]
}

/// Names that some services treat as the framing headers that they resemble.
fn lookalikes() -> Vec<Case> {
    let sidecar = |headers: &str| noncompliant(post(headers, ""), "SuspiciousHeader", "POST / a");
    let with_framing = |headers: &str| {
        let body = format!("0\r\n\r\n{SMUGGLED}");
        noncompliant(post(headers, &body), "SuspiciousTeClPresent", "")
    };
    vec![
        sidecar("Transfer_Encoding: chunked"),
        sidecar("Content_Length: 5"),
        sidecar("TRANSFER.ENCODING: chunked"),
        sidecar("Content.Length: 5"),
        sidecar("TransferEncoding: chunked"),
        sidecar("ContentLength: 5"),
        sidecar("Transfer--Encoding: chunked"),
        sidecar("Content-Length-: 5"),
        sidecar("Transfer~Encoding: chunked"),
        sidecar("-Content-Length: 5"),
        sidecar("_Transfer-Encoding: chunked"),
        with_framing("Content-Length: 5\r\nTransfer_Encoding: chunked"),
        with_framing("Transfer-Encoding: chunked\r\nContent_Length: 5"),
        with_framing("Content-Length: 5\r\nTransfer.Encoding: chunked"),
        with_framing("Content-Length: 5\r\nContent_Length: 10"),
        with_framing("Transfer_Encoding: chunked\r\nTransfer-Encoding: chunked"),
        with_framing("Content-Length: 5\r\ntransfer-encoding-: chunked"),
        noncompliant(post("Transfer-Encoding : chunked", "0\r\n\r\n"), "BadHeader", ""),
        noncompliant(post("Transfer-Encoding\t: chunked", "0\r\n\r\n"), "BadHeader", ""),
        noncompliant(post("Transfer Encoding: chunked", "0\r\n\r\n"), "BadHeader", ""),
        noncompliant(post("Transfer-Encoding\u{b}: chunked", "0\r\n\r\n"), "BadHeader", ""),
        noncompliant(post("Content-Length : 5", "hello"), "BadHeader", ""),
        noncompliant(post("Content Length: 5", "hello"), "BadHeader", ""),
        noncompliant(post(" Content-Length: 5", "hello"), "MultilineHeader", ""),
        noncompliant(post("X: y\r\n Content-Length: 5", "hello"), "MultilineHeader", ""),
        noncompliant(
            post("X: y\r\n\tTransfer-Encoding: chunked", "0\r\n\r\n"),
            "MultilineHeader",
            "",
        ),
        noncompliant(post("\0Content-Length: 5", "hello"), "BadHeader", ""),
        noncompliant(post("Content-Length\0: 5", "hello"), "BadHeader", ""),
        noncompliant(post("Transfer-Encoding chunked", "0\r\n\r\n"), "MissingHeaderColon", ""),
        noncompliant(post("Content-Length=5", "hello"), "MissingHeaderColon", ""),
        noncompliant(post("\u{fb01}Content-Length: 5", "hello"), "BadHeader", ""),
        noncompliant(post("X: y\rTransfer-Encoding: chunked", "0\r\n\r\n"), "BadHeader", ""),
        served(post("X: \"\\\"Transfer-Encoding: chunked\"", ""), "POST / a"),
        served(post("X-Content-Length: 5", ""), "POST / a"),
        served(post("Content-Lengths: 5", ""), "POST / a"),
    ]
}

/// CL.0 smuggling and variants: methods for which many services do not read a body.
fn without_body() -> Vec<Case> {
    let with = |method: &str, headers: &str, body: &str| {
        format!("{method} / HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n{body}")
    };
    let length = "UndefinedContentLengthSemantics";
    let coding = "UndefinedTransferEncodingSemantics";
    let chunks = "5\r\nhello\r\n0\r\n\r\n";
    vec![
        noncompliant(get("Content-Length: 0"), "GetHeadZeroContentLength", "GET / a"),
        noncompliant(with("HEAD", "Content-Length: 0", ""), "GetHeadZeroContentLength", "HEAD / a"),
        noncompliant(with("GET", "Content-Length: 5", "hello"), length, "GET / a hello"),
        noncompliant(with("HEAD", "Content-Length: 5", "hello"), length, "HEAD / a hello"),
        noncompliant(with("GET", "Transfer-Encoding: chunked", chunks), coding, "GET / a hello"),
        noncompliant(with("HEAD", "Transfer-Encoding: chunked", chunks), coding, "HEAD / a hello"),
        noncompliant(with("GET", "Content-Length: x", SMUGGLED), "BadContentLength", ""),
        noncompliant(with("GET", "Transfer-Encoding: x", SMUGGLED), "BadTransferEncoding", ""),
        served(with("DELETE", "Content-Length: 5", "hello"), "DELETE / a hello"),
        served(with("OPTIONS", "Content-Length: 5", "hello"), "OPTIONS / a hello"),
        served(with("PURGE", "Transfer-Encoding: chunked", chunks), "PURGE / a hello"),
        noncompliant(
            with("GET", &format!("Content-Length: {}", SMUGGLED.len()), SMUGGLED),
            length,
            "GET / a GET /smuggled HTTP/1.1\r\nHost: a",
        ),
        noncompliant(
            with("GET", "Content-Length: 5\r\nTransfer-Encoding: chunked", chunks),
            "BothTeClPresent",
            "GET / a hello",
        ),
    ]
}
