//! Processes of the demo: the roles of weft and the services, each on its host.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use weft_runtime::clock::now;

use super::hosts::Host;
use crate::client;

/// How long a process may take to become ready.
const READY: Duration = Duration::from_secs(30);

/// Starts processes. Dropping a [`DemoRole`] kills its process.
#[derive(Debug)]
pub(super) struct Roles {
    binary: PathBuf,
    logs: PathBuf,
}

/// A running process.
#[derive(Debug)]
pub(super) struct DemoRole {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Roles {
    /// Uses the current executable; the logs go to a directory.
    pub(super) fn new(logs: &Path) -> Result<Self, String> {
        let binary = std::env::current_exe().map_err(|error| error.to_string())?;
        std::fs::create_dir_all(logs).map_err(|error| format!("{}: {error}", logs.display()))?;
        Ok(Self { binary, logs: logs.to_owned() })
    }

    /// Starts `weft ARGUMENTS` on a host; without one, on the router.
    pub(super) fn start(
        &self,
        name: &str,
        host: Option<&Host>,
        arguments: &[&str],
    ) -> Result<DemoRole, String> {
        let log = self.logs.join(format!("{name}.log"));
        let out = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
        let err = out.try_clone().map_err(|error| error.to_string())?;
        let mut command = Command::new(&self.binary);
        command.args(arguments).stdin(Stdio::null()).stdout(out).stderr(err);
        let spawned = match host {
            Some(host) => host.on(|| command.spawn())?,
            None => command.spawn(),
        };
        let child = spawned.map_err(|error| format!("cannot start {name}: {error}"))?;
        Ok(DemoRole { name: name.to_owned(), child, log })
    }
}

impl DemoRole {
    /// Waits until `/ready` of the admin port returns 200.
    pub(super) fn ready(&mut self, host: &Host) -> Result<(), String> {
        self.wait(host, client::is_ready)
    }

    /// Waits until `/ready` of the admin port on the router returns 200.
    pub(super) fn ready_on_router(&mut self) -> Result<(), String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        let deadline = now() + READY;
        while !runtime.block_on(client::is_ready()) {
            self.check(deadline)?;
        }
        Ok(())
    }

    fn wait<F>(&mut self, host: &Host, probe: fn() -> F) -> Result<(), String>
    where
        F: Future<Output = bool> + Send,
    {
        let deadline = now() + READY;
        while !host.run(probe())? {
            self.check(deadline)?;
        }
        Ok(())
    }

    fn check(&mut self, deadline: Instant) -> Result<(), String> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return Err(format!("{} exited ({status}):\n{}", self.name, self.tail()));
        }
        if now() >= deadline {
            return Err(format!("{} was not ready within {READY:?}:\n{}", self.name, self.tail()));
        }
        pause(Duration::from_millis(50));
        Ok(())
    }

    /// Kills the process with SIGKILL.
    pub(super) fn kill(&mut self) -> Result<(), String> {
        self.child.kill().map_err(|error| error.to_string())?;
        self.child.wait().map(drop).map_err(|error| error.to_string())
    }

    /// The name of the process.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The last lines of the log, without the access log.
    pub(super) fn tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('{')).collect();
        lines
            .iter()
            .skip(lines.len().saturating_sub(12))
            .map(|line| format!("    {line}\n"))
            .collect()
    }
}

impl Drop for DemoRole {
    fn drop(&mut self) {
        // The process may have exited already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Sleeps between two polls.
#[expect(
    clippy::disallowed_methods,
    reason = "the step between two polls, each bounded by a deadline"
)]
pub(super) fn pause(time: Duration) {
    std::thread::sleep(time);
}
