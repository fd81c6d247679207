//! A process that a test starts: its lines, its signals and its end.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::{DEADLINE, eventually};

/// How many of the last lines of standard error are kept for a test that fails.
const TAIL_LINES: usize = 60;

/// The `weft` command: `$WEFT`, or what cargo built beside this test.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn weft() -> Command {
    let path = std::env::var_os("WEFT").map_or_else(|| built().join("weft"), PathBuf::from);
    assert!(path.exists(), "{} is missing; run cargo build, or set WEFT", path.display());
    Command::new(path)
}

/// Python, in the environment of the tests: `$WEFT_PYTHON`, or what `integration/setup` made.
///
/// # Panics
/// When the environment is not there.
#[must_use]
pub fn python() -> Command {
    let python = std::env::var_os("WEFT_PYTHON")
        .map_or_else(|| built().join("../venv/bin/python"), PathBuf::from);
    assert!(python.exists(), "{} is missing; run integration/setup", python.display());
    Command::new(python)
}

/// A program of `integration/counterparts`.
///
/// # Panics
/// When the environment of the tests is not there.
#[must_use]
pub fn counterpart(script: &str) -> Command {
    let mut command = python();
    command.arg("-u").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("counterparts").join(script));
    command
}

/// Where cargo put what it built: `target/debug`, of which the test itself is in `deps`.
fn built() -> PathBuf {
    let test = std::env::current_exe().expect("a running program has a path");
    test.ancestors().nth(2).expect("a test stands in target/debug/deps").to_owned()
}

/// A tool of the system's administration, such as `nft`.
#[must_use]
pub fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    // Debian keeps it where an ordinary user's PATH does not look.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// Runs `nft` with these words and gives what it prints.
///
/// # Panics
/// When it fails.
pub fn nft(words: &str) -> String {
    run(tool("nft").args(words.split_whitespace()))
}

/// Runs `ip` with these words and gives its standard output.
///
/// # Panics
/// When it fails.
pub fn ip(words: &str) -> String {
    run(tool("ip").args(words.split_whitespace()))
}

/// Runs a command to its end and gives its standard output.
///
/// # Panics
/// When it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("the command can be started");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{error}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A running process. It is killed when the value is dropped; in a test that fails, what it last wrote
/// to standard error is then printed.
pub struct Process {
    name: String,
    child: std::process::Child,
    lines: Receiver<String>,
    errors: Arc<Mutex<VecDeque<String>>>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.child.id())
    }
}

impl Process {
    /// Starts a command. `name` is for people.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(name: &str, command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().unwrap_or_else(|error| unstartable(command.get_program(), &error));
        let (sender, lines) = channel();
        let errors = Arc::new(Mutex::new(VecDeque::new()));
        let output = child.stdout.take().expect("it was piped");
        // A test that is over reads no more lines.
        each_line(output, move |line| drop(sender.send(line)));
        let (kept, output) = (errors.clone(), child.stderr.take().expect("it was piped"));
        each_line(output, move |line| {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.push_back(line);
            if kept.len() > TAIL_LINES {
                kept.pop_front();
            }
        });
        Self { name: name.to_owned(), child, lines, errors }
    }

    /// The next line of standard output that holds `text`; those before it are passed over.
    ///
    /// # Panics
    /// When none comes before the deadline.
    pub fn line_with(&self, text: &str) -> String {
        self.line(text, |line| line.contains(text))
    }

    /// The next line of standard output that `is_it` picks; those before it are passed over.
    ///
    /// # Panics
    /// When none comes before the deadline.
    pub fn line(&self, awaited: &str, is_it: impl Fn(&str) -> bool) -> String {
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok(line) if is_it(&line) => return line,
                Ok(_) => {}
                Err(error) => unseen(self, awaited, &error),
            }
        }
    }

    /// The lines of standard output that were not read yet.
    #[must_use]
    pub fn lines_so_far(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// The last lines of standard error.
    #[must_use]
    pub fn errors(&self) -> String {
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors.iter().fold(String::new(), |text, line| text + line + "\n")
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).expect("a process id is a small number");
        kill(Pid::from_raw(id), signal).expect("the process is there until it was waited for");
    }

    /// Ends it without a word.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }

    /// Ends it without a word after some time, wherever it is then.
    pub fn kill_after(&mut self, time: std::time::Duration) {
        // What it has to say meanwhile is of no interest; when it ends, nothing more will come.
        while self.lines.recv_timeout(time).is_ok() {}
        self.kill();
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end before the deadline.
    pub fn ended(&mut self) -> ExitStatus {
        let awaited = format!("the end of {}", self.name);
        eventually(awaited, || self.child.try_wait().expect("it is a child of ours"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let running = self.is_running();
        self.kill();
        if std::thread::panicking() {
            let standing = if running { "was running" } else { "had ended" };
            let text = format!("--- {} {standing}; its errors:\n{}", self.name, self.errors());
            // Nothing is left to do about a standard error that is gone.
            drop(std::io::stderr().write_all(text.as_bytes()));
        }
    }
}

fn each_line(output: impl Read + Send + 'static, take: impl Fn(String) + Send + 'static) {
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            take(String::from_utf8_lossy(&line).trim_end().to_owned());
            line.clear();
        }
    });
}

#[allow(clippy::panic, reason = "a test cannot go on without the process")]
fn unstartable(program: &OsStr, error: &std::io::Error) -> ! {
    panic!("{} cannot be started: {error}; run integration/setup", program.display())
}

#[allow(clippy::panic, reason = "a test cannot go on without the line")]
fn unseen(process: &Process, awaited: &str, error: &dyn fmt::Display) -> ! {
    panic!("{process:?} never wrote a line with {awaited:?}: {error}")
}
