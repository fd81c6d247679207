//! A certificate authority under faults: its store on a full disk or in a damaged file, its clock set wrong, and
//! unauthenticated clients on its port.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::json;
use tempfile::TempDir;
use weft_certs::validity;
use weft_integration::curl::{Curl, CurlResponse};
use weft_integration::fake_clock::FakeClock;
use weft_integration::mesh_pki::{TRUST_DOMAIN, spiffe_id, text};
use weft_integration::port;
use weft_integration::process::{Process, tool, weft};
use weft_integration::wait::{eventually, within_certificate_lifetime};

/// A certificate authority whose state folder is a small file system of its own.
struct Authority {
    folder: TempDir,
}

impl Authority {
    fn create() -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        let authority = Self { folder };
        fs::create_dir(authority.state()).expect("the state folder can be created");
        let size = Some("size=16m,mode=0700");
        mount(Some("tmpfs"), &authority.state(), Some("tmpfs"), MsFlags::empty(), size)
            .expect("the file system can be mounted");
        authority.ca_succeeds(&["init", "--trust-domain", TRUST_DOMAIN]);
        authority
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.state().join(name)
    }

    fn ca(&self, arguments: &[&str]) -> Output {
        let [name, rest @ ..] = arguments else {
            unreachable!("the first argument is the command")
        };
        let mut command = weft();
        command.args(["ca", name, "--state"]).arg(self.state()).args(rest);
        command.output().expect("the command can be started")
    }

    fn ca_succeeds(&self, arguments: &[&str]) -> String {
        let output = self.ca(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("the output is UTF-8")
    }

    /// Runs a command, asserts exit code 1, and returns its standard error.
    fn ca_fails(&self, arguments: &[&str]) -> String {
        let output = self.ca(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        String::from_utf8(output.stderr).expect("the errors are UTF-8")
    }

    /// Issues a certificate and returns its serial number.
    fn issue(&self, service: &str) -> String {
        let out = self.folder.path().join(service);
        let output = self.ca_succeeds(&["issue", &spiffe_id(service), "--out", text(&out)]);
        output.split(' ').next().expect("the output begins with the serial number").to_owned()
    }

    fn audited(&self, event: &str) -> usize {
        let log = fs::read_to_string(self.file("audit.jsonl")).expect("the audit log can be read");
        log.lines().filter(|line| line.contains(&format!("\"event\":\"{event}\""))).count()
    }

    fn write_mesh(&self, services: &[&str], revoked: &[&str]) {
        let service = |name: &&str| {
            json!({"name": name, "endpoints": [{"address": "10.0.0.1"}],
                "ports": [{"port": 80, "target": 8080, "protocol": "http"}]})
        };
        let services: Vec<_> = services.iter().map(service).collect();
        let file = json!({"trust_domain": TRUST_DOMAIN, "service_ranges": ["10.96.0.0/16"], "services": services,
            "security": {"revocations": revoked, "policies": []}});
        let part = self.folder.path().join("mesh.part");
        fs::write(&part, format!("{file:#}")).expect("the folder is writable");
        fs::rename(part, self.mesh()).expect("the mesh file can be replaced");
    }

    fn mesh(&self) -> PathBuf {
        self.folder.path().join("mesh.yaml")
    }

    fn command(&self, [listen, admin]: [u16; 2]) -> Command {
        let mut command = weft();
        command.args(["control", "--config", text(&self.mesh()), "--state", text(&self.state())]);
        command.args(["--listen", &format!("127.0.0.1:{listen}")]);
        command.args(["--admin", &format!("127.0.0.1:{admin}")]);
        command
    }

    fn start(&self) -> Control {
        self.start_with_clock(&FakeClock::create())
    }

    fn start_with_clock(&self, clock: &FakeClock) -> Control {
        let ports = [port::free(), port::free()];
        let mut command = self.command(ports);
        clock.apply_to(&mut command);
        let [listen, admin] = ports;
        let control = Control { process: Process::start("control", &mut command), listen, admin };
        control.wait_until_ready();
        control
    }

    /// Starts a sidecar of `web` with its own join token. Returns the process and its admin port.
    fn join(&self, control: &Control, name: &str) -> (Process, u16) {
        let token = self.folder.path().join(name).with_extension("token");
        fs::write(&token, self.ca_succeeds(&["token", &spiffe_id("web")]))
            .expect("the folder is writable");
        let root = self.folder.path().join("root.pem");
        fs::write(&root, self.ca_succeeds(&["roots"])).expect("the folder is writable");
        let admin = port::free();
        let mut command = weft();
        command.args(["sidecar", "--service", "web", "--workers", "1", "--trust", text(&root)]);
        command.args(["--control", &format!("127.0.0.1:{}", control.listen)]);
        command.args(["--join-token-file", text(&token), "--admin", &format!("127.0.0.1:{admin}")]);
        (Process::start(name, &mut command), admin)
    }

    /// Fills the file system completely.
    fn fill(&self) {
        let mut filler =
            fs::File::create(self.file("filler")).expect("the filler file can be created");
        for block in [64 * 1024, 4096, 1] {
            while filler.write_all(&vec![b'x'; block]).is_ok() {}
        }
    }

    fn free_space(&self) {
        fs::remove_file(self.file("filler")).expect("the filler file exists");
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        // Ignored: the mount disappears with the mount namespace of the test.
        let _unmounted = umount2(&self.state(), MntFlags::MNT_DETACH);
    }
}

struct Control {
    process: Process,
    listen: u16,
    admin: u16,
}

impl Control {
    fn ready(&self) -> CurlResponse {
        Curl::get(self.admin, "/ready").run()
    }

    fn wait_until_ready(&self) {
        eventually("the control plane is ready", || (self.ready().status == 200).then_some(()));
    }

    fn dump(&self) -> serde_json::Value {
        serde_json::from_slice(&Curl::get(self.admin, "/config_dump").run().body)
            .expect("the dump is JSON")
    }

    /// Validity period of the certificate that the control plane presents.
    fn certificate_validity(&self) -> (SystemTime, SystemTime) {
        let mut openssl = tool("openssl");
        openssl.args(["s_client", "-connect", &format!("127.0.0.1:{}", self.listen)]);
        let output = openssl
            .args(["-alpn", "h2"])
            .stdin(Stdio::null())
            .output()
            .expect("the command can be started");
        validity(
            &CertificateDer::from_pem_slice(&output.stdout)
                .expect("openssl prints the certificate"),
        )
        .expect("the certificate has a validity period")
    }

    fn resident_bytes(&self) -> u64 {
        let page = Curl::get(self.admin, "/metrics").run().text();
        let mut lines = page.lines();
        let line = lines.find_map(|line| line.strip_prefix("process_resident_memory_bytes "));
        line.expect("the page has the metric").parse().expect("the metric is a number")
    }

    fn logged(&self, text: &str) -> usize {
        self.process.errors().matches(text).count()
    }
}

#[test]
fn full_disk_fails_revocations_with_its_reason_and_store_recovers_with_space() {
    let authority = Authority::create();
    let [first, second, third] = ["first", "second", "third"].map(|name| authority.issue(name));
    authority.ca_succeeds(&["revoke", &first]);
    authority.write_mesh(&["web"], &[]);
    let mut control = authority.start();
    let list_number = control.dump()["revocation_list_number"].clone();

    authority.fill();
    let reason = eventually("a write fails because the disk is full", || {
        let output = authority.ca(&["token", &spiffe_id("web")]);
        (!output.status.success())
            .then(|| String::from_utf8(output.stderr).expect("the errors are UTF-8"))
    });
    assert!(reason.contains("No space left on device"), "{reason}");
    let reason = authority.ca_fails(&["revoke", &second]);
    assert!(reason.contains("No space left on device"), "{reason}");
    let answer = eventually("the control plane is not ready", || {
        Some(control.ready()).filter(|answer| answer.status == 503)
    });
    assert!(answer.text().contains("No space left on device"), "{answer:?}");
    // Changes that need no store still apply; a mesh file with a revocation that cannot be stored is rejected.
    authority.write_mesh(&["web", "api"], &[]);
    eventually("the change of services is applied", || {
        (control.dump()["services"] == json!(["api", "web"])).then_some(())
    });
    authority.write_mesh(&["web"], &[&third]);
    eventually("the mesh file is rejected", || {
        control.dump()["rejected"].to_string().contains(&third).then_some(())
    });
    let dump = control.dump();
    assert_eq!(dump["services"], json!(["api", "web"]), "the last good mesh file stays in force");
    assert_eq!(dump["revocation_list_number"], list_number, "the last CRL stays in force");
    assert_eq!(control.ready().status, 503);
    assert_eq!(
        control.logged("store failed: issuing and admin commands are paused"),
        1,
        "{}",
        control.process.errors()
    );

    authority.free_space();
    control.wait_until_ready();
    assert_eq!(control.logged("store available again"), 1, "{}", control.process.errors());
    let output = authority.ca_succeeds(&["revoke", &second]);
    assert_eq!(output.trim(), format!("{second} revoked"));
    eventually("the mesh file is applied", || {
        (control.dump()["services"] == json!(["web"])).then_some(())
    });
    let list = authority.ca_succeeds(&["list"]);
    for serial in [&first, &second, &third] {
        let line = list
            .lines()
            .find(|line| line.starts_with(serial.as_str()))
            .expect("the certificate is listed");
        assert!(line.contains("revoked"), "{line}");
    }
    authority.ca_succeeds(&["check"]);
    assert!(control.process.is_running() && control.logged("panicked") == 0);
}

#[test]
fn damaged_store_is_reported_with_its_backup_and_not_written_to() {
    let authority = Authority::create();
    let serial = authority.issue("web");
    authority.write_mesh(&["web"], &[]);
    drop(authority.start());
    let store = authority.file("weft.redb");
    let backup = authority.file("weft.redb.backup-1");
    let checked = authority.ca_succeeds(&["check"]);
    assert_eq!(checked.lines().filter(|line| line.contains(": good: ")).count(), 3, "{checked}");
    let whole = fs::read(&store).expect("the store can be read");
    let mut scattered = whole.clone();
    scattered.iter_mut().step_by(509).for_each(|byte| *byte ^= 0x55);
    let half = whole[..whole.len() / 2].to_vec();
    for bytes in [Vec::new(), half, scattered, vec![0; 4096], b"redb".to_vec()] {
        fs::write(&store, &bytes).expect("the store can be overwritten");
        for arguments in [&["list"][..], &["check"], &["revoke", &serial], &["crl"]] {
            let errors = authority.ca_fails(arguments);
            assert_restorable(&errors, &store, &backup);
        }
        let output = authority
            .command([port::free(), port::free()])
            .output()
            .expect("the command can be started");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_restorable(
            &String::from_utf8(output.stderr).expect("the errors are UTF-8"),
            &store,
            &backup,
        );
        assert_eq!(
            fs::read(&store).expect("the store can be read"),
            bytes,
            "the damaged store was written to"
        );
    }
    fs::copy(&backup, &store).expect("the backup can be copied");
    drop(authority.start());
    assert!(authority.ca_succeeds(&["list"]).contains(&serial));
    // A damaged backup is reported, and the next good one is recommended.
    fs::write(&backup, b"").expect("the backup can be overwritten");
    let errors = authority.ca_fails(&["check"]);
    assert!(errors.contains("backup-1: is empty") && errors.contains("backup-2: good"), "{errors}");
    fs::write(&store, b"").expect("the store can be overwritten");
    assert_restorable(
        &authority.ca_fails(&["list"]),
        &store,
        &authority.file("weft.redb.backup-2"),
    );
}

/// Asserts that the error is one message that names the file and the command that restores it.
fn assert_restorable(errors: &str, store: &Path, backup: &Path) {
    let restore = format!("cp -p {} {}", backup.display(), store.display());
    assert!(errors.contains(&restore), "{errors}");
    let lines = errors.lines().filter(|line| line.starts_with("weft: ")).count();
    assert_eq!(lines, errors.lines().count(), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
}

#[test]
fn mesh_changes_issue_no_certificate_and_operations_are_audited() {
    let authority = Authority::create();
    assert_eq!(authority.audited("authority_created"), 1);
    let serial = authority.issue("web");
    assert_eq!(authority.audited("issued"), 1);
    authority.ca_succeeds(&["crl"]);
    assert_eq!(authority.audited("lists_signed"), 1);
    let line = |serial: &str| {
        let list = authority.ca_succeeds(&["list"]);
        list.lines()
            .find(|line| line.starts_with(serial))
            .expect("the certificate is listed")
            .to_owned()
    };
    let words = |line: String| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let [_, state, issued, expires, revoked, id] = &words(line(&serial))[..] else {
        panic!("a line of `weft ca list` has six columns")
    };
    assert_eq!((state.as_str(), revoked.as_str()), ("good", "-"));
    assert_eq!(*id, spiffe_id("web"));
    assert!(issued.ends_with('Z') && expires.ends_with('Z') && issued < expires);
    authority.ca_succeeds(&["revoke", &serial]);
    let [_, state, _, _, revoked, _] = &words(line(&serial))[..] else {
        panic!("a line of `weft ca list` has six columns")
    };
    assert!(state == "revoked" && revoked.ends_with('Z') && revoked >= issued);

    authority.write_mesh(&["web"], &[]);
    let control = authority.start();
    assert_eq!(authority.audited("issued"), 2, "one more: the control plane's own certificate");
    for services in [&["web", "api"][..], &["api"], &["web"]] {
        authority.write_mesh(services, &[]);
        eventually("the change of services is applied", || {
            let in_force =
                control.dump()["services"].as_array().expect("the dump lists services").len();
            let named = control.dump()["services"].to_string();
            (in_force == services.len() && services.iter().all(|one| named.contains(one)))
                .then_some(())
        });
    }
    // A change of the CRL issues no certificate either.
    let listed_before = authority.ca_succeeds(&["list"]).lines().count();
    let number = control.dump()["revocation_list_number"].clone();
    authority.write_mesh(&["web"], &["0a"]);
    eventually("the new CRL is in force", || {
        (control.dump()["revocation_list_number"] != number || authority.audited("issued") > 2)
            .then_some(())
    });
    assert_eq!(authority.audited("issued"), 2);
    assert_eq!(authority.ca_succeeds(&["list"]).lines().count(), listed_before);
    // The control plane replaces its own certificate when that one is revoked.
    authority.ca_succeeds(&["revoke", "control"]);
    eventually("the control plane has a new certificate", || {
        (authority.audited("issued") == 3).then_some(())
    });
}

const DAY: Duration = Duration::from_secs(24 * 3600);

#[expect(clippy::disallowed_methods, reason = "the test compares with the real time")]
fn now() -> SystemTime {
    SystemTime::now()
}

fn is_ready(admin: u16) -> Option<()> {
    (Curl::get(admin, "/ready").run().status == 200).then_some(())
}

#[test]
fn clock_jump_ahead_suspends_signing_and_does_not_lock_out_data_planes() {
    let authority = Authority::create();
    let clock = FakeClock::create();
    authority.write_mesh(&["web"], &[]);
    let mut control = authority.start_with_clock(&clock);
    let before = control.certificate_validity();
    clock.set_ahead(DAY);
    eventually("the jump is noticed", || {
        (control.logged("clock jumped, signing paused") == 1).then_some(())
    });
    let (sidecar, admin) = authority.join(&control, "web");
    eventually("the sidecar is refused a certificate", || {
        sidecar.errors().contains("nothing is signed until it has been steady").then_some(())
    });
    let page = Curl::get(control.admin, "/metrics").run().text();
    assert!(page.contains("\nweft_clock_jumps_total 1\n"), "{page}");
    clock.reset();
    // The refused requests did not consume its join token.
    eventually("the sidecar is served", || is_ready(admin));
    assert_eq!(control.certificate_validity(), before);
    assert_eq!(authority.audited("issued"), 2, "one for the control plane, one for the sidecar");
    assert!(control.process.is_running() && control.logged("panicked") == 0);
}

#[test]
fn control_plane_started_a_day_ahead_reissues_certificate_and_crl_once_its_clock_is_right() {
    let authority = Authority::create();
    let clock = FakeClock::create();
    authority.write_mesh(&["web"], &[]);
    clock.set_ahead(DAY);
    let control = authority.start_with_clock(&clock);
    let (from, _) = control.certificate_validity();
    assert!(from > now() + DAY / 2, "the certificate is dated by the wrong clock");
    let number = control.dump()["revocation_list_number"].clone();
    let (sidecar, admin) = authority.join(&control, "web");
    eventually("the sidecar refuses the control plane", || {
        sidecar.errors().contains("no certificate yet").then_some(())
    });
    clock.reset();
    within_certificate_lifetime("the control plane has a certificate that is valid now", || {
        (control.certificate_validity().0 <= now()).then_some(())
    });
    within_certificate_lifetime("a new CRL is in force", || {
        (control.dump()["revocation_list_number"] != number).then_some(())
    });
    within_certificate_lifetime("the sidecar is served", || is_ready(admin));
}

/// Sends a gRPC request with the content of a file as its body to the control plane's port.
fn send(listen: u16, method: &str, body: &Path, options: &[&str]) -> CurlResponse {
    let curl = Curl::to(format!("https://127.0.0.1:{listen}/{method}"));
    let body = format!("@{}", text(body));
    let curl = curl.with(&["--insecure", "--http2", "--data-binary", &body]);
    let headers = ["--header", "content-type: application/grpc", "--header", "te: trailers"];
    curl.with(&headers).with(options).run()
}

const STREAM: &str =
    "envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";
const SECRETS: &str = "envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets";
const CERTIFICATE: &str = "istio.v1.auth.IstioCertificateService/CreateCertificate";
const MEBIBYTE: usize = 1024 * 1024;

/// Writes a gRPC message whose length prefix announces more bytes than follow.
fn unfinished_message(file: &Path, length: usize, sent: usize) {
    let length = u32::try_from(length).expect("the length fits into u32").to_be_bytes();
    fs::write(file, [&[0][..], &length, &vec![b'x'; sent]].concat())
        .expect("the folder is writable");
}

#[test]
fn unauthenticated_requests_are_refused_before_their_messages_are_read() {
    let authority = Authority::create();
    authority.write_mesh(&["web"], &[]);
    authority.issue("web");
    let mut control = authority.start();
    let [body, large] = ["body", "large"].map(|name| authority.folder.path().join(name));
    unfinished_message(&body, 62 * MEBIBYTE, 8192);
    unfinished_message(&large, 62 * MEBIBYTE, 48 * MEBIBYTE);
    let before = control.resident_bytes();
    for (method, code) in [(STREAM, "16"), (SECRETS, "16"), (CERTIFICATE, "7")] {
        let answer = send(control.listen, method, &body, &[]);
        assert_eq!(answer.header("grpc-status"), Some(code), "{method}: {answer:?}");
    }
    let token = ["--header", "authorization: Bearer 0a0b"];
    let answer = send(control.listen, CERTIFICATE, &body, &token);
    assert_eq!(answer.header("grpc-status"), Some("7"), "{answer:?}");
    // Most of these bytes never leave the client: the refusal resets their streams.
    std::thread::scope(|scope| {
        for method in [STREAM, SECRETS, CERTIFICATE, STREAM, CERTIFICATE, STREAM] {
            let listen = control.listen;
            let large = &large;
            scope.spawn(move || send(listen, method, large, &["--max-time", "5"]));
        }
    });
    // Messages of a client with a certificate are read up to the limit.
    let [certificate, key] =
        ["pem", "key"].map(|kind| authority.folder.path().join("web").with_extension(kind));
    let identity = ["--cert", text(&certificate), "--key", text(&key)];
    for method in [STREAM, SECRETS, CERTIFICATE] {
        let answer = send(control.listen, method, &body, &identity);
        assert_eq!(answer.header("grpc-status"), Some("8"), "{method}: {answer:?}");
        let message = answer.header("grpc-message").unwrap_or_default().replace("%20", " ");
        assert_eq!(message, "message of 65011712 bytes is larger than the limit of 16777216 bytes");
    }
    let grown = control.resident_bytes().saturating_sub(before);
    assert!(
        grown < 24 << 20,
        "the control plane grew by {grown} bytes for requests that it does not read"
    );
    assert!(control.process.is_running() && control.logged("panicked") == 0);
}

#[test]
fn address_that_uses_up_its_connections_does_not_keep_out_other_addresses() {
    let authority = Authority::create();
    authority.write_mesh(&["web"], &[]);
    let control = authority.start();
    let idle: Vec<TcpStream> = (0..600)
        .map(|_| {
            TcpStream::connect(("127.0.0.1", control.listen))
                .expect("the control plane accepts connections")
        })
        .collect();
    let body = authority.folder.path().join("body");
    unfinished_message(&body, 10, 0);
    for other in ["127.0.0.2", "127.0.0.3"] {
        let answer = eventually("another address is served", || {
            let options = ["--interface", other, "--max-time", "2"];
            Some(send(control.listen, STREAM, &body, &options)).filter(|answer| answer.exit == 0)
        });
        assert_eq!(answer.header("grpc-status"), Some("16"), "{answer:?}");
    }
    // The oldest of the idle connections was closed to admit the others.
    let mut first = idle.first().expect("there are idle connections");
    first.set_read_timeout(Some(Duration::from_secs(5))).expect("the timeout is not zero");
    assert_eq!(first.read(&mut [0]).unwrap_or_default(), 0);
}
