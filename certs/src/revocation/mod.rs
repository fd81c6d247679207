//! CRLs: loading, verification and lookup of revoked certificates.
//!
//! A CRL is checked once on load: its syntax, its issuer and signature, its scope and its dates. The index then keeps
//! a sorted array of serial numbers per issuer, so a handshake costs a binary search.

mod coverage;
mod loading;
mod parse;
mod pending;
mod serials;

pub use coverage::{CrlInfo, IssuerCoverage};
pub use loading::check_crls;
pub(crate) use parse::distribution_points;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_model::RevocationPolicy;

use crate::issuer::{self, CaCertificate};
use crate::proof::LinkId;
use loading::{Changes, LoadedCrls, ParsedCrl, split};
use parse::{Number, Scope};
use pending::PendingCrls;
use serials::Serials;

/// The revocation status of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevocationStatus {
    /// The CRLs that cover the certificate are in force, and none revokes it.
    Good,
    /// A CRL of the issuer revokes the certificate.
    Revoked,
    /// No CRL of the issuer covers the certificate.
    Unknown,
    /// A CRL that covers the certificate is past its `nextUpdate`.
    Expired,
}

/// The role of a certificate in a chain. A CRL may cover one role only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateRole {
    /// The end entity.
    Leaf,
    /// An intermediate CA.
    Authority,
}

/// A certificate whose revocation status is queried.
#[derive(Debug, Clone, Copy)]
pub struct RevocationQuery<'a> {
    /// The content of the issuer's name, DER.
    pub issuer: &'a [u8],
    /// The issuer's `SubjectPublicKeyInfo`, DER: only CRLs of this key can prove that the certificate is good. None:
    /// CRLs of all keys with the issuer's name count.
    pub issuer_key: Option<&'a [u8]>,
    /// The serial number, two's complement, big-endian.
    pub serial: &'a [u8],
    /// The role in the chain.
    pub role: CertificateRole,
    /// The certificate, DER, for CRLs that cover one distribution point. Empty: such CRLs do not prove that the
    /// certificate is good.
    pub certificate: &'a [u8],
}

/// The revoked serial numbers by issuer. An update replaces the whole index; only CRLs that wait for their issuer are
/// added later.
#[derive(Debug, Clone, Default)]
pub struct CrlIndex {
    issuers: BTreeMap<Vec<u8>, Vec<Arc<Crl>>>,
    pending: Arc<PendingCrls>,
    warnings: Vec<String>,
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

struct Crl {
    /// The key that signed the CRL. CRL numbers are per key and scope.
    public_key: Vec<u8>,
    scope: Scope,
    /// `CRLNumber`.
    number: Number,
    this_update: u64,
    next_update: u64,
    serials: Serials,
}

impl fmt::Debug for Crl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} serials, next update {}", self.serials.len(), self.next_update)
    }
}

