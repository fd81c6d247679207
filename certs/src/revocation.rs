//! Which certificates were revoked.
//!
//! A list is read once, when it arrives: its form by webpki, its issuer and signature against the
//! roots, its scope and its age. What remains is a sorted array of serial numbers per issuer, so a
//! handshake pays for a binary search and not for the list.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};

use crate::der::{self, Elements};
use crate::issuer::{self, Issuer};
use crate::proof::LinkId;

/// The most revoked certificates in all lists together.
const ENTRY_LIMIT: usize = 10_000_000;

const CRL_NUMBER: &[u8] = &[0x55, 0x1d, 0x14];
const ISSUING_DISTRIBUTION_POINT: &[u8] = &[0x55, 0x1d, 0x1c];

/// A number of at most 20 bytes (RFC 5280, section 4.1.2.2) and its sign, right-aligned.
type Serial = [u8; 21];

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

/// What to do when the lists do not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RevocationPolicy {
    /// Whether a certificate passes whose issuer has no list.
    pub allow_unknown: bool,
    /// Whether a certificate passes whose issuer's list has expired.
    pub allow_expired: bool,
}

impl RevocationPolicy {
    /// Fails closed: what is not known to be good is refused.
    pub const STRICT: Self = Self { allow_unknown: false, allow_expired: false };
}

/// What part a certificate plays in a chain. A list may speak of one part only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The end entity.
    Leaf,
    /// An intermediate.
    Authority,
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
    number: Serial,
    this_update: u64,
    next_update: u64,
    serials: Box<[Serial]>,
}

