//! Sets the time of day of one process with libfaketime, also while the process runs. Its timers
//! are not affected: they use the monotonic clock.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

/// The clock of a process. It shows the real time until a test sets it.
#[derive(Debug)]
pub struct FakeClock {
    folder: TempDir,
}

impl FakeClock {
    /// Creates a clock that shows the real time.
    ///
    /// # Panics
    /// If its folder cannot be created.
    #[must_use]
    pub fn create() -> Self {
        let clock = Self { folder: TempDir::new().expect("a temporary folder can be created") };
        clock.reset();
        clock
    }

    /// Makes a command use this clock.
    ///
    /// # Panics
    /// If libfaketime is not installed.
    pub fn apply_to(&self, command: &mut Command) {
        command.env("LD_PRELOAD", library());
        command.env("FAKETIME_TIMESTAMP_FILE", self.file());
        // Reads the file at each query of the time.
        command.env("FAKETIME_NO_CACHE", "1");
        command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    }

    /// Sets the clock ahead of the real time.
    pub fn set_ahead(&self, by: Duration) {
        self.write(&format!("+{}", by.as_secs()));
    }

    /// Sets the clock behind the real time.
    pub fn set_back(&self, by: Duration) {
        self.write(&format!("-{}", by.as_secs()));
    }

    /// Sets the clock to the real time.
    pub fn reset(&self) {
        self.write("+0");
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("clock")
    }

    fn write(&self, shift: &str) {
        let part = self.folder.path().join("part");
        std::fs::write(&part, shift).expect("the folder is writable");
        std::fs::rename(part, self.file()).expect("the file can be replaced");
    }
}

/// The path of libfaketime on Debian, for any architecture.
fn library() -> PathBuf {
    let folders = std::fs::read_dir("/usr/lib").expect("/usr/lib exists").flatten();
    let place = Path::new("faketime/libfaketimeMT.so.1");
    let library = folders.map(|folder| folder.path().join(place)).find(|path| path.exists());
    library.expect("libfaketime is missing; run integration/setup")
}
