//! What time of day it is for one process alone, by libfaketime: a clock that is set while the process runs.
//! Its timers go on as they did, since only the time of day is another.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

/// The clock of a process. It is right until it is set.
#[derive(Debug)]
pub struct FakeClock {
    folder: TempDir,
}

impl FakeClock {
    /// A clock that is right.
    ///
    /// # Panics
    /// When there is no folder for it.
    #[must_use]
    pub fn create() -> Self {
        let clock = Self { folder: TempDir::new().expect("a temporary folder can be made") };
        clock.reset();
        clock
    }

    /// Has a command go by it.
    ///
    /// # Panics
    /// When libfaketime is not there.
    pub fn apply_to(&self, command: &mut Command) {
        command.env("LD_PRELOAD", library());
        command.env("FAKETIME_TIMESTAMP_FILE", self.file());
        // The file is read whenever somebody asks for the time.
        command.env("FAKETIME_NO_CACHE", "1");
        command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    }

    /// Sets it ahead.
    pub fn set_ahead(&self, by: Duration) {
        self.write(&format!("+{}", by.as_secs()));
    }

    /// Sets it back.
    pub fn set_back(&self, by: Duration) {
        self.write(&format!("-{}", by.as_secs()));
    }

    /// Sets it right.
    pub fn reset(&self) {
        self.write("+0");
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("clock")
    }

    fn write(&self, shift: &str) {
        let part = self.folder.path().join("part");
        std::fs::write(&part, shift).expect("the folder takes files");
        std::fs::rename(part, self.file()).expect("it may be replaced");
    }
}

/// Where Debian puts it, for whatever processor.
fn library() -> PathBuf {
    let folders = std::fs::read_dir("/usr/lib").expect("every system has it").flatten();
    let place = Path::new("faketime/libfaketimeMT.so.1");
    let library = folders.map(|folder| folder.path().join(place)).find(|path| path.exists());
    library.expect("libfaketime is missing; run integration/setup")
}
