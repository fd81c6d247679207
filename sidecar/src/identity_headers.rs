//! Headers that describe the client's certificate. The client's own versions are removed before these are set from the
//! verified certificate, so a service behind the sidecar can trust them.

use std::fmt::Write as _;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderName, HeaderValue};
use rustls_pki_types::CertificateDer;
use weft_certs::{CertificateNames, CertificateText, VerifiedPeer};
use weft_model::{CertificateKey, ClientCertificateDetails, HttpService};

use crate::http::headers::Headers;

const FORWARDED_CERTIFICATE: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
const PEER: HeaderName = HeaderName::from_static("x-weft-peer");
const SERIAL_NUMBER: HeaderName = HeaderName::from_static("x-amzn-mtls-clientcert-serial-number");
const ISSUER: HeaderName = HeaderName::from_static("x-amzn-mtls-clientcert-issuer");
const SUBJECT: HeaderName = HeaderName::from_static("x-amzn-mtls-clientcert-subject");
const VALIDITY: HeaderName = HeaderName::from_static("x-amzn-mtls-clientcert-validity");
const LEAF: HeaderName = HeaderName::from_static("x-amzn-mtls-clientcert-leaf");
const CHAIN: HeaderName = HeaderName::from_static("x-amzn-mtls-clientcert");

/// The headers of one connection, built once and shared by its requests.
#[derive(Debug, Clone)]
pub(crate) struct ClientCertificateHeaders(Vec<(HeaderName, HeaderValue)>);

/// The certificates that the headers of a connection are built from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandshakeCertificates<'a> {
    /// The verified identity of the client.
    pub(crate) peer: &'a VerifiedPeer,
    /// The client's certificate chain, leaf first.
    pub(crate) chain: &'a [CertificateDer<'a>],
    /// The certificate that the sidecar presented.
    pub(crate) own: Option<&'a CertificateDer<'a>>,
}

impl ClientCertificateHeaders {
    /// The headers that describe a verified client.
    pub(crate) fn new(proof: HandshakeCertificates<'_>, http: &HttpService) -> Self {
        let HandshakeCertificates { peer, chain, .. } = proof;
        let mut headers = Vec::with_capacity(3);
        let mut add = |name: HeaderName, text: String| {
            if let Ok(value) = HeaderValue::from_str(&text) {
                headers.push((name, value));
            }
        };
        add(FORWARDED_CERTIFICATE, forwarded_certificate(proof, &http.certificate_keys));
        if let Some(id) = peer.identity() {
            add(PEER, id.to_string());
        }
        add(SERIAL_NUMBER, peer.serial_hex());
        let is_whole = http.client_certificate == ClientCertificateDetails::SanitizeSetWhole;
        let certificate = chain.first().filter(|_| is_whole);
        let text = certificate.and_then(CertificateText::of);
        if let Some((text, certificate)) = text.zip(certificate) {
            add(ISSUER, text.issuer);
            add(SUBJECT, text.subject);
            add(VALIDITY, format!("NotBefore={};NotAfter={}", text.not_before, text.not_after));
            add(LEAF, encoded_pem(certificate));
        }
        Self(headers)
    }

