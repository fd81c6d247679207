//! Outages of the certificate authority and wrong clocks: requests are served meanwhile, or as soon
//! as the cause is gone.

#![expect(clippy::unwrap_used, reason = "a test may panic on unexpected values")]

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
use weft_integration::tls_contexts::verify_mode;
use weft_integration::wait::{DEADLINE, eventually, pause, within_certificate_lifetime};
use weft_model::{StringMatch, TlsParameters};

/// How long before the expiry of the first certificate the authority starts again.
const BEFORE_EXPIRY: Duration = Duration::from_secs(10);

#[expect(clippy::disallowed_methods, reason = "certificates are compared with the current time")]
fn now() -> SystemTime {
    SystemTime::now()
}

/// A certificate that a server presents.
#[derive(Debug, PartialEq, Eq)]
struct PresentedCertificate {
    der: CertificateDer<'static>,
    until: SystemTime,
}

/// The certificate that a server presents to the mesh's client.
fn presented_certificate(mesh: &TestMesh, at: SocketAddr) -> PresentedCertificate {
    let mut openssl = tool("openssl");
    openssl.args(["s_client", "-connect", &at.to_string(), "-alpn", "h2"]);
    let chain = text(&mesh.identity.certificate);
    let key = text(&mesh.identity.key);
    openssl.args(["-cert", chain, "-cert_chain", chain, "-key", key]);
    openssl.stdin(Stdio::null());
    let printed = mesh.client.on(|| run(&mut openssl)).unwrap();
    let der = CertificateDer::from_pem_slice(printed.as_bytes())
        .expect("the server presents a certificate");
    let (_, until) = validity(&der).unwrap();
    PresentedCertificate { der, until }
}

/// The hosts of the sidecars of `web` and `orders`.
fn sidecars(mesh: &TestMesh) -> impl Iterator<Item = &Host> {
    [&mesh.web].into_iter().chain(&mesh.orders).map(|workload| &workload.host)
}

fn certificates_of_sidecars(mesh: &TestMesh) -> Vec<PresentedCertificate> {
    sidecars(mesh).map(|host| presented_certificate(mesh, (host.address, 8080).into())).collect()
}

fn certificate_of_control(mesh: &TestMesh) -> PresentedCertificate {
    presented_certificate(mesh, (mesh.control_host().address, 15010).into())
}

/// The number of certificates that the authority has issued.
fn issued(mesh: &TestMesh) -> usize {
    let log = std::fs::read_to_string(mesh.file("state/audit.jsonl")).unwrap();
    log.lines().filter(|line| line.contains("\"event\":\"issued\"")).count()
}

#[test]
fn authority_outage_shorter_than_a_certificate_fails_no_request() {
    let mut mesh = start_mesh_with_short_certificates();
    let http = mesh.orders_at(80);
    let opaque = mesh.orders_at(OPAQUE_PORT);
    let web = mesh.web_at(80);
    let caller = &mesh.web.host;
    let files = [&mesh.identity.certificate, &mesh.identity.key].map(|file| text(file).to_owned());
    let load = BackgroundLoad(vec![
        LoadClient::over_new_connections("new HTTP/1.1 connections", caller, http),
        LoadClient::over_one_connection("one HTTP/1.1 connection", caller, http),
        LoadClient::new("HTTP/2", caller, move || curl(http, "http", &["--http2-prior-knowledge"])),
        LoadClient::over_new_connections("new TCP connections", caller, opaque),
        LoadClient::over_one_connection("one TCP connection", caller, opaque),
        LoadClient::new("a client without a sidecar", &mesh.client, move || {
            let [certificate, key] = &files;
            curl(web, "https", &["--insecure", "--cert", certificate, "--key", key])
        }),
    ]);
    load.during(|| stop_control_until_expiry(&mut mesh, &load));
    mesh.assert_healthy();
}

