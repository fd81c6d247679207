//! The story: what a mesh does, a line a step, each checked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use weft_agent::redirect::{self, Backend, Namespace, Redirect};
use weft_model::Cidr;

use super::files::{ClientCertificate, Files, MeshFile};
use super::flows::{echo_flow, udp_flows};
use super::hosts::{Host, Network};
use super::load::{Load, usage};
use super::roles::{Role, Roles, now, pause};
use super::service::{DIRECT_PORT, ECHO_PORT};
use super::{line, mark};
use crate::client::{Answer, Caller, config_dump, get};

/// How long a change may take to arrive everywhere.
const CHANGE: Duration = Duration::from_secs(15);
/// The virtual address of the echo service.
const ECHO: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 3));
/// How many requests the table is made of.
const MEASURED: usize = 300;

/// The mesh while it runs.
struct Stage {
    files: Files,
    control_host: Host,
    client_host: Host,
    web: Host,
    orders: Vec<Host>,
    control: Role,
    others: Vec<Role>,
    client: ClientCertificate,
    leaver: ClientCertificate,
}

/// A role with its memory in KiB and its open files.
type Usage = (String, (u64, u64));

/// A step: what was found, or why it failed.
type Step = fn(&mut Stage) -> Result<String, String>;

/// Tells the story; the first step that fails ends it.
pub(super) fn tell(keep: bool, load: Option<Load>, backend: Backend) -> Result<(), String> {
    line("weft demo: a mesh of a control plane, an agent, web and three replicas of orders");
    let mut stage = Stage::set(backend)?;
    mark(true, "control plane, agent and four sidecars are ready, each on a host of its own");
    line(&format!("         redirects installed by {backend}"));
    let steps: [(&str, Step); 11] = [
        ("traffic flows, and each service sees who called it", Stage::traffic_flows),
        ("a client without a certificate is refused", Stage::no_certificate),
        ("a token is asked for: none 401, forged 401, good 200", Stage::tokens),
        ("orders is reached through its three replicas evenly", Stage::evenly),
        ("a flow stays on its endpoint while endpoints change", Stage::sticky_flow),
        ("UDP is balanced, and each flow keeps its endpoint", Stage::datagrams),
        ("IPv6 clients are served in the same way", Stage::ipv6),
        ("a bad mesh.yaml is rejected with the reason, the old one serves", Stage::bad_mesh),
        ("a revoked certificate is refused at the next handshake", Stage::revocation),
        ("control plane killed: traffic goes on", Stage::control_killed),
        ("how long requests take", Stage::measure),
    ];
    for (text, step) in steps {
        match step(&mut stage) {
            Ok(found) => {
                mark(true, text);
                found.lines().for_each(|detail| line(&format!("         {detail}")));
            }
            Err(reason) => {
                mark(false, text);
                stage.show_logs();
                return Err(reason);
            }
        }
    }
    line("every step as promised");
    if let Some(load) = load {
        let what = format!("{} requests a second for {} seconds", load.rate, load.seconds);
        match stage.carry_load(&load) {
            Ok(found) => {
                mark(true, &what);
                found.lines().for_each(|detail| line(&format!("         {detail}")));
            }
            Err(reason) => {
                mark(false, &what);
                return Err(reason);
            }
        }
    }
    if keep {
        stage.stay();
    }
    Ok(())
}

impl Stage {
    fn set(backend: Backend) -> Result<Self, String> {
        let folder = Path::new("/run/weft");
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("{}: {error}", folder.display()))?;
        let mut network = Network::new()?;
        let control_host = network.host("control")?;
        let client_host = network.host("client")?;
        let web = network.host("web")?;
        let orders =
            (1..=3).map(|n| network.host(&format!("orders-{n}"))).collect::<Result<Vec<_>, _>>()?;

