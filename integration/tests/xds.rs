//! Our sidecar as the client of a control plane that is not ours: one written with grpcio, in both
//! variants of the protocol, and with every fault that such a server may have.

use std::io::{BufRead, Read, Write};
use std::net::TcpStream;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use weft_integration::bootstrap::{
    UpstreamHttp, any, bootstrap, cluster, endpoints, http, listener, require_token, route_to, with,
};
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::MeshPki;
use weft_integration::port;
use weft_integration::process::{Process, counterpart, run};
use weft_integration::scripted_server::{ScriptedServer, read_head};
use weft_integration::sidecar_pair::TestSidecar;
use weft_integration::wait::{DEADLINE, eventually};

const BOTH_VARIANTS: [Variant; 2] = [Variant::Delta, Variant::StateOfTheWorld];

#[derive(Debug, Clone, Copy)]
enum Variant {
    Delta,
    StateOfTheWorld,
}

impl Variant {
    fn api_type(self) -> &'static str {
        match self {
            Self::Delta => "DELTA_GRPC",
            Self::StateOfTheWorld => "GRPC",
        }
    }
}

/// What the control plane serves.
#[derive(Debug, Clone, Default)]
struct World {
    fault: Option<&'static str>,
    clusters: Vec<Value>,
    endpoints: Vec<Value>,
    listeners: Vec<Value>,
}

impl World {
    fn json(&self) -> String {
        let Self { fault, clusters, endpoints, listeners } = self;
        json!({"fault": fault, "clusters": clusters, "endpoints": endpoints,
               "listeners": listeners})
        .to_string()
    }
}

/// A sidecar and the control plane that it follows.
struct Following {
    server: Process,
    server_port: u16,
    sidecar: TestSidecar,
    folder: MeshPki,
}

impl Following {
    /// Starts both. `port` is where the sidecar is expected to listen, once it is told so.
    fn start(variant: Variant, world: &World, port: u16) -> Self {
        Self::start_with_options(
            json!({"id": "web-1", "cluster": "web"}),
            &json!([]),
            variant,
            world,
            port,
        )
    }

