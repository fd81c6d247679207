//! The sidecar as the client of another control plane: a scripted grpcio server, in both protocol
//! variants, with every failure that such a server can have.

use std::io::{BufRead, Read, Write};
use std::net::TcpStream;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use weft_integration::bootstrap::{
    UpstreamHttp, any, bootstrap, cluster, cluster_over_eds, endpoints, http,
    http_with_named_routes, listener, require_token, route_to, with,
};
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::process::{Process, counterpart, run};
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::TestSidecar;
use weft_integration::wait::{DEADLINE, eventually};

const BOTH_VARIANTS: [XdsVariant; 2] = [XdsVariant::Delta, XdsVariant::StateOfTheWorld];

#[derive(Debug, Clone, Copy)]
enum XdsVariant {
    Delta,
    StateOfTheWorld,
}

impl XdsVariant {
    fn api_type(self) -> &'static str {
        match self {
            Self::Delta => "DELTA_GRPC",
            Self::StateOfTheWorld => "GRPC",
        }
    }
}

/// The resources and behaviour of the control plane.
#[derive(Debug, Clone, Default)]
struct ServedResources {
    fault: Option<&'static str>,
    clusters: Vec<Value>,
    endpoints: Vec<Value>,
    listeners: Vec<Value>,
}

impl ServedResources {
    fn json(&self) -> String {
        let Self { fault, clusters, endpoints, listeners } = self;
        json!({"fault": fault, "clusters": clusters, "endpoints": endpoints,
               "listeners": listeners})
        .to_string()
    }
}

/// A sidecar and the control plane that it follows.
struct SidecarWithControl {
    server: Process,
    server_port: u16,
    sidecar: TestSidecar,
    folder: MeshPki,
}

impl SidecarWithControl {
    /// Starts both. `port` is where the sidecar will listen, once it has its configuration.
    fn start(variant: XdsVariant, resources: &ServedResources, port: u16) -> Self {
        Self::start_with_options(
            json!({"id": "web-1", "cluster": "web"}),
            &json!([]),
            variant,
            resources,
            port,
        )
    }

    fn start_with_options(
        node: Value,
        initial_metadata: &Value,
        variant: XdsVariant,
        resources: &ServedResources,
        port: u16,
    ) -> Self {
        let folder = MeshPki::create();
        let server_port = port::free();
        let server = serve(&folder, server_port, resources);
        let admin = port::free();
        let ads = json!({
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "ads_config": {
                "api_type": variant.api_type(),
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "control"},
                                   "initial_metadata": initial_metadata}],
            },
        });
        let control = cluster("control", &[server_port], UpstreamHttp::Http2, None);
        let config = with(bootstrap(admin, &[], &[control]), "dynamic_resources", ads);
        let config = with(config, "node", node);
        let sidecar = TestSidecar::start_without_waiting("follower", &folder, port, admin, &config);
        Self { server, server_port, sidecar, folder }
    }

    fn start_ready(variant: XdsVariant, resources: &ServedResources, port: u16) -> Self {
        let following = Self::start(variant, resources, port);
        following.sidecar.wait_until_ready();
        following
    }

    /// Replaces the served resources.
    fn replace_resources(&self, resources: &ServedResources) {
        std::fs::write(self.folder.path("world.json"), resources.json())
            .expect("the folder is writable");
        self.server.signal(Signal::SIGHUP);
    }

    /// The reason of the next NACK of listeners.
    fn refusal(&self) -> String {
        let line = self.server.line("a nack", |line| line.contains("\"nack\""));
        let event: Value = serde_json::from_str(&line).expect("events are JSON");
        event.get("error").and_then(Value::as_str).expect("a NACK has an error").to_owned()
    }

    fn accepted(&self, kind: &str) {
        self.server.line(&format!("an ack of {kind}"), |line| {
            line.contains("\"ack\"") && line.contains(kind)
        });
    }

    fn metric(&self, name: &str) -> Option<String> {
        let page = self.sidecar.metrics();
        weft_integration::metrics::find_metric(&page, name).map(|value| value.to_string())
    }

    #[track_caller]
    fn assert_healthy(&mut self) {
        let process = &mut self.sidecar.process;
        assert!(process.is_running() && !process.errors().contains("panicked"), "{process:?}");
    }
}

