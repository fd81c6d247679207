//! The rustls verifier: webpki checks the path, [`CrlIndex`](crate::CrlIndex) the revocation, and the policy the
//! names.
//!
//! The revocation check of webpki verifies the CRL signature in every handshake (24 ms for a million entries).
//! Therefore webpki builds the path without CRLs, and the verified path is looked up in the index.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DistinguishedName, Error};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use weft_model::{SpiffeId, StringMatch};

use crate::certificate::CertificateFields;
use crate::der;
use crate::fault::{PeerFault, PeerRefusal};
use crate::path_cache::{self, CachedPath, ChainDigest, PathCache};
use crate::profile::{self, Purpose, UNREADABLE};
use crate::proof::{LinkId, Proof};
use crate::revocation::{CertificateRole, RevocationQuery, RevocationStatus};
use crate::signature::{ALGORITHMS, signatures};
use crate::store::TrustStore;

/// Verifies the certificates of peers with a trust store.
pub(crate) struct Verifier {
    trust: Arc<TrustStore>,
    /// Accepted names in addition to those of the store. The peer needs one name of each list that is not empty.
    names: Vec<StringMatch>,
    hints: Vec<DistinguishedName>,
    mandatory: bool,
    path_cache: PathCache,
}

/// The maximum number of certificates that a peer may present above its leaf, whether or not they are on the path.
pub(crate) const PRESENTED_LIMIT: usize = 16;

impl Verifier {
    pub(crate) fn new(trust: Arc<TrustStore>, names: Vec<StringMatch>, mandatory: bool) -> Self {
        let hints = trust.hints();
        Self { trust, names, hints, mandatory, path_cache: PathCache::default() }
    }

    pub(crate) fn trust(&self) -> &TrustStore {
        &self.trust
    }

