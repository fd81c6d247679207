//! The open database, and what is done when it fails: the library refuses everything after one I/O error, so
//! the file is closed, verified and opened again, ever more slowly, until it works.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use redb::Database;

use crate::clock::monotonic;

use super::backup::BackupMode;
use super::image::catch_panic;
use super::{StoreError, backup, check_writable};

const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A failure so long after the one before it begins again with the shortest wait.
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
    retries: Retries,
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

/// Which file it is: another one may be put in its place, or none.
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

/// When a database that failed is opened again.
#[derive(Debug, Default)]
struct Retries {
    failures: u32,
    last: Option<Instant>,
    due: Option<Instant>,
}

impl Retries {
    fn failed(&mut self, now: Instant) {
        let is_calm = self.last.is_some_and(|last| now.duration_since(last) > BACKOFF_RESET);
        self.failures = if is_calm { 0 } else { self.failures };
        let wait = RETRY_MIN.saturating_mul(2u32.saturating_pow(self.failures));
        self.failures = self.failures.saturating_add(1);
        (self.last, self.due) = (Some(now), Some(now + wait.min(RETRY_MAX)));
    }

    fn is_due(&self, now: Instant) -> bool {
        self.due.is_none_or(|due| due <= now)
    }
}

impl StoreDatabase {
    /// Opens the database of a file that is there.
    ///
    /// # Errors
    /// When it is not there, in use, or damaged.
    pub(super) fn open(path: PathBuf) -> Result<Self, StoreError> {
        let opened = open(&path, BackupMode::Create)?;
        let inner =
            DatabaseInner { state: DatabaseState::Open(opened), retries: Retries::default() };
        Ok(Self { path, inner: Mutex::new(inner) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Why the database does not work now, if so. Opens it again when that is due.
    pub(super) fn problem(&self) -> Option<String> {
        self.with(|_| Ok(())).err().map(|error| error.to_string())
    }

    /// Verifies the file, with no change under way meanwhile.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub(super) fn check(&self) -> Result<super::StoreSummary, StoreError> {
        let _held = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let file =
            fs::File::open(&self.path).map_err(|error| StoreError::io(&self.path, &error))?;
        backup::check_open(&self.path, &file)
    }

    /// Works with the database, if it works. One at a time: what fails for one fails for all.
    ///
    /// # Errors
    /// What the work gives, or that the database does not work.
    pub(super) fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let now = monotonic();
        if let DatabaseState::Failed(reason) = &inner.state {
            if !inner.retries.is_due(now) {
                return Err(self.unavailable(reason));
            }
            match reopen(&self.path) {
                Ok(opened) => {
                    tracing::info!(store = %self.path.display(), "the store works again");
                    inner.state = DatabaseState::Open(opened);
                }
                Err(error) => return Err(self.failed(&mut inner, error.to_string(), now)),
            }
        }
        let DatabaseState::Open(opened) = &inner.state else {
            return Err(self.unavailable("it is closed"));
        };
        if FileId::of(&self.path).as_ref() != Some(&opened.file) {
            let reason = "the file was removed or replaced while it was in use";
            return Err(self.failed(&mut inner, reason.into(), now));
        }
        match catch_panic(|| work(&opened.database)) {
            Ok(Err(StoreError::Broken(reason))) | Err(reason) => {
                Err(self.failed(&mut inner, reason, now))
            }
            Ok(done) => done,
        }
    }

    /// Closes the database and says so once.
    fn failed(&self, inner: &mut DatabaseInner, reason: String, now: Instant) -> StoreError {
        inner.retries.failed(now);
        let error = self.unavailable(&reason);
        if let DatabaseState::Open(_) = inner.state {
            tracing::error!(
                store = %self.path.display(),
                reason,
                "the store failed: no certificate is issued and no order is taken until it works again"
            );
        }
        let before = std::mem::replace(&mut inner.state, DatabaseState::Failed(reason));
        // Closing writes, and fails as what came before did.
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

/// Opens it again, and shows that it can be written to.
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
                Ok(Ok(())) => StoreError::Broken("it is closed".into()),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_database_is_opened_again_ever_more_slowly_and_quickly_after_a_calm() {
        let mut retries = Retries::default();
        let start = monotonic();
        assert!(retries.is_due(start));
        retries.failed(start);
        assert!(!retries.is_due(start) && retries.is_due(start + RETRY_MIN));
        for _ in 0..40 {
            retries.failed(start);
        }
        assert!(!retries.is_due(start + RETRY_MAX - Duration::from_millis(1)));
        assert!(retries.is_due(start + RETRY_MAX));
        let later = start + BACKOFF_RESET + Duration::from_secs(1);
        retries.failed(later);
        assert!(retries.is_due(later + RETRY_MIN));
    }
}
