//! The CRLs of a trust store, and the lookup of revoked certificates.

use std::sync::Arc;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_model::RevocationPolicy;

use super::crl::{Crl, CrlError, RevocationQuery, RevocationStatus};
use super::crl_set::{CrlSet, CrlsByIssuer};
use super::loading::{LoadedCrls, split};
use super::pending::{self, PendingCrls};
use crate::issuer::{self, CaCertificate};
use crate::proof::LinkId;

/// The revoked serial numbers by issuer. An update replaces the whole index; only CRLs that wait for their issuer are
/// added later.
#[derive(Debug, Clone, Default)]
pub struct CrlIndex {
    /// The CRLs verified on load.
    loaded: CrlSet,
    pending: Arc<PendingCrls>,
}

/// The CAs that verify CRLs on load.
#[derive(Debug, Clone, Copy)]
pub struct CrlSigners<'a> {
    /// The roots.
    pub roots: &'a [CertificateDer<'static>],
    /// Intermediates. They are used if a root, or another of them, signed them.
    pub intermediates: &'a [CertificateDer<'static>],
    /// Intermediates learned from verified chains. Their CRLs are treated as if these chains came after the load: a
    /// CRL that cannot be used waits or causes a warning, and does not fail the load.
    pub seen: &'a [CertificateDer<'static>],
}

impl CrlIndex {
    /// Loads CRLs in PEM, or any number of concatenated CRLs in DER. PEM input may contain certificates of
    /// intermediate issuers; they are used only if one of `signers` signed them. Of several CRLs with the same issuer
    /// and scope the newest is used, including those in `previous`; a delta CRL is applied to its base CRL. A CRL
    /// that none of these CAs signed is used after [`Self::verify_pending`] gets its issuer.
    ///
    /// # Errors
    /// A CRL is malformed, unsupported or from the future, its signer may not sign CRLs, or the CRLs exceed the
    /// limits of `policy`. In strict mode, such a CRL of an unknown issuer only causes a warning: certificates
    /// without a CRL are rejected anyway.
    pub fn load(
        bytes: &[u8],
        signers: &CrlSigners<'_>,
        previous: Option<&Self>,
        policy: &RevocationPolicy,
        now: UnixTime,
    ) -> Result<Self, Vec<CrlError>> {
        let fail = |reason| vec![CrlError { index: 0, reason }];
        if bytes.len() > policy.bytes_limit {
            let reason =
                format!("CRLs have {} bytes; must be {} at most", bytes.len(), policy.bytes_limit);
            return Err(fail(reason));
        }
        let lists = split(bytes).map_err(fail)?;
        let beside = CertificateDer::pem_slice_iter(bytes).filter_map(Result::ok);
        let beside: Vec<_> = signers.intermediates.iter().cloned().chain(beside).collect();
        let mut issuers: Vec<_> =
            signers.roots.iter().filter_map(|root| CaCertificate::of(root)).collect();
        let mut rest = issuer::add_below(&mut issuers, beside.iter().collect(), now);
        let own = issuers.len();
        rest.extend(signers.seen.iter().filter(|seen| !beside.contains(seen)));
        issuer::add_below(&mut issuers, rest, now);
        let (own, seen) = issuers.split_at(own);
        let mut loaded = CrlSet::default();
        let LoadedCrls { verified, mut waiting, mut left_out, mut errors } =
            LoadedCrls::of(lists, own, policy, now, &mut loaded.warnings);
        errors.extend(loaded.take(verified));
        let signed = seen.iter().flat_map(|issuer| pending::take_signed(&mut waiting, issuer, now));
        let signed = signed.collect();
        let problems: Vec<_> = loaded.take(signed).iter().map(ToString::to_string).collect();
        let is_unverified = !waiting.is_empty() || !problems.is_empty();
        if loaded.by_issuer.is_empty() && !is_unverified {
            errors.append(&mut left_out);
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let left_out = left_out.iter().map(|crl| format!("{crl}; the CRL is ignored"));
        loaded.warnings.extend(left_out);
        if let Some(previous) = previous {
            loaded.keep_newer_of(&previous.in_force(), &issuers, is_unverified);
        }
        let pending = Arc::new(PendingCrls::new(waiting, problems, &mut loaded.by_issuer));
        Ok(Self { loaded, pending })
    }

    /// Verifies the CRLs that wait for a CA of this name with its key, once. The CA must be on a path that was
    /// verified up to a root.
    pub(crate) fn verify_pending(&self, issuer: &CaCertificate, now: UnixTime) {
        self.pending.verify_pending(issuer, now);
    }

    /// Whether a CRL waits for an issuer of this name (the content of the name, DER). Takes no lock.
    pub(crate) fn has_pending_from(&self, issuer: &[u8]) -> bool {
        self.pending.has_pending_from(issuer)
    }

    /// The number of CRLs that wait for their issuer.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        self.pending.len()
    }

