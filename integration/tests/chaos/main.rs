//! Chaos: traffic of every kind through a whole mesh, while `mesh.yaml` changes all the time, every kind of
//! process is killed and started again, certificates live for minutes and the root is rotated.
//!
//! A request may fail only at a killed process:
//!
//! - at a sidecar that is ended by SIGKILL: what was begun before its process was gone. Later requests go to
//!   another replica, while it is down as well as while it starts;
//! - at a program that is ended by SIGKILL without notice, or at the agent: what was in flight, and what is sent
//!   there until the next process is ready. Each client has one request in flight; of those begun meanwhile some
//!   must be served while one program of three is down.
//!
//! No request may fail for a kill of the control plane, for the SIGTERM of a sidecar, for a program that ends after
//! its replica was taken out of the mesh, for a change, for a renewed certificate, or for the rotation of the
//! root; and none that the kernel forwards for a kill of the agent. In the end the mesh uses what it used before:
//! memory, threads, descriptors, tracked connections, rules and routes.
//!
//! `WEFT_CHAOS_SECONDS` says for how long; 300 is the full run with 500 changes and certificates that live for two
//! minutes. `WEFT_CHAOS_SEED` repeats the changes of an earlier run.

mod ca_rotation;
mod changes;
mod clients;
mod http2;
mod kills;
mod stage;
mod tally;
mod usage;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use ca_rotation::Rotation;
use changes::MeshFile;
use kills::{KILLS, Killer, assert_sound};
use stage::{REPLICAS, Stage};
use tally::{KINDS, Tally, now};
use usage::{Usage, shorten_conntrack};
use weft_integration::wait::{pause, within_certificate_lifetime};

/// How long the mesh is disturbed when no environment variable says so, and in the full run.
const SECONDS: u64 = 30;
const FULL_SECONDS: u64 = 300;
/// How many changes the full run has at least.
const FULL_CHANGES: u64 = 500;
/// The time between two changes, which may take longer.
const CHANGE_EVERY: Duration = Duration::from_millis(600);
/// How long the mesh rests before what it uses is measured.
const REST: Duration = Duration::from_secs(3);

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().expect("the variable is a number"))
}

#[allow(clippy::print_stdout, reason = "the figures of a run are its result")]
fn report(text: &str) {
    println!("{text}");
}

/// Ends threads also when the test fails.
struct StopWhenDropped<'s>(&'s AtomicBool);

impl Drop for StopWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// What was done to the mesh, and what it used before and after.
struct Course {
    kills: usize,
    rotation: String,
    is_rotated: bool,
    before: Usage,
    after: Usage,
}

/// Disturbs the mesh for so long, at least by each kill once, while the clients send their traffic.
fn disturb(killer: &mut Killer<'_>, seconds: u64) -> Course {
    let tally = killer.tally;
    tally.begin();
    pause(REST);
    let before = Usage::of(&killer.stage.mesh);
    let certificate = killer.stage.mesh.file("web-state/certificate.pem");
    let read = || std::fs::read(&certificate).expect("web has a certificate");
    let first = read();
    let begun = now();
    let over = AtomicBool::new(false);
    let mut kills = 0;
    std::thread::scope(|scope| {
        let _over = StopWhenDropped(&over);
        let file = killer.file;
        let over = &over;
        scope.spawn(move || {
            while !over.load(Relaxed) {
                let next = now() + CHANGE_EVERY;
                file.change();
                pause(next.saturating_duration_since(now()));
            }
        });
        // Kills are spread over the time; on a slow machine they follow one another.
        let every = Duration::from_secs(seconds.min(40)) / u32::try_from(KILLS.len()).unwrap_or(1);
        let changes = seconds * FULL_CHANGES / FULL_SECONDS;
        while now() - begun < Duration::from_secs(seconds)
            || kills < KILLS.len()
            || file.changes() < changes
        {
            let next = now() + every;
            killer.rotation.advance(&killer.stage.mesh);
            let kill = KILLS.iter().cycle().nth(kills).expect("the list repeats");
            report(&format!("{:.1?}: {kill:?}", tally.since(now())));
            killer.kill(*kill, kills / 2 % REPLICAS);
            kills += 1;
            pause(next.saturating_duration_since(now()));
        }
    });
    if seconds >= FULL_SECONDS {
        killer.rotation.complete(&killer.stage.mesh);
    }
    within_certificate_lifetime("the certificate of web is renewed", || {
        (read() != first).then_some(())
    });
    killer.file.restore(&killer.stage.mesh);
    tally.await_all();
    pause(REST);
    let after = Usage::of(&killer.stage.mesh);
    let rotation = killer.rotation.progress();
    let is_rotated = killer.rotation.has_followed();
    Course { kills, rotation, is_rotated, before, after }
}

