//! The rustls verifiers: the path by webpki, revocation by [`CrlIndex`], names by the policy.
//!
//! webpki's own revocation check verifies the list's signature again in every handshake (24 ms for
//! a million entries), so the path is built without it and the verified path is then looked up in
//! the index.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DistinguishedName, Error};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use weft_model::{SpiffeId, StringMatch};

use crate::fault::{self, PeerFault};
use crate::path_cache::{self, CachedPath, ChainDigest, PathCache, Purpose};
use crate::proof::{CertificateFields, LinkId};
use crate::{CertificateRole, Proof, RevocationQuery, RevocationStatus, TrustStore, der, profile};

pub(crate) static ALGORITHMS: std::sync::LazyLock<WebPkiSupportedAlgorithms> =
    std::sync::LazyLock::new(|| {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
    });

/// How the signatures of a handshake are verified, which is the same whoever asks: what a verifier of rustls
/// must have beside its own question.
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
                &$crate::verify::ALGORITHMS,
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
                &$crate::verify::ALGORITHMS,
            )
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            $crate::verify::ALGORITHMS.supported_schemes()
        }
    };
}
pub(crate) use signatures;

/// Checks the certificates of peers against a trust store.
pub(crate) struct Verifier {
    trust: Arc<TrustStore>,
    /// Names asked for beside those of the store; the peer needs one of each non-empty list.
    names: Vec<StringMatch>,
    hints: Vec<DistinguishedName>,
    mandatory: bool,
    path_cache: PathCache,
}

/// How many certificates beside its own a peer may show, whether or not they are on its path.
pub(crate) const PRESENTED_LIMIT: usize = 16;

impl Verifier {
    pub(crate) fn new(trust: Arc<TrustStore>, names: Vec<StringMatch>, mandatory: bool) -> Self {
        let hints = trust.hints();
        Self { trust, names, hints, mandatory, path_cache: PathCache::default() }
    }

    pub(crate) fn trust(&self) -> &TrustStore {
        &self.trust
    }

    /// Checks all but which names are wanted.
    fn verify<'a>(
        &self,
        end_entity: &'a CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        purpose: Purpose,
    ) -> Result<webpki::EndEntityCert<'a>, Error> {
        let digest = path_cache::chain_digest(purpose, end_entity, intermediates);
        if self.known_path(&digest, end_entity, intermediates, now).is_some()
            && let Ok(known) = webpki::EndEntityCert::try_from(end_entity)
        {
            return Ok(known);
        }
        let verified =
            self.verify_chain(end_entity, intermediates, now, purpose).map(|(leaf, path)| {
                if let Some(path) = path {
                    self.path_cache.put(digest, path);
                }
                leaf
            });
        if verified.is_err() {
            fault::note(end_entity);
        }
        verified
    }

    /// The proof of a chain that a handshake has just accepted, leaf first: the path that the handshake found, or,
    /// when that path was not remembered, one that is found by another verification. None when the chain is not
    /// valid.
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

    /// The path that was found before, if it is still valid. None: verify the chain again, since there may be
    /// another path.
    fn known_path(
        &self,
        digest: &ChainDigest,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Option<CachedPath> {
        let path = self.path_cache.get(digest)?;
        if !(path.from..=path.proof.expires_at()).contains(&now.as_secs()) {
            return None;
        }
        let mut certificates: Vec<&[u8]> = vec![end_entity];
        for at in &path.above {
            certificates.push(self.candidates(intermediates).nth(*at)?);
        }
        self.check_revocation(&certificates, &path.root_key, now).ok()?;
        Some(path)
    }

    /// The certificates that may be on the path above a leaf, in the order that [`CachedPath::above`] counts: those that
    /// the peer shows, then the intermediates of the trust bundle.
    fn candidates<'c>(&'c self, shown: &'c [CertificateDer<'_>]) -> impl Iterator<Item = &'c [u8]> {
        shown.iter().map(AsRef::as_ref).chain(self.trust.intermediates().iter().map(AsRef::as_ref))
    }

    fn verify_chain<'a>(
        &self,
        end_entity: &'a CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        purpose: Purpose,
    ) -> Result<(webpki::EndEntityCert<'a>, Option<CachedPath>), Error> {
        if intermediates.len() > PRESENTED_LIMIT {
            return Err(
                PeerFault::MaxChainDepthExceeded.refuse("it shows a chain that is too long")
            );
        }
        let certificate = webpki::EndEntityCert::try_from(end_entity)
            .map_err(|_| PeerFault::Invalid.refuse("its certificate cannot be read"))?;
        profile::check_leaf(end_entity).map_err(|detail| PeerFault::Invalid.refuse(detail))?;
        let identity =
            profile::identity(end_entity).map_err(|detail| PeerFault::Rejected.refuse(detail))?;
        let both: Vec<CertificateDer<'_>>;
        let intermediates = match self.trust.intermediates() {
            [] => intermediates,
            _ => {
                both = self.candidates(intermediates).map(CertificateDer::from).collect();
                &both[..]
            }
        };
        let (fault, found) = (Cell::new(None), RefCell::new(None));
        let good = |path: &webpki::VerifiedPath<'_>| {
            self.check_path(path, identity.as_ref(), now).map_err(|refused| {
                fault.set(Some(refused));
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
            // webpki goes on to look for another path, and tells of the worst error: ours says more.
            let (fault, detail) = fault.get().unwrap_or_else(|| explain(&error));
            fault.refuse(detail)
        })?;
        let path = found.take();
        Ok((certificate, path))
    }

    /// What webpki leaves to us of a path: that its authorities may sign, that the id is of the root's
    /// domain, and that nothing of it was revoked.
    fn check_path(
        &self,
        path: &webpki::VerifiedPath<'_>,
        identity: Option<&SpiffeId>,
        now: UnixTime,
    ) -> Result<(), (PeerFault, &'static str)> {
        let mut depth = 1;
        for authority in path.intermediate_certificates() {
            profile::check_authority(&authority.der())
                .map_err(|detail| (PeerFault::Invalid, detail))?;
            depth += 1;
        }
        if depth > self.trust.policy().depth_limit {
            return Err((PeerFault::MaxChainDepthExceeded, "its chain is too long"));
        }
        let domain = self.trust.domain_of(path.anchor());
        if let (Some(domain), Some(identity)) = (domain, identity)
            && domain != identity.trust_domain()
        {
            let detail = "its trust domain is not that of the root that it ends in";
            return Err((PeerFault::Rejected, detail));
        }
        let above: Vec<CertificateDer<'_>> =
            path.intermediate_certificates().map(|certificate| certificate.der()).collect();
        let leaf = path.end_entity().der();
        self.trust.learn(&above, now);
        let certificates: Vec<&[u8]> =
            std::iter::once(&leaf).chain(&above).map(AsRef::as_ref).collect();
        let root_key = der::sequence(&path.anchor().subject_public_key_info);
        self.check_revocation(&certificates, &root_key, now)
    }

    /// Whether the lists let a path pass: its certificates, the leaf first, and the root's key.
    fn check_revocation(
        &self,
        certificates: &[&[u8]],
        root_key: &[u8],
        now: UnixTime,
    ) -> Result<(), (PeerFault, &'static str)> {
        if self.trust.revocations().is_none() {
            return Ok(());
        }
        let unreadable = (PeerFault::Invalid, "its certificate cannot be read");
        let fields = certificates.iter().map(|certificate| CertificateFields::read(certificate));
        let fields = fields.collect::<Option<Vec<_>>>().ok_or(unreadable)?;
        let keys = fields.iter().skip(1).map(|issuer| issuer.key).chain([root_key]);
        for (at, (certificate, issuer_key)) in fields.iter().zip(keys).enumerate() {
            let asked = RevocationQuery {
                issuer: certificate.issuer,
                issuer_key: Some(issuer_key),
                serial: certificate.serial,
                role: if at == 0 { CertificateRole::Leaf } else { CertificateRole::Authority },
                certificate: certificate.whole,
            };
            self.trust.check_revocation(&asked, now).map_err(|status| match status {
                RevocationStatus::Expired => {
                    (PeerFault::CrlProcessingError, "its revocation list has expired")
                }
                RevocationStatus::Unknown => {
                    (PeerFault::CrlProcessingError, "no revocation list speaks of it")
                }
                RevocationStatus::Revoked | RevocationStatus::Good => {
                    (PeerFault::CrlHit, "it was revoked")
                }
            })?;
        }
        Ok(())
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
        let certificate = self.verify(end_entity, intermediates, now, Purpose::Client)?;
        // Nobody asked for this client by its name: it is the policy that refuses it.
        if !self.is_named(&certificate) {
            fault::note(end_entity);
            return Err(PeerFault::Rejected.refuse("it is not one of those who are let in"));
        }
        Ok(ClientCertVerified::assertion())
    }

    signatures!();
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
        let certificate = self.verify(end_entity, intermediates, now, Purpose::Server)?;
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

