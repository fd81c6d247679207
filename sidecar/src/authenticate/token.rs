//! Parses tokens strictly (RFC 7515, section 7.1; RFC 7519): ambiguous input is rejected. Nothing is verified here.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use weft_certs::{SignatureAlgorithm, SignedText};

use super::fault::{TokenFault, TokenRejection};

/// The nesting limit of a token's JSON. The length of a token is limited by the size limit of the request head.
const DEPTH_LIMIT: usize = 32;

/// A signed text (JWS) in three parts.
#[derive(Debug)]
pub(crate) struct SignedToken<'a> {
    pub(crate) algorithm: SignatureAlgorithm,
    /// The key ID (`kid`).
    pub(crate) key: Option<String>,
    /// The payload, in base64url.
    pub(crate) payload: &'a str,
    /// The signed text.
    pub(crate) text: &'a str,
    /// The signature, in base64url.
    pub(crate) signature: &'a str,
}

/// A signed token with its claims.
#[derive(Debug)]
pub(crate) struct Token<'a> {
    pub(crate) signed: SignedToken<'a>,
    pub(crate) claims: Map<String, Value>,
}

impl<'a> Token<'a> {
    /// Parses a token.
    ///
    /// # Errors
    /// The same as [`SignedToken::read`], or when the payload is not a JSON object.
    pub(crate) fn read(text: &'a str) -> Result<Self, TokenRejection> {
        let signed = SignedToken::read(text)?;
        let claims = object(signed.payload)?;
        Ok(Self { signed, claims })
    }
}

impl<'a> SignedToken<'a> {
    /// The input for verification by a key set.
    pub(crate) fn signed_text(&self) -> SignedText<'_> {
        SignedText {
            algorithm: self.algorithm,
            key_id: self.key.as_deref(),
            text: self.text,
            signature: self.signature,
        }
    }

    /// Parses everything but the payload.
    ///
    /// # Errors
    /// When the text is not a JWS in compact form, its header has critical extensions, an unencoded payload or another token type, or
    /// its algorithm is not supported.
    pub(crate) fn read(text: &'a str) -> Result<Self, TokenRejection> {
        let (signed, signature) = text.rsplit_once('.').ok_or(NO_TOKEN)?;
        let (header, payload) = signed.split_once('.').ok_or(NO_TOKEN)?;
        if payload.contains('.') {
            return Err(NO_TOKEN);
        }
        let mut header = object(header)?;
        if header.contains_key("crit") {
            // A receiver that does not understand a critical extension must reject it (RFC 7515, section 4.1.11).
            return Err(TokenRejection::format("the token has critical extensions"));
        }
        if header.get("b64").is_some_and(|b64| *b64 != Value::Bool(true)) {
            return Err(TokenRejection::format("the token payload is not base64url-encoded"));
        }
        check_type(&header)?;
        let key = match header.remove("kid") {
            None => None,
            Some(Value::String(key)) => Some(key),
            Some(_) => return Err(TokenRejection::format("kid is not a string")),
        };
        let algorithm = match header.get("alg") {
            Some(Value::String(word)) => {
                let unknown = TokenRejection::new(
                    TokenFault::Signature,
                    "its algorithm is none that is taken",
                );
                SignatureAlgorithm::parse(word).ok_or(unknown)?
            }
            _ => return Err(TokenRejection::format("alg is not a string")),
        };
        // Decoding checks the alphabet, and that padding bits are zero.
        URL_SAFE_NO_PAD.decode(signature).map_err(|_| NO_TOKEN)?;
        Ok(Self { algorithm, key, payload, text: signed, signature })
    }
}

const NO_TOKEN: TokenRejection = TokenRejection::format("not a valid JWT");

/// One type of token must not be accepted as another (RFC 8725, section 3.11).
fn check_type(header: &Map<String, Value>) -> Result<(), TokenRejection> {
    const KINDS: [&str; 3] = ["jwt", "at+jwt", "jose"];
    let other = Err(TokenRejection::format("the token has another type than JWT"));
    match header.get("typ") {
        None => Ok(()),
        Some(Value::String(kind)) => {
            let kind = kind.to_ascii_lowercase();
            let short = kind.strip_prefix("application/").unwrap_or(&kind);
            if KINDS.contains(&short) { Ok(()) } else { other }
        }
        Some(_) => other,
    }
}