fn serve(folder: &MeshPki, port: u16, resources: &ServedResources) -> Process {
    let file = folder.path("world.json");
    std::fs::write(&file, resources.json()).expect("the folder is writable");
    let mut command = counterpart("ads_server.py");
    let server = Process::start("ads_server", command.arg(port.to_string()).arg(&file));
    server.line_with("ready");
    server
}

/// An `HttpConnectionManager` that responds to every request with a text.
fn http_text(text: &str) -> Value {
    let answer = json!({"status": 200, "body": {"inline_string": text}});
    http(&json!({"match": {"prefix": "/"}, "direct_response": answer}), &[])
}

/// A listener that responds to every request with a text.
fn text_listener(name: &str, port: u16, text: &str) -> Value {
    listener(name, port, http_text(text), None)
}

/// The same listener with a setting that weft rejects: it would forward identity headers of
/// clients.
fn unsafe_text_listener(name: &str, port: u16, text: &str) -> Value {
    let unsafe_setting = json!("ALWAYS_FORWARD_ONLY");
    let manager = with(http_text(text), "forward_client_cert_details", unsafe_setting);
    listener(name, port, manager, None)
}

/// Resources with one listener, whose cluster gets its endpoints over EDS.
fn forwarding(port: u16, service: &[u16]) -> ServedResources {
    ServedResources {
        clusters: vec![cluster_over_eds("service", UpstreamHttp::Http1)],
        endpoints: vec![endpoints("service", service)],
        listeners: vec![listener("web", port, http(&route_to("service", 5), &[]), None)],
        ..ServedResources::default()
    }
}

fn text_server(text: &str) -> u16 {
    let length = text.len();
    let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    ScriptedServer::replying_once(head + text).port
}

fn ask(port: u16) -> String {
    let answer = Curl::get(port, "/").run();
    if answer.exit == 0 { answer.text() } else { answer.stderr }
}

#[track_caller]
fn wait_for_text(port: u16, expected: &str) {
    eventually(format!("port {port} responds {expected:?}"), || {
        (ask(port) == expected).then_some(())
    });
}

#[test]
fn configuration_is_applied_and_endpoint_changes_are_followed() {
    for variant in BOTH_VARIANTS {
        let port = port::free();
        let one = text_server("one");
        let two = text_server("two");
        let mut following =
            SidecarWithControl::start_ready(variant, &forwarding(port, &[one]), port);
        assert_eq!(ask(port), "one", "{variant:?}");
        following.replace_resources(&forwarding(port, &[two]));
        wait_for_text(port, "two");
        following.replace_resources(&forwarding(port, &[]));
        wait_for_text(port, "no_endpoint\n");
        following.replace_resources(&forwarding(port, &[one]));
        wait_for_text(port, "one");
        following.assert_healthy();
    }
}

/// A listener with a route configuration name that the server does not have.
fn listener_without_routes(port: u16) -> Value {
    listener("lost", port, http_with_named_routes("lost", &[]), None)
}

#[test]
fn changes_apply_at_once_despite_missing_endpoints_and_routes() {
    for variant in BOTH_VARIANTS {
        let port = port::free();
        let one = text_server("one");
        let two = text_server("two");
        let mut following =
            SidecarWithControl::start_ready(variant, &forwarding(port, &[one]), port);
        let beside = |text: &str, service: u16| {
            let mut resources = forwarding(port, &[service]);
            let mut lost =
                resources.clusters.first().cloned().expect("the resources have a cluster");
            lost["name"] = json!("lost");
            resources.clusters.push(lost);
            resources.listeners.push(listener_without_routes(port::free()));
            resources.listeners.push(text_listener("new", port + 1, text));
            resources
        };
        for (text, service) in [("a", two), ("b", one), ("c", two)] {
            #[expect(clippy::disallowed_methods, reason = "the test measures elapsed time")]
            let start = std::time::Instant::now();
            following.replace_resources(&beside(text, service));
            wait_for_text(port + 1, text);
            wait_for_text(port, if service == one { "one" } else { "two" });
            // Waiting for the missing resources would take 15 s; on an idle machine this takes 0.1
            // s.
            let time = start.elapsed();
            assert!(time.as_secs() < 5, "{variant:?} {text}: {time:?}");
        }
        assert_eq!(Curl::get(following.sidecar.admin, "/ready").run().status, 200);
        following.assert_healthy();
    }
}

