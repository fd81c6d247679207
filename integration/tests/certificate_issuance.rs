//! Certificate issuance by a control plane: which requests are granted, and the content of the
//! certificates.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use weft::identity::{Enrolment, IdentitySource, control_dial};
use weft_certs::request::{self, CheckedRequest};
use weft_certs::tls::LoadedIdentity;
use weft_certs::{Authority, identity_of, validity};
use weft_control::issue::create_join_token;
use weft_control::store::Store;
use weft_integration::authority::PemIdentity;
use weft_integration::curl::Curl;
use weft_integration::mesh_pki::{TRUST_DOMAIN, spiffe_id, text};
use weft_integration::port;
use weft_integration::process::{Process, counterpart, run, weft};
use weft_integration::wait::eventually;
use weft_model::SpiffeId;
use weft_xds::authority::{SignError, request_certificate};
use weft_xds::dial::Dialer;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// The number of certificates whose serial numbers are compared.
const MANY: usize = 200;

/// A running control plane, with certificates and tokens that its authority issued before.
struct ControlPlane {
    process: Process,
    admin: u16,
    folder: TempDir,
    enrolment: Enrolment,
    runtime: Runtime,
    /// Of `web`, valid for a day.
    web: PemIdentity,
    /// Of `web`, expired an hour ago.
    expired: PemIdentity,
    /// Of `web`, valid for some seconds.
    brief: PemIdentity,
    /// A join token for `web`.
    token: String,
    /// A join token for `web` of another trust domain.
    foreign_token: String,
}

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).expect("the SPIFFE ID is valid")
}

fn web() -> SpiffeId {
    id(&spiffe_id("web"))
}

impl ControlPlane {
    fn start() -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        let state = folder.path().join("state");
        let files = Authority::create(TRUST_DOMAIN, now()).expect("the authority can be created");
        let store = Store::create(&state, TRUST_DOMAIN, &files).expect("the store can be created");
        let roots = files.root_certificate.clone().into_bytes();
        let authority = Authority::load(files, TRUST_DOMAIN).expect("the files hold an authority");
        let sign = |life: Duration, at: SystemTime| {
            let pending = request::make(&web()).expect("the request can be made");
            let asked = CheckedRequest::parse(&pending.request_pem).expect("the request is valid");
            let issued =
                authority.issue(&asked, life, at).expect("the authority signs the certificate");
            PemIdentity {
                chain: issued.chain.concat(),
                key: pending.key_pem.to_string(),
                serial: issued.serial,
            }
        };
        let valid = sign(DAY, now());
        let expired = sign(DAY / 24, now() - 2 * DAY / 24);
        let brief = sign(Duration::from_secs(4), now());
        let token_for = |wanted: &SpiffeId| {
            create_join_token(&store, wanted, now()).expect("the token can be created")
        };
        let foreign = id("spiffe://other.local/ns/default/sa/web");
        let token = token_for(&web());
        let foreign_token = token_for(&foreign);
        // Only one process may open the store.
        drop(store);
        write_mesh(folder.path(), &[]);
        let port = port::free();
        let admin = port::free();
        let mut command = weft();
        command.args(["control", "--config"]).arg(folder.path().join("mesh.yaml"));
        command.arg("--state").arg(&state);
        command.args(["--listen", &format!("127.0.0.1:{port}")]);
        command.args(["--admin", &format!("127.0.0.1:{admin}")]);
        let process = Process::start("control", &mut command);
        eventually("the control plane is ready", || {
            let is_ready = Curl::get(admin, "/ready").run().status == 200;
            (is_ready && TcpStream::connect(("127.0.0.1", port)).is_ok()).then_some(())
        });
        let source = IdentitySource { token_file: None, state: None };
        let control = format!("127.0.0.1:{port}");
        let enrolment = Enrolment { control, roots, identity: web(), source };
        let runtime = Runtime::new().expect("the runtime can be created");
        let web = valid;
        Self {
            process,
            admin,
            folder,
            enrolment,
            runtime,
            web,
            expired,
            brief,
            token,
            foreign_token,
        }
    }

    /// Connects with a client certificate, or without.
    fn dial(&self, identity: Option<&PemIdentity>) -> Dialer {
        let load = |identity: &PemIdentity| {
            LoadedIdentity::load(identity.chain.as_bytes(), identity.key.as_bytes())
                .expect("the identity is valid")
        };
        let identity = identity.map(load);
        control_dial(&self.enrolment, identity.as_ref(), "", None).expect("the root is valid")
    }

    /// Requests a certificate.
    fn ask(
        &self,
        identity: Option<&PemIdentity>,
        token: Option<&str>,
        request: &str,
    ) -> Result<Vec<String>, SignError> {
        let dial = self.dial(identity);
        self.runtime.block_on(request_certificate(&dial, request.to_owned(), token))
    }

    fn list_number(&self) -> u64 {
        let page = Curl::get(self.admin, "/metrics").run().text();
        weft_integration::metrics::metric(&page, "weft_control_crl_number")
    }

    /// Ends the control plane, so that its store can be read.
    fn end(&mut self) {
        let process = &mut self.process;
        assert!(process.is_running() && !process.errors().contains("panicked"), "{process:?}");
        process.kill();
    }

    /// Revokes the certificate of `web`, and waits until the control plane rejects it.
    fn revoke(&self) {
        let before = self.list_number();
        write_mesh(self.folder.path(), &[&self.web.serial]);
        eventually("a new CRL is in force", || (self.list_number() > before).then_some(()));
        let other = make_request(&id(&spiffe_id("admin")));
        eventually("a full handshake is rejected", || {
            // The request would be denied anyway.
            matches!(self.ask(Some(&self.web), None, &other), Err(SignError::Unavailable(_)))
                .then_some(())
        });
    }
}

