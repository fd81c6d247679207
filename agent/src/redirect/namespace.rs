//! A network namespace, and work inside it.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns};

use super::types::RedirectError;

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Namespace {
    /// The namespace of this process.
    #[default]
    Own,
    /// The namespace that a file refers to, such as `/run/netns/web` or `/proc/42/ns/net`.
    At(PathBuf),
}

/// Device and inode of a namespace's file: another file of the same name is another namespace. `None` when it
/// does not exist.
pub(super) type NamespaceId = Option<(u64, u64)>;

impl Namespace {
    /// The identity of the namespace, `None` when it does not exist.
    pub(super) fn namespace_id(&self) -> NamespaceId {
        let own = std::path::Path::new("/proc/self/ns/net");
        let path = match self {
            Self::Own => own,
            Self::At(path) => path,
        };
        let file = std::fs::metadata(path).ok()?;
        Some((file.dev(), file.ino()))
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("this namespace"),
            Self::At(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Runs `operation` on a thread that has entered the namespace. Child processes of that thread are in it too.
pub(crate) fn in_namespace<T: Send>(
    namespace: &Namespace,
    operation: impl FnOnce() -> Result<T, RedirectError> + Send,
) -> Result<T, RedirectError> {
    let Namespace::At(path) = namespace else {
        return operation();
    };
    let fail = |reason: String| RedirectError::Namespace { path: path.clone(), reason };
    let file = File::open(path).map_err(|error| fail(error.to_string()))?;
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            setns(&file, CloneFlags::CLONE_NEWNET).map_err(|error| fail(error.to_string()))?;
            operation()
        });
        entered.join().unwrap_or_else(|_| Err(fail("the thread that entered it failed".into())))
    })
}