/// How many certificates the authority has issued.
fn issued(stage: &Stage) -> usize {
    let log = std::fs::read_to_string(stage.mesh.file("state/audit.jsonl")).unwrap_or_default();
    log.lines().filter(|line| line.contains("\"event\":\"issued\"")).count()
}

/// The access lines of the requests that failed otherwise than at a killed process.
fn access_lines(stage: &Stage, complaints: &str) -> String {
    let sidecars = [&stage.mesh.web].into_iter().chain(&stage.mesh.orders);
    let lines = sidecars.flat_map(|one| {
        let lines = one.sidecar.process.lines_so_far();
        lines.into_iter().map(|line| format!("{}: {line}\n", one.host.name))
    });
    let is_named = |line: &String| {
        let mut fields = line.split('"').filter(|field| is_request(field));
        fields.any(|field| {
            let ends = [" ", ",", ":"];
            ends.iter().any(|end| complaints.contains(&format!("{field}{end}")))
        })
    };
    lines.filter(is_named).collect()
}

/// Whether a field of an access line names one request: a path or an authority that ends with a number.
fn is_request(field: &str) -> bool {
    let named = ["/orders/", "/opaque/", "/chat/", "call-"];
    named.iter().any(|start| field.starts_with(start))
}

#[test]
fn requests_fail_only_at_killed_processes_and_nothing_grows() {
    let seconds = number("WEFT_CHAOS_SECONDS").unwrap_or(SECONDS);
    let seed = number("WEFT_CHAOS_SEED").unwrap_or_else(|| std::process::id().into());
    report(&format!("{seconds} s of chaos, WEFT_CHAOS_SEED={seed}"));
    let mut stage = Stage::start(if seconds >= FULL_SECONDS { 2 } else { 1 });
    shorten_conntrack(&stage.mesh);
    let (file, addresses, tally) =
        (MeshFile::of(&stage.mesh, seed), stage.addresses(), Tally::new());
    let course = std::thread::scope(|scope| {
        let _stop = StopWhenDropped(&tally.stop);
        clients::start(scope, &addresses, &tally);
        let rotation = Rotation::new();
        let mut killer = Killer { stage: &mut stage, tally: &tally, file: &file, rotation };
        disturb(&mut killer, seconds)
    });
    let changes = file.changes();
    let certificates = issued(&stage);
    report(&format!("{changes} changes, {} kills, {certificates} certificates", course.kills));
    report(&format!("rotation of the root: {}", course.rotation));
    report(&format!("{}before:\n{}after:\n{}", tally.summary(), course.before, course.after));
    let complaints: Vec<String> =
        KINDS.iter().filter_map(|kind| tally.failures(*kind).complaint()).collect();
    let complaints = complaints.join("\n");
    assert!(complaints.is_empty(), "{complaints}\n{}", access_lines(&stage, &complaints));
    let growth = course.after.growth_since(&course.before);
    assert!(growth.is_empty(), "{growth:#?}");
    assert!(course.is_rotated, "{}", course.rotation);
    assert_sound(&stage.mesh.web.sidecar);
    stage.use_identity_of_client();
    stage.mesh.assert_healthy();
}