/// Stops the control plane for as long as certificates allow.
fn stop_control_until_expiry(mesh: &mut TestMesh, load: &BackgroundLoad) {
    load.await_answers();
    let before = certificates_of_sidecars(mesh);
    mesh.control.process.kill();
    let first_end = before.iter().map(|leaf| leaf.until).min().unwrap();
    within_certificate_lifetime("the first certificate is about to expire", || {
        (now() >= first_end - BEFORE_EXPIRY).then_some(())
    });
    load.await_answers();
    let complaints = [&mesh.web].into_iter().chain(&mesh.orders).map(|one| &one.sidecar.process);
    for process in complaints {
        assert!(
            process.errors().contains("certificate renewal failed"),
            "{process:?} logs failed renewals"
        );
    }
    assert_eq!(certificates_of_sidecars(mesh), before);
    mesh.control.restart();
    let control = certificate_of_control(mesh);
    // Waits until all earlier certificates have expired and their successors were renewed too.
    let after = within_certificate_lifetime("all sidecars have a new certificate", || {
        let after = certificates_of_sidecars(mesh);
        after.iter().zip(&before).all(|(after, before)| after.der != before.der).then_some(after)
    });
    let last_end = before.iter().map(|leaf| leaf.until).max().unwrap();
    within_certificate_lifetime("the earlier certificates have expired", || {
        (now() > last_end + Duration::from_secs(2)).then_some(())
    });
    load.await_answers();
    within_certificate_lifetime("the sidecars have the next certificates", || {
        let next = certificates_of_sidecars(mesh);
        next.iter().zip(&after).all(|(next, after)| next.der != after.der).then_some(())
    });
    within_certificate_lifetime("the control plane has a new certificate", || {
        (certificate_of_control(mesh).der != control.der).then_some(())
    });
    load.await_answers();
    // No workload requests more certificates than its renewal interval needs.
    let issued = issued(mesh);
    assert!(issued < 40, "{issued} certificates for five workloads");
}

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A sidecar with a fake clock that accepts clients of `signer`. Its service responds to each
/// complete request.
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

/// A client of the callee, with a certificate and TLS sessions to resume.
struct Caller {
    port: u16,
    full: Arc<ClientConfig>,
    resuming: tls::ClientTls,
}

impl Caller {
    fn new(signer: &TestAuthority, callee: &SingleSidecar, life: Duration) -> Self {
        let pem = signer.sign("web", life);
        let identity = LoadedIdentity::load(pem.chain.as_bytes(), pem.key.as_bytes()).unwrap();
        let roots = signer.roots().as_bytes();
        let trust = TrustStore::load(roots, None, Vec::new(), None, UnixTime::now()).unwrap();
        let names = vec![StringMatch::Exact(spiffe_id("server"))];
        let alpn = ["http/1.1".into()];
        let resuming = tls::ClientTls::new(
            Some(&identity),
            Arc::new(trust),
            names,
            &alpn,
            &TlsParameters::default(),
        )
        .unwrap();
        let full = client_config(signer, &pem, "server", "http/1.1");
        Self { port: callee.port, full, resuming }
    }

    /// Connects with a full handshake and gets a response.
    fn connect(&self) -> TlsClient {
        let mut caller = TlsClient::connect(self.port, &self.full);
        assert_eq!(caller.ask("/"), Some(200));
        caller
    }

    /// Whether a session is resumed; `None` when the client is not served.
    fn resume(&self) -> Option<bool> {
        let mut caller = TlsClient::connect(self.port, self.resuming.config());
        (caller.ask("/") == Some(200)).then(|| caller.is_resumed())
    }

    /// Waits until a full handshake is rejected, and checks that a session cannot be resumed.
    fn await_refusal(&self) {
        eventually("a full handshake is rejected", || {
            let refused = TlsClient::connect(self.port, &self.full).handshake_result().err()?;
            assert_eq!(refused, Some(AlertDescription::CertificateExpired));
            Some(())
        });
        assert_eq!(self.resume(), None, "a session cannot be resumed either");
    }

    /// Waits until the client is accepted with a full handshake and with a session.
    fn await_service(&self) {
        eventually("a full handshake succeeds", || {
            TlsClient::connect(self.port, &self.full).handshake_result().ok()
        });
        self.connect();
        assert!(self.resume().is_some());
    }
}

/// Checks that an idle sidecar uses no CPU.
fn assert_idle(callee: &SingleSidecar) {
    let before = callee.sidecar.cpu_time();
    let begun = now();
    pause(Duration::from_secs(1));
    let took = callee.sidecar.cpu_time() - before;
    let of = now().duration_since(begun).unwrap();
    assert!(took < of / 2, "{took:?} of CPU time in {of:?}");
}

