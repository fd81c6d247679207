//! `weft demo`, the demonstration mesh, with each backend that can install its redirects.

use std::path::Path;

use tempfile::TempDir;
use weft_integration::process::weft;

/// A folder with links to these commands only, used as `PATH`.
fn path_with_only(commands: &[&str]) -> TempDir {
    let folder = TempDir::new().expect("a temporary folder can be created");
    for command in commands {
        let folders = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
        let program =
            folders.iter().map(|folder| Path::new(folder).join(command)).find(|path| path.exists());
        assert!(program.is_some(), "{command} is missing; run integration/setup");
        let Some(program) = program else { continue };
        std::os::unix::fs::symlink(program, folder.path().join(command))
            .expect("a link can be created in the folder");
    }
    folder
}

/// Runs `weft demo` with only these commands in its `PATH`, and asserts that every step succeeds.
#[track_caller]
fn assert_demo_succeeds_with(commands: &[&str], arguments: &[&str], path: &str) {
    let tools = path_with_only(commands);
    let mut demo = weft();
    let output = demo.arg("demo").args(arguments).env("PATH", tools.path()).output();
    let output = output.expect("the demo can be started");
    let printed = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}\n{errors}");
    assert_eq!(printed.lines().filter(|line| line.starts_with("  ok ")).count(), 14, "{printed}");
    assert!(printed.contains(&format!(" by the {path} path: ")), "{printed}");
    assert!(printed.ends_with("all steps succeeded\n"), "{printed}");
}

#[test]
fn demo_succeeds_without_nft_and_iptables() {
    assert_demo_succeeds_with(&["ip"], &[], "kernel");
}

#[test]
fn demo_succeeds_with_nft_backend() {
    assert_demo_succeeds_with(&["ip", "nft"], &["--backend", "nft"], "kernel");
}

#[test]
fn demo_succeeds_with_proxy_path() {
    assert_demo_succeeds_with(&["ip"], &["--path", "proxy"], "proxy");
}

#[test]
fn demo_succeeds_with_iptables_backend() {
    let tools = ["ip", "iptables", "ip6tables", "iptables-restore", "ip6tables-restore"];
    assert_demo_succeeds_with(&tools, &["--backend", "iptables"], "kernel");
}
