//! Policies on paths against services that normalize paths in different ways: no spelling of a path
//! reaches a denied resource.

use serde_json::{Value, json};
use weft_integration::bootstrap::{any, require_token_with_fetched_keys};
use weft_integration::http1::{self, Http1Client};
use weft_integration::mesh_pki::text;
use weft_integration::nginx::Nginx;
use weft_integration::port;
use weft_integration::process::{Process, counterpart};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};

const SECRET: &str = "secret";

fn deny_admin() -> Value {
    let rules = json!({"action": "DENY", "policies": {"admin": {
        "permissions": [
            {"url_path": {"path": {"prefix": "/admin/"}}}, {"url_path": {"path": {"exact": "/admin"}}}],
        "principals": [{"any": true}]}}});
    let message = "envoy.extensions.filters.http.rbac.v3.RBAC";
    json!({"name": "rbac", "typed_config": any(message, json!({"rules": rules}))})
}

/// Paths that some services read as `/admin/secret`, and others as another path.
fn paths() -> Vec<String> {
    let starts = [
        "/",
        "//",
        "/./",
        "/x/../",
        "/x/..;/",
        "/x//../",
        "/%2e/",
        "/x/%2e%2e/",
        "/x%2f../",
        "/x%2f..%2f",
        "/..%2f",
        "/%2f",
        "/;/",
        "/;a=b/",
        "/x/%252e%252e/",
        "/x%252f..%252f",
        "/%2e%2e/",
        "/x%5c..%5c",
        "/public/..%2F",
    ];
    let names = [
        "admin",
        "%61dmin",
        "adm%69n",
        "%61%64%6d%69%6e",
        "%2561dmin",
        "admin;x=1",
        "admin%3b",
        "ADMIN",
    ];
    let ends = [
        "/secret",
        "//secret",
        "%2fsecret",
        "/./secret",
        "/x/../secret",
        "/%73ecret",
        ";a/secret",
        "%5csecret",
        "/secret?x=/public",
        "/%2e/secret",
        "%252fsecret",
    ];
    let mut paths = Vec::new();
    for start in starts {
        for name in names {
            paths.extend(ends.iter().map(|end| format!("{start}{name}{end}")));
        }
    }
    paths
}

fn ask(client: &mut Http1Client, port: u16, path: &str) -> http1::Http1Response {
    let answer = client.ask(&format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n"));
    if answer.broken || answer.header("connection").is_some_and(|value| value == "close") {
        *client = Http1Client::connect(port);
    }
    answer
}

/// Sidecars in front of a service, with the settings of a bootstrap file and of a mesh.
fn fronts(port: u16) -> Vec<(&'static str, SingleSidecar)> {
    let front = |settings: Value, normalize: bool| {
        let mut wanted =
            SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1).with_filter(deny_admin());
        wanted.weft_metadata = settings;
        if normalize {
            wanted = wanted.with("normalize_path", json!(true)).with("merge_slashes", json!(true));
        }
        wanted.start()
    };
    vec![
        ("a file", front(json!({}), false)),
        ("a file that normalizes", front(json!({}), true)),
        ("a mesh", front(json!({"path": "as_sent"}), false)),
    ]
}

#[track_caller]
fn check(name: &str, service: u16) {
    let paths = paths();
    let mut direct = Http1Client::connect(service);
    let reached: Vec<&String> =
        paths.iter().filter(|path| ask(&mut direct, service, path).body.contains(SECRET)).collect();
    // A service that serves nothing below /admin would prove nothing.
    assert!(!reached.is_empty(), "{name} serves nothing below /admin");
    for (settings, front) in fronts(service) {
        let mut client = Http1Client::connect(front.port);
        let mut served = 0;
        for path in &paths {
            let answer = ask(&mut client, front.port, path);
            assert!(
                !answer.body.contains(SECRET),
                "{name} behind {settings}: {path} reaches the denied resource"
            );
            served += usize::from(answer.status == 200);
        }
        // Rejecting every path would also pass the checks above.
        let public = ask(&mut client, front.port, "/public%2Fx//y").status;
        assert!(
            ![400, 403].contains(&public),
            "{name} behind {settings}: {public}, {served} served"
        );
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::TempDir::new().expect("a temporary folder can be created");
    std::fs::create_dir(folder.path().join("admin")).expect("the folder is writable");
    std::fs::write(folder.path().join("admin/secret"), SECRET).expect("the folder is writable");
    folder
}

fn check_service(which: &str) {
    let folder = folder();
    let port = port::free();
    let mut command = counterpart("decoding_services.py");
    command.args([which, &port.to_string(), text(folder.path())]);
    let process = Process::start(which, &mut command);
    process.line_with("ready");
    check(which, port);
}

#[test]
fn file_server_serves_no_spelling_of_a_denied_path() {
    check_service("files");
}

#[test]
fn wsgi_service_serves_no_spelling_of_a_denied_path() {
    check_service("wsgi");
}

#[test]
fn service_that_decodes_twice_serves_no_spelling_of_a_denied_path() {
    check_service("twice");
}

#[test]
fn service_that_cuts_parameters_serves_no_spelling_of_a_denied_path() {
    check_service("servlet");
}

#[test]
fn service_that_decodes_nothing_serves_no_spelling_of_a_denied_path() {
    check_service("raw");
}

#[test]
fn nginx_serves_no_spelling_of_a_denied_path() {
    let nginx = Nginx::start();
    std::fs::create_dir(nginx.file("admin")).expect("the folder is writable");
    nginx.serve("admin/secret", SECRET.as_bytes());
    check("nginx", nginx.port);
}

#[test]
fn token_is_required_where_any_reading_of_the_path_requires_it() {
    for settings in [json!({}), json!({"path": "as_sent"})] {
        let filter = require_token_with_fetched_keys("issuer", "audience", "service", "/admin");
        let mut wanted = SingleSidecarConfig::for_upstream(
            ScriptedServer::echoing_heads().port,
            UpstreamHttp::Http1,
        )
        .with_filter(filter);
        wanted.weft_metadata = settings;
        let front = wanted.start();
        for (path, status) in [
            ("/admin/x", 401),
            ("/x/..%2fadmin/x", 401),
            ("//admin", 401),
            ("/%2561dmin/x", 401),
            ("/x/..;/admin", 401),
            ("/public%2fx//y", 200),
        ] {
            let get = format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
            assert_eq!(http1::ask(front.port, &get).status, status, "{path}");
        }
    }
}
