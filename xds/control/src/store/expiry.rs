//! Deletes expired entries, so that the store and the CRLs do not grow with the age of a mesh.

use std::time::{Duration, SystemTime};

use redb::{ReadableTable as _, WriteTransaction};

use super::entries::{ISSUED, NUMBERS, REVOKED, StoreEntry, TOKENS, seconds, time};
use super::error::StoreError;

/// How long an entry stays after its expiry: peers whose clocks are behind accept the certificate meanwhile, and must find
/// it in the CRL.
const RETENTION: Duration = Duration::from_secs(24 * 3600);
/// How often expired entries are deleted.
const RUN_INTERVAL: Duration = Duration::from_secs(3600);
/// The key of the time of the last deletion, in seconds since 1970.
const LAST_RUN: &str = "expired_looked_at";

/// Deletes certificates with their revocations, and join tokens, that expired longer than [`RETENTION`] ago. Runs at most
/// once per [`RUN_INTERVAL`]. A revocation of an unknown certificate stays: its expiry is not known.
///
/// An entry is deleted only if it had expired at the previous run as well, so that one run with a clock that is ahead
/// deletes nothing.
pub(super) fn delete_expired(write: &WriteTransaction, now: SystemTime) -> Result<(), StoreError> {
    let mut numbers = write.open_table(NUMBERS)?;
    let last = numbers.get(LAST_RUN)?.and_then(|at| time(at.value()));
    if last.is_some_and(|last| last <= now && now < last + RUN_INTERVAL) {
        return Ok(());
    }
    numbers.insert(LAST_RUN, seconds(now))?;
    let Some(end) = last.and_then(|last| last.min(now).checked_sub(RETENTION)) else {
        return Ok(());
    };
    let mut issued = write.open_table(ISSUED)?;
    let mut revoked = write.open_table(REVOKED)?;
    for serial in expired(&issued, end)? {
        issued.remove(serial.as_str())?;
        revoked.remove(serial.as_str())?;
    }
    let mut tokens = write.open_table(TOKENS)?;
    for digest in expired(&tokens, end)? {
        tokens.remove(digest.as_str())?;
    }
    Ok(())
}

/// The keys of the entries that expired before a time. An unreadable entry stays, and is reported by [`super::Store::list`].
fn expired(
    table: &redb::Table<'_, &'static str, &'static str>,
    end: SystemTime,
) -> Result<Vec<String>, StoreError> {
    let mut keys = Vec::new();
    for entry in table.iter()? {
        let (key, value) = entry?;
        if StoreEntry::parse(value.value()).is_some_and(|record| record.until < end) {
            keys.push(key.value().to_owned());
        }
    }
    Ok(keys)
}
