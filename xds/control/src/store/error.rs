//! Why a store cannot do what it is asked, and which of the library's errors mean that it has to be opened again.

use std::path::{Path, PathBuf};

/// Why the store cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is none yet.
    #[error("{} holds no authority; make one: weft ca init --state {}", .0.display(), .0.display())]
    Missing(PathBuf),
    /// There is one already.
    #[error("{} holds an authority already; nothing was changed", .0.display())]
    Exists(PathBuf),
    /// Another process has it open.
    #[error("{} is in use by another process; a control plane takes ca revoke, list and token meanwhile", .0.display())]
    InUse(PathBuf),
    /// A file cannot be read or written.
    #[error("{path}: {reason}", path = .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file is not a whole store.
    #[error("{path} {reason}; it was not changed; {restore}", path = .path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// How to get a whole one.
        restore: String,
    },
    /// The database failed before, and is opened again after a while.
    #[error("{path} cannot be used: {reason}; it is tried again", path = .path.display())]
    Unavailable {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The database failed, and refuses everything until it is opened again.
    #[error("the store failed: {0}")]
    Broken(String),
    /// What a change began with is no longer there.
    #[error("the authorities have been changed meanwhile; nothing was stored, try again")]
    Changed,
    /// An entry cannot be read, or a change cannot be made.
    #[error("the store failed: {0}")]
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
