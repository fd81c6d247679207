//! Tokens that are not three parts of base64 as RFC 7515 has it (section 2): without padding, line ends,
//! white space or any other characters, and each text the only one for its bytes.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE};
use serde_json::json;

use crate::front::{Front, case};
use crate::issuer::{Issuer, Key, appended, claims, claims_saying, encode, unsigned};

const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The same bytes by another text: the bits that the last character has left are not zero.
fn with_bits_behind(text: &str) -> String {
    assert_ne!(text.len() % 4, 0, "all of its bits are used");
    let (start, last) = text.split_at(text.len() - 1);
    let place = ALPHABET.iter().position(|letter| letter == &last.as_bytes()[0]);
    let other = ALPHABET[place.expect("it is base64") + 1];
    format!("{start}{}", char::from(other))
}

/// The same JSON, in so many bytes that its base64 has bits left.
fn uneven(mut json: String) -> String {
    while json.len().is_multiple_of(3) {
        json.push(' ');
    }
    json
}

#[test]
fn base64_is_as_it_must_be() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    // In both, five of each in a row are found in every alphabet's place.
    let header = uneven(key.header_with("x", "?????>>>>>"));
    let payload = uneven(claims_saying("x", "\"?????>>>>>\""));
    let text = unsigned(&header, &payload);
    let signature = encode(key.signature(&text));
    let (head, body) = text.split_once('.').expect("it has a dot");
    let standard = |json: &str| {
        let text = STANDARD_NO_PAD.encode(json);
        assert!(text.contains(['+', '/']), "{json} has none of the letters that differ");
        text
    };
    let middle = body.len() / 2;
    let broken = |by: &str| format!("{}{by}{}", &body[..middle], &body[middle..]);
    let cut = |by: &str| format!("{}{by}{}", &signature[..20], &signature[20..]);
    let sealed = |head: &str, body: &str| key.sealed(&format!("{head}.{body}"));
    Front::of(&issuer).refuses(&[
        case("bits behind the signature", format!("{text}.{}", with_bits_behind(&signature))),
        case("bits behind the header", sealed(&with_bits_behind(head), body)),
        case("bits behind the payload", sealed(head, &with_bits_behind(body))),
        case("padding behind the signature", format!("{text}.{signature}==")),
        case("one sign of padding behind the signature", format!("{text}.{signature}=")),
        case("padding behind the header", sealed(&URL_SAFE.encode(&header), body)),
        case("padding behind the payload", sealed(head, &URL_SAFE.encode(&payload))),
        case("padding in the payload", sealed(head, &broken("="))),
        case("another alphabet in the header", sealed(&standard(&header), body)),
        case("another alphabet in the payload", sealed(head, &standard(&payload))),
        case("another alphabet in the signature", signed_in_another_alphabet(key, &text)),
        case("a space in the payload", sealed(head, &broken(" "))),
        case("a tab in the payload", sealed(head, &broken("\t"))),
        case("a space in the signature", format!("{text}.{}", cut(" "))),
        case("a tab in the signature", format!("{text}.{}", cut("\t"))),
        case("a percent sign in the signature", format!("{text}.{}", cut("%0A"))),
        case("a letter that is not ASCII in the signature", format!("{text}.{}", cut("é"))),
        case("a star in the payload", sealed(head, &broken("*"))),
        case("a space before a dot", format!("{head} .{body}.{signature}")),
        case("one letter more in the signature", format!("{text}.{signature}A")),
        case("one letter more in the payload", sealed(head, &format!("{body}A"))),
        case("JSON that is not in base64", format!("{header}.{payload}.{signature}")),
        case("base64 in base64", sealed(&encode(head), &encode(body))),
        case("all of it in base64", encode(format!("{text}.{signature}"))),
        case("in quotes", format!("\"{text}.{signature}\"")),
    ]);
}

fn signed_in_another_alphabet(key: &Key, text: &str) -> String {
    let mut signatures = std::iter::repeat_with(|| STANDARD_NO_PAD.encode(key.signature(text)));
    let other = signatures.find(|signature| signature.contains(['+', '/']));
    format!("{text}.{}", other.expect("there is no end of signatures"))
}

#[test]
fn a_token_has_three_parts() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let good = key.good();
    let parts: Vec<&str> = good.split('.').collect();
    let [header, payload, signature] = [parts[0], parts[1], parts[2]];
    let encrypted = encode(json!({"alg": "RSA-OAEP", "enc": "A256GCM"}).to_string());
    let nested = key.headed(key.header_with("cty", "JWT"));
    let (signed, said) = (json!({"payload": payload, "protected": header}), &claims().to_string());
    let flat = appended(&signed.to_string(), "signature", &json!(signature).to_string());
    Front::of(&issuer).refuses(&[
        case("the header alone", header),
        case("the header and a dot", format!("{header}.")),
        case("the header and the payload", format!("{header}.{payload}")),
        case("no signature", format!("{header}.{payload}.")),
        case("no payload", format!("{header}..{signature}")),
        case("no header", format!(".{payload}.{signature}")),
        case("a signature alone", format!("..{signature}")),
        case("a dot", "."),
        case("two dots", ".."),
        case("five dots", "....."),
        case("a dot behind", format!("{good}.")),
        case("a dot before", format!(".{good}")),
        case("four parts", format!("{good}.{signature}")),
        case("four parts, the header twice", format!("{header}.{good}")),
        case("two dots for one", format!("{header}..{payload}.{signature}")),
        case("five parts", format!("{good}.{payload}.{signature}")),
        case("five parts of an encrypted one", format!("{encrypted}.AA.AA.{payload}.AA")),
        case("five parts by a direct key", format!("{encrypted}..AA.{payload}.AA")),
        case("signed without its dots", key.sealed(&format!("{header}{payload}"))),
        case("an empty payload that is signed", key.claiming("")),
        case("an empty header that is signed", key.token("", said)),
        case("a token in a token", key.claiming(nested)),
        case("as JSON", flat),
        case("one letter", "A"),
        case("a thousand dots", ".".repeat(1000)),
        case("eight thousand dots", ".".repeat(8000)),
        case("no base64 at all", "token"),
    ]);
}
