//! Authorization policies: a changed policy applies to open requests and connections, each clause
//! is enforced as documented, and `weft why` reports the deciding policy.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use weft_integration::mesh::{MeshWorkload, TestMesh};
use weft_integration::mesh_pki::spiffe_id;
use weft_integration::process::weft;
use weft_integration::wait::{DEADLINE, eventually};

/// The ports of `orders` that forward to programs of this test.
const STREAMS: u16 = 8000;
const STREAMS_TARGET: u16 = 7200;
const BYTES: u16 = 7300;
const ORDERS_IP: [u8; 4] = [10, 96, 0, 2];
/// More time than a change of `mesh.yaml` needs to take effect.
const SOON: Duration = Duration::from_secs(5);
/// The interval between two chunks of a stream.
const CHUNK_INTERVAL: Duration = Duration::from_millis(50);

/// Starts a program that responds to each request with an endless body, and one that echoes bytes.
fn programs(mesh: &TestMesh) {
    for workload in &mesh.orders {
        let listen = |port: u16| {
            let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, port));
            mesh.on(Some(&workload.host), bind).expect("the port is free")
        };
        let streams = listen(STREAMS_TARGET);
        let bytes = listen(BYTES);
        std::thread::spawn(move || streams.incoming().flatten().for_each(spawn(stream)));
        std::thread::spawn(move || bytes.incoming().flatten().for_each(spawn(echo)));
    }
}

fn spawn(serve: fn(TcpStream) -> Option<()>) -> impl FnMut(TcpStream) {
    move |stream| drop(std::thread::spawn(move || serve(stream)))
}

fn stream(client: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(client.try_clone().ok()?);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).ok().filter(|bytes| *bytes > 0)?;
    }
    let mut client = client;
    client.set_read_timeout(Some(CHUNK_INTERVAL)).ok()?;
    client.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").ok()?;
    loop {
        client.write_all(b"5\r\ntick\n\r\n").ok()?;
        // Waits until the client closes the connection.
        if let Ok(0) = reader.read(&mut [0]) {
            return None;
        }
    }
}

fn echo(mut client: TcpStream) -> Option<()> {
    let mut buffer = [0; 64];
    loop {
        let bytes = client.read(&mut buffer).ok().filter(|bytes| *bytes > 0)?;
        client.write_all(buffer.get(..bytes)?).ok()?;
    }
}

/// A connection from the program of `web` to `orders`.
struct OpenConnection(BufReader<TcpStream>);

impl OpenConnection {
    fn to(mesh: &TestMesh, port: u16) -> Self {
        let orders = SocketAddr::from((ORDERS_IP, port));
        let connect = || TcpStream::connect(orders).expect("the sidecar accepts the connection");
        let stream = mesh.on(Some(&mesh.web.host), connect);
        stream.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        Self(BufReader::new(stream))
    }

    /// Starts a stream; returns its status.
    fn begin(mesh: &TestMesh, path: &str) -> (Self, String) {
        let mut open = Self::to(mesh, STREAMS);
        let head = format!("GET {path} HTTP/1.1\r\nhost: orders\r\n\r\n");
        let mut status = String::new();
        // Without a response the status is empty.
        let asked = open.0.get_mut().write_all(head.as_bytes());
        drop(asked.and_then(|()| open.0.read_line(&mut status)));
        (open, status.split(' ').nth(1).unwrap_or_default().to_owned())
    }

    /// Whether three more chunks of the stream are received.
    fn continues(&mut self) -> bool {
        let mut ticks = 0;
        let mut line = String::new();
        while ticks < 3 {
            line.clear();
            match self.0.read_line(&mut line) {
                Ok(1..) => ticks += u8::from(line == "tick\n"),
                Ok(0) | Err(_) => return false,
            }
        }
        true
    }

    /// Whether the stream ends soon.
    fn ends(&mut self) -> bool {
        let reader = &mut self.0;
        reader.get_ref().set_read_timeout(Some(SOON)).expect("the timeout is not zero");
        let mut buffer = [0; 4096];
        for _ in 0..SOON.as_millis() / CHUNK_INTERVAL.as_millis() {
            match reader.read(&mut buffer) {
                Ok(0) => return true,
                Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
                Ok(_) => {}
            }
        }
        false
    }

    /// Sends bytes over a TCP connection; returns whether they are echoed.
    fn echoes(&mut self, what: &str) -> bool {
        let mut line = String::new();
        writeln!(self.0.get_mut(), "{what}").is_ok()
            && self.0.read_line(&mut line).is_ok_and(|bytes| bytes > 0)
    }
}

