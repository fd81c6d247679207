//! The rustls verifiers: the path by webpki, revocation by [`CrlIndex`], names by the policy.
//!
//! webpki's own revocation check verifies the list's signature again in every handshake (24 ms for
//! a million entries), so the path is built without it and the verified path is then looked up in
//! the index.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use weft_model::StringMatch;

use crate::{Asked, Revocation, Role, TrustStore};

pub(crate) static ALGORITHMS: std::sync::LazyLock<WebPkiSupportedAlgorithms> =
    std::sync::LazyLock::new(|| {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
    });

/// Checks the certificates of peers against a trust store.
pub(crate) struct Verifier {
    trust: Arc<TrustStore>,
    /// Names asked for beside those of the store; the peer needs one of each non-empty list.
    names: Vec<StringMatch>,
    hints: Vec<DistinguishedName>,
    mandatory: bool,
}

impl Verifier {
    pub(crate) fn new(trust: Arc<TrustStore>, names: Vec<StringMatch>, mandatory: bool) -> Self {
        let hints = trust.hints();
        Self { trust, names, hints, mandatory }
    }

    pub(crate) fn trust(&self) -> &TrustStore {
        &self.trust
    }

    /// Checks all but the names.
    fn verify<'a>(
        &self,
        end_entity: &'a CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: webpki::KeyUsage,
    ) -> Result<webpki::EndEntityCert<'a>, Error> {
        let certificate = webpki::EndEntityCert::try_from(end_entity)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let unrevoked = |path: &webpki::VerifiedPath<'_>| self.check_revocation(path, now);
        certificate
            .verify_for_usage(
                ALGORITHMS.all,
                self.trust.anchors(),
                intermediates,
                now,
                usage,
                None,
                Some(&unrevoked),
            )
            .map_err(refusal)?;
        Ok(certificate)
    }

    fn check_revocation(
        &self,
        path: &webpki::VerifiedPath<'_>,
        now: UnixTime,
    ) -> Result<(), webpki::Error> {
        let check = |certificate: &webpki::Cert<'_>, role| {
            let whole = certificate.der();
            let (issuer, serial) = (certificate.issuer(), certificate.serial());
            let asked = Asked { issuer, serial, role, certificate: &whole };
            self.trust.admits(&asked, now).map_err(|status| match status {
                Revocation::Expired => webpki::Error::CrlExpired {
                    time: now,
                    next_update: UnixTime::since_unix_epoch(std::time::Duration::ZERO),
                },
                Revocation::Unknown => webpki::Error::UnknownRevocationStatus,
                Revocation::Revoked | Revocation::Good => webpki::Error::CertRevoked,
            })
        };
        check(path.end_entity(), Role::Leaf)?;
        path.intermediate_certificates()
            .try_for_each(|certificate| check(certificate, Role::Authority))
    }

    /// Whether the certificate has one name of each list that asks for any.
    fn is_named(&self, certificate: &webpki::EndEntityCert<'_>) -> bool {
        [self.trust.names(), &self.names].into_iter().filter(|wanted| !wanted.is_empty()).all(
            |wanted| {
                certificate
                    .valid_uri_names()
                    .chain(certificate.valid_dns_names())
                    .any(|name| wanted.iter().any(|want| want.matches(name)))
            },
        )
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("names", &self.names)
            .field("mandatory", &self.mandatory)
            .finish_non_exhaustive()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let certificate =
            self.verify(end_entity, intermediates, now, webpki::KeyUsage::client_auth())?;
        // Nobody asked for this client by its name: it is the policy that refuses it.
        if !self.is_named(&certificate) {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &ALGORITHMS)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

impl ServerCertVerifier for Verifier {
    /// The server's name is checked by the names asked for, since a mesh endpoint proves a SPIFFE id
    /// and not the host name it was dialled by. When none are asked for, the host name counts.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate =
            self.verify(end_entity, intermediates, now, webpki::KeyUsage::server_auth())?;
        let named = if self.names.is_empty() && self.trust.names().is_empty() {
            certificate.verify_is_valid_for_subject_name(server_name).is_ok()
        } else {
            self.is_named(&certificate)
        };
        if !named {
            return Err(CertificateError::NotValidForName.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &ALGORITHMS)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

/// The alert follows from the error, so each cause keeps its own.
fn refusal(error: webpki::Error) -> Error {
    let cause = match error {
        webpki::Error::CertRevoked => CertificateError::Revoked,
        webpki::Error::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus,
        webpki::Error::CrlExpired { .. } => CertificateError::ExpiredRevocationList,
        webpki::Error::CertExpired { .. } => CertificateError::Expired,
        webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet,
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        webpki::Error::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        webpki::Error::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    };
    Error::InvalidCertificate(cause)
}
