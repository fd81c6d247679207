//! Where a token stands in a request, and how long it may be.

use serde_json::json;
use weft_integration::http1::Http1Client;
use weft_integration::http2::{self, request};
use weft_integration::origin_server::OriginServer;
use weft_integration::single_sidecar::UpstreamHttp;

use crate::front::{Front, INVALID, MISSING, bearer, case, wanting};
use crate::issuer::{Issuer, Key, claims_saying, unsigned};

#[test]
fn a_token_elsewhere_is_none() {
    let issuer = Issuer::new();
    let (front, token) = (Front::of(&issuer), issuer.key("ES256").good());
    front.refuses_lines(
        MISSING,
        &[
            case("nothing", ""),
            case("an empty field", "authorization:\r\n"),
            case("Basic", "authorization: Basic dXNlcjpwYXNzd29yZA==\r\n"),
            case("Basic with a token", format!("authorization: Basic {token}\r\n")),
            case("Digest", "authorization: Digest username=\"a\"\r\n"),
            case("another scheme", format!("authorization: JWT {token}\r\n")),
            case("a scheme that begins so", format!("authorization: Bearerx {token}\r\n")),
            case("no scheme", format!("authorization: {token}\r\n")),
            case("a colon behind the scheme", format!("authorization: Bearer:{token}\r\n")),
            case("in proxy-authorization", format!("proxy-authorization: Bearer {token}\r\n")),
            case("in x-authorization", format!("x-authorization: Bearer {token}\r\n")),
            case(
                "in a cookie",
                format!("cookie: authorization=Bearer {token}; access_token={token}\r\n"),
            ),
        ],
    );
    let answer = front.ask(&format!("/refused/?access_token={token}"), "");
    assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some(MISSING)));
}

#[test]
fn a_field_holds_one_token() {
    let issuer = Issuer::new();
    let (front, token) = (Front::of(&issuer), issuer.key("ES256").good());
    let (line, bad) = (bearer(&token), bearer("e30.e30.e30"));
    front.refuses_lines(
        INVALID,
        &[
            case("the field twice", format!("{line}{line}")),
            case("the field twice, a bad one first", format!("{bad}{line}")),
            case("the field twice, a bad one last", format!("{line}{bad}")),
            case("the field twice, Basic first", format!("authorization: Basic eA==\r\n{line}")),
            case("the field twice, Basic last", format!("{line}authorization: Basic eA==\r\n")),
            case("the field twice, an empty one last", format!("{line}authorization:\r\n")),
            case("two with a comma", bearer(&format!("{token},{token}"))),
            case("two with a comma and a space", bearer(&format!("{token}, {token}"))),
            case("two with a comma and the scheme", bearer(&format!("{token}, Bearer {token}"))),
            case("two with a space", bearer(&format!("{token} {token}"))),
            case("two with a semicolon", bearer(&format!("{token};{token}"))),
            case("the scheme twice", bearer(&format!("Bearer {token}"))),
            case("as a parameter", bearer(&format!("token={token}"))),
            case("as a parameter in quotes", bearer(&format!("token=\"{token}\""))),
            case("a parameter behind", bearer(&format!("{token}, realm=x"))),
        ],
    );
}

#[test]
fn a_scheme_without_a_token_is_refused() {
    let front = Front::of(&Issuer::new());
    for line in
        ["authorization: Bearer\r\n", "authorization: Bearer \r\n", "authorization: bearer\t\r\n"]
    {
        let answer = front.ask("/refused/", line);
        let challenge = answer.header("www-authenticate").unwrap_or_default();
        assert_eq!(answer.status, 401, "{line:?}: {answer:?}");
        assert!([MISSING, INVALID].contains(&challenge), "{line:?}: {answer:?}");
    }
    front.refuses_lines(MISSING, &[]);
}

#[test]
fn a_token_in_trailers_comes_too_late() {
    let issuer = Issuer::new();
    let (front, token) = (Front::of(&issuer), issuer.key("ES256").good());
    let mut client = Http1Client::connect(front.alone.port);
    client.send(format!(
        "POST /refused/trailers HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\
         trailer: authorization\r\n\r\n4\r\nbody\r\n0\r\nauthorization: Bearer {token}\r\n\r\n"
    ));
    let answer = client.answer("POST");
    assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some(MISSING)));

    let mut late = request("POST", "/refused/trailers", &[]);
    late["body"] = json!("body");
    late["trailers"] = json!([("authorization", format!("Bearer {token}"))]);
    let answer = http2::ask_one(front.alone.port, late);
    assert_eq!((answer.status(), answer.header("www-authenticate")), (401, Some(MISSING)));
    front.refuses_lines(MISSING, &[]);
}

/// A good token of just so many bytes.
fn of_length(key: &Key, length: usize) -> String {
    // Base64 skips a length now and then, so the header has to help.
    let headers = (0..3).map(|spaces| key.header().to_string() + &" ".repeat(spaces));
    // Behind the text are a dot and a signature of 86 letters.
    let most = length * 3 / 4;
    let fitting = headers.flat_map(|header| {
        let payload = |letters| claims_saying("x", &format!("\"{}\"", "x".repeat(letters)));
        (most.saturating_sub(500)..most).map(move |letters| unsigned(&header, payload(letters)))
    });
    let mut fitting = fitting.filter(|text| text.len() + 87 == length);
    key.sealed(&fitting.next().expect("some payload leads to each length"))
}

#[test]
fn token_may_be_as_long_as_a_header() {
    let issuer = Issuer::new();
    let (front, key) = (Front::of(&issuer), issuer.key("ES256"));
    let check = |length| {
        let token = of_length(key, length);
        assert_eq!(token.len(), length);
        case(format!("{length} bytes"), token)
    };
    front.takes(&[check(8192), check(16 * 1024 + 1), check(32_000), check(60_000)]);
}

#[test]
fn grpc_is_asked_for_a_token_as_well() {
    let issuer = Issuer::new();
    let keys = json!({"keys": issuer.published()}).to_string();
    let (_origin, port) = OriginServer::start_http2();
    let alone = wanting(&keys, port, UpstreamHttp::Http2).start();
    let good = format!("Bearer {}", issuer.key("ES256").good());
    let forged = format!("Bearer {}", Key::ecdsa("ES256").good());
    let check = |fields: &[(&str, &str)], status: u16, grpc: Option<&str>| {
        let usual = [("content-type", "application/grpc"), ("te", "trailers")];
        let fields = [&usual[..], fields].concat();
        let answer = http2::ask_one(alone.port, request("POST", "/service/method", &fields));
        assert_eq!((answer.status(), answer.header("grpc-status")), (status, grpc), "{answer:?}");
    };
    check(&[("authorization", &good)], 200, None);
    check(&[("authorization", &good), ("authorization", &good)], 200, Some("16"));
    check(&[("authorization", &forged)], 200, Some("16"));
    check(&[("authorization", "Basic eA==")], 200, Some("16"));
    check(&[], 200, Some("16"));
}
