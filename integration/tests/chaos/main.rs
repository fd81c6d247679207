//! Chaos test: traffic of every kind through a whole mesh while `mesh.yaml` changes continuously, every kind of process
//! is killed and restarted, certificates live for minutes and the root is rotated.
//!
//! A request may fail only because of a killed process:
//!
//! - a sidecar that got SIGKILL: requests that began before its process was gone. Later requests go to another
//!   endpoint, while the sidecar is down and while it starts;
//! - a program that got SIGKILL without notice, or the agent: requests in flight, and requests to it until the next
//!   process is ready. Each client has one request in flight. While one program of three is down, some of the
//!   requests that begin must be served.
//!
//! No request may fail because of a kill of the control plane, the SIGTERM of a sidecar, the end of a program whose
//! endpoint was removed from the mesh before, a change, a renewed certificate, or the rotation of the root. No flow
//! that the kernel forwards may fail because of a kill of the agent. At the end the mesh uses what it used at the
//! start: memory, threads, descriptors, conntrack entries, rules and routes.
//!
//! `WEFT_CHAOS_SECONDS` sets the duration; 300 is the full run with 500 changes and certificates that live for two
//! minutes. `WEFT_CHAOS_SEED` repeats the changes of an earlier run.

mod ca_rotation;
mod changes;
mod clients;
mod http2;
mod kills;
mod tally;
mod testbed;
mod usage;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use ca_rotation::Rotation;
use changes::MeshFile;
use kills::{KILLS, Killer, assert_not_panicked};
use tally::{KINDS, Tally, now};
use testbed::{ENDPOINTS, Testbed};
use usage::{Usage, shorten_conntrack};
use weft_integration::wait::{pause, within_certificate_lifetime};

/// Duration without `WEFT_CHAOS_SECONDS`, and of the full run.
const SECONDS: u64 = 30;
const FULL_SECONDS: u64 = 300;
/// Minimum number of changes in the full run.
const FULL_CHANGES: u64 = 500;
/// Minimum time between two changes.
const CHANGE_EVERY: Duration = Duration::from_millis(600);
/// Time without changes and kills before resource usage is measured.
const SETTLE_TIME: Duration = Duration::from_secs(3);

fn number_from(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().expect("the variable is a number"))
}

#[expect(clippy::print_stdout, reason = "the figures of a run are its result")]
fn report(text: &str) {
    println!("{text}");
}

/// Sets the flag on drop, so that threads also end when the test fails.
struct StopWhenDropped<'s>(&'s AtomicBool);

impl Drop for StopWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// The kills and the rotation of a run, and the resource usage before and after.
struct RunResult {
    kills: usize,
    rotation: String,
    is_rotated: bool,
    before: Usage,
    after: Usage,
}

/// Disturbs the mesh for this many seconds, and by each kill at least once, while the clients send traffic.
fn disturb(killer: &mut Killer<'_>, seconds: u64) -> RunResult {
    let tally = killer.tally;
    tally.begin();
    pause(SETTLE_TIME);
    let before = Usage::of(&killer.testbed.mesh);
    let certificate = killer.testbed.mesh.file("web-state/certificate.pem");
    let read = || std::fs::read(&certificate).expect("web has a certificate");
    let first = read();
    let begun = now();
    let stop = AtomicBool::new(false);
    let mut kills = 0;
    std::thread::scope(|scope| {
        let _stop = StopWhenDropped(&stop);
        let file = killer.file;
        let stop = &stop;
        scope.spawn(move || {
            while !stop.load(Relaxed) {
                let next = now() + CHANGE_EVERY;
                file.change();
                pause(next.saturating_duration_since(now()));
            }
        });
        // Kills are spread over the run, up to 40 s; on a slow machine they follow each other directly.
        let every = Duration::from_secs(seconds.min(40)) / u32::try_from(KILLS.len()).unwrap_or(1);
        let changes = seconds * FULL_CHANGES / FULL_SECONDS;
        while now() - begun < Duration::from_secs(seconds)
            || kills < KILLS.len()
            || file.changes() < changes
        {
            let next = now() + every;
            killer.rotation.advance(&killer.testbed.mesh);
            let kill = KILLS.iter().cycle().nth(kills).expect("the list repeats");
            report(&format!("{:.1?}: {kill:?}", tally.since(now())));
            killer.kill(*kill, kills / 2 % ENDPOINTS);
            kills += 1;
            pause(next.saturating_duration_since(now()));
        }
    });
    if seconds >= FULL_SECONDS {
        killer.rotation.complete(&killer.testbed.mesh);
    }
    within_certificate_lifetime("the certificate of web is renewed", || {
        (read() != first).then_some(())
    });
    killer.file.restore(&killer.testbed.mesh);
    tally.wait_until_all_served();
    pause(SETTLE_TIME);
    let after = Usage::of(&killer.testbed.mesh);
    let rotation = killer.rotation.progress();
    let is_rotated = killer.rotation.has_switched();
    RunResult { kills, rotation, is_rotated, before, after }
}

