//! The mesh under test: a control plane, an agent, `web`, three endpoints of `orders` with programs of several kinds,
//! and two echo services, one forwarded by the kernel and one by the agent.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;

use serde_json::{Value, json};
use weft::demo::hosts::Host;
use weft_integration::mesh::TestMesh;
use weft_integration::mesh_file::TestMeshFile;
use weft_integration::mesh_pki::{spiffe_id, text};
use weft_integration::process::{Process, counterpart};
use weft_integration::role_process::RoleProcess;
use weft_integration::wait::eventually;

use crate::ca_rotation::ca;

/// Number of endpoints of `orders`. While one is killed and another is removed, one still serves.
pub(crate) const ENDPOINTS: usize = 3;

/// Ports of `orders` other than port 80, each with the port of the program that serves it.
const OPAQUE: (u16, u16) = (81, 7002);
const GRPC: (u16, u16) = (82, 8081);
const WEBSOCKET: (u16, u16) = (83, 8082);
/// The last port on which the HTTP/1.1 and echo program begins to listen.
const ECHO: u16 = 7000;
/// The address of the echo service that the agent forwards itself, because its endpoints have addresses of the other
/// family.
const PROXY_ECHO: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 5);

/// The address of the client as a service, to which no client sends requests.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 6);
/// The folder of the certificate of the client without a sidecar.
const CLIENT_STATE: &str = "client-state";

/// The mesh, with the programs that are not part of weft.
#[derive(Debug)]
pub(crate) struct Testbed {
    pub(crate) mesh: TestMesh,
    /// The gRPC programs, one per endpoint.
    pub(crate) grpc: Vec<Process>,
    /// The WebSocket programs, one per endpoint.
    pub(crate) websocket: Vec<Process>,
    /// The `weft sds` that renews the certificate of the client without a sidecar.
    identity: RoleProcess,
}

/// The addresses and files that clients need.
#[derive(Debug)]
pub(crate) struct Addresses {
    /// The host of clients with a sidecar.
    pub(crate) web: Host,
    /// The host of clients without a sidecar.
    pub(crate) client: Host,
    pub(crate) http: SocketAddr,
    pub(crate) opaque: SocketAddr,
    pub(crate) grpc: SocketAddr,
    pub(crate) websocket: SocketAddr,
    pub(crate) https: SocketAddr,
    pub(crate) kernel_echo: SocketAddr,
    pub(crate) proxy_echo: SocketAddr,
    /// The folder of the certificate and key of the client without a sidecar.
    pub(crate) identity: PathBuf,
}

impl Testbed {
    /// Starts the mesh with certificates of this lifetime.
    pub(crate) fn start(certificate_minutes: u32) -> Self {
        let minutes = certificate_minutes.to_string();
        let mut mesh = TestMesh::builder()
            .endpoints(ENDPOINTS)
            .control_arguments(&["--certificate-minutes", &minutes])
            .sidecar_arguments(&["--drain-timeout", "15"])
            // The kernel forwards the first three services by name, including those of `client` and `echo`. A debug
            // build would take seconds to fill the tables of all services.
            .agent_arguments(&["--drain-timeout", "5", "--slot-limit", "196611"])
            .start();
        let hosts = mesh.orders.iter().map(|endpoint| endpoint.host.clone());
        let hosts: Vec<Host> = hosts.collect();
        let start = |script, port| hosts.iter().map(move |host| program(host, script, port));
        let grpc = start("grpc_service.py", GRPC.1).collect();
        let websocket = start("websocket_service.py", WEBSOCKET.1).collect();
        let client = mesh.client.clone();
        mesh.change(|file| add_services(file, &hosts, &client));
        let identity = join_client(&mesh);
        await_paths(&mesh);
        Self { mesh, grpc, websocket, identity }
    }

    /// Makes the mesh's own requests use the current certificate of the client without a sidecar.
    pub(crate) fn use_client_certificate(&mut self) {
        self.identity.wait_until_ready();
        let state = self.mesh.file(CLIENT_STATE);
        self.mesh.identity.certificate = state.join("certificate.pem");
        self.mesh.identity.key = state.join("key.pem");
    }

    /// The addresses and files that clients need.
    pub(crate) fn addresses(&self) -> Addresses {
        let mesh = &self.mesh;
        Addresses {
            web: mesh.web.host.clone(),
            client: mesh.client.clone(),
            http: mesh.orders_at(80),
            opaque: mesh.orders_at(OPAQUE.0),
            grpc: mesh.orders_at(GRPC.0),
            websocket: mesh.orders_at(WEBSOCKET.0),
            https: mesh.web_at(80),
            kernel_echo: mesh.echo(),
            proxy_echo: (PROXY_ECHO, ECHO).into(),
            identity: mesh.file(CLIENT_STATE),
        }
    }

