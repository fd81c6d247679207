//! Two sidecars: the caller's takes plain HTTP and sends mutual TLS, the service's verifies it.

use std::process::Command;

use serde_json::{Value, json};

use crate::bootstrap::{
    UpstreamHttp, bootstrap, cluster, http, listener, mutual_tls, route_to, verify_mode, with,
};
use crate::curl::Curl;
use crate::mesh_pki::MeshPki;
use crate::port;
use crate::process::{Process, tool, weft};
use crate::wait::eventually;

/// A sidecar that runs.
#[derive(Debug)]
pub struct TestSidecar {
    /// Its process.
    pub process: Process,
    /// Where it listens.
    pub port: u16,
    /// Its admin port.
    pub admin: u16,
}

impl TestSidecar {
    /// Starts a sidecar and waits until it is ready. `config` becomes its file.
    ///
    /// # Panics
    /// When it does not become ready.
    #[must_use]
    pub fn start(name: &str, pki: &MeshPki, port: u16, admin: u16, config: &Value) -> Self {
        let sidecar = Self::start_without_waiting(name, pki, port, admin, config);
        sidecar.wait_until_ready();
        sidecar
    }

    /// Starts a sidecar.
    ///
    /// # Panics
    /// When its file cannot be written.
    #[must_use]
    pub fn start_without_waiting(
        name: &str,
        pki: &MeshPki,
        port: u16,
        admin: u16,
        config: &Value,
    ) -> Self {
        let file = pki.path(&format!("{name}.json"));
        std::fs::write(&file, format!("{config:#}")).expect("the folder takes files");
        let process = Process::start(name, SidecarLaunch::default().command().arg(file));
        Self { process, port, admin }
    }

    /// Starts a sidecar in another way, and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready.
    #[must_use]
    pub fn launch(launch: &SidecarLaunch, pki: &MeshPki, ports: [u16; 2], config: &Value) -> Self {
        let file = pki.path("sidecar.json");
        std::fs::write(&file, format!("{config:#}")).expect("the folder takes files");
        let process = Process::start("sidecar", launch.command().arg(file));
        let [port, admin] = ports;
        let sidecar = Self { process, port, admin };
        sidecar.wait_until_ready();
        sidecar
    }

    /// Starts a sidecar of whose listeners some serve no client, and waits until the others do.
    ///
    /// # Panics
    /// When it does not come to that.
    #[must_use]
    pub fn launch_unready(
        launch: &SidecarLaunch,
        pki: &MeshPki,
        ports: [u16; 2],
        config: &Value,
    ) -> Self {
        let file = pki.path("sidecar.json");
        std::fs::write(&file, format!("{config:#}")).expect("the folder takes files");
        let process = Process::start("sidecar", launch.command().arg(file));
        let [port, admin] = ports;
        let sidecar = Self { process, port, admin };
        eventually(format!("{:?} answers and is not ready", sidecar.process), || {
            let is_bound = std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
            (Curl::get(admin, "/ready").run().status == 503 && is_bound).then_some(())
        });
        sidecar
    }

    /// Waits until it says that it is ready and its port is bound.
    ///
    /// # Panics
    /// When it does not before the deadline.
    pub fn wait_until_ready(&self) {
        eventually(format!("{:?} is ready", self.process), || {
            let ready = Curl::get(self.admin, "/ready").run();
            let bound = std::net::TcpStream::connect(("127.0.0.1", self.port));
            (ready.status == 200 && bound.is_ok()).then_some(())
        });
    }

    /// The page of its metrics.
    #[must_use]
    pub fn metrics(&self) -> String {
        Curl::get(self.admin, "/metrics").run().text()
    }

    /// One of its metrics, by its name with its labels.
    ///
    /// # Panics
    /// When there is none of that name.
    #[must_use]
    pub fn metric(&self, name: &str) -> u64 {
        let page = self.metrics();
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.expect(name).parse().expect("a number")
    }

    /// How many bytes of memory it has had at most, by the kernel's account.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()));
        let status = status.expect("it runs");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix(" kB"));
        let kibibytes: u64 = peak.expect("every process has one").trim().parse().expect("a number");
        kibibytes * 1024
    }

    /// How many bytes of memory it has.
    ///
    /// # Panics
    /// When it does not say.
    #[must_use]
    pub fn resident_memory(&self) -> u64 {
        self.metric("process_resident_memory_bytes")
    }
}

