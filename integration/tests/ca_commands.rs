//! Input that the `weft ca` commands refuse, and that a failed command leaves no file behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use tempfile::TempDir;
use weft_integration::process::{run, weft};

const WEB: &str = "spiffe://mesh.local/ns/default/sa/web";
const FOREIGN: &str = "spiffe://other.example/ns/default/sa/web";

/// A folder with a certificate authority for the trust domain `mesh.local`.
struct Folder(TempDir);

impl Folder {
    fn create() -> Self {
        let folder = Self(TempDir::new().expect("a temporary folder can be created"));
        run(weft().args(["ca", "init", "--state"]).arg(folder.path("state")));
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn ca(&self, arguments: &[&str]) -> Output {
        let [name, rest @ ..] = arguments else {
            unreachable!("the first argument is the command")
        };
        let mut command = weft();
        command.current_dir(self.0.path()).args(["ca", name, "--state", "state"]).args(rest);
        command.output().expect("the command can be started")
    }

    /// Runs a command, asserts its exit code, and returns its standard error.
    #[track_caller]
    fn ca_fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.ca(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// The number of certificates that the authority has issued.
    fn issued(&self) -> usize {
        let listed = String::from_utf8_lossy(&self.ca(&["list"]).stdout).into_owned();
        listed.lines().count() - 1
    }
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

#[test]
fn identity_of_another_trust_domain_gets_neither_token_nor_certificate() {
    let folder = Folder::create();
    for arguments in [&["token", FOREIGN][..], &["issue", FOREIGN, "--out", "web"]] {
        let refused = folder.ca_fails(2, arguments);
        assert!(refused.contains("its trust domain is \"other.example\""), "{refused}");
        assert!(refused.contains("this authority's is \"mesh.local\""), "{refused}");
    }
    assert!(!exists(&folder.path("web.pem")));
    assert!(!exists(&folder.path("web.key")));
    assert_eq!(folder.ca(&["token", WEB]).status.code(), Some(0));
}

#[test]
fn issue_that_cannot_write_both_files_writes_none_and_issues_nothing() {
    for taken in ["web.pem", "web.key"] {
        let folder = Folder::create();
        fs::write(folder.path(taken), "file of the user").expect("the folder is writable");
        let refused = folder.ca_fails(1, &["issue", WEB, "--out", "web"]);
        assert!(refused.contains(taken), "{refused}");
        for name in ["web.pem", "web.key"] {
            assert_eq!(exists(&folder.path(name)), name == taken, "{taken} existed before: {name}");
        }
        let content = fs::read_to_string(folder.path(taken)).expect("the file exists");
        assert_eq!(content, "file of the user");
        assert_eq!(folder.issued(), 0);
    }
}

#[test]
fn out_prefix_with_a_dot_is_kept_whole() {
    let folder = Folder::create();
    let issued = folder.ca(&["issue", WEB, "--out", "web.v1"]);
    assert_eq!(issued.status.code(), Some(0), "{issued:?}");
    assert!(exists(&folder.path("web.v1.pem")));
    assert!(exists(&folder.path("web.v1.key")));
    assert_eq!(folder.issued(), 1);
}