/// A mesh in which `web` may read all streams of `orders` and use its byte port.
fn mesh() -> TestMesh {
    let mut mesh = TestMesh::builder().start();
    programs(&mesh);
    let all = json!([{"from": ["web"]}]);
    mesh.change(|file| {
        let mut orders = file.service("orders");
        orders.add_port(json!({"port": STREAMS, "target": STREAMS_TARGET, "protocol": "http"}));
        orders.add_port(json!({"port": BYTES, "protocol": "tcp"}));
        // With one endpoint, all streams are at the same endpoint.
        orders.keep_endpoints(1);
        file.policy("orders").replace(json!({"service": "orders", "allow": all}));
    });
    eventually("the new ports are served", || {
        let (mut open, status) = OpenConnection::begin(&mesh, "/");
        (status == "200" && open.continues() && OpenConnection::to(&mesh, BYTES).echoes("?"))
            .then_some(())
    });
    mesh
}

fn counted(mesh: &TestMesh, metric: &str) -> u64 {
    let of = |workload: &MeshWorkload| {
        weft_integration::metrics::metric(&workload.sidecar.admin("/metrics").text(), metric)
    };
    mesh.orders.iter().map(of).sum()
}

#[test]
fn policy_change_ends_exactly_the_streams_that_it_denies() {
    let mut mesh = mesh();
    let (mut cut, _) = OpenConnection::begin(&mesh, "/cut/1");
    let (mut kept, _) = OpenConnection::begin(&mesh, "/kept/1");
    let mut bytes = OpenConnection::to(&mesh, BYTES);
    assert!(cut.continues() && kept.continues() && bytes.echoes("?"));

    // A change that still allows the open streams ends none of them.
    let allow =
        json!([{"from": ["web"], "paths": ["/cut", "/kept"]}, {"from": ["web"], "ports": [BYTES]}]);
    mesh.change(|file| file.policy("orders").replace(json!({"service": "orders", "allow": allow})));
    eventually("the new policy is in force", || {
        (OpenConnection::begin(&mesh, "/other").1 == "403").then_some(())
    });
    assert!(cut.continues() && kept.continues() && bytes.echoes("?"));
    assert_eq!(OpenConnection::begin(&mesh, "/never").1, "403");
    // Requests that polled for the new policy may have been ended by it.
    let ended = counted(&mesh, "weft_sidecar_requests_aborted_total{reason=\"policy_changed\"}");

    let deny = json!([{"from": ["web"], "paths": ["/cut"], "ports": [STREAMS]}]);
    mesh.change(|file| {
        file.policy("orders").replace(json!({"service": "orders", "allow": allow, "deny": deny}));
    });
    assert!(cut.ends(), "the stream is denied now");
    assert!(kept.continues() && bytes.echoes("?"), "other streams are not");
    assert_eq!(OpenConnection::begin(&mesh, "/cut/2").1, "403");
    assert_eq!(
        counted(&mesh, "weft_sidecar_requests_aborted_total{reason=\"policy_changed\"}"),
        ended + 1
    );

    let allow = json!([{"from": ["web"], "paths": ["/kept"]}]);
    mesh.change(|file| file.policy("orders").replace(json!({"service": "orders", "allow": allow})));
    assert!(bytes.ends(), "a clause with a path does not allow TCP connections");
    assert!(kept.continues());
    assert_eq!(
        counted(&mesh, "weft_sidecar_connections_closed_total{reason=\"policy_changed\"}"),
        1
    );
    assert!(!OpenConnection::to(&mesh, BYTES).echoes("?"));
    // Each worker writes its own lines, so their order is undefined.
    let paths = ["/never", "/cut/1", "/cut/2"];
    let of_any = |line: &str| {
        paths.iter().any(|path| line.contains(&format!("\"path\":\"{path}\"")))
            || line.contains("\"connection_termination_details\":\"aborted\"")
    };
    let next = || mesh.orders[0].sidecar.process.line("a line of these requests", of_any);
    let lines: Vec<Value> = (0..=paths.len())
        .map(|_| serde_json::from_str(&next()).expect("the line is JSON"))
        .collect();
    let of = |path: &str| {
        lines.iter().find(|line| line["path"] == path).expect("each request has a line")
    };
    let bytes = lines.iter().find(|line| line["kind"] == "tcp").expect("the connection has a line");
    assert_eq!(bytes["matched_policy"], Value::Null, "no policy allows it: {bytes}");
    assert_eq!(of("/never")["matched_policy"], Value::Null);
    let cut = of("/cut/1");
    assert_eq!(cut["response_code_details"], "rbac_access_denied", "{cut}");
    assert_eq!(cut["matched_policy"], "orders.deny[0]", "{cut}");
    assert_eq!(of("/cut/2")["matched_policy"], "orders.deny[0]");
}