    /// Checks everything except the accepted names.
    fn verify<'a>(
        &self,
        end_entity: &'a CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        purpose: Purpose,
    ) -> Result<webpki::EndEntityCert<'a>, PeerRefusal> {
        let digest = path_cache::chain_digest(purpose, end_entity, intermediates);
        if self.known_path(&digest, end_entity, intermediates, now).is_some()
            && let Ok(known) = webpki::EndEntityCert::try_from(end_entity)
        {
            return Ok(known);
        }
        let (leaf, path) = self.verify_chain(end_entity, intermediates, now, purpose)?;
        if let Some(path) = path {
            self.path_cache.put(digest, path);
        }
        Ok(leaf)
    }

    /// The proof of a chain that a handshake has just accepted, leaf first: the cached path, or the result of another
    /// verification. None if the chain is not valid.
    pub(crate) fn proof(
        &self,
        chain: &[CertificateDer<'_>],
        purpose: Purpose,
        now: UnixTime,
    ) -> Option<Proof> {
        let (leaf, above) = chain.split_first()?;
        let digest = path_cache::chain_digest(purpose, leaf, above);
        let path = match self.known_path(&digest, leaf, above, now) {
            Some(known) => known,
            None => self.verify_chain(leaf, above, now, purpose).ok()?.1?,
        };
        Some(path.proof)
    }

    /// The cached path, if it is still valid. None: the chain must be verified again, because it may have another
    /// path.
    fn known_path(
        &self,
        digest: &ChainDigest,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Option<CachedPath> {
        let path = self.path_cache.get(digest)?;
        if !(path.from..=path.proof.expires_at()).contains(&now) {
            return None;
        }
        let mut certificates: Vec<&[u8]> = vec![end_entity];
        for at in &path.above {
            certificates.push(self.candidates(intermediates).nth(*at)?);
        }
        self.check_revocation(&certificates, &path.root_key, now).ok()?;
        Some(path)
    }

    /// The certificates that may be on the path above a leaf, in the order that [`CachedPath::above`] indexes: the
    /// presented ones, then the intermediates of the trust bundle.
    fn candidates<'c>(&'c self, shown: &'c [CertificateDer<'_>]) -> impl Iterator<Item = &'c [u8]> {
        shown.iter().map(AsRef::as_ref).chain(self.trust.intermediates().iter().map(AsRef::as_ref))
    }

    fn verify_chain<'a>(
        &self,
        end_entity: &'a CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        purpose: Purpose,
    ) -> Result<(webpki::EndEntityCert<'a>, Option<CachedPath>), PeerRefusal> {
        if intermediates.len() > PRESENTED_LIMIT {
            return Err(PeerFault::MaxChainDepthExceeded.because("too many certificates presented"));
        }
        let certificate = webpki::EndEntityCert::try_from(end_entity)
            .map_err(|_| PeerFault::Invalid.because(UNREADABLE))?;
        CertificateFields::read(end_entity)
            .ok_or(UNREADABLE)
            .and_then(|leaf| profile::check_leaf(&leaf))
            .map_err(|detail| PeerFault::Invalid.because(detail))?;
        let identity =
            profile::identity(end_entity).map_err(|detail| PeerFault::Rejected.because(detail))?;
        let both: Vec<CertificateDer<'_>>;
        let intermediates = match self.trust.intermediates() {
            [] => intermediates,
            _ => {
                both = self.candidates(intermediates).map(CertificateDer::from).collect();
                &both[..]
            }
        };
        let refusal = Cell::new(None);
        let found = RefCell::new(None);
        let good = |path: &webpki::VerifiedPath<'_>| {
            self.check_path(path, identity.as_ref(), now).map_err(|refused| {
                refusal.set(Some(refused));
                webpki::Error::UnknownIssuer
            })?;
            found.replace(found_path(path, end_entity, intermediates));
            Ok(())
        };
        let verified = certificate.verify_for_usage(
            ALGORITHMS.all,
            self.trust.anchors(),
            intermediates,
            now,
            purpose.usage(),
            None,
            Some(&good),
        );
        verified.map_err(|error| {
            // webpki tries other paths after a rejection and returns its own error. The refusal of `check_path` has
            // more detail.
            refusal.take().unwrap_or_else(|| explain(&error))
        })?;
        let path = found.take();
        Ok((certificate, path))
    }

    /// Checks of a path that webpki does not make: the profile of the CAs, the trust domain of the root, and
    /// revocation.
    fn check_path(
        &self,
        path: &webpki::VerifiedPath<'_>,
        identity: Option<&SpiffeId>,
        now: UnixTime,
    ) -> Result<(), PeerRefusal> {
        let mut depth = 1;
        for authority in path.intermediate_certificates() {
            CertificateFields::read(&authority.der())
                .ok_or(UNREADABLE)
                .and_then(|authority| profile::check_authority(&authority))
                .map_err(|detail| PeerFault::Invalid.because(detail))?;
            depth += 1;
        }
        if depth > self.trust.policy().depth_limit {
            return Err(PeerFault::MaxChainDepthExceeded.because("certificate chain is too long"));
        }
        let domain = self.trust.domain_of(path.anchor());
        if let (Some(domain), Some(identity)) = (domain, identity)
            && domain != identity.trust_domain()
        {
            let detail = "trust domain of the certificate differs from that of its root";
            return Err(PeerFault::Rejected.because(detail));
        }
        let above: Vec<CertificateDer<'_>> =
            path.intermediate_certificates().map(|certificate| certificate.der()).collect();
        let leaf = path.end_entity().der();
        // A stored CRL is in force only once its issuer is known: these authorities are verified, and may be it.
        self.trust.learn(&above, now);
        let certificates: Vec<&[u8]> =
            std::iter::once(&leaf).chain(&above).map(AsRef::as_ref).collect();
        let root_key = der::sequence(&path.anchor().subject_public_key_info);
        self.check_revocation(&certificates, &root_key, now)
    }

    /// Checks a path against the CRLs. `certificates` begins with the leaf; `root_key` is the root's key.
    fn check_revocation(
        &self,
        certificates: &[&[u8]],
        root_key: &[u8],
        now: UnixTime,
    ) -> Result<(), PeerRefusal> {
        if self.trust.revocations().is_none() {
            return Ok(());
        }
        let unreadable = || PeerFault::Invalid.because(UNREADABLE);
        let fields = certificates.iter().map(|certificate| CertificateFields::read(certificate));
        let fields = fields.collect::<Option<Vec<_>>>().ok_or_else(unreadable)?;
        let keys = fields.iter().skip(1).map(|issuer| issuer.key).chain([root_key]);
        for (at, (certificate, issuer_key)) in fields.iter().zip(keys).enumerate() {
            let asked = RevocationQuery {
                issuer: certificate.issuer,
                issuer_key: Some(issuer_key),
                serial: certificate.serial,
                role: if at == 0 { CertificateRole::Leaf } else { CertificateRole::Authority },
                certificate: certificate.whole,
            };
            self.trust.check_revocation(&asked, now).map_err(refused_status)?;
        }
        Ok(())
    }

    /// Whether the certificate has one name of each list that is not empty.
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
        let certificate = self
            .verify(end_entity, intermediates, now, Purpose::Client)
            .map_err(|refusal| refusal.into_error(end_entity))?;
        // A client is not connected to by name, so the fault is a rejection by policy.
        if !self.is_named(&certificate) {
            let refusal = PeerFault::Rejected.because("certificate has none of the accepted names");
            return Err(refusal.into_error(end_entity));
        }
        Ok(ClientCertVerified::assertion())
    }

    signatures!();
}

