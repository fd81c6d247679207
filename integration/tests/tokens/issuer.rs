//! A token issuer that signs any bytes.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaEncoding, RsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tempfile::TempDir;
use weft_integration::bootstrap::with;
use weft_integration::process::run;

/// The `iss` of its tokens.
pub(crate) const ISSUER: &str = "https://issuer";
/// The `aud` of its tokens.
pub(crate) const AUDIENCE: &str = "service";

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    UNIX_EPOCH.elapsed().expect("the clock is later than 1970").as_secs()
}

/// Encodes bytes as base64url without padding.
pub(crate) fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Claims that are valid for an hour.
pub(crate) fn claims() -> Value {
    json!({"iss": ISSUER, "aud": AUDIENCE, "sub": "visitor", "exp": now() + 3600})
}

/// The claims without one claim, as JSON.
pub(crate) fn claims_without(name: &str) -> String {
    without(claims(), name)
}

/// The claims with this JSON value for one claim.
pub(crate) fn claims_with(name: &str, json: &str) -> String {
    appended(&claims_without(name), name, json)
}

/// A JSON object without one member, as text.
pub(crate) fn without(mut object: Value, name: &str) -> String {
    object.as_object_mut().expect("the JSON is an object").remove(name);
    object.to_string()
}

/// A JSON object with one more member, which may be a duplicate.
pub(crate) fn appended(object: &str, name: &str, json: &str) -> String {
    let open = object.strip_suffix('}').expect("the JSON is an object");
    format!("{open},\"{name}\":{json}}}")
}

/// The signing function of a key.
type SignFn = Box<dyn Fn(&[u8]) -> Vec<u8>>;

/// A key with its signing function.
pub(crate) struct SigningKey {
    /// The public key.
    pub(crate) jwk: Value,
    /// The public key as SubjectPublicKeyInfo, DER; empty where no test needs it.
    pub(crate) der: Vec<u8>,
    sign: SignFn,
}

impl SigningKey {
    /// An elliptic-curve key.
    pub(crate) fn ecdsa(algorithm: &str) -> Self {
        let (signing, curve) = match algorithm {
            "ES256" => (&signature::ECDSA_P256_SHA256_FIXED_SIGNING, "P-256"),
            "ES384" => (&signature::ECDSA_P384_SHA384_FIXED_SIGNING, "P-384"),
            _ => (&signature::ECDSA_P521_SHA512_FIXED_SIGNING, "P-521"),
        };
        let pair = EcdsaKeyPair::generate(signing).expect("a key can be generated");
        let public = pair.public_key();
        let (x, y) = public.as_ref()[1..].split_at(public.as_ref().len() / 2);
        let jwk = json!({"kty": "EC", "crv": curve, "x": encode(x), "y": encode(y)});
        let der = public.as_der().expect("the public key has a DER form").as_ref().to_vec();
        let sign = move |message: &[u8]| {
            let signature = pair.sign(&SystemRandom::new(), message);
            signature.expect("the key can sign").as_ref().to_vec()
        };
        Self { jwk: of(jwk, algorithm), der, sign: Box::new(sign) }
    }

    /// An Ed25519 key.
    pub(crate) fn ed25519() -> Self {
        let pair = Ed25519KeyPair::generate().expect("a key can be generated");
        let x = encode(pair.public_key());
        let jwk = of(json!({"kty": "OKP", "crv": "Ed25519", "x": x}), "EdDSA");
        let der = pair.public_key().as_ref().to_vec();
        Self { jwk, der, sign: Box::new(move |message| pair.sign(message).as_ref().to_vec()) }
    }

