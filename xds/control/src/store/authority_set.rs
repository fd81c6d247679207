//! The authorities in the store: the one that signs, and those that are only trusted.

use std::time::SystemTime;

use redb::{ReadTransaction, ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};
use weft_certs::{AuthorityFiles, RootSigner};

use super::entries::{AUTHORITY, seconds, time, unreadable};
use super::error::StoreError;

/// The table of the authorities.
trait AuthorityTable: ReadableTable<&'static str, &'static str> {}

impl<T: ReadableTable<&'static str, &'static str>> AuthorityTable for T {}

/// The authority that signs, and its trust domain.
fn authority_of(table: &impl AuthorityTable) -> Result<(AuthorityFiles, String), StoreError> {
    let part = |name: &str| -> Result<String, StoreError> {
        let value =
            table.get(name)?.ok_or_else(|| StoreError::Database(format!("{name} is missing")))?;
        Ok(value.value().to_owned())
    };
    let lists = table.get("root_lists")?.map(|lists| lists.value().to_owned()).unwrap_or_default();
    let files = AuthorityFiles {
        root_certificate: part("root_certificate")?,
        root: root_signer(part("root_key")?, lists),
        intermediate_certificate: part("intermediate_certificate")?,
        intermediate_key: part("intermediate_key")?.into(),
    };
    Ok((files, part("trust_domain")?))
}

/// The authority that signs, and its trust domain.
pub(super) fn read_authority(
    read: &ReadTransaction,
) -> Result<(AuthorityFiles, String), StoreError> {
    authority_of(&read.open_table(AUTHORITY)?)
}

/// Replaces all authorities, if they are still equal to `before`.
pub(super) fn replace_authority_set(
    write: &WriteTransaction,
    before: &AuthoritySet,
    after: &AuthoritySet,
) -> Result<(), StoreError> {
    let stored = |(files, due): &(AuthorityFiles, SystemTime)| StoredAuthority::of(files, *due);
    let others = OtherAuthorities {
        next: after.next.as_ref().map(stored),
        former: after.former.iter().map(stored).collect(),
    };
    let text =
        serde_json::to_string(&others).map_err(|error| StoreError::Database(error.to_string()))?;
    let mut table = write.open_table(AUTHORITY)?;
    if authority_set_of(&table)? != *before {
        return Err(StoreError::Changed);
    }
    for (name, text) in parts(&after.signing) {
        table.insert(name, text)?;
    }
    table.insert(OTHER_AUTHORITIES, text.as_str())?;
    Ok(())
}

pub(super) fn read_authority_set(read: &ReadTransaction) -> Result<AuthoritySet, StoreError> {
    authority_set_of(&read.open_table(AUTHORITY)?)
}

fn authority_set_of(table: &impl AuthorityTable) -> Result<AuthoritySet, StoreError> {
    let (signing, trust_domain) = authority_of(table)?;
    let others = match table.get(OTHER_AUTHORITIES)? {
        Some(text) => serde_json::from_str(text.value())
            .map_err(|error| StoreError::Database(format!("{OTHER_AUTHORITIES}: {error}")))?,
        None => OtherAuthorities::default(),
    };
    let read = |stored: StoredAuthority| {
        let due = time(stored.due).ok_or_else(|| unreadable("authority", OTHER_AUTHORITIES))?;
        Ok::<_, StoreError>((stored.files(), due))
    };
    Ok(AuthoritySet {
        trust_domain,
        signing,
        next: others.next.map(read).transpose()?,
        former: others.former.into_iter().map(read).collect::<Result<_, _>>()?,
    })
}

/// The authorities of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthoritySet {
    /// The trust domain of all authorities.
    pub trust_domain: String,
    /// The authority that signs.
    pub signing: AuthorityFiles,
    /// An authority that is trusted and does not sign yet, with the time from which it signs.
    pub next: Option<(AuthorityFiles, SystemTime)>,
    /// Former authorities, oldest first, each with the expiry of its last certificate.
    pub former: Vec<(AuthorityFiles, SystemTime)>,
}

impl AuthoritySet {
    /// All authorities; the first is the one that signs.
    pub(crate) fn all_mut(&mut self) -> impl Iterator<Item = &mut AuthorityFiles> {
        let next = self.next.as_mut().map(|(files, _)| files);
        let former = self.former.iter_mut().map(|(files, _)| files);
        std::iter::once(&mut self.signing).chain(next).chain(former)
    }
}

/// The key of the authorities that do not sign, as JSON. The name is part of the file format.
const OTHER_AUTHORITIES: &str = "beside";

#[derive(Default, Serialize, Deserialize)]
struct OtherAuthorities {
    next: Option<StoredAuthority>,
    former: Vec<StoredAuthority>,
}

#[derive(Serialize, Deserialize)]
struct StoredAuthority {
    root_certificate: String,
    root_key: String,
    #[serde(default)]
    root_lists: String,
    intermediate_certificate: String,
    intermediate_key: String,
    /// The time of [`AuthoritySet::next`] or [`AuthoritySet::former`], in seconds since 1970.
    due: u64,
}

impl StoredAuthority {
    fn of(files: &AuthorityFiles, due: SystemTime) -> Self {
        let files = files.clone();
        let (root_key, root_lists) = match files.root {
            RootSigner::Local { key } => (key.to_string(), String::new()),
            RootSigner::External { crls } => (String::new(), crls),
        };
        Self {
            root_certificate: files.root_certificate,
            root_key,
            root_lists,
            intermediate_certificate: files.intermediate_certificate,
            intermediate_key: files.intermediate_key.to_string(),
            due: seconds(due),
        }
    }

    fn files(&self) -> AuthorityFiles {
        AuthorityFiles {
            root_certificate: self.root_certificate.clone(),
            root: root_signer(self.root_key.clone(), self.root_lists.clone()),
            intermediate_certificate: self.intermediate_certificate.clone(),
            intermediate_key: self.intermediate_key.clone().into(),
        }
    }
}

/// The signer of the root's CRLs: external if the store has no key of the root.
fn root_signer(key: String, lists: String) -> RootSigner {
    if key.is_empty() {
        RootSigner::External { crls: lists }
    } else {
        RootSigner::Local { key: key.into() }
    }
}

pub(super) fn parts(files: &AuthorityFiles) -> [(&'static str, &str); 5] {
    let (key, lists) = match &files.root {
        RootSigner::Local { key } => (&**key, ""),
        RootSigner::External { crls } => ("", crls.as_str()),
    };
    [
        ("root_certificate", &files.root_certificate),
        ("root_key", key),
        ("root_lists", lists),
        ("intermediate_certificate", &files.intermediate_certificate),
        ("intermediate_key", &files.intermediate_key),
    ]
}