        let files = Files::make(folder)?;
        let (client, leaver) = (files.client_certificate()?, files.client_certificate()?);
        let agent_token = files.join_token("agent", None)?;
        let mut tokens = vec![files.join_token("web", Some("web"))?];
        for host in &orders {
            tokens.push(files.join_token(&host.name, Some("orders"))?);
        }
        files.write_mesh(&mesh(&web, &orders, &orders))?;

        let roles = Roles::new(&folder.join("logs"))?;
        let (config, state) = (files.path("mesh.yaml"), files.path("authority"));
        let mut control = roles.start(
            "control",
            Some(&control_host),
            &["control", "-c", &config, "--state", &state],
        )?;
        control.ready(&control_host)?;

        let address = format!("{}:15010", control_host.address);
        let trust = files.path("root.pem");
        let joined =
            ["--control", &address, "--trust", &trust, "--workers", "1", "--join-token-file"];
        let mut others = Vec::new();
        capture(None, backend)?;
        let mut agent =
            roles.start("agent", None, &[&["agent"], &joined[..], &[&agent_token]].concat())?;
        for (host, token) in [&web].into_iter().chain(&orders).zip(&tokens) {
            let service = if host.name == "web" { "web" } else { "orders" };
            let name = format!("{}-service", host.name);
            let asks: &[&str] = if service == "web" { &["--asks", "10.96.0.2:80"] } else { &[] };
            let arguments =
                [&["demo-service", "--name", service, "--replica", &host.name], asks].concat();
            others.push(roles.start(&name, Some(host), &arguments)?);
            capture(Some(host), backend)?;
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
        Ok(Self { files, control_host, client_host, web, orders, control, others, client, leaver })
    }

    /// The last lines of every log, when something went wrong.
    fn show_logs(&self) {
        for role in [&self.control].into_iter().chain(&self.others) {
            line(&format!("  {}:\n{}", role.name(), role.tail()));
        }
    }

    fn tls(&self) -> Result<Arc<ClientConfig>, String> {
        self.files.tls(Some(&self.client))
    }

    /// Asks `web` for orders, with the client's certificate.
    fn ask(&self, token: Option<&str>) -> Result<Answer, String> {
        let tls = self.tls()?;
        self.client_host.run(get(web_address(), Some(tls), "/orders", token))?
    }

