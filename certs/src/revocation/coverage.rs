//! Descriptions of the CRLs in force, and the issuers that they cover.

use rustls_pki_types::{CertificateDer, UnixTime};

use super::crl::{digits, name};
use super::index::CrlIndex;
use crate::issuer;

/// The fields of a CRL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrlInfo {
    /// The readable part of the issuer's name.
    pub issuer: String,
    /// `CRLNumber` in hex.
    pub number: String,
    /// The number of revoked certificates.
    pub entries: usize,
    /// `thisUpdate`.
    pub this_update: UnixTime,
    /// `nextUpdate`.
    pub next_update: UnixTime,
    /// The certificates of the issuer that the CRL covers: `all`, `leaves` or `authorities`, and the distribution
    /// point if it covers only one.
    pub scope: String,
}

/// The CRL coverage of an issuer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerCoverage {
    /// The readable part of the issuer's name.
    pub issuer: String,
    /// Whether a CRL in force covers all leaves of the issuer.
    pub leaves: bool,
    /// Whether a CRL in force covers all CAs that the issuer signed.
    pub authorities: bool,
    /// When the first CRL of the issuer expires; none without a CRL.
    pub next_update: Option<UnixTime>,
}

impl CrlIndex {
    /// Describes each CRL.
    #[must_use]
    pub fn crl_infos(&self) -> Vec<CrlInfo> {
        let in_force = self.in_force();
        let lists = in_force.iter().flat_map(|(issuer, lists)| {
            lists.iter().map(|list| CrlInfo {
                issuer: name(issuer),
                number: digits(&list.number),
                entries: list.serials.len(),
                this_update: list.this_update,
                next_update: list.next_update,
                scope: list.scope.to_string(),
            })
        });
        lists.collect()
    }

    /// The CRL coverage of `roots`, and of the intermediates in `beside` that one of them signed. In strict mode,
    /// certificates of an issuer without coverage are rejected.
    #[must_use]
    pub fn issuer_coverage(
        &self,
        roots: &[CertificateDer<'_>],
        beside: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Vec<IssuerCoverage> {
        let mut covers: Vec<IssuerCoverage> = Vec::new();
        let in_force = self.in_force();
        for issuer in issuer::known(roots, beside, now) {
            let lists = in_force.get(&issuer.name).map_or(&[][..], Vec::as_slice);
            let own = lists.iter().filter(|list| list.public_key == issuer.public_key);
            let whole = own.clone().filter(|list| list.covers_all(now)).map(|list| &list.scope);
            let found = IssuerCoverage {
                issuer: name(&issuer.name),
                leaves: whole.clone().any(|scope| scope.leaves),
                authorities: whole.clone().any(|scope| scope.authorities),
                next_update: own.map(|list| list.next_update).min(),
            };
            if !covers.contains(&found) {
                covers.push(found);
            }
        }
        covers
    }

    /// Messages about the CRLs that have expired.
    #[must_use]
    pub fn expired(&self, now: UnixTime) -> Vec<String> {
        let over = self.crl_infos().into_iter().filter(|list| list.next_update <= now);
        over.map(|list| format!("CRL number {} of {} has expired", list.number, list.issuer))
            .collect()
    }
}
