//! Worker threads: one runtime each, nothing shared.

use std::future::Future;
use std::io;
use std::num::NonZeroUsize;
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, unshare};
use tokio::task::LocalSet;

/// The running workers of a process.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<JoinHandle<()>>,
}

/// How many workers there are when nobody says: one per processor that we may use.
#[must_use]
pub fn default_count() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Starts `count` workers named `name-0`, `name-1` and so on. Each calls `run` with its number and
/// ends when what that gives has ended.
///
/// Each worker has its own table of open files, so that the limit of open files holds per worker
/// and not for all together. It follows that a worker opens its sockets itself.
///
/// # Errors
/// When a thread or its runtime cannot be made.
pub fn start<F, W>(name: &str, count: NonZeroUsize, run: F) -> io::Result<Workers>
where
    F: Fn(usize) -> W + Clone + Send + 'static,
    W: Future<Output = ()> + 'static,
{
    let mut threads = Vec::new();
    for index in 0..count.get() {
        let run = run.clone();
        let thread =
            std::thread::Builder::new().name(format!("{name}-{index}")).spawn(move || {
                let runtime =
                    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                        Ok(runtime) => runtime,
                        Err(error) => return tracing::error!(%error, "a worker could not start"),
                    };
                // After the runtime, whose wake-up descriptor other threads write to: it must be open,
                // under the same number, in their table too.
                if let Err(error) = unshare(CloneFlags::CLONE_FILES) {
                    tracing::debug!(%error, "workers share one table of open files");
                }
                LocalSet::new().block_on(&runtime, run(index));
            })?;
        threads.push(thread);
    }
    Ok(Workers { threads })
}

impl Workers {
    /// Waits until every worker has ended; whether all did so in good order.
    #[must_use]
    pub fn join(self) -> bool {
        let outcomes: Vec<_> = self.threads.into_iter().map(JoinHandle::join).collect();
        outcomes.iter().all(Result::is_ok)
    }
}