    fn start_with_options(
        node: Value,
        initial_metadata: &Value,
        variant: Variant,
        world: &World,
        port: u16,
    ) -> Self {
        let folder = MeshPki::create();
        let server_port = port::free();
        let server = serve(&folder, server_port, world);
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

    fn start_ready(variant: Variant, world: &World, port: u16) -> Self {
        let following = Self::start(variant, world, port);
        following.sidecar.wait_until_ready();
        following
    }

    /// Serves another world from now on.
    fn turn_to(&self, world: &World) {
        std::fs::write(self.folder.path("world.json"), world.json()).expect("the folder takes it");
        self.server.signal(Signal::SIGHUP);
    }

    /// The next acknowledgement or refusal of listeners.
    fn refusal(&self) -> String {
        let line = self.server.line("a nack", |line| line.contains("\"nack\""));
        let event: Value = serde_json::from_str(&line).expect("events are JSON");
        event.get("error").and_then(Value::as_str).expect("a nack has its reason").to_owned()
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

fn serve(folder: &MeshPki, port: u16, world: &World) -> Process {
    let file = folder.path("world.json");
    std::fs::write(&file, world.json()).expect("the folder takes files");
    let mut command = counterpart("ads_server.py");
    let server = Process::start("ads_server", command.arg(port.to_string()).arg(&file));
    server.line_with("ready");
    server
}

/// A listener that answers every request with a text.
fn saying(name: &str, port: u16, text: &str) -> Value {
    let answer = json!({"status": 200, "body": {"inline_string": text}});
    let route = json!({"match": {"prefix": "/"}, "direct_response": answer});
    listener(name, port, http(&route, &[]), None)
}

/// The same, asking for what we refuse: to pass on whatever identity a client claims.
fn saying_unsafely(name: &str, port: u16, text: &str) -> Value {
    let mut bad = saying(name, port, text);
    let manager = bad.pointer_mut("/filter_chains/0/filters/0/typed_config");
    let field = manager.and_then(|config| config.get_mut("forward_client_cert_details"));
    *field.expect("every listener has it") = json!("ALWAYS_FORWARD_ONLY");
    bad
}

/// A world whose one listener sends to the endpoints of a service, named over EDS.
fn forwarding(port: u16, service: &[u16]) -> World {
    let by_name = json!({"eds_config": {"ads": {}, "resource_api_version": "V3"}});
    let mut service_cluster = cluster("service", &[], UpstreamHttp::Http1, None);
    let fields = service_cluster.as_object_mut().expect("a message is an object");
    fields.remove("load_assignment");
    let eds = with(with(service_cluster, "type", json!("EDS")), "eds_cluster_config", by_name);
    World {
        clusters: vec![eds],
        endpoints: vec![endpoints("service", service)],
        listeners: vec![listener("web", port, http(&route_to("service", 5), &[]), None)],
        ..World::default()
    }
}

fn backend(text: &str) -> u16 {
    let length = text.len();
    let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    ScriptedServer::replying_once(head + text).port
}

fn ask(port: u16) -> String {
    let answer = Curl::get(port, "/").run();
    if answer.exit == 0 { answer.text() } else { answer.stderr }
}

#[track_caller]
fn until_it_says(port: u16, expected: &str) {
    eventually(format!("port {port} says {expected:?}"), || (ask(port) == expected).then_some(()));
}

#[test]
fn configuration_arrives_and_a_change_of_endpoints_is_followed() {
    for variant in BOTH_VARIANTS {
        let (port, one, two) = (port::free(), backend("one"), backend("two"));
        let mut following = Following::start_ready(variant, &forwarding(port, &[one]), port);
        assert_eq!(ask(port), "one", "{variant:?}");
        following.turn_to(&forwarding(port, &[two]));
        until_it_says(port, "two");
        following.turn_to(&forwarding(port, &[]));
        until_it_says(port, "no_endpoint\n");
        following.turn_to(&forwarding(port, &[one]));
        until_it_says(port, "one");
        following.assert_healthy();
    }
}

/// A listener whose routes come by a name that no server has.
fn lost_listener(port: u16) -> Value {
    let mut lost = saying("lost", port, "");
    let manager = lost.pointer_mut("/filter_chains/0/filters/0/typed_config");
    let manager = manager.and_then(Value::as_object_mut).expect("every listener has it");
    manager.remove("route_config");
    let source = json!({"ads": {}, "resource_api_version": "V3"});
    manager.insert("rds".into(), json!({"route_config_name": "lost", "config_source": source}));
    lost
}

#[test]
fn changes_beside_missing_endpoints_and_routes_apply_at_once() {
    for variant in BOTH_VARIANTS {
        let (port, one, two) = (port::free(), backend("one"), backend("two"));
        let mut following = Following::start_ready(variant, &forwarding(port, &[one]), port);
        let beside = |text: &str, service: u16| {
            let mut world = forwarding(port, &[service]);
            let mut lost = world.clusters.first().cloned().expect("it has one");
            lost["name"] = json!("lost");
            world.clusters.push(lost);
            world.listeners.push(lost_listener(port::free()));
            world.listeners.push(saying("new", port + 1, text));
            world
        };
        for (text, service) in [("a", two), ("b", one), ("c", two)] {
            #[allow(
                clippy::disallowed_methods,
                reason = "the time that it takes is what is tested"
            )]
            let start = std::time::Instant::now();
            following.turn_to(&beside(text, service));
            until_it_says(port + 1, text);
            until_it_says(port, if service == one { "one" } else { "two" });
            // It took 15 s before, each time; on an idle machine it takes 0.1 s.
            let time = start.elapsed();
            assert!(time.as_secs() < 5, "{variant:?} {text}: {time:?}");
        }
        assert_eq!(Curl::get(following.sidecar.admin, "/ready").run().status, 200);
        following.assert_healthy();
    }
}

#[test]
fn a_listener_comes_and_goes_with_its_resource() {
    for variant in BOTH_VARIANTS {
        let (stays, goes) = (port::free(), port::free());
        let only = World { listeners: vec![saying("a", stays, "a")], ..World::default() };
        let both = World {
            listeners: vec![saying("a", stays, "a"), saying("b", goes, "b")],
            ..World::default()
        };
        let following = Following::start_ready(variant, &only, stays);
        following.turn_to(&both);
        until_it_says(goes, "b");
        following.turn_to(&only);
        eventually(format!("port {goes} is closed"), || {
            TcpStream::connect(("127.0.0.1", goes)).is_err().then_some(())
        });
        assert_eq!(ask(stays), "a");
    }
}

#[test]
fn a_bad_listener_is_refused_by_name_and_field_and_the_good_ones_serve() {
    for variant in BOTH_VARIANTS {
        let (good, bad, new) = (port::free(), port::free(), port::free());
        let world = |listeners| World { listeners, ..World::default() };
        let first = world(vec![saying("good", good, "good 1"), saying("bad", bad, "bad 1")]);
        let mut following = Following::start_ready(variant, &first, good);
        until_it_says(bad, "bad 1");

        following.turn_to(&world(vec![
            saying("good", good, "good 2"),
            saying_unsafely("bad", bad, "bad 2"),
            saying("new", new, "new 2"),
        ]));
        let reason = following.refusal();
        for part in ["\"bad\"", "filter_chains[0].filters[0]", "forward_client_cert_details"] {
            assert!(reason.contains(part), "{variant:?}: no {part:?} in {reason:?}");
        }
        assert!(!reason.contains("good"), "{variant:?}: {reason:?}");
        until_it_says(good, "good 2");
        until_it_says(new, "new 2");
        assert_eq!(ask(bad), "bad 1", "{variant:?}: the last good version stays in force");
        assert_eq!(following.metric("weft_xds_rejected_resources").as_deref(), Some("1"));

        following.turn_to(&world(vec![
            saying("good", good, "good 3"),
            saying("bad", bad, "bad 3"),
            saying("new", new, "new 3"),
        ]));
        for (port, text) in [(good, "good 3"), (bad, "bad 3"), (new, "new 3")] {
            until_it_says(port, text);
        }
        eventually("nothing is refused any more", || {
            (following.metric("weft_xds_rejected_resources")? == "0").then_some(())
        });
        following.assert_healthy();
    }
}

#[test]
fn garbage_and_duplicates_are_refused_and_disturb_nothing() {
    for variant in BOTH_VARIANTS {
        for fault in ["garbage", "duplicates"] {
            let (port, new) = (port::free(), port::free());
            let world = |fault, listeners| World { fault, listeners, ..World::default() };
            let first = world(None, vec![saying("a", port, "a 1")]);
            let mut following = Following::start_ready(variant, &first, port);
            let both = || vec![saying("a", port, "a 1"), saying("b", new, "b 2")];

            following.turn_to(&world(Some(fault), both()));
            let reason = following.refusal();
            assert!(!reason.is_empty(), "{variant:?} {fault}");
            assert_eq!(ask(port), "a 1", "{variant:?} {fault}");

            following
                .turn_to(&world(None, vec![saying("a", port, "a 3"), saying("b", new, "b 3")]));
            until_it_says(port, "a 3");
            until_it_says(new, "b 3");
            following.assert_healthy();
        }
    }
}

#[test]
fn a_silent_server_is_waited_for_and_readiness_says_so() {
    for variant in BOTH_VARIANTS {
        let port = port::free();
        let silent = World { fault: Some("silence"), ..forwarding(port, &[backend("one")]) };
        let following = Following::start(variant, &silent, port);
        following.server.line_with("stream");
        let unready = eventually("readiness says why not", || {
            let ready = Curl::get(following.sidecar.admin, "/ready").run();
            (ready.status == 503).then(|| ready.text())
        });
        assert!(unready.contains("waiting"), "{variant:?}: {unready:?}");
        following.turn_to(&World { fault: None, ..silent });
        following.sidecar.wait_until_ready();
        assert_eq!(ask(port), "one", "{variant:?}");
    }
}

#[test]
fn traffic_outlives_the_server_and_the_next_one_is_followed() {
    for variant in BOTH_VARIANTS {
        let (port, one, two) = (port::free(), backend("one"), backend("two"));
        let mut following = Following::start_ready(variant, &forwarding(port, &[one]), port);
        following.accepted("endpoints");
        following.server.kill();
        eventually("the loss is noticed", || {
            (following.metric("weft_xds_connected")? == "0").then_some(())
        });
        for _ in 0..20 {
            assert_eq!(ask(port), "one", "{variant:?}");
        }
        let world = forwarding(port, &[two]);
        following.server = serve(&following.folder, following.server_port, &world);
        until_it_says(port, "two");
        assert_eq!(following.metric("weft_xds_connected").as_deref(), Some("1"));
        following.assert_healthy();
    }
}

/// What changed while nobody was connected counts as well: also that something is gone.
#[test]
fn what_was_deleted_while_the_server_was_away_is_gone() {
    for variant in BOTH_VARIANTS {
        let (stays, goes) = (port::free(), port::free());
        let world = |listeners| World { listeners, ..World::default() };
        let both = world(vec![saying("a", stays, "a"), saying("b", goes, "b")]);
        let mut following = Following::start_ready(variant, &both, stays);
        until_it_says(goes, "b");
        following.server.kill();
        let only = world(vec![saying("a", stays, "a")]);
        following.server = serve(&following.folder, following.server_port, &only);
        eventually(format!("{variant:?}: port {goes} is closed"), || {
            TcpStream::connect(("127.0.0.1", goes)).is_err().then_some(())
        });
        assert_eq!(ask(stays), "a", "{variant:?}");
    }
}

/// A stream that lasts, begun with a token or without.
struct Lasting(std::io::BufReader<TcpStream>);

impl Lasting {
    fn begin(port: u16, token: Option<&str>) -> Self {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a deadline above zero");
        let token = token.map(|token| format!("authorization: Bearer {token}\r\n"));
        let head = format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", token.unwrap_or_default());
        stream.write_all(head.as_bytes()).expect("it takes requests");
        let mut lasting = Self(std::io::BufReader::new(stream));
        assert!(lasting.goes_on(), "it has begun");
        lasting
    }

