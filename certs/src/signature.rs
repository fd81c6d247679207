//! Signatures of certificates and CRLs: the accepted algorithms, and the check with the key of a CA.

use std::sync::LazyLock;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls_pki_types::SubjectPublicKeyInfoDer;

use crate::der::{self, DerReader};

/// The accepted signature algorithms.
pub(crate) static ALGORITHMS: LazyLock<WebPkiSupportedAlgorithms> =
    LazyLock::new(|| crate::parameters::PROVIDER.signature_verification_algorithms);

/// The signature methods that every rustls verifier must have; they are the same in all of them.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &rustls_pki_types::CertificateDer<'_>,
            signed: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls12_signature(
                message,
                certificate,
                signed,
                &$crate::signature::ALGORITHMS,
            )
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &rustls_pki_types::CertificateDer<'_>,
            signed: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls13_signature(
                message,
                certificate,
                signed,
                &$crate::signature::ALGORITHMS,
            )
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            $crate::signature::ALGORITHMS.supported_schemes()
        }
    };
}
pub(crate) use signatures;

/// A signed structure: a certificate or CRL.
pub(crate) struct SignedStructure<'a> {
    /// The signed bytes.
    pub(crate) body: &'a [u8],
    /// The content of the algorithm identifier.
    pub(crate) algorithm: &'a [u8],
    /// The content of the BIT STRING: the number of unused bits, then the signature.
    signature: &'a [u8],
}

impl<'a> SignedStructure<'a> {
    /// Splits a structure. None if it is malformed.
    pub(crate) fn read(structure: &'a [u8]) -> Option<Self> {
        let mut outer = DerReader(structure);
        let mut inner = DerReader(outer.expect(der::SEQUENCE)?.content);
        let body = inner.expect(der::SEQUENCE)?.whole;
        let algorithm = inner.expect(der::SEQUENCE)?.content;
        let signature = inner.expect(der::BIT_STRING)?.content;
        (inner.is_empty() && outer.is_empty()).then_some(Self { body, algorithm, signature })
    }
}

/// Whether the key (`SubjectPublicKeyInfo`) signed this certificate or CRL.
pub(crate) fn is_signed(structure: &[u8], public_key: &[u8]) -> bool {
    let key = SubjectPublicKeyInfoDer::from(public_key);
    let Ok(key) = webpki::RawPublicKeyEntity::try_from(&key) else {
        return false;
    };
    let Some(signed) = SignedStructure::read(structure) else {
        return false;
    };
    // A signature has whole bytes, so its BIT STRING has no unused bits.
    let Some(signature) = signed.signature.strip_prefix(&[0]) else {
        return false;
    };
    ALGORITHMS
        .all
        .iter()
        .filter(|candidate| candidate.signature_alg_id().as_ref() == signed.algorithm)
        .any(|candidate| key.verify_signature(*candidate, signed.body, signature).is_ok())
}