#[test]
fn dry_run_policy_reports_what_it_would_deny() {
    let mut mesh = mesh();
    let below_default = spiffe_id("*");
    mesh.change(|file| {
        file.add_policy(
            json!({"service": "orders", "dry_run": true, "allow": [{"from": ["web"], "paths": ["/kept"]}],
                   "deny": [{"from": [below_default], "ports": [STREAMS], "paths": ["/kept/not"]}]}),
        );
    });
    let refused = || counted(&mesh, "weft_sidecar_requests_dry_run_denied_total");
    eventually("the dry-run policy is in force", || {
        let before = refused();
        assert_eq!(OpenConnection::begin(&mesh, "/other").1, "200");
        (refused() > before).then_some(())
    });
    let before = refused();
    assert_eq!(OpenConnection::begin(&mesh, "/kept").1, "200");
    assert_eq!(refused(), before);
    assert_eq!(OpenConnection::begin(&mesh, "/kept/not").1, "200");
    assert_eq!(refused(), before + 1);
    let logged = || {
        let is_denied = |line: &str| line.contains("\"dry_run_denied\":true");
        let line = mesh.orders[0].sidecar.process.line("a line of a dry-run denial", is_denied);
        serde_json::from_str::<Value>(&line).expect("the line is JSON")
    };
    // Each worker writes its own lines, so their order is undefined.
    let lines: Vec<Value> = std::iter::repeat_with(logged).take(2).collect();
    for line in lines {
        let by_deny_rule = line["path"] == "/kept/not";
        assert_eq!(line["dry_run_policy"].is_string(), by_deny_rule, "{line}");
    }
}

/// Runs `weft why` with a mesh file; checks its exit code and a part of its output.
fn why(mesh: &str, question: &[&str], code: i32, answer: &str) {
    let folder = tempfile::tempdir().expect("a temporary folder can be created");
    let file = folder.path().join("mesh.yaml");
    std::fs::write(&file, mesh).expect("the folder is writable");
    let output = weft()
        .arg("why")
        .arg("-c")
        .arg(&file)
        .args(question)
        .output()
        .expect("weft can be started");
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8(printed).expect("the output is UTF-8");
    assert_eq!(output.status.code(), Some(code), "{question:?}: {printed}");
    assert!(printed.contains(answer), "{question:?}: {printed}");
}

/// Runs `weft why` with a question whose arguments contain no spaces.
fn check_why(mesh: &str, question: &str, code: i32, answer: &str) {
    let words: Vec<&str> = question.split_whitespace().collect();
    why(mesh, &words, code, answer);
}

