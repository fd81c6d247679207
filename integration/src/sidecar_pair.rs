//! Starts two sidecars: the client's sidecar sends mutual TLS, the service's sidecar verifies it.

use std::process::Command;

use serde_json::{Value, json};

use crate::bootstrap::{UpstreamHttp, bootstrap, cluster, http, listener, route_to, with};
use crate::curl::Curl;
use crate::mesh_pki::MeshPki;
use crate::metrics::metric;
use crate::port;
use crate::process::{Process, tool, weft};
use crate::tls_contexts::{mutual_tls, verify_mode};
use crate::wait::eventually;

/// A running sidecar.
#[derive(Debug)]
pub struct TestSidecar {
    /// Its process.
    pub process: Process,
    /// The port of its listener.
    pub port: u16,
    /// Its admin port.
    pub admin: u16,
}

impl TestSidecar {
    /// Starts a sidecar with this configuration, and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    #[must_use]
    pub fn start(name: &str, pki: &MeshPki, port: u16, admin: u16, config: &Value) -> Self {
        let sidecar = Self::start_without_waiting(name, pki, port, admin, config);
        sidecar.wait_until_ready();
        sidecar
    }

    /// Starts a sidecar with this configuration.
    ///
    /// # Panics
    /// If its configuration file cannot be written.
    #[must_use]
    pub fn start_without_waiting(
        name: &str,
        pki: &MeshPki,
        port: u16,
        admin: u16,
        config: &Value,
    ) -> Self {
        let file = pki.path(&format!("{name}.json"));
        std::fs::write(&file, format!("{config:#}")).expect("the folder is writable");
        let process = Process::start(name, SidecarLaunch::default().command().arg(file));
        Self { process, port, admin }
    }

    /// Starts a sidecar with other command-line options, and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    #[must_use]
    pub fn launch(launch: &SidecarLaunch, pki: &MeshPki, ports: [u16; 2], config: &Value) -> Self {
        let file = pki.path("sidecar.json");
        std::fs::write(&file, format!("{config:#}")).expect("the folder is writable");
        let process = Process::start("sidecar", launch.command().arg(file));
        let [port, admin] = ports;
        let sidecar = Self { process, port, admin };
        sidecar.wait_until_ready();
        sidecar
    }

    /// Starts a sidecar of which some listeners cannot serve, and waits until the others do.
    ///
    /// # Panics
    /// If the sidecar does not reach that state.
    #[must_use]
    pub fn launch_unready(
        launch: &SidecarLaunch,
        pki: &MeshPki,
        ports: [u16; 2],
        config: &Value,
    ) -> Self {
        let file = pki.path("sidecar.json");
        std::fs::write(&file, format!("{config:#}")).expect("the folder is writable");
        let process = Process::start("sidecar", launch.command().arg(file));
        let [port, admin] = ports;
        let sidecar = Self { process, port, admin };
        eventually(format!("{:?} listens and is not ready", sidecar.process), || {
            let is_bound = std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
            (Curl::get(admin, "/ready").run().status == 503 && is_bound).then_some(())
        });
        sidecar
    }

    /// Waits until the sidecar reports that it is ready and its port accepts connections.
    ///
    /// # Panics
    /// If that does not happen before the deadline.
    pub fn wait_until_ready(&self) {
        eventually(format!("{:?} is ready", self.process), || {
            let ready = Curl::get(self.admin, "/ready").run();
            let bound = std::net::TcpStream::connect(("127.0.0.1", self.port));
            (ready.status == 200 && bound.is_ok()).then_some(())
        });
    }

    /// The metrics page.
    #[must_use]
    pub fn metrics(&self) -> String {
        Curl::get(self.admin, "/metrics").run().text()
    }

    /// The value of a metric, given by its name with its labels.
    ///
    /// # Panics
    /// If the metric does not exist.
    #[must_use]
    pub fn metric(&self, name: &str) -> u64 {
        metric(&self.metrics(), name)
    }

    /// The peak resident memory in bytes, from `/proc`.
    ///
    /// # Panics
    /// If the process has ended.
    #[must_use]
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()));
        let status = status.expect("the sidecar runs");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix(" kB"));
        let kibibytes: u64 =
            peak.expect("the kernel reports VmHWM").trim().parse().expect("a number");
        kibibytes * 1024
    }

    /// The resident memory in bytes, from the sidecar's metrics.
    ///
    /// # Panics
    /// If the metric is missing.
    #[must_use]
    pub fn resident_memory(&self) -> u64 {
        self.metric("process_resident_memory_bytes")
    }
}

