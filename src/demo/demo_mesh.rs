//! The running demo mesh: its hosts, its processes and its client.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;
use weft_agent::redirect::{self, DesiredRedirects, RedirectBackend, RedirectError, RedirectState};

use super::files::{ClientCertificate, DemoFiles, DemoMeshFile};
use super::hosts::{Host, Network};
use super::output::line;
use super::roles::{DemoRole, Roles};
use super::service::{DIRECT_PORT, ECHO_PORT};
use super::wait::wait;
use crate::client::{HttpResponse, get};
use crate::redirects::parse;

/// The running demo mesh.
pub(super) struct DemoMesh {
    pub(super) files: DemoFiles,
    pub(super) control_host: Host,
    pub(super) client_host: Host,
    pub(super) web: Host,
    pub(super) orders: Vec<Host>,
    pub(super) control: DemoRole,
    pub(super) others: Vec<DemoRole>,
    pub(super) client: ClientCertificate,
    pub(super) revoked_client: ClientCertificate,
    /// The redirects that the agent maintains, on every host.
    pub(super) redirects: Vec<DesiredRedirects>,
}

impl DemoMesh {
    /// Creates every host, starts every process and waits until all are ready.
    pub(super) fn start(backend: RedirectBackend, path: &str) -> Result<Self, String> {
        let folder = Path::new("/run/weft");
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("{}: {error}", folder.display()))?;
        let mut network = Network::new()?;
        let control_host = network.host("control")?;
        let client_host = network.host("client")?;
        let web = network.host("web")?;
        let orders =
            (1..=3).map(|n| network.host(&format!("orders-{n}"))).collect::<Result<Vec<_>, _>>()?;

        let files = DemoFiles::make(folder)?;
        let client = files.client_certificate()?;
        let revoked_client = files.client_certificate()?;
        let agent_token = files.join_token("agent", None)?;
        let mut tokens = vec![files.join_token("web", Some("web"))?];
        for host in &orders {
            tokens.push(files.join_token(&host.name, Some("orders"))?);
        }
        files.write_mesh(&mesh(&web, &orders, &orders))?;

        let roles = Roles::new(&folder.join("logs"))?;
        let state = files.path("authority");
        let mut control = roles.start(
            "control",
            Some(&control_host),
            &["control", "-c", &files.path("mesh.yaml"), "--state", &state],
        )?;
        control.ready(&control_host)?;

