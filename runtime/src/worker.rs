//! Worker threads: one runtime each, nothing shared.

use std::future::Future;
use std::io;
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, unshare};
use tokio::runtime::{LocalOptions, LocalRuntime};

/// Workers that wait for their work.
#[derive(Debug)]
pub struct PreparedWorkers {
    threads: Vec<(Sender<WorkerTask>, JoinHandle<()>)>,
}

/// The running workers of a process.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<JoinHandle<()>>,
}

/// What a worker does, on its runtime.
type WorkerTask = Box<dyn FnOnce(&LocalRuntime) + Send>;

/// How many workers there are when nobody says: one per processor that we may use.
#[must_use]
pub fn default_count() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Makes `count` workers named `name-0`, `name-1` and so on, which wait for their work.
///
/// Each has its own table of open files, so that the limit of open files holds per worker and not
/// for all together. What is open at this call is open in every one of these tables for as long as
/// the worker lives, and closing it elsewhere does not end it: a connection would stay up, a pipe
/// would have no end. So this comes before anything else is opened, but for the runtimes that
/// workers are to wake. It follows too that a worker opens its sockets itself.
///
/// # Errors
/// When a thread or its runtime cannot be made.
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
        // One after the other: the next one is not to hold what this one opens.
        prepared.recv().unwrap_or_else(|_| Err(io::Error::other("a worker's thread failed")))?;
    }
    Ok(PreparedWorkers { threads })
}

fn wait_for_task(ready: &Sender<io::Result<()>>, tasks: &Receiver<WorkerTask>) {
    // Its tasks stay on this thread, so none needs a lock to be woken.
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().build_local(LocalOptions::default());
    // After the runtime, whose wake-up descriptor other threads write to: it must be open, under the
    // same number, in their table too.
    let tabled = unshare(CloneFlags::CLONE_FILES);
    let (runtime, outcome) = match runtime {
        Ok(runtime) => (Some(runtime), Ok(())),
        Err(error) => (None, Err(error)),
    };
    // Whoever waits for it may have given up.
    drop(ready.send(outcome));
    if let Err(error) = tabled {
        tracing::debug!(%error, "workers share one table of open files");
    }
    if let (Some(runtime), Ok(work)) = (runtime, tasks.recv()) {
        work(&runtime);
    }
}

impl PreparedWorkers {
    /// Sets them to work: each calls `run` with its number and ends when what that gives has ended.
    #[must_use]
    pub fn start<F, W>(self, run: F) -> Workers
    where
        F: Fn(usize) -> W + Clone + Send + 'static,
        W: Future<Output = ()> + 'static,
    {
        let threads = self.threads.into_iter().enumerate();
        let threads = threads.map(|(index, (work, thread))| {
            let run = run.clone();
            // One whose thread has failed is told of when it is joined.
            drop(work.send(Box::new(move |runtime| runtime.block_on(run(index)))));
            thread
        });
        Workers { threads: threads.collect() }
    }
}

impl Workers {
    /// Waits until every worker has ended; whether all did so in good order.
    #[must_use]
    pub fn join(self) -> bool {
        let outcomes: Vec<_> = self.threads.into_iter().map(JoinHandle::join).collect();
        outcomes.iter().all(Result::is_ok)
    }
}
