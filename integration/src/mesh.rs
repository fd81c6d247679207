//! Starts a complete mesh. Each part is a process of the real command on a host of its own: the
//! control plane with the certificate authority, an agent on the router, `web` and two endpoints of
//! `orders` with sidecars, and a client with a certificate but no sidecar.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use weft::demo::hosts::{Host, Network};

use crate::curl::{Curl, CurlResponse};
use crate::echo_flow::EchoFlow;
use crate::mesh_pki::{IdentityFiles, MeshPki, TRUST_DOMAIN, spiffe_id, text};
use crate::process::{run, weft};
use crate::role_process::{RoleProcess, on};
use crate::wait::{DEADLINE, eventually};

/// The port of the programs of `web` and `orders`.
const PROGRAM_PORT: u16 = 8080;
/// The TCP echo port of the programs; the next port echoes UDP. Traffic to them bypasses the
/// sidecars.
const ECHO_PORT: u16 = 7000;
/// A datagram size that needs three IP fragments.
const FRAGMENTED_BYTES: usize = 4000;
/// The numbers of the services in their virtual IPs.
const WEB: u8 = 1;
const ORDERS: u8 = 2;
const ECHO: u8 = 3;
const SINK: u8 = 4;
/// The TCP port at which tests listen themselves on the hosts of `orders`; the next port is for
/// UDP.
const SINK_PORT: u16 = 7100;

/// The address family of a mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeshIpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl MeshIpFamily {
    /// The range of the virtual IPs.
    #[must_use]
    pub fn service_range(self) -> &'static str {
        match self {
            Self::V4 => "10.96.0.0/16",
            Self::V6 => "fd96::/64",
        }
    }

    /// The virtual IP of the service with this number.
    fn service(self, number: u8) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(10, 96, 0, number).into(),
            Self::V6 => Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, number.into()).into(),
        }
    }

    fn of(self, host: &Host) -> IpAddr {
        match self {
            Self::V4 => host.address.into(),
            Self::V6 => host.address6.expect("the host has IPv6").into(),
        }
    }

    fn any(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// An endpoint of a service with its sidecar.
#[derive(Debug)]
pub struct MeshWorkload {
    /// The host of both.
    pub host: Host,
    /// The sidecar.
    pub sidecar: RoleProcess,
    /// The application behind it, which also serves the echo ports.
    pub program: RoleProcess,
}

/// The options of a mesh.
#[derive(Debug, Clone, Copy)]
pub struct TestMeshOptions<'o> {
    /// The address family.
    pub family: MeshIpFamily,
    /// The number of endpoints of `orders`.
    pub replicas: usize,
    /// Further arguments of the control plane.
    pub control_arguments: &'o [&'o str],
    /// Further arguments of the agent.
    pub agent_arguments: &'o [&'o str],
    /// Further arguments of each sidecar.
    pub sidecar_arguments: &'o [&'o str],
}

impl Default for TestMeshOptions<'_> {
    fn default() -> Self {
        Self {
            family: MeshIpFamily::V4,
            replicas: 2,
            control_arguments: &[],
            agent_arguments: &[],
            sidecar_arguments: &[],
        }
    }
}

/// A running mesh. All processes stop when the value is dropped.
#[derive(Debug)]
pub struct TestMesh {
    /// The control plane with the certificate authority.
    pub control: RoleProcess,
    /// The agent, on the router between the hosts.
    pub agent: RoleProcess,
    /// A service that calls `orders` when it gets a request for `/orders`.
    pub web: MeshWorkload,
    /// The endpoints of `orders`.
    pub orders: Vec<MeshWorkload>,
    /// The host of the client.
    pub client: Host,
    /// The client's certificate.
    pub identity: IdentityFiles,
    joining: JoinParameters,
    network: Network,
    file: Value,
}

/// The parameters with which a workload joins the mesh.
#[derive(Debug)]
struct JoinParameters {
    family: MeshIpFamily,
    control: String,
    pki: MeshPki,
}

