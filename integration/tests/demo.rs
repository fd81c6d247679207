//! The whole mesh of `weft demo`, with each of the ways in which its redirects may be installed.

use std::path::Path;

use tempfile::TempDir;
use weft_integration::process::weft;

/// A folder with links to these commands and no others.
fn only(commands: &[&str]) -> TempDir {
    let folder = TempDir::new().expect("a temporary folder can be made");
    for command in commands {
        let places = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
        let found =
            places.iter().map(|place| Path::new(place).join(command)).find(|path| path.exists());
        assert!(found.is_some(), "{command} is missing; run integration/setup");
        let Some(found) = found else { continue };
        std::os::unix::fs::symlink(found, folder.path().join(command))
            .expect("the folder takes links");
    }
    folder
}

/// Tells the story with these commands only, and expects every step to be as promised.
#[track_caller]
fn tells_its_story_with(commands: &[&str], arguments: &[&str], path: &str) {
    let tools = only(commands);
    let mut demo = weft();
    let output = demo.arg("demo").args(arguments).env("PATH", tools.path()).output();
    let output = output.expect("the demo can be started");
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{complained}");
    assert_eq!(said.lines().filter(|line| line.starts_with("  ok ")).count(), 14, "{said}");
    assert!(said.contains(&format!(" by the {path} path: ")), "{said}");
    assert!(said.ends_with("every step as promised\n"), "{said}");
}

#[test]
fn a_mesh_is_as_promised_where_there_is_neither_nft_nor_iptables() {
    tells_its_story_with(&["ip"], &[], "kernel");
}

#[test]
fn a_mesh_is_as_promised_by_nft() {
    tells_its_story_with(&["ip", "nft"], &["--backend", "nft"], "kernel");
}

#[test]
fn a_mesh_is_as_promised_when_the_agent_carries_every_flow() {
    tells_its_story_with(&["ip"], &["--path", "proxy"], "proxy");
}

#[test]
fn a_mesh_is_as_promised_by_iptables() {
    let tools = ["ip", "iptables", "ip6tables", "iptables-restore", "ip6tables-restore"];
    tells_its_story_with(&tools, &["--backend", "iptables"], "kernel");
}