fn write_mesh(folder: &Path, revoked: &[&str]) {
    let file = json!({
        "trust_domain": TRUST_DOMAIN,
        "service_ranges": ["10.96.0.0/16"],
        "services": [{"name": "web", "addresses": ["10.96.0.1"],
            "ports": [{"port": 80, "target": 8080, "protocol": "http"}],
            "endpoints": [{"address": "10.0.0.1"}]}],
        "security": {"revocations": revoked, "policies": []},
    });
    let part = folder.join("mesh.part");
    std::fs::write(&part, format!("{file:#}")).expect("the folder is writable");
    std::fs::rename(part, folder.join("mesh.yaml")).expect("a file can be renamed");
}

/// A certificate request for a SPIFFE ID.
fn make_request(wanted: &SpiffeId) -> String {
    request::make(wanted).expect("the request can be made").request_pem
}

/// Checks a certificate of `web` against the profile, whatever the request contained; returns its
/// serial number.
fn check_issued(name: &str, chain: &[String]) -> Vec<u8> {
    assert_eq!(chain.len(), 3, "{name}: leaf, intermediate, root");
    let leaf = chain.first().expect("the chain has a leaf");
    let der = CertificateDer::from_pem_slice(leaf.as_bytes()).expect("the certificate is valid");
    assert_eq!(identity_of(&der), Some(web()), "{name}");
    let (_, leaf) = X509Certificate::from_der(&der).expect("the certificate is valid");
    let names = leaf
        .subject_alternative_name()
        .expect("the extension is valid")
        .expect("the certificate has the extension");
    let own = spiffe_id("web");
    assert_eq!(names.value.general_names, [GeneralName::URI(&own)], "{name}: exactly one URI");
    assert_eq!(leaf.subject().to_string(), "CN=web", "{name}");
    let constraints = leaf
        .basic_constraints()
        .expect("the extension is valid")
        .expect("the certificate has the extension");
    assert!(!constraints.value.ca && !leaf.is_ca(), "{name}: not a CA");
    let usage = leaf
        .key_usage()
        .expect("the extension is valid")
        .expect("the certificate has the extension")
        .value;
    assert_eq!(usage.flags, 1, "{name}: key usage digitalSignature only");
    let purposes = leaf
        .extended_key_usage()
        .expect("the extension is valid")
        .expect("the certificate has the extension");
    let purposes = purposes.value;
    assert!(purposes.client_auth && purposes.server_auth, "{name}");
    assert!(!purposes.any && !purposes.code_signing && purposes.other.is_empty(), "{name}");
    let (from, until) = validity(&der).expect("the certificate has a validity");
    assert!(from <= now() && until <= now() + DAY, "{name}: valid for a day at most");
    assert!(until > now() + DAY / 2, "{name}");
    let serial = leaf.raw_serial();
    assert_eq!(serial.len(), 16, "{name}: 128 bits");
    assert!(serial.first().is_some_and(|first| *first < 0x80), "{name}: positive serial number");
    serial.to_vec()
}