#[test]
fn why_reports_the_deciding_policy() {
    let check = |question: &str, code: i32, answer: &str| check_why(MESH, question, code, answer);
    let no = "no policy of orders allows the request";
    let named = "allowed: security.policies[0].allow[0] (orders.allow[0] in access logs)";
    check("web orders:80", 0, named);
    check("web orders:80 POST /", 1, no);
    check("web orders:80 GET /admin/x", 1, "denied: security.policies[0].deny[0]");
    check("spiffe://mesh.test/ns/ops/sa/anna orders:80 DELETE /any", 0, "policies[0].allow[1]");
    check("spiffe://mesh.test/ns/opsy/sa/anna orders:80 DELETE /any", 1, no);
    check("spiffe://other.test/ns/ops/sa/anna orders:80 DELETE /any", 1, no);
    check("batch orders:80 GET /reports", 1, "no token of issuer login");
    check("batch orders:80 GET /reports --token login", 1, no);
    check("batch orders:80 GET /reports --token login --claim role=reader", 0, "allow[2]");
    check("batch orders:80 GET /reports/7?full --token login --claim role=admin", 0, "allow[2]");
    let clause = "security.policies[0].allow[3]";
    check("web orders:5432", 2, &format!("missing --address: {clause}"));
    check("web orders:5432 --address 10.2.0.7", 1, no);
    check("web orders:5432 --address 10.1.0.7", 0, "allowed: security.policies[0].allow[3]");
    check("batch orders:80 GET / --address 10.1.0.7", 1, no);
    check("batch web:80", 1, "no policy of web allows the request");
    check("web cache:80", 0, "service \"cache\" is outside the mesh; no policy is enforced");
    check("cache orders:80", 1, "denied: service \"cache\" has no identity: meshed: false");
    check("cache cache:80", 0, "no policy is enforced");
    check("web names:53", 1, "no policy of names allows the request");
    check("web names:54", 0, "allowed: UDP bypasses sidecars");
    check("web orders:80 get /items", 2, "methods are case-sensitive and sidecars answer 400");
    check("web orders:80 GET /x/../%61dmin", 1, "denied: security.policies[0].deny[0]");
    check("web orders:80 GET /x%2f..%2fadmin", 1, "denied: security.policies[0].deny[0]");
    check("web orders:80 GET /group%2Fproject", 0, "allowed: security.policies[0].allow[0]");
    check("web orders:80 DELETE /items/7", 1, "denied: security.policies[0].deny[1]");
    check("web orders:80 CONNECT /items", 2, "sidecars of the mesh answer CONNECT with 405");
    check("web orders:80 DELETE /items/7/x", 1, no);
    check("web orders:80 GET /hidden/x/y", 1, "denied: security.policies[0].deny[2]");
    check("web orders:80 GET /x/y.bak", 1, "denied: security.policies[0].deny[2]");
    check(
        "web orders:80 GET /watched",
        0,
        "dry_run policy would deny the request: security.policies[1].deny[0]",
    );
    check("bob orders:80", 2, "\"bob\" is not a service or a SPIFFE ID of the mesh");
    check("web order:80", 2, "\"order\" is not a service of the mesh: services are batch, cache");
    check("web orders:81", 2, "service orders has no port 81: must be one of 80, 5432");
    check("web orders", 2, "invalid destination \"orders\": must be SERVICE:PORT");
    check("batch orders:80 GET / --token no", 2, "unknown issuer \"no\"");
}

#[test]
fn why_evaluates_the_policies_of_each_destination_of_the_matching_route() {
    let check = |question: &str, code: i32, answer: &str| check_why(ROUTED, question, code, answer);
    check(
        "web orders:80 GET /v1/admin",
        0,
        "route: routes[0].rules[0] of route \"r\"\n\
         destination: orders:80, path \"/v1/admin\" rewritten to \"/v2/admin\"\n\
         allowed: security.policies[0].allow[0] (orders.allow[0] in access logs)\n",
    );
    check("web orders:80 GET /v1/secret", 1, "denied: security.policies[0].deny[0]");
    check(
        "web orders:80 GET /split",
        1,
        "destination: orders:80, weight 9 of 10, path \"/split\" unchanged\n\
         allowed: security.policies[0].allow[0] (orders.allow[0] in access logs)\n\
         destination: canary:80, weight 1 of 10, path \"/split\" unchanged\n\
         denied: no policy of canary allows the request\n\
         weft: denied at 1 of 2 destinations: canary:80\n",
    );
    check(
        "web orders:80 GET /old",
        0,
        "redirected: 301 to host \"new.test\"; the request reaches no service",
    );
    check("web orders:80 GET /v2/x", 0, "route: no rule matches; the request is sent to orders:80");
    check("web canary:80 GET /x", 1, "denied: no policy of canary allows the request");
    check("web orders:80 GET /hosts --header host=a.test", 1, "destination: canary:80");
}

#[test]
fn sidecars_decide_on_a_rewritten_path_as_why_prints() {
    let mut mesh = mesh();
    let allow = json!([{"from": ["web"], "paths": ["/old", "/new"]}]);
    let deny = json!([{"from": ["*"], "ports": [STREAMS], "paths": ["/old/admin", "/new/secret"]}]);
    let filter = json!({"type": "URLRewrite", "urlRewrite": {"path":
        {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}}});
    mesh.change(|file| {
        file.policy("orders").replace(json!({"service": "orders", "allow": allow, "deny": deny}));
        let rule = json!({"matches": [{"path": {"value": "/old"}, "method": "get"}],
            "filters": [filter], "backendRefs": [{"name": "orders", "port": STREAMS}]});
        let parent = json!({"name": "orders", "port": STREAMS});
        file.set("routes", json!([{"name": "r", "parentRefs": [parent], "rules": [rule]}]));
    });
    let status = |path: &str| OpenConnection::begin(&mesh, path).1;
    eventually("the route and the policy are in force", || {
        (status("/old/secret") == "403" && status("/old/admin") == "200").then_some(())
    });
    let text = std::fs::read_to_string(mesh.file("mesh.yaml")).expect("the mesh has a file");
    let callee = format!("orders:{STREAMS}");
    for path in ["/old/admin", "/old/secret", "/x/../old/%73ecret", "/new/secret", "/new", "/other"]
    {
        let is_refused = status(path) == "403";
        let answer = if is_refused { "denied: " } else { "allowed: " };
        why(&text, &["web", &callee, "GET", path], i32::from(is_refused), answer);
    }
}

