//! Starts one sidecar in front of a service, for tests that do not need a pair of sidecars.

use std::net::TcpStream;
use std::process::Command;

use serde_json::{Value, json};

use crate::bootstrap::{
    bootstrap, cluster, filter_chain, http_with_routes, loopback, route_to, with,
};
use crate::curl::Curl;
use crate::mesh_pki::MeshPki;
use crate::origin_server::OriginServer;
use crate::port;
use crate::process::Process;
use crate::sidecar_pair::{SidecarLaunch, TestSidecar};
use crate::wait::eventually;

pub use crate::bootstrap::UpstreamHttp;

/// The configuration of a single sidecar.
#[derive(Debug, Clone)]
pub struct SingleSidecarConfig {
    /// The clusters; the first is the service.
    pub clusters: Vec<Value>,
    /// The routes, in order. By default one route of all paths to the service.
    pub routes: Vec<Value>,
    /// The HTTP filters before the router.
    pub filters: Vec<Value>,
    /// Further fields of the `HttpConnectionManager`.
    pub http: Value,
    /// HTTP settings of the filter chain's metadata, for which Envoy has no field.
    pub weft_metadata: Value,
    /// The transport socket of the listener, if clients use TLS.
    pub tls: Option<Value>,
    /// The command line.
    pub launch: SidecarLaunch,
}

impl SingleSidecarConfig {
    /// A sidecar in front of a port.
    #[must_use]
    pub fn for_upstream(port: u16, upstream_http: UpstreamHttp) -> Self {
        let clusters = vec![cluster("service", &[port], upstream_http, None)];
        Self {
            clusters,
            routes: vec![route_to("service", 15)],
            filters: Vec::new(),
            http: json!({}),
            weft_metadata: json!({}),
            tls: None,
            launch: SidecarLaunch::default(),
        }
    }

    /// Sets another field of `HttpConnectionManager`.
    #[must_use]
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.http = with(self.http, field, value);
        self
    }

    /// Replaces the routes by this one.
    #[must_use]
    pub fn with_route(mut self, route: Value) -> Self {
        self.routes = vec![route];
        self
    }

    /// Sets a field of the `RouteAction` of every route.
    #[must_use]
    pub fn with_route_action(mut self, field: &str, value: &Value) -> Self {
        for route in &mut self.routes {
            let action = with(route["route"].take(), field, value.clone());
            *route = with(route.take(), "route", action);
        }
        self
    }

    /// Makes every route also match requests without a path.
    #[must_use]
    pub fn matching_empty_path(mut self) -> Self {
        let change = |route| with(route, "match", json!({"prefix": ""}));
        self.routes = self.routes.into_iter().map(change).collect();
        self
    }

    /// Adds an HTTP filter, after those added before.
    #[must_use]
    pub fn with_filter(mut self, filter: Value) -> Self {
        self.filters.push(filter);
        self
    }

    /// Sets another field of weft's metadata.
    #[must_use]
    pub fn with_weft_metadata(mut self, field: &str, value: Value) -> Self {
        self.weft_metadata = with(self.weft_metadata, field, value);
        self
    }

    /// Sets another field of every cluster.
    #[must_use]
    pub fn with_cluster(mut self, field: &str, value: &Value) -> Self {
        self.clusters = self.clusters.into_iter().map(|c| with(c, field, value.clone())).collect();
        self
    }

    /// Starts the sidecar with one worker, so that a limit per worker is the limit of the process,
    /// and with more command-line arguments.
    #[must_use]
    pub fn with_one_worker(mut self, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        self.launch = SidecarLaunch { workers: 1, arguments, ..self.launch };
        self
    }

    /// Starts the sidecar with a new certificate authority.
    #[must_use]
    pub fn start(self) -> SingleSidecar {
        self.start_with_pki(MeshPki::create())
    }

    /// Starts the sidecar with this certificate authority.
    ///
    /// # Panics
    /// If the sidecar does not become ready.
    #[must_use]
    pub fn start_with_pki(self, pki: MeshPki) -> SingleSidecar {
        self.start_all(pki, None)
    }

    /// Starts the sidecar with a second listener that has the same filter chain; `other` is the
    /// rest of that listener.
    ///
    /// # Panics
    /// If the sidecar does not become ready.
    #[must_use]
    pub fn start_with_second_listener(self, other: &Value) -> SingleSidecar {
        self.start_all(MeshPki::create(), Some(other))
    }

    /// Starts the sidecar and waits until it listens and its admin port reports that it is not
    /// ready for this reason.
    ///
    /// # Panics
    /// If the sidecar does not reach that state.
    #[must_use]
    pub fn start_unready(self, reason: &str) -> SingleSidecar {
        let pki = MeshPki::create();
        let port = port::free();
        let admin = port::free();
        let config = self.config(port, admin, None);
        let sidecar = TestSidecar::start_without_waiting("sidecar", &pki, port, admin, &config);
        eventually(format!("the sidecar listens and is not ready: {reason}"), || {
            let ready = Curl::get(admin, "/ready").run();
            let waits = ready.status == 503 && ready.text().contains(reason);
            TcpStream::connect(("127.0.0.1", port)).ok().filter(|_| waits)
        });
        SingleSidecar { sidecar, port, pki }
    }

    /// Starts the sidecar by another command, to which `--config FILE` is added.
    ///
    /// # Panics
    /// If the sidecar does not listen.
    #[must_use]
    pub fn start_with_command(self, pki: MeshPki, mut command: Command) -> SingleSidecar {
        let port = port::free();
        let admin = port::free();
        let file = pki.path("sidecar.json");
        let config = self.config(port, admin, None);
        std::fs::write(&file, format!("{config:#}")).expect("the folder is writable");
        let process = Process::start("sidecar", command.arg("--config").arg(file));
        // Connecting costs the sidecar nothing before it listens; a request to its admin port would
        // change what the test counts.
        eventually("the sidecar listens", || TcpStream::connect(("127.0.0.1", port)).ok());
        let sidecar = TestSidecar { process, port, admin };
        SingleSidecar { sidecar, port, pki }
    }

    fn start_all(self, pki: MeshPki, other: Option<&Value>) -> SingleSidecar {
        let port = port::free();
        let admin = port::free();
        let launch = self.launch.clone();
        let config = self.config(port, admin, other);
        let sidecar = TestSidecar::launch(&launch, &pki, [port, admin], &config);
        SingleSidecar { sidecar, port, pki }
    }

    fn config(self, port: u16, admin: u16, other: Option<&Value>) -> Value {
        let mut manager = http_with_routes(&self.routes, &self.filters);
        if let Value::Object(fields) = self.http {
            for (field, value) in fields {
                manager = with(manager, &field, value);
            }
        }
        let metadata = json!({"filter_metadata": {"weft": self.weft_metadata}});
        let chain = with(filter_chain(manager, self.tls), "metadata", metadata);
        let chains = json!([chain]);
        let other = other.map(|other| with(other.clone(), "filter_chains", chains.clone()));
        let inbound =
            json!({"name": "inbound", "address": loopback(port), "filter_chains": chains});
        let listeners: Vec<Value> = [inbound].into_iter().chain(other).collect();
        bootstrap(admin, &listeners, &self.clusters)
    }
}

