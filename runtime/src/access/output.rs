//! The open sinks of the access log: streams, and files that are opened again after they were rotated.

use std::fmt;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{Error, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};

use nix::fcntl::OFlag;
use weft_model::AccessLogSink;

use super::LineBatch;

/// The most sinks that are open at a time. For another one, the file that was not written to for the longest time is
/// closed; it is opened again for its next line.
pub(super) const SINK_LIMIT: usize = 16;
/// The mode of new files, before the umask.
const FILE_MODE: u32 = 0o640;

/// An opened sink.
pub struct OpenedSink {
    to: Box<dyn Write + Send>,
    /// The file behind the path of a file sink.
    file: Option<LogFileId>,
}

impl fmt::Debug for OpenedSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenedSink").field("file", &self.file).finish_non_exhaustive()
    }
}

/// Identifies a file: if its path leads to another file, it was rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LogFileId {
    device: u64,
    inode: u64,
}

impl LogFileId {
    fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

impl OpenedSink {
    /// A sink that is never opened again.
    #[must_use]
    pub fn stream(to: impl Write + Send + 'static) -> Self {
        Self { to: Box::new(to), file: None }
    }

    /// Opens a sink of this process. A file is created if needed, with mode 0640, and lines are appended.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(sink: &AccessLogSink) -> std::io::Result<Self> {
        match sink {
            AccessLogSink::Stdout => Ok(Self::stream(std::io::stdout())),
            AccessLogSink::Stderr => Ok(Self::stream(std::io::stderr())),
            AccessLogSink::File(path) => {
                // Without O_NONBLOCK, opening a named pipe blocks the thread until a process reads from the pipe.
                let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
                let file: File = OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(FILE_MODE)
                    .custom_flags(flags.bits())
                    .open(path)?;
                let id = LogFileId::of(&file.metadata()?);
                Ok(Self { to: Box::new(file), file: Some(id) })
            }
        }
    }
}

/// Lines that were not written.
#[derive(Debug)]
pub(super) struct LostLines {
    pub(super) lines: u64,
    /// Why; none when the output was closed before and that was reported.
    pub(super) error: Option<Error>,
}

/// How a sink is opened.
pub(super) type SinkOpener = Box<dyn FnMut(&AccessLogSink) -> std::io::Result<OpenedSink> + Send>;

/// The open sinks, the most recently used one last.
pub(super) struct Outputs {
    open: SinkOpener,
    outputs: Vec<SinkOutput>,
}

impl Outputs {
    pub(super) fn new(open: SinkOpener) -> Self {
        Self { open, outputs: Vec::new() }
    }

    /// Writes a batch to its sink.
    ///
    /// # Errors
    /// The sink cannot be opened or written to, or its reader has closed it.
    pub(super) fn write(&mut self, batch: &LineBatch) -> Result<(), LostLines> {
        let output = self.take(&batch.sink);
        let mut output =
            output.map_err(|error| LostLines { lines: batch.lines, error: Some(error) })?;
        let written = output.write(batch);
        self.outputs.push(output);
        written
    }

    /// Takes the output of a sink out of the list, or opens the sink.
    fn take(&mut self, sink: &AccessLogSink) -> std::io::Result<SinkOutput> {
        if let Some(position) = self.outputs.iter().position(|output| output.sink == *sink) {
            let output = self.outputs.remove(position);
            if !output.is_rotated() {
                return Ok(output);
            }
        }
        if self.outputs.len() >= SINK_LIMIT
            && let Some(oldest) = self.outputs.iter().position(|output| output.file.is_some())
        {
            self.outputs.remove(oldest);
        }
        let OpenedSink { to, file } = (self.open)(sink)?;
        let lines = LineOutput { to, is_torn: false };
        Ok(SinkOutput { sink: sink.clone(), lines, file, is_closed: false })
    }
}

/// The output of one sink.
struct SinkOutput {
    sink: AccessLogSink,
    lines: LineOutput,
    file: Option<LogFileId>,
    /// Whether the reader of a stream has closed it.
    is_closed: bool,
}

