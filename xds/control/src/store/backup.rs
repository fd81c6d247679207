//! Backups of the store file in the same folder. Each is verified before it replaces an older one.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::error::StoreError;
use super::image::verify;
use super::summary::StoreSummary;

/// The file names of the backups, newest first.
const BACKUPS: [&str; 2] = ["weft.redb.backup-1", "weft.redb.backup-2"];
/// The free disk space that is required to open the store again after a failure.
const FREE_SPACE_BYTES: usize = 256 * 1024;
/// A file that is being written.
const PART: &str = "weft.redb.backup.part";

/// Whether to make a backup of the verified file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BackupMode {
    /// Make a backup, at each start.
    Create,
    /// Make none, when the file is opened again after a failure: the disk may be full.
    Skip,
}

/// Opens and locks the file of a store, and verifies it without writing to it.
///
/// # Errors
/// The file is missing, in use, or damaged.
pub(super) fn open_verified(path: &Path, mode: BackupMode) -> Result<File, StoreError> {
    let file = open_locked(path)?;
    let bytes = read(&file).map_err(|error| StoreError::io(path, &error))?;
    let part = path.with_file_name(PART);
    // Written first, since verification consumes the bytes. It is renamed to a backup only after verification.
    let written = match mode {
        BackupMode::Create => write(&part, &bytes),
        BackupMode::Skip => Ok(()),
    };
    let verified = verify(bytes).map_err(|reason| damaged(path, reason));
    if mode == BackupMode::Create {
        let stored = match &verified {
            Ok(_) => written.and_then(|()| replace(path, &part)),
            Err(_) => Ok(()),
        };
        if let Err(error) = stored {
            tracing::warn!(store = %path.display(), %error, "failed to back up the store");
        }
        // The file may not exist: after the rename it is the backup.
        drop(fs::remove_file(&part));
    }
    verified.map(|_| file)
}

/// Verifies the file of a store that no process has open.
///
/// # Errors
/// The file is missing, in use, or damaged.
pub(super) fn check(path: &Path) -> Result<StoreSummary, StoreError> {
    let file = open_locked(path)?;
    check_open(path, &file)
}

/// Verifies an open file. The caller ensures that no transaction is in progress.
///
/// # Errors
/// The file cannot be read, or is damaged.
pub(super) fn check_open(path: &Path, file: &File) -> Result<StoreSummary, StoreError> {
    let bytes = read(file).map_err(|error| StoreError::io(path, &error))?;
    verify(bytes).map_err(|reason| damaged(path, reason))
}

/// The existing backups, newest first, each with its summary or its damage.
pub(super) fn backups(path: &Path) -> Vec<(PathBuf, Result<StoreSummary, String>)> {
    let backups = BACKUPS.map(|name| path.with_file_name(name));
    let there = backups.into_iter().filter(|copy| copy.exists());
    let check = |copy: PathBuf| {
        let checked = fs::read(&copy).map_err(|error| error.to_string()).and_then(verify);
        (copy, checked)
    };
    there.map(check).collect()
}

/// How to restore the newest intact backup.
pub(super) fn restore_hint(path: &Path) -> String {
    let whole = backups(path).into_iter().find(|(_, checked)| checked.is_ok());
    match whole {
        Some((copy, _)) => format!(
            "to restore the last backup: cp -p {copy} {store}, then revoke again what audit.jsonl lists as \
             revoked since",
            copy = copy.display(),
            store = path.display()
        ),
        None => "no backup found in the folder; restore the folder from your own backup".into(),
    }
}

fn damaged(path: &Path, reason: String) -> StoreError {
    StoreError::Damaged { path: path.to_owned(), reason, restore: restore_hint(path) }
}

fn open_locked(path: &Path) -> Result<File, StoreError> {
    let folder = || path.parent().unwrap_or(path).to_owned();
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let has_copy = BACKUPS.iter().any(|name| path.with_file_name(name).exists());
            return Err(if has_copy {
                damaged(path, "is missing".into())
            } else {
                StoreError::Missing(folder())
            });
        }
        Err(error) => return Err(StoreError::io(path, &error)),
    };
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse(folder())),
        Err(TryLockError::Error(error)) => Err(StoreError::io(path, &error)),
    }
}

fn read(mut file: &File) -> io::Result<Vec<u8>> {
    io::Seek::rewind(&mut file)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn write(part: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // The file contains the authority's keys.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(part)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Checks that the disk has free space for more than a page, since the database may reuse one that it had allocated.
///
/// # Errors
/// The file cannot be written.
pub(super) fn check_free_space(path: &Path) -> io::Result<()> {
    let part = path.with_file_name(PART);
    let written = write(&part, &[0; FREE_SPACE_BYTES]);
    // The file may not exist.
    drop(fs::remove_file(&part));
    written
}

/// Renames the newest backup to the older one, and the written file to the newest.
fn replace(path: &Path, part: &Path) -> io::Result<()> {
    let [newest, older] = BACKUPS.map(|name| path.with_file_name(name));
    match fs::rename(&newest, older) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::rename(part, newest)?;
    sync_folder(path)
}

/// Writes changes of the folder of a file to disk.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or_else(|| Path::new(".")))?.sync_all()
}