    fn mesh(&self) -> MeshFile<'_> {
        mesh(&self.web, &self.orders, &self.orders)
    }

    fn traffic_flows(&mut self) -> Result<String, String> {
        let answer = self.ask(Some(&self.files.token()?))?;
        expect(answer.status == 200, || format!("status {}: {}", answer.status, answer.body))?;
        let said: serde_json::Value =
            serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
        let peer = |said: &serde_json::Value| {
            said.get("peer").and_then(|p| p.as_str()).unwrap_or("nobody").to_owned()
        };
        let (caller, web) = (peer(&said), said.get("orders").map(peer).unwrap_or_default());
        expect(caller.ends_with("/sa/client"), || format!("web saw {caller}"))?;
        expect(web.ends_with("/sa/web"), || format!("orders saw {web}"))?;
        Ok(format!("web was called by {caller}\norders was called by {web}"))
    }

    fn no_certificate(&mut self) -> Result<String, String> {
        let tls = self.files.tls(None)?;
        match self.client_host.run(get(web_address(), Some(tls), "/orders", None))? {
            Err(reason) => Ok(format!("the handshake ended: {reason}")),
            Ok(answer) => Err(format!("it was answered with {}", answer.status)),
        }
    }

    fn tokens(&mut self) -> Result<String, String> {
        let forged = Files::forged_token()?;
        let good = self.files.token()?;
        for (token, expected) in
            [(None, 401), (Some(forged.as_str()), 401), (Some(good.as_str()), 200)]
        {
            let answer = self.ask(token)?;
            expect(answer.status == expected, || {
                format!("{} instead of {expected}: {}", answer.status, answer.body)
            })?;
        }
        Ok(String::new())
    }

    fn evenly(&mut self) -> Result<String, String> {
        let token = self.files.token()?;
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..30 {
            let answer = self.ask(Some(&token))?;
            let said: serde_json::Value =
                serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
            let replica = said
                .pointer("/orders/replica")
                .and_then(|r| r.as_str())
                .unwrap_or("none")
                .to_owned();
            *seen.entry(replica).or_default() += 1;
        }
        expect(seen.len() == 3 && seen.values().all(|count| *count == 10), || format!("{seen:?}"))?;
        Ok(format!("{seen:?}"))
    }

    fn sticky_flow(&mut self) -> Result<String, String> {
        let host = self.client_host.clone();
        let (mut flow, first) = host.on(|| echo_flow(ECHO))??;
        let leaving =
            self.orders.iter().find(|replica| replica.name != first).ok_or("no other replica")?;
        let staying: Vec<&Host> =
            self.orders.iter().filter(|replica| replica.name != leaving.name).collect();
        self.files.write_mesh(&MeshFile { echo: staying, ..self.mesh() })?;
        wait("the agent knows two endpoints", || {
            let dump = on_router(config_dump())??;
            let endpoints = dump.pointer("/endpoints/echo|7000/endpoints/0/lb_endpoints");
            Ok(endpoints.and_then(|list| list.as_array()).is_some_and(|list| list.len() == 2))
        })?;
        let same = flow.say("still there?")?;
        expect(same == first, || format!("it moved from {first} to {same}"))?;
        // What the agent has heard of reaches its workers a moment later.
        wait("12 new flows in a row go elsewhere", || {
            for _ in 0..12 {
                let (_, replica) = host.on(|| echo_flow(ECHO))??;
                if replica == leaving.name {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        let detail =
            format!("the flow stayed on {first}; {} left and gets no new flow", leaving.name);
        self.files.write_mesh(&self.mesh())?;
        Ok(detail)
    }

    fn datagrams(&mut self) -> Result<String, String> {
        wait("the agent knows three endpoints", || {
            let dump = on_router(config_dump())??;
            let endpoints = dump.pointer("/endpoints/echo|7001~1udp/endpoints/0/lb_endpoints");
            Ok(endpoints.and_then(|list| list.as_array()).is_some_and(|list| list.len() == 3))
        })?;
        let mut replicas = BTreeSet::new();
        wait("40 flows reach all three", || {
            replicas = self.client_host.run(udp_flows(ECHO, 40))??;
            Ok(replicas.len() == 3)
        })?;
        Ok(format!("40 flows over {replicas:?}"))
    }

    fn ipv6(&mut self) -> Result<String, String> {
        if self.client_host.address6.is_none() {
            return Ok("this host has no IPv6: not tried".into());
        }
        let token = self.files.token()?;
        let web = SocketAddr::from((Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1), 80));
        // Enough that both of web's addresses, one of either family, are chosen.
        for _ in 0..12 {
            let asking = get(web, Some(self.tls()?), "/orders", Some(&token));
            let answer = self.client_host.run(asking)??;
            expect(answer.status == 200, || format!("status {}: {}", answer.status, answer.body))?;
        }
        let echo = IpAddr::from(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 3));
        let (mut flow, first) = self.client_host.on(|| echo_flow(echo))??;
        let same = flow.say("still there?")?;
        expect(same == first, || format!("the flow moved from {first} to {same}"))?;
        let replicas = self.client_host.run(udp_flows(echo, 20))??;
        Ok(format!("12 requests, a TCP flow to {first}, 20 UDP flows over {replicas:?}"))
    }

    fn bad_mesh(&mut self) -> Result<String, String> {
        self.files.write_mesh(&MeshFile { caller: "wbe", ..self.mesh() })?;
        let mut reason = String::new();
        wait("the control plane rejects it", || {
            let dump = self.control_host.run(config_dump())??;
            let rejected = dump.pointer("/rejected/0").and_then(|r| r.as_str()).unwrap_or_default();
            rejected.clone_into(&mut reason);
            Ok(!reason.is_empty())
        })?;
        let answer = self.ask(Some(&self.files.token()?))?;
        expect(answer.status == 200, || format!("meanwhile traffic got {}", answer.status))?;
        self.files.write_mesh(&self.mesh())?;
        wait("the control plane takes the good one again", || {
            let dump = self.control_host.run(config_dump())??;
            Ok(dump.pointer("/rejected/0").is_none())
        })?;
        Ok(reason)
    }

    fn revocation(&mut self) -> Result<String, String> {
        let tls = self.files.tls(Some(&self.leaver))?;
        let before = self.client_host.run(get(web_address(), Some(tls.clone()), "/", None))??;
        expect(before.status == 200, || format!("before it was revoked it got {}", before.status))?;
        self.files.write_mesh(&MeshFile {
            revocations: vec![self.leaver.serial.clone()],
            ..self.mesh()
        })?;
        let mut reason = String::new();
        wait("the revoked certificate is refused", || {
            let outcome = self.client_host.run(get(web_address(), Some(tls.clone()), "/", None))?;
            if let Err(error) = &outcome {
                reason.clone_from(error);
            }
            Ok(outcome.is_err())
        })?;
        let other = self.ask(Some(&self.files.token()?))?;
        expect(other.status == 200, || format!("the other certificate got {}", other.status))?;
        Ok(format!("the handshake ended: {reason}"))
    }

    fn control_killed(&mut self) -> Result<String, String> {
        self.control.kill()?;
        let token = self.files.token()?;
        for _ in 0..20 {
            let answer = self.ask(Some(&token))?;
            expect(answer.status == 200, || format!("a request got {}", answer.status))?;
        }
        Ok("20 requests, each with a handshake of its own, were served".into())
    }

    fn measure(&mut self) -> Result<String, String> {
        let replica = self.orders.first().ok_or("no replica")?;
        let direct: SocketAddr = (replica.address, DIRECT_PORT).into();
        let token = self.files.token()?;
        let tls = self.tls()?;
        let direct = self.client_host.run(timed(direct, None, None))??;
        let through = self.client_host.run(timed(web_address(), Some(tls), Some(token)))??;
        let row = |name: &str, mut times: Vec<Duration>| {
            times.sort_unstable();
            let at = |part: usize| {
                times.get(times.len() * part / 100).copied().unwrap_or_default().as_secs_f64() * 1e3
            };
            format!("{name:32} {:>8} {:>8.2}ms {:>8.2}ms", times.len(), at(50), at(99))
        };
        Ok(format!(
            "{:32} {:>8} {:>10} {:>10}\n{}\n{}",
            "",
            "requests",
            "p50",
            "p99",
            row("direct: client -> orders", direct),
            row("mesh: client -> web -> orders", through)
        ))
    }

    /// Sends a steady load, and looks at memory and open files before and after.
    fn carry_load(&self, load: &Load) -> Result<String, String> {
        let look = || -> Result<Vec<Usage>, String> {
            let mut all = vec![("agent".to_owned(), on_router(usage())??)];
            for host in [&self.web].into_iter().chain(&self.orders) {
                all.push((host.name.clone(), host.run(usage())??));
            }
            Ok(all)
        };
        let (tls, token) = (self.tls()?, self.files.token()?);
        let short = Load { seconds: 2, ..*load };
        self.client_host.run(short.send(web_address(), tls.clone(), &token))??;
        let before = look()?;
        let sent = self.client_host.run(load.send(web_address(), tls, &token))??;
        let after = look()?;
        expect(sent.errors.is_empty(), || {
            format!("{} errors, such as {:?}", sent.errors.len(), sent.errors.first())
        })?;
        let mut found = format!(
            "{} requests, 0 errors, p50 {:.2}ms, p99 {:.2}ms",
            sent.times.len(),
            sent.at(50),
            sent.at(99)
        );
        for ((name, old), (_, new)) in before.iter().zip(&after) {
            found += &format!(
                "\n{name:9} {} -> {} KiB, {} -> {} open files",
                old.0, new.0, old.1, new.1
            );
        }
        Ok(found)
    }

    /// Leaves the mesh running until the user ends it.
    fn stay(&self) {
        let pid = std::fs::read_link("/proc/self")
            .map(|path| path.display().to_string())
            .unwrap_or_default();
        let enter = format!("nsenter -t {pid} -U -n -m --preserve-credentials");
        line(
            "\nthe mesh runs on; Ctrl-C ends it and removes everything. To try (as the same user):",
        );
        line(&format!(
            "  {enter} ip netns exec web curl -s http://10.96.0.2/orders          no token: 401"
        ));
        line(&format!(
            "  {enter} ip netns exec orders-1 curl -s http://127.0.0.1:15000/config_dump"
        ));
        line(&format!(
            "  {enter} curl -s http://127.0.0.1:15000/metrics                      the agent's"
        ));
        line(&format!("  {enter} tail -f {}/logs/web.log", self.files.folder.display()));
        loop {
            std::thread::park();
        }
    }
}

fn mesh<'a>(web: &'a Host, orders: &'a [Host], echo: &'a [Host]) -> MeshFile<'a> {
    MeshFile { web, orders, echo: echo.iter().collect(), revocations: Vec::new(), caller: "web" }
}

