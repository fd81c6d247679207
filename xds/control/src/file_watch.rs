//! Notifies the caller when a file may have changed, by inotify on its folder.
//!
//! The folder is watched rather than the file: editors and Kubernetes replace the file, or a symbolic link on its path.
//! Where inotify does not work (watch limit reached, network file system), the caller has to poll.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Weak;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::sync::Notify;

/// How often the thread checks whether `changed` is still in use, in milliseconds.
const IN_USE_CHECK_MS: u16 = 1000;

/// Starts a thread that notifies `changed` after each change in the folder of `file`, as long as
/// `changed` is in use.
///
/// # Errors
/// inotify is not available, or the thread cannot be started.
pub(crate) fn notify_changes(file: &Path, changed: Weak<Notify>) -> std::io::Result<()> {
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) | None => Path::new("."),
    };
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    // A write counts when the writer closes the file: before that, it may be incomplete.
    let events =
        AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE;
    inotify.add_watch(folder, events)?;
    std::thread::Builder::new().name("file-watch".into()).spawn(move || {
        if let Err(error) = run(&inotify, &changed) {
            tracing::warn!(%error, "file watch failed, polling instead");
        }
    })?;
    Ok(())
}

fn run(inotify: &Inotify, changed: &Weak<Notify>) -> Result<(), Errno> {
    loop {
        let mut readable = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        let ready = match poll(&mut readable, PollTimeout::from(IN_USE_CHECK_MS)) {
            Err(Errno::EINTR) => 0,
            ready => ready?,
        };
        let Some(changed) = changed.upgrade() else {
            return Ok(());
        };
        if ready > 0 {
            match inotify.read_events() {
                Ok(_) => changed.notify_one(),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    async fn is_notified(changed: &Notify) -> bool {
        tokio::time::timeout(Duration::from_secs(5), changed.notified()).await.is_ok()
    }

    #[tokio::test]
    async fn writing_and_replacing_the_file_notifies() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("mesh.yaml");
        let changed = Arc::new(Notify::new());
        notify_changes(&file, Arc::downgrade(&changed)).expect("a watch");
        std::fs::write(&file, "a").expect("written");
        assert!(is_notified(&changed).await, "a write");
        let other = folder.path().join("new.yaml");
        std::fs::write(&other, "b").expect("written");
        assert!(is_notified(&changed).await, "another file in the folder");
        std::fs::rename(&other, &file).expect("replaced");
        assert!(is_notified(&changed).await, "a replacement");
    }

    #[test]
    fn missing_folder_is_an_error() {
        let changed = Arc::new(Notify::new());
        let missing = Path::new("/nonexistent/mesh.yaml");
        notify_changes(missing, Arc::downgrade(&changed)).expect_err("no folder");
    }
}