impl TestMesh {
    /// Starts an IPv4 mesh.
    ///
    /// # Panics
    /// If a part of the mesh does not become ready.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in_family(MeshIpFamily::V4)
    }

    /// Starts a mesh of one address family.
    ///
    /// # Panics
    /// If a part of the mesh does not become ready.
    #[must_use]
    pub fn start_in_family(family: MeshIpFamily) -> Self {
        Self::start_with_agent_arguments(family, &[])
    }

    /// Starts a mesh with further arguments of the agent.
    ///
    /// # Panics
    /// If a part of the mesh does not become ready.
    #[must_use]
    pub fn start_with_agent_arguments(family: MeshIpFamily, agent_arguments: &[&str]) -> Self {
        Self::start_with_options(TestMeshOptions {
            family,
            agent_arguments,
            ..TestMeshOptions::default()
        })
    }

    /// Starts a mesh with further arguments of the control plane.
    ///
    /// # Panics
    /// If a part of the mesh does not become ready.
    #[must_use]
    pub fn start_with_control_arguments(control_arguments: &[&str]) -> Self {
        Self::start_with_options(TestMeshOptions {
            control_arguments,
            ..TestMeshOptions::default()
        })
    }

    /// Starts a mesh with these options.
    ///
    /// # Panics
    /// If a part of the mesh does not become ready.
    #[must_use]
    pub fn start_with_options(options: TestMeshOptions<'_>) -> Self {
        let TestMeshOptions { family, sidecar_arguments, .. } = options;
        let mut network = Network::new().expect("a test has a network namespace of its own");
        let mut host = |name: &str| network.host(name).expect("hosts can be created");
        let (control_host, client, web) = (host("control"), host("client"), host("web"));
        let replicas = (1..=options.replicas).map(|number| host(&format!("orders-{number}")));
        let replicas: Vec<Host> = replicas.collect();

        let pki = MeshPki::create();
        let identity = pki.issue("client");
        pki.join_token("agent", &format!("spiffe://{TRUST_DOMAIN}/ns/weft/sa/agent"));
        pki.join_token("web", &spiffe_id("web"));
        for replica in &replicas {
            pki.join_token(&replica.name, &spiffe_id("orders"));
        }
        let file = mesh_file(family, &web, &replicas);
        write_mesh(&pki, &file);

        let (mesh, state) = (pki.path("mesh.yaml"), pki.path("state"));
        let arguments = ["control", "--config", text(&mesh), "--state", text(&state)];
        let arguments = [&arguments, options.control_arguments].concat();
        let control = RoleProcess::start("control", Some(&control_host), &arguments);
        control.wait_until_ready();

        let address = SocketAddr::new(family.of(&control_host), 15010).to_string();
        let joining = JoinParameters { family, control: address, pki };
        joining.redirect(None);
        let arguments = [&["agent"], options.agent_arguments].concat();
        let agent = joining.role("agent", None, "agent", &arguments);
        let web = joining.workload(web, "web", sidecar_arguments);
        let orders = replicas.into_iter();
        let orders = orders.map(|host| joining.workload(host, "orders", sidecar_arguments));
        let orders = orders.collect();
        let mesh = Self { control, agent, web, orders, client, identity, joining, network, file };
        mesh.roles().for_each(RoleProcess::wait_until_ready);
        mesh
    }

    fn roles(&self) -> impl Iterator<Item = &RoleProcess> {
        let sidecars = [&self.web].into_iter().chain(&self.orders).map(|one| &one.sidecar);
        [&self.control, &self.agent].into_iter().chain(sidecars)
    }

    /// The host of the control plane.
    ///
    /// # Panics
    /// Never: the control plane has a host of its own.
    #[must_use]
    pub fn control_host(&self) -> &Host {
        self.control.host().expect("the control plane has a host")
    }

    /// Creates a further host.
    ///
    /// # Panics
    /// If it cannot be created.
    pub fn host(&mut self, name: &str) -> Host {
        self.network.host(name).expect("hosts can be created")
    }

    /// Starts a role on a host, with the join token file of name `token`.
    #[must_use]
    pub fn join(&self, name: &str, host: &Host, token: &str, arguments: &[&str]) -> RoleProcess {
        self.joining.role(name, Some(host), token, arguments)
    }

    /// Changes `mesh.yaml`. The file is replaced atomically.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn change(&mut self, change: impl FnOnce(&mut Value)) {
        change(&mut self.file);
        write_mesh(&self.joining.pki, &self.file);
    }

    /// Sends a request from the client through the agent to `web`, which calls `orders`.
    #[must_use]
    pub fn ask(&self) -> CurlResponse {
        let web = self.web_at(80);
        let identity = [
            "--insecure",
            "--cert",
            text(&self.identity.certificate),
            "--key",
            text(&self.identity.key),
        ];
        let curl = Curl::to(format!("https://{web}/orders")).with(&identity);
        on(Some(&self.client), || curl.run())
    }

    /// Sends a request from the program of `web` through its sidecar to `orders`.
    #[must_use]
    pub fn ask_orders(&self) -> CurlResponse {
        let orders = self.orders_at(80);
        on(Some(&self.web.host), || Curl::to(format!("http://{orders}/orders")).run())
    }

    /// Opens a TCP connection to the echo service, through the agent; returns it with the name of
    /// the endpoint.
    #[must_use]
    pub fn open_flow(&self) -> Option<(EchoFlow, String)> {
        let echo = self.echo();
        let stream = on(Some(&self.client), || TcpStream::connect_timeout(&echo, DEADLINE)).ok()?;
        stream.set_read_timeout(Some(DEADLINE)).ok()?;
        let mut flow = EchoFlow::new(stream);
        let replica = flow.read_endpoint_name()?;
        Some((flow, replica))
    }

    /// Sends datagrams to the echo service, through the agent, until one is answered; returns the
    /// name of the endpoint. Each datagram is larger than the MTU, so it is fragmented.
    ///
    /// # Panics
    /// If no datagram is answered before the deadline.
    #[must_use]
    pub fn send_datagram(&self) -> String {
        let family = self.joining.family;
        let echo = SocketAddr::new(family.service(ECHO), ECHO_PORT + 1);
        let socket = on(Some(&self.client), || UdpSocket::bind((family.any(), 0)));
        let socket = socket.expect("a port is free");
        socket.set_read_timeout(Some(Duration::from_millis(500))).expect("the timeout is not zero");
        eventually("a datagram is answered", || {
            socket.send_to(&[b'?'; FRAGMENTED_BYTES], echo).ok()?;
            let mut answer = [0; 64];
            let (bytes, from) = socket.recv_from(&mut answer).ok()?;
            assert_eq!(from, echo, "the reply comes from the address of the service");
            Some(String::from_utf8_lossy(answer.get(..bytes)?).into_owned())
        })
    }

    /// The path of a file in the folder of the mesh.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.joining.pki.path(name)
    }

    /// An address of the service `web`.
    #[must_use]
    pub fn web_at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.joining.family.service(WEB), port)
    }

    /// An address of the service `orders`.
    #[must_use]
    pub fn orders_at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.joining.family.service(ORDERS), port)
    }

    /// The TCP address of the echo service; the next port is for UDP.
    #[must_use]
    pub fn echo(&self) -> SocketAddr {
        SocketAddr::new(self.joining.family.service(ECHO), ECHO_PORT)
    }

    /// The TCP address of the service `sink`, whose endpoints are sockets of the test; the next
    /// port is for UDP.
    #[must_use]
    pub fn sink(&self) -> SocketAddr {
        SocketAddr::new(self.joining.family.service(SINK), SINK_PORT)
    }

    /// The TCP address of the `sink` endpoint on a host of `orders`.
    ///
    /// # Panics
    /// If `orders` has fewer hosts.
    #[must_use]
    pub fn sink_endpoint(&self, number: usize) -> SocketAddr {
        let host = &self.orders.get(number).expect("`orders` has that many hosts").host;
        SocketAddr::new(self.joining.family.of(host), SINK_PORT)
    }

    /// Sets on which hosts of `orders` the service `sink` has endpoints.
    ///
    /// # Panics
    /// If `orders` has fewer hosts.
    pub fn change_sink(&mut self, numbers: &[usize]) {
        let endpoints: Vec<Value> =
            numbers.iter().map(|n| json!({"address": self.sink_endpoint(*n).ip()})).collect();
        self.change(|mesh| {
            let sink = mesh.pointer_mut("/services/3/endpoints").expect("the file has the service");
            *sink = endpoints.into();
        });
    }

    /// Runs `work` on a host, or on the router without a host.
    pub fn on<T: Send>(&self, host: Option<&Host>, work: impl FnOnce() -> T + Send) -> T {
        on(host, work)
    }

    /// Checks that every role runs, that none has panicked, and that traffic of every kind flows.
    ///
    /// # Panics
    /// If one of these checks fails.
    #[track_caller]
    pub fn assert_healthy(&mut self) {
        let sidecars = [&mut self.web].into_iter().chain(&mut self.orders).map(|w| &mut w.sidecar);
        for role in [&mut self.control, &mut self.agent].into_iter().chain(sidecars) {
            let process = &mut role.process;
            assert!(process.is_running(), "{process:?} has ended");
            assert!(!process.errors().contains("panicked"), "{process:?} panicked");
        }
        self.assert_traffic_flows();
    }

    /// Checks that HTTP requests, TCP connections and datagrams are served.
    ///
    /// # Panics
    /// If one is not served.
    #[track_caller]
    pub fn assert_traffic_flows(&self) {
        let answer = self.ask();
        assert_eq!(answer.status, 200, "{answer:?}");
        let (mut flow, replica) =
            self.open_flow().expect("the echo service accepts the connection");
        assert_eq!(flow.send_line("ping"), Some(replica), "the connection keeps its endpoint");
        assert!(self.send_datagram().starts_with("orders-"));
    }
}

