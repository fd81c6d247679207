//! CA rotation on an operator's command while requests are made: no request fails, and certificates
//! of the former authority are rejected in the end.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic on unexpected values"
)]

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use nix::sys::signal::Signal;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use weft_control::store::Store;
use weft_integration::authority::TestAuthority;
use weft_integration::http1::Http1Client;
use weft_integration::load::{
    BackgroundLoad, LoadClient, OPAQUE_PORT, ask, curl, start_mesh_with_short_certificates,
};
use weft_integration::mesh::TestMesh;
use weft_integration::mesh_pki::{IdentityFiles, spiffe_id, text};
use weft_integration::process::{tool, weft};
use weft_integration::role_process::RoleProcess;
use weft_integration::wait::{eventually, within_certificate_lifetime};

/// What is replaced: the root or the intermediate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Replaced {
    Root,
    Intermediate,
}

/// A sidecar of `orders` without traffic, which the test can stop.
const PAUSED_SIDECAR: &str = "witness";
/// The workloads that have a certificate.
const HOLDERS: [&str; 5] = [PAUSED_SIDECAR, "web", "orders-1", "orders-2", "agent"];

/// The error while a former authority cannot be removed yet.
const STILL_GOOD: &str = "certificates of the former authority are valid until ";

/// Runs a `weft ca` command; returns its output, or its error.
fn ca(mesh: &TestMesh, command: &str, words: &[&str]) -> Result<String, String> {
    let mut ca = weft();
    ca.args(["ca", command, "--state"]).arg(mesh.file("state")).args(words);
    let output = ca.output().expect("the command can be started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn rotate(mesh: &TestMesh, step: &str) -> Result<String, String> {
    ca(mesh, "rotate", &[step])
}

type Certificate = CertificateDer<'static>;

fn certificates(pem: &[u8]) -> Vec<Certificate> {
    CertificateDer::pem_slice_iter(pem).map(Result::unwrap).collect()
}

/// The roots that the authority publishes.
fn roots(mesh: &TestMesh) -> Vec<Certificate> {
    certificates(ca(mesh, "roots", &[]).unwrap().as_bytes())
}

/// The certificate of a workload, the intermediate that signed it, and the root.
fn chain_of(mesh: &TestMesh, workload: &str) -> [Certificate; 3] {
    let file = mesh.file(&format!("{workload}-state")).join("certificate.pem");
    certificates(&std::fs::read(file).unwrap())
        .try_into()
        .expect("the chain has a leaf, an intermediate and a root")
}

fn all_chains(mesh: &TestMesh) -> [[Certificate; 3]; 5] {
    HOLDERS.map(|workload| chain_of(mesh, workload))
}

/// What a sidecar presents in a handshake: the intermediate above its certificate, and the number
/// of roots that it trusts.
#[derive(Debug, PartialEq, Eq)]
struct Presented {
    intermediate: Certificate,
    roots: usize,
}

fn presented_by(mesh: &TestMesh, at: SocketAddr) -> Presented {
    let mut openssl = tool("openssl");
    openssl.args(["s_client", "-showcerts", "-alpn", "h2", "-connect", &at.to_string()]);
    openssl.stdin(Stdio::null());
    // The handshake is rejected afterwards, because the client presents no certificate.
    let printed = mesh.client.on(|| openssl.output()).unwrap().unwrap().stdout;
    let text = String::from_utf8_lossy(&printed);
    let (_, names) = text.split_once("Acceptable client certificate CA names\n").unwrap();
    let roots = names.lines().take_while(|line| line.contains("weft root")).count();
    Presented { intermediate: certificates(&printed).swap_remove(1), roots }
}

/// What the sidecars of `web` and of both endpoints of `orders` present.
fn presented_by_all(mesh: &TestMesh) -> Vec<Presented> {
    let hosts = [&mesh.web].into_iter().chain(&mesh.orders).map(|workload| &workload.host);
    hosts.map(|host| presented_by(mesh, (host.address, 8080).into())).collect()
}

/// Waits until all sidecars present this intermediate and trust this many roots.
fn await_presented(mesh: &TestMesh, intermediate: &Certificate, roots: usize) {
    let awaited = Presented { intermediate: intermediate.clone(), roots };
    eventually(format!("all sidecars trust {roots} roots"), || {
        presented_by_all(mesh).iter().all(|presented_by| *presented_by == awaited).then_some(())
    });
}

/// Sends a request to `web` without a sidecar.
fn call_web(mesh: &TestMesh, identity: &IdentityFiles) -> Result<(), String> {
    let certificate = text(&identity.certificate);
    let key = text(&identity.key);
    let web = mesh.web_at(80);
    let files = ["--insecure", "--cert", certificate, "--key", key];
    mesh.client.on(|| curl(web, "https", &files)).unwrap()
}

/// The stolen keys of the authority.
fn steal_keys(mesh: &mut TestMesh) -> TestAuthority {
    // The store can be open only once.
    mesh.control.process.kill();
    let (files, _) = Store::open(&mesh.file("state")).unwrap().authority().unwrap();
    mesh.control.restart();
    TestAuthority::of(files)
}

fn join(mesh: &mut TestMesh, name: &str) -> RoleProcess {
    let host = mesh.host(name);
    let token = ca(mesh, "token", &[&spiffe_id("orders")]).unwrap();
    std::fs::write(mesh.file(name).with_extension("token"), token).unwrap();
    let role = mesh.join(name, &host, name, &["sidecar", "--service", "orders"]);
    role.wait_until_ready();
    role
}

/// A mesh in which `orders` may call `web` too, and whose authority has issued only short-lived
/// certificates.
fn start() -> (TestMesh, TestAuthority) {
    let mut mesh = start_mesh_with_short_certificates();
    let keys = steal_keys(&mut mesh);
    ca(&mesh, "revoke", &[&mesh.identity.serial]).unwrap();
    mesh.change(|file| file.policy("web").allow_from(&[&spiffe_id("client"), "orders"]));
    let web = mesh.web_at(80);
    eventually("orders may call web", || {
        mesh.orders[0].host.on(|| curl(web, "http", &[])).unwrap().ok()
    });
    // An announced authority waits for the connected workloads.
    eventually("all workloads are connected again", || {
        let sidecars = [&mesh.web].into_iter().chain(&mesh.orders).map(|one| &one.sidecar);
        let mut pages = sidecars.map(|role| role.admin("/metrics").text());
        pages.all(|page| page.contains("weft_xds_connected 1")).then_some(())
    });
    (mesh, keys)
}

/// The load clients. The persistent TCP connection is reopened when `renew` is set.
fn load(mesh: &TestMesh, renew: &Arc<AtomicBool>) -> BackgroundLoad {
    let http = mesh.orders_at(80);
    let opaque = mesh.orders_at(OPAQUE_PORT);
    let web = mesh.web_at(80);
    let caller = &mesh.web.host;
    let orders = &mesh.orders[0].host;
    let mut kept = None;
    let renew = renew.clone();
    BackgroundLoad(vec![
        LoadClient::over_new_connections("new HTTP/1.1 connections", caller, http),
        LoadClient::over_one_connection("one HTTP/1.1 connection", caller, http),
        LoadClient::new("HTTP/2", caller, move || curl(http, "http", &["--http2-prior-knowledge"])),
        LoadClient::over_new_connections("new TCP connections", caller, opaque),
        LoadClient::new("one TCP connection", caller, move || {
            if renew.swap(false, Relaxed) {
                kept = None;
            }
            ask(kept.get_or_insert_with(|| Http1Client::connect_to(opaque)))
        }),
        LoadClient::over_one_connection(
            "one connection to a service that calls another",
            orders,
            web,
        ),
    ])
}

/// Announces the next authority, and lets it sign once all workloads trust it.
fn activate_next_authority(mesh: &TestMesh, paused_sidecar: &RoleProcess, new: Replaced) {
    let [_, former, _] = chain_of(mesh, PAUSED_SIDECAR);
    let (step, both) = match new {
        Replaced::Root => ("root", 2),
        Replaced::Intermediate => ("intermediate", 1),
    };
    await_presented(mesh, &former, 1);
    paused_sidecar.process.signal(Signal::SIGSTOP);
    let output = rotate(mesh, step).unwrap();
    assert!(output.contains("\nnext     trusted; signs from "), "{output}");
    assert_eq!(roots(mesh).len(), both);
    let behind = "clients without the new trust bundle: ";
    eventually("only the paused sidecar does not trust the next authority", || {
        let refused =
            rotate(mesh, "next").expect_err("the paused sidecar does not trust the next authority");
        let (_, names) = refused.split_once(behind).expect(&refused);
        (names == spiffe_id("orders")).then_some(())
    });
    await_presented(mesh, &former, both);
    paused_sidecar.process.signal(Signal::SIGCONT);
    let output =
        eventually("all workloads trust the next authority", || match rotate(mesh, "next") {
            Ok(output) => Some(output),
            Err(refused) => {
                assert!(refused.contains(behind), "{refused}");
                None
            }
        });
    assert!(output.starts_with("former   its certificates are valid until "), "{output}");
    assert_eq!(roots(mesh).len(), both);
}

/// Waits until all workloads have certificates of the next authority; returns them.
fn await_renewals(mesh: &TestMesh, former: &Certificate) -> [[Certificate; 3]; 5] {
    let all = within_certificate_lifetime(
        "all workloads have a certificate of the next authority",
        || {
            let all = all_chains(mesh);
            all.iter().all(|[_, intermediate, _]| intermediate != former).then_some(all)
        },
    );
    let [_, next, root] = &all[0];
    assert!(all.iter().all(|[_, intermediate, above]| (intermediate, above) == (next, root)));
    all
}

/// Removes the former authority once its certificates have expired.
fn remove_former_authority(mesh: &TestMesh) {
    let output = within_certificate_lifetime(
        "all certificates of the former authority have expired",
        || match rotate(mesh, "next") {
            Ok(output) => Some(output),
            Err(refused) => {
                assert!(refused.contains(STILL_GOOD), "{refused}");
                None
            }
        },
    );
    assert!(output.starts_with("signing ") && output.lines().count() == 1, "{output}");
}

/// Rotates the authority while requests are made, none of which may fail.
fn rotate_under_load(mesh: &TestMesh, paused_sidecar: &RoleProcess, new: Replaced) {
    let renew = Arc::new(AtomicBool::new(false));
    let load = load(mesh, &renew);
    let opaque = mesh.orders_at(OPAQUE_PORT);
    let mut oldest = mesh.web.host.on(|| Http1Client::connect_to(opaque)).unwrap();
    ask(&mut oldest).expect("the request is served");
    let [_, former, former_root] = chain_of(mesh, PAUSED_SIDECAR);
    load.during(|| {
        load.await_answers();
        activate_next_authority(mesh, paused_sidecar, new);
        load.await_answers();
        let too_early = rotate(mesh, "next").unwrap_err();
        assert!(too_early.contains(STILL_GOOD), "{too_early}");
        let before = await_renewals(mesh, &former);
        let [_, next, root] = &before[0];
        await_presented(mesh, next, roots(mesh).len());
        load.await_answers();
        // A connection may stay open for an hour after the expiry of its certificate; an operator
        // may end it earlier.
        ask(&mut oldest).expect("the open connection is served");
        renew.store(true, Relaxed);
        load.await_answers();
        remove_former_authority(mesh);
        assert_eq!(roots(mesh), std::slice::from_ref(root));
        assert_eq!(*root != former_root, new == Replaced::Root);
        await_presented(mesh, next, 1);
        load.await_answers();
        assert_eq!(
            ask(&mut oldest).is_err(),
            new == Replaced::Root,
            "the connection ends when its root is removed"
        );
        // The control plane now presents a certificate of the new authority.
        let before = all_chains(mesh);
        within_certificate_lifetime("all workloads renew once more", || {
            let mut all = all_chains(mesh).into_iter().zip(&before);
            all.all(|(after, before)| after[0] != before[0]).then_some(())
        });
        load.await_answers();
    });
}

/// Checks that the mesh restarts, grows and serves with the new authority.
fn assert_mesh_works_after_rotation(mesh: &mut TestMesh, mut paused_sidecar: RoleProcess) {
    // The trust file of its command line has only the former root.
    paused_sidecar.restart();
    std::fs::write(mesh.file("root.pem"), ca(mesh, "roots", &[]).unwrap()).unwrap();
    join(mesh, "newcomer");
    mesh.control.process.kill();
    let prefix = mesh.file("client-2");
    ca(mesh, "issue", &[&spiffe_id("client"), "--out", text(&prefix)]).unwrap();
    mesh.control.restart();
    mesh.identity.certificate = prefix.with_extension("pem");
    mesh.identity.key = prefix.with_extension("key");
    mesh.assert_healthy();
}

/// Checks that a client with this certificate is rejected for this reason.
fn assert_refused(mesh: &TestMesh, identity: &IdentityFiles, reason: &str) {
    let counted = format!("weft_sidecar_tls_handshake_failures_total{{reason=\"{reason}\"}}");
    let count = || {
        let page = mesh.web.sidecar.admin("/metrics").text();
        weft_integration::metrics::metric(&page, &counted)
    };
    let before = count();
    call_web(mesh, identity).expect_err("the certificate's authority was removed");
    eventually(reason, || (count() == before + 1).then_some(()));
}

/// Rotates the authority, and checks that a certificate signed with stolen keys of the former one
/// is rejected for this reason.
fn check_rotation(new: Replaced, reason: &str) {
    let (mut mesh, keys) = start();
    let forged = keys.write_files("client", &keys.sign("client", Duration::from_secs(24 * 3600)));
    call_web(&mesh, &forged).expect("a certificate signed with the stolen keys is accepted");
    let paused_sidecar = join(&mut mesh, PAUSED_SIDECAR);
    rotate_under_load(&mesh, &paused_sidecar, new);
    assert_refused(&mesh, &forged, reason);
    assert_mesh_works_after_rotation(&mut mesh, paused_sidecar);
}

#[test]
fn root_rotation_fails_no_request() {
    check_rotation(Replaced::Root, "ClientCertUntrusted");
}

#[test]
fn intermediate_rotation_fails_no_request() {
    // The former intermediate is below a trusted root, but no CRL covers it.
    check_rotation(Replaced::Intermediate, "ClientCertCrlProcessingError");
}

#[test]
fn rotation_waits_for_disconnected_workloads() {
    let mut mesh = TestMesh::builder().start();
    mesh.web.sidecar.process.kill();
    rotate(&mesh, "root").unwrap();
    let away = format!("{}, which is not connected", spiffe_id("web"));
    eventually("only the disconnected workload is reported", || {
        let refused = rotate(&mesh, "next").expect_err("a workload is disconnected");
        refused.ends_with(&format!("bundle: {away}")).then_some(())
    });
    mesh.control.process.kill();
    mesh.control.restart();
    eventually("the other workloads are connected again", || {
        let refused = rotate(&mesh, "next").expect_err("a workload is disconnected");
        refused.ends_with(&format!("bundle: {away}")).then_some(())
    });
    mesh.web.sidecar.restart();
    eventually("all workloads trust the next authority", || rotate(&mesh, "next").ok());
}
