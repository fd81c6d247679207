//! Headers and claims that are no JSON (RFC 8259), or JSON of which two readers make two things.

use crate::front::{Case, Front, case};
use serde_json::json;

use crate::issuer::{AUDIENCE, ISSUER, Issuer, appended, claims, now};

/// An array in an array, so many times.
pub(crate) fn nested(levels: usize) -> String {
    format!("{}{}", "[".repeat(levels), "]".repeat(levels))
}

/// Texts in place of an object, and bytes that are no text.
fn spoilt(object: &str) -> Vec<(&'static str, Vec<u8>)> {
    let with = |json: &str| appended(object, "x", json).into_bytes();
    let inner = &object[1..object.len() - 1];
    let utf_16: Vec<u8> = object.encode_utf16().flat_map(u16::to_be_bytes).collect();
    vec![
        ("garbage behind", format!("{object}x").into()),
        ("a brace behind", format!("{object}}}").into()),
        ("another object behind", format!("{object}{object}").into()),
        ("another object on a line behind", format!("{object}\n{object}").into()),
        ("a NUL behind", format!("{object}\0").into()),
        ("a byte order mark", format!("\u{feff}{object}").into()),
        ("a comment behind", format!("{object}// x").into()),
        ("a comment before", format!("/* x */{object}").into()),
        ("a comment in it", format!("{{/* x */{inner}}}").into()),
        ("a comma at the end", format!("{{{inner},}}").into()),
        ("a comma at the start", format!("{{,{inner}}}").into()),
        ("no end", format!("{{{inner}").into()),
        ("no start", format!("{inner}}}").into()),
        ("single quotes", object.replace('"', "'").into()),
        (
            "names without quotes",
            object.replace("\"kid\":", "kid:").replace("\"exp\":", "exp:").into(),
        ),
        ("NaN", with("NaN")),
        ("Infinity", with("Infinity")),
        ("a number with a plus", with("+1")),
        ("a number with a zero before", with("01")),
        ("a number in another base", with("0x10")),
        ("a number without its end", with("1.")),
        ("undefined", with("undefined")),
        ("True", with("True")),
        ("an escape that is none", with("\"\\x41\"")),
        ("a line end in a text", with("\"a\nb\"")),
        ("a NUL in a text", with("\"a\0b\"")),
        ("UTF-16", utf_16),
        ("an array", format!("[{object}]").into()),
        ("an array of members", format!("[{inner}]").into()),
        ("an empty object", "{}".into()),
        ("an empty array", "[]".into()),
        ("null", "null".into()),
        ("a number", "1".into()),
        ("true", "true".into()),
        ("a text", "\"x\"".into()),
        ("an object in a text", json!(object).to_string().into()),
        ("white space", " ".into()),
        ("20000 levels", with(&nested(20_000))),
        ("20000 levels that are not closed", with(&"[".repeat(20_000))),
        ("1000 objects that are not closed", with(&"{\"a\":".repeat(1000))),
    ]
}

/// An object with a text of bytes that are none (RFC 3629, sections 3 and 10).
pub(crate) fn no_text(object: &str) -> [(&'static str, Vec<u8>); 4] {
    let with = |bytes: &[u8]| {
        let around = appended(object, "x", "\"?\"");
        let (before, behind) = around.rsplit_once('?').expect("it is there");
        [before.as_bytes(), bytes, behind.as_bytes()].concat()
    };
    [
        ("invalid UTF-8", with(&[0xff])),
        ("UTF-8 that breaks off", with(&[0xe2, 0x82])),
        ("UTF-8 that is too long", with(&[0xc0, 0xaf])),
        ("a surrogate in UTF-8", with(&[0xed, 0xa0, 0x80])),
    ]
}

#[test]
fn a_header_is_an_object() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let header = key.header().to_string();
    let spoilt = spoilt(&header).into_iter().chain(no_text(&header));
    let cases: Vec<Case> = spoilt.map(|(name, bytes)| case(name, key.headed(bytes))).collect();
    Front::of(&issuer).refuses(&cases);
}

#[test]
fn claims_are_an_object() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let payload = claims().to_string();
    let cases: Vec<Case> =
        spoilt(&payload).into_iter().map(|(name, bytes)| case(name, key.claiming(bytes))).collect();
    Front::of(&issuer).refuses(&cases);
}

/// What is wrong inside of an object that is well otherwise.
pub(crate) fn spoilt_inside() -> [(&'static str, String); 5] {
    let objects = format!("{}1{}", "{\"a\":".repeat(1500), "}".repeat(1500));
    [
        ("5500 levels", nested(5500)),
        ("1500 objects", objects),
        ("a high surrogate alone", "\"\\ud800\"".to_owned()),
        ("a low surrogate alone", "\"\\udc00\"".to_owned()),
        ("surrogates in the wrong order", "\"\\udc00\\ud800\"".to_owned()),
    ]
}

#[test]
fn what_is_nested_too_deep_or_is_half_a_character_is_no_json() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let mut cases: Vec<Case> = spoilt_inside()
        .map(|(name, json)| case(name, key.headed(appended(&key.header().to_string(), "x", &json))))
        .into();
    let claims = appended(&claims().to_string(), "\\ud800", "1");
    cases.push(case("a surrogate alone in the name of a claim", key.claiming(claims)));
    let header = appended(&key.header().to_string(), "\\ud800", "1");
    cases.push(case("a surrogate alone in the name of a member", key.headed(header)));
    Front::of(&issuer).refuses(&cases);
}

#[test]
fn members_are_not_told_by_their_places() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let (issuer_name, us, end) = (ISSUER, AUDIENCE, now() + 3600);
    Front::of(&issuer).refuses(&[
        case("claims by their names", key.claiming(json!(["visitor", end, 0]).to_string())),
        case(
            "claims in another order",
            key.claiming(json!([end, 0, "visitor", issuer_name, us]).to_string()),
        ),
        case("a header", key.headed(json!(["JWT", "ES256"]).to_string())),
        case(
            "a header with all there is",
            key.headed(json!(["JWT", "ES256", null, null, null, "key-ES256"]).to_string()),
        ),
    ]);
}