impl ServerCertVerifier for Verifier {
    /// Checks the accepted names and not the host name, because a mesh endpoint has a SPIFFE ID. Without accepted
    /// names, the host name is checked.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = self
            .verify(end_entity, intermediates, now, Purpose::Server)
            .map_err(|refusal| refusal.into_error(end_entity))?;
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

    signatures!();
}

/// Converts a verified path into indexes of its candidates. None if a certificate of the path cannot be read.
fn found_path(
    path: &webpki::VerifiedPath<'_>,
    leaf: &CertificateDer<'_>,
    candidates: &[CertificateDer<'_>],
) -> Option<CachedPath> {
    let mut above = Vec::new();
    let leaf = CertificateFields::read(leaf)?;
    let mut validity = leaf.validity()?;
    let mut links = vec![LinkId::certificate(leaf.issuer, leaf.serial)];
    for certificate in path.intermediate_certificates() {
        let der = certificate.der();
        above.push(candidates.iter().position(|candidate| **candidate == *der)?);
        let fields = CertificateFields::read(&der)?;
        validity = validity.and(fields.validity()?);
        links.push(LinkId::certificate(fields.issuer, fields.serial));
        links.push(LinkId::authority_of(&der)?);
    }
    links.push(LinkId::authority(path.anchor()));
    let root_key = der::sequence(&path.anchor().subject_public_key_info).into();
    Some(CachedPath {
        above: above.into(),
        root_key,
        from: validity.not_before,
        proof: Proof::new(links, validity.not_after),
    })
}

/// The refusal for a revocation status that the policy rejects.
fn refused_status(status: RevocationStatus) -> PeerRefusal {
    match status {
        RevocationStatus::Expired => PeerFault::CrlProcessingError.because("CRL has expired"),
        RevocationStatus::Unknown => {
            PeerFault::CrlProcessingError.because("no CRL covers the certificate")
        }
        // `Good` is accepted by every policy, so it does not get here.
        RevocationStatus::Revoked | RevocationStatus::Good => {
            PeerFault::CrlHit.because("certificate is revoked")
        }
    }
}

/// The refusal for an error of webpki.
fn explain(error: &webpki::Error) -> PeerRefusal {
    let (fault, detail) = match error {
        webpki::Error::CertExpired { .. } => (PeerFault::Expired, "certificate has expired"),
        webpki::Error::CertNotValidYet { .. } => {
            (PeerFault::NotYetValid, "certificate is not valid yet")
        }
        webpki::Error::UnknownIssuer => {
            (PeerFault::Untrusted, "certificate chain does not end in a trusted root")
        }
        webpki::Error::InvalidSignatureForPublicKey => {
            (PeerFault::Untrusted, "invalid signature in the certificate chain")
        }
        webpki::Error::RequiredEkuNotFoundContext(_) => {
            (PeerFault::PurposeInvalid, "extended key usage does not allow this use")
        }
        webpki::Error::UnsupportedSignatureAlgorithmContext(_)
        | webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => (
            PeerFault::TypeUnsupported,
            "unsupported key or signature algorithm in the certificate chain",
        ),
        webpki::Error::MaximumPathDepthExceeded
        | webpki::Error::MaximumPathBuildCallsExceeded
        | webpki::Error::MaximumSignatureChecksExceeded => {
            (PeerFault::MaxChainDepthExceeded, "certificate chain is too long")
        }
        webpki::Error::NameConstraintViolation => {
            (PeerFault::Rejected, "name constraints of a CA do not allow a name of the certificate")
        }
        _ => (PeerFault::Invalid, "invalid certificate in the chain"),
    };
    fault.because(detail)
}
