//! The persistent state of the control plane: the authority's keys, the issued and revoked certificates, the CRL number and
//! the join tokens. It is one redb database file, and each change is one transaction.
//!
//! A read error is never reported as an empty result: the caller gets an error and keeps its last state.

mod authority_set;
mod backup;
mod database;
mod entries;
mod error;
mod expiry;
mod image;
mod summary;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use redb::{ReadTransaction, ReadableDatabase as _, ReadableTable as _, WriteTransaction};
use weft_certs::{AuthorityFiles, RevokedCertificate};
use weft_model::SpiffeId;

use crate::audit;
pub use authority_set::AuthoritySet;
use database::StoreDatabase;
pub use entries::IssuedRecord;
use entries::{
    AUTHORITY, CRL_NUMBER, FLOW_SEED, ISSUED, NUMBERS, REVOKED, StoreEntry, TOKENS, read_issued,
    read_revoked, record, seconds, unreadable, write,
};
pub use error::StoreError;
pub use summary::StoreSummary;

pub(crate) const STORE_FILE: &str = "weft.redb";

/// The store of a control plane.
#[derive(Debug)]
pub struct Store(StoreDatabase);

/// The result of a check of the store and its backups.
#[derive(Debug)]
pub struct StoreCheck {
    /// The store itself.
    pub store: Result<StoreSummary, String>,
    /// The backups, newest first.
    pub backups: Vec<(PathBuf, Result<StoreSummary, String>)>,
}

