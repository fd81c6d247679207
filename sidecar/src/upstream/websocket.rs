//! WebSocket's opening handshake, where one side asks by HTTP/1.1 and the other by HTTP/2, which has no
//! key and no proof of having read it (RFC 6455, section 4; RFC 8441, section 5).

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderName, HeaderValue};

use crate::http::headers::Headers;

const KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");
/// RFC 6455, section 1.3.
const PROOF: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Takes the key out of a request that goes on by HTTP/2; gives the proof that the client waits for.
pub(super) fn take_key(headers: &mut Headers) -> Option<HeaderValue> {
    let accept = accept_of(headers.get(KEY.as_str())?);
    headers.remove(|name| name.eq_ignore_ascii_case(KEY.as_str().as_bytes()));
    Some(accept)
}

/// Adds a key to a request that came by HTTP/2; gives the proof that the service must answer with.
pub(super) fn add_key(headers: &mut Headers) -> HeaderValue {
    headers.remove(|name| name.eq_ignore_ascii_case(KEY.as_str().as_bytes()));
    // It shows that the service understood, and is no secret.
    let key = STANDARD.encode(fastrand::u128(..).to_be_bytes());
    let accept = accept_of(key.as_bytes());
    if let Ok(key) = HeaderValue::try_from(key) {
        headers.add(KEY, key);
    }
    accept
}

/// Takes the proof out of a response; whether it is the one that was expected.
pub(super) fn take_proof(headers: &mut Headers, expected: &HeaderValue) -> bool {
    let proved = headers.get(ACCEPT.as_str()) == Some(expected.as_bytes());
    headers.remove(|name| name.eq_ignore_ascii_case(ACCEPT.as_str().as_bytes()));
    proved
}

/// Adds the proof to a response.
pub(super) fn add_proof(headers: &mut Headers, proof: HeaderValue) {
    headers.add(ACCEPT, proof);
}

fn accept_of(key: &[u8]) -> HeaderValue {
    let hashed = digest(&SHA1_FOR_LEGACY_USE_ONLY, &[key, PROOF].concat());
    HeaderValue::try_from(STANDARD.encode(hashed)).unwrap_or(HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proof_is_that_of_the_standard() {
        // RFC 6455, section 1.3.
        assert_eq!(accept_of(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let mut headers = Headers::from(http::HeaderMap::new());
        let expected = add_key(&mut headers);
        let proof = take_key(&mut headers).expect("it was added");
        assert_eq!(proof, expected);
        add_proof(&mut headers, proof);
        assert!(take_proof(&mut headers, &expected));
        assert!(!take_proof(&mut headers, &expected), "it was taken");
    }
}
