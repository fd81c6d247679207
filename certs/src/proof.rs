//! What the proof of an identity rests on, and what takes it away again.
//!
//! A handshake proves a peer for as long as nothing that it rests on is withdrawn: a certificate of its
//! chain by a revocation list, the root that it ends in by another set of roots. Each of these has a
//! [`LinkId`], so that a connection is found by what was withdrawn, and not by looking at all of them.

use std::collections::HashSet;

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::{CertificateDer, TrustAnchor};

use crate::der::{self, Elements};
use crate::{TrustStore, issuer};

/// The longest chain that is followed. No verifier here takes a longer one.
const LINK_LIMIT: usize = 16;

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

/// What the proof of a peer's identity rests on. It proves nothing by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    links: Box<[LinkId]>,
    /// When the first of the certificates ends, in seconds since 1970.
    ends: u64,
}

impl Proof {
    /// Of a chain that `trust` has accepted, the leaf first. Certificates beside the way from the leaf to
    /// the root do not count; where two of the same name could be on it, both do, and so do intermediates of
    /// the trust bundle, which a peer need not show. None when one cannot be
    /// read, which an accepted one always can.
    #[must_use]
    pub fn of(chain: &[CertificateDer<'_>], trust: &TrustStore) -> Option<Self> {
        let (leaf, above) = chain.split_first()?;
        let leaf = Fields::read(leaf)?;
        let above = above.iter().take(LINK_LIMIT).chain(trust.intermediates());
        let mut above: Vec<_> = above.filter_map(|certificate| Fields::read(certificate)).collect();
        let (mut links, mut ends, mut below) = (vec![leaf.id()], leaf.ends, vec![leaf]);
        while let Some(certificate) = below.pop() {
            links.extend(roots_above(&certificate, trust));
            let name = certificate.issuer;
            let (on_the_way, others) = above.into_iter().partition(|known| known.subject == name);
            above = others;
            let on_the_way: Vec<Fields<'_>> = on_the_way;
            for known in on_the_way.into_iter().filter(|known| !known.is_root(trust)) {
                links.push(known.id());
                ends = ends.min(known.ends);
                // With a new key an authority may vouch for its own name; above it is the same name again.
                if known.issuer != name {
                    below.push(known);
                } else {
                    links.extend(roots_above(&known, trust));
                }
            }
        }
        links.sort_unstable();
        links.dedup();
        Some(Self { links: links.into(), ends })
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

/// The roots that may have signed a certificate. Which of several with one name it was, their keys tell.
fn roots_above(certificate: &Fields<'_>, trust: &TrustStore) -> Vec<LinkId> {
    let is_named = |root: &&TrustAnchor<'_>| root.subject.as_ref() == certificate.issuer;
    let named: Vec<_> = trust.anchors().iter().filter(is_named).collect();
    match named.as_slice() {
        [only] => vec![LinkId::root(only)],
        several => {
            let signed = |root: &&&TrustAnchor<'_>| {
                issuer::signed(&der::sequence(&root.subject_public_key_info), certificate.whole)
            };
            several.iter().filter(signed).map(|root| LinkId::root(root)).collect()
        }
    }
}

/// What is read of a certificate (RFC 5280, section 4.1).
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

    fn is_root(&self, trust: &TrustStore) -> bool {
        let is_it = |root: &TrustAnchor<'_>| {
            root.subject.as_ref() == self.subject
                && der::sequence(&root.subject_public_key_info) == self.key
        };
        trust.anchors().iter().any(is_it)
    }

    fn id(&self) -> LinkId {
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
