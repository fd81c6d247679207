//! An agent with a file of its own, and no control plane.

use serde_json::Value;
use tempfile::TempDir;

use crate::curl::Curl;
use crate::port;
use crate::process::{Process, weft};
use crate::wait::eventually;

/// An agent that runs.
#[derive(Debug)]
pub struct TestAgent {
    /// Its process.
    pub process: Process,
    /// Where its admin port is.
    pub admin: u16,
    file: TempDir,
}

impl TestAgent {
    /// Starts one with what `config` gives for an admin port, and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready.
    #[must_use]
    pub fn start(config: impl FnOnce(u16) -> Value, arguments: &[&str]) -> Self {
        let file = TempDir::new().expect("a temporary folder can be made");
        let admin = port::free();
        let path = file.path().join("agent.json");
        std::fs::write(path, format!("{:#}", config(admin))).expect("the folder takes files");
        let mut agent = Self { process: Self::run(&file, arguments), admin, file };
        agent.wait_until_ready();
        agent
    }

    fn run(file: &TempDir, arguments: &[&str]) -> Process {
        let mut command = weft();
        command.args(["agent", "--workers", "1", "-c"]).arg(file.path().join("agent.json"));
        Process::start("agent", command.args(arguments))
    }

    /// Starts it anew, in the place of one that was killed.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn restart(&mut self) {
        self.restart_without_waiting();
        self.wait_until_ready();
    }

    /// The same, without waiting.
    pub fn restart_without_waiting(&mut self) {
        self.process = Self::run(&self.file, &[]);
    }

    fn wait_until_ready(&mut self) {
        eventually(format!("{:?} is ready", self.process), || {
            (Curl::get(self.admin, "/ready").run().status == 200).then_some(())
        });
    }

    /// What it tells of its configuration.
    ///
    /// # Panics
    /// When it tells nothing.
    #[must_use]
    pub fn dump(&self) -> Value {
        serde_json::from_slice(&Curl::get(self.admin, "/config_dump").run().body)
            .expect("a dump is JSON")
    }

    /// The services, and which way each goes.
    ///
    /// # Panics
    /// When it tells none.
    #[must_use]
    pub fn services(&self) -> Vec<Value> {
        let dump = self.dump();
        let services = dump.get("services").and_then(Value::as_array);
        services.expect("it lists services").clone()
    }

    /// One of its metrics, by its name with its labels.
    ///
    /// # Panics
    /// When there is none of that name.
    #[must_use]
    pub fn metric(&self, name: &str) -> u64 {
        let page = Curl::get(self.admin, "/metrics").run().text();
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.expect(name).parse().expect("a number")
    }
}
