//! A sidecar with a service that records the requests it receives.

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

/// A sidecar and its recording service.
#[derive(Debug)]
pub(crate) struct Front {
    pub(crate) sidecar: TestSidecar,
    pub(crate) recorder: Recorder,
    _pki: MeshPki,
}

impl Front {
    /// Starts both. `settings` are more fields of the HTTP connection manager, `weft_metadata` holds weft's own fields in
    /// the metadata of the filter chain.
    pub(crate) fn start(filters: &[Value], settings: &Value, weft_metadata: &Value) -> Self {
        let pki = MeshPki::create();
        let recorder = Recorder::start();
        let port = port::free();
        let admin = port::free();
        // An empty prefix also matches requests without a path: tunnels, and `OPTIONS *`.
        let route = with(route_to("next", 15), "match", json!({"prefix": ""}));
        let mut served = http(&route, filters);
        for (field, value) in settings.as_object().expect("settings are a JSON object") {
            served = with(served, field, value.clone());
        }
        let mut weft_metadata = weft_metadata.clone();
        for limit in ["target_limit_bytes", "field_limit_bytes"] {
            weft_metadata = with(weft_metadata, limit, json!(16 * 1024));
        }
        let mut inbound = listener("inbound", port, served, None);
        inbound["filter_chains"][0]["metadata"] =
            json!({"filter_metadata": {"weft": weft_metadata}});
        let next = cluster("next", &[recorder.port], UpstreamHttp::Http1, None);
        let config = bootstrap(admin, &[inbound], &[next]);
        let file = pki.path("front.json");
        std::fs::write(&file, format!("{config:#}")).expect("the folder is writable");
        let mut command = weft();
        // One worker, so that each request goes over the connection of the one before it.
        command.args(["sidecar", "--workers", "1", "--config"]).arg(file);
        let sidecar = TestSidecar { process: Process::start("front", &mut command), port, admin };
        sidecar.wait_until_ready();
        // Discard what the readiness wait recorded.
        drop(recorder.take());
        Self { sidecar, recorder, _pki: pki }
    }

    /// The number of noncompliant requests by reason.
    pub(crate) fn noncompliant_requests(&self) -> BTreeMap<String, u64> {
        const NAME: &str = "weft_sidecar_requests_noncompliant_total{reason=\"";
        let mut client = Client::connect(self.sidecar.admin);
        client.send(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let page = client.rest().expect("the connection closes");
        let page = String::from_utf8_lossy(&page).into_owned();
        let counts: BTreeMap<String, u64> = page
            .lines()
            .filter_map(|line| line.strip_prefix(NAME)?.split_once("\"} "))
            .map(|(reason, count)| {
                (reason.to_owned(), count.parse().expect("the count is a number"))
            })
            .collect();
        assert!(!counts.is_empty(), "no reasons are reported: {page}");
        counts
    }

    /// A new client.
    pub(crate) fn client(&self) -> Client {
        Client::connect(self.sidecar.port)
    }

    /// Asserts that the sidecar runs, has not panicked, and serves a client.
    pub(crate) fn assert_healthy(&mut self) {
        let process = &mut self.sidecar.process;
        assert!(process.is_running(), "{process:?} has ended");
        assert!(!process.errors().contains("panicked"), "{process:?} panicked");
        probe(&mut self.client(), "unharmed").expect("a client is served");
    }
}

/// Sends a request with a unique path. Returns an error with the response if the response is not to that request.
pub(crate) fn probe(client: &mut Client, name: &str) -> Result<(), String> {
    client.send(format!("GET /probe/{name} HTTP/1.1\r\nHost: p\r\n\r\n").as_bytes());
    let answer = client.answer(false);
    let own = answer.as_ref().is_some_and(|a| a.status == 200 && a.body == recorded_probe(name));
    if own { Ok(()) } else { Err(format!("a probe got {answer:?}")) }
}

/// The record of such a request by the service.
pub(crate) fn recorded_probe(name: &str) -> String {
    format!("GET /probe/{name} p")
}