impl SinkOutput {
    /// Whether the path of a file sink leads to another file or to none.
    fn is_rotated(&self) -> bool {
        let (AccessLogSink::File(path), Some(file)) = (&self.sink, self.file) else {
            return false;
        };
        match fs::metadata(path) {
            Ok(metadata) => LogFileId::of(&metadata) != file,
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }

    fn write(&mut self, batch: &LineBatch) -> Result<(), LostLines> {
        if self.is_closed {
            return Err(LostLines { lines: batch.lines, error: None });
        }
        self.lines.write(&batch.bytes).inspect_err(|lost| {
            let is_broken = |error: &Error| error.kind() == ErrorKind::BrokenPipe;
            self.is_closed = self.file.is_none() && lost.error.as_ref().is_some_and(is_broken);
        })
    }
}

/// Writes whole lines.
struct LineOutput {
    to: Box<dyn Write + Send>,
    /// Whether the last write ended within a line.
    is_torn: bool,
}

impl LineOutput {
    /// Writes a batch. If the last write ended within a line, ends that line first, so that no other line is damaged.
    ///
    /// # Errors
    /// Writing failed.
    fn write(&mut self, bytes: &[u8]) -> Result<(), LostLines> {
        let mut rest = bytes;
        let written = self.write_rest(&mut rest);
        written.map_err(|error| {
            let lines = rest.iter().filter(|byte| **byte == b'\n').count() as u64;
            LostLines { lines, error: Some(error) }
        })
    }

    fn write_rest(&mut self, rest: &mut &[u8]) -> Result<(), Error> {
        if self.is_torn {
            self.to.write_all(b"\n")?;
            self.is_torn = false;
        }
        while !rest.is_empty() {
            let written = match self.to.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                written => written?,
            };
            let (done, left) = rest.split_at(written.min(rest.len()));
            self.is_torn = !done.ends_with(b"\n");
            *rest = left;
        }
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    /// A folder of this test process, removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn create(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("weft-{name}-{}", std::process::id()));
            fs::create_dir_all(&folder).expect("a folder can be created");
            Self(folder)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    fn batch(path: &Path, line: &str) -> LineBatch {
        let sink = AccessLogSink::File(path.into());
        LineBatch { sink, bytes: format!("{line}\n").into(), lines: 1 }
    }

    fn text(path: &Path) -> String {
        fs::read_to_string(path).expect("the file exists")
    }

    fn real() -> Outputs {
        Outputs::new(Box::new(OpenedSink::open))
    }

    #[test]
    fn file_is_appended_to_and_readable_by_its_group_only() {
        let folder = Folder::create("append");
        let path = folder.path("log");
        fs::write(&path, "before\n").expect("the file can be written");
        real().write(&batch(&path, "one")).expect("the file can be opened");
        assert_eq!(text(&path), "before\none\n");
        let new = folder.path("new");
        real().write(&batch(&new, "one")).expect("the file can be created");
        let mode = fs::metadata(&new).expect("the file exists").mode();
        assert_eq!(mode & 0o137, 0, "{mode:o}");
    }

    #[test]
    fn renamed_and_removed_files_are_opened_again() {
        let folder = Folder::create("rotate");
        let path = folder.path("log");
        let rotated = folder.path("log.1");
        let mut outputs = real();
        let mut write = |line| outputs.write(&batch(&path, line)).expect("the file can be written");
        write("one");
        fs::rename(&path, &rotated).expect("the file can be renamed");
        write("two");
        write("three");
        assert_eq!((text(&rotated), text(&path)), ("one\n".into(), "two\nthree\n".into()));
        fs::remove_file(&path).expect("the file can be removed");
        write("four");
        assert_eq!(text(&path), "four\n");
    }

    #[test]
    fn file_that_cannot_be_opened_loses_its_lines_until_it_can() {
        let folder = Folder::create("retry");
        let below = folder.path("missing");
        let path = below.join("log");
        let mut outputs = real();
        let lost = outputs.write(&batch(&path, "one")).expect_err("the folder is missing");
        assert_eq!(
            (lost.lines, lost.error.map(|error| error.kind())),
            (1, Some(ErrorKind::NotFound))
        );
        fs::create_dir(&below).expect("the folder can be created");
        outputs.write(&batch(&path, "two")).expect("the file can be opened");
        assert_eq!(text(&path), "two\n");
    }

    #[test]
    fn least_recently_used_file_is_closed_at_the_limit() {
        let folder = Folder::create("limit");
        let mut outputs = real();
        let paths: Vec<_> = (0..=SINK_LIMIT).map(|n| folder.path(&n.to_string())).collect();
        for round in ["one", "two"] {
            for path in &paths {
                outputs.write(&batch(path, round)).expect("the file can be written");
                assert!(outputs.outputs.len() <= SINK_LIMIT);
            }
        }
        assert!(paths.iter().all(|path| text(path) == "one\ntwo\n"));
    }
}
