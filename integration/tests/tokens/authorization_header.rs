//! The position of a token in a request, and its maximum length.

use serde_json::json;
use weft_integration::http1::Http1Client;
use weft_integration::http2::{self, request};
use weft_integration::origin_server::OriginServer;
use weft_integration::single_sidecar::UpstreamHttp;

use crate::front::{INVALID, MISSING, TokenFront, bearer, case, requiring_token};
use crate::issuer::{SigningKey, TokenIssuer, claims_with, unsigned};

#[test]
fn token_outside_the_authorization_bearer_scheme_is_ignored() {
    let issuer = TokenIssuer::new();
    let front = TokenFront::of(&issuer);
    let token = issuer.key("ES256").good();
    front.assert_lines_rejected(
        MISSING,
        &[
            case("nothing", ""),
            case("an empty header", "authorization:\r\n"),
            case("Basic", "authorization: Basic dXNlcjpwYXNzd29yZA==\r\n"),
            case("Basic with a token", format!("authorization: Basic {token}\r\n")),
            case("Digest", "authorization: Digest username=\"a\"\r\n"),
            case("another scheme", format!("authorization: JWT {token}\r\n")),
            case("a scheme that begins with Bearer", format!("authorization: Bearerx {token}\r\n")),
            case("no scheme", format!("authorization: {token}\r\n")),
            case("a colon after the scheme", format!("authorization: Bearer:{token}\r\n")),
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
fn authorization_with_several_values_is_rejected() {
    let issuer = TokenIssuer::new();
    let front = TokenFront::of(&issuer);
    let token = issuer.key("ES256").good();
    let line = bearer(&token);
    let bad = bearer("e30.e30.e30");
    front.assert_lines_rejected(
        INVALID,
        &[
            case("the header twice", format!("{line}{line}")),
            case("the header twice, an invalid token first", format!("{bad}{line}")),
            case("the header twice, an invalid token last", format!("{line}{bad}")),
            case("the header twice, Basic first", format!("authorization: Basic eA==\r\n{line}")),
            case("the header twice, Basic last", format!("{line}authorization: Basic eA==\r\n")),
            case("the header twice, an empty one last", format!("{line}authorization:\r\n")),
            case("two tokens separated by a comma", bearer(&format!("{token},{token}"))),
            case(
                "two tokens separated by a comma and a space",
                bearer(&format!("{token}, {token}")),
            ),
            case(
                "two tokens with schemes, separated by a comma",
                bearer(&format!("{token}, Bearer {token}")),
            ),
            case("two tokens separated by a space", bearer(&format!("{token} {token}"))),
            case("two tokens separated by a semicolon", bearer(&format!("{token};{token}"))),
            case("the scheme twice", bearer(&format!("Bearer {token}"))),
            case("as a parameter", bearer(&format!("token={token}"))),
            case("as a parameter in quotes", bearer(&format!("token=\"{token}\""))),
            case("a parameter after the token", bearer(&format!("{token}, realm=x"))),
        ],
    );
}

#[test]
fn bearer_scheme_without_token_is_rejected() {
    let front = TokenFront::of(&TokenIssuer::new());
    for line in
        ["authorization: Bearer\r\n", "authorization: Bearer \r\n", "authorization: bearer\t\r\n"]
    {
        let answer = front.ask("/refused/", line);
        let challenge = answer.header("www-authenticate").unwrap_or_default();
        assert_eq!(answer.status, 401, "{line:?}: {answer:?}");
        assert!([MISSING, INVALID].contains(&challenge), "{line:?}: {answer:?}");
    }
    front.assert_lines_rejected(MISSING, &[]);
}

#[test]
fn token_in_trailers_is_ignored() {
    let issuer = TokenIssuer::new();
    let front = TokenFront::of(&issuer);
    let token = issuer.key("ES256").good();
    let mut client = Http1Client::connect(front.sidecar.port);
    client.send(format!(
        "POST /refused/trailers HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\
         trailer: authorization\r\n\r\n4\r\nbody\r\n0\r\nauthorization: Bearer {token}\r\n\r\n"
    ));
    let answer = client.answer("POST");
    assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some(MISSING)));

    let mut late = request("POST", "/refused/trailers", &[]);
    late["body"] = json!("body");
    late["trailers"] = json!([("authorization", format!("Bearer {token}"))]);
    let answer = http2::ask_one(front.sidecar.port, late);
    assert_eq!((answer.status(), answer.header("www-authenticate")), (401, Some(MISSING)));
    front.assert_lines_rejected(MISSING, &[]);
}

/// A valid token of exactly this length.
fn of_length(key: &SigningKey, length: usize) -> String {
    // Base64 skips some lengths, so the header length varies too.
    let headers = (0..3).map(|spaces| key.header().to_string() + &" ".repeat(spaces));
    // The text is followed by a dot and a signature of 86 characters.
    let most = length * 3 / 4;
    let fitting = headers.flat_map(|header| {
        let payload = |letters| claims_with("x", &format!("\"{}\"", "x".repeat(letters)));
        (most.saturating_sub(500)..most).map(move |letters| unsigned(&header, payload(letters)))
    });
    let mut fitting = fitting.filter(|text| text.len() + 87 == length);
    key.sealed(&fitting.next().expect("every length can be reached"))
}

#[test]
fn token_as_long_as_the_header_limit_is_accepted() {
    let issuer = TokenIssuer::new();
    let front = TokenFront::of(&issuer);
    let key = issuer.key("ES256");
    let check = |length| {
        let token = of_length(key, length);
        assert_eq!(token.len(), length);
        case(format!("{length} bytes"), token)
    };
    front.assert_accepted(&[check(8192), check(16 * 1024 + 1), check(32_000), check(60_000)]);
}

#[test]
fn grpc_call_needs_a_token_too() {
    let issuer = TokenIssuer::new();
    let keys = json!({"keys": issuer.published()}).to_string();
    let (_origin, port) = OriginServer::start_http2();
    let sidecar = requiring_token(&keys, port, UpstreamHttp::Http2).start();
    let good = format!("Bearer {}", issuer.key("ES256").good());
    let forged = format!("Bearer {}", SigningKey::ecdsa("ES256").good());
    let check = |fields: &[(&str, &str)], status: u16, grpc: Option<&str>| {
        let usual = [("content-type", "application/grpc"), ("te", "trailers")];
        let fields = [&usual[..], fields].concat();
        let answer = http2::ask_one(sidecar.port, request("POST", "/service/method", &fields));
        assert_eq!((answer.status(), answer.header("grpc-status")), (status, grpc), "{answer:?}");
    };
    check(&[("authorization", &good)], 200, None);
    check(&[("authorization", &good), ("authorization", &good)], 200, Some("16"));
    check(&[("authorization", &forged)], 200, Some("16"));
    check(&[("authorization", "Basic eA==")], 200, Some("16"));
    check(&[], 200, Some("16"));
}