/// The expected result of a request.
#[derive(Debug, Clone, Copy)]
enum IssuanceOutcome {
    Issued,
    Denied(&'static str),
    Invalid(&'static str),
    /// The control plane rejects the connection.
    CutOff,
}

use IssuanceOutcome::{CutOff, Denied, Invalid, Issued};

fn failure(
    name: &str,
    got: &Result<Vec<String>, SignError>,
    wanted: IssuanceOutcome,
) -> Option<String> {
    let is_right = match (got, wanted) {
        (Ok(chain), Issued) => {
            check_issued(name, chain);
            true
        }
        (Err(SignError::Denied(message)), Denied(reason))
        | (Err(SignError::Invalid(message)), Invalid(reason)) => message.contains(reason),
        (Err(SignError::Unavailable(_)), CutOff) => true,
        _ => false,
    };
    (!is_right).then(|| format!("{name}: {got:?}, expected {wanted:?}"))
}

fn assert_no_failures(failures: Vec<Option<String>>) {
    let all = failures.len();
    let failures: Vec<String> = failures.into_iter().flatten().collect();
    assert!(failures.is_empty(), "{} of {all}:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn certificate_has_only_the_spiffe_id_of_the_request() {
    let control = ControlPlane::start();
    run(counterpart("certificate_requests.py").arg(control.folder.path()).arg(spiffe_id("web")));
    let check = |name: &str, wanted: IssuanceOutcome| {
        let file = control.folder.path().join(name).with_extension("csr");
        let request = std::fs::read_to_string(file).expect("it was made");
        failure(name, &control.ask(Some(&control.web), None, &request), wanted)
    };
    const UNUSABLE: IssuanceOutcome = Invalid("the certificate request cannot be used");
    const NOT_ONE: IssuanceOutcome = Invalid("must ask for exactly one SPIFFE id");
    assert_no_failures(vec![
        check("p256", Issued),
        check("p384", Issued),
        check("ed25519", Issued),
        check("rsa2048", Issued),
        check("rsa1024", UNUSABLE),
        check("k1", UNUSABLE),
        check("authority", Issued),
        check("signs-certificates", Issued),
        check("signs-code", Issued),
        check("common-name", Issued),
        check("foreign", Denied("may only request a certificate for its own ID")),
        check("admin", Denied("may only request a certificate for its own ID")),
        check("two-uris", NOT_ONE),
        check("twice", NOT_ONE),
        check("host-beside", NOT_ONE),
        check("host-only", NOT_ONE),
        check("nameless", NOT_ONE),
        check("upper-case", NOT_ONE),
        check("dots", NOT_ONE),
        check("bad-signature", UNUSABLE),
        check("changed-name", UNUSABLE),
        check("cut-off", UNUSABLE),
        check("large", Invalid("larger than 64 KiB")),
        check("garbage", UNUSABLE),
        check("empty", UNUSABLE),
    ]);
}

#[test]
fn certificate_request_without_valid_proof_is_denied() {
    let control = ControlPlane::start();
    let ControlPlane { web: own, expired, token, foreign_token, .. } = &control;
    let stranger = weft_integration::authority::TestAuthority::create().sign("web", DAY);
    let good = make_request(&web());
    let admin = make_request(&id(&spiffe_id("admin")));
    let foreign = make_request(&id("spiffe://other.local/ns/default/sa/web"));
    let check = |name, identity, token, request: &str, wanted| {
        failure(name, &control.ask(identity, token, request), wanted)
    };
    const UNKNOWN: IssuanceOutcome = Denied("unknown, already used, or expired");
    let padded = format!("{token} ");
    let upper = token.to_uppercase();
    assert_no_failures(vec![
        check("no proof", None, None, &good, Denied("no client certificate and no join token")),
        check("an empty token", None, Some(""), &good, UNKNOWN),
        check("another token", None, Some("0a0b"), &good, UNKNOWN),
        check("half a token", None, token.get(..32), &good, UNKNOWN),
        check("a token in upper case", None, Some(&upper), &good, UNKNOWN),
        check("a token with a line break", None, Some("a\nb: c"), &good, Invalid("characters")),
        check("an expired certificate", Some(expired), None, &good, CutOff),
        check("an expired certificate and a token", Some(expired), Some(token), &good, CutOff),
        check("a certificate of another authority", Some(&stranger), None, &good, CutOff),
        check("a malformed request", None, Some(token), "nothing", Invalid("cannot be used")),
        check("a valid certificate", Some(own), None, &good, Issued),
        check(
            "the certificate of another workload",
            Some(own),
            None,
            &admin,
            Denied("may only request a certificate for its own ID"),
        ),
        check(
            "the certificate of another workload, with a token",
            Some(own),
            Some(token),
            &admin,
            Denied("may only request a certificate for its own ID"),
        ),
        check("a token with a space", None, Some(&padded), &good, UNKNOWN),
        check("a valid token", None, Some(token), &good, Issued),
        check("a token again", None, Some(token), &good, UNKNOWN),
        check(
            "a token of another trust domain",
            None,
            Some(foreign_token),
            &foreign,
            Invalid("trust domain"),
        ),
        check(
            "a token of another trust domain again",
            None,
            Some(foreign_token),
            &foreign,
            UNKNOWN,
        ),
    ]);
}

#[test]
fn join_token_is_valid_for_one_identity_only() {
    let control = ControlPlane::start();
    let admin = make_request(&id(&spiffe_id("admin")));
    let got = control.ask(None, Some(&control.token), &admin);
    assert_no_failures(vec![failure(
        "admin with web's token",
        &got,
        Denied("the join token is for"),
    )]);
    // A failed attempt uses the token up.
    let got = control.ask(None, Some(&control.token), &make_request(&web()));
    assert_no_failures(vec![failure(
        "web's token after the failed attempt",
        &got,
        Denied("already used"),
    )]);
}

#[test]
fn serial_numbers_are_random_and_unique() {
    let mut control = ControlPlane::start();
    let dial = control.dial(Some(&control.web));
    let mut serials = BTreeSet::new();
    for _ in 0..MANY {
        let asking = request_certificate(&dial, make_request(&web()), None);
        let chain = control.runtime.block_on(asking).expect("the certificate is issued");
        serials.insert(check_issued("one of many", &chain));
    }
    assert_eq!(serials.len(), MANY);
    // Each bit varies, except the two that keep a number positive and of full length.
    for bit in 2..128 {
        let is_set = |serial: &Vec<u8>| {
            serial.get(bit / 8).is_some_and(|byte| byte & (0x80 >> (bit % 8)) != 0)
        };
        let ones = serials.iter().filter(|serial| is_set(serial)).count();
        assert!((MANY / 5..=MANY * 4 / 5).contains(&ones), "bit {bit} is set in {ones}");
    }
    // The authority stores each certificate, so that each can be revoked.
    let state = control.folder.path().join("state");
    control.end();
    let listed = run(weft().args(["ca", "list", "--state", text(&state)]));
    for serial in &serials {
        let digits: String = serial.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(listed.contains(&digits), "{digits} is not listed");
    }
}

#[test]
fn revoked_workload_cannot_renew_its_certificate() {
    let control = ControlPlane::start();
    control.revoke();
    let got = control.ask(Some(&control.web), None, &make_request(&web()));
    assert_no_failures(vec![failure("a revoked certificate", &got, CutOff)]);
}

/// A dial function that returns an already open connection, once.
fn over_open(control: &ControlPlane, identity: &PemIdentity) -> Dialer {
    let open = control.runtime.block_on(control.dial(Some(identity)).open());
    let open = Arc::new(Mutex::new(Some(open.expect("the control plane accepts the connection"))));
    Dialer::new(move || {
        let open = open.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::pin(async move {
            open.ok_or_else(|| std::io::Error::other("the connection was used already"))
        })
    })
}

#[test]
fn open_connection_can_renew_before_revocation() {
    let control = ControlPlane::start();
    let dial = over_open(&control, &control.web);
    let got = control.runtime.block_on(request_certificate(&dial, make_request(&web()), None));
    assert_no_failures(vec![failure("an open connection", &got, Issued)]);
}

#[test]
fn revoked_workload_cannot_renew_over_an_open_connection() {
    let control = ControlPlane::start();
    let dial = over_open(&control, &control.web);
    control.revoke();
    let got = control.runtime.block_on(request_certificate(&dial, make_request(&web()), None));
    assert!(got.is_err(), "a revoked client received a certificate: {got:?}");
}

#[test]
fn expired_workload_cannot_renew_over_an_open_connection() {
    let control = ControlPlane::start();
    let dial = over_open(&control, &control.brief);
    let other = make_request(&id(&spiffe_id("admin")));
    eventually("a full handshake is rejected", || {
        let got = control.ask(Some(&control.brief), None, &other);
        matches!(got, Err(SignError::Unavailable(_))).then_some(())
    });
    let got = control.runtime.block_on(request_certificate(&dial, make_request(&web()), None));
    assert!(got.is_err(), "an expired client received a certificate: {got:?}");
}

#[expect(clippy::disallowed_methods, reason = "tests issue certificates for the current time")]
fn now() -> SystemTime {
    SystemTime::now()
}

/// Runs a `weft ca` command; returns its exit code and output.
fn ca(control: &ControlPlane, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = weft();
    let [name, rest @ ..] = arguments else { unreachable!("a command has a name") };
    command.args(["ca", name, "--state"]).arg(control.folder.path().join("state")).args(rest);
    let output = command.output().expect("weft can be started");
    let printed = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(printed).expect("the output is UTF-8"))
}

#[test]
fn ca_commands_apply_at_once_to_a_running_control_plane() {
    let control = ControlPlane::start();
    let number = || {
        let dump = Curl::get(control.admin, "/config_dump").run().text();
        let dump: serde_json::Value = serde_json::from_str(&dump).expect("the dump is JSON");
        dump["revocation_list_number"].as_u64().expect("the text is a number")
    };
    // A workload that joins with a token of the running control plane.
    let (code, token) = ca(&control, &["token", web().as_str()]);
    assert_eq!(code, Some(0), "{token}");
    let got = control
        .ask(None, Some(token.trim()), &make_request(&web()))
        .expect("the certificate is valid");
    assert!(!got.is_empty());
    let (_, all) = ca(&control, &["list"]);
    let mine =
        all.lines().find(|line| line.ends_with(web().as_str())).expect("the certificate is listed");
    let serial = mine.split(' ').next().expect("the line begins with the serial number").to_owned();

    let before = number();
    let since = now();
    let (code, printed) = ca(&control, &["revoke", "web"]);
    assert_eq!((code, printed.trim()), (Some(0), format!("{serial} revoked").as_str()));
    eventually("a new CRL is published", || (number() > before).then_some(()));
    let took = now().duration_since(since).expect("the clock does not go back");
    assert!(took < Duration::from_secs(1), "after {took:?}");
    let (_, printed) = ca(&control, &["revoke", &serial]);
    assert_eq!(printed.trim(), format!("{serial} already revoked"));
    let (code, printed) = ca(&control, &["revoke", "unknown"]);
    assert_eq!(code, Some(1), "{printed}");
    assert!(printed.contains("invalid target \"unknown\": must be the serial number"), "{printed}");
    let log = control.folder.path().join("state/audit.jsonl");
    let log = std::fs::read_to_string(log).expect("the audit log exists");
    for event in ["token_made", "issued", "revoked"] {
        assert!(log.contains(&format!("\"event\":\"{event}\"")), "{log}");
    }
    assert!(!log.contains(token.trim()), "the audit log contains no token");
}
