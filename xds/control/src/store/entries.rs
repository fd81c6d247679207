//! The tables of the store, and the form of their entries.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redb::{Database, ReadTransaction, ReadableTable as _, TableDefinition, WriteTransaction};
use weft_certs::RevokedCertificate;
use weft_model::SpiffeId;

use super::error::StoreError;

/// The authority that signs, by part; the other authorities as JSON.
pub(super) const AUTHORITY: TableDefinition<'_, &str, &str> = TableDefinition::new("authority");
/// Issued certificates: serial number to `identity expiry issued`. Times are seconds since 1970; stores of earlier versions
/// have no issue time.
pub(super) const ISSUED: TableDefinition<'_, &str, &str> = TableDefinition::new("issued");
/// Revoked certificates: serial number to the time of revocation.
pub(super) const REVOKED: TableDefinition<'_, &str, u64> = TableDefinition::new("revoked");
/// Join tokens: SHA-256 of the token to `identity expiry`.
pub(super) const TOKENS: TableDefinition<'_, &str, &str> = TableDefinition::new("tokens");
/// Single numbers by name.
pub(super) const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");

pub(super) const CRL_NUMBER: &str = "revocation_list";
pub(super) const FLOW_SEED: &str = "flow_seed";
/// Incremented to check that the database is writable.
pub(super) const WRITABLE: &str = "writable";

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

/// Runs a transaction with a two-phase commit. After a crash the last commit is then known to be complete. Otherwise redb
/// could fall back to an earlier commit, which may lack a revocation.
pub(super) fn write<T>(
    database: &Database,
    work: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let mut write = database.begin_write()?;
    write.set_two_phase_commit(true);
    let done = work(&write)?;
    write.commit()?;
    Ok(done)
}

pub(super) fn check_writable(database: &Database) -> Result<(), StoreError> {
    write(database, |write| {
        let mut table = write.open_table(NUMBERS)?;
        let last = table.get(WRITABLE)?.map_or(0, |number| number.value());
        table.insert(WRITABLE, last.wrapping_add(1))?;
        Ok(())
    })
}

pub(super) fn read_issued(read: &ReadTransaction) -> Result<Vec<IssuedRecord>, StoreError> {
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

pub(super) fn read_revoked(read: &ReadTransaction) -> Result<Vec<RevokedCertificate>, StoreError> {
    let table = read.open_table(REVOKED)?;
    let mut revoked = Vec::new();
    for entry in table.iter()? {
        let (serial, at) = entry?;
        let at = time(at.value()).ok_or_else(|| unreadable("revocation", serial.value()))?;
        revoked.push(RevokedCertificate { serial: serial.value().to_owned(), at });
    }
    Ok(revoked)
}

pub(super) fn record(identity: &SpiffeId, until: SystemTime) -> String {
    format!("{identity} {}", seconds(until))
}

/// An entry of the tables of certificates and join tokens.
pub(super) struct StoreEntry {
    pub(super) identity: String,
    pub(super) until: SystemTime,
    pub(super) issued: Option<SystemTime>,
}

impl StoreEntry {
    pub(super) fn parse(text: &str) -> Option<Self> {
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
pub(super) fn time(seconds: u64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

pub(super) fn unreadable(what: &str, key: &str) -> StoreError {
    StoreError::Database(format!("invalid entry of {what} {key:?}"))
}
