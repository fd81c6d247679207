//! What a process uses, by the kernel's account.

use std::path::PathBuf;
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};

use crate::sidecar_pair::TestSidecar;

impl TestSidecar {
    /// How many files its workers have open: each has a table of its own.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn open_files(&self) -> usize {
        let threads = std::fs::read_dir(self.account("task")).expect("it runs");
        // A thread may be gone by the time it is looked at; workers stay.
        let threads = threads.flatten().map(|thread| thread.path());
        let name = |thread: &PathBuf| std::fs::read_to_string(thread.join("comm"));
        let is_worker = |thread: &PathBuf| name(thread).is_ok_and(|n| n.starts_with("sidecar-"));
        let files = |thread: PathBuf| Some(std::fs::read_dir(thread.join("fd")).ok()?.count());
        let files = threads.filter(is_worker).filter_map(files).sum();
        assert!(files > 0, "{self:?} has no worker");
        files
    }

    /// How much time of processors it has taken.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(self.account("stat")).expect("it runs");
        // The name, in parentheses, may hold anything; behind it the numbers begin with the third.
        let (_, numbers) = stat.rsplit_once(')').expect("it has a name");
        let number = |nth: usize| numbers.split_whitespace().nth(nth - 3)?.parse::<u64>().ok();
        let ticks = number(14).zip(number(15)).map(|(own, kernel)| own + kernel);
        let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().expect("there are ticks");
        let per_second = u64::try_from(per_second).expect("they are counted up");
        Duration::from_millis(ticks.expect("the columns of time") * 1000 / per_second)
    }

    fn account(&self, of: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{of}", self.process.id()))
    }
}
