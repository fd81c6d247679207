//! Where a body ends: `content-length` and `transfer-encoding`, alone, together, twice, and what looks
//! like them (RFC 9112, section 6).

use super::{Case, SMUGGLED, departs, get, post, refused, served};

pub(super) fn cases() -> Vec<Case> {
    [lengths(), codings(), both(), lookalikes(), without_body()].concat()
}

fn lengths() -> Vec<Case> {
    let length = |value: &str| post(&format!("Content-Length:{value}"), "hello");
    let bad = |value: &str| departs(length(value), "BadContentLength", "");
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
        // All digits: the number has one meaning, however it is written.
        served(length(" 0000000005"), "POST / a hello"),
        served(post("Content-Length: 0", ""), "POST / a"),
        served(post("X: y", ""), "POST / a"),
        refused(length(" 99999999999999999999"), 413),
        refused(length(" 18446744073709551616"), 413),
        refused(length(" 18446744073709551621"), 413),
        refused(length(" 9223372036854775808"), 413),
        refused(length(" 1099511627777"), 413),
        departs(length(" 5\0"), "BadHeader", ""),
        departs(length(" 5\u{b}"), "BadHeader", ""),
        departs(length(" 5\r"), "BadHeader", ""),
        departs(length(" \r5"), "BadHeader", ""),
    ]);
    let two = |first: &str, second: &str| {
        post(&format!("Content-Length: {first}\r\nContent-Length: {second}"), "hello")
    };
    cases.extend([
        departs(two("5", "5"), "DuplicateContentLength", "POST / a hello"),
        departs(two("5", "05"), "DuplicateContentLength", "POST / a hello"),
        departs(two("5", "6"), "MultipleContentLength", ""),
        departs(two("5", "0"), "MultipleContentLength", ""),
        departs(two("0", "5"), "MultipleContentLength", ""),
        departs(two("5", ""), "BadContentLength", ""),
        departs(two("5", "5, 5"), "BadContentLength", ""),
        departs(
            post("content-length: 5\r\nX: y\r\nCONTENT-LENGTH: 5", "hello"),
            "DuplicateContentLength",
            "POST / a hello",
        ),
    ]);
    cases
}

/// The coding of all these is chunked for somebody.
fn codings() -> Vec<Case> {
    let coded =
        |value: &str| post(&format!("Transfer-Encoding:{value}"), &format!("0\r\n\r\n{SMUGGLED}"));
    let whole =
        |value: &str| post(&format!("Transfer-Encoding:{value}"), "5\r\nhello\r\n0\r\n\r\n");
    let bad = |value: &str| departs(coded(value), "BadTransferEncoding", "");
    let twice = |value: &str| departs(coded(value), "MultipleTransferEncodingChunked", "");
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
        served(whole(" chunked"), "POST / a hello"),
        served(whole("chunked"), "POST / a hello"),
        served(whole(" Chunked"), "POST / a hello"),
        served(whole("\tCHUNKED \t"), "POST / a hello"),
        twice(" chunked, chunked"),
        twice(" chunked,chunked"),
        twice(" chunked\r\nTransfer-Encoding: chunked"),
        twice(" chunked, gzip, chunked"),
        departs(coded(" chunked\r\nTransfer-Encoding: identity"), "BadTransferEncoding", ""),
        departs(coded(" identity\r\nTransfer-Encoding: chunked"), "BadTransferEncoding", ""),
        departs(coded(" chunked\r\nTransfer-Encoding: x"), "BadTransferEncoding", ""),
        departs(coded(" chunked\r\nTransfer-encoding: cow"), "BadTransferEncoding", ""),
        refused(coded(" gzip, chunked"), 501),
        refused(coded(" gzip"), 501),
        refused(coded(" chunked, gzip"), 501),
        refused(coded(" deflate, chunked"), 501),
        refused(coded(" x-gzip"), 501),
        departs(coded(" \u{b}chunked"), "BadHeader", ""),
        departs(coded(" \u{c}chunked"), "BadHeader", ""),
        departs(coded(" chunked\0"), "BadHeader", ""),
        departs(coded(" chunked\u{7f}"), "BadHeader", ""),
        departs(coded(" \rchunked"), "BadHeader", ""),
        departs(coded("\r\n chunked"), "MultilineHeader", ""),
        departs(coded("\r\n\tchunked"), "MultilineHeader", ""),
        departs(coded(" chunked\r\n ,identity"), "MultilineHeader", ""),
    ]);
    cases
}

/// CL.TE, TE.CL and what is between.
fn both() -> Vec<Case> {
    let chunks = "5\r\nhello\r\n0\r\n\r\n";
    let short = |fields: &str| post(fields, &format!("{chunks}{SMUGGLED}"));
    let both = "BothTeClPresent";
    vec![
        departs(short("Content-Length: 4\r\nTransfer-Encoding: chunked"), both, "POST / a hello"),
        departs(short("Content-Length: 50\r\nTransfer-Encoding: chunked"), both, "POST / a hello"),
        departs(short("Content-Length: 0\r\nTransfer-Encoding: chunked"), both, "POST / a hello"),
        departs(short("Transfer-Encoding: chunked\r\nContent-Length: 15"), both, "POST / a hello"),
        departs(short("transfer-encoding: CHUNKED\r\nCONTENT-LENGTH: 15"), both, "POST / a hello"),
        departs(
            post(
                "Content-Length: 6\r\nTransfer-Encoding: chunked",
                &format!("0\r\n\r\n{SMUGGLED}"),
            ),
            both,
            "POST / a",
        ),
        departs(short("Content-Length: x\r\nTransfer-Encoding: chunked"), "BadContentLength", ""),
        departs(
            short("Content-Length: 4\r\nTransfer-Encoding: xchunked"),
            "BadTransferEncoding",
            "",
        ),
        departs(
            short("Content-Length: 4\r\nTransfer-Encoding: identity"),
            "BadTransferEncoding",
            "",
        ),
        departs(
            short("Content-Length: 4\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"),
            "MultipleContentLength",
            "",
        ),
        refused(short("Content-Length: 4\r\nTransfer-Encoding: gzip, chunked"), 501),
        refused(short("Content-Length: 99999999999999999999\r\nTransfer-Encoding: chunked"), 413),
    ]
}

