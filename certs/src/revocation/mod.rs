//! Which certificates were revoked.
//!
//! A list is read once, when it arrives: its form, its issuer and signature against the roots, its scope and
//! its age. What remains is a sorted array of serial numbers per issuer, so a handshake pays for a binary
//! search and not for the list.

mod coverage;
mod list;
mod serials;

pub use coverage::{Coverage, Covers};
pub(crate) use list::distribution_points;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use weft_model::RevocationPolicy;

use crate::der;
use crate::issuer::{self, Issuer};
use crate::proof::LinkId;
use list::{List, Number, Scope};
use serials::Serials;

/// What is known of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revocation {
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
pub enum Role {
    /// The end entity.
    Leaf,
    /// An intermediate.
    Authority,
}

/// The certificate that is asked about.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The content of its issuer's name, DER.
    pub issuer: &'a [u8],
    /// Its issuer's `SubjectPublicKeyInfo`, DER: a list proves nothing good of what another key of the same
    /// name has signed. None: the name alone counts.
    pub issuer_key: Option<&'a [u8]>,
    /// Its serial number, two's complement, big-endian.
    pub serial: &'a [u8],
    /// The part that it plays.
    pub role: Role,
    /// All of it, for where a list speaks of a part of its issuer's certificates; empty: such lists prove
    /// nothing good.
    pub certificate: &'a [u8],
}

/// The revoked serial numbers by issuer. Immutable; replaced whole.
#[derive(Debug, Clone, Default)]
pub struct CrlIndex {
    issuers: BTreeMap<Vec<u8>, Vec<Arc<IssuerList>>>,
    warnings: Vec<String>,
}

struct IssuerList {
    /// The key that signed it: lists count their numbers per key and scope.
    public_key: Vec<u8>,
    scope: Scope,
    /// `CRLNumber`.
    number: Number,
    this_update: u64,
    next_update: u64,
    serials: Serials,
}