#[test]
fn listener_is_added_and_removed_with_its_resource() {
    for variant in BOTH_VARIANTS {
        let stays = port::free();
        let goes = port::free();
        let only = ServedResources {
            listeners: vec![text_listener("a", stays, "a")],
            ..ServedResources::default()
        };
        let both = ServedResources {
            listeners: vec![text_listener("a", stays, "a"), text_listener("b", goes, "b")],
            ..ServedResources::default()
        };
        let following = SidecarWithControl::start_ready(variant, &only, stays);
        following.replace_resources(&both);
        wait_for_text(goes, "b");
        following.replace_resources(&only);
        eventually(format!("port {goes} is closed"), || {
            TcpStream::connect(("127.0.0.1", goes)).is_err().then_some(())
        });
        assert_eq!(ask(stays), "a");
    }
}

#[test]
fn invalid_listener_is_rejected_with_name_and_field_and_valid_ones_serve() {
    for variant in BOTH_VARIANTS {
        let good = port::free();
        let bad = port::free();
        let new = port::free();
        let resources = |listeners| ServedResources { listeners, ..ServedResources::default() };
        let first = resources(vec![
            text_listener("good", good, "good 1"),
            text_listener("bad", bad, "bad 1"),
        ]);
        let mut following = SidecarWithControl::start_ready(variant, &first, good);
        wait_for_text(bad, "bad 1");

        following.replace_resources(&resources(vec![
            text_listener("good", good, "good 2"),
            unsafe_text_listener("bad", bad, "bad 2"),
            text_listener("new", new, "new 2"),
        ]));
        let reason = following.refusal();
        for part in ["\"bad\"", "filter_chains[0].filters[0]", "forward_client_cert_details"] {
            assert!(reason.contains(part), "{variant:?}: no {part:?} in {reason:?}");
        }
        assert!(!reason.contains("good"), "{variant:?}: {reason:?}");
        wait_for_text(good, "good 2");
        wait_for_text(new, "new 2");
        assert_eq!(ask(bad), "bad 1", "{variant:?}: the last good version stays in force");
        assert_eq!(following.metric("weft_xds_rejected_resources").as_deref(), Some("1"));

        following.replace_resources(&resources(vec![
            text_listener("good", good, "good 3"),
            text_listener("bad", bad, "bad 3"),
            text_listener("new", new, "new 3"),
        ]));
        for (port, text) in [(good, "good 3"), (bad, "bad 3"), (new, "new 3")] {
            wait_for_text(port, text);
        }
        eventually("all resources are accepted", || {
            (following.metric("weft_xds_rejected_resources")? == "0").then_some(())
        });
        following.assert_healthy();
    }
}

#[test]
fn garbage_and_duplicate_resources_are_rejected_without_effect() {
    for variant in BOTH_VARIANTS {
        for fault in ["garbage", "duplicates"] {
            let port = port::free();
            let new = port::free();
            let resources = |fault, listeners| ServedResources {
                fault,
                listeners,
                ..ServedResources::default()
            };
            let first = resources(None, vec![text_listener("a", port, "a 1")]);
            let mut following = SidecarWithControl::start_ready(variant, &first, port);
            let both = || vec![text_listener("a", port, "a 1"), text_listener("b", new, "b 2")];

            following.replace_resources(&resources(Some(fault), both()));
            let reason = following.refusal();
            assert!(!reason.is_empty(), "{variant:?} {fault}");
            assert_eq!(ask(port), "a 1", "{variant:?} {fault}");

            following.replace_resources(&resources(
                None,
                vec![text_listener("a", port, "a 3"), text_listener("b", new, "b 3")],
            ));
            wait_for_text(port, "a 3");
            wait_for_text(new, "b 3");
            following.assert_healthy();
        }
    }
}

