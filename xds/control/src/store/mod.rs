//! The persistent state of the control plane: the authority's keys, the issued and revoked certificates, the CRL number and
//! the join tokens. It is one redb database file, and each change is one transaction.
//!
//! A read error is never reported as an empty result: the caller gets an error and keeps its last state.

mod authority_set;
mod backup;
mod database;
mod error;
mod expiry;
mod image;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redb::{
    Database, ReadTransaction, ReadableDatabase as _, ReadableTable as _, TableDefinition,
    WriteTransaction,
};
use weft_certs::{AuthorityFiles, RevokedCertificate};
use weft_model::SpiffeId;

use crate::audit;
pub use authority_set::AuthoritySet;
use database::StoreDatabase;
pub use error::StoreError;

/// The authority that signs, by part; the other authorities as JSON.
const AUTHORITY: TableDefinition<'_, &str, &str> = TableDefinition::new("authority");
/// Issued certificates: serial number to `identity expiry issued`. Times are seconds since 1970; stores of earlier versions
/// have no issue time.
const ISSUED: TableDefinition<'_, &str, &str> = TableDefinition::new("issued");
/// Revoked certificates: serial number to the time of revocation.
const REVOKED: TableDefinition<'_, &str, u64> = TableDefinition::new("revoked");
/// Join tokens: SHA-256 of the token to `identity expiry`.
const TOKENS: TableDefinition<'_, &str, &str> = TableDefinition::new("tokens");
/// Single numbers by name.
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");

const CRL_NUMBER: &str = "revocation_list";
const FLOW_SEED: &str = "flow_seed";
/// Incremented to check that the database is writable.
const WRITABLE: &str = "writable";

pub(crate) const STORE_FILE: &str = "weft.redb";

/// The store of a control plane.
#[derive(Debug)]
pub struct Store(StoreDatabase);

/// An issued certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedRecord {
    /// The serial number, hexadecimal.
    pub serial: String,
    /// The SPIFFE ID.
    pub identity: String,
    /// When it was issued; none in entries of earlier versions.
    pub issued: Option<SystemTime>,
    /// When it expires.
    pub not_after: SystemTime,
    /// When it was revoked.
    pub revoked: Option<SystemTime>,
}

/// The content of a store, counted by a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreSummary {
    /// The trust domain of the authority.
    pub trust_domain: String,
    /// The number of issued certificates.
    pub issued: usize,
    /// The number of revoked certificates.
    pub revoked: usize,
    /// The last CRL number; 0 if no CRL was signed.
    pub crl_number: u64,
}

impl std::fmt::Display for StoreSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { trust_domain, issued, revoked, crl_number } = self;
        write!(
            f,
            "trust domain {trust_domain}, {issued} certificates, {revoked} revoked, CRL number \
             {crl_number}"
        )
    }
}

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

/// Runs a transaction with a two-phase commit. After a crash the last commit is then known to be complete. Otherwise redb
/// could fall back to an earlier commit, which may lack a revocation.
fn write<T>(
    database: &Database,
    work: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let mut write = database.begin_write()?;
    write.set_two_phase_commit(true);
    let done = work(&write)?;
    write.commit()?;
    Ok(done)
}

fn check_writable(database: &Database) -> Result<(), StoreError> {
    write(database, |write| {
        let mut table = write.open_table(NUMBERS)?;
        let last = table.get(WRITABLE)?.map_or(0, |number| number.value());
        table.insert(WRITABLE, last.wrapping_add(1))?;
        Ok(())
    })
}

/// Reads and counts all entries.
fn summary(database: &Database) -> Result<StoreSummary, StoreError> {
    let read = database.begin_read()?;
    let authority_set = authority_set::read_authority_set(&read)?;
    let tokens = read.open_table(TOKENS)?;
    for entry in tokens.iter()? {
        let (digest, value) = entry?;
        StoreEntry::parse(value.value()).ok_or_else(|| unreadable("join token", digest.value()))?;
    }
    let numbers = read.open_table(NUMBERS)?;
    Ok(StoreSummary {
        trust_domain: authority_set.trust_domain,
        issued: read_issued(&read)?.len(),
        revoked: read_revoked(&read)?.len(),
        crl_number: numbers.get(CRL_NUMBER)?.map_or(0, |number| number.value()),
    })
}

fn read_issued(read: &ReadTransaction) -> Result<Vec<IssuedRecord>, StoreError> {
    let issued = read.open_table(ISSUED)?;
    let revoked = read.open_table(REVOKED)?;
    let mut records = Vec::new();
    for entry in issued.iter()? {
        let (serial, value) = entry?;
        let unreadable = || unreadable("certificate", serial.value());
        let record = StoreEntry::parse(value.value()).ok_or_else(unreadable)?;
        let at = revoked.get(serial.value())?.map(|at| at.value());
        let at = at.map(|at| time(at).ok_or_else(unreadable)).transpose()?;
        records.push(IssuedRecord {
            serial: serial.value().to_owned(),
            identity: record.identity,
            issued: record.issued,
            not_after: record.until,
            revoked: at,
        });
    }
    Ok(records)
}

fn read_revoked(read: &ReadTransaction) -> Result<Vec<RevokedCertificate>, StoreError> {
    let table = read.open_table(REVOKED)?;
    let mut revoked = Vec::new();
    for entry in table.iter()? {
        let (serial, at) = entry?;
        let at = time(at.value()).ok_or_else(|| unreadable("revocation", serial.value()))?;
        revoked.push(RevokedCertificate { serial: serial.value().to_owned(), at });
    }
    Ok(revoked)
}

fn record(identity: &SpiffeId, until: SystemTime) -> String {
    format!("{identity} {}", seconds(until))
}

/// An entry of the tables of certificates and join tokens.
struct StoreEntry {
    identity: String,
    until: SystemTime,
    issued: Option<SystemTime>,
}

impl StoreEntry {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let identity = words.next()?.to_owned();
        let until = time(words.next()?.parse().ok()?)?;
        let issued = match words.next() {
            Some(word) => Some(time(word.parse().ok()?)?),
            None => None,
        };
        Some(Self { identity, until, issued })
    }
}

/// The time. None if it is out of range, so the entry is damaged.
fn time(seconds: u64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn unreadable(what: &str, key: &str) -> StoreError {
    StoreError::Database(format!("invalid entry of {what} {key:?}"))
}

#[cfg(test)]
mod tests;
