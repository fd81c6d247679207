//! Loss of access lines when the reader of standard output does not keep up.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::process::Command;

use weft_integration::http1::Http1Client;
use weft_integration::mesh_pki::{MeshPki, text};
use weft_integration::process::{run, weft};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecarConfig, UpstreamHttp};
use weft_integration::wait::eventually;

/// More lines than the pipe and the queued blocks can hold.
const REQUESTS: usize = 12_000;

#[test]
fn lost_access_lines_are_counted_and_logged_once() {
    let pki = MeshPki::create();
    let pipe = pki.path("lines");
    run(Command::new("mkfifo").arg(&pipe));
    // GaugeGuard for reading and writing, so that neither open blocks until the other end is open.
    let reader =
        OpenOptions::new().read(true).write(true).open(&pipe).expect("the pipe can be opened");
    let mut command = Command::new("sh");
    let shell = format!(
        "exec {} sidecar --workers 1 \"$@\" > {}",
        text(weft().get_program().as_ref()),
        text(&pipe)
    );
    command.args(["-c", &shell, "sh"]);
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .start_with_command(pki, command);
    let mut client = Http1Client::connect(sidecar.port);
    let path = "x".repeat(400);
    let get = format!("GET /{path} HTTP/1.1\r\nhost: a\r\n\r\n");
    for _ in 0..REQUESTS {
        assert_eq!(
            client.ask(&get).status,
            200,
            "requests are served while no process reads the access lines"
        );
    }
    let lost = eventually("lost lines are counted", || {
        let lost = sidecar.metric("weft_access_log_lost_lines_total");
        (lost > 0).then_some(lost)
    });
    let lost = usize::try_from(lost).expect("the count fits into usize");
    assert!(lost < REQUESTS, "lost {lost} of {REQUESTS} access lines");
    let mut lines = BufReader::new(reader).lines();
    for number in 0..REQUESTS - lost {
        let line = lines.next().expect("another access line").expect("the pipe is open");
        assert!(line.contains(&path), "line {number}: {line}");
    }
    let message = "access log lines lost: output too slow";
    let logged = eventually("the loss is logged", || {
        let errors = sidecar.sidecar.process.errors();
        errors.lines().find(|line| line.contains(message)).map(str::to_owned)
    });
    assert!(logged.contains(&format!("lines={lost}")), "{lost}: {logged}");
    assert_eq!(sidecar.sidecar.process.errors().matches(message).count(), 1);
}
