//! Which certificates were revoked.
//!
//! A list is read once, when it arrives: its profile, its issuer and signature against the roots, its scope and
//! its age. What remains is a sorted array of serial numbers per issuer, so a handshake pays for a binary
//! search and not for the list.

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

use crate::issuer::{self, Issuer};
use crate::proof::LinkId;
use loading::{Changes, LoadedCrls, ParsedCrl, split};
use parse::{Number, Scope};
use pending::PendingCrls;
use serials::Serials;

/// What is known of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevocationStatus {
    /// Its issuer's lists are in force and do not name it.
    Good,
    /// A list of its issuer names it.
    Revoked,
    /// There is no list of its issuer that speaks of all such certificates.
    Unknown,
    /// A list of its issuer that speaks of it is past its `nextUpdate`.
    Expired,
}

/// What part a certificate plays in a chain. A list may speak of one part only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateRole {
    /// The end entity.
    Leaf,
    /// An intermediate.
    Authority,
}

/// The certificate that is asked about.
#[derive(Debug, Clone, Copy)]
pub struct RevocationQuery<'a> {
    /// The content of its issuer's name, DER.
    pub issuer: &'a [u8],
    /// Its issuer's `SubjectPublicKeyInfo`, DER: a list proves nothing good of what another key of the same
    /// name has signed. None: the name alone counts.
    pub issuer_key: Option<&'a [u8]>,
    /// Its serial number, two's complement, big-endian.
    pub serial: &'a [u8],
    /// The part that it plays.
    pub role: CertificateRole,
    /// All of it, for where a list speaks of a part of its issuer's certificates; empty: such lists verify_pending
    /// nothing good.
    pub certificate: &'a [u8],
}

/// The revoked serial numbers by issuer. Replaced whole; only lists that wait for their issuer are added to it.
#[derive(Debug, Clone, Default)]
pub struct CrlIndex {
    issuers: BTreeMap<Vec<u8>, Vec<Arc<Crl>>>,
    pending: Arc<PendingCrls>,
    warnings: Vec<String>,
}

/// The authorities by which lists are verified when they are loaded.
#[derive(Debug, Clone, Copy)]
pub struct CrlSigners<'a> {
    /// The roots.
    pub roots: &'a [CertificateDer<'static>],
    /// Intermediates; they count when one of the roots, or of the others, signed them.
    pub intermediates: &'a [CertificateDer<'static>],
    /// Intermediates that only verified chains have shown so far. Their lists are treated as if these chains came
    /// after the load: a list of theirs that cannot be used waits, or is reported, and does not fail the load.
    pub seen: &'a [CertificateDer<'static>],
}