/// An error in loading a CRL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CRL {index}: {reason}")]
pub struct CrlError {
    /// The index of the CRL in the input, from 0.
    pub index: usize,
    /// The reason.
    pub reason: String,
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
        let (limit, length) = (policy.bytes_limit, bytes.len());
        if length > limit {
            return Err(fail(format!("CRLs have {length} bytes; must be {limit} at most")));
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
        let mut index = Self::default();
        let LoadedCrls { verified, mut waiting, mut left_out, mut errors } =
            LoadedCrls::of(lists, own, policy, now, &mut index.warnings);
        errors.extend(index.take(verified));
        let signed = seen.iter().flat_map(|issuer| pending::take_signed(&mut waiting, issuer, now));
        let signed = signed.collect();
        let problems: Vec<_> = index.take(signed).iter().map(ToString::to_string).collect();
        let is_unverified = !waiting.is_empty() || !problems.is_empty();
        if index.issuers.is_empty() && !is_unverified {
            errors.append(&mut left_out);
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let left_out = left_out.iter().map(|crl| format!("{crl}; the CRL is ignored"));
        index.warnings.extend(left_out);
        if let Some(previous) = previous {
            index.keep_newer_of(previous, &issuers, is_unverified);
        }
        index.pending = Arc::new(PendingCrls::new(waiting, problems, &mut index.issuers));
        Ok(index)
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

    /// Adds CRLs whose signatures were verified.
    fn take(&mut self, verified: Vec<ParsedCrl>) -> Vec<CrlError> {
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

    /// Adds a CRL, unless the index has a newer one with the same key and scope.
    fn add(&mut self, issuer: Vec<u8>, list: Crl) {
        let readable = name(&issuer);
        let lists = self.issuers.entry(issuer).or_default();
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
        let lists = self.issuers.get_mut(&issuer).map_or(&mut [][..], Vec::as_mut_slice);
        let held = lists.iter_mut().find(|held| held.has_same_key_and_scope(&list));
        let Some(held) = held.filter(|held| held.number >= base) else {
            let (issuer, base) = (name(&issuer), digits(&base));
            return Err(format!(
                "delta CRL without its base CRL: number {base} of {issuer}, or later"
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
    fn keep_newer_of(&mut self, previous: &Self, issuers: &[CaCertificate], is_unverified: bool) {
        let previous = previous.in_force();
        for (issuer, lists) in &previous {
            let now = self.issuers.get(issuer).map_or(&[][..], Vec::as_slice);
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
                self.issuers.entry(issuer.clone()).or_default().extend(missed);
            }
            self.warnings.push(warning);
        }
        for (issuer, lists) in &mut self.issuers {
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

    /// The revocation status of a certificate.
    ///
    /// A CRL that contains the serial number revokes the certificate whatever its scope, because an issuer uses a
    /// serial number once. For the status good, each CRL that covers the certificate must be in force.
    #[must_use]
    pub fn status(&self, asked: &RevocationQuery<'_>, now: UnixTime) -> RevocationStatus {
        let verified = self.pending.verified(asked.issuer);
        let loaded = self.issuers.get(asked.issuer).map_or(&[][..], Vec::as_slice);
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
        if covering.any(|list| list.next_update <= now.as_secs()) {
            return RevocationStatus::Expired;
        }
        RevocationStatus::Good
    }

    /// All verified CRLs by the name of their issuer.
    fn in_force(&self) -> BTreeMap<Vec<u8>, Vec<Arc<Crl>>> {
        let mut all = self.issuers.clone();
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
        self.issuers.is_empty() && self.pending.is_empty()
    }

    /// Warnings of the load, and about CRLs that wait for their issuer, for the operator.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        [self.warnings.clone(), self.pending.warnings()].concat()
    }
}

impl Crl {
    fn age(&self) -> (&Number, u64) {
        (&self.number, self.this_update)
    }

    /// Whether the newer of the two CRLs replaces the other.
    fn has_same_key_and_scope(&self, other: &Self) -> bool {
        self.public_key == other.public_key && self.scope == other.scope
    }
}

impl Scope {
    /// Whether a CRL of this scope covers the certificate.
    fn covers(&self, asked: &RevocationQuery<'_>) -> bool {
        let named = match asked.role {
            CertificateRole::Leaf => self.leaves,
            CertificateRole::Authority => self.authorities,
        };
        let at_point = |point: &&[u8]| self.points.iter().any(|own| **own == **point);
        named
            && (self.points.is_empty()
                || distribution_points(asked.certificate).iter().any(at_point))
    }
}

/// The longest readable part of a name, for messages.
fn name(issuer: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(issuer)
        .chars()
        .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '\u{0}' })
        .collect();
    let longest = text.split('\u{0}').max_by_key(|part| part.len()).unwrap_or_default();
    format!("{longest:?}")
}

/// Formats a number in hex without leading zeros.
fn digits(number: &Number) -> String {
    let digits = crate::peer::hex(number);
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() { "0".into() } else { digits.into() }
}
