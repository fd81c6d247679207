//! One authority of a mesh follows another by an operator's word, while requests are made all the time: not
//! one of them fails, and what the former authority signed is good for nothing in the end.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at what it did not expect"
)]

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use nix::sys::signal::Signal;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::json;
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

/// What is new of an authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum New {
    Root,
    Intermediate,
}

/// A sidecar of `orders` to which nobody sends anything, so that it may be slow.
const WITNESS: &str = "witness";
/// Those who hold a certificate.
const HOLDERS: [&str; 5] = [WITNESS, "web", "orders-1", "orders-2", "agent"];

/// Why an authority is not taken back yet.
const STILL_GOOD: &str = "certificates of the former authority are valid until ";

/// What an operator says, and what comes of it.
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

/// What the authority says is trusted.
fn roots(mesh: &TestMesh) -> Vec<Certificate> {
    certificates(ca(mesh, "roots", &[]).unwrap().as_bytes())
}

/// The certificate that a workload has, the intermediate that signed it, and the root.
fn held(mesh: &TestMesh, holder: &str) -> [Certificate; 3] {
    let file = mesh.file(&format!("{holder}-state")).join("certificate.pem");
    certificates(&std::fs::read(file).unwrap()).try_into().expect("a leaf below two authorities")
}

fn held_by_all(mesh: &TestMesh) -> [[Certificate; 3]; 5] {
    HOLDERS.map(|holder| held(mesh, holder))
}

/// What a sidecar says of itself when others meet it: the intermediate above its certificate, and how many
/// roots it trusts.
#[derive(Debug, PartialEq, Eq)]
struct Greeting {
    intermediate: Certificate,
    roots: usize,
}

fn greeting(mesh: &TestMesh, at: SocketAddr) -> Greeting {
    let mut openssl = tool("openssl");
    openssl.args(["s_client", "-showcerts", "-alpn", "h2", "-connect", &at.to_string()]);
    openssl.stdin(Stdio::null());
    // That it sends us away then is no matter: we show no certificate.
    let said = mesh.client.on(|| openssl.output()).unwrap().unwrap().stdout;
    let text = String::from_utf8_lossy(&said);
    let (_, names) = text.split_once("Acceptable client certificate CA names\n").unwrap();
    let roots = names.lines().take_while(|line| line.contains("weft root")).count();
    Greeting { intermediate: certificates(&said).swap_remove(1), roots }
}

/// Those of `web` and of both replicas of `orders`.
fn greetings(mesh: &TestMesh) -> Vec<Greeting> {
    let hosts = [&mesh.web].into_iter().chain(&mesh.orders).map(|workload| &workload.host);
    hosts.map(|host| greeting(mesh, (host.address, 8080).into())).collect()
}

/// Waits until all sidecars are met with this behind them, and trust so many roots.
fn await_greetings(mesh: &TestMesh, intermediate: &Certificate, roots: usize) {
    let awaited = Greeting { intermediate: intermediate.clone(), roots };
    eventually(format!("{roots} roots are trusted by all"), || {
        greetings(mesh).iter().all(|greeting| *greeting == awaited).then_some(())
    });
}

/// Asks `web` without a sidecar.
fn knock(mesh: &TestMesh, shows: &IdentityFiles) -> Result<(), String> {
    let (certificate, key) = (text(&shows.certificate), text(&shows.key));
    let web = mesh.web_at(80);
    let files = ["--insecure", "--cert", certificate, "--key", key];
    mesh.client.on(|| curl(web, "https", &files)).unwrap()
}

/// The keys of the authority, stolen.
fn steal_keys(mesh: &mut TestMesh) -> TestAuthority {
    // Nobody else may have the store open.
    mesh.control.process.kill();
    let (files, _) = Store::open(&mesh.file("state")).unwrap().authority().unwrap();
    mesh.control.restart();
    TestAuthority::of(files)
}

fn join(mesh: &mut TestMesh, name: &str) -> RoleProcess {
    let (host, token) = (mesh.host(name), ca(mesh, "token", &[&spiffe_id("orders")]).unwrap());
    std::fs::write(mesh.file(name).with_extension("token"), token).unwrap();
    let role = mesh.join(name, &host, name, &["sidecar", "--service", "orders"]);
    role.wait_until_ready();
    role
}

