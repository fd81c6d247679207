//! Runs a role of weft as a process on a host of a mesh. The process can be restarted.

use std::process::Command;

use weft::demo::hosts::Host;

use crate::curl::{Curl, CurlResponse};
use crate::fake_clock::FakeClock;
use crate::process::{Process, weft};
use crate::wait::eventually;

/// A running role of weft.
#[derive(Debug)]
pub struct RoleProcess {
    /// Its process.
    pub process: Process,
    name: String,
    host: Option<Host>,
    arguments: Vec<String>,
}

impl RoleProcess {
    pub(crate) fn start(name: &str, host: Option<&Host>, arguments: &[&str]) -> Self {
        let arguments: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
        let process = on(host, || Process::start(name, weft().args(&arguments)));
        Self { process, name: name.to_owned(), host: host.cloned(), arguments }
    }

    /// The host it runs on; `None` is the router.
    #[must_use]
    pub fn host(&self) -> Option<&Host> {
        self.host.as_ref()
    }

    /// Restarts the role with the same arguments, and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn restart(&mut self) {
        self.start_again(weft());
        self.wait_until_ready();
    }

    /// Restarts the role with the same arguments and another clock; does not wait until it is
    /// ready.
    pub fn restart_with_clock(&mut self, clock: &FakeClock) {
        let mut command = weft();
        clock.apply_to(&mut command);
        self.start_again(command);
    }

    /// Restarts the role with the same arguments; does not wait until it is ready.
    pub fn restart_without_waiting(&mut self) {
        self.start_again(weft());
    }

    fn start_again(&mut self, mut command: Command) {
        self.process.kill();
        command.args(&self.arguments);
        self.process = on(self.host.as_ref(), || Process::start(&self.name, &mut command));
    }

    /// Requests a page of its admin port.
    #[must_use]
    pub fn admin(&self, path: &str) -> CurlResponse {
        on(self.host.as_ref(), || Curl::get(15000, path).run())
    }

    /// Waits until the role reports that it is ready.
    ///
    /// # Panics
    /// If it does not before the deadline.
    pub fn wait_until_ready(&self) {
        eventually(format!("{:?} is ready", self.process), || {
            (self.admin("/ready").status == 200).then_some(())
        });
    }
}

/// Runs `work` on a host, or on the router without a host.
pub(crate) fn on<T: Send>(host: Option<&Host>, work: impl FnOnce() -> T + Send) -> T {
    match host {
        Some(host) => host.on(work).expect("the host's namespace can be entered"),
        None => work(),
    }
}