/// Installs the redirect of a workload, or of the router where the agent is.
fn capture(host: Option<&Host>, backend: Backend) -> Result<(), String> {
    let services: Result<_, _> =
        ["10.96.0.0/16", "fd96::/64"].map(Cidr::parse).into_iter().collect();
    let services = services.map_err(|error| error.to_string())?;
    let wanted = Redirect {
        owner: "weft-demo".into(),
        inbound: host.map(|_| 15006),
        outbound: host.map(|_| 15001),
        forwarded: host.is_none().then_some(15001),
        udp: host.is_none().then_some(15099),
        services,
        exclude_inbound_ports: vec![ECHO_PORT, ECHO_PORT + 1, DIRECT_PORT],
        exclude_outbound_ports: Vec::new(),
        exclude_destinations: Vec::new(),
        mark: weft_runtime::socket::Mark::DEFAULT.0,
        uid: None,
    };
    let namespace = host.map_or(Namespace::Own, |host| Namespace::At(host.namespace()));
    redirect::apply(&wanted, backend, &namespace).map_err(|error| error.to_string())
}

fn web_address() -> SocketAddr {
    ([10, 96, 0, 1], 80).into()
}

fn expect(good: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if good { Ok(()) } else { Err(otherwise()) }
}

/// Looks until it is so, not longer than a change may take.
fn wait(what: &str, mut is_so: impl FnMut() -> Result<bool, String>) -> Result<(), String> {
    let deadline = now() + CHANGE;
    while !is_so()? {
        expect(now() < deadline, || {
            format!("within {CHANGE:?} it did not come to pass that {what}")
        })?;
        pause(Duration::from_millis(50));
    }
    Ok(())
}

fn on_router<T>(work: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map(|runtime| runtime.block_on(work)).map_err(|error| error.to_string())
}

/// How long each of some requests took, over one connection.
async fn timed(
    target: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
    token: Option<String>,
) -> Result<Vec<Duration>, String> {
    let mut caller = Caller::connect(target, tls).await?;
    let mut times = Vec::new();
    for _ in 0..MEASURED {
        let started = now();
        let answer = caller.get("/orders", token.as_deref()).await?;
        expect(answer.status == 200, || format!("a measured request got {}", answer.status))?;
        times.push(now() - started);
    }
    Ok(times)
}