/// A mesh where `orders` may ask `web` too, and whose authority has signed nothing that is good for long, as
/// far as it knows.
fn start() -> (TestMesh, TestAuthority) {
    let mut mesh = start_mesh_with_short_certificates();
    let keys = steal_keys(&mut mesh);
    ca(&mesh, "revoke", &[&mesh.identity.serial]).unwrap();
    mesh.change(|mesh| {
        let from = mesh.pointer_mut("/security/policies/0/allow/0/from").unwrap();
        *from = json!([spiffe_id("client"), "orders"]);
    });
    let web = mesh.web_at(80);
    eventually("web may be asked by orders", || {
        mesh.orders[0].host.on(|| curl(web, "http", &[])).unwrap().ok()
    });
    // An authority that is announced waits for those who are there.
    eventually("all are back after the control plane was away", || {
        let sidecars = [&mesh.web].into_iter().chain(&mesh.orders).map(|one| &one.sidecar);
        let mut pages = sidecars.map(|role| role.admin("/metrics").text());
        pages.all(|page| page.contains("weft_xds_connected 1")).then_some(())
    });
    (mesh, keys)
}

/// All who ask. The kept connection that is not ours to read is made anew when told.
fn load(mesh: &TestMesh, renew: &Arc<AtomicBool>) -> BackgroundLoad {
    let (http, opaque, web) = (mesh.orders_at(80), mesh.orders_at(OPAQUE_PORT), mesh.web_at(80));
    let (caller, orders) = (&mesh.web.host, &mesh.orders[0].host);
    let (mut kept, renew) = (None, renew.clone());
    BackgroundLoad(vec![
        LoadClient::over_new_connections("new connections of HTTP/1.1", caller, http),
        LoadClient::over_one_connection("a kept connection of HTTP/1.1", caller, http),
        LoadClient::new("HTTP/2", caller, move || curl(http, "http", &["--http2-prior-knowledge"])),
        LoadClient::over_new_connections(
            "new connections that are not ours to read",
            caller,
            opaque,
        ),
        LoadClient::new("a kept connection that is not ours to read", caller, move || {
            if renew.swap(false, Relaxed) {
                kept = None;
            }
            ask(kept.get_or_insert_with(|| Http1Client::connect_to(opaque)))
        }),
        LoadClient::over_one_connection("a kept connection to one who asks others", orders, web),
    ])
}

/// Has the next authority announced, and sign when all know it.
fn hand_over(mesh: &TestMesh, witness: &RoleProcess, new: New) {
    let [_, former, _] = held(mesh, WITNESS);
    let (step, both) = match new {
        New::Root => ("root", 2),
        New::Intermediate => ("intermediate", 1),
    };
    await_greetings(mesh, &former, 1);
    witness.process.signal(Signal::SIGSTOP);
    let told = rotate(mesh, step).unwrap();
    assert!(told.contains("\nnext     trusted; signs from "), "{told}");
    assert_eq!(roots(mesh).len(), both);
    let behind = "clients without the new trust bundle: ";
    eventually("only the witness is behind", || {
        let refused = rotate(mesh, "next").expect_err("it has not been told");
        let (_, names) = refused.split_once(behind).expect(&refused);
        (names == spiffe_id("orders")).then_some(())
    });
    await_greetings(mesh, &former, both);
    witness.process.signal(Signal::SIGCONT);
    let told = eventually("all know it", || match rotate(mesh, "next") {
        Ok(told) => Some(told),
        Err(refused) => {
            assert!(refused.contains(behind), "{refused}");
            None
        }
    });
    assert!(told.starts_with("former   its certificates are valid until "), "{told}");
    assert_eq!(roots(mesh).len(), both);
}

/// Waits until all have certificates of the next authority; gives them.
fn await_renewals(mesh: &TestMesh, former: &Certificate) -> [[Certificate; 3]; 5] {
    let all = within_certificate_lifetime("all have a certificate of the next authority", || {
        let all = held_by_all(mesh);
        all.iter().all(|[_, intermediate, _]| intermediate != former).then_some(all)
    });
    let [_, next, root] = &all[0];
    assert!(all.iter().all(|[_, intermediate, above]| (intermediate, above) == (next, root)));
    all
}

/// Has the former authority taken back once nothing of it is good.
fn take_back(mesh: &TestMesh) {
    let told = within_certificate_lifetime("nothing of the former one is good", || {
        match rotate(mesh, "next") {
            Ok(told) => Some(told),
            Err(refused) => {
                assert!(refused.contains(STILL_GOOD), "{refused}");
                None
            }
        }
    });
    assert!(told.starts_with("signing ") && told.lines().count() == 1, "{told}");
}

