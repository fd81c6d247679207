//! Signatures that are malformed, belong to another token, or have values that satisfy a verifier
//! without range checks.

use crate::front::{TokenCase, TokenFront, case};
use crate::issuer::{
    SigningKey, TokenIssuer, claims, claims_with, encode, from_hex, now, unsigned,
};

/// The orders of the groups (SEC 2, sections 2.4.2 and 2.5.1).
const ORDERS: [(&str, &str); 2] = [
    ("ES256", "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551"),
    (
        "ES384",
        "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    ),
];

#[test]
fn ecdsa_signature_with_out_of_range_values_is_rejected() {
    let issuer = TokenIssuer::new();
    let mut cases = Vec::new();
    for (algorithm, order) in ORDERS {
        let key = issuer.key(algorithm);
        let order = from_hex(order);
        let text = unsigned(key.header().to_string(), claims().to_string());
        let good = key.signature(&text);
        let (r, s) = good.split_at(order.len());
        let zero = vec![0; order.len()];
        let mut one = zero.clone();
        *one.last_mut().expect("the number has bytes") = 1;
        let highest = vec![0xff; order.len()];
        let mut below = order.clone();
        *below.last_mut().expect("the number has bytes") -= 1;
        let numbers: [(&str, &[u8]); 5] =
            [("0", &zero), ("1", &one), ("n", &order), ("n-1", &below), ("2^b-1", &highest)];
        let mut forged = |name: String, r: &[u8], s: &[u8]| {
            let signature = encode([r, s].concat());
            cases.push(case(format!("{algorithm}: {name}"), format!("{text}.{signature}")));
        };
        for (first, one) in numbers {
            for (second, other) in numbers {
                forged(format!("r={first}, s={second}"), one, other);
            }
            forged(format!("r={first}, s unchanged"), one, s);
            forged(format!("r unchanged, s={first}"), r, one);
        }
        forged("r and s exchanged".to_owned(), s, r);
    }
    TokenFront::of(&issuer).assert_rejected(&cases);
}

/// A DER INTEGER.
fn der_integer(number: &[u8]) -> Vec<u8> {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    let mut digits = number[zeros..].to_vec();
    if digits.first().is_some_and(|first| *first >= 0x80) {
        digits.insert(0, 0);
    }
    der(0x02, &digits)
}

fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).expect("the content is short");
    assert!(length < 0x80, "longer lengths have another encoding");
    [&[tag, length], content].concat()
}

#[test]
fn malformed_signature_is_rejected() {
    let issuer = TokenIssuer::new();
    let mut cases: Vec<TokenCase> = Vec::new();
    for algorithm in ["ES256", "ES384", "RS256", "PS256", "EdDSA"] {
        let key = issuer.key(algorithm);
        let text = unsigned(key.header().to_string(), claims().to_string());
        let good = key.signature(&text);
        let (first, last) = good.split_at(good.len() / 2);
        let mut changed = good.clone();
        changed[3] ^= 1;
        let forms: [(&str, Vec<u8>); 11] = [
            ("empty", Vec::new()),
            ("one byte", vec![0]),
            ("without its last byte", good[..good.len() - 1].to_vec()),
            ("without its first byte", good[1..].to_vec()),
            ("its first half", first.to_vec()),
            ("its second half", last.to_vec()),
            ("with a zero at the end", [&good[..], &[0]].concat()),
            ("with a zero at the start", [&[0], &good[..]].concat()),
            ("twice", [&good[..], &good[..]].concat()),
            ("with one bit changed", changed),
            ("all zero", vec![0; good.len()]),
        ];
        for (name, form) in forms {
            let token = format!("{text}.{}", encode(form));
            cases.push(case(format!("{algorithm}: {name}"), token));
        }
        if algorithm.starts_with("ES") {
            let sequence = der(0x30, &[der_integer(first), der_integer(last)].concat());
            let token = format!("{text}.{}", encode(sequence));
            cases.push(case(format!("{algorithm}: as DER"), token));
        }
    }
    TokenFront::of(&issuer).assert_rejected(&cases);
}

#[test]
fn signature_of_other_content_is_rejected() {
    let issuer = TokenIssuer::new();
    let mut cases = Vec::new();
    for algorithm in ["ES256", "RS256", "EdDSA"] {
        let key = issuer.key(algorithm);
        let stranger = match algorithm {
            "ES256" => SigningKey::ecdsa(algorithm),
            "EdDSA" => SigningKey::ed25519(),
            _ => SigningKey::rsa(&crate::issuer::rsa_pair(), algorithm),
        };
        let header = key.header().to_string();
        let over = claims_with("exp", &(now() - 7200).to_string());
        let old = key.signature(&unsigned(&header, &over));
        let other_header = key.header_with("x", 1);
        let claims_json = claims().to_string();
        let good = key.good();
        let (text, signature) = good.rsplit_once('.').expect("the token has dots");
        let mut forged = |name: &str, token: String| {
            cases.push(case(format!("{algorithm}: {name}"), token));
        };
        forged("by another key", stranger.headed(&header));
        forged("of other claims", format!("{}.{}", unsigned(&header, &claims_json), encode(old)));
        forged(
            "of another header",
            format!("{}.{signature}", unsigned(other_header, &claims_json)),
        );
        forged(
            "of the claims only",
            format!("{text}.{}", encode(key.signature(&encode(&claims_json)))),
        );
        forged(
            "of the JSON",
            format!("{text}.{}", encode(key.signature(&format!("{header}.{claims_json}")))),
        );
        forged("the signed text instead of a signature", format!("{text}.{text}"));
    }
    TokenFront::of(&issuer).assert_rejected(&cases);
}
