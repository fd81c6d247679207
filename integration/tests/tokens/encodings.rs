//! Tokens that are not three base64url parts as required by RFC 7515, section 2: without padding,
//! line breaks, white space or other characters, and with exactly one encoding of each byte
//! sequence.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE};
use serde_json::json;

use crate::front::{TokenFront, case};
use crate::issuer::{SigningKey, TokenIssuer, appended, claims, claims_with, encode, unsigned};

const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The same bytes in another encoding: the unused bits of the last character are not zero.
fn with_nonzero_unused_bits(text: &str) -> String {
    assert_ne!(text.len() % 4, 0, "the last character has unused bits");
    let (start, last) = text.split_at(text.len() - 1);
    let place = ALPHABET.iter().position(|letter| letter == &last.as_bytes()[0]);
    let other = ALPHABET[place.expect("the text is base64url") + 1];
    format!("{start}{}", char::from(other))
}

/// The same JSON, padded so that its base64 has unused bits.
fn uneven(mut json: String) -> String {
    while json.len().is_multiple_of(3) {
        json.push(' ');
    }
    json
}

#[test]
fn malformed_base64url_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    // Both JSON texts have five of each of these bytes in a row, so every position of the alphabet
    // occurs.
    let header = uneven(key.header_with("x", "?????>>>>>"));
    let payload = uneven(claims_with("x", "\"?????>>>>>\""));
    let text = unsigned(&header, &payload);
    let signature = encode(key.signature(&text));
    let (head, body) = text.split_once('.').expect("the token has a dot");
    let standard = |json: &str| {
        let text = STANDARD_NO_PAD.encode(json);
        assert!(
            text.contains(['+', '/']),
            "{json} has no character that differs between the alphabets"
        );
        text
    };
    let middle = body.len() / 2;
    let broken = |by: &str| format!("{}{by}{}", &body[..middle], &body[middle..]);
    let cut = |by: &str| format!("{}{by}{}", &signature[..20], &signature[20..]);
    let sealed = |head: &str, body: &str| key.sealed(&format!("{head}.{body}"));
    TokenFront::of(&issuer).assert_rejected(&[
        case(
            "nonzero unused bits in the signature",
            format!("{text}.{}", with_nonzero_unused_bits(&signature)),
        ),
        case("nonzero unused bits in the header", sealed(&with_nonzero_unused_bits(head), body)),
        case("nonzero unused bits in the payload", sealed(head, &with_nonzero_unused_bits(body))),
        case("padding after the signature", format!("{text}.{signature}==")),
        case("one padding character after the signature", format!("{text}.{signature}=")),
        case("padding after the header", sealed(&URL_SAFE.encode(&header), body)),
        case("padding after the payload", sealed(head, &URL_SAFE.encode(&payload))),
        case("padding in the payload", sealed(head, &broken("="))),
        case("standard base64 alphabet in the header", sealed(&standard(&header), body)),
        case("standard base64 alphabet in the payload", sealed(head, &standard(&payload))),
        case("standard base64 alphabet in the signature", signed_in_another_alphabet(key, &text)),
        case("a space in the payload", sealed(head, &broken(" "))),
        case("a tab in the payload", sealed(head, &broken("\t"))),
        case("a space in the signature", format!("{text}.{}", cut(" "))),
        case("a tab in the signature", format!("{text}.{}", cut("\t"))),
        case("a percent sign in the signature", format!("{text}.{}", cut("%0A"))),
        case("a non-ASCII character in the signature", format!("{text}.{}", cut("é"))),
        case("a star in the payload", sealed(head, &broken("*"))),
        case("a space before a dot", format!("{head} .{body}.{signature}")),
        case("one more character in the signature", format!("{text}.{signature}A")),
        case("one more character in the payload", sealed(head, &format!("{body}A"))),
        case("JSON without base64", format!("{header}.{payload}.{signature}")),
        case("base64 in base64", sealed(&encode(head), &encode(body))),
        case("the whole token in base64", encode(format!("{text}.{signature}"))),
        case("in quotes", format!("\"{text}.{signature}\"")),
    ]);
}

fn signed_in_another_alphabet(key: &SigningKey, text: &str) -> String {
    let mut signatures = std::iter::repeat_with(|| STANDARD_NO_PAD.encode(key.signature(text)));
    let other = signatures.find(|signature| signature.contains(['+', '/']));
    format!("{text}.{}", other.expect("some signature differs between the alphabets"))
}

#[test]
fn token_without_exactly_three_parts_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let good = key.good();
    let parts: Vec<&str> = good.split('.').collect();
    let [header, payload, signature] = [parts[0], parts[1], parts[2]];
    let encrypted = encode(json!({"alg": "RSA-OAEP", "enc": "A256GCM"}).to_string());
    let nested = key.headed(key.header_with("cty", "JWT"));
    let signed = json!({"payload": payload, "protected": header});
    let claims_json = &claims().to_string();
    let flat = appended(&signed.to_string(), "signature", &json!(signature).to_string());
    TokenFront::of(&issuer).assert_rejected(&[
        case("only the header", header),
        case("the header and a dot", format!("{header}.")),
        case("the header and the payload", format!("{header}.{payload}")),
        case("no signature", format!("{header}.{payload}.")),
        case("no payload", format!("{header}..{signature}")),
        case("no header", format!(".{payload}.{signature}")),
        case("only a signature", format!("..{signature}")),
        case("a dot", "."),
        case("two dots", ".."),
        case("five dots", "....."),
        case("a dot at the end", format!("{good}.")),
        case("a dot at the start", format!(".{good}")),
        case("four parts", format!("{good}.{signature}")),
        case("four parts, the header twice", format!("{header}.{good}")),
        case("two dots instead of one", format!("{header}..{payload}.{signature}")),
        case("five parts", format!("{good}.{payload}.{signature}")),
        case("five parts, as of a JWE", format!("{encrypted}.AA.AA.{payload}.AA")),
        case("five parts, as of a JWE with a direct key", format!("{encrypted}..AA.{payload}.AA")),
        case("signed without dots", key.sealed(&format!("{header}{payload}"))),
        case("a signed empty payload", key.claiming("")),
        case("a signed empty header", key.token("", claims_json)),
        case("a token in a token", key.claiming(nested)),
        case("as JSON", flat),
        case("one character", "A"),
        case("a thousand dots", ".".repeat(1000)),
        case("eight thousand dots", ".".repeat(8000)),
        case("a plain word", "token"),
    ]);
}
