//! One sidecar before a service, for where the way between two does not matter.

use std::net::TcpStream;
use std::process::Command;

use serde_json::{Value, json};

use crate::bootstrap::{bootstrap, cluster, http, listener, route_to, with};
use crate::curl::Curl;
use crate::mesh_pki::MeshPki;
use crate::origin_server::OriginServer;
use crate::port;
use crate::process::Process;
use crate::sidecar_pair::{SidecarLaunch, TestSidecar};
use crate::wait::eventually;

pub use crate::bootstrap::UpstreamHttp;

/// What it is asked to do.
#[derive(Debug, Clone)]
pub struct SingleSidecarConfig {
    /// Its clusters; the first is the service.
    pub clusters: Vec<Value>,
    /// How it serves HTTP.
    pub http: Value,
    /// What is said of that in the metadata, for which Envoy has no field.
    pub ours: Value,
    /// How its clients reach it by TLS, if so.
    pub tls: Option<Value>,
    /// How it is started.
    pub launch: SidecarLaunch,
}

impl SingleSidecarConfig {
    /// A sidecar before a port.
    #[must_use]
    pub fn for_upstream(port: u16, speaks: UpstreamHttp) -> Self {
        let clusters = vec![cluster("service", &[port], speaks, None)];
        let http = http(&route_to("service", 15), &[]);
        Self { clusters, http, ours: json!({}), tls: None, launch: SidecarLaunch::default() }
    }

    /// The same with another field of `HttpConnectionManager`.
    #[must_use]
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.http = with(self.http, field, value);
        self
    }

    /// The same with a field of ours.
    #[must_use]
    pub fn with_weft_metadata(mut self, field: &str, value: Value) -> Self {
        self.ours = with(self.ours, field, value);
        self
    }

    /// The same with another field of the service's cluster.
    #[must_use]
    pub fn with_cluster(mut self, field: &str, value: &Value) -> Self {
        self.clusters = self.clusters.into_iter().map(|c| with(c, field, value.clone())).collect();
        self
    }

    /// The same with one worker, to which alone a limit of each worker then applies, and with more words
    /// on its command line.
    #[must_use]
    pub fn with_one_worker(mut self, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        self.launch = SidecarLaunch { workers: 1, arguments, ..self.launch };
        self
    }

    /// Starts it with an authority of its own.
    #[must_use]
    pub fn start(self) -> SingleSidecar {
        self.start_with_pki(MeshPki::create())
    }

    /// Starts it.
    ///
    /// # Panics
    /// When it does not become ready.
    #[must_use]
    pub fn start_with_pki(self, pki: MeshPki) -> SingleSidecar {
        self.start_all(pki, None)
    }

    /// Starts it with another listener of the same chain, of which `other` says the rest.
    ///
    /// # Panics
    /// When it does not become ready.
    #[must_use]
    pub fn start_with_second_listener(self, other: &Value) -> SingleSidecar {
        self.start_all(MeshPki::create(), Some(other))
    }

    /// Starts it and waits until it listens and is not ready for this reason.
    ///
    /// # Panics
    /// When it does not come to that.
    #[must_use]
    pub fn start_unready(self, reason: &str) -> SingleSidecar {
        let (pki, port, admin) = (MeshPki::create(), port::free(), port::free());
        let config = self.config(port, admin, None);
        let sidecar = TestSidecar::start_without_waiting("sidecar", &pki, port, admin, &config);
        eventually(format!("the sidecar listens and waits: {reason}"), || {
            let ready = Curl::get(admin, "/ready").run();
            let waits = ready.status == 503 && ready.text().contains(reason);
            TcpStream::connect(("127.0.0.1", port)).ok().filter(|_| waits)
        });
        SingleSidecar { sidecar, port, pki }
    }

    /// Starts it by a command other than the usual one, to which its file is added.
    ///
    /// # Panics
    /// When it does not become ready.
    #[must_use]
    pub fn start_with_command(self, pki: MeshPki, mut command: Command) -> SingleSidecar {
        let (port, admin) = (port::free(), port::free());
        let file = pki.path("sidecar.json");
        let config = self.config(port, admin, None);
        std::fs::write(&file, format!("{config:#}")).expect("the folder takes files");
        let process = Process::start("sidecar", command.arg("--config").arg(file));
        // Until it listens, a look costs it nothing: asking its admin port would be counted as well.
        eventually("the sidecar listens", || TcpStream::connect(("127.0.0.1", port)).ok());
        let sidecar = TestSidecar { process, port, admin };
        SingleSidecar { sidecar, port, pki }
    }

    fn start_all(self, pki: MeshPki, other: Option<&Value>) -> SingleSidecar {
        let (port, admin) = (port::free(), port::free());
        let launch = self.launch.clone();
        let config = self.config(port, admin, other);
        let sidecar = TestSidecar::launch(&launch, &pki, [port, admin], &config);
        SingleSidecar { sidecar, port, pki }
    }

    fn config(self, port: u16, admin: u16, other: Option<&Value>) -> Value {
        let mut inbound = listener("inbound", port, self.http, self.tls);
        let chain = inbound.pointer_mut("/filter_chains/0").expect("it has one chain");
        *chain = with(chain.take(), "metadata", json!({"filter_metadata": {"weft": self.ours}}));
        let chains = json!([chain.clone()]);
        let other = other.map(|other| with(other.clone(), "filter_chains", chains));
        let listeners: Vec<Value> = [inbound].into_iter().chain(other).collect();
        bootstrap(admin, &listeners, &self.clusters)
    }
}

