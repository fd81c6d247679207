//! The mesh under test: a control plane, an agent, `web`, three replicas of `orders` with programs of several
//! kinds, and services that the agent balances by the kernel and by itself.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;

use serde_json::{Value, json};
use weft::demo::hosts::Host;
use weft_integration::mesh::{TestMesh, TestMeshOptions};
use weft_integration::mesh_pki::{spiffe_id, text};
use weft_integration::process::{Process, counterpart};
use weft_integration::role_process::RoleProcess;
use weft_integration::wait::eventually;

use crate::ca_rotation::ca;

/// How many replicas `orders` has. While one is killed another may be out of the mesh, and one serves.
pub(crate) const REPLICAS: usize = 3;

/// The ports of `orders` beside port 80, and those of the programs behind them.
const OPAQUE: (u16, u16) = (81, 7002);
const GRPC: (u16, u16) = (82, 8081);
const WEBSOCKET: (u16, u16) = (83, 8082);
/// The last port that the program of HTTP/1.1 and of the echoes listens on.
const ECHO: u16 = 7000;
/// The address of the echo service that the agent forwards itself, since its endpoints have addresses of the
/// other family.
const PROXY_ECHO: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 5);

/// The address of the client as a service, which no client asks.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 6);
/// Where the certificate of the client without a sidecar is.
const CLIENT_STATE: &str = "client-state";

/// The mesh, with the programs that are not of weft.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) mesh: TestMesh,
    /// The gRPC programs, one for each replica.
    pub(crate) grpc: Vec<Process>,
    /// The WebSocket programs, one for each replica.
    pub(crate) websocket: Vec<Process>,
    /// What renews the certificate of the client without a sidecar.
    identity: RoleProcess,
}

/// What clients must know.
#[derive(Debug)]
pub(crate) struct Addresses {
    /// The host of clients that have a sidecar.
    pub(crate) web: Host,
    /// The host of clients that have none.
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

impl Stage {
    /// Starts everything, with certificates that live for so long.
    pub(crate) fn start(certificate_minutes: u32) -> Self {
        let minutes = certificate_minutes.to_string();
        let mut mesh = TestMesh::start_with_options(TestMeshOptions {
            replicas: REPLICAS,
            control_arguments: &["--certificate-minutes", &minutes],
            sidecar_arguments: &["--drain-timeout", "15"],
            // The kernel carries the first three services by name, which are those of `client` and `echo`: a debug
            // build takes seconds to fill the tables of all.
            agent_arguments: &["--drain-timeout", "5", "--slot-limit", "196611"],
            ..TestMeshOptions::default()
        });
        let hosts = mesh.orders.iter().map(|replica| replica.host.clone());
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

    /// Has the mesh's own requests show the certificate that the client without a sidecar has now.
    pub(crate) fn use_identity_of_client(&mut self) {
        self.identity.wait_until_ready();
        let state = self.mesh.file(CLIENT_STATE);
        self.mesh.identity.certificate = state.join("certificate.pem");
        self.mesh.identity.key = state.join("key.pem");
    }

    /// What clients must know.
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

    /// Kills the gRPC program of a replica and starts it again.
    pub(crate) fn restart_grpc(&mut self, replica: usize) {
        let host = &self.replica(replica).host.clone();
        let old = self.grpc.get_mut(replica).expect("there is such a replica");
        old.kill();
        *old = program(host, "grpc_service.py", GRPC.1);
    }

    /// Kills the WebSocket program of a replica and starts it again.
    pub(crate) fn restart_websocket(&mut self, replica: usize) {
        let host = &self.replica(replica).host.clone();
        let old = self.websocket.get_mut(replica).expect("there is such a replica");
        old.kill();
        *old = program(host, "websocket_service.py", WEBSOCKET.1);
    }

    /// Kills the program of HTTP/1.1 and of the echoes of a replica and starts it again.
    pub(crate) fn restart_program(&mut self, replica: usize) {
        let replica = self.mesh.orders.get_mut(replica).expect("there is such a replica");
        replica.program.restart_without_waiting();
        let host = &replica.host;
        eventually(format!("{:?} listens", replica.program), || {
            let connected = host.on(|| TcpStream::connect((Ipv4Addr::LOCALHOST, ECHO)));
            connected.expect("the host can be entered").ok()
        });
    }

    fn replica(&self, number: usize) -> &weft_integration::mesh::MeshWorkload {
        self.mesh.orders.get(number).expect("there is such a replica")
    }
}

/// Waits until the kernel forwards the one echo service and the agent the other.
fn await_paths(mesh: &TestMesh) {
    let wanted = [
        ("echo|7000", "kernel"),
        ("echo|7001/udp", "kernel"),
        ("proxied|7000", "proxy"),
        ("proxied|7001/udp", "proxy"),
    ];
    eventually(format!("{wanted:?}"), || {
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
        wanted.iter().all(has_path).then_some(())
    });
}

/// Starts what has a certificate renewed for the client without a sidecar. Its first certificate, which is good
/// for a day, is revoked: a root is not taken back while it has signed something that is good.
fn join_client(mesh: &TestMesh) -> RoleProcess {
    let token = ca(mesh, "token", &[&spiffe_id("client")]).expect("a token can be made");
    std::fs::write(mesh.file("client").with_extension("token"), token).expect("a file");
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

/// Adds what this mesh has beside that of every test.
fn add_services(file: &mut Value, replicas: &[Host], client: &Host) {
    let port = |(port, target): (u16, u16), protocol: &str| json!({"port": port, "target": target, "protocol": protocol});
    let more = [port(OPAQUE, "tcp"), port(GRPC, "grpc"), port(WEBSOCKET, "http")];
    let ports = file.pointer_mut("/services/1/ports").and_then(Value::as_array_mut);
    ports.expect("the file has the service").extend(more);
    let allow = file.pointer_mut("/security/policies/1/allow");
    *allow.expect("the file has the policy") = json!([{"from": ["web"]}]);
    let endpoints: Vec<Value> =
        replicas.iter().map(|host| json!({"address": host.address6})).collect();
    let services = file.pointer_mut("/services").and_then(Value::as_array_mut);
    let services = services.expect("the file has services");
    services.push(json!({
        "name": "proxied", "addresses": [PROXY_ECHO], "meshed": false, "endpoints": endpoints,
        "ports": [{"port": ECHO, "protocol": "tcp"}, {"port": ECHO + 1, "protocol": "udp", "idle_timeout": "10s"}],
    }));
    // A service, so that its certificate and what it trusts are kept up to date.
    services.push(json!({
        "name": "client", "addresses": [CLIENT], "endpoints": [{"address": client.address}],
        "ports": [{"port": 80, "target": 8080, "protocol": "http"}],
    }));
}
