//! The certificates and CAs that prove the identity of a peer, and the trust changes that invalidate the proof.
//!
//! A proof is valid until a CRL revokes a certificate of its path, or a new trust bundle removes all CAs of its path. Each
//! certificate and CA has a [`LinkId`], by which a connection registry finds the affected connections without a scan.

use std::collections::HashSet;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::{CertificateDer, TrustAnchor};

use crate::der::{self, DerReader};
use crate::issuer;

/// Identifies a certificate by issuer and serial number, or a CA by name, key and name constraints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId([u8; 16]);

impl LinkId {
    /// The ID of the certificate with serial number `serial` that `issuer` (the content of its name, DER) signed.
    #[must_use]
    pub fn certificate(issuer: &[u8], serial: &[u8]) -> Self {
        Self::of(&[&issuer.len().to_be_bytes(), issuer, shortest(serial)].concat())
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
        Self::of(
            &[&no_certificate, &name_length, name, &key_length, key, &mark, constraints].concat(),
        )
    }

    /// The ID of the CA that a certificate (DER) belongs to. None if the certificate cannot be read.
    pub(crate) fn authority_of(certificate: &[u8]) -> Option<Self> {
        let certificate = CertificateDer::from(certificate);
        Some(Self::authority(&webpki::anchor_from_trusted_cert(&certificate).ok()?))
    }

    /// 128 bits of a SHA-256 are enough: a peer that finds a collision only closes a connection of its own.
    fn of(text: &[u8]) -> Self {
        let mut id = [0; 16];
        id.iter_mut().zip(digest(&SHA256, text).as_ref()).for_each(|(id, byte)| *id = *byte);
        Self(id)
    }
}

/// The certificates and CAs of a verified path, including the root. Other certificates that the peer presents, or
/// that the trust bundle contains, are not part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    links: Box<[LinkId]>,
    /// When the first of the certificates expires, in seconds since 1970.
    ends: u64,
}

impl Proof {
    pub(crate) fn new(links: Vec<LinkId>, ends: u64) -> Self {
        Self { links: links.into(), ends }
    }

    /// The certificates and CAs of the path.
    #[must_use]
    pub fn links(&self) -> &[LinkId] {
        &self.links
    }

    /// When the first of the certificates expires, in seconds since 1970.
    #[must_use]
    pub fn expires_at(&self) -> u64 {
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

/// The fields of a certificate (RFC 5280, section 4.1).
#[derive(Clone, Copy)]
pub(crate) struct CertificateFields<'a> {
    pub(crate) whole: &'a [u8],
    pub(crate) serial: &'a [u8],
    pub(crate) issuer: &'a [u8],
    pub(crate) subject: &'a [u8],
    /// `SubjectPublicKeyInfo`.
    pub(crate) key: &'a [u8],
    pub(crate) begins: u64,
    pub(crate) ends: u64,
}

impl<'a> CertificateFields<'a> {
    pub(crate) fn read(certificate: &'a [u8]) -> Option<Self> {
        const VERSION: u8 = 0xa0;
        let mut outer = DerReader(DerReader(certificate).expect(der::SEQUENCE)?.content);
        let mut fields = DerReader(outer.expect(der::SEQUENCE)?.content);
        fields.optional(VERSION);
        let serial = fields.expect(der::INTEGER)?.content;
        fields.expect(der::SEQUENCE)?;
        let issuer = fields.expect(der::SEQUENCE)?.content;
        let mut validity = DerReader(fields.expect(der::SEQUENCE)?.content);
        // A time before 1970 is treated as 1970.
        let begins = der::time(validity.any()?).unwrap_or_default();
        let ends = der::time(validity.any()?)?;
        let subject = fields.expect(der::SEQUENCE)?.content;
        let key = fields.expect(der::SEQUENCE)?.whole;
        Some(Self { whole: certificate, serial, issuer, subject, key, begins, ends })
    }

    /// The fields of all certificates that can be read.
    pub(crate) fn read_all(certificates: &'a [CertificateDer<'_>]) -> Vec<Self> {
        certificates.iter().filter_map(|certificate| Self::read(certificate)).collect()
    }

    /// Whether `above` is the named issuer, and its key signed this certificate.
    pub(crate) fn is_signed_by(&self, above: &Self) -> bool {
        self.issuer == above.subject && issuer::signed(above.key, self.whole)
    }

    pub(crate) fn id(&self) -> LinkId {
        LinkId::certificate(self.issuer, self.serial)
    }
}

/// Strips redundant sign bytes of a two's complement integer.
pub(crate) fn shortest(integer: &[u8]) -> &[u8] {
    let mut rest = integer;
    while let [sign @ (0 | 0xff), after @ ..] = rest
        && after.first().is_some_and(|next| (next & 0x80) == (sign & 0x80))
    {
        rest = after;
    }
    rest
}