impl fmt::Debug for IssuerList {
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

/// What a list was that could be read.
enum Read {
    Whole(Vec<u8>, IssuerList),
    /// It changes a list of at least this number.
    Changes(Vec<u8>, Changes),
}

/// A list of changes (a delta list; RFC 5280, section 5.2.4).
struct Changes {
    position: usize,
    base: Number,
    list: IssuerList,
    restored: Serials,
}

impl CrlIndex {
    /// Reads lists in PEM, or any number in DER, one behind the other. Certificates of intermediate issuers
    /// may stand beside those in PEM; they are used only when one of `roots` signed them. Of several lists
    /// of an issuer with the same scope the newest wins, also against those in `previous`; a list of changes
    /// is applied to it.
    ///
    /// # Errors
    /// Each list that is malformed, of an unsupported kind, from the future, or not signed by an issuer that
    /// we trust with it; and when there is more than `policy` allows.
    pub fn load(
        bytes: &[u8],
        roots: &[CertificateDer<'_>],
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
        let beside: Vec<_> = CertificateDer::pem_slice_iter(bytes).filter_map(Result::ok).collect();
        let issuers = issuer::known(roots, &beside, now);
        let (mut index, mut errors, mut changes) = (Self::default(), Vec::new(), Vec::new());
        let (mut room, mut lapsed) = (policy.entries_limit, Vec::new());
        for (position, list) in lists.iter().enumerate() {
            match read(list, position, &issuers, room, now) {
                Ok(Read::Whole(issuer, list)) => {
                    room = room.saturating_sub(list.serials.len());
                    index.add(issuer, list);
                }
                Ok(Read::Changes(issuer, list)) => {
                    room = room.saturating_sub(list.list.serials.len());
                    changes.push((issuer, list));
                }
                // Whose time is over has nobody below it who could be let in.
                Err(reason) if reason == issuer::NOT_IN_FORCE => {
                    lapsed.push(CrlError { index: position, reason });
                }
                Err(reason) => errors.push(CrlError { index: position, reason }),
            }
        }
        changes.sort_by_key(|(_, changes)| changes.list.number);
        for (issuer, changes) in changes {
            let index_of = changes.position;
            if let Err(reason) = index.change(&issuer, changes) {
                errors.push(CrlError { index: index_of, reason });
            }
        }
        if index.is_empty() {
            errors.append(&mut lapsed);
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let lapsed = lapsed.iter().map(|list| format!("{list}; it does not count"));
        index.warnings.extend(lapsed);
        if let Some(previous) = previous {
            index.keep_newer_of(previous, &issuers);
        }
        Ok(index)
    }

    /// Takes a list, unless a newer one of its kind stands in the same set.
    fn add(&mut self, issuer: Vec<u8>, list: IssuerList) {
        let readable = name(&issuer);
        let lists = self.issuers.entry(issuer).or_default();
        let Some(held) = lists.iter_mut().find(|held| held.is_of_a_kind_with(&list)) else {
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
    fn change(&mut self, issuer: &[u8], changes: Changes) -> Result<(), String> {
        let Changes { base, list, restored, .. } = changes;
        let lists = self.issuers.get_mut(issuer).map_or(&mut [][..], Vec::as_mut_slice);
        let held = lists.iter_mut().find(|held| held.is_of_a_kind_with(&list));
        let Some(held) = held.filter(|held| held.number >= base) else {
            let (issuer, base) = (name(issuer), digits(&base));
            return Err(format!(
                "it changes list number {base} of {issuer}, or a later one, which is not here"
            ));
        };
        if held.number < list.number {
            let kept = held.serials.iter().filter(|serial| !restored.contain(serial));
            let serials = Serials::new(kept.chain(list.serials.iter()).collect());
            let serials = serials.map_err(|_| "a serial number has over 20 bytes")?;
            let next_update = held.next_update.min(list.next_update);
            *held = Arc::new(IssuerList { serials, next_update, ..list });
        }
        Ok(())
    }

    /// Puts the lists in force back where the ones that came are older.
    fn keep_newer_of(&mut self, previous: &Self, issuers: &[Issuer]) {
        for (issuer, lists) in &previous.issuers {
            let now = self.issuers.get(issuer).map_or(&[][..], Vec::as_slice);
            // Of whom we trust no more there need be none.
            let is_missed = |held: &Arc<IssuerList>| {
                let signer = (issuer.as_slice(), held.public_key.as_slice());
                issuers.iter().any(|known| (&known.name[..], &known.public_key[..]) == signer)
                    && !now.iter().any(|new| new.is_of_a_kind_with(held))
            };
            if lists.iter().any(is_missed) {
                let warning = format!("a list of {} is not among those that came", name(issuer));
                self.warnings.push(warning);
            }
        }
        for (issuer, lists) in &mut self.issuers {
            let in_force = previous.issuers.get(issuer).map_or(&[][..], Vec::as_slice);
            for list in lists {
                let held = in_force.iter().find(|held| held.is_of_a_kind_with(list));
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
    pub fn status(&self, asked: &Asked<'_>, now: UnixTime) -> Revocation {
        let Some(lists) = self.issuers.get(asked.issuer) else {
            return Revocation::Unknown;
        };
        if lists.iter().any(|list| list.serials.contain(asked.serial)) {
            return Revocation::Revoked;
        }
        let is_own =
            |list: &&Arc<IssuerList>| asked.issuer_key.is_none_or(|key| list.public_key == key);
        let own = lists.iter().filter(is_own);
        let mut covering = own.filter(|list| list.scope.covers(asked)).peekable();
        if covering.peek().is_none() {
            return Revocation::Unknown;
        }
        if covering.any(|list| list.next_update <= now.as_secs()) {
            return Revocation::Expired;
        }
        Revocation::Good
    }

    /// What these lists revoke and those of `previous` did not.
    pub(crate) fn revoked_since(&self, previous: Option<&Self>) -> impl Iterator<Item = LinkId> {
        self.issuers.iter().flat_map(move |(issuer, lists)| {
            let before = previous.and_then(|previous| previous.issuers.get(issuer));
            let before = before.map_or(&[][..], Vec::as_slice);
            // Most lists stay as they are.
            let held = |list: &Arc<IssuerList>| before.iter().any(|held| Arc::ptr_eq(held, list));
            let new = lists.iter().filter(move |list| !held(list));
            let was_revoked =
                |serial: &&[u8]| before.iter().any(|list| list.serials.contain(serial));
            new.flat_map(|list| list.serials.iter())
                .filter(move |serial| !was_revoked(serial))
                .map(|serial| LinkId::certificate(issuer, serial))
        })
    }

    /// How many serial numbers are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.issuers.values().flatten().map(|list| list.serials.len()).sum()
    }

    /// How many bytes the serial numbers take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.issuers.values().flatten().map(|list| list.serials.bytes()).sum()
    }

    /// Whether no list is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.issuers.is_empty()
    }

    /// What an operator should know of the load.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl IssuerList {
    fn age(&self) -> (&Number, u64) {
        (&self.number, self.this_update)
    }

    /// Whether the newer one of the two replaces the other.
    fn is_of_a_kind_with(&self, other: &Self) -> bool {
        self.public_key == other.public_key && self.scope == other.scope
    }
}

impl Scope {
    /// Whether a list of this scope would name the certificate if it were revoked.
    fn covers(&self, asked: &Asked<'_>) -> bool {
        let named = match asked.role {
            Role::Leaf => self.leaves,
            Role::Authority => self.authorities,
        };
        let at_point = |point: &&[u8]| self.points.iter().any(|own| **own == **point);
        named
            && (self.points.is_empty()
                || distribution_points(asked.certificate).iter().any(at_point))
    }
}

/// The lists in PEM, or those in DER.
/// Whether there is a list in it, and nothing that only looks like one. Who signed it is another matter.
///
/// # Errors
/// Why not.
pub fn holds_lists(bytes: &[u8]) -> Result<(), String> {
    let lists = split(bytes)?;
    if lists.is_empty() {
        return Err("there is no revocation list in it".into());
    }
    lists.iter().try_for_each(|list| List::read(list, usize::MAX).map(drop))
}

fn split(bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    if bytes.first() == Some(&der::SEQUENCE) {
        let (mut lists, mut rest) = (Vec::new(), der::Elements(bytes));
        while !rest.is_empty() {
            let list = rest.expect(der::SEQUENCE).ok_or("it is malformed")?;
            lists.push(list.whole.to_vec().into());
        }
        return Ok(lists);
    }
    CertificateRevocationListDer::pem_slice_iter(bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("it is neither DER nor PEM: {error}"))
}

/// Reads one list: who issued it, and what it says.
fn read(
    list: &CertificateRevocationListDer<'_>,
    position: usize,
    issuers: &[Issuer],
    limit: usize,
    now: UnixTime,
) -> Result<Read, String> {
    let List { issuer, this_update, next_update, number, base, scope, revoked, restored } =
        List::read(list, limit)?;
    let signer = signer(list, issuer, issuers)?;
    if this_update > now.as_secs() {
        return Err("its thisUpdate is in the future".into());
    }
    let set = |serials| Serials::new(serials).map_err(|_| "a serial number has over 20 bytes");
    let list = IssuerList {
        public_key: signer.public_key.clone(),
        scope,
        number,
        this_update,
        next_update,
        serials: set(revoked)?,
    };
    let issuer = issuer.to_vec();
    Ok(match base {
        None => Read::Whole(issuer, list),
        Some(base) => {
            Read::Changes(issuer, Changes { position, base, list, restored: set(restored)? })
        }
    })
}

/// Which of the authorities of this name signed the list.
fn signer<'a>(list: &[u8], issuer: &[u8], issuers: &'a [Issuer]) -> Result<&'a Issuer, String> {
    let mut named = issuers.iter().filter(|known| known.name == issuer).peekable();
    if named.peek().is_none() {
        return Err(format!("its issuer {} is none that we trust", name(issuer)));
    }
    let signer = named
        .find(|known| known.signed(list))
        .ok_or_else(|| format!("its signature is not by {}", name(issuer)))?;
    signer.may_sign_lists()?;
    Ok(signer)
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