    /// The header with the unverified chain of a client, leaf first. The handshake proved only that the client has the key.
    pub(crate) fn unverified(chain: &[CertificateDer<'_>]) -> Self {
        let chain: String = chain.iter().map(encoded_pem).collect();
        Self(HeaderValue::from_str(&chain).map(|value| (CHAIN, value)).into_iter().collect())
    }
}

/// The value of `x-forwarded-client-cert`, in Envoy's order: `By` and `Hash`, then the configured keys. `URI` has no value
/// where the certificate has no URI, as in Envoy.
fn forwarded_certificate(proof: HandshakeCertificates<'_>, keys: &[CertificateKey]) -> String {
    let own = proof.own.map(CertificateNames::of).unwrap_or_default();
    let leaf = proof.chain.first();
    let names = leaf.map(CertificateNames::of).unwrap_or_default();
    let mut parts: Vec<String> = own.uris.iter().map(|uri| pair("By", uri)).collect();
    parts.push(format!("Hash={}", proof.peer.fingerprint()));
    for key in keys {
        match key {
            CertificateKey::Cert => {
                parts.extend(leaf.map(|leaf| format!("Cert=\"{}\"", fully_encoded_pem(leaf))));
            }
            CertificateKey::Chain => {
                let chain: String = proof.chain.iter().map(fully_encoded_pem).collect();
                parts.push(format!("Chain=\"{chain}\""));
            }
            CertificateKey::Subject => {
                let text = leaf.and_then(CertificateText::of);
                let subject = text.map(|text| text.subject).unwrap_or_default();
                parts.push(format!("Subject=\"{subject}\""));
            }
            CertificateKey::Uri if names.uris.is_empty() => parts.push("URI=".to_owned()),
            CertificateKey::Uri => parts.extend(names.uris.iter().map(|uri| pair("URI", uri))),
            CertificateKey::Dns => parts.extend(names.dns.iter().map(|name| pair("DNS", name))),
        }
    }
    parts.join(";")
}

/// A key and its value. The value comes from a certificate and may contain the delimiters of pairs and elements; it is quoted
/// then, so that it cannot add a pair. Bytes that a header must not contain are percent-encoded.
fn pair(key: &str, value: &str) -> String {
    let is_quoted = value.contains(['"', ',', ';', '\\']);
    let mut text = format!("{key}=");
    if is_quoted {
        text.push('"');
    }
    for byte in value.bytes() {
        match byte {
            b'"' | b'\\' => text.extend(['\\', char::from(byte)]),
            b' '..=b'~' => text.push(char::from(byte)),
            other => {
                // Writing to a String cannot fail.
                let _infallible = write!(text, "%{other:02X}");
            }
        }
    }
    if is_quoted {
        text.push('"');
    }
    text
}

/// A certificate as PEM with every reserved character percent-encoded, as Envoy does.
fn fully_encoded_pem(certificate: &CertificateDer<'_>) -> String {
    encoded_pem(certificate).replace('+', "%2B").replace('/', "%2F").replace('=', "%3D")
}

/// A certificate as PEM, percent-encoded as AWS does: `+`, `=` and `/` are not encoded.
fn encoded_pem(certificate: &CertificateDer<'_>) -> String {
    const LINE: usize = 64;
    let text = STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN%20CERTIFICATE-----%0A");
    let mut rest = text.as_str();
    while let Some((line, more)) =
        rest.split_at_checked(LINE.min(rest.len())).filter(|l| !l.0.is_empty())
    {
        pem.push_str(line);
        pem.push_str("%0A");
        rest = more;
    }
    pem.push_str("-----END%20CERTIFICATE-----%0A");
    pem
}

/// Adds the headers of a verified client. Those that the client sent were removed before.
pub(crate) fn apply(
    headers: &mut Headers,
    details: ClientCertificateDetails,
    proved: Option<&ClientCertificateHeaders>,
) {
    match (details, proved) {
        (
            ClientCertificateDetails::SanitizeSet | ClientCertificateDetails::SanitizeSetWhole,
            Some(ClientCertificateHeaders(proved)),
        ) => {
            for (name, value) in proved {
                headers.add(name.clone(), value.clone());
            }
        }
        (ClientCertificateDetails::Sanitize, _) | (_, None) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delimiters_in_names_are_quoted_and_cannot_add_pairs() {
        for (value, expected) in [
            ("spiffe://a/b", "URI=spiffe://a/b"),
            ("https://a?b=c", "URI=https://a?b=c"),
            ("x;URI=spiffe://admin", "URI=\"x;URI=spiffe://admin\""),
            ("x,By=y", "URI=\"x,By=y\""),
            ("x\";URI=y", "URI=\"x\\\";URI=y\""),
            ("x\\", "URI=\"x\\\\\""),
            ("\u{feff}spiffe://a\r\n", "URI=%EF%BB%BFspiffe://a%0D%0A"),
        ] {
            assert_eq!(pair("URI", value), expected);
        }
    }
}