/// How a sidecar is started.
#[derive(Debug, Clone)]
pub struct SidecarLaunch {
    /// How many workers it has.
    pub workers: u32,
    /// What else its command line says.
    pub arguments: Vec<String>,
    /// How many files it may have open, if that is less than the host allows.
    pub open_files: Option<u32>,
}

impl Default for SidecarLaunch {
    fn default() -> Self {
        Self { workers: 2, arguments: Vec::new(), open_files: None }
    }
}

impl SidecarLaunch {
    /// The command, of which only its file is missing.
    fn command(&self) -> Command {
        let weft = weft();
        let mut command = match self.open_files {
            Some(limit) => {
                // It becomes what it starts, so the process is the sidecar's.
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

/// What a pair of sidecars is asked to do.
#[derive(Debug, Clone)]
pub struct PairConfig {
    /// Where the service listens.
    pub service: Vec<u16>,
    /// What it speaks.
    pub speaks: UpstreamHttp,
    /// What stands before the service.
    pub filters: Vec<Value>,
    /// How long an answer may take; 0 is without end.
    pub timeout_seconds: u64,
    /// How many requests a connection may bring to either; any number when not given.
    pub request_limit: Option<u32>,
}

impl PairConfig {
    /// A pair before a service that speaks HTTP/1.1.
    #[must_use]
    pub fn http1(service: u16) -> Self {
        let speaks = UpstreamHttp::Http1;
        let (filters, timeout_seconds, request_limit) = (Vec::new(), 15, None);
        Self { service: vec![service], speaks, filters, timeout_seconds, request_limit }
    }

    fn http(&self, route: &Value, filters: &[Value]) -> Value {
        let options = json!({"max_requests_per_connection": self.request_limit});
        with(http(route, filters), "common_http_protocol_options", options)
    }

    /// A pair before a service that speaks HTTP/2.
    #[must_use]
    pub fn http2(service: u16) -> Self {
        Self { speaks: UpstreamHttp::Http2, ..Self::http1(service) }
    }
}

/// Two sidecars, ready. The caller is `client`, the service `server`.
#[derive(Debug)]
pub struct SidecarPair {
    /// The caller's.
    pub caller: TestSidecar,
    /// The service's.
    pub callee: TestSidecar,
    /// What both trust.
    pub pki: MeshPki,
    callee_config: Value,
}

impl SidecarPair {
    /// Starts both.
    ///
    /// # Panics
    /// When one does not become ready.
    #[must_use]
    pub fn start(wanted: &PairConfig) -> Self {
        let pki = MeshPki::create();
        let (client, server) = (pki.issue("client"), pki.issue("server"));
        let route = route_to("next", wanted.timeout_seconds);

        let (port, admin) = (port::free(), port::free());
        let verify = verify_mode(&server, &pki.root(), &pki.crl_file());
        let inbound = listener("inbound", port, wanted.http(&route, &wanted.filters), Some(verify));
        let service = cluster("next", &wanted.service, wanted.speaks, None);
        let callee_config = bootstrap(admin, &[inbound], &[service]);
        let callee = TestSidecar::start("callee", &pki, port, admin, &callee_config);

        let (port, admin) = (port::free(), port::free());
        let outbound = listener("outbound", port, wanted.http(&route, &[]), None);
        let tls = mutual_tls(&client, &pki.root(), "server");
        let next = cluster("next", &[callee.port], UpstreamHttp::AsClient, Some(tls));
        let config = bootstrap(admin, &[outbound], &[next]);
        let caller = TestSidecar::start("caller", &pki, port, admin, &config);
        Self { caller, callee, pki, callee_config }
    }

    /// The address that a client dials.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.caller.port)
    }

    /// Starts the service's sidecar again on its old ports.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn restart_callee(&mut self) {
        self.callee.process.kill();
        let TestSidecar { port, admin, .. } = self.callee;
        self.callee = TestSidecar::start("callee", &self.pki, port, admin, &self.callee_config);
    }

    /// Holds that both run, and that no worker of theirs has panicked.
    ///
    /// # Panics
    /// When one does not.
    pub fn assert_healthy(&mut self) {
        for sidecar in [&mut self.caller, &mut self.callee] {
            let process = &mut sidecar.process;
            assert!(process.is_running(), "{process:?} has ended");
            assert!(!process.errors().contains("panicked"), "{process:?} panicked");
        }
    }
}