    /// Kills the gRPC program of an endpoint and starts it again.
    pub(crate) fn restart_grpc(&mut self, endpoint: usize) {
        let host = &self.endpoint(endpoint).host.clone();
        let old = self.grpc.get_mut(endpoint).expect("the endpoint exists");
        old.kill();
        *old = program(host, "grpc_service.py", GRPC.1);
    }

    /// Kills the WebSocket program of an endpoint and starts it again.
    pub(crate) fn restart_websocket(&mut self, endpoint: usize) {
        let host = &self.endpoint(endpoint).host.clone();
        let old = self.websocket.get_mut(endpoint).expect("the endpoint exists");
        old.kill();
        *old = program(host, "websocket_service.py", WEBSOCKET.1);
    }

    /// Kills the HTTP/1.1 and echo program of an endpoint and starts it again.
    pub(crate) fn restart_program(&mut self, endpoint: usize) {
        let endpoint = self.mesh.orders.get_mut(endpoint).expect("the endpoint exists");
        endpoint.program.restart_without_waiting();
        let host = &endpoint.host;
        eventually(format!("{:?} listens", endpoint.program), || {
            let connected = host.on(|| TcpStream::connect((Ipv4Addr::LOCALHOST, ECHO)));
            connected.expect("the host can be entered").ok()
        });
    }

    fn endpoint(&self, number: usize) -> &weft_integration::mesh::MeshWorkload {
        self.mesh.orders.get(number).expect("the endpoint exists")
    }
}

/// Waits until the kernel forwards one echo service and the agent the other.
fn await_paths(mesh: &TestMesh) {
    let expected = [
        ("echo|7000", "kernel"),
        ("echo|7001/udp", "kernel"),
        ("proxied|7000", "proxy"),
        ("proxied|7001/udp", "proxy"),
    ];
    eventually(format!("{expected:?}"), || {
        let dump: Value = serde_json::from_slice(&mesh.agent.admin("/config_dump").body).ok()?;
        let services = dump.get("services")?.as_array()?;
        let has_path = |(name, path): &(&str, &str)| {
            // The address follows the name.
            let name = format!("{name} ");
            let is_named = |listener: &Value| {
                listener.as_str().is_some_and(|listener| listener.starts_with(&name))
            };
            let mut named = services.iter().filter(|service| is_named(&service["listener"]));
            named.any(|service| service["path"] == *path)
        };
        expected.iter().all(has_path).then_some(())
    });
}

/// Starts `weft sds`, which renews the certificate of the client without a sidecar. Revokes the client's first
/// certificate, which is valid for a day: a root cannot be removed while a valid certificate of it exists.
fn join_client(mesh: &TestMesh) -> RoleProcess {
    let token = ca(mesh, "token", &[&spiffe_id("client")]).expect("a token can be created");
    std::fs::write(mesh.file("client").with_extension("token"), token)
        .expect("the folder is writable");
    let socket = mesh.file("client-socket");
    let arguments = ["sds", "--service", "client", "--socket", text(&socket)];
    let role = mesh.join("client", &mesh.client, "client", &arguments);
    role.wait_until_ready();
    ca(mesh, "revoke", &[&mesh.identity.serial]).expect("a certificate can be revoked");
    role
}

fn program(host: &Host, script: &str, port: u16) -> Process {
    let name = format!("{} of {}", script, host.name);
    let mut command = counterpart(script);
    command.arg(port.to_string());
    let process = host.on(|| Process::start(&name, &mut command));
    let process = process.expect("the host can be entered");
    process.line_with("ready");
    process
}

/// Adds the services, ports and policies that only this mesh has.
fn add_services(file: &mut TestMeshFile, endpoints: &[Host], client: &Host) {
    let port = |(port, target): (u16, u16), protocol: &str| json!({"port": port, "target": target, "protocol": protocol});
    let more = [port(OPAQUE, "tcp"), port(GRPC, "grpc"), port(WEBSOCKET, "http")];
    more.into_iter().for_each(|port| file.service("orders").add_port(port));
    file.policy("orders").set_allow(json!([{"from": ["web"]}]));
    let endpoints: Vec<Value> =
        endpoints.iter().map(|host| json!({"address": host.address6})).collect();
    file.add_service(json!({
        "name": "proxied", "addresses": [PROXY_ECHO], "meshed": false, "endpoints": endpoints,
        "ports": [{"port": ECHO, "protocol": "tcp"}, {"port": ECHO + 1, "protocol": "udp", "idle_timeout": "10s"}],
    }));
    // The client is a service, so that `weft sds` keeps its certificate and trust bundle up to date.
    file.add_service(json!({
        "name": "client", "addresses": [CLIENT], "endpoints": [{"address": client.address}],
        "ports": [{"port": 80, "target": 8080, "protocol": "http"}],
    }));
}