    /// An RSA key, used with one algorithm.
    pub(crate) fn rsa(pair: &Arc<RsaKeyPair>, algorithm: &str) -> Self {
        let padding: &'static dyn RsaEncoding = match algorithm {
            "RS256" => &signature::RSA_PKCS1_SHA256,
            "RS384" => &signature::RSA_PKCS1_SHA384,
            "RS512" => &signature::RSA_PKCS1_SHA512,
            "PS256" => &signature::RSA_PSS_SHA256,
            "PS384" => &signature::RSA_PSS_SHA384,
            _ => &signature::RSA_PSS_SHA512,
        };
        let public = pair.public_key();
        let [n, e] = [public.modulus(), public.exponent()];
        let [n, e] = [n, e].map(|number| encode(number.big_endian_without_leading_zero()));
        let der = public.as_der().expect("the public key has a DER form").as_ref().to_vec();
        let pair = pair.clone();
        let sign = move |message: &[u8]| {
            let mut signature = vec![0; pair.public_modulus_len()];
            let signed = pair.sign(padding, &SystemRandom::new(), message, &mut signature);
            signed.expect("the key can sign");
            signature
        };
        let jwk = of(json!({"kty": "RSA", "n": n, "e": e}), algorithm);
        Self { jwk, der, sign: Box::new(sign) }
    }

    /// An RSA key of 1024 bits. The crypto library refuses to create one, so openssl does.
    pub(crate) fn rsa_of_1024_bits() -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        let key = folder.path().join("key.pem");
        let openssl = |words: &str, file: &Path| {
            run(Command::new("openssl").args(words.split(' ')).arg(file))
        };
        run(Command::new("openssl").args(["genrsa", "-out"]).arg(&key).arg("1024"));
        let printed = openssl("rsa -noout -modulus -in", &key);
        let digits = printed.trim().strip_prefix("Modulus=").expect("openssl prints the modulus");
        let n = encode(from_hex(digits));
        let sign = move |message: &[u8]| {
            let file = |name| folder.path().join(name);
            std::fs::write(file("message"), message).expect("the folder is writable");
            let mut openssl = Command::new("openssl");
            openssl.args(["dgst", "-sha256", "-sign"]).arg(file("key.pem"));
            run(openssl.arg("-out").arg(file("signature")).arg(file("message")));
            std::fs::read(file("signature")).expect("openssl has written it")
        };
        let jwk = of(json!({"kty": "RSA", "n": n, "e": "AQAB"}), "RS256");
        Self { jwk, der: Vec::new(), sign: Box::new(sign) }
    }

    /// A shared secret.
    pub(crate) fn secret(algorithm: &str, secret: &[u8]) -> Self {
        let jwk = of(json!({"kty": "oct", "k": encode(secret)}), algorithm);
        let algorithm = match algorithm {
            "HS256" => hmac::HMAC_SHA256,
            "HS384" => hmac::HMAC_SHA384,
            _ => hmac::HMAC_SHA512,
        };
        let key = hmac::Key::new(algorithm, secret);
        let sign = move |message: &[u8]| hmac::sign(&key, message).as_ref().to_vec();
        Self { jwk, der: Vec::new(), sign: Box::new(sign) }
    }

    /// A key with this signing function.
    pub(crate) fn signing(jwk: Value, sign: impl Fn(&[u8]) -> Vec<u8> + 'static) -> Self {
        Self { jwk, der: Vec::new(), sign: Box::new(sign) }
    }

    /// Sets a member of the JWK.
    pub(crate) fn with_member(mut self, member: &str, value: impl Into<Value>) -> Self {
        self.jwk = with(self.jwk, member, value.into());
        self
    }

    /// The header of its tokens.
    pub(crate) fn header(&self) -> Value {
        json!({"alg": self.jwk["alg"], "kid": self.jwk["kid"], "typ": "JWT"})
    }

    /// That header with another member.
    pub(crate) fn header_with(&self, name: &str, value: impl Into<Value>) -> String {
        with(self.header(), name, value.into()).to_string()
    }

    /// The signature of a text.
    pub(crate) fn signature(&self, text: &str) -> Vec<u8> {
        (self.sign)(text.as_bytes())
    }

    /// A text followed by its signature.
    pub(crate) fn sealed(&self, text: &str) -> String {
        format!("{text}.{}", encode(self.signature(text)))
    }

    /// A signed token with these bytes.
    pub(crate) fn token(&self, header: impl AsRef<[u8]>, payload: impl AsRef<[u8]>) -> String {
        self.sealed(&unsigned(header, payload))
    }

    /// A token that is valid except for its header.
    pub(crate) fn headed(&self, header: impl AsRef<[u8]>) -> String {
        self.token(header, claims().to_string())
    }

    /// A token that is valid except for its claims.
    pub(crate) fn claiming(&self, payload: impl AsRef<[u8]>) -> String {
        self.token(self.header().to_string(), payload)
    }

    /// A valid token.
    pub(crate) fn good(&self) -> String {
        self.claiming(claims().to_string())
    }
}

/// The signed part of a token.
pub(crate) fn unsigned(header: impl AsRef<[u8]>, payload: impl AsRef<[u8]>) -> String {
    format!("{}.{}", encode(header), encode(payload))
}

/// Decodes a hexadecimal string.
pub(crate) fn from_hex(digits: &str) -> Vec<u8> {
    let pairs = digits.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair));
    let byte = |pair| u8::from_str_radix(pair, 16).expect("the digits are hexadecimal");
    pairs.map(|pair| byte(pair.expect("the digits are ASCII"))).collect()
}

/// Adds the algorithm, and a kid derived from it, to a JWK.
fn of(jwk: Value, algorithm: &str) -> Value {
    with(with(jwk, "alg", json!(algorithm)), "kid", json!(format!("key-{algorithm}")))
}

/// A new RSA key pair.
pub(crate) fn rsa_pair() -> Arc<RsaKeyPair> {
    Arc::new(RsaKeyPair::generate(KeySize::Rsa2048).expect("a key can be generated"))
}

/// An issuer with a key of each algorithm.
pub(crate) struct TokenIssuer {
    keys: Vec<SigningKey>,
}

impl TokenIssuer {
    pub(crate) fn new() -> Self {
        let pair = rsa_pair();
        let rsa = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"];
        let rsa = rsa.map(|algorithm| SigningKey::rsa(&pair, algorithm));
        let ecdsa = ["ES256", "ES384", "ES512"].map(SigningKey::ecdsa);
        Self { keys: rsa.into_iter().chain(ecdsa).chain([SigningKey::ed25519()]).collect() }
    }

    /// The key of an algorithm.
    pub(crate) fn key(&self, algorithm: &str) -> &SigningKey {
        let key = self.keys.iter().find(|key| key.jwk["alg"] == algorithm);
        key.expect("the issuer has a key of each algorithm")
    }

    /// The published JWKS.
    pub(crate) fn published(&self) -> Vec<Value> {
        self.keys.iter().map(|key| key.jwk.clone()).collect()
    }
}
