//! Certificate signing requests (PKCS #10): created by workloads, checked by the CA.

use rcgen::{CertificateParams, CertificateSigningRequestParams, KeyPair, PublicKey, SanType};
use weft_model::SpiffeId;

use crate::KeyText;

/// A request with its private key. The key stays in this process.
pub struct PendingRequest {
    /// The request, PEM.
    pub request_pem: String,
    /// The private key, PKCS #8 PEM.
    pub key_pem: KeyText,
}

impl std::fmt::Debug for PendingRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PendingRequest { .. }")
    }
}

/// An error in creating or checking a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The request cannot be read, or its signature does not match its key.
    #[error("the certificate request cannot be used: {0}")]
    Malformed(String),
    /// The request does not have exactly one SPIFFE ID.
    #[error("the certificate request must ask for exactly one SPIFFE id: {0}")]
    Identity(String),
    /// Key generation failed.
    #[error("key generation failed: {0}")]
    Key(String),
}

/// Makes a P-256 key and a request for `identity`.
///
/// # Errors
/// When the key generator fails.
pub fn make(identity: &SpiffeId) -> Result<PendingRequest, RequestError> {
    let fail = |error: rcgen::Error| RequestError::Key(error.to_string());
    let key = KeyPair::generate().map_err(fail)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let uri = identity.as_str().try_into().map_err(fail)?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    let request = params.serialize_request(&key).map_err(fail)?;
    Ok(PendingRequest {
        request_pem: request.pem().map_err(fail)?,
        key_pem: key.serialize_pem().into(),
    })
}

/// A request with a verified signature and its SPIFFE ID. Other fields of the request are ignored: the CA decides the
/// contents of the certificate.
pub struct CheckedRequest {
    pub(crate) public_key: PublicKey,
    identity: SpiffeId,
}

impl CheckedRequest {
    /// Reads and verifies a PEM request.
    ///
    /// # Errors
    /// The request is larger than 64 KiB, cannot be read, has an invalid signature, or does not have exactly one
    /// SPIFFE ID.
    pub fn parse(pem: &str) -> Result<Self, RequestError> {
        let malformed = |error: rcgen::Error| RequestError::Malformed(error.to_string());
        if pem.len() > 64 * 1024 {
            return Err(RequestError::Malformed("larger than 64 KiB".into()));
        }
        let request = CertificateSigningRequestParams::from_pem(pem).map_err(malformed)?;
        let names = &request.params.subject_alt_names;
        let identity = match names.as_slice() {
            [SanType::URI(uri)] => SpiffeId::parse(uri.as_str())
                .map_err(|error| RequestError::Identity(error.to_string()))?,
            others => return Err(RequestError::Identity(format!("has {} names", others.len()))),
        };
        Ok(Self { public_key: request.public_key, identity })
    }

    /// The requested SPIFFE ID.
    #[must_use]
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }
}

impl std::fmt::Debug for CheckedRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckedRequest").field("identity", &self.identity).finish_non_exhaustive()
    }
}