#[test]
fn sidecar_is_not_ready_while_the_server_is_silent() {
    for variant in BOTH_VARIANTS {
        let port = port::free();
        let silent =
            ServedResources { fault: Some("silence"), ..forwarding(port, &[text_server("one")]) };
        let following = SidecarWithControl::start(variant, &silent, port);
        following.server.line_with("stream");
        let unready = eventually("/ready reports the reason", || {
            let ready = Curl::get(following.sidecar.admin, "/ready").run();
            (ready.status == 503).then(|| ready.text())
        });
        assert!(unready.contains("waiting"), "{variant:?}: {unready:?}");
        following.replace_resources(&ServedResources { fault: None, ..silent });
        following.sidecar.wait_until_ready();
        assert_eq!(ask(port), "one", "{variant:?}");
    }
}

#[test]
fn traffic_continues_without_the_server_and_the_next_one_is_followed() {
    for variant in BOTH_VARIANTS {
        let port = port::free();
        let one = text_server("one");
        let two = text_server("two");
        let mut following =
            SidecarWithControl::start_ready(variant, &forwarding(port, &[one]), port);
        following.accepted("endpoints");
        following.server.kill();
        eventually("the lost connection is detected", || {
            (following.metric("weft_xds_connected")? == "0").then_some(())
        });
        for _ in 0..20 {
            assert_eq!(ask(port), "one", "{variant:?}");
        }
        let resources = forwarding(port, &[two]);
        following.server = serve(&following.folder, following.server_port, &resources);
        wait_for_text(port, "two");
        assert_eq!(following.metric("weft_xds_connected").as_deref(), Some("1"));
        following.assert_healthy();
    }
}

/// Changes during the disconnection apply too, also removals.
#[test]
fn resource_deleted_while_disconnected_is_removed() {
    for variant in BOTH_VARIANTS {
        let stays = port::free();
        let goes = port::free();
        let resources = |listeners| ServedResources { listeners, ..ServedResources::default() };
        let both = resources(vec![text_listener("a", stays, "a"), text_listener("b", goes, "b")]);
        let mut following = SidecarWithControl::start_ready(variant, &both, stays);
        wait_for_text(goes, "b");
        following.server.kill();
        let only = resources(vec![text_listener("a", stays, "a")]);
        following.server = serve(&following.folder, following.server_port, &only);
        eventually(format!("{variant:?}: port {goes} is closed"), || {
            TcpStream::connect(("127.0.0.1", goes)).is_err().then_some(())
        });
        assert_eq!(ask(stays), "a", "{variant:?}");
    }
}

/// A long-lived stream, started with a token or without.
struct LongStream(std::io::BufReader<TcpStream>);

impl LongStream {
    fn begin(port: u16, token: Option<&str>) -> Self {
        let mut stream =
            TcpStream::connect(("127.0.0.1", port)).expect("the port accepts connections");
        stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        let token = token.map(|token| format!("authorization: Bearer {token}\r\n"));
        let head = format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", token.unwrap_or_default());
        stream.write_all(head.as_bytes()).expect("the sidecar reads the request");
        let mut stream_in_progress = Self(std::io::BufReader::new(stream));
        assert!(stream_in_progress.continues(), "the stream has started");
        stream_in_progress
    }

    /// Whether more of the stream is received.
    fn continues(&mut self) -> bool {
        let mut line = String::new();
        (0..20).all(|_| {
            line.clear();
            self.0.read_line(&mut line).is_ok_and(|bytes| bytes > 0)
        })
    }

    fn ends(&mut self) -> bool {
        let mut line = String::new();
        eventually("the stream ends", || {
            line.clear();
            let went_on = self.0.read_line(&mut line).is_ok_and(|bytes| bytes > 0);
            (!went_on).then_some(true)
        })
    }
}