        let address = format!("{}:15010", control_host.address);
        let trust = files.path("root.pem");
        let joined =
            ["--control", &address, "--trust", &trust, "--workers", "1", "--join-token-file"];
        let mut others = Vec::new();
        let (redirects, text) = redirects(&web, &orders, backend)?;
        let file = files.write("redirects.yaml", &text)?;
        let agent_arguments = ["agent", "--path", path, "--redirects", &file];
        let mut agent = roles.start(
            "agent",
            None,
            &[&agent_arguments, &joined[..], &[&agent_token]].concat(),
        )?;
        // The rules must be installed before any connection: conntrack could treat an older connection as new.
        let in_force = redirects.iter().try_for_each(await_redirect);
        in_force.map_err(|reason| format!("{reason}; log of the agent:\n{}", agent.tail()))?;
        for (host, token) in [&web].into_iter().chain(&orders).zip(&tokens) {
            let service = if host.name == "web" { "web" } else { "orders" };
            let name = format!("{}-service", host.name);
            let asks: &[&str] = if service == "web" { &["--asks", "10.96.0.2:80"] } else { &[] };
            let arguments =
                [&["demo-service", "--name", service, "--replica", &host.name], asks].concat();
            others.push(roles.start(&name, Some(host), &arguments)?);
            let arguments = [&["sidecar"], &joined[..], &[token], &["--service", service]].concat();
            others.push(roles.start(&host.name, Some(host), &arguments)?);
        }
        agent.ready_on_router()?;
        others.push(agent);
        for (host, sidecar) in
            [&web].into_iter().chain(&orders).zip(others.iter_mut().skip(1).step_by(2))
        {
            sidecar.ready(host)?;
        }
        Ok(Self {
            files,
            control_host,
            client_host,
            web,
            orders,
            control,
            others,
            client,
            revoked_client,
            redirects,
        })
    }

    /// Prints the last lines of every log after a failure.
    pub(super) fn show_logs(&self) {
        for role in [&self.control].into_iter().chain(&self.others) {
            line(&format!("  {}:\n{}", role.name(), role.tail()));
        }
    }

    pub(super) fn tls(&self) -> Result<Arc<ClientConfig>, String> {
        self.files.tls(Some(&self.client))
    }

    /// Sends a request for `/orders` to `web`, with the client certificate.
    pub(super) fn ask(&self, token: Option<&str>) -> Result<HttpResponse, String> {
        let tls = self.tls()?;
        self.client_host.run(get(web_address(), Some(tls), "/orders", token))?
    }

    pub(super) fn mesh(&self) -> DemoMeshFile<'_> {
        mesh(&self.web, &self.orders, &self.orders)
    }

    /// Keeps the mesh running until the user stops it.
    pub(super) fn stay(&self) {
        let pid = std::fs::read_link("/proc/self")
            .map(|path| path.display().to_string())
            .unwrap_or_default();
        let enter = format!("nsenter -t {pid} -U -n -m --preserve-credentials");
        line(
            "\nthe mesh keeps running; Ctrl-C stops it and removes everything. Commands to try (as the same user):",
        );
        line(&format!(
            "  {enter} ip netns exec web curl -s http://10.96.0.2/orders          no token: 401"
        ));
        line(&format!(
            "  {enter} ip netns exec orders-1 curl -s http://127.0.0.1:15000/config_dump"
        ));
        line(&format!(
            "  {enter} curl -s http://127.0.0.1:15000/metrics                      metrics of the agent"
        ));
        line(&format!("  {enter} tail -f {}/logs/web.log", self.files.folder.display()));
        loop {
            std::thread::park();
        }
    }
}

fn mesh<'a>(web: &'a Host, orders: &'a [Host], echo: &'a [Host]) -> DemoMeshFile<'a> {
    DemoMeshFile {
        web,
        orders,
        echo: echo.iter().collect(),
        revocations: Vec::new(),
        caller: "web",
    }
}

/// Waits until the redirect rules are installed.
pub(super) fn await_redirect(desired: &DesiredRedirects) -> Result<(), String> {
    let text = |error: RedirectError| error.to_string();
    let backend = desired.backend.resolve().map_err(text)?;
    wait("the redirect rules are installed", || {
        let state = redirect::verify(&desired.redirect, backend, &desired.namespace);
        Ok(state.map_err(text)? == RedirectState::InSync)
    })
}

/// The redirects and their YAML text: on each workload host to the sidecar, on the router to the agent. The agent
/// maintains them.
fn redirects(
    web: &Host,
    orders: &[Host],
    backend: RedirectBackend,
) -> Result<(Vec<DesiredRedirects>, String), String> {
    let backend = match backend {
        RedirectBackend::Native => "native",
        RedirectBackend::Nft => "nft",
        RedirectBackend::Iptables => "iptables",
    };
    let common =
        format!("owner: weft-demo, backend: {backend}, services: [10.96.0.0/16, 'fd96::/64']");
    let mut text = format!("redirects:\n- {{{common}, forwarded: 15001, udp: 15099}}\n");
    for host in [web].into_iter().chain(orders) {
        let namespace = host.namespace();
        text += &format!(
            "- {{netns: {}, {common}, inbound: 15006, outbound: 15001, exclude_inbound_ports: [{ECHO_PORT}, {}, {DIRECT_PORT}]}}\n",
            namespace.display(),
            ECHO_PORT + 1
        );
    }
    let desired = parse(&text).map_err(|problems| format!("redirects.yaml: {problems:?}"))?;
    Ok((desired, text))
}

pub(super) fn web_address() -> SocketAddr {
    ([10, 96, 0, 1], 80).into()
}