/// The command line and limits of a sidecar.
#[derive(Debug, Clone)]
pub struct SidecarLaunch {
    /// The number of workers.
    pub workers: u32,
    /// Further command-line arguments.
    pub arguments: Vec<String>,
    /// The limit of open files; `None` keeps the limit of the host.
    pub open_files: Option<u32>,
}

impl Default for SidecarLaunch {
    fn default() -> Self {
        Self { workers: 2, arguments: Vec::new(), open_files: None }
    }
}

impl SidecarLaunch {
    /// The command without the path of its configuration file.
    fn command(&self) -> Command {
        let weft = weft();
        let mut command = match self.open_files {
            Some(limit) => {
                // `prlimit` replaces itself with the sidecar, so the process ID is the sidecar's.
                let mut command = tool("prlimit");
                command.arg(format!("--nofile={limit}:{limit}")).arg("--").arg(weft.get_program());
                command
            }
            None => weft,
        };
        command.args(["sidecar", "--drain-timeout", "10", "--workers", &self.workers.to_string()]);
        command.args(&self.arguments).arg("--config");
        command
    }
}

/// The configuration of a pair of sidecars.
#[derive(Debug, Clone)]
pub struct PairConfig {
    /// The ports of the service's endpoints.
    pub service: Vec<u16>,
    /// The HTTP version of the service.
    pub speaks: UpstreamHttp,
    /// HTTP filters of the service's sidecar.
    pub filters: Vec<Value>,
    /// The route timeout in seconds; 0 disables it.
    pub timeout_seconds: u64,
    /// The limit of requests per connection, for both sidecars; `None` disables it.
    pub request_limit: Option<u32>,
}

impl PairConfig {
    /// A pair in front of an HTTP/1.1 service.
    #[must_use]
    pub fn http1(service: u16) -> Self {
        let speaks = UpstreamHttp::Http1;
        let filters = Vec::new();
        let timeout_seconds = 15;
        let request_limit = None;
        Self { service: vec![service], speaks, filters, timeout_seconds, request_limit }
    }

    fn http(&self, route: &Value, filters: &[Value]) -> Value {
        let options = json!({"max_requests_per_connection": self.request_limit});
        with(http(route, filters), "common_http_protocol_options", options)
    }

    /// A pair in front of an HTTP/2 service.
    #[must_use]
    pub fn http2(service: u16) -> Self {
        Self { speaks: UpstreamHttp::Http2, ..Self::http1(service) }
    }
}

/// Two running sidecars. The client's identity is `client`, the service's is `server`.
#[derive(Debug)]
pub struct SidecarPair {
    /// The client's sidecar.
    pub caller: TestSidecar,
    /// The service's sidecar.
    pub callee: TestSidecar,
    /// The authority that both trust.
    pub pki: MeshPki,
    callee_config: Value,
}

impl SidecarPair {
    /// Starts both sidecars.
    ///
    /// # Panics
    /// If one does not become ready.
    #[must_use]
    pub fn start(config: &PairConfig) -> Self {
        let pki = MeshPki::create();
        let client = pki.issue("client");
        let server = pki.issue("server");
        let route = route_to("next", config.timeout_seconds);

        let port = port::free();
        let admin = port::free();
        let verify = verify_mode(&server, &pki.root(), &pki.crl_file());
        let inbound = listener("inbound", port, config.http(&route, &config.filters), Some(verify));
        let service = cluster("next", &config.service, config.speaks, None);
        let callee_config = bootstrap(admin, &[inbound], &[service]);
        let callee = TestSidecar::start("callee", &pki, port, admin, &callee_config);

        let port = port::free();
        let admin = port::free();
        let outbound = listener("outbound", port, config.http(&route, &[]), None);
        let tls = mutual_tls(&client, &pki.root(), "server");
        let next = cluster("next", &[callee.port], UpstreamHttp::AsClient, Some(tls));
        let caller_config = bootstrap(admin, &[outbound], &[next]);
        let caller = TestSidecar::start("caller", &pki, port, admin, &caller_config);
        Self { caller, callee, pki, callee_config }
    }

    /// The address of the client's sidecar.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.caller.port)
    }

    /// Restarts the service's sidecar on the same ports.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn restart_callee(&mut self) {
        self.callee.process.kill();
        let TestSidecar { port, admin, .. } = self.callee;
        self.callee = TestSidecar::start("callee", &self.pki, port, admin, &self.callee_config);
    }

    /// Checks that both sidecars run and that no worker has panicked.
    ///
    /// # Panics
    /// If one does not run, or a worker panicked.
    pub fn assert_healthy(&mut self) {
        for sidecar in [&mut self.caller, &mut self.callee] {
            let process = &mut sidecar.process;
            assert!(process.is_running(), "{process:?} has ended");
            assert!(!process.errors().contains("panicked"), "{process:?} panicked");
        }
    }
}