/// A verified path in terms of the certificates from which it was built. None when a certificate of the path cannot
/// be read.
fn found_path(
    path: &webpki::VerifiedPath<'_>,
    leaf: &CertificateDer<'_>,
    candidates: &[CertificateDer<'_>],
) -> Option<CachedPath> {
    let mut above = Vec::new();
    let leaf = CertificateFields::read(leaf)?;
    let mut from = leaf.begins;
    let mut ends = leaf.ends;
    let mut links = vec![leaf.id()];
    for certificate in path.intermediate_certificates() {
        let der = certificate.der();
        above.push(candidates.iter().position(|candidate| **candidate == *der)?);
        let fields = CertificateFields::read(&der)?;
        (from, ends) = (from.max(fields.begins), ends.min(fields.ends));
        links.extend([fields.id(), LinkId::authority_of(&der)?]);
    }
    links.push(LinkId::authority(path.anchor()));
    let root_key = der::sequence(&path.anchor().subject_public_key_info).into();
    Some(CachedPath { above: above.into(), root_key, from, proof: Proof::new(links, ends) })
}

fn explain(error: &webpki::Error) -> (PeerFault, &'static str) {
    match error {
        webpki::Error::CertExpired { .. } => (PeerFault::Expired, "it has expired"),
        webpki::Error::CertNotValidYet { .. } => (PeerFault::NotYetValid, "it is not good yet"),
        webpki::Error::UnknownIssuer => (PeerFault::Untrusted, "its chain ends in no root of ours"),
        webpki::Error::InvalidSignatureForPublicKey => {
            (PeerFault::Untrusted, "a signature of its chain is wrong")
        }
        webpki::Error::RequiredEkuNotFoundContext(_) => {
            (PeerFault::PurposeInvalid, "it is for something else")
        }
        webpki::Error::UnsupportedSignatureAlgorithmContext(_)
        | webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => (
            PeerFault::TypeUnsupported,
            "a key or signature of its chain is of no kind that is taken",
        ),
        webpki::Error::MaximumPathDepthExceeded
        | webpki::Error::MaximumPathBuildCallsExceeded
        | webpki::Error::MaximumSignatureChecksExceeded => {
            (PeerFault::MaxChainDepthExceeded, "its chain is too long")
        }
        webpki::Error::NameConstraintViolation => {
            (PeerFault::Rejected, "an authority of its chain may not give it its name")
        }
        _ => (PeerFault::Invalid, "a certificate of its chain is not as it must be"),
    }
}
