//! Verified CRLs: which of several with the same issuer, key and scope is in force.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::crl::{Crl, CrlError, digits, name};
use super::parse::{Changes, ParsedCrl};
use super::serials::Serials;
use crate::issuer::CaCertificate;

/// CRLs by the name of their issuer.
pub(super) type CrlsByIssuer = BTreeMap<Vec<u8>, Vec<Arc<Crl>>>;

/// Verified CRLs. Of several with the same issuer, key and scope the newest is in force.
#[derive(Debug, Clone, Default)]
pub(super) struct CrlSet {
    pub(super) by_issuer: CrlsByIssuer,
    /// Warnings for the operator about CRLs that are not used.
    pub(super) warnings: Vec<String>,
}

impl CrlSet {
    /// Adds CRLs whose signatures were verified.
    pub(super) fn take(&mut self, verified: Vec<ParsedCrl>) -> Vec<CrlError> {
        let mut changes = Vec::new();
        for read in verified {
            match read {
                ParsedCrl { issuer, list, changes: None, .. } => self.add(issuer, list),
                changing => changes.push(changing),
            }
        }
        changes.sort_by_key(|read| read.list.number);
        let changed = changes.into_iter().map(|read| {
            let index = read.position;
            self.change(read).map_err(|reason| CrlError { index, reason })
        });
        changed.filter_map(Result::err).collect()
    }

    /// Adds a CRL, unless the set has a newer one with the same key and scope.
    fn add(&mut self, issuer: Vec<u8>, list: Crl) {
        let readable = name(&issuer);
        let lists = self.by_issuer.entry(issuer).or_default();
        let Some(held) = lists.iter_mut().find(|held| held.has_same_key_and_scope(&list)) else {
            lists.push(Arc::new(list));
            return;
        };
        if held.age() != list.age() {
            self.warnings
                .push(format!("{readable} has an older and a newer CRL; the newer one is used"));
        }
        if held.age() < list.age() {
            *held = Arc::new(list);
        }
    }

    /// Applies a delta CRL to its base CRL.
    fn change(&mut self, read: ParsedCrl) -> Result<(), String> {
        let ParsedCrl { issuer, list, changes: Some(Changes { base, restored }), .. } = read else {
            return Ok(());
        };
        let lists = self.by_issuer.get_mut(&issuer).map_or(&mut [][..], Vec::as_mut_slice);
        let held = lists.iter_mut().find(|held| held.has_same_key_and_scope(&list));
        let Some(held) = held.filter(|held| held.number >= base) else {
            return Err(format!(
                "delta CRL without its base CRL: number {} of {}, or later",
                digits(&base),
                name(&issuer)
            ));
        };
        if held.number < list.number {
            let kept = held.serials.iter().filter(|serial| !restored.contain(serial));
            let serials = Serials::new(kept.chain(list.serials.iter()).collect());
            let serials = serials.map_err(|_| "serial number is longer than 20 bytes")?;
            let next_update = held.next_update.min(list.next_update);
            *held = Arc::new(Crl { serials, next_update, ..list });
        }
        Ok(())
    }

    /// Keeps the CRLs of `previous` that are newer than those loaded, or that are missing while another loaded CRL is
    /// not verified (`is_unverified`): that one may be a damaged CRL of the same issuer.
    pub(super) fn keep_newer_of(
        &mut self,
        previous: &CrlsByIssuer,
        issuers: &[CaCertificate],
        is_unverified: bool,
    ) {
        for (issuer, lists) in previous {
            let now = self.by_issuer.get(issuer).map_or(&[][..], Vec::as_slice);
            // Issuers removed from the trust bundle need no CRL.
            let is_missed = |held: &&Arc<Crl>| {
                let signer = (issuer.as_slice(), held.public_key.as_slice());
                issuers.iter().any(|known| (&known.name[..], &known.public_key[..]) == signer)
                    && !now.iter().any(|new| new.has_same_key_and_scope(held))
            };
            let missed: Vec<_> = lists.iter().filter(is_missed).cloned().collect();
            if missed.is_empty() {
                continue;
            }
            let mut warning = format!("the loaded CRLs have none of {}", name(issuer));
            if is_unverified {
                warning +=
                    "; the last good one stays in force, because a loaded CRL is not verified";
                self.by_issuer.entry(issuer.clone()).or_default().extend(missed);
            }
            self.warnings.push(warning);
        }
        for (issuer, lists) in &mut self.by_issuer {
            let in_force = previous.get(issuer).map_or(&[][..], Vec::as_slice);
            for list in lists {
                let held = in_force.iter().find(|held| held.has_same_key_and_scope(list));
                let Some(held) = held.filter(|held| held.age() >= list.age()) else {
                    continue;
                };
                if held.age() > list.age() {
                    self.warnings.push(format!(
                        "the loaded CRL of {} is older than the one in force, which stays",
                        name(issuer)
                    ));
                    *list = held.clone();
                } else if held.serials == list.serials && held.next_update == list.next_update {
                    // The same CRL was loaded again: sharing the `Arc` makes later comparisons cheap.
                    *list = held.clone();
                }
            }
        }
    }
}
