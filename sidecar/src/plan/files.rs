//! What a plan reads from files, and whether they still say it.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use weft_model::DataSource;

/// The files that the last plan was made of.
#[derive(Debug, Default)]
pub(crate) struct Files {
    seen: HashMap<PathBuf, Stamp>,
}

/// What tells one content of a file from another, without a look at it; nothing where there is no file.
/// Links are followed, so one that is set anew shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stamp(Option<[i64; 5]>);

impl Stamp {
    fn of(path: &Path) -> Self {
        let Ok(about) = fs::metadata(path) else {
            return Self(None);
        };
        let whole = |number: u64| i64::from_ne_bytes(number.to_ne_bytes());
        let [device, inode, size] = [about.dev(), about.ino(), about.size()].map(whole);
        Self(Some([device, inode, size, about.mtime(), about.mtime_nsec()]))
    }
}

impl Files {
    /// Forgets all files, before a plan is made.
    pub(crate) fn begin(&mut self) {
        self.seen.clear();
    }

    /// The content, and from now on whether it changes counts.
    ///
    /// # Errors
    /// Why a file cannot be read.
    pub(crate) fn read(&mut self, data: &DataSource) -> Result<Vec<u8>, String> {
        match data {
            DataSource::Inline(bytes) => Ok(bytes.to_vec()),
            DataSource::File(path) => {
                // Before it is read: whatever comes between is another content.
                self.stamp(data);
                fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
            }
        }
    }

    /// What tells the content from another; the same for all that stands in place.
    pub(crate) fn stamp(&mut self, data: &DataSource) -> Stamp {
        match data {
            DataSource::Inline(_) => Stamp::default(),
            DataSource::File(path) => {
                let stamp = Stamp::of(path);
                self.seen.insert(path.clone(), stamp);
                stamp
            }
        }
    }

    /// Whether a file says something else than when it was read.
    pub(crate) fn have_changed(&self) -> bool {
        self.seen.iter().any(|(path, stamp)| Stamp::of(path) != *stamp)
    }
}
