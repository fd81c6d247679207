//! Starts an agent with a static configuration file, without a control plane.

use serde_json::Value;
use tempfile::TempDir;

use crate::curl::Curl;
use crate::metrics::metric;
use crate::port;
use crate::process::{Process, weft};
use crate::wait::eventually;

/// A running agent.
#[derive(Debug)]
pub struct TestAgent {
    /// The agent's process.
    pub process: Process,
    /// The admin port.
    pub admin: u16,
    file: TempDir,
}

impl TestAgent {
    /// Starts an agent with the configuration that `config` returns for an admin port, and waits
    /// until it is ready.
    ///
    /// # Panics
    /// If the agent does not become ready.
    #[must_use]
    pub fn start(config: impl FnOnce(u16) -> Value, arguments: &[&str]) -> Self {
        let file = TempDir::new().expect("a temporary folder can be created");
        let admin = port::free();
        let path = file.path().join("agent.json");
        std::fs::write(path, format!("{:#}", config(admin))).expect("the folder is writable");
        let mut agent = Self { process: Self::run(&file, arguments), admin, file };
        agent.wait_until_ready();
        agent
    }

    fn run(file: &TempDir, arguments: &[&str]) -> Process {
        let mut command = weft();
        command.args(["agent", "--workers", "1", "-c"]).arg(file.path().join("agent.json"));
        Process::start("agent", command.args(arguments))
    }

    /// Starts the agent again, after it was killed.
    ///
    /// # Panics
    /// If the agent does not become ready.
    pub fn restart(&mut self) {
        self.restart_without_waiting();
        self.wait_until_ready();
    }

    /// Starts the agent again and does not wait until it is ready.
    pub fn restart_without_waiting(&mut self) {
        self.process = Self::run(&self.file, &[]);
    }

    fn wait_until_ready(&mut self) {
        eventually(format!("{:?} is ready", self.process), || {
            (Curl::get(self.admin, "/ready").run().status == 200).then_some(())
        });
    }

    /// The configuration dump.
    ///
    /// # Panics
    /// If the agent returns no dump.
    #[must_use]
    pub fn dump(&self) -> Value {
        serde_json::from_slice(&Curl::get(self.admin, "/config_dump").run().body)
            .expect("the dump is JSON")
    }

    /// The services of the configuration dump, with the data path that each uses.
    ///
    /// # Panics
    /// If the dump lists no services.
    #[must_use]
    pub fn services(&self) -> Vec<Value> {
        let dump = self.dump();
        let services = dump.get("services").and_then(Value::as_array);
        services.expect("the dump lists services").clone()
    }

    /// The value of a metric, given by its name with its labels.
    ///
    /// # Panics
    /// If the metric does not exist.
    #[must_use]
    pub fn metric(&self, name: &str) -> u64 {
        metric(&Curl::get(self.admin, "/metrics").run().text(), name)
    }
}
