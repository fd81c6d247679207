//! Trust files and join token files on the command line with which a data plane can never get a certificate.

use std::fs;

use tempfile::TempDir;
use weft_integration::process::{Process, weft};
use weft_integration::wait::eventually;

#[test]
fn trust_file_without_a_certificate_is_a_usage_error() {
    let folder = TempDir::new().expect("a temporary folder can be created");
    let file = folder.path().join("root.pem");
    for content in ["", "no PEM", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
    {
        fs::write(&file, content).expect("the folder is writable");
        let mut command = weft();
        command.args(["sidecar", "--check-config", "--service", "web"]);
        command.args(["--control", "127.0.0.1:15010", "--trust"]).arg(&file);
        let output = command.output().expect("the command can be started");
        assert_eq!(output.status.code(), Some(2), "{content:?}: {output:?}");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains("must hold root certificates, PEM"), "{errors}");
    }
}

#[test]
fn join_token_file_that_cannot_be_read_is_logged() {
    let folder = TempDir::new().expect("a temporary folder can be created");
    let state = folder.path().join("state");
    let roots = folder.path().join("root.pem");
    let mut init = weft();
    init.args(["ca", "init", "--state"]).arg(&state).arg("--trust-file").arg(&roots);
    assert!(init.status().expect("the command can be started").success());
    let mut command = weft();
    command.args(["sidecar", "--workers", "1", "--service", "web", "--admin", "127.0.0.1:0"]);
    command.args(["--control", "127.0.0.1:1", "--trust"]).arg(&roots);
    command.arg("--join-token-file").arg(folder.path().join("missing"));
    let sidecar = Process::start("sidecar", &mut command);
    eventually("the failure is logged", || {
        let logged = sidecar.errors();
        (logged.contains("failed to read the join token file") && logged.contains("missing"))
            .then_some(())
    });
}
