//! Headers that bring a key along, that name a key of others' making, or that ask for what nobody
//! understands.

use std::io::{BufReader, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use weft_integration::scripted_server::{ScriptedServer, read_head};

use crate::front::{Front, case};
use crate::issuer::{Issuer, Key, appended, claims, encode, unsigned, without};

#[test]
fn a_key_that_a_token_brings_along_is_not_used() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let stranger = Key::ecdsa("ES256").saying("kid", "stranger");
    let chain = json!([base64_of(&stranger.der)]);
    // Whoever followed a link would find the stranger's keys there.
    let visits = Arc::<AtomicUsize>::default();
    let (counted, keys) = (visits.clone(), json!({"keys": [stranger.jwk]}).to_string());
    let home = ScriptedServer::start(move |stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        let mut reader = BufReader::new(stream);
        let length = keys.len();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{keys}");
        if read_head(&mut reader).is_some() {
            // Who hangs up has come all the same.
            drop(reader.get_mut().write_all(answer.as_bytes()));
        }
    });
    let url = format!("http://127.0.0.1:{}/keys", home.port);
    let mut cases = Vec::new();
    for (name, member, value) in [
        ("nothing", "x", json!(1)),
        ("jwk", "jwk", stranger.jwk.clone()),
        ("jwk with the kid of another", "jwk", stranger_named(&stranger, key)),
        ("jku", "jku", json!(url)),
        ("jku of a file", "jku", json!("file:///etc/passwd")),
        ("x5u", "x5u", json!(url)),
        ("x5c", "x5c", chain),
        ("x5t", "x5t", json!(encode([1; 20]))),
        ("x5t#S256", "x5t#S256", json!(encode([1; 32]))),
    ] {
        let header = |base: &Key| stranger.headed(base.header_with(member, value.clone()));
        let nameless = without(with(&stranger.header(), member, &value), "kid");
        cases.push(case(format!("{name} and its own kid"), header(&stranger)));
        cases.push(case(format!("{name} and the kid of another"), header(key)));
        cases.push(case(format!("{name} and no kid"), stranger.headed(nameless)));
    }
    Front::of(&issuer).refuses(&cases);
    assert_eq!(visits.load(Ordering::Relaxed), 0, "the stranger was asked for keys");
}

fn with(header: &Value, member: &str, value: &Value) -> Value {
    weft_integration::bootstrap::with(header.clone(), member, value.clone())
}

fn stranger_named(stranger: &Key, key: &Key) -> Value {
    with(&stranger.jwk, "kid", &key.jwk["kid"])
}

fn base64_of(der: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(der)
}

#[test]
fn a_kid_is_a_name_and_no_more() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let long = "k".repeat(10_000);
    let kids = [
        ("another's", json!("key-ES384")),
        ("nobody's", json!("nobody")),
        ("empty", json!("")),
        ("in upper case", json!("KEY-ES256")),
        ("with a space behind", json!("key-ES256 ")),
        ("the start of one", json!("key-ES25")),
        ("a path", json!("../../../../etc/passwd")),
        ("a path of nothing", json!("/dev/null")),
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
        ("line ends", json!("key-ES256\r\nx: y")),
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
    Front::of(&issuer).refuses(&cases);
}

#[test]
fn what_a_token_calls_critical_is_understood_or_refused() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let crit = |name: &str, value: Value| case(name, key.headed(key.header_with("crit", value)));
    let raw = claims().to_string();
    // RFC 7797: what is signed is the payload itself.
    let plain = with(&with(&key.header(), "b64", &json!(false)), "crit", &json!(["b64"]));
    let plainly = format!("{}.{raw}", encode(plain.to_string()));
    let silently = format!("{}.{raw}", encode(key.header_with("b64", false)));
    let signature = encode(key.signature(&plainly));
    Front::of(&issuer).refuses(&[
        crit("crit is b64 alone", json!(["b64"])),
        crit("crit is empty", json!([])),
        crit("crit is a claim", json!(["exp"])),
        crit("crit is a member of the header", json!(["alg"])),
        crit("crit is unknown", json!(["http://example.com/UNDEFINED"])),
        crit("crit is itself", json!(["crit"])),
        crit("crit is a text", json!("x")),
        crit("crit is the text b64", json!("b64")),
        crit("crit is true", json!(true)),
        crit("crit is false", json!(false)),
        crit("crit is a number", json!(0)),
        crit("crit is an object", json!({"b64": true})),
        crit("crit has a number", json!([1])),
        crit("crit has null", json!([null])),
        crit("crit is empty in itself", json!([[]])),
        case(
            "crit with its member",
            key.headed(appended(&key.header_with("crit", json!(["x"])), "x", "1")),
        ),
        case(
            "crit twice, the first in vain",
            key.headed(appended(&key.header_with("crit", json!(["x"])), "crit", "null")),
        ),
        case("crit is b64 and b64 is false", key.headed(plain.to_string())),
        case("b64 is false and the payload plain", key.sealed(&plainly)),
        case("b64 is false and not critical and the payload plain", key.sealed(&silently)),
        case(
            "b64 is false and the signature of the plain payload",
            format!("{}.{signature}", unsigned(plain.to_string(), &raw)),
        ),
    ]);
}

#[test]
fn members_of_a_header_have_their_kind() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let member = |name: &str, value: Value| {
        let called = format!("{name} is {value}");
        case(called, key.headed(key.header_with(name, value)))
    };
    let twice = |name: &str, json: &str| {
        let header = appended(&key.header().to_string(), name, json);
        case(format!("{name} twice, then {json}"), key.headed(header))
    };
    Front::of(&issuer).refuses(&[
        member("typ", json!(1)),
        member("typ", json!(["JWT"])),
        member("typ", json!({})),
        twice("alg", "\"ES256\""),
        twice("alg", "\"none\""),
        twice("\\u0061lg", "\"none\""),
        twice("kid", "\"key-ES256\""),
        twice("kid", "\"nobody\""),
        twice("typ", "\"JWT\""),
        case(
            "alg twice, none first",
            key.headed(appended(r#"{"alg":"none","kid":"key-ES256"}"#, "alg", "\"ES256\"")),
        ),
        case(
            "kid twice, nobody's first",
            key.headed(appended(r#"{"alg":"ES256","kid":"nobody"}"#, "kid", "\"key-ES256\"")),
        ),
    ]);
}
