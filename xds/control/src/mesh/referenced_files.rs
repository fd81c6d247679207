//! The files that `mesh.yaml` refers to.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The files that a mesh refers to, with the content that was read.
#[derive(Debug)]
pub(super) struct ReferencedFiles {
    folder: PathBuf,
    read: RefCell<BTreeMap<PathBuf, Result<Vec<u8>, String>>>,
}

impl ReferencedFiles {
    /// Files whose paths are relative to a folder.
    pub(super) fn below(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), read: RefCell::default() }
    }

    /// The full path of a file, and its content.
    pub(super) fn read(&self, name: &str) -> (PathBuf, Result<Vec<u8>, String>) {
        let path = self.folder.join(name);
        let mut read = self.read.borrow_mut();
        let content = read.entry(path.clone()).or_insert_with(|| content(&path)).clone();
        (path, content)
    }

    /// The full paths of the files that were read.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.read.borrow().keys().cloned().collect()
    }

    /// Replaces the content that was read of a file.
    #[cfg(test)]
    pub(super) fn replace(&self, path: PathBuf, content: Result<Vec<u8>, String>) {
        self.read.borrow_mut().insert(path, content);
    }

    /// Whether each file still has the content that was read.
    pub(super) fn is_unchanged(&self) -> bool {
        self.read.borrow().iter().all(|(path, before)| content(path) == *before)
    }
}

fn content(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| error.to_string())
}