impl JoinParameters {
    /// Installs the rules that redirect a workload's traffic to its sidecar, or a router's to the
    /// agent.
    fn redirect(&self, host: Option<&Host>) {
        let mut command = weft();
        command.args(["redirect", "apply", "--services", self.family.service_range()]);
        let excluded = [ECHO_PORT, ECHO_PORT + 1, SINK_PORT, SINK_PORT + 1];
        let excluded = excluded.map(|port| port.to_string()).join(",");
        match host {
            Some(host) => command
                .args(["--inbound", "15006", "--outbound", "15001"])
                .args(["--exclude-inbound-ports", &excluded, "--netns"])
                .arg(host.namespace()),
            None => command.args(["--forwarded", "15001", "--udp", "15099"]),
        };
        run(&mut command);
    }

    /// Starts a role with the join token file of name `token`, and a state folder of its own.
    fn role(
        &self,
        name: &str,
        host: Option<&Host>,
        token: &str,
        arguments: &[&str],
    ) -> RoleProcess {
        let (root, state) = (self.pki.root(), self.pki.path(&format!("{name}-state")));
        let token = self.pki.path(token).with_extension("token");
        let joined = ["--control", &self.control, "--trust", text(&root), "--workers", "2"];
        let own = ["--join-token-file", text(&token), "--state", text(&state)];
        RoleProcess::start(name, host, &[arguments, &joined, &own].concat())
    }

