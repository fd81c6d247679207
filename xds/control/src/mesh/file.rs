//! Reads `mesh.yaml` and the files that it refers to, and reads them again only after a change.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Mesh;
use super::reader::MeshReader;
use super::referenced_files::ReferencedFiles;

/// A stamp is reliable once the file has not been changed for this time. Before that, another write may leave the same
/// timestamp, since some file systems count whole seconds.
const STAMP_SETTLE_TIME: Duration = Duration::from_secs(2);

/// A mesh file, which may change.
#[derive(Debug)]
pub struct MeshFile {
    path: PathBuf,
    reader: Box<MeshReader>,
    /// The last version that was read, valid or not.
    last_read: Option<ReadVersion>,
}

impl MeshFile {
    /// The file at a path. Nothing is read yet.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, reader: Box::default(), last_read: None }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the mesh.
    ///
    /// # Errors
    /// The file cannot be read or is not UTF-8, or every error in it, with file, line and field.
    pub fn read(&mut self, now: SystemTime) -> Result<Mesh, Vec<String>> {
        let text = self.text();
        self.evaluate(text, now)
    }

    /// Reads the mesh again if the file, or one that it refers to, has changed since the last time. None if nothing has
    /// changed.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    pub(crate) fn read_changed(&mut self, now: SystemTime) -> Option<Result<Mesh, Vec<String>>> {
        if self.last_read.as_ref().is_some_and(|last_read| last_read.is_current(&self.path, now)) {
            return None;
        }
        let text = self.text();
        if let Some(last_read) = self.last_read.as_mut().filter(|last_read| last_read.text == text)
            && last_read.files.is_unchanged()
        {
            last_read.stamps = MeshFileStamps::take(&self.path, &last_read.files, now);
            return None;
        }
        Some(self.evaluate(text, now))
    }

    fn evaluate(
        &mut self,
        text: Result<Arc<str>, String>,
        now: SystemTime,
    ) -> Result<Mesh, Vec<String>> {
        let files = ReferencedFiles::below(self.path.parent().unwrap_or_else(|| Path::new(".")));
        let read = match &text {
            Ok(text) => self.parse_with(text, &files),
            Err(error) => Err(vec![error.clone()]),
        };
        let stamps = MeshFileStamps::take(&self.path, &files, now);
        self.last_read = Some(ReadVersion { text, files, stamps });
        read
    }

    /// Parses and checks a text.
    ///
    /// # Errors
    /// Every error, with file, line and field.
    #[cfg(test)]
    pub(crate) fn parse(&mut self, text: &Arc<str>) -> Result<Mesh, Vec<String>> {
        self.parse_with(text, &ReferencedFiles::below(Path::new(".")))
    }

    fn parse_with(
        &mut self,
        text: &Arc<str>,
        files: &ReferencedFiles,
    ) -> Result<Mesh, Vec<String>> {
        self.reader.read(text, files).map_err(|problems| {
            problems.iter().map(|problem| problem.in_file(self.path.display())).collect()
        })
    }

    /// The present text of the file.
    fn text(&self) -> Result<Arc<str>, String> {
        let text = fs::read_to_string(&self.path)
            .map_err(|error| format!("{}: {error}", self.path.display()))?;
        Ok(self.reader.shared(text))
    }
}

/// A version of the mesh that was read, and the state of the files at that time.
#[derive(Debug)]
struct ReadVersion {
    text: Result<Arc<str>, String>,
    files: ReferencedFiles,
    stamps: MeshFileStamps,
}

impl ReadVersion {
    /// Whether no file has changed since.
    fn is_current(&self, path: &Path, now: SystemTime) -> bool {
        self.stamps.is_settled && self.stamps == MeshFileStamps::take(path, &self.files, now)
    }
}

/// The stamps of the mesh file and of the files that it refers to, in this order.
#[derive(Debug)]
struct MeshFileStamps {
    stamps: Vec<Option<MeshFileStamp>>,
    /// Whether all stamps are reliable; see [`STAMP_SETTLE_TIME`].
    is_settled: bool,
}

impl PartialEq for MeshFileStamps {
    fn eq(&self, other: &Self) -> bool {
        self.stamps == other.stamps
    }
}

