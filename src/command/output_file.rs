//! Files that a command writes: several are written together or not at all.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file that is removed when dropped, unless it was kept.
#[derive(Debug)]
pub(super) struct OutputFile {
    file: File,
    path: PathBuf,
    /// Whether dropping removes the file.
    is_temporary: bool,
}

impl OutputFile {
    /// Makes an empty file, with its mode from the first moment.
    ///
    /// # Errors
    /// When there is such a file, or it cannot be made.
    pub(super) fn create(path: PathBuf, mode: u32) -> Result<Self, String> {
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
        let file = file.map_err(|error| describe(&path, &error))?;
        Ok(Self { file, path, is_temporary: true })
    }

    /// Writes the whole content.
    ///
    /// # Errors
    /// When it cannot be written, such as on a full disk.
    pub(super) fn write(&mut self, text: &str) -> Result<(), String> {
        self.file.write_all(text.as_bytes()).map_err(|error| describe(&self.path, &error))
    }

    /// Leaves the file where it is.
    pub(super) fn keep(mut self) {
        self.is_temporary = false;
    }

    /// Where the file is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if self.is_temporary {
            // The command has failed already, and its error is the one to report.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

fn describe(path: &Path, error: &std::io::Error) -> String {
    format!("{}: {error}", path.display())
}