#[test]
fn clock_set_ahead_rejects_expired_clients_until_it_is_corrected() {
    let signer = TestAuthority::create();
    let clock = FakeClock::create();
    let mut callee = start_callee(&signer, &clock);
    let [brief, long] = [30 * MINUTE, DAY].map(|life| Caller::new(&signer, &callee, life));
    assert_eq!(brief.resume().zip(brief.resume()), Some((false, true)));
    let [mut idle, mut busy, mut kept] = [brief.connect(), brief.connect(), long.connect()];
    busy.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhel");

    clock.set_ahead(40 * MINUTE);
    brief.await_refusal();
    // Open connections are drained and open requests finish: no timer has fired.
    assert!(idle.ends_within(DEADLINE));
    assert_eq!(busy.exchange("lo").map(|(status, _)| status), Some(200));
    assert!(busy.ends_within(DEADLINE));
    assert_eq!(
        callee.metric("weft_sidecar_connections_closed_total{reason=\"certificate_expired\"}"),
        2
    );
    // Clients with a longer validity are not affected.
    long.await_service();
    assert_eq!(kept.ask("/"), Some(200));
    assert_idle(&callee);

    clock.reset();
    brief.await_service();
    assert_eq!(kept.ask("/"), Some(200));
    // Again, with the clock ahead of every certificate's expiry.
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
fn clock_set_back_rejects_not_yet_valid_clients_until_it_is_corrected() {
    let signer = TestAuthority::create();
    let clock = FakeClock::create();
    let mut callee = start_callee(&signer, &clock);
    let brief = Caller::new(&signer, &callee, 30 * MINUTE);
    assert_eq!(brief.resume().zip(brief.resume()), Some((false, true)));
    let [mut kept, mut busy] = [brief.connect(), brief.connect()];
    busy.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhel");

    // One day back, and to where a clock starts after its battery failed.
    let since_1970 = now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    for back in [DAY, since_1970 - MINUTE] {
        clock.set_back(back);
        brief.await_refusal();
        // No certificate has expired, so open connections are served.
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
fn crl_received_while_the_clock_is_back_applies_once_it_is_corrected() {
    let signer = TestAuthority::create();
    let clock = FakeClock::create();
    let callee = start_callee(&signer, &clock);
    let revoked = signer.sign("web", DAY);
    let other = signer.sign("web", DAY);
    let connect = |identity: &PemIdentity| {
        TlsClient::connect(callee.port, &client_config(&signer, identity, "server", "http/1.1"))
    };
    let mut kept = connect(&revoked);
    assert_eq!(kept.ask("/"), Some(200));
    clock.set_back(DAY);
    signer.revoke(&[&revoked.serial]);
    eventually("the CRL is reported as not yet valid", || {
        callee.sidecar.process.errors().contains("in the future").then_some(())
    });
    clock.reset();
    assert!(kept.ends_within(DEADLINE));
    assert_eq!([&revoked, &other].map(|identity| connect(identity).ask("/")), [None, Some(200)]);
}

#[test]
fn caller_with_a_wrong_clock_renews_its_certificate_once_it_is_corrected() {
    let mut mesh = start_mesh_with_short_certificates();
    let clock = FakeClock::create();
    let fresh = mesh.orders_at(OPAQUE_PORT);
    let ask_anew = |mesh: &TestMesh| mesh.web.host.on(|| curl(fresh, "http", &[])).unwrap();
    let asked = |mesh: &TestMesh, is_served: bool| {
        eventually(format!("a new connection is served: {is_served}"), || {
            (ask_anew(mesh).is_ok() == is_served).then_some(())
        });
    };
    let own = (mesh.web.host.address, 8080).into();
    let renewed = |mesh: &TestMesh, before: &PresentedCertificate| {
        within_certificate_lifetime("the sidecar has a new certificate", || {
            (presented_certificate(mesh, own).der != before.der).then_some(())
        });
    };

    // A machine that starts may not know the time yet.
    clock.set_ahead(1000 * DAY);
    mesh.web.sidecar.restart_with_clock(&clock);
    eventually("the stored certificate has expired by its clock", || {
        mesh.web.sidecar.process.errors().contains("no certificate yet").then_some(())
    });
    clock.reset();
    mesh.web.sidecar.wait_until_ready();
    asked(&mesh, true);
    let before = presented_certificate(&mesh, own);
    clock.set_back(DAY);
    mesh.web.sidecar.restart_with_clock(&clock);
    eventually("the stored certificate is not yet valid by its clock", || {
        mesh.web.sidecar.process.errors().contains("stored certificate not usable").then_some(())
    });
    assert!(ask_anew(&mesh).is_err());
    clock.reset();
    mesh.web.sidecar.wait_until_ready();
    asked(&mesh, true);
    renewed(&mesh, &before);
    let mut kept = mesh.web.host.on(|| Http1Client::connect_to(fresh)).unwrap();
    ask(&mut kept).expect("the request is served");

    // By this clock all certificates have expired, that of the control plane too: no workload can
    // renew.
    clock.set_ahead(1000 * DAY);
    asked(&mesh, false);
    eventually("idle connections are drained", || (mesh.ask_orders().status == 503).then_some(()));
    ask(&mut kept).expect("the open connection is served");
    let message = "certificate renewal failed";
    within_certificate_lifetime("the sidecar tries to renew its certificate", || {
        mesh.web.sidecar.process.errors().contains(message).then_some(())
    });
    clock.reset();
    asked(&mesh, true);
    assert_eq!(mesh.ask_orders().status, 200);
    let before = presented_certificate(&mesh, own);
    renewed(&mesh, &before);

    // By this clock no certificate is valid yet.
    clock.set_back(DAY);
    asked(&mesh, false);
    ask(&mut kept).expect("the open connection is served");
    clock.reset();
    asked(&mesh, true);
    let before = presented_certificate(&mesh, own);
    renewed(&mesh, &before);
    asked(&mesh, true);
    mesh.assert_healthy();
}
