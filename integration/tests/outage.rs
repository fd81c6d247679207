//! What keeps certificates in order may be away, or wrong: the authority, and the clock. Requests are
//! answered all the same, or as soon as it is there again.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at what it did not expect"
)]

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::{AlertDescription, ClientConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use weft::demo::hosts::Host;
use weft_certs::tls::{self, Identity};
use weft_certs::{TrustStore, validity};
use weft_integration::alone::{Alone, Speaks, Wanted};
use weft_integration::authority::{Holder, Signer};
use weft_integration::bootstrap::verify_mode;
use weft_integration::clock::Clock;
use weft_integration::http1::Client;
use weft_integration::load::{Asking, Load, OPAQUE_PORT, ask, curl, start_brief_mesh};
use weft_integration::mesh::Mesh;
use weft_integration::mesh_pki::{MeshPki, spiffe_id, text};
use weft_integration::origin::Origin;
use weft_integration::process::{run, tool, weft};
use weft_integration::tls_caller::{TlsCaller, caller};
use weft_integration::wait::{DEADLINE, eventually, in_due_time, pause};
use weft_model::{StringMatch, TlsParameters};

/// How long before the first certificate ends the authority is there again.
const IN_TIME: Duration = Duration::from_secs(10);

#[allow(clippy::disallowed_methods, reason = "a test happens now")]
fn now() -> SystemTime {
    SystemTime::now()
}

/// A certificate that somebody shows.
#[derive(Debug, PartialEq, Eq)]
struct Leaf {
    der: CertificateDer<'static>,
    until: SystemTime,
}

/// The certificate that somebody shows to the mesh's client.
fn shown(mesh: &Mesh, at: SocketAddr) -> Leaf {
    let mut openssl = tool("openssl");
    openssl.args(["s_client", "-connect", &at.to_string(), "-alpn", "h2"]);
    let (chain, key) = (text(&mesh.identity.certificate), text(&mesh.identity.key));
    openssl.args(["-cert", chain, "-cert_chain", chain, "-key", key]);
    openssl.stdin(Stdio::null());
    let said = mesh.client.on(|| run(&mut openssl)).unwrap();
    let der = CertificateDer::from_pem_slice(said.as_bytes()).expect("it shows one");
    let (_, until) = validity(&der).unwrap();
    Leaf { der, until }
}

/// The sidecars of `web` and `orders`, by their hosts.
fn sidecars(mesh: &Mesh) -> impl Iterator<Item = &Host> {
    [&mesh.web].into_iter().chain(&mesh.orders).map(|workload| &workload.host)
}

fn shown_by_sidecars(mesh: &Mesh) -> Vec<Leaf> {
    sidecars(mesh).map(|host| shown(mesh, (host.address, 8080).into())).collect()
}

fn shown_by_control(mesh: &Mesh) -> Leaf {
    shown(mesh, (mesh.control_host().address, 15010).into())
}

/// How many certificates the authority has given out.
fn issued(mesh: &Mesh) -> usize {
    let log = std::fs::read_to_string(mesh.file("state/audit.jsonl")).unwrap();
    log.lines().filter(|line| line.contains("\"event\":\"issued\"")).count()
}

#[test]
fn an_authority_that_is_away_is_not_missed() {
    let mut mesh = start_brief_mesh();
    let (http, opaque, web) = (mesh.orders_at(80), mesh.orders_at(OPAQUE_PORT), mesh.web_at(80));
    let caller = &mesh.web.host;
    let files = [&mesh.identity.certificate, &mesh.identity.key].map(|file| text(file).to_owned());
    let load = Load(vec![
        Asking::over_many("new connections of HTTP/1.1", caller, http),
        Asking::over_one("a kept connection of HTTP/1.1", caller, http),
        Asking::new("HTTP/2", caller, move || curl(http, "http", &["--http2-prior-knowledge"])),
        Asking::over_many("new connections that are not ours to read", caller, opaque),
        Asking::over_one("a kept connection that is not ours to read", caller, opaque),
        Asking::new("a client without a sidecar", &mesh.client, move || {
            let [certificate, key] = &files;
            curl(web, "https", &["--insecure", "--cert", certificate, "--key", key])
        }),
    ]);
    load.during(|| stay_away(&mut mesh, &load));
    mesh.assert_unharmed();
}

/// Has the authority away for as long as it may be.
fn stay_away(mesh: &mut Mesh, load: &Load) {
    load.await_answers();
    let before = shown_by_sidecars(mesh);
    mesh.control.process.kill();
    let first_end = before.iter().map(|leaf| leaf.until).min().unwrap();
    in_due_time("the first certificate is nearly over", || {
        (now() >= first_end - IN_TIME).then_some(())
    });
    load.await_answers();
    let complaints = [&mesh.web].into_iter().chain(&mesh.orders).map(|one| &one.sidecar.process);
    for process in complaints {
        assert!(process.errors().contains("not renewed yet"), "{process:?} missed nothing");
    }
    assert_eq!(shown_by_sidecars(mesh), before);
    mesh.control.restart();
    let control = shown_by_control(mesh);
    // Until all that was there before is over, and what came after it has been renewed as well.
    let after = in_due_time("everybody has a new certificate", || {
        let after = shown_by_sidecars(mesh);
        after.iter().zip(&before).all(|(after, before)| after.der != before.der).then_some(after)
    });
    let last_end = before.iter().map(|leaf| leaf.until).max().unwrap();
    in_due_time("the certificates of before are over", || {
        (now() > last_end + Duration::from_secs(2)).then_some(())
    });
    load.await_answers();
    in_due_time("the next certificates", || {
        let next = shown_by_sidecars(mesh);
        next.iter().zip(&after).all(|(next, after)| next.der != after.der).then_some(())
    });
    in_due_time("the control plane has a new one itself", || {
        (shown_by_control(mesh).der != control.der).then_some(())
    });
    load.await_answers();
    // Nobody asks for more than the life of its certificate wants.
    let issued = issued(mesh);
    assert!(issued < 40, "{issued} certificates for five who need some");
}

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A sidecar that goes by a clock of its own and takes whom the signer vouches for. Its service answers each
/// request when that has come whole.
fn start_callee(signer: &Signer, clock: &Clock) -> Alone {
    let mut wanted = Wanted::before(Origin::start().port, Speaks::Http1);
    let server = signer.files_of("server", &signer.sign("server", DAY));
    wanted.tls = Some(verify_mode(&server, &signer.root(), &signer.revocations()));
    let mut command = weft();
    command.args(["sidecar", "--workers", "1"]);
    clock.rule(&mut command);
    wanted.start_by(MeshPki::create(), command)
}

/// A client of the callee, with a certificate and with sessions to resume.
struct Caller {
    port: u16,
    whole: Arc<ClientConfig>,
    resuming: tls::Client,
}

impl Caller {
    fn new(signer: &Signer, callee: &Alone, life: Duration) -> Self {
        let holder = signer.sign("web", life);
        let identity = Identity::load(holder.chain.as_bytes(), holder.key.as_bytes()).unwrap();
        let roots = signer.roots().as_bytes();
        let trust = TrustStore::load(roots, None, Vec::new(), None, UnixTime::now()).unwrap();
        let (names, alpn) = (vec![StringMatch::Exact(spiffe_id("server"))], ["http/1.1".into()]);
        let resuming = tls::Client::new(
            Some(&identity),
            Arc::new(trust),
            names,
            &alpn,
            &TlsParameters::default(),
        )
        .unwrap();
        let whole = caller(signer, &holder, "server", "http/1.1");
        Self { port: callee.port, whole, resuming }
    }

    /// A connection by a whole handshake that is let in and has had an answer.
    fn connect(&self) -> TlsCaller {
        let mut caller = TlsCaller::connect(self.port, &self.whole);
        assert_eq!(caller.ask("/"), Some(200));
        caller
    }

    /// Whether an earlier session is gone on with; none when the client is not served.
    fn resume(&self) -> Option<bool> {
        let mut caller = TlsCaller::connect(self.port, self.resuming.config());
        (caller.ask("/") == Some(200)).then(|| caller.is_resumed())
    }

    /// Waits until a whole handshake is refused, and holds that a session does not help.
    fn await_refusal(&self) {
        eventually("a new handshake is refused", || {
            let refused = TlsCaller::connect(self.port, &self.whole).is_let_in().err()?;
            assert_eq!(refused, Some(AlertDescription::CertificateExpired));
            Some(())
        });
        assert_eq!(self.resume(), None, "by an earlier session it would be let in");
    }

    /// Waits until it is let in, in both ways.
    fn await_service(&self) {
        eventually("a new handshake succeeds", || {
            TlsCaller::connect(self.port, &self.whole).is_let_in().ok()
        });
        self.connect();
        assert!(self.resume().is_some());
    }
}

/// Holds that a sidecar with nothing to do does nothing.
fn assert_idle(callee: &Alone) {
    let (before, begun) = (callee.sidecar.processor_time(), now());
    pause(Duration::from_secs(1));
    let took = callee.sidecar.processor_time() - before;
    let of = now().duration_since(begun).unwrap();
    assert!(took < of / 2, "{took:?} of {of:?}");
}

#[test]
fn a_callee_whose_clock_goes_ahead_refuses_whose_time_is_over_until_it_is_right_again() {
    let (signer, clock) = (Signer::create(), Clock::right());
    let mut callee = start_callee(&signer, &clock);
    let [brief, long] = [30 * MINUTE, DAY].map(|life| Caller::new(&signer, &callee, life));
    assert_eq!(brief.resume().zip(brief.resume()), Some((false, true)));
    let [mut idle, mut busy, mut kept] = [brief.connect(), brief.connect(), long.connect()];
    busy.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhel");

    clock.set_ahead(40 * MINUTE);
    brief.await_refusal();
    // What it has open takes its leave, and what it has begun is finished: no timer has run out.
    assert!(idle.ends_within(DEADLINE));
    assert_eq!(busy.exchange("lo").map(|(status, _)| status), Some(200));
    assert!(busy.ends_within(DEADLINE));
    assert_eq!(callee.metric("weft_sidecar_connections_expired_total"), 2);
    // Others are not concerned.
    long.await_service();
    assert_eq!(kept.ask("/"), Some(200));
    assert_idle(&callee);

    clock.set_right();
    brief.await_service();
    assert_eq!(kept.ask("/"), Some(200));
    // Once more, by far more than everybody's life.
    clock.set_ahead(1000 * DAY);
    brief.await_refusal();
    long.await_refusal();
    assert!(kept.ends_within(DEADLINE));
    assert_idle(&callee);
    clock.set_right();
    brief.await_service();
    long.await_service();
    callee.assert_unharmed();
}

#[test]
fn a_callee_whose_clock_goes_back_refuses_whose_time_has_not_come_until_it_is_right_again() {
    let (signer, clock) = (Signer::create(), Clock::right());
    let mut callee = start_callee(&signer, &clock);
    let brief = Caller::new(&signer, &callee, 30 * MINUTE);
    assert_eq!(brief.resume().zip(brief.resume()), Some((false, true)));
    let [mut kept, mut busy] = [brief.connect(), brief.connect()];
    busy.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhel");

    // To the day before, and to where a clock begins that has lost its battery.
    let since_1970 = now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    for back in [DAY, since_1970 - MINUTE] {
        clock.set_back(back);
        brief.await_refusal();
        // Nothing is over, so what is open serves on.
        assert_eq!(kept.ask("/"), Some(200));
        assert_idle(&callee);
        clock.set_right();
        brief.await_service();
        assert_eq!(kept.ask("/"), Some(200));
    }
    assert_eq!(busy.exchange("lo").map(|(status, _)| status), Some(200));
    assert_eq!(callee.metric("weft_sidecar_connections_expired_total"), 0);
    callee.assert_unharmed();
}

#[test]
fn a_list_that_comes_while_a_clock_is_back_holds_as_soon_as_it_is_right() {
    let (signer, clock) = (Signer::create(), Clock::right());
    let callee = start_callee(&signer, &clock);
    let (revoked, other) = (signer.sign("web", DAY), signer.sign("web", DAY));
    let connect = |holder: &Holder| {
        TlsCaller::connect(callee.port, &caller(&signer, holder, "server", "http/1.1"))
    };
    let mut kept = connect(&revoked);
    assert_eq!(kept.ask("/"), Some(200));
    clock.set_back(DAY);
    signer.revoke(&[&revoked.serial]);
    eventually("the list is of the future", || {
        callee.sidecar.process.errors().contains("in the future").then_some(())
    });
    clock.set_right();
    assert!(kept.ends_within(DEADLINE));
    assert_eq!([&revoked, &other].map(|holder| connect(holder).ask("/")), [None, Some(200)]);
}

#[test]
fn a_caller_whose_clock_was_wrong_is_served_and_renews_as_soon_as_it_is_right() {
    let (mut mesh, clock) = (start_brief_mesh(), Clock::right());
    let fresh = mesh.orders_at(OPAQUE_PORT);
    let ask_anew = |mesh: &Mesh| mesh.web.host.on(|| curl(fresh, "http", &[])).unwrap();
    let asked = |mesh: &Mesh, is_served: bool| {
        eventually(format!("a new connection is served: {is_served}"), || {
            (ask_anew(mesh).is_ok() == is_served).then_some(())
        });
    };
    let own = (mesh.web.host.address, 8080).into();
    let renewed = |mesh: &Mesh, before: &Leaf| {
        in_due_time("it has a new certificate", || {
            (shown(mesh, own).der != before.der).then_some(())
        });
    };

    // A machine that starts may not know yet what time it is.
    clock.set_ahead(1000 * DAY);
    mesh.web.sidecar.restart_by(&clock);
    eventually("the certificate that it has is over by its clock", || {
        mesh.web.sidecar.process.errors().contains("no certificate yet").then_some(())
    });
    clock.set_right();
    mesh.web.sidecar.wait_until_ready();
    asked(&mesh, true);
    let before = shown(&mesh, own);
    clock.set_back(DAY);
    mesh.web.sidecar.restart_by(&clock);
    eventually("its certificate of before is not good yet by its clock", || {
        mesh.web
            .sidecar
            .process
            .errors()
            .contains("of an earlier run is not taken up")
            .then_some(())
    });
    assert!(ask_anew(&mesh).is_err());
    clock.set_right();
    mesh.web.sidecar.wait_until_ready();
    asked(&mesh, true);
    renewed(&mesh, &before);
    let mut kept = mesh.web.host.on(|| Client::connect_to(fresh)).unwrap();
    ask(&mut kept).expect("all is well");

    // Everybody's certificate is over by it, the control plane's as well: there is nobody to renew one.
    clock.set_ahead(1000 * DAY);
    asked(&mesh, false);
    eventually("what waits for requests is left", || {
        (mesh.ask_orders().status == 503).then_some(())
    });
    ask(&mut kept).expect("what has begun goes on");
    let complaint = "not renewed yet";
    in_due_time("it tries to renew its certificate", || {
        mesh.web.sidecar.process.errors().contains(complaint).then_some(())
    });
    clock.set_right();
    asked(&mesh, true);
    assert_eq!(mesh.ask_orders().status, 200);
    let before = shown(&mesh, own);
    renewed(&mesh, &before);

    // And no certificate's time has come.
    clock.set_back(DAY);
    asked(&mesh, false);
    ask(&mut kept).expect("nothing of it is over");
    clock.set_right();
    asked(&mesh, true);
    let before = shown(&mesh, own);
    renewed(&mesh, &before);
    asked(&mesh, true);
    mesh.assert_unharmed();
}
