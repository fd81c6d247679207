//! The certificates and CAs that prove the identity of a peer, and the trust changes that invalidate the proof.
//!
//! A proof is valid until a CRL revokes a certificate of its path, or a new trust bundle removes all CAs of its path. Each
//! certificate and CA has a [`LinkId`], by which the certificate index of the sidecar finds the affected connections without a scan.

use std::collections::HashSet;
use std::sync::Arc;

use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};

use crate::digest::sha256;
use crate::serial::shortest;

/// Identifies a certificate by issuer and serial number, or a CA by name, key and name constraints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId([u8; 16]);

impl LinkId {
    /// The ID of the certificate with serial number `serial` that `issuer` (the content of its name, DER) signed.
    #[must_use]
    pub fn certificate(issuer: &[u8], serial: &[u8]) -> Self {
        Self::of([&issuer.len().to_be_bytes(), issuer, shortest(serial)])
    }

    /// The ID of a CA: the same for each certificate of the CA, and for a root and an intermediate.
    #[must_use]
    pub fn authority(anchor: &TrustAnchor<'_>) -> Self {
        let name: &[u8] = &anchor.subject;
        let key: &[u8] = &anchor.subject_public_key_info;
        let constraints = anchor.name_constraints.as_ref();
        let mark = [u8::from(constraints.is_some())];
        let constraints = constraints.map_or(&[][..], AsRef::as_ref);
        let [name_length, key_length] = [name, key].map(|part| part.len().to_be_bytes());
        let no_certificate = u64::MAX.to_be_bytes();
        Self::of([&no_certificate, &name_length, name, &key_length, key, &mark, constraints])
    }

    /// The ID of the CA that a certificate (DER) belongs to. None if the certificate cannot be read.
    pub(crate) fn authority_of(certificate: &[u8]) -> Option<Self> {
        let certificate = CertificateDer::from(certificate);
        Some(Self::authority(&webpki::anchor_from_trusted_cert(&certificate).ok()?))
    }

    /// 128 bits of a SHA-256 are enough: a peer that finds a collision only closes a connection of its own.
    fn of<const N: usize>(parts: [&[u8]; N]) -> Self {
        let mut id = [0; 16];
        id.iter_mut().zip(sha256(parts)).for_each(|(id, byte)| *id = byte);
        Self(id)
    }
}

/// The certificates and CAs of a verified path, including the root. Other certificates that the peer presents, or
/// that the trust bundle contains, are not part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    links: Box<[LinkId]>,
    /// When the first of the certificates expires.
    ends: UnixTime,
}

impl Proof {
    pub(crate) fn new(links: Vec<LinkId>, ends: UnixTime) -> Self {
        Self { links: links.into(), ends }
    }

    /// The certificates and CAs of the path.
    #[must_use]
    pub fn links(&self) -> &[LinkId] {
        &self.links
    }

    /// When the first of the certificates expires.
    #[must_use]
    pub fn expires_at(&self) -> UnixTime {
        self.ends
    }
}

/// The certificates and CAs that a trust store no longer accepts, compared with the store before it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustDelta {
    /// Revoked certificates.
    pub(crate) revoked: HashSet<LinkId>,
    /// CAs that were trusted directly before and are not now.
    pub(crate) gone: HashSet<LinkId>,
    /// CAs that are trusted now: a path through one of them does not need the certificates above it.
    pub(crate) trusted: Arc<HashSet<LinkId>>,
}

impl TrustDelta {
    /// Whether no certificate is revoked and no CA is removed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of revoked certificates and removed CAs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.revoked.len() + self.gone.len()
    }

    /// Whether the proof has become invalid: one of its certificates is revoked, or one of its CAs is removed and
    /// no CA of the proof is trusted.
    #[must_use]
    pub fn invalidates(&self, proof: &Proof) -> bool {
        let has = |links: &HashSet<LinkId>| proof.links.iter().any(|link| links.contains(link));
        has(&self.revoked) || (has(&self.gone) && !has(&self.trusted))
    }

    /// The revoked certificates and removed CAs. A proof that [`Self::invalidates`] has at least one of them.
    pub fn links(&self) -> impl Iterator<Item = &LinkId> {
        self.revoked.iter().chain(&self.gone)
    }
}
