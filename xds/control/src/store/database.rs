//! The open database, and its recovery. After an I/O error redb refuses every operation, so the file is closed, verified
//! and opened again, with exponential backoff.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use redb::Database;
use weft_model::Backoff;

use crate::clock::monotonic;

use super::backup;
use super::backup::BackupMode;
use super::entries::check_writable;
use super::error::StoreError;
use super::image::catch_panic;
use super::summary::StoreSummary;

/// The time between attempts to open the database again.
const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(250), longest: Duration::from_secs(5) };
/// After this time without a failure the backoff begins with the shortest wait again.
const BACKOFF_RESET: Duration = Duration::from_secs(60);

/// A database that is opened again after a failure.
#[derive(Debug)]
pub(super) struct StoreDatabase {
    path: PathBuf,
    inner: Mutex<DatabaseInner>,
}

#[derive(Debug)]
struct DatabaseInner {
    state: DatabaseState,
    backoff: RetryBackoff,
}

#[derive(Debug)]
enum DatabaseState {
    Open(OpenDatabase),
    Failed(String),
}

#[derive(Debug)]
struct OpenDatabase {
    database: Database,
    file: FileId,
}

/// Identifies the open file, to detect that it was replaced or removed.
#[derive(Debug, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(path: &Path) -> Option<Self> {
        let data = fs::metadata(path).ok()?;
        Some(Self { device: data.dev(), inode: data.ino() })
    }
}

/// The backoff of a database that failed.
#[derive(Debug, Default)]
struct RetryBackoff {
    failures: u32,
    last: Option<Instant>,
    due: Option<Instant>,
}

impl RetryBackoff {
    fn failed(&mut self, now: Instant) {
        let is_reset = self.last.is_some_and(|last| now.duration_since(last) > BACKOFF_RESET);
        self.failures = if is_reset { 0 } else { self.failures };
        let wait = BACKOFF.delay(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.last = Some(now);
        self.due = Some(now + wait);
    }

    fn is_due(&self, now: Instant) -> bool {
        self.due.is_none_or(|due| due <= now)
    }
}

impl StoreDatabase {
    /// Verifies and opens an existing database file.
    ///
    /// # Errors
    /// The file is missing, in use, or damaged.
    pub(super) fn open(path: PathBuf) -> Result<Self, StoreError> {
        let opened = open(&path, BackupMode::Create)?;
        let inner =
            DatabaseInner { state: DatabaseState::Open(opened), backoff: RetryBackoff::default() };
        Ok(Self { path, inner: Mutex::new(inner) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Why the database is not available, if so. Opens it again if the retry is due.
    pub(super) fn problem(&self) -> Option<String> {
        self.with(|_| Ok(())).err().map(|error| error.to_string())
    }

    /// Verifies the file, while no transaction is in progress.
    ///
    /// # Errors
    /// The file cannot be read, or is damaged.
    pub(super) fn check(&self) -> Result<StoreSummary, StoreError> {
        let _guard = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let file =
            fs::File::open(&self.path).map_err(|error| StoreError::io(&self.path, &error))?;
        backup::check_open(&self.path, &file)
    }

    /// Runs an operation on the database. Operations are serialized.
    ///
    /// # Errors
    /// The error of the operation, or the database is not available.
    pub(super) fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let now = monotonic();
        if let DatabaseState::Failed(reason) = &inner.state {
            if !inner.backoff.is_due(now) {
                return Err(self.unavailable(reason));
            }
            match reopen(&self.path) {
                Ok(opened) => {
                    tracing::info!(store = %self.path.display(), "store available again");
                    inner.state = DatabaseState::Open(opened);
                }
                Err(error) => return Err(self.failed(&mut inner, error.to_string(), now)),
            }
        }
        let DatabaseState::Open(opened) = &inner.state else {
            return Err(self.unavailable("the database is closed"));
        };
        if FileId::of(&self.path).as_ref() != Some(&opened.file) {
            let reason = "the file was removed or replaced while in use";
            return Err(self.failed(&mut inner, reason.into(), now));
        }
        match catch_panic(|| work(&opened.database)) {
            Ok(Err(StoreError::Broken(reason))) | Err(reason) => {
                Err(self.failed(&mut inner, reason, now))
            }
            Ok(done) => done,
        }
    }

    /// Closes the database, and logs the first failure.
    fn failed(&self, inner: &mut DatabaseInner, reason: String, now: Instant) -> StoreError {
        inner.backoff.failed(now);
        let error = self.unavailable(&reason);
        if let DatabaseState::Open(_) = inner.state {
            tracing::error!(
                store = %self.path.display(),
                reason,
                "store failed: issuing and admin commands are paused"
            );
        }
        let before = std::mem::replace(&mut inner.state, DatabaseState::Failed(reason));
        // Closing writes to the file, and may fail like the operation before.
        drop(catch_panic(|| drop(before)));
        error
    }

    fn unavailable(&self, reason: &str) -> StoreError {
        StoreError::Unavailable { path: self.path.clone(), reason: reason.to_owned() }
    }
}

fn open(path: &Path, mode: BackupMode) -> Result<OpenDatabase, StoreError> {
    let file = backup::open_verified(path, mode)?;
    let id = FileId::of(path).ok_or_else(|| StoreError::Missing(path.to_owned()))?;
    let database = catch_panic(|| redb::Builder::new().create_file(file));
    let database = database
        .map_err(StoreError::Broken)?
        .map_err(|error| StoreError::Io { path: path.to_owned(), reason: error.to_string() })?;
    Ok(OpenDatabase { database, file: id })
}

/// Opens the database again, and checks that it is writable.
fn reopen(path: &Path) -> Result<OpenDatabase, StoreError> {
    backup::check_free_space(path).map_err(|error| StoreError::io(path, &error))?;
    let opened = open(path, BackupMode::Skip)?;
    match catch_panic(|| check_writable(&opened.database)) {
        Ok(Ok(())) => Ok(opened),
        failed => {
            drop(catch_panic(|| drop(opened)));
            Err(match failed {
                Ok(Err(error)) => error,
                Err(reason) => StoreError::Broken(reason),
                Ok(Ok(())) => StoreError::Broken("the database is closed".into()),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_database_is_retried_with_backoff_that_resets_after_a_while() {
        let mut backoff = RetryBackoff::default();
        let start = monotonic();
        assert!(backoff.is_due(start));
        backoff.failed(start);
        assert!(!backoff.is_due(start) && backoff.is_due(start + BACKOFF.first));
        for _ in 0..40 {
            backoff.failed(start);
        }
        assert!(!backoff.is_due(start + BACKOFF.longest - Duration::from_millis(1)));
        assert!(backoff.is_due(start + BACKOFF.longest));
        let later = start + BACKOFF_RESET + Duration::from_secs(1);
        backoff.failed(later);
        assert!(backoff.is_due(later + BACKOFF.first));
    }
}
