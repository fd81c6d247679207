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

/// A certificate by its issuer and serial number, or an authority by its name, key and name constraints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId([u8; 16]);

impl LinkId {
    /// The certificate that `issuer` (the content of its name, DER) numbered `serial`.
    #[must_use]
    pub fn certificate(issuer: &[u8], serial: &[u8]) -> Self {
        Self::of(&[&issuer.len().to_be_bytes(), issuer, shortest(serial)].concat())
    }

    /// An authority, whichever certificate names it: the same as a root and as an intermediate.
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

    /// The authority that a certificate (DER) is for. None when it cannot be read.
    pub(crate) fn authority_of(certificate: &[u8]) -> Option<Self> {
        let certificate = CertificateDer::from(certificate);
        Some(Self::authority(&webpki::anchor_from_trusted_cert(&certificate).ok()?))
    }

    /// Half of a SHA-256 is more than enough: who finds two alike ends a connection of their own.
    fn of(text: &[u8]) -> Self {
        let mut id = [0; 16];
        id.iter_mut().zip(digest(&SHA256, text).as_ref()).for_each(|(id, byte)| *id = *byte);
        Self(id)
    }
}

/// The certificates and authorities, up to the root, that the verified path of a peer consists of. Other
/// certificates that the peer shows, or that the trust bundle holds, are not part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    links: Box<[LinkId]>,
    /// When the first of the certificates ends, in seconds since 1970.
    ends: u64,
}

impl Proof {
    pub(crate) fn new(links: Vec<LinkId>, ends: u64) -> Self {
        Self { links: links.into(), ends }
    }

    /// What it rests on.
    #[must_use]
    pub fn links(&self) -> &[LinkId] {
        &self.links
    }

    /// When the first of its certificates ends, in seconds since 1970.
    #[must_use]
    pub fn expires_at(&self) -> u64 {
        self.ends
    }
}

/// What a trust store no longer vouches for that the one before it did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustDelta {
    /// Certificates that are revoked.
    pub(crate) revoked: HashSet<LinkId>,
    /// Authorities that are no longer trusted by themselves.
    pub(crate) gone: HashSet<LinkId>,
    /// Authorities that are trusted now: a path through one of them does not need what is above it.
    pub(crate) trusted: Arc<HashSet<LinkId>>,
}

impl TrustDelta {
    /// Whether nothing was withdrawn.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many certificates and authorities were withdrawn.
    #[must_use]
    pub fn len(&self) -> usize {
        self.revoked.len() + self.gone.len()
    }

    /// Whether the proof no longer holds: a certificate of it was revoked, or an authority of it is gone and no
    /// other one of it is trusted.
    #[must_use]
    pub fn invalidates(&self, proof: &Proof) -> bool {
        let has = |links: &HashSet<LinkId>| proof.links.iter().any(|link| links.contains(link));
        has(&self.revoked) || (has(&self.gone) && !has(&self.trusted))
    }

    /// Each certificate and authority that was withdrawn. A proof that [`Self::invalidates`] has one of them.
    pub fn links(&self) -> impl Iterator<Item = &LinkId> {
        self.revoked.iter().chain(&self.gone)
    }
}

/// What is read of a certificate (RFC 5280, section 4.1).
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
        // Before 1970 is early enough.
        let begins = der::time(validity.any()?).unwrap_or_default();
        let ends = der::time(validity.any()?)?;
        let subject = fields.expect(der::SEQUENCE)?.content;
        let key = fields.expect(der::SEQUENCE)?.whole;
        Some(Self { whole: certificate, serial, issuer, subject, key, begins, ends })
    }

    /// Of those certificates that can be read.
    pub(crate) fn read_all(certificates: &'a [CertificateDer<'_>]) -> Vec<Self> {
        certificates.iter().filter_map(|certificate| Self::read(certificate)).collect()
    }

    /// Whether it names the other as its issuer, and the other's key signed it.
    pub(crate) fn is_signed_by(&self, above: &Self) -> bool {
        self.issuer == above.subject && issuer::signed(above.key, self.whole)
    }

    pub(crate) fn id(&self) -> LinkId {
        LinkId::certificate(self.issuer, self.serial)
    }
}

/// A two's complement integer without bytes that say nothing.
pub(crate) fn shortest(integer: &[u8]) -> &[u8] {
    let mut rest = integer;
    while let [sign @ (0 | 0xff), after @ ..] = rest
        && after.first().is_some_and(|next| (next & 0x80) == (sign & 0x80))
    {
        rest = after;
    }
    rest
}