    fn workload(&self, host: Host, service: &str, arguments: &[&str]) -> MeshWorkload {
        let orders = SocketAddr::new(self.family.service(ORDERS), 80).to_string();
        let mut command = vec!["demo-service", "--name", service, "--replica", &host.name];
        if service == "web" {
            command.extend(["--asks", &orders]);
        }
        let program = RoleProcess::start(&format!("{}-program", host.name), Some(&host), &command);
        self.redirect(Some(&host));
        let arguments = [&["sidecar", "--service", service], arguments].concat();
        let sidecar = self.role(&host.name, Some(&host), &host.name, &arguments);
        MeshWorkload { host, sidecar, program }
    }
}

fn mesh_file(family: MeshIpFamily, web: &Host, orders: &[Host]) -> Value {
    let replica = |host: &Host| json!({"address": family.of(host)});
    let replicas: Vec<Value> = orders.iter().map(replica).collect();
    let http = json!([{"port": 80, "target": PROGRAM_PORT, "protocol": "http"}]);
    json!({
        "trust_domain": TRUST_DOMAIN,
        "service_ranges": [family.service_range()],
        "services": [
            {"name": "web", "addresses": [family.service(WEB)], "ports": http,
             "endpoints": [replica(web)]},
            {"name": "orders", "addresses": [family.service(ORDERS)], "ports": http,
             "endpoints": replicas},
            {"name": "echo", "addresses": [family.service(ECHO)], "meshed": false,
             "ports": [{"port": ECHO_PORT, "protocol": "tcp"},
                       {"port": ECHO_PORT + 1, "protocol": "udp"}],
             "endpoints": replicas},
            {"name": "sink", "addresses": [family.service(SINK)], "meshed": false,
             "ports": [{"port": SINK_PORT, "protocol": "tcp"},
                       {"port": SINK_PORT + 1, "protocol": "udp"}],
             "endpoints": replicas},
        ],
        "security": {"revocations": [], "policies": [
            {"service": "web", "allow": [{"from": [spiffe_id("client")], "methods": ["GET"]}]},
            {"service": "orders", "allow": [{"from": ["web"], "methods": ["GET"]}]},
        ]},
    })
}

fn write_mesh(pki: &MeshPki, file: &Value) {
    let part = pki.path("mesh.part");
    std::fs::write(&part, format!("{file:#}")).expect("the folder is writable");
    std::fs::rename(part, pki.path("mesh.yaml")).expect("a file can be renamed");
}
