//! Who gets which certificate from a control plane, and what stands in it.

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
/// How many certificates must have serial numbers of their own.
const MANY: usize = 200;

/// A control plane that runs, and what its authority had given out before.
struct Control {
    process: Process,
    admin: u16,
    folder: TempDir,
    enrolment: Enrolment,
    runtime: Runtime,
    /// Of `web`, good for a day.
    web: PemIdentity,
    /// Of `web`, over since an hour.
    expired: PemIdentity,
    /// Of `web`, good for some seconds.
    brief: PemIdentity,
    /// Good once, for `web`.
    token: String,
    /// Good once, for `web` of another domain.
    foreign_token: String,
}

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).expect("an id")
}

fn web() -> SpiffeId {
    id(&spiffe_id("web"))
}

impl Control {
    fn start() -> Self {
        let folder = TempDir::new().expect("a folder");
        let state = folder.path().join("state");
        let files = Authority::create(TRUST_DOMAIN, now()).expect("an authority can be made");
        let store = Store::create(&state, TRUST_DOMAIN, &files).expect("the folder takes it");
        let roots = files.root_certificate.clone().into_bytes();
        let authority = Authority::load(files, TRUST_DOMAIN).expect("it is one");
        let sign = |life: Duration, at: SystemTime| {
            let pending = request::make(&web()).expect("a request");
            let asked = CheckedRequest::parse(&pending.request_pem).expect("a good one");
            let issued = authority.issue(&asked, life, at).expect("it signs");
            PemIdentity {
                chain: issued.chain.concat(),
                key: pending.key_pem.to_string(),
                serial: issued.serial,
            }
        };
        let (valid, expired) = (sign(DAY, now()), sign(DAY / 24, now() - 2 * DAY / 24));
        let brief = sign(Duration::from_secs(4), now());
        let token = |wanted: &SpiffeId| create_join_token(&store, wanted, now()).expect("a token");
        let foreign = id("spiffe://other.local/ns/default/sa/web");
        let (token, foreign_token) = (token(&web()), token(&foreign));
        // Only one process may have it open.
        drop(store);
        write_mesh(folder.path(), &[]);
        let (port, admin) = (port::free(), port::free());
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
        let runtime = Runtime::new().expect("a runtime can be made");
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

    /// The way to it, as somebody or as nobody.
    fn dial(&self, holder: Option<&PemIdentity>) -> Dialer {
        let load = |holder: &PemIdentity| {
            LoadedIdentity::load(holder.chain.as_bytes(), holder.key.as_bytes())
                .expect("an identity")
        };
        let identity = holder.map(load);
        control_dial(&self.enrolment, identity.as_ref(), "", None).expect("the root is one")
    }

    /// Asks it to sign a request.
    fn ask(
        &self,
        holder: Option<&PemIdentity>,
        token: Option<&str>,
        request: &str,
    ) -> Result<Vec<String>, SignError> {
        let dial = self.dial(holder);
        self.runtime.block_on(request_certificate(&dial, request.to_owned(), token))
    }

    fn list_number(&self) -> u64 {
        let page = Curl::get(self.admin, "/metrics").run().text();
        weft_integration::metrics::metric(&page, "weft_control_crl_number")
    }

    /// Ends it: its store may then be read.
    fn end(&mut self) {
        let process = &mut self.process;
        assert!(process.is_running() && !process.errors().contains("panicked"), "{process:?}");
        process.kill();
    }

    /// Revokes the certificate of `web`, and waits until the control plane takes it no more.
    fn revoke(&self) {
        let before = self.list_number();
        write_mesh(self.folder.path(), &[&self.web.serial]);
        eventually("a new list is in force", || (self.list_number() > before).then_some(()));
        let other = ours(&id(&spiffe_id("admin")));
        eventually("a whole handshake is refused", || {
            // It may not have that one anyway.
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
    std::fs::write(&part, format!("{file:#}")).expect("the folder takes files");
    std::fs::rename(part, folder.join("mesh.yaml")).expect("a file can be renamed");
}

/// A request of our own for an id.
fn ours(wanted: &SpiffeId) -> String {
    request::make(wanted).expect("a request").request_pem
}

/// Holds what a certificate of `web` must be, whatever was asked for; gives its serial number.
fn check_issued(name: &str, chain: &[String]) -> Vec<u8> {
    assert_eq!(chain.len(), 3, "{name}: leaf, intermediate, root");
    let leaf = chain.first().expect("there are three");
    let der = CertificateDer::from_pem_slice(leaf.as_bytes()).expect("a certificate");
    assert_eq!(identity_of(&der), Some(web()), "{name}");
    let (_, leaf) = X509Certificate::from_der(&der).expect("a certificate");
    let names = leaf.subject_alternative_name().expect("it can be read").expect("there is one");
    let own = spiffe_id("web");
    assert_eq!(names.value.general_names, [GeneralName::URI(&own)], "{name}: one URI, no more");
    assert_eq!(leaf.subject().to_string(), "CN=web", "{name}");
    let constraints = leaf.basic_constraints().expect("they can be read").expect("they are there");
    assert!(!constraints.value.ca && !leaf.is_ca(), "{name}: it is no authority");
    let usage = leaf.key_usage().expect("it can be read").expect("it is there").value;
    assert_eq!(usage.flags, 1, "{name}: its key is for signatures and nothing else");
    let purposes = leaf.extended_key_usage().expect("they can be read").expect("they are there");
    let purposes = purposes.value;
    assert!(purposes.client_auth && purposes.server_auth, "{name}");
    assert!(!purposes.any && !purposes.code_signing && purposes.other.is_empty(), "{name}");
    let (from, until) = validity(&der).expect("it has dates");
    assert!(from <= now() && until <= now() + DAY, "{name}: it lives for a day");
    assert!(until > now() + DAY / 2, "{name}");
    let serial = leaf.raw_serial();
    assert_eq!(serial.len(), 16, "{name}: 128 bits");
    assert!(serial.first().is_some_and(|first| *first < 0x80), "{name}: it is positive");
    serial.to_vec()
}

/// What must come of a request.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    Issued,
    Denied(&'static str),
    Invalid(&'static str),
    /// There is no talking to the control plane.
    CutOff,
}

use Outcome::{CutOff, Denied, Invalid, Issued};

fn fault(name: &str, got: &Result<Vec<String>, SignError>, wanted: Outcome) -> Option<String> {
    let is_right = match (got, wanted) {
        (Ok(chain), Issued) => {
            check_issued(name, chain);
            true
        }
        (Err(SignError::Denied(told)), Denied(reason))
        | (Err(SignError::Invalid(told)), Invalid(reason)) => told.contains(reason),
        (Err(SignError::Unavailable(_)), CutOff) => true,
        _ => false,
    };
    (!is_right).then(|| format!("{name}: {got:?}, not {wanted:?}"))
}

fn hold(faults: Vec<Option<String>>) {
    let all = faults.len();
    let faults: Vec<String> = faults.into_iter().flatten().collect();
    assert!(faults.is_empty(), "{} of {all}:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn what_a_request_asks_for_beyond_its_id_is_not_given() {
    let control = Control::start();
    run(counterpart("certificate_requests.py").arg(control.folder.path()).arg(spiffe_id("web")));
    let check = |name: &str, wanted: Outcome| {
        let file = control.folder.path().join(name).with_extension("csr");
        let request = std::fs::read_to_string(file).expect("it was made");
        fault(name, &control.ask(Some(&control.web), None, &request), wanted)
    };
    const UNUSABLE: Outcome = Invalid("the certificate request cannot be used");
    const NOT_ONE: Outcome = Invalid("must ask for exactly one SPIFFE id");
    hold(vec![
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
fn nobody_gets_a_certificate_without_proof() {
    let control = Control::start();
    let Control { web: own, expired, token, foreign_token, .. } = &control;
    let stranger = weft_integration::authority::TestAuthority::create().sign("web", DAY);
    let (good, admin) = (ours(&web()), ours(&id(&spiffe_id("admin"))));
    let foreign = ours(&id("spiffe://other.local/ns/default/sa/web"));
    let check = |name, holder, token, request: &str, wanted| {
        fault(name, &control.ask(holder, token, request), wanted)
    };
    const UNKNOWN: Outcome = Denied("unknown, was used before, or has expired");
    let padded = format!("{token} ");
    let upper = token.to_uppercase();
    hold(vec![
        check("nothing", None, None, &good, Denied("no client certificate and no join token")),
        check("an empty token", None, Some(""), &good, UNKNOWN),
        check("another token", None, Some("0a0b"), &good, UNKNOWN),
        check("half a token", None, token.get(..32), &good, UNKNOWN),
        check("a token in capitals", None, Some(&upper), &good, UNKNOWN),
        check("a token and a line", None, Some("a\nb: c"), &good, Invalid("characters")),
        check("a certificate that is over", Some(expired), None, &good, CutOff),
        check("that, and a token", Some(expired), Some(token), &good, CutOff),
        check("a certificate of others", Some(&stranger), None, &good, CutOff),
        check("a request that is none", None, Some(token), "nothing", Invalid("cannot be used")),
        check("a certificate", Some(own), None, &good, Issued),
        check("another's certificate", Some(own), None, &admin, Denied("may not have")),
        check("another's, with a token", Some(own), Some(token), &admin, Denied("may not have")),
        check("a token and a blank", None, Some(&padded), &good, UNKNOWN),
        check("a token", None, Some(token), &good, Issued),
        check("a token again", None, Some(token), &good, UNKNOWN),
        check("a token of others", None, Some(foreign_token), &foreign, Invalid("trust domain")),
        check("that again", None, Some(foreign_token), &foreign, UNKNOWN),
    ]);
}

#[test]
fn a_token_is_for_one_identity() {
    let control = Control::start();
    let admin = ours(&id(&spiffe_id("admin")));
    let got = control.ask(None, Some(&control.token), &admin);
    hold(vec![fault("admin by web's token", &got, Denied("the join token is for"))]);
    // Whoever tries what it is not for has had it.
    let got = control.ask(None, Some(&control.token), &ours(&web()));
    hold(vec![fault("web's token after that", &got, Denied("was used before"))]);
}

#[test]
fn serial_numbers_are_random_and_never_the_same() {
    let mut control = Control::start();
    let dial = control.dial(Some(&control.web));
    let mut serials = BTreeSet::new();
    for _ in 0..MANY {
        let asking = request_certificate(&dial, ours(&web()), None);
        let chain = control.runtime.block_on(asking).expect("it is signed");
        serials.insert(check_issued("one of many", &chain));
    }
    assert_eq!(serials.len(), MANY);
    // Each bit is now one and now zero, but for the two that keep a number positive and long.
    for bit in 2..128 {
        let is_set = |serial: &Vec<u8>| {
            serial.get(bit / 8).is_some_and(|byte| byte & (0x80 >> (bit % 8)) != 0)
        };
        let ones = serials.iter().filter(|serial| is_set(serial)).count();
        assert!((MANY / 5..=MANY * 4 / 5).contains(&ones), "bit {bit} is set in {ones}");
    }
    // The authority remembers each, so that each can be revoked.
    let state = control.folder.path().join("state");
    control.end();
    let listed = run(weft().args(["ca", "list", "--state", text(&state)]));
    for serial in &serials {
        let digits: String = serial.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(listed.contains(&digits), "{digits} is not remembered");
    }
}

#[test]
fn who_is_revoked_gets_no_certificate_anew() {
    let control = Control::start();
    control.revoke();
    let got = control.ask(Some(&control.web), None, &ours(&web()));
    hold(vec![fault("a certificate that is revoked", &got, CutOff)]);
}

/// A way that leads over a connection that is open already, once.
fn over_open(control: &Control, holder: &PemIdentity) -> Dialer {
    let open = control.runtime.block_on(control.dial(Some(holder)).open());
    let open = Arc::new(Mutex::new(Some(open.expect("it takes the connection"))));
    Dialer::new(move || {
        let open = open.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::pin(async move { open.ok_or_else(|| std::io::Error::other("it was used")) })
    })
}

#[test]
fn an_open_connection_serves_until_its_certificate_is_revoked() {
    let control = Control::start();
    let dial = over_open(&control, &control.web);
    let got = control.runtime.block_on(request_certificate(&dial, ours(&web()), None));
    hold(vec![fault("a connection that was opened before", &got, Issued)]);
}

#[test]
fn who_is_revoked_gets_no_certificate_over_an_open_connection_either() {
    let control = Control::start();
    let dial = over_open(&control, &control.web);
    control.revoke();
    let got = control.runtime.block_on(request_certificate(&dial, ours(&web()), None));
    assert!(got.is_err(), "a revoked client has a new certificate: {got:?}");
}

#[test]
fn who_has_expired_gets_no_certificate_over_an_open_connection_either() {
    let control = Control::start();
    let dial = over_open(&control, &control.brief);
    let other = ours(&id(&spiffe_id("admin")));
    eventually("a whole handshake is refused", || {
        let got = control.ask(Some(&control.brief), None, &other);
        matches!(got, Err(SignError::Unavailable(_))).then_some(())
    });
    let got = control.runtime.block_on(request_certificate(&dial, ours(&web()), None));
    assert!(got.is_err(), "who has expired has a new certificate: {got:?}");
}

#[allow(clippy::disallowed_methods, reason = "a test happens now")]
fn now() -> SystemTime {
    SystemTime::now()
}

/// What `weft ca` prints of an order, with its exit code.
fn ca(control: &Control, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = weft();
    let [name, rest @ ..] = arguments else { unreachable!("an order has a name") };
    command.args(["ca", name, "--state"]).arg(control.folder.path().join("state")).args(rest);
    let output = command.output().expect("it runs");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).expect("a text"))
}

#[test]
fn a_control_plane_that_runs_takes_orders_and_they_hold_at_once() {
    let control = Control::start();
    let number = || {
        let dump = Curl::get(control.admin, "/config_dump").run().text();
        let dump: serde_json::Value = serde_json::from_str(&dump).expect("it is JSON");
        dump["revocation_list_number"].as_u64().expect("a number")
    };
    // One who joins by a token that the running control plane makes.
    let (code, token) = ca(&control, &["token", web().as_str()]);
    assert_eq!(code, Some(0), "{token}");
    let got = control.ask(None, Some(token.trim()), &ours(&web())).expect("a certificate");
    assert!(!got.is_empty());
    let (_, all) = ca(&control, &["list"]);
    let mine = all.lines().find(|line| line.ends_with(web().as_str())).expect("it is listed");
    let serial = mine.split(' ').next().expect("a serial number").to_owned();

    let (before, since) = (number(), now());
    let (code, said) = ca(&control, &["revoke", "web"]);
    assert_eq!((code, said.trim()), (Some(0), format!("{serial} revoked").as_str()));
    eventually("a new list is published", || (number() > before).then_some(()));
    let took = now().duration_since(since).expect("time goes on");
    assert!(took < Duration::from_secs(1), "after {took:?}");
    let (_, said) = ca(&control, &["revoke", &serial]);
    assert_eq!(said.trim(), format!("{serial} already revoked"));
    let (code, said) = ca(&control, &["revoke", "nobody"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("invalid target \"nobody\": must be the serial number"), "{said}");
    let log = control.folder.path().join("state/audit.jsonl");
    let log = std::fs::read_to_string(log).expect("there is an audit log");
    for event in ["token_made", "issued", "revoked"] {
        assert!(log.contains(&format!("\"event\":\"{event}\"")), "{log}");
    }
    assert!(!log.contains(token.trim()), "a token is a secret");
}