/// A running sidecar.
#[derive(Debug)]
pub struct SingleSidecar {
    /// The process and its ports.
    pub sidecar: TestSidecar,
    /// The port of its listener.
    pub port: u16,
    /// The authority that issued its certificates.
    pub pki: MeshPki,
}

impl SingleSidecar {
    /// The value of a metric, given by its name with its labels.
    ///
    /// # Panics
    /// If the metric does not exist.
    #[must_use]
    pub fn metric(&self, name: &str) -> u64 {
        self.sidecar.metric(name)
    }

    /// The next access-log line that contains `text`.
    ///
    /// # Panics
    /// If no such line is written before the deadline.
    #[must_use]
    pub fn access_line(&self, text: &str) -> Value {
        serde_json::from_str(&self.sidecar.process.line_with(text))
            .expect("an access-log line is JSON")
    }

    /// Checks that the sidecar runs and that no worker has panicked.
    ///
    /// # Panics
    /// If it does not run, or a worker panicked.
    pub fn assert_healthy(&mut self) {
        let process = &mut self.sidecar.process;
        assert!(process.is_running(), "{process:?} has ended");
        assert!(!process.errors().contains("panicked"), "{process:?} panicked");
    }
}

/// Two sidecars with the same settings: one in front of an HTTP/1.1 service, one in front of an
/// HTTP/2 service.
#[derive(Debug)]
pub struct SidecarPerHttpVersion {
    /// The HTTP/1.1 service and its sidecar.
    pub http1: (OriginServer, SingleSidecar),
    /// The HTTP/2 service and its sidecar.
    pub http2: (Process, SingleSidecar),
}

impl SidecarPerHttpVersion {
    /// Starts both sidecars; `change` adjusts the configuration of each.
    ///
    /// # Panics
    /// If one does not become ready.
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

    /// Starts both sidecars with the default configuration.
    ///
    /// # Panics
    /// If one does not become ready.
    #[must_use]
    pub fn plain() -> Self {
        Self::start(|config| config)
    }

    /// The ports of both, with a name for messages.
    #[must_use]
    pub fn ports(&self) -> [(&'static str, u16); 2] {
        [("to HTTP/1.1", self.http1.1.port), ("to HTTP/2", self.http2.1.port)]
    }
}