/// The sidecar, ready.
#[derive(Debug)]
pub struct SingleSidecar {
    /// Its process and ports.
    pub sidecar: TestSidecar,
    /// Where it listens.
    pub port: u16,
    /// Who made its certificates.
    pub pki: MeshPki,
}

impl SingleSidecar {
    /// One of its metrics, by its name with its labels.
    ///
    /// # Panics
    /// When there is none of that name.
    #[must_use]
    pub fn metric(&self, name: &str) -> u64 {
        let page = Curl::get(self.sidecar.admin, "/metrics").run().text();
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.expect(name).parse().expect("a number")
    }

    /// The next access line that holds `text`.
    ///
    /// # Panics
    /// When none comes.
    #[must_use]
    pub fn access_line(&self, text: &str) -> Value {
        serde_json::from_str(&self.sidecar.process.line_with(text)).expect("a line is JSON")
    }

    /// Holds that it runs, and that no worker of its has panicked.
    ///
    /// # Panics
    /// When it does not.
    pub fn assert_healthy(&mut self) {
        let process = &mut self.sidecar.process;
        assert!(process.is_running(), "{process:?} has ended");
        assert!(!process.errors().contains("panicked"), "{process:?} panicked");
    }
}

/// A sidecar before a service of each version, with what is asked of it.
#[derive(Debug)]
pub struct SidecarPerHttpVersion {
    /// Before one of HTTP/1.1.
    pub http1: (OriginServer, SingleSidecar),
    /// Before one of HTTP/2.
    pub http2: (Process, SingleSidecar),
}

impl SidecarPerHttpVersion {
    /// Starts both, each with a change.
    ///
    /// # Panics
    /// When one does not become ready.
    #[must_use]
    pub fn start(change: impl Fn(SingleSidecarConfig) -> SingleSidecarConfig) -> Self {
        let origin = OriginServer::start();
        let alone =
            change(SingleSidecarConfig::for_upstream(origin.port, UpstreamHttp::Http1)).start();
        let (process, port) = OriginServer::start_http2();
        let http2 =
            (process, change(SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http2)).start());
        Self { http1: (origin, alone), http2 }
    }

    /// Starts both as they are.
    ///
    /// # Panics
    /// When one does not become ready.
    #[must_use]
    pub fn plain() -> Self {
        Self::start(|wanted| wanted)
    }

    /// Where to reach each.
    #[must_use]
    pub fn ports(&self) -> [(&'static str, u16); 2] {
        [("to HTTP/1.1", self.http1.1.port), ("to HTTP/2", self.http2.1.port)]
    }
}

/// The same with a route for requests that have no path as well.
///
/// # Panics
/// When it has no route.
#[must_use]
pub fn matching_empty_path(mut wanted: SingleSidecarConfig) -> SingleSidecarConfig {
    let route = wanted.http.pointer_mut("/route_config/virtual_hosts/0/routes/0/match");
    *route.expect("it has a route") = json!({"prefix": ""});
    wanted
}
