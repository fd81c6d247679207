//! Token headers that carry a key, refer to a key of another party, or require unknown extensions.

use std::io::{BufReader, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use weft_integration::scripted_server::{ScriptedServer, read_head};

use crate::front::{TokenFront, case};
use crate::issuer::{SigningKey, TokenIssuer, appended, claims, encode, unsigned, without};

#[test]
fn key_embedded_in_a_token_is_not_used() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let stranger = SigningKey::ecdsa("ES256").with_member("kid", "stranger");
    let chain = json!([base64_of(&stranger.der)]);
    // Following a link would return the other party's keys.
    let visits = Arc::<AtomicUsize>::default();
    let counted = visits.clone();
    let keys = json!({"keys": [stranger.jwk]}).to_string();
    let home = ScriptedServer::start(move |stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        let mut reader = BufReader::new(stream);
        let length = keys.len();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{keys}");
        if read_head(&mut reader).is_some() {
            // A closed connection still counts as a visit.
            drop(reader.get_mut().write_all(answer.as_bytes()));
        }
    });
    let url = format!("http://127.0.0.1:{}/keys", home.port);
    let mut cases = Vec::new();
    for (name, member, value) in [
        ("nothing", "x", json!(1)),
        ("jwk", "jwk", stranger.jwk.clone()),
        ("jwk with the issuer's kid", "jwk", stranger_named(&stranger, key)),
        ("jku", "jku", json!(url)),
        ("jku of a file", "jku", json!("file:///etc/passwd")),
        ("x5u", "x5u", json!(url)),
        ("x5c", "x5c", chain),
        ("x5t", "x5t", json!(encode([1; 20]))),
        ("x5t#S256", "x5t#S256", json!(encode([1; 32]))),
    ] {
        let header = |base: &SigningKey| stranger.headed(base.header_with(member, value.clone()));
        let nameless = without(with(&stranger.header(), member, &value), "kid");
        cases.push(case(format!("{name} and its own kid"), header(&stranger)));
        cases.push(case(format!("{name} and the issuer's kid"), header(key)));
        cases.push(case(format!("{name} and no kid"), stranger.headed(nameless)));
    }
    TokenFront::of(&issuer).assert_rejected(&cases);
    assert_eq!(visits.load(Ordering::Relaxed), 0, "keys were fetched from the other party");
}

fn with(header: &Value, member: &str, value: &Value) -> Value {
    weft_integration::bootstrap::with(header.clone(), member, value.clone())
}

fn stranger_named(stranger: &SigningKey, key: &SigningKey) -> Value {
    with(&stranger.jwk, "kid", &key.jwk["kid"])
}

fn base64_of(der: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(der)
}

#[test]
fn kid_is_compared_literally_and_never_used_as_path_or_url() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let long = "k".repeat(10_000);
    let kids = [
        ("another's", json!("key-ES384")),
        ("unknown", json!("unknown")),
        ("empty", json!("")),
        ("in upper case", json!("KEY-ES256")),
        ("with a trailing space", json!("key-ES256 ")),
        ("a prefix of a kid", json!("key-ES25")),
        ("a path", json!("../../../../etc/passwd")),
        ("a path of an empty file", json!("/dev/null")),
        ("a path with a NUL", json!("key-ES256\u{0}.pem")),
        ("a NUL", json!("\u{0}")),
        ("SQL", json!("x' UNION SELECT 'key' --")),
        ("SQL that is always true", json!("' OR '1'='1")),
        ("a command", json!("key-ES256; reboot")),
        ("a command in back quotes", json!("`reboot`")),
        ("a URL", json!("http://127.0.0.1:9/keys")),
        ("a pattern", json!(".*")),
        ("a star", json!("*")),
        ("LDAP", json!("*)(uid=*")),
        ("a template", json!("{{7*7}}${jndi:ldap://127.0.0.1:9/}")),
        ("line breaks", json!("key-ES256\r\nx: y")),
        ("very long", json!(long)),
        ("an array", json!(["key-ES256"])),
        ("an object", json!({"kid": "key-ES256"})),
        ("a number", json!(0)),
        ("true", json!(true)),
    ];
    let cases: Vec<_> = kids
        .into_iter()
        .map(|(name, kid)| case(format!("kid is {name}"), key.headed(key.header_with("kid", kid))))
        .collect();
    TokenFront::of(&issuer).assert_rejected(&cases);
}

#[test]
fn token_with_unknown_crit_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let crit = |name: &str, value: Value| case(name, key.headed(key.header_with("crit", value)));
    let raw = claims().to_string();
    // RFC 7797: the signature covers the plain payload.
    let plain = with(&with(&key.header(), "b64", &json!(false)), "crit", &json!(["b64"]));
    let plainly = format!("{}.{raw}", encode(plain.to_string()));
    let silently = format!("{}.{raw}", encode(key.header_with("b64", false)));
    let signature = encode(key.signature(&plainly));
    TokenFront::of(&issuer).assert_rejected(&[
        crit("crit is only b64", json!(["b64"])),
        crit("crit is empty", json!([])),
        crit("crit is a claim", json!(["exp"])),
        crit("crit is a member of the header", json!(["alg"])),
        crit("crit is unknown", json!(["http://example.com/UNDEFINED"])),
        crit("crit is itself", json!(["crit"])),
        crit("crit is a string", json!("x")),
        crit("crit is the string b64", json!("b64")),
        crit("crit is true", json!(true)),
        crit("crit is false", json!(false)),
        crit("crit is a number", json!(0)),
        crit("crit is an object", json!({"b64": true})),
        crit("crit has a number", json!([1])),
        crit("crit has null", json!([null])),
        crit("crit has an empty array", json!([[]])),
        case(
            "crit with its member",
            key.headed(appended(&key.header_with("crit", json!(["x"])), "x", "1")),
        ),
        case(
            "crit twice, null last",
            key.headed(appended(&key.header_with("crit", json!(["x"])), "crit", "null")),
        ),
        case("crit is b64 and b64 is false", key.headed(plain.to_string())),
        case("b64 is false and the payload is plain", key.sealed(&plainly)),
        case("b64 is false but not critical, and the payload is plain", key.sealed(&silently)),
        case(
            "b64 is false and the signature of the plain payload",
            format!("{}.{signature}", unsigned(plain.to_string(), &raw)),
        ),
    ]);
}

#[test]
fn token_header_with_wrong_types_or_duplicates_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let member = |name: &str, value: Value| {
        let description = format!("{name} is {value}");
        case(description, key.headed(key.header_with(name, value)))
    };
    let twice = |name: &str, json: &str| {
        let header = appended(&key.header().to_string(), name, json);
        case(format!("{name} twice, then {json}"), key.headed(header))
    };
    TokenFront::of(&issuer).assert_rejected(&[
        member("typ", json!(1)),
        member("typ", json!(["JWT"])),
        member("typ", json!({})),
        twice("alg", "\"ES256\""),
        twice("alg", "\"none\""),
        twice("\\u0061lg", "\"none\""),
        twice("kid", "\"key-ES256\""),
        twice("kid", "\"unknown\""),
        twice("typ", "\"JWT\""),
        case(
            "alg twice, none first",
            key.headed(appended(r#"{"alg":"none","kid":"key-ES256"}"#, "alg", "\"ES256\"")),
        ),
        case(
            "kid twice, an unknown one first",
            key.headed(appended(r#"{"alg":"ES256","kid":"unknown"}"#, "kid", "\"key-ES256\"")),
        ),
    ]);
}