struct Crl {
    /// The key that signed it: lists count their numbers per key and scope.
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

/// Why a list cannot be used. Its place is its number among the lists, from 0.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("revocation list {index}: {reason}")]
pub struct CrlError {
    /// Which list.
    pub index: usize,
    /// Why.
    pub reason: String,
}

impl CrlIndex {
    /// Reads lists in PEM, or any number in DER, one behind the other. Certificates of intermediate issuers
    /// may stand beside those in PEM; they are used only when one of `signers` signed them. Of several lists
    /// of an issuer with the same scope the newest wins, also against those in `previous`; a list of changes
    /// is applied to it. A list that none of these authorities signed counts once [`Self::verify_pending`] is given
    /// the one that did.
    ///
    /// # Errors
    /// Each list that is malformed, of an unsupported kind or from the future, or whose signer may not sign
    /// lists; and when there is more than `policy` allows. In strict mode such a list is left out with a
    /// warning where its issuer is not known: nobody is let in whose list is not there.
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
            return Err(fail(format!("{length} bytes of lists; at most {limit} are read")));
        }
        let lists = split(bytes).map_err(fail)?;
        let beside = CertificateDer::pem_slice_iter(bytes).filter_map(Result::ok);
        let beside: Vec<_> = signers.intermediates.iter().cloned().chain(beside).collect();
        let mut issuers: Vec<_> =
            signers.roots.iter().filter_map(|root| Issuer::of(root)).collect();
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
        let left_out = left_out.iter().map(|list| format!("{list}; the list is ignored"));
        index.warnings.extend(left_out);
        if let Some(previous) = previous {
            index.keep_newer_of(previous, &issuers, is_unverified);
        }
        index.pending = Arc::new(PendingCrls::new(waiting, problems, &mut index.issuers));
        Ok(index)
    }

    /// Verifies the lists that wait for an authority of this name by its key, once. The authority must be on a
    /// path that was verified up to a root.
    pub(crate) fn verify_pending(&self, issuer: &Issuer, now: UnixTime) {
        self.pending.verify_pending(issuer, now);
    }

    /// Whether a list waits for an issuer of this name (the content of the name, DER). Takes no lock.
    pub(crate) fn has_pending_from(&self, issuer: &[u8]) -> bool {
        self.pending.has_pending_from(issuer)
    }

    /// How many lists wait for their issuer.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        self.pending.len()
    }

    /// Takes lists whose signatures were verified.
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

    /// Takes a list, unless a newer one of its kind stands in the same set.
    fn add(&mut self, issuer: Vec<u8>, list: Crl) {
        let readable = name(&issuer);
        let lists = self.issuers.entry(issuer).or_default();
        let Some(held) = lists.iter_mut().find(|held| held.has_same_key_and_scope(&list)) else {
            lists.push(Arc::new(list));
            return;
        };
        if held.age() != list.age() {
            self.warnings.push(format!(
                "there are an older and a newer list of {readable}; the newer one counts"
            ));
        }
        if held.age() < list.age() {
            *held = Arc::new(list);
        }
    }

    /// Applies a list of changes to the list that it changes.
    fn change(&mut self, read: ParsedCrl) -> Result<(), String> {
        let ParsedCrl { issuer, list, changes: Some(Changes { base, restored }), .. } = read else {
            return Ok(());
        };
        let lists = self.issuers.get_mut(&issuer).map_or(&mut [][..], Vec::as_mut_slice);
        let held = lists.iter_mut().find(|held| held.has_same_key_and_scope(&list));
        let Some(held) = held.filter(|held| held.number >= base) else {
            let (issuer, base) = (name(&issuer), digits(&base));
            return Err(format!(
                "it changes list number {base} of {issuer}, or a later one, which is not here"
            ));
        };
        if held.number < list.number {
            let kept = held.serials.iter().filter(|serial| !restored.contain(serial));
            let serials = Serials::new(kept.chain(list.serials.iter()).collect());
            let serials = serials.map_err(|_| "a serial number has over 20 bytes")?;
            let next_update = held.next_update.min(list.next_update);
            *held = Arc::new(Crl { serials, next_update, ..list });
        }
        Ok(())
    }

    /// Puts the lists in force back where the ones that came are older, or are missing while others came that
    /// could not be verified (`is_unverified`): one of those may be a list of the same issuer that was damaged.
    fn keep_newer_of(&mut self, previous: &Self, issuers: &[Issuer], is_unverified: bool) {
        let previous = previous.in_force();
        for (issuer, lists) in &previous {
            let now = self.issuers.get(issuer).map_or(&[][..], Vec::as_slice);
            // Of whom we trust no more there need be none.
            let is_missed = |held: &&Arc<Crl>| {
                let signer = (issuer.as_slice(), held.public_key.as_slice());
                issuers.iter().any(|known| (&known.name[..], &known.public_key[..]) == signer)
                    && !now.iter().any(|new| new.has_same_key_and_scope(held))
            };
            let missed: Vec<_> = lists.iter().filter(is_missed).cloned().collect();
            if missed.is_empty() {
                continue;
            }
            let mut warning = format!("a list of {} is not among those that came", name(issuer));
            if is_unverified {
                warning += "; the last good one stays in force, as one that came is not verified";
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
                        "the list of {} is older than the one in force, which stays",
                        name(issuer)
                    ));
                    *list = held.clone();
                } else if held.serials == list.serials && held.next_update == list.next_update {
                    // The same one again: that nothing has changed is then seen at a glance.
                    *list = held.clone();
                }
            }
        }
    }

    /// What is known of a certificate.
    ///
    /// A list that names the number revokes it whatever its scope, since an issuer gives a number
    /// only once. For the opposite, each list that speaks of such certificates must be in force.
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

    /// The lists that count now, by the name of their issuer.
    fn in_force(&self) -> BTreeMap<Vec<u8>, Vec<Arc<Crl>>> {
        let mut all = self.issuers.clone();
        for (issuer, lists) in self.pending.all_verified() {
            all.entry(issuer).or_default().extend(lists);
        }
        all
    }

    /// What these lists revoke and those of `previous` did not.
    pub(crate) fn revoked_since(&self, previous: Option<&Self>) -> Vec<LinkId> {
        let before = previous.map(Self::in_force).unwrap_or_default();
        let mut revoked = Vec::new();
        for (issuer, lists) in &self.in_force() {
            let before = before.get(issuer).map_or(&[][..], Vec::as_slice);
            // Most lists stay as they are.
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

    /// How many serial numbers are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.in_force().values().flatten().map(|list| list.serials.len()).sum()
    }

    /// How many bytes the serial numbers take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.in_force().values().flatten().map(|list| list.serials.bytes()).sum()
    }

    /// Whether no list is held, and none waits for its issuer.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.issuers.is_empty() && self.pending.is_empty()
    }

    /// What an operator should know of the load, and of the lists that wait.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        [self.warnings.clone(), self.pending.warnings()].concat()
    }
}

impl Crl {
    fn age(&self) -> (&Number, u64) {
        (&self.number, self.this_update)
    }

    /// Whether the newer one of the two replaces the other.
    fn has_same_key_and_scope(&self, other: &Self) -> bool {
        self.public_key == other.public_key && self.scope == other.scope
    }
}

impl Scope {
    /// Whether a list of this scope would name the certificate if it were revoked.
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

/// The readable parts of a name, for messages.
fn name(issuer: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(issuer)
        .chars()
        .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '\u{0}' })
        .collect();
    let longest = text.split('\u{0}').max_by_key(|part| part.len()).unwrap_or_default();
    format!("{longest:?}")
}

/// A number in hex, without zeroes before it.
fn digits(number: &Number) -> String {
    let digits = crate::peer::hex(number);
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() { "0".into() } else { digits.into() }
}