/// Has one authority follow another while requests are made, of which none may fail.
fn have_followed(mesh: &TestMesh, witness: &RoleProcess, new: New) {
    let renew = Arc::new(AtomicBool::new(false));
    let load = load(mesh, &renew);
    let opaque = mesh.orders_at(OPAQUE_PORT);
    let mut oldest = mesh.web.host.on(|| Http1Client::connect_to(opaque)).unwrap();
    ask(&mut oldest).expect("it is served");
    let [_, former, former_root] = held(mesh, WITNESS);
    load.during(|| {
        load.await_answers();
        hand_over(mesh, witness, new);
        load.await_answers();
        let too_early = rotate(mesh, "next").unwrap_err();
        assert!(too_early.contains(STILL_GOOD), "{too_early}");
        let before = await_renewals(mesh, &former);
        let [_, next, root] = &before[0];
        await_greetings(mesh, next, roots(mesh).len());
        load.await_answers();
        // What began before has an hour from the end of its certificate, which an operator may cut short.
        ask(&mut oldest).expect("what has begun goes on");
        renew.store(true, Relaxed);
        load.await_answers();
        take_back(mesh);
        assert_eq!(roots(mesh), std::slice::from_ref(root));
        assert_eq!(*root != former_root, new == New::Root);
        await_greetings(mesh, next, 1);
        load.await_answers();
        assert_eq!(ask(&mut oldest).is_err(), new == New::Root, "it ends with its root");
        // From a control plane that is known by what is trusted now.
        let before = held_by_all(mesh);
        within_certificate_lifetime("everybody renews once more", || {
            let mut all = held_by_all(mesh).into_iter().zip(&before);
            all.all(|(after, before)| after[0] != before[0]).then_some(())
        });
        load.await_answers();
    });
}

/// Holds that the mesh starts, grows and serves by the new authority.
fn assert_life_goes_on(mesh: &mut TestMesh, mut witness: RoleProcess) {
    // The file with which it is started holds the former root alone.
    witness.restart();
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

/// Holds that who shows this is let in no more, for that reason.
fn assert_refused(mesh: &TestMesh, shows: &IdentityFiles, reason: &str) {
    let counted = format!("weft_sidecar_tls_handshake_failures_total{{reason=\"{reason}\"}}");
    let count = || {
        let page = mesh.web.sidecar.admin("/metrics").text();
        weft_integration::metrics::metric(&page, &counted)
    };
    let before = count();
    knock(mesh, shows).expect_err("what it rests on was taken back");
    eventually(reason, || (count() == before + 1).then_some(()));
}

/// Has one authority follow another, by which whoever has stolen the keys of the former is refused for that
/// reason.
fn follow(new: New, reason: &str) {
    let (mut mesh, keys) = start();
    let forged = keys.write_files("client", &keys.sign("client", Duration::from_secs(24 * 3600)));
    knock(&mesh, &forged).expect("who has the keys is let in");
    let witness = join(&mut mesh, WITNESS);
    have_followed(&mesh, &witness, new);
    assert_refused(&mesh, &forged, reason);
    assert_life_goes_on(&mut mesh, witness);
}

#[test]
fn a_root_follows_another_and_no_request_fails() {
    follow(New::Root, "ClientCertUntrusted");
}

#[test]
fn an_intermediate_follows_another_and_no_request_fails() {
    // It is below a root that is trusted, but no list speaks for it any more.
    follow(New::Intermediate, "ClientCertCrlProcessingError");
}

#[test]
fn who_has_lost_the_control_plane_is_waited_for() {
    let mut mesh = TestMesh::start();
    mesh.web.sidecar.process.kill();
    rotate(&mesh, "root").unwrap();
    let away = format!("{}, which is not connected", spiffe_id("web"));
    eventually("only who is away is behind", || {
        let refused = rotate(&mesh, "next").expect_err("one is away");
        refused.ends_with(&format!("yet: {away}")).then_some(())
    });
    mesh.control.process.kill();
    mesh.control.restart();
    eventually("the others are back, and it is not", || {
        let refused = rotate(&mesh, "next").expect_err("one is away");
        refused.ends_with(&format!("yet: {away}")).then_some(())
    });
    mesh.web.sidecar.restart();
    eventually("all know the new authority", || rotate(&mesh, "next").ok());
}