#[test]
fn why_rejects_an_invalid_method_path_or_header() {
    let check = |words: &[&str], reason: &str| why(MESH, words, 2, reason);
    check(&["web", "orders:80", "G T", "/"], "must be a method name, such as GET");
    check(&["web", "orders:80", "", "/"], "must be a method name, such as GET");
    check(&["web", "orders:80", "GET", "items"], "must start with /");
    check(&["web", "orders:80", "GET", "http://orders/items"], "must start with /");
    check(&["web", "orders:80", "GET", "/a b"], "contain no whitespace and no #");
    check(&["web", "orders:80", "GET", "/a#b"], "contain no whitespace and no #");
    check(&["web", "orders:80", "GET", "*"], "* is for method OPTIONS");
    check(&["web", "orders:80", "GET", "/", "--header", "x y=1"], "invalid header name \"x y\"");
    why(ROUTED, &["web", "orders:80", "OPTIONS", "*"], 1, "no policy of orders allows the request");
}

const ROUTED: &str = r#"
trust_domain: mesh.test
service_ranges: [10.96.0.0/16]
services:
- {name: web, addresses: [10.96.0.1], ports: [{port: 80, protocol: http}], endpoints: [{address: 10.1.0.1}]}
- {name: orders, addresses: [10.96.0.2], ports: [{port: 80, protocol: http}], endpoints: [{address: 10.1.0.2}]}
- {name: canary, addresses: [10.96.0.3], ports: [{port: 80, protocol: http}], endpoints: [{address: 10.1.0.3}]}
routes:
- name: r
  parentRefs: [{name: orders}]
  rules:
  - matches: [{path: {value: /v1}, method: GET}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /v2}}}]
    backendRefs: [{name: orders, port: 80}]
  - matches: [{path: {value: /split}}]
    backendRefs: [{name: orders, port: 80, weight: 9}, {name: canary, port: 80}]
  - matches: [{path: {value: /old}}]
    filters: [{type: RequestRedirect, requestRedirect: {hostname: new.test, statusCode: 301}}]
- name: hosts
  parentRefs: [{name: orders}]
  hostnames: [a.test]
  rules:
  - backendRefs: [{name: canary, port: 80}]
security:
  policies:
  - service: orders
    allow: [{from: [web], paths: [/v1, /v2, /split]}]
    deny: [{from: ["*"], paths: [/v1/admin, /v2/secret]}]
"#;

const MESH: &str = r#"
trust_domain: mesh.test
service_ranges: [10.96.0.0/16]
services:
- {name: web, addresses: [10.96.0.1], ports: [{port: 80, protocol: http}], endpoints: [{address: 10.1.0.1}]}
- {name: batch, addresses: [10.96.0.3], ports: [{port: 80, protocol: http}], endpoints: [{address: 10.1.0.3}]}
- {name: cache, addresses: [10.96.0.4], meshed: false, ports: [{port: 80, protocol: tcp}], endpoints: [{address: 10.1.0.4}]}
- {name: names, addresses: [10.96.0.5], ports: [{port: 53, protocol: udp}, {port: 53, protocol: tcp}, {port: 54, protocol: udp}]}
- name: orders
  addresses: [10.96.0.2]
  ports: [{port: 80, target: 8080, protocol: http}, {port: 5432, protocol: tcp}]
  endpoints: [{address: 10.1.0.2}]
security:
  issuers:
    login: {issuer: "https://login", audiences: [orders], jwks_uri: "http://login/keys", jwks_address: "10.1.0.9:80"}
  policies:
  - service: orders
    allow:
    - {from: [web], methods: [GET]}
    - {from: ["spiffe://mesh.test/ns/ops/*"], ports: [80]}
    - {from: [batch], paths: [/reports], token: login, claims: {role: [reader, admin]}}
    - {from: [web], ports: [5432], from_addresses: [10.1.0.0/24]}
    deny:
    - {from: ["*"], ports: [80], paths: [/admin]}
    - {from: [web], ports: [80], methods: [delete], paths: ["/items/{id}"]}
    - {from: ["*"], ports: [80], paths: ["/hidden/*", "*.bak"]}
  - service: orders
    dry_run: true
    deny:
    - {from: [web], ports: [80], paths: [/watched]}
"#;
