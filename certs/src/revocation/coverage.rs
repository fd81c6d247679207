//! What the revocation lists in force say of themselves, and whom they speak for.

use std::fmt;

use rustls_pki_types::{CertificateDer, UnixTime};

use super::parse::Scope;
use super::{Crl, CrlIndex, digits, name};
use crate::issuer;

/// What a list says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrlInfo {
    /// The readable part of the issuer's name.
    pub issuer: String,
    /// `CRLNumber` in hex.
    pub number: String,
    /// How many certificates it revokes.
    pub entries: usize,
    /// `thisUpdate`, in seconds since 1970.
    pub this_update: u64,
    /// `nextUpdate`, in seconds since 1970.
    pub next_update: u64,
    /// Of which of the issuer's certificates it speaks: `all`, `leaves`, `authorities`, and whether it
    /// speaks of those of one distribution point only.
    pub scope: String,
}

/// What the lists say of what an issuer has signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerCoverage {
    /// The readable part of its name.
    pub issuer: String,
    /// Whether a list that is in force speaks of all its leaves.
    pub leaves: bool,
    /// Whether a list that is in force speaks of all authorities that it has signed.
    pub authorities: bool,
    /// When the first of its lists expires, in seconds since 1970; none without a list.
    pub next_update: Option<u64>,
}

impl CrlIndex {
    /// What each list says of itself.
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

    /// Which of `roots`, and of the intermediates in `beside` that one of them signed, the lists speak for: in
    /// strict mode nobody is let in whom one of the others signed.
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

    /// Which lists have expired, in words.
    #[must_use]
    pub fn expired(&self, now: UnixTime) -> Vec<String> {
        let over = self.crl_infos().into_iter().filter(|list| list.next_update <= now.as_secs());
        over.map(|list| format!("list number {} of {} has expired", list.number, list.issuer))
            .collect()
    }
}

impl Crl {
    /// Whether it is in force, and not for a part that only a certificate can tell.
    fn covers_all(&self, now: UnixTime) -> bool {
        self.scope.points.is_empty() && self.next_update > now.as_secs()
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.leaves, self.authorities) {
            (true, true) => "all",
            (true, false) => "leaves",
            (false, _) => "authorities",
        })?;
        for point in &self.points {
            write!(f, " at {}", String::from_utf8_lossy(point.get(2..).unwrap_or_default()))?;
        }
        Ok(())
    }
}
