//! A token as it stands (RFC 7515, section 7.1; RFC 7519), read strictly: what could be read in two ways is
//! no token. Nothing of it is proved here.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use weft_certs::{SignatureAlgorithm, SignedText};

use super::fault::{TokenFault, TokenRejection};

/// How deep the JSON of a token may nest. How long a token may be, the limits of a request's head say.
const DEPTH_LIMIT: usize = 32;

/// A text that somebody may have signed, in three parts.
#[derive(Debug)]
pub(crate) struct SignedToken<'a> {
    pub(crate) algorithm: SignatureAlgorithm,
    /// The name of the key (`kid`).
    pub(crate) key: Option<String>,
    /// The payload, base64url.
    pub(crate) payload: &'a str,
    /// What is signed.
    pub(crate) text: &'a str,
    /// The signature, base64url.
    pub(crate) signature: &'a str,
}

/// A token: what is signed are claims.
#[derive(Debug)]
pub(crate) struct Token<'a> {
    pub(crate) signed: SignedToken<'a>,
    pub(crate) claims: Map<String, Value>,
}

impl<'a> Token<'a> {
    /// Reads a token.
    ///
    /// # Errors
    /// Why it is none, or none that could be good.
    pub(crate) fn read(text: &'a str) -> Result<Self, TokenRejection> {
        let signed = SignedToken::read(text)?;
        let claims = object(signed.payload)?;
        Ok(Self { signed, claims })
    }
}

impl<'a> SignedToken<'a> {
    /// What a key set verifies.
    pub(crate) fn signed_text(&self) -> SignedText<'_> {
        SignedText {
            algorithm: self.algorithm,
            key_id: self.key.as_deref(),
            text: self.text,
            signature: self.signature,
        }
    }

    /// Reads all but what the payload says.
    ///
    /// # Errors
    /// Why it is no token, or none that could be good.
    pub(crate) fn read(text: &'a str) -> Result<Self, TokenRejection> {
        let (signed, signature) = text.rsplit_once('.').ok_or(NO_TOKEN)?;
        let (header, payload) = signed.split_once('.').ok_or(NO_TOKEN)?;
        if payload.contains('.') {
            return Err(NO_TOKEN);
        }
        let mut header = object(header)?;
        if header.contains_key("crit") {
            // RFC 7515, section 4.1.11: who understands none of them refuses them all.
            return Err(TokenRejection::format("it has critical extensions"));
        }
        if header.get("b64").is_some_and(|b64| *b64 != Value::Bool(true)) {
            return Err(TokenRejection::format("its payload is not encoded"));
        }
        check_type(&header)?;
        let key = match header.remove("kid") {
            None => None,
            Some(Value::String(key)) => Some(key),
            Some(_) => return Err(TokenRejection::format("its kid is no string")),
        };
        let algorithm = match header.get("alg") {
            Some(Value::String(word)) => {
                let unknown = TokenRejection::new(
                    TokenFault::Signature,
                    "its algorithm is none that is taken",
                );
                SignatureAlgorithm::parse(word).ok_or(unknown)?
            }
            _ => return Err(TokenRejection::format("its alg is no string")),
        };
        // Whether it can be decoded; the padding bits must be as they would be written.
        URL_SAFE_NO_PAD.decode(signature).map_err(|_| NO_TOKEN)?;
        Ok(Self { algorithm, key, payload, text: signed, signature })
    }
}

const NO_TOKEN: TokenRejection = TokenRejection::format("it is no token");

/// RFC 8725, section 3.11: one kind of token must not be taken for another.
fn check_type(header: &Map<String, Value>) -> Result<(), TokenRejection> {
    const KINDS: [&str; 3] = ["jwt", "at+jwt", "jose"];
    let other = Err(TokenRejection::format("it is a token of another kind"));
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

/// An object of JSON in base64url.
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

/// Reads JSON that says nothing twice, and does not nest too deep.
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
    fn what_could_be_read_in_two_ways_is_no_token() {
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
    fn only_three_parts_as_they_would_be_written_are_a_token() {
        let good = token(r#"{"alg":"ES256"}"#, "{}");
        assert!(Token::read(&good).is_ok());
        let unpadded = good.trim_end_matches("c2ln");
        for bad in [
            good.replacen('.', "", 1),
            format!("{good}.c2ln"),
            format!("{good}="),
            format!("{good} "),
            format!(" {good}"),
            // Bits that nobody would write.
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
