//! A sidecar before a service that remembers what it got.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use weft_integration::bootstrap::{
    UpstreamHttp, bootstrap, cluster, http, listener, route_to, with,
};
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::process::{Process, weft};
use weft_integration::sidecar_pair::TestSidecar;

use crate::client::Client;
use crate::recorder::Recorder;

/// A sidecar and the service behind it.
#[derive(Debug)]
pub(crate) struct Front {
    pub(crate) sidecar: TestSidecar,
    pub(crate) recorder: Recorder,
    _pki: MeshPki,
}

impl Front {
    /// Starts both. `settings` are more fields of how HTTP is served, `ours` is what stands in the
    /// chain's metadata.
    pub(crate) fn start(filters: &[Value], settings: &Value, ours: &Value) -> Self {
        let pki = MeshPki::create();
        let recorder = Recorder::start();
        let (port, admin) = (port::free(), port::free());
        // An empty prefix covers also what has no path: tunnels, and `OPTIONS *`.
        let route = with(route_to("next", 15), "match", json!({"prefix": ""}));
        let mut served = http(&route, filters);
        for (field, value) in settings.as_object().expect("settings are fields") {
            served = with(served, field, value.clone());
        }
        let mut ours = ours.clone();
        for limit in ["target_limit_bytes", "field_limit_bytes"] {
            ours = with(ours, limit, json!(16 * 1024));
        }
        let mut inbound = listener("inbound", port, served, None);
        inbound["filter_chains"][0]["metadata"] = json!({"filter_metadata": {"weft": ours}});
        let next = cluster("next", &[recorder.port], UpstreamHttp::Http1, None);
        let config = bootstrap(admin, &[inbound], &[next]);
        let file = pki.path("front.json");
        std::fs::write(&file, format!("{config:#}")).expect("the folder takes files");
        let mut command = weft();
        // One worker, so that each request goes over the connection of the one before it.
        command.args(["sidecar", "--workers", "1", "--config"]).arg(file);
        let sidecar = TestSidecar { process: Process::start("front", &mut command), port, admin };
        sidecar.wait_until_ready();
        // What the wait has left behind is not what a test sees.
        drop(recorder.take());
        Self { sidecar, recorder, _pki: pki }
    }

    /// How many requests departed from the standard, for each reason that there was.
    pub(crate) fn departures(&self) -> BTreeMap<String, u64> {
        const NAME: &str = "weft_sidecar_noncompliant_requests_total{reason=\"";
        let mut client = Client::connect(self.sidecar.admin);
        client.send(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let page = client.rest().expect("it ends");
        let page = String::from_utf8_lossy(&page).into_owned();
        let counts: BTreeMap<String, u64> = page
            .lines()
            .filter_map(|line| line.strip_prefix(NAME)?.split_once("\"} "))
            .map(|(reason, count)| (reason.to_owned(), count.parse().expect("a number")))
            .collect();
        assert!(!counts.is_empty(), "no reasons are told: {page}");
        counts
    }

    /// A new client.
    pub(crate) fn client(&self) -> Client {
        Client::connect(self.sidecar.port)
    }

    /// Holds that it runs, that none of its workers has panicked, and that a client is served.
    pub(crate) fn assert_healthy(&mut self) {
        let process = &mut self.sidecar.process;
        assert!(process.is_running(), "{process:?} has ended");
        assert!(!process.errors().contains("panicked"), "{process:?} panicked");
        probe(&mut self.client(), "unharmed").expect("a client is served");
    }
}

/// Asks for something that is the caller's own; what came back if it is not the answer to that.
pub(crate) fn probe(client: &mut Client, name: &str) -> Result<(), String> {
    client.send(format!("GET /probe/{name} HTTP/1.1\r\nHost: p\r\n\r\n").as_bytes());
    let answer = client.answer(false);
    let own = answer.as_ref().is_some_and(|a| a.status == 200 && a.body == told_probe(name));
    if own { Ok(()) } else { Err(format!("to a probe it said {answer:?}")) }
}

/// What the service tells of such a request.
pub(crate) fn told_probe(name: &str) -> String {
    format!("GET /probe/{name} p")
}
