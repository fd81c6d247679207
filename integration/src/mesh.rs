//! Starts a complete mesh. Each part is a process of the real command on a host of its own: the
//! control plane with the certificate authority, an agent on the router, `web` and two endpoints of
//! `orders` with sidecars, and a client with a certificate but no sidecar.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use weft::demo::hosts::{Host, Network};

use crate::curl::{Curl, CurlResponse};
use crate::echo_flow::EchoFlow;
use crate::mesh_file::{ECHO, ECHO_PORT, ORDERS, SINK, SINK_PORT, TestMeshFile, WEB};
use crate::mesh_pki::{IdentityFiles, MeshPki, TRUST_DOMAIN, spiffe_id, text};
use crate::process::{run, weft};
use crate::role_process::{RoleProcess, on};
use crate::wait::{DEADLINE, eventually};

pub use crate::mesh_file::MeshIpFamily;

/// A datagram size that needs three IP fragments.
const FRAGMENTED_BYTES: usize = 4000;

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
    file: TestMeshFile,
}

/// The parameters with which a workload joins the mesh.
#[derive(Debug)]
struct JoinParameters {
    family: MeshIpFamily,
    control: String,
    pki: MeshPki,
}

/// The configuration of a mesh; [`start`](Self::start) runs it. By default an IPv4 mesh with two endpoints of `orders`.
#[derive(Debug, Clone, Copy)]
pub struct TestMeshBuilder<'o> {
    family: MeshIpFamily,
    endpoints: usize,
    control_arguments: &'o [&'o str],
    agent_arguments: &'o [&'o str],
    sidecar_arguments: &'o [&'o str],
}

impl<'o> TestMeshBuilder<'o> {
    /// Sets the address family.
    #[must_use]
    pub fn family(self, family: MeshIpFamily) -> Self {
        Self { family, ..self }
    }

    /// Sets the number of endpoints of `orders`.
    #[must_use]
    pub fn endpoints(self, endpoints: usize) -> Self {
        Self { endpoints, ..self }
    }

    /// Sets further arguments of the control plane.
    #[must_use]
    pub fn control_arguments(self, control_arguments: &'o [&'o str]) -> Self {
        Self { control_arguments, ..self }
    }

    /// Sets further arguments of the agent.
    #[must_use]
    pub fn agent_arguments(self, agent_arguments: &'o [&'o str]) -> Self {
        Self { agent_arguments, ..self }
    }

    /// Sets further arguments of each sidecar.
    #[must_use]
    pub fn sidecar_arguments(self, sidecar_arguments: &'o [&'o str]) -> Self {
        Self { sidecar_arguments, ..self }
    }

    /// Starts the mesh, and waits until its roles are ready.
    ///
    /// # Panics
    /// If a part of the mesh does not become ready.
    #[must_use]
    pub fn start(self) -> TestMesh {
        let Self { family, sidecar_arguments, .. } = self;
        let mut network = Network::new().expect("a test has a network namespace of its own");
        let mut host = |name: &str| network.host(name).expect("hosts can be created");
        let control_host = host("control");
        let client = host("client");
        let web = host("web");
        let replicas = (1..=self.endpoints).map(|number| host(&format!("orders-{number}")));
        let replicas: Vec<Host> = replicas.collect();

        let pki = MeshPki::create();
        let identity = pki.issue("client");
        pki.join_token("agent", &format!("spiffe://{TRUST_DOMAIN}/ns/weft/sa/agent"));
        pki.join_token("web", &spiffe_id("web"));
        for replica in &replicas {
            pki.join_token(&replica.name, &spiffe_id("orders"));
        }
        let orders: Vec<IpAddr> = replicas.iter().map(|host| family.of(host)).collect();
        let file = TestMeshFile::new(family, family.of(&web), &orders);
        file.write(&pki);

        let mesh = pki.path("mesh.yaml");
        let state = pki.path("state");
        let arguments = ["control", "--config", text(&mesh), "--state", text(&state)];
        let arguments = [&arguments, self.control_arguments].concat();
        let control = RoleProcess::start("control", Some(&control_host), &arguments);
        control.wait_until_ready();

        let address = SocketAddr::new(family.of(&control_host), 15010).to_string();
        let joining = JoinParameters { family, control: address, pki };
        joining.redirect(None);
        let arguments = [&["agent"], self.agent_arguments].concat();
        let agent = joining.role("agent", None, "agent", &arguments);
        let web = joining.workload(web, "web", sidecar_arguments);
        let orders = replicas.into_iter();
        let orders = orders.map(|host| joining.workload(host, "orders", sidecar_arguments));
        let orders = orders.collect();
        let mesh =
            TestMesh { control, agent, web, orders, client, identity, joining, network, file };
        mesh.roles().for_each(RoleProcess::wait_until_ready);
        mesh
    }
}

impl TestMesh {
    /// The configuration of a mesh, to be started.
    #[must_use]
    pub fn builder<'o>() -> TestMeshBuilder<'o> {
        TestMeshBuilder {
            family: MeshIpFamily::V4,
            endpoints: 2,
            control_arguments: &[],
            agent_arguments: &[],
            sidecar_arguments: &[],
        }
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
    pub fn change(&mut self, change: impl FnOnce(&mut TestMeshFile)) {
        change(&mut self.file);
        self.file.write(&self.joining.pki);
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
        let endpoints: Vec<IpAddr> = numbers.iter().map(|n| self.sink_endpoint(*n).ip()).collect();
        self.change(|file| file.service("sink").set_endpoints(&endpoints));
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
        let root = self.pki.root();
        let state = self.pki.path(&format!("{name}-state"));
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