/// A service with endless responses.
fn endless() -> u16 {
    ScriptedServer::start(|stream| {
        let mut reader = std::io::BufReader::new(stream);
        if read_head(&mut reader).is_none() {
            return;
        }
        let stream = reader.get_mut();
        let pause = std::time::Duration::from_millis(20);
        stream.set_read_timeout(Some(pause)).expect("the timeout is not zero");
        let mut left = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
        while left.is_ok() && !matches!(stream.read(&mut [0]), Ok(0)) {
            left = stream.write_all(b"5\r\ntick\n\r\n");
        }
    })
    .port
}

/// Resources with one service without response timeout, behind these filters.
fn without_timeout(port: u16, service: u16, filters: &[Value]) -> ServedResources {
    ServedResources {
        clusters: vec![cluster("service", &[service], UpstreamHttp::Http1, None)],
        listeners: vec![listener("web", port, http(&route_to("service", 0), filters), None)],
        ..ServedResources::default()
    }
}

/// The output of a token issuer.
struct IssuerFiles {
    /// The JWKS.
    keys: String,
    /// A token of `https://issuer` for the audience `service`.
    token: String,
}

fn issued() -> IssuerFiles {
    let folder = tempfile::TempDir::new().expect("a temporary folder can be created");
    run(counterpart("issuer.py").arg(folder.path()).args(["https://issuer", "service"]));
    let read = |name| std::fs::read_to_string(folder.path().join(name)).expect("the file exists");
    IssuerFiles { keys: read("keys.json"), token: read("good.token") }
}

#[test]
fn new_token_requirement_ends_exactly_the_streams_without_valid_token() {
    let IssuerFiles { keys, token } = issued();
    for variant in BOTH_VARIANTS {
        let port = port::free();
        let service = endless();
        let resources = |filters: &[Value]| without_timeout(port, service, filters);
        let wants = |issuer, audience| [require_token(issuer, audience, &keys)];
        let following = SidecarWithControl::start_ready(
            variant,
            &resources(&wants("https://issuer", "service")),
            port,
        );
        let mut with = LongStream::begin(port, Some(&token));
        let settled = |count: &str| {
            eventually(format!("{count} streams were ended"), || {
                let withdrawn = following
                    .metric("weft_sidecar_requests_aborted_total{reason=\"policy_changed\"}")?;
                (withdrawn == count).then_some(())
            });
        };
        // First no token is required, then the same token as before.
        following.replace_resources(&resources(&[]));
        eventually("no token is required", || {
            (Curl::get(port, "/").with(&["-m", "1"]).run().status == 200).then_some(())
        });
        let mut without = LongStream::begin(port, None);
        following.replace_resources(&resources(&wants("https://issuer", "service")));
        assert!(without.ends() && with.continues(), "{variant:?}");
        settled("1");
        // A token for another audience.
        following.replace_resources(&resources(&wants("https://issuer", "another")));
        assert!(with.ends(), "{variant:?}");
        settled("2");
    }
}

/// An RBAC filter with one policy, which applies to requests with an `authorization` header.
fn on_authorization(action: &str, policy: &str) -> Value {
    let header = json!({"name": "authorization", "present_match": true});
    let policies =
        json!({policy: {"permissions": [{"any": true}], "principals": [{"header": header}]}});
    let message = "envoy.extensions.filters.http.rbac.v3.RBAC";
    let rules = json!({"action": action, "policies": policies});
    json!({"name": "rbac", "typed_config": any(message, json!({"rules": rules}))})
}

