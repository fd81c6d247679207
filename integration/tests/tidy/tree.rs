//! The files of the tree, and what of them is code.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// A file of the tree, its path relative to the root of the workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) path: String,
    pub(crate) text: String,
}

impl File {
    pub(crate) fn new(path: impl Into<String>, text: impl Into<String>) -> Self {
        Self { path: path.into(), text: text.into() }
    }

    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    pub(crate) fn is_manifest(&self) -> bool {
        self.path == "Cargo.toml" || self.path.ends_with("/Cargo.toml")
    }

    /// Whether nothing in the file is meant for production.
    pub(crate) fn is_wholly_tests(&self) -> bool {
        let path = Path::new(&self.path);
        path.iter().any(|part| part == "tests") || path.file_name().is_some_and(|n| n == "tests.rs")
    }

    /// How many lines come before the test module that ends the file, or all of them.
    ///
    /// Only a `#[cfg(test)]` on an inline module ends the count: one on an import or on `mod tests;`
    /// may stand at the top, and the code below it is as long as ever.
    pub(crate) fn lines_before_tests(&self) -> usize {
        let lines: Vec<&str> = self.text.lines().collect();
        let opens_tests = |at: usize| {
            let mut after = lines.iter().skip(at + 1);
            after
                .find(|line| line.starts_with(|c: char| c.is_alphabetic()))
                .is_some_and(|line| line.contains("mod ") && line.ends_with('{'))
        };
        lines
            .iter()
            .enumerate()
            .position(|(at, line)| line.starts_with("#[cfg(test)]") && opens_tests(at))
            .unwrap_or(lines.len())
    }

    /// The numbered lines of code before the tests, without comments and the insides of strings.
    pub(crate) fn production_code(&self) -> impl Iterator<Item = (usize, String)> {
        self.numbered().take(self.lines_before_tests()).map(|(number, line)| (number, code(line)))
    }

    pub(crate) fn numbered(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(at, line)| (at + 1, line))
    }
}

/// A line without its comment and without what stands inside its strings. It sees one line at a time,
/// so a string over several lines is taken for code: a false alarm, never a miss.
pub(crate) fn code(line: &str) -> String {
    let mut kept = String::with_capacity(line.len());
    let mut in_string = false;
    let line = line.replace("'\"'", "' '").replace("\\\\", "  ").replace("\\\"", "  ");
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' => in_string = !in_string,
            _ if in_string => {}
            '/' if chars.peek() == Some(&'/') => break,
            other => kept.push(other),
        }
    }
    kept
}

/// Whether `c` can be part of an identifier.
pub(crate) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Every file of the workspace: those under git, and those that the next `git add` would bring.
pub(crate) fn tree() -> Vec<File> {
    let root = root();
    let listed = Command::new("git")
        // The tests may run as root of a user namespace, where the tree belongs to somebody else.
        .args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"])
        .arg("--exclude-standard")
        .current_dir(&root)
        .output()
        .expect("git is installed, the tree came by it");
    assert!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let listed = String::from_utf8(listed.stdout).expect("paths of the tree are UTF-8");
    let files: Vec<File> = listed
        .split_terminator('\0')
        .filter_map(|path| {
            // A file that git lists and the disk lacks was just deleted or moved.
            let bytes = fs::read(root.join(path)).ok()?;
            Some(File::new(path, String::from_utf8_lossy(&bytes)))
        })
        .collect();
    assert!(files.iter().any(|file| file.path == "Cargo.toml"), "{} has no tree", root.display());
    files
}

pub(crate) fn root() -> PathBuf {
    let here = env::var_os("CARGO_MANIFEST_DIR").expect("cargo says where the crate is");
    PathBuf::from(here).join("..")
}