/// Decodes a JSON object in base64url.
fn object(part: &str) -> Result<Map<String, Value>, TokenRejection> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| NO_TOKEN)?;
    let mut reader = serde_json::Deserializer::from_slice(&bytes);
    let value = StrictJson { depth: DEPTH_LIMIT }.deserialize(&mut reader).map_err(|_| NO_TOKEN)?;
    reader.end().map_err(|_| NO_TOKEN)?;
    match value {
        Value::Object(object) => Ok(object),
        _ => Err(NO_TOKEN),
    }
}

/// Deserializes JSON without duplicate names and with limited nesting.
#[derive(Clone, Copy)]
struct StrictJson {
    depth: usize,
}

impl StrictJson {
    fn deeper<E: Error>(self) -> Result<Self, E> {
        let depth = self.depth.checked_sub(1).ok_or_else(|| E::custom("it nests too deep"))?;
        Ok(Self { depth })
    }
}

impl<'de> DeserializeSeed<'de> for StrictJson {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictJson {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let deeper = self.deeper()?;
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(deeper)? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let deeper = self.deeper()?;
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            let value = members.next_value_seed(deeper)?;
            if object.insert(name, value).is_some() {
                return Err(A::Error::custom("it says something twice"));
            }
        }
        Ok(object.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(header: &str, payload: &str) -> String {
        let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.c2ln", part(header), part(payload))
    }

    #[test]
    fn ambiguous_tokens_are_rejected() {
        let good = r#"{"alg":"ES256"}"#;
        let read = |header: &str, payload: &str| {
            let text = token(header, payload);
            Token::read(&text).map(|token| token.claims.len()).map_err(|refused| refused.fault)
        };
        let format = Err(TokenFault::Format);
        let signature = Err(TokenFault::Signature);
        assert_eq!(read(good, r#"{"a":{"b":[1,2.5,null,true,"x"]}}"#), Ok(1));
        for typ in ["JWT", "at+jwt", "application/at+JWT", "JOSE"] {
            assert_eq!(read(&format!(r#"{{"alg":"ES256","typ":"{typ}"}}"#), "{}"), Ok(0), "{typ}");
        }
        for header in [
            r#"{"alg":"ES256","alg":"ES256"}"#,
            r#"{"alg":"ES256","crit":[]}"#,
            r#"{"alg":"ES256","crit":null}"#,
            r#"{"alg":"ES256","b64":false}"#,
            r#"{"alg":"ES256","typ":1}"#,
            r#"{"alg":"ES256","typ":"logout+jwt"}"#,
            r#"{"alg":"ES256","kid":["a"]}"#,
            r#"{"alg":null}"#,
            r#"{"alg":1}"#,
            "{}",
            "[]",
            r#"{"alg":"ES256"} "#,
            r#"{"alg":"ES256"}{}"#,
            "\u{feff}{\"alg\":\"ES256\"}",
        ] {
            let expected = if header.ends_with(' ') { Ok(0) } else { format };
            assert_eq!(read(header, "{}"), expected, "{header}");
        }
        for alg in ["none", "None", "", "HS256", "es256", "ES256K", "RSA-OAEP"] {
            assert_eq!(read(&format!(r#"{{"alg":"{alg}"}}"#), "{}"), signature, "{alg}");
        }
        for payload in [
            r#"{"exp":1,"exp":2}"#,
            r#"{"a":{"b":1,"b":1}}"#,
            r#"{"a":NaN}"#,
            r#"{"a":1e400}"#,
            "1",
            "",
        ] {
            assert_eq!(read(good, payload), format, "{payload}");
        }
        let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(read(good, &nested(DEPTH_LIMIT - 1)), Ok(1));
        assert_eq!(read(good, &nested(DEPTH_LIMIT)), format);
        assert_eq!(read(good, &nested(5_000)), format);
    }

    #[test]
    fn only_three_canonically_encoded_parts_are_accepted() {
        let good = token(r#"{"alg":"ES256"}"#, "{}");
        assert!(Token::read(&good).is_ok());
        let unpadded = good.trim_end_matches("c2ln");
        for bad in [
            good.replacen('.', "", 1),
            format!("{good}.c2ln"),
            format!("{good}="),
            format!("{good} "),
            format!(" {good}"),
            // Padding bits that are not zero.
            format!("{unpadded}c2lnAB"),
            format!("{unpadded}c2+n"),
            good.trim_end_matches('g').to_owned() + "\n",
            ".".into(),
            "..".into(),
            String::new(),
        ] {
            assert_eq!(
                Token::read(&bad).map(drop).map_err(|r| r.fault),
                Err(TokenFault::Format),
                "{bad}"
            );
        }
    }
}