/// The number of certificates that the authority has issued.
fn issued(testbed: &Testbed) -> usize {
    let log = std::fs::read_to_string(testbed.mesh.file("state/audit.jsonl")).unwrap_or_default();
    log.lines().filter(|line| line.contains("\"event\":\"issued\"")).count()
}

/// The access lines of requests that failed for another reason than a killed process.
fn access_lines(testbed: &Testbed, failures: &str) -> String {
    let sidecars = [&testbed.mesh.web].into_iter().chain(&testbed.mesh.orders);
    let lines = sidecars.flat_map(|one| {
        let lines = one.sidecar.process.lines_so_far();
        lines.into_iter().map(|line| format!("{}: {line}\n", one.host.name))
    });
    let is_mentioned = |line: &String| {
        let mut requests = line.split('"').filter(|text| is_request(text));
        requests.any(|request| {
            let ends = [" ", ",", ":"];
            ends.iter().any(|end| failures.contains(&format!("{request}{end}")))
        })
    };
    lines.filter(is_mentioned).collect()
}

/// Whether a text of an access line identifies one request: a path or an authority that ends with a number.
fn is_request(text: &str) -> bool {
    let prefixes = ["/orders/", "/opaque/", "/chat/", "call-"];
    prefixes.iter().any(|prefix| text.starts_with(prefix))
}

#[test]
fn requests_fail_only_because_of_killed_processes_and_resource_usage_does_not_grow() {
    let seconds = number_from("WEFT_CHAOS_SECONDS").unwrap_or(SECONDS);
    let seed = number_from("WEFT_CHAOS_SEED").unwrap_or_else(|| std::process::id().into());
    report(&format!("{seconds} s of chaos, WEFT_CHAOS_SEED={seed}"));
    let mut testbed = Testbed::start(if seconds >= FULL_SECONDS { 2 } else { 1 });
    shorten_conntrack(&testbed.mesh);
    let file = MeshFile::of(&testbed.mesh, seed);
    let addresses = testbed.addresses();
    let tally = Tally::new();
    let run = std::thread::scope(|scope| {
        let _stop = StopWhenDropped(&tally.stop);
        clients::start(scope, &addresses, &tally);
        let rotation = Rotation::new();
        let mut killer = Killer { testbed: &mut testbed, tally: &tally, file: &file, rotation };
        disturb(&mut killer, seconds)
    });
    let changes = file.changes();
    let certificates = issued(&testbed);
    report(&format!("{changes} changes, {} kills, {certificates} certificates", run.kills));
    report(&format!("rotation of the root: {}", run.rotation));
    report(&format!("{}before:\n{}after:\n{}", tally.summary(), run.before, run.after));
    let unexpected: Vec<String> =
        KINDS.iter().filter_map(|kind| tally.failures(*kind).unexpected()).collect();
    let unexpected = unexpected.join("\n");
    assert!(unexpected.is_empty(), "{unexpected}\n{}", access_lines(&testbed, &unexpected));
    let growth = run.after.growth_since(&run.before);
    assert!(growth.is_empty(), "{growth:#?}");
    assert!(run.is_rotated, "{}", run.rotation);
    assert_not_panicked(&testbed.mesh.web.sidecar);
    testbed.use_client_certificate();
    testbed.mesh.assert_healthy();
}