impl Store {
    /// Verifies and opens the store in a folder, and makes a backup.
    ///
    /// # Errors
    /// The store is missing, in use, or damaged.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        StoreDatabase::open(folder.join(STORE_FILE)).map(Self)
    }

    /// Creates a store with a new authority in a folder. Only the present user can read it.
    ///
    /// # Errors
    /// The folder has a store or a backup already, or a file cannot be written.
    pub fn create(
        folder: &Path,
        trust_domain: &str,
        files: &AuthorityFiles,
    ) -> Result<Self, StoreError> {
        let path = folder.join(STORE_FILE);
        let io = |error: std::io::Error| StoreError::io(&path, &error);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(io)?;
        if path.exists() || !backup::backups(&path).is_empty() {
            return Err(StoreError::Exists(folder.to_owned()));
        }
        // Written under another name, so that the store's file is always complete.
        let part = path.with_extension("part");
        match fs::remove_file(&part) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
        let mut options = fs::OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&part).map_err(io)?;
        let database = redb::Builder::new().create_file(file);
        let database = database.map_err(|error| StoreError::Database(error.to_string()))?;
        write(&database, |write| {
            let mut table = write.open_table(AUTHORITY)?;
            table.insert("trust_domain", trust_domain)?;
            for (name, text) in authority_set::parts(files) {
                table.insert(name, text)?;
            }
            write.open_table(ISSUED)?;
            write.open_table(REVOKED)?;
            write.open_table(TOKENS)?;
            write.open_table(NUMBERS)?;
            Ok(())
        })?;
        drop(database);
        // Unlike a rename, a link does not replace a file that another process has created meanwhile.
        let linked = fs::hard_link(&part, &path);
        fs::remove_file(&part).map_err(io)?;
        match linked {
            Ok(()) => backup::sync_folder(&path).map_err(io)?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(StoreError::Exists(folder.to_owned()));
            }
            Err(error) => return Err(io(error)),
        }
        audit::line(&path, "authority_created", &[("trust_domain", trust_domain)]);
        Self::open(folder)
    }

    /// Verifies the store of a folder that no process has open, and its backups, without changing them.
    ///
    /// # Errors
    /// Another process has the store open.
    pub fn check_closed(folder: &Path) -> Result<StoreCheck, StoreError> {
        let path = folder.join(STORE_FILE);
        let store = match backup::check(&path) {
            Err(StoreError::InUse(folder)) => return Err(StoreError::InUse(folder)),
            checked => checked.map_err(|error| error.to_string()),
        };
        Ok(StoreCheck { store, backups: backup::backups(&path) })
    }

    /// Verifies the file of this store and its backups, while it is in use.
    #[must_use]
    pub fn check(&self) -> StoreCheck {
        let store = self.0.check().map_err(|error| error.to_string());
        StoreCheck { store, backups: backup::backups(self.path()) }
    }

    /// The path of the database file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Why the store is not available, if so. Like every other operation, this opens the database again when the retry is
    /// due.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.0.problem()
    }

    /// The authority that signs, and its trust domain.
    ///
    /// # Errors
    /// The database fails, or a part is missing.
    pub fn authority(&self) -> Result<(AuthorityFiles, String), StoreError> {
        self.read(authority_set::read_authority)
    }

    /// All authorities.
    ///
    /// # Errors
    /// The database fails, or a part is missing or invalid.
    pub fn authority_set(&self) -> Result<AuthoritySet, StoreError> {
        self.read(authority_set::read_authority_set)
    }

    /// Replaces all authorities in one transaction, if they are still equal to `before`.
    ///
    /// # Errors
    /// [`StoreError::Changed`] if they are not, or the database fails.
    pub fn replace_authority_set(
        &self,
        before: &AuthoritySet,
        after: &AuthoritySet,
    ) -> Result<(), StoreError> {
        self.write(|write| authority_set::replace_authority_set(write, before, after))
    }

    fn read<T>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.0.with(|database| work(&database.begin_read()?))
    }

    fn write<T>(
        &self,
        work: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.0.with(|database| write(database, work))
    }

    /// The latest expiry of the certificates that are valid now. None if there are none.
    ///
    /// # Errors
    /// The database fails.
    pub fn latest_expiry(&self, now: SystemTime) -> Result<Option<SystemTime>, StoreError> {
        let records = self.list()?;
        let good = records.iter().filter(|record| record.revoked.is_none());
        Ok(good.map(|record| record.not_after).filter(|end| *end > now).max())
    }

    /// Stores a certificate that was issued at `now`, and deletes old expired entries.
    ///
    /// # Errors
    /// The database fails.
    pub fn record_issued(
        &self,
        serial: &str,
        identity: &SpiffeId,
        not_after: SystemTime,
        now: SystemTime,
    ) -> Result<(), StoreError> {
        let record = format!("{} {}", record(identity, not_after), seconds(now));
        self.write(|write| {
            write.open_table(ISSUED)?.insert(serial, record.as_str())?;
            expiry::delete_expired(write, now)
        })
    }

    /// The issued certificates by serial number, without those that were deleted after their expiry.
    ///
    /// # Errors
    /// The database fails, or an entry cannot be read.
    pub fn list(&self) -> Result<Vec<IssuedRecord>, StoreError> {
        self.read(read_issued)
    }

    /// Revokes certificates by serial number, all or none. Returns for each whether it is newly revoked.
    ///
    /// # Errors
    /// The database fails.
    pub fn revoke(
        &self,
        serials: &[String],
        now: SystemTime,
    ) -> Result<BTreeMap<String, bool>, StoreError> {
        self.write(|write| {
            let mut table = write.open_table(REVOKED)?;
            let mut new = BTreeMap::new();
            for serial in serials {
                let is_known = table.get(serial.as_str())?.is_some();
                if !is_known {
                    table.insert(serial.as_str(), seconds(now))?;
                }
                new.insert(serial.clone(), !is_known);
            }
            Ok(new)
        })
    }

    /// The revoked certificates.
    ///
    /// # Errors
    /// The database fails, or an entry cannot be read.
    pub fn revoked(&self) -> Result<Vec<RevokedCertificate>, StoreError> {
        self.read(read_revoked)
    }

    /// The next CRL number. No number is returned twice.
    ///
    /// # Errors
    /// The database fails.
    pub fn next_crl_number(&self) -> Result<u64, StoreError> {
        self.write(|write| {
            let mut table = write.open_table(NUMBERS)?;
            let last = table.get(CRL_NUMBER)?.map_or(0, |number| number.value());
            let next = last.checked_add(1).ok_or_else(|| unreadable("number", CRL_NUMBER))?;
            table.insert(CRL_NUMBER, next)?;
            Ok(next)
        })
    }

    /// The seed with which agents hash flows. It is random and created once, so that an attacker cannot predict the endpoint
    /// of a flow.
    ///
    /// # Errors
    /// The database or the random number generator fails.
    pub fn flow_seed(&self) -> Result<u32, StoreError> {
        let stored = self.read(|read| {
            let seed = read.open_table(NUMBERS)?.get(FLOW_SEED)?.map(|seed| seed.value());
            Ok(seed.and_then(|seed| u32::try_from(seed).ok()))
        })?;
        if let Some(seed) = stored {
            return Ok(seed);
        }
        let seed = weft_certs::random_number();
        let seed =
            seed.ok_or_else(|| StoreError::Database("the random number generator failed".into()))?;
        self.write(|write| {
            write.open_table(NUMBERS)?.insert(FLOW_SEED, u64::from(seed))?;
            Ok(seed)
        })
    }

    /// Stores the digest of a join token.
    ///
    /// # Errors
    /// The database fails.
    pub fn add_token(
        &self,
        digest: &str,
        identity: &SpiffeId,
        until: SystemTime,
    ) -> Result<(), StoreError> {
        self.write(|write| {
            write.open_table(TOKENS)?.insert(digest, record(identity, until).as_str())?;
            Ok(())
        })
    }

    /// Whether a join token is valid, without redeeming it.
    ///
    /// # Errors
    /// The database fails.
    pub fn is_token_valid(&self, digest: &str, now: SystemTime) -> Result<bool, StoreError> {
        self.read(|read| {
            let found = read.open_table(TOKENS)?.get(digest)?;
            let record = found.and_then(|value| StoreEntry::parse(value.value()));
            Ok(record.is_some_and(|record| record.until > now))
        })
    }

    /// Redeems a join token: deletes it, and returns its identity if it was valid.
    ///
    /// # Errors
    /// The database fails.
    pub fn redeem_token(
        &self,
        digest: &str,
        now: SystemTime,
    ) -> Result<Option<String>, StoreError> {
        let found = self.write(|write| {
            let mut table = write.open_table(TOKENS)?;
            let removed = table.remove(digest)?;
            Ok(removed.and_then(|value| StoreEntry::parse(value.value())))
        })?;
        Ok(found.filter(|record| record.until > now).map(|record| record.identity))
    }
}

#[cfg(test)]
mod tests;
