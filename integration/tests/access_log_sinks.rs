//! The sinks of the access log: standard output, standard error and files, as the configuration names them.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use weft_integration::bootstrap::any;
use weft_integration::http1;
use weft_integration::mesh_pki::{MeshPki, text};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

/// An access logger of Envoy.
fn logger(kind: &str, config: Value) -> Value {
    json!({"name": "log", "typed_config": any(&format!("envoy.extensions.access_loggers.{kind}"), config)})
}

fn file_logger(path: &Path) -> Value {
    logger("file.v3.FileAccessLog", json!({"path": text(path)}))
}

fn start(pki: MeshPki, loggers: Value) -> SingleSidecar {
    let port = ScriptedServer::echoing_heads().port;
    let config = SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1);
    config.with("access_log", loggers).start_with_pki(pki)
}

fn ask(sidecar: &SingleSidecar, path: &str) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nx-request-id: id-1\r\n\r\n");
    assert_eq!(http1::ask(sidecar.port, &request).status, 200);
}

/// The line of a request in a file.
fn line_in(file: &Path, path: &str) -> Value {
    eventually("the line is written", || {
        let lines = fs::read_to_string(file).unwrap_or_default();
        let line = lines.lines().find(|line| line.contains(&format!("\"path\":\"{path}\"")))?;
        serde_json::from_str(line).ok()
    })
}

#[test]
fn file_sink_gets_the_lines_and_standard_output_none_and_rotation_reopens_the_file() {
    let pki = MeshPki::create();
    let file = pki.path("access.log");
    let sidecar = start(pki, json!([file_logger(&file)]));
    ask(&sidecar, "/one");
    let line = line_in(&file, "/one");
    let fields = ["kind", "protocol", "request_id", "response_code_details", "upstream_cluster"];
    let expected = ["http", "HTTP/1.1", "id-1", "via_upstream", "service"];
    assert_eq!(fields.map(|field| &line[field]), expected, "{line}");
    let rotated = file.with_extension("1");
    fs::rename(&file, &rotated).expect("the file can be renamed");
    ask(&sidecar, "/two");
    line_in(&file, "/two");
    assert!(!fs::read_to_string(&rotated).expect("the file exists").contains("/two"));
    let printed = sidecar.sidecar.process.lines_so_far();
    assert!(printed.iter().all(|line| !line.starts_with('{')), "{printed:?}");
}

#[test]
fn standard_error_and_a_file_get_each_line_and_standard_output_none() {
    let pki = MeshPki::create();
    let file = pki.path("access.log");
    let loggers = json!([logger("stream.v3.StderrAccessLog", json!({})), file_logger(&file)]);
    let sidecar = start(pki, loggers);
    ask(&sidecar, "/one");
    line_in(&file, "/one");
    eventually("the line is on standard error", || {
        sidecar.sidecar.process.errors().contains("\"path\":\"/one\"").then_some(())
    });
    let printed = sidecar.sidecar.process.lines_so_far();
    assert!(printed.iter().all(|line| !line.starts_with('{')), "{printed:?}");
}

#[test]
fn requests_are_served_and_lines_counted_as_lost_while_the_file_cannot_be_opened() {
    let pki = MeshPki::create();
    let folder = pki.path("logs");
    let file = folder.join("access.log");
    let sidecar = start(pki, json!([file_logger(&file)]));
    ask(&sidecar, "/one");
    eventually("the lost line is counted and logged", || {
        let errors = sidecar.sidecar.process.errors();
        (sidecar.metric("weft_access_log_lost_lines_total") == 1
            && errors.contains("access log lines lost: write failed"))
        .then_some(())
    });
    fs::create_dir(&folder).expect("the folder can be created");
    ask(&sidecar, "/two");
    line_in(&file, "/two");
}
