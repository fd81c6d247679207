//! Reads the files of a plan and detects when they change.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash as _, Hasher as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use weft_certs::{system_roots_file, usable_roots};
use weft_model::DataSource;

/// The files that the last plan was built from.
#[derive(Debug, Default)]
pub(crate) struct WatchedFiles {
    seen: HashMap<PathBuf, WatchedFileStamp>,
}

/// Identifies the version of a file by its metadata, without reading it; none when the file does not exist. Symbolic links are
/// followed, so a replaced link is detected. The stamp of a folder includes all its files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct WatchedFileStamp(Option<u64>);

impl WatchedFileStamp {
    fn of(path: &Path) -> Self {
        let Ok(about) = fs::metadata(path) else {
            return Self(None);
        };
        let mut hasher = DefaultHasher::new();
        let one = |about: &fs::Metadata, hasher: &mut DefaultHasher| {
            let when = (about.mtime(), about.mtime_nsec());
            (about.dev(), about.ino(), about.size(), about.mode(), when).hash(hasher);
        };
        one(&about, &mut hasher);
        if about.is_dir() {
            for file in visible(path).unwrap_or_default() {
                file.hash(&mut hasher);
                if let Ok(about) = fs::metadata(&file) {
                    one(&about, &mut hasher);
                }
            }
        }
        Self(Some(hasher.finish()))
    }
}

impl WatchedFileStamp {
    /// The stamp of this and of something else that has a version number.
    pub(crate) fn with(self, number: u64) -> Self {
        let mut hasher = DefaultHasher::new();
        (self.0, number).hash(&mut hasher);
        Self(Some(hasher.finish()))
    }
}

/// The files of a folder except hidden ones, sorted by name.
fn visible(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let names = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path()));
    let mut names = names.collect::<Result<Vec<PathBuf>, _>>()?;
    let is_hidden =
        |path: &Path| path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    names.retain(|path| !is_hidden(path) && path.is_file());
    names.sort();
    Ok(names)
}

/// Concatenates CRLs. The result is PEM unless all are DER, because DER cannot be mixed with PEM.
pub(crate) fn as_one(files: Vec<Vec<u8>>) -> Vec<u8> {
    let is_der = |file: &[u8]| file.first() == Some(&0x30);
    if files.iter().all(|file| is_der(file)) {
        return files.concat();
    }
    let armoured = files.into_iter().map(|file| match is_der(&file) {
        true => {
            let text = base64::engine::general_purpose::STANDARD.encode(&file);
            format!("-----BEGIN X509 CRL-----\n{text}\n-----END X509 CRL-----\n").into_bytes()
        }
        false => [file, b"\n".to_vec()].concat(),
    });
    armoured.collect::<Vec<_>>().concat()
}

impl WatchedFiles {
    /// Forgets all files before a plan is built.
    pub(crate) fn begin(&mut self) {
        self.seen.clear();
    }

    /// Reads a source and watches it for changes.
    ///
    /// # Errors
    /// When a file cannot be read, with its path.
    pub(crate) fn read(&mut self, data: &DataSource) -> Result<Vec<u8>, String> {
        match data {
            DataSource::Inline(bytes) => Ok(bytes.to_vec()),
            DataSource::File(path) => {
                // The stamp is taken first, so that a change during the read is detected.
                self.stamp(data);
                fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
            }
            DataSource::SystemRoots => {
                self.stamp(data);
                let file = system_roots_file().map_err(|error| error.to_string())?;
                let bundle = fs::read(&file);
                let bundle = bundle.map_err(|error| format!("{}: {error}", file.display()))?;
                Ok(usable_roots(&bundle))
            }
        }
    }

    /// Reads a source; for a folder, all its files except hidden ones, sorted by name. Stops after `limit` bytes, which the caller
    /// then reports as too large.
    ///
    /// # Errors
    /// When a file cannot be read, with its path.
    pub(crate) fn read_all(&mut self, data: &DataSource, limit: usize) -> Result<Vec<u8>, String> {
        let DataSource::File(folder) = data else {
            return self.read(data);
        };
        if !folder.is_dir() {
            return self.read(data);
        }
        self.stamp(data);
        let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
        let names = visible(folder).map_err(failed)?;
        let mut all = Vec::new();
        for name in names {
            all.push(fs::read(&name).map_err(|error| format!("{}: {error}", name.display()))?);
            if all.iter().map(Vec::len).sum::<usize>() > limit {
                break;
            }
        }
        Ok(as_one(all))
    }

    /// A warning about a private key file that other users may read.
    pub(crate) fn open_to_all(&self, data: &DataSource) -> Option<String> {
        const OTHERS_READ: u32 = 0o004;
        let DataSource::File(path) = data else {
            return None;
        };
        let mode = fs::metadata(path).ok()?.mode() & 0o777;
        let is_open = mode & OTHERS_READ != 0;
        is_open.then(|| {
            format!(
                "key file {} is readable by all users (mode {mode:o}): use mode 600",
                path.display()
            )
        })
    }

    /// The stamp of a source; the same for all inline data.
    pub(crate) fn stamp(&mut self, data: &DataSource) -> WatchedFileStamp {
        match data {
            DataSource::Inline(_) => WatchedFileStamp::default(),
            DataSource::File(path) => self.stamp_of(path),
            DataSource::SystemRoots => {
                system_roots_file().map(|file| self.stamp_of(&file)).unwrap_or_default()
            }
        }
    }

    fn stamp_of(&mut self, path: &Path) -> WatchedFileStamp {
        let stamp = WatchedFileStamp::of(path);
        self.seen.insert(path.to_owned(), stamp);
        stamp
    }

    /// Whether a file changed since it was read.
    pub(crate) fn have_changed(&self) -> bool {
        self.seen.iter().any(|(path, stamp)| WatchedFileStamp::of(path) != *stamp)
    }
}