impl MeshFileStamps {
    fn take(path: &Path, files: &ReferencedFiles, now: SystemTime) -> Self {
        let read = files.paths();
        let paths = std::iter::once(path).chain(read.iter().map(PathBuf::as_path));
        let stamps: Vec<Option<MeshFileStamp>> = paths.map(MeshFileStamp::of).collect();
        let is_settled = stamps.iter().flatten().all(|stamp| stamp.is_settled(now));
        Self { stamps, is_settled }
    }
}

/// Identifies the content of a file: its inode, size and times.
#[derive(Debug, PartialEq, Eq)]
struct MeshFileStamp {
    device: u64,
    inode: u64,
    bytes: u64,
    /// The times of the last change of the content and of the inode: seconds and nanoseconds since 1970.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl MeshFileStamp {
    /// None if the file's metadata cannot be read.
    fn of(path: &Path) -> Option<Self> {
        let data = fs::metadata(path).ok()?;
        Some(Self {
            device: data.dev(),
            inode: data.ino(),
            bytes: data.len(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
        })
    }

    fn is_settled(&self, now: SystemTime) -> bool {
        let (seconds, _) = self.changed;
        let settled = UNIX_EPOCH
            .checked_add(Duration::from_secs(u64::try_from(seconds).unwrap_or_default()))
            .and_then(|changed| changed.checked_add(STAMP_SETTLE_TIME));
        settled.is_some_and(|settled| settled < now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESH: &str = "trust_domain: mesh.test\nservice_ranges: [10.96.0.0/16]\nservices: []\n\
        security:\n  issuers: {login: {issuer: me, audiences: [a], jwks_file: keys.json}}\n";

    const KEYS: &str = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

    struct Files {
        folder: tempfile::TempDir,
        file: MeshFile,
        /// A time at which stamps are reliable.
        later: SystemTime,
    }

    impl Files {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let file = MeshFile::new(folder.path().join("mesh.yaml"));
            let later = crate::clock::wall_clock() + 3600 * STAMP_SETTLE_TIME;
            let files = Self { folder, file, later };
            files.write("mesh.yaml", MESH);
            files.write("keys.json", KEYS);
            files
        }

        fn write(&self, name: &str, content: &str) {
            fs::write(self.folder.path().join(name), content).expect("it is written");
        }

        fn changed(&mut self) -> Option<Result<(), String>> {
            let read = self.file.read_changed(self.later)?;
            Some(read.map(drop).map_err(|errors| errors.join("\n")))
        }
    }

    #[test]
    fn mesh_is_read_again_after_a_change_of_the_file_or_a_referenced_file() {
        let mut files = Files::new();
        assert_eq!(files.changed(), Some(Ok(())));
        assert_eq!(files.changed(), None);
        files.write("keys.json", &KEYS.replace("\"a\"", "\"b\""));
        assert_eq!(files.changed(), Some(Ok(())), "a key file");
        assert_eq!(files.changed(), None);
        fs::remove_file(files.folder.path().join("keys.json")).expect("it is there");
        let rejected = files.changed().expect("a change").expect_err("no keys");
        assert!(rejected.contains("keys.json: No such file"), "{rejected}");
        assert_eq!(files.changed(), None, "a rejected mesh is not checked again");
        files.write("keys.json", KEYS);
        assert_eq!(files.changed(), Some(Ok(())), "the key file is back");
        files.write("mesh.yaml", "services: [");
        assert!(files.changed().expect("a change").is_err());
        assert_eq!(files.changed(), None, "a rejected mesh is not read again");
        files.write("mesh.yaml", MESH);
        assert_eq!(files.changed(), Some(Ok(())));
    }

    #[test]
    fn content_is_compared_until_its_stamp_is_settled() {
        let mut files = Files::new();
        // At this time the files have just been written to.
        files.later = UNIX_EPOCH;
        assert_eq!(files.changed(), Some(Ok(())));
        let last_read = files.file.last_read.as_mut().expect("it was read");
        assert!(!last_read.stamps.is_settled);
        assert_eq!(files.changed(), None, "the content is the same");
        // As a write that leaves all stamps as they were.
        let last_read = files.file.last_read.as_mut().expect("it was read");
        let before = Ok(KEYS.replace("\"a\"", "\"b\"").into_bytes());
        last_read.files.replace(files.folder.path().join("keys.json"), before);
        assert_eq!(files.changed(), Some(Ok(())), "another content");
    }
}
