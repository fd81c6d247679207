//! Starts processes for tests; reads their output, sends signals and waits for their exit.

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

/// The number of last lines of standard error that are kept for the report of a failed test.
const TAIL_LINES: usize = 60;

/// The `weft` command: `$WEFT`, or the binary that cargo built next to this test.
///
/// # Panics
/// If the binary does not exist.
#[must_use]
pub fn weft() -> Command {
    let path = std::env::var_os("WEFT").map_or_else(|| built().join("weft"), PathBuf::from);
    assert!(path.exists(), "{} is missing; run cargo build, or set WEFT", path.display());
    Command::new(path)
}

/// Python in the virtual environment of the tests: `$WEFT_PYTHON`, or the one that
/// `integration/setup` made.
///
/// # Panics
/// If the environment does not exist.
#[must_use]
pub fn python() -> Command {
    let python = std::env::var_os("WEFT_PYTHON")
        .map_or_else(|| built().join("../venv/bin/python"), PathBuf::from);
    assert!(python.exists(), "{} is missing; run integration/setup", python.display());
    Command::new(python)
}

/// Prometheus' `promtool`: `$WEFT_PROMTOOL`, what `integration/setup` downloaded, or what the system has.
#[must_use]
pub fn promtool() -> Command {
    let downloaded = built().join("../promtool");
    let path = std::env::var_os("WEFT_PROMTOOL")
        .map(PathBuf::from)
        .or_else(|| downloaded.exists().then_some(downloaded));
    Command::new(path.unwrap_or_else(|| "promtool".into()))
}

/// A program of `integration/counterparts`.
///
/// # Panics
/// If the Python environment does not exist.
#[must_use]
pub fn counterpart(script: &str) -> Command {
    let mut command = python();
    command.arg("-u").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("counterparts").join(script));
    command
}

/// The folder of cargo's output, `target/debug`; the test itself is in `deps` below it.
fn built() -> PathBuf {
    let test = std::env::current_exe().expect("a running program has a path");
    test.ancestors().nth(2).expect("the test is in target/debug/deps").to_owned()
}

/// A system administration tool, such as `nft`.
#[must_use]
pub fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    // Debian installs these in folders that are not in an ordinary user's PATH.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// Runs `nft` with these arguments and returns its standard output.
///
/// # Panics
/// If it fails.
pub fn nft(words: &str) -> String {
    run(tool("nft").args(words.split_whitespace()))
}

/// Runs `ip` with these arguments and returns its standard output.
///
/// # Panics
/// If it fails.
pub fn ip(words: &str) -> String {
    run(tool("ip").args(words.split_whitespace()))
}

/// Runs a command to its end and returns its standard output.
///
/// # Panics
/// If it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("the command can be started");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{error}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A running process. It is killed when the value is dropped; a failed test then also prints the
/// last lines of the process's standard error.
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
    /// Starts a command; `name` appears in messages.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(name: &str, command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic_cannot_start(command.get_program(), &error));
        let (sender, lines) = channel();
        let errors = Arc::new(Mutex::new(VecDeque::new()));
        let output = child.stdout.take().expect("the stream is a pipe");
        // The receiver is closed when the test ends.
        each_line(output, move |line| drop(sender.send(line)));
        let kept = errors.clone();
        let output = child.stderr.take().expect("the stream is a pipe");
        each_line(output, move |line| {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.push_back(line);
            if kept.len() > TAIL_LINES {
                kept.pop_front();
            }
        });
        Self { name: name.to_owned(), child, lines, errors }
    }

    /// Reads standard output up to the next line that contains `text`, and returns that line.
    ///
    /// # Panics
    /// If no such line is written before the deadline.
    pub fn line_with(&self, text: &str) -> String {
        self.line(text, |line| line.contains(text))
    }

    /// Reads standard output up to the next line that matches `matches`, and returns that line.
    ///
    /// # Panics
    /// If no such line is written before the deadline.
    pub fn line(&self, awaited: &str, matches: impl Fn(&str) -> bool) -> String {
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok(line) if matches(&line) => return line,
                Ok(_) => {}
                Err(error) => panic_line_missing(self, awaited, &error),
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

    /// The process ID.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// If the process has ended.
    pub fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).expect("a process id is a small number");
        kill(Pid::from_raw(id), signal)
            .expect("a child process exists until the test waits for it");
    }

    /// Kills the process with SIGKILL.
    pub fn kill(&mut self) {
        // The process may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }

    /// Kills the process with SIGKILL after this time.
    pub fn kill_after(&mut self, time: std::time::Duration) {
        // Output until then is discarded; the channel closes early if the process ends.
        while self.lines.recv_timeout(time).is_ok() {}
        self.kill();
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the process to exit.
    ///
    /// # Panics
    /// If it does not exit before the deadline.
    pub fn ended(&mut self) -> ExitStatus {
        let awaited = format!("the end of {}", self.name);
        eventually(awaited, || self.child.try_wait().expect("the process is a child of this test"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let running = self.is_running();
        self.kill();
        if std::thread::panicking() {
            let state = if running { "was running" } else { "had ended" };
            let text = format!("--- {} {state}; its standard error:\n{}", self.name, self.errors());
            // An error of writing to standard error cannot be reported.
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

#[expect(clippy::panic, reason = "a test cannot continue without the process")]
fn panic_cannot_start(program: &OsStr, error: &std::io::Error) -> ! {
    panic!("{} cannot be started: {error}; run integration/setup", program.display())
}

#[expect(clippy::panic, reason = "a test cannot continue without the line")]
fn panic_line_missing(process: &Process, awaited: &str, error: &dyn fmt::Display) -> ! {
    panic!("{process:?} never wrote a line with {awaited:?}: {error}")
}
