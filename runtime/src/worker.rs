//! Worker threads: each has its own runtime, sockets and table of open files.

use std::future::Future;
use std::io;
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, unshare};
use tokio::runtime::{LocalOptions, LocalRuntime};

/// Worker threads that wait for their task.
#[derive(Debug)]
pub struct PreparedWorkers {
    threads: Vec<(Sender<WorkerTask>, JoinHandle<()>)>,
}

/// The running workers of a process.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<JoinHandle<()>>,
}

/// The task of a worker, which runs on its runtime.
type WorkerTask = Box<dyn FnOnce(&LocalRuntime) + Send>;

/// The default number of workers: one per processor that this process may use.
#[must_use]
pub fn default_count() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Starts `count` threads named `name-0`, `name-1` and so on, which wait for their task.
///
/// Each thread has its own table of open files, so the limit of open files applies to each worker. A
/// descriptor that is open at this call stays open in every one of these tables while the worker lives, also
/// when another thread closes it: a connection would stay up, a pipe would have no end. So call this before
/// anything else is opened, except the runtimes that the workers wake. For the same reason a worker opens its
/// sockets itself.
///
/// # Errors
/// When a thread or its runtime cannot be created.
pub fn prepare(name: &str, count: NonZeroUsize) -> io::Result<PreparedWorkers> {
    let (ready, prepared) = channel();
    let mut threads = Vec::new();
    for index in 0..count.get() {
        let ready = ready.clone();
        let (work, tasks) = channel();
        let thread = std::thread::Builder::new()
            .name(format!("{name}-{index}"))
            .spawn(move || wait_for_task(&ready, &tasks))?;
        threads.push((work, thread));
        // One after the other, so that a thread does not inherit descriptors of the one before.
        prepared.recv().unwrap_or_else(|_| Err(io::Error::other("a worker's thread failed")))?;
    }
    Ok(PreparedWorkers { threads })
}

fn wait_for_task(ready: &Sender<io::Result<()>>, tasks: &Receiver<WorkerTask>) {
    // Tasks stay on this thread, so waking one needs no lock.
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().build_local(LocalOptions::default());
    // The runtime comes first: other threads write to its wake-up descriptor, so the descriptor must be open
    // under the same number in their tables too.
    let tabled = unshare(CloneFlags::CLONE_FILES);
    let (runtime, outcome) = match runtime {
        Ok(runtime) => (Some(runtime), Ok(())),
        Err(error) => (None, Err(error)),
    };
    // The receiver may have given up already.
    drop(ready.send(outcome));
    if let Err(error) = tabled {
        tracing::debug!(%error, "workers share one table of open files");
    }
    if let (Some(runtime), Ok(work)) = (runtime, tasks.recv()) {
        work(&runtime);
    }
}

impl PreparedWorkers {
    /// Starts the workers: each runs `run` with its number, and ends when the returned future has ended.
    #[must_use]
    pub fn start<F, W>(self, run: F) -> Workers
    where
        F: Fn(usize) -> W + Clone + Send + 'static,
        W: Future<Output = ()> + 'static,
    {
        let threads = self.threads.into_iter().enumerate();
        let threads = threads.map(|(index, (work, thread))| {
            let run = run.clone();
            // If the thread has failed, `join` reports it.
            drop(work.send(Box::new(move |runtime| runtime.block_on(run(index)))));
            thread
        });
        Workers { threads: threads.collect() }
    }
}

impl Workers {
    /// Waits until every worker has ended. Returns whether all ended without a panic.
    #[must_use]
    pub fn join(self) -> bool {
        let outcomes: Vec<_> = self.threads.into_iter().map(JoinHandle::join).collect();
        outcomes.iter().all(Result::is_ok)
    }
}