#[test]
fn changed_policy_evaluates_the_token_header_that_is_not_forwarded() {
    let IssuerFiles { keys, token } = issued();
    for variant in BOTH_VARIANTS {
        let port = port::free();
        let service = endless();
        let wants = require_token("https://issuer", "service", &keys);
        let resources = |rbac| without_timeout(port, service, &[wants.clone(), rbac]);
        let first = resources(on_authorization("ALLOW", "first"));
        let following = SidecarWithControl::start_ready(variant, &first, port);
        let mut stream_in_progress = LongStream::begin(port, Some(&token));
        following.replace_resources(&resources(on_authorization("ALLOW", "second")));
        following.accepted("listeners");
        assert!(
            (0..5).all(|_| stream_in_progress.continues()),
            "{variant:?}: the stream is still allowed"
        );
        following.replace_resources(&resources(on_authorization("DENY", "third")));
        assert!(stream_in_progress.ends(), "{variant:?}");
    }
}

#[test]
fn node_and_initial_metadata_reach_the_server() {
    let node = json!({
        "id": "web-1", "cluster": "web", "user_agent_name": "another",
        "metadata": {"NAMESPACE": "shop", "LABELS": {"app": "web"}, "WEIGHT": 1.5, "ON": [true, null]},
        "locality": {"region": "eu", "zone": "eu-1", "sub_zone": "rack-7"},
    });
    let metadata = json!([{"key": "Authorization", "value": "Bearer abc"}, {"key": "x-tag", "value": "1"},
                          {"key": "x-tag-bin", "raw_value": "AAH/"}]);
    for variant in BOTH_VARIANTS {
        let port = port::free();
        let resources = ServedResources {
            listeners: vec![text_listener("web", port, "hello")],
            ..ServedResources::default()
        };
        let following = SidecarWithControl::start_with_options(
            node.clone(),
            &metadata,
            variant,
            &resources,
            port,
        );
        let line = following.server.line_with("\"node\"");
        let event: Value = serde_json::from_str(&line).expect("events are JSON");
        let seen = event.get("node").expect("the event has the node");
        let field = |name: &str| seen.get(name).cloned().unwrap_or_default();
        assert_eq!(field("metadata"), node["metadata"], "{variant:?}");
        let locality = json!({"region": "eu", "zone": "eu-1", "subZone": "rack-7"});
        assert_eq!(field("locality"), locality, "{variant:?}");
        assert_eq!((field("id"), field("userAgentName")), (json!("web-1"), json!("weft")));
        let metadata = event.get("metadata").expect("the event has the stream's metadata");
        assert_eq!(metadata["authorization"], "Bearer abc", "{variant:?}");
        assert_eq!(metadata["x-tag"], "1", "{variant:?}");
        assert_eq!(metadata["x-tag-bin"], "b'\\x00\\x01\\xff'", "{variant:?}");
        wait_for_text(port, "hello");
    }
}

#[test]
fn settings_without_effect_are_logged_once_and_listed_in_the_dump() {
    for variant in BOTH_VARIANTS {
        let port = port::free();
        let one = text_server("one");
        let two = text_server("two");
        let with_settings = |service: u16| {
            let mut resources = forwarding(port, &[service]);
            let overload = json!({"category": "x", "drop_percentage": {"numerator": 5}});
            resources.endpoints[0]["policy"] = json!({"drop_overloads": [overload]});
            let check = json!({"timeout": "1s", "interval": "5s", "unhealthy_threshold": 2,
                               "healthy_threshold": 2, "tcp_health_check": {}});
            resources.clusters[0]["health_checks"] = json!([check]);
            resources
        };
        let mut following = SidecarWithControl::start_ready(variant, &with_settings(one), port);
        following.replace_resources(&with_settings(two));
        wait_for_text(port, "two");
        let log = following.sidecar.process.errors();
        let lines = log.lines().filter(|line| line.contains("setting has no effect"));
        let lines: Vec<&str> = lines.collect();
        let dump = Curl::get(following.sidecar.admin, "/config_dump").run().text();
        for setting in ["policy.drop_overloads", "health_checks"] {
            let of_setting = lines.iter().filter(|line| line.contains(setting)).count();
            assert_eq!(of_setting, 1, "{variant:?} {setting}: {log}");
            assert!(dump.contains(setting), "{variant:?} {setting}: {dump}");
        }
        following.assert_healthy();
    }
}
