//! Fields that say who the client is: what the client claims is removed, then they are set from
//! what was proved. A service behind a sidecar may therefore believe them.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderName, HeaderValue};
use rustls_pki_types::CertificateDer;
use weft_certs::{CertificateText, VerifiedPeer};
use weft_model::ClientCertificateDetails;

use crate::http::fields::Fields;

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
pub(crate) struct ProvedFields(Vec<(HeaderName, HeaderValue)>);

impl ProvedFields {
    /// What is told of `peer`, and of its certificate, where that is told.
    pub(crate) fn new(peer: &VerifiedPeer, certificate: Option<&CertificateDer<'_>>) -> Self {
        let mut fields = Vec::with_capacity(3);
        let mut add = |name: HeaderName, text: String| {
            if let Ok(value) = HeaderValue::from_str(&text) {
                fields.push((name, value));
            }
        };
        let uri = peer.identity().map(|id| format!(";URI={id}")).unwrap_or_default();
        add(FORWARDED_CERTIFICATE, format!("Hash={}{uri}", peer.fingerprint()));
        if let Some(id) = peer.identity() {
            add(PEER, id.to_string());
        }
        add(SERIAL_NUMBER, peer.serial_hex());
        let text = certificate.and_then(CertificateText::of);
        if let Some((text, certificate)) = text.zip(certificate) {
            add(ISSUER, text.issuer);
            add(SUBJECT, text.subject);
            add(VALIDITY, format!("NotBefore={};NotAfter={}", text.not_before, text.not_after));
            add(LEAF, encoded_pem(certificate));
        }
        Self(fields)
    }

    /// The chain of a client of which nothing but its key is proved, its own certificate first.
    pub(crate) fn passed(chain: &[CertificateDer<'_>]) -> Self {
        let chain: String = chain.iter().map(encoded_pem).collect();
        Self(HeaderValue::from_str(&chain).map(|value| (CHAIN, value)).into_iter().collect())
    }
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
    fields: &mut Fields,
    details: ClientCertificateDetails,
    proved: Option<&ProvedFields>,
) {
    match (details, proved) {
        (
            ClientCertificateDetails::FromProof | ClientCertificateDetails::Whole,
            Some(ProvedFields(proved)),
        ) => {
            for (name, value) in proved {
                fields.add(name.clone(), value.clone());
            }
        }
        (ClientCertificateDetails::Nothing, _) | (_, None) => {}
    }
}
