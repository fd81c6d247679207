//! Reads the resource usage of a sidecar from `/proc`.

use std::path::PathBuf;
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};

use crate::sidecar_pair::TestSidecar;

impl TestSidecar {
    /// The number of files its workers have open: each worker has a file table of its own.
    ///
    /// # Panics
    /// If the process has ended.
    #[must_use]
    pub fn open_files(&self) -> usize {
        let threads = std::fs::read_dir(self.proc_path("task")).expect("the sidecar runs");
        // A thread may end while this loop runs; workers do not.
        let threads = threads.flatten().map(|thread| thread.path());
        let name = |thread: &PathBuf| std::fs::read_to_string(thread.join("comm"));
        let is_worker = |thread: &PathBuf| name(thread).is_ok_and(|n| n.starts_with("sidecar-"));
        let files = |thread: PathBuf| Some(std::fs::read_dir(thread.join("fd")).ok()?.count());
        let files = threads.filter(is_worker).filter_map(files).sum();
        assert!(files > 0, "{self:?} has no worker");
        files
    }

    /// The CPU time it has used, in user and kernel mode.
    ///
    /// # Panics
    /// If the process has ended.
    #[must_use]
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(self.proc_path("stat")).expect("the sidecar runs");
        // The command name in parentheses may hold any character; the third field follows it.
        let (_, numbers) = stat.rsplit_once(')').expect("stat has the command name");
        let number = |nth: usize| numbers.split_whitespace().nth(nth - 3)?.parse::<u64>().ok();
        let ticks = number(14).zip(number(15)).map(|(own, kernel)| own + kernel);
        let per_second = sysconf(SysconfVar::CLK_TCK)
            .ok()
            .flatten()
            .expect("the kernel reports its clock ticks");
        let per_second = u64::try_from(per_second).expect("the clock tick rate is positive");
        Duration::from_millis(ticks.expect("stat has user and system time") * 1000 / per_second)
    }

    fn proc_path(&self, of: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{of}", self.process.id()))
    }
}
