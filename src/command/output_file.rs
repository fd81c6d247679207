//! Output files of a command. A command that fails removes the files that it created.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A new file. Dropping it removes the file unless [`Self::keep`] was called.
#[derive(Debug)]
pub(super) struct OutputFile {
    file: File,
    path: PathBuf,
    /// Whether dropping removes the file.
    is_temporary: bool,
}

impl OutputFile {
    /// Creates an empty file with this mode.
    ///
    /// # Errors
    /// The file exists already, or cannot be created.
    pub(super) fn create(path: PathBuf, mode: u32) -> Result<Self, String> {
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
        let file = file.map_err(|error| describe(&path, &error))?;
        Ok(Self { file, path, is_temporary: true })
    }

    /// Writes the whole content.
    ///
    /// # Errors
    /// The file cannot be written, for example on a full disk.
    pub(super) fn write(&mut self, text: &str) -> Result<(), String> {
        self.file.write_all(text.as_bytes()).map_err(|error| describe(&self.path, &error))
    }

    /// Keeps the file.
    pub(super) fn keep(mut self) {
        self.is_temporary = false;
    }

    /// The path of the file.
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
