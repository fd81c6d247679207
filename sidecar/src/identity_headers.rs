//! Headers that say who the client is: what the client claims is removed, then they are set from
//! what was proved. A service behind a sidecar may therefore believe them.

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

/// The values for one connection, written once and shared by its requests.
#[derive(Debug, Clone)]
pub(crate) struct ClientCertificateHeaders(Vec<(HeaderName, HeaderValue)>);

/// What the headers of a connection are made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandshakeCertificates<'a> {
    /// Who the client proved to be.
    pub(crate) peer: &'a VerifiedPeer,
    /// The chain that it showed, its own certificate first.
    pub(crate) chain: &'a [CertificateDer<'a>],
    /// The certificate that it was shown.
    pub(crate) own: Option<&'a CertificateDer<'a>>,
}

impl ClientCertificateHeaders {
    /// The headers that describe a client.
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

    /// The chain of a client of which nothing but its key is proved, its own certificate first.
    pub(crate) fn passed(chain: &[CertificateDer<'_>]) -> Self {
        let chain: String = chain.iter().map(encoded_pem).collect();
        Self(HeaderValue::from_str(&chain).map(|value| (CHAIN, value)).into_iter().collect())
    }
}

/// The value of `x-forwarded-client-cert`, in Envoy's order: `By` and `Hash`, then the keys asked for. `URI`
/// is there without a value where the certificate has no URI, as in Envoy.
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

/// A key and its value. A name is what an authority signed, and may hold what divides pairs and elements:
/// then it is quoted, so that it cannot pass for another pair. What may not be in a header is
/// percent-encoded.
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
                // A text takes whatever is written to it.
                let _infallible = write!(text, "%{other:02X}");
            }
        }
    }
    if is_quoted {
        text.push('"');
    }
    text
}

/// A certificate as PEM, all of it percent-encoded that is not unreserved, as Envoy does.
fn fully_encoded_pem(certificate: &CertificateDer<'_>) -> String {
    encoded_pem(certificate).replace('+', "%2B").replace('/', "%2F").replace('=', "%3D")
}

/// A certificate as PEM, percent-encoded as AWS does: `+`, `=` and `/` stay.
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

/// Sets what the client proved. What it claims has been removed.
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
    fn names_cannot_pass_for_other_pairs() {
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
