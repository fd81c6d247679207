//! What the proof of an identity rests on, and what takes it away again.
//!
//! A handshake proves a peer for as long as nothing that it rests on is withdrawn: a certificate of its
//! chain by a revocation list, the root that it ends in by another set of roots. Each of these has a
//! [`LinkId`], so that a connection is found by what was withdrawn, and not by looking at all of them.

use std::collections::HashSet;

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::TrustAnchor;

use crate::der::{self, Elements};
use crate::issuer;

/// A certificate by its issuer and serial number, or a root by its name and key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId([u8; 16]);

impl LinkId {
    /// The certificate that `issuer` (the content of its name, DER) numbered `serial`.
    #[must_use]
    pub fn certificate(issuer: &[u8], serial: &[u8]) -> Self {
        Self::of(&[&issuer.len().to_be_bytes(), issuer, shortest(serial)].concat())
    }

    /// A root.
    #[must_use]
    pub fn root(root: &TrustAnchor<'_>) -> Self {
        let name: &[u8] = &root.subject;
        Self::of(&[&u64::MAX.to_be_bytes(), name, &root.subject_public_key_info].concat())
    }

    /// Half of a SHA-256 is more than enough: who finds two alike ends a connection of their own.
    fn of(text: &[u8]) -> Self {
        let mut id = [0; 16];
        id.iter_mut().zip(digest(&SHA256, text).as_ref()).for_each(|(id, byte)| *id = *byte);
        Self(id)
    }
}

/// The certificates and the root that the verified path of a peer consists of. Other certificates that the peer
/// shows, or that the trust bundle holds, are not part of it.
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
    pub fn ends(&self) -> u64 {
        self.ends
    }
}

/// What a trust store no longer vouches for that the one before it did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Withdrawn(HashSet<LinkId>);

impl Withdrawn {
    /// Whether nothing was withdrawn.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether something was that the proof rests on.
    #[must_use]
    pub fn ends(&self, proof: &Proof) -> bool {
        proof.links.iter().any(|link| self.0.contains(link))
    }

    /// Each of them.
    pub fn links(&self) -> impl ExactSizeIterator<Item = &LinkId> {
        self.0.iter()
    }
}

impl FromIterator<LinkId> for Withdrawn {
    fn from_iter<I: IntoIterator<Item = LinkId>>(links: I) -> Self {
        Self(links.into_iter().collect())
    }
}

/// What is read of a certificate (RFC 5280, section 4.1).
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) whole: &'a [u8],
    pub(crate) serial: &'a [u8],
    pub(crate) issuer: &'a [u8],
    pub(crate) subject: &'a [u8],
    /// `SubjectPublicKeyInfo`.
    pub(crate) key: &'a [u8],
    pub(crate) begins: u64,
    pub(crate) ends: u64,
}

impl<'a> Fields<'a> {
    pub(crate) fn read(certificate: &'a [u8]) -> Option<Self> {
        const VERSION: u8 = 0xa0;
        let mut outer = Elements(Elements(certificate).expect(der::SEQUENCE)?.content);
        let mut fields = Elements(outer.expect(der::SEQUENCE)?.content);
        fields.optional(VERSION);
        let serial = fields.expect(der::INTEGER)?.content;
        fields.expect(der::SEQUENCE)?;
        let issuer = fields.expect(der::SEQUENCE)?.content;
        let mut validity = Elements(fields.expect(der::SEQUENCE)?.content);
        // Before 1970 is early enough.
        let begins = der::time(validity.any()?).unwrap_or_default();
        let ends = der::time(validity.any()?)?;
        let subject = fields.expect(der::SEQUENCE)?.content;
        let key = fields.expect(der::SEQUENCE)?.whole;
        Some(Self { whole: certificate, serial, issuer, subject, key, begins, ends })
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
