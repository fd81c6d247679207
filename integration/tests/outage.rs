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
use weft_certs::tls::{self, LoadedIdentity};
use weft_certs::{TrustStore, validity};
use weft_integration::authority::{PemIdentity, TestAuthority};
use weft_integration::bootstrap::verify_mode;
use weft_integration::fake_clock::FakeClock;
use weft_integration::http1::Http1Client;
use weft_integration::load::{
    BackgroundLoad, LoadClient, OPAQUE_PORT, ask, curl, start_mesh_with_short_certificates,
};
use weft_integration::mesh::TestMesh;
use weft_integration::mesh_pki::{MeshPki, spiffe_id, text};
use weft_integration::origin_server::OriginServer;
use weft_integration::process::{run, tool, weft};
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};
use weft_integration::tls_client::{TlsClient, client_config};
use weft_integration::wait::{DEADLINE, eventually, pause, within_certificate_lifetime};
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
fn shown(mesh: &TestMesh, at: SocketAddr) -> Leaf {
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
fn sidecars(mesh: &TestMesh) -> impl Iterator<Item = &Host> {
    [&mesh.web].into_iter().chain(&mesh.orders).map(|workload| &workload.host)
}

fn shown_by_sidecars(mesh: &TestMesh) -> Vec<Leaf> {
    sidecars(mesh).map(|host| shown(mesh, (host.address, 8080).into())).collect()
}

fn shown_by_control(mesh: &TestMesh) -> Leaf {
    shown(mesh, (mesh.control_host().address, 15010).into())
}

/// How many certificates the authority has given out.
fn issued(mesh: &TestMesh) -> usize {
    let log = std::fs::read_to_string(mesh.file("state/audit.jsonl")).unwrap();
    log.lines().filter(|line| line.contains("\"event\":\"issued\"")).count()
}

#[test]
fn an_authority_that_is_away_is_not_missed() {
    let mut mesh = start_mesh_with_short_certificates();
    let (http, opaque, web) = (mesh.orders_at(80), mesh.orders_at(OPAQUE_PORT), mesh.web_at(80));
    let caller = &mesh.web.host;
    let files = [&mesh.identity.certificate, &mesh.identity.key].map(|file| text(file).to_owned());
    let load = BackgroundLoad(vec![
        LoadClient::over_new_connections("new connections of HTTP/1.1", caller, http),
        LoadClient::over_one_connection("a kept connection of HTTP/1.1", caller, http),
        LoadClient::new("HTTP/2", caller, move || curl(http, "http", &["--http2-prior-knowledge"])),
        LoadClient::over_new_connections(
            "new connections that are not ours to read",
            caller,
            opaque,
        ),
        LoadClient::over_one_connection(
            "a kept connection that is not ours to read",
            caller,
            opaque,
        ),
        LoadClient::new("a client without a sidecar", &mesh.client, move || {
            let [certificate, key] = &files;
            curl(web, "https", &["--insecure", "--cert", certificate, "--key", key])
        }),
    ]);
    load.during(|| stay_away(&mut mesh, &load));
    mesh.assert_healthy();
}

/// Has the authority away for as long as it may be.
fn stay_away(mesh: &mut TestMesh, load: &BackgroundLoad) {
    load.await_answers();
    let before = shown_by_sidecars(mesh);
    mesh.control.process.kill();
    let first_end = before.iter().map(|leaf| leaf.until).min().unwrap();
    within_certificate_lifetime("the first certificate is nearly over", || {
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
    let after = within_certificate_lifetime("everybody has a new certificate", || {
        let after = shown_by_sidecars(mesh);
        after.iter().zip(&before).all(|(after, before)| after.der != before.der).then_some(after)
    });
    let last_end = before.iter().map(|leaf| leaf.until).max().unwrap();
    within_certificate_lifetime("the certificates of before are over", || {
        (now() > last_end + Duration::from_secs(2)).then_some(())
    });
    load.await_answers();
    within_certificate_lifetime("the next certificates", || {
        let next = shown_by_sidecars(mesh);
        next.iter().zip(&after).all(|(next, after)| next.der != after.der).then_some(())
    });
    within_certificate_lifetime("the control plane has a new one itself", || {
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
fn start_callee(signer: &TestAuthority, clock: &FakeClock) -> SingleSidecar {
    let mut wanted =
        SingleSidecarConfig::for_upstream(OriginServer::start().port, UpstreamHttp::Http1);
    let server = signer.write_files("server", &signer.sign("server", DAY));
    wanted.tls = Some(verify_mode(&server, &signer.root(), &signer.crl_file()));
    let mut command = weft();
    command.args(["sidecar", "--workers", "1"]);
    clock.apply_to(&mut command);
    wanted.start_with_command(MeshPki::create(), command)
}

/// A client of the callee, with a certificate and with sessions to resume.
struct Caller {
    port: u16,
    whole: Arc<ClientConfig>,
    resuming: tls::ClientTls,
}

impl Caller {
    fn new(signer: &TestAuthority, callee: &SingleSidecar, life: Duration) -> Self {
        let holder = signer.sign("web", life);
        let identity =
            LoadedIdentity::load(holder.chain.as_bytes(), holder.key.as_bytes()).unwrap();
        let roots = signer.roots().as_bytes();
        let trust = TrustStore::load(roots, None, Vec::new(), None, UnixTime::now()).unwrap();
        let (names, alpn) = (vec![StringMatch::Exact(spiffe_id("server"))], ["http/1.1".into()]);
        let resuming = tls::ClientTls::new(
            Some(&identity),
            Arc::new(trust),
            names,
            &alpn,
            &TlsParameters::default(),
        )
        .unwrap();
        let whole = client_config(signer, &holder, "server", "http/1.1");
        Self { port: callee.port, whole, resuming }
    }

    /// A connection by a whole handshake that is let in and has had an answer.
    fn connect(&self) -> TlsClient {
        let mut caller = TlsClient::connect(self.port, &self.whole);
        assert_eq!(caller.ask("/"), Some(200));
        caller
    }

    /// Whether an earlier session is gone on with; none when the client is not served.
    fn resume(&self) -> Option<bool> {
        let mut caller = TlsClient::connect(self.port, self.resuming.config());
        (caller.ask("/") == Some(200)).then(|| caller.is_resumed())
    }

    /// Waits until a whole handshake is refused, and holds that a session does not help.
    fn await_refusal(&self) {
        eventually("a new handshake is refused", || {
            let refused = TlsClient::connect(self.port, &self.whole).handshake_result().err()?;
            assert_eq!(refused, Some(AlertDescription::CertificateExpired));
            Some(())
        });
        assert_eq!(self.resume(), None, "by an earlier session it would be let in");
    }

    /// Waits until it is let in, in both ways.
    fn await_service(&self) {
        eventually("a new handshake succeeds", || {
            TlsClient::connect(self.port, &self.whole).handshake_result().ok()
        });
        self.connect();
        assert!(self.resume().is_some());
    }
}

/// Holds that a sidecar with nothing to do does nothing.
fn assert_idle(callee: &SingleSidecar) {
    let (before, begun) = (callee.sidecar.cpu_time(), now());
    pause(Duration::from_secs(1));
    let took = callee.sidecar.cpu_time() - before;
    let of = now().duration_since(begun).unwrap();
    assert!(took < of / 2, "{took:?} of {of:?}");
}

#[test]
fn a_callee_whose_clock_goes_ahead_refuses_whose_time_is_over_until_it_is_right_again() {
    let (signer, clock) = (TestAuthority::create(), FakeClock::create());
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
    assert_eq!(
        callee.metric("weft_sidecar_connections_closed_total{reason=\"certificate_expired\"}"),
        2
    );
    // Others are not concerned.
    long.await_service();
    assert_eq!(kept.ask("/"), Some(200));
    assert_idle(&callee);

    clock.reset();
    brief.await_service();
    assert_eq!(kept.ask("/"), Some(200));
    // Once more, by far more than everybody's life.
    clock.set_ahead(1000 * DAY);
    brief.await_refusal();
    long.await_refusal();
    assert!(kept.ends_within(DEADLINE));
    assert_idle(&callee);
    clock.reset();
    brief.await_service();
    long.await_service();
    callee.assert_healthy();
}

#[test]
fn a_callee_whose_clock_goes_back_refuses_whose_time_has_not_come_until_it_is_right_again() {
    let (signer, clock) = (TestAuthority::create(), FakeClock::create());
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
        clock.reset();
        brief.await_service();
        assert_eq!(kept.ask("/"), Some(200));
    }
    assert_eq!(busy.exchange("lo").map(|(status, _)| status), Some(200));
    assert_eq!(
        callee.metric("weft_sidecar_connections_closed_total{reason=\"certificate_expired\"}"),
        0
    );
    callee.assert_healthy();
}

#[test]
fn a_list_that_comes_while_a_clock_is_back_holds_as_soon_as_it_is_right() {
    let (signer, clock) = (TestAuthority::create(), FakeClock::create());
    let callee = start_callee(&signer, &clock);
    let (revoked, other) = (signer.sign("web", DAY), signer.sign("web", DAY));
    let connect = |holder: &PemIdentity| {
        TlsClient::connect(callee.port, &client_config(&signer, holder, "server", "http/1.1"))
    };
    let mut kept = connect(&revoked);
    assert_eq!(kept.ask("/"), Some(200));
    clock.set_back(DAY);
    signer.revoke(&[&revoked.serial]);
    eventually("the list is of the future", || {
        callee.sidecar.process.errors().contains("in the future").then_some(())
    });
    clock.reset();
    assert!(kept.ends_within(DEADLINE));
    assert_eq!([&revoked, &other].map(|holder| connect(holder).ask("/")), [None, Some(200)]);
}

#[test]
fn a_caller_whose_clock_was_wrong_is_served_and_renews_as_soon_as_it_is_right() {
    let (mut mesh, clock) = (start_mesh_with_short_certificates(), FakeClock::create());
    let fresh = mesh.orders_at(OPAQUE_PORT);
    let ask_anew = |mesh: &TestMesh| mesh.web.host.on(|| curl(fresh, "http", &[])).unwrap();
    let asked = |mesh: &TestMesh, is_served: bool| {
        eventually(format!("a new connection is served: {is_served}"), || {
            (ask_anew(mesh).is_ok() == is_served).then_some(())
        });
    };
    let own = (mesh.web.host.address, 8080).into();
    let renewed = |mesh: &TestMesh, before: &Leaf| {
        within_certificate_lifetime("it has a new certificate", || {
            (shown(mesh, own).der != before.der).then_some(())
        });
    };

    // A machine that starts may not know yet what time it is.
    clock.set_ahead(1000 * DAY);
    mesh.web.sidecar.restart_with_clock(&clock);
    eventually("the certificate that it has is over by its clock", || {
        mesh.web.sidecar.process.errors().contains("no certificate yet").then_some(())
    });
    clock.reset();
    mesh.web.sidecar.wait_until_ready();
    asked(&mesh, true);
    let before = shown(&mesh, own);
    clock.set_back(DAY);
    mesh.web.sidecar.restart_with_clock(&clock);
    eventually("its certificate of before is not good yet by its clock", || {
        mesh.web
            .sidecar
            .process
            .errors()
            .contains("of an earlier run is not taken up")
            .then_some(())
    });
    assert!(ask_anew(&mesh).is_err());
    clock.reset();
    mesh.web.sidecar.wait_until_ready();
    asked(&mesh, true);
    renewed(&mesh, &before);
    let mut kept = mesh.web.host.on(|| Http1Client::connect_to(fresh)).unwrap();
    ask(&mut kept).expect("all is well");

    // Everybody's certificate is over by it, the control plane's as well: there is nobody to renew one.
    clock.set_ahead(1000 * DAY);
    asked(&mesh, false);
    eventually("what waits for requests is left", || {
        (mesh.ask_orders().status == 503).then_some(())
    });
    ask(&mut kept).expect("what has begun goes on");
    let complaint = "not renewed yet";
    within_certificate_lifetime("it tries to renew its certificate", || {
        mesh.web.sidecar.process.errors().contains(complaint).then_some(())
    });
    clock.reset();
    asked(&mesh, true);
    assert_eq!(mesh.ask_orders().status, 200);
    let before = shown(&mesh, own);
    renewed(&mesh, &before);

    // And no certificate's time has come.
    clock.set_back(DAY);
    asked(&mesh, false);
    ask(&mut kept).expect("nothing of it is over");
    clock.reset();
    asked(&mesh, true);
    let before = shown(&mesh, own);
    renewed(&mesh, &before);
    asked(&mesh, true);
    mesh.assert_healthy();
}