/// Which of its issuer's certificates a list speaks of.
#[derive(Debug, PartialEq, Eq)]
struct Scope {
    leaves: bool,
    authorities: bool,
    /// The distribution point, empty when there is none. Only the certificate says which is its own,
    /// so such a list proves nothing good.
    partition: Box<[u8]>,
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

impl CrlIndex {
    /// Reads lists in PEM, or one in DER. Certificates of intermediate issuers may stand beside
    /// them; those are used only when one of `roots` signed them. Of several lists of an issuer with
    /// the same scope the newest wins, also against those in `previous`.
    ///
    /// # Errors
    /// Each list that is malformed, of an unsupported kind, from the future, or not signed by an
    /// issuer that we trust with it.
    pub fn load(
        bytes: &[u8],
        roots: &[CertificateDer<'_>],
        previous: Option<&Self>,
        now: UnixTime,
    ) -> Result<Self, Vec<CrlError>> {
        let lists = split(bytes).map_err(|reason| vec![CrlError { index: 0, reason }])?;
        let beside: Vec<_> = CertificateDer::pem_slice_iter(bytes).filter_map(Result::ok).collect();
        let issuers = issuer::known(roots, &beside, now);
        let mut index = Self::default();
        let mut errors = Vec::new();
        for (position, list) in lists.iter().enumerate() {
            match read(list, &issuers, now) {
                Ok((issuer, list)) => index.add(issuer, list),
                Err(reason) => errors.push(CrlError { index: position, reason }),
            }
        }
        let entries = index.len();
        if entries > ENTRY_LIMIT {
            errors.push(CrlError {
                index: 0,
                reason: format!("{entries} entries; at most {ENTRY_LIMIT} are held"),
            });
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        if let Some(previous) = previous {
            index.keep_newer_of(previous);
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

    /// Puts the lists in force back where the ones that came are older.
    fn keep_newer_of(&mut self, previous: &Self) {
        for (issuer, lists) in &mut self.issuers {
            let in_force = previous.issuers.get(issuer).map_or(&[][..], Vec::as_slice);
            for list in lists {
                let newer = in_force
                    .iter()
                    .find(|held| held.is_of_a_kind_with(list) && held.age() > list.age());
                if let Some(held) = newer {
                    self.warnings.push(format!(
                        "the list of {} is older than the one in force, which stays",
                        name(issuer)
                    ));
                    *list = held.clone();
                }
            }
        }
    }

    /// What is known of the certificate that `issuer` (the content of its name, DER) numbered
    /// `serial`.
    ///
    /// A list that names the number revokes it whatever its scope, since an issuer gives a number
    /// only once. For the opposite, each list that speaks of such certificates must be in force.
    #[must_use]
    pub fn status(&self, issuer: &[u8], serial: &[u8], role: Role, now: UnixTime) -> Revocation {
        let (Some(lists), Some(serial)) = (self.issuers.get(issuer), aligned(serial)) else {
            return Revocation::Unknown;
        };
        if lists.iter().any(|list| list.serials.binary_search(&serial).is_ok()) {
            return Revocation::Revoked;
        }
        let mut covering = lists.iter().filter(|list| list.scope.covers(role)).peekable();
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
            let was_revoked = |serial: &Serial| {
                before.iter().any(|list| list.serials.binary_search(serial).is_ok())
            };
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
    fn age(&self) -> (&Serial, u64) {
        (&self.number, self.this_update)
    }

    /// Whether the newer one of the two replaces the other.
    fn is_of_a_kind_with(&self, other: &Self) -> bool {
        self.public_key == other.public_key && self.scope == other.scope
    }
}

impl Scope {
    fn covers(&self, role: Role) -> bool {
        let named = match role {
            Role::Leaf => self.leaves,
            Role::Authority => self.authorities,
        };
        named && self.partition.is_empty()
    }
}

/// The lists in PEM, or the one in DER.
fn split(bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    if bytes.first() == Some(&der::SEQUENCE) {
        return Ok(vec![bytes.to_vec().into()]);
    }
    CertificateRevocationListDer::pem_slice_iter(bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("it is neither DER nor PEM: {error}"))
}

/// Reads one list: who issued it, and what it says.
fn read(
    list: &CertificateRevocationListDer<'_>,
    issuers: &[Issuer],
    now: UnixTime,
) -> Result<(Vec<u8>, IssuerList), String> {
    let form =
        webpki::BorrowedCertRevocationList::from_der(list).map_err(|error| explain(&error))?;
    let Fields { issuer, this_update, next_update, extensions } =
        fields(list).ok_or("it is malformed")?;
    let signer = signer(list, issuer, issuers)?;
    if this_update > now.as_secs() {
        return Err("its thisUpdate is in the future".into());
    }
    let list = IssuerList {
        public_key: signer.public_key.clone(),
        scope: extensions.scope,
        number: extensions.number.ok_or("it has no CRL number that is not critical")?,
        this_update,
        next_update,
        serials: serials(&form)?,
    };
    Ok((issuer.to_vec(), list))
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

/// What webpki reads of a list and keeps to itself.
struct Fields<'a> {
    issuer: &'a [u8],
    this_update: u64,
    next_update: u64,
    extensions: Extensions,
}

fn fields(list: &[u8]) -> Option<Fields<'_>> {
    let mut list = Elements(Elements(list).expect(der::SEQUENCE)?.content);
    let mut fields = Elements(list.expect(der::SEQUENCE)?.content);
    fields.expect(der::INTEGER)?;
    fields.expect(der::SEQUENCE)?;
    let issuer = fields.expect(der::SEQUENCE)?.content;
    let this_update = der::time(fields.any()?)?;
    let next_update = der::time(fields.any()?)?;
    fields.optional(der::SEQUENCE);
    let extensions = extensions(&mut fields)?;
    Some(Fields { issuer, this_update, next_update, extensions })
}

struct Extensions {
    number: Option<Serial>,
    scope: Scope,
}

fn extensions(fields: &mut Elements<'_>) -> Option<Extensions> {
    let whole = Scope { leaves: true, authorities: true, partition: Box::default() };
    let mut found = Extensions { number: None, scope: whole };
    let mut list = Elements(Elements(fields.expect(0xa0)?.content).expect(der::SEQUENCE)?.content);
    while !list.is_empty() {
        let mut extension = Elements(list.expect(der::SEQUENCE)?.content);
        let id = extension.expect(der::OBJECT_IDENTIFIER)?;
        let critical = extension.optional(der::BOOLEAN).is_some_and(|flag| flag.content != [0]);
        let value = extension.expect(der::OCTET_STRING)?;
        // RFC 5280, section 5.2.3: "CRLNumber is a non-critical CRL extension".
        if id.content == CRL_NUMBER && !critical {
            found.number = Some(aligned(Elements(value.content).expect(der::INTEGER)?.content)?);
        }
        if id.content == ISSUING_DISTRIBUTION_POINT {
            scope(value.content, &mut found.scope)?;
        }
    }
    Some(found)
}

/// `IssuingDistributionPoint` (RFC 5280, section 5.2.5). webpki has refused indirect lists and
/// those for some reasons only.
fn scope(value: &[u8], found: &mut Scope) -> Option<()> {
    const DISTRIBUTION_POINT: u8 = 0xa0;
    const ONLY_USER_CERTIFICATES: u8 = 0x81;
    const ONLY_AUTHORITY_CERTIFICATES: u8 = 0x82;
    let mut fields = Elements(Elements(value).expect(der::SEQUENCE)?.content);
    while !fields.is_empty() {
        let field = fields.any()?;
        let set = field.content.first().is_some_and(|byte| *byte != 0);
        match field.tag {
            DISTRIBUTION_POINT => found.partition = field.content.into(),
            ONLY_USER_CERTIFICATES if set => found.authorities = false,
            ONLY_AUTHORITY_CERTIFICATES if set => found.leaves = false,
            _ => {}
        }
    }
    Some(())
}

fn serials(list: &webpki::BorrowedCertRevocationList<'_>) -> Result<Box<[Serial]>, String> {
    let mut serials = Vec::new();
    for entry in list {
        let entry = entry.map_err(|error| explain(&error))?;
        serials.push(aligned(entry.serial_number).ok_or("a serial number has over 20 bytes")?);
    }
    serials.sort_unstable();
    serials.dedup();
    Ok(serials.into_boxed_slice())
}

/// A two's complement integer, right-aligned. The sign is part of it: `FF` is not `00FF`.
fn aligned(integer: &[u8]) -> Option<Serial> {
    let negative = integer.first().is_some_and(|first| first & 0x80 != 0);
    let mut serial = if negative { [0xff; 21] } else { [0; 21] };
    let start = serial.len().checked_sub(integer.len())?;
    serial.get_mut(start..)?.copy_from_slice(integer);
    Some(serial)
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

fn explain(error: &webpki::Error) -> String {
    match error {
        webpki::Error::UnsupportedDeltaCrl => "delta lists are not supported".into(),
        webpki::Error::UnsupportedIndirectCrl => "indirect lists are not supported".into(),
        webpki::Error::UnsupportedCrlVersion => "only version 2 lists are supported".into(),
        webpki::Error::UnsupportedCriticalExtension => {
            "it has a critical extension that is not supported".into()
        }
        webpki::Error::UnsupportedRevocationReasonsPartitioning => {
            "lists for some reasons only are not supported".into()
        }
        webpki::Error::UnsupportedCrlIssuingDistributionPoint => {
            "its distribution point has no full name, which is not supported".into()
        }
        other => format!("it is malformed: {other:?}"),
    }
}
