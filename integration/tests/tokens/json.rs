//! Headers and claims that are not valid JSON (RFC 8259), or that JSON parsers read in different
//! ways.

use crate::front::{TokenCase, TokenFront, case};
use serde_json::json;

use crate::issuer::{AUDIENCE, ISSUER, TokenIssuer, appended, claims, now};

/// An array nested this many levels deep.
pub(crate) fn nested(levels: usize) -> String {
    format!("{}{}", "[".repeat(levels), "]".repeat(levels))
}

/// Invalid replacements of a JSON object, and invalid additions to it.
fn malformed(object: &str) -> Vec<(&'static str, Vec<u8>)> {
    let with = |json: &str| appended(object, "x", json).into_bytes();
    let inner = &object[1..object.len() - 1];
    let utf_16: Vec<u8> = object.encode_utf16().flat_map(u16::to_be_bytes).collect();
    vec![
        ("garbage at the end", format!("{object}x").into()),
        ("a brace at the end", format!("{object}}}").into()),
        ("another object at the end", format!("{object}{object}").into()),
        ("another object on the next line", format!("{object}\n{object}").into()),
        ("a NUL at the end", format!("{object}\0").into()),
        ("a byte order mark", format!("\u{feff}{object}").into()),
        ("a comment at the end", format!("{object}// x").into()),
        ("a comment at the start", format!("/* x */{object}").into()),
        ("a comment inside", format!("{{/* x */{inner}}}").into()),
        ("a comma at the end", format!("{{{inner},}}").into()),
        ("a comma at the start", format!("{{,{inner}}}").into()),
        ("no closing brace", format!("{{{inner}").into()),
        ("no opening brace", format!("{inner}}}").into()),
        ("single quotes", object.replace('"', "'").into()),
        (
            "names without quotes",
            object.replace("\"kid\":", "kid:").replace("\"exp\":", "exp:").into(),
        ),
        ("NaN", with("NaN")),
        ("Infinity", with("Infinity")),
        ("a number with a plus", with("+1")),
        ("a number with a leading zero", with("01")),
        ("a hexadecimal number", with("0x10")),
        ("a number that ends with a point", with("1.")),
        ("undefined", with("undefined")),
        ("True", with("True")),
        ("an invalid escape", with("\"\\x41\"")),
        ("a line break in a string", with("\"a\nb\"")),
        ("a NUL in a string", with("\"a\0b\"")),
        ("UTF-16", utf_16),
        ("an array", format!("[{object}]").into()),
        ("an array of members", format!("[{inner}]").into()),
        ("an empty object", "{}".into()),
        ("an empty array", "[]".into()),
        ("null", "null".into()),
        ("a number", "1".into()),
        ("true", "true".into()),
        ("a string", "\"x\"".into()),
        ("an object in a string", json!(object).to_string().into()),
        ("white space", " ".into()),
        ("20000 levels", with(&nested(20_000))),
        ("20000 unclosed levels", with(&"[".repeat(20_000))),
        ("1000 unclosed objects", with(&"{\"a\":".repeat(1000))),
    ]
}

/// A JSON object with a string of invalid UTF-8 (RFC 3629, sections 3 and 10).
pub(crate) fn invalid_utf8(object: &str) -> [(&'static str, Vec<u8>); 4] {
    let with = |bytes: &[u8]| {
        let around = appended(object, "x", "\"?\"");
        let (before, behind) = around.rsplit_once('?').expect("the object has the placeholder");
        [before.as_bytes(), bytes, behind.as_bytes()].concat()
    };
    [
        ("invalid UTF-8", with(&[0xff])),
        ("truncated UTF-8", with(&[0xe2, 0x82])),
        ("overlong UTF-8", with(&[0xc0, 0xaf])),
        ("a surrogate in UTF-8", with(&[0xed, 0xa0, 0x80])),
    ]
}

#[test]
fn token_header_that_is_not_a_json_object_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let header = key.header().to_string();
    let malformed = malformed(&header).into_iter().chain(invalid_utf8(&header));
    let cases: Vec<TokenCase> =
        malformed.map(|(name, bytes)| case(name, key.headed(bytes))).collect();
    TokenFront::of(&issuer).assert_rejected(&cases);
}

#[test]
fn claims_that_are_not_a_json_object_are_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let payload = claims().to_string();
    let cases: Vec<TokenCase> = malformed(&payload)
        .into_iter()
        .map(|(name, bytes)| case(name, key.claiming(bytes)))
        .collect();
    TokenFront::of(&issuer).assert_rejected(&cases);
}

/// Invalid values inside an otherwise valid object.
pub(crate) fn malformed_inside() -> [(&'static str, String); 5] {
    let objects = format!("{}1{}", "{\"a\":".repeat(1500), "}".repeat(1500));
    [
        ("5500 levels", nested(5500)),
        ("1500 objects", objects),
        ("a lone high surrogate", "\"\\ud800\"".to_owned()),
        ("a lone low surrogate", "\"\\udc00\"".to_owned()),
        ("surrogates in the wrong order", "\"\\udc00\\ud800\"".to_owned()),
    ]
}

#[test]
fn deeply_nested_json_and_lone_surrogates_are_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let mut cases: Vec<TokenCase> = malformed_inside()
        .map(|(name, json)| case(name, key.headed(appended(&key.header().to_string(), "x", &json))))
        .into();
    let claims = appended(&claims().to_string(), "\\ud800", "1");
    cases.push(case("a lone surrogate in the name of a claim", key.claiming(claims)));
    let header = appended(&key.header().to_string(), "\\ud800", "1");
    cases.push(case("a lone surrogate in the name of a member", key.headed(header)));
    TokenFront::of(&issuer).assert_rejected(&cases);
}

#[test]
fn json_array_instead_of_an_object_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let issuer_name = ISSUER;
    let us = AUDIENCE;
    let end = now() + 3600;
    TokenFront::of(&issuer).assert_rejected(&[
        case("claims as an array", key.claiming(json!(["visitor", end, 0]).to_string())),
        case(
            "claims as an array in another order",
            key.claiming(json!([end, 0, "visitor", issuer_name, us]).to_string()),
        ),
        case("a header as an array", key.headed(json!(["JWT", "ES256"]).to_string())),
        case(
            "a header as an array of all members",
            key.headed(json!(["JWT", "ES256", null, null, null, "key-ES256"]).to_string()),
        ),
    ]);
}