    /// The revocation status of a certificate.
    ///
    /// A CRL that contains the serial number revokes the certificate whatever its scope, because an issuer uses a
    /// serial number once. For the status good, each CRL that covers the certificate must be in force.
    #[must_use]
    pub fn status(&self, asked: &RevocationQuery<'_>, now: UnixTime) -> RevocationStatus {
        let verified = self.pending.verified(asked.issuer);
        let loaded = self.loaded.by_issuer.get(asked.issuer).map_or(&[][..], Vec::as_slice);
        let lists = || loaded.iter().chain(&verified);
        if lists().any(|list| list.serials.contain(asked.serial)) {
            return RevocationStatus::Revoked;
        }
        let is_own = |list: &&Arc<Crl>| asked.issuer_key.is_none_or(|key| list.public_key == key);
        let own = lists().filter(is_own);
        let mut covering = own.filter(|list| list.scope.covers(asked)).peekable();
        if covering.peek().is_none() {
            return RevocationStatus::Unknown;
        }
        if covering.any(|list| list.next_update <= now) {
            return RevocationStatus::Expired;
        }
        RevocationStatus::Good
    }

    /// All verified CRLs by the name of their issuer.
    pub(super) fn in_force(&self) -> CrlsByIssuer {
        let mut all = self.loaded.by_issuer.clone();
        for (issuer, lists) in self.pending.all_verified() {
            all.entry(issuer).or_default().extend(lists);
        }
        all
    }

    /// The certificates that these CRLs revoke and those of `previous` did not.
    pub(crate) fn revoked_since(&self, previous: Option<&Self>) -> Vec<LinkId> {
        let before = previous.map(Self::in_force).unwrap_or_default();
        let mut revoked = Vec::new();
        for (issuer, lists) in &self.in_force() {
            let before = before.get(issuer).map_or(&[][..], Vec::as_slice);
            // Most CRLs do not change between updates.
            let is_held = |list: &&Arc<Crl>| before.iter().any(|held| Arc::ptr_eq(held, list));
            let was_revoked =
                |serial: &&[u8]| before.iter().any(|list| list.serials.contain(serial));
            let new = lists.iter().filter(|list| !is_held(list));
            let serials = new.flat_map(|list| list.serials.iter());
            let serials = serials.filter(|serial| !was_revoked(serial));
            revoked.extend(serials.map(|serial| LinkId::certificate(issuer, serial)));
        }
        revoked
    }

    /// The number of revoked serial numbers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.in_force().values().flatten().map(|list| list.serials.len()).sum()
    }

    /// The memory of the serial numbers in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.in_force().values().flatten().map(|list| list.serials.bytes()).sum()
    }

    /// Whether the index has no CRL, and none waits for its issuer.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.loaded.by_issuer.is_empty() && self.pending.is_empty()
    }

    /// Warnings of the load, and about CRLs that wait for their issuer, for the operator.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        [self.loaded.warnings.clone(), self.pending.warnings()].concat()
    }
}