    /// Whether some more of it comes.
    fn goes_on(&mut self) -> bool {
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

/// A service whose answers have no end.
fn endless() -> u16 {
    ScriptedServer::start(|stream| {
        let mut reader = std::io::BufReader::new(stream);
        if read_head(&mut reader).is_none() {
            return;
        }
        let stream = reader.get_mut();
        let pause = std::time::Duration::from_millis(20);
        stream.set_read_timeout(Some(pause)).expect("a time above zero");
        let mut left = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
        while left.is_ok() && !matches!(stream.read(&mut [0]), Ok(0)) {
            left = stream.write_all(b"5\r\ntick\n\r\n");
        }
    })
    .port
}

/// A world with one service whose responses may last, behind these filters.
fn without_timeout(port: u16, service: u16, filters: &[Value]) -> World {
    World {
        clusters: vec![cluster("service", &[service], UpstreamHttp::Http1, None)],
        listeners: vec![listener("web", port, http(&route_to("service", 0), filters), None)],
        ..World::default()
    }
}

/// What an issuer of tokens made.
struct Issued {
    /// Its key set, as JSON.
    keys: String,
    /// A token of `https://issuer` for the audience `service`.
    token: String,
}

fn issued() -> Issued {
    let folder = tempfile::TempDir::new().expect("a folder");
    run(counterpart("issuer.py").arg(folder.path()).args(["https://issuer", "service"]));
    let read = |name| std::fs::read_to_string(folder.path().join(name)).expect("it is there");
    Issued { keys: read("keys.json"), token: read("good.token") }
}

#[test]
fn streams_end_that_have_not_proved_what_is_asked_for_now_and_no_others() {
    let Issued { keys, token } = issued();
    for variant in BOTH_VARIANTS {
        let (port, service) = (port::free(), endless());
        let world = |filters: &[Value]| without_timeout(port, service, filters);
        let wants = |issuer, audience| [require_token(issuer, audience, &keys)];
        let following =
            Following::start_ready(variant, &world(&wants("https://issuer", "service")), port);
        let mut with = Lasting::begin(port, Some(&token));
        let settled = |count: &str| {
            eventually(format!("{count} were withdrawn"), || {
                let withdrawn = following
                    .metric("weft_sidecar_requests_aborted_total{reason=\"policy_changed\"}")?;
                (withdrawn == count).then_some(())
            });
        };
        // Nothing is asked of anybody, and then the same token as before.
        following.turn_to(&world(&[]));
        eventually("no token is needed", || {
            (Curl::get(port, "/").with(&["-m", "1"]).run().status == 200).then_some(())
        });
        let mut without = Lasting::begin(port, None);
        following.turn_to(&world(&wants("https://issuer", "service")));
        assert!(without.ends() && with.goes_on(), "{variant:?}");
        settled("1");
        // One for somebody else.
        following.turn_to(&world(&wants("https://issuer", "another")));
        assert!(with.ends(), "{variant:?}");
        settled("2");
    }
}

/// A filter with one policy, which applies to requests that have an `authorization` header.
fn on_authorization(action: &str, policy: &str) -> Value {
    let header = json!({"name": "authorization", "present_match": true});
    let policies =
        json!({policy: {"permissions": [{"any": true}], "principals": [{"header": header}]}});
    let message = "envoy.extensions.filters.http.rbac.v3.RBAC";
    let rules = json!({"action": action, "policies": policies});
    json!({"name": "rbac", "typed_config": any(message, json!({"rules": rules}))})
}

#[test]
fn changed_policy_judges_the_token_header_that_the_service_does_not_see() {
    let Issued { keys, token } = issued();
    for variant in BOTH_VARIANTS {
        let (port, service) = (port::free(), endless());
        let wants = require_token("https://issuer", "service", &keys);
        let world = |rbac| without_timeout(port, service, &[wants.clone(), rbac]);
        let first = world(on_authorization("ALLOW", "first"));
        let following = Following::start_ready(variant, &first, port);
        let mut lasting = Lasting::begin(port, Some(&token));
        following.turn_to(&world(on_authorization("ALLOW", "second")));
        following.accepted("listeners");
        assert!((0..5).all(|_| lasting.goes_on()), "{variant:?}: it is allowed as before");
        following.turn_to(&world(on_authorization("DENY", "third")));
        assert!(lasting.ends(), "{variant:?}");
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
        let world = World { listeners: vec![saying("web", port, "hello")], ..World::default() };
        let following =
            Following::start_with_options(node.clone(), &metadata, variant, &world, port);
        let line = following.server.line_with("\"node\"");
        let event: Value = serde_json::from_str(&line).expect("events are JSON");
        let seen = event.get("node").expect("the event has the node");
        let field = |name: &str| seen.get(name).cloned().unwrap_or_default();
        assert_eq!(field("metadata"), node["metadata"], "{variant:?}");
        let locality = json!({"region": "eu", "zone": "eu-1", "subZone": "rack-7"});
        assert_eq!(field("locality"), locality, "{variant:?}");
        assert_eq!((field("id"), field("userAgentName")), (json!("web-1"), json!("weft")));
        let said = event.get("metadata").expect("the event has the stream's metadata");
        assert_eq!(said["authorization"], "Bearer abc", "{variant:?}");
        assert_eq!(said["x-tag"], "1", "{variant:?}");
        assert_eq!(said["x-tag-bin"], "b'\\x00\\x01\\xff'", "{variant:?}");
        until_it_says(port, "hello");
    }
}

#[test]
fn settings_without_effect_are_logged_once_and_listed() {
    for variant in BOTH_VARIANTS {
        let (port, one, two) = (port::free(), backend("one"), backend("two"));
        let with_settings = |service: u16| {
            let mut world = forwarding(port, &[service]);
            let overload = json!({"category": "x", "drop_percentage": {"numerator": 5}});
            world.endpoints[0]["policy"] = json!({"drop_overloads": [overload]});
            let check = json!({"timeout": "1s", "interval": "5s", "unhealthy_threshold": 2,
                               "healthy_threshold": 2, "tcp_health_check": {}});
            world.clusters[0]["health_checks"] = json!([check]);
            world
        };
        let mut following = Following::start_ready(variant, &with_settings(one), port);
        following.turn_to(&with_settings(two));
        until_it_says(port, "two");
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
