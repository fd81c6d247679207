//! Errors of the store. [`StoreError::Broken`] means that the database has to be closed and opened again.

use std::path::{Path, PathBuf};

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder has no store.
    #[error("{}: no authority found; create one: weft ca init --state {}", .0.display(), .0.display())]
    Missing(PathBuf),
    /// The folder has a store already.
    #[error("{}: an authority exists already; nothing was changed", .0.display())]
    Exists(PathBuf),
    /// Another process has the store open.
    #[error("{} is in use by another process; with a running control plane use weft ca revoke, list or token", .0.display())]
    InUse(PathBuf),
    /// A file cannot be read or written.
    #[error("{path}: {reason}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// The file is damaged, or is not a store.
    #[error("{path} {reason}; it was not changed; {restore}", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The damage.
        reason: String,
        /// How to restore a backup.
        restore: String,
    },
    /// The database failed and is closed; it is opened again with backoff.
    #[error("{path}: store not available: {reason}; retrying", path = .path.display())]
    Unavailable {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// The database failed, and refuses every operation until it is opened again.
    #[error("store failed: {0}")]
    Broken(String),
    /// Another process or thread changed the authorities first.
    #[error("the authorities were changed meanwhile; nothing was stored, try again")]
    Changed,
    /// An entry cannot be read, or a change cannot be written. The database stays open.
    #[error("store failed: {0}")]
    Database(String),
}

impl StoreError {
    pub(super) fn io(path: &Path, error: &std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), reason: error.to_string() }
    }
}

impl From<redb::StorageError> for StoreError {
    fn from(error: redb::StorageError) -> Self {
        match error {
            redb::StorageError::ValueTooLarge(_) => Self::Database(error.to_string()),
            redb::StorageError::Io(error) => Self::Broken(error.to_string()),
            _ => Self::Broken(error.to_string()),
        }
    }
}

impl From<redb::TableError> for StoreError {
    fn from(error: redb::TableError) -> Self {
        match error {
            redb::TableError::Storage(error) => error.into(),
            _ => Self::Database(error.to_string()),
        }
    }
}

impl From<redb::TransactionError> for StoreError {
    fn from(error: redb::TransactionError) -> Self {
        match error {
            redb::TransactionError::Storage(error) => error.into(),
            _ => Self::Broken(error.to_string()),
        }
    }
}

impl From<redb::CommitError> for StoreError {
    fn from(error: redb::CommitError) -> Self {
        match error {
            redb::CommitError::Storage(error) => error.into(),
            _ => Self::Broken(error.to_string()),
        }
    }
}