/// Names that some services take for the one they resemble.
fn lookalikes() -> Vec<Case> {
    let alone = |fields: &str| departs(post(fields, ""), "SuspiciousHeader", "POST / a");
    let beside = |fields: &str| {
        let body = format!("0\r\n\r\n{SMUGGLED}");
        departs(post(fields, &body), "SuspiciousTeClPresent", "")
    };
    vec![
        alone("Transfer_Encoding: chunked"),
        alone("Content_Length: 5"),
        alone("TRANSFER.ENCODING: chunked"),
        alone("Content.Length: 5"),
        alone("TransferEncoding: chunked"),
        alone("ContentLength: 5"),
        alone("Transfer--Encoding: chunked"),
        alone("Content-Length-: 5"),
        alone("Transfer~Encoding: chunked"),
        alone("-Content-Length: 5"),
        alone("_Transfer-Encoding: chunked"),
        beside("Content-Length: 5\r\nTransfer_Encoding: chunked"),
        beside("Transfer-Encoding: chunked\r\nContent_Length: 5"),
        beside("Content-Length: 5\r\nTransfer.Encoding: chunked"),
        beside("Content-Length: 5\r\nContent_Length: 10"),
        beside("Transfer_Encoding: chunked\r\nTransfer-Encoding: chunked"),
        beside("Content-Length: 5\r\ntransfer-encoding-: chunked"),
        departs(post("Transfer-Encoding : chunked", "0\r\n\r\n"), "BadHeader", ""),
        departs(post("Transfer-Encoding\t: chunked", "0\r\n\r\n"), "BadHeader", ""),
        departs(post("Transfer Encoding: chunked", "0\r\n\r\n"), "BadHeader", ""),
        departs(post("Transfer-Encoding\u{b}: chunked", "0\r\n\r\n"), "BadHeader", ""),
        departs(post("Content-Length : 5", "hello"), "BadHeader", ""),
        departs(post("Content Length: 5", "hello"), "BadHeader", ""),
        departs(post(" Content-Length: 5", "hello"), "MultilineHeader", ""),
        departs(post("X: y\r\n Content-Length: 5", "hello"), "MultilineHeader", ""),
        departs(post("X: y\r\n\tTransfer-Encoding: chunked", "0\r\n\r\n"), "MultilineHeader", ""),
        departs(post("\0Content-Length: 5", "hello"), "BadHeader", ""),
        departs(post("Content-Length\0: 5", "hello"), "BadHeader", ""),
        departs(post("Transfer-Encoding chunked", "0\r\n\r\n"), "MissingHeaderColon", ""),
        departs(post("Content-Length=5", "hello"), "MissingHeaderColon", ""),
        departs(post("\u{fb01}Content-Length: 5", "hello"), "BadHeader", ""),
        departs(post("X: y\rTransfer-Encoding: chunked", "0\r\n\r\n"), "BadHeader", ""),
        served(post("X: \"\\\"Transfer-Encoding: chunked\"", ""), "POST / a"),
        served(post("X-Content-Length: 5", ""), "POST / a"),
        served(post("Content-Lengths: 5", ""), "POST / a"),
    ]
}

/// CL.0 and its kin: methods of which nobody expects a body.
fn without_body() -> Vec<Case> {
    let with = |method: &str, fields: &str, body: &str| {
        format!("{method} / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n{body}")
    };
    let (length, coding) =
        ("UndefinedContentLengthSemantics", "UndefinedTransferEncodingSemantics");
    let chunks = "5\r\nhello\r\n0\r\n\r\n";
    vec![
        departs(get("Content-Length: 0"), "GetHeadZeroContentLength", "GET / a"),
        departs(with("HEAD", "Content-Length: 0", ""), "GetHeadZeroContentLength", "HEAD / a"),
        departs(with("GET", "Content-Length: 5", "hello"), length, "GET / a hello"),
        departs(with("HEAD", "Content-Length: 5", "hello"), length, "HEAD / a hello"),
        departs(with("GET", "Transfer-Encoding: chunked", chunks), coding, "GET / a hello"),
        departs(with("HEAD", "Transfer-Encoding: chunked", chunks), coding, "HEAD / a hello"),
        departs(with("GET", "Content-Length: x", SMUGGLED), "BadContentLength", ""),
        departs(with("GET", "Transfer-Encoding: x", SMUGGLED), "BadTransferEncoding", ""),
        served(with("DELETE", "Content-Length: 5", "hello"), "DELETE / a hello"),
        served(with("OPTIONS", "Content-Length: 5", "hello"), "OPTIONS / a hello"),
        served(with("PURGE", "Transfer-Encoding: chunked", chunks), "PURGE / a hello"),
        departs(
            with("GET", &format!("Content-Length: {}", SMUGGLED.len()), SMUGGLED),
            length,
            "GET / a GET /smuggled HTTP/1.1\r\nHost: a",
        ),
        departs(
            with("GET", "Content-Length: 5\r\nTransfer-Encoding: chunked", chunks),
            "BothTeClPresent",
            "GET / a hello",
        ),
    ]
}
